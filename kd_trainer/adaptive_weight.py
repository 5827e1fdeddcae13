"""Less of the teacher once the student is better than it: the adaptive distillation weight.

r is the student's mIoU over the teacher's, at each evaluation of the training, smoothed. Up to 1
everything is as configured. Above it the terms that need the teacher fade by exp(-20·(r - 1)), and
beyond 1.03 they are off. One evaluation is noisy, so that each change waits for a second one in a
row, and below 1 the teacher is back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING = 0.5  # share of the newest ratio
PATIENCE = 2  # evaluations in a row
OFF_ABOVE = 1.03
FADE, RISE = 20.0, 40.0


@dataclass
class AdaptiveWeight:
    """What the evaluations so far came to: plain numbers, saved with each checkpoint.

    Attributes:
        ratio: smoothed; 0 before the first evaluation.
        better: evaluations in a row at which it was above 1.
        beyond: the same above `OFF_ABOVE`.
        off: whether the teacher has no part until the ratio is below 1 again.
    """

    ratio: float = 0.0
    better: int = 0
    beyond: int = 0
    off: bool = False

    def update(self, student: float, teacher: float) -> None:
        """Take in an evaluation: both mIoU on the same images.

        A teacher of mIoU 0, or one that could not be measured, says nothing.
        """
        if not (math.isfinite(student) and teacher > 0):
            return
        ratio = student / teacher
        seen = self.ratio > 0
        self.ratio = (1 - SMOOTHING) * self.ratio + SMOOTHING * ratio if seen else ratio
        self.better = self.better + 1 if self.ratio > 1 else 0
        self.beyond = self.beyond + 1 if self.ratio > OFF_ABOVE else 0
        self.off = self.ratio >= 1 and (self.off or self.beyond >= PATIENCE)

    @property
    def _excess(self) -> float:
        """How far the ratio is above 1, once that is to be believed."""
        return self.ratio - 1 if self.off or self.better >= PATIENCE else 0.0

    @property
    def distillation(self) -> float:
        """Factor of the terms that need the teacher, 0..1."""
        return 0.0 if self.off else math.exp(-FADE * min(self._excess, OFF_ABOVE - 1))

    def task(self, weight: float) -> float:
        """Factor of the terms that compare with labels: from `weight` towards 1, if it is lower."""
        return weight + max(1 - weight, 0.0) * (1 - math.exp(-RISE * self._excess))

    def logs(self) -> dict[str, float]:
        """What a log holds of it."""
        return {"adaptive/ratio": self.ratio, "adaptive/distillation": self.distillation}
