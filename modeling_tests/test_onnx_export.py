import numpy as np
import pytest
import torch
from conftest import TEXTS, tiny_config

from m3bert_hf import M3BertModel, build_sentence_transformer, export_submodel
from m3bert_hf.__main__ import main


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from m3bert_hf.onnx_export import export_onnx, load_onnx  # noqa: E402


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b), dim=1)


@pytest.mark.parametrize("architecture", ["released", "local"])
def test_the_graph_is_the_model_for_any_batch_and_length(tokenizer, tmp_path, architecture):
    fields = {"position_embedding_type": "rotary", "global_attn_every_n_layers": 2, "local_attention": 4}
    config = tiny_config(vocab_size=len(tokenizer), **(fields if architecture == "local" else {}))
    torch.manual_seed(0)
    M3BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parent = build_sentence_transformer(tmp_path)
    for exit_layer, width in ((None, None), (3, 20)):
        file = export_onnx(tmp_path, exit_layer=exit_layer, truncate_dim=width)
        session = onnxruntime.InferenceSession(str(file))
        for texts in (TEXTS, TEXTS[:1], ["x", TEXTS[4] * 2]):
            inputs = dict(parent.tokenizer(texts, padding=True, return_tensors="np"))
            vectors, states = session.run(None, {k: v.astype(np.int64) for k, v in inputs.items()})
            wanted = parent.encode(texts, exit_layer=exit_layer, truncate_dim=width)
            np.testing.assert_allclose(vectors, wanted, atol=1e-4, rtol=1e-4)
            assert states.shape == (*inputs["input_ids"].shape, 32)
    names = sorted(p.name for p in (tmp_path / "onnx").iterdir())
    assert names == ["model.onnx", "model_exit3.onnx"]
    assert (tmp_path / "onnx" / names[1]).stat().st_size < (tmp_path / "onnx" / names[0]).stat().st_size


def test_as_a_sentence_transformer_with_prompts_and_in_int8(checkpoint, tmp_path):
    parent = build_sentence_transformer(checkpoint)
    parent.prompts = {"query": "q: ", "document": ""}
    export_submodel(parent, tmp_path / "out", 3, 20)
    wanted = build_sentence_transformer(tmp_path / "out").encode_query(TEXTS)
    export_onnx(tmp_path / "out")
    plain = load_onnx(tmp_path / "out", threads=1)
    np.testing.assert_allclose(plain.encode_query(TEXTS), wanted, atol=1e-5)
    assert plain.get_embedding_dimension() == 20
    torch_model = build_sentence_transformer(tmp_path / "out")
    torch_model.max_seq_length = plain.max_seq_length = 5
    assert plain.max_seq_length == 5
    np.testing.assert_allclose(plain.encode(TEXTS), torch_model.encode(TEXTS), atol=1e-5)
    for target in ("avx512_vnni", "avx2", "arm64"):
        file = export_onnx(tmp_path / "out", int8=True, target=target)
        assert cosine(load_onnx(tmp_path / "out", f"onnx/{file.name}").encode_query(TEXTS), wanted).min() > 0.98
    files = {p.name: p.stat().st_size for p in (tmp_path / "out" / "onnx").iterdir()}
    assert sorted(files) == ["model.onnx", "model_int8.onnx"]


def test_a_loaded_model_is_exported_at_its_default_exit_and_left_as_it_is(checkpoint, tmp_path):
    model = build_sentence_transformer(checkpoint, model_kwargs={"dtype": torch.bfloat16})
    model.prompts, model.default_prompt_name = {"query": "q: ", "document": ""}, "query"
    model.exit_layer = 1
    model.train()
    file = export_onnx(model, tmp_path)
    assert file.name == "model_exit1.onnx" and model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="Name an output_dir"):
        export_onnx(model)


def test_width_and_what_is_fixed_in_the_file(checkpoint, tmp_path):
    directory = tmp_path / "model"
    build_sentence_transformer(checkpoint).save_pretrained(str(directory))
    export_onnx(directory)
    assert load_onnx(directory, truncate_dim=8).encode("text").shape == (8,)
    with pytest.raises(ValueError, match="exit_layer cannot be chosen here"):
        load_onnx(directory, exit_layer=1)


def test_a_graph_that_is_wrong_is_not_kept(checkpoint, tmp_path, monkeypatch):
    from m3bert_hf.sentence_transformer import M3BertSentenceTransformer

    encode = M3BertSentenceTransformer.encode
    monkeypatch.setattr(M3BertSentenceTransformer, "encode", lambda *a, **k: encode(*a, **k) + 1)
    with pytest.raises(ValueError, match="not written"):
        export_onnx(checkpoint, tmp_path)
    assert not list((tmp_path / "onnx").iterdir())


def test_bad_arguments_are_named(checkpoint, tmp_path):
    for options, message in (
        ({"exit_layer": 2}, "exit_layer=2"),
        ({"truncate_dim": 99}, "truncate_dim=99"),
        ({"target": "sse"}, "target='sse'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(checkpoint, tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="--onnx"):
        load_onnx(checkpoint, "onnx/none.onnx")


def test_command(checkpoint, tmp_path, capsys):
    main(f"export {checkpoint} {tmp_path / 'out'} --exit-layer 3 --truncate-dim 20 --onnx --int8".split())
    assert "model_int8.onnx" in capsys.readouterr().out
    assert load_onnx(tmp_path / "out", "onnx/model_int8.onnx").encode("text").shape == (20,)
