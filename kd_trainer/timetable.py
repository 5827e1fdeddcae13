"""Temperature, free units and learning rates of a run as pure functions of the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kd_trainer.arguments import DistillationArguments
from kd_trainer.schedules import UnfreezeSchedule, epoch_progress

_ROUNDING = 1e-6  # of an epoch that is scaled to another length


@dataclass
class RunningEpoch:
    """Where a run is. Counted, because an epoch can have fewer updates than it was to have.

    Attributes:
        index: of the running epoch, from 0.
        first_update: updates of the run before it.
        over: whether it has ended.
        entered: whether it has begun in this process.
    """

    index: int = 0
    first_update: int = 0
    over: bool = False
    entered: bool = False


@dataclass(frozen=True)
class Timetable:
    """When what happens. Nothing of it is saved: a resumed run derives the same values again.

    Args:
        args: the run's arguments.
        units: encoder units of the student.
        epochs: length of the run (a fraction with `--max_steps`).
        updates_per_epoch: optimizer updates in one epoch.
        missed: updates that the epochs so far were short of: rows of a stream that could not be
            used, or a callback that ended an epoch.
    """

    args: DistillationArguments
    units: int
    epochs: float
    updates_per_epoch: int = 1
    missed: int = 0

    @property
    def unfreezing(self) -> UnfreezeSchedule:
        """Number of free units as a function of the epoch, before it is scaled to the run."""
        return self.args.unfreezing(self.units)

    @property
    def scale(self) -> float:
        """Epochs of this run for one of the plan, by which warm-up and unfreezing are scaled."""
        return self.epochs / self.args.plan_epochs if self.args.plan_epochs else 1.0

    def free_units(self, epoch: int) -> int:
        """Number of free units at an epoch of the run."""
        return self.unfreezing(math.floor(epoch / self.scale + _ROUNDING))

    def temperature(self, update: int) -> float:
        """Temperature of the loss at an update, counted from 0; held after the last one."""
        if self.args.temperature_per == "step":
            last = max(1, round(self.epochs * self.updates_per_epoch))
            return self.args.temperature(min(epoch_progress(update + self.missed, last), 1.0))
        last = max(1, math.ceil(self.epochs))
        epoch = min((update + self.missed) // self.updates_per_epoch, last - 1)
        return self.args.temperature(epoch_progress(epoch, last))

    def free_from(self, part: str) -> int:
        """Epoch from which a part of the network (`decoder`, `unit_6`, ...) is trained."""
        if not part.startswith("unit_"):
            return 0
        rank = self.units - 1 - int(part.removeprefix("unit_"))
        return math.ceil(self.unfreezing.first_free_epoch(rank) * self.scale - _ROUNDING)

    def rate(self, part: str) -> Callable[[int], float]:
        """Learning rate of a part as a share of its base rate, as a function of the update."""
        start = self.free_from(part)
        return lambda update: self.rate_at((update + self.missed) / self.updates_per_epoch, start)

    def rate_at(self, epoch: float, free_from: float = 0.0) -> float:
        """Learning rate as a share of the base rate at a fractional epoch.

        Linear warm-up over `warmup_epochs`, then a cosine to `min_learning_rate`. A part that is
        freed at `free_from` has 0 before it, and ramps up over `unfreeze_warmup_epochs` after it.
        """
        if epoch < free_from:
            return 0.0
        factor = self._warmup_cosine(epoch)
        if self.args.unfreeze_warmup_epochs > 0 and free_from > 0:
            ramp = self.args.unfreeze_warmup_epochs * self.scale
            factor *= min(1.0, (epoch - free_from) / ramp)
        return factor

    def _warmup_cosine(self, epoch: float) -> float:
        warmup = min(self.args.warmup_epochs * self.scale, self.epochs)
        if epoch < warmup:
            return epoch / warmup
        floor = self.args.min_learning_rate / self.args.learning_rate
        rest = self.epochs - warmup
        progress = min((epoch - warmup) / rest, 1.0) if rest > 0 else 1.0
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
