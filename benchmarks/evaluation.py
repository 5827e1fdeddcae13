"""Memory of an evaluation against the number of images: `benchmark.py evaluation`."""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.memory import added_mib, in_new_process
from benchmarks.timer import figures_table
from benchmarks.train import StepArguments, make_networks, trainer_arguments
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.trainer import DistillationTrainer

_SIDE, _BATCH, _ENCODER = 32, 20, "mobilenet_v2"  # what is kept of an image needs none of them


@dataclass
class EvaluationArguments:
    """Settings of `benchmark.py evaluation`."""

    images: list[int] = help_field([100, 1000, 10000], "Numbers of images.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        for count in self.images:
            check_at_least("images", count, 1)


def run_evaluation(args: EvaluationArguments) -> dict[str, Any]:
    """MiB beyond a first evaluation, each number of images in a new process."""
    growth = {str(count): in_new_process(_growth_mib, count) for count in args.images}
    print(f"\nMiB beyond a first evaluation:\n\n{figures_table({'images': growth})}")
    return {"growth_mib": growth}


def _growth_mib(images: int) -> float:
    args = StepArguments(image_size=_SIDE, teacher_encoder=_ENCODER, student_encoder=_ENCODER)
    student, teacher = make_networks(args)
    sample = {
        "pixel_values": torch.randint(256, (3, _SIDE, _SIDE), dtype=torch.uint8),
        "labels": torch.randint(2, (_SIDE, _SIDE), dtype=torch.uint8),
        "distil_mask": torch.ones(_SIDE, _SIDE, dtype=torch.bool),
    }
    with TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            student,
            trainer_arguments(args, output, per_device_eval_batch_size=_BATCH),
            teacher=teacher,
            eval_dataset=[sample] * images,
        )
        trainer.evaluate([sample] * 32)
        return added_mib(trainer.evaluate)
