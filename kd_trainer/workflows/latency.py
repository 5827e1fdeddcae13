"""How long one call takes: several networks in turn, so that all meet the same busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Call = Callable[..., Any]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 95th percentile, and of how many calls on what."""

    median: float
    percentile_95: float
    repeats: int
    threads: int


def latency(call: Call, inputs: Sequence[Any], repeats: int, threads: int) -> Latency:
    """Time `call(*inputs)`.

    Args:
        call: a network, or anything that is called with the inputs.
        inputs: positional arguments of each call.
        repeats: measured calls, at least 1, after two that warm up.
        threads: threads of torch during the calls.
    """
    return interleaved({"": call}, inputs, repeats, threads)[""]


def interleaved(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    repeats: int,
    threads: int,
    *,
    warm_up: int = 2,
    progress: bool = True,
) -> dict[str, Latency]:
    """Time several calls with the same inputs, A B A B; see `passes`."""
    seconds = passes(calls, inputs, repeats, threads, warm_up=warm_up, progress=progress)
    return {name: summary(values, threads) for name, values in seconds.items()}


def passes(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    repeats: int,
    threads: int,
    *,
    warm_up: int = 2,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Seconds of several calls with the same inputs, A B A B.

    One after the other, a network that meets a busy or a hot machine would look slow; in turn, they
    share it. The order is turned round at every second pass, so that none always comes first.

    Args:
        calls: by name.
        inputs: positional arguments of each call.
        repeats: measured calls of each, at least 1.
        threads: threads of torch during the calls. Other libraries have their own setting.
        warm_up: calls of each before those that are measured.
        progress: draw a bar where there is a terminal.

    Returns:
        By name, one value a pass: values of the same index were measured side by side.

    Raises:
        ValueError: if repeats or threads are below 1.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    with torch_threads(threads), torch.inference_mode():
        indices = range(-warm_up, repeats)
        for index in tqdm(indices, desc="latency", unit="pass", disable=None if progress else True):
            for name, call in order if index % 2 else reversed(order):
                elapsed = _timed(call, inputs)
                if index >= 0:
                    seconds[name].append(elapsed)
    return seconds


def _timed(call: Call, inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    call(*inputs)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a call on a GPU only queues its work
    return time.perf_counter() - start


def summary(seconds: Sequence[float], threads: int) -> Latency:
    """Median and 95th percentile of these calls."""
    median, high = np.percentile(np.asarray(seconds) * 1000, [50, 95])
    return Latency(float(median), float(high), len(seconds), threads)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute on so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
