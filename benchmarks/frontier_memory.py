"""Peak memory of one picture and of one training step, each network in a process of its own.

Random weights need as much memory as trained ones. Run as a module it prints the published table:
`python -m benchmarks.frontier_memory`.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.memory import high_water_mib, run_child
from kd_trainer.costs import reset_peak_memory
from kd_trainer.models.modeling import SmpForSemanticSegmentation

MODULE = "benchmarks.frontier_memory"
WORK = ("inference", "training")
LIGHT = [64, 48, 32, 16, 8]
MODELS: dict[str, dict[str, Any]] = {
    "teacher, B3": {"encoder": "timm-efficientnet-b3"},
    "B0, the recipe's U-Net": {"encoder": "timm-efficientnet-b0"},
    "B0, light U-Net": {"encoder": "timm-efficientnet-b0", "decoder_channels": LIGHT},
}
_STEPS = 2  # the second one has the optimizer's state and every gradient at once


def peak_memory(options: dict[str, Any], work: str, *, side: int) -> float:
    """MiB that a network's work adds to the imported libraries, in a new process on the CPU.

    Args:
        options: of `SmpForSemanticSegmentation.create`, architecture U-Net.
        work: `inference` (one picture) or `training` (steps of one picture in fp32: forward,
            backward, AdamW over all parameters).
        side: pixels of the square picture.
    """
    job = {"options": options, "work": work, "side": side}
    return float(run_child(MODULE, job)["peak_mib"])


def memory_table(*, side: int = 640, repeats: int = 9) -> dict[str, Any]:
    """Medians of each network and work, and their share of the first network's.

    Returns:
        `side`, `batch_size`, `device`, `repeats`, `torch`, and in `models` for each name `mib` and
        `share` by work.
    """
    mib = {
        name: {
            work: median(peak_memory(options, work, side=side) for _ in range(repeats))
            for work in WORK
        }
        for name, options in MODELS.items()
    }
    first = next(iter(mib.values()))
    rows = {
        name: {"mib": own, "share": {work: own[work] / first[work] for work in WORK}}
        for name, own in mib.items()
    }
    about = {"side": side, "batch_size": 1, "device": "cpu", "repeats": repeats}
    return {**about, "torch": torch.__version__, "models": rows}


def _child(job: dict[str, Any]) -> dict[str, float]:
    pixels, side = torch.randn(1, 3, 8, 8), job["side"]
    nn.Conv2d(3, 8, 3)(pixels).sum().backward()  # what torch itself loads at its first use
    reset_peak_memory()
    before = high_water_mib()
    network = SmpForSemanticSegmentation.create(
        "unet", encoder_weights="none", image_size=side, **job["options"]
    ).eval()
    pixels = torch.randn(1, 3, side, side)
    if job["work"] == "inference":
        with torch.inference_mode():
            network(pixels)
    else:
        _train(network.train(), pixels)
    return {"peak_mib": high_water_mib() - before}


def _train(network: nn.Module, pixels: torch.Tensor) -> None:
    mask = torch.zeros(pixels.shape[0], 1, *pixels.shape[2:])
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(_STEPS):
        logits = network(pixels).raw_logits
        nn.functional.binary_cross_entropy_with_logits(logits, mask).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1]) if len(sys.argv) > 1 else None
    print(json.dumps(memory_table(), indent=1) if asked is None else json.dumps(_child(asked)))
