"""The terms of the loss as pure functions of logits, for one logit a pixel and for classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def working_precision(logits: Tensor) -> Tensor:
    """Logits as fp32, whatever the network ran in; float64 stays, so that gradients can be checked.

    Half precision holds neither the sum over a 640x640 picture nor the T² that follows it.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def keep_pixels(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, K, H, W) with zeros outside the mask (B, H, W).

    Multiplying the loss by the mask would not do: 0 times an infinite or NaN gradient is NaN.
    """
    return torch.where(mask.unsqueeze(1), logits, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, H, W) over the True pixels of mask (B, H, W); 0 where there is none.

    The count stays on the device: reading it would stop the stream at every step.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def check_inputs(
    student: Tensor, teacher: Tensor | None, labels: Tensor, distil_mask: Tensor | None
) -> None:
    """Raise unless logits are (B, K, H, W) and labels and mask lie on the same pixels."""
    _check_logits("student", student)
    if teacher is not None:
        _check_logits("teacher", teacher)
        _check_teacher(tuple(student.shape), tuple(teacher.shape))
    pixels = (student.shape[0], *student.shape[2:])
    class_ids(labels)
    _check_pixels("labels", labels, pixels)
    if distil_mask is not None:
        if distil_mask.dtype != torch.bool:
            raise TypeError(
                f"Expected a bool distil_mask, got {distil_mask.dtype}. "
                "Pass True where a pixel counts."
            )
        _check_pixels("distil_mask", distil_mask, pixels)


def class_ids(labels: Tensor) -> Tensor:
    """The same labels as int64; 0.9 would become class 0 without a word.

    Raises:
        TypeError: if they are no integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"Expected integer labels, got {labels.dtype}. "
            "Pass class ids, for instance as torch.uint8 or torch.int64."
        )
    return labels.long()


def check_temperature(temperature: float) -> None:
    """Raise unless the temperature is a finite Python number above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(
            f"Expected temperature as a Python number, got {type(temperature).__name__}. "
            "Pass a float: reading a tensor would stall the device at every step."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"Expected temperature > 0, got {temperature}. Use 1.0 for unsoftened logits."
        )


def check_pos_weight(pos_weight: float | None, channels: int) -> None:
    """Raise unless pos_weight is None or, for a one-logit model, a finite number above 0."""
    if pos_weight is None:
        return
    if channels != 1:
        raise ValueError(
            f"Expected no pos_weight for {channels} logits per pixel, got {pos_weight}. "
            "It balances the two sides of a one-logit model; leave it out here."
        )
    if not (math.isfinite(pos_weight) and pos_weight > 0):
        raise ValueError(
            f"Expected pos_weight > 0, got {pos_weight}. Leave it out for no weighting."
        )


def _check_logits(whose: str, logits: Tensor) -> None:
    if logits.ndim != 4 or logits.shape[1] < 1:
        raise ValueError(
            f"Expected {whose} logits (B, K, H, W), got shape {tuple(logits.shape)}. "
            "Keep the channel dimension, also where it is 1."
        )
    if not logits.is_floating_point():
        raise TypeError(
            f"Expected floating point {whose} logits, got {logits.dtype}. "
            "Pass raw scores, neither class ids nor masks."
        )


def _check_teacher(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    if student[1] != teacher[1]:
        raise ValueError(
            f"Expected teacher logits with {student[1]} channels like the student's, "
            f"got {teacher[1]}. Use a teacher of the same classes, or map its channels first."
        )
    if student != teacher:
        raise ValueError(
            f"Expected teacher logits of the student's shape {student}, got {teacher}. "
            "Resize the teacher's logits to the student's before comparing them."
        )


def _check_pixels(what: str, tensor: Tensor, pixels: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != pixels:
        raise ValueError(
            f"Expected {what} of shape (B, H, W) = {pixels}, got {tuple(tensor.shape)}. "
            "Give them the size of the logits, without a channel dimension."
        )


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
