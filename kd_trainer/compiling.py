"""What torch.compile needs for staged unfreezing, and what accelerate leaves on a student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def allow_recompiles(units: int) -> None:
    """Let a network be compiled for each unit that is freed, in both modes, and for a last batch.

    torch gives up at its own limit of 8 and goes on without, which nobody would notice. What an
    earlier run of this process compiled would count too, and is dropped.

    Args:
        units: encoder units that may be freed one after another.
    """
    import torch._dynamo.config as config  # takes seconds: only for those who compile

    torch.compiler.reset()
    settings: Any = config
    settings.recompile_limit = max(settings.recompile_limit, 4 * (units + 2))


def forget_earlier_training(model: nn.Module) -> None:
    """Take off what accelerate put on a model for another Trainer of this process.

    It prepares a model once and passes it on after that: a second Trainer with another
    mixed_precision would train in that of the first, and one with torch_compile uncompiled, both
    without a word. The other Trainer must not be used any more.
    """
    vars(model).pop("_is_accelerate_prepared", None)
    forward = vars(model).pop("_original_forward", None)
    if forward is not None:
        model.forward = forward


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; each one takes a while."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
