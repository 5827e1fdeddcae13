"""A stand-in for a teacher whose logits are cached: quick, and it counts how often it is asked."""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_trainer.teacher_cache import (
    CacheBudget,
    CacheWriter,
    TeacherCache,
    cached_images,
    image_digest,
)

GB = 10**9
SHAPE = (1, 8, 8)


def files(count: int) -> list[bytes]:
    """Made-up image files."""
    return [f"file {number}".encode() for number in range(count)]


class Asked:
    """A teacher whose answer is a function of the file, and who counts."""

    def __init__(self, data: list[bytes], seconds: float = 0.0) -> None:
        self.data = data
        self.count = 0
        self.seconds = seconds

    def pixels(self, row: int) -> torch.Tensor:
        return torch.full((3, 8, 8), zlib.crc32(self.data[row]) % 251, dtype=torch.uint8)

    def infer(self, pixels: torch.Tensor) -> torch.Tensor:
        self.count += len(pixels)
        time.sleep(self.seconds * len(pixels))
        return pixels[:, :1].float() / 7 - 3

    def writer(self, file: Path, bound: int = GB, **options: Any) -> CacheWriter:
        return CacheWriter(
            file,
            {"teacher": "of tests"},
            CacheBudget(file.parent, bound),
            {image_digest(data): row for row, data in enumerate(self.data)},
            lambda row: (image_digest(self.data[row]), self.pixels(row)),
            self.infer,
            **options,
        )

    def expected(self, row: int) -> np.ndarray:
        return (self.pixels(row)[:1].float() / 7 - 3).half().numpy()


def assert_whole(file: Path, asked: Asked) -> None:
    """Every image is there, with its own logits, and nothing else."""
    cache = TeacherCache(file, SHAPE)
    assert cached_images(file) == set(map(image_digest, asked.data))
    for row, data in enumerate(asked.data):
        np.testing.assert_array_equal(cache.logits(data, "x"), asked.expected(row))
