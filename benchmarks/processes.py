"""Two processes against one with the same batch: `benchmark.py processes`.

Both use the same cores, so that two of them can win nothing but must not lose: what they add is
the exchange of gradients, the search for parameters without one, and everything that is done twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arguments import StepArguments
from benchmarks.contenders import make_contender, make_networks
from benchmarks.machine import machine
from benchmarks.memory import run_child
from benchmarks.pictures import pair_folder
from kd_trainer.arguments import usable_processors
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.run_folder import write_json

MODULE = "benchmarks.processes"


@dataclass
class ProcessArguments(StepArguments):
    """Settings of `benchmark.py processes`."""

    processes: int = help_field(2, "Processes that share the batch.")
    steps: int = help_field(10, "Measured steps of each start.")
    pairs: int = help_field(3, "How often one and several processes are started in turn.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("processes", self.processes, 2)
        check_at_least("steps", self.steps, 1)
        check_at_least("pairs", self.pairs, 1)
        if self.batch_size % self.processes:
            raise ValueError(
                f"Expected --batch_size divisible by {self.processes} processes, got "
                f"{self.batch_size}. Each gets an equal share of it."
            )


def run_processes(args: ProcessArguments) -> dict[str, Any]:
    """Start one and several processes in turn; print and write seconds of a step."""
    seconds: dict[int, list[float]] = {1: [], args.processes: []}
    with pair_folder(args) as folder:
        for index in tqdm(range(args.pairs), desc="starting", unit="pair", disable=None):
            order = list(seconds) if index % 2 == 0 else list(seconds)[::-1]
            for count in order:
                seconds[count].append(_started(args, folder, count))
    pairs = zip(seconds[1], seconds[args.processes], strict=True)
    result = {
        "what": "processes",
        "machine": machine(args.torch_device),
        "work": vars(args),
        "seconds": {str(count): own for count, own in seconds.items()},
        "ratio": median(one / several for one, several in pairs),
    }
    for count, own in seconds.items():
        print(f"{count} process(es): {median(own):.3f} s a step of {args.batch_size} pictures")
    print(f"{args.processes} processes are {result['ratio']:.2f}x as fast as one.")
    if args.json is not None:
        write_json(Path(args.json), result)
    return result


def _started(args: ProcessArguments, folder: Path, count: int) -> float:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(StepArguments)}
    values["batch_size"] = args.batch_size // count
    threads = max(1, usable_processors() // count)
    job = {"args": values, "folder": str(folder), "steps": args.steps, "threads": threads}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    found = run_child(MODULE, job, *launcher)
    return float(found["seconds"])


def _child(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    args = StepArguments(**job["args"])
    contender = make_contender("ours", args, Path(job["folder"]), make_networks(args))
    turn = contender(job["steps"])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": turn.seconds}), flush=True)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
