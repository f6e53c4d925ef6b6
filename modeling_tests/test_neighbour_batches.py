import pytest
from datasets import Dataset

from m3bert_hf.neighbour_batches import NeighbourBatchSampler


def sampler_of(documents, batch_size, neighbours, drop_last=False, **kwargs):
    data = {"query": [f"q{i}" for i in range(len(documents))], "document": documents}
    data["dataset_name"] = ["one"] * len(documents)
    return NeighbourBatchSampler(Dataset.from_dict(data), batch_size, drop_last, neighbours, **kwargs)


FAMILIES = [f"{family} part {part}" for part in range(4) for family in "abcdefghij"]


def test_families_come_together_and_nothing_is_lost():
    sampler = sampler_of(FAMILIES, 8, 4)
    together, alone = (
        [
            sum(FAMILIES[i][0] == FAMILIES[j][0] for i in batch for j in batch) / len(batch)
            for batch in sampler_of(FAMILIES, 8, n)
        ]
        for n in (4, 1)
    )
    assert sorted(row for batch in sampler for row in batch) == list(range(40)) and len(sampler) == 5
    assert sum(together) > 1.3 * sum(alone)


def test_no_batch_holds_a_text_twice():
    documents = ["same"] * 3 + [f"other {i}" for i in range(9)]
    batches = list(sampler_of(documents, 4, 2))
    assert sorted(row for batch in batches for row in batch) == list(range(12))
    for batch in batches:
        texts = [documents[row] for row in batch]
        assert len(set(texts)) == len(texts)


def test_the_order_follows_from_seed_and_epoch():
    def batches(seed, epoch):
        sampler = sampler_of(FAMILIES, 8, 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 0) == batches(1, 0)
    assert batches(1, 0) != batches(1, 1) and batches(1, 0) != batches(2, 0)


def test_batches_that_are_not_full_are_left_out_if_asked():
    assert [len(batch) for batch in sampler_of(FAMILIES[:10], 4, 2, drop_last=True)] == [4, 4]
    assert list(sampler_of(["same"] * 6, 2, 1, drop_last=True)) == []


def test_there_are_as_many_batches_as_announced_in_every_epoch():
    documents = [f"{i % 5}" for i in range(12)] + [f"other {i}" for i in range(6)]
    for drop_last in (True, False):
        for seed in range(20):
            sampler = sampler_of(documents, 4, 2, drop_last=drop_last, seed=seed)
            for epoch in range(2):
                sampler.set_epoch(epoch)
                batches = list(sampler)
                assert len(batches) == len(sampler)
                assert all(len(batch) == 4 for batch in batches) or not drop_last
                if not drop_last:
                    assert sorted(row for batch in batches for row in batch) == list(range(18))


def test_a_run_must_fit_a_batch():
    with pytest.raises(ValueError, match="neighbours=9 must be within 1 and the batch's 8 rows"):
        sampler_of(FAMILIES, 8, 9)
