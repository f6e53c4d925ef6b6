"""Search a small multilingual collection at several depths and widths, side by side.

python examples/search.py "how do I resize a photo"
python examples/search.py "写真のサイズを変更する" --exit-layer 2 --truncate-dim 64
python examples/search.py "my question" --documents my_texts.jsonl
"""

import argparse
import json
import textwrap
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from m3bert_hf import M3BertSentenceTransformer, build_sentence_transformer
from m3bert_hf.search import exact_search


ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "checkpoints" / "m3bert-nano"
DOCUMENTS = Path(__file__).resolve().parent / "data" / "passages.jsonl"


def read_documents(path: Path) -> list[dict[str, str]]:
    """Read one document a line: JSON with `document` (and perhaps `lang`), or plain text."""
    documents = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        row = json.loads(line) if line.lstrip().startswith("{") else {"document": line}
        if not isinstance(row.get("document"), str):
            raise ValueError(f"{path} has a row without `document`: {line[:80]}")
        documents.append(row)
    if not documents:
        raise ValueError(f"{path} holds no documents.")
    return documents


def search(
    model: M3BertSentenceTransformer, query: str, documents: list[str], exit_layer: int, truncate_dim: int, top_k: int
) -> tuple[list[tuple[float, int]], float, float]:
    """Return (similarity, index) of the best documents, and milliseconds for all documents and for the query."""
    options = {"exit_layer": exit_layer, "truncate_dim": truncate_dim, "convert_to_tensor": True}
    model.encode_query("warm-up", **options)
    start = time.perf_counter()
    vectors = model.encode_document(documents, **options)
    encoded = time.perf_counter()
    scores, indices = exact_search(model.encode_query([query], **options), vectors, top_k)
    end = time.perf_counter()
    hits = list(zip(scores[0].tolist(), indices[0].tolist(), strict=True))
    return hits, 1e3 * (encoded - start), 1e3 * (end - encoded)


def main() -> None:
    """Parse the command line, search at each cell and print the hits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", help="in any language")
    parser.add_argument("--model", default=str(MODEL), help="an m3BERT checkpoint (default: the one shipped here)")
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="JSON lines with `document`, or plain lines")
    parser.add_argument("--exit-layer", type=int, help="search at this exit only")
    parser.add_argument("--truncate-dim", type=int, help="search at this width only")
    parser.add_argument("--top-k", type=int, default=3)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if not options.query.strip():
            raise ValueError("The query is empty: there is nothing to search for.")
        rows = read_documents(options.documents)
        model = build_sentence_transformer(options.model)
        config = model.transformers_model.config
        exits = [options.exit_layer] if options.exit_layer is not None else config.exit_layers
        dims = config.matryoshka_dimensions
        if options.truncate_dim is not None:
            dims = [options.truncate_dim]
        elif options.exit_layer is None:
            dims = [dims[0], dims[-1]]
        texts = [row["document"] for row in rows]
        print(f'"{options.query}" in {len(texts)} documents\n')
        for exit_layer in exits:
            for dim in dims:
                with torch.inference_mode():
                    hits, all_ms, query_ms = search(model, options.query, texts, exit_layer, dim, options.top_k)
                size = 4 * dim
                print(
                    f"exit {exit_layer} of {config.num_hidden_layers}, {dim} dimensions: query {query_ms:.1f} ms, "
                    f"all documents {all_ms:.0f} ms, {size} bytes a vector"
                )
                for score, index in hits:
                    text = textwrap.shorten(texts[index], 96, placeholder=" ...")
                    print(f"  {score:.3f}  {rows[index].get('lang', ''):2}  {text}")
                print()
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
