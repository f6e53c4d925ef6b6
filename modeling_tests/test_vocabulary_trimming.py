import pytest
from conftest import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from m3bert_hf.tokenizer_training import train_tokenizer
from m3bert_hf.vocabulary_trimming import trim_vocabulary


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS * 3, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {
        "bos": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "unk": "<unk>",
        "mask": "<mask>",
        "cls": "<s>",
        "sep": "</s>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


@pytest.fixture(scope="module")
def families(tokenizer):
    return {
        "unigram": tokenizer,
        "bpe": train_tokenizer(TEXTS * 20, 600, model="bpe"),
        "byte-level bpe": byte_level_bpe(),
        "wordpiece": wordpiece(),
    }


FAMILIES = ["unigram", "bpe", "byte-level bpe", "wordpiece"]


def back(trimmed, text, **options):
    return [trimmed.kept_ids[i] for i in trimmed.tokenizer(text, **options)["input_ids"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_covered_texts_are_split_as_before(families, family):
    tokenizer = families[family]
    corpus = [*TEXTS[:2], "zzz ⚙ unknown", "fox " * 80]
    trimmed = trim_vocabulary(tokenizer, corpus, other_texts=TEXTS[2:])
    assert trimmed.report["new_size"] < trimmed.report["old_size"] == len(tokenizer)
    assert trimmed.report["corpus_unchanged"] == 1.0
    assert 0.0 <= trimmed.report["other_unchanged"] < 1.0 and trimmed.report["other_tokens_ratio"] > 0.5
    for text in corpus:
        assert back(trimmed, text) == tokenizer(text)["input_ids"]
        assert trimmed.tokenizer.decode(trimmed.tokenizer(text)["input_ids"]) == tokenizer.decode(
            tokenizer(text)["input_ids"]
        )
    pair = trimmed.tokenizer(corpus[0], corpus[1], truncation=True, max_length=9)["input_ids"]
    assert [trimmed.kept_ids[i] for i in pair] == tokenizer(corpus[0], corpus[1], truncation=True, max_length=9)[
        "input_ids"
    ]
    for name in ("pad_token", "mask_token", "cls_token", "sep_token"):
        assert getattr(trimmed.tokenizer, name) == getattr(tokenizer, name)
        assert trimmed.new_id(getattr(tokenizer, f"{name}_id")) == getattr(trimmed.tokenizer, f"{name}_id")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=4), st.data())
def test_any_text_can_be_covered(families, family, texts, data):
    texts = [*texts, data.draw(st.sampled_from(TEXTS))]
    trimmed = trim_vocabulary(families[family], texts)
    for text in texts:
        assert back(trimmed, text) == families[family](text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(families, family, tmp_path):
    from transformers import AutoTokenizer

    trimmed = trim_vocabulary(families[family], TEXTS[:3])
    trimmed.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == trimmed.tokenizer(text)["input_ids"]
    assert again.mask_token_id == trimmed.tokenizer.mask_token_id


def test_bytes_cover_what_was_never_seen(families):
    for family in ("unigram", "bpe", "byte-level bpe"):
        trimmed = trim_vocabulary(families[family], ["fox"]).tokenizer
        assert trimmed.unk_token_id not in trimmed("日本語 und Ωμέγα")["input_ids"]
        assert "日本語" in trimmed.decode(trimmed("日本語")["input_ids"], skip_special_tokens=True)


def test_languages_keep_their_scripts(families):
    tokenizer = families["unigram"]
    trimmed = trim_vocabulary(tokenizer, languages=["ru"])
    kept = set(trimmed.tokenizer.get_vocab())
    assert all(back(trimmed, text) == tokenizer(text)["input_ids"] for text in (TEXTS[0], TEXTS[5]))
    dropped = set(tokenizer.get_vocab()) - kept
    assert dropped and not any(0x430 <= ord(c) < 0x450 or "a" <= c <= "z" for token in dropped for c in token)
    with pytest.raises(ValueError, match="byte-level"):
        trim_vocabulary(families["byte-level bpe"], languages=["ru"])
    with pytest.raises(ValueError, match=r"languages \['xx'\]"):
        trim_vocabulary(tokenizer, languages=["xx"])


def test_listed_tokens_and_rare_ones(families):
    tokenizer = families["unigram"]
    token = max(tokenizer.get_vocab(), key=len)
    assert token in trim_vocabulary(tokenizer, ["fox"], vocabulary=[token]).tokenizer.get_vocab()
    often = trim_vocabulary(tokenizer, [*["the fox"] * 5, TEXTS[2]], min_count=5)
    always = trim_vocabulary(tokenizer, [*["the fox"] * 5, TEXTS[2]])
    assert len(often.tokenizer) < len(always.tokenizer) and often.report["corpus_unchanged"] < 1
    assert back(often, "the fox") == tokenizer("the fox")["input_ids"]


def test_a_word_that_is_unknown_does_not_keep_rare_tokens_of_others(families):
    tokenizer = families["wordpiece"]
    corpus = [*["the fox"] * 5, TEXTS[2]]
    known = trim_vocabulary(tokenizer, corpus, min_count=2)
    unknown = trim_vocabulary(tokenizer, [*corpus, *["the ⚙⚙"] * 5], min_count=2)
    assert tokenizer.unk_token_id in tokenizer("the ⚙⚙")["input_ids"]
    assert len(known.tokenizer) < len(trim_vocabulary(tokenizer, corpus).tokenizer)
    assert len(unknown.tokenizer) == len(known.tokenizer)


def test_bad_arguments_are_named(families):
    tokenizer = families["unigram"]
    for options, message in (
        ({}, "Say what to keep"),
        ({"corpus": ["", ""]}, "corpus is empty"),
        ({"vocabulary": ["no such token"]}, "'no such token' does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            trim_vocabulary(tokenizer, **options)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(TypeError, match="WordLevel model cannot be trimmed"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), ["a"])
