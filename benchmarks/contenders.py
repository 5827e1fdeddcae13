"""Who is measured: the plain loop, the student alone, and our trainer, all on the same networks."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.arguments import StepArguments
from benchmarks.pictures import pair_files
from benchmarks.plain_loop import PlainDataset, PlainLoop
from benchmarks.stopwatch import Stopwatch
from kd_trainer.arguments import DataArguments, DistillationArguments
from kd_trainer.commands.teacher_targets import use_cached_targets
from kd_trainer.data import TransformedDataset, load_splits, transforms
from kd_trainer.fast_layers import usual_memory
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units
from kd_trainer.teacher import Teacher
from kd_trainer.trainer import DistillationTrainer

WARM_UP = 1
LOG_EVERY = 10


@dataclass(frozen=True)
class Turn:
    """One turn of a contender, all in seconds of one step."""

    seconds: float
    cpu_seconds: float
    parts: dict[str, float]


Contender = Callable[[int], Turn]
"""Trains for so many steps after one that warms up, and says how long they took."""


@dataclass
class Networks:
    """Teacher and student of random weights; speed does not depend on them."""

    teacher: SmpForSemanticSegmentation
    student: SmpForSemanticSegmentation


def make_networks(args: StepArguments) -> Networks:
    """Both networks, the student with the free units that are asked for.

    Raises:
        ValueError: if an encoder is unknown, or has fewer units.
    """
    torch.manual_seed(0)
    teacher, student = (
        SmpForSemanticSegmentation.create(
            "unet", encoder, encoder_weights="none", image_size=args.image_size
        )
        for encoder in (args.teacher_encoder, args.student_encoder)
    )
    student.set_free_units(args.free_units)
    return Networks(teacher, student)


def make_contender(
    name: str, args: StepArguments, folder: Path, networks: Networks, *, cache: Path | None = None
) -> Contender:
    """A contender by its name; it trains a copy of the student.

    Args:
        name: plain, student, ours, or cached, which is ours with the teacher's logits on the disk.
        args: the work.
        folder: the pair folder.
        networks: are not changed.
        cache: folder that `cached` fills before its first turn; the others need none.
    """
    networks = copy.deepcopy(networks)
    if name == "plain":
        return _plain(args, folder, networks)
    dataset = _dataset(args, folder)
    extra: dict[str, Any] = {"torch_compile": args.compile}
    if name == "student":
        return lambda steps: train_turn(args, networks.student, None, dataset, steps=steps, **extra)
    teacher = _teacher(networks)
    if name == "ours":
        extra |= {"compile_teacher": args.compile}
        return lambda steps: train_turn(
            args, networks.student, teacher, dataset, steps=steps, **extra
        )
    extra |= {"teacher_targets": "cached", "teacher_cache": str(cache)}
    with contextlib.redirect_stdout(io.StringIO()):
        use_cached_targets(trainer_arguments(args, str(cache), **extra), teacher, [dataset])
    return lambda steps: train_turn(args, networks.student, teacher, dataset, steps=steps, **extra)


def _teacher(networks: Networks) -> Teacher:
    config = networks.student.config
    mean, std = config.image_mean, config.image_std
    return Teacher(
        networks.teacher, num_labels=2, mean=mean, std=std, input_mean=mean, input_std=std
    )


def _plain(args: StepArguments, folder: Path, networks: Networks) -> Contender:
    pairs = pair_files(folder, args.train_split)
    student: nn.Module = networks.student
    loop = PlainLoop(
        student,
        networks.teacher,
        PlainDataset(pairs, args.image_size),
        batch_size=args.batch_size,
        device=args.torch_device,
        workers=args.workers,
    )

    def turn(steps: int) -> Turn:
        if args.torch_device.type == "cpu":
            usual_memory()  # what our trainer has set for this process is no part of a plain loop
        watch = Stopwatch(args.torch_device)
        loop.run(steps, watch)
        return _turn(watch, steps)

    return turn


def _turn(watch: Stopwatch, steps: int) -> Turn:
    wall, cpu, parts = watch.stop()
    return Turn(wall / steps, cpu / steps, {name: s / steps for name, s in parts.items()})


def _dataset(args: StepArguments, folder: Path) -> TransformedDataset:
    data = DataArguments(
        dataset=str(folder),
        train_split=args.train_split,
        image_size=args.image_size,
        augmentation=args.augmentation,
    )
    splits = load_splits(data, [args.train_split])
    training, _ = transforms(splits, data, seed=0)
    return TransformedDataset(splits[args.train_split], training)


def trainer_arguments(args: StepArguments, output: str, **changed: Any) -> DistillationArguments:
    """Arguments of a training of ours without evaluation and checkpoints, but with its log."""
    settings: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "use_cpu": args.torch_device.type == "cpu",
        "dataloader_num_workers": args.workers,
        "num_train_epochs": 1000,
        "unfreeze_start_epoch": 0 if args.free_units is None else 999,
        "unfreeze_every": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": min(LOG_EVERY, changed.get("max_steps", LOG_EVERY)),
    }
    return DistillationArguments(**(settings | changed))


class Window(TrainerCallback):
    """Starts and stops the stopwatch, so that it counts whole steps with their data and logs.

    Args:
        watch: the stopwatch.
        units: free encoder units, set once the schedule has set its own.
        last: update after which it stops.
    """

    def __init__(self, watch: Stopwatch, units: int | None, last: int) -> None:
        self.watch, self.units, self.last = watch, units, last
        self.measured: tuple[float, float, dict[str, float]] | None = None
        self.trainer: DistillationTrainer | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Free what is asked for, and count the parts of a step."""
        kwargs["model"].set_free_units(self.units)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The same after an epoch."""
        kwargs["model"].set_free_units(self.units)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop after the last update, and the log that follows it."""
        if state.global_step >= self.last and self.measured is None:
            self.measured = self.watch.stop()


def train_turn(
    args: StepArguments,
    student: SmpForSemanticSegmentation,
    teacher: Teacher | None,
    dataset: TransformedDataset,
    *,
    steps: int,
    **changed: Any,
) -> Turn:
    """Some updates of `DistillationTrainer.train`, of which the first only warms up."""
    watch = Stopwatch(args.torch_device)
    last = WARM_UP + steps
    window = Window(watch, args.free_units, last)
    with TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        trainer = DistillationTrainer(
            student,
            trainer_arguments(args, output, max_steps=last, **changed),
            teacher=teacher,
            train_dataset=dataset,
            callbacks=[window],
        )
        hooks = _count_parts(trainer, watch)
        trainer.train()
    for hook in hooks:
        hook.remove()
    assert window.measured is not None
    wall, cpu, parts = window.measured
    return Turn(wall / steps, cpu / steps, {name: s / steps for name, s in parts.items()})


def _count_parts(trainer: DistillationTrainer, watch: Stopwatch) -> list[RemovableHandle]:
    """Name the parts of a step, and start before the first batch after the warm-up is read.

    Returns:
        Hooks of the student, which the next turn must not find.
    """
    fetch = trainer.get_batch_samples

    def counted_fetch(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == WARM_UP and not watch.running:
            watch.start()
        with watch.part("data"):
            return fetch(*args, **kwargs)

    trainer.get_batch_samples = counted_fetch  # type: ignore[method-assign]
    watch.wrap(trainer, "_prepare_inputs", "data")
    watch.wrap(trainer, "compute_loss", "loss")
    watch.wrap(trainer, "teacher_logits", "teacher")
    watch.wrap(trainer.accelerator, "backward", "student backward")
    watch.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    watch.wrap(trainer, "log", "log")
    trainer.create_optimizer()
    watch.wrap(trainer.optimizer, "step", "optimizer")
    return _count_forward(trainer.model, watch)


def _count_forward(model: nn.Module, watch: Stopwatch) -> list[RemovableHandle]:
    handle: list[Any] = []

    def before(*_: Any) -> None:
        handle.append(watch.part("student forward"))
        handle[-1].__enter__()

    def after(*_: Any) -> None:
        handle.pop().__exit__(None, None, None)

    return [model.register_forward_pre_hook(before), model.register_forward_hook(after)]


def units_of(args: StepArguments, networks: Networks) -> str:
    """What of the student is trained, in words."""
    count = len(encoder_units(networks.student))
    free = count if args.free_units is None else args.free_units
    return "all units free" if free == count else f"{free} of {count} units free"
