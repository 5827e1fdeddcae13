"""From logits to figures: one row of counts an image, summed over the data set, ratios last.

The rows are what processes exchange, so the figures depend neither on their number nor on the
batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd_trainer.fields import closest
from kd_trainer.losses import (
    TERMS,
    LossWeights,
    class_ids,
    distillation_terms,
    weighted_sum,
)
from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher

NAMES = tuple(term.name for term in TERMS)


Measured = SmpForSemanticSegmentation | Teacher
"""What can be evaluated: a student, or any other network behind the interface of a teacher."""


def labels_of(model: Measured) -> dict[int, str]:
    """Name of each class of a model, background first."""
    names = model.id2label if isinstance(model, Teacher) else model.config.id2label
    return {int(index): str(name) for index, name in (names or {}).items()}


def input_statistics(model: Measured) -> tuple[list[float], list[float]]:
    """Mean and std with which pictures are given to a model, of values 0..1."""
    if isinstance(model, Teacher):
        return model.input_mean, model.input_std
    return list(model.config.image_mean), list(model.config.image_std)


Statistics = tuple[Tensor, Tensor]


def pixel_statistics(model: Measured, device: torch.device | str) -> Statistics:
    """Mean and std of a model's input for values 0..255, each (1, 3, 1, 1)."""
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
        for values in input_statistics(model)
    )
    return mean, std


def raw_logits(model: Measured, pixels: Tensor) -> Tensor:
    """Raw logits (B, K, H, W) for pictures (B, 3, H, W) that are normalised for the model."""
    output = model(pixels)
    logits: Tensor = output if isinstance(model, Teacher) else output["raw_logits"]
    return logits


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """uint8 (B, 3, H, W) as the floats a model expects, channels last."""
    mean, std = statistics
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def bytes_of(pixels: Tensor, statistics: Statistics) -> Tensor:
    """The uint8 pictures (B, 3, H, W) that `normalise` made floats of; bytes stay as they are."""
    if pixels.dtype == torch.uint8:
        return pixels
    mean, std = (value.to(pixels.device) for value in statistics)
    return (pixels.float() * std + mean).round().clamp(0, 255).byte()


def classes_of(raw_logits: Tensor) -> Tensor:
    """Class of each pixel, (B, H, W) int64, from raw logits (B, K, H, W).

    One logit is foreground above 0 (a probability above one half); several take the largest.
    """
    if raw_logits.shape[1] == 1:
        return (raw_logits[:, 0] > 0).long()
    return raw_logits.argmax(dim=1)


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation needs to know beside the logits."""

    num_labels: int
    ignore_index: int
    weights: LossWeights
    pos_weight: float | None = None


def student_rows(raw_logits: Tensor, labels: Tensor, settings: EvaluationSettings) -> Tensor:
    """Counts of a prediction against the labels, int64 (B, C), one row an image."""
    return image_counts(
        classes_of(raw_logits),
        class_ids(labels),
        settings.num_labels,
        ignore_index=settings.ignore_index,
    )


def agreement_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, settings: EvaluationSettings
) -> Tensor:
    """Counts of the student's classes against the teacher's on the valid pixels, int64 (B, C)."""
    teacher_classes = classes_of(teacher)
    teacher_classes[class_ids(labels) == settings.ignore_index] = settings.ignore_index
    return image_counts(
        classes_of(student),
        teacher_classes,
        settings.num_labels,
        ignore_index=settings.ignore_index,
        boundary=False,
    )


def term_rows(
    student: Tensor, teacher: Tensor | None, labels: Tensor, settings: EvaluationSettings
) -> Tensor:
    """Loss terms of each image at temperature 1, float64 (B, T + 1): those of `TERMS`, total.

    A term that is not computed is NaN. Image by image, so that the mean over the set does not
    depend on how it was batched.
    """
    rows = torch.full((len(student), len(NAMES) + 1), torch.nan, dtype=torch.float64)
    rows = rows.to(student.device)
    for index in range(len(student)):
        one = slice(index, index + 1)
        terms = distillation_terms(
            student[one],
            None if teacher is None else teacher[one],
            labels[one],
            temperature=1.0,
            ignore_index=settings.ignore_index,
            weights=settings.weights,
            pos_weight=settings.pos_weight,
        )
        for name, value in terms.named().items():
            rows[index, NAMES.index(name)] = value
        rows[index, -1] = weighted_sum(terms, settings.weights)
    return rows


def evaluation_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    settings: EvaluationSettings,
    *,
    teacher_figures: bool,
) -> tuple[Tensor, ...]:
    """Everything an evaluation needs of one batch, one row an image.

    Args:
        student: raw logits (B, K, H, W).
        teacher: the same, or None.
        labels: class ids (B, H, W).
        settings: classes, weights and the ignored label.
        teacher_figures: also count the teacher against the labels.

    Returns:
        Counts of the student, terms, and with a teacher the agreement and (if asked for) its own
        counts.
    """
    rows = [student_rows(student, labels, settings), term_rows(student, teacher, labels, settings)]
    if teacher is not None:
        rows.append(agreement_rows(student, teacher, labels, settings))
        if teacher_figures:
            rows.append(student_rows(teacher, labels, settings))
    return tuple(rows)


def figures_of(rows: np.ndarray, id2label: dict[int, str]) -> dict[str, float]:
    """Metrics of a data set from its rows of counts (N, C)."""
    return SegmentationCounts.zero(len(id2label)).add(rows).metrics(id2label)


def figure_names(id2label: dict[int, str], weights: LossWeights, *, teacher: bool) -> list[str]:
    """Names of the figures that each evaluation of a training gives."""
    factors = weights.effective()
    terms = [term.evaluated_as for term in TERMS if factors[term.name] > 0]
    return [
        *SegmentationCounts.zero(len(id2label)).metrics(id2label),
        *terms,
        "loss",
        *(("agreement", "agreement_miou") if teacher else ()),
    ]


def check_best_metric(metric: str | None, known: list[str]) -> None:
    """Refuse a figure that no evaluation will have, before hours are spent.

    Raises:
        ValueError: names the nearest.
    """
    metric = metric or "loss"  # what the Trainer takes
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"Expected --metric_for_best_model to be a figure of the evaluation, got {metric!r}."
            f"{closest(metric, known)} There are {', '.join(known)}."
        )


def agreement_of(rows: np.ndarray, id2label: dict[int, str]) -> dict[str, float]:
    """Share of valid pixels on which student and teacher agree, and their mutual mIoU."""
    figures = figures_of(rows, id2label)
    return {"agreement": figures["pixel_accuracy"], "agreement_miou": figures["miou"]}


def terms_of(rows: np.ndarray, counts: np.ndarray, weights: LossWeights) -> dict[str, float]:
    """Mean of each computed term over the images, and `loss`, their weighted sum.

    An image without a pixel that counts is left out, if there are others: one that a process was
    given to fill up its last batch must change nothing. The Dice term is called `dice_loss`,
    because `dice` is a metric.

    Args:
        rows: of `term_rows`, float64 (N, T + 1).
        counts: of `student_rows`, int64 (N, C).
        weights: those of the loss; a term of weight 0 was not computed.

    Raises:
        FloatingPointError: if a term is not finite; names it.
    """
    factors = weights.effective()
    counted = counts.any(axis=1)
    rows = rows[counted] if counted.any() else rows
    means = dict(zip((*NAMES, "loss"), rows.mean(axis=0).tolist(), strict=True))
    means = {name: value for name, value in means.items() if factors.get(name, 1.0) > 0}
    for name, value in means.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"Expected finite loss terms in the evaluation, got {name} = {value}. Look for "
                "weights that are not finite, or for extreme logits of the teacher or student."
            )
    names = {term.name: term.evaluated_as for term in TERMS}
    return {names.get(name, name): value for name, value in means.items()}
