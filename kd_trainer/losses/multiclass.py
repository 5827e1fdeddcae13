"""Terms of a model with K >= 2 logits per pixel, through a softmax over the channels.

All functions take logits (B, K, H, W) in fp32 or float64, the student's finite outside the
mask as well (`distillation_terms` sees to both), and a bool mask (B, H, W) of what counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_trainer.losses.pixels import masked_mean


def softmax_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each pixel's class distribution, softened by `temperature`.

    Args:
        student: logits (B, K, H, W).
        teacher: logits of the same shape, without gradient.
        mask: bool (B, H, W), the pixels that count.
        temperature: > 0; 1 leaves the logits as they are.

    Returns:
        Mean over the pixels of the mask (not `batchmean`, which grows with the picture's area),
        in nats, times temperature squared.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    log_q = F.log_softmax(teacher / temperature, dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(dim=1)
    return temperature**2 * masked_mean(divergence, mask)


def centred_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over pixels of the mask and channels of the squared difference of centred logits.

    A softmax does not see a constant added to all channels of a pixel. Subtracting each pixel's
    channel mean keeps the student from spending capacity on copying the teacher's constant.

    Args:
        student: logits (B, K, H, W).
        teacher: logits of the same shape, without gradient.
        mask: bool (B, H, W), the pixels that count.

    Source: Ba & Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919.
    """
    difference = student - teacher
    centred = difference - difference.mean(dim=1, keepdim=True)
    return masked_mean(centred.square().mean(dim=1), mask)


def softmax_cross_entropy(student: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of the softmax with class ids, mean over the pixels of the mask, in nats.

    Args:
        student: logits (B, K, H, W).
        labels: int64 (B, H, W), 0..K-1 inside the mask.
        mask: bool (B, H, W), the pixels that count.
    """
    target = torch.where(mask, labels, 0).unsqueeze(1)
    log_p = F.log_softmax(student, dim=1).gather(1, target)
    return masked_mean(-log_p.squeeze(1), mask)
