"""How long runs will take: from finished runs where there are some, else from a few updates."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kd_trainer.arguments import DistillationArguments
from kd_trainer.command_line import RunArguments, build
from kd_trainer.trainer import DistillationTrainer
from kd_trainer.workflows.assemble import Parts
from kd_trainer.workflows.compare.budget import alone
from kd_trainer.workflows.compare.runs import PlannedRun, written_note, written_results
from kd_trainer.workflows.image_counts import count_images

MEASURED_UPDATES = 3


@dataclass(frozen=True)
class Speed:
    """Seconds of one update, and of one evaluation image with student and teacher."""

    update: float
    image: float


class _Clock(TrainerCallback):
    """Notes when each update ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the signature is that of transformers)
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        self.ends.append(time.perf_counter())


def measure_speed(run: RunArguments, parts: Parts, guide: Parts) -> Speed:
    """Time a few updates and evaluation images of a run.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects, used up.
        guide: objects with a teacher and evaluation data.
    """
    return Speed(measure_update(run, parts), _seconds_an_image(run, parts, guide))


def measure_update(
    run: RunArguments, parts: Parts, *, updates: int = MEASURED_UPDATES, **changed: Any
) -> float:
    """Seconds of one update of a run.

    All units of the encoder are free, which is the slowest that the run gets. The first update
    only warms up. With cached targets an update is one without a teacher.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects, used up.
        updates: how many to time.
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
    given = alone(run.given) if cached else run.given
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = build(given | quiet | changed | {"output_dir": folder}).training
        trainer = DistillationTrainer(
            parts.student,
            args,
            teacher=None if cached else parts.teacher,
            train_dataset=parts.train_dataset,
            ignore_index=run.data.ignore_index,
            processing_class=parts.processor,
            callbacks=[clock],
        )
        trainer.train()
    return (clock.ends[-1] - clock.ends[0]) / updates


def _seconds_an_image(run: RunArguments, parts: Parts, guide: Parts) -> float:
    assert guide.teacher is not None
    assert guide.eval_dataset is not None
    size = min(run.training.per_device_eval_batch_size, len(guide.eval_dataset))
    for _ in range(2):
        start = time.perf_counter()
        count_images(
            parts.student,
            guide.teacher,
            guide.eval_dataset,
            batch_size=size,
            ignore_index=run.data.ignore_index,
            device=run.training.device,
            batches=1,
        )
        elapsed = time.perf_counter() - start
    return elapsed / size


def seconds_left(planned: PlannedRun, speed: Speed, eval_images: int) -> float:
    """Seconds a run still needs: updates, evaluations, and two (three with a report) at the end."""
    evaluation = speed.image * eval_images
    if planned.trained:
        return 0.0 if planned.complete else evaluation
    updates = planned.budget.updates
    share = 1 - min(planned.checkpoint(), updates) / updates
    args, per_epoch = planned.run.training, planned.budget.per_epoch[planned.kind]
    return (
        share * training_seconds(args, updates, per_epoch, speed, eval_images)
        + (2 + args.report) * evaluation
    )


def training_seconds(
    args: DistillationArguments, updates: int, per_epoch: int, speed: Speed, eval_images: int
) -> float:
    """Seconds of so many updates with the evaluations between them."""
    every = {"no": math.inf, "epoch": per_epoch}.get(args.eval_strategy, args.eval_steps or 0)
    evaluations = updates / every if every >= 1 else 1 / every
    return updates * speed.update + evaluations * speed.image * eval_images


def finished_speed(planned: PlannedRun) -> Speed | None:
    """Speed of a run whose whole training was measured, evaluations spread over it."""
    seconds = written_results(planned.folder).get("train_seconds")
    note = written_note(planned.folder)
    whole = note.get("starts") == 1 or note.get("whole_time", False)
    if seconds is None or not (planned.trained and whole):
        return None
    return Speed(seconds / planned.budget.updates, 0.0)


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
