"""Filling: the teacher sees each image that is not in the cache yet, exactly once.

Any number of processes may fill one folder at the same time, those of one run and of others. The
images are dealt into buckets by their digest; a process locks a bucket, looks again what is missing
in it, and fills it. So the work is divided as it comes, nothing is computed twice, and the lock of
a process that was killed is free at once. What it had not written is done again.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kd_trainer.disk import writing
from kd_trainer.safe_files import plain
from kd_trainer.teacher_cache.coding import as_half, encode
from kd_trainer.teacher_cache.room import Room
from kd_trainer.teacher_cache.shards import (
    BUCKETS,
    PARTIAL,
    DamagedError,
    bucket_of,
    images_of,
    read_records,
    shard_bytes,
    shard_paths,
    write_shard,
)

_PROBED = 8  # images whose compressed size is measured before the rest is begun
_SHARD_BYTES = 64 * 10**6
_SHARD_SECONDS = 60.0  # of work that a kill costs at most, about


@dataclass(frozen=True)
class Work:
    """What a cache is to hold, and how to come by it.

    Attributes:
        images: number of the row of each image, by the image's digest.
        look: digest and uint8 pixels (3, H, W) of a row; called by several threads.
        ask: logits (B, K, H, W) of uint8 pixels (B, 3, H, W).
        batch_size: pictures that the teacher sees at a time.
        threads: that read and decode pictures.
    """

    images: Mapping[bytes, int]
    look: Callable[[int], tuple[bytes, Tensor]]
    ask: Callable[[Tensor], Tensor]
    batch_size: int = 1
    threads: int = 1


class Stored(NamedTuple):
    """Digests of the images in a folder, and what is wrong with the shards that cannot be read."""

    images: set[bytes]
    damaged: dict[Path, DamagedError]


def stored(folder: Path, bucket: int | None = None) -> Stored:
    """What a folder holds, or one bucket of it."""
    found = Stored(set(), {})
    for path in shard_paths(folder, bucket):
        try:
            found.images.update(images_of(read_records(path)))
        except DamagedError as error:
            found.damaged[path] = error
    return found


def fill(folder: Path, work: Work, room: Room, *, first: int = 0, quiet: bool | None = None) -> int:
    """Ask the teacher for what is missing; returns when all of it is there, whoever has done it.

    Args:
        folder: of one teacher; is made.
        work: the images and how to ask.
        room: bound of the disk.
        first: bucket to begin with; other ones for other processes keep them apart.
        quiet: True hides the progress bar, None shows it on a terminal.

    Returns:
        How many images this process has asked for.

    Raises:
        ValueError: if they do not fit the bound or the disk, before anything is written; or if an
            image has changed meanwhile.
        OSError: if the disk does not take them.
    """
    used = room.used()  # before looking what is missing: others may be filling
    there = stored(folder)
    missing = work.images.keys() - there.images
    if not missing and not there.damaged:
        return 0
    if missing:
        room.check_fits(folder, used, len(missing), _bytes_each(work, missing))
    with writing("the teacher's logits", folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted: list[list[bytes]] = [[] for _ in range(BUCKETS)]
    for image in sorted(work.images):
        wanted[bucket_of(image)].append(image)
    left = [(first + i) % BUCKETS for i in range(BUCKETS)]
    done = 0
    bar = tqdm(total=len(missing), desc="ask teacher", unit="image", disable=quiet)
    with bar, _locks(folder) as lock, ThreadPoolExecutor(work.threads) as pool:
        filler = _Filler(folder, work, room, pool, bar)
        for wait in (False, True):  # first what nobody works at, then see that all of it is done
            for bucket in list(left):
                if not lock(bucket, wait):
                    continue
                own = filler.fill(bucket, wanted[bucket])
                left.remove(bucket)
                done += own
                bar.update(len(missing.intersection(wanted[bucket])) - own)  # of other processes
    return done


def _bytes_each(work: Work, missing: Iterable[bytes]) -> float:
    """Bytes that an image's logits take on the disk, from a few."""
    sizes = []
    for image in islice(sorted(missing), _PROBED):
        _, pixels = work.look(work.images[image])
        sizes.append(shard_bytes([encode(as_half(work.ask(pixels[None])[0]))]))
    return sum(sizes) / len(sizes)


@dataclass
class _Filler:
    """Fills single buckets, whose lock this process holds."""

    folder: Path
    work: Work
    room: Room
    pool: ThreadPoolExecutor
    bar: tqdm[Any]

    def fill(self, bucket: int, wanted: Sequence[bytes]) -> int:
        """Ask for what is missing in a bucket; how many that were."""
        self._tidy(bucket)
        there = stored(self.folder, bucket).images
        missing = [image for image in wanted if image not in there]
        entries: dict[bytes, bytes] = {}
        began = time.monotonic()
        for images, pixels in self._batches(missing):
            logits = as_half(self.work.ask(pixels))
            entries |= {image: encode(one) for image, one in zip(images, logits, strict=True)}
            self.bar.update(len(images))
            large = sum(map(len, entries.values())) > _SHARD_BYTES
            if large or time.monotonic() - began > _SHARD_SECONDS:
                self._write(bucket, entries)
                entries, began = {}, time.monotonic()
        if entries:
            self._write(bucket, entries)
        return len(missing)

    def _tidy(self, bucket: int) -> None:
        """Remove what a killed process left half-written, and what is damaged."""
        for partial in self.folder.glob(f"{bucket:02d}-*{PARTIAL}"):
            partial.unlink()
        for path, error in stored(self.folder, bucket).damaged.items():
            tqdm.write(
                f"teacher cache: {path.name} is filled again: {plain(error)}", file=sys.stderr
            )
            path.unlink()

    def _write(self, bucket: int, entries: Mapping[bytes, bytes]) -> None:
        self.room.check_write(self.folder, shard_bytes(entries.values()))
        with writing("the teacher's logits", self.folder):
            write_shard(self.folder, bucket, entries)

    def _batches(self, missing: Sequence[bytes]) -> Iterator[tuple[list[bytes], Tensor]]:
        """Digests and pixels; the next batch is read while the teacher looks at this one."""
        size = self.work.batch_size
        parts = [list(missing[i : i + size]) for i in range(0, len(missing), size)]
        coming: list[Future[Tensor]] = []
        for number, images in enumerate([[], *parts]):
            now, following = coming, parts[number : number + 1]
            coming = [self.pool.submit(self._look, image) for part in following for image in part]
            if images:
                yield images, torch.stack([pixels.result() for pixels in now])

    def _look(self, image: bytes) -> Tensor:
        row = self.work.images[image]
        found, pixels = self.work.look(row)
        if found != image:
            raise ValueError(
                f"Expected the image of row {row} as it was when the run began, got another one. "
                "Start again once nothing changes the data."
            )
        return pixels


@contextmanager
def _locks(folder: Path) -> Iterator[Callable[[int, bool], bool]]:
    """Locks of single bytes of one file, one a bucket, which end with the process that holds them.

    The function takes a bucket (waiting for it, or saying False) and lets the one before go.
    """
    with (folder / "lock").open("ab") as file:
        held: list[int] = []

        def lock(bucket: int, wait: bool) -> bool:
            while held:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, held.pop())
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, bucket)
            except (BlockingIOError, PermissionError):
                return False
            held.append(bucket)
            return True

        yield lock


def describe(folder: Path, ingredients: str) -> None:
    """Write down what a folder belongs to, for people; nothing reads it."""
    file = folder / "about.json"
    if file.is_file():
        return
    partial = folder / f"about.{os.getpid()}{PARTIAL}"
    partial.write_text(ingredients + "\n", encoding="utf-8")
    partial.replace(file)
