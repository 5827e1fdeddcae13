"""The real images of an export: those it is checked on, and those int8 is calibrated on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_trainer.arguments import DataArguments
from kd_trainer.build import evaluation_dataset
from kd_trainer.data.folder_images import find_pictures, is_video
from kd_trainer.data.images import decode_image
from kd_trainer.export.parity import CheckBatch
from kd_trainer.models.image_processing import resize_image

Sample = tuple[Tensor, Tensor | None]


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `length`: a folder is often sorted by its contents."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def from_dataset(data: DataArguments, split: str, count: int) -> list[Sample]:
    """Pictures uint8 (3, H, W) and labels (H, W) of a split, without augmentation."""
    other = data.train_split if split == data.eval_split else data.eval_split
    dataset: Any = evaluation_dataset(
        replace(data, eval_split=split, train_split=other), batch_size=1
    )
    if data.streaming:
        rows = list(itertools.islice(dataset, count))
    else:
        rows = [dataset[i] for i in spread(len(dataset), count)]
    return [(row["pixel_values"], row["labels"]) for row in rows]


def from_pictures(sources: Sequence[str], size: int, count: int) -> list[Sample]:
    """Pictures uint8 (3, size, size) of files, folders and globs; their masks are unknown.

    Raises:
        FileNotFoundError: if a source names no picture.
        ValueError: if a file is no readable picture.
    """
    paths = [path for path in find_pictures(sources) if not is_video(path)]
    if not paths:
        raise ValueError(
            f"Expected pictures as --images, got only videos: {' '.join(sources)}. Export single "
            "frames of them first."
        )
    chosen = [paths[i] for i in spread(len(paths), count)]
    pictures = (decode_image({"path": str(p), "bytes": None}, 0) for p in chosen)
    tensors = (torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in pictures)
    return [(resize_image(tensor, size, size), None) for tensor in tensors]


def batches_of(samples: Sequence[Sample], batch_size: int) -> list[CheckBatch]:
    """Samples stacked, in order."""
    batches = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        labels = [label for _, label in some if label is not None]
        batches.append(
            (torch.stack([picture for picture, _ in some]), torch.stack(labels) if labels else None)
        )
    return batches


def at_another_size(samples: Sequence[Sample], size: int, multiple: int) -> list[CheckBatch]:
    """One batch of another number, height and width than any other, without masks."""
    pictures = [picture for picture, _ in samples[:3]]
    height, width = size + multiple, size + 2 * multiple
    return [(torch.stack([resize_image(p, height, width) for p in pictures]), None)]
