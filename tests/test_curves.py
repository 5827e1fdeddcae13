"""Charts: gaps where figures are missing, names as text, colours for light and dark."""

import math
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from kd_trainer.reports.charts import DASHES, LINE_COLOURS, line_chart
from kd_trainer.reports.panels import CLASS_COLOURS

NS = {"s": "http://www.w3.org/2000/svg"}
LABELS = {"title": "Loss", "x_label": "epoch", "y_label": "nats"}


def lines(svg: str) -> dict[str, list[np.ndarray]]:
    """Pixels (N, 2) of each unbroken piece of each line, by the name of the line."""
    drawn = {}
    for group in ElementTree.fromstring(svg).findall(".//s:g[s:title]", NS):
        path = group.find("s:path", NS)
        pieces = [] if path is None else path.attrib["d"].split("M")[1:]
        drawn[group.findtext("s:title", namespaces=NS) or ""] = [
            np.array(piece.replace("L", " ").split(), float).reshape(-1, 2) for piece in pieces
        ]
    return drawn


def dots(svg: str) -> int:
    return len(ElementTree.fromstring(svg).findall(".//s:g[s:title]//s:use", NS))


def test_steps_hold_a_value_until_the_next():
    """A temperature that changes once an epoch would look as if it glided."""
    points = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]
    (held,) = lines(line_chart({"t": points}, **LABELS, step=True))["t"]
    (straight,) = lines(line_chart({"t": points}, **LABELS))["t"]
    (x0, y0), (x1, y1), (x2, y2) = straight
    assert held.tolist() == [[x0, y0], [x1, y0], [x1, y1], [x2, y1], [x2, y2]]


def test_missing_figures_interrupt_the_line():
    """A straight line over a gap invents figures."""
    nan, inf = math.nan, math.inf
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, nan), (3.0, inf), (4.0, 3.0), (5.0, 1.0), (6.0, nan)]
    svg = line_chart({"a": points}, **LABELS)
    assert [len(piece) for piece in lines(svg)["a"]] == [2, 2]
    assert dots(svg) == 4


def test_a_logarithmic_axis_leaves_out_what_is_not_positive():
    """A learning rate of 0 while a unit is frozen has no logarithm."""
    points = [(0.0, 0.0), (1.0, -1.0), (2.0, 0.1), (3.0, 10.0)]
    assert [
        len(piece) for piece in lines(line_chart({"a": points}, **LABELS, log_y=True))["a"]
    ] == [2]


def test_what_is_never_negative_has_no_axis_below_zero():
    """A share of -5 % on the axis makes a reader doubt the others."""
    words = "".join(
        ElementTree.fromstring(line_chart({"a": [(0, 0.0), (1, 1.0)]}, **LABELS)).itertext()
    )
    assert "\N{MINUS SIGN}" not in words


def test_one_point_is_a_dot_and_none_is_said():
    """A run of one epoch, and a run without any log, have reports too."""
    for step in (False, True):
        assert dots(line_chart({"a": [(1.0, 5.0)]}, **LABELS, step=step)) == 1
    long = [(float(i), math.nan if i == 49 else 1.0) for i in range(51)]
    assert dots(line_chart({"a": long}, **LABELS)) == 1  # the last, which no line reaches
    for empty in ({}, {"a": []}, {"a": [(0.0, math.nan)]}):
        for log_y in (False, True):
            assert "no data" in line_chart(empty, **LABELS, log_y=log_y)
    assert "hollow (no data)" in line_chart(
        {"full": [(0.0, 1.0), (1.0, 2.0)], "hollow": []}, **LABELS
    )


@pytest.mark.parametrize(
    "name", ["<script>alert('&')</script>", "$x^2$ $", "_b", "\x1b[2J\n", "\N{CJK RADICAL REPEAT}"]
)
def test_names_are_text_and_never_markup(name: str):
    """A class may be called <script>, or what matplotlib takes for a formula, or hides."""
    series = {name: [(0.0, 1.0), (1.0, 2.0)], "b": [(0.0, 2.0), (1.0, 1.0)]}
    svg = line_chart(series, title=f'"{name}"', x_label=name, y_label=name)
    root = ElementTree.fromstring(svg)
    assert "<script" not in svg
    shown = name.replace("\x1b", r"\x1b").replace("\n", r"\n")
    assert root.attrib["aria-label"] == f'"{shown}"'
    assert [text.text for text in root.findall(".//s:text", NS)].count(shown) == 3


def test_a_long_name_is_cut_and_many_make_the_chart_higher():
    """They would run out of the chart, or leave no room for the lines."""
    svg = line_chart({"x" * 300: [(0.0, 1.0)]}, **LABELS)
    assert (
        max(len(text.text or "") for text in ElementTree.fromstring(svg).iterfind(".//s:text", NS))
        < 60
    )
    few, many = (
        line_chart({f"series {'x' * 30} {i}": [(0.0, i), (1.0, i)] for i in range(n)}, **LABELS)
        for n in (2, 12)
    )
    heights = []
    for chart in (few, many):
        *_, width, height = map(float, ElementTree.fromstring(chart).attrib["viewBox"].split())
        drawn = np.concatenate([piece for pieces in lines(chart).values() for piece in pieces])
        assert ((drawn >= 0) & (drawn <= (width, height))).all()
        heights.append(np.ptp(drawn[:, 1]))
    assert heights[1] == pytest.approx(heights[0], rel=0.1)


def test_a_long_history_stays_small_and_keeps_its_peaks():
    """A run of days has a hundred thousand logs, and its one spike is what one looks for."""
    y = np.random.default_rng(0).normal(size=100_000)
    y[31_415] = 50
    svg = line_chart({"loss": list(enumerate(y.tolist()))}, **LABELS)
    assert len(svg) < 40_000
    (line,) = lines(svg)["loss"]
    left, right = line[[0, -1], 0]
    x, top = line[line[:, 1].argmin()]
    assert (x - left) / (right - left) == pytest.approx(0.31415, abs=0.005)
    assert top < np.median(line[:, 1]) - 100


def test_a_chart_is_the_same_each_time_and_leaves_matplotlib_as_it_was():
    """A report that differs from itself cannot be compared, and a notebook has its own style."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    series = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    first = line_chart(series, **LABELS)
    assert line_chart(series, **LABELS) == first
    assert dict(matplotlib.rcParams) == before
    other = line_chart(series, **{**LABELS, "title": "Other"})
    ids = [{e.get("id") for e in ElementTree.fromstring(svg).iter()} for svg in (first, other)]
    assert ids[0] & ids[1] == {None}  # two of them stand in one page


def test_matplotlib_is_imported_only_to_draw():
    """It costs every command a second that writes no chart."""
    program = "import sys, kd_trainer.reports.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_lines_are_told_apart_and_seen_on_light_and_dark():
    """Yellow on white is no line."""
    palette = {"#{:02x}{:02x}{:02x}".format(*colour.tolist()) for colour in CLASS_COLOURS}
    assert set(LINE_COLOURS) <= palette
    for place, colour in enumerate(LINE_COLOURS):
        on_white = 1.05 / (luminance(colour) + 0.05)
        on_dark = (luminance(colour) + 0.05) / (luminance("#14181d") + 0.05)
        # The first four carry most charts: the contrast WCAG asks of graphics.
        assert min(on_white, on_dark) >= (3.0 if place < 4 else 2.1), colour
    count = len(LINE_COLOURS) * len(DASHES)
    svg = line_chart({str(i): [(0.0, i), (1.0, i)] for i in range(count)}, **LABELS)
    paths = ElementTree.fromstring(svg).findall(".//s:g[s:title]/s:path", NS)
    assert len({path.attrib["style"] for path in paths}) == count


def test_a_chart_alone_has_its_own_sheet_and_one_in_a_page_the_page_s():
    """Black text on a dark page is not seen."""
    series = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    alone = ElementTree.fromstring(line_chart(series, **LABELS, background=True))
    sheet = alone.find(".//s:path", NS)
    assert sheet is not None
    assert "fill: #ffffff" in sheet.attrib["style"]
    assert luminance(alone.attrib["color"]) < 0.05
    inside = ElementTree.fromstring(line_chart(series, **LABELS))
    assert "color" not in inside.attrib
    styles = [e.attrib["style"] for e in inside.iter() if "style" in e.attrib]
    colours = {
        part.split("#")[1][:6] for style in styles for part in style.split(";") if "#" in part
    }
    assert {f"#{colour}" for colour in colours} == {LINE_COLOURS[0]}
    assert all("currentColor" in text.attrib["style"] for text in inside.findall(".//s:text", NS))
