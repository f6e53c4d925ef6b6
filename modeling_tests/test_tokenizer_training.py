import json

import pytest
from conftest import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from m3bert_hf.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return train_tokenizer(TEXTS * 20, 400, model_max_length=48, model=request.param)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_no_text_is_unknown(tokenizer, text):
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert tokenizer.unk_token_id not in ids or "<unk>" in text
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert max(ids) < len(tokenizer)


def test_text_comes_back_from_its_tokens(tokenizer):
    for text in (*TEXTS, "🙂 ꙮ never seen: ሰላም"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_where_xlm_r_has_them(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert tokenizer("<mask>", add_special_tokens=False)["input_ids"] == [tokenizer.mask_token_id]
    pair = tokenizer("dog", "cat")["input_ids"]
    assert pair.count(tokenizer.sep_token_id) == 3


def test_saved_and_reloaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    assert again.model_max_length == 48 and again.pad_token_id == 1


def test_normalisation_is_a_choice():
    texts = ["ﬁne ﬁx", "fine fix"] * 40
    on, off = (train_tokenizer(texts, 300, nfkc=nfkc) for nfkc in (True, False))
    assert on("ﬁne")["input_ids"] == on("fine")["input_ids"]
    assert off("ﬁne")["input_ids"] != off("fine")["input_ids"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="vocab_size=200"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(ValueError, match="model must be 'unigram' or 'bpe', got 'word'"):
        train_tokenizer(TEXTS, 400, model="word")
    with pytest.raises(ValueError, match="The texts are empty"):
        train_tokenizer([], 400, model="bpe")


def test_words_are_learned(tokenizer):
    assert any(len(token) > 2 and not token.startswith("<") for token in tokenizer.get_vocab())
    assert len(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) < len(TEXTS[0])


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_the_command_balances_languages(model, tmp_path):
    from m3bert_hf.__main__ import main

    rows = [{"text": TEXTS[0], "lang": "en"}] * 200 + [{"query": TEXTS[5], "document": TEXTS[5], "lang": "ru"}] * 20
    for name, part in (("a.jsonl", rows[:200]), ("b.jsonl", rows[200:])):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in part))
    arguments = ["train-tokenizer", str(tmp_path / "*.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "400"]
    main([*arguments, "--model", model, "--texts", "40", "--temperature", "0"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert set("фотграизменьюпрк") <= set(tokenizer.get_vocab())
    assert not any(token.startswith("<0x") for token in tokenizer.tokenize(TEXTS[5]))
