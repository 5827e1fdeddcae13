"""Whether a run fits: its plan into its epochs, bytes on the disk, memory, and hours."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from kd_trainer.arguments import DistillationArguments
from kd_trainer.build import RunComponents, image_count, images_an_epoch, speed_up
from kd_trainer.config import RunArguments, build
from kd_trainer.costs import (
    duration,
    peak_memory_mib,
    reset_peak_memory,
    steps_per_epoch,
    total_steps,
    without_teacher,
)
from kd_trainer.doctor.finding import Finding, fault, note, ok
from kd_trainer.optim import unit_parameters
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.sources import SELF
from kd_trainer.trainer import DistillationTrainer

_MIB = 2**20
_GIB = 2**30


def plan_finding(schedule: TrainingSchedule) -> Finding:
    """Whether warm-up and unfreezing come to their end within the epochs of the run."""
    units, epochs = schedule.unfreezing.units, schedule.epochs
    freed = schedule.free_units(max(math.ceil(epochs) - 1, 0))
    warmup = schedule.warmup_epochs * schedule.scale
    short = []
    if freed < units:
        short.append(f"{freed or 'none'} of {units} encoder units become free")
    if warmup > epochs / 2:
        short.append(f"the learning rate warms up for {min(warmup, epochs):.3g} of them")
    if not short:
        return ok("plan", f"all {units} encoder units are free at the end of {epochs:.3g} epochs")
    planned = max(10 * schedule.warmup_epochs, schedule.unfreezing.first_free_epoch(units - 1) + 1)
    return note(
        "plan",
        f"in the {epochs:.3g} epochs of this run {' and '.join(short)}",
        "--plan_epochs scales warm-up and unfreezing to the run: name the epochs that they are "
        f"written for ({planned:.0f} here). Or train for longer.",
    )


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes.

    Attributes:
        parameters: of the student, with those that are never used.
        trainable: of these, those that the optimizer keeps states of.
        checkpoints: most that lie there at a time.
    """

    parameters: int
    trainable: int
    checkpoints: int

    @property
    def bytes(self) -> int:
        """Checkpoints, the student, and 8 MiB for report, panels, logs and random states.

        All are in fp32; AdamW keeps two states of each parameter.
        """
        student = 4 * self.parameters
        return self.checkpoints * (student + 8 * self.trainable) + student + 8 * _MIB


def disk_need(run: RunArguments, parts: RunComponents) -> DiskNeed:
    """What the run writes: one checkpoint more than it keeps, while the next one is saved."""
    args = run.training
    per_epoch = steps_per_epoch(images_an_epoch(parts.train_dataset, args), args)
    steps = total_steps(args, per_epoch)
    every = per_epoch if args.save_strategy in ("epoch", "best") else args.save_steps
    every = every if every >= 1 else every * steps
    saves = 0 if args.save_strategy == "no" else max(1, round(steps / every))
    if args.save_total_limit is not None:
        kept = max(args.save_total_limit, 1 + bool(args.load_best_model_at_end))
        saves = min(saves, kept + 1)
    trainable = sum(p.numel() for unit in unit_parameters(parts.student).values() for _, p in unit)
    return DiskNeed(sum(p.numel() for p in parts.student.parameters()), trainable, saves)


def disk_finding(need: DiskNeed, free: int, folder: str) -> Finding:
    """Whether the checkpoints and the student fit on the disk."""
    what = f"{need.checkpoints} checkpoints and the student"
    if need.bytes > free:
        return fault(
            "disk",
            f"Expected {_size(need.bytes)} of free disk at {folder} for {what}, got {_size(free)}",
            "Make room, name another --output_dir, or lower --save_total_limit.",
        )
    return ok("disk", f"{_size(need.bytes)} for {what}; {_size(free)} are free")


_NEARLY = 0.9  # of the memory


def memory_finding(expected: float, installed: float, device: str) -> Finding:
    """Whether a training step fits into memory, both in bytes."""
    text = f"a step takes about {_size(expected)} of the {_size(installed)} of {device}"
    if expected > _NEARLY * installed:
        return note("memory", text, "Lower --batch_size and raise --gradient_accumulation_steps.")
    return ok("memory", text)


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


SECONDS = 20.0  # that the measured steps should take together
MEASURED_STEPS = 3
_SMALLEST = 2  # images: BatchNorm needs two where it pools to one pixel


def affordable(batch: int, image_seconds: float, seconds: float = SECONDS) -> tuple[int, int]:
    """How many steps to measure, of how many images, beside one that warms up.

    Args:
        batch: images of a step of the run.
        image_seconds: that an image of a step takes, about.
        seconds: that all of it should take.
    """
    while batch > _SMALLEST and 2 * batch * image_seconds > seconds:
        batch = max(_SMALLEST, batch // 2)
    steps = int(seconds / (batch * max(image_seconds, 1e-6))) - 1
    return max(1, min(steps, MEASURED_STEPS)), batch


def cost_findings(
    run: RunArguments, parts: RunComponents, *, step_seconds: float, eval_seconds: float
) -> Iterator[Finding]:
    """Measure a few steps, and say what the run takes.

    A batch that is too slow to measure is measured smaller, and what it takes is scaled.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects; the student is copied.
        step_seconds: about what an image of a step takes, to choose the work by.
        eval_seconds: what an evaluation image takes.
    """
    args = run.training
    whole = args.per_device_train_batch_size
    steps, batch = affordable(whole, step_seconds)
    scale = whole / batch
    measurable = reset_peak_memory()
    before = peak_memory_mib()
    step = measure_update(
        run,
        replace(parts, student=copy.deepcopy(parts.student)),
        updates=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
    )
    if measurable:
        expected = before + (peak_memory_mib() - before) * scale
        yield memory_finding(expected * _MIB, *_memory(args.device))
    step *= scale * args.gradient_accumulation_steps
    per_epoch = steps_per_epoch(images_an_epoch(parts.train_dataset, args), args)
    total = total_steps(args, per_epoch)
    images = 0 if parts.eval_dataset is None else image_count(parts.eval_dataset)
    seconds = training_seconds(args, total, per_epoch, Speed(step, eval_seconds), images)
    smaller = "" if scale == 1 else f", measured with {batch} images"
    each = f"{step:,.0f}" if step >= 10 else f"{step:.2g}"
    yield ok(
        "time",
        f"about {duration(seconds)} for {total:,} steps of {each} s{smaller}, with all units free",
    )


def _memory(device: torch.device) -> tuple[float, str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return float(properties.total_memory), properties.name
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine"


@dataclass(frozen=True)
class Speed:
    """Seconds of one step (`update`), and of one evaluation image with student and teacher."""

    update: float
    image: float


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def measure_update(
    run: RunArguments, parts: RunComponents, *, updates: int = MEASURED_STEPS, **changed: Any
) -> float:
    """Seconds of one step of a run.

    All units of the encoder are free, which is the slowest that the run gets. The first step
    only warms up. With cached targets a step is one without a teacher.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects, used up.
        updates: how many steps to time.
        changed: settings of the training that are to differ from the run's.
    """
    quiet = {
        "max_steps": updates + 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "panel_images": 0,
        "logging_steps": 10**6,
        "disable_tqdm": True,
        "unfreeze_start_epoch": 0,
        "unfreeze_every": 0,
    }
    cached = run.training.teacher_targets == "cached"
    settings = without_teacher(run.given) if cached else run.given
    maps = run.training.loss_weights.feature_terms  # for which the teacher runs in any case
    teacher = None if cached and not maps else parts.teacher
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = build(settings | quiet | changed | {"output_dir": folder}).training
        speed_up(parts.student, args)  # as the training will
        trainer = DistillationTrainer(
            parts.student,
            args,
            teacher=SELF if run.model.teaches_itself else teacher,
            train_dataset=parts.train_dataset,
            ignore_index=run.data.ignore_index,
            processing_class=parts.processor,
            callbacks=[clock],
        )
        trainer.train()
    return (clock.ends[-1] - clock.ends[0]) / updates


def training_seconds(
    args: DistillationArguments, updates: int, per_epoch: int, speed: Speed, eval_images: int
) -> float:
    """Seconds of so many steps with the evaluations between them."""
    every = {"no": math.inf, "epoch": per_epoch}.get(args.eval_strategy, args.eval_steps or 0)
    evaluations = updates / every if every >= 1 else 1 / every
    return updates * speed.update + evaluations * speed.image * eval_images
