"""Equal budgets: what both kinds of run spend, and the settings that make it so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd_trainer.argument_checks import epoch_without_terms
from kd_trainer.arguments import DistillationArguments
from kd_trainer.costs import without_teacher
from kd_trainer.losses import SCHEDULED
from kd_trainer.schedules import WeightSchedule, read_weight_schedules, weight_schedule_words


@dataclass(frozen=True)
class Budget:
    """What both kinds of run spend.

    Attributes:
        steps: optimizer steps of every run.
        per_epoch: steps in one epoch of each kind.
        images: training images of each kind.
    """

    steps: int
    per_epoch: dict[str, int]
    images: dict[str, int]

    @property
    def left_out(self) -> int:
        """Images without masks that the baseline cannot use."""
        return self.images["distilled"] - self.images["baseline"]

    def epochs(self, kind: str) -> float:
        """Passes over the training images of a kind of run."""
        return self.steps / self.per_epoch[kind]

    def sentence(self) -> str:
        """What is equal, and what could not be."""
        text = f"Every run makes {self.steps:,} steps"
        if not self.left_out:
            return f"{text} (epochs of the same images: {self.epochs('distilled'):g})."
        return (
            f"{text}. The baseline cannot use the {self.left_out:,} images without masks, so "
            f"it makes them in {self.epochs('baseline'):.4g} epochs of {self.images['baseline']:,} "
            f"images, the distilled student in {self.epochs('distilled'):.4g} of "
            f"{self.images['distilled']:,}. Warm-up, unfreezing and evaluations of the baseline "
            "come at the same steps; units are freed at the nearest whole epoch."
        )


def baseline_settings(
    settings: dict[str, Any], args: DistillationArguments, budget: Budget
) -> dict[str, Any]:
    """Settings of the baseline: the distilled run's without its teacher, of the same steps.

    Schedules count in epochs. Without the unlabelled images an epoch is shorter, so they are
    stretched until everything happens at the step at which it does in the distilled run: also the
    evaluations, as the best of more of them would be an advantage. Where the teacher has a stage of
    its own, the baseline learns from its labels in all steps.
    """
    result = without_teacher(settings)
    own = read_weight_schedules(result.get("weight_schedule"), SCHEDULED)
    if epoch_without_terms(args.loss_weights.without_teacher(), own) is not None:
        peaks = {name: schedule.peak for name, schedule in own.items()}
        changed = {n: peak for n, peak in peaks.items() if peak != getattr(args, f"{n}_weight")}
        held = {name: WeightSchedule(((0.0, peak),)) for name, peak in changed.items()}
        result["weight_schedule"] = weight_schedule_words(held) or None
    if not budget.left_out:
        return result
    every = budget.per_epoch["distilled"]
    longer = every / budget.per_epoch["baseline"]
    result |= {
        "max_steps": budget.steps,
        "num_train_epochs": budget.epochs("baseline"),
        "warmup_epochs": args.warmup_epochs * longer,
        "unfreeze_warmup_epochs": args.unfreeze_warmup_epochs * longer,
        "unfreeze_start_epoch": round(args.unfreeze_start_epoch * longer),
        "plan_epochs": args.plan_epochs and args.plan_epochs * longer,
        "unfreeze_every": max(1, round(args.unfreeze_every * longer)) if args.unfreeze_every else 0,
    }
    schedules = read_weight_schedules(result.get("weight_schedule"), SCHEDULED)
    if schedules:
        stretched = {name: schedule.stretched(longer) for name, schedule in schedules.items()}
        result["weight_schedule"] = weight_schedule_words(stretched)
    for what in ("eval", "save"):
        if getattr(args, f"{what}_strategy") == "epoch":
            result |= {f"{what}_strategy": "steps", f"{what}_steps": every}
    return result
