"""Measure a saved model, and a teacher beside it, through our `evaluate.Metric`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.build import REDUCED, counts_from_one, evaluation_dataset
from kd_trainer.config import parser_of_saved
from kd_trainer.console import markdown_table
from kd_trainer.data import BadSample, StreamedDataset, TransformedDataset, collate
from kd_trainer.evaluation import (
    Measured,
    classes_of,
    input_statistics,
    labels_of,
    normalise,
    pixel_statistics,
    raw_logits,
)
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.loading import load_measured, make_teacher
from kd_trainer.losses import class_ids
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.parsing import settings_of
from kd_trainer.reports.metric import load_metric
from kd_trainer.run_folder import write_bad_samples, write_json
from kd_trainer.safe_files import plain, write_text
from kd_trainer.teacher import Teacher


@dataclass
class Evaluation:
    """Figures of one evaluation; `teacher` and `agreement` are empty without a teacher.

    `bad_samples` is what `--on_bad_sample skip` left out, None without it.
    """

    student: dict[str, float]
    eval_images: int
    teacher: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    bad_samples: list[BadSample] | None = None

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
            [plain(name), *(f"{who[name]:.4f}" for who in (self.student, self.teacher) if who)]
            for name in self.student
        ]
        table = markdown_table(header, rows)
        if self.agreement:
            table += (
                f"\n\nAgreement with the teacher: {self.agreement['agreement']:.4f} of the pixels"
            )
        left_out = f", {len(self.bad_samples):,} bad ones left out" if self.bad_samples else ""
        return f"{table}\n\n{self.eval_images:,} images{left_out}\n"


@torch.no_grad()
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
    """Figures of a model on a data set without augmentation, in fp32.

    The same figures as `DistillationTrainer.evaluate` in fp32, on the same data.

    Raises:
        FloatingPointError: if a logit is not finite; the classes read off it would be a guess.
    """
    network: nn.Module = student
    network.to(device).eval().to(memory_format=torch.channels_last)
    statistics = pixel_statistics(student, device)
    labels = labels_of(student)
    compared = ["student", *(["teacher", "agreement"] if teacher is not None else [])]
    metrics = {
        who: load_metric(len(labels), id2label=labels, ignore_index=ignore_index)
        for who in compared
    }
    if teacher is not None:
        teacher.expect_input(*input_statistics(student)).to(device)
    images, finite = 0, torch.tensor(True, device=device)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    for batch in tqdm(loader, desc="evaluate", unit="batch", disable=None):
        pixels = normalise(batch["pixel_values"].to(device), statistics)
        truth = class_ids(batch["labels"])
        raw = raw_logits(student, pixels)
        finite &= raw.isfinite().all()
        found = classes_of(raw).cpu()
        metrics["student"].add_batch(predictions=found, references=truth)
        if teacher is not None:
            guide = classes_of(teacher(pixels)).cpu()
            metrics["teacher"].add_batch(predictions=guide, references=truth)
            guide[truth == ignore_index] = ignore_index
            metrics["agreement"].add_batch(predictions=found, references=guide)
        images += len(truth)
    if not finite:
        raise FloatingPointError(
            "Expected finite logits, got NaN or infinity from the model. Its weights are broken: "
            "take another checkpoint."
        )
    figures = {who: metric.compute() for who, metric in metrics.items()}
    agreement = {}
    if teacher is not None:
        same = figures["agreement"]
        agreement = {"agreement": same["pixel_accuracy"], "agreement_miou": same["miou"]}
    return Evaluation(figures["student"], images, figures.get("teacher", {}), agreement)


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
