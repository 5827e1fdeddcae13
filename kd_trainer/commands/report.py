"""`report.html` of a training run: its settings, logs and figures, and its student looked at."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_trainer.build import evaluation_dataset
from kd_trainer.commands.shown_images import EvaluationData, choose, shown_images
from kd_trainer.config import parser_of_saved
from kd_trainer.data_arguments import DataArguments
from kd_trainer.evaluation import Evaluator, figures_of, is_multi_label, labels_of
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.files import write_text
from kd_trainer.inference import evaluator_for
from kd_trainer.loading import load_student, make_teacher, network_name, network_size
from kd_trainer.measurement import Evaluation, evaluate_model
from kd_trainer.metrics import confusion_of
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_sizes import AnySize
from kd_trainer.parsing import settings_of
from kd_trainer.reports.contents import EMA, STUDENT, TEACHER, Contents, Network
from kd_trainer.reports.page import report_html
from kd_trainer.run_folder import (
    COMPARISON_SHAPE,
    RESULTS_SHAPE,
    log_history,
    read_object,
    run_settings,
    written_agreement,
    written_evaluations,
    written_figures,
)
from kd_trainer.sources import run_of
from kd_trainer.students import check_student_size
from kd_trainer.teacher import Teacher

LIBRARIES = ("torch", "transformers", "segmentation-models-pytorch")


@dataclass
class ReportArguments:
    """Settings of scripts/report.py beside those of the data and the teacher."""

    max_images: int = help_field(6, "Images shown: a third each of best, median and worst.")
    output: str = help_field("", "The file to write (default: report.html in the run's folder).")
    batch_size: int = help_field(4, "Images at a time.")
    workers: int = help_field(0, "Processes that read the data.")

    def __post_init__(self) -> None:
        check_at_least("max_images", self.max_images, 0)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("workers", self.workers, 0)
        if self.output and Path(self.output).is_dir():
            raise ValueError(
                f"Expected --output to be a file, got the folder {self.output}. Name a file in it."
            )


@dataclass(frozen=True)
class Loaded:
    """What a training has at hand already, so that nothing is loaded or measured twice."""

    teacher: Teacher | None
    dataset: EvaluationData | None
    evaluation: Evaluation | None = None


def build_report(
    run_folder: str | Path,
    args: ReportArguments | None = None,
    *,
    changed: dict[str, Any] | None = None,
    loaded: Loaded | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write the report of a run, from its folder.

    Args:
        run_folder: output folder of a training: `config.yaml` and `student/`; what else lies there
            (`results.json`, `trainer_state.json`, `comparison.json`) is shown too.
        args: what is shown, and where it is written.
        changed: settings of data and teacher that count instead of the configuration's. `dataset`
            `none` leaves out everything that needs images.
        loaded: teacher and evaluation data, where they are at hand.
        device: that computes.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: if the folder is no finished run, or its evaluation data is not there.
        ValueError: if settings contradict the student.
    """
    folder, args, changed = run_of(run_folder), args or ReportArguments(), changed or {}
    settings = run_settings(folder)
    data = DataArguments(**settings_of(DataArguments, settings | changed))
    student = load_student(folder / "student", num_labels=data.num_labels)
    contents = _contents(folder, settings, student)
    dataset = _dataset(data, settings, changed, loaded, args)
    if dataset is None:
        missing = "No evaluation data, so there are neither images nor a reliability diagram."
    else:
        check_student_size(data.image_size, student)
        model = ModelArguments(**settings_of(ModelArguments, settings | changed))
        teacher, missing = _teacher(model, student, data.image_size, changed, loaded)
        evaluator = evaluator_for(dataset, student, teacher, data.ignore_index, device)
        evaluation = (loaded and loaded.evaluation) or evaluate_model(
            student,
            dataset,
            teacher=teacher,
            batch_size=args.batch_size,
            ignore_index=data.ignore_index,
            device=device,
            workers=args.workers,
        )
        contents = _with_images(contents, evaluator, dataset, evaluation, count=args.max_images)
        if loaded is None:  # else what results.json says of the average is of these images
            contents = _with_average(contents, folder, evaluator, dataset, args)
        contents = replace(contents, measured=_measured_on(data, evaluation.eval_images))
    if missing:
        contents = replace(contents, notes=[missing, *contents.notes])
    path = Path(args.output) if args.output else folder / "report.html"
    write_text(path, report_html(contents))
    return path


def _dataset(
    data: DataArguments,
    settings: dict[str, Any],
    changed: dict[str, Any],
    loaded: Loaded | None,
    args: ReportArguments,
) -> EvaluationData | None:
    """The evaluation data: as it is at hand, else as the settings name it."""
    if loaded is not None and loaded.dataset is not None:
        return loaded.dataset
    never_evaluated = settings.get("eval_strategy") == "no" and "dataset" not in changed
    if data.dataset.lower() == "none" or never_evaluated:
        return None
    try:
        return evaluation_dataset(data, batch_size=args.batch_size)
    except FileNotFoundError as error:
        if "dataset" in changed:
            raise
        raise FileNotFoundError(
            f"{error} This is how the run names its data: name their present place with --dataset, "
            "or go to the folder that the training was started in."
        ) from error


def _teacher(
    model: ModelArguments,
    student: nn.Module,
    image_size: AnySize,
    changed: dict[str, Any],
    loaded: Loaded | None,
) -> tuple[Teacher | None, str]:
    """The teacher, and a note where the run's own is gone; that of one asked for is an error."""
    if loaded is not None:
        return loaded.teacher, ""
    try:
        return make_teacher(model, student, image_size=image_size), ""
    except (OSError, ValueError) as error:
        if "teacher" in changed:
            raise
        reason = " ".join(str(error).split())
        return None, (
            f"The teacher {model.teacher_name} could not be loaded, so no image and no reliability "
            f"shows it. Name its present place with --teacher. The reason: {reason}"
        )


def _contents(folder: Path, settings: dict[str, Any], student: nn.Module) -> Contents:
    """All that is there without a look at an image."""
    results = read_object(folder / "results.json", RESULTS_SHAPE)
    logs = log_history(folder)
    missing = (
        "No trainer_state.json in the folder or its checkpoints, so no curves but those of the "
        "evaluations in results.json."
    )
    networks = {STUDENT: _network(student, written_figures(results, STUDENT))}
    if figures := written_figures(results, TEACHER):
        size = int(results.get("teacher_parameters") or 0)
        networks[TEACHER] = Network(str(results.get("teacher")), size, figures)
    if figures := written_figures(results, EMA):
        networks[EMA] = _network(student, figures)
    return Contents(
        title=folder.resolve().name,
        class_names=list(labels_of(student).values()),
        multi_label=is_multi_label(student),
        networks=networks,
        measured="Figures of results.json.",
        notes=[] if logs else [missing],
        agreement=written_agreement(results),
        results=results,
        settings=settings,
        logs=logs or written_evaluations(results),
        # compare.py writes it beside the folders of its runs.
        comparison=read_object(folder / "comparison.json", COMPARISON_SHAPE)
        or read_object(folder.resolve().parent / "comparison.json", COMPARISON_SHAPE),
        versions={"python": platform.python_version()} | {n: version(n) for n in LIBRARIES},
    )


def _network(network: nn.Module, figures: Mapping[str, float]) -> Network:
    return Network(network_name(network), network_size(network)[0], figures)


def _with_images(
    contents: Contents,
    evaluator: Evaluator,
    dataset: EvaluationData,
    evaluation: Evaluation,
    *,
    count: int,
) -> Contents:
    """The contents with everything that needs the images."""
    labels = evaluator.id2label
    networks = {STUDENT: _network(evaluator.student, evaluation.student)}
    if evaluator.teacher is not None:
        networks[TEACHER] = _network(evaluator.teacher.network, evaluation.teacher)
    counts, several = evaluation.rows, evaluator.settings.multi_label
    ious = {
        who: np.array(
            [figures_of(row[None], labels, multi_label=several)["miou"] for row in counts[who]]
        )
        for who in networks
    }
    measured = {
        who: replace(
            network,
            confusion=confusion_of(counts[who], len(labels), multi_label=several),
            reliability=evaluation.reliability[who],
        )
        for who, network in networks.items()
    }
    chosen = choose(ious[STUDENT], count)
    return replace(
        contents,
        networks=dict(contents.networks) | measured,
        images=shown_images(evaluator, dataset, chosen, ious),
        agreement=evaluation.agreement,
    )


def _with_average(
    contents: Contents,
    folder: Path,
    evaluator: Evaluator,
    dataset: EvaluationData,
    args: ReportArguments,
) -> Contents:
    """The contents with the figures of the moving average on these images; none without it."""
    networks = {who: one for who, one in contents.networks.items() if who != EMA}
    if (folder / EMA / "config.json").is_file():
        average = load_student(folder / EMA, num_labels=len(evaluator.id2label))
        evaluation = evaluate_model(
            average,
            dataset,
            batch_size=args.batch_size,
            ignore_index=evaluator.ignore_index,
            device=evaluator.device,
            workers=args.workers,
        )
        networks[EMA] = _network(average, evaluation.student)
    return replace(contents, networks=networks)


def _measured_on(data: DataArguments, images: int) -> str:
    height, width = data.input_size
    size = f"{height} x {width} pixels"
    if data.eval_size != "input":
        how = " read by windows" if data.eval_size == "windows" else ""
        size = f"their own size{how} (the input has {size})"
    return (
        f"Measured in fp32 on the {images:,} images of the split {data.eval_split} of "
        f"{data.dataset}, at {size}."
    )


def report_main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a finished run."""
    parser = parser_of_saved(
        (ReportArguments, DataArguments, ModelArguments),
        "report.py",
        "Write report.html of a training run: figures, curves, images, reliability. Settings of "
        "data and teacher are those of the run unless they are given here.",
        "Examples:\n  report.py runs/distilled\n"
        "  report.py runs/distilled --dataset photos/ --eval_split test --output test.html\n"
        "  report.py runs/distilled --dataset none   (without images)",
    )
    parser.add_argument("run", help="Output folder of a training.")
    flags = parser.given(arguments)
    folder = flags.pop("run")
    args = ReportArguments(**settings_of(ReportArguments, flags))
    changed = settings_of(DataArguments, flags) | settings_of(ModelArguments, flags)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = build_report(folder, args, changed=changed, device=device)
    print(f"Written to {path} ({path.stat().st_size / 2**20:.1f} MiB)")
