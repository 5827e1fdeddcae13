"""What grows with a data set, and what must not: the start, the memory, the time of a sample."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np

from benchmarks.turns import in_turn, one_core
from kd_trainer.arguments import DataArguments
from kd_trainer.data import StreamedDataset, TransformedDataset, load_splits, transforms
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.synthetic import synthetic_pair

_LINKED = 8  # files of which a large folder consists; a file system bounds the links to one


def growth(
    counts: Sequence[int] = (100, 100_000), image_size: int = 64, samples: int = 200
) -> dict[str, Any]:
    """Pair folders of different sizes: time to the first sample, and samples a second after it.

    Args:
        counts: images of each folder, the smallest first; hard links to a few tiny files.
        image_size: side of the files and samples in pixels.
        samples: that are read of each folder at a time, in three turns.

    Returns:
        For each count `start`, processor seconds from the folder to the transforms, `mib` of the
        table, and `map` and `stream`, samples a second; `ratio` of the last count to the first.
    """
    if not counts or min(counts) < 1 or samples < 1:
        raise ValueError(
            f"Expected at least one image and sample, got {list(counts)} and {samples}. Raise them."
        )
    rows: dict[str, Any] = {}
    works: dict[str, Callable[[int], Any]] = {}
    with tempfile.TemporaryDirectory() as place, one_core():
        for count in counts:
            folder = _linked(Path(place) / str(count), count, image_size)
            data = DataArguments(dataset=str(folder), image_size=image_size)
            begin = time.process_time()
            splits = load_splits(data)
            training, _ = transforms(splits, data, seed=0)
            start = time.process_time() - begin
            rows[str(count)] = {"start": start, "mib": splits["train"].data.nbytes / 2**20}
            stream = load_splits(replace(data, streaming=True))["train"]
            works[f"map {count}"] = _by_number(splits["train"], training, samples)
            works[f"stream {count}"] = _in_order(stream, training, samples)
        taken = in_turn(works, 3)
    for count in counts:
        for kind in ("map", "stream"):
            rows[str(count)][kind] = 1000 * samples / median(taken[f"{kind} {count}"])
    first, last = rows[str(counts[0])], rows[str(counts[-1])]
    return rows | {"ratio": {kind: last[kind] / first[kind] for kind in ("map", "stream")}}


def _by_number(rows: Any, training: SegmentationTransform, samples: int) -> Callable[[int], None]:
    mapped = TransformedDataset(rows, training)

    def work(turn: int) -> None:
        for index in np.random.default_rng(turn).integers(0, len(mapped), samples):
            mapped[int(index)]

    return work


def _in_order(rows: Any, training: SegmentationTransform, samples: int) -> Callable[[int], None]:
    # The buffer is filled before the first sample; a small one keeps that out of the figures.
    streamed = StreamedDataset(rows, training, shuffle=True, seed=0, buffer_size=16)

    def work(turn: int) -> None:
        left = samples
        for epoch in range(turn, turn + samples):
            streamed.set_epoch(epoch)
            left -= sum(1 for _ in islice(streamed, left))
            if not left:
                return

    return work


def _linked(folder: Path, count: int, size: int) -> Path:
    """A pair folder of hard links to a few drawn pairs."""
    for split, pairs in (("train", count), ("validation", _LINKED)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(pairs):
            for kind, ending in (("images", "jpg"), ("masks", "png")):
                file = folder / f"{kind}{index % _LINKED}.{ending}"
                if not file.exists():
                    drawn = synthetic_pair("train", index, size=size, seed=0)[kind == "masks"]
                    cv2.imwrite(str(file), drawn)
                os.link(file, folder / split / kind / f"{index:07d}.{ending}")
    return folder
