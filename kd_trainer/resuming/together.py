"""Steps that all processes end together, well or not.

At a barrier the others would wait for one that has failed until their time limit is up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import TrainingArguments


def together(args: TrainingArguments, step: Callable[[], object] | None) -> None:
    """Run a step on this process, wait for the others, and fail if one of them has.

    Args:
        args: of the run, which name the device.
        step: what this process does; None waits only.

    Raises:
        Exception: what `step` raised here.
        OSError: if the step failed on another process, which says why.
    """
    failure: Exception | None = None
    try:
        if step is not None:
            step()
    except Exception as error:
        failure = error
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        failures = torch.tensor(int(failure is not None), device=args.device)
        dist.all_reduce(failures)
        if failures and failure is None:
            raise OSError(
                f"Expected all {dist.get_world_size()} processes to go on, got a failure of "
                f"{int(failures)}, which says why. Process {dist.get_rank()} stops with it."
            )
    if failure is not None:
        raise failure
