"""The map-style data set that the Trainer reads, and its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_trainer.data.bad_samples import BadSample
from kd_trainer.data.transform import SegmentationTransform


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


class SharedEpoch:
    """An epoch number in shared memory, so that persistent workers see it change."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """Set the epoch for all processes that hold this object."""
        if epoch < 0:
            raise ValueError(f"Expected an epoch >= 0, got {epoch}.")
        self._value.fill_(int(epoch))

    def get(self) -> int:
        """The epoch that was set last, 0 at first."""
        return int(self._value)


class TransformedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples of a `datasets.Dataset` with the columns `image` and `mask`.

    Args:
        dataset: rows by number, and a length.
        transform: makes a sample of a row.
        bad_samples: what was left out of it.
    """

    def __init__(
        self, dataset: Any, transform: SegmentationTransform, bad_samples: Sequence[BadSample] = ()
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.bad_samples = list(bad_samples)
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next draws; call it before the DataLoader's iterator is made."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample of row `index` in the current epoch."""
        index = range(len(self))[index]  # a negative index means the same row, so the same draw
        return self.transform(self.dataset[index], epoch=self._epoch.get(), index=index)
