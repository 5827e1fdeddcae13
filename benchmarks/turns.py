"""Works that are timed in turn, on one core and in processor time.

Other processes disturb processor time less than the clock on the wall; what disturbs it still
(shared caches, a slower clock) falls on works that take turns alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import cv2
import torch

Works = Mapping[str, Callable[[int], Any]]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep cv2 and torch to one thread, as in a worker."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def in_turn(works: Works, repeats: int) -> dict[str, list[float]]:
    """Processor milliseconds of each work, called with 0, 1, ... in turn after a first call."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-1, repeats):
        for name, work in works.items():
            begin = time.process_time()
            work(max(number, 0))
            if number >= 0:
                taken[name].append(1000 * (time.process_time() - begin))
    return taken
