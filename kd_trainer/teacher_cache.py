"""The teacher's logits on the disk: it sees each clean image once instead of once an epoch.

One sqlite file a teacher, named by `cache_key`; one row an image, by the digest of its file. sqlite
brings the locks of several processes, and takes a transaction back that a kill or a power cut has
broken off. The journal is the default one, not a write-ahead log: new pages need no copy in it, so
that each blob is written once; and it needs no memory that processes share, which a folder that is
read-only or on a network does not give.

Logits are kept in half precision, which holds what a teacher in bf16 says exactly, and one in fp32
to 0.004 at logits of 15. Eight bits would save a third of that, but are 0.06 off, or coarse at
large logits, which the MSE weighs most (figures in docs/teacher_cache.md). Neighbouring pixels
share the upper byte, so the two bytes are compressed apart, without further loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from kd_trainer.checkpointing.fingerprint import tensors_digest
from kd_trainer.files import nearest_existing, writing
from kd_trainer.models.image_sizes import AnySize, plain_size
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_ensemble import TeacherEnsemble

Half = npt.NDArray[np.float16]

FORMAT = 2
"""Number of the file format and of the way from file bytes to logits: a change of either counts."""

# What a configuration says of where it was loaded from, and by which version.
_OF_THE_COPY = ("_name_or_path", "transformers_version")
# Read five times as fast as zlib, and 10 % smaller; level 6 saves another 3 % at thrice the time.
_CODEC = pa.Codec("zstd", compression_level=3)
_SUFFIX = ".sqlite"
_PAGE = 8192  # bytes; smaller ones are read more slowly, larger ones waste more
_TABLES = (
    f"PRAGMA page_size = {_PAGE}",
    "CREATE TABLE IF NOT EXISTS cache_key (json TEXT PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS logits (image BLOB PRIMARY KEY, crc32 INTEGER, data BLOB)",
)
_LOCK_SECONDS = 60.0  # that a transaction of another process may take
_WRITE_SECONDS = 0.25  # of work in one transaction, which costs some 10 ms
_PROBED = 8  # images whose compressed size is measured before the rest is begun


def cache_key(
    teacher: Teacher,
    *,
    image_size: AnySize,
    precision: str,
    folded: bool,
    keep_aspect_ratio: bool = False,
    own_depth: bool = False,
) -> dict[str, Any]:
    """Everything that decides a teacher's logits for given file bytes, as plain values.

    Args:
        teacher: the frozen network behind the student's input and classes.
        image_size: of the images and of the logits in pixels.
        precision: in which the network runs: no, bf16 or fp16.
        folded: whether its BatchNorms are multiplied into its convolutions, which rounds otherwise.
        keep_aspect_ratio: whether images are fitted in instead of stretched.
        own_depth: whether images are read by their own bit depth, instead of as 8-bit RGB.
    """
    network = teacher.network
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        "format": FORMAT,
        "stored_as": "float16",
        "weights": tensors_digest(tensors, values=True),
        "network": hashlib.sha256(_architecture(network).encode()).hexdigest()[:16],
        "precision": precision,
        "folded": folded,
        "image_size": plain_size(image_size),
        **({"keep_aspect_ratio": True} if keep_aspect_ratio else {}),
        **({"own_depth": True} if own_depth else {}),
        **({"multi_label": True} if teacher.multi_label else {}),
        "teacher_image_size": teacher.image_size and plain_size(teacher.image_size),
        "num_labels": teacher.num_labels,
        "class_order": teacher.class_map,  # what is kept is merged, and so much smaller
        "input_mean": teacher.input_mean,
        "input_std": teacher.input_std,
        "scale": teacher.scale.flatten().tolist(),
        "shift": teacher.shift.flatten().tolist(),
    }


def _architecture(network: nn.Module) -> str:
    """How a network computes, as text: equal weights in another network give other logits."""
    if isinstance(network, TeacherEnsemble):
        members = [_member(teacher) for teacher in network.teachers]
        return "\n".join([network.extra_repr(), *members])
    config = getattr(network, "config", None)
    settings = {}
    if isinstance(config, PreTrainedConfig):
        settings = json.loads(config.to_json_string(use_diff=False))
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_COPY}
    return f"{network!r}\n{json.dumps(kept, sort_keys=True)}"


def _member(teacher: Teacher) -> str:
    settings = (teacher.image_size, teacher.num_labels, teacher.class_map)
    return f"{_architecture(teacher.network)}\n{settings}"


def cache_file(root: Path, key: Mapping[str, Any]) -> Path:
    """The file of a teacher: 32 hexadecimal digits stand for the key."""
    text = json.dumps(key, sort_keys=True)
    return root / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{_SUFFIX}"


def image_digest(data: bytes) -> bytes:
    """What a row is called: the first 16 bytes of the SHA-256 of the image's file."""
    return hashlib.sha256(data).digest()[:16]


def show_size(size: float) -> str:
    """A size as people say it: 412 kB, 9.8 MB, 24.6 GB."""
    for unit, step in (("GB", 10**9), ("MB", 10**6)):
        if size >= step:
            return f"{size / step:,.1f} {unit}"
    return f"{size / 1000:,.0f} kB"


def as_half(logits: Tensor) -> Half:
    """Logits of any shape as float16 on the CPU.

    Raises:
        FloatingPointError: if one is not finite, or too large for half precision.
    """
    half = logits.detach().to("cpu", torch.float16).contiguous().numpy()
    if not np.isfinite(half).all():
        raise FloatingPointError(
            "Expected finite logits of the teacher of at most 65504, got "
            f"{float(logits.float().abs().max()):g}. Look for broken weights, or train with "
            "--teacher_targets online."
        )
    return half


def encode(logits: Half) -> bytes:
    """Compressed bytes of float16 logits."""
    planes = np.ascontiguousarray(logits).view(np.uint8).reshape(-1, 2).T
    compressed: bytes = _CODEC.compress(planes.tobytes(), asbytes=True)
    return compressed


def decode(data: bytes, shape: tuple[int, ...]) -> Half:
    """The float16 logits of `encode`, which had this shape."""
    count = math.prod(shape)
    low, high = np.frombuffer(_CODEC.decompress(data, 2 * count), np.uint8).reshape(2, count)
    pairs = high.astype("<u2")
    pairs <<= 8
    pairs |= low
    return pairs.view(np.float16).reshape(shape)


@dataclass(frozen=True)
class CacheBudget:
    """The bound of a folder of caches.

    Attributes:
        root: folder that holds one file a teacher.
        bound: bytes that all of them together may take.
    """

    root: Path
    bound: int

    def used(self) -> dict[Path, int]:
        """Bytes of each teacher's file; files of others do not count."""
        return {path: path.stat().st_size for path in self.root.glob(f"*{_SUFFIX}")}

    def check_fits(self, file: Path, used: Mapping[Path, int], images: int, need: float) -> None:
        """Refuse what would grow beyond the bound or the disk.

        Args:
            file: that is to be filled.
            used: what `used` said before it was looked up which images are missing.
            images: how many are to be added.
            need: bytes that they take together, about.

        Raises:
            ValueError: says what is needed, what is there, and what could go.
        """
        taken = sum(used.values())
        wanted = f"{images:,} images of about {show_size(need / images)}"
        if taken + need > self.bound:
            beside = f", beside {show_size(taken)} that are there" if taken else ""
            raise ValueError(
                f"Expected the teacher's logits within {show_size(self.bound)} "
                f"(--teacher_cache_size), got {wanted}, together {show_size(need)}{beside}."
                f"{self._cure(file, used)}"
            )
        free = shutil.disk_usage(nearest_existing(self.root)).free
        if need > free:
            raise ValueError(
                f"Expected {show_size(need)} of free disk at {self.root} for the teacher's logits "
                f"of {wanted}, got {show_size(free)}. Make room, or name another folder with "
                "--teacher_cache."
            )

    def _cure(self, file: Path, used: Mapping[Path, int]) -> str:
        others = {path: size for path, size in used.items() if path != file}
        if not others:
            return " Raise it, or train with --teacher_targets online."
        largest = max(others, key=lambda path: others[path])
        return (
            f" Raise it, or delete what is no longer used: {len(others)} other "
            f"file{'s' if len(others) > 1 else ''} in {self.root}, the largest {largest.name} "
            f"with {show_size(others[largest])}."
        )


@contextmanager
def _open(file: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection that is closed at the end; sqlite's errors get the file's name and a cure.

    Readers may write as well: the first to come takes back what a killed writer has left. Where the
    file is write-protected, sqlite only reads.
    """
    uri = f"{file.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        with closing(sqlite3.connect(uri, _LOCK_SECONDS, uri=True)) as database:
            for statement in _TABLES if create else ():
                database.execute(statement)
            yield database
    except sqlite3.OperationalError as error:
        free = shutil.disk_usage(nearest_existing(file.parent)).free
        raise OSError(
            f"Expected to use the teacher's logits in {file}, got: {error} ({show_size(free)} are "
            "free there). See to the folder's rights, its disk, and that its file system has "
            "locks, or name another one with --teacher_cache."
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"Expected the teacher's logits in {file} as they were written, got a damaged file: "
        f"{reason}. Delete it and go on with --resume: the teacher is asked for them again."
    )


def cached_images(file: Path) -> set[bytes]:
    """Digests of the images in a file; none if there is no file yet.

    Raises:
        ValueError: if the file is damaged.
        OSError: if it cannot be read.
    """
    if not file.exists():
        return set()
    with _open(file, create=True) as database:  # who made it may have died before the tables
        return {image for (image,) in database.execute("SELECT image FROM logits")}


@dataclass(frozen=True)
class TeacherCache:
    """The logits in a teacher's file, for any number of reading processes.

    Each reading connects for itself, which takes 0.1 ms: nothing is left open that must not be used
    after a fork, and cannot be sent to a worker that is spawned.

    Attributes:
        file: of one teacher, see `cache_file`.
        shape: of the logits of an image, (K, H, W).
    """

    file: Path
    shape: tuple[int, int, int]

    def logits(self, data: bytes, name: str) -> Half:
        """The teacher's logits of an image, float16 (K, H, W).

        Args:
            data: the bytes of its file.
            name: what to call it in a message.

        Raises:
            ValueError: if there are none, or they are damaged.
            OSError: if the file cannot be read.
        """
        with _open(self.file) as database:
            query = "SELECT crc32, data FROM logits WHERE image = ?"
            row = database.execute(query, (image_digest(data),)).fetchone()
        if row is None:
            raise ValueError(
                f"Expected the teacher's logits of {name} in {self.file}, got none: the image is "
                "not the one that was there when the run began. Start again, or go on with "
                "--resume: the teacher is asked for what is missing."
            )
        crc32, blob = row
        if zlib.crc32(blob) != crc32:  # sqlite itself keeps no checksums
            raise _damaged(self.file, "bytes in it have changed")
        return decode(blob, self.shape)


@dataclass(frozen=True)
class CacheWriter:
    """Asks the teacher for the images that are missing in its file.

    Any number of processes may do so at the same time. The ranks of a run begin with a share each;
    every process takes batches in an order of its own and leaves out what is there by then, so that
    few images are asked for twice. A batch is written as a whole or not at all; which images are
    in it depends neither on the order nor on kills, as a GPU may round them together.

    Attributes:
        file: of one teacher, see `cache_file`.
        key: what the file belongs to; written into it for people, nothing reads it.
        budget: bound of the disk.
        images: number of the row of each image, by the image's digest.
        read: digest and pixels (C, H, W) of a row; called by several threads.
        infer: logits (B, K, H, W) of pixels (B, C, H, W).
        batch_size: images that the teacher sees at a time.
        threads: that read and decode images.
    """

    file: Path
    key: Mapping[str, Any]
    budget: CacheBudget
    images: Mapping[bytes, int]
    read: Callable[[int], tuple[bytes, Tensor]]
    infer: Callable[[Tensor], Tensor]
    batch_size: int = 1
    threads: int = 1

    def fill(self, *, rank: int = 0, world_size: int = 1, quiet: bool | None = None) -> int:
        """Ask for what is missing; returns when all of it is there, whoever has done it.

        Args:
            rank: of this process among those of its run.
            world_size: how many these are.
            quiet: True hides the progress bar, None shows it on a terminal.

        Returns:
            How many images were missing when it began.

        Raises:
            ValueError: if they do not fit the bound or the disk, before anything is written; if an
                image has changed meanwhile; or if the file is damaged.
            OSError: if the disk does not take them.
        """
        used = self.budget.used()  # before looking what is missing: others may be filling
        missing = self.images.keys() - cached_images(self.file)
        if not missing:
            return 0
        need = len(missing) * self._bytes_each(missing)
        self.budget.check_fits(self.file, used, len(missing), need)
        with writing("the teacher's logits", self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            self._batches(missing, rank, world_size), "ask teacher", unit="batch", disable=quiet
        )
        with _open(self.file, create=True) as database:
            with database:
                insert = "INSERT OR IGNORE INTO cache_key VALUES (?)"
                database.execute(insert, (json.dumps(self.key, indent=1),))
            blobs: dict[bytes, bytes] = {}
            began = time.monotonic()
            for images, pixels in self._read_ahead(database, bar):
                blobs |= zip(images, map(encode, as_half(self.infer(pixels))), strict=True)
                if time.monotonic() - began > _WRITE_SECONDS:
                    self._write(database, blobs)
                    blobs, began = {}, time.monotonic()
            if blobs:
                self._write(database, blobs)
        return len(missing)

    def _bytes_each(self, missing: Set[bytes]) -> float:
        """Bytes that the logits of an image take on the disk, from a few."""
        probed = [self._pixels(image)[None] for image in islice(sorted(missing), _PROBED)]
        sizes = [_whole_pages(encode(as_half(self.infer(pixels)))) for pixels in probed]
        return sum(sizes) / len(sizes)

    def _batches(self, missing: Set[bytes], rank: int, world_size: int) -> list[list[bytes]]:
        """Batches in which something is missing: own share first, in an order of this process."""
        images, size = sorted(self.images), self.batch_size
        batches = [images[i : i + size] for i in range(0, len(images), size)]
        draw = random.Random()  # the generator that trainings use stays as it is
        order = sorted(
            range(len(batches)), key=lambda n: ((n - rank) % world_size > 0, draw.random())
        )
        return [batches[n] for n in order if not missing.isdisjoint(batches[n])]

    def _pixels(self, image: bytes) -> Tensor:
        row = self.images[image]
        digest, pixels = self.read(row)
        if digest != image:
            raise ValueError(
                f"Expected the image of row {row} as it was when the run began, got another one. "
                "Start again once nothing changes the data."
            )
        return pixels

    def _read_ahead(
        self, database: sqlite3.Connection, batches: Collection[list[bytes]]
    ) -> Iterator[tuple[list[bytes], Tensor]]:
        """Digests and pixels of what is still missing of each batch.

        The next batch is read while the teacher looks at this one.
        """
        images: list[bytes] = []
        pixels: Iterator[Tensor] = iter(())
        with ThreadPoolExecutor(self.threads) as pool:
            for batch in chain(batches, [[]]):
                missing = [image for image in batch if not _has(database, image)]
                reading = pool.map(self._pixels, missing)
                if images:
                    yield images, torch.stack(list(pixels))
                images, pixels = missing, reading

    def _write(self, database: sqlite3.Connection, blobs: Mapping[bytes, bytes]) -> None:
        need = sum(map(_whole_pages, blobs.values()))
        # Again, as several teachers may fill one folder at once.
        self.budget.check_fits(self.file, self.budget.used(), len(blobs), need)
        rows = [(image, zlib.crc32(blob), blob) for image, blob in blobs.items()]
        with database:
            database.executemany("INSERT OR IGNORE INTO logits VALUES (?, ?, ?)", rows)


def _whole_pages(blob: bytes) -> int:
    """Bytes that a row takes, which ends in a page that it has for itself unless it is small."""
    return math.ceil(len(blob) / _PAGE) * _PAGE


def _has(database: sqlite3.Connection, image: bytes) -> bool:
    query = "SELECT 1 FROM logits WHERE image = ?"
    return database.execute(query, (image,)).fetchone() is not None
