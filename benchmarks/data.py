"""The path of the data on one core: `benchmark.py data`. Files that are drawn to be read."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import albumentations as A
import cv2
import datasets
import numpy as np
from PIL import Image

from benchmarks.timer import figures_table, ratios, take_turns, timed
from kd_trainer.costs import torch_threads
from kd_trainer.data import StreamedDataset, TransformedDataset, load_splits, transforms
from kd_trainer.data.augmentation import Augmentation, SoftFog
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.images import decode_image
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.synthetic import synthetic_pair
from kd_trainer.data_arguments import DataArguments
from kd_trainer.fields import check_at_least, help_field

SHAPE = (480, 640)
"""Height and width of drawn files: those of a small photograph."""
DRAWN = 8  # the others are hard links to them
Variants = dict[str, Callable[[int], float]]


@dataclass
class DataPathArguments:
    """Settings of `benchmark.py data`."""

    image_size: int = help_field(640, "Side of the augmented images in pixels.")
    repeats: int = help_field(20, "Draws of each transform.")
    images: list[int] = help_field([100, 100_000], "Numbers of images of the growing folders.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        check_at_least("repeats", self.repeats, 1)
        for count in self.images:
            check_at_least("images", count, 1)


def run_data(args: DataPathArguments) -> dict[str, Any]:
    """Augmentation, decoding and growth, in processor time of one core as in a worker."""
    cv2.setNumThreads(1)
    with torch_threads(1):
        augmentation = augmentation_times(args.image_size, args.repeats)
        decoding = decoding_times(args.image_size, 20 * args.repeats)
        growing = growth(args.images)
    whole = {"whole list, weighted": augmentation["list"]}
    print(f"\nHeavy, ms:\n\n{figures_table(augmentation['transforms'] | whole)}")
    print(f"\nDecoding and whole samples, ms:\n\n{figures_table(decoding)}")
    print(f"\nFolders by images: start in s, MiB, samples a second\n\n{figures_table(growing)}")
    return {"augmentation": augmentation, "decoding": decoding, "growth": growing}


def augmentation_times(image_size: int, repeats: int) -> dict[str, Any]:
    """The transforms of `heavy`, albumentations' own against ours; only the fog is not the same.

    Returns:
        `transforms`: for each its `probability` in an image, and `library` and `ours`, mean
        milliseconds a draw. `list`: `library` and `ours`, milliseconds an image, the transforms
        weighted with their probabilities, and `ratio`. The library's list ends with Normalize in
        floats, which ours leaves to the device; `without_normalize` is that list without.
        `measured`: mean milliseconds of whole draws of our list.
    """
    images = [synthetic_pair("train", i, size=image_size, seed=0)[0] for i in range(4)]
    mask = np.zeros((image_size, image_size), np.int16)
    augment = Augmentation(
        "heavy", image_size=image_size, seed=0, brightness_contrast_probability=0.8
    )
    rows = {}
    for ours, probability in members(augment.compose):
        works = {"library": _draw(in_library(ours), images), "ours": _draw(ours, images)}
        means = {name: fmean(taken) for name, taken in take_turns(works, repeats).items()}
        rows[type(ours).__name__] = {"probability": probability, **means}
    whole = take_turns(
        {
            "normalize": _draw(A.Normalize(), images),
            "list": timed(lambda i: augment(images[i % len(images)], mask, epoch=0, index=i)),
        },
        10 * repeats,
    )
    library, ours = (
        sum(row["probability"] * row[name] for row in rows.values()) for name in ("library", "ours")
    )
    normalized = library + median(whole["normalize"])
    totals = {"library": normalized, "without_normalize": library, "ours": ours}
    totals["ratio"] = normalized / ours
    return {"transforms": rows, "list": totals, "measured": fmean(whole["list"])}


def members(compose: Any) -> Iterator[tuple[Any, float]]:
    """The transforms of a composition, each with its probability in an image."""
    for entry in compose.transforms:
        # ColorJitter has `transforms` as well, but is no group of them.
        group = entry.transforms if isinstance(entry, A.OneOf) else [entry]
        total = sum(member.p for member in group)
        for member in group:
            yield member, float(entry.p * member.p / total)


def in_library(transform: Any) -> Any:
    """What albumentations itself has in the place of one of our transforms."""
    if isinstance(transform, SoftFog):
        return A.RandomFog(transform.alpha_coef, transform.fog_coef_range, p=transform.p)
    return transform


def _draw(transform: Any, images: Sequence[Any]) -> Callable[[int], float]:
    """One draw of a transform, whatever its probability."""
    transform.p = 1.0

    def draw(number: int) -> None:
        transform.set_random_state(np.random.default_rng(number), random.Random(number))
        transform(image=images[number % len(images)])

    return timed(draw)


def decoding_times(
    image_size: int, repeats: int, shape: tuple[int, int] = SHAPE
) -> dict[str, dict[str, float]]:
    """A JPEG and its PNG mask from the disk to arrays: PIL through `datasets` against ours.

    Returns:
        For masks written by `cv2` and by `PIL` each `pil` and `ours`, median milliseconds a row,
        and `ratio`, the median over neighbouring rows; `sample`: median milliseconds of `none`, a
        sample of `image_size` without augmentation, and the mean of `heavy`.
    """
    measured: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as place:
        for writer in ("cv2", "PIL"):
            folder = draw_pairs(Path(place) / writer, DRAWN, shape, mask_writer=writer)
            times = take_turns(_readers(folder), repeats)
            own = {name: median(taken) for name, taken in times.items()}
            measured[writer] = own | {"ratio": median(ratios(times["pil"], times["ours"]))}
        folder = Path(place) / "cv2"
        samples = {kind: _sampler(folder, image_size, kind) for kind in ("none", "heavy")}
        times = take_turns(samples, repeats)
    measured["sample"] = {"none": median(times["none"]), "heavy": fmean(times["heavy"])}
    return measured


def _readers(folder: Path) -> Variants:
    encoded, _ = read_folder(folder)
    decoded = encoded
    for column in encoded.column_names:
        decoded = decoded.cast_column(column, datasets.Image())

    def by_pil(number: int) -> None:
        row = decoded[number % len(decoded)]
        np.array(row["image"]), np.array(row["mask"])

    def by_us(number: int) -> None:
        row = encoded[number % len(encoded)]
        decode_image(row["image"], number), decode_mask(row["mask"], number)

    return {"pil": timed(by_pil), "ours": timed(by_us)}


def _sampler(folder: Path, image_size: int, kind: str) -> Callable[[int], float]:
    rows, transform = read_folder(folder, image_size=image_size, augmentation=kind)
    return timed(lambda number: transform(rows[number % len(rows)], epoch=0, index=number))


def growth(
    counts: Sequence[int], side: int = 64, samples: int = 200
) -> dict[str, dict[str, float]]:
    """Pair folders of `counts` images: what must not grow with them.

    Returns:
        For each count `start`, processor seconds from the folder to the transforms, `mib` of the
        table, and `map` and `stream`, samples a second, of `samples` in each of three turns.
    """
    rows: dict[str, dict[str, float]] = {}
    works: Variants = {}
    with TemporaryDirectory() as place:
        for count in counts:
            folder = draw_pairs(Path(place) / str(count), count, (side, side))
            begin = time.process_time()
            table, transform = read_folder(folder, image_size=side)
            start = time.process_time() - begin
            rows[str(count)] = {"start": start, "mib": table.data.nbytes / 2**20}
            stream, _ = read_folder(folder, image_size=side, streaming=True)
            works[f"map {count}"] = _by_number(TransformedDataset(table, transform), samples)
            # The buffer is filled before the first sample; a small one keeps that out.
            streamed = StreamedDataset(stream, transform, shuffle=True, seed=0, buffer_size=16)
            works[f"stream {count}"] = _in_order(streamed, samples)
        taken = take_turns(works, 3)
    for count in counts:
        for kind in ("map", "stream"):
            rows[str(count)][kind] = 1000 * samples / median(taken[f"{kind} {count}"])
    return rows


def _by_number(mapped: TransformedDataset, samples: int) -> Callable[[int], float]:
    def read(turn: int) -> None:
        for index in np.random.default_rng(turn).integers(0, len(mapped), samples):
            mapped[int(index)]

    return timed(read)


def _in_order(streamed: StreamedDataset, samples: int) -> Callable[[int], float]:
    def read(turn: int) -> None:
        left, epoch = samples, turn
        while left:
            streamed.set_epoch(epoch)
            left -= sum(1 for _ in islice(streamed, left))
            epoch += 1

    return timed(read)


def draw_pairs(
    folder: Path, count: int, shape: tuple[int, int] = SHAPE, *, mask_writer: str = "cv2"
) -> Path:
    """Write JPEG images and PNG masks as a pair folder with the split `train`.

    Args:
        folder: is made.
        count: pairs, of which the first few are drawn.
        shape: height and width of the files.
        mask_writer: `cv2` or `PIL`, which compress otherwise.
    """
    images, masks = (folder / "train" / kind for kind in ("images", "masks"))
    for place in (images, masks):
        place.mkdir(parents=True)
    window = (slice(shape[0]), slice(shape[1]))
    for index in range(count):
        files = images / f"{index:07d}.jpg", masks / f"{index:07d}.png"
        if index >= DRAWN:
            for file in files:
                os.link(file.with_stem(f"{index % DRAWN:07d}"), file)
            continue
        image, mask = synthetic_pair("train", index, size=max(shape), seed=0)
        Image.fromarray(image[window]).save(files[0], quality=92)
        if mask_writer == "cv2":
            cv2.imwrite(str(files[1]), mask[window])
        else:
            Image.fromarray(mask[window]).save(files[1])
    return folder


def read_folder(
    folder: Path, split: str = "train", **settings: Any
) -> tuple[Any, SegmentationTransform]:
    """Encoded rows of a split of a pair folder, and how they become samples to train on."""
    data = DataArguments(dataset=str(folder), train_split=split, **settings)
    splits = load_splits(data, [split])
    training, _ = transforms(splits, data, seed=0)
    return splits[split], training
