"""A signal or Ctrl-C: the step is finished, a checkpoint saved, and the process ends.

A signal only sets a flag here; the trainer looks at it after each step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from kd_trainer.errors import Stopped

# torchrun passes a Ctrl-C on to processes that the terminal has told already.
_ONE_PRESS = 1.0
_PR_SET_PDEATHSIG = 1
# What schedulers send before they take the machine away (SIGUSR1), and what a lost terminal does.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Set for their children by torchrun, and by `accelerate launch` with one process; by no user.
_OF_LAUNCHERS = (b"TORCHELASTIC_RUN_ID=", b"ACCELERATE_DYNAMO_MODE=")


class StopRequest:
    """Whether somebody asked this run to stop."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = False
        self._at = 0.0
        self._owner = os.getpid()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle one of `_SIGNALS`; a second Ctrl-C stops at once."""
        if os.getpid() != self._owner:
            return  # a process that reads data: Ctrl-C reaches it too, and it is needed to the end
        again = number == signal.SIGINT and self.signal == signal.SIGINT
        if again and time.monotonic() - self._at > _ONE_PRESS:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if self.signal:
            return
        self.signal, self._at = number, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            more = " (Ctrl-C again stops at once and saves nothing)"
            # Not print(): a handler may run inside one, which cannot be entered twice.
            text = f"\n{name}: finishing the step and saving{more if number == 2 else ''}\n"
            os.write(2, text.encode())

    def agree(self, device: torch.device) -> bool:
        """Whether to stop after this step: one process that was asked stops all of them."""
        number = self.signal
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            told = torch.tensor(number, device=device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            number = int(told)
        self.signal = self.signal or number
        self.agreed = self.agreed or number != 0
        return self.agreed

    def stopped(self, checkpoint: Path, step: int, steps: int) -> Stopped:
        """What to raise once the checkpoint is complete."""
        return Stopped(
            f"stopped by {signal.Signals(self.signal).name} after step {step:,} of "
            f"{steps:,}, saved as {checkpoint}.",
            128 + self.signal,
        )


@contextmanager
def stoppable(trainer: Any) -> Iterator[None]:
    """Let a signal or Ctrl-C stop the training of a `DistillationTrainer` after a step.

    One that arrives too late for that acts as usual at the end of the block.

    Args:
        trainer: gets the `StopRequest`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone
        return
    request = StopRequest()
    numbers = list(_SIGNALS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # `nohup`: the run shall outlive its terminal
    before = {number: signal.signal(number, request.receive) for number in numbers}
    _outlive_launcher()
    trainer.stop = request
    try:
        yield
    finally:
        trainer.stop = None
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.signal:
        signal.raise_signal(request.signal)


def _outlive_launcher() -> None:
    """Be told by a SIGTERM if the launcher dies: `accelerate launch` passes no signal on to one.

    Without that a SIGTERM to it would leave the training running on its own. On Linux alone:
    elsewhere send the signal to the training itself.
    """
    launcher = os.getppid()
    if not _is_launcher(launcher):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it has died meanwhile, and the system tells of it no more
        signal.raise_signal(signal.SIGTERM)


def _is_launcher(parent: int, process: int | str = "self") -> bool:
    """Whether the parent has set for a process what launchers set, and not inherited it.

    As they were at the start: the Trainer sets such variables for itself.
    """
    try:
        own, inherited = (
            Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            for number in (process, parent)
        )
    except OSError:
        return False
    return any(v.startswith(_OF_LAUNCHERS) and v not in inherited for v in own)
