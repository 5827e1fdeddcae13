"""How the data is read where nothing is said: what suits the machine."""

from __future__ import annotations

import os
import sys
from typing import Any

MOST_WORKERS = 8


def usable_processors() -> int:
    """Processors this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_loading(args: Any, on_gpu: bool) -> None:
    """Fill in processes that read, whether they stay, and copies that do not wait.

    On a CPU a reading process only takes a core from the training. A GPU would wait for a single
    one: a picture of the heavy augmentation takes about 10 ms at 640 px. Draws do not depend on any
    of this.

    Args:
        args: gets `dataloader_num_workers`, `dataloader_persistent_workers`, `accelerator_config`.
        on_gpu: whether the training runs on one.
    """
    if args.dataloader_num_workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = usable_processors() // max(here, 1)
        args.dataloader_num_workers = min(MOST_WORKERS, max(1, cores - 1)) if on_gpu else 0
    if args.dataloader_persistent_workers is None:
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
    if on_gpu and args.accelerator_config is None:
        args.accelerator_config = {"non_blocking": True}  # from pinned memory
