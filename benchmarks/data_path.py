"""Times of the data path: the augmentation, and the way from files to samples."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import cv2
import datasets
import numpy as np
from PIL import Image

from benchmarks.originals import as_in_library, members
from benchmarks.turns import in_turn, one_core
from kd_trainer.data.augmentation import Augmentation
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.images import decode_image, decode_mask
from kd_trainer.data.masks import MaskRule
from kd_trainer.data.synthetic import synthetic_pair

SHAPE = (480, 640)
"""Height and width of the files that are decoded."""
MASK_WRITERS = ("cv2", "PIL")
_BRIGHTNESS_CONTRAST = 0.8  # the recipe's probability of that group


def augmentation_times(image_size: int = 640, repeats: int = 20) -> dict[str, Any]:
    """The transforms of `heavy`, albumentations' own against ours.

    Args:
        image_size: side of the images in pixels.
        repeats: draws of each transform.

    Returns:
        `transforms`: for each its `probability` in an image, and `library` and `ours`, mean
        milliseconds a draw. `list`: `library` and `ours`, milliseconds an image, the transforms
        weighted with their probabilities, and `ratio`. The library's list ends with its
        normalisation in floats, which ours leaves to the device; `without_normalize` is that list
        without. `measured`: mean milliseconds of whole draws of our list.
    """
    images = [synthetic_pair("train", i, size=image_size, seed=0)[0] for i in range(4)]
    mask = np.zeros((image_size, image_size), np.int16)
    augment = Augmentation(
        "heavy",
        image_size=image_size,
        seed=0,
        brightness_contrast_probability=_BRIGHTNESS_CONTRAST,
    )
    rows: dict[str, dict[str, float]] = {}
    with one_core():
        for member, probability in members(augment.compose):
            works = {
                "library": _draw(as_in_library(member), images),
                "ours": _draw(member, images),
            }
            taken = in_turn(works, repeats)
            times = {name: fmean(values) for name, values in taken.items()}
            rows[type(member).__name__] = {"probability": probability, **times}
        floats = in_turn({"normalize": lambda i: _normalized(images[i % len(images)])}, repeats)
        whole = in_turn(
            {"whole": lambda i: augment(images[i % len(images)], mask, epoch=0, index=i)},
            10 * repeats,
        )
    library, ours = (
        sum(row["probability"] * row[name] for row in rows.values()) for name in ("library", "ours")
    )
    normalize = median(floats["normalize"])
    return {
        "transforms": rows,
        "list": {
            "library": library + normalize,
            "without_normalize": library,
            "ours": ours,
            "ratio": (library + normalize) / ours,
        },
        "measured": fmean(whole["whole"]),
    }


def _draw(transform: Any, images: Sequence[Any]) -> Callable[[int], Any]:
    """One draw of a transform, whatever its probability."""
    transform.p = 1.0

    def work(number: int) -> None:
        transform.set_random_state(np.random.default_rng(number), random.Random(number))
        transform(image=images[number % len(images)])

    return work


def _normalized(image: Any) -> Any:
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    return (image.astype(np.float32) - 255 * mean) * (1 / (255 * deviation))


def decoding_times(
    shape: tuple[int, int] = SHAPE, repeats: int = 400, count: int = 8, image_size: int = 640
) -> dict[str, Any]:
    """A JPEG and its PNG mask from the disk to arrays: PIL through `datasets` against ours.

    Args:
        shape: height and width of the files.
        repeats: rows that are read.
        count: different rows.
        image_size: of whole samples.

    Returns:
        For masks written by `cv2` and by `PIL` each `pil` and `ours`, median milliseconds a row,
        and `ratio`; `sample`: median milliseconds of `none`, a sample without augmentation, and
        the mean of `heavy`.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, one_core():
        for writer in MASK_WRITERS:
            rows = _files(Path(place) / writer, shape, count, writer)
            works = _readers(rows)
            taken = {name: median(ms) for name, ms in in_turn(works, repeats).items()}
            found[writer] = taken | {"ratio": taken["pil"] / taken["ours"]}
            if writer == MASK_WRITERS[0]:
                samples = in_turn(_samplers(rows, image_size), repeats)
                found["sample"] = {
                    "none": median(samples["none"]),
                    "heavy": fmean(samples["heavy"]),
                }
    return found


def _files(place: Path, shape: tuple[int, int], count: int, writer: str) -> list[dict[str, str]]:
    """Paths of `count` drawn photographs and masks."""
    place.mkdir(parents=True)
    rows = []
    for index in range(count):
        image, mask = synthetic_pair("train", index, size=max(shape), seed=0)
        image, mask = image[: shape[0], : shape[1]], mask[: shape[0], : shape[1]]
        names = {"image": str(place / f"{index}.jpg"), "mask": str(place / f"{index}.png")}
        Image.fromarray(image).save(names["image"], quality=92)
        if writer == "cv2":
            cv2.imwrite(names["mask"], mask)
        else:
            Image.fromarray(mask).save(names["mask"])
        rows.append(names)
    return rows


def _table(rows: Sequence[Mapping[str, str]], *, decode: bool) -> Any:
    features = datasets.Features(
        {name: datasets.Image(decode=decode) for name in ("image", "mask")}
    )
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def _readers(rows: Sequence[Mapping[str, str]]) -> dict[str, Callable[[int], Any]]:
    decoded, encoded = _table(rows, decode=True), _table(rows, decode=False)

    def by_pil(number: int) -> None:
        row = decoded[number % len(rows)]
        np.array(row["image"]), np.array(row["mask"])

    def by_us(number: int) -> None:
        row = encoded[number % len(rows)]
        decode_image(row["image"], number), decode_mask(row["mask"], number)

    return {"pil": by_pil, "ours": by_us}


def _samplers(rows: Sequence[Mapping[str, str]], size: int) -> dict[str, Callable[[int], Any]]:
    encoded = _table(rows, decode=False)

    def sampler(kind: str) -> Callable[[int], Any]:
        transform = SegmentationTransform(
            size,
            MaskRule((0, 255)),
            augmentation=kind,
            seed=0,
            brightness_contrast_probability=_BRIGHTNESS_CONTRAST,
        )
        return lambda number: transform(encoded[number % len(rows)], epoch=0, index=number)

    return {kind: sampler(kind) for kind in ("none", "heavy")}
