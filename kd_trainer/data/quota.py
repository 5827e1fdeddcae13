"""Batches with a fixed number of images that have masks, where there are others without.

Drawn at random, a batch of 8 of which a tenth has masks holds none in 43 % of cases; here each one
holds its share. An epoch is one round of the images without masks, and those with masks are
repeated as often as it takes; or one round of those with masks, where these need more batches. The
last batch is filled up from a further round. Each round is a permutation of its own, and a row
draws another augmentation in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch

from kd_trainer.arguments import DistillationArguments
from kd_trainer.data.dataset import TransformedDataset
from kd_trainer.schedules import LabelledShare

Numbers = npt.NDArray[np.int64]


def has_mask(rows: Any) -> npt.NDArray[np.bool_]:
    """For each row of a data set whether it has a mask."""
    if not isinstance(rows, datasets.Dataset):
        return np.array([rows[index].get("mask") is not None for index in range(len(rows))], bool)
    # As an arrow column: 100,000 rows are looked through without reading any image.
    masks = rows.select_columns("mask").with_format("arrow")[:]["mask"]
    return np.asarray(masks.is_valid())


class QuotaSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Rows in the order of an epoch: batch after batch, each with its share of masks.

    A function of the seed and of the epoch that the data set is told, so that a resumed run goes on
    in it. The processes of a run take whole batches in turn. All epochs have as many as the first.

    Args:
        dataset: of the samples.
        share: of the images of a batch that have masks, by epoch.
        planned_epoch: the epoch of `share` for one of the data set.
        batch_size: of a process.
        seed: of the order.
        processes: their number divides that of the batches.

    Raises:
        TypeError: for another kind of data set.
        ValueError: if it has no images of one of both kinds, or a batch has no place for both.
    """

    def __init__(
        self,
        dataset: Any,
        share: LabelledShare,
        *,
        batch_size: int,
        seed: int,
        processes: int = 1,
        planned_epoch: Callable[[int], float] = float,
    ) -> None:
        if not isinstance(dataset, TransformedDataset):
            raise TypeError(
                f"Expected a TransformedDataset with --labelled_share, got a "
                f"{type(dataset).__name__}, which does not say which rows have masks, or is read "
                "in order. Leave it out (and with it --streaming, if given)."
            )
        labelled = has_mask(dataset.dataset)
        self.rows = np.flatnonzero(labelled), np.flatnonzero(~labelled)
        if not all(map(len, self.rows)):
            raise ValueError(
                "Expected images with and without masks with --labelled_share, got "
                f"{len(self.rows[0]):,} with and {len(self.rows[1]):,} without. Name a folder of "
                "images without masks (--unlabelled), or leave it out."
            )
        self.dataset, self.share, self.seed = dataset, share, seed
        self.batch_size, self.planned_epoch = batch_size, planned_epoch
        counts = self._counts(epoch=0)
        needed = (
            -(-len(rows) // count) for rows, count in zip(self.rows, counts, strict=True) if count
        )
        self.batches = -(-max(needed) // processes) * processes

    def _counts(self, epoch: int) -> tuple[int, int]:
        """Images with and without masks in each batch of an epoch."""
        labelled = self.share.images(self.planned_epoch(epoch), self.batch_size)
        return labelled, self.batch_size - labelled

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Row and round of each sample; the data set takes such pairs."""
        epoch = self.dataset.epoch
        draw = np.random.default_rng([self.seed, epoch])
        kinds = [
            rounds(rows, self.batches * count, draw).reshape(self.batches, count, 2)
            for rows, count in zip(self.rows, self._counts(epoch), strict=True)
        ]
        batches = np.concatenate(kinds, axis=1)
        # Places within a batch mean nothing: whoever mixes neighbours mixes both kinds.
        places = draw.random(batches.shape[:2]).argsort(axis=1)
        for row, turn in np.take_along_axis(batches, places[..., None], axis=1).reshape(-1, 2):
            yield int(row), int(turn)


def rounds(rows: Numbers, count: int, draw: np.random.Generator) -> Numbers:
    """The first `count` of one permutation of the rows after the other: (count, 2), row, round."""
    turns = -(-count // len(rows))
    order = [
        np.stack([draw.permutation(rows), np.full_like(rows, turn)], 1) for turn in range(turns)
    ]
    return np.concatenate([np.empty((0, 2), np.int64), *order])[:count]


def quota_sampler(
    dataset: Any, args: DistillationArguments, planned_epoch: Callable[[int], float] = float
) -> QuotaSampler:
    """The sampler of a run with `--labelled_share`."""
    share = args.labelled_schedule
    assert share is not None
    return QuotaSampler(
        dataset,
        share,
        batch_size=args.train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        processes=args.world_size,
        planned_epoch=planned_epoch,
    )
