import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from conftest import TEXTS
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    CoSENTLoss,
    CosineSimilarityLoss,
    GISTEmbedLoss,
    MarginMSELoss,
    Matryoshka2dLoss,
    MSELoss,
    MultipleNegativesRankingLoss,
    TripletLoss,
)
from torch.nn.functional import cosine_similarity, normalize

from m3bert_hf import MultigranularLoss, build_sentence_transformer
from m3bert_hf.sentence_transformer import exit_embeddings


def columns(model, count=2):
    # Every text once: guides compare similarities, and equal ones would be told apart by rounding.
    negatives = [text[::-1] for text in TEXTS[:3]]
    return [model.preprocess(texts) for texts in (TEXTS[:3], TEXTS[3:], negatives)[:count]]


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, tolerance=1e-5):
    assert got.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(got[name], wanted[name], atol=tolerance * scale, rtol=1e-4, msg=name)


def separate_vectors(model, features, layer, width):
    """What a model that exits at `layer` and cuts at `width` gives, by a pass of its own."""
    return normalize(model(dict(features), exit_layer=layer)["sentence_embedding"][:, :width], dim=-1)


WEIGHTS = [0.05 + i / 20 for i in range(9)]


@pytest.mark.parametrize(
    ("make", "count", "labels"),
    [
        (MultipleNegativesRankingLoss, 3, None),
        (CoSENTLoss, 2, torch.tensor([0.1, 0.9, 0.5])),
        (CosineSimilarityLoss, 2, torch.tensor([0.1, 0.9, 0.5])),
        (MarginMSELoss, 3, torch.tensor([0.3, -0.1, 0.2])),
        (TripletLoss, 3, None),
    ],
)
def test_equals_the_sum_of_separate_losses_with_gradients(sentence_model, make, count, labels):
    model = sentence_model.train()
    inner = make(model)
    loss = MultigranularLoss(model, inner, weights=WEIGHTS)
    value = loss(columns(model, count), labels)
    got = gradients(model, value)
    total = 0
    for (layer, width), weight in zip(loss.granularities, WEIGHTS, strict=True):
        vectors = [separate_vectors(model, c, layer, width) for c in columns(model, count)]
        total = total + weight * inner.compute_loss_from_embeddings(vectors, labels)
    torch.testing.assert_close(value, total, atol=1e-5, rtol=1e-5)
    assert_same_gradients(got, gradients(model, total))


@pytest.mark.parametrize("align", ["similarity", "embedding"])
@pytest.mark.parametrize(
    ("plain", "cached"),
    [
        (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss),
        (losses.MultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesSymmetricRankingLoss),
    ],
)
def test_cached_and_uncached_agree(sentence_model, plain, cached, align):
    model = sentence_model.train()
    options = {"weights": WEIGHTS, "align_weight": 0.7, "align": align}
    wanted = MultigranularLoss(model, plain(model), **options)(columns(model), None)
    wanted_gradients = gradients(model, wanted)
    for size in (1, 2, 3):
        loss = MultigranularLoss(model, cached(model, mini_batch_size=size), **options)
        value = loss(columns(model), None)
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
        # A weight from outside, as the accumulation of gradients sets, reaches the replay.
        got = gradients(model, 0.5 * value)
        assert_same_gradients({name: 2 * g for name, g in got.items()}, wanted_gradients)
        with torch.no_grad():
            torch.testing.assert_close(loss(columns(model), None), wanted, atol=1e-5, rtol=1e-5)


def test_guided_losses_agree_and_ask_their_guide_once(sentence_model, checkpoint):
    model = sentence_model.train()
    guide = build_sentence_transformer(checkpoint)
    calls = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    before = guide.encode(TEXTS)
    calls.clear()
    value = MultigranularLoss(model, GISTEmbedLoss(model, guide), weights=WEIGHTS)(columns(model, 3), None)
    assert len(calls) <= 3
    wanted = gradients(model, value)
    loss = CachedGISTEmbedLoss(model, guide, mini_batch_size=2)
    calls.clear()
    cached = MultigranularLoss(model, loss, weights=WEIGHTS)(columns(model, 3), None)
    assert len(calls) == 6
    torch.testing.assert_close(cached, value, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, cached), wanted)
    assert (guide.encode(TEXTS) == before).all()
    total = 0
    for layer, width, weight in zip((1,) * 3 + (3,) * 3 + (4,) * 3, (8, 20, 32) * 3, WEIGHTS, strict=True):
        alone = MultigranularLoss(model, GISTEmbedLoss(model, guide), granularities=[(layer, width)])
        total = total + weight * alone(columns(model, 3), None)
    torch.testing.assert_close(value, total, atol=1e-5, rtol=1e-5)


def test_a_teacher_s_vectors_are_cut_with_the_prediction(sentence_model):
    model = sentence_model.eval()
    labels = torch.randn(3, 32)
    options = {"granularities": [(3, 20)], "normalize_embeddings": False}
    value = MultigranularLoss(model, MSELoss(model), **options)(columns(model, 1), labels)
    vectors = model(columns(model, 1)[0], exit_layer=3)["sentence_embedding"][:, :20]
    torch.testing.assert_close(value, torch.nn.functional.mse_loss(vectors, labels[:, :20]))


def test_exits_are_what_encode_returns(sentence_model):
    with torch.no_grad():
        exits = exit_embeddings(sentence_model.eval(), sentence_model.preprocess(TEXTS))
    for layer, vectors in zip(sentence_model.exit_layers, exits, strict=True):
        expected = sentence_model.encode(TEXTS, exit_layer=layer, convert_to_tensor=True)
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


def test_one_pass_no_deeper_than_the_deepest_pair(sentence_model):
    runs = []
    for depth, layer in enumerate(sentence_model.transformers_model.layers, 1):
        layer.register_forward_hook(lambda *_, depth=depth: runs.append(depth))
    inner = MultipleNegativesRankingLoss(sentence_model)
    MultigranularLoss(sentence_model, inner, granularities=[(3, 8), (1, 32)])(columns(sentence_model), None)
    assert runs == [1, 2, 3] * 2


def test_alignment_is_what_its_formula_says(sentence_model):
    model = sentence_model.eval()
    inner = MultipleNegativesRankingLoss(model)
    pairs = [(1, 8), (4, 32)]
    plain = MultigranularLoss(model, inner, pairs)(columns(model), None)
    deep, shallow = ([model(c, exit_layer=layer)["sentence_embedding"] for c in columns(model)] for layer in (4, 1))
    for align, wanted in (
        (
            "embedding",
            sum((1 - cosine_similarity(s[:, :8], d[:, :8])).mean() / 2 for s, d in zip(shallow, deep, strict=True)),
        ),
        (
            "similarity",
            torch.nn.functional.kl_div(
                cosine_similarity(shallow[0][:, None, :8], shallow[1][None, :, :8], dim=-1).div(0.1).log_softmax(1),
                cosine_similarity(deep[0][:, None], deep[1][None], dim=-1).div(0.1).softmax(1),
                reduction="batchmean",
            ),
        ),
    ):
        loss = MultigranularLoss(model, inner, pairs, align_weight=3.0, align=align, align_temperature=0.1)
        torch.testing.assert_close(loss(columns(model), None) - plain, 3 * wanted, atol=1e-4, rtol=1e-4)
    # The deepest exit is the teacher: alignment alone moves nothing above the layer that the shallow exit reads.
    loss = MultigranularLoss(model, inner, pairs, weights=[0, 0], align_weight=1.0, align="embedding")
    touched = gradients(model, loss(columns(model), None))
    assert not any(g.any() for name, g in touched.items() if ".layers.3." in name)
    assert any(g.any() for name, g in touched.items() if ".layers.0." in name)


def test_single_column_alignment_ignores_the_text_itself(sentence_model):
    loss = MultigranularLoss(sentence_model, MSELoss(sentence_model), weights=[0.0] * 9, align_weight=1.0)
    value = loss(columns(sentence_model, 1), torch.zeros(3, 32))
    assert value.isfinite() and value > 0


def trained(checkpoint, directory, loss_class=MultipleNegativesRankingLoss, loss_options=None, **options):
    model = build_sentence_transformer(checkpoint)
    rows = {"query": [t[:9] for t in TEXTS] * 2, "document": TEXTS * 2, "negative": TEXTS[::-1] * 2}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(directory), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, **options
    )
    loss = MultigranularLoss(model, loss_class(model, **(loss_options or {})))
    SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), loss=loss).train()
    return copy.deepcopy(model.state_dict())


def test_in_the_library_s_trainer(checkpoint, tmp_path):
    """Prompts, hard negatives, a batch sampler, compilation; cached as uncached; losses with accumulation finite."""
    options = {"per_device_train_batch_size": 4, "batch_sampler": BatchSamplers.NO_DUPLICATES}
    options["prompts"] = {"query": "query: ", "document": "passage: ", "negative": "passage: "}
    plain = trained(checkpoint, tmp_path, **options)
    compiled = trained(checkpoint, tmp_path, torch_compile=True, torch_compile_backend="eager", **options)
    cached = trained(checkpoint, tmp_path, CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}, **options)
    start = build_sentence_transformer(checkpoint).state_dict()
    assert any(not torch.equal(plain[name], start[name]) for name in plain)
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(cached[name], plain[name], atol=2e-3, rtol=1e-2)


def distributed_gradients(rank, port, checkpoint, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, make in (
        ("plain", lambda m: MultipleNegativesRankingLoss(m, gather_across_devices=True)),
        ("cached", lambda m: CachedMultipleNegativesRankingLoss(m, mini_batch_size=2, gather_across_devices=True)),
    ):
        model = build_sentence_transformer(checkpoint).train()
        loss = MultigranularLoss(model, make(model))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        loss.model = loss.loss.model = wrapped  # as the trainer does
        part = slice(3 * rank, 3 * rank + 3)
        features = [model.preprocess([t[:9] for t in TEXTS][part]), model.preprocess(TEXTS[part])]
        loss(features, None).backward()
        if rank == 0:
            torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{out}/{name}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_twice_the_batch(checkpoint, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(distributed_gradients, (port, str(checkpoint), str(tmp_path)), nprocs=2)
    model = build_sentence_transformer(checkpoint).train()
    loss = MultigranularLoss(model, MultipleNegativesRankingLoss(model))
    features = [model.preprocess([t[:9] for t in TEXTS]), model.preprocess(TEXTS)]
    wanted = gradients(model, loss(features, None))
    for name in ("plain", "cached"):
        assert_same_gradients(torch.load(tmp_path / f"{name}.pt"), wanted, tolerance=1e-4)


def test_bad_arguments_are_named(sentence_model, checkpoint):
    from sentence_transformers import SentenceTransformer

    inner = MultipleNegativesRankingLoss(sentence_model)
    for options, message in (
        ({"granularities": [(2, 8)]}, "exit_layer=2"),
        ({"granularities": [(1, 99)]}, "truncate_dim=99"),
        ({"granularities": []}, "granularities is empty"),
        ({"weights": [1.0]}, "1 weights do not fit 9"),
        ({"align": "both"}, "align='both' does not exist"),
        ({"align_weight": -1}, "align_weight=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MultigranularLoss(sentence_model, inner, **options)
    with pytest.raises(TypeError, match="Linear is not a loss"):
        MultigranularLoss(sentence_model, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="build_sentence_transformer"):
        MultigranularLoss(SentenceTransformer(str(checkpoint)), inner)
    with pytest.raises(TypeError, match="give MultigranularLoss the loss inside"):
        MultigranularLoss(sentence_model, Matryoshka2dLoss(sentence_model, inner, [32]))
