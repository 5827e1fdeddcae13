"""Parameter groups of staged unfreezing.

All groups are built once, before the first step, in a fixed order: decoder and head, then the
encoder units from the deepest to the shallowest, each split by weight decay. Freeing a unit later
only changes `requires_grad` and the learning rate (see `schedules`), so the optimizer's state, the
learning-rate scheduler and a resumed run never meet a group that was not there before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from kd_trainer.arguments import DistillationArguments
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units
from kd_trainer.schedules import TrainingSchedule

NamedParameters = list[tuple[str, nn.Parameter]]

DECODER = "decoder"


def unit_parameters(model: SmpForSemanticSegmentation) -> dict[str, NamedParameters]:
    """Every parameter that can be trained, by part: `decoder` first, then `unit_6` ... `unit_0`.

    Parameters that no forward pass uses are left out: they never get a gradient.
    """
    units = list(enumerate(encoder_units(model)))
    parts = {f"unit_{i}": list(unit.parameters()) for i, unit in reversed(units)}
    elsewhere = {name for own in parts.values() for name, _ in own} | model.never_used_parameters()
    rest = [(name, p) for name, p in model.named_parameters() if name not in elsewhere]
    return {DECODER: rest, **parts}


def parameter_groups(
    model: SmpForSemanticSegmentation, args: DistillationArguments
) -> list[dict[str, Any]]:
    """Groups for AdamW: two for each part, with and without weight decay.

    Each group has `name` (`decoder`, `unit_6`, ...), `params` as (name, tensor) pairs, `lr` (base
    rate; the encoder's is `encoder_lr_scale` of the decoder's) and `weight_decay` (0 for tensors of
    one dimension: biases and the scales of normalisation layers). Empty groups are left out.
    """
    groups = []
    for part, parameters in unit_parameters(model).items():
        scale = 1.0 if part == DECODER else args.encoder_lr_scale
        for decays in (True, False):
            chosen = [(name, p) for name, p in parameters if (p.ndim > 1) == decays]
            if chosen:
                groups.append(
                    {
                        "name": part,
                        "params": chosen,
                        "lr": args.learning_rate * scale,
                        "weight_decay": args.weight_decay if decays else 0.0,
                    }
                )
    return groups


class GroupedTrainer(Trainer):
    """Trains the parts of a student in groups of their own, each at its own rates."""

    args: DistillationArguments
    model: SmpForSemanticSegmentation
    schedule: TrainingSchedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group a part of the network, all built before anything is frozen."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.args)
            optimizer_class, options = (
                self.optimizer_cls_and_kwargs
                or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A LambdaLR with one pure function of the update for each group."""
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            rates = [self.rate(group["name"]) for group in optimizer.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def rate(self, part: str) -> Callable[[int], float]:
        """Learning rate of a part as the schedules of the running epoch have it."""
        return lambda update: self.schedule.rate(part)(update)
