"""`report.html`: one file that holds everything it shows.

The markup is in `templates/`, where jinja2 escapes whatever is printed: names of classes, paths and
settings come from outside. What is shown of the contents is worked out here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from kd_trainer.reports.charts import METRICS, history_charts, line_chart
from kd_trainer.reports.contents import DIFFERENCE, EMA, STUDENT, TEACHER, Contents, Network
from kd_trainer.reports.panels import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    IGNORED,
    MIXED_UP,
    Pixels,
    colours_of,
)

_SIDE, _QUALITY = 320, 85  # of an image in the page: pixels, and of JPEG
_NO_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")

Rows = Iterable[Sequence[object]]
Table = tuple[Sequence[object], Rows]


def shown(value: object) -> object:
    """A value as a page shows it: a missing figure as a dash, a number short; text as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(shown(item)) for item in value)
    return value


class Jpeg(NamedTuple):
    """An image inside a page; `data` is in base64."""

    data: str
    width: int
    height: int


def jpeg(pixels: Pixels) -> Jpeg:
    """An image as JPEG of at most `_SIDE` pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Without chroma subsampling: thin coloured errors would fade into the grey around them.
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return Jpeg(base64.b64encode(buffer.getvalue()).decode("ascii"), image.width, image.height)


PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
    autoescape=True,
    finalize=shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters["jpeg"] = jpeg


def text(value: object) -> str:
    """Any value as escaped text."""
    return str(escape(shown(value)))


def table(header: Sequence[object], rows: Rows) -> str:
    """Markup of a table that scrolls inside its own box where it is wider than the page.

    Args:
        header: headings of the columns.
        rows: cells, first column left, the others right.
    """
    return str(PAGES.get_template("parts.html").module.table(header, rows))  # type: ignore[attr-defined]


def legend(colours: Mapping[str, str]) -> str:
    """Markup of samples of colours (CSS values of ours, or a gradient) with their names."""
    return str(PAGES.get_template("parts.html").module.legend(colours))  # type: ignore[attr-defined]


def rgb(colour: Any) -> str:
    """A colour of three numbers in 0..255 as CSS."""
    return "rgb({},{},{})".format(*map(int, colour))


def report_html(contents: Contents) -> str:
    """The report as one HTML document.

    Images are inside the file, there is no script, and nothing is loaded from anywhere. It reads
    on narrow screens, in light and dark as the reader's system asks for.
    """
    student, teacher = contents.networks[STUDENT], contents.networks.get(TEACHER)
    charts = history_charts(
        contents.logs, contents.class_names, background=not contents.multi_label
    )
    return PAGES.get_template("report.html").render(
        contents=contents,
        student=student,
        teacher=teacher,
        tiles=list(_tiles(contents)),
        metrics=_metrics(student, teacher, contents.networks.get(EMA)),
        compared=list(_compared(contents.comparison)),
        curve_charts=[Markup(chart) for chart in charts],  # line_chart escapes its text
        evaluations=_evaluations(contents.logs),
        legends=list(_legends(contents)),
        reliability=_reliability(contents),
        class_table=_classes(contents),
        settings=_pairs(contents.settings),
        environments={
            "Training": _pairs(_trained_with(contents.results)),
            "This report": _pairs(contents.versions),
        },
    )


def _share(part: float, whole: float) -> str:
    """A quotient in percent, a dash where there is nothing to divide by."""
    return f"{part / whole:.1%}" if whole and not math.isnan(part / whole) else "-"


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Rows of a table of two columns; numbers with all digits that matter."""
    return [(key, f"{v:.6g}" if isinstance(v, float) else v) for key, v in values.items()]


def _tiles(contents: Contents) -> Iterator[tuple[str, object, str]]:
    """The main figures: what it is, the figure, what it compares with."""
    student, teacher = contents.networks[STUDENT], contents.networks.get(TEACHER)
    results = contents.results
    if student.figures:
        more = ""
        if teacher is not None and "miou" in teacher.figures:
            other = teacher.figures["miou"]
            more = f"{_share(student.figures['miou'], other)} of the teacher's {shown(other)}"
        yield "mIoU", student.figures["miou"], more
    if contents.agreement:
        mutual = f"of the pixels; mutual mIoU {text(contents.agreement['agreement_miou'])}"
        yield "agreement with the teacher", f"{contents.agreement['agreement']:.2%}", mutual
    of = ""
    if teacher is not None and teacher.parameters:
        share = student.parameters / teacher.parameters
        of = f"{share:.0%} of the teacher's {teacher.parameters / 1e6:.2f} M"
    yield "parameters", f"{student.parameters / 1e6:.2f} M", of
    if (mib := results.get("student_file_mib")) is not None:
        yield "file size", f"{mib:.1f} MiB", "model.safetensors"
    if (seconds := results.get("train_seconds")) is not None:
        epochs, count = results.get("epochs") or 0, results.get("train_images") or 0
        done = f"{epochs:g} epochs of {count:,} images"
        yield "training time", duration(seconds), done


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _metrics(student: Network, teacher: Network | None, ema: Network | None) -> Table | None:
    """Student, its moving average and teacher side by side."""
    rows: list[list[object]] = []
    for key, name in METRICS.items():
        if key in student.figures:
            row = [name, student.figures[key]]
            if ema is not None:
                row.append(ema.figures.get(key, math.nan))
            if teacher is not None:
                other = teacher.figures.get(key, math.nan)
                row += [other, _share(student.figures[key], other)]
            rows.append(row)
    header = ["metric", STUDENT, *(["its moving average"] if ema else [])]
    header += [TEACHER, "student / teacher"] if teacher else []
    return (header, rows) if rows else None


def _evaluations(logs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every figure of every evaluation, one row an evaluation."""
    evaluated = [log for log in logs if "eval_miou" in log]
    keys = dict.fromkeys(key for log in evaluated for key in log if key.startswith("eval_"))
    names = {key: key.removeprefix("eval_") for key in keys if key not in _NO_METRICS}
    rows = [
        [
            "-" if log.get("epoch") is None else f"{log['epoch']:g}",
            *(log.get(key) for key in names),
        ]
        for log in evaluated
    ]
    return (["epoch", *names.values()], rows) if rows else None


def _legends(contents: Contents) -> Iterator[dict[str, str]]:
    """Colours of the classes, of the errors and of the difference to the teacher."""
    names, labels = contents.class_names, contents.multi_label
    several = len(names) > 2 or labels
    colours = colours_of(len(names), multi_label=labels)
    yield {name: rgb(colours[i]) for i, name in enumerate(names) if i or labels}
    wrong = ", or the wrong class" if several and not labels else ""
    yield {
        f"error: found where there is none{wrong}": rgb(FALSE_POSITIVE),
        "error: missed": rgb(FALSE_NEGATIVE),
        **({"error: one label found, another missed": rgb(MIXED_UP)} if labels else {}),
        "ignored": rgb(IGNORED),
    }
    if not any(DIFFERENCE in image.views for image in contents.images):
        return
    ends = f"rgb(200,200,200),{rgb(FALSE_POSITIVE)})"
    if several:
        what = "largest distance of any label" if labels else "distance of the two distributions"
        meaning = f"difference to the teacher: {what}, 0 to 1"
        yield {meaning: f"linear-gradient(90deg,{ends}"}
    else:
        meaning = "difference: the student's probability minus the teacher's, -1 to 1"
        yield {meaning: f"linear-gradient(90deg,{rgb(FALSE_NEGATIVE)},{ends}"}


def _reliability(contents: Contents) -> dict[str, Any] | None:
    """Reliability diagram, where the confidences lie, and both in figures."""
    measured = {w: n.reliability for w, n in contents.networks.items() if n.reliability.points()}
    if not measured:
        return None
    lowest = min(r.points()[0][0] for r in measured.values())
    start = 0.5 if lowest >= 0.5 else 0.0
    diagram = line_chart(
        {w: r.points() for w, r in measured.items()} | {"perfect": [(start, start), (1.0, 1.0)]},
        title="Reliability",
        x_label="confidence",
        y_label="share that is right",
        x_range=(start, 1.0),
    )
    shares = line_chart(
        {w: r.shares() for w, r in measured.items()},
        title="How sure the networks are",
        x_label="confidence",
        y_label="share of pixels",
        log_y=True,
        x_range=(start, 1.0),
    )
    return {
        "charts": [Markup(diagram), Markup(shares)],
        "rows": [[who, f"{r.error:.4f}", f"{r.gap:+.4f}"] for who, r in measured.items()],
        "bins": next(iter(measured.values())).counts.shape[1],
    }


def _classes(contents: Contents) -> Table | None:
    """IoU, Dice, precision and recall of every class."""
    confusions = {
        who: n.confusion for who, n in contents.networks.items() if n.confusion is not None
    }
    if not confusions:
        return None
    figures = {who: class_figures(confusion) for who, confusion in confusions.items()}
    columns = {
        f"{metric} {who}": figures[who][metric]
        for metric in ("IoU", "Dice", "precision", "recall")
        for who in figures
    }
    _, truth, _ = hits(confusions[STUDENT])
    tables = confusions[STUDENT]
    totals = tables.sum(axis=(1, 2)) if tables.ndim == 3 else np.full(len(truth), tables.sum())
    rows = [
        [name, _share(truth[i], totals[i]), *(float(column[i]) for column in columns.values())]
        for i, name in enumerate(contents.class_names)
    ]
    return ["class", "share of pixels", *columns], rows


def class_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """IoU, Dice, precision and recall of every class (K,), NaN where there is nothing to divide by.

    Args:
        confusion: counts (K, K) by [truth, prediction], or (K, 2, 2) of several labels a pixel.
    """
    hit, truth, predicted = hits(confusion)
    quotients = {
        "IoU": (hit, truth + predicted - hit),
        "Dice": (2 * hit, truth + predicted),
        "precision": (hit, predicted),
        "recall": (hit, truth),
    }
    return {
        name: np.divide(part, whole, out=np.full(len(hit), np.nan), where=whole > 0)
        for name, (part, whole) in quotients.items()
    }


def hits(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class (K,) that are right, that it has, and that are given it."""
    if confusion.ndim == 3:
        own = confusion[:, 1, 1], confusion[:, 1].sum(axis=1), confusion[:, :, 1].sum(axis=1)
    else:
        own = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return own[0].astype(float), own[1], own[2]


def _trained_with(results: Mapping[str, Any]) -> dict[str, Any]:
    """Device and versions of the training."""
    keys = ("device", "mixed_precision", "peak_memory_mib", "images_per_second")
    facts = {key.replace("_", " "): results[key] for key in keys if key in results}
    return facts | dict(results.get("versions") or {})


class Part(NamedTuple):
    """A heading and a table of a comparison; either may be empty."""

    heading: str
    header: Sequence[object] = ()
    rows: Rows = ()
    words: bool = False


def _compared(value: Any) -> Iterator[Part]:
    """`comparison.json` as tables, whatever it holds: mappings, lists of them, single values.

    Another command writes it, so its values are shown without knowing them.
    """
    if not value:
        return
    if _is_single(value):
        yield Part("", [""], [[value]], words=True)
    elif isinstance(value, list):
        if all(map(_is_row, value)):
            yield _one_row_each({str(number): row for number, row in enumerate(value, 1)})
        else:
            for item in value:
                yield from _compared(item)
    elif len(value) > 1 and all(map(_is_row, value.values())):
        yield _one_row_each(value)
    else:
        single = {key: item for key, item in value.items() if _is_single(item)}
        if single:
            yield Part("", ["", "value"], _pairs(single), words=True)
        for key, item in value.items():
            if key not in single:
                yield Part(str(key).replace("_", " "))
                yield from _compared(item)


def _one_row_each(rows: Mapping[str, Mapping[str, Any]]) -> Part:
    """One row a mapping, one column a key that any of them has."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    header = ["", *(str(key).replace("_", " ") for key in keys)]
    return Part("", header, [[name, *(row.get(key) for key in keys)] for name, row in rows.items()])


def _is_single(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None or isinstance(item, str | int | float) for item in value)
    return not isinstance(value, Mapping)


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_single, value.values()))
