"""Samples that cannot be used, as `--on_bad_sample skip` leaves them out.

No other sample ever takes the place of a bad one. Indexed data is looked through once before the
run and its bad rows are dropped, so that batches, epochs, processes and a resumed run are those of
a data set that never held them. A stream is not read twice: its bad rows are left out when they
come, so that a batch is filled by the rows behind them and an epoch is that much shorter. From the
next epoch on they are known, and are left out as if they were not there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from kd_trainer.data.dataset import check_same_size, one_thread_per_worker
from kd_trainer.data.images import BadSample, BadSampleError, decode_image, image_name
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.masks import present_values, show_values
from kd_trainer.data_arguments import DataArguments

PRINTED = 20
"""Bad samples of a split that are printed; all of them are in bad_samples.txt."""


class SampleCheck(NamedTuple):
    """What decoding a row showed: values and name of its mask, or why it cannot be used."""

    values: tuple[int, ...] = ()
    bits: bool = False
    mask: str = ""
    reason: str | None = None


class Readable(NamedTuple):
    """What some rule for a data set may read.

    Attributes:
        values: every one that the rule knows; None for all.
        kind: what they are (`mask_files`).
    """

    values: frozenset[int] | None
    kind: str = "values"


def readable_values(data: DataArguments) -> Readable:
    """Every mask value that some rule for this data knows."""
    kind = data.mask_kind or "values"
    ignored = {data.ignore_index, *(data.ignore_values or ())}
    members = data.class_members
    if data.mask_colors is not None and members is not None:
        colors = (*members.members, members.ignored)
        return Readable(frozenset(int(color) for one in colors for color in one), "colors")
    if data.mask_threshold is not None or members is not None:
        return Readable(None, kind)  # of merged classes the rule says it later
    if data.mask_values is not None:
        return Readable(frozenset({*data.mask_values, *ignored}), kind)
    if data.reduce_labels:
        return Readable(frozenset({*range(data.num_labels + 1), *ignored}), kind)
    ids = range(data.num_labels) if data.num_labels > 2 else (0, 1, 255)
    return Readable(frozenset({*ids, *ignored}), kind)


def check_sample(row: Mapping[str, Any], index: int, readable: Readable) -> SampleCheck:
    """Decode a row wholly, as a training does."""
    try:
        shape = decode_image(row["image"], index).shape[:2]
        if row["mask"] is None:
            return SampleCheck()
        name = image_name(row["mask"], index)
        mask = decode_mask(row["mask"], index, readable.kind)
        check_same_size(row, index, mask=mask.shape, image=shape)
        values, bits = present_values(mask), mask.dtype == bool
        if not bits and readable.values is not None and not readable.values.issuperset(values):
            what = "colors" if readable.kind == "colors" else "values"
            raise BadSampleError(
                f"Expected mask {what} among {show_values(readable.values, what)}, got "
                f"{show_values(values, what)} in {name}. Correct the mask, or name the {what} with "
                f"--mask_{what}."
            )
    except BadSampleError as error:
        return SampleCheck(reason=str(error))
    return SampleCheck(values, bits, name)


class _SampleChecks(torch.utils.data.Dataset[SampleCheck]):
    def __init__(self, rows: Any, readable: Readable) -> None:
        self.rows = rows
        self.readable = readable

    def __getitem__(self, index: int) -> SampleCheck:
        one_thread_per_worker(os.getpid())
        return check_sample(self.rows[index], index, self.readable)


_CHECKED: dict[tuple[str, Readable], list[SampleCheck]] = {}  # a comparison asks many times
_PRINTED: set[BadSample] = set()


def check_split(
    rows: Any, readable: Readable, *, name: str, workers: int = 0, shared: bool = False
) -> list[SampleCheck]:
    """Check each row of a `datasets.Dataset`; the second time it is remembered.

    Args:
        rows: with the columns `image` and `mask`.
        readable: see `readable_values`.
        name: of the split, for the bar.
        workers: processes that decode.
        shared: divide the rows among the processes of a run, all of which have to call this; then
            all know the same, even if a disk answers only one of them.
    """
    key = (rows._fingerprint, readable)
    if key in _CHECKED:
        return _CHECKED[key]
    rank, world = _place() if shared else (0, 1)
    mine = range(rank, len(rows), world)
    # A generator of its own: the training's random numbers must not depend on this check.
    loader = DataLoader(
        _SampleChecks(rows, readable),
        batch_size=None,
        sampler=mine,
        num_workers=workers,
        generator=torch.Generator(),
    )
    bar = tqdm(loader, f"check {name}", len(mine), unit="image", disable=True if rank else None)
    checks = list(bar)
    if world > 1:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, checks)
        checks = [shares[row % world][row // world] for row in range(len(rows))]
    _CHECKED[key] = checks
    return _CHECKED[key]


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def announce(bad: Iterable[BadSample]) -> None:
    """Print samples that were not printed before, on the main process."""
    new = [sample for sample in bad if sample not in _PRINTED]
    _PRINTED.update(new)
    if new and _place()[0] == 0:
        for sample in new[:PRINTED]:
            tqdm.write(f"left out: {sample}", file=sys.stderr)
        if len(new) > PRINTED:
            tqdm.write(f"left out: {len(new) - PRINTED:,} more", file=sys.stderr)


def check_share(bad: Collection[BadSample], total: int, limit: float) -> None:
    """Refuse a split with too many bad samples, or nothing else.

    Raises:
        ValueError: with the first one and its reason.
    """
    if bad and (len(bad) > limit * total or len(bad) == total):
        first = next(iter(bad))
        raise ValueError(
            f"Expected at most {limit:.2%} bad samples in the split {first.split!r} "
            f"(--max_bad_share), got {len(bad):,} of {total:,}. Mend or remove the files, or raise "
            f"--max_bad_share. The first: {first.reason}"
        )


class StreamedBad:
    """The bad rows of a stream, known to all processes that read it for one rank.

    Args:
        split: its name.
        total: its rows.
        limit: largest share of bad rows.
    """

    def __init__(self, split: str, total: int, limit: float) -> None:
        self.split = split
        self.total = total
        self.limit = limit
        self._seen = torch.zeros(total, dtype=torch.uint8).share_memory_()
        self._left_out = torch.zeros(total, dtype=torch.uint8).share_memory_()
        handle, self._path = tempfile.mkstemp(prefix="kd_trainer-bad-")
        os.close(handle)
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, row: int, file: str, reason: str) -> None:
        """Note a row; the first time it is printed, and counted.

        Raises:
            ValueError: if there are too many.
        """
        if self._seen[row]:
            return
        self._seen[row] = 1
        sample = BadSample(self.split, row, file, reason)
        with Path(self._path).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(asdict(sample)) + "\n")  # one write, so no other comes between
        count = int(self._seen.sum())
        if count <= PRINTED:
            tqdm.write(f"left out: {sample}", file=sys.stderr)
        if count > self.limit * self.total:
            check_share(self.noted(), self.total, self.limit)

    def leave_out(self) -> None:
        """Leave out what has been noted by now, until the next call; before workers begin an epoch.

        They would not agree on the batches of an epoch if each left out what it has met itself.
        """
        self._left_out.copy_(self._seen)

    def leaves_out(self, row: int) -> bool:
        """Whether the running epoch does without a row from its beginning."""
        return bool(self._left_out[row])

    @property
    def missing(self) -> int:
        """Rows that the running epoch does without."""
        return int(self._left_out.sum())

    def left_out(self) -> list[BadSample]:
        """What the running epoch does without from its beginning."""
        return [sample for sample in self.noted() if self.leaves_out(sample.row)]

    def noted(self) -> list[BadSample]:
        """All rows so far, in the order of the stream."""
        lines = Path(self._path).read_text(encoding="utf-8").splitlines()
        return sorted((BadSample(**json.loads(line)) for line in lines), key=lambda s: s.row)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not when a worker process ends
        Path(path).unlink(missing_ok=True)
