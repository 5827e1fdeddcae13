"""Our list of transforms as albumentations would run it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

from kd_trainer.fast_transforms import (
    FastColorJitter,
    FastGaussNoise,
    FastHueSaturationValue,
    FastISONoise,
    FastRGBShift,
    SoftFog,
)

FAST = (
    FastColorJitter,
    FastGaussNoise,
    FastHueSaturationValue,
    FastISONoise,
    FastRGBShift,
    SoftFog,
)
"""They add methods to albumentations' classes, and no attributes."""


def as_in_library(transform: Any) -> Any:
    """A copy of a transform with the method of albumentations in place of ours."""
    same: Any = copy(transform)
    if isinstance(same, FAST):
        original: Any = type(same).__base__
        same.__class__ = original
        same._set_keys()  # the copy would still call the methods that were bound to ours
    return same


def members(compose: Any) -> Iterator[tuple[Any, float]]:
    """The transforms of a composition, each with its probability in an image."""
    for entry in compose.transforms:
        group = [entry] if isinstance(entry, FAST) else getattr(entry, "transforms", [entry])
        total = sum(member.p for member in group)
        for member in group:
            yield member, float(entry.p * member.p / total)
