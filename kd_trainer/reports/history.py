"""The curves of a run, out of the Trainer's log history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd_trainer.losses import TERMS
from kd_trainer.reports.curves import Point, line_chart

Logs = Sequence[Mapping[str, Any]]

METRICS = {
    "dice": "Dice",
    "iou_foreground": "IoU foreground",
    "boundary_iou": "boundary IoU",
    "precision": "precision",
    "recall": "recall",
    "pixel_accuracy": "pixel accuracy",
    "mean_image_iou": "mean image IoU",
}
_NO_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def curve(logs: Logs, key: str) -> list[Point]:
    """(epoch, value) of each log that has the key; a figure that does not exist is NaN."""
    found = [(log["epoch"], log[key]) for log in logs if key in log and "epoch" in log]
    return [(float(x), math.nan if y is None else float(y)) for x, y in found]


def curves_of(logs: Logs, names: Mapping[str, str]) -> dict[str, list[Point]]:
    """Curves of the keys that were logged, by their name in the legend."""
    found = {name: curve(logs, key) for key, name in names.items()}
    return {name: points for name, points in found.items() if points}


def _under(logs: Logs, prefix: str) -> dict[str, str]:
    """Logged keys that begin so, and the rest of their names."""
    keys = dict.fromkeys(key for log in logs for key in log if key.startswith(prefix))
    return {key: key.removeprefix(prefix).replace("_", " ") for key in keys}


def _spans_decades(series: Mapping[str, Sequence[Point]]) -> bool:
    """Whether the figures are positive and so different that the small ones would lie on zero."""
    values = [y for points in series.values() for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def history_charts(logs: Logs, class_names: Sequence[str]) -> list[str]:
    """All charts for which something was logged, as `<svg>` elements."""
    terms = {term.name: term.name for term in TERMS}
    shares = {f"grad_share/{name}": name for name in terms}
    softened = {term.name for term in TERMS if term.softened}
    evaluated = {f"eval_{k}": v for k, v in {**terms, "dice_loss": "dice"}.items() if k != "dice"}
    classes = {f"eval_iou_{name}": name for name in class_names}
    return [
        *_chart(logs, "mIoU at each evaluation", _miou(), "mIoU"),
        *_chart(logs, "Metrics of the student", {f"eval_{k}": v for k, v in METRICS.items()}),
        *(_chart(logs, "IoU of each class", classes, "IoU") if len(classes) > 2 else []),
        *_chart(logs, "Agreement with the teacher", {"eval_agreement": "share of pixels"}),
        *_chart(logs, "Loss", {"loss": "training", "eval_loss": "evaluation (T = 1)"}, "loss"),
        *_chart(logs, "Loss terms, training", terms, "unweighted"),
        *_chart(logs, "Loss terms, evaluation (T = 1)", evaluated, "unweighted"),
        *_chart(logs, "Shares of the gradient", shares, "share"),
        *_chart(logs, "Gradient norm before clipping", {"grad_norm": "norm"}, "norm"),
        *_chart(logs, "Learning rates", _under(logs, "lr/"), "rate"),
        *(
            _chart(logs, "Temperature", {"temperature": "temperature"}, "T", step=True)
            if any(softened & log.keys() for log in logs)
            else []
        ),
        *_chart(logs, "Free encoder units", {"free_units": "free units"}, "units", step=True),
    ]


def _miou() -> dict[str, str]:
    return {
        "eval_miou": "student",
        "eval_teacher_miou": "teacher",
        "eval_agreement_miou": "student against teacher",
    }


def _chart(
    logs: Logs, title: str, names: Mapping[str, str], y_label: str = "", *, step: bool = False
) -> list[str]:
    """The chart, or nothing if none of its keys was ever logged."""
    series = merged(curves_of(logs, names))
    if not series:
        return []
    # Whole numbers get an axis from 0, or a constant would have ticks at fractions.
    highest = max((y for points in series.values() for _, y in points), default=0.0)
    return [
        line_chart(
            series,
            title=title,
            x_label="epoch",
            y_label=y_label,
            log_y=y_label in ("loss", "unweighted", "norm") and _spans_decades(series),
            step=step,
            y_range=(0.0, max(highest, 3.0) * 1.05) if y_label == "units" else None,
        )
    ]


def merged(series: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Curves that coincide as one, under all their names: only the last drawn would be seen."""
    names: dict[str, list[str]] = {}
    for name, points in series.items():
        names.setdefault(repr(points), []).append(name)  # text, as NaN is not equal to itself
    return {_joined(group): series[group[0]] for group in names.values()}


def _joined(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"


def evaluations(logs: Logs) -> tuple[list[str], list[list[Any]]]:
    """Every figure of every evaluation: heading, and one row an evaluation."""
    rows = [log for log in logs if "eval_miou" in log]
    keys = [key for key in _under(rows, "eval_") if key not in _NO_METRICS]
    header = ["epoch", *(key.removeprefix("eval_") for key in keys)]
    return header, [
        [f"{log.get('epoch', math.nan):g}", *(log.get(key) for key in keys)] for log in rows
    ]
