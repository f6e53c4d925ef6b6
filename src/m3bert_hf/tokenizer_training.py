"""Training of a multilingual Unigram tokenizer with byte fallback and the special tokens of XLM-R."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
_MASK_TOKEN = "<mask>"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, nfkc: bool = True, model_max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Train a Unigram tokenizer in which no text is unknown.

    Ids follow XLM-R: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3 first and `<mask>` last; the 256 byte tokens come after
    the first four (Kudo 2018, arXiv 1804.10959, for the Unigram model; SentencePiece for byte fallback).

    Args:
        texts: Training texts; balance languages before (see `sample_balanced`).
        vocab_size: Size of the vocabulary, special and byte tokens included.
        nfkc: Whether to normalise text to NFKC.
        model_max_length: Longest input in tokens that the tokenizer announces.

    Raises:
        ValueError: If `vocab_size` leaves no room beside special and byte tokens, or there is no text.
    """
    reserved = len(_SPECIAL_TOKENS) + len(_BYTE_TOKENS) + 1
    if vocab_size <= reserved:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for words: {reserved} tokens are reserved.")
    normalizer = normalizers.Sequence(
        ([normalizers.NFKC()] if nfkc else []) + [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(_BYTE_TOKENS) - 1,
        special_tokens=_SPECIAL_TOKENS,
        unk_token="<unk>",
        show_progress=True,
    )
    trained.train_from_iterator(texts, trainer)
    learned = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    if len(learned) <= len(_SPECIAL_TOKENS):
        raise ValueError("The texts are empty: a tokenizer needs text to be trained on.")
    # The trainer cannot reserve byte tokens. They get the worst score, so that no lattice ever prefers them.
    worst = min(score for _, score in learned)
    vocabulary = [(token, 0.0) for token in _SPECIAL_TOKENS]
    vocabulary += [(token, worst) for token in _BYTE_TOKENS]
    taken = {token for token, _ in vocabulary}
    vocabulary += [(piece, score) for piece, score in learned if piece not in taken and piece != _MASK_TOKEN]
    vocabulary.append((_MASK_TOKEN, 0.0))

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=_SPECIAL_TOKENS.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"],
        pair=["<s>", "$A", "</s>", "</s>", "$B", "</s>"],
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=_MASK_TOKEN,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


__all__ = ["train_tokenizer"]
