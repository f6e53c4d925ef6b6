import pytest
import torch
from conftest import tiny_config

from m3bert_hf import M3BertModel
from m3bert_hf.whitening import whiten_embeddings


@pytest.fixture
def collapsed():
    """A model whose tokens all have nearly the same vector, as after a short pretraining."""
    torch.manual_seed(0)
    model = M3BertModel(tiny_config(position_embedding_type="rotary"))
    with torch.no_grad():
        weight = model.embeddings.word_embeddings.weight
        weight.mul_(0.05).add_(torch.randn(weight.shape[1]))
        model.embeddings.norm.weight.uniform_(0.5, 2.0)
    return model


def test_tokens_have_mean_zero_and_the_identity_as_covariance_by_their_frequency(collapsed):
    counts = torch.arange(1, 102)
    whiten_embeddings(collapsed, counts)
    rows = collapsed.embeddings.word_embeddings.weight.detach().double() / collapsed.config.initializer_range
    share = counts / counts.sum()
    mean = (share[:, None] * rows).sum(dim=0)
    assert mean.abs().max() < 1e-4
    covariance = rows.T @ (share[:, None] * rows)
    # The floor under the spectrum takes some off the narrowest directions.
    assert torch.allclose(covariance, torch.eye(32, dtype=torch.float64), atol=0.05)
    assert (collapsed.embeddings.norm.weight == 1).all()


def test_texts_no_longer_have_one_vector(collapsed):
    ids = torch.randint(4, 101, (20, 12))

    @torch.no_grad()
    def mean_cosine():
        vectors = torch.nn.functional.normalize(collapsed(ids).last_hidden_state.mean(dim=1), dim=1)
        return float((vectors @ vectors.T).mean())

    before = mean_cosine()
    whiten_embeddings(collapsed, torch.ones(101))
    assert before > 0.5 and mean_cosine() < 0.2


def test_learned_positions_do_not_outweigh_the_tokens():
    model = M3BertModel(tiny_config(position_embedding_type="absolute"))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.add_(3.0)
    whiten_embeddings(model, torch.ones(101))
    tokens, positions = (
        getattr(model.embeddings, f"{kind}_embeddings").weight.norm(dim=1).mean() for kind in ("word", "position")
    )
    assert positions < 0.2 * tokens


def test_layers_keep_their_inputs_and_write_less(collapsed):
    layer = collapsed.layers[0]
    before = {name: weight.clone() for name, weight in layer.named_parameters()}
    whiten_embeddings(collapsed, torch.ones(101), residual_scale=0.5)
    for name, weight in layer.named_parameters():
        factor = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        assert torch.allclose(weight, factor * before[name]), name


def test_bad_arguments_are_named(collapsed):
    with pytest.raises(ValueError, match=r"residual_scale=-1"):
        whiten_embeddings(collapsed, torch.ones(101), residual_scale=-1)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        whiten_embeddings(collapsed, torch.ones(7))
