"""Several processes of one training: what they do together, and which of them died."""

from __future__ import annotations

import gc
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from transformers import TrainingArguments


def run_on_all_ranks(args: TrainingArguments, step: Callable[[], object] | None) -> None:
    """Run a step on this process, wait for the others, and fail if one of them has.

    Args:
        args: of the run, which name the device.
        step: what this process does; None waits only.

    Raises:
        Exception: what `step` raised here.
        OSError: if the step failed on another process, which says why.
    """
    failure: Exception | None = None
    try:
        if step is not None:
            step()
    except Exception as error:
        failure = error
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        failures = torch.tensor(int(failure is not None), device=args.device)
        dist.all_reduce(failures)
        if failures and failure is None:
            raise OSError(
                f"Expected all {dist.get_world_size()} processes to go on, got a failure of "
                f"{int(failures)}, which says why. Process {dist.get_rank()} stops with it."
            )
    if failure is not None:
        raise failure


def share_buffers(network: Any) -> None:
    """Give all processes the buffers of the first one, such as the statistics of its BatchNorms.

    In one message for each type: one for each of 200 buffers would take most of a step's wait.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer.detach())
    for buffers in kinds.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(together, src=0)
        parts = together.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def leave_process_group() -> None:
    """End the threads with which this process talks to the others, before Python ends itself.

    A process that ends while gloo's threads run may abort: `terminate called without an active
    exception`. They run for as long as a DDP module holds the group, so those are collected first.
    """
    gc.collect()
    PartialState().destroy_process_group()


_GO_ON = "Go on with the same command and --resume auto"
# How torch says that a process that reads data is gone; it names the number of the process.
_OF_WORKERS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
# How gloo and NCCL say that another rank is gone, but not which.
_OF_RANKS = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Connection (?:closed|refused)",
    re.IGNORECASE,
)
_PATIENCE = 5.0  # seconds: a socket may close before its process is gone


class Peer(NamedTuple):
    """A process of a training, and where it runs."""

    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether it runs on this machine no more; one elsewhere cannot be seen."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "ZX"  # dead, its parent has not asked yet


def processes_of_run() -> list[Peer]:
    """All processes of a training, by rank; all have to ask."""
    own = Peer(socket.gethostname(), os.getpid())
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    peers: list[Peer] = [own] * dist.get_world_size()
    dist.all_gather_object(peers, own)
    return peers


@contextmanager
def naming_dead_processes(trainer: Any) -> Iterator[None]:
    """Turn the errors of torch that come from the end of another process into one that names it.

    Args:
        trainer: knows the processes of the training as `peers`.
    """
    try:
        yield
    except RuntimeError as error:
        cause = cause_of_death(error, trainer.peers)
        if cause is None:
            raise
        raise cause from error


def cause_of_death(error: RuntimeError, peers: Sequence[Peer]) -> OSError | None:
    """What to raise if an error of torch comes from the end of another process; else None."""
    worker = _OF_WORKERS.search(str(error))
    if worker is not None:
        reason = " ".join(worker[2].split()).rstrip(".")
        return OSError(
            f"Expected the processes that read the data to go on, got the end of process "
            f"{worker[1]}: {reason}. Where memory is short, ask for fewer with "
            f"--dataloader_num_workers. {_GO_ON}."
        )
    if len(peers) < 2 or not _OF_RANKS.search(str(error)):
        return None
    gone = _gone(peers)
    names = " and ".join(f"process {rank} (pid {peers[rank].pid})" for rank in gone)
    return OSError(
        f"Expected all {len(peers)} processes to go on, got the end of "
        f"{names or 'one that cannot be seen from here'}; what it said last tells why, if the "
        f"system did not kill it. {_GO_ON}."
    )


def _gone(peers: Sequence[Peer]) -> list[int]:
    """Ranks that have ended, as soon as there are any."""
    end = time.monotonic() + _PATIENCE
    while True:
        gone = [rank for rank, peer in enumerate(peers) if peer.is_gone()]
        if gone or time.monotonic() > end:
            return gone
        time.sleep(0.05)
