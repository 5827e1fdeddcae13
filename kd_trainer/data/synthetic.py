"""Synthetic people with exact masks: the data set of `make demo`, of examples and of tests.

Each image is a function of (seed, split, index) and of its size alone, so that the set can be drawn
again in any order. Colours are RGB. A drawing is an image and its mask, changed together: every
stroke writes its colour into the one and its label into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import datasets
import numpy as np
from numpy.typing import NDArray

from kd_trainer.models.image_sizes import AnySize, as_size, size_text

Image = NDArray[np.uint8]
Field = NDArray[np.float32]
Colour = tuple[int, int, int]
Point = tuple[float, float]

SPLITS = ("train", "validation")
BACKGROUND, PERSON = 0, 255
SMALLEST = 32
SUPERSAMPLING = 2  # drawn twice as large and averaged: smooth edges at any size
SKIN: tuple[Colour, ...] = (
    (255, 224, 196), (241, 194, 155), (224, 172, 125), (190, 130, 88), (141, 85, 54), (92, 58, 40),
)  # fmt: skip
HAIR: tuple[Colour, ...] = (
    (28, 22, 20), (70, 42, 26), (122, 78, 42), (196, 152, 82), (150, 60, 34), (150, 150, 152),
)  # fmt: skip
VIVID, MUTED = (0.45, 0.95), (0.03, 0.4)  # saturation of clothes, and of walls and floors
PATTERNS = ("plain", "stripes", "checks", "dots", "noise", "bricks", "blobs", "gradient")
CLOTHES = ("plain", "plain", "stripes", "checks", "dots", "noise")
WALLS = ("gradient", "noise", "stripes", "bricks", "blobs", "checks")


def synthetic_splits(
    train: int, evaluation: int, *, size: AnySize, seed: int
) -> datasets.DatasetDict:
    """Draw the splits `train` and `validation`.

    Args:
        train: number of images to train on.
        evaluation: number of images held out.
        size: of the images in pixels, at least 32 a side.
        seed: first of the three numbers that decide an image.

    Returns:
        Splits with the columns `image` and `mask` (PNG bytes, not decoded; mask values 0 and 255).

    Raises:
        ValueError: if a number is out of range.
    """
    if min(as_size(size)) < SMALLEST:
        raise ValueError(
            f"Expected size >= {SMALLEST} pixels, got {size_text(size)}. Draw larger images."
        )
    if train < 1 or evaluation < 1:
        raise ValueError(
            f"Expected at least one image a split, got {train} to train on and {evaluation} "
            "held out. Raise the smaller number."
        )
    counts = zip(SPLITS, (train, evaluation), strict=True)
    return datasets.DatasetDict({name: _split(name, count, size, seed) for name, count in counts})


def _split(name: str, count: int, size: AnySize, seed: int) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"image": [], "mask": []}
    for index in range(count):
        image, mask = synthetic_pair(name, index, size=size, seed=seed)
        columns["image"].append(_png(image[..., ::-1]))
        columns["mask"].append(_png(mask))
    features = datasets.Features(dict.fromkeys(columns, datasets.Image(decode=False)))
    return datasets.Dataset.from_dict(columns, features)


def _png(pixels: Image) -> dict[str, bytes | None]:
    # Level 1: a third of the time for a tenth more bytes.
    _, encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return {"bytes": encoded.tobytes(), "path": None}


def synthetic_pair(split: str, index: int, *, size: AnySize, seed: int) -> tuple[Image, Image]:
    """Draw one image: a square, of which an oblong shows the part with most of the people.

    Args:
        split: "train" or "validation".
        index: number of the image in its split, from 0.
        size: in pixels.
        seed: seed of the whole set.

    Returns:
        Image (H, W, 3) in RGB and mask (H, W) with 0 and 255, both uint8.
    """
    height, width = as_size(size)
    image, mask = _square(split, index, max(height, width), seed)
    rows, columns = (
        _fullest(mask.sum(axis=1 - axis, dtype=np.int64), length)
        for axis, length in enumerate((height, width))
    )
    return image[rows, columns], mask[rows, columns]


def _fullest(counts: NDArray[np.int64], length: int) -> slice:
    """The `length` neighbours among counts whose sum is the largest, the first of several."""
    sums = np.convolve(counts, np.ones(length, np.int64), mode="valid")
    start = int(sums.argmax())
    return slice(start, start + length)


def _square(split: str, index: int, size: int, seed: int) -> tuple[Image, Image]:
    """Image (size, size, 3) and mask (size, size) of `synthetic_pair`."""
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
    small = cv2.resize(drawing.image, (size, size), interpolation=cv2.INTER_AREA)
    cover = cv2.resize(drawing.mask, (size, size), interpolation=cv2.INTER_AREA)
    mask = np.where(cover > 127, np.uint8(255), np.uint8(0))
    return _expose(rng, np.asarray(small, np.uint8)), mask


def _backdrop(rng: np.random.Generator, side: int) -> Image:
    """Wall above, floor below, each with its own texture."""
    image = _surface(rng, side)
    if rng.random() < 0.75:
        horizon = int(side * rng.uniform(0.45, 0.85))
        image[horizon:] = _surface(rng, side)[horizon:]
    return image


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
        _shadow(drawing.image, (hip[0], foot), float(height) * side)
        draw_person(rng, drawing, hip, float(height) * side)


def _shadow(image: Image, foot: tuple[float, float], height: float) -> None:
    cover = np.zeros(image.shape[:2], np.uint8)
    axes = (int(0.2 * height), int(0.035 * height))
    cv2.ellipse(cover, (int(foot[0]), int(foot[1])), axes, 0, 0, 360, 255, -1)
    cv2.copyTo(cv2.convertScaleAbs(image, alpha=0.65), cover, image)


def _expose(rng: np.random.Generator, image: Image) -> Image:
    """Give a drawing uneven light, tint, blur and sensor noise."""
    side = image.shape[0]
    light = 1 + float(rng.uniform(0, 0.3)) * noise(rng, side, 2)
    exposure = rng.uniform(0.75, 1.15) * rng.uniform(0.94, 1.06, 3)
    pixels = image * (light[..., None] * exposure.astype(np.float32))
    pixels = pixels + rng.uniform(0, 35) * np.float32(rng.random() < 0.3)  # haze
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.3, 0.005 * side + 0.3)))
    grain = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 6))
    lit: Image = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return lit


@dataclass(frozen=True)
class Body:
    """Where a person stands: `hip` in pixels, `height` in pixels, `lean` and `turn` in radians."""

    hip: Point
    height: float
    lean: float
    width: float

    def at(self, across: float, up: float) -> Point:
        """Pixel position of a point given in body heights, seen from the hip."""
        cosine, sine = float(np.cos(self.lean)), float(np.sin(self.lean))
        x, y = across * self.width * self.height, -up * self.height
        return self.hip[0] + cosine * x - sine * y, self.hip[1] + sine * x + cosine * y


@dataclass(frozen=True)
class Outfit:
    """Colours and cloth of one person."""

    skin: Colour
    hair: Colour
    shirt: Image
    sleeve: Colour
    trousers: Colour
    shoes: Colour


def draw_person(rng: np.random.Generator, drawing: Drawing, hip: Point, height: float) -> None:
    """Draw one person in a random pose, labelled PERSON.

    Args:
        rng: source of pose, build and clothes.
        drawing: changed in place.
        hip: position of the hip in pixels; it may lie outside the image.
        height: height of the upright person in pixels.
    """
    body = Body(hip, height, float(rng.normal(0, 0.09)), float(rng.uniform(1.0, 1.35)))
    outfit = _outfit(rng, drawing.side, height)
    drawing.label = PERSON
    long_hair = rng.random() < 0.4
    head = body.at(float(rng.normal(0, 0.012)), 0.40)
    radius = height * float(rng.uniform(0.09, 0.118))
    if long_hair:
        drawing.ball((head[0], head[1] + 0.55 * radius), (1.22 * radius, 1.7 * radius), outfit.hair)
    _arm(rng, drawing, body, outfit, -1)
    _legs(rng, drawing, body, outfit)
    drawing.limb(body.at(0, 0.26), head, 0.075 * height, shade(outfit.skin, 0.9))
    _torso(rng, drawing, body, outfit)
    _head(rng, drawing, outfit, head, radius)
    _arm(rng, drawing, body, outfit, 1)
    drawing.label = BACKGROUND


def _outfit(rng: np.random.Generator, side: int, height: float) -> Outfit:
    main, other = (any_colour(rng, saturation=VIVID) for _ in range(2))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    shirt = texture(rng, side, kind, (main, other), height * rng.uniform(0.04, 0.09))
    return Outfit(
        pick(rng, SKIN),
        pick(rng, HAIR),
        shirt,
        main,
        any_colour(rng, saturation=VIVID, value=(0.2, 0.7)),
        any_colour(rng),
    )


def _torso(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit) -> None:
    shoulder, waist = float(rng.uniform(0.098, 0.125)), float(rng.uniform(0.07, 0.095))
    hem = float(rng.uniform(0.085, 0.11))
    bottom = -0.03 if rng.random() < 0.7 else float(rng.uniform(-0.24, -0.14))  # shirt or dress
    flare = hem if bottom > -0.1 else hem + 0.06
    outline = [
        (-0.045, 0.305), (0.045, 0.305), (shoulder, 0.275), (shoulder, 0.2), (waist, 0.1),
        (flare, bottom), (-flare, bottom), (-waist, 0.1), (-shoulder, 0.2), (-shoulder, 0.275),
    ]  # fmt: skip
    drawing.shape([body.at(*corner) for corner in outline], outfit.shirt)


def _legs(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit) -> None:
    bare = rng.random() < 0.3
    thick = body.height * float(rng.uniform(0.085, 0.115))
    stride = float(abs(rng.normal(0, 0.28)))
    for side in (-1, 1):
        thigh = side * (0.06 + stride * float(rng.uniform(0.5, 1)))
        shin = thigh * float(rng.uniform(-0.4, 1.0)) if rng.random() < 0.8 else -1.2 * thigh
        hip = (0.045 * side, 0.0)
        knee = (hip[0] + 0.25 * np.sin(thigh), hip[1] - 0.25 * np.cos(thigh))
        ankle = (knee[0] + 0.24 * np.sin(shin), knee[1] - 0.24 * np.cos(shin))
        lower = outfit.skin if bare else outfit.trousers
        drawing.limb(body.at(*knee), body.at(*ankle), 0.8 * thick, lower)
        drawing.limb(body.at(*hip), body.at(*knee), thick, outfit.trousers)
        foot = body.at(ankle[0] + 0.02 * side, ankle[1] - 0.015)
        drawing.ball(foot, (0.055 * body.height, 0.028 * body.height), outfit.shoes)


def _arm(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit, side: int) -> None:
    posture = rng.random()
    upper = float(rng.uniform(0.05, 0.4)) if posture < 0.6 else float(rng.uniform(0.5, 2.6))
    bend = float(rng.uniform(-0.5, 0.3)) if posture < 0.6 else float(rng.uniform(-0.3, 1.4))
    if 0.45 < posture < 0.6:  # hand on the hip
        upper, bend = 0.75, -1.6
    thick = body.height * float(rng.uniform(0.062, 0.078))
    shoulder = (0.095 * side, 0.265)
    elbow = (shoulder[0] + side * 0.15 * np.sin(upper), shoulder[1] - 0.15 * np.cos(upper))
    angle = upper + bend
    hand = (elbow[0] + side * 0.15 * np.sin(angle), elbow[1] - 0.15 * np.cos(angle))
    lower = outfit.sleeve if rng.random() < 0.5 else outfit.skin
    drawing.limb(body.at(*elbow), body.at(*hand), 0.85 * thick, lower)
    drawing.limb(body.at(*shoulder), body.at(*elbow), thick, outfit.sleeve)
    drawing.ball(body.at(*hand), (0.55 * thick, 0.55 * thick), outfit.skin)


def _head(
    rng: np.random.Generator, drawing: Drawing, outfit: Outfit, head: Point, radius: float
) -> None:
    x, y = head
    drawing.ball(head, (0.9 * radius, 1.1 * radius), outfit.skin)
    looks = float(rng.uniform(-0.3, 0.3)) * radius
    if rng.random() < 0.8:
        for eye in (-0.33, 0.33):
            spot = (x + looks + eye * radius, y + 0.02 * radius)
            drawing.ball(spot, (0.1 * radius, 0.12 * radius), (30, 24, 24))
        mouth = (x + looks, y + 0.5 * radius)
        drawing.ball(mouth, (0.25 * radius, 0.08 * radius), (170, 70, 70))
    top, axes = pixel((x, y - 0.22 * radius)), pixel((radius, 0.95 * radius))
    hat = rng.random() < 0.2
    colour = any_colour(rng) if hat else outfit.hair
    cv2.ellipse(drawing.image, top, axes, 0, 180, 360, colour, -1, cv2.LINE_AA)
    cv2.ellipse(drawing.mask, top, axes, 0, 180, 360, drawing.label, -1)
    if hat:
        brim = 1.35 * radius
        left, right = (x - brim, y - 0.28 * radius), (x + brim, y - 0.28 * radius)
        drawing.limb(left, right, 0.24 * radius, shade(colour, 0.8))


def draw_clutter(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    """Draw one thing that shares parts or colours with people, labelled BACKGROUND.

    Args:
        rng: chooses tree, lamp, balls in skin colours, snowman, empty shirt or box.
        drawing: changed in place.
        foot: where the thing stands, in pixels.
        height: its height in pixels.
    """
    kinds = (_tree, _lamp, _balls, _snowman, _shirt, _box)
    kinds[rng.integers(len(kinds))](rng, drawing, foot, height)


def _tree(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    drawing.limb(foot, (x, y - 0.6 * height), 0.1 * height, pick(rng, HAIR[1:3]))
    leaves = pick(rng, ((60, 120, 50), (110, 140, 50), (190, 120, 50), (40, 90, 70)), 20)
    for _ in range(4):
        centre = (x + rng.normal(0, 0.1) * height, y - rng.uniform(0.6, 0.9) * height)
        size = height * float(rng.uniform(0.13, 0.22))
        drawing.ball(centre, (size, 0.9 * size), shade(leaves, float(rng.uniform(0.8, 1.15))))


def _lamp(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    drawing.limb(
        foot, (x, y - 0.9 * height), 0.06 * height, any_colour(rng, saturation=(0.03, 0.3))
    )
    light = pick(rng, (*SKIN, (250, 240, 190)))
    drawing.ball((x, y - 0.92 * height), (0.1 * height, 0.11 * height), light)


def _balls(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    for _ in range(int(rng.integers(1, 4))):
        radius = height * float(rng.uniform(0.06, 0.14))
        centre = (x + rng.normal(0, 0.25) * height, y - radius - rng.uniform(0, 0.5) * height)
        drawing.ball(centre, (radius, radius * float(rng.uniform(0.8, 1.2))), pick(rng, SKIN))


def _snowman(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    colour = any_colour(rng, saturation=(0.03, 0.4))
    for up, size in ((0.2, 0.2), (0.52, 0.15), (0.78, 0.1)):
        drawing.ball((x, y - up * height), (size * height, size * height), colour)


def _shirt(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot[0], foot[1] - 0.75 * height
    colours = (any_colour(rng), any_colour(rng))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    cloth = texture(rng, drawing.side, kind, colours, 0.07 * height)
    drawing.limb((x, y), (x, y - 0.1 * height), 0.02 * height, (70, 70, 70))
    outline = [
        (-0.05, 0), (0.05, 0), (0.2, 0.12), (0.15, 0.19), (0.11, 0.15), (0.12, 0.42),
        (-0.12, 0.42), (-0.11, 0.15), (-0.15, 0.19), (-0.2, 0.12),
    ]  # fmt: skip
    drawing.shape([(x + across * height, y + down * height) for across, down in outline], cloth)


def _box(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    width, tall = height * float(rng.uniform(0.15, 0.35)), height * float(rng.uniform(0.3, 0.7))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    colours = (any_colour(rng), any_colour(rng))
    cloth = texture(rng, drawing.side, kind, colours, 0.08 * height)
    slant = float(rng.normal(0, 0.06)) * height
    top = y - tall
    corners = [(x - width / 2, y), (x - width / 2 + slant, top), (x + width / 2 + slant, top)]
    drawing.shape([*corners, (x + width / 2, y)], cloth)


@dataclass
class Drawing:
    """A square RGB image (side, side, 3) with its mask (side, side); lengths are in pixels."""

    image: Image
    mask: Image
    label: int = BACKGROUND

    @property
    def side(self) -> int:
        """Side of the image in pixels."""
        return int(self.image.shape[0])

    def limb(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a thick line with round ends, lit from the upper left."""
        first, last, thickness = pixel(start), pixel(end), max(round(width), 1)
        cv2.line(self.image, first, last, shade(colour, 0.78), thickness, cv2.LINE_AA)
        cv2.line(self.mask, first, last, self.label, thickness)
        if thickness > 3:
            lift = 0.13 * width
            lit = [pixel((x - lift, y - 0.5 * lift)) for x, y in (start, end)]
            cv2.line(self.image, lit[0], lit[1], colour, int(0.66 * thickness), cv2.LINE_AA)

    def ball(self, centre: Point, radius: Point, colour: Colour, angle: float = 0.0) -> None:
        """Draw an ellipse with two radii, turned by `angle` degrees, lit from the upper left."""
        middle, axes = pixel(centre), pixel((max(radius[0], 1), max(radius[1], 1)))
        cv2.ellipse(self.image, middle, axes, angle, 0, 360, shade(colour, 0.82), -1, cv2.LINE_AA)
        cv2.ellipse(self.mask, middle, axes, angle, 0, 360, self.label, -1)
        if min(axes) > 3:
            lit = pixel((centre[0] - 0.12 * radius[0], centre[1] - 0.1 * radius[1]))
            inner = pixel((0.84 * radius[0], 0.86 * radius[1]))
            cv2.ellipse(self.image, lit, inner, angle, 0, 360, colour, -1, cv2.LINE_AA)

    def shape(self, corners: Sequence[Point], cloth: Image) -> None:
        """Fill a polygon with `cloth` (side, side, 3), darker along its right edge."""
        outline = np.rint(np.asarray(corners)).astype(np.int32)
        inside = np.zeros_like(self.mask)
        cv2.fillPoly(inside, [outline], 255, cv2.LINE_AA)
        inside = np.where(inside > 127, np.uint8(255), np.uint8(0))
        width = int(np.ptp(outline[:, 0]))
        lit = np.zeros_like(inside)
        cv2.fillPoly(lit, [outline - np.array([width // 6, 0], np.int32)], 255)
        cv2.copyTo(cv2.convertScaleAbs(cloth, alpha=0.78), inside, self.image)
        cv2.copyTo(cloth, cv2.bitwise_and(lit, inside), self.image)
        self.mask[inside > 0] = self.label


def shade(colour: Colour, factor: float) -> Colour:
    """Return `colour` with its brightness multiplied by `factor`, kept within 0..255."""
    red, green, blue = (int(min(max(channel * factor, 0), 255)) for channel in colour)
    return red, green, blue


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 12) -> Colour:
    """Draw one of `colours` and vary each of its channels by a few grey levels."""
    chosen = np.asarray(colours[int(rng.integers(len(colours)))]) + rng.normal(0, spread, 3)
    red, green, blue = (int(value) for value in np.clip(chosen, 0, 255))
    return red, green, blue


def any_colour(
    rng: np.random.Generator, *, saturation: Point = (0.1, 0.95), value: Point = (0.2, 0.98)
) -> Colour:
    """Draw a colour of any hue, with saturation and value from the two ranges within 0..1."""
    hue = int(rng.integers(180))
    shares = (rng.uniform(*saturation), rng.uniform(*value))
    cell = np.array([[[hue, *(int(255 * share) for share in shares)]]], np.uint8)
    red, green, blue = (int(channel) for channel in cv2.cvtColor(cell, cv2.COLOR_HSV2RGB)[0, 0])
    return red, green, blue


def noise(rng: np.random.Generator, side: int, cells: int) -> Field:
    """Draw a smooth random field (side, side), about -1..1, with `cells` bumps along a side."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), np.float32)


def texture(
    rng: np.random.Generator, side: int, kind: str, colours: tuple[Colour, Colour], period: float
) -> Image:
    """Draw a texture that mixes two colours.

    Args:
        rng: source of the directions and the details.
        side: side in pixels.
        kind: one of PATTERNS.
        colours: the two colours.
        period: distance in pixels between two stripes, bricks or dots.

    Returns:
        RGB image (side, side, 3), uint8.
    """
    if kind == "plain":
        return np.full((side, side, 3), colours[0], np.uint8)
    share = (255 * _field(rng, side, kind, max(period, 3.0))).astype(np.uint8)
    # 256 mixtures looked up per pixel cost a fifth of mixing at each pixel.
    mixtures = np.linspace(colours[0], colours[1], 256).astype(np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(share, mixtures), np.uint8)


def pixel(point: Point) -> tuple[int, int]:
    """Nearest whole pixel, as OpenCV wants it."""
    return round(point[0]), round(point[1])


def _field(rng: np.random.Generator, side: int, kind: str, period: float) -> Field:
    """Share of the second colour at each pixel (side, side), 0..1, from rows and columns alone."""
    steps = np.arange(side, dtype=np.float32)
    across, along = steps[None, :] + np.float32(rng.uniform(0, period)), steps[:, None]
    if kind == "stripes":
        across = across if rng.random() < 0.5 else along
        field = np.mod(across, period) < period * rng.uniform(0.3, 0.7)
    elif kind == "checks":
        field = 0.5 * (np.mod(across, period) < period / 2) + 0.5 * (
            np.mod(along, period) < period / 2
        )
    elif kind == "dots":
        squares = [(np.mod(line, period) / period - 0.5) ** 2 for line in (across, along)]
        field = squares[0] + squares[1] < rng.uniform(0.22, 0.36) ** 2
    elif kind == "bricks":
        field = _bricks(across, along, period)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        field = 0.5 + 0.5 * (np.cos(angle) * (across - period) + np.sin(angle) * along) / side
    elif kind == "blobs":
        field = noise(rng, side, max(int(side / period), 2)) > 0.1
    else:
        grain = rng.standard_normal((side, side), np.float32) * np.float32(0.08)
        field = 0.5 + 0.5 * noise(rng, side, max(int(side / period), 2)) + grain
    return np.clip(np.broadcast_to(field, (side, side)).astype(np.float32), 0, 1)


def _bricks(across: Field, along: Field, period: float) -> NDArray[np.bool_]:
    joint = 0.12 * period + 1
    upright = [np.mod(across + shift, 2 * period) < joint for shift in (0, period)]
    odd = np.mod(along, 2 * period) >= period
    return np.where(odd, upright[1], upright[0]) | (np.mod(along, period) < joint)
