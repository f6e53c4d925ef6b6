"""What bfloat16 and int8 cost in quality: a checkpoint on a retrieval task at each exit, against its float32 self.

    python benchmarks/precision.py MODEL --queries F --documents F --output precision.json

`--pool` documents (all right ones among them) keep it short. The cosine is that of the same text's vectors in both
precisions, over the queries; quality is MRR@10 with queries and documents encoded in the same precision.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from m3bert_hf import build_sentence_transformer
from m3bert_hf.onnx_export import export_onnx, load_onnx
from m3bert_hf.retrieval_metrics import retrieval_metrics
from m3bert_hf.retrieval_task import load_retrieval_task
from m3bert_hf.search import exact_search


def main() -> None:
    """Measure each exit in each precision and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    task = load_retrieval_task(options.queries, options.documents).with_pool(options.pool)
    rows: list[dict[str, Any]] = []
    exits = build_sentence_transformer(options.model).exit_layers
    print("| exit | precision | least cosine | 1st percentile | mean cosine | MRR@10 | of float32 |")
    print("| ---: | --- |" + " ---: |" * 5)
    for exit_layer in exits:
        reference: Any = None
        for precision in ("float32", "bfloat16", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                if precision == "int8":
                    source = build_sentence_transformer(options.model, exit_layer)
                    source.save_pretrained(folder)
                    export_onnx(folder, int8=True)
                    model: Any = load_onnx(folder, "onnx/model_int8.onnx")
                else:
                    kwargs = {"dtype": getattr(torch, precision)}
                    model = build_sentence_transformer(options.model, exit_layer, device="cpu", model_kwargs=kwargs)
                model.max_seq_length = 64
                encode: dict[str, Any] = {"batch_size": 64, "convert_to_tensor": True, "show_progress_bar": False}
                queries = model.encode_query(task.queries, **encode).float()
                documents = model.encode_document(task.documents, **encode).float()
            _, hits = exact_search(queries, documents, 10)
            quality = retrieval_metrics(hits, task.with_duplicates(), (10,))["mrr@10"].mean().item()
            if precision == "float32":
                reference = queries, quality
            cosines = cosine_similarity(queries, reference[0]).sort().values
            row = {
                "exit_layer": exit_layer,
                "precision": precision,
                "least_cosine": cosines[0].item(),
                "percentile_1": cosines[len(cosines) // 100].item(),
                "mean_cosine": cosines.mean().item(),
                "mrr@10": quality,
                "of_float32": quality / reference[1],
            }
            rows.append(row)
            print(
                f"| {exit_layer} | {precision} | {row['least_cosine']:.4f} | {row['percentile_1']:.4f} | "
                f"{row['mean_cosine']:.4f} | {quality:.4f} | {row['of_float32']:.3f} |",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
