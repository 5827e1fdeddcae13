"""A saved model measured, and a teacher beside it, on the data that it is for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_trainer.data import BadSample, StreamedDataset, TransformedDataset
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import announce
from kd_trainer.evaluation import (
    AGREEMENT,
    EvaluatedBatch,
    Evaluator,
    Measured,
    RowCounter,
    agreement_of,
    classes_of,
    figures_of,
    input_statistics,
    is_multi_label,
    labels_of,
)
from kd_trainer.found_settings import REDUCED, counts_from_one
from kd_trainer.inference import evaluator_for
from kd_trainer.losses import class_ids
from kd_trainer.reports.calibration import Reliability, reliability_counts
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.metric import load_metric
from kd_trainer.run_folder import written_settings
from kd_trainer.students import image_size_of, keeps_aspect_ratio, reads_own_depth
from kd_trainer.teacher import Teacher


@dataclass
class Evaluation:
    """Figures of one evaluation; `teacher` and `agreement` are empty without a teacher.

    Attributes:
        student: metrics by name.
        teacher: likewise.
        agreement: of student and teacher.
        rows: counts of each image by who was counted, as `RowCounter` gives them.
        reliability: pixels by confidence of `student`, and of `teacher` if there is one.
        bad_samples: what `--on_bad_sample skip` left out, None without it.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    agreement: dict[str, float]
    rows: dict[str, np.ndarray]
    reliability: dict[str, Reliability]
    bad_samples: list[BadSample] | None = None

    @property
    def eval_images(self) -> int:
        """How many images were looked at."""
        return len(self.rows[STUDENT])

    def results(self) -> dict[str, Any]:
        """One flat mapping: `student_miou`, `teacher_miou`, `agreement`, `eval_images`, ..."""
        return {
            **{f"student_{k}": v for k, v in self.student.items()},
            **{f"teacher_{k}": v for k, v in self.teacher.items()},
            **self.agreement,
            "eval_images": self.eval_images,
            **({} if self.bad_samples is None else {"bad_samples": len(self.bad_samples)}),
        }


def evaluate_model(
    student: Measured,
    dataset: TransformedDataset | StreamedDataset,
    *,
    teacher: Teacher | None = None,
    batch_size: int = 4,
    ignore_index: int = 255,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Evaluation:
    """Figures of a model on a data set without augmentation, in fp32, by our `evaluate.Metric`.

    The same figures as `DistillationTrainer.evaluate` in fp32, on the same data. A data set whose
    images keep their own size is measured there (`--eval_size`), image by image.

    Raises:
        FloatingPointError: if a logit is not finite; the classes read off it would be a guess.
        ValueError: if there is no image.
    """
    evaluator = evaluator_for(dataset, student, teacher, ignore_index, device)
    rows, reliability = RowCounter(evaluator.settings), ReliabilityCounter(ignore_index)
    metrics = MetricCounter(evaluator)
    if evaluator.settings.multi_label:  # `evaluate.Metric` is of one class a pixel
        evaluator.run(dataset, rows, reliability, batch_size=batch_size, workers=workers)
        return _multi_label(rows.rows(), evaluator.id2label, reliability.counts)
    counters = (rows, reliability, metrics)
    evaluator.run(dataset, *counters, batch_size=batch_size, workers=workers)
    counted = rows.rows()  # there are images
    figures = metrics.compute()
    agreement = {}
    if teacher is not None:
        same = figures[AGREEMENT]
        agreement = {"agreement": same["pixel_accuracy"], "agreement_miou": same["miou"]}
    of_teacher = figures.get(TEACHER, {})
    return Evaluation(figures[STUDENT], of_teacher, agreement, counted, reliability.counts)


def _multi_label(
    rows: dict[str, np.ndarray], id2label: dict[int, str], reliability: dict[str, Reliability]
) -> Evaluation:
    figures = {
        who: figures_of(rows[who], id2label, multi_label=True) if who in rows else {}
        for who in (STUDENT, TEACHER)
    }
    same = agreement_of(rows[AGREEMENT], id2label, multi_label=True) if AGREEMENT in rows else {}
    return Evaluation(figures[STUDENT], figures[TEACHER], same, rows, reliability)


class MetricCounter:
    """Feeds a pass to one `evaluate.Metric` each of student, teacher and their agreement."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.ignore_index = evaluator.ignore_index
        with_teacher = evaluator.teacher is not None
        labels = evaluator.id2label
        self.metrics = {
            who: load_metric(len(labels), id2label=labels, ignore_index=self.ignore_index)
            for who in (STUDENT, *((TEACHER, AGREEMENT) if with_teacher else ()))
        }

    def __call__(self, batch: EvaluatedBatch) -> None:
        """Add a batch."""
        truth = class_ids(batch.labels).cpu()
        classes = {who: classes_of(raw).cpu() for who, raw in batch.logits.items()}
        for who, predicted in classes.items():
            self.metrics[who].add_batch(predictions=predicted, references=truth)
        if TEACHER in classes:
            target = classes[TEACHER]
            target[truth == self.ignore_index] = self.ignore_index
            self.metrics[AGREEMENT].add_batch(predictions=classes[STUDENT], references=target)

    def compute(self) -> dict[str, dict[str, float]]:
        """Metrics by name, of each that was compared."""
        return {who: metric.compute() for who, metric in self.metrics.items()}


class ReliabilityCounter:
    """Pixels of a pass by confidence, of `student` and, if there is one, of `teacher`.

    With several labels a pixel each plane counts as a binary map.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.counts: dict[str, Reliability] = {}

    def __call__(self, batch: EvaluatedBatch) -> None:
        """Count a batch."""
        planes = batch.labels.ndim == 4
        labels = batch.labels.flatten(0, 1) if planes else batch.labels
        for who, raw in batch.logits.items():
            maps = raw.flatten(0, 1)[:, None] if planes else raw
            bins = reliability_counts(maps, labels, ignore_index=self.ignore_index)
            self.counts[who] = self.counts.get(who, Reliability.zero()).add(bins)


def data_arguments_of(model: Measured, source: str, chosen: dict[str, Any]) -> DataArguments:
    """Settings of the data that a model saved at `source` is for, but for those that are chosen."""
    names = list(labels_of(model).values())
    settings: dict[str, Any] = {"num_labels": len(names), "class_names": names}
    settings["multi_label"] = is_multi_label(model)
    if reads_own_depth(model):
        mean, std = input_statistics(model)
        settings |= {"in_channels": len(mean), "channel_mean": mean, "channel_std": std}
    if not isinstance(model, Teacher):
        settings["image_size"] = image_size_of(model)
        settings["resize"] = "fit" if keeps_aspect_ratio(model) else "stretch"
        settings["ignore_index"] = getattr(model.config, "semantic_loss_ignore_index", 255)
    data = DataArguments(**(settings | settings_of_run(source, chosen) | chosen))
    if data.reduce_labels is None and counts_from_one(source, data):
        print(f"The model was {REDUCED}", file=sys.stderr)
        data = replace(data, reduce_labels=True)
    return data


_MASK_SETTINGS = (
    *("mask_kind", "mask_values", "mask_colors", "mask_threshold"),
    *("merge_classes", "ignore_values"),
)


# By which images are held out: a model is measured on those that it was not trained on.
_HOLD_OUT = ("eval_fraction", "group_by")


def settings_of_run(source: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """How the run of a model read the masks of the same data set, and what it held out of it.

    Of another data set only the colours of the classes: found anew they could be in another order.
    Without masks where flags say how they are read.
    """
    student = Path(source)
    run = next((f for f in (student, student.parent) if (f / "config.yaml").is_file()), None)
    if run is None:
        return {}
    own_masks = chosen.keys() & {*_MASK_SETTINGS, "reduce_labels"}
    names = _HOLD_OUT if own_masks else (*_HOLD_OUT, *_MASK_SETTINGS)
    settings = written_settings(run)
    if not _is_same(settings.get("dataset"), chosen.get("dataset")):
        colors = None if own_masks else settings.get("mask_colors")
        if colors is None:
            return {}
        announce("Mask colours are those of the run. Masks of class ids: --mask_kind values.")
        return {"mask_colors": colors}
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _is_same(*sources: str | None) -> bool:
    """Whether two names of data sets mean the same: `data`, `data/` and `/home/me/data`."""
    before, now = sources
    if before == now or not before or not now:
        return before == now
    places = [Path(source) for source in (before, now)]
    return all(place.exists() for place in places) and places[0].samefile(places[1])
