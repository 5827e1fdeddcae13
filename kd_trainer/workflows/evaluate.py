"""Measure a saved model, and a teacher beside it, through our `evaluate.Metric`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

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
from kd_trainer.losses import class_ids
from kd_trainer.reports.metric import load_metric
from kd_trainer.safe_files import plain, write_text
from kd_trainer.teacher import Teacher
from kd_trainer.workflows.files import write_bad_samples, write_json
from kd_trainer.workflows.plan import markdown_table


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
