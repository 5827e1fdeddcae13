"""Our list of transforms as albumentations would run it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import albumentations as A

from kd_trainer.data.augmentation import SoftFog


def as_in_library(transform: Any) -> Any:
    """A copy of a transform; of our fog, albumentations' own with the same settings."""
    same: Any = copy(transform)
    if isinstance(same, SoftFog):  # which adds methods, and no attributes
        original: Any = SoftFog.__base__
        same.__class__ = original
        same._set_keys()  # the copy would still call the methods that were bound to ours
    return same


def members(compose: Any) -> Iterator[tuple[Any, float]]:
    """The transforms of a composition, each with its probability in an image."""
    for entry in compose.transforms:
        # ColorJitter has `transforms` as well, but is no group of them.
        group = entry.transforms if isinstance(entry, A.OneOf) else [entry]
        total = sum(member.p for member in group)
        for member in group:
            yield member, float(entry.p * member.p / total)
