"""From logits to figures: one row of counts an image, summed over the data set, ratios last.

The rows are what processes exchange, so the figures depend neither on their number nor on the
batch size. The trainer gets them batch by batch from `evaluation_rows`; everybody else from the one
pass over a data set, `Evaluator.run`, which hands the logits of each batch to whoever counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from kd_trainer.data import collate
from kd_trainer.data.channels import visible
from kd_trainer.fields import closest
from kd_trainer.losses import (
    TERMS,
    LossWeights,
    class_ids,
    distillation_terms,
    weighted_sum,
)
from kd_trainer.metrics import (
    SegmentationCounts,
    image_counts,
    multi_label_metrics,
    plane_counts,
)
from kd_trainer.reports.contents import EMA, STUDENT, TEACHER
from kd_trainer.students import (
    channels_of,
    has_several_labels,
    labels_of_student,
    reads_own_depth,
    statistics_of,
    student_logits,
)
from kd_trainer.teacher import Teacher, state_of

NAMES = tuple(term.name for term in TERMS)
AGREEMENT = "agreement"


Measured = nn.Module
"""What can be evaluated: a student (`kd_trainer.students`), or a network behind a `Teacher`."""


def labels_of(model: Measured) -> dict[int, str]:
    """Name of each class of a model, background first."""
    if isinstance(model, Teacher):
        return {int(index): str(name) for index, name in model.id2label.items()}
    return labels_of_student(model)


def input_statistics(model: Measured) -> tuple[list[float], list[float]]:
    """Mean and std with which images are given to a model, of values 0..1."""
    if isinstance(model, Teacher):
        return model.input_mean, model.input_std
    return statistics_of(model)


Statistics = tuple[Tensor, Tensor]


def pixel_statistics(model: Measured, device: torch.device | str) -> Statistics:
    """Mean and std of a model's input for values 0..255, each (1, C, 1, 1)."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) * 255
        for values in input_statistics(model)
    )
    return mean, std


def raw_logits(model: Measured, pixels: Tensor) -> Tensor:
    """Raw logits (B, K, H, W) for images (B, 3, H, W) that are normalised for the model."""
    return student_logits(model, pixels)


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """uint8 (B, 3, H, W) as the floats a model expects, channels last; floats are normalised."""
    if pixels.is_floating_point():
        return pixels.contiguous(memory_format=torch.channels_last)
    mean, std = statistics
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def bytes_of(pixels: Tensor, statistics: Statistics) -> Tensor:
    """The uint8 images (B, 3, H, W) that `normalise` made floats of; bytes stay as they are."""
    if pixels.dtype == torch.uint8:
        return pixels
    mean, std = (value.to(pixels.device) for value in statistics)
    return (pixels.float() * std + mean).round().clamp(0, 255).byte()


def is_multi_label(model: Measured) -> bool:
    """Whether a pixel may have several of the model's labels."""
    return model.multi_label if isinstance(model, Teacher) else has_several_labels(model)


def classes_of(raw_logits: Tensor) -> Tensor:
    """Class of each pixel, (B, H, W) int64, from raw logits (B, K, H, W).

    One logit is foreground above 0 (a probability above one half); several take the largest.
    """
    if raw_logits.shape[1] == 1:
        return (raw_logits[:, 0] > 0).long()
    return raw_logits.argmax(dim=1)


def masks_of(raw_logits: Tensor, *, multi_label: bool) -> Tensor:
    """Classes (B, H, W) in raw logits; of several labels a pixel planes (B, K, H, W) of 0 and 1."""
    return (raw_logits > 0).long() if multi_label else classes_of(raw_logits)


def visible_images(pixels: Tensor, model: Measured) -> npt.NDArray[np.uint8]:
    """Images of a batch for people, RGB (B, H, W, 3): bytes as they are, others by `visible`."""
    if not isinstance(model, Teacher) and reads_own_depth(model):
        return np.stack([visible(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()])
    images = bytes_of(pixels, pixel_statistics(model, pixels.device))
    return np.asarray(images.permute(0, 2, 3, 1).cpu().numpy())


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation needs to know beside the logits.

    With `multi_label` labels are (B, K, H, W), and counts those of `plane_counts`.
    """

    num_labels: int
    ignore_index: int
    weights: LossWeights
    pos_weight: float | Sequence[float] | None = None
    multi_label: bool = False


def settings_for(
    model: nn.Module,
    ignore_index: int,
    weights: LossWeights,
    pos_weight: float | Sequence[float] | None = None,
) -> EvaluationSettings:
    """Those of a student; images to evaluate on have masks, so that no label is a pseudo label.

    Raises:
        ValueError: if a term that has a weight teaches nothing to it.
    """
    several, weights = is_multi_label(model), weights.without_pseudo()
    weights.check_channels(1 if several else channels_of(model))
    return EvaluationSettings(len(labels_of(model)), ignore_index, weights, pos_weight, several)


def student_rows(raw_logits: Tensor, labels: Tensor, settings: EvaluationSettings) -> Tensor:
    """Counts of a prediction against the labels, int64 (B, C), one row an image."""
    if settings.multi_label:
        return plane_counts(raw_logits > 0, labels, ignore_index=settings.ignore_index)
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
    if settings.multi_label:
        planes = torch.where(labels == settings.ignore_index, labels, (teacher > 0).to(labels))
        options: dict[str, Any] = {"ignore_index": settings.ignore_index, "boundary": False}
        return plane_counts(student > 0, planes, **options)
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


@dataclass(frozen=True)
class EvaluatedBatch:
    """What a pass over a data set shows of one batch.

    Attributes:
        logits: raw, fp32 (B, K, H, W), of `student`, and of `teacher` if there is one.
        labels: class ids (B, H, W), on the same device.
    """

    logits: dict[str, Tensor]
    labels: Tensor


@dataclass
class Evaluator:
    """Student and teacher, ready to be asked on one device, in fp32.

    Args:
        student: put there, in eval mode.
        teacher: likewise; None measures the student alone.
        ignore_index: label of the pixels that count nowhere.
        device: where to compute.
    """

    student: Measured
    teacher: Teacher | None = None
    ignore_index: int = 255
    device: torch.device | str = "cpu"
    one_by_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        network: nn.Module = self.student
        network.to(self.device).eval().to(memory_format=torch.channels_last)
        if self.teacher is not None:
            self.teacher.expect_input(*input_statistics(self.student)).to(self.device)
        self.statistics = pixel_statistics(self.student, self.device)
        self.id2label = labels_of(self.student)
        # Only counts are asked for: the weights of the losses play no part.
        several = is_multi_label(self.student)
        self.settings = EvaluationSettings(
            len(self.id2label), self.ignore_index, LossWeights(), multi_label=several
        )

    @torch.no_grad()
    def logits(self, pixels: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """Raw logits (B, K, H, W) of each network for uint8 images (B, 3, H, W).

        `targets` are the teacher's where they come with the samples.

        Raises:
            FloatingPointError: if the student's are not finite: its classes would be a guess.
        """
        inputs = normalise(pixels.to(self.device), self.statistics)
        student = raw_logits(self.student, inputs)
        if not student.isfinite().all():
            raise FloatingPointError(
                "Expected finite logits, got NaN or infinity from the model. Its weights are "
                "broken: take another checkpoint."
            )
        logits = {STUDENT: student}
        if self.teacher is None:
            return logits
        if self.teacher.from_samples and targets is not None:
            return logits | {TEACHER: targets.to(self.device).float()}
        return logits | {TEACHER: self.teacher(inputs)}

    def run(
        self,
        dataset: Any,
        *counters: Callable[[EvaluatedBatch], None],
        batch_size: int,
        workers: int = 0,
        batches: int | None = None,
        title: str = "evaluate",
    ) -> None:
        """Go once over a data set without augmentation; each counter is shown every batch.

        Args:
            dataset: samples with `pixel_values` uint8 and `labels`, map-style or a stream.
            counters: keep what they need; no logit is kept here.
            batch_size: images at a time.
            workers: processes that read the data.
            batches: stop after so many; None takes all.
            title: of the progress bar.
        """
        batch_size = 1 if self.one_by_one else batch_size
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=workers)
        total = len(loader) if batches is None else batches
        steps = tqdm(islice(loader, batches), title, total, unit="batch", leave=False, disable=None)
        for batch in steps:
            logits = self.logits(batch["pixel_values"], batch.get("teacher_logits"))
            shown = EvaluatedBatch(logits, batch["labels"].to(self.device))
            for count in counters:
                count(shown)


class RowCounter:
    """Counts of every image of a pass, in the order of the data."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.parts: dict[str, list[np.ndarray]] = {}

    def __call__(self, batch: EvaluatedBatch) -> None:
        """Count a batch."""
        labels, settings = batch.labels, self.settings
        counts = {who: student_rows(raw, labels, settings) for who, raw in batch.logits.items()}
        if TEACHER in batch.logits:
            pair = batch.logits[STUDENT], batch.logits[TEACHER]
            counts[AGREEMENT] = agreement_rows(*pair, labels, settings)
        for who, rows in counts.items():
            self.parts.setdefault(who, []).append(rows.cpu().numpy())

    def rows(self) -> dict[str, np.ndarray]:
        """int64 (N, C) of `student`, and with a teacher of `teacher` and `agreement`.

        Raises:
            ValueError: if there was no image.
        """
        if not self.parts:
            raise ValueError(
                "Expected at least one evaluation image, got none. Name a split that has some with "
                "--eval_split."
            )
        return {who: np.concatenate(parts) for who, parts in self.parts.items()}


def figures_of(
    rows: np.ndarray, id2label: dict[int, str], *, multi_label: bool = False
) -> dict[str, float]:
    """Metrics of a data set from its rows of counts (N, C)."""
    if multi_label:
        return multi_label_metrics(rows, id2label)
    return SegmentationCounts.zero(len(id2label)).add(rows).metrics(id2label)


def figure_names(
    id2label: dict[int, str], weights: LossWeights, *, teacher: bool, ema: bool = False
) -> list[str]:
    """Names of the figures that each evaluation of a training gives, whatever the kind of task."""
    metrics = list(SegmentationCounts.zero(len(id2label)).metrics(id2label))
    factors = weights.effective()
    terms = [term.evaluated_as for term in TERMS if factors[term.name] > 0]
    return [
        *metrics,
        *terms,
        "loss",
        *(("agreement", "agreement_miou") if teacher else ()),
        *(f"{EMA}_{name}" for name in metrics if ema),
    ]


def check_best_metric(
    args: TrainingArguments, figures: Sequence[str], sets: Iterable[str] = ()
) -> None:
    """Refuse to choose the best student by a figure that no evaluation has, before hours are spent.

    Args:
        args: of the run.
        figures: of an evaluation.
        sets: names of the evaluation sets, if there are several.

    Raises:
        ValueError: names the nearest.
    """
    known = [f"{one}_{name}" for one in sets for name in figures] or figures
    metric = args.metric_for_best_model or "loss"  # what the Trainer takes
    chooses = args.load_best_model_at_end or args.save_strategy == "best"
    if chooses and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"Expected --metric_for_best_model to be a figure of the evaluation, got {metric!r}."
            f"{closest(metric, known)} There are {', '.join(known)}."
        )


def agreement_of(
    rows: np.ndarray, id2label: dict[int, str], *, multi_label: bool = False
) -> dict[str, float]:
    """Share of valid pixels on which student and teacher agree, and their mutual mIoU."""
    figures = figures_of(rows, id2label, multi_label=multi_label)
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


class DataSetFigures:
    """Metrics of a data set from the rows of an evaluation; an unchanged teacher is counted once.

    Args:
        id2label: the classes, background first.
        settings: of the evaluation.
    """

    def __init__(self, id2label: dict[int, str], settings: EvaluationSettings) -> None:
        self.id2label = id2label
        self.weights = settings.weights
        self.options = {"multi_label": settings.multi_label}
        self._of_teacher: dict[str, float] = {}
        self._measured: tuple[object, object] | None = None

    def knows(self, teacher: Teacher | None, loader: Any) -> bool:
        """Whether the teacher, as it is now, has been counted on the data set of this loader."""
        if teacher is None or self._measured is None:
            return False
        dataset, state = self._measured
        return dataset is loader.dataset and state == state_of(teacher)

    def __call__(
        self, predictions: tuple[np.ndarray, ...], teacher: Teacher | None, loader: Any
    ) -> dict[str, float]:
        """Figures from the rows of `evaluation_rows`, of all processes."""
        student, terms, *rest = (np.asarray(rows) for rows in predictions)
        figures = figures_of(student, self.id2label, **self.options)
        figures |= terms_of(terms, student, self.weights)
        if teacher is None:
            return figures
        if len(rest) == 2:
            self._of_teacher = figures_of(rest[1], self.id2label, **self.options)
            self._measured = (loader.dataset, state_of(teacher))
        figures |= agreement_of(rest[0], self.id2label, **self.options)
        return figures | {f"teacher_{name}": value for name, value in self._of_teacher.items()}

    def of_average(self, rows: np.ndarray) -> dict[str, float]:
        """Those of the student's moving average, from its `student_rows`."""
        figures = figures_of(np.asarray(rows), self.id2label, **self.options)
        return {f"{EMA}_{name}": value for name, value in figures.items()}
