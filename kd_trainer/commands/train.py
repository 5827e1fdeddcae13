"""Train a student, with or without a teacher, and leave it measured, saved and loadable."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from kd_trainer.arguments import DistillationArguments
from kd_trainer.build import Parts, assemble, evaluation_dataset, image_count
from kd_trainer.checkpointing.checkpoints import check_complete, checkpoint_folders, never_complete
from kd_trainer.checkpointing.resume import newest_checkpoint, recover_on_all_ranks
from kd_trainer.checkpointing.stopping import stoppable
from kd_trainer.commands.evaluate import Evaluation, evaluate_model
from kd_trainer.commands.report import Loaded, ReportArguments, build_report
from kd_trainer.commands.teacher_targets import use_cached_targets
from kd_trainer.config import RunArguments
from kd_trainer.console import markdown_table
from kd_trainer.costs import image_milliseconds, peak_memory_mib
from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.data.images import content_digest
from kd_trainer.doctor.checks import check_before_training
from kd_trainer.doctor.plan import describe
from kd_trainer.errors import printable
from kd_trainer.fast_layers import keep_freed_memory, use_fast_layers
from kd_trainer.files import (
    FolderLock,
    check_writable,
    replacing_file,
    replacing_files,
    write_json,
    write_text,
    writing,
)
from kd_trainer.hub import check_access, publish
from kd_trainer.loading import load_student, network_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.push_callback import HUB_FOLDER, publication_of
from kd_trainer.run_folder import check_no_links, write_bad_samples
from kd_trainer.sources import public_name
from kd_trainer.trainer import DistillationTrainer

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "segmentation-models-pytorch",
    "timm",
    "albumentations",
)


def train(run: RunArguments, *, stops: bool = True) -> dict[str, Any]:
    """Run the settings; returns what `results.json` holds.

    Leaves in the output folder: `student/` (best student by mIoU, readable by transformers and
    smp), `checkpoint-*/`, `runs/` (TensorBoard), `panels/`, `config.yaml`, `trainer_state.json`,
    `results.json` and `report.html`.

    Args:
        run: the settings.
        stops: let SIGTERM and Ctrl-C save a checkpoint and raise `Stopped`.
    """
    lock = FolderLock(Path(str(run.training.output_dir)))
    try:
        return _train(run, lock, stops=stops)
    finally:
        lock.release()


def _train(run: RunArguments, lock: FolderLock, *, stops: bool) -> dict[str, Any]:
    first = run.training.process_index == 0
    check_no_links(Path(str(run.training.output_dir)))
    if first:
        lock.take()  # of a folder that is there; a new one is made below
    checkpoint = find_checkpoint(run)  # before anything is written or takes long
    if run.training.push_to_hub and first:
        private = run.training.hub_private_repo is not False
        check_access(str(run.training.hub_model_id), private=private)
    parts = assemble(run)
    if checkpoint is None and not run.training.no_preflight:
        check_before_training(run, parts)  # a run that goes on was looked at when it started
    output = Path(str(run.training.output_dir))
    speed_up(parts.student, run.training)
    trainer = DistillationTrainer(
        parts.student,
        run.training,
        teacher=parts.teacher,
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        ignore_index=run.data.ignore_index,
        processing_class=parts.processor,
    )
    trainer.facts = facts_of(run, parts)
    if checkpoint is not None:
        trainer.check_resume(checkpoint)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        lock.take()
        _write_settings(run, parts, output)
    if run.training.teacher_targets == "cached" and parts.teacher is not None:
        use_cached_targets(run.training, parts.teacher, [parts.train_dataset, parts.eval_dataset])
    with stoppable(trainer) if stops else nullcontext():
        trained = trainer.train(str(checkpoint) if checkpoint else None).metrics
    trainer.check_finite()
    if first:  # with the logs that the report's curves are drawn of
        with replacing_file(output / TRAINER_STATE_NAME) as partial:
            trainer.state.save_to_json(str(partial))
    trainer.accelerator.wait_for_everyone()
    # All processes take part: where the weights are split among them, each has a share.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not first:
        return {}
    student_folder = output / "student"
    student = trainer.accelerator.unwrap_model(trainer.model)
    with writing("the student", student_folder), replacing_files(student_folder) as partial:
        student.save_pretrained(partial, state_dict=weights)
        parts.processor.save_pretrained(partial)
    results, evaluation = _results(run, parts, student_folder, trained)
    results["epochs"] = round(float(trainer.state.epoch or 0.0), 4)
    results["eval_history"] = eval_history(trainer.state.log_history)
    if run.data.on_bad_sample == "skip":
        results["bad_samples"] = write_bad_samples(output, parts.bad_samples)
    write_json(output / "results.json", results)
    if run.training.report:
        _report(run, parts, output, evaluation)
    if run.training.push_to_hub:
        pushed = publish(output, output / HUB_FOLDER, publication_of(run.training))
        print(f"\nPushed: {pushed.url}")
    return results


def speed_up(student: SmpForSemanticSegmentation, args: DistillationArguments) -> None:
    """What changes the student's layers and this process, which is why no constructor does it."""
    use_fast_layers(student)
    if args.keep_freed_memory and args.device.type == "cpu":
        keep_freed_memory()


def _write_settings(run: RunArguments, parts: Parts, output: Path) -> None:
    """What is known before the training."""
    settings = yaml.safe_dump(run.resolved(), sort_keys=False)
    write_text(output / "config.yaml", settings)
    if run.data.on_bad_sample == "skip":  # a stream's list is written at the end, again
        write_bad_samples(output, parts.bad_samples)


def _report(run: RunArguments, parts: Parts, output: Path, evaluation: Evaluation | None) -> None:
    """`report.html`, with the teacher, the images and the figures that are in memory already.

    A stream is opened anew: this process has only its own share of it.
    """
    streamed = isinstance(parts.eval_dataset, StreamedDataset)
    build_report(
        output,
        ReportArguments(batch_size=run.training.per_device_eval_batch_size),
        loaded=Loaded(parts.teacher, None if streamed else parts.eval_dataset, evaluation),
        device=run.training.device,
    )


def eval_history(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Main figures of each evaluation during training, in the training's precision."""
    keys = ("epoch", "eval_miou", "eval_dice", "eval_loss", "eval_agreement")
    return [
        {key.removeprefix("eval_"): log[key] for key in keys if key in log}
        for log in logs
        if "eval_miou" in log
    ]


def _results(
    run: RunArguments, parts: Parts, folder: Path, trained: dict[str, float]
) -> tuple[dict[str, Any], Evaluation | None]:
    """Figures of the student as it was saved: read back from its folder, in fp32."""
    student = load_student(folder)
    results: dict[str, Any] = {
        "student_parameters": network_size(student)[0],
        "student_file_mib": weight_file_mib(folder),
        "train_seconds": trained["train_runtime"],
        "images_per_second": trained["train_samples_per_second"],
        "peak_memory_mib": peak_memory_mib(),
        "train_images": _train_images(parts.train_dataset),
        "image_size": run.data.image_size,
        "mixed_precision": run.training.mixed_precision,
        "device": str(run.training.device),
        "teacher": public_name(run.model.teacher) if parts.teacher is not None else None,
    }
    if parts.teacher is not None:
        results["teacher_parameters"] = network_size(parts.teacher.network)[0]
        results["teacher_file_mib"] = weight_file_mib(Path(run.model.teacher))
    evaluation = None
    if parts.eval_dataset is not None:
        size, images = run.training.per_device_eval_batch_size, parts.eval_dataset
        if isinstance(images, StreamedDataset):  # of which this process has only its share
            images = evaluation_dataset(run.data, batch_size=size)
        evaluation = evaluate_model(
            student,
            images,
            teacher=parts.teacher,
            batch_size=size,
            ignore_index=run.data.ignore_index,
            device=run.training.device,
        )
        results = evaluation.results() | results
    results |= _latencies(run, parts, student)
    return results | {"versions": {name: version(name) for name in LIBRARIES}}, evaluation


def _latencies(
    run: RunArguments, parts: Parts, student: SmpForSemanticSegmentation
) -> dict[str, float | int]:
    """Milliseconds a picture of student and teacher, on the device they were measured on."""
    networks: dict[str, nn.Module] = {"student": student}
    sides = {"student": run.data.image_size}
    if parts.teacher is not None:
        networks["teacher"] = parts.teacher.network
        sides["teacher"] = parts.teacher.image_size or run.data.image_size
    return image_milliseconds(networks, sides)


def _train_images(dataset: TransformedDataset | StreamedDataset) -> int:
    """Images in an epoch; a stream's length is announced, with the bad ones that it leaves out."""
    left_out = len(dataset.bad_samples) if isinstance(dataset, StreamedDataset) else 0
    return image_count(dataset) - left_out


def weight_file_mib(source: Path) -> float | None:
    """Size of a weight file, or of the one in a model's folder; None if it is not on this disk."""
    file = source / "model.safetensors" if source.is_dir() else source
    return file.stat().st_size / 2**20 if file.is_file() else None


def summary_table(results: dict[str, Any]) -> str:
    """Teacher and student side by side, as a Markdown table."""
    metrics = {
        "miou": "mIoU",
        "iou_foreground": "IoU foreground",
        "dice": "Dice",
        "boundary_iou": "boundary IoU",
        "pixel_accuracy": "pixel accuracy",
    }
    header = ["", *metrics.values(), "agreement", "parameters", "file MiB", "ms a picture"]
    rows = []
    for who in ("teacher", "student"):
        if f"{who}_miou" not in results:
            continue
        parameters, size = results[f"{who}_parameters"], results.get(f"{who}_file_mib")
        milliseconds = results.get(f"{who}_ms")
        agreement = f"{results['agreement']:.4f}" if "agreement" in results else ""
        rows.append(
            [
                who,
                *(f"{results[f'{who}_{key}']:.4f}" for key in metrics),
                agreement if who == "student" else "",
                f"{parameters:,}",
                "" if size is None else f"{size:.1f}",
                "" if milliseconds is None else f"{milliseconds:.1f}",
            ]
        )
    return markdown_table(header, rows)


def run_train(run: RunArguments) -> dict[str, Any]:
    """What scripts/train.py does: the plan with `--dry_run`, else the training and its table."""
    if run.dry_run:
        print(describe(run, assemble(run)))
        return {}
    results = train(run)
    if "student_miou" in results:
        print("\n" + summary_table(results))
    if results:
        output = Path(str(run.training.output_dir))
        print(f"\nStudent: {output / 'student'}")
        if run.training.report:
            print(f"Report:  {output / 'report.html'}")
    return results


def facts_of(run: RunArguments, parts: Parts) -> dict[str, Any]:
    """What a resumed run is compared by, beside what the trainer knows: networks and data."""
    data = {"train_content": parts.train_dataset, "eval_content": parts.eval_dataset}
    digests = {name: content_digest(d.dataset) if d else None for name, d in data.items()}
    settings = asdict(run.model) | asdict(run.data) | digests
    return {name: value for name, value in settings.items() if name != "trust_remote_code"}


def find_checkpoint(run: RunArguments) -> Path | None:
    """What `--resume` names, complete; says what it skips.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        OSError: if the output folder cannot be written to.
        ValueError: if there are checkpoints of another run that nobody mentioned, or those that are
            named are damaged.
    """
    args = run.training
    resume, output = args.resume, Path(str(args.output_dir))
    recover_on_all_ranks(args)  # else one that waits to be replaced would be found by nobody here
    own = checkpoint_folders(output)
    if resume == "auto":  # for what restarts the same command: it may have died before any save
        resume = None if all(map(never_complete, own)) else "latest"
    elif resume is None and own:
        raise ValueError(
            f"Expected --resume or an output folder without checkpoints, got {output}, which has "
            "some. Add --resume to go on (--resume auto starts or goes on), name another "
            "--output_dir, or delete it."
        )
    found = None
    if resume == "latest":
        found, skipped = newest_checkpoint(args)
        for folder, wrong in skipped.items():
            if args.process_index == 0:
                told = f"skipped {folder}: {wrong}. Going on from {found.name}: what came after it"
                print(f"{printable(told)} is done again.", file=sys.stderr)
    elif resume is not None:
        found = Path(resume)
        check_complete(found)
        if own and found.resolve().parent != output.resolve():
            raise ValueError(
                f"Expected --resume with a checkpoint in {output}, which holds some, got {found}. "
                "Two runs in one folder would mix: name another --output_dir."
            )
    check_writable(output)
    return found
