"""Means over seeds, gap closed and the bootstrap, against scipy, derivatives and plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import sem

from kd_trainer import metrics
from kd_trainer.metrics import (
    Mean,
    SegmentationCounts,
    bootstrap_difference,
    gap_closed,
    mean_of,
    miou,
)

FIGURES = st.floats(0.0, 1.0)


def counts(runs: int, images: int, classes: int, seed: int) -> np.ndarray:
    """Counts of several runs on the same images: every image keeps its pixels a class."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(1, 200, (images, classes))
    share = draw.dirichlet(np.ones(classes), (runs, images, classes))
    found = np.floor(truth[None, :, :, None] * share).astype(np.int64)
    found[..., 0] += truth - found.sum(axis=-1)
    return found


@given(st.lists(FIGURES, min_size=2, max_size=8))
def test_standard_error_is_that_of_scipy(values):
    """The spread of single runs in its place would be larger by the root of their number."""
    found = mean_of(values)
    assert found.value == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(sem(values), abs=1e-12)
    assert found.count == len(values)


def test_one_seed_has_no_standard_error():
    """An error of 0 would make the figure of one run look certain."""
    assert mean_of([0.7]) == Mean(0.7, None, 1)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_mean_refuses_what_has_no_mean(values):
    """A NaN would travel through every further figure."""
    with pytest.raises(ValueError, match="Expected at least one finite figure"):
        mean_of(values)


@given(
    *(st.floats(0.0, 0.01) for _ in range(3)),
    st.floats(0.4, 0.6),
    st.floats(0.4, 0.8),
    st.floats(0.7, 0.9),
)
def test_error_of_gap_closed_is_the_propagated_one(sd, sb, st_, baseline, distilled, teacher):
    """A wrong factor in the formula gives a plausible figure that nobody checks."""

    def share(t, b, d):
        return (d - b) / (t - b)

    point, errors, step = (teacher, baseline, distilled), (st_, sb, sd), 1e-6
    variance = 0.0
    for index, sigma in enumerate(errors):
        up, down = list(point), list(point)
        up[index] += step
        down[index] -= step
        variance += ((share(*up) - share(*down)) / (2 * step) * sigma) ** 2
    found = gap_closed(*(Mean(v, s, 3) for v, s in zip(point, errors, strict=True)))
    assert found.closed == pytest.approx(share(*point))
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-5, abs=1e-9)
    assert not found.conditional


def test_error_of_gap_closed_is_what_repeated_experiments_scatter_by():
    """The formula is an approximation; it has to describe experiments, not only derivatives."""
    draw = np.random.default_rng(0)
    runs = draw.normal([[[0.70]], [[0.74]]], 0.006, (2, 4000, 3)).mean(axis=2)
    scattered = np.std((runs[1] - runs[0]) / (0.8 - runs[0]))
    sigma = 0.006 / math.sqrt(3)
    found = gap_closed(Mean(0.8, None, 1), Mean(0.70, sigma, 3), Mean(0.74, sigma, 3))
    assert found.error == pytest.approx(scattered, rel=0.05)


def test_one_teacher_makes_the_error_conditional():
    """Without the word, the error seems to hold for any teacher trained like this one."""
    found = gap_closed(Mean(0.8, None, 1), Mean(0.7, 0.01, 3), Mean(0.75, 0.01, 3))
    assert found.conditional
    assert found.error == pytest.approx(math.sqrt(0.01**2 + 0.25 * 0.01**2) / 0.1)
    assert "conditional on this one teacher" in found.sentence()
    assert "G = 0.500 ± 0.112" in found.sentence()


@pytest.mark.parametrize(
    ("gap", "teacher_error", "judged"),
    [(0.0201, None, True), (0.0199, None, False), (0.0281, 0.01, False), (0.0284, 0.01, True)],
)
def test_gap_below_twice_its_error_is_not_judged(gap, teacher_error, judged):
    """A ratio over a gap of noise can be anything, and 0.9 of nothing reads like a success."""
    teacher, baseline = Mean(0.7 + gap, teacher_error, 3), Mean(0.7, 0.01, 3)
    found = gap_closed(teacher, baseline, Mean(0.71, 0.01, 3))
    assert found.too_small != judged
    assert ("too small to judge" in found.sentence()) != judged
    assert (found.error is None) != judged


@pytest.mark.parametrize("teacher", [0.7, 0.69])
@pytest.mark.parametrize("error", [0.0, None])
def test_teacher_that_is_not_better_leaves_nothing_to_close(teacher, error):
    """A negative gap turns a student that got worse into one that closed the gap."""
    found = gap_closed(Mean(teacher, None, 1), Mean(0.7, error, 2), Mean(0.6, error, 2))
    assert found.closed is None
    assert "not better than the baseline" in found.sentence()


def test_one_seed_says_what_is_missing():
    """Whoever sees only G takes it for a result."""
    alone = gap_closed(Mean(0.8, None, 1), Mean(0.7, None, 1), Mean(0.75, None, 1))
    assert (alone.error, alone.needed) == (None, None)
    assert "cannot be said whether the gap is large enough" in alone.sentence()
    half = gap_closed(Mean(0.8, None, 1), Mean(0.7, 0.01, 2), Mean(0.75, None, 1))
    assert "distilled student has one seed" in half.sentence()


def test_miou_is_that_of_the_metrics():
    """The interval must stand around the figure that is reported."""
    table = counts(4, 6, 3, seed=1).sum(axis=1)
    table[0, 2], table[0, :, 2] = 0, 0  # a class that occurs nowhere
    for own, confusion in zip(miou(table), table, strict=True):
        totals = SegmentationCounts(confusion, np.zeros((2, 3), np.int64), 0.0, 1)
        expected = totals.metrics({0: "a", 1: "b", 2: "c"})["miou"]
        assert own == pytest.approx(expected, abs=1e-12)
    assert np.isnan(miou(np.zeros((2, 2))))


def by_hand(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The bootstrap as loops: draw images, add their counts, then take ratios."""
    draw = np.random.default_rng(seed)
    images, found = first.shape[1], []
    for _ in range(resamples):
        picked = [int(i) for i in draw.integers(0, images, images)]
        means = []
        for side in (first, second):
            scores = []
            for run in side:
                total = sum(run[i] for i in picked)
                ious = [
                    total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k])
                    for k in range(len(total))
                ]
                scores.append(sum(ious) / len(ious))
            means.append(sum(scores) / len(scores))
        found.append(means[0] - means[1])
    return np.array(found)


def test_bootstrap_is_the_plain_loop():
    """A matrix product that sums the wrong axis still gives an interval."""
    both = counts(5, 7, 3, seed=2)
    first, second = both[:3], both[3:]
    found = bootstrap_difference(first, second, resamples=60, seed=5)
    expected = by_hand(first, second, 60, seed=5)
    assert found.low == pytest.approx(np.percentile(expected, 2.5), abs=1e-12)
    assert found.high == pytest.approx(np.percentile(expected, 97.5), abs=1e-12)
    assert (found.images, found.resamples, found.level) == (7, 60, 0.95)


def test_bootstrap_does_not_depend_on_how_it_is_cut(monkeypatch):
    """Large data sets are drawn in pieces, and must not get another interval by it."""
    both = counts(2, 9, 2, seed=3)
    whole = bootstrap_difference(both[:1], both[1:], resamples=50)
    monkeypatch.setattr(metrics, "_DRAWS", 40)
    assert bootstrap_difference(both[:1], both[1:], resamples=50) == whole


@given(st.integers(1, 12), st.integers(2, 4), st.integers(0, 50))
def test_bootstrap_is_repeatable_antisymmetric_and_zero_between_equals(images, classes, seed):
    """Each breaks if the two sides were not drawn with the same images."""
    both = counts(2, images, classes, seed)
    one, other = both[:1], both[1:]
    found = bootstrap_difference(one, other, resamples=20, seed=seed)
    assert bootstrap_difference(one, other, resamples=20, seed=seed) == found
    turned = bootstrap_difference(other, one, resamples=20, seed=seed)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert found.low - 1e-12 <= found.high
    same = bootstrap_difference(one, one, resamples=20)
    assert (same.low, same.estimate, same.high) == (0.0, 0.0, 0.0)


def test_images_without_valid_pixels_do_not_count():
    """A resample of nothing but them would have no mIoU."""
    both = counts(2, 3, 2, seed=4)
    padded = np.concatenate([both, np.zeros((2, 40, 2, 2), np.int64)], axis=1)
    found = bootstrap_difference(padded[:1], padded[1:], resamples=30)
    assert found == bootstrap_difference(both[:1], both[1:], resamples=30)
    with pytest.raises(ValueError, match="Expected images with valid pixels"):
        bootstrap_difference(padded[:1, 3:], padded[1:, 3:])


def test_bootstrap_refuses_other_images():
    """Runs measured on two data sets have a difference too, which says nothing."""
    one = counts(1, 4, 2, seed=5)
    with pytest.raises(ValueError, match="same images in the same order"):
        bootstrap_difference(one, one[:, ::-1])
    with pytest.raises(ValueError, match="of the same images, got shapes"):
        bootstrap_difference(one, one[:, :3])
    with pytest.raises(ValueError, match="at least one resample"):
        bootstrap_difference(one, one, resamples=0)
