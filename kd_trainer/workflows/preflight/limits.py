"""How much a preflight looks at, and what it must not change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Limits:
    """Images of each split, and seconds for each of the longer stages."""

    images: int
    masks: float
    networks: float
    normalisation: float
    hashing: float


QUICK = Limits(images=8, masks=0.5, networks=4.0, normalisation=2.5, hashing=1.0)
THOROUGH = Limits(images=16, masks=2.0, networks=12.0, normalisation=12.0, hashing=5.0)


@contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Put the generators of Python, numpy and torch back afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
