import numpy as np
import pytest
import torch
from conftest import TEXTS, tiny_config

from m3bert_hf import M3BertForMaskedLM, M3BertModel
from m3bert_hf.masking import M3BertDataCollator, word_starts


def documents(tokenizer, *texts):
    return [np.array(tokenizer(text)["input_ids"]) for text in texts]


@pytest.fixture
def row(tokenizer):
    return {"documents": documents(tokenizer, *TEXTS[:3]), "index": 5}


def test_masks_depend_on_seed_and_index_alone(tokenizer, row):
    collator = M3BertDataCollator(tokenizer, row_length=120, seed=3)
    other = {**row, "index": 6}
    alone = collator([row])
    torch.manual_seed(9)
    np.random.seed(9)
    beside = collator([other, row])
    for key in alone:
        assert torch.equal(alone[key][0], beside[key][1])
    assert not torch.equal(beside["labels"][0], beside["labels"][1])
    assert not torch.equal(M3BertDataCollator(tokenizer, row_length=120, seed=4)([row])["labels"], alone["labels"])


def test_ratio_replacement_and_special_tokens(tokenizer):
    ids = np.concatenate(documents(tokenizer, *TEXTS))
    collator = M3BertDataCollator(tokenizer, 0.3)
    special = np.isin(ids, tokenizer.all_special_ids)
    labelled = masked = kept = randomised = 0
    for index in range(400):
        inputs, labels = collator.mask(ids, index)
        chosen = labels != -100
        assert not chosen[special].any() and np.array_equal(inputs[~chosen], ids[~chosen])
        assert np.array_equal(labels[chosen], ids[chosen])
        labelled += chosen.sum()
        masked += (inputs[chosen] == tokenizer.mask_token_id).sum()
        kept += (inputs[chosen] == ids[chosen]).sum()
        randomised += (~np.isin(inputs[chosen], tokenizer.all_special_ids) & (inputs[chosen] != ids[chosen])).sum()
    assert labelled / (400 * (~special).sum()) == pytest.approx(0.3, abs=0.005)
    assert masked / labelled == pytest.approx(0.8, abs=0.02)
    assert kept / labelled == pytest.approx(0.1, abs=0.02) and masked + kept + randomised == labelled
    inputs, labels = M3BertDataCollator(tokenizer, 0.3, replace=(1, 0, 0)).mask(ids, 0)
    assert (inputs[labels != -100] == tokenizer.mask_token_id).all()


def test_the_ratio_holds_on_average_in_short_rows_and_with_whole_words(tokenizer):
    ids = documents(tokenizer, "the quick brown fox")[0]
    inner = (~np.isin(ids, tokenizer.all_special_ids)).sum()
    for whole_words in (False, True):
        collator = M3BertDataCollator(tokenizer, 0.3, whole_words=whole_words)
        share = np.mean([(collator.mask(ids, i)[1] != -100).sum() / inner for i in range(1500)])
        assert share == pytest.approx(0.3, abs=0.03)


def test_whole_words_are_masked_together(tokenizer):
    starts = word_starts(tokenizer)
    collator = M3BertDataCollator(tokenizer, 0.4, whole_words=True)
    ids = np.concatenate(documents(tokenizer, *TEXTS[:4]))
    word = np.cumsum(starts[ids])
    for index in range(50):
        chosen = collator.mask(ids, index)[1] != -100
        for w in np.unique(word):
            own = chosen[(word == w) & ~np.isin(ids, tokenizer.all_special_ids)]
            # Long runs, as in scripts without spaces, are cut into parts of 8.
            assert all(len(set(own[i : i + 8])) <= 1 for i in range(0, len(own), 8))
    # Japanese has no spaces: its text must not be masked as one word.
    japanese = documents(tokenizer, TEXTS[4])[0]
    shares = [(collator.mask(japanese, i)[1] != -100).mean() for i in range(30)]
    assert np.mean(shares) > 0.1 and max(shares) < 0.9


def test_the_ratio_moves_over_the_run(tokenizer):
    collator = M3BertDataCollator(tokenizer, [0.5, 0.1], total_rows=101)
    assert [collator.ratio(i) for i in (0, 50, 100, 500)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    with pytest.raises(ValueError, match="needs `total_rows`"):
        M3BertDataCollator(tokenizer, [0.5, 0.1])


def test_packed_documents_give_the_loss_that_they_give_alone(tokenizer):
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=48)).eval()
    collator = M3BertDataCollator(tokenizer, row_length=130, longest_document=48)
    parts = documents(tokenizer, *TEXTS[:3])
    batch = collator([{"documents": parts, "index": 0}])
    assert batch["input_ids"].shape == (1, 130)
    total = sum(len(part) for part in parts)
    packed = model(**batch)
    sums, count, start = 0.0, 0, 0
    for part in parts:
        piece = slice(start, start + len(part))
        labels = batch["labels"][:, piece]
        number = (labels != -100).sum()
        if number:
            sums = sums + model(batch["input_ids"][:, piece], labels=labels).granularity_losses * number
        count, start = count + number, piece.stop
    torch.testing.assert_close(packed.granularity_losses, sums / count, atol=1e-4, rtol=1e-4)
    assert (batch["input_ids"][0, total:] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, total:] == -100).all() and batch["position_ids"].max() < 48
    with pytest.raises(ValueError, match=r"A row of \d+ tokens does not fit into row_length=16"):
        M3BertDataCollator(tokenizer, row_length=16)([{"documents": parts}])


def test_padding_and_packing_hold_the_same_documents(tokenizer):
    parts = documents(tokenizer, *TEXTS[:3])
    collator = M3BertDataCollator(tokenizer, pad_to_multiple_of=8)
    batch = collator([{"input_ids": part, "index": i} for i, part in enumerate(parts)])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(part) for part in parts]
    restored = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    for own, part, mask in zip(restored, parts, batch["attention_mask"], strict=True):
        assert own[mask.bool()].tolist() == part.tolist()
    M3BertModel(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=64))(
        batch["input_ids"], batch["attention_mask"]
    )


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="`mask_ratio` must be"):
        M3BertDataCollator(tokenizer, 0.0)
    with pytest.raises(ValueError, match="`replace` must be three shares"):
        M3BertDataCollator(tokenizer, replace=(0.5, 0.1, 0.1))
