"""Settings of the measurements of training steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kd_trainer.arguments import AUGMENTATIONS
from kd_trainer.fields import check_at_least, check_choice, help_field

CONTENDERS = ("plain", "student", "ours", "cached")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class StepArguments:
    """What a step is measured on; the defaults are those of the published table."""

    image_size: int = help_field(256, "Side of the square pictures in pixels.")
    batch_size: int = help_field(4, "Pictures of a step.")
    teacher_encoder: str = help_field("timm-efficientnet-b3", "Encoder of the teacher.")
    student_encoder: str = help_field("timm-efficientnet-b0", "Encoder of the student.")
    free_units: int | None = help_field(
        None, "Encoder units of the student that are trained: 0 is the decoder alone, default all."
    )
    augmentation: str = help_field(
        "heavy", "heavy, seed, light or none; the plain loop has heavy only."
    )
    dataset: str | None = help_field(
        None, "Pair folder to read (<split>/images, <split>/masks); default: drawn for this run."
    )
    train_split: str = help_field("train", "Split of that folder.")
    mixed_precision: str = help_field("bf16", "Of the student alone and of ours: bf16, fp16 or no.")
    workers: int = help_field(0, "Processes that read the data, for each contender.")
    device: str = help_field("auto", "cpu, cuda, or auto: the GPU where there is one.")
    compile: bool = help_field(False, "Compile our students, and the teacher of ours.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("workers", self.workers, 0)
        check_choice("device", self.device, DEVICES)
        check_choice("mixed_precision", self.mixed_precision, ("bf16", "fp16", "no"))
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("Expected a GPU with --device cuda, got none. Leave --device out.")

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means here."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass
class TrainArguments(StepArguments):
    """Settings of `benchmark.py train`."""

    steps: int = help_field(10, "Measured steps of each contender in each pair.")
    pairs: int = help_field(5, "How often each contender has its turn.")
    contenders: list[str] = help_field(
        list(CONTENDERS),
        "Who takes part: plain, student, ours, cached (ours with cached targets); all.",
    )
    memory: bool = help_field(True, "Measure the peak memory of each in a process of its own.")
    json: str | None = help_field(None, "File that gets everything that was measured.")
    profile: str | None = help_field(None, "Folder that gets a trace of two steps of ours.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("steps", self.steps, 1)
        check_at_least("pairs", self.pairs, 1)
        for name in self.contenders:
            check_choice("contenders", name, CONTENDERS)
