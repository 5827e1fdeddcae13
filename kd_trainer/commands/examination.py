"""One pass over an evaluation set for a report, and a second look at the few images it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from kd_trainer.data import StreamedDataset, TransformedDataset, collate
from kd_trainer.evaluation import (
    EvaluationSettings,
    agreement_rows,
    classes_of,
    figures_of,
    input_statistics,
    labels_of,
    normalise,
    pixel_statistics,
    student_rows,
)
from kd_trainer.losses import LossWeights
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.reports.calibration import Reliability, reliability_counts
from kd_trainer.reports.contents import DIFFERENCE, STUDENT, TEACHER, ShownImage
from kd_trainer.reports.panels import Picture, difference_map, error_map, overlay
from kd_trainer.teacher import Teacher

EvaluationData = TransformedDataset | StreamedDataset
AGREEMENT = "agreement"
GROUPS = ("best", "median", "worst")


@dataclass
class Networks:
    """Student and teacher, ready to be asked on one device, in fp32."""

    student: SmpForSemanticSegmentation
    teacher: Teacher | None
    ignore_index: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        network: nn.Module = self.student
        network.to(self.device).eval().to(memory_format=torch.channels_last)
        if self.teacher is not None:
            self.teacher.expect_input(*input_statistics(self.student)).to(self.device)
        self.statistics = pixel_statistics(self.student, self.device)
        self.labels = labels_of(self.student)
        # Only counts are asked for: the weights of the losses play no part.
        weights = LossWeights()
        self.settings = EvaluationSettings(len(self.labels), self.ignore_index, weights)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Raw logits (B, K, H, W) of each network for uint8 pictures (B, 3, H, W)."""
        inputs = normalise(pixels.to(self.device), self.statistics)
        found = {STUDENT: self.student(pixel_values=inputs)["raw_logits"]}
        return found if self.teacher is None else found | {TEACHER: self.teacher(inputs)}


@dataclass
class Examination:
    """What one pass leaves: a row of counts an image, and pixels by confidence.

    Attributes:
        rows: int64 (N, C) of `student`, and with a teacher of `teacher` and `agreement`.
        reliability: of `student`, and of `teacher` if there is one.
    """

    rows: dict[str, np.ndarray]
    reliability: dict[str, Reliability] = field(default_factory=dict)

    def image_ious(self, labels: dict[int, str]) -> dict[str, np.ndarray]:
        """Mean IoU of each network on each single image (N,); NaN where nothing counts."""
        return {
            who: np.array([figures_of(row[None], labels)["miou"] for row in rows])
            for who, rows in self.rows.items()
            if who != AGREEMENT
        }


def examine(
    networks: Networks, dataset: EvaluationData, *, batch_size: int, workers: int = 0
) -> Examination:
    """Count everything a report needs, batch by batch; no picture and no logit is kept."""
    rows: dict[str, list[np.ndarray]] = {}
    reliability: dict[str, Reliability] = {}
    settings = networks.settings
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    for batch in tqdm(loader, desc="report", unit="batch", disable=None):
        labels = batch["labels"].to(networks.device)
        logits = networks.logits(batch["pixel_values"])
        counted = {who: student_rows(raw, labels, settings) for who, raw in logits.items()}
        if TEACHER in logits:
            pair = logits[STUDENT], logits[TEACHER]
            counted[AGREEMENT] = agreement_rows(*pair, labels, settings)
        for who, counts in counted.items():
            rows.setdefault(who, []).append(counts.cpu().numpy())
        for who, raw in logits.items():
            bins = reliability_counts(raw, labels, ignore_index=networks.ignore_index)
            reliability[who] = reliability.get(who, Reliability.zero()).add(bins)
    if not rows:
        raise ValueError(
            "Expected at least one evaluation image, got none. Name a split that has some with "
            "--eval_split."
        )
    return Examination({who: np.concatenate(parts) for who, parts in rows.items()}, reliability)


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
    networks: Networks,
    dataset: EvaluationData,
    chosen: Sequence[tuple[str, int]],
    ious: dict[str, np.ndarray],
) -> list[ShownImage]:
    """The chosen images with what each network found on them."""
    cells = {
        index: _cells(networks, sample)
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


def _cells(networks: Networks, sample: dict[str, Tensor]) -> dict[str, Picture]:
    image = sample["pixel_values"].permute(1, 2, 0).numpy()
    truth = sample["labels"].numpy()
    logits = {w: raw.cpu() for w, raw in networks.logits(sample["pixel_values"][None]).items()}
    found: dict[str, Any] = {w: classes_of(raw)[0].numpy() for w, raw in logits.items()}
    masks = {"truth": truth} | {w: found[w] for w in (TEACHER, STUDENT) if w in found}
    count, ignored = networks.settings.num_labels, networks.ignore_index
    cells = {"image": image}
    cells |= {name: overlay(image, mask, num_labels=count) for name, mask in masks.items()}
    cells["errors of the student"] = error_map(image, truth, found[STUDENT], ignore_index=ignored)
    if TEACHER in logits:
        difference = probability_difference(logits[STUDENT], logits[TEACHER])[0].numpy()
        cells[DIFFERENCE] = difference_map(image, difference)
    return cells


def probability_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """How far two networks are apart on each pixel, float32 (B, H, W).

    Args:
        student: raw logits (B, K, H, W).
        teacher: likewise.

    Returns:
        For one logit the student's probability of the foreground minus the teacher's, -1..1; else
        the total variation distance of the two distributions, 0..1.
    """
    if student.shape[1] == 1:
        return (student.float().sigmoid() - teacher.float().sigmoid())[:, 0]
    gap = student.float().softmax(dim=1) - teacher.float().softmax(dim=1)
    return gap.abs().sum(dim=1) / 2
