"""The quick preflight at the start of a training."""

from __future__ import annotations

import time

from accelerate.utils import broadcast_object_list

from kd_trainer.command_line import RunArguments
from kd_trainer.fast_layers import keep_freed_memory
from kd_trainer.preflight.finding import error_message, summary
from kd_trainer.workflows.assemble import Parts
from kd_trainer.workflows.preflight.checks import Preflight
from kd_trainer.workflows.preflight.limits import QUICK


def check_before_training(run: RunArguments, parts: Parts) -> None:
    """The quick preflight of a training; prints what it found.

    The first process looks, and tells the others what it has found at fault.

    Raises:
        ValueError: if the training would be pointless; says why, and what to do.
    """
    message: list[str | None] = [None]
    if run.training.process_index == 0:
        start = time.monotonic()
        if run.training.keep_freed_memory and run.training.device.type == "cpu":
            keep_freed_memory()  # as the training will: its networks run here first
        findings = list(Preflight(run, parts, QUICK).findings())
        message = [error_message(findings)]
        if message[0] is None:
            print(summary(findings, time.monotonic() - start), flush=True)
    if run.training.world_size > 1:
        broadcast_object_list(message)
    if message[0] is not None:
        raise ValueError(message[0])
