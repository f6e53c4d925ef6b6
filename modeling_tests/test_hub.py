"""One directory, three readers: this package, remote code without it, and sentence-transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config

from m3bert_hf import (
    M3BertForMaskedLM,
    M3BertForMultipleChoice,
    M3BertForQuestionAnswering,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
    build_sentence_transformer,
)


CLASSES = [
    M3BertModel,
    M3BertForMaskedLM,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertForQuestionAnswering,
    M3BertForMultipleChoice,
]

# Makes the package impossible to import, wherever it is installed.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "m3bert_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
try:
    import m3bert_hf
    raise SystemExit("the package is still importable")
except ModuleNotFoundError:
    pass
"""


def run_without_package(code: str, tmp_path) -> dict:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_class_loads_by_every_auto_class_without_the_package(model_class, tokenizer, tmp_path):
    torch.manual_seed(0)
    saved = model_class(tiny_config(vocab_size=len(tokenizer), exit_norm="last", tie_word_embeddings=True)).eval()
    saved.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.bin"))
    code = f"""
import json, torch, transformers
path = {str(tmp_path / "m")!r}
config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
result = {{"classes": []}}
for name in config.auto_map:
    if name == "AutoConfig":
        continue
    # Another task's classifier has another shape; that it is not loaded is the library's ordinary report.
    model = getattr(transformers, name).from_pretrained(path, trust_remote_code=True, ignore_mismatched_sizes=True)
    result["classes"].append(type(model).__name__)
    model(torch.tensor([[[5, 6]]] if "Choice" in name else [[5, 6]]))
model = transformers.AutoModel.from_pretrained(path, trust_remote_code=True, exit_layer=3).eval()
result["layers"] = len(model.layers)
with torch.no_grad():
    result["state"] = model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, 0].tolist()
model.save_pretrained(path + "-again")
again = transformers.AutoModel.from_pretrained(path + "-again", trust_remote_code=True)
result["again"] = len(again.layers)
try:
    model(torch.tensor([[5]]), exit_layer=2)
except ValueError as error:
    result["error"] = str(error)
print(json.dumps(result))
"""
    got = run_without_package(code, tmp_path)
    assert sorted(got["classes"]) == sorted(c.__name__ for c in CLASSES)
    assert got["layers"] == got["again"] == 3
    assert "exit_layer=2 does not exist" in got["error"]
    encoder = saved.base_model
    with torch.no_grad():
        expected = encoder(torch.tensor([[5, 6, 7]]), exit_layer=3).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.tensor(got["state"]), expected, atol=1e-5, rtol=1e-5)
    # And here, where the package is imported, without the flag.
    assert type(model_class.from_pretrained(tmp_path / "m-again", output_loading_info=True)[0]) is model_class


@pytest.mark.parametrize("source", ["transformers", "sentence-transformers"])
def test_sentence_transformer_loads_and_encodes_without_the_package(source, checkpoint, tmp_path):
    built = build_sentence_transformer(checkpoint)
    path = checkpoint
    if source == "sentence-transformers":
        path = tmp_path / "st"
        built.save_pretrained(str(path))
    code = f"""
import json
from sentence_transformers import SentenceTransformer
path = {str(path)!r}
texts = ["a small dog", "写真"]
load = dict(trust_remote_code=True, device="cpu")
cut = dict(load, truncate_dim=8)
result = {{
    "full": SentenceTransformer(path, **load).encode(texts).tolist(),
    "config": SentenceTransformer(path, config_kwargs={{"exit_layer": 3}}, **cut).encode(texts).tolist(),
    "model": SentenceTransformer(path, model_kwargs={{"exit_layer": 3}}, **cut).encode(texts).tolist(),
}}
if {source == "sentence-transformers"}:
    model = SentenceTransformer(path, **load)
    result["call"] = model.encode(texts, exit_layer=3, truncate_dim=8).tolist()
    result["query"] = model.encode_query(texts, exit_layer=3, truncate_dim=8).tolist()
print(json.dumps(result))
"""
    got = {key: torch.tensor(value) for key, value in run_without_package(code, tmp_path).items()}
    texts = ["a small dog", "写真"]
    torch.testing.assert_close(got.pop("full"), built.encode(texts, convert_to_tensor=True), atol=1e-5, rtol=1e-5)
    expected = built.encode(texts, exit_layer=3, truncate_dim=8, convert_to_tensor=True)
    for key, value in got.items():
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=key)


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    """The Hub is replaced by a recorder of the commit, in whichever way this transformers calls it."""
    from transformers.utils import hub

    uploaded = {}

    class Repo:
        repo_id = "someone/model"

    class Api:
        def __getattr__(self, name):
            def call(*arguments, **options):
                for operation in options.get("operations", []):
                    uploaded[operation.path_in_repo] = operation
                return Repo()

            return call

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda *a, **k: Api(), raising=False)
        for name in ("create_repo", "create_commit", "create_branch"):
            if hasattr(hub, name):
                monkeypatch.setattr(f"{module}.{name}", getattr(Api(), name), raising=False)
    M3BertModel(tiny_config()).push_to_hub("someone/model")
    assert {"config.json", "model.safetensors", "modeling_m3bert.py", "configuration_m3bert.py"} <= set(uploaded)
    assert not any(name.endswith(".bin") for name in uploaded)
