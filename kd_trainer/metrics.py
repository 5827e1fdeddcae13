"""Segmentation metrics: integer counts per image on the device first, ratios on the host last.

Counts add up over images, batches and processes, so a figure does not depend on how the set was
split. Boundary IoU: Cheng et al. 2021, arXiv 2103.16562.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Share of the image's diagonal that counts as boundary: the paper's choice, and COCO's.
BOUNDARY_SHARE = 0.02


def image_counts(
    prediction: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    ignore_index: int = 255,
    boundary: bool = True,
) -> Tensor:
    """Confusion and boundary counts of each image, on the device, without a host sync.

    Args:
        prediction: integer (B, H, W), class ids; anything where labels are ignored.
        labels: integer (B, H, W), class ids or `ignore_index`. Unknown ids, on either side, fail
            in an index operation.
        num_labels: number of classes K, background included.
        ignore_index: label of the pixels that do not count.
        boundary: False leaves the boundary counts at zero, for tables that do not need them.

    Returns:
        int64 (B, K·K + 2·K): pixels by [truth, prediction] row by row, then per class the
        intersection and then per class the union of the two boundaries.

    Raises:
        ValueError: if the shapes differ or are not (B, H, W), or num_labels is below 2.
    """
    if labels.ndim != 3 or prediction.shape != labels.shape:
        raise ValueError(
            f"Expected prediction and labels of one shape (B, H, W), got "
            f"{tuple(prediction.shape)} and {tuple(labels.shape)}. "
            "Resize the prediction to the labels and take its classes first."
        )
    if num_labels < 2:
        raise ValueError(f"Expected num_labels >= 2, got {num_labels}. Count the background too.")
    prediction, labels = prediction.long(), labels.long()
    valid = labels != ignore_index
    confusion = _confusion(prediction, labels, valid, num_labels)
    if not boundary:
        return torch.cat([confusion, confusion.new_zeros(len(labels), 2 * num_labels)], dim=1)
    classes = torch.arange(num_labels, device=labels.device).view(1, -1, 1, 1)
    # Ignored pixels lie outside every class on both sides: their rim is then the same boundary
    # in truth and prediction, and what was predicted inside them has no influence.
    inside = valid.unsqueeze(1)
    truth = _boundary((labels.unsqueeze(1) == classes) & inside)
    guess = _boundary((prediction.unsqueeze(1) == classes) & inside)
    both = (truth & guess).flatten(2).sum(dim=2)
    either = (truth | guess).flatten(2).sum(dim=2)
    return torch.cat([confusion, both, either], dim=1)


def _confusion(prediction: Tensor, labels: Tensor, valid: Tensor, num_labels: int) -> Tensor:
    """int64 (B, K·K); scattered, because `bincount` reads its result's size on the host."""
    pairs = num_labels * num_labels
    # Slot 0 takes the ignored pixels. An unknown class id is sent off the table, where it fails on
    # every device; it would otherwise count in a neighbour's cell.
    known = (labels >= 0) & (labels < num_labels) & (prediction >= 0) & (prediction < num_labels)
    slot = torch.where(known, 1 + labels * num_labels + prediction, pairs + 1)
    slot = torch.where(valid, slot, 0).flatten(1)
    counts = slot.new_zeros(len(labels), pairs + 1)
    return counts.scatter_add_(1, slot, torch.ones_like(slot))[:, 1:]


def boundary_width(height: int, width: int) -> int:
    """Depth in pixels of the band that counts as boundary in an image of this size."""
    return max(1, round(BOUNDARY_SHARE * math.hypot(height, width)))


def _boundary(mask: Tensor) -> Tensor:
    """Pixels of bool masks (..., H, W) that lie within the boundary width of their outside.

    The mask minus its erosion by a square; beyond the image's border everything is outside.
    """
    depth = boundary_width(mask.shape[-2], mask.shape[-1])
    padded = torch.nn.functional.pad(mask, (depth, depth, depth, depth), value=False)
    return mask & ~_all_in_window(_all_in_window(padded, 2 * depth + 1, -1), 2 * depth + 1, -2)


def _all_in_window(mask: Tensor, width: int, dim: int) -> Tensor:
    """True where `width` neighbours along `dim` are all True; the result is width − 1 shorter.

    A minimum pooling by doubling the window: six passes of AND for the 37 pixels of a 640x640
    image, where a pooling kernel compares 37 numbers.
    """
    size = 1
    while size < width:
        step = min(size, width - size)
        rest = mask.shape[dim] - step
        mask = mask.narrow(dim, 0, rest) & mask.narrow(dim, step, rest)
        size += step
    return mask


@dataclass(frozen=True, eq=False)
class SegmentationCounts:
    """Totals over a set of images; adding gives new totals.

    Attributes:
        confusion: int64 (K, K), pixels by [truth, prediction].
        boundary: int64 (2, K), intersection and union of the boundaries.
        image_iou_sum: sum over images of each image's mean IoU.
        images: those with at least one valid pixel.
    """

    confusion: Array
    boundary: Array
    image_iou_sum: float
    images: int

    @classmethod
    def zero(cls, num_labels: int) -> SegmentationCounts:
        """Totals of an empty set."""
        shape = (num_labels, num_labels)
        return cls(np.zeros(shape, np.int64), np.zeros((2, num_labels), np.int64), 0.0, 0)

    @property
    def num_labels(self) -> int:
        """Number of classes, background included."""
        return len(self.confusion)

    def add(self, rows: npt.ArrayLike) -> SegmentationCounts:
        """Totals with the images of `rows`, as `image_counts` gives them: integers (N, C).

        Raises:
            ValueError: if the rows are not of this number of classes.
            TypeError: if they are not integers.
        """
        table, classes = np.asarray(rows), self.num_labels
        if table.ndim != 2 or table.shape[1] != classes * (classes + 2):
            raise ValueError(
                f"Expected rows of {classes * (classes + 2)} counts for {classes} classes, got "
                f"shape {table.shape}. Count with the same num_labels."
            )
        if not np.issubdtype(table.dtype, np.integer):
            raise TypeError(f"Expected integer counts, got {table.dtype}. Do not average them.")
        table = table.astype(np.int64)
        confusion = table[:, : classes * classes].reshape(-1, classes, classes)
        counted = confusion[confusion.any(axis=(1, 2))]
        return SegmentationCounts(
            self.confusion + confusion.sum(axis=0),
            self.boundary + table[:, classes * classes :].sum(axis=0).reshape(2, classes),
            self.image_iou_sum + float(np.nanmean(_iou(counted), axis=1).sum()),
            self.images + len(counted),
        )

    def __add__(self, other: SegmentationCounts) -> SegmentationCounts:
        if other.num_labels != self.num_labels:
            raise ValueError(
                f"Expected totals of {self.num_labels} classes, got {other.num_labels}. "
                "Count both sets with the same num_labels."
            )
        return SegmentationCounts(
            self.confusion + other.confusion,
            self.boundary + other.boundary,
            self.image_iou_sum + other.image_iou_sum,
            self.images + other.images,
        )

    def metrics(self, id2label: Mapping[int, str]) -> dict[str, float]:
        """Ratios of the totals, all in 0..1; NaN where there was nothing to measure.

        "Foreground" is every class but 0. Means go over the classes that occur in truth or
        prediction; among those, a precision or recall without a pixel to divide by is 0.

        Args:
            id2label: name of every class id.

        Returns:
            miou, dice, iou_foreground, precision, recall, boundary_iou (foreground, the first
            over all classes), pixel_accuracy, mean_image_iou (mean over images of the mean over
            the classes in each), and iou_<name>, dice_<name> for every class.

        Raises:
            ValueError: if a class has no name, or two figures would have the same.
        """
        check_class_names([id2label.get(index) for index in range(self.num_labels)])
        hit, truth, guess = _hits(self.confusion)
        occurs = truth + guess > 0
        iou, dice = _iou(self.confusion), _ratio(2 * hit, truth + guess)
        values = {
            "miou": _mean(iou),
            "dice": _mean(dice[1:]),
            "iou_foreground": _mean(iou[1:]),
            "precision": _mean(np.where(occurs, hit / np.maximum(guess, 1), np.nan)[1:]),
            "recall": _mean(np.where(occurs, hit / np.maximum(truth, 1), np.nan)[1:]),
            "pixel_accuracy": agreement(self),
            "mean_image_iou": self.image_iou_sum / self.images if self.images else math.nan,
            "boundary_iou": _mean(_ratio(self.boundary[0], self.boundary[1])[1:]),
        }
        for index in range(self.num_labels):
            values[f"iou_{id2label[index]}"] = float(iou[index])
            values[f"dice_{id2label[index]}"] = float(dice[index])
        return values


def plane_counts(
    prediction: Tensor, labels: Tensor, *, ignore_index: int = 255, boundary: bool = True
) -> Tensor:
    """Counts of each image with several labels a pixel, as those of K binary tasks.

    Args:
        prediction: bool (B, K, H, W).
        labels: integer (B, K, H, W), 0, 1 or `ignore_index`.
        ignore_index: label of what does not count.
        boundary: as for `image_counts`.

    Returns:
        int64 (B, K·8): the row of `image_counts` for each class in turn.
    """
    maps = prediction.flatten(0, 1), labels.flatten(0, 1)
    counts = image_counts(*maps, 2, ignore_index=ignore_index, boundary=boundary)
    return counts.view(len(prediction), -1)


def multi_label_metrics(rows: npt.ArrayLike, id2label: Mapping[int, str]) -> dict[str, float]:
    """Ratios of the counts of a data set with several labels a pixel.

    There is no background: all means go over the classes that occur in truth or prediction, and
    the IoU of a class is that of its foreground.

    Args:
        rows: of `plane_counts`, integers (N, K·8).
        id2label: name of every class id.

    Returns:
        What `SegmentationCounts.metrics` names; `iou_foreground` is `miou`, and `pixel_accuracy`
        the mean of the classes' own.
    """
    check_class_names([id2label.get(index) for index in range(len(id2label))])
    table = np.asarray(rows).reshape(-1, len(id2label), 8)
    classes = [
        SegmentationCounts.zero(2).add(table[:, index]).metrics({0: "background", 1: "foreground"})
        for index in range(len(id2label))
    ]
    names = {"miou": "iou_foreground"} | {
        name: name for name in ("dice", "iou_foreground", "precision", "recall", "pixel_accuracy")
    }
    values = {name: _mean(np.array([one[of] for one in classes])) for name, of in names.items()}
    ious = _iou(table[..., :4].reshape(*table.shape[:2], 2, 2))[..., 1]
    values["mean_image_iou"] = _mean(np.array([_mean(image) for image in ious]))
    values["boundary_iou"] = _mean(np.array([one["boundary_iou"] for one in classes]))
    for index, one in enumerate(classes):
        values[f"iou_{id2label[index]}"] = one["iou_foreground"]
        values[f"dice_{id2label[index]}"] = one["dice"]
    return values


def confusion_of(
    rows: npt.ArrayLike, num_labels: int, *, multi_label: bool = False
) -> npt.NDArray[np.int64]:
    """Pixels of a data set by [truth, prediction] from its rows of counts.

    Args:
        rows: of `image_counts`, or with `multi_label` of `plane_counts`.
        num_labels: K.
        multi_label: whether a pixel may have several of the labels.

    Returns:
        (K, K), or with `multi_label` (K, 2, 2).
    """
    if multi_label:
        tables = np.asarray(rows).reshape(-1, num_labels, 8).sum(axis=0)
        return np.asarray(tables[:, :4].reshape(num_labels, 2, 2), np.int64)
    return SegmentationCounts.zero(num_labels).add(rows).confusion


def check_class_names(names: Sequence[str | None]) -> None:
    """Refuse names under which two figures would be one.

    Raises:
        ValueError: if a class has no name, or two have the same; or if one of several is called
            `foreground`, as the mean over them is.
    """
    # A binary task's only foreground class may be called so: it is the same figure.
    taken = {"foreground"} if len(names) > 2 else set()
    if None in names or len(set(names)) < len(names) or taken & set(names):
        but = ", none of them `foreground`, which is a figure of its own" if taken else ""
        raise ValueError(
            f"Expected one distinct name for each of {len(names)} classes{but}, got "
            f"{', '.join(map(str, names))}. Give each its own (--class_names, or id2label)."
        )


def agreement(counts: SegmentationCounts) -> float:
    """Share of the valid pixels with equal class; NaN without any.

    For student against teacher, count the student's classes against the teacher's, the latter set
    to `ignore_index` where the labels do not count.
    """
    pixels = int(counts.confusion.sum())
    return int(np.trace(counts.confusion)) / pixels if pixels else math.nan


def _hits(confusion: Array) -> tuple[Array, Array, Array]:
    """Correct, true and predicted pixels of each class, float64 (..., K), of (..., K, K)."""
    table = confusion.astype(np.float64)
    return np.diagonal(table, axis1=-2, axis2=-1), table.sum(axis=-1), table.sum(axis=-2)


def _iou(confusion: Array) -> Array:
    """IoU of each class (..., K), NaN where it occurs neither in truth nor in prediction."""
    hit, truth, guess = _hits(confusion)
    return _ratio(hit, truth + guess - hit)


def _ratio(part: Array, whole: Array) -> Array:
    """The quotient, NaN where whole is 0."""
    out = np.full(np.shape(whole), np.nan)
    return np.divide(part, whole, out=out, where=whole > 0)


def _mean(values: Array) -> float:
    """Mean of the values that are not NaN; NaN if there are none (numpy would warn)."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


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
    return _mean_iou(hit, table.sum(axis=-1) + table.sum(axis=-2) - hit)


def planes_miou(tables: npt.ArrayLike) -> Array:
    """Mean IoU of several labels a pixel, of their tables (..., K, 2, 2); otherwise as `miou`."""
    table = np.asarray(tables, dtype=np.float64)
    hit = table[..., 1, 1]
    return _mean_iou(hit, table[..., 1, :].sum(axis=-1) + table[..., :, 1].sum(axis=-1) - hit)


def _mean_iou(hit: Array, union: Array) -> Array:
    """Mean over the classes (..., K) that occur."""
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
        first: integer counts (S, N, K, K): runs, images, [truth, prediction]; of several labels a
            pixel (S, N, K, 2, 2).
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
    counted = sides[0][0].any(
        axis=tuple(range(1, first.ndim - 1))
    )  # an image without a valid pixel adds nothing
    sides = [side[:, counted] for side in sides]
    images, draw = int(counted.sum()), np.random.default_rng(seed)
    if not images:
        raise ValueError("Expected images with valid pixels, got none. Check the labels.")
    figure = miou if first.ndim == 4 else planes_miou
    estimate = float(np.subtract(*(figure(side.sum(axis=1)).mean() for side in sides)))
    found = []
    step = max(1, _DRAWS // images)
    for start in range(0, resamples, step):
        rows = draw.integers(0, images, (min(step, resamples - start), images))
        weights = _occurrences(rows, images)
        found.append(np.subtract(*(_resampled(side, weights, figure) for side in sides)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), level, images, resamples)


def _check_images(first: Array, second: Array) -> None:
    shapes = first.shape, second.shape
    if first.ndim not in (4, 5) or first.ndim != second.ndim or shapes[0][1:] != shapes[1][1:]:
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


def _resampled(side: Array, weights: Array, figure: Callable[[Array], Array]) -> Array:
    """Data-set mIoU of each resample (R,), the mean over the runs of a side (S, N, ...)."""
    sums = [weights @ run.reshape(len(run), -1) for run in side]
    return np.mean([figure(s.reshape(-1, *side.shape[2:])) for s in sums], axis=0)
