"""Terms of a model with one logit per pixel: foreground or not, through a sigmoid.

All functions take logits (B, 1, H, W) in fp32 or float64, the student's finite outside the
mask as well (`distillation_terms` sees to both), and a bool mask (B, H, W) of what counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_trainer.losses.pixels import masked_mean


def binary_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each pixel's Bernoulli distribution, softened by `temperature`.

    The softmax form is identically zero on one channel, so one-logit maps need this one.
    Its gradient is T·(σ(s/T) − σ(t/T)) / |V|, and for high T it tends to (s − t)²/8.

    Args:
        student: logits (B, 1, H, W).
        teacher: logits of the same shape, without gradient.
        mask: bool (B, H, W), the pixels that count.
        temperature: > 0; 1 leaves the logits as they are.

    Returns:
        Mean over the pixels of the mask, in nats, times temperature squared.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; per label as in arXiv 2308.06453.
    """
    softened = teacher / temperature
    target = torch.sigmoid(softened)
    cross = F.binary_cross_entropy_with_logits(student / temperature, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(softened, target, reduction="none")
    return temperature**2 * masked_mean((cross - entropy).squeeze(1), mask)


def binary_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pixels of the mask of the squared difference of the logits.

    Args:
        student: logits (B, 1, H, W).
        teacher: logits of the same shape, without gradient.
        mask: bool (B, H, W), the pixels that count.

    Source: Ba & Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919.
    """
    return masked_mean((student - teacher).square().squeeze(1), mask)


def binary_cross_entropy(
    student: Tensor, labels: Tensor, mask: Tensor, pos_weight: float | None = None
) -> Tensor:
    """Cross entropy of the sigmoid with 0/1 labels, mean over the pixels of the mask, in nats.

    Args:
        student: logits (B, 1, H, W).
        labels: int64 (B, H, W), 0 or 1 inside the mask.
        mask: bool (B, H, W), the pixels that count.
        pos_weight: factor on the foreground's part; the mean still divides by the pixel count.
    """
    target = binary_target(labels, mask, student.dtype)
    # Filled on the device: a tensor made from a Python list would be copied there at each step.
    weight = None if pos_weight is None else student.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(
        student.squeeze(1), target, pos_weight=weight, reduction="none"
    )
    return masked_mean(loss, mask)


def binary_target(labels: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels (B, H, W) as 0.0 and 1.0, with 0.0 outside the mask.

    Looked up rather than cast: a class id of 2 then fails on every device, without a host sync,
    where a cast would train towards a probability of two.
    """
    table = torch.arange(2, dtype=dtype, device=labels.device)
    return table.gather(0, torch.where(mask, labels, 0).flatten()).view(labels.shape)
