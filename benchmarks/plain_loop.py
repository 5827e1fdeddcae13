"""The loop to compare with: distillation as it is written on an afternoon.

fp32, contiguous, the teacher like the student, `.item()` on every loss, plain AdamW, PIL, and the
albumentations list with its own fog and its Normalize on the CPU. It shares no code with the
trainer, so that a mistake there is none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import albumentations as A
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

TEMPERATURE = 4.0


def stock_list(image_size: int) -> Any:
    """Resize, the heavy list as it is written down, of the library alone, and Normalize to floats.

    Args:
        image_size: side of the square result in pixels.

    Returns:
        An `A.Compose` to call with `image` uint8 (H, W, 3) and `mask` (H, W).
    """
    flare = max(1, round(0.3 * image_size))
    return A.Compose(
        [
            A.Resize(image_size, image_size),
            A.HorizontalFlip(p=0.5),
            A.OneOf(
                [A.ColorJitter(0.2, 0.2, 0.2, 0.1), A.HueSaturationValue(), A.RGBShift()], p=0.8
            ),
            A.OneOf([A.RandomBrightnessContrast(), A.CLAHE(), A.RandomGamma()], p=0.8),
            A.OneOf([A.RandomRain(), A.RandomFog(), A.RandomSunFlare(src_radius=flare)], p=0.1),
            A.OneOf([A.MotionBlur(), A.GaussianBlur(), A.MedianBlur()], p=0.05),
            A.OneOf([A.GaussNoise(std_range=(0.02, 0.08)), A.ISONoise()], p=0.05),
            A.OneOf(
                [A.ImageCompression(quality_range=(40, 95)), A.Downscale(scale_range=(0.4, 0.9))],
                p=0.1,
            ),
            A.Normalize(),
        ]
    )


class PlainDataset(Dataset[tuple[Tensor, Tensor]]):
    """Decodes with PIL, changes with albumentations, normalises on the CPU.

    Args:
        files: paths of image and mask of each sample.
        image_size: side of the samples in pixels.
    """

    def __init__(self, files: Sequence[tuple[str, str]], image_size: int) -> None:
        self.files = files
        self.transform = stock_list(image_size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A normalised image float (3, S, S) and its mask float (1, S, S)."""
        image_path, mask_path = self.files[index]
        image = np.array(Image.open(image_path).convert("RGB"))
        mask = np.array(Image.open(mask_path).convert("L"))
        changed = self.transform(image=image, mask=mask)
        pixels = torch.from_numpy(changed["image"].transpose(2, 0, 1).copy())
        target = torch.from_numpy((changed["mask"] > 127).astype(np.float32))[None]
        return pixels, target


class PlainLoop:
    """Trains a student on what a data set gives.

    Args:
        student: with `raw_logits` in its output.
        teacher: likewise, frozen here.
        dataset: images and masks, at least a batch.
        batch_size: images of a step.
        device: to train on.
        workers: processes that read.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.student = student.to(device).train()
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        loader = DataLoader(
            dataset, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True
        )
        self.batches = chain.from_iterable(repeat(loader))
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=1e-4)
        self.device = device

    def step(self) -> list[float]:
        """Train on the next batch; gives the loss and its terms."""
        images, masks = (tensor.to(self.device) for tensor in next(self.batches))
        self.optimizer.zero_grad()
        with torch.no_grad():
            teacher = self.teacher(images)["raw_logits"]
        student = self.student(images)["raw_logits"]
        target = torch.sigmoid(teacher / TEMPERATURE)
        soft = F.binary_cross_entropy_with_logits(student / TEMPERATURE, target)
        least = F.binary_cross_entropy_with_logits(teacher / TEMPERATURE, target)
        kl = (soft - least) * TEMPERATURE**2
        mse = F.mse_loss(student, teacher)
        bce = F.binary_cross_entropy_with_logits(student, masks)
        probability = torch.sigmoid(student)
        overlap = (probability * masks).sum(dim=(1, 2, 3))
        areas = probability.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
        dice = (1 - (2 * overlap + 1) / (areas + 1)).mean()
        loss = 0.3 * kl + 0.5 * mse + 0.5 * bce + dice
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.step()
        return [term.item() for term in (loss, kl, mse, bce, dice)]
