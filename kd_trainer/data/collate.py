"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of equal size.

    Args:
        samples: dicts of `pixel_values` (3, H, W), `labels` (H, W), `distil_mask` (H, W), and the
            `teacher_logits` (K, H, W) where they are cached.

    Returns:
        The same names with a leading batch axis; bytes stay bytes, the trainer normalises them.
    """
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def padding_like(sample: dict[str, Tensor], ignore_index: int) -> dict[str, Tensor]:
    """A sample of the same shapes without a pixel that counts."""
    return sample | {
        "labels": torch.full_like(sample["labels"], ignore_index),
        "distil_mask": torch.zeros_like(sample["distil_mask"]),
    }
