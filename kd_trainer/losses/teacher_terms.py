"""The loss functions that compare the student's logits with the teacher's.

All are pure. Those called `binary` are for one logit a pixel (K = 1, read through a sigmoid), those
called `softmax` or `centred` for K >= 2 channels, the others for both. The mask is that of the
pixels on which student and teacher are compared; what the teacher's logits hold elsewhere has no
influence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_trainer.losses.pixels import (
    NOWHERE,
    Labels,
    Logits,
    Mask,
    Scalar,
    channel_divergence,
    masked_mean,
)

NON_TARGET = 8.0  # β of Zhao et al. 2022
# Of the boundary: β, and how far from it a pixel still counts more.
BOUNDARY_WEIGHT, BOUNDARY_PIXELS = 4.0, 3


def binary_kl(student: Logits, teacher: Logits, mask: Mask, temperature: float) -> Scalar:
    """KL(teacher || student) of each pixel's Bernoulli distribution, softened by `temperature`.

    The softmax form is identically zero on one channel, so one-logit maps need this one. Its
    gradient is T·(σ(s/T) − σ(t/T)) / |V|, and for high T it tends to (s − t)²/8. Times T².

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; per label as in arXiv 2308.06453.
    """
    return temperature**2 * masked_mean(_binary_divergence(student, teacher, temperature), mask)


def _binary_divergence(student: Logits, teacher: Logits, temperature: float) -> Tensor:
    """KL of each pixel's Bernoulli distribution, (B, H, W)."""
    softened = teacher / temperature
    target = torch.sigmoid(softened)
    cross = F.binary_cross_entropy_with_logits(student / temperature, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(softened, target, reduction="none")
    return (cross - entropy).squeeze(1)


def softmax_kl(student: Logits, teacher: Logits, mask: Mask, temperature: float) -> Scalar:
    """KL(teacher || student) of each pixel's class distribution, softened by `temperature`.

    A mean over pixels times T², not `batchmean`, which grows with the area of the image.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    return temperature**2 * masked_mean(_softmax_divergence(student, teacher, temperature), mask)


def _softmax_divergence(student: Logits, teacher: Logits, temperature: float) -> Tensor:
    """KL of each pixel's distribution over the classes, (B, H, W)."""
    log_q = F.log_softmax(teacher / temperature, dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def binary_mse(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """Mean over the pixels of the mask of the squared difference of the logits.

    Source: Ba & Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919.
    """
    return masked_mean((student - teacher).square().squeeze(1), mask)


def centred_mse(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """Mean over pixels of the mask and channels of the squared difference of centred logits.

    A softmax does not see a constant added to all channels of a pixel. Subtracting each pixel's
    channel mean keeps the student from spending capacity on copying the teacher's constant.

    Source: Ba & Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919.
    """
    difference = student - teacher
    centred = difference - difference.mean(dim=1, keepdim=True)
    return masked_mean(centred.square().mean(dim=1), mask)


def channel_kl(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """KL between the distributions over pixels that a channel's logits make, mean over channels.

    T²/(B·K) Σ KL(softmax over pixels of t/T || the same of s/T), T = 4, over the images with pixels
    that count. It sees where a class is and not how sure: a constant on a whole channel changes
    nothing, so one-logit students need a KL or BCE beside it.

    Source: Shu et al. 2021, arXiv 2011.13256.
    """
    return _mean_of_images(channel_divergence(student, teacher, mask), mask)


def binary_intra(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """1 − Pearson's correlation of both probability maps over the pixels of an image.

    Mean over the images with pixels that count.

    Source: Huang et al. 2022, arXiv 2205.10536.
    """
    return _one_minus_correlation(student.sigmoid(), teacher.sigmoid(), mask)


def softmax_intra(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """The same of each class, mean over classes and images."""
    return _one_minus_correlation(student.softmax(dim=1), teacher.softmax(dim=1), mask)


def softmax_inter(student: Logits, teacher: Logits, mask: Mask) -> Scalar:
    """1 − Pearson's correlation of both probabilities over the classes, mean over the pixels.

    Source: Huang et al. 2022, arXiv 2205.10536.
    """
    mean = 1 / student.shape[1]  # of K probabilities
    centred_p, centred_q = (F.softmax(z, dim=1) - mean for z in (student, teacher))
    similarity = F.cosine_similarity(centred_p, centred_q, dim=1, eps=_CONSTANT)
    return masked_mean(1 - similarity, mask)


def decoupled_kl(
    student: Logits,
    teacher: Logits,
    labels: Labels,
    mask: Mask,
    *,
    valid: Mask,
    temperature: float,
) -> Scalar:
    """KL of label against the rest, plus 8 times the KL among the rest; T² times mean over pixels.

    Where a pixel has no label, the teacher's class is taken for it.

    Args:
        student: logits (B, K, H, W), K >= 3.
        teacher: the same shape.
        labels: class ids where valid.
        mask: the pixels that are compared.
        valid: those with a label.
        temperature: > 0.

    Source: Zhao et al. 2022, arXiv 2203.08679, equation 7.
    """
    target = _classes(teacher, labels, mask, valid).unsqueeze(1)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, target, True)
    parts = []
    for logits in (student, teacher):
        log_all = F.log_softmax(torch.where(mask.unsqueeze(1), logits, 0.0) / temperature, dim=1)
        others = torch.where(is_target, NOWHERE, log_all)
        log_rest = others.logsumexp(dim=1, keepdim=True)
        parts.append((torch.cat([log_all.gather(1, target), log_rest], 1), others - log_rest))
    (pair_p, rest_p), (pair_q, rest_q) = parts
    of_target = (pair_q.exp() * (pair_q - pair_p)).sum(dim=1)
    of_rest = torch.where(is_target, 0.0, rest_q.exp() * (rest_q - rest_p)).sum(dim=1)
    return temperature**2 * masked_mean(of_target + NON_TARGET * of_rest, mask)


def binary_boundary_kl(
    student: Logits,
    teacher: Logits,
    labels: Labels,
    mask: Mask,
    *,
    valid: Mask,
    temperature: float,
) -> Scalar:
    """The KL with 5 times the weight within 3 pixels of a boundary, divided by the weights' sum.

    The boundary is that of the labels, and of the teacher's classes where a pixel has no label.

    Args:
        student: logits (B, 1, H, W).
        teacher: the same shape.
        labels: 0 or 1 where valid.
        mask: the pixels that are compared.
        valid: those with a label.
        temperature: > 0.

    Source: after Liu et al. 2023, arXiv 2306.08075.
    """
    classes = _classes(teacher, labels, mask, valid)
    divergence = _binary_divergence(student, teacher, temperature)
    return temperature**2 * _boundary_mean(divergence, classes, student.shape[1], mask)


def softmax_boundary_kl(
    student: Logits,
    teacher: Logits,
    labels: Labels,
    mask: Mask,
    *,
    valid: Mask,
    temperature: float,
) -> Scalar:
    """The same of the softmax: a boundary lies between any two classes."""
    classes = _classes(teacher, labels, mask, valid)
    divergence = _softmax_divergence(student, teacher, temperature)
    return temperature**2 * _boundary_mean(divergence, classes, student.shape[1], mask)


_CONSTANT = 1e-8  # least length of a map: one without any contrast correlates with nothing


def _mean_of_images(values: Tensor, mask: Mask) -> Scalar:
    """Mean of values (B,) over the images with pixels that count; 0 without any. No host sync."""
    counted = mask.flatten(1).any(dim=1)
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def _one_minus_correlation(student: Tensor, teacher: Tensor, mask: Mask) -> Scalar:
    """Of maps (B, K, H, W) over the pixels of the mask, mean over K, then over images."""
    inside = mask.unsqueeze(1).flatten(2)
    pixels = inside.sum(dim=2, keepdim=True).clamp(min=1)

    def centred(maps: Tensor) -> Tensor:
        kept = torch.where(inside, maps.flatten(2), 0.0)
        return torch.where(inside, kept - kept.sum(dim=2, keepdim=True) / pixels, 0.0)

    similarity = F.cosine_similarity(centred(student), centred(teacher), dim=2, eps=_CONSTANT)
    return _mean_of_images((1 - similarity).mean(dim=1), mask)


def _classes(teacher: Logits, labels: Labels, mask: Mask, valid: Mask) -> Tensor:
    """Class ids (B, H, W): the labels, and where there is none the teacher's; 0 off the mask."""
    several = teacher.shape[1] > 1
    found = teacher.argmax(dim=1) if several else (teacher.squeeze(1) > 0).long()
    return torch.where(mask, torch.where(valid, labels, found), 0)


def _boundary_mean(values: Tensor, classes: Tensor, channels: int, mask: Mask) -> Scalar:
    """Mean of values (B, H, W) weighted by 1, and 1 + β where another class is within the radius.

    Pixels off the mask are of no class. Dilation and erosion are a maximum and a minimum.
    """
    side, around = 2 * BOUNDARY_PIXELS + 1, BOUNDARY_PIXELS
    ids = classes.to(values.dtype)
    highest = F.max_pool2d(torch.where(mask, ids, -1.0), side, stride=1, padding=around)
    lowest = -F.max_pool2d(-torch.where(mask, ids, channels + 1.0), side, stride=1, padding=around)
    weights = torch.where(mask, 1 + BOUNDARY_WEIGHT * (highest != lowest), 0.0)
    return torch.where(mask, weights * values, 0.0).sum() / weights.sum().clamp(min=1)
