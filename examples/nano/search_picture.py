"""Draw what `examples/search.py` finds for one question in many languages, as a picture of a terminal.

python examples/nano/search_picture.py --topic photo-resize --output docs/search.svg    (pip install rich)
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from search import DOCUMENTS, MODEL, read_documents, search  # noqa: E402

from m3bert_hf import build_sentence_transformer  # noqa: E402
from m3bert_hf.text_data import read_json_lines  # noqa: E402


def main() -> None:
    """Search with every query of a topic, at one exit and width, and save the best hits as SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", default="photo-resize", help="first part of the queries' ids")
    parser.add_argument("--queries", type=Path, default=DOCUMENTS.with_name("queries.jsonl"))
    parser.add_argument("--exit-layer", type=int)
    parser.add_argument("--truncate-dim", type=int)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/search.svg"))
    options = parser.parse_args()
    model = build_sentence_transformer(str(MODEL))
    rows = read_documents(DOCUMENTS)
    texts = [row["document"] for row in rows]
    exit_layer = options.exit_layer or model.exit_layers[0]
    width = options.truncate_dim or model.matryoshka_dimensions[1]
    table = Table(title=f"m3bert-nano, exit {exit_layer}, {width} dimensions: {4 * width} bytes a text")
    for heading in ("query", "score", "", "best hits among passages in eight languages"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=88)
    queries = [row for row in read_json_lines(options.queries) if row["id"].partition(".")[0] == options.topic]
    for row in queries:
        with torch.inference_mode():
            hits, _, _ = search(model, row["query"], texts, exit_layer, width, options.top_k)
        for place, (score, index) in enumerate(hits):
            query = row["query"] if place == 0 else ""
            table.add_row(query, f"{score:.2f}", rows[index].get("lang", ""), texts[index])
        table.add_section()
    console = Console(record=True, width=150)
    console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(options.output), title="search")


if __name__ == "__main__":
    main()
