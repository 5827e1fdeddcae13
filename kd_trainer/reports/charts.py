"""Charts as SVG by matplotlib, in the colours of the page around them; text stays text."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from kd_trainer.errors import printable
from kd_trainer.losses import TERMS
from kd_trainer.reports.panels import CLASS_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Point = tuple[float, float]
Range = tuple[float, float]
Logs = Sequence[Mapping[str, Any]]

# Indices into the palette by contrast against white and against black; its yellow and its first
# orange are too pale on white to come early or at all.
_ORDER = (5, 6, 1, 7, 3, 2, 8)
LINE_COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*CLASS_COLOURS[i].tolist()) for i in _ORDER)
DASHES = ("solid", "dashed", "dotted", "dashdot")

WIDTH, HEIGHT = 400, 300  # pixels; a phone shows them at about 0.85 of that
_LEGEND_ROW = 18
_LONGEST_NAME = 44  # characters; more would not fit beside a line of the legend
_MARKED = 30  # up to so many points are also drawn as dots
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_INK = "#010203"  # stands for the page's text colour, of which matplotlib has no notion
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine measures text alike
    "font.size": 12,
    "text.parse_math": False,  # a class may be called $x$
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "lines.linewidth": 2,
    "path.simplify_threshold": 1.0,  # pixels, or a long history makes a large file
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
}


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    step: bool = False,
    x_range: Range | None = None,
    y_range: Range | None = None,
    background: bool = False,
) -> str:
    """Lines through the points of each series, as one `<svg>` element.

    A point that is not finite, or not positive on a logarithmic axis, is left out and interrupts
    its line. A series without points stays in the legend, named as having no data.

    Args:
        series: name in the legend -> (x, y) points in the order in which they are joined.
        title: heading.
        x_label: name of the horizontal axis, with its unit.
        y_label: name of the vertical axis, with its unit.
        log_y: logarithmic vertical axis.
        step: hold each value up to the next point instead of going straight to it.
        x_range: ends of the horizontal axis; by default those of the data.
        y_range: likewise; by default the data's with a small margin.
        background: paint the page white below the chart and draw in black, for a file of its own.

    Returns:
        The element as text, which is a complete .svg file too; the same for the same arguments.
    """
    # Costs about a second, which most commands need not spend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = {name: _drawable(points, log_y) for name, points in series.items()}
    names = [_legend_name(name, points) for name, points in values.items()]
    columns = _legend_columns(names)
    height = HEIGHT + _LEGEND_ROW * max(math.ceil(len(names) / columns) - 1, 0)
    file = io.StringIO()
    # The salt makes ids those of the content, and other ones in each chart of a page.
    with rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        # Of a name in a script that the font lacks: the browser has another font for it.
        warnings.filterwarnings("ignore", "Glyph")
        # SVG counts 72 pixels an inch.
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(printable(title))
        axes.set_xlabel(printable(x_label))
        axes.set_ylabel(printable(y_label))
        lines = [_line(axes, points, index, step) for index, points in enumerate(values.values())]
        _scale(axes, np.concatenate([[], *(y for _, y in values.values())]), log_y)
        axes.set(**{f"{axis}lim": r for axis, r in (("x", x_range), ("y", y_range)) if r})
        if lines:
            figure.legend(lines, names, loc="outside lower left", ncols=columns)
        figure.savefig(file, format="svg", facecolor="white" if background else "none")
    root = _element(file.getvalue(), names, printable(title), _summary(values))
    if background:
        root.attrib["color"] = "#1f2328"
    return ElementTree.tostring(root, encoding="unicode")


def _drawable(points: Sequence[Point], log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N,) and (N,); y is NaN where there is nothing to draw."""
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, np.where(np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y)), y, np.nan)


def _legend_name(name: str, points: tuple[np.ndarray, np.ndarray]) -> str:
    shown = printable(name)
    if len(shown) > _LONGEST_NAME:
        shown = f"{shown[: _LONGEST_NAME - 1]}…"
    return shown if np.isfinite(points[1]).any() else f"{shown} (no data)"


def _legend_columns(names: Sequence[str]) -> int:
    """As many as have room for the longest name and its line."""
    widest = 7 * max(map(len, names), default=0) + 38
    return max(1, min(len(names), WIDTH // widest))


def _line(axes: Axes, points: tuple[np.ndarray, np.ndarray], index: int, step: bool) -> Line2D:
    x, y = points
    there = np.isfinite(y)
    before, after = np.append(False, there[:-1]), np.append(there[1:], False)
    alone = there & ~before & ~after
    marked = there if there.sum() <= _MARKED and not step else alone
    (line,) = axes.plot(
        x,
        y,
        color=LINE_COLOURS[index % len(LINE_COLOURS)],
        linestyle=DASHES[index // len(LINE_COLOURS) % len(DASHES)],
        drawstyle="steps-post" if step else "default",
        marker="o" if marked.any() else "",
        markevery=np.flatnonzero(marked).tolist(),
        clip_on=False,  # half of a dot on the border would be cut off
        gid=f"line {index}",
    )
    return line


def _scale(axes: Axes, y: np.ndarray, log_y: bool) -> None:
    """Ticks, and a logarithmic axis; or a note that there is nothing to see."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    y = y[np.isfinite(y)]
    if not len(y):
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
    elif log_y:
        axes.set_yscale("log")
        between = (1, 2, 5) if y.max() < 1000 * y.min() else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif y.min() >= 0:  # what is never negative gets no axis below zero
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))


def _summary(values: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """What a screen reader says of the lines."""
    ends = {name: y[np.isfinite(y)] for name, (_, y) in values.items()}
    said = [f"{printable(name)} {y[0]:.4g} to {y[-1]:.4g}" for name, y in ends.items() if len(y)]
    return "; ".join(said) or "no data"


def _element(svg: str, names: Sequence[str], title: str, summary: str) -> ElementTree.Element:
    """Matplotlib's file as an element of a page: small, named, and in the page's colour and font.

    Left out are its metadata, its style sheet, which would style the whole page, ids that nothing
    refers to, and digits below a tenth of a pixel.
    """
    root = ElementTree.fromstring(svg)
    for name in ("metadata", "defs"):
        for element in root.findall(f"{_SVG}{name}"):
            root.remove(element)
    drawing = list(root)
    root[:] = [_titled("title", title), _titled("desc", summary), *drawing]
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text, element.tail = (element.text or "").strip(), None
        kind, _, number = element.attrib.get("id", "").partition(" ")
        if kind == "line":
            element.insert(0, _titled("title", names[int(number)]))
        for name in element.attrib.keys() & {"d", "x", "y", "transform"}:
            short = re.sub(r"(\.\d)\d+", r"\1", element.attrib[name])
            element.attrib[name] = " ".join(short.split())
        if target := element.attrib.pop(f"{_XLINK}href", None):
            element.attrib["href"] = target
        element.attrib.pop("clip-path", None)  # nothing lies outside of the axes
        if element.tag == "g":  # the ids of dots, which are used again and again, are on paths
            element.attrib.pop("id", None)
        if style := element.attrib.get("style"):
            style = style.replace("'DejaVu Sans'", "system-ui, sans-serif")
            element.attrib["style"] = style.replace(_INK, "currentColor")
    size = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    root.attrib = {"xmlns": _SVG[1:-1], **size, "stroke-linejoin": "round"}
    return root


def _titled(tag: str, text: str) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    element.text = text
    return element


METRICS = {
    "miou": "mIoU",
    "iou_foreground": "IoU foreground",
    "dice": "Dice",
    "boundary_iou": "boundary IoU",
    "precision": "precision",
    "recall": "recall",
    "pixel_accuracy": "pixel accuracy",
    "mean_image_iou": "mean image IoU",
}
"""Keys of a network's figures and their names, in the order of tables and legends."""


def history_charts(logs: Logs, class_names: Sequence[str], *, background: bool = True) -> list[str]:
    """All charts for which something was logged, as `<svg>` elements.

    Without a `background` two classes are two figures; with it they are that of the foreground.
    """
    mious = {
        "eval_miou": "student",
        "eval_ema_miou": "its moving average",
        "eval_teacher_miou": "teacher",
        "eval_agreement_miou": "student against teacher",
    }
    metrics = {f"eval_{key}": name for key, name in METRICS.items() if key != "miou"}
    several = class_names if len(class_names) > 2 or not background else ()
    classes = {f"eval_iou_{name}": name for name in several}
    losses = {"loss": "training", "eval_loss": "evaluation (T = 1)"}
    terms = {term.name: term.name for term in TERMS}
    evaluated = {f"eval_{term.evaluated_as}": term.name for term in TERMS}
    shares = {f"grad_share/{name}": name for name in terms}
    rates, weights = (
        {key: name.replace("_", " ") for key, name in _named(logs, prefix).items()}
        for prefix in ("lr/", "weight/")
    )
    softened = {term.name for term in TERMS if term.softened}
    is_softened = any(softened & log.keys() for log in logs)
    temperature = {"temperature": "temperature"} if is_softened else {}
    charts = [
        _chart(logs, "mIoU at each evaluation", mious, "mIoU"),
        _chart(logs, "Metrics of the student", metrics),
        _chart(logs, "IoU of each class", classes, "IoU"),
        _chart(logs, "Agreement with the teacher", {"eval_agreement": "share of pixels"}),
        _chart(logs, "Loss", losses, "loss"),
        _chart(logs, "Loss terms, training", terms, "unweighted"),
        _chart(logs, "Loss terms, evaluation (T = 1)", evaluated, "unweighted"),
        _chart(logs, "Shares of the gradient", shares, "share"),
        _chart(logs, "Gradient norm before clipping", {"grad_norm": "norm"}, "norm"),
        _chart(logs, "Learning rates", rates, "rate"),
        _chart(logs, "Weights of the terms", weights, "weight"),
        _chart(logs, "Temperature", temperature, "T"),
        _chart(logs, "Free encoder units", {"free_units": "free units"}, "units"),
    ]
    return [chart for chart in charts if chart is not None]


def _named(logs: Logs, prefix: str) -> dict[str, str]:
    """What stands behind the prefix, of each key that begins with it."""
    return {k: k.removeprefix(prefix) for log in logs for k in log if k.startswith(prefix)}


def _chart(logs: Logs, title: str, names: Mapping[str, str], y_label: str = "") -> str | None:
    """The curves of these keys by their name in the legend; None if none was ever logged."""
    curves = {name: _curve(logs, key) for key, name in names.items()}
    series = merged({name: points for name, points in curves.items() if points})
    if not series:
        return None
    values = [y for points in series.values() for _, y in points if math.isfinite(y)]
    # Small figures would lie on the zero of large ones.
    spans_decades = bool(values) and min(values) > 0 and max(values) / min(values) > 30
    # Whole numbers get an axis from 0, or a constant would have ticks at fractions.
    whole = (0.0, max([3.0, *values]) * 1.05)
    return line_chart(
        series,
        title=title,
        x_label="epoch",
        y_label=y_label,
        log_y=y_label in ("loss", "unweighted", "norm") and spans_decades,
        step=y_label in ("T", "units"),
        y_range=whole if y_label == "units" else None,
    )


def _curve(logs: Logs, key: str) -> list[Point]:
    """(epoch, value) of each log that has the key; a figure that does not exist is NaN."""
    return [
        (float(log["epoch"]), math.nan if log[key] is None else float(log[key]))
        for log in logs
        if key in log and log.get("epoch") is not None
    ]


def merged(series: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Curves that coincide as one, under all their names: only the last of them would be seen."""
    names: dict[str, list[str]] = {}
    for name, points in series.items():
        names.setdefault(repr(points), []).append(name)  # text, as NaN is not equal to itself
    return {
        ", ".join(group) if len(group) < 3 else f"{group[0]} to {group[-1]}": series[group[0]]
        for group in names.values()
    }
