"""Peak memory of a training step, each contender in a process of its own.

The peak of a process never falls, and what one contender has freed the next one finds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.arguments import StepArguments
from benchmarks.contenders import make_contender, make_networks
from kd_trainer.costs import peak_memory_mib, reset_peak_memory

STEPS = 2
MODULE = "benchmarks.memory"


def measure_memory(name: str, args: StepArguments, folder: Path) -> dict[str, float]:
    """Start a process that trains for two steps.

    Returns:
        `peak_mib` of the process (on a GPU: of its memory) and `training_mib`, the part of it
        that networks, optimizer, data and the steps have added to the imported libraries.
    """
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(StepArguments)}
    job = {"name": name, "folder": str(folder), "args": values}
    return run_child(MODULE, job)


def high_water_mib() -> float:
    """Most memory since the last reset: of the GPU, else resident in this process.

    Not from `getrusage`, whose figure a process takes over from the one that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_memory_mib()
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


ROOT = Path(__file__).resolve().parents[1]  # benchmarks are not installed


def run_child(module: str, job: dict[str, Any], *launcher: str) -> dict[str, Any]:
    """Run a module of ours with a job as JSON, and read the JSON of its last line.

    Raises:
        RuntimeError: with what it printed, if it fails.
    """
    command = [sys.executable, *launcher, "-m", module, json.dumps(job)]
    found_from = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"PYTHONPATH": found_from.rstrip(os.pathsep)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError(f"The measurement {module} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _child(job: dict[str, Any]) -> dict[str, float]:
    args = StepArguments(**job["args"])
    reset_peak_memory()
    before = high_water_mib()
    networks = make_networks(args)
    with TemporaryDirectory() as cache:
        folder = Path(job["folder"])
        contender = make_contender(job["name"], args, folder, networks, cache=Path(cache))
        del networks
        reset_peak_memory()
        contender(STEPS)
    peak = high_water_mib()
    return {"peak_mib": peak, "training_mib": peak - before}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
