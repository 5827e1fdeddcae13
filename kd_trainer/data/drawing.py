"""Pencils, colours and textures of the synthetic pictures (`data/synthetic.py`).

Colours are RGB. A drawing is a picture and its mask, changed together: every stroke writes its
colour into the picture and its label into the mask, so that whatever is painted in front of a
person also takes its pixels away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Field = NDArray[np.float32]
Colour = tuple[int, int, int]
Point = tuple[float, float]

BACKGROUND, PERSON = 0, 255
SKIN: tuple[Colour, ...] = (
    (255, 224, 196),
    (241, 194, 155),
    (224, 172, 125),
    (190, 130, 88),
    (141, 85, 54),
    (92, 58, 40),
)
HAIR: tuple[Colour, ...] = (
    (28, 22, 20),
    (70, 42, 26),
    (122, 78, 42),
    (196, 152, 82),
    (150, 60, 34),
    (150, 150, 152),
)
PATTERNS = ("plain", "stripes", "checks", "dots", "noise", "bricks", "blobs", "gradient")


@dataclass
class Drawing:
    """A square RGB picture (side, side, 3) with its mask (side, side); lengths are in pixels."""

    picture: Image
    mask: Image
    label: int = BACKGROUND

    @property
    def side(self) -> int:
        """Side of the picture in pixels."""
        return int(self.picture.shape[0])

    def limb(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a thick line with round ends, lit from the upper left."""
        first, last, thickness = pixel(start), pixel(end), max(round(width), 1)
        cv2.line(self.picture, first, last, shade(colour, 0.78), thickness, cv2.LINE_AA)
        cv2.line(self.mask, first, last, self.label, thickness)
        if thickness > 3:
            lift = 0.13 * width
            lit = [pixel((x - lift, y - 0.5 * lift)) for x, y in (start, end)]
            cv2.line(self.picture, lit[0], lit[1], colour, int(0.66 * thickness), cv2.LINE_AA)

    def ball(self, centre: Point, radius: Point, colour: Colour, angle: float = 0.0) -> None:
        """Draw an ellipse with two radii, turned by `angle` degrees, lit from the upper left."""
        middle, axes = pixel(centre), pixel((max(radius[0], 1), max(radius[1], 1)))
        cv2.ellipse(self.picture, middle, axes, angle, 0, 360, shade(colour, 0.82), -1, cv2.LINE_AA)
        cv2.ellipse(self.mask, middle, axes, angle, 0, 360, self.label, -1)
        if min(axes) > 3:
            lit = pixel((centre[0] - 0.12 * radius[0], centre[1] - 0.1 * radius[1]))
            inner = pixel((0.84 * radius[0], 0.86 * radius[1]))
            cv2.ellipse(self.picture, lit, inner, angle, 0, 360, colour, -1, cv2.LINE_AA)

    def shape(self, corners: Sequence[Point], cloth: Image) -> None:
        """Fill a polygon with `cloth` (side, side, 3), darker along its right edge."""
        outline = np.rint(np.asarray(corners)).astype(np.int32)
        inside = np.zeros_like(self.mask)
        cv2.fillPoly(inside, [outline], 255, cv2.LINE_AA)
        inside = np.where(inside > 127, np.uint8(255), np.uint8(0))
        width = int(np.ptp(outline[:, 0]))
        lit = np.zeros_like(inside)
        cv2.fillPoly(lit, [outline - np.array([width // 6, 0], np.int32)], 255)
        cv2.copyTo(cv2.convertScaleAbs(cloth, alpha=0.78), inside, self.picture)
        cv2.copyTo(cloth, cv2.bitwise_and(lit, inside), self.picture)
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
        RGB picture (side, side, 3), uint8.
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
