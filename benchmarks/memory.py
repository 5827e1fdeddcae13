"""Peak memory, each measurement in a process of its own.

The peak of a process never falls, and what one measurement has freed the next one finds.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kd_trainer.costs import peak_memory_mib, reset_peak_memory


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` gives in a Python that has run nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def added_mib(work: Callable[[], object]) -> float:
    """By how many MiB the peak of a piece of work exceeds what was there before."""
    reset_peak_memory()
    before = _high_water_mib()
    work()
    return _high_water_mib() - before


def _high_water_mib() -> float:
    """Most memory since the last reset: of the GPU, else resident in this process.

    Not from `getrusage`, whose figure a process takes over from the one that started it.
    """
    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.is_file():
        return peak_memory_mib()
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
