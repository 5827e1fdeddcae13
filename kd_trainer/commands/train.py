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
from transformers.image_processing_backends import TorchvisionBackend
from transformers.trainer import TRAINER_STATE_NAME

from kd_trainer import hub
from kd_trainer.build import RunComponents, build_run, evaluation_dataset, image_count, speed_up
from kd_trainer.checkpointing.checkpoints import check_complete, checkpoint_folders, never_complete
from kd_trainer.checkpointing.resume import newest_checkpoint, recover_on_all_ranks
from kd_trainer.checkpointing.stopping import stoppable
from kd_trainer.commands.report import Loaded, ReportArguments, build_report
from kd_trainer.config import RUN_CONFIG, RunArguments
from kd_trainer.console import summary_table
from kd_trainer.costs import file_mib, image_milliseconds, peak_memory_mib
from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.data.images import content_digest
from kd_trainer.doctor.checks import check_before_training
from kd_trainer.doctor.plan import describe
from kd_trainer.errors import printable
from kd_trainer.files import (
    FolderLock,
    check_writable,
    replacing_file,
    replacing_files,
    write_json,
    write_text,
    writing,
)
from kd_trainer.hub import check_access
from kd_trainer.loading import load_student, network_size
from kd_trainer.measurement import evaluate_model
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_sizes import plain_size
from kd_trainer.push_callback import HUB_FOLDER, publication_of
from kd_trainer.reports.contents import EMA
from kd_trainer.run_folder import check_no_links, write_bad_samples, write_held_out
from kd_trainer.sources import SELF
from kd_trainer.teacher_targets import use_cached_targets
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
    """Run the settings; returns what `results.json` holds, on the first process.

    Leaves in the output folder: `student/` (best student by mIoU, readable by transformers and
    smp), with `ema_decay` its moving average in `ema/`, `checkpoint-*/`, `runs/` (TensorBoard),
    `panels/`, `config.yaml`, `trainer_state.json`, `results.json` and `report.html`.

    Args:
        run: the settings.
        stops: let SIGTERM and Ctrl-C save a checkpoint and raise `Stopped`.
    """
    lock = FolderLock(run.output)
    try:
        parts, trainer, checkpoint = prepare(run, lock)
        figures = fit(trainer, checkpoint, parts.processor, stops=stops)
        if run.training.process_index > 0:
            return {}
        results, measured = measure(run, parts)
        results |= {
            "train_seconds": figures["train_runtime"],
            "images_per_second": figures["train_samples_per_second"],
            "epochs": round(float(trainer.state.epoch or 0.0), 4),
            "eval_history": eval_history(trainer.state.log_history),
        }
        publish(run, parts, results, measured)
        return results
    finally:
        lock.release()


def prepare(
    run: RunArguments, lock: FolderLock
) -> tuple[RunComponents, DistillationTrainer, Path | None]:
    """The objects of a run and the checkpoint that it goes on from, everything checked.

    Nothing is written before all of it is known to fit.
    """
    args, first = run.training, run.training.process_index == 0
    check_no_links(run.output)
    if first:
        lock.take()  # of a folder that is there; a new one is made below
    checkpoint = find_checkpoint(run)
    if args.push_to_hub and first:
        check_access(str(args.hub_model_id), private=args.hub_private_repo is not False)
    parts = build_run(run)
    if checkpoint is None and not args.no_preflight:
        check_before_training(run, parts)  # a run that goes on was looked at when it started
    speed_up(parts.student, args)
    trainer = DistillationTrainer(
        parts.student,
        args,
        teacher=SELF if run.model.teaches_itself else parts.teacher,
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        ignore_index=run.data.ignore_index,
        processing_class=parts.processor,
    )
    trainer.facts = facts_of(run, parts)
    if checkpoint is not None:
        trainer.check_resume(checkpoint)
    if first:
        run.output.mkdir(parents=True, exist_ok=True)
        lock.take()
        write_text(run.output / RUN_CONFIG, yaml.safe_dump(run.resolved(), sort_keys=False))
        if run.data.on_bad_sample == "skip":  # a stream's list is written at the end, again
            write_bad_samples(run.output, parts.bad_samples)
        if parts.held_out:
            write_held_out(run.output, parts.held_out)
    asked = parts.teacher is not None and not parts.teacher.from_samples
    if args.teacher_targets == "cached" and parts.teacher is not None and asked:
        use_cached_targets(args, parts.teacher, [parts.train_dataset, parts.eval_dataset])
    return parts, trainer, checkpoint


def fit(
    trainer: DistillationTrainer,
    checkpoint: Path | None,
    processor: TorchvisionBackend,
    *,
    stops: bool,
) -> dict[str, float]:
    """Train, and save the best student; returns the Trainer's figures of the training."""
    with stoppable(trainer) if stops else nullcontext():
        figures = trainer.train(str(checkpoint) if checkpoint else None).metrics
    trainer.check_finite()
    output, first = Path(str(trainer.args.output_dir)), trainer.args.process_index == 0
    if first:  # with the logs that the report's curves are drawn of
        with replacing_file(output / TRAINER_STATE_NAME) as partial:
            trainer.state.save_to_json(str(partial))
    trainer.accelerator.wait_for_everyone()
    # All processes take part: where the weights are split among them, each has a share.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if first:
        student = trainer.accelerator.unwrap_model(trainer.model)
        _save(student, output / "student", processor, state_dict=weights)
        if trainer.ema is not None:
            _save(trainer.ema.network, output / EMA, processor)
    return figures


def _save(network: Any, folder: Path, processor: TorchvisionBackend, **options: Any) -> None:
    with writing("the student", folder), replacing_files(folder) as partial:
        network.save_pretrained(partial, **options)
        processor.save_pretrained(partial)


def measure(run: RunArguments, parts: RunComponents) -> tuple[dict[str, Any], Loaded]:
    """Figures of the student as it was saved: read back from its folder, in fp32.

    Also what they were measured with, which the report shows.
    """
    args, size, teacher = run.training, run.data.input_size, parts.teacher
    student = load_student(run.output / "student")
    networks: dict[str, nn.Module] = {"student": student}
    files, sizes = {"student": [str(run.output / "student")]}, {"student": size}
    if teacher is not None and not teacher.from_samples:
        networks["teacher"], files["teacher"] = teacher.network, run.model.teachers
        sizes["teacher"] = teacher.image_size or size
    results: dict[str, Any] = {}
    images, evaluation = parts.eval_dataset, None
    if images is not None:
        batch_size = args.per_device_eval_batch_size
        own_size = run.data.eval_size != "input"
        # Of a stream this process has only its share.
        if own_size or isinstance(images, StreamedDataset):
            targets = images.transform.targets
            images = evaluation_dataset(run.data, batch_size=batch_size)
            if teacher is not None and teacher.from_samples:
                images.transform.targets = targets
        evaluation = evaluate_model(
            student,
            images,
            teacher=teacher,
            batch_size=batch_size,
            ignore_index=run.data.ignore_index,
            device=args.device,
        )
        results = evaluation.results()
        if args.ema_decay is not None:
            average = load_student(run.output / EMA)
            results |= _ema_figures(average, images, run)
    for name, network in networks.items():
        results[f"{name}_parameters"] = network_size(network)[0]
        results[f"{name}_file_mib"] = file_mib(*files[name])
    results |= {
        "peak_memory_mib": peak_memory_mib(),
        "train_images": _train_images(parts.train_dataset),
        "image_size": plain_size(size),
        "eval_size": run.data.eval_size,
        "mixed_precision": args.mixed_precision,
        "device": str(args.device),
        "teacher": _teacher_name(run.model),
        **image_milliseconds(networks, sizes),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return results, Loaded(teacher, images, evaluation)


def _teacher_name(model: ModelArguments) -> str | None:
    if model.teaches_itself:
        return SELF
    return model.teacher_name if model.has_teacher else None


def _ema_figures(average: nn.Module, images: Any, run: RunArguments) -> dict[str, float]:
    """Those of the student's moving average, read back from its folder too."""
    evaluation = evaluate_model(
        average,
        images,
        batch_size=run.training.per_device_eval_batch_size,
        ignore_index=run.data.ignore_index,
        device=run.training.device,
    )
    return {f"{EMA}_{name}": value for name, value in evaluation.student.items()}


def publish(
    run: RunArguments, parts: RunComponents, results: dict[str, Any], measured: Loaded
) -> None:
    """Write the results and the report, and push the student where that was asked for."""
    args = run.training
    if run.data.on_bad_sample == "skip":
        results["bad_samples"] = write_bad_samples(run.output, parts.bad_samples)
    write_json(run.output / "results.json", results)
    if args.report:
        shown = ReportArguments(batch_size=args.per_device_eval_batch_size)
        build_report(run.output, shown, loaded=measured, device=args.device)
    if args.push_to_hub:
        pushed = hub.publish(run.output, run.output / HUB_FOLDER, publication_of(args))
        print(f"\nPushed: {pushed.url}")


def eval_history(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Main figures of each evaluation during training, in the training's precision."""
    keys = ("epoch", "eval_miou", "eval_dice", "eval_loss", "eval_agreement", "eval_ema_miou")
    return [
        {key.removeprefix("eval_"): log[key] for key in keys if key in log}
        for log in logs
        if "eval_miou" in log
    ]


def _train_images(dataset: TransformedDataset | StreamedDataset) -> int:
    """Images in an epoch; a stream's length is announced, with the bad ones that it leaves out."""
    left_out = len(dataset.bad_samples) if isinstance(dataset, StreamedDataset) else 0
    return image_count(dataset) - left_out


def run_train(run: RunArguments) -> dict[str, Any]:
    """What scripts/train.py does: the plan with `--dry_run`, else the training and its table."""
    if run.dry_run:
        print(describe(run, build_run(run)))
        return {}
    results = train(run)
    if "student_miou" in results:
        print("\n" + summary_table(results))
    if results:
        print(f"\nStudent: {run.output / 'student'}")
        if (run.output / "report.html").is_file():
            print(f"Report:  {run.output / 'report.html'}")
    return results


def facts_of(run: RunArguments, parts: RunComponents) -> dict[str, Any]:
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
    args, resume, output = run.training, run.training.resume, run.output
    recover_on_all_ranks(args)  # else one that waits to be replaced would be found by nobody here
    folders = checkpoint_folders(output)
    if resume == "auto":  # for what restarts the same command: it may have died before any save
        resume = None if all(map(never_complete, folders)) else "latest"
    elif resume is None and folders:
        raise ValueError(
            f"Expected --resume or an output folder without checkpoints, got {output}, which has "
            "some. Add --resume to go on (--resume auto starts or goes on), name another "
            "--output_dir, or delete it."
        )
    checkpoint = None
    if resume == "latest":
        checkpoint, skipped = newest_checkpoint(args)
        for folder, wrong in skipped.items():
            if args.process_index == 0:
                place = f"skipped {folder}: {wrong}. Going on from {checkpoint.name}"
                print(f"{printable(place)}: what came after it is done again.", file=sys.stderr)
    elif resume is not None:
        checkpoint = Path(resume)
        check_complete(checkpoint)
        if folders and checkpoint.resolve().parent != output.resolve():
            raise ValueError(
                f"Expected --resume with a checkpoint in {output}, which holds some, got "
                f"{checkpoint}. Two runs in one folder would mix: name another --output_dir."
            )
    check_writable(output)
    return checkpoint
