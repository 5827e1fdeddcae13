"""The path of the data on one core: `benchmark.py data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_growth import growth
from benchmarks.data_path import augmentation_times, decoding_times
from benchmarks.machine import machine
from kd_trainer.console import markdown_table
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.files import write_json

_GROWTH = {"start": 2, "mib": 2, "map": 0, "stream": 0}
"""Figures of a folder, and their decimals."""


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
    print(text_of(result))
    if args.json is not None:
        write_json(Path(args.json), result)
    return result


def text_of(result: dict[str, Any]) -> str:
    """Tables of a measurement for the terminal."""
    augmentation, decoding = result["augmentation"], result["decoding"]
    draws = [
        [name, f"{own['probability']:.3f}", f"{own['library']:.2f}", f"{own['ours']:.2f}"]
        for name, own in augmentation["transforms"].items()
    ]
    whole = [f"{augmentation['list'][who]:.2f}" for who in ("library", "ours")]
    draws.append(["whole list, weighted", "", *whole])
    files = [
        [f"masks of {name}", *(f"{own[who]:.2f}" for who in ("pil", "ours", "ratio"))]
        for name, own in decoding.items()
        if name != "sample"
    ]
    growing = [
        [f"{int(count):,}", *(f"{own[k]:,.{n}f}" for k, n in _GROWTH.items())]
        for count, own in result["growth"].items()
        if count != "ratio"
    ]
    size = result["work"]["image_size"]
    samples = ", ".join(f"{name} {ms:.1f}" for name, ms in decoding["sample"].items())
    return "\n".join(
        [
            f"\n{result['machine']['about']}; milliseconds of processor time on one core",
            f"\nHeavy augmentation at {size} px:\n",
            markdown_table(["transform", "probability", "albumentations", "ours"], draws),
            "\nA JPEG of 640 x 480 and its mask from the disk:\n",
            markdown_table(["", "PIL through datasets", "ours", "times as fast"], files),
            f"\nA whole sample at {size} px, by augmentation: {samples}.",
            "\nFolders of growing size, 64 px:\n",
            markdown_table(["images", "start (s)", "MiB", "map-style/s", "stream/s"], growing),
        ]
    )
