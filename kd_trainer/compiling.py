"""What torch.compile needs to know of staged unfreezing, and what it has done."""

from __future__ import annotations

from typing import Any


def allow_recompiles(units: int) -> None:
    """Let a network be compiled once for each unit that is freed, in both of its modes.

    torch gives up at its own limit of 8 and goes on without, which nobody would notice.

    Args:
        units: encoder units that may be freed one after another.
    """
    import torch._dynamo.config as config  # takes seconds: only for those who compile

    settings: Any = config
    settings.recompile_limit = max(settings.recompile_limit, 2 * (units + 2))


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; each one takes a while."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
