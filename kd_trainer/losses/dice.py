"""Soft Dice, computed for each picture alone and then averaged over the pictures.

One ratio over a whole batch would not add up over micro-batches and processes, so accumulating
gradients would train something else than one large batch.

Source: Milletari et al. 2016, arXiv 1606.04797.
"""

import torch
from torch import Tensor

from kd_trainer.losses.binary import binary_target

# Keeps 0/0 apart: a picture without foreground (or without valid pixels) that is predicted empty
# has loss 0. In pixels, so it fades where objects are large.
EPSILON = 1.0


def binary_dice(student: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """1 − Dice of the foreground's probability, mean over pictures.

    Args:
        student: logits (B, 1, H, W), finite outside the mask as well.
        labels: int64 (B, H, W), 0 or 1 inside the mask.
        mask: bool (B, H, W), the pixels that count; a picture without any gives 0.
    """
    target = binary_target(labels, mask, student.dtype)
    probability = torch.where(mask, torch.sigmoid(student.squeeze(1)), 0.0)
    return _one_minus_dice(probability, target).mean()


def softmax_dice(student: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """1 − Dice, mean over the classes each picture shows, then over the pictures.

    A class that a picture does not show is left out there: its Dice would only count false
    alarms, at ε's mercy.

    Args:
        student: logits (B, K, H, W), finite outside the mask as well.
        labels: int64 (B, H, W), 0..K-1 inside the mask.
        mask: bool (B, H, W), the pixels that count; a picture without any gives 0.
    """
    inside = mask.unsqueeze(1)
    probability = torch.where(inside, torch.softmax(student, dim=1), 0.0)
    ids = torch.where(mask, labels, 0).unsqueeze(1)
    target = torch.zeros_like(probability).scatter(1, ids, inside.to(probability.dtype))
    present = target.flatten(2).any(dim=2)
    per_class = torch.where(present, _one_minus_dice(probability, target), 0.0)
    return (per_class.sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()


def _one_minus_dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 − (2·overlap + ε)/(both areas + ε), summed over the last two dimensions."""
    overlap = (probability * target).sum(dim=(-2, -1))
    areas = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1.0 - (2.0 * overlap + EPSILON) / (areas + EPSILON)
