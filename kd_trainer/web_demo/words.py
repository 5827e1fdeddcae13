"""The words and tables of the web demo: plain values in, escaped markup out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from kd_trainer.costs import Latency
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.page import legend, rgb, table, text
from kd_trainer.reports.panels import ONLY_STUDENT, ONLY_TEACHER, OTHER_CLASS, class_colours
from kd_trainer.web_demo.models import DemoModel
from kd_trainer.web_demo.result import LONGEST, Models, Result


def introduction(models: Models) -> str:
    """Heading of the page, and what the networks are."""
    student, teacher = models[STUDENT].name, models.get(TEACHER)
    if teacher is None:
        return (
            f"<h1>Segmentation</h1><p>By {text(student)}. Drop a photograph, then move the slider "
            "between it and what was found.</p>"
        )
    return (
        f"<h1>Teacher and student</h1><p>Teacher: {text(teacher.name)}. Student: {text(student)}, "
        "which learned from it. Drop a photograph, then move the slider between the two.</p>"
    )


def error_note(message: str) -> str:
    """A box that says what is wrong with an upload."""
    return f'<p class="note" role="alert">{text(message)}</p>'


def shrunk_note(shown: tuple[int, int], original: tuple[int, int]) -> str:
    """A box that says that a large picture was shrunk; nothing if it was not.

    Args:
        shown: height and width that the models saw.
        original: those of the file.
    """
    if shown == original:
        return ""
    return (
        f'<p class="note">The picture of {original[1]} x {original[0]} pixels was shrunk to '
        f"{shown[1]} x {shown[0]} first: this page works with at most {LONGEST} a side.</p>"
    )


def figures(models: Models, latencies: Mapping[str, Latency] | None) -> str:
    """Milliseconds and sizes of the networks; None stands for times that are not there yet."""
    times: dict[str, float | None] = dict.fromkeys(models)
    times_of = "Milliseconds are those of the network alone"
    if latencies is not None:
        times = {role: latencies[role].median for role in models}
        times_of += f", the median of {latencies[STUDENT].repeats} calls"
    rows = [
        _figures("milliseconds", times, ",.1f"),
        _figures("million parameters", _of(models, _millions), ",.2f"),
        _figures("weight file, MiB", _of(models, lambda model: model.file_mib), ",.1f"),
        _figures("side of the input", _of(models, lambda m: m.segmenter.image_size), "d"),
    ]
    places = {role: model.runs_on for role, model in models.items()}
    same = len(set(places.values())) == 1
    told = places[STUDENT] if same else "; ".join(f"{r} on {place}" for r, place in places.items())
    notes = f"<p>{times_of}: {text(told)}."
    if TEACHER in models:
        notes += " Ratios are teacher / student."
    return table(["", *models, *(["ratio"] if TEACHER in models else [])], rows) + f"{notes}</p>"


def _millions(model: DemoModel) -> float | None:
    return None if model.parameters is None else model.parameters / 1e6


def _of(models: Models, value: Callable[[DemoModel], float | None]) -> dict[str, float | None]:
    return {role: value(model) for role, model in models.items()}


def _figures(name: str, values: Mapping[str, float | None], form: str) -> list[object]:
    """A row of figures and their quotient; `form` is their format."""
    row: list[object] = [name]
    row += [None if value is None else f"{value:{form}}" for value in values.values()]
    if TEACHER in values:
        teacher, student = values[TEACHER], values[STUDENT]
        row.append(f"{teacher / student:.2f}" if teacher and student else None)
    return row


def found(result: Result, class_names: tuple[str, ...]) -> str:
    """Colour and share of the picture of each class that a model found."""
    colours = class_colours(len(class_names))
    present = [
        index
        for index in range(1, len(class_names))
        if any((mask == index).any() for mask in result.masks.values())
    ]
    if not present:
        return "<p>Nothing was found in this picture.</p>"
    shares = [
        [class_names[i], *(_percent(float((mask == i).mean())) for mask in result.masks.values())]
        for i in present
    ]
    header = ["share of the picture", *result.masks]
    return legend({class_names[i]: rgb(colours[i]) for i in present}) + table(header, shares)


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def differences(result: Result, class_names: tuple[str, ...]) -> str:
    """How far the masks are apart, and the colours of their difference; empty without a teacher."""
    if result.difference is None:
        return ""
    several = len(class_names) > 2
    colours = {"only the teacher": rgb(ONLY_TEACHER), "only the student": rgb(ONLY_STUDENT)}
    if several:
        colours["both, as different classes"] = rgb(OTHER_CLASS)
    share, iou = result.difference.pixels, result.difference.iou
    if math.isnan(iou):
        overlap = "neither found anything"
    else:
        overlap = f"IoU of the two{', mean of the classes found' if several else ''}: {iou:.4f}"
    return f"<p>Different on {_percent(share)} of the pixels; {overlap}.</p>{legend(colours)}"
