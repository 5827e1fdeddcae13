"""The rows of `frontier` as a table and as a chart of mIoU against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frontier import ENGINES, INT8, ONNX
from kd_trainer.console import markdown_table
from kd_trainer.reports.charts import Point, line_chart

Row = Mapping[str, Any]


def frontier_table(rows: Sequence[Row]) -> str:
    """Two Markdown tables: quality, size and work; then milliseconds and speed of each engine.

    Args:
        rows: of `frontier`.
    """
    sizes = [
        "model",
        "mIoU",
        "of the first's",
        "int8 mIoU",
        "parameters",
        "GFLOP",
        "in the encoder",
        "MiB onnx",
        "MiB int8",
        "best for its latency",
    ]
    body = [
        [
            row["name"],
            _number(row["miou"], ".4f"),
            _number(row["miou_share"], ".1%"),
            _number(row["int8_miou"], ".4f"),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gflop']:.1f}",
            f"{row['encoder_gflop']:.1f}",
            _number(row["mib"]["onnx"], ".1f"),
            _number(row["mib"]["int8"], ".1f"),
            {True: "yes", False: "no", None: ""}[row["best"]],
        ]
        for row in rows
    ]
    times = ["model", *(f"{engine} ms (times as fast)" for engine in ENGINES)]
    timed = [[row["name"], *(_time(row, engine) for engine in ENGINES)] for row in rows]
    return f"{markdown_table(sizes, body)}\n\n{markdown_table(times, timed)}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(row: Row, engine: str) -> str:
    if engine not in row["latency"]:
        return ""
    speed = row["speed"].get(engine)
    times = "" if speed is None else f" ({speed:.2f})"
    return f"{row['latency'][engine]['median']:.0f}{times}"


def frontier_chart(rows: Sequence[Row], *, title: str) -> str:
    """Chart of mIoU against latency, as `<svg>`: a dot for fp32, joined to one for int8.

    Args:
        rows: of `frontier`; those without a mIoU are named as having no data.
        title: heading.
    """
    series: dict[str, list[Point]] = {}
    for row in rows:
        reached = ((ONNX, row["miou"]), (INT8, row["int8_miou"]))
        series[row["name"]] = [
            (row["latency"][engine]["median"], miou)
            for engine, miou in reached
            if engine in row["latency"] and miou is not None
        ]
    longest = max((x for points in series.values() for x, _ in points), default=1.0)
    return line_chart(
        series,
        title=title,
        x_label=f"ONNX Runtime, one thread, {rows[0]['side']} px (ms): int8 below fp32",
        y_label="mIoU",
        x_range=(0.0, longest * 1.05),
        background=True,
    )
