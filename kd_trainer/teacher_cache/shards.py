"""Files of many entries that are there as a whole or not at all.

A shard is a head (magic, number of entries, one record an entry, a checksum) and then the entries'
bytes. It is written beside its place, flushed to the disk and moved there by a rename, and is never
changed afterwards. Records name an entry by its image's digest, with place, length and checksum.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

SUFFIX = ".logits"
PARTIAL = ".partial"
BUCKETS = 64
"""Parts of a cache, by the first byte of the image's digest: what one process fills at a time."""

_MAGIC = b"KDTGT001"
_HEAD = struct.Struct("<8sQ")
_CHECK = struct.Struct("<I")
RECORD = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("start", "<u8"), ("length", "<u4"), ("check", "<u4")]
)
Records = npt.NDArray[np.void]


class DamagedError(ValueError):
    """A shard whose bytes are not those that were written; the message says what is wrong."""


def image_digest(data: bytes) -> bytes:
    """What an entry is called: the first 16 bytes of the SHA-256 of the image's file."""
    return hashlib.sha256(data).digest()[:16]


def bucket_of(image: bytes) -> int:
    """Which part of a cache an image belongs to, 0 to 63."""
    return image[0] % BUCKETS


def halves(image: bytes) -> tuple[int, int]:
    """A digest as two numbers, as records hold it."""
    high, low = struct.unpack(">QQ", image)
    return high, low


def shard_bytes(payloads: Collection[bytes]) -> int:
    """Size of a shard of these entries."""
    fixed = _HEAD.size + _CHECK.size
    return fixed + RECORD.itemsize * len(payloads) + sum(map(len, payloads))


def shard_paths(folder: Path, bucket: int | None = None) -> list[Path]:
    """The shards of a bucket, or of all of them, in a fixed order."""
    start = "*" if bucket is None else f"{bucket:02d}-*"
    return sorted(folder.glob(f"{start}{SUFFIX}"))


def write_shard(folder: Path, bucket: int, entries: Mapping[bytes, bytes]) -> Path:
    """Write the compressed logits of some images of a bucket; returns once they are on the disk.

    Raises:
        OSError: if the disk does not take them; nothing is left behind.
    """
    records = np.zeros(len(entries), RECORD)
    start = _HEAD.size + records.nbytes + _CHECK.size
    for place, (image, data) in enumerate(entries.items()):
        records[place] = (*halves(image), start, len(data), zlib.crc32(data))
        start += len(data)
    head = _HEAD.pack(_MAGIC, len(entries)) + records.tobytes()
    content = b"".join([head, _CHECK.pack(zlib.crc32(head)), *entries.values()])
    name = f"{bucket:02d}-{hashlib.sha256(content).hexdigest()[:16]}{SUFFIX}"
    partial = folder / f"{name}.{os.getpid()}{PARTIAL}"
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(folder)
    return folder / name


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: Path) -> Records:
    """The head of a shard.

    Raises:
        DamagedError: if it is no shard, was cut off or lengthened, or its head has changed.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_HEAD.size)
        if len(first) < _HEAD.size or first[:8] != _MAGIC:
            raise DamagedError("it does not begin as one")
        count = _HEAD.unpack(first)[1]
        length = count * RECORD.itemsize
        if length > size:
            raise DamagedError("it is cut off")
        body, check = file.read(length), file.read(_CHECK.size)
    if len(check) < _CHECK.size or zlib.crc32(first + body) != _CHECK.unpack(check)[0]:
        raise DamagedError("its head has changed")
    records = np.frombuffer(body, RECORD)
    wanted = _HEAD.size + length + _CHECK.size + int(records["length"].sum())
    if size != wanted:
        raise DamagedError(f"it has {size:,} bytes instead of {wanted:,}")
    return records


def read_entry(path: Path, record: np.void) -> bytes:
    """The bytes of one entry.

    Raises:
        DamagedError: if the file is gone or the bytes have changed since they were written.
    """
    try:
        with path.open("rb") as file:
            file.seek(int(record["start"]))
            data = file.read(int(record["length"]))
    except FileNotFoundError:
        raise DamagedError("it is gone") from None
    if zlib.crc32(data) != int(record["check"]):
        raise DamagedError("bytes in it have changed")
    return data


def images_of(records: Records) -> set[bytes]:
    """Digests of the images that records name."""
    pairs = zip(records["high"].tolist(), records["low"].tolist(), strict=True)
    return {struct.pack(">QQ", high, low) for high, low in pairs}
