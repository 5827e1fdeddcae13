"""Where the time of a training step goes: by the clock on a CPU, by events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"
"""Time that belongs to no named part."""


class Stopwatch:
    """Adds up the time of named parts that may lie inside each other; each counts without its own.

    On a GPU the host only queues work, so that its clock says nothing: there, events are put into
    the queue, and read once at the end. Waiting for data shows as the time between two events.

    Args:
        device: on which the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = False
        self._spans: list[tuple[str, Any, Any]] = []
        self._stack: list[str] = []
        self._since: Any = None
        self._cpu = 0.0
        self._wall = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._synchronise()
        self._spans, self.running = [], True
        self._since = self._moment()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> tuple[float, float, dict[str, float]]:
        """End; gives seconds of the wall clock, of all processors together, and of each part."""
        self._close()
        cpu = time.process_time() - self._cpu
        self._synchronise()
        wall = time.perf_counter() - self._wall
        self.running = False
        parts: dict[str, float] = {}
        for name, begin, end in self._spans:
            parts[name] = parts.get(name, 0.0) + self._between(begin, end)
        # Without a queue the spans lie end to end, whatever else ran between two readings here.
        return (wall if self.device.type == "cuda" else sum(parts.values())), cpu, parts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as `name`, and not as the part around it."""
        self._close()
        self._stack.append(name)
        try:
            yield
        finally:
            self._close()
            self._stack.pop()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count every call of a method of this one object as `name`."""
        original: Callable[..., Any] = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, counted)

    def _close(self) -> None:
        """End the span that runs and begin the next."""
        if not self.running:
            return
        now = self._moment()
        self._spans.append((self._stack[-1] if self._stack else OTHER, self._since, now))
        self._since = now

    def _moment(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
