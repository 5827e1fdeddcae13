"""The one timer: variants take turns beside each other, and are compared within a round.

Absolute times belong to the machine and to what else it does. Variants that take turns meet the
same busy machine, so that ratios within a round say more than any time of one variant alone.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from kd_trainer.arguments import usable_processors
from kd_trainer.console import markdown_table

Name = TypeVar("Name")
Measured = TypeVar("Measured")
_BUSY = 1.5  # processes a core that want to run, beside which wall-clock figures mean little


def take_turns(
    variants: Mapping[Name, Callable[[int], Measured]], rounds: int, *, warm_up: int = 1
) -> dict[Name, list[Measured]]:
    """Call variants in turn, A B C, C B A, ..., so that none always comes first.

    Args:
        variants: by name; each is called with the number of the round, below 0 to warm up, and
            gives what it measured.
        rounds: measured calls of each.
        warm_up: calls of each before these.

    Returns:
        By name one value a round: values of the same index were measured side by side.
    """
    names = list(variants)
    measured: dict[Name, list[Measured]] = {name: [] for name in names}
    for number in tqdm(range(-warm_up, rounds), desc="measuring", unit="round", disable=None):
        for name in names if number % 2 == 0 else reversed(names):
            value = variants[name](number)
            if number >= 0:
                measured[name].append(value)
    return measured


def timed(
    work: Callable[[int], Any], clock: Callable[[], float] = time.process_time
) -> Callable[[int], float]:
    """A variant that does `work(number)` and gives its milliseconds.

    Processor time, the default, is disturbed by other processes less than the wall clock.
    """

    def variant(number: int) -> float:
        begin = clock()
        work(max(number, 0))
        return 1000 * (clock() - begin)

    return variant


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """How many times as long `above` took as `below`, within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def machine(device: torch.device) -> dict[str, Any]:
    """What is measured on, and how busy it is at this moment."""
    load, cores = os.getloadavg()[0], usable_processors()
    on_gpu = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": load,
        "busy": load > _BUSY * cores,
        "torch": torch.__version__,
    }


def figures_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures of each row by column, as a Markdown table; what a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(_shown(row.get(c)) for c in columns)] for name, row in rows.items()]
    return markdown_table(["", *columns], body)


def _shown(figure: Any) -> str:
    if not isinstance(figure, float):
        return "" if figure is None else str(figure)
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.4g}"


class Turn(NamedTuple):
    """One turn of training steps: seconds of one step, by the clock and of all processors."""

    seconds: float
    cpu_seconds: float


class Clock:
    """Runs since it was made. A GPU, to which the host only queues work, is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = self._now()

    def turn(self, steps: int) -> Turn:
        """What each of so many steps took."""
        wall, cpu = self._now()
        return Turn((wall - self.begin[0]) / steps, (cpu - self.begin[1]) / steps)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()
