"""Table and picture of every granularity's loss over one or several stages of pretraining."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .trainer import last_complete_checkpoint


def read_history(run: str | Path) -> list[dict]:
    """Return the log of a run, finished or not.

    Args:
        run: `output_dir` of the run.

    Raises:
        FileNotFoundError: If neither the directory nor a checkpoint in it has a `trainer_state.json`.
    """
    checkpoint = last_complete_checkpoint(run)
    for directory in (Path(run), *([Path(checkpoint)] if checkpoint else [])):
        path = directory / "trainer_state.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(
        f"{run} has no trainer_state.json and no complete checkpoint: nothing was logged there yet."
    )


def granularities_of(entry: dict, prefix: str) -> dict[tuple[int, int], float]:
    """Return the values of an entry of the log by (exit, dimension).

    Args:
        entry: Of the log.
        prefix: Such as `"loss"` or `"eval_accuracy"`.
    """
    found = {}
    for key, value in entry.items():
        match = re.fullmatch(rf"{prefix}_L(\d+)D(\d+)", key)
        if match:
            found[int(match[1]), int(match[2])] = float(value)
    return found


def first_and_last(runs: Sequence[str | Path], prefix: str = "eval_loss") -> str:
    """Return a table of each granularity's first and last value in each run.

    Args:
        runs: Output directories, in order.
        prefix: What to show; `"loss"` where a run was not evaluated.
    """
    columns, names = [], []
    for run in runs:
        values = [granularities_of(entry, prefix) for entry in read_history(run)]
        values = [value for value in values if value]
        if values:
            columns.append((values[0], values[-1]))
            names.append(Path(run).name)
    lines = [
        "| exit | dimension | " + " | ".join(f"{name}: first | last" for name in names) + " |",
        "| ---: | ---: |" + " ---: | ---: |" * len(names),
    ]
    for layer, dimension in sorted({pair for first, _ in columns for pair in first}):
        cells = [f"{part[layer, dimension]:.3f}" for first, last in columns for part in (first, last)]
        lines.append(f"| {layer} | {dimension} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(runs: Sequence[str | Path], picture: str | Path) -> None:
    """Draw the loss of every granularity, in training and on held-out documents, over stages one after another.

    Args:
        runs: Output directories, in order.
        picture: PNG file.

    Raises:
        FileNotFoundError: If a run has no log.
        ImportError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    histories = [(Path(run).name, read_history(run)) for run in runs]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours, styles = plt.get_cmap("viridis"), ["-", "--", ":", "-."]
    grid = sorted({pair for _, history in histories for entry in history for pair in granularities_of(entry, "loss")})
    exits, dimensions = sorted({layer for layer, _ in grid}), sorted({d for _, d in grid})
    for axis, prefix, title in zip(axes, ("loss", "eval_loss"), ("training", "held-out documents"), strict=True):
        begin = 0
        for name, history in histories:
            entries = [entry for entry in history if granularities_of(entry, prefix)]
            for layer, dimension in grid:
                points = [(begin + e["step"], granularities_of(e, prefix).get((layer, dimension))) for e in entries]
                points = [point for point in points if point[1] is not None]
                axis.plot(
                    *(zip(*points, strict=True) if points else ([], [])),
                    color=colours(exits.index(layer) / max(len(exits) - 1, 1) * 0.85),
                    linestyle=styles[dimensions.index(dimension) % len(styles)],
                    linewidth=1.1,
                    label=f"exit {layer}, d={dimension}" if begin == 0 else None,
                )
            begin += max((e["step"] for e in history if "step" in e), default=0)
            axis.axvline(begin, color="0.8", linewidth=0.8)
            axis.annotate(name, (begin, 1.0), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8)
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=10, pad=14)
    axes[0].set_ylabel("cross entropy of masked tokens")
    axes[1].legend(fontsize=7, ncols=2)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


__all__ = ["draw_curves", "first_and_last", "granularities_of", "read_history"]
