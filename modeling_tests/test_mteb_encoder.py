import json

import pytest


mteb = pytest.importorskip("mteb")

from m3bert_hf.mteb_encoder import mteb_encoder  # noqa: E402


@pytest.fixture
def tasks():
    from mteb.mocks import mock_tasks

    return [mock_tasks.MockRetrievalTask(), mock_tasks.MockSTSTask()]


def test_every_granularity_is_evaluated_and_filed_apart(sentence_model, tasks, tmp_path):
    from mteb.cache import ResultCache

    seen = set()
    for exit_layer, width in ((1, 8), (4, 32)):
        widths = []
        hook = sentence_model.transformers_model.layers[3].register_forward_hook(lambda *_, w=widths: w.append(1))
        encoder = mteb_encoder(sentence_model, exit_layer, width)
        results = mteb.evaluate(encoder, tasks, cache=ResultCache(tmp_path), overwrite_strategy="always")
        hook.remove()
        # The deepest layer runs for the deepest exit alone.
        assert bool(widths) == (exit_layer == 4)
        assert len(results.task_results) == 2
        meta = encoder.mteb_model_meta
        assert meta.embed_dim == width and meta.experiment_kwargs == {"exit_layer": exit_layer, "truncate_dim": width}
        seen.add(meta.experiment_name)
    assert len(seen) == 2
    files = [p for p in tmp_path.rglob("*.json") if "Mock" in p.name]
    assert len(files) == 4 and all(json.loads(p.read_text())["scores"] for p in files)


def test_vectors_are_those_of_the_granularity(sentence_model, tasks):
    from torch.utils.data import DataLoader

    class Texts(list):
        features = {"text": None}

    texts = ["one text", "another text"]
    loader = DataLoader(Texts({"text": t} for t in texts), batch_size=2)
    options = {"task_metadata": tasks[1].metadata, "hf_split": "test", "hf_subset": "default"}
    vectors = mteb_encoder(sentence_model, 3, 20).encode(loader, show_progress_bar=False, **options)
    assert vectors == pytest.approx(sentence_model.encode(texts, exit_layer=3, truncate_dim=20), abs=1e-5)


def test_bad_arguments_are_named(sentence_model):
    with pytest.raises(ValueError, match="exit_layer=2"):
        mteb_encoder(sentence_model, 2)
    with pytest.raises(ValueError, match="truncate_dim=99"):
        mteb_encoder(sentence_model, 1, 99)
