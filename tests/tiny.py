"""Small data and networks that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_trainer.arguments import DistillationArguments
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher

SIDE = 32
BINARY = {0: "background", 1: "person"}


class Squares(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Bright squares on noise; the mask is the square. Each sample is a function of its index."""

    def __init__(self, length: int, *, num_labels: int = 2, offset: int = 0) -> None:
        self.length = length
        self.num_labels = num_labels
        self.offset = offset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        random = torch.Generator().manual_seed(1000 + self.offset + index)
        pixels = torch.randint(0, 120, (3, SIDE, SIDE), generator=random, dtype=torch.uint8)
        top, left = torch.randint(0, SIDE // 2, (2,), generator=random).tolist()
        label = 1 + index % (self.num_labels - 1)
        labels = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        area = (slice(top, top + SIDE // 2), slice(left, left + SIDE // 2))
        labels[area] = label
        pixels[label % 3, area[0], area[1]] += 120
        return {
            "pixel_values": pixels,
            "labels": labels,
            "distil_mask": torch.ones(SIDE, SIDE, dtype=torch.bool),
        }


def tiny_student(
    encoder: str = "resnet18",
    *,
    id2label: dict[int, str] | None = None,
    norm: bool = True,
    seed: int = 0,
) -> SmpForSemanticSegmentation:
    """A student with a narrow decoder; `norm=False` takes every BatchNorm out."""
    torch.manual_seed(seed)
    depth = 3
    student = SmpForSemanticSegmentation.create(
        "unet",
        encoder,
        encoder_weights="none",
        id2label=id2label or BINARY,
        image_size=SIDE,
        encoder_depth=depth,
        decoder_channels=(16, 8, 8),
        decoder_use_norm="batchnorm" if norm else False,
    )
    if not norm:
        _drop_norms(student)
        left = {name for name, _ in student.named_parameters()}
        student._never_used = student.never_used_parameters() & left
    return student


def _drop_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            _drop_norms(child)


def tiny_teacher(*, num_labels: int = 2, seed: int = 7) -> Teacher:
    """A frozen network of random weights."""
    labels = BINARY if num_labels == 2 else {i: f"class_{i}" for i in range(num_labels)}
    network = tiny_student(id2label=labels, seed=seed)
    config = network.config
    return Teacher(
        network,
        num_labels=num_labels,
        mean=config.image_mean,
        std=config.image_std,
        input_mean=config.image_mean,
        input_std=config.image_std,
    )


def arguments(output_dir: Path, **options: Any) -> DistillationArguments:
    """Arguments of a short run on the CPU that frees everything at once and writes little."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "unfreeze_start_epoch": 0,
        "unfreeze_every": 0,
        "warmup_epochs": 0,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "panel_images": 0,
    }
    return DistillationArguments(**(settings | options))
