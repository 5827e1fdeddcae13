"""The images that a report shows: the best, the median and the worst of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.evaluation import Evaluator, masks_of, visible_images
from kd_trainer.reports.contents import DIFFERENCE, STUDENT, TEACHER, ShownImage
from kd_trainer.reports.panels import Pixels, difference_map, error_map, overlay

EvaluationData = TransformedDataset | StreamedDataset
GROUPS = ("best", "median", "worst")


def choose(ious: np.ndarray, count: int) -> list[tuple[str, int]]:
    """Images to show, as (group, number): a third each of the best, the median and the worst.

    Args:
        ious: of each image (N,); those without a figure (NaN) are never chosen.
        count: how many; one that is no multiple of three shows more of the worst, then of the
            median. A smaller set is shown whole, no image twice.
    """
    order = [int(i) for i in np.argsort(ious, kind="stable") if not np.isnan(ious[i])]
    count = min(count, len(order))
    worst, median = -(-count // 3), -(-(count - 1) // 3)
    best = count - worst - median
    inner = order[worst : len(order) - best]
    start = (len(inner) - median) // 2
    parts = (order[len(order) - best :][::-1], inner[start : start + median], order[:worst])
    return [(group, i) for group, part in zip(GROUPS, parts, strict=True) for i in part]


def shown_images(
    evaluator: Evaluator,
    dataset: EvaluationData,
    chosen: Sequence[tuple[str, int]],
    ious: dict[str, np.ndarray],
) -> list[ShownImage]:
    """The chosen images with what each network found on them."""
    cells = {
        index: _cells(evaluator, sample)
        for index, sample in samples_at(dataset, {index for _, index in chosen})
    }
    return [
        ShownImage(
            group,
            image_name(dataset, index),
            {who: float(values[index]) for who, values in ious.items()},
            cells[index],
        )
        for group, index in chosen
    ]


def samples_at(
    dataset: EvaluationData, indices: set[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The samples of these numbers; of a stream no more is read than needed."""
    if isinstance(dataset, IterableDataset):
        for index, sample in enumerate(islice(dataset, max(indices, default=-1) + 1)):
            if index in indices:
                yield index, sample
    else:
        yield from ((index, dataset[index]) for index in sorted(indices))


def image_name(dataset: EvaluationData, index: int) -> str:
    """`image 12`, and its file where that is known."""
    if isinstance(dataset, IterableDataset):
        return f"image {index}"
    path = (dataset.dataset[index]["image"] or {}).get("path")
    return f"image {index}" + (f" ({Path(path).name})" if path else "")


def _cells(evaluator: Evaluator, sample: dict[str, Tensor]) -> dict[str, Pixels]:
    image = visible_images(sample["pixel_values"][None], evaluator.student)[0]
    several = evaluator.settings.multi_label
    truth = sample["labels"].numpy()
    targets = sample.get("teacher_logits")
    found = evaluator.logits(
        sample["pixel_values"][None], None if targets is None else targets[None]
    )
    logits = {who: raw.cpu() for who, raw in found.items()}
    masks = {
        who: masks_of(logits[who], multi_label=several)[0].numpy()
        for who in (TEACHER, STUDENT)
        if who in logits
    }
    count, ignored = evaluator.settings.num_labels, evaluator.ignore_index
    cells = {"image": image, "truth": overlay(image, truth, num_labels=count)}
    cells |= {who: overlay(image, mask, num_labels=count) for who, mask in masks.items()}
    cells["errors of the student"] = error_map(image, truth, masks[STUDENT], ignore_index=ignored)
    if TEACHER in logits:
        pair = logits[STUDENT], logits[TEACHER]
        difference = probability_difference(*pair, multi_label=several)[0].numpy()
        cells[DIFFERENCE] = difference_map(image, difference)
    return cells


def probability_difference(
    student: Tensor, teacher: Tensor, *, multi_label: bool = False
) -> Tensor:
    """How far two networks are apart on each pixel, float32 (B, H, W).

    Args:
        student: raw logits (B, K, H, W).
        teacher: likewise.
        multi_label: whether a pixel may have several of the labels.

    Returns:
        For one logit the student's probability of the foreground minus the teacher's, -1..1; of
        several labels a pixel the largest distance of any label, 0..1; else the total variation
        distance of the two distributions, 0..1.
    """
    if multi_label:
        return (student.float().sigmoid() - teacher.float().sigmoid()).abs().amax(dim=1)
    if student.shape[1] == 1:
        return (student.float().sigmoid() - teacher.float().sigmoid())[:, 0]
    gap = student.float().softmax(dim=1) - teacher.float().softmax(dim=1)
    return gap.abs().sum(dim=1) / 2
