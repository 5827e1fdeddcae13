"""What the logits, labels and settings of a loss must be, checked without reading a value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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


def check_pos_weight(pos_weight: float | Sequence[float] | None, channels: int) -> None:
    """Raise unless pos_weight is None, a number for one logit, or one number for each of several.

    For one logit it is finite and above 0; of several, some may be 0 but not all.
    """
    if pos_weight is None:
        return
    if channels == 1 or isinstance(pos_weight, int | float):
        if channels != 1:
            raise ValueError(
                f"Expected no pos_weight for {channels} logits per pixel, got {pos_weight}. "
                "It balances the two sides of a one-logit model; name a number for each class "
                "(--class_weights)."
            )
        if not isinstance(pos_weight, int | float):
            raise ValueError(
                "Expected one pos_weight (or two class weights: background, foreground) for one "
                f"logit, got {len(pos_weight)} numbers. Give the factor of the foreground."
            )
        if not (math.isfinite(pos_weight) and pos_weight > 0):
            raise ValueError(
                f"Expected pos_weight > 0, got {pos_weight}. Leave it out for no weighting."
            )
        return
    fine = all(math.isfinite(weight) and weight >= 0 for weight in pos_weight)
    if len(pos_weight) != channels or not fine or not any(pos_weight):
        raise ValueError(
            f"Expected {channels} class weights >= 0, one for each class and not all 0, got "
            f"{' '.join(f'{weight:g}' for weight in pos_weight)}. Leave them out for no weighting."
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
