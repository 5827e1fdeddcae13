"""Peak memory of a training step, each contender in a process of its own.

The peak of a process never falls, and what one contender has freed the next one finds.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kd_trainer.workflows.benchmark.arguments import StepArguments
from kd_trainer.workflows.benchmark.contenders import make_contender, make_networks
from kd_trainer.workflows.compare.runs import reset_peak_memory
from kd_trainer.workflows.train import peak_memory_mib

STEPS = 2


def measure_memory(name: str, args: StepArguments, folder: Path) -> dict[str, float]:
    """Start a process that trains for two steps.

    Returns:
        `peak_mib` of the process (on a GPU: of its memory) and `training_mib`, the part of it
        that networks, optimizer, data and the steps have added to the imported libraries.
    """
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(StepArguments)}
    job = {"name": name, "folder": str(folder), "args": values}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The measurement of the memory of {name} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(job: dict[str, Any]) -> dict[str, float]:
    args = StepArguments(**job["args"])
    reset_peak_memory()
    before = peak_memory_mib() if args.torch_device.type == "cpu" else 0.0
    networks = make_networks(args)
    reset_peak_memory()
    contender = make_contender(job["name"], args, Path(job["folder"]), networks)
    del networks
    contender(STEPS)
    if args.torch_device.type == "cuda":
        torch.cuda.synchronize()
    peak = peak_memory_mib()
    return {"peak_mib": peak, "training_mib": peak - before}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
