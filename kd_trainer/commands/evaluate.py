"""Measure a saved model, and a teacher beside it, through our `evaluate.Metric`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kd_trainer.build import evaluation_dataset
from kd_trainer.config import parser_of_saved
from kd_trainer.console import markdown_table
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import printable
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_measured, make_teacher
from kd_trainer.measurement import Evaluation, data_arguments_of, evaluate_model
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import settings_of
from kd_trainer.run_folder import write_bad_samples
from kd_trainer.students import check_student_size
from kd_trainer.teacher import Teacher


@dataclass
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


def results_table(evaluation: Evaluation) -> str:
    """Metrics as rows, student and teacher as columns, and what they were counted on."""
    networks = {"student": evaluation.student, "teacher": evaluation.teacher}
    networks = {name: metrics for name, metrics in networks.items() if metrics}
    rows = [
        [printable(name), *(f"{metrics[name]:.4f}" for metrics in networks.values())]
        for name in evaluation.student
    ]
    parts = [markdown_table(["metric", *networks], rows)]
    if evaluation.agreement:
        agreement = evaluation.agreement["agreement"]
        parts.append(f"Agreement with the teacher: {agreement:.4f} of the pixels")
    bad = evaluation.bad_samples
    left_out = f", {len(bad):,} bad ones left out" if bad else ""
    parts.append(f"{evaluation.eval_images:,} images{left_out}")
    return "\n\n".join(parts) + "\n"


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
    flags = parser.given(arguments)
    source = flags.pop("model")
    args = EvaluateArguments(**settings_of(EvaluateArguments, flags))
    teacher = ModelArguments(**settings_of(ModelArguments, flags))
    if teacher.teaches_itself:
        raise ValueError(
            "Expected a --teacher with a file, got self: the average of a student is a model of "
            "its own, RUN/ema. Measure that as MODEL."
        )
    model = load_measured(
        source,
        arch=args.arch,
        encoder=args.encoder,
        num_labels=flags.get("num_labels"),
        trust_remote_code=teacher.trust_remote_code,
    )
    data = data_arguments_of(model, source, settings_of(DataArguments, flags))
    if not isinstance(model, Teacher):
        check_student_size(data.image_size, model)
    dataset = evaluation_dataset(data, batch_size=args.batch_size, workers=args.workers)
    evaluation = evaluate_model(
        model,
        dataset,
        teacher=make_teacher(teacher, model, image_size=data.image_size),
        batch_size=args.batch_size,
        ignore_index=data.ignore_index,
        device="cuda" if torch.cuda.is_available() else "cpu",
        workers=args.workers,
    )
    output = Path(args.output_dir)
    if data.on_bad_sample == "skip":
        evaluation.bad_samples = dataset.bad_samples
        write_bad_samples(output, dataset.bad_samples)
    results = evaluation.results() | {"eval_size": data.eval_size}
    write_json(output / "eval_results.json", results)
    table = results_table(evaluation)
    write_text(output / "eval_results.md", table)
    print(f"\n{table}\nWritten to {output}/eval_results.json and .md")
