"""Reading: from the digest of an image to the teacher's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_trainer.teacher_cache.coding import Half, decode
from kd_trainer.teacher_cache.shards import (
    RECORD,
    DamagedError,
    halves,
    image_digest,
    read_entry,
    read_records,
    shard_paths,
)


class TargetCache:
    """The logits that lie in a folder, for any number of reading processes.

    It knows what was there when it was made. It holds 40 bytes an image and no open file, so it can
    be copied into DataLoader workers.

    Args:
        folder: of one teacher and its circumstances (see `key.about`).
        shape: of the logits of an image, (K, H, W).

    Raises:
        ValueError: if a shard is damaged; names it.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder = folder
        self.shape = shape
        self.paths = shard_paths(folder)
        records = []
        for path in self.paths:
            try:
                records.append(read_records(path))
            except DamagedError as error:
                raise _damaged(path, error) from None
        together = np.concatenate([np.zeros(0, RECORD), *records])
        shards = np.repeat(np.arange(len(records)), [len(r) for r in records])
        order = np.argsort(together["high"], kind="stable")
        self._records, self._shards = together[order], shards[order].astype(np.int32)
        self._high = np.ascontiguousarray(self._records["high"])

    def __len__(self) -> int:
        return len(self._records)

    def logits(self, data: bytes, name: str) -> Half:
        """The teacher's logits of an image, float16 (K, H, W).

        Args:
            data: the bytes of its file.
            name: what to call it in a message.

        Raises:
            ValueError: if there are none, or they are damaged.
        """
        place = self._find(image_digest(data))
        if place is None:
            raise ValueError(
                f"Expected the teacher's logits of {name} in {self.folder}, got none: the file is "
                "not the one that was there when the run began. Start again, or go on with "
                "--resume: the teacher is asked for what is missing."
            )
        path = self.paths[int(self._shards[place])]
        try:
            return decode(read_entry(path, self._records[place]), self.shape)
        except ValueError as error:
            raise _damaged(path, error) from None

    def _find(self, image: bytes) -> int | None:
        high, low = halves(image)
        place = int(np.searchsorted(self._high, np.uint64(high)))
        while place < len(self._high) and int(self._high[place]) == high:
            if int(self._records["low"][place]) == low:
                return place
            place += 1
        return None


def _damaged(path: Path, error: ValueError) -> ValueError:
    return ValueError(
        f"Expected the teacher's logits in {path} as they were written, got a damaged file: "
        f"{error}. Delete it and go on with --resume: the teacher is asked for them again."
    )
