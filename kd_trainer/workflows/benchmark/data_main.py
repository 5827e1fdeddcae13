"""The path of the data on one core: `benchmark.py data`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_trainer.fields import check_at_least, help_field
from kd_trainer.workflows.benchmark.data_growth import growth
from kd_trainer.workflows.benchmark.data_path import augmentation_times, decoding_times
from kd_trainer.workflows.benchmark.machine import machine
from kd_trainer.workflows.files import write_json


@dataclass
class DataPathArguments:
    """Settings of `benchmark.py data`."""

    image_size: int = help_field(640, "Side of the augmented pictures in pixels.")
    repeats: int = help_field(20, "Draws of each transform.")
    images: list[int] = help_field([100, 100_000], "Numbers of images of the growing folders.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        check_at_least("repeats", self.repeats, 1)
        for count in self.images:
            check_at_least("images", count, 1)


def run_data(args: DataPathArguments) -> dict[str, Any]:
    """Augmentation, decoding and growth; print and write the figures."""
    result = {
        "what": "data",
        "machine": machine(torch.device("cpu")),
        "work": vars(args),
        "augmentation": augmentation_times(args.image_size, args.repeats),
        "decoding": decoding_times(image_size=args.image_size),
        "growth": growth(args.images),
    }
    print(json.dumps(result, indent=1))
    if args.json is not None:
        write_json(Path(args.json), result)
    return result
