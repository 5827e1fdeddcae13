"""Whether a difference between runs is more than chance: seeds, gap closed, bootstrap over images.

Everything is float64 numpy. Two kinds of chance are kept apart: another seed would give another
student (`mean_of`, `gap_closed`), and another set of images would give other figures of the same
students (`bootstrap_difference`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Numbers drawn at a time by the bootstrap: about 32 MiB, whatever the number of images.
_DRAWS = 4_000_000


@dataclass(frozen=True)
class Mean:
    """Mean of a figure over seeds.

    Attributes:
        value: the mean.
        error: standard error of the mean, s/√n with s from n − 1; None with one seed, which says
            nothing about the spread.
        count: number of seeds.
    """

    value: float
    error: float | None
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of the mean of one figure of several seeds.

    Raises:
        ValueError: if there is no value, or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(
            f"Expected at least one finite figure, got {list(values)}. Leave out the runs that "
            "have none."
        )
    count = len(numbers)
    error = float(numbers.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Mean(float(numbers.mean()), error, count)


@dataclass(frozen=True)
class GapClosed:
    """How much of the way from the baseline to the teacher the distilled student went.

    Attributes:
        gap: teacher − baseline.
        needed: 2·√(σ_T² + σ_B²), below which the gap is too small to judge; None with one seed.
        closed: G; None if the gap is too small to judge.
        error: standard error of G; None if G or the error of a mean is not known.
        conditional: whether σ_T was taken as 0, because there is one teacher.
    """

    gap: float
    needed: float | None
    closed: float | None
    error: float | None
    conditional: bool

    @property
    def too_small(self) -> bool:
        """Whether the gap is too small to judge."""
        return self.closed is None

    def sentence(self) -> str:
        """What can be said, in one or two sentences."""
        if self.gap <= 0:
            return (
                f"The gap is too small to judge: the teacher is not better than the baseline "
                f"({self.gap:+.4f})."
            )
        if self.closed is None:
            return (
                f"The gap between teacher and baseline ({self.gap:.4f}) is too small to judge: "
                f"it is below twice its standard error ({self.needed:.4f})."
            )
        about = f"Gap closed G = {self.closed:.3f}"
        if self.error is not None:
            about += f" ± {self.error:.3f} (standard error"
            about += ", conditional on this one teacher)" if self.conditional else ")"
        if self.needed is None:
            return (
                f"{about}. The baseline has one seed, so there is no standard error, and it cannot "
                "be said whether the gap is large enough to judge."
            )
        if self.error is None:
            return f"{about}. The distilled student has one seed, so G has no standard error."
        return f"{about} of a gap of {self.gap:.4f}."


def gap_closed(teacher: Mean, baseline: Mean, distilled: Mean) -> GapClosed:
    """G = (distilled − baseline) / (teacher − baseline) with its standard error.

    `Var(G) ≈ [σ_D² + (1 − G)²σ_B² + G²σ_T²] / (teacher − baseline)²`, first-order propagation for
    independent means. Each σ is the standard error of a mean, not the spread s of single runs: G is
    made of means, so its error falls with the number of seeds. (With s instead, the formula would
    predict how far G of one further seed may lie.) A teacher of one run enters with σ_T = 0: the
    error then holds for this teacher, not for teachers trained like it.

    Args:
        teacher: one run (`error` None), or several.
        baseline: the student trained alone.
        distilled: the student trained with the teacher.
    """
    gap = teacher.value - baseline.value
    spread = teacher.error or 0.0
    needed = None if baseline.error is None else 2 * math.hypot(spread, baseline.error)
    conditional = teacher.error is None
    if gap <= 0 or (needed is not None and gap < needed):
        return GapClosed(gap, needed, None, None, conditional)
    share = (distilled.value - baseline.value) / gap
    if distilled.error is None or baseline.error is None:
        return GapClosed(gap, needed, share, None, conditional)
    error = math.hypot(distilled.error, (1 - share) * baseline.error, share * spread) / gap
    return GapClosed(gap, needed, share, error, conditional)


def miou(confusion: npt.ArrayLike) -> Array:
    """Mean IoU of confusion counts (..., K, K) by [truth, prediction], float64 (...).

    The mean goes over the classes that occur in truth or prediction; NaN where none does.
    """
    table = np.asarray(confusion, dtype=np.float64)
    hit = np.diagonal(table, axis1=-2, axis2=-1)
    union = table.sum(axis=-1) + table.sum(axis=-2) - hit
    occurs = union > 0
    iou = np.divide(hit, union, out=np.zeros_like(union), where=occurs)
    classes = occurs.sum(axis=-1).astype(np.float64)
    nothing = np.full_like(classes, np.nan)
    return np.divide(iou.sum(axis=-1), classes, out=nothing, where=classes > 0)


@dataclass(frozen=True)
class Interval:
    """A difference and the percentile interval of its bootstrap.

    Attributes:
        estimate: the difference on all images.
        low: lower end of the interval.
        high: upper end.
        level: share of the resamples inside, such as 0.95.
        images: images that were resampled.
        resamples: how often.
    """

    estimate: float
    low: float
    high: float
    level: float
    images: int
    resamples: int


def bootstrap_difference(
    first: Array, second: Array, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval over images of the difference of two data-set mIoUs.

    Images are drawn with replacement, as many as there are, and their counts are summed before
    any ratio is taken, because the mIoU of a data set is no mean over images. Each resample takes
    the same images for all runs, so what makes an image hard for both cancels. The mIoU of a side
    is the mean over its runs; the runs themselves are not resampled.

    Args:
        first: integer counts (S, N, K, K): runs, images, [truth, prediction].
        second: the same images and classes, of any number of runs.
        resamples: at least 1.
        level: between 0 and 1.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: if the images of the runs are not the same, or no image has a valid pixel.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    sides = [np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)]
    _check_images(*sides)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"Expected at least one resample and a level between 0 and 1, got {resamples} and "
            f"{level}."
        )
    counted = sides[0][0].any(axis=(1, 2))  # an image without a valid pixel adds nothing
    sides = [side[:, counted] for side in sides]
    images, draw = int(counted.sum()), np.random.default_rng(seed)
    if not images:
        raise ValueError("Expected images with valid pixels, got none. Check the labels.")
    estimate = float(np.subtract(*(miou(side.sum(axis=1)).mean() for side in sides)))
    found = []
    step = max(1, _DRAWS // images)
    for start in range(0, resamples, step):
        rows = draw.integers(0, images, (min(step, resamples - start), images))
        weights = _occurrences(rows, images)
        found.append(np.subtract(*(_resampled(side, weights) for side in sides)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), level, images, resamples)


def _check_images(first: Array, second: Array) -> None:
    shapes = first.shape, second.shape
    if first.ndim != 4 or second.ndim != 4 or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"Expected counts (runs, images, classes, classes) of the same images, got shapes "
            f"{shapes[0]} and {shapes[1]}. Measure all runs on the same images."
        )
    truth = np.concatenate([first, second]).sum(axis=-1)
    if not (truth == truth[:1]).all():
        raise ValueError(
            "Expected runs measured on the same images in the same order, got other pixels a class "
            "in the labels. Measure all runs on the same data."
        )


def _occurrences(rows: Array, images: int) -> Array:
    """How often each image was drawn, float64 (R, N), of drawn indices (R, N)."""
    offsets = images * np.arange(len(rows))[:, None]
    flat = np.bincount((rows + offsets).ravel(), minlength=len(rows) * images)
    return flat.reshape(len(rows), images).astype(np.float64)


def _resampled(side: Array, weights: Array) -> Array:
    """Data-set mIoU of each resample (R,), the mean over the runs of a side (S, N, K, K)."""
    classes = side.shape[-1]
    sums = [weights @ run.reshape(len(run), -1) for run in side]
    return np.mean([miou(s.reshape(-1, classes, classes)) for s in sums], axis=0)
