"""Memory and hours of a run, from a few of its updates."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from kd_trainer.command_line import RunArguments
from kd_trainer.preflight.finding import Finding, ok
from kd_trainer.preflight.resources import memory_finding
from kd_trainer.workflows.assemble import Parts, image_count
from kd_trainer.workflows.compare.budget import total_updates
from kd_trainer.workflows.compare.estimate import (
    MEASURED_UPDATES,
    Speed,
    duration,
    measure_update,
    training_seconds,
)
from kd_trainer.workflows.compare.runs import reset_peak_memory
from kd_trainer.workflows.plan import updates_per_epoch
from kd_trainer.workflows.train import peak_memory_mib

SECONDS = 20.0  # that the measured updates should take together
_SMALLEST = 2  # images: BatchNorm needs two where it pools to one pixel
_MIB = 2**20


def affordable(batch: int, image_seconds: float, seconds: float = SECONDS) -> tuple[int, int]:
    """How many updates to measure, of how many images, beside one that warms up.

    Args:
        batch: images of an update of the run.
        image_seconds: that an image of an update takes, about.
        seconds: that all of it should take.
    """
    while batch > _SMALLEST and 2 * batch * image_seconds > seconds:
        batch = max(_SMALLEST, batch // 2)
    updates = int(seconds / (batch * max(image_seconds, 1e-6))) - 1
    return max(1, min(updates, MEASURED_UPDATES)), batch


def cost_findings(
    run: RunArguments, parts: Parts, *, step_seconds: float, eval_seconds: float
) -> Iterator[Finding]:
    """Measure a few updates, and say what the run takes.

    A batch that is too slow to measure is measured smaller, and what it takes is scaled.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects; the student is copied.
        step_seconds: about what an image of an update takes, to choose the work by.
        eval_seconds: what an evaluation image takes.
    """
    args = run.training
    whole = args.per_device_train_batch_size
    updates, batch = affordable(whole, step_seconds)
    own_peak = reset_peak_memory()
    before = peak_memory_mib()
    seconds = measure_update(
        run,
        replace(parts, student=copy.deepcopy(parts.student)),
        updates=updates,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
    )
    scale = whole / batch
    if own_peak:
        expected = before + (peak_memory_mib() - before) * scale
        yield memory_finding(expected * _MIB, *_memory(args.device))
    update = seconds * scale * args.gradient_accumulation_steps
    per_epoch = updates_per_epoch(image_count(parts.train_dataset), args)
    total = total_updates(args, per_epoch)
    images = 0 if parts.eval_dataset is None else image_count(parts.eval_dataset)
    took = training_seconds(args, total, per_epoch, Speed(update, eval_seconds), images)
    scaled = "" if scale == 1 else f", measured with {batch} images"
    each = f"{update:,.0f}" if update >= 10 else f"{update:.2g}"
    yield ok(
        "time",
        f"about {duration(took)} for {total:,} updates of {each} s{scaled}, with all units free",
    )


def _memory(device: torch.device) -> tuple[float, str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return float(properties.total_memory), properties.name
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine"
