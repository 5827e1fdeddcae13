"""Measure a saved model, and a teacher beside it, through our `evaluate.Metric`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.build import REDUCED, counts_from_one, evaluation_dataset
from kd_trainer.config import parser_of_saved
from kd_trainer.console import markdown_table
from kd_trainer.data import BadSample, StreamedDataset, TransformedDataset
from kd_trainer.errors import printable
from kd_trainer.evaluation import (
    AGREEMENT,
    EvaluatedBatch,
    Evaluator,
    Measured,
    RowCounter,
    classes_of,
    labels_of,
)
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_measured, make_teacher
from kd_trainer.losses import class_ids
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.parsing import settings_of
from kd_trainer.reports.calibration import Reliability, reliability_counts
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.metric import load_metric
from kd_trainer.run_folder import write_bad_samples
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

    def markdown(self) -> str:
        """Metrics as rows, student and teacher as columns."""
        header = ["metric", "student", *(["teacher"] if self.teacher else [])]
        rows = [
            [printable(name), *(f"{who[name]:.4f}" for who in (self.student, self.teacher) if who)]
            for name in self.student
        ]
        table = markdown_table(header, rows)
        if self.agreement:
            table += (
                f"\n\nAgreement with the teacher: {self.agreement['agreement']:.4f} of the pixels"
            )
        left_out = f", {len(self.bad_samples):,} bad ones left out" if self.bad_samples else ""
        return f"{table}\n\n{self.eval_images:,} images{left_out}\n"


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

    The same figures as `DistillationTrainer.evaluate` in fp32, on the same data.

    Raises:
        FloatingPointError: if a logit is not finite; the classes read off it would be a guess.
        ValueError: if there is no image.
    """
    evaluator = Evaluator(student, teacher, ignore_index, device)
    rows, reliability = RowCounter(evaluator.settings), ReliabilityCounter(ignore_index)
    metrics = MetricCounter(evaluator)
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
    """Pixels of a pass by confidence, of `student` and, if there is one, of `teacher`."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.counts: dict[str, Reliability] = {}

    def __call__(self, batch: EvaluatedBatch) -> None:
        """Count a batch."""
        for who, raw in batch.logits.items():
            bins = reliability_counts(raw, batch.labels, ignore_index=self.ignore_index)
            self.counts[who] = self.counts.get(who, Reliability.zero()).add(bins)


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `eval_results.json` and `eval_results.md`."""
    write_json(folder / "eval_results.json", evaluation.results())
    write_text(folder / "eval_results.md", evaluation.markdown())
    if evaluation.bad_samples is not None:
        write_bad_samples(folder, evaluation.bad_samples)


@dataclasses.dataclass
class EvaluateArguments:
    """Settings of scripts/eval.py beside those of the data and the teacher."""

    output_dir: str = help_field("runs/eval", "Gets eval_results.json and eval_results.md.")
    batch_size: int = help_field(4, "Images at a time.")
    workers: int = help_field(0, "Processes that read the data.")
    arch: str | None = help_field(None, "Architecture of MODEL, if that is a bare checkpoint.")
    encoder: str | None = help_field(None, "Encoder of MODEL, likewise.")

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("workers", self.workers, 0)
        check_folder("output_dir", self.output_dir)


def data_of(
    model: SmpForSemanticSegmentation | Teacher, source: str, given: dict[str, Any]
) -> DataArguments:
    """Settings of the data that a model saved at `source` is for, but for those that are given."""
    names = list(labels_of(model).values())
    told: dict[str, Any] = {"num_labels": len(names), "class_names": names}
    if isinstance(model, SmpForSemanticSegmentation):
        told["image_size"] = model.config.image_size
        told["ignore_index"] = model.config.semantic_loss_ignore_index
    data = DataArguments(**(told | given))
    if data.reduce_labels is None and counts_from_one(source, data):
        print(f"The model was {REDUCED}", file=sys.stderr)
        data = dataclasses.replace(data, reduce_labels=True)
    return data


def evaluate_main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a saved model on a split, print the table, write both files."""
    parser = parser_of_saved(
        (EvaluateArguments, DataArguments, ModelArguments),
        "eval.py",
        "Measure a saved model, and a teacher beside it, in fp32.",
        "Examples:\n  eval.py runs/demo/student --dataset photos/ "
        "--teacher runs/demo/teacher/student\n"
        "  eval.py unet_b3.pth --arch unet --encoder timm-efficientnet-b3 --dataset photos/",
    )
    parser.add_argument(
        "model",
        help="A saved student, any semantic segmentation model (its folder, that of a run, or a "
        "Hub id), or a checkpoint with --arch and --encoder.",
    )
    given = parser.given(arguments)
    source = given.pop("model")
    args = EvaluateArguments(**settings_of(EvaluateArguments, given))
    model = ModelArguments(**settings_of(ModelArguments, given))
    data_settings = settings_of(DataArguments, given)
    measured = load_measured(
        source,
        arch=args.arch,
        encoder=args.encoder,
        num_labels=data_settings.get("num_labels"),
        trust_remote_code=model.trust_remote_code,
    )
    data = data_of(measured, source, data_settings)
    if isinstance(measured, SmpForSemanticSegmentation):
        check_image_size(data.image_size, measured)
    dataset = evaluation_dataset(data, batch_size=args.batch_size, workers=args.workers)
    evaluation = evaluate_model(
        measured,
        dataset,
        teacher=make_teacher(model, measured, image_size=data.image_size),
        batch_size=args.batch_size,
        ignore_index=data.ignore_index,
        device="cuda" if torch.cuda.is_available() else "cpu",
        workers=args.workers,
    )
    if data.on_bad_sample == "skip":
        evaluation.bad_samples = dataset.bad_samples
    folder = Path(args.output_dir)
    write_evaluation(evaluation, folder)
    print(f"\n{evaluation.markdown()}\nWritten to {folder}/eval_results.json and .md")
