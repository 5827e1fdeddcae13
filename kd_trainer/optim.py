"""The optimizer of staged unfreezing: a group for each free part, and the rates that drive them.

While a unit is frozen the optimizer knows nothing of it. When it is freed it gets a group of its
own, behind those that are there; their tensors keep their state. The weights come out as those of
groups that are all built at the start, bit for bit: a tensor without a gradient is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kd_trainer.arguments import DistillationArguments
from kd_trainer.students import never_used, units_of

NamedParameters = list[tuple[str, nn.Parameter]]

DECODER = "decoder"
PROJECTIONS = "projections"  # of feature maps: no part of the student, and never frozen


def unit_parameters(model: nn.Module) -> dict[str, NamedParameters]:
    """Every parameter that can be trained, by part: `decoder` first, then `unit_6` ... `unit_0`.

    Parameters that no forward pass uses are left out: they never get a gradient.
    """
    units = list(enumerate(units_of(model)))
    parts = {f"unit_{i}": list(unit.parameters()) for i, unit in reversed(units)}
    elsewhere = {name for own in parts.values() for name, _ in own} | never_used(model)
    rest = [(name, p) for name, p in model.named_parameters() if name not in elsewhere]
    return {DECODER: rest, **parts}


def base_rate(part: str, args: DistillationArguments) -> float:
    """Learning rate of a part before the schedule: the encoder's is a share of the decoder's."""
    if part == PROJECTIONS and args.projection_learning_rate is not None:
        return args.projection_learning_rate
    return args.learning_rate * (1.0 if part in (DECODER, PROJECTIONS) else args.encoder_lr_scale)


def parameter_groups(
    model: nn.Module,
    args: DistillationArguments,
    free_units: int,
    projections: NamedParameters | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW of the free parts: two for each, with and without weight decay.

    The projections of feature maps, if there are any, are a part behind the others.

    Each group has `name` (`decoder`, `unit_6`, ...), `params` as (name, tensor) pairs, `lr` (base
    rate) and `weight_decay` (0 for tensors of one dimension: biases and the scales of normalisation
    layers). Empty groups are left out.
    """
    free = list(unit_parameters(model).items())[: 1 + free_units]
    free.append((PROJECTIONS, projections or []))
    split = (
        (part, decays, [(name, p) for name, p in parameters if (p.ndim > 1) == decays])
        for part, parameters in free
        for decays in (True, False)
    )
    return [
        {
            "name": part,
            "params": chosen,
            "lr": base_rate(part, args),
            "initial_lr": base_rate(part, args),
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for part, decays, chosen in split
        if chosen
    ]


def regroup(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    """Make these the groups of an optimizer, in place.

    Args:
        optimizer: tensors that stay keep their state, those that come have none, and that of those
            that go is dropped.
        groups: as `parameter_groups` gives them. Those that a user's optimizer was made with have
            no name, and are replaced.
    """
    named = [group for group in optimizer.param_groups if "name" in group]
    present = {id(group["params"][0]): group for group in named}
    optimizer.param_groups.clear()
    for group in groups:
        _, first = group["params"][0]
        if id(first) in present:
            optimizer.param_groups.append(present[id(first)])
        else:
            optimizer.add_param_group(group)
    free = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    gone = [key for key in optimizer.state if torch.is_tensor(key) and id(key) not in free]
    for tensor in gone:
        del optimizer.state[tensor]


class PartLR(torch.optim.lr_scheduler.LRScheduler):
    """Drives whatever groups the optimizer has now, each by a pure function of the step.

    `LambdaLR` holds a list of functions and of base rates, made for the groups that it was built
    with.

    Args:
        optimizer: its groups have a `name` and an `initial_lr`.
        rate: of a part, as a share of its base rate, at a step counted from 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[str, int], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Rate of each group for the next step."""
        step = self.last_epoch  # torch's name for what it counts
        groups = self.optimizer.param_groups
        return [group["initial_lr"] * self.rate(group["name"], step) for group in groups]

    def refresh(self) -> None:
        """Set the rates of the next step again: groups or the length of epochs have changed."""
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken: everything else can be derived."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}
