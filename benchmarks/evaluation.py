"""Memory of an evaluation against the number of images: `benchmark.py evaluation`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import StepArguments
from benchmarks.contenders import make_networks, trainer_arguments
from benchmarks.machine import machine
from benchmarks.memory import high_water_mib, run_child
from kd_trainer.console import markdown_table
from kd_trainer.costs import reset_peak_memory
from kd_trainer.evaluation import input_statistics
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.files import write_json
from kd_trainer.teacher import Teacher
from kd_trainer.trainer import DistillationTrainer

MODULE = "benchmarks.evaluation"
WARM_UP = 32


@dataclass
class EvaluationArguments(StepArguments):
    """Settings of `benchmark.py evaluation`; memory does not look at what is on the pictures."""

    image_size: int = help_field(32, "Side of the square pictures in pixels.")
    batch_size: int = help_field(20, "Pictures at a time.")
    teacher_encoder: str = help_field("mobilenet_v2", "Encoder of the teacher.")
    student_encoder: str = help_field("mobilenet_v2", "Encoder of the student.")
    images: list[int] = help_field([100, 1000, 10000], "Numbers of images.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.images:
            check_at_least("images", count, 1)


class Noise(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As many pictures as wanted, each made when it is asked for."""

    def __init__(self, length: int, side: int) -> None:
        self.length, self.side = length, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample that is a function of its number."""
        draw = torch.Generator().manual_seed(index)
        shape = (self.side, self.side)
        return {
            "pixel_values": torch.randint(256, (3, *shape), generator=draw, dtype=torch.uint8),
            "labels": torch.randint(2, shape, generator=draw, dtype=torch.uint8),
            "distil_mask": torch.ones(shape, dtype=torch.bool),
        }


def run_evaluation(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate with the trainer, each number of images in a process of its own."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(StepArguments)}
    found = {n: run_child(MODULE, {"args": values, "images": n}) for n in args.images}
    result = {
        "what": "evaluation",
        "machine": machine(args.torch_device),
        "work": vars(args),
        "growth_mib": {str(n): one["growth_mib"] for n, one in found.items()},
        "peak_mib": {str(n): one["peak_mib"] for n, one in found.items()},
    }
    rows = [[f"{n:,}", f"{x['peak_mib']:.0f}", f"{x['growth_mib']:.1f}"] for n, x in found.items()]
    header = ["images", "peak MiB", "beyond the first evaluation, MiB"]
    print(markdown_table(header, rows))
    if args.json is not None:
        write_json(Path(args.json), result)
    return result


def _child(job: dict[str, Any]) -> dict[str, float]:
    args = StepArguments(**job["args"])
    networks = make_networks(args)
    mean, std = input_statistics(networks.student)
    teacher = Teacher(
        networks.teacher, num_labels=2, mean=mean, std=std, input_mean=mean, input_std=std
    )
    with TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            networks.student,
            trainer_arguments(args, output, per_device_eval_batch_size=args.batch_size),
            teacher=teacher,
            eval_dataset=Noise(job["images"], args.image_size),
        )
        trainer.evaluate(Noise(WARM_UP, args.image_size))
        reset_peak_memory()
        before = high_water_mib()
        trainer.evaluate()
        peak = high_water_mib()
    return {"peak_mib": peak, "growth_mib": peak - before}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
