"""The command lines of the scripts beside train.py: parse, call, print."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.command_line import given_flags
from kd_trainer.evaluation import labels_of
from kd_trainer.fields import (
    add_fields,
    check_at_least,
    check_folder,
    help_field,
)
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.teacher import Teacher
from kd_trainer.workflows.assemble import REDUCED, counts_from_one, evaluation_dataset
from kd_trainer.workflows.evaluate import evaluate_model, write_evaluation
from kd_trainer.workflows.flags import EVALUATION_DATA, TEACHER, command_parser, given_settings
from kd_trainer.workflows.models import load_measured, make_teacher
from kd_trainer.workflows.predict import PredictArguments, predict
from kd_trainer.workflows.report import ReportArguments, build_report


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
    parser = command_parser(
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
    add_fields(parser, EvaluateArguments, title="evaluation")
    add_fields(parser, DataArguments, title="data", only=EVALUATION_DATA)
    add_fields(parser, ModelArguments, title="teacher", only=TEACHER)
    given = given_flags(parser, arguments)
    source = given.pop("model")
    own, data_settings, model_settings = given_settings(
        (EvaluateArguments, DataArguments, ModelArguments), given
    )
    args, model = EvaluateArguments(**own), ModelArguments(**model_settings)
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


def predict_main(arguments: Sequence[str] | None = None) -> None:
    """Write masks, overlays or cut-outs, and say how fast."""
    parser = command_parser(
        "predict.py",
        "Masks, overlays and cut-outs of a saved student, for pictures and videos.",
        "Examples:\n  predict.py runs/demo/student photo.jpg\n"
        "  predict.py runs/demo/student photos/ 'more/*.png' holiday.mp4 --output_dir out\n"
        "  predict.py runs/demo/student poster.jpg --tile --flip --outputs cutouts",
    )
    parser.add_argument(
        "model",
        help="Saved student: a folder, a run's folder, a Hub id or an ONNX file of export.py.",
    )
    parser.add_argument("pictures", nargs="+", help="Pictures, videos, folders or globs.")
    add_fields(
        parser,
        PredictArguments,
        title="prediction",
        only={f.name for f in dataclasses.fields(PredictArguments)} - {"model"},
    )
    given = given_flags(parser, arguments)
    pictures = given.pop("pictures")
    model = given.pop("model")
    (own,) = given_settings((PredictArguments,), given)
    args = PredictArguments(**(own | {"model": model}))
    speed = predict(args, pictures)
    print(f"{speed:.1f} images per second. Written to {args.output_dir}")


def report_main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a finished run."""
    parser = command_parser(
        "report.py",
        "Write report.html of a training run: figures, curves, images, reliability. Settings of "
        "data and teacher are those of the run unless they are given here.",
        "Examples:\n  report.py runs/distilled\n"
        "  report.py runs/distilled --dataset photos/ --eval_split test --output test.html\n"
        "  report.py runs/distilled --dataset none   (without images)",
    )
    parser.add_argument("run", help="Output folder of a training.")
    add_fields(parser, ReportArguments, title="report")
    add_fields(parser, DataArguments, title="data", only=EVALUATION_DATA)
    add_fields(parser, ModelArguments, title="teacher", only=TEACHER)
    given = given_flags(parser, arguments)
    folder = given.pop("run")
    own, data, model = given_settings((ReportArguments, DataArguments, ModelArguments), given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = build_report(folder, ReportArguments(**own), changed=data | model, device=device)
    print(f"Written to {path} ({path.stat().st_size / 2**20:.1f} MiB)")
