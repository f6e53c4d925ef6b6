"""Training of a multilingual Unigram or BPE tokenizer with byte fallback and the special tokens of XLM-R."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
_MASK_TOKEN = "<mask>"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    nfkc: bool = True,
    model_max_length: int = 512,
    model: str = "unigram",
    lowercase: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer in which no text is unknown.

    Ids follow XLM-R: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3 first and `<mask>` last; the 256 byte tokens come after
    the first four (Unigram: Kudo 2018, arXiv 1804.10959; BPE: Sennrich et al. 2016, arXiv 1508.07909; byte fallback:
    SentencePiece).

    Args:
        texts: Training texts; balance languages before (see `sample_balanced`).
        vocab_size: Size of the vocabulary, special and byte tokens included.
        nfkc: Whether to normalise text to NFKC.
        model_max_length: Longest input in tokens that the tokenizer announces.
        model: `"unigram"` or `"bpe"`.
        lowercase: Whether to lowercase text: a small vocabulary then spends no entry twice, and a query matches a
            document however either is capitalised, by Unicode's rules (which do not join Turkish İ and i, or ß and
            SS). The case is lost to tasks that need it, such as named entities.

    Raises:
        ValueError: If the model is neither, `vocab_size` leaves no room beside special and byte tokens, or there is
            no text.
    """
    if model not in ("unigram", "bpe"):
        raise ValueError(f"model must be 'unigram' or 'bpe', got {model!r}.")
    reserved = len(_SPECIAL_TOKENS) + len(_BYTE_TOKENS) + 1
    if vocab_size <= reserved:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for words: {reserved} tokens are reserved.")
    normalizer = normalizers.Sequence(
        ([normalizers.NFKC()] if nfkc else [])
        + ([normalizers.Lowercase()] if lowercase else [])
        + [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    train = _train_unigram if model == "unigram" else _train_bpe
    tokenizer = Tokenizer(train(texts, vocab_size, normalizer, pre_tokenizer))
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


def _learn(trained: Tokenizer, trainer, texts, normalizer, pre_tokenizer) -> dict[str, Any]:
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizer
    trained.train_from_iterator(texts, trainer)
    learned = json.loads(trained.to_str())["model"]
    if not learned["merges"] if "merges" in learned else len(learned["vocab"]) <= len(_SPECIAL_TOKENS):
        raise ValueError("The texts are empty: a tokenizer needs text to be trained on.")
    return learned


def _train_unigram(texts, vocab_size: int, normalizer, pre_tokenizer) -> models.Unigram:
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(_BYTE_TOKENS) - 1,
        special_tokens=_SPECIAL_TOKENS,
        unk_token="<unk>",
        show_progress=True,
    )
    learned = _learn(Tokenizer(models.Unigram()), trainer, texts, normalizer, pre_tokenizer)["vocab"]
    # The trainer cannot reserve byte tokens. They get the worst score, so that no lattice ever prefers them.
    worst = min(score for _, score in learned)
    vocabulary = [(token, 0.0) for token in _SPECIAL_TOKENS]
    vocabulary += [(token, worst) for token in _BYTE_TOKENS]
    taken = {token for token, _ in vocabulary}
    vocabulary += [(piece, score) for piece, score in learned if piece not in taken and piece != _MASK_TOKEN]
    vocabulary.append((_MASK_TOKEN, 0.0))
    return models.Unigram(vocabulary, unk_id=_SPECIAL_TOKENS.index("<unk>"), byte_fallback=True)


def _train_bpe(texts, vocab_size: int, normalizer, pre_tokenizer) -> models.BPE:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=_SPECIAL_TOKENS + _BYTE_TOKENS,
        # Rare characters come from bytes: an alphabet without end would leave no room for words.
        limit_alphabet=max((vocab_size - len(_BYTE_TOKENS)) // 3, 1),
        show_progress=True,
    )
    learned = _learn(Tokenizer(models.BPE(unk_token="<unk>")), trainer, texts, normalizer, pre_tokenizer)
    vocabulary = {piece: index for piece, index in learned["vocab"].items() if piece != _MASK_TOKEN}
    vocabulary = {piece: index for index, piece in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in learned["merges"]]
    merges = [(left, right) for left, right in pairs if left + right in vocabulary]
    vocabulary[_MASK_TOKEN] = len(vocabulary)
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)


__all__ = ["train_tokenizer"]
