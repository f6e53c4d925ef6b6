"""A grid of measured cells (exit, dimension, precision): tables, JSON, CSV, pictures, and which cell to take."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


_AXES = {
    "query_p50_ms": "latency of one query, encoding only, p50 (ms)",
    "bytes_per_vector": "bytes per stored vector",
    "megabytes": "model size (MB)",
    "documents_per_second": "documents per second",
}
_METRICS = {"mrr": "MRR", "recall": "Recall", "ndcg": "nDCG", "spearman": "Spearman"}
# Told apart by shape and lightness too, not by hue alone.
_MARKERS = "osD^vP*X"


def metric_label(metric: str) -> str:
    """Return a metric's name as people write it: `mrr@10` is MRR@10."""
    kind, _, k = metric.partition("@")
    return _METRICS.get(kind, kind) + (f"@{k}" if k else "")


@dataclass
class GridReport:
    """Measured cells.

    Attributes:
        rows: One dictionary for each cell: `exit_layer`, `truncate_dim`, `precision`, metrics, sizes, speeds, and
            `groups` with the metrics of each group of queries.
        description: How it was measured: task, numbers of queries and documents, threads, device, versions.
        metric: The metric that cells are compared by.
    """

    rows: list[dict[str, Any]]
    description: dict[str, Any] = field(default_factory=dict)
    metric: str = "mrr@10"

    # ------------------------------------------------------------------ access

    @property
    def exit_layers(self) -> list[int]:
        """Exits that were measured, ascending."""
        return sorted({row["exit_layer"] for row in self.rows})

    @property
    def truncate_dims(self) -> list[int]:
        """Dimensions that were measured, ascending."""
        return sorted({row["truncate_dim"] for row in self.rows})

    @property
    def precisions(self) -> list[str]:
        """Precisions that were measured, in the order of the rows."""
        return list(dict.fromkeys(row.get("precision", "float32") for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """Names of the measured metrics of quality."""
        return [key for key in self.rows[0] if key.partition("@")[0] in _METRICS]

    def cell(self, exit_layer: int, truncate_dim: int, precision: str = "float32") -> dict[str, Any]:
        """Return the row of a cell.

        Raises:
            KeyError: If it was not measured.
        """
        for row in self.rows:
            key = row["exit_layer"], row["truncate_dim"], row.get("precision", "float32")
            if key == (exit_layer, truncate_dim, precision):
                return row
        raise KeyError(
            f"({exit_layer}, {truncate_dim}, {precision}) was not measured; exits {self.exit_layers}, dimensions "
            f"{self.truncate_dims}, precisions {self.precisions} were."
        )

    def group_mean(self, row: dict[str, Any], metric: str, leave_out: Sequence[str] = (), at_least: int = 1) -> float:
        """Return a metric's unweighted mean over a row's groups of at least so many queries.

        Raises:
            ValueError: If no group is left.
        """
        values = [
            group[metric]
            for name, group in row.get("groups", {}).items()
            if name not in leave_out and group["queries"] >= at_least
        ]
        if not values:
            raise ValueError("No group is left to average over.")
        return sum(values) / len(values)

    def flat_metrics(self) -> dict[str, float]:
        """Return `exit{l}_dim{d}_{metric}` for each cell, with `_{precision}` if not float32, and `mean_{metric}`."""
        flat = {}
        for row in self.rows:
            precision = row.get("precision", "float32")
            suffix = "" if precision == "float32" else f"_{precision}"
            for metric in self.metrics:
                flat[f"exit{row['exit_layer']}_dim{row['truncate_dim']}{suffix}_{metric}"] = row[metric]
        whole = [row for row in self.rows if row.get("precision", "float32") == self.precisions[0]]
        for metric in self.metrics:
            flat[f"mean_{metric}"] = sum(row[metric] for row in whole) / len(whole)
        return flat

    # ------------------------------------------------------------------ choosing

    def recommend(
        self,
        min_quality: float = 0.97,
        metric: str | None = None,
        prefer: Literal["latency", "storage"] = "latency",
    ) -> dict[str, Any]:
        """Return the smallest cell that keeps a share of the best cell's quality.

        Args:
            min_quality: Share of the best value, within 0 and 1.
            metric: `None` means `self.metric`.
            prefer: What is small: `latency` takes the shallowest exit and of its cells the one with the fewest bytes
                per vector; `storage` the fewest bytes per vector and of these the shallowest exit.

        Raises:
            ValueError: If the share is not within 0 and 1, or `prefer` or the metric does not exist.
        """
        metric = metric or self.metric
        if not 0.0 <= min_quality <= 1.0:
            raise ValueError(f"min_quality={min_quality} must be within 0 and 1, a share of the best cell's {metric}.")
        if prefer not in ("latency", "storage"):
            raise ValueError(f"prefer={prefer!r} does not exist: choose 'latency' or 'storage'.")
        if metric not in self.metrics:
            raise ValueError(f"metric={metric!r} was not measured: choose one of {self.metrics}.")
        best = max(row[metric] for row in self.rows)
        # A share of a negative correlation would be above it: then only the best is good.
        good = [row for row in self.rows if row[metric] >= min(best, min_quality * best)]
        if not good:
            raise ValueError(f"{metric} is not a number in some cell: there is nothing to choose by.")
        names = ("exit_layer", "bytes_per_vector") if prefer == "latency" else ("bytes_per_vector", "exit_layer")
        return min(good, key=lambda row: (row[names[0]], row[names[1]], -row[metric]))

    def pareto_front(self, cost: str, metric: str | None = None, smaller: bool = True) -> list[dict[str, Any]]:
        """Return the cells that no other cell beats in quality at the same cost or less, cheapest first.

        Args:
            cost: Column, such as `query_p50_ms` or `bytes_per_vector`.
            metric: `None` means `self.metric`.
            smaller: Whether less of the cost is better.
        """
        metric = metric or self.metric
        sign = 1 if smaller else -1
        front: list[dict[str, Any]] = []
        for row in sorted(self.rows, key=lambda row: (sign * row[cost], -row[metric])):
            if not front or row[metric] > front[-1][metric]:
                front.append(row)
        return front

    # ------------------------------------------------------------------ writing

    def table(self, metric: str | None = None, precision: str | None = None, digits: int = 3) -> str:
        """Return a Markdown table of one metric: exits down, dimensions across; the first precision by default."""
        metric = metric or self.metric
        precision = precision or self.precisions[0]
        dims = self.truncate_dims
        lines = [f"| {metric_label(metric)} | " + " | ".join(f"d={d}" for d in dims) + " |"]
        lines.append("| --- |" + " ---: |" * len(dims))
        for exit_layer in self.exit_layers:
            values = " | ".join(f"{self.cell(exit_layer, d, precision)[metric]:.{digits}f}" for d in dims)
            lines.append(f"| exit {exit_layer} | {values} |")
        return "\n".join(lines)

    def cost_table(self) -> str:
        """Return a Markdown table of what each exit costs: latency, throughput, size."""
        columns = [
            ("query_p50_ms", "query p50 (ms)", "{:.1f}"),
            ("query_p95_ms", "query p95 (ms)", "{:.1f}"),
            ("queries_per_second", "queries/s", "{:,.0f}"),
            ("documents_per_second", "documents/s", "{:,.0f}"),
            ("parameters", "parameters", "{:,}"),
            ("megabytes", "MB", "{:.1f}"),
        ]
        columns = [column for column in columns if column[0] in self.rows[0]]
        lines = ["| exit | " + " | ".join(title for _, title, _ in columns) + " |"]
        lines.append("| --- |" + " ---: |" * len(columns))
        for exit_layer in self.exit_layers:
            row = next(row for row in self.rows if row["exit_layer"] == exit_layer)
            lines.append(f"| {exit_layer} | " + " | ".join(f.format(row[key]) for key, _, f in columns) + " |")
        return "\n".join(lines)

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        content = {"metric": self.metric, "description": self.description, "rows": self.rows}
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "GridReport":
        """Read what [`to_json`] wrote.

        Raises:
            ValueError: If the file holds no grid.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            report = cls(content["rows"], content["description"], content["metric"])
            report.rows[0]["exit_layer"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no grid of `m3bert_hf evaluate` ({error!r}).") from error
        return report

    def to_csv(self, path: str | Path) -> None:
        """Write one line for each cell and group, `all` being every query."""
        columns = ["group", "queries", *(key for key in self.rows[0] if key != "groups")]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            for row in self.rows:
                whole = {key: value for key, value in row.items() if key != "groups"}
                writer.writerow({"group": "all", "queries": self.description.get("queries", ""), **whole})
                key: dict[str, Any] = {n: row[n] for n in ("exit_layer", "truncate_dim", "precision") if n in row}
                for name, group in row.get("groups", {}).items():
                    writer.writerow({"group": name, **group, **key})

    def save(self, directory: str | Path) -> None:
        """Write `grid.json`, `grid.csv` and, if matplotlib is installed, the pictures into a directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.to_json(directory / "grid.json")
        self.to_csv(directory / "grid.csv")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return
        self.draw_heat_map(directory / "grid.png")
        if "query_p50_ms" in self.rows[0]:
            self.draw_trade_off(directory / "quality-latency.png", "query_p50_ms")
        if len(self.truncate_dims) > 1 or len(self.precisions) > 1:
            self.draw_trade_off(directory / "quality-bytes.png", "bytes_per_vector")

    # ------------------------------------------------------------------ pictures

    def draw_heat_map(self, path: str | Path, metrics: Sequence[str] | None = None, title: str | None = None) -> None:
        """Draw a heat map for each metric, exits over dimensions.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        plt = _pyplot()
        metrics = list(metrics or [m for m in self.metrics if m != "ndcg@10"][:4])
        precision = self.precisions[0]
        exits, dims = self.exit_layers, self.truncate_dims
        width = max(3.2, 0.75 * len(dims) + 1.4)
        figure, axes = plt.subplots(
            1,
            len(metrics),
            figsize=(width * len(metrics), max(2.3, 0.55 * len(exits) + 1.5)),
            squeeze=False,
            layout="constrained",
        )
        for axis, metric in zip(axes[0], metrics, strict=True):
            values = [[self.cell(e, d, precision)[metric] for d in dims] for e in exits]
            image = axis.imshow(values, cmap="viridis", aspect="auto", origin="lower")
            low, high = image.get_clim()
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    dark = value < (low + high) / 2 or low == high
                    axis.text(x, y, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(dims)), [str(d) for d in dims])
            axis.set_yticks(range(len(exits)), [str(e) for e in exits])
            axis.set_xlabel("dimension")
            axis.set_ylabel("exit layer")
            axis.set_title(metric_label(metric))
        figure.suptitle(self._title() if title is None else title, fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def draw_trade_off(
        self, path: str | Path, cost: str = "query_p50_ms", metric: str | None = None, title: str | None = None
    ) -> None:
        """Draw quality against a cost, one point for each cell, and the Pareto front.

        Args:
            path: PNG file.
            cost: `query_p50_ms`, `bytes_per_vector`, `megabytes` or `documents_per_second`.
            metric: `None` means `self.metric`.
            title: `None` means the task's name and size.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the cost was not measured.
        """
        if cost not in self.rows[0]:
            raise ValueError(
                f"cost={cost!r} was not measured: choose one of {[c for c in _AXES if c in self.rows[0]]}."
            )
        plt = _pyplot()
        metric = metric or self.metric
        figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        # What the cost depends on is on the axis; the other coordinate is the series.
        by_exit = cost == "bytes_per_vector"
        key = "exit_layer" if by_exit else "truncate_dim"
        names = self.exit_layers if by_exit else self.truncate_dims
        colors = plt.get_cmap("viridis")([0.85 * i / max(1, len(names) - 1) for i in range(len(names))])
        fills = {"float32": "full", "int8": "left", "binary": "none"}
        # What documents are stored in changes nothing of the time to encode a query.
        precisions = self.precisions if by_exit else self.precisions[:1]
        for index, name in enumerate(names):
            for precision in precisions:
                rows = [r for r in self.rows if r[key] == name and r.get("precision", "float32") == precision]
                label = f"exit {name}" if by_exit else f"d={name}"
                axis.plot(
                    [row[cost] for row in rows],
                    [row[metric] for row in rows],
                    linestyle="",
                    marker=_MARKERS[index % len(_MARKERS)],
                    fillstyle=fills.get(precision, "full"),
                    color=colors[index],
                    markersize=8,
                    label=label if len(precisions) == 1 else f"{label}, {precision}",
                )
        shown = [row for row in self.rows if row.get("precision", "float32") in precisions]
        front = GridReport(shown).pareto_front(cost, metric, smaller=cost != "documents_per_second")
        axis.plot(
            [r[cost] for r in front],
            [r[metric] for r in front],
            color="0.5",
            linewidth=1,
            zorder=0,
            label="Pareto front",
        )
        if cost == "bytes_per_vector":
            axis.set_xscale("log", base=2)
            ticks = sorted({row[cost] for row in self.rows})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
            axis.minorticks_off()
        axis.set_xlabel(_AXES.get(cost, cost))
        axis.set_ylabel(metric_label(metric))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axis.set_title(self._title() if title is None else title, fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _title(self) -> str:
        parts = [str(self.description.get("task") or "")]
        if "queries" in self.description:
            parts.append(f"{self.description['queries']:,} queries, {self.description['documents']:,} documents")
        return ": ".join(part for part in parts if part)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'm3bert-hf[plot]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


__all__ = ["GridReport", "metric_label"]
