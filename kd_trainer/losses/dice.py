"""Soft Dice, computed for each picture alone and then averaged over those with valid pixels.

One ratio over a whole batch would not add up over micro-batches and processes, so accumulating
gradients would train something else than one large batch. Nor would the mean over the labelled
pictures of a micro-batch, where their number differs; so the caller can say how many there are.

Source: Milletari et al. 2016, arXiv 1606.04797.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_trainer.losses.binary import binary_target

# Keeps 0/0 apart: a picture without foreground that is predicted empty has loss 0. In pixels, so it
# fades where objects are large.
EPSILON = 1.0


def labelled_images(batches: Iterable[Mapping[str, Any]], ignore_index: int) -> Tensor:
    """Mean number of images with a pixel that counts in these micro-batches, fp32, on their device.

    As `images` of the functions below, in each of the micro-batches, it makes their mean the mean
    over all labelled images. Averaged over processes, it does so for what DDP averages.
    """
    counts = [(batch["labels"] != ignore_index).flatten(1).any(dim=1).sum() for batch in batches]
    return torch.stack(counts).float().mean()


def binary_dice(
    student: Tensor, labels: Tensor, mask: Tensor, images: Tensor | None = None
) -> Tensor:
    """1 − Dice of the foreground's probability, mean over the pictures with valid pixels.

    Args:
        student: logits (B, 1, H, W), finite outside the mask as well.
        labels: int64 (B, H, W), 0 or 1 inside the mask.
        mask: bool (B, H, W), the pixels that count.
        images: divide by this number instead of that of the pictures with valid pixels.
    """
    target = binary_target(labels, mask, student.dtype)
    probability = torch.where(mask, torch.sigmoid(student.squeeze(1)), 0.0)
    return _image_mean(_one_minus_dice(probability, target), mask, images)


def softmax_dice(
    student: Tensor, labels: Tensor, mask: Tensor, images: Tensor | None = None
) -> Tensor:
    """1 − Dice, mean over the classes each picture shows, then over the pictures.

    A class that a picture does not show is left out there: its Dice would only count false
    alarms, at ε's mercy.

    Args:
        student: logits (B, K, H, W), finite outside the mask as well.
        labels: int64 (B, H, W), 0..K-1 inside the mask.
        mask: bool (B, H, W), the pixels that count; pictures without any are left out.
        images: divide by this number instead of that of the pictures with valid pixels.
    """
    inside = mask.unsqueeze(1)
    probability = torch.where(inside, torch.softmax(student, dim=1), 0.0)
    ids = torch.where(mask, labels, 0).unsqueeze(1)
    target = torch.zeros_like(probability).scatter(1, ids, inside.to(probability.dtype))
    present = target.flatten(2).any(dim=2)
    per_class = torch.where(present, _one_minus_dice(probability, target), 0.0)
    return _image_mean(per_class.sum(dim=1) / present.sum(dim=1).clamp(min=1), mask, images)


def _image_mean(values: Tensor, mask: Tensor, images: Tensor | None) -> Tensor:
    """Mean of values (B,) over the pictures with valid pixels; 0 without any. No host sync."""
    counted = mask.flatten(1).any(dim=1)
    images = counted.sum() if images is None else images
    # Below one where most micro-batches have no labelled picture: only 0 is to be avoided.
    return torch.where(counted, values, 0.0).sum() / images.to(values.dtype).clamp(min=1e-6)


def _one_minus_dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 − (2·overlap + ε)/(both areas + ε), summed over the last two dimensions."""
    overlap = (probability * target).sum(dim=(-2, -1))
    areas = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1.0 - (2.0 * overlap + EPSILON) / (areas + EPSILON)
