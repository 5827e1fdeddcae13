"""The loss functions on feature maps, and what is learned beside the student to compare them.

Each function gets a list of compared maps and adds up one number for each of them, a mean over the
images of the batch; an image without a cell that counts adds 0. Maps arrive as fp32 or float64, the
teacher's without gradient, both of one size; what they hold outside the mask has no influence.
No value depends on the size of the maps but through what they show.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.losses.pixels import Scalar, channel_divergence

Maps = Tensor  # (B, C, h, w)
Cells = Tensor  # (B, h, w), bool, True where a cell of the maps counts

MGD_MASKED = 0.75  # share of the cells that are hidden, as Yang et al. 2022 do for segmentation


class ComparedMaps(NamedTuple):
    """One map of the student beside one of the teacher.

    Attributes:
        student: (B, C, h, w), where a term learns one after its projection.
        teacher: of the same shape, but for the channels of `at`.
        mask: bool (B, h, w), the cells that count.
    """

    student: Maps
    teacher: Maps
    mask: Cells


def pooled_mask(mask: Tensor, size: tuple[int, int]) -> Cells:
    """The cells (B, h, w) of a map at least half of whose pixels count in a mask (B, H, W)."""
    if mask.shape[-2:] == size:
        return mask
    return F.adaptive_avg_pool2d(mask.unsqueeze(1).float(), size).squeeze(1) >= 0.5


def fitnet(features: Iterable[ComparedMaps]) -> Scalar:
    """Sum over the maps of ‖s/‖s‖ − t/‖t‖‖², each map of an image as one vector; mean over images.

    Between 0 and 4 for each map. Without the norms it would be ruled by the scale of the teacher's
    maps.

    Source: Romero et al. 2015, arXiv 1412.6550, normalised.
    """
    distances = [
        (_unit(student, mask) - _unit(teacher, mask)).square().sum(dim=1)
        for student, teacher, mask in features
    ]
    return _sum_of_means(distances)


def attention_transfer(features: Iterable[ComparedMaps]) -> Scalar:
    """The same of the attention maps, the mean over channels of the squares: nothing is learned.

    The authors' code takes the mean over the cells where their formula has a sum: its values, which
    fall as maps grow, are h·w times less.

    Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928, section 3.1.
    """
    energies = (
        ComparedMaps(_energy(student, mask), _energy(teacher, mask), mask)
        for student, teacher, mask in features
    )
    return fitnet(energies)


def channel_wise(features: Iterable[ComparedMaps]) -> Scalar:
    """Sum over the maps of `channel_divergence`, mean over images.

    Source: Shu et al. 2021, arXiv 2011.13256.
    """
    return _sum_of_means([channel_divergence(*maps) for maps in features])


def masked_generation(features: Iterable[ComparedMaps]) -> Scalar:
    """Squared error of the maps that `MaskedGenerator` makes, as a share of the teacher's squares.

    1 is what maps of zeros would have. The authors sum the errors without dividing.

    Source: Yang et al. 2022, arXiv 2205.01529.
    """
    shares = []
    for student, teacher, mask in features:
        error, whole = (
            _keep_cells(maps, mask).square().flatten(1).sum(dim=1)
            for maps in (student - teacher, teacher)
        )
        some = whole > 0
        shares.append(torch.where(some, error / torch.where(some, whole, 1.0), 0.0))
    return _sum_of_means(shares)


def _sum_of_means(values: list[Tensor]) -> Scalar:
    """Sum over the maps of the mean over images of (B,) numbers."""
    return torch.stack([value.mean() for value in values]).sum()


def _keep_cells(maps: Maps, mask: Cells) -> Maps:
    return torch.where(mask.unsqueeze(1), maps, 0.0)


def _unit(maps: Maps, mask: Cells) -> Tensor:
    """The cells of each image that count as one vector of length 1: (B, C·h·w)."""
    return F.normalize(_keep_cells(maps, mask).flatten(1), dim=1)


def _energy(maps: Maps, mask: Cells) -> Maps:
    return _keep_cells(maps, mask).square().mean(dim=1, keepdim=True)


class Projection(nn.Sequential):
    """A 1x1 convolution and a BatchNorm: the student's channels to the teacher's."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))


class Alignment(nn.Conv2d):
    """A 1x1 convolution alone: a softmax sees no bias, whose gradient would be rounding alone."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__(student, teacher, 1, bias=False)


class MaskedGenerator(nn.Module):
    """Makes the teacher's map of the student's with most of its cells hidden, drawn anew each time.

    Drawn from torch's global generator, whose state is in every checkpoint.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.align = nn.Conv2d(student, teacher, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher, teacher, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 3, padding=1),
        )

    def forward(self, maps: Maps) -> Maps:
        """(B, C, h, w) of the student to (B, C', h, w)."""
        aligned = self.align(maps)
        shown = torch.rand_like(aligned[:, :1]) >= MGD_MASKED
        made: Tensor = self.generation(aligned * shown)
        return made
