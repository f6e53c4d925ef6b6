"""Throughput, latency, memory and size of encoding on a CPU: ours at several exits and runtimes, and its peers.

    python benchmarks/inference.py --output inference.json --picture inference.png

Base size with random weights, each case in a process of its own, through sentence-transformers' `encode` (peers on
ONNX files: without its overhead). Texts are real (`--queries`, `--documents`: JSON lines with `query` and
`document`; those of `examples/data` by default) and cut at 64 tokens; every model gets the same tokenizer, so that
all see the same lengths, and the vocabulary size of its own kind. Peers, with transformers' own code: XLM-R base
(the body of multilingual-e5-base), ModernBERT-base, mmBERT-base and mmBERT-small. bf16 means weights in bfloat16;
int8 is ONNX with dynamic quantisation, on onnxruntime; prepacked is `prepack_weights`, for ours alone; compiled is
`compile_encoder` for ours and `torch.compile(dynamic=True)` of the encoder for peers; openvino runs the same ONNX
files on OpenVINO.

- docs/s: batches of 32 or 96, whichever suits the model (`--batch-sizes`), sorted by length by the library; the best
  of the repeats. With `--rounds 3` every case is measured three times, in turn, so that an hour in which the machine
  is slow is not one case's alone; the best counts.
- p50, p95: single queries, one after another, all of them in each repeat.
- GFLOP/s: 2 operations for each weight of the layers that run and each token, padding not counted.
- load: from the files to the first vector; compiled, to the first batches. peak: of the process, after loading and
  encoding in batches of every size. size: of the weights.

`--packing` measures our padded batches with and without `unpad_inputs`, on batches of unsorted and of sorted texts.
"""

import argparse
import json
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "checkpoints" / "m3bert-nano"
PEERS = {
    "XLM-R base": ("XLMRoberta", 250_002, {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "ModernBERT-base": ("ModernBert", 50_368, {"num_hidden_layers": 22, "intermediate_size": 1152}),
    "mmBERT-base": ("ModernBert", 256_000, {"num_hidden_layers": 22, "intermediate_size": 1152}),
    "mmBERT-small": (
        "ModernBert",
        256_000,
        {"num_hidden_layers": 22, "intermediate_size": 1152, "hidden_size": 384, "num_attention_heads": 6},
    ),
}
OURS = ("exit 4", "exit 8", "exit 12", "exported (4, 64), 32k vocabulary")
KINDS = (
    "float32",
    "bf16",
    "int8",
    "float32 prepacked",
    "bf16 prepacked",
    "float32 compiled",
    "bf16 compiled",
    "bf16 openvino",
    "int8 openvino",
)
CASES = [(n, k) for n in (*OURS, *PEERS) for k in KINDS if n in OURS or not k.endswith("prepacked")]


def read_texts(file: Path, key: str, count: int) -> list[str]:
    """Draw texts from JSON lines."""
    opener: Any = lzma.open if file.suffix == ".xz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)[key] for line in lines]
    return random.Random(0).sample(texts, min(count, len(texts)))


def build(name: str, folder: Path) -> int:
    """Save a model with random weights; return the weights of its layers that run."""
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel, XLMRobertaConfig, XLMRobertaModel

    from m3bert_hf import M3BertConfig, M3BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if name in PEERS:
        kind, vocabulary, fields = PEERS[name]
        common = {"vocab_size": vocabulary, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        if kind == "XLMRoberta":
            model: Any = XLMRobertaModel(XLMRobertaConfig(**common, **fields), add_pooling_layer=False)
        else:
            model = ModernBertModel(ModernBertConfig(**common, cls_token_id=0, sep_token_id=2, **fields))
        layers = model.encoder.layer if kind == "XLMRoberta" else model.layers
    else:
        vocabulary = 32_000 if name.startswith("exported") else 250_002
        depth = 4 if name.startswith("exported") else 12
        exits = [4] if depth == 4 else [4, 8, 12]
        model = M3BertModel(M3BertConfig(vocab_size=vocabulary, num_hidden_layers=depth, exit_layers=exits))
        layers = model.layers[: 4 if depth == 4 else int(name.split()[1])]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)


def onnx_file(model: Any, folder: Path, int8: bool) -> Path:
    """Write an ONNX file of any encoder, perhaps quantised, as m3bert_hf does for its own."""
    from m3bert_hf import onnx_export

    plain, file = folder / "plain.onnx", folder / "model_int8.onnx"
    pipeline = onnx_export._Pipeline(model, None).eval()
    model.transformers_model.config.max_input_length = 512
    onnx_export._write_graph(pipeline, plain, model.transformers_model.config)
    if not int8:
        return plain
    onnx_export._quantize(plain, file, "avx512_vnni")
    plain.unlink()
    return file


def on_onnx(kind: str) -> bool:
    """Whether a kind runs an ONNX file."""
    return kind.startswith("int8") or kind.endswith("openvino")


def load(name: str, kind: str, folder: Path) -> Any:
    """Load a case as its users would."""
    from sentence_transformers import SentenceTransformer

    from m3bert_hf import build_sentence_transformer
    from m3bert_hf.compilation import compile_encoder
    from m3bert_hf.onnx_export import load_onnx
    from m3bert_hf.prepacking import prepack_weights

    if on_onnx(kind) and name not in PEERS:
        file = json.loads((folder / "file.json").read_text())
        if kind.endswith("openvino"):
            precision = "bfloat16" if kind.startswith("bf16") else None
            return load_onnx(folder, file, runtime="openvino", precision=precision)
        return load_onnx(folder, file)
    dtype, compiled = torch.bfloat16 if kind.startswith("bf16") else torch.float32, kind.endswith("compiled")
    options: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if name in PEERS:
        peer = SentenceTransformer(str(folder), device="cpu", **options)
        if compiled:
            peer[0].auto_model.compile(dynamic=True)
        return peer
    exit_layer = 4 if name.startswith("exported") else int(name.split()[1])
    width = 64 if name.startswith("exported") else None
    model = build_sentence_transformer(str(folder), exit_layer, width, device="cpu", **options)
    if kind.endswith("prepacked"):
        return prepack_weights(model)
    return compile_encoder(model) if compiled else model


class _OnnxPeer:
    """A peer's graph behind the same calls."""

    def __init__(self, folder: Path, kind: str):
        from transformers import AutoTokenizer

        from m3bert_hf.onnx_export import OnnxEncoder
        from m3bert_hf.openvino_encoder import OpenVinoEncoder

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        file = folder / ("model_int8.onnx" if kind.startswith("int8") else "plain.onnx")
        if kind.endswith("openvino"):
            precision = "bfloat16" if kind.startswith("bf16") else "float32"
            self.encoder: OnnxEncoder = OpenVinoEncoder(file, None, precision=precision)
        else:
            self.encoder = OnnxEncoder(file, None)
        self.max_seq_length = 64

    def encode(self, texts, batch_size: int = 32, **_):
        texts = [texts] if isinstance(texts, str) else texts
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), batch_size):
            batch = [texts[i] for i in order[start : start + batch_size]]
            features = self.tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt")
            self.encoder.embed(features["input_ids"], features["attention_mask"])


def prepare(name: str, kind: str, folder: Path) -> int:
    """Write what the case loads; in a process of its own, so that the measured one has only loaded it."""
    weights = build(name, folder)
    if on_onnx(kind):
        int8 = kind.startswith("int8")
        if name in PEERS:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
            onnx_file(model, folder, int8)
        else:
            from m3bert_hf.onnx_export import export_onnx

            exit_layer = 4 if name.startswith("exported") else int(name.split()[1])
            width = 64 if name.startswith("exported") else None
            file = export_onnx(folder, exit_layer=exit_layer, truncate_dim=width, int8=int8)
            (folder / "file.json").write_text(json.dumps(file.relative_to(folder).as_posix()))
    return weights


def measure(name: str, kind: str, folder: Path, weights: int, options: argparse.Namespace) -> dict[str, Any]:
    """Load and time a case."""
    from m3bert_hf.throughput import keep_freed_memory

    queries = read_texts(options.queries, "query", 40)
    documents = read_texts(options.documents, "document", options.count)
    # For peers as well: clearing the pages of intermediate results anew in every batch takes time.
    keep_freed_memory()
    start = time.perf_counter()
    model = _OnnxPeer(folder, kind) if on_onnx(kind) and name in PEERS else load(name, kind, folder)
    model.max_seq_length = 64
    model.encode(queries[0])
    if kind.endswith("compiled"):
        # What a server does before it answers; the time is part of loading.
        for size in options.batch_sizes:
            model.encode(documents, batch_size=size)
    row: dict[str, Any] = {"model": name, "kind": kind, "load_seconds": time.perf_counter() - start}
    rates, times = [], []
    for _ in range(options.repeats):
        for size in options.batch_sizes:
            start = time.perf_counter()
            model.encode(documents, batch_size=size)
            rates.append((len(documents) / (time.perf_counter() - start), size))
    for text in queries[:3]:
        model.encode(text)
    for text in queries * options.repeats:
        start = time.perf_counter()
        model.encode(text)
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    lengths = model.tokenizer(documents, truncation=True, max_length=64)["input_ids"]
    tokens = sum(map(len, lengths)) / len(documents)
    size = sum(f.stat().st_size for f in folder.rglob("*.onnx" if on_onnx(kind) else "*.safetensors"))
    rate, batch_size = max(rates)
    row.update(
        batch_size=batch_size,
        documents_per_second=rate,
        tokens_per_second=rate * tokens,
        gflops=2 * weights * rate * tokens / 1e9,
        query_p50_ms=times[len(times) // 2],
        query_p95_ms=times[int(len(times) * 0.95)],
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        size_mib=(size / 2 if kind.startswith("bf16") and not on_onnx(kind) else size) / 2**20,
    )
    return row


def packing(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time padded batches of real lengths with and without `unpad_inputs`."""
    from transformers import AutoTokenizer

    from m3bert_hf import M3BertConfig, M3BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = M3BertModel(M3BertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, exit_layers=[4])).eval()
    documents = read_texts(options.documents, "document", options.count)
    rows = []
    for order in ("unsorted", "sorted"):
        texts = documents if order == "unsorted" else sorted(documents, key=len)
        batches = [
            tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt")
            for i in range(0, len(texts), 32)
        ]
        full = sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["attention_mask"].numel() for b in batches)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            best = {}
            for _ in range(options.repeats + 1):
                for unpad in (False, None):
                    model.config.unpad_inputs = unpad
                    start = time.perf_counter()
                    with torch.inference_mode():
                        for batch in batches:
                            model(**batch)
                    seconds = time.perf_counter() - start
                    best[unpad] = min(best.get(unpad, seconds), seconds)
            rows.append(
                {
                    "batches": order,
                    "dtype": str(dtype).removeprefix("torch."),
                    "share_of_tokens": full,
                    "padded_seconds": best[False],
                    "packed_seconds": best[None],
                    "speed_up": best[False] / best[None],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_in_turn(cases: list[tuple[str, str]], texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure each case in a process of its own, all cases once in each round, and keep its best figures."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    # What torch loads is the same in every dtype.
    turns = [((name, kind), (name, kind if on_onnx(kind) else "torch")) for name, kind in cases * rounds]
    last = {files: place for place, (_, files) in enumerate(turns)}
    prepared: dict[tuple[str, str], subprocess.CompletedProcess] = {}
    with tempfile.TemporaryDirectory() as parent:
        for place, (case, files) in enumerate(tqdm(turns, desc="cases")):
            folder = Path(parent) / "-".join(files).replace(" ", "_")
            # Each case compiles what it runs: the cost of loading it is not another's.
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(parent) / f"inductor-{place}")}
            command = [sys.executable, __file__, "--one", *case]
            common: Any = {"capture_output": True, "text": True, "env": environment}
            if files not in prepared:
                folder.mkdir()
                prepared[files] = subprocess.run([*command, "--prepare", str(folder)], **common)
            done = prepared[files]
            if done.returncode == 0:
                measured = ["--measure", str(folder), "--weights", done.stdout.strip().splitlines()[-1]]
                done = subprocess.run([*command, *measured, *texts], **common)
            if done.returncode == 0:
                row = json.loads(done.stdout.strip().splitlines()[-1])
                print(json.dumps(row), flush=True)
                rows[case] = best_of(rows[case], row) if case in rows else row
            else:
                # A peer that does not export is left out and said to be.
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                print(f"{', '.join(case)}: {lines[-1][:300]}", flush=True)
            shutil.rmtree(environment["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
            if last[files] == place:
                shutil.rmtree(folder)
    return list(rows.values())


def best_of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Take the throughput of the faster round, the latencies of the one with the lower p50, and its load time."""
    faster = max(one, other, key=lambda row: row["documents_per_second"])
    prompter = min(one, other, key=lambda row: row["query_p50_ms"])
    return {**faster, **{key: prompter[key] for key in ("query_p50_ms", "query_p95_ms", "load_seconds")}}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw documents per second and the p50 of a query as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(names) + 1.4), sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")([0.95 * place / len(kinds) for place in range(1, len(kinds) + 1)])
    labels = (("documents_per_second", "documents per second"), ("query_p50_ms", "single query, p50 (ms)"))
    for axis, (key, label) in zip(axes, labels, strict=True):
        for index, kind in enumerate(kinds):
            for place, name in enumerate(names):
                row = next((r for r in rows if r["model"] == name and r["kind"] == kind), None)
                if row is None:
                    continue
                height = 0.8 / len(kinds)
                y = place + (index - (len(kinds) - 1) / 2) * height
                bar = axis.barh(y, row[key], 0.93 * height, color=colors[index], label=kind if place == 0 else None)
                axis.bar_label(bar, fmt="%.0f", fontsize=7, padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [name if name in PEERS else f"m3BERT, {name}" for name in names])
    axes[0].invert_yaxis()
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the cases and print a table."""
    data = ROOT / "examples" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, default=data / "queries.jsonl")
    parser.add_argument("--documents", type=Path, default=data / "passages.jsonl")
    parser.add_argument("--count", type=int, default=128, help="documents")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 96], help="the best counts")
    parser.add_argument("--rounds", type=int, default=1, help="times that every case is measured, all in turn")
    parser.add_argument("--models", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:3])
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        print(prepare(*options.one, options.prepare))
        return
    if options.measure:
        print(json.dumps(measure(*options.one, options.measure, options.weights, options)))
        return
    rows: list[dict[str, Any]] = []
    if options.packing:
        rows = packing(options)
    else:
        cases = [case for case in CASES if case[0] in options.models and case[1] in options.kinds]
        texts = ["--queries", str(options.queries), "--documents", str(options.documents)]
        texts += ["--count", str(options.count), "--repeats", str(options.repeats)]
        texts += ["--batch-sizes", *map(str, options.batch_sizes)]
        rows = measure_in_turn(cases, texts, options.rounds)
        names = "batch | docs/s | tokens/s | GFLOP/s | p50 (ms) | p95 (ms) | load (s) | peak (MiB) | size (MiB)"
        print(f"\n| model | kind | {names} |")
        print("| --- | --- |" + " ---: |" * 9)
        for row in rows:
            figures = ("documents_per_second", "tokens_per_second", "gflops", "query_p50_ms", "query_p95_ms")
            values = [f"{row[key]:,.1f}" if row[key] < 100 else f"{row[key]:,.0f}" for key in figures]
            values += [f"{row['load_seconds']:.1f}", f"{row['peak_mib']:,.0f}", f"{row['size_mib']:,.0f}"]
            print(f"| {row['model']} | {row['kind']} | {row['batch_size']} | " + " | ".join(values) + " |")
        if options.picture:
            draw(rows, options.picture)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
