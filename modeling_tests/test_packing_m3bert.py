import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from m3bert_hf.packing_m3bert import PackedDocuments, padded


LENGTHS = [5, 12, 12, 0, 1, 12, 9, 3, 3, 40]


def attend(module, query, key, value, mask, scaling):
    """The interface of transformers' attention functions."""
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2), None


def run(documents, states):
    masks = [None if valid is None else valid[:, None, None, :] for valid in documents.valid]
    return documents.attend(attend, None, *states, masks, {"scaling": 0.3})


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, sum(LENGTHS), 4, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("alone", [1, 4, 10, 1000])
def test_attention_and_gradients_are_those_of_each_document_by_itself(alone, states, monkeypatch):
    monkeypatch.setattr(PackedDocuments, "alone", alone)
    monkeypatch.setattr(PackedDocuments, "run", alone)
    assert not any(PackedDocuments(LENGTHS, "cpu").slices), "each slice's gradient would be as large as the row"
    with torch.no_grad():
        documents = PackedDocuments(LENGTHS, "cpu")
    # Documents of at least `alone` tokens are slices, and those that happened to be a group of one.
    sliced = [place.shape for place, span in zip(documents.places, documents.slices, strict=True) if span is not None]
    assert sum(shape[0] for shape in sliced) >= sum(length >= alone for length in LENGTHS if length)
    assert ((2, 12) in sliced) == (alone <= 12), "neighbours of one length share a call"
    expected = torch.cat(
        [
            scaled_dot_product_attention(*(part.split(LENGTHS, dim=2)[i] for part in states), scale=0.3)
            for i in range(len(LENGTHS))
        ],
        dim=2,
    ).transpose(1, 2)
    found = run(documents, states)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), states),
        torch.autograd.grad((expected * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_groups_hold_documents_of_like_length():
    documents = PackedDocuments(LENGTHS, "cpu")
    for place, valid in zip(documents.places, documents.valid, strict=True):
        if valid is not None:
            assert valid.sum() >= documents.fullness * place.numel()
    tokens = sum(
        place.numel() if valid is None else int(valid.sum())
        for place, valid in zip(documents.places, documents.valid, strict=True)
    )
    assert tokens == sum(LENGTHS)


@torch.no_grad()
def test_documents_in_order_are_not_moved(monkeypatch):
    monkeypatch.setattr(PackedDocuments, "alone", 1)
    assert PackedDocuments([4, 9, 0, 7], "cpu").back is None
    monkeypatch.setattr(PackedDocuments, "alone", 8)
    assert PackedDocuments([4, 9, 0, 7], "cpu").back is not None


@torch.no_grad()
def test_neighbours_of_one_length_share_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(PackedDocuments, "alone", 1)
    monkeypatch.setattr(PackedDocuments, "run", 1)
    monkeypatch.setattr(PackedDocuments, "pairs", 3 * 10**2)
    documents = PackedDocuments([10, 10, 10, 10, 20, 20, 5, 5, 5], "cpu")
    assert [tuple(place.shape) for place in documents.places] == [(3, 10), (1, 10), (1, 20), (1, 20), (3, 5)]


@torch.no_grad()
def test_neighbours_of_one_length_are_slices_sooner_than_single_documents(monkeypatch):
    monkeypatch.setattr(PackedDocuments, "alone", 20)
    monkeypatch.setattr(PackedDocuments, "run", 10)
    monkeypatch.setattr(PackedDocuments, "pairs", 2 * 12**2)
    lengths = [12, 12, 12, 15, 9, 9, 20, 14]
    documents = PackedDocuments(lengths, "cpu")
    found = [(tuple(p.shape), s is not None) for p, s in zip(documents.places, documents.slices, strict=True)]
    # The third 12 exceeds the pairs of a call and is single; 9 is too short for a slice, 15 and 14 are so when single.
    assert found == [((2, 12), True), ((1, 20), True), ((3, 15), False), ((2, 9), False)]
    states = [torch.randn(1, 2, sum(lengths), 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = [
        scaled_dot_product_attention(*(part.split(lengths, dim=2)[i] for part in states), scale=0.3)
        for i in range(len(lengths))
    ]
    torch.testing.assert_close(run(documents, states), torch.cat(expected, dim=2).transpose(1, 2))


def test_nothing_to_attend_to():
    empty = [torch.zeros(1, 2, 0, 4)] * 3
    assert run(PackedDocuments([0, 0], "cpu"), empty).shape == (1, 0, 2, 4)


def test_states_return_to_where_their_tokens_stood():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    states = torch.arange(8.0).view(1, 4, 2)
    assert padded(states, mask).tolist() == [[[0, 1], [2, 3], [0, 0]], [[0, 0], [4, 5], [6, 7]]]
