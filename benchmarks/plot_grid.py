"""Draw the grid that `python -m m3bert_hf evaluate ... --output grid.json` measured.

python benchmarks/plot_grid.py grid.json docs/nano-grid.png --title "..."
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Read the JSON and write one heat map for each metric, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--metrics", nargs="+", default=["mrr@10", "recall@100"])
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    rows = json.loads(options.grid.read_text(encoding="utf-8"))
    exits = sorted({row["exit_layer"] for row in rows})
    dims = sorted({row["truncate_dim"] for row in rows})
    figure, axes = plt.subplots(
        1, len(options.metrics), figsize=(4.2 * len(options.metrics), 3.4), squeeze=False, layout="constrained"
    )
    for axis, metric in zip(axes[0], options.metrics, strict=True):
        cells = {(row["exit_layer"], row["truncate_dim"]): row[metric] for row in rows}
        values = [[cells[e, d] for d in dims] for e in exits]
        best = max(max(line) for line in values)
        axis.imshow(values, cmap="viridis", vmin=0, vmax=best)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                color = "black" if value > 0.6 * best else "white"
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", color=color, fontsize=11)
        axis.set_xticks(range(len(dims)), dims)
        axis.set_yticks(range(len(exits)), exits)
        axis.set_xlabel("dimensions of the vector")
        axis.set_ylabel("exit layer")
        axis.set_title(metric.replace("mrr", "MRR").replace("recall", "Recall"))
    figure.suptitle(options.title, fontsize=11)
    figure.savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
