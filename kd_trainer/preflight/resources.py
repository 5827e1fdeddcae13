"""Whether a run fits: its plan into its epochs, bytes on the disk, memory, and hours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kd_trainer.preflight.finding import Finding, fault, note, ok
from kd_trainer.schedules import TrainingSchedule

_BYTES = 4  # of a parameter in fp32
_STATES = 2  # that AdamW keeps of each parameter
_REST = 8 * 2**20  # report, panels, logs and random states
_GIB = 2**30
_NEARLY = 0.9  # of the memory


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
        """In all: checkpoints, the student and what lies beside it."""
        student = self.parameters * _BYTES
        checkpoint = student + self.trainable * _BYTES * _STATES
        return self.checkpoints * checkpoint + student + _REST


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


def memory_finding(expected: float, there: float, device: str) -> Finding:
    """Whether a training step fits into memory, both in bytes."""
    shown = f"about {_size(expected)} of the {_size(there)} of {device}"
    if expected > _NEARLY * there:
        return note(
            "memory",
            f"a step takes {shown}",
            "Lower --batch_size and raise --gradient_accumulation_steps.",
        )
    return ok("memory", f"a step takes {shown}")


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
