"""Charts: points where they belong, gaps where figures are missing, XML that every reader takes."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from kd_trainer.reports.charts import (
    DASHES,
    LINE_COLOURS,
    WIDTH,
    line_chart,
    linear_ticks,
    log_ticks,
    tick_labels,
)
from kd_trainer.reports.panels import CLASS_COLOURS

NS = {"s": "http://www.w3.org/2000/svg"}
LABELS = {"title": "Loss", "x_label": "epoch", "y_label": "nats"}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def polylines(svg: str) -> list[np.ndarray]:
    found = parsed(svg).findall(".//s:polyline", NS)
    return [
        np.array([[float(v) for v in p.split(",")] for p in line.attrib["points"].split()])
        for line in found
    ]


def axis(svg: str, which: str) -> tuple[list[float], list[float]]:
    """(pixels, numbers) of the ticks of an axis, read off their labels."""
    texts = parsed(svg).findall(f".//s:text[@class='{which}']", NS)
    shift = 4 if which == "y" else 0  # labels stand a little below their grid line
    return [float(t.attrib[which]) - shift for t in texts], [float(t.text or "") for t in texts]


def read_off(svg: str, which: str, pixels: np.ndarray, *, log: bool = False) -> np.ndarray:
    """Values at pixels, as somebody with a ruler would find them between the labelled ticks."""
    places, numbers = axis(svg, which)
    assert len(places) >= 2
    scale = np.log10(numbers) if log else numbers
    values = np.polyval(np.polyfit(places, scale, 1), pixels)
    return 10**values if log else values


@pytest.mark.parametrize("log_y", [False, True])
def test_points_lie_where_the_labels_of_the_axes_say(log_y: bool):
    """A curve beside its own scale is a wrong figure in every report."""
    points = [(0.5, 3.0), (1.0, 40.0), (2.0, 0.2), (7.5, 900.0)]
    svg = line_chart({"a": points}, **LABELS, log_y=log_y)
    (line,) = polylines(svg)
    wanted = np.array(points)
    assert read_off(svg, "x", line[:, 0]) == pytest.approx(wanted[:, 0], abs=0.02)
    found = read_off(svg, "y", line[:, 1], log=log_y)
    tolerance = {"rel": 0.02} if log_y else {"abs": 2.0}
    assert found == pytest.approx(wanted[:, 1], **tolerance)


def test_everything_lies_inside_the_picture():
    """A point outside the box is cut off without a word."""
    points = [(float(i), math.sin(i) * 1e-3) for i in range(40)]
    svg = line_chart({f"series {i}": points for i in range(12)}, **LABELS)
    _, _, width, height = map(float, parsed(svg).attrib["viewBox"].split())
    assert width == WIDTH
    for line in polylines(svg):
        assert (line >= 0).all()
        assert (line <= (width, height)).all()
    lowest_legend = max(float(y) for y in re.findall(r'<path d="M[\d.]+ ([\d.]+)h20"', svg))
    assert min(line[:, 1].min() for line in polylines(svg)) > lowest_legend


def test_steps_hold_a_value_until_the_next():
    """A temperature that changes once an epoch would look as if it glided."""
    svg = line_chart({"t": [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]}, **LABELS, step=True)
    (line,) = polylines(svg)
    x, y = read_off(svg, "x", line[:, 0]), read_off(svg, "y", line[:, 1])
    assert x == pytest.approx([0, 1, 1, 2, 2], abs=0.02)
    assert y == pytest.approx([4, 4, 2, 2, 1], abs=0.02)


def test_missing_figures_interrupt_the_line():
    """A straight line over a gap invents figures."""
    nan, inf = math.nan, math.inf
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, nan), (3.0, inf), (4.0, 3.0), (5.0, 1.0), (6.0, nan)]
    svg = line_chart({"a": points}, **LABELS)
    assert [len(line) for line in polylines(svg)] == [2, 2]
    assert "nan" not in svg.lower()
    assert not re.search(r"\binf\b", svg)


def test_a_logarithmic_axis_leaves_out_what_is_not_positive():
    """A learning rate of 0 while a unit is frozen has no logarithm."""
    svg = line_chart(
        {"a": [(0.0, 0.0), (1.0, -1.0), (2.0, 0.1), (3.0, 10.0)]}, **LABELS, log_y=True
    )
    assert [len(line) for line in polylines(svg)] == [2]


def test_one_point_is_a_dot_and_none_is_said():
    """A run of one epoch, and a run without any log, have reports too."""
    single = line_chart({"a": [(1.0, 5.0)]}, **LABELS)
    assert len(parsed(single).findall(".//s:circle", NS)) == 1
    for empty in ({}, {"a": []}, {"a": [(0.0, math.nan)]}):
        assert "no data" in "".join(parsed(line_chart(empty, **LABELS)).itertext())
    mixed = line_chart({"full": [(0.0, 1.0), (1.0, 2.0)], "hollow": []}, **LABELS)
    assert "hollow (no data)" in "".join(parsed(mixed).itertext())


def test_constant_lines_get_an_axis():
    """Equal ends of an axis are a division by zero."""
    for value in (0.0, 1.0, 1e-7, -3.0):
        svg = line_chart({"a": [(0.0, value), (1.0, value)]}, **LABELS)
        assert len(polylines(svg)) == 1
        assert len(axis(svg, "y")[0]) >= 2
    line_chart({"a": [(0.0, 5.0), (1.0, 5.0)]}, **LABELS, log_y=True)


def test_names_are_text_and_never_markup():
    """A class may be called <script>, and a title may hold quotes."""
    name = "<script>alert('&')</script>"
    svg = line_chart(
        {name: [(0.0, 1.0), (1.0, 2.0)]}, title=f'"{name}"', x_label=name, y_label=name
    )
    root = parsed(svg)
    assert "<script" not in svg
    assert root.attrib["aria-label"] == f'"{name}"'
    assert [t.text for t in root.findall(".//s:text", NS)].count(name) == 3


def test_a_long_history_stays_small_and_keeps_its_peaks():
    """A run of days has a hundred thousand logs, and its one spike is what one looks for."""
    points = [
        (float(i), math.sin(i / 500) + (50.0 if i == 31_415 else 0.0)) for i in range(100_000)
    ]
    svg = line_chart({"loss": points}, **LABELS)
    assert len(svg) < 20_000
    (line,) = polylines(svg)
    highest = line[line[:, 1].argmin()]
    assert read_off(svg, "x", highest[:1])[0] == pytest.approx(31_415, rel=0.01)
    assert read_off(svg, "y", highest[1:])[0] == pytest.approx(50, rel=0.05)
    assert read_off(svg, "x", line[[0, -1], 0]) == pytest.approx([0, 99_999], abs=300)


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
    looks = {
        (line.attrib["stroke"], line.attrib.get("stroke-dasharray"))
        for line in parsed(svg).findall(".//s:polyline", NS)
    }
    assert len(looks) == count


def test_a_chart_alone_has_its_own_sheet():
    """Saved as a file and seen on a dark page, black text would stand on black."""
    alone = line_chart({"a": [(0.0, 1.0), (1.0, 2.0)]}, **LABELS, background=True)
    (sheet,) = parsed(alone).findall("./s:rect", NS)
    assert sheet.attrib["fill"] == "#ffffff"
    assert parsed(alone).attrib["color"].startswith("#")
    inside = line_chart({"a": [(0.0, 1.0), (1.0, 2.0)]}, **LABELS)
    assert parsed(inside).findall("./s:rect", NS) == []
    assert parsed(inside).attrib["fill"] == "currentColor"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 50), (0.88, 0.913), (-3, 4), (0, 1e-6), (1e3, 1e7), (0, 7)]
)
def test_ticks_are_round_even_and_inside(low: float, high: float):
    """Ticks at 0.137 are read by nobody."""
    ticks = linear_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 7
    assert low - 1e-9 * abs(high) <= ticks[0] < ticks[-1] <= high * (1 + 1e-9)
    gaps = np.diff(ticks)
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    mantissa = gaps[0] / 10 ** math.floor(math.log10(gaps[0]) + 1e-9)
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 2.5, 5))
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(labels)
    assert [float(text) for text in labels] == pytest.approx(ticks, abs=gaps[0] / 100)


@pytest.mark.parametrize(
    ("low", "high"), [(1e-6, 1e-3), (0.2, 900), (0.5, 0.9), (0.02, 0.7), (1e-9, 1e9)]
)
def test_logarithmic_ticks_are_few_and_labelled_exactly(low: float, high: float):
    """Eighteen decades need not have eighteen labels."""
    ticks = log_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 7
    assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert [float(text) for text in tick_labels(ticks)] == pytest.approx(ticks, rel=1e-2)
    steps = np.diff(np.log10(ticks))
    if high / low > 10:  # without a hole of decades between close neighbours
        assert steps.max() < 3 * steps.min()
