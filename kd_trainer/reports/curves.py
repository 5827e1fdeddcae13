"""Line charts as SVG text: no dependency, no script, nothing loaded from elsewhere.

Text and axes take the colour of the text around them, lines have middle tones of Okabe and Ito's
palette, so one chart is readable on light and on dark pages and with every kind of colour vision.
Lines beyond the number of colours are dashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from kd_trainer.reports.panels import CLASS_COLOURS
from kd_trainer.reports.ticks import linear_ticks, log_ticks, tick_labels

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
