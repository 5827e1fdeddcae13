"""The frozen teacher: any segmentation network behind the student's own input and classes.

A teacher may want other normalisation, another input size or a two-class softmax; this module
hides all of it, so the losses see fp32 logits of the student's shape.
Re-normalising the student's input follows the idea of timm's distillation task.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.fast_layers import logits_of
from kd_trainer.models.configuration_smp import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_labels,
)

Statistics = Sequence[float]


class Teacher(nn.Module):
    """A frozen segmentation network that answers with the student's classes and size.

    It stays in eval mode and without gradient, whatever it is told.

    Args:
        network: (B, 3, h, w) to a tensor of logits or an output with `raw_logits` or `logits`.
        num_labels: of the student, background included; 2 gives one logit.
        image_size: side that the network wants; None takes the pictures as they come.
        mean: per channel in 0..1, that the network was trained with.
        std: likewise.
        input_mean: with which the pictures arrive (the student's).
        input_std: likewise.
        id2label: names of the teacher's classes.
        order: the teacher's class for each of the student's, where it counts them otherwise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        num_labels: int,
        image_size: int | None = None,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
        input_mean: Statistics = IMAGENET_MEAN,
        input_std: Statistics = IMAGENET_STD,
        id2label: dict[int, str] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_labels = num_labels
        self.image_size = image_size
        self.id2label = id2label or default_labels(num_labels)
        self.order = None if order is None else list(order)
        self.mean, self.std = list(mean), list(std)
        self.register_buffer("scale", torch.ones(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1), persistent=False)
        self.expect_input(input_mean, input_std)
        self.requires_grad_(False)
        super().train(False)

    def expect_input(self, mean: Statistics, std: Statistics) -> Self:
        """Take pictures that are normalised so: those of a student that is trained or measured."""
        own_mean, own_std = _column(self.mean, "mean"), _column(self.std, "std")
        new_mean, new_std = _column(mean, "input_mean"), _column(std, "input_std")
        self.input_mean, self.input_std = list(mean), list(std)
        self.same_statistics = torch.equal(own_mean, new_mean) and torch.equal(own_std, new_std)
        self.scale = (new_std / own_std).to(self.scale.device)
        self.shift = ((new_mean - own_mean) / own_std).to(self.shift.device)
        return self

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 (the name nn.Module gives it)
        """Do nothing: a teacher in train mode would drift with every batch."""
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            pixel_values: floats (B, 3, H, W), normalised with the student's statistics.

        Returns:
            float32 (B, K, H, W), K = 1 for two labels, otherwise num_labels.

        Raises:
            ValueError: if the network gives another number of channels.
        """
        if any(module.training for module in self.network.modules()):
            self.network.eval()  # somebody has called train() on what is in here
        height, width = pixel_values.shape[-2:]
        images = pixel_values
        if not self.same_statistics:
            images = images * self.scale + self.shift
        if self.image_size is not None:
            side = self.image_size
            images = _resize(images, (side, side), antialias=side < max(height, width))
        output = self.network(images.to(next(self.network.parameters()).dtype))
        logits = self._student_classes(logits_of(output).float())
        return _resize(logits, (height, width))

    def _student_classes(self, logits: Tensor) -> Tensor:
        channels = logits.shape[1]
        if self.order is not None:  # of a one-logit teacher, the other class has the other sign
            logits = -logits if channels == 1 else logits[:, self.order]
        if self.num_labels == 2 and channels == 2:
            return logits[:, 1:] - logits[:, :1]  # sigmoid of it is the softmax's second class
        if channels != (1 if self.num_labels == 2 else self.num_labels):
            raise ValueError(
                f"Expected a teacher of {self.num_labels} classes, got {channels} channels. "
                "Choose a teacher of the student's classes."
            )
        return logits


def _column(values: Statistics, name: str) -> Tensor:
    finite = len(values) == 3 and all(map(math.isfinite, values))
    if not finite or (name.endswith("std") and min(values) <= 0):
        raise ValueError(
            f"Expected three finite numbers (positive ones for std) as {name}, got {list(values)}. "
            "Give one a channel, of values in 0..1."
        )
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def _resize(maps: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=antialias)
