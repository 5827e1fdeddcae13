"""Shapes that loss functions share, and what two of them compute alike."""

from __future__ import annotations

import torch
from torch import Tensor

Logits = Tensor  # (B, K, H, W)
Labels = Tensor  # (B, H, W), int64, a class id at each pixel that counts
Mask = Tensor  # (B, H, W), bool, True where a pixel counts
Scalar = Tensor  # ()

NOWHERE = -1e9  # a logit of no probability, finite so that nothing beside it becomes NaN
CHANNEL_TEMPERATURE = 4.0  # of Shu et al. 2021


def masked_mean(values: Tensor, mask: Mask) -> Scalar:
    """Mean of values (B, H, W) over the True pixels of the mask; 0 where there is none.

    The count stays on the device: reading it would stop the stream at every step.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def channel_divergence(student: Tensor, teacher: Tensor, mask: Mask) -> Tensor:
    """T²·KL between the distributions over the mask that each channel makes; mean over channels.

    Args:
        student: maps or logits (B, C, H, W).
        teacher: of the same shape.
        mask: (B, H, W).

    Returns:
        A number an image, (B,); 0 where the mask is empty.

    Source: Shu et al. 2021, arXiv 2011.13256, T = 4.
    """
    log_p, log_q = (
        torch.where(mask.unsqueeze(1), maps / CHANNEL_TEMPERATURE, NOWHERE)
        .flatten(2)
        .log_softmax(dim=2)
        for maps in (student, teacher)
    )
    divergence = (log_q.exp() * (log_q - log_p)).sum(dim=2)
    return CHANNEL_TEMPERATURE**2 * divergence.mean(dim=1)
