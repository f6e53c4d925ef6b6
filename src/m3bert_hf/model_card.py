"""Model cards for the Hub, filled from measured grids and stated facts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import AutoConfig

from .grid_report import GridReport, metric_label


TEMPLATE = Path(__file__).with_name("model_card_template.md")

# What a person has to state, since no measurement knows it; and what may be stated.
_REQUIRED = ("name", "summary", "license", "languages", "limits")
_OPTIONAL = (
    "path",
    "training_data",
    "stages",
    "hardware",
    "commands",
    "commit",
    "pictures",
    "peers",
    "reference_group",
    "pipeline_tag",
    "tags",
    "datasets",
)


# Groups of fewer queries say more about the draw than about the model.
_LEAST_QUERIES = 30


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read the facts of a card from YAML or JSON.

    Raises:
        ValueError: If one that is required is missing, or one does not exist.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        facts = json.loads(text)
    else:
        import yaml

        facts = yaml.safe_load(text)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds no facts: expected keys such as {', '.join(_REQUIRED)}.")
    missing = [key for key in _REQUIRED if not facts.get(key)]
    if missing:
        raise ValueError(f"{path} does not state {', '.join(missing)}: a card needs {', '.join(_REQUIRED)}.")
    unknown = sorted(set(facts) - set(_REQUIRED) - set(_OPTIONAL))
    if unknown:
        raise ValueError(f"{path} states {', '.join(unknown)}, which no card has: choose of {', '.join(_OPTIONAL)}.")
    return facts


def write_model_card(
    model: str | Path,
    facts: str | Path | dict[str, Any],
    grids: Sequence[str | Path] = (),
    output: str | Path | None = None,
) -> Path:
    """Write a model card: metadata, figures, pictures and choice of granularity from the grids, the rest from facts.

    Args:
        model: Directory of the checkpoint.
        facts: YAML or JSON file, or its content: `name`, `summary`, `license`, `languages`, `limits`; perhaps
            `training_data`, `stages` (each with name, what, data, steps, amount, time), `hardware`, `commands`,
            `commit`, `pictures` (each with path and caption), `peers` (task: name: metrics), `reference_group` (a
            group, such as the language of the documents, to tell apart from the mean of the others; peers' metrics
            of the two are `mrr@10/GROUP` and `mrr@10/others`), `pipeline_tag` (`fill-mask` for a pretrained model),
            `tags`, `datasets`, `path` (what users load).
        grids: Directories or JSON files that `evaluate --output` wrote.
        output: File; `None` means README.md of the checkpoint. Pictures lie in a folder beside it.

    Returns:
        The file.

    Raises:
        ValueError: If a fact is missing or a grid cannot be read.
    """
    facts = facts if isinstance(facts, dict) else read_facts(facts)
    output = Path(output) if output is not None else Path(model) / "README.md"
    folder = output.parent / ("pictures" if output.name == "README.md" else f"{output.stem}-pictures")
    config = AutoConfig.from_pretrained(model)
    reports = [GridReport.from_json(_grid_file(path)) for path in grids]
    group = facts.get("reference_group")
    sections = [_section(report, facts.get("peers") or {}, folder, output.parent, group) for report in reports]
    pictures = []
    for picture in facts.get("pictures") or []:
        folder.mkdir(parents=True, exist_ok=True)
        copied = folder / Path(picture["path"]).name
        if copied.resolve() != Path(picture["path"]).resolve():
            shutil.copy(picture["path"], copied)
        pictures.append({"path": copied.relative_to(output.parent).as_posix(), "caption": picture["caption"]})
    example = (
        reports[0].recommend()
        if reports
        else {
            "exit_layer": config.exit_layers[0],
            "truncate_dim": config.matryoshka_dimensions[0],
        }
    )
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = template.render(
        metadata=_metadata(facts, reports).to_yaml(line_break="\n").strip(),
        name=facts["name"],
        path=facts.get("path") or facts["name"],
        summary=str(facts["summary"]).strip(),
        pipeline_tag=facts.get("pipeline_tag"),
        architecture=_architecture(config, Path(model)),
        example=example,
        grids=sections,
        pictures=pictures,
        limits=facts["limits"],
        **{key: facts.get(key) for key in ("training_data", "stages", "hardware", "commands", "commit")},
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(text).save(output)
    return output


def _grid_file(path: str | Path) -> Path:
    path = Path(path)
    return path / "grid.json" if path.is_dir() else path


def _architecture(config: Any, directory: Path) -> list[tuple[str, str]]:
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return [
        ("layers", str(config.num_hidden_layers)),
        ("exits", ", ".join(map(str, config.exit_layers))),
        ("dimensions", ", ".join(map(str, config.matryoshka_dimensions))),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("longest input", f"{config.max_input_length:,} tokens"),
        ("positions", config.position_embedding_type),
        ("weights on disk", f"{size / 2**20:.1f} MiB"),
    ]


def _metadata(facts: dict[str, Any], reports: Sequence[GridReport]) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-retrieval" if report.metric != "spearman" else "sentence-similarity",
            dataset_type=str(report.description.get("task") or "custom"),
            dataset_name=str(report.description.get("task") or "custom"),
            metric_type=metric,
            metric_name=f"{metric_label(metric)} at exit {row['exit_layer']}, {row['truncate_dim']} dimensions",
            metric_value=round(row[metric], 4),
        )
        for report in reports
        for row in report.rows
        if row.get("precision", "float32") == "float32"
        for metric in [report.metric]
    ]
    data = ModelCardData(
        language=facts["languages"],
        license=facts["license"],
        library_name="transformers" if facts.get("pipeline_tag") == "fill-mask" else "sentence-transformers",
        pipeline_tag=facts.get("pipeline_tag") or "sentence-similarity",
        datasets=facts.get("datasets"),
        tags=["m3bert", "matryoshka", "early-exit", "feature-extraction", *(facts.get("tags") or [])],
    )
    if results:
        setattr(data, "model-index", eval_results_to_model_index(facts["name"], results))
    return data


def _section(
    report: GridReport, peers: dict[str, Any], folder: Path, root: Path, group: str | None = None
) -> dict[str, Any]:
    about = report.description
    task = str(about.get("task") or "task")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, draw, caption in (
        ("grid", report.draw_heat_map, "Quality at every exit and dimension"),
        ("latency", lambda path: report.draw_trade_off(path, "query_p50_ms"), "Quality against latency"),
        ("bytes", lambda path: report.draw_trade_off(path, "bytes_per_vector"), "Quality against bytes per vector"),
    ):
        if name == "latency" and "query_p50_ms" not in report.rows[0]:
            continue
        path = folder / f"{task}-{name}.png"
        draw(path)
        pictures.append({"path": path.relative_to(root).as_posix(), "caption": f"{caption}, {task}"})
    size = (
        f"{about['queries']:,} queries, {about['documents']:,} documents, exact search over all of them"
        if "queries" in about
        else f"{about.get('pairs', 0):,} scored pairs"
    )
    metrics = [metric for metric in report.metrics if not metric.startswith("ndcg")]
    return {
        "title": task,
        "how": f"{size}; texts cut at {about.get('max_seq_length')} tokens.",
        "tables": [report.table(m, precision=report.precisions[0]) for m in metrics]
        + _group_grids(report, group)
        + _other_precisions(report),
        "peers": _peer_table(report, peers.get(task) or {}, group),
        "groups": _group_table(report),
        "costs": report.cost_table() if "query_p50_ms" in report.rows[0] else "",
        "machine": f"{about.get('device')}, {about.get('threads')} threads, torch {about.get('torch')}",
        "pictures": pictures,
        "choices": [_choice(report, share, prefer, task) for share, prefer in ((0.97, "latency"), (0.9, "storage"))],
    }


def _choice(report: GridReport, share: float, prefer: Any, task: str) -> str:
    cell = report.recommend(share, prefer=prefer)
    best = max(row[report.metric] for row in report.rows)
    what = "the shallowest exit" if prefer == "latency" else "the fewest bytes per vector"
    return (
        f"On {task}, {what} that keeps {share:.0%} of the best {metric_label(report.metric)}: **exit "
        f"{cell['exit_layer']}, {cell['truncate_dim']} dimensions, {cell.get('precision', 'float32')}** "
        f"({cell[report.metric]:.3f} of {best:.3f}, {cell['bytes_per_vector']:,} bytes a vector)."
    )


def _other_precisions(report: GridReport) -> list[str]:
    return [
        f"Stored as {precision}:\n\n{report.table(report.metric, precision=precision)}"
        for precision in report.precisions[1:]
    ]


def _first_precision(report: GridReport) -> list[dict[str, Any]]:
    return [row for row in report.rows if row.get("precision", "float32") == report.precisions[0]]


def _told_apart(report: GridReport, row: dict[str, Any], group: str | None) -> dict[str, float]:
    """Return the main metric of the reference group and the mean of the others, if the row has these groups."""
    groups = [name for name, figures in row.get("groups", {}).items() if figures["queries"] >= _LEAST_QUERIES]
    if group not in groups or len(groups) < 2:
        return {}
    return {
        f"{report.metric}/{group}": row["groups"][group][report.metric],
        f"{report.metric}/others": report.group_mean(row, report.metric, [str(group)], _LEAST_QUERIES),
    }


def _group_grids(report: GridReport, group: str | None) -> list[str]:
    """Return a table of all cells for the reference group, and one for the mean of the others."""
    rows = [{**row, **_told_apart(report, row, group)} for row in report.rows]
    names = list(_told_apart(report, report.rows[0], group))
    if not names:
        return []
    label = metric_label(report.metric)
    number = sum(g["queries"] >= _LEAST_QUERIES for g in report.rows[0]["groups"].values()) - 1
    titles = (
        f"{label} of {group}:",
        f"{label}, mean of the {number} other groups of {_LEAST_QUERIES} queries or more:",
    )
    told = GridReport(rows)
    return [f"{title}\n\n{told.table(name)}" for title, name in zip(titles, names, strict=True)]


def _peer_table(report: GridReport, peers: dict[str, Any], group: str | None = None) -> str:
    if not peers:
        return ""
    rows = _first_precision(report)
    best = max(rows, key=lambda row: row[report.metric])
    first = [row for row in rows if row["exit_layer"] == report.exit_layers[0]]
    shown = {f"this, exit {row['exit_layer']}, {row['truncate_dim']} dimensions": row for row in (best, *first)}
    figures = {name: {**row, **_told_apart(report, row, group)} for name, row in shown.items()}
    names = [*report.metrics, *_told_apart(report, best, group)]
    metrics = [m for m in names if any(m in peer for peer in peers.values())]
    lines = ["| model | " + " | ".join(map(metric_label, metrics)) + " |", "| --- |" + " ---: |" * len(metrics)]
    for name, values in [*figures.items(), *peers.items()]:
        lines.append(f"| {name} | " + " | ".join(f"{values[m]:.3f}" if m in values else "" for m in metrics) + " |")
    return "\n".join(lines)


def _group_table(report: GridReport, at_least: int = _LEAST_QUERIES) -> str:
    """Return the best cell and the smallest one by group, those of few queries left out."""
    best = max(_first_precision(report), key=lambda row: row[report.metric])
    least = min(_first_precision(report), key=lambda row: (row["exit_layer"], row["truncate_dim"]))
    groups = {n: g for n, g in best.get("groups", {}).items() if g["queries"] >= at_least}
    if len(groups) < 2:
        return ""
    label = metric_label(report.metric)
    lines = [f"By group of at least {at_least} queries, {label}:\n"]
    lines.append(
        f"| group | queries | ({best['exit_layer']}, {best['truncate_dim']}) | "
        f"({least['exit_layer']}, {least['truncate_dim']}) |"
    )
    lines.append("| --- | ---: | ---: | ---: |")
    for name, group in sorted(groups.items(), key=lambda item: -item[1]["queries"]):
        value, small = group[report.metric], least["groups"][name][report.metric]
        lines.append(f"| {name} | {group['queries']:,} | {value:.3f} | {small:.3f} |")
    return "\n".join(lines)


__all__ = ["read_facts", "write_model_card"]
