"""What holds for any schedule, counts and mask: bounds, sums, and a plain second opinion."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.mask_survey import find_mask_rule
from kd_trainer.data.masks import MaskRule
from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.schedules import (
    TEMPERATURE_KINDS,
    TemperatureSchedule,
    TrainingSchedule,
    UnfreezeSchedule,
)

IGNORE = 255
SEEDS = st.integers(0, 2**31 - 1)


# --- schedules ----------------------------------------------------------------------------------

TEMPERATURES = st.floats(0.25, 20)


@given(
    st.sampled_from(TEMPERATURE_KINDS),
    st.lists(TEMPERATURES, min_size=2, max_size=5),
    st.lists(st.floats(-1, 2), min_size=2, max_size=6),
)
def test_temperatures_move_one_way_from_start_to_end(kind, heights, places):
    """A temperature that turns around would soften again what was already sharp."""
    heights = sorted(heights, reverse=heights[0] >= heights[-1])
    points = tuple(enumerate(heights)) if kind == "piecewise" else ()
    schedule = TemperatureSchedule(kind, heights[0], heights[-1], points)
    found = [schedule(place) for place in sorted(places)]
    low, high = min(heights), max(heights)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    sign = -1 if heights[0] >= heights[-1] else 1
    assert all(sign * (b - a) >= -1e-9 for a, b in itertools.pairwise(found))
    assert schedule(0) == pytest.approx(heights[0])
    end = heights[0] if kind == "constant" else heights[-1]
    assert schedule(1) == pytest.approx(end)


@given(st.integers(0, 20), st.integers(0, 6), st.integers(1, 12))
def test_free_units_never_decrease_and_end_at_all(start, every, units):
    """A unit that is frozen again keeps its moments, and is trained from where nobody expects."""
    schedule = UnfreezeSchedule(start, every, units)
    found = [schedule(epoch) for epoch in range(start + every * units + 2)]
    assert found == sorted(found)
    assert set(found[:start]) <= {0}
    assert found[-1] == units
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(step in (0, 1) for step in steps) or every == 0


@given(st.integers(1, 50), st.floats(0, 10), st.floats(0, 1), st.integers(1, 7))
def test_learning_rates_rise_once_and_fall_once_between_0_and_the_base_rate(
    epochs, warmup, floor, updates
):
    """A factor above 1 trains faster than anybody asked for."""
    table = TrainingSchedule(
        UnfreezeSchedule(5, 3, 7),
        TemperatureSchedule("constant", 1.0, 1.0),
        epochs=epochs,
        steps_per_epoch=updates,
        warmup_epochs=warmup,
        min_rate=floor,
    )
    rates = [table.rate("decoder")(update) for update in range(updates * epochs)]
    top = min(math.ceil(updates * warmup), len(rates))
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(rate >= floor - 1e-12 for rate in rates[top:])


# --- counts and figures -------------------------------------------------------------------------


def maps(seed: int, num_labels: int, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    shape = (pictures, 6, 7)
    labels = random.integers(0, num_labels, shape)
    prediction = np.where(random.random(shape) < 0.6, labels, random.integers(0, num_labels, shape))
    labels[random.random(shape) < 0.2] = IGNORE
    return torch.from_numpy(prediction), torch.from_numpy(labels)


def counted(prediction: torch.Tensor, labels: torch.Tensor, num_labels: int) -> SegmentationCounts:
    return SegmentationCounts.zero(num_labels).add(image_counts(prediction, labels, num_labels))


def equal(one: SegmentationCounts, other: SegmentationCounts) -> bool:
    tables = (one.confusion == other.confusion).all() and (one.boundary == other.boundary).all()
    sums = one.image_iou_sum == pytest.approx(other.image_iou_sum, abs=1e-12)
    return bool(tables) and sums and one.images == other.images


@given(SEEDS, st.integers(2, 6), st.integers(2, 7), st.data())
def test_counts_of_any_parts_add_up_to_those_of_the_whole(seed, num_labels, pictures, data):
    """Batches, processes and a resumed evaluation split a set wherever they like."""
    prediction, labels = maps(seed, num_labels, pictures)
    cuts = data.draw(st.lists(st.integers(0, pictures), max_size=4).map(sorted))
    ends = [0, *cuts, pictures]
    whole, parts = counted(prediction, labels, num_labels), SegmentationCounts.zero(num_labels)
    for a, b in itertools.pairwise(ends):
        if a < b:
            parts = parts + counted(prediction[a:b], labels[a:b], num_labels)
    assert equal(whole, parts)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(pictures))
    assert equal(whole, counted(prediction[order], labels[order], num_labels))


@given(SEEDS, st.integers(2, 6))
def test_confusions_of_any_split_of_the_pixels_add_up(seed, num_labels):
    """Each pixel counts once: ignoring one half and then the other is counting both."""
    prediction, labels = maps(seed, num_labels, 2)
    half = torch.from_numpy(np.random.default_rng(seed + 1).random(labels.shape) < 0.5)
    parts = [
        counted(prediction, torch.where(chosen, labels, IGNORE), num_labels).confusion
        for chosen in (half, ~half)
    ]
    assert np.array_equal(sum(parts), counted(prediction, labels, num_labels).confusion)


@given(SEEDS, st.integers(2, 6), st.integers(1, 4))
def test_figures_are_shares_and_equal_plain_counting(seed, num_labels, pictures):
    """Sets of pixels, class by class, as one would explain an IoU at a blackboard."""
    prediction, labels = maps(seed, num_labels, pictures)
    names = {i: f"c{i}" for i in range(num_labels)}
    found = counted(prediction, labels, num_labels).metrics(names)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found.values())
    pixels = [
        (place, int(p), int(t))
        for place, (p, t) in enumerate(
            zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True)
        )
        if t != IGNORE
    ]
    ious = {}
    for c in range(num_labels):
        guess = {place for place, p, _ in pixels if p == c}
        truth = {place for place, _, t in pixels if t == c}
        if guess | truth:
            ious[c] = len(guess & truth) / len(guess | truth)
            dice = 2 * len(guess & truth) / (len(guess) + len(truth))
            assert found[f"iou_c{c}"] == pytest.approx(ious[c], abs=1e-12)
            assert found[f"dice_c{c}"] == pytest.approx(dice, abs=1e-12)
            assert ious[c] <= dice <= 2 * ious[c]
        else:
            assert math.isnan(found[f"iou_c{c}"])
    assert found["miou"] == pytest.approx(np.mean(list(ious.values())), abs=1e-12)


@given(SEEDS, st.integers(2, 5))
def test_renaming_the_foreground_classes_changes_no_mean(seed, num_labels):
    """Means that depend on the order of the classes favour some of them."""
    prediction, labels = maps(seed, num_labels, 3)
    order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(num_labels - 1)])
    table = torch.from_numpy(np.concatenate([order, np.full(256 - num_labels, IGNORE)]))
    names = {i: f"c{i}" for i in range(num_labels)}
    before = counted(prediction, labels, num_labels).metrics(names)
    after = counted(table[prediction], table[labels], num_labels).metrics(names)
    for name in ("miou", "dice", "pixel_accuracy", "mean_image_iou", "boundary_iou", "recall"):
        assert after[name] == pytest.approx(before[name], abs=1e-12, nan_ok=True)


# --- masks --------------------------------------------------------------------------------------

ENCODINGS = ("0/1", "0/255", "1-bit", "ids", "palette", "rgb", "16-bit", "mask_values")


def encoded(classes: np.ndarray, how: str, values: list[int], kind: str) -> dict:
    """A mask of class ids as a file, in one of the ways that people store masks."""
    if how == "0/255":
        image = Image.fromarray(np.where(classes == 1, 255, classes).astype(np.uint8))
    elif how == "1-bit":
        image = Image.fromarray(classes.astype(bool))
    elif how == "palette":
        image = Image.fromarray(classes.astype(np.uint8)).convert("L")
        image.putpalette([(37 * i + c) % 256 for i in range(256) for c in (0, 90, 170)])
    elif how == "rgb":
        image = Image.fromarray(np.repeat(classes.astype(np.uint8)[..., None], 3, axis=2))
    elif how == "16-bit":
        image = Image.fromarray(classes.astype(np.uint16))
    elif how == "mask_values":
        table = np.full(256, 255, np.uint8)
        table[: len(values)] = values
        image = Image.fromarray(table[classes])
    else:
        image = Image.fromarray(classes.astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, kind)
    return {"bytes": stream.getvalue(), "path": "mask"}


@given(
    st.sampled_from(ENCODINGS),
    st.sampled_from(["PNG", "TIFF"]),
    st.integers(1, 40),
    st.integers(1, 40),
    SEEDS,
)
def test_classes_survive_each_way_of_storing_them(how, kind, height, width, seed):
    """The student learns whatever comes out here, right or wrong."""
    random = np.random.default_rng(seed)
    binary = how in ("0/1", "0/255", "1-bit")
    num_labels = 2 if binary else int(random.integers(3, 20))
    classes = random.integers(0, num_labels, (height, width))
    if how not in ("0/255", "1-bit"):  # 255 is foreground there, and a bit has no third value
        classes[random.random(classes.shape) < 0.1] = IGNORE
    values = [int(v) for v in random.permutation(250)[:num_labels]]
    cell = encoded(classes, how, values, kind)
    if how == "mask_values":
        rule = MaskRule(tuple(values))
    else:
        seen = set(np.unique(classes)) - {IGNORE}
        assume(seen == {0, 1} if binary else max(seen, default=0) > 1)
        rule = find_mask_rule([cell], num_labels=num_labels, ignore_index=IGNORE)
    assert np.array_equal(rule.labels(decode_mask(cell, 0), "mask"), classes)
