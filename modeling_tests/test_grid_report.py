import csv

import pytest

from m3bert_hf.grid_report import GridReport, metric_label


def report():
    values = {(2, 8): 0.50, (2, 32): 0.80, (4, 8): 0.70, (4, 32): 1.00}
    rows = [
        {
            "exit_layer": e,
            "truncate_dim": d,
            "precision": "float32",
            "mrr@10": value,
            "recall@10": value,
            "bytes_per_vector": 4 * d,
            "query_p50_ms": 1.5 * e,
            "query_p95_ms": 2.0 * e,
            "queries_per_second": 100 / e,
            "documents_per_second": 50 / e,
            "parameters": 1000 * e,
            "megabytes": 0.004 * e,
            "groups": {"en": {"queries": 3, "mrr@10": value, "recall@10": value}},
        }
        for (e, d), value in values.items()
    ]
    return GridReport(rows, {"task": "t", "queries": 3, "documents": 9})


def key(row):
    return row["exit_layer"], row["truncate_dim"]


def test_the_smallest_good_cell():
    grid = report()
    assert key(grid.recommend(1.0)) == (4, 32)
    assert key(grid.recommend(0.8)) == (2, 32)
    assert key(grid.recommend(0.7)) == (2, 32)
    assert key(grid.recommend(0.7, prefer="storage")) == (4, 8)
    assert key(grid.recommend(0.0)) == (2, 8)
    for options, message in (
        ({"min_quality": 97}, "min_quality=97"),
        ({"prefer": "size"}, "prefer='size'"),
        ({"metric": "f1"}, "metric='f1'"),
    ):
        with pytest.raises(ValueError, match=message):
            grid.recommend(**options)


def test_pareto_front():
    grid = report()
    assert [key(r) for r in grid.pareto_front("query_p50_ms")] == [(2, 32), (4, 32)]
    assert [key(r) for r in grid.pareto_front("bytes_per_vector")] == [(4, 8), (4, 32)]
    assert [key(r) for r in grid.pareto_front("documents_per_second", smaller=False)] == [(2, 32), (4, 32)]


def test_written_and_read(tmp_path):
    grid = report()
    grid.save(tmp_path)
    again = GridReport.from_json(tmp_path / "grid.json")
    assert again == grid
    with (tmp_path / "grid.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and {line["group"] for line in lines} == {"all", "en"}
    assert [float(line["mrr@10"]) for line in lines if line["group"] == "all"] == [0.5, 0.8, 0.7, 1.0]
    for name in ("grid.png", "quality-latency.png", "quality-bytes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no grid"):
        GridReport.from_json(tmp_path / "bad.json")


def test_one_precision_that_is_not_float32():
    rows = [{**row, "precision": "int8"} for row in report().rows]
    grid = GridReport(rows)
    assert grid.table().splitlines()[-1] == "| exit 4 | 0.700 | 1.000 |"
    assert grid.flat_metrics()["mean_mrr@10"] == pytest.approx(0.75)


def test_negative_values_leave_only_the_best():
    rows = [{**row, "spearman": -row["mrr@10"]} for row in report().rows]
    assert key(GridReport(rows, metric="spearman").recommend(0.5)) == (2, 8)
    rows[0]["spearman"] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        GridReport([rows[0]], metric="spearman").recommend()


def test_tables():
    grid = report()
    assert grid.table().splitlines()[-1] == "| exit 4 | 0.700 | 1.000 |"
    assert grid.cost_table().splitlines()[-1] == "| 4 | 6.0 | 8.0 | 25 | 12 | 4,000 | 0.0 |"
    assert metric_label("recall@100") == "Recall@100"
    with pytest.raises(KeyError, match="was not measured"):
        grid.cell(3, 8)
    with pytest.raises(ValueError, match="was not measured"):
        grid.draw_trade_off("x.png", "cost")
    with pytest.raises(ValueError, match="No group is left"):
        grid.group_mean(grid.rows[0], "mrr@10", leave_out=["en"])
