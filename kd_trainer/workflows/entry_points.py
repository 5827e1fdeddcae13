"""The command lines of scripts/eval.py and scripts/predict.py: parse, call, print."""

from __future__ import annotations

import dataclasses
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.command_line import Parser, given_flags
from kd_trainer.evaluation import labels_of
from kd_trainer.fields import (
    add_fields,
    check_at_least,
    check_folder,
    convert,
    help_field,
    hints_of,
)
from kd_trainer.modeling import check_image_size
from kd_trainer.workflows.assemble import evaluation_dataset, load_student, make_teacher
from kd_trainer.workflows.evaluate import evaluate_model, write_evaluation
from kd_trainer.workflows.predict import PredictArguments, predict


@dataclasses.dataclass
class EvaluateArguments:
    """Settings of scripts/eval.py beside those of the data and the teacher."""

    output_dir: str = help_field("runs/eval", "Gets eval_results.json and eval_results.md.")
    batch_size: int = help_field(4, "Images at a time.")
    workers: int = help_field(0, "Processes that read the data.")

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("workers", self.workers, 0)
        check_folder("output_dir", self.output_dir)


_TEACHER = frozenset(f.name for f in dataclasses.fields(ModelArguments) if "teacher" in f.name) | {
    "trust_remote_code"
}
_DATA = frozenset(f.name for f in dataclasses.fields(DataArguments)) - {
    "train_split",
    "unlabelled",
    "augmentation",
    "brightness_contrast_probability",
    "synthetic_train",
    "max_train_samples",
}


def _parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )


def _settings(classes: Sequence[type], given: dict[str, Any]) -> list[dict[str, Any]]:
    hints = hints_of(classes)
    values = {name: convert(name, value, hints[name]) for name, value in given.items()}
    names = [{f.name for f in dataclasses.fields(cls)} for cls in classes]
    return [{k: v for k, v in values.items() if k in own} for own in names]


def evaluate_main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a saved model on a split, print the table, write both files."""
    parser = _parser(
        "eval.py",
        "Measure a saved student, and a teacher beside it, in fp32.",
        "Example:\n  eval.py runs/demo/student --dataset photos/ "
        "--teacher runs/demo/teacher/student",
    )
    parser.add_argument("model", help="Saved student: a folder or a Hub id.")
    add_fields(parser, EvaluateArguments, title="evaluation")
    add_fields(parser, DataArguments, title="data", only=_DATA)
    add_fields(parser, ModelArguments, title="teacher", only=_TEACHER)
    given = given_flags(parser, arguments)
    source = given.pop("model")
    own, data_settings, model_settings = _settings(
        (EvaluateArguments, DataArguments, ModelArguments), given
    )
    args = EvaluateArguments(**own)
    model = ModelArguments(**model_settings)
    student = load_student(source, num_labels=data_settings.get("num_labels"))
    names = list(labels_of(student).values())
    told: dict[str, Any] = {
        "num_labels": len(names),
        "class_names": names,
        "image_size": student.config.image_size,
    }
    data = DataArguments(**(told | data_settings))
    check_image_size(data.image_size, student)
    evaluation = evaluate_model(
        student,
        evaluation_dataset(data, batch_size=args.batch_size),
        teacher=make_teacher(model, student, image_size=data.image_size),
        batch_size=args.batch_size,
        ignore_index=data.ignore_index,
        device="cuda" if torch.cuda.is_available() else "cpu",
        workers=args.workers,
    )
    folder = Path(args.output_dir)
    write_evaluation(evaluation, folder)
    print(f"\n{evaluation.markdown()}\nWritten to {folder}/eval_results.json and .md")


def predict_main(arguments: Sequence[str] | None = None) -> None:
    """Write masks and overlays, and say how fast."""
    parser = _parser(
        "predict.py",
        "Masks and overlays of a saved student.",
        "Examples:\n  predict.py runs/demo/student photo.jpg\n"
        "  predict.py runs/demo/student photos/ 'more/*.png' --output_dir out",
    )
    parser.add_argument("model", help="Saved student: a folder or a Hub id.")
    parser.add_argument("pictures", nargs="+", help="Files, folders or globs.")
    add_fields(
        parser,
        PredictArguments,
        title="prediction",
        only={f.name for f in dataclasses.fields(PredictArguments)} - {"model"},
    )
    given = given_flags(parser, arguments)
    pictures = given.pop("pictures")
    model = given.pop("model")
    (own,) = _settings((PredictArguments,), given)
    args = PredictArguments(**(own | {"model": model}))
    speed = predict(args, pictures)
    print(f"{speed:.1f} images per second. Written to {args.output_dir}")
