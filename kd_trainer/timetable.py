"""Temperature, free units and learning rates of a run as pure functions of the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kd_trainer.arguments import DistillationArguments
from kd_trainer.schedules import UnfreezeSchedule, epoch_progress


@dataclass(frozen=True)
class Timetable:
    """When what happens. Nothing of it is saved: a resumed run derives the same values again.

    Args:
        args: the run's arguments.
        units: encoder units of the student.
        epochs: length of the run (a fraction with `--max_steps`).
        updates_per_epoch: optimizer updates in one epoch.
    """

    args: DistillationArguments
    units: int
    epochs: float
    updates_per_epoch: int = 1

    @property
    def unfreezing(self) -> UnfreezeSchedule:
        """Number of free units as a function of the epoch."""
        return self.args.unfreezing(self.units)

    def temperature(self, update: int) -> float:
        """Temperature of the loss at an update, counted from 0; held after the last one."""
        if self.args.temperature_per == "step":
            last = max(1, round(self.epochs * self.updates_per_epoch))
            return self.args.temperature(min(epoch_progress(update, last), 1.0))
        last = max(1, math.ceil(self.epochs))
        epoch = min(update // self.updates_per_epoch, last - 1)
        return self.args.temperature(epoch_progress(epoch, last))

    def free_from(self, part: str) -> int:
        """Epoch from which a part of the network (`decoder`, `unit_6`, ...) is trained."""
        if not part.startswith("unit_"):
            return 0
        rank = self.units - 1 - int(part.removeprefix("unit_"))
        return self.unfreezing.first_free_epoch(rank)

    def rate(self, part: str) -> Callable[[int], float]:
        """Learning rate of a part as a share of its base rate, as a function of the update."""
        start = self.free_from(part)
        return lambda update: self.rate_at(update / self.updates_per_epoch, start)

    def rate_at(self, epoch: float, free_from: float = 0.0) -> float:
        """Learning rate as a share of the base rate at a fractional epoch.

        Linear warm-up over `warmup_epochs`, then a cosine to `min_learning_rate`. A part that is
        freed at `free_from` has 0 before it, and ramps up over `unfreeze_warmup_epochs` after it.
        """
        if epoch < free_from:
            return 0.0
        factor = self._warmup_cosine(epoch)
        if self.args.unfreeze_warmup_epochs > 0 and free_from > 0:
            factor *= min(1.0, (epoch - free_from) / self.args.unfreeze_warmup_epochs)
        return factor

    def _warmup_cosine(self, epoch: float) -> float:
        warmup = min(self.args.warmup_epochs, self.epochs)
        if epoch < warmup:
            return epoch / warmup
        floor = self.args.min_learning_rate / self.args.learning_rate
        rest = self.epochs - warmup
        progress = min((epoch - warmup) / rest, 1.0) if rest > 0 else 1.0
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
