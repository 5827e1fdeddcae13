"""Charts as SVG, in the page's own colours: training curves and what they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from kd_trainer.losses import TERMS
from kd_trainer.reports.panels import CLASS_COLOURS

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that lie evenly between two bounds.

    Args:
        low: lower bound.
        high: upper bound, above `low`.
        count: about how many; there are at most `count + 1`.
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in STEPS if power * s >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten between two positive bounds, and their doubles and halves where there is room.

    Over less than a decade the ticks are those of a linear axis.
    """
    decades = math.log10(high / low)
    if decades < 1:
        return [tick for tick in linear_ticks(low, high, count) if tick > 0]
    every = max(1, math.ceil(decades / count))
    first = math.floor(math.log10(low) / every) * every
    powers = range(first, math.ceil(math.log10(high)) + 1, every)
    for factors in ((1, 2, 5), (1, 3), (1,)) if every == 1 else ((1,),):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count + 2:
            break
    return ticks


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks as text, all with as many decimals as the finest of them needs."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    smallest = min((abs(tick) for tick in ticks if tick), default=1.0)
    if largest >= 1e5 or largest < 1e-2 or largest / smallest > 1e4:
        return [_power(tick) for tick in ticks]
    decimals = max((_decimals(tick) for tick in ticks), default=0)
    if largest / smallest >= 100:  # a logarithmic axis: each number as it is, if short enough
        plain = [f"{tick:.{_decimals(tick)}f}" for tick in ticks]
        return plain if max(map(len, plain)) < 6 else [_power(tick) for tick in ticks]
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _decimals(value: float) -> int:
    return next((d for d in range(6) if math.isclose(round(value, d), value, abs_tol=1e-9)), 6)


def _power(value: float) -> str:
    """2e-4 and not 2e-04."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    short = mantissa.rstrip("0").rstrip(".")
    return f"{short}e{int(exponent)}" if int(exponent) else short


Point = tuple[float, float]
Range = tuple[float, float]

# Indices into the palette by contrast against white and against black; its yellow and its first
# orange are too pale on white to come early or at all.
_ORDER = (5, 6, 1, 7, 3, 2, 8)
LINE_COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*CLASS_COLOURS[i].tolist()) for i in _ORDER)
DASHES = ("", "7 3", "2 3", "10 3 2 3")

WIDTH, HEIGHT = 440, 290
FONT = 12
_CHARACTER = 6.3  # mean width of one in pixels, at this size in a usual sans-serif
_LEFT, _RIGHT, _BOTTOM = 60, 14, 42
_MOST_POINTS = 400  # of one line; more cannot be seen and would only make the file larger
_MARKED = 30  # up to so many points are also drawn as dots


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels inside the axes."""

    x: Range
    y: Range
    top: float
    height: float
    log_y: bool

    def place(self, point: Point) -> Point:
        """Pixel of a point; y grows downwards."""
        low, high, value = *self.y, point[1]
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - low) / (high - low)
        bottom = self.height - _BOTTOM
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), bottom - up * (bottom - self.top)


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
        The element as text, which is a complete .svg file too.
    """
    kept = {name: _segments(points, log_y) for name, points in series.items()}
    everything = [p for segments in kept.values() for segment in segments for p in segment]
    names = {name: name if kept[name] else f"{name} (no data)" for name in kept}
    lines, top = _legend(names)
    # A long legend makes the picture higher and leaves the axes their height.
    height = HEIGHT + max(0.0, top - 68)
    parts = [_text(WIDTH / 2, 18, title, anchor="middle", extra='font-weight="600"'), *lines]
    if everything:
        frame = _Frame(
            x_range or _bounds([p[0] for p in everything], 0.0, log=False),
            y_range or _bounds([p[1] for p in everything], 0.05, log=log_y),
            top,
            height,
            log_y,
        )
        parts += _axes(frame, x_label, y_label)
        for index, (name, segments) in enumerate(kept.items()):
            parts += _line(name, segments, index, frame, step)
    else:
        middle = (top + height) / 2
        parts.append(_text(WIDTH / 2, middle, "no data", anchor="middle", extra='opacity="0.7"'))
    return _document(parts, title, height, background)


def _document(parts: list[str], title: str, height: float, background: bool) -> str:
    colour = ' color="#1f2328"' if background else ""
    sheet = '<rect width="100%" height="100%" fill="#ffffff"/>' if background else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img"'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="{FONT}"'
        f' fill="currentColor"{colour}>{sheet}{"".join(parts)}</svg>'
    )


def _segments(points: Sequence[Point], log_y: bool) -> list[list[Point]]:
    """The drawable points, cut where one is not, thinned to what can be seen."""
    segments: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y):
            segments[-1].append((x, y))
        elif segments[-1]:
            segments.append([])
    total = sum(map(len, segments))
    keep = max(1.0, total / _MOST_POINTS)
    return [_thinned(segment, math.ceil(len(segment) / keep)) for segment in segments if segment]


def _thinned(points: list[Point], most: int) -> list[Point]:
    """About `most` of the points: of each run the lowest and the highest, so that peaks stay."""
    if len(points) <= max(most, 4):
        return points
    size = math.ceil(2 * len(points) / most)
    kept = [0, len(points) - 1]
    for start in range(0, len(points), size):
        run = range(start, min(start + size, len(points)))
        kept += [min(run, key=lambda i: points[i][1]), max(run, key=lambda i: points[i][1])]
    return [points[i] for i in sorted(set(kept))]


def _bounds(values: list[float], margin: float, *, log: bool) -> Range:
    """Ends of an axis: those of the values and a margin; never equal."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** margin if high > low else 2.0
        return low / factor, high * factor
    if low == high:
        wide = abs(low) * 0.1 or 1.0
        return low - wide, high + wide
    wide = (high - low) * margin
    # Figures that are never negative get no axis below zero.
    return (0.0 if low >= 0 > low - wide else low - wide), high + wide


def _legend(names: Mapping[str, str]) -> tuple[list[str], float]:
    """Samples of the lines with their names, in rows; and where the axes may begin."""
    parts, x, y = [], float(_LEFT), 38.0
    for index, name in enumerate(names.values()):
        width = 26 + _CHARACTER * len(name) + 12
        if x > _LEFT and x + width > WIDTH:
            x, y = float(_LEFT), y + 17
        parts.append(f'<path d="M{x:.1f} {y - 4:.1f}h20" {_stroke(index)}/>')
        parts.append(_text(x + 25, y, name))
        x += width
    return parts, y + (13 if names else -8)


def _stroke(index: int) -> str:
    colour = LINE_COLOURS[index % len(LINE_COLOURS)]
    dash = DASHES[index // len(LINE_COLOURS) % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'fill="none" stroke="{colour}" stroke-width="2"{dashed}'


def _axes(frame: _Frame, x_label: str, y_label: str) -> list[str]:
    bottom, right = frame.height - _BOTTOM, WIDTH - _RIGHT
    rows = log_ticks(*frame.y, 5) if frame.log_y else linear_ticks(*frame.y, 5)
    parts = []
    for tick, label in zip(rows, tick_labels(rows), strict=True):
        y = frame.place((frame.x[0], tick))[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" opacity="0.15"/>')
        parts.append(_text(_LEFT - 6, y + 4, label, anchor="end", extra='class="y"'))
    columns = linear_ticks(*frame.x, 6)
    for tick, label in zip(columns, tick_labels(columns), strict=True):
        x = frame.place((tick, frame.y[1]))[0]
        parts.append(f'<path d="M{x:.1f} {bottom:g}v4" stroke="currentColor"/>')
        parts.append(_text(x, bottom + 17, label, anchor="middle", extra='class="x"'))
    parts.append(
        f'<path d="M{_LEFT} {frame.top:g}V{bottom:g}H{right}" fill="none" stroke="currentColor"'
        ' opacity="0.7"/>'
    )
    middle, height = (_LEFT + right) / 2, (frame.top + bottom) / 2
    parts.append(_text(middle, frame.height - 8, x_label, anchor="middle"))
    turn = f'transform="rotate(-90 12 {height:.1f})"'
    return [*parts, _text(12, height, y_label, anchor="middle", extra=turn)]


def _line(
    name: str, segments: list[list[Point]], index: int, frame: _Frame, step: bool
) -> list[str]:
    """One series: a polyline a segment, and dots where there are few points."""
    count = sum(map(len, segments))
    parts = [f"<g><title>{escape(name)}</title>"]
    for segment in segments:
        places = [frame.place(point) for point in segment]
        if len(places) > 1:
            drawn = " ".join(f"{x:.2f},{y:.2f}" for x, y in (_stepped(places) if step else places))
            parts.append(f'<polyline points="{drawn}" stroke-linejoin="round" {_stroke(index)}/>')
        if len(places) == 1 or (count <= _MARKED and not step):
            colour = LINE_COLOURS[index % len(LINE_COLOURS)]
            dots = (f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.5"/>' for x, y in places)
            parts.append(f'<g fill="{colour}">{"".join(dots)}</g>')
    return [*parts, "</g>"]


def _stepped(places: list[Point]) -> list[Point]:
    corners = [(after[0], before[1]) for before, after in pairwise(places)]
    return [places[0], *(p for pair in zip(corners, places[1:], strict=True) for p in pair)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", extra: str = "") -> str:
    more = f" {extra}" if extra else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


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
    found = [(log.get("epoch"), log[key]) for log in logs if key in log]
    return [(float(x), math.nan if y is None else float(y)) for x, y in found if x is not None]


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
    epochs = ("-" if (x := log.get("epoch")) is None else f"{x:g}" for log in rows)
    figures = ([log.get(key) for key in keys] for log in rows)
    return header, [[x, *row] for x, row in zip(epochs, figures, strict=True)]
