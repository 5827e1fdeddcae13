"""Streams with a length: the samples and the draws of the map-style data set, read in order.

`datasets` gives the rows of a stream to DataLoader workers by shard, so that few shards leave
workers idle, and the Trainer splits among ranks once more (20 of 40 samples were seen). Here each
rank reads its own contiguous share of the rows, and the batches of a rank go to its workers in
turn; so no row is lost or doubled, and batches do not depend on the number of workers. Every worker
reads its rank's share but decodes only its own rows. A row's number in the whole stream travels
with it, so its augmentation is that of the map-style data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from kd_trainer.data.bad_samples import StreamedBad
from kd_trainer.data.dataset import SegmentationTransform, SharedEpoch, padding_like
from kd_trainer.data.images import BadSample, BadSampleError, image_name

Row = tuple[int, dict[str, Any]]

READ_ROWS = 16


class Piece(NamedTuple):
    """Rows of one shard: which shard, how many to skip, how many to read, the first's number."""

    shard: int
    skip: int
    rows: int
    number: int


def with_lengths(stream: Any, shard_lengths: Sequence[int]) -> Any:
    """Write the rows of each shard where `stream_lengths` (and `datasets`) look for them."""
    name = str(stream.split or "train")
    info = datasets.SplitInfo(
        name=name, num_examples=sum(shard_lengths), shard_lengths=list(shard_lengths)
    )
    stream.info.splits = datasets.SplitDict({name: info})
    return stream


def stream_lengths(stream: Any) -> list[int] | None:
    """Rows of each shard of a stream, one number for all shards, or None if unknown."""
    splits = stream.info.splits or {}
    name = str(stream.split or "train")
    if name not in splits or not splits[name].num_examples:
        return None
    info = splits[name]
    lengths = info.shard_lengths
    if lengths and len(lengths) == stream.num_shards and sum(lengths) == info.num_examples:
        return list(lengths)
    return [info.num_examples]


class StreamedDataset(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Samples of a stream with the columns `image` and `mask`, for one rank.

    Args:
        dataset: a `datasets.IterableDataset` as `load_splits` gives it.
        transform: makes a sample of a row.
        shuffle: read pieces and rows in an order that depends on `seed` and the epoch.
        seed: of that order.
        batch_size: of the DataLoader; whole batches go to its workers in turn. With another number
            no sample is lost, but there are more short batches than `len` promises.
        buffer_size: rows (undecoded) among which `shuffle` draws the next one.
        rank: which of `world_size` shares to read.
        world_size: number of shares.
        even: give all ranks the same number of rows, as training with DDP needs; at most
            `world_size - 1` rows stay out, others in each epoch if shuffled.
        padded: give all ranks the same number of samples, as an evaluation that exchanges figures
            needs, and leave no row out: a rank that has one row less ends with a sample without
            a pixel that counts.
        ignore_index: label of the pixels of that sample.
        max_bad_share: leave out rows that cannot be used, up to this share of them; None: the
            first one is an error.
        name: of the split, in the list of these rows.

    Raises:
        ValueError: if the length is unknown, or a number is out of range; while iterating, if the
            stream has another number of rows than it said.
    """

    def __init__(
        self,
        dataset: Any,
        transform: SegmentationTransform,
        *,
        shuffle: bool,
        seed: int,
        batch_size: int = 1,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
        padded: bool = False,
        ignore_index: int = 255,
        max_bad_share: float | None = None,
        name: str = "stream",
    ) -> None:
        lengths = stream_lengths(dataset)
        if lengths is None:
            raise ValueError(
                "Expected a stream that says how many rows it has, got one without a length. Give "
                "the number with --max_train_samples and --max_eval_samples, or leave --streaming "
                "out."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"Expected 0 <= rank < {world_size} (world_size), got {rank}.")
        if batch_size < 1 or buffer_size < 1:
            raise ValueError(
                f"Expected batch_size and buffer_size >= 1, got {batch_size} and {buffer_size}."
            )
        if padded and sum(lengths) < world_size:
            raise ValueError(
                f"Expected an evaluation image for each of {world_size} processes, got "
                f"{sum(lengths)}. Add images, or start fewer processes."
            )
        self.dataset = dataset
        self.transform = transform
        self.lengths = lengths
        self.shuffle = shuffle
        self.seed = seed
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.rank = rank
        self.world_size = world_size
        self.even = even
        self.padded = padded
        self.ignore_index = ignore_index
        self._epoch = SharedEpoch()
        self._bad: StreamedBad | None = None
        if max_bad_share is not None:
            if even and world_size > 1:
                raise ValueError(
                    f"Expected one process with --streaming and --on_bad_sample skip, got "
                    f"{world_size}: the one that leaves a sample out would end its epoch before "
                    "the others. Leave --streaming out."
                )
            self._bad = StreamedBad(name, sum(lengths), max_bad_share)

    @property
    def bad_samples(self) -> list[BadSample]:
        """What has been left out so far, by all processes that read for this rank."""
        return [] if self._bad is None else self._bad.noted()

    @property
    def left_out(self) -> list[BadSample]:
        """Those that are not counted in the length, because they were known in time."""
        return [] if self._bad is None else self._bad.left_out()

    def restore(self, bad: Iterable[BadSample]) -> None:
        """Know the bad rows that an interrupted run knew."""
        for sample in bad:
            if self._bad is not None:
                self._bad.add(sample.row, sample.file, sample.reason)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next draws, which leave out the bad rows that are known by now.

        Call it before the DataLoader's iterator is made.
        """
        self._epoch.set(epoch)
        if self._bad is not None:
            self._bad.leave_out()

    @property
    def announced(self) -> int:
        """Samples of this rank in an epoch, if all can be used."""
        start, stop = self._share()
        return stop - start + self._missing()

    def __len__(self) -> int:
        """Samples of this rank in an epoch, as far as is known."""
        return self.announced - (self._bad.missing if self._bad else 0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Samples of this rank, and in a DataLoader worker of this worker, in the current epoch."""
        epoch = self._epoch.get()
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        bad = self._bad
        rows = (row for row in self._rows(epoch) if bad is None or not bad.leaves_out(row[0]))
        last: Row = (0, {})
        for position, row in enumerate(chain(rows, repeat(None, self._missing()))):
            last = row or last
            if position // self.batch_size % workers != number:
                continue
            try:
                sample = self.transform(last[1], epoch=epoch, index=last[0])
            except BadSampleError as error:
                if bad is None:
                    raise
                bad.add(last[0], image_name(last[1]["image"], last[0]), str(error))
            else:
                yield sample if row else padding_like(sample, self.ignore_index)

    @property
    def rows(self) -> int:
        """Rows of the whole stream, those of the other ranks too."""
        return sum(self.lengths)

    def _missing(self) -> int:
        """Samples to add to those of this rank; 0 or 1."""
        start, stop = self._share()
        return -(-self.rows // self.world_size) - (stop - start) if self.padded else 0

    def _share(self) -> tuple[int, int]:
        total, world = self.rows, self.world_size
        if self.even:
            total -= total % world
        return total * self.rank // world, total * (self.rank + 1) // world

    def _rows(self, epoch: int) -> Iterator[Row]:
        start, stop = self._share()
        if not self.shuffle:
            return self._read(self._pieces(start, stop))
        # The order is one for the workers of a rank: each takes its batches out of it. The shares
        # move around the stream, so that a rank does not see the same rows in every epoch.
        total = self.rows
        move = int(np.random.default_rng([self.seed, epoch]).integers(total))
        start, stop = start + move, stop + move
        pieces = [
            *self._pieces(start, min(stop, total)),
            *self._pieces(max(start, total) - total, stop - total),
        ]
        draw = np.random.default_rng([self.seed, epoch, self.rank])
        pieces = [pieces[i] for i in draw.permutation(len(pieces))]
        return shuffled(self._read(pieces), draw, self.buffer_size)

    def _pieces(self, start: int, stop: int) -> list[Piece]:
        pieces = []
        beginnings = accumulate(self.lengths, initial=0)
        for shard, (begin, end) in enumerate(pairwise(beginnings)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                pieces.append(Piece(shard, first - begin, last - first, first))
        return pieces

    def _read(self, pieces: Iterable[Piece]) -> Iterator[Row]:
        for piece in pieces:
            count = 0
            to_the_end = piece.skip + piece.rows == self.lengths[piece.shard]
            for row in self._shard_rows(piece, to_the_end):
                if count == piece.rows:
                    raise self._wrong_length(piece, "more")
                yield piece.number + count, row
                count += 1
            if count < piece.rows:
                raise self._wrong_length(piece, f"only {piece.skip + count}")

    def _shard_rows(self, piece: Piece, to_the_end: bool) -> Iterator[dict[str, Any]]:
        stream = self.dataset
        if len(self.lengths) > 1:
            stream = stream.shard(num_shards=len(self.lengths), index=piece.shard)
        if piece.skip:
            stream = stream.skip(piece.skip)
        # One row more at the end of a shard shows a length that was too small.
        stream = stream.take(piece.rows + to_the_end)
        # Not `for row in stream`: in a worker that would split the stream a second time.
        for batch in stream.iter(batch_size=READ_ROWS):
            for image, mask in zip(batch["image"], batch["mask"], strict=True):
                yield {"image": image, "mask": mask}

    def _wrong_length(self, piece: Piece, got: str) -> ValueError:
        where = f"shard {piece.shard}" if len(self.lengths) > 1 else "the stream"
        return ValueError(
            f"Expected {self.lengths[piece.shard]} rows in {where}, as it was announced, "
            f"got {got}. Correct --max_train_samples or --max_eval_samples, or leave out "
            "--streaming."
        )


def shuffled(rows: Iterable[Row], draw: np.random.Generator, size: int) -> Iterator[Row]:
    """The rows in a random order, each drawn from a buffer of `size`."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = int(draw.integers(size))
        yield buffer[place]
        buffer[place] = row
    for place in draw.permutation(len(buffer)):
        yield buffer[place]


def stream_loader(
    dataset: Any, args: TrainingArguments, collator: Any, *, batch_size: int, drop_last: bool
) -> DataLoader[Any]:
    """A loader of a stream, with the settings of a run; its batches are of one rank already."""
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        # These two fields came with transformers 5.15; the defaults are torch's.
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        in_order=getattr(args, "dataloader_in_order", True),
        drop_last=drop_last,
    )


def seed_loader(loader: Any, seed: int) -> Any:
    """Let a DataLoader draw the seeds of its workers elsewhere than DropPath draws on a CPU.

    With persistent workers it draws once in a run, else once in an epoch; a resumed run draws once
    more, and would see other DropPath draws.
    """
    base: DataLoader[Any] = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper
    base.generator = torch.Generator().manual_seed(seed)
    return loader
