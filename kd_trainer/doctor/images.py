"""What a preflight looks at: some masks, some images, and what the networks find in them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import datasets
import torch
from torch import Tensor, nn

from kd_trainer.data import (
    SegmentationTransform,
    StreamedDataset,
    TransformedDataset,
    sample_rows,
)
from kd_trainer.data.dataset import resize_labels
from kd_trainer.data.images import decode_mask, image_name
from kd_trainer.doctor.data import MaskFacts, Shared, find_shared, marks, mask_facts
from kd_trainer.doctor.teacher import OutputRange, Rows, rows_of
from kd_trainer.evaluation import classes_of, normalise, raw_logits
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher

DataSet = TransformedDataset | StreamedDataset
Item = TypeVar("Item")

MASKS = 200
_UNREADABLE = MaskFacts(0.0, 0.0, 0.0, frozenset())
GRADIENT_IMAGES = 2  # of one backward pass: BatchNorm needs two where it pools to one pixel


def within(seconds: float, items: Iterable[Item], *, least: int = 1) -> Iterator[Item]:
    """Items until time is up, but at least the first few."""
    end = time.monotonic() + seconds
    for number, item in enumerate(items):
        if number >= least and time.monotonic() > end:
            return
        yield item


@dataclass
class SplitMasks:
    """Facts of the masks of one split.

    Attributes:
        facts: one for each mask looked at, in the order of `sample_rows`.
        complete: whether these are all of the split.
        lost: how many mark something in their own size and nothing at the size of the training.
    """

    facts: list[MaskFacts]
    complete: bool
    lost: int = 0


def split_masks(dataset: DataSet, seconds: float, *, skip_bad: bool = False) -> SplitMasks:
    """Look at up to `MASKS` masks, at the size of the training.

    With `skip_bad` one that cannot be read counts as one without valid pixels: a stream still has
    the rows that its reader will leave out.
    """
    rule, facts, lost = dataset.transform.rule, list[MaskFacts](), 0
    rows = dataset.dataset
    rows = rows.select_columns("mask") if isinstance(rows, datasets.Dataset) else rows
    timed_out = True
    for number, row in enumerate(within(seconds, _and_end(sample_rows(rows, MASKS)))):
        if row is None:
            timed_out = False
            break
        cell = row["mask"]
        try:
            labels = rule.labels(decode_mask(cell, number), image_name(cell, number))
        except (ValueError, OSError):
            if not skip_bad:
                raise
            facts.append(_UNREADABLE)
        else:
            small = resize_labels(labels, dataset.transform.image_size)
            facts.append(mask_facts(small, rule.ignore_index))
            lost += marks(labels, rule.ignore_index) and not marks(small, rule.ignore_index)
    return SplitMasks(facts, not timed_out and len(facts) < MASKS, lost)


def _and_end(rows: Iterable[Any]) -> Iterator[Any | None]:
    yield from rows
    yield None


def choose(
    dataset: DataSet, masks: SplitMasks, most: int, *, skip_bad: bool = False
) -> list[dict[str, Tensor]]:
    """Up to `most` samples without augmentation, evenly spread over masks that mark something."""
    numbers = [i for i, f in enumerate(masks.facts) if f.classes - {0}]
    numbers = numbers or [i for i, f in enumerate(masks.facts) if f.valid]
    count = min(most, len(numbers))
    chosen = {numbers[len(numbers) * i // count] for i in range(count)}
    given = dataset.transform
    plain = SegmentationTransform(
        given.image_size,
        given.rule,
        augmentation="none",
        seed=0,
        brightness_contrast_probability=0.0,
    )
    last = max(chosen, default=-1)
    rows = islice(enumerate(sample_rows(dataset.dataset, MASKS)), last + 1)
    samples = []
    for number, row in rows:
        with suppress(*((ValueError, OSError) if skip_bad else ())):
            samples += [plain(row, epoch=0, index=number)] if number in chosen else []
    return samples


@dataclass
class Seen:
    """Images that were looked at, and what the networks find in them.

    Attributes:
        num_labels: classes.
        ignore_index: label that counts nowhere.
        samples: as the data gives them.
        teacher: classes the teacher finds, int64 (S, S) each; empty without one.
        student: likewise of a saved student; empty for a new one.
        logits: of the teacher for the first `GRADIENT_IMAGES`, (1, K, S, S) each.
        output: what the teacher's own output holds.
        seconds: that the networks took for an image.
    """

    num_labels: int
    ignore_index: int
    samples: list[dict[str, Tensor]] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)
    student: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    output: OutputRange = field(default_factory=OutputRange)
    seconds: float = 0.0

    def labels(self, images: int | None = None) -> Tensor:
        """Labels of the first images, int64 (N, S, S)."""
        return torch.stack([sample["labels"].long() for sample in self.samples[:images]])

    def rows(self, classes: list[Tensor]) -> Rows:
        """Counts of classes that were found in the first images against their labels."""
        labels = self.labels(len(classes))
        return rows_of(torch.stack(classes), labels, self.num_labels, self.ignore_index)


@torch.no_grad()
def look(
    seen: Seen,
    samples: list[dict[str, Tensor]],
    teacher: Teacher | None,
    student: SmpForSemanticSegmentation | None,
    *,
    statistics: tuple[Tensor, Tensor],
    seconds: float,
) -> None:
    """Ask the networks for their classes, image by image, until time is up.

    Args:
        seen: takes them.
        samples: to look at, the first ones first.
        teacher: on the device of the statistics; None without one.
        student: likewise, in eval mode; None if it knows nothing yet.
        statistics: mean and std of the input.
        seconds: that this may take; two images are looked at in any case.
    """
    device, start = statistics[0].device, time.monotonic()
    for sample in within(seconds, samples, least=GRADIENT_IMAGES):
        pixels = normalise(sample["pixel_values"][None].to(device), statistics)
        seen.samples.append(sample)
        if teacher is not None:
            logits, seen.output = _watched(teacher, pixels, seen.output)
            seen.teacher.append(classes_of(logits)[0].cpu())
            if len(seen.logits) < GRADIENT_IMAGES:
                seen.logits.append(logits)
        if student is not None:
            seen.student.append(classes_of(raw_logits(student, pixels))[0].cpu())
    seen.seconds = (time.monotonic() - start) / max(len(seen.samples), 1)


def _watched(teacher: Teacher, pixels: Tensor, before: OutputRange) -> tuple[Tensor, OutputRange]:
    """The teacher's logits, and the range of what its network gave before they were made of it."""
    found = [before]

    def note_range(_: nn.Module, __: Any, output: Any) -> None:
        raw = output if isinstance(output, Tensor) else getattr(output, "raw_logits", None)
        found.append(found[-1].add(output.logits if raw is None else raw))

    handle = teacher.network.register_forward_hook(note_range)
    try:
        return teacher(pixels), found[-1]
    finally:
        handle.remove()


def shared_images(training: DataSet, evaluation: DataSet, seconds: float) -> Shared | None:
    """Images that both splits hold, as far as time allows; None for streams and remote files."""
    rows, own = training.dataset, evaluation.dataset
    if not (isinstance(rows, datasets.Dataset) and isinstance(own, datasets.Dataset)):
        return None
    if any("://" in (split[0]["image"].get("path") or "") for split in (rows, own)):
        return None
    end = time.monotonic() + seconds
    own = own.select_columns("image")
    return find_shared(
        (row["image"] for row in rows.select_columns("image")),
        (row["image"] for row in own),
        lambda number: own[number]["image"],
        lambda: time.monotonic() < end,
    )
