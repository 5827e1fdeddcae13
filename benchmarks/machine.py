"""What was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from kd_trainer.arguments import usable_processors

_BUSY = 1.5  # processes a core that want to run, beside which wall-clock figures mean little


def machine(device: torch.device) -> dict[str, Any]:
    """Device, cores, threads, load at this moment and versions."""
    load = os.getloadavg()[0]
    cores = usable_processors()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    busy = load > _BUSY * cores
    about = f"{name}, {cores} cores, {torch.get_num_threads()} threads"
    if busy:
        about += f"; BUSY (load {load:.1f}): compare processor seconds rather than seconds"
    return {
        "about": about,
        "device": str(device),
        "name": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": load,
        "busy": busy,
        "torch": version("torch"),
    }
