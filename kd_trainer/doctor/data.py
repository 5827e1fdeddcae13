"""The data: which masks mark something, which images are checked or are in both splits."""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
from torch import Tensor

from kd_trainer.data import (
    SegmentationTransform,
    StreamedDataset,
    TransformedDataset,
    sample_rows,
)
from kd_trainer.data.channels import channels_shape
from kd_trainer.data.dataset import resize_labels
from kd_trainer.data.images import image_name, image_shape
from kd_trainer.data.masks import MaskRule
from kd_trainer.doctor.finding import Finding, fault, listed, note, ok, several

Labels = npt.NDArray[np.uint8]
DataSet = TransformedDataset | StreamedDataset
Item = TypeVar("Item")

MASKS = 200  # of each split
MANY = 100  # masks without foreground from which chance is ruled out for all but the rarest objects
_MOSTLY = 0.5
_LOST = 0.1  # of the masks: small things are smaller still at the size of the training
_BORDER = 0.8


def within(seconds: float, items: Iterable[Item], *, least: int = 1) -> Iterator[Item]:
    """Items until time is up, but at least the first few."""
    end = time.monotonic() + seconds
    for count, item in enumerate(items, start=1):
        yield item
        if count >= least and time.monotonic() > end:
            return


@dataclass(frozen=True)
class MaskStatistics:
    """What one mask holds, as shares of its valid pixels; the default is an unreadable one.

    Attributes:
        valid: share of all pixels that count.
        foreground: share of classes above 0.
        border: share of foreground on the outermost pixels.
        classes: ids that occur; of planes 1 for the first.
    """

    valid: float = 0.0
    foreground: float = 0.0
    border: float = 0.0
    classes: frozenset[int] = frozenset()

    @property
    def marked(self) -> bool:
        """Whether any class above 0 occurs."""
        return bool(self.classes - {0})

    @classmethod
    def of(cls, labels: Labels, ignore_index: int) -> MaskStatistics:
        """Count a mask (H, W) of class ids and `ignore_index`, or planes (H, W, K)."""
        if labels.ndim == 3:
            return cls._of_planes(labels, ignore_index)
        valid = labels != ignore_index
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        return cls(
            float(valid.mean()),
            _foreground(labels, ignore_index),
            _foreground(edge, ignore_index),
            frozenset(np.flatnonzero(np.bincount(labels[valid])).tolist()),
        )

    @classmethod
    def _of_planes(cls, planes: Labels, ignore_index: int) -> MaskStatistics:
        occurring = 1 + np.flatnonzero((planes == 1).any(axis=(0, 1)))
        whole = cls.of(_any_label(planes, ignore_index), ignore_index)
        return replace(whole, classes=frozenset(occurring.tolist()))


def _any_label(planes: Labels, ignore_index: int) -> Labels:
    """Planes (H, W, K) as one map (H, W): 1 where any label is, ignored where none counts."""
    found = (planes == 1).any(axis=2).astype(np.uint8)
    found[(planes == ignore_index).all(axis=2)] = ignore_index
    return found


def _foreground(labels: Labels, ignore_index: int) -> float:
    valid = labels[labels != ignore_index]
    return float((valid > 0).mean()) if valid.size else 0.0


@dataclass(frozen=True)
class SplitMasks:
    """The masks of one split that were looked at.

    Attributes:
        masks: in the order of `sample_rows`, at the size of the training.
        complete: whether these are all of the split.
        lost: how many mark something in their own size and nothing at the size of the training.
    """

    masks: Sequence[MaskStatistics]
    complete: bool
    lost: int = 0


_WITHOUT_LABEL = 0.05  # of the batches


def label_finding(labelled: int, images: int, batch: int) -> Finding:
    """How many batches, drawn as they come, will hold no image with a mask.

    Args:
        labelled: training images with a mask.
        images: all training images.
        batch: images of one.
    """
    without = math.comb(images - labelled, batch) / math.comb(images, batch)
    text = (
        f"{labelled:,} of {images:,} images have a mask: about {without:.0%} of the batches of "
        f"{batch} will hold none"
    )
    if without < _WITHOUT_LABEL:
        return ok("labels", text)
    return note("labels", text, "Give each batch its share with --labelled_share 0.5, say.")


def read_masks(dataset: DataSet, seconds: float, *, skip_bad: bool = False) -> SplitMasks:
    """Look at up to `MASKS` masks, at the size of the training.

    With `skip_bad` one that cannot be read counts as one without valid pixels: a stream still has
    the rows that its reader will leave out.
    """
    transform, masks, lost = dataset.transform, [], 0
    rule = transform.rule
    source = dataset.dataset
    if isinstance(source, datasets.Dataset) and isinstance(rule, MaskRule):
        source = source.select_columns("mask")
    rows = iter(sample_rows(source, MASKS))
    for number, row in enumerate(within(seconds, rows)):
        masks.append(MaskStatistics())
        with suppress(*((ValueError, OSError) if skip_bad else ())):
            labels = _labels(transform, row, number)
            size = transform.content_size(labels.shape)
            small = MaskStatistics.of(resize_labels(labels, size), rule.ignore_index)
            masks[-1] = small
            lost += not small.marked and MaskStatistics.of(labels, rule.ignore_index).marked
    return SplitMasks(masks, next(rows, None) is None and len(masks) < MASKS, lost)


def _labels(transform: SegmentationTransform, row: Mapping[str, Any], number: int) -> Labels:
    """The labels of a row at their own size, (H, W) or planes (H, W, K)."""
    mask, rule = row["mask"], transform.rule
    if isinstance(rule, MaskRule):
        return rule.labels(rule.decode(mask, number), image_name(mask, number))
    # One grey PNG of planes does not say where they end: the image does.
    shape_of = image_shape if transform.channels is None else channels_shape
    return rule.planes(mask, number, shape_of(row["image"], number))


def choose_samples(
    dataset: DataSet, split: SplitMasks, most: int, *, skip_bad: bool = False
) -> list[dict[str, Tensor]]:
    """Up to `most` samples without augmentation, evenly spread over masks that mark something."""
    numbers = [i for i, mask in enumerate(split.masks) if mask.marked]
    numbers = numbers or [i for i, mask in enumerate(split.masks) if mask.valid]
    count = min(most, len(numbers))
    chosen = {numbers[len(numbers) * i // count] for i in range(count)}
    own = dataset.transform
    plain = SegmentationTransform(
        own.image_size,
        own.rule,
        resize="stretch" if own.resize == "stretch" else "fit",
        augmentation="none",
        seed=0,
        brightness_contrast_probability=0.0,
        channels=own.channels,
    )
    rows = islice(enumerate(sample_rows(dataset.dataset, MASKS)), max(chosen, default=-1) + 1)
    samples = []
    for number, row in rows:
        with suppress(*((ValueError, OSError) if skip_bad else ())):
            samples += [plain(row, epoch=0, index=number)] if number in chosen else []
    return samples


def mask_finding(name: str, split: SplitMasks) -> Finding:
    """Whether the masks of the split of this name mark anything at the size of the training."""
    check, count = f"masks, {name}", len(split.masks)
    grade = fault if split.complete or count >= MANY else note
    masks = several(count, "mask")
    if not any(mask.valid for mask in split.masks):
        return grade(
            check,
            f"Expected pixels that count, got only ignored ones in all of {masks}",
            "Say how the masks are read: --mask_values and --ignore_index.",
        )
    marked = sum(mask.marked for mask in split.masks)
    larger = "Raise --image_size: what is thinner than a pixel there is lost."
    if not marked and split.lost:
        return grade(
            check,
            f"Expected foreground in the masks at the size of the training, got none in any of "
            f"{masks}; {split.lost} only before they are resized to --image_size",
            larger,
        )
    if not marked:
        return grade(
            check,
            f"Expected foreground in the masks, got none in any of {masks}",
            "Check the masks, or name the values of background and foreground with --mask_values.",
        )
    share = float(np.mean([mask.foreground for mask in split.masks]))
    text = f"{marked} of {masks} mark something, {share:.0%} of the pixels"
    if split.lost:
        text += f"; {split.lost} more only before they are resized to --image_size"
    if split.lost > _LOST * count:
        return note(check, text, larger)
    if marked < _MOSTLY * count:
        return note(check, text, "Check that this is how the data is meant to be.")
    return ok(check, text)


def inverted_finding(masks: Sequence[MaskStatistics]) -> Finding:
    """Whether binary masks look inverted, judged by themselves: most of the border is foreground.

    Objects fill the inside of images more than their border. That is a habit of photographers
    and no law, so this is never a fault; against a teacher `classes_finding` knows better.
    """
    check = "foreground"
    share = float(np.mean([mask.foreground for mask in masks]))
    border = float(np.mean([mask.border for mask in masks]))
    text = f"{share:.0%} of the pixels and {border:.0%} of the border are foreground"
    if share > _MOSTLY and border > max(_BORDER, share):
        return note(
            check,
            f"the masks may be inverted: {text}",
            "Look at some. --mask_values (background first) turns them round.",
        )
    return ok(check, text)


def occurrence_finding(masks: Sequence[MaskStatistics], names: Mapping[int, str]) -> Finding:
    """Whether every class occurs in the masks that were looked at."""
    occurring = frozenset[int]().union(*(mask.classes for mask in masks))
    missing = [name for label, name in names.items() if label not in occurring]
    if missing:
        return note(
            "class ids",
            f"{', '.join(missing)} in none of {several(len(masks), 'mask')}",
            "Check the masks, --num_labels, --class_names and --mask_values; a class without "
            "pixels is neither learned nor measured.",
        )
    return ok("class ids", f"each of {len(names)} classes occurs in {several(len(masks), 'mask')}")


_MOST = 0.5  # of a split: from here the figures of an evaluation say nothing


@dataclass(frozen=True)
class SharedImages:
    """What two splits have in common.

    Attributes:
        pairs: names of (evaluation image, training image) of equal bytes.
        evaluation: evaluation images that were looked at.
        training: training images that were looked at.
        complete: whether that was all of both.
    """

    pairs: Mapping[str, str]
    evaluation: int
    training: int
    complete: bool


def shared_images(training: DataSet, evaluation: DataSet, seconds: float) -> SharedImages | None:
    """Images that both splits hold, as far as time allows; None for streams and remote files."""
    splits = training.dataset, evaluation.dataset
    if not all(isinstance(rows, datasets.Dataset) for rows in splits):
        return None
    if any("://" in (rows[0]["image"].get("path") or "") for rows in splits):
        return None
    first, second = (rows.select_columns("image") for rows in splits)
    return find_shared(first, second, seconds)


def find_shared(training: Any, evaluation: Any, seconds: float) -> SharedImages:
    """Look for evaluation images whose encoded bytes are those of a training image.

    An image that was saved anew is not found: that would mean to decode them all.

    Args:
        training: rows by number, with a cell `image` of `{bytes, path}`.
        evaluation: likewise.
        seconds: that this may take.
    """
    end = time.monotonic() + seconds
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(within(seconds, evaluation)):
        by_size[_size(row["image"])].append(number)
    hashes: dict[int, dict[bytes, int]] = {}
    pairs, searched = {}, 0
    for number, row in enumerate(within(end - time.monotonic(), training)):
        image, searched = row["image"], number + 1
        size = _size(image)
        if size not in by_size:
            continue
        if size not in hashes:
            hashes[size] = {_hash(evaluation[n]["image"]): n for n in by_size[size]}
        match = hashes[size].get(_hash(image))
        if match is not None:
            pairs[_name(evaluation[match]["image"], match)] = _name(image, number)
    indexed = sum(map(len, by_size.values()))
    complete = (indexed, searched) == (len(evaluation), len(training))
    return SharedImages(pairs, indexed, searched, complete)


def _size(image: Mapping[str, Any]) -> int:
    return len(image["bytes"]) if image.get("bytes") else Path(image["path"]).stat().st_size


def _hash(image: Mapping[str, Any]) -> bytes:
    data = image["bytes"] if image.get("bytes") else Path(image["path"]).read_bytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _name(image: Mapping[str, Any], number: int) -> str:
    path = image.get("path")
    return Path(path).name if path else f"row {number}"


def sharing_finding(shared: SharedImages) -> Finding:
    """Whether what is measured was trained on."""
    check = "shared images"
    among = (
        f"{several(shared.evaluation, 'evaluation image')} and "
        f"{several(shared.training, 'training image')}"
    )
    among += "" if shared.complete else " that were looked at"
    if not shared.pairs:
        return ok(check, f"none among {among}")
    names = [a if a == b else f"{a} = {b}" for a, b in shared.pairs.items()]
    # Where time was too short for all training images, most of those looked at are as telling.
    grade = fault if len(names) > _MOST * min(shared.evaluation, shared.training) else note
    return grade(
        check,
        f"Expected evaluation images that are not trained on, got {several(len(names), 'image')} "
        f"in both splits ({listed(names)}) among {among}",
        "Remove them from one split: figures of images that were trained on are too good.",
    )
