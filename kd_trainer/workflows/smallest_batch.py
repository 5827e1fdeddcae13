"""Whether a student can train on the smallest batch that will occur."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_trainer.arguments import DistillationArguments
from kd_trainer.modeling import SmpForSemanticSegmentation


class _OneValueError(Exception):
    """A BatchNorm would have to normalise by the variance of a single value."""


def smallest_batch(images: int, args: DistillationArguments, *, streamed: bool) -> int:
    """Images of the smallest training batch of a process that will occur.

    Only the last batch of an epoch is short, and a run may end before it.

    Args:
        images: of all processes.
        args: batch size, whether a last short batch is dropped, and the length of the run.
        streamed: whether each process reads a share of its own; else accelerate fills up the last
            batch where there are several processes.
    """
    batch, processes = args.per_device_train_batch_size, args.world_size
    if args.dataloader_drop_last or (processes > 1 and not streamed):
        return batch
    share = images // processes
    updates = math.ceil(math.ceil(share / batch) / args.gradient_accumulation_steps)
    first_epoch = math.ceil(min(1.0, args.num_train_epochs) * updates)
    if (args.max_steps if args.max_steps > 0 else first_epoch) < updates:
        return batch
    return share % batch or batch


def check_smallest_batch(
    student: SmpForSemanticSegmentation, images: int, args: DistillationArguments, *, streamed: bool
) -> None:
    """Refuse batches of one image for a network with a BatchNorm behind a pooling to one pixel.

    Raises:
        ValueError: if there will be such a batch; torch says so at the end of the first epoch only.
    """
    alone = smallest_batch(images, args, streamed=streamed) == 1
    if not alone or args.sync_batchnorm or not _needs_two(student):
        return
    if args.per_device_train_batch_size == 1:
        got, cure = "--batch_size 1", "Set --batch_size 2 or more"
    else:
        got = f"a last batch of one ({images:,} images, --dataloader_drop_last false)"
        cure = "Set --dataloader_drop_last true, or another --batch_size"
    raise ValueError(
        f"Expected batches of at least 2 images for {student.config._model_class}, a BatchNorm of "
        f"which sees one value of each channel in one image, got {got}. {cure}."
    )


@torch.no_grad()
def _needs_two(student: SmpForSemanticSegmentation) -> bool:
    network = copy.deepcopy(student)
    network.set_free_units(None)
    network.train()

    def look(_: nn.Module, given: Any) -> None:
        if given[0].numel() == given[0].shape[1]:
            raise _OneValueError

    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(look)
    side = int(student.config.image_size)
    pixels = torch.zeros(1, int(student.config.in_channels), side, side)
    try:
        with torch.random.fork_rng(devices=[]):
            network(pixel_values=pixels)
    except _OneValueError:
        return True
    return False
