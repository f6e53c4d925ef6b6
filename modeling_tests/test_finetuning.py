import json

import numpy as np
import pytest
from conftest import TEXTS
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from m3bert_hf import build_sentence_transformer
from m3bert_hf.finetuning import FinetuneArguments, finetune, load_pairs


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"lang": "x", "source": "s", "query": text[:10], "document": text} for text in TEXTS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_training_brings_each_query_to_its_document_at_every_granularity(checkpoint, pairs, tmp_path):
    training = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=6,
        max_steps=25,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    finetune(FinetuneArguments(str(checkpoint), [str(pairs)]), training)
    before, after = build_sentence_transformer(checkpoint), SentenceTransformer(str(tmp_path / "out"))
    queries = [text[:10] for text in TEXTS]
    for layer in (1, 3, 4):
        for width in (8, 20, 32):
            options = {"exit_layer": layer, "truncate_dim": width, "normalize_embeddings": True}
            margins = []
            for model in (before, after):
                scores = model.encode(queries, **options) @ model.encode(TEXTS, **options).T
                margins.append(np.mean(np.diag(scores)) - np.mean(scores))
            assert margins[1] > margins[0] + 0.1
    assert after[0].query_length is None


def test_what_is_evaluated_is_never_trained_on(pairs, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(
        json.dumps({"id": "1", "query": TEXTS[0][:10]}) + "\n" + json.dumps({"id": "2", "document": TEXTS[1]})
    )
    arguments = FinetuneArguments("unused", [str(pairs)], exclude_files=[str(held_out)])
    documents = load_pairs(arguments, seed=0)["document"]
    assert sorted(documents) == sorted(TEXTS[2:])
    arguments.exclude_files = [str(pairs)]
    with pytest.raises(ValueError, match="No pairs to train on"):
        load_pairs(arguments, seed=0)
