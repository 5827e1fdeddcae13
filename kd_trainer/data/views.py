"""What a student is shown beside the augmentation: strong views, and images mixed in pairs.

The draws belong to a row and travel in its sample (`draw_mix`). Whoever trains follows them once
the teacher has answered about the images as they were before (`student_batch`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_trainer.models.image_sizes import Size

STRONG = "strong_views"
MIX_BOX, MIX_CLASSES = "mix_box", "mix_classes"
AREA = (0.02, 0.4)
"""Share of the image that a box covers."""
RATIO = (0.3, 1 / 0.3)
"""Height over width of a box, both as shares of the image's."""
_PER_IMAGE = ("pixel_values", "labels", "distil_mask", "teacher_logits")
# Fourth of the numbers of a draw; the augmentation has three, and crops have 1.
MIX_STREAM, STRONG_STREAM = 2, 3


@dataclass(frozen=True)
class Views:
    """What samples carry for it.

    Attributes:
        strong: photometrically changed views of each image that the student sees in place of it.
        mix: probability that a view is mixed with another image.
        classes: of which the half that a partner shows is pasted (ClassMix); 0 pastes a box
            (CutMix).
    """

    strong: int = 0
    mix: float = 0.0
    classes: int = 0

    def draw_mix(self, numbers: list[int], size: Size) -> dict[str, Tensor]:
        """What the sample of a row says about its mixing; a function of the numbers.

        Args:
            numbers: seed, epoch and row.
            size: of the sample, (height, width).

        Returns:
            Of each view `mix_box` int64 (V, 4), top, left, bottom and right, nothing where it is
            not mixed; or `mix_classes` int64 (V, K), the rank of each class among those that are
            pasted first, K where it is not mixed.
        """
        if self.mix == 0:
            return {}
        rows = []
        for view in range(max(1, self.strong)):
            draw = np.random.default_rng([*numbers, MIX_STREAM, view])
            mixes = draw.random() < self.mix
            if self.classes:
                rank = draw.permutation(self.classes)
                rows.append(rank if mixes else np.full(self.classes, self.classes))
            else:
                rows.append(_box(draw, size) if mixes else np.zeros(4, np.int64))
        return {
            MIX_CLASSES if self.classes else MIX_BOX: torch.from_numpy(np.stack(rows)).long(),
        }


def _box(draw: np.random.Generator, size: Size) -> np.ndarray[Any, Any]:
    """Top, left, bottom and right of a box that lies in the image."""
    area = draw.uniform(*AREA)
    # Evenly on a logarithmic scale: as often upright as lying; within what fits into the image.
    low, high = math.log(max(RATIO[0], area)), math.log(min(RATIO[1], 1 / area))
    ratio = math.exp(draw.uniform(low, high))
    shares = math.sqrt(area * ratio), math.sqrt(area / ratio)
    sides = [min(s, max(1, round(share * s))) for share, s in zip(shares, size, strict=True)]
    top, left = (
        int(draw.integers(0, whole - side + 1)) for whole, side in zip(size, sides, strict=True)
    )
    return np.array([top, left, top + sides[0], left + sides[1]])


def has_views(batch: Mapping[str, Any]) -> bool:
    """Whether a student is shown something else than the images of a batch."""
    return any(name in batch for name in (STRONG, MIX_BOX, MIX_CLASSES))


def student_batch(
    batch: Mapping[str, Any], classes: Tensor | None, *, ignore_index: int
) -> dict[str, Any]:
    """A batch as the student sees it: its strong views, each mixed with that of a partner.

    The partner of an image is the one at the same place in the reversed batch. Labels, the pixels
    on which the teacher is followed and the teacher's logits are mixed as the images are, so each
    pixel keeps its own.

    Args:
        batch: of `collate`, with `teacher_logits` of the images as they are if there is a teacher.
        classes: which the teacher finds, (B, H, W): those of the pixels without a label.
        ignore_index: label of the pixels that count nowhere.

    Returns:
        The batch with V·B images, V = 1 without strong views, the first view of all images first.
    """
    result = dict(batch)
    strong = result.pop(STRONG, None)
    boxes, ranks = result.pop(MIX_BOX, None), result.pop(MIX_CLASSES, None)
    images = {name: result[name] for name in _PER_IMAGE if result.get(name) is not None}
    if strong is not None:
        count = strong.shape[1]
        images = {n: value.repeat(count, *[1] * (value.ndim - 1)) for n, value in images.items()}
        images["pixel_values"] = _by_view(strong)
        classes = None if classes is None else classes.repeat(count, 1, 1)
    pasted = None
    if boxes is not None:
        height, width = images["pixel_values"].shape[-2:]
        pasted = _inside(_by_view(boxes), height, width)
    elif ranks is not None:
        labels = images["labels"].long()
        known = labels != ignore_index
        shown = torch.where(known, labels, ranks.shape[-1])
        if classes is not None:
            shown = torch.where(~known & images["distil_mask"], classes, shown)
        pasted = _of_half_the_classes(shown.flip(0), _by_view(ranks))
    if pasted is not None:
        images = {name: _mixed(value, pasted) for name, value in images.items()}
    return result | images


def _by_view(values: Tensor) -> Tensor:
    """(B, V, ...) as (V·B, ...), the first view of all images first."""
    return values.transpose(0, 1).flatten(0, 1)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """The pixels (B, H, W) that lie in the boxes (B, 4)."""
    top, left, bottom, right = (side.view(-1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def _of_half_the_classes(shown: Tensor, ranks: Tensor) -> Tensor:
    """The pixels (B, H, W) of half of the classes that an image shows, rounded down.

    No host sync: which classes are there is found and ranked on the device.

    Args:
        shown: class of each pixel (B, H, W); K is none.
        ranks: (B, K), which of them comes first; K for all takes none.
    """
    count = ranks.shape[1]
    found = torch.zeros(len(shown), count + 1, dtype=torch.bool, device=shown.device)
    found = found.scatter(1, shown.flatten(1), True)[:, :count]
    rank = torch.where(found, ranks, count)
    earlier = (rank.unsqueeze(1) < rank.unsqueeze(2)).sum(dim=2)  # classes before each one
    chosen = found & (ranks < count) & (earlier < found.sum(dim=1, keepdim=True) // 2)
    chosen = torch.cat([chosen, torch.zeros_like(chosen[:, :1])], dim=1)
    return chosen.gather(1, shown.flatten(1)).view(shown.shape)


def _mixed(values: Tensor, pasted: Tensor) -> Tensor:
    """Values (B, ..., H, W) with those of the reversed batch at the pixels (B, H, W) of a mask."""
    while pasted.ndim < values.ndim:
        pasted = pasted.unsqueeze(1)
    return torch.where(pasted, values.flip(0), values)
