"""Shapes that loss functions share, and the mean over the pixels that count."""

from __future__ import annotations

import torch
from torch import Tensor

Logits = Tensor  # (B, K, H, W)
Labels = Tensor  # (B, H, W), int64, a class id at each pixel that counts
Mask = Tensor  # (B, H, W), bool, True where a pixel counts
Scalar = Tensor  # ()


def masked_mean(values: Tensor, mask: Mask) -> Scalar:
    """Mean of values (B, H, W) over the True pixels of the mask; 0 where there is none.

    The count stays on the device: reading it would stop the stream at every step.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
