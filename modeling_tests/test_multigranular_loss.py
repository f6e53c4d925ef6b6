import pytest
import torch
from conftest import TEXTS
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss

from m3bert_hf import MultigranularLoss
from m3bert_hf.sentence_transformer import exit_embeddings


def columns(model):
    return [model.preprocess(TEXTS[:3]), model.preprocess(TEXTS[3:])]


def test_equals_the_sum_of_separate_losses_with_gradients(sentence_model):
    model = sentence_model.train()
    inner = MultipleNegativesRankingLoss(model)
    weights = [0.05 + i / 20 for i in range(9)]
    loss = MultigranularLoss(model, inner, weights=weights)
    value = loss(columns(model), None)
    value.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = 0
    for (layer, width), weight in zip(loss.granularities, weights, strict=True):
        embeddings = [model(dict(c), exit_layer=layer)["sentence_embedding"][:, :width] for c in columns(model)]
        total = total + weight * inner.compute_loss_from_embeddings(embeddings, None)
    total.backward()
    torch.testing.assert_close(value, total, atol=1e-5, rtol=1e-5)
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_exits_are_what_encode_returns(sentence_model):
    with torch.no_grad():
        exits = exit_embeddings(sentence_model.eval(), sentence_model.preprocess(TEXTS))
    for layer, vectors in zip(sentence_model.exit_layers, exits, strict=True):
        expected = sentence_model.encode(TEXTS, exit_layer=layer, convert_to_tensor=True)
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


def test_chosen_pairs_and_other_losses(sentence_model):
    loss = MultigranularLoss(sentence_model, CosineSimilarityLoss(sentence_model), granularities=[(1, 8), (4, 32)])
    assert loss(columns(sentence_model), torch.tensor([0.1, 0.5, 0.9])).isfinite()
    assert loss.get_config_dict()["granularities"] == [[1, 8], [4, 32]]


def test_bad_arguments_are_named(sentence_model):
    inner = MultipleNegativesRankingLoss(sentence_model)
    with pytest.raises(ValueError, match="exit_layer=2"):
        MultigranularLoss(sentence_model, inner, granularities=[(2, 8)])
    with pytest.raises(ValueError, match="truncate_dim=99"):
        MultigranularLoss(sentence_model, inner, granularities=[(1, 99)])
    with pytest.raises(ValueError, match="1 weights do not fit 9"):
        MultigranularLoss(sentence_model, inner, weights=[1.0])
    with pytest.raises(TypeError, match="Linear cannot compute"):
        MultigranularLoss(sentence_model, torch.nn.Linear(1, 1))
