from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TEXTS

from m3bert_hf import build_sentence_transformer


pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from m3bert_hf.onnx_export import export_onnx, load_onnx


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    model = build_sentence_transformer(checkpoint, prompts={"query": "q: "})
    model.save_pretrained(str(directory))
    export_onnx(directory)
    export_onnx(directory, int8=True)
    return directory


def test_vectors_are_the_model_s_for_any_batch_and_length(exported):
    model, served = build_sentence_transformer(exported), load_onnx(exported, runtime="openvino", threads=1)
    assert served.get_embedding_dimension() == 32
    for texts in (TEXTS, TEXTS[:1], ["x", TEXTS[4] * 2], [""]):
        np.testing.assert_allclose(served.encode_query(texts), model.encode_query(texts), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        served.encode("text", truncate_dim=8), model.encode("text", truncate_dim=8), atol=1e-4, rtol=1e-4
    )


def test_an_answer_survives_the_next_one(exported):
    encoder = load_onnx(exported, runtime="openvino")[0].encoder
    model = build_sentence_transformer(exported)
    features = [model.tokenizer([text], return_tensors="pt") for text in TEXTS[:2]]
    first = encoder.embed(features[0]["input_ids"], features[0]["attention_mask"])
    kept = first.clone()
    encoder.embed(features[1]["input_ids"], features[1]["attention_mask"])
    assert (first == kept).all()


def test_threads_may_ask_at_once(exported):
    encoder = load_onnx(exported, runtime="openvino")[0].encoder
    model = build_sentence_transformer(exported)
    inputs = [dict(model.tokenizer([text], return_tensors="pt")) for text in TEXTS * 5]
    wanted = [encoder.embed(**features) for features in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda features: encoder.embed(**features), inputs))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("file", "precision"), [("model.onnx", "bfloat16"), ("model_int8.onnx", None)])
def test_low_precision_keeps_the_direction(exported, file, precision):
    wanted = build_sentence_transformer(exported).encode(TEXTS, normalize_embeddings=True)
    served = load_onnx(exported, f"onnx/{file}", runtime="openvino", precision=precision)
    assert (served.encode(TEXTS, normalize_embeddings=True) * wanted).sum(axis=1).min() > 0.98


def test_bad_arguments_are_named(exported):
    with pytest.raises(ValueError, match="precision='float16' must be one of float32, bfloat16"):
        load_onnx(exported, runtime="openvino", precision="float16")
    with pytest.raises(ValueError, match="precision='bfloat16' is OpenVINO's"):
        load_onnx(exported, precision="bfloat16")
    with pytest.raises(ValueError, match="runtime='tvm' must be onnxruntime or openvino"):
        load_onnx(exported, runtime="tvm")
    with pytest.raises(FileNotFoundError, match="--onnx"):
        load_onnx(exported, "onnx/none.onnx", runtime="openvino")
