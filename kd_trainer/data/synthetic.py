"""Synthetic people with exact masks: the data set of `make demo`, of examples and of tests.

Each picture is a function of (seed, split, index) and of its size alone, so that the set can be
drawn again in any order. Pictures hold people in many poses, sizes and clothes, some cut by the
frame or hidden behind things, in front of textured walls and floors, among things with the same
colours and shapes.
"""

import cv2
import datasets
import numpy as np

from kd_trainer.data.drawing import (
    Drawing,
    Image,
    any_colour,
    noise,
    shade,
    texture,
)
from kd_trainer.data.figures import draw_clutter, draw_person

SPLITS = ("train", "validation")
SUPERSAMPLING = 2  # drawn twice as large and averaged: smooth edges at any size
WALLS = ("gradient", "noise", "stripes", "bricks", "blobs", "checks")
MUTED = (0.03, 0.4)  # saturation of walls and floors
SMALLEST = 32


def synthetic_splits(train: int, evaluation: int, *, size: int, seed: int) -> datasets.DatasetDict:
    """Draw the splits `train` and `validation`.

    Args:
        train: number of pictures to train on.
        evaluation: number of pictures held out.
        size: side of the pictures in pixels, at least 32.
        seed: first of the three numbers that decide a picture.

    Returns:
        Splits with the columns `image` and `mask` (PNG bytes, not decoded; mask values 0 and 255).

    Raises:
        ValueError: if a number is out of range.
    """
    if size < SMALLEST:
        raise ValueError(f"Expected size >= {SMALLEST} pixels, got {size}. Draw larger pictures.")
    if train < 1 or evaluation < 1:
        raise ValueError(
            f"Expected at least one picture a split, got {train} to train on and {evaluation} "
            "held out. Raise the smaller number."
        )
    counts = zip(SPLITS, (train, evaluation), strict=True)
    return datasets.DatasetDict({name: _split(name, count, size, seed) for name, count in counts})


def synthetic_pair(split: str, index: int, *, size: int, seed: int) -> tuple[Image, Image]:
    """Draw one picture.

    Args:
        split: "train" or "validation".
        index: number of the picture in its split, from 0.
        size: side in pixels.
        seed: seed of the whole set.

    Returns:
        Picture (size, size, 3) in RGB and mask (size, size) with 0 and 255, both uint8.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    side = size * SUPERSAMPLING
    drawing = Drawing(_backdrop(rng, side), np.zeros((side, side), np.uint8))
    for _ in range(int(rng.integers(1, 4))):
        foot = (float(rng.uniform(0, side)), float(rng.uniform(0.5, 1.0) * side))
        draw_clutter(rng, drawing, foot, side * float(rng.uniform(0.3, 0.9)))
    _crowd(rng, drawing)
    if rng.random() < 0.45:
        foot = (float(rng.uniform(0, side)), float(rng.uniform(0.95, 1.15) * side))
        draw_clutter(rng, drawing, foot, side * float(rng.uniform(0.35, 0.7)))
    small = cv2.resize(drawing.picture, (size, size), interpolation=cv2.INTER_AREA)
    cover = cv2.resize(drawing.mask, (size, size), interpolation=cv2.INTER_AREA)
    return _photograph(rng, np.asarray(small, np.uint8)), np.where(
        cover > 127, np.uint8(255), np.uint8(0)
    )


def _split(name: str, count: int, size: int, seed: int) -> datasets.Dataset:
    pairs = (synthetic_pair(name, index, size=size, seed=seed) for index in range(count))
    images, masks = zip(
        *((_png(image[..., ::-1]), _png(mask)) for image, mask in pairs), strict=True
    )
    column = datasets.Image(decode=False)
    features = datasets.Features({"image": column, "mask": column})
    return datasets.Dataset.from_dict({"image": list(images), "mask": list(masks)}, features)


def _png(pixels: Image) -> dict[str, bytes | None]:
    # Level 1: a third of the time for a tenth more bytes.
    _, encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return {"bytes": encoded.tobytes(), "path": None}


def _backdrop(rng: np.random.Generator, side: int) -> Image:
    """Wall above, floor below, each with its own texture."""
    picture = _surface(rng, side)
    if rng.random() < 0.75:
        horizon = int(side * rng.uniform(0.45, 0.85))
        picture[horizon:] = _surface(rng, side)[horizon:]
    return picture


def _surface(rng: np.random.Generator, side: int) -> Image:
    first = any_colour(rng, saturation=MUTED, value=(0.45, 0.95))
    second = shade(first, float(rng.uniform(0.55, 0.95)))
    kind = WALLS[rng.integers(len(WALLS))]
    return texture(rng, side, kind, (first, second), side * rng.uniform(0.06, 0.25))


def _crowd(rng: np.random.Generator, drawing: Drawing) -> None:
    """One to three people, the farther and smaller ones first."""
    side = drawing.side
    count = int(rng.choice([1, 2, 3], p=[0.42, 0.4, 0.18]))
    heights = np.sort(rng.uniform(0.55, 1.2, count)) * (1.1 - 0.07 * count)
    places = (rng.permutation(count) + rng.uniform(0.1, 0.9, count)) / count
    for height, place in zip(heights, places, strict=True):
        foot = side * float(np.clip(0.62 + 0.36 * height + rng.normal(0, 0.06), 0.6, 1.25))
        hip = (side * float(place), foot - 0.5 * float(height) * side)
        _shadow(drawing.picture, (hip[0], foot), float(height) * side)
        draw_person(rng, drawing, hip, float(height) * side)


def _shadow(picture: Image, foot: tuple[float, float], height: float) -> None:
    cover = np.zeros(picture.shape[:2], np.uint8)
    axes = (int(0.2 * height), int(0.035 * height))
    cv2.ellipse(cover, (int(foot[0]), int(foot[1])), axes, 0, 0, 360, 255, -1)
    cv2.copyTo(cv2.convertScaleAbs(picture, alpha=0.65), cover, picture)


def _photograph(rng: np.random.Generator, picture: Image) -> Image:
    """Uneven light, tint, blur and sensor noise."""
    side = picture.shape[0]
    light = 1 + float(rng.uniform(0, 0.3)) * noise(rng, side, 2)
    exposure = rng.uniform(0.75, 1.15) * rng.uniform(0.94, 1.06, 3)
    pixels = picture * (light[..., None] * exposure.astype(np.float32))
    pixels = pixels + rng.uniform(0, 35) * np.float32(rng.random() < 0.3)  # haze
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.3, 0.005 * side + 0.3)))
    grain = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(1, 6))
    lit: Image = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return lit
