"""albumentations' slowest transforms again, with the same distributions and in bytes.

At 640 px the library draws fog as a thousand circles, noise in double precision, and shifts colours
channel by channel. `FastRGBShift`, `FastHueSaturationValue` and `FastColorJitter` give the very
pixels of their originals; the noises and the fog give other draws of the same distributions. All
parameters come from the two generators that albumentations gives each transform.
"""

from __future__ import annotations

import os
from functools import cache
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a server for its version
import albumentations as A
from albumentations.augmentations.pixel import functional

Pixels = npt.NDArray[np.uint8]

_LEVELS = 2**16  # a normal deviate is looked up under 16 random bits
_RAMP = np.arange(256, dtype=np.uint8).reshape(1, 256)


class FastRGBShift(A.RGBShift):
    """`RGBShift` in one saturated addition: the same pixels in half the time."""

    def apply(self, img: Pixels, noise_map: npt.NDArray[Any], **params: Any) -> Pixels:
        """Add to each channel of uint8 `img` (H, W, 3) its shift without the decimals."""
        del params
        shift: Any = (*np.trunc(noise_map).tolist(), 0)  # cv2's types know no scalars
        return np.asarray(cv2.add(img, shift), np.uint8)


class FastHueSaturationValue(A.HueSaturationValue):
    """`HueSaturationValue` through three tables: the same pixels in two thirds of the time."""

    def apply(
        self, img: Pixels, hue_shift: float, sat_shift: float, val_shift: float, **params: Any
    ) -> Pixels:
        """Shift uint8 RGB `img` (H, W, 3); what is grey keeps its saturation of 0."""
        del params
        tables = (
            _hue_table(hue_shift),
            _added(sat_shift),
            _added(val_shift),
        )
        tables[1][0, 0] = 0
        planes = cv2.split(cv2.cvtColor(img, cv2.COLOR_RGB2HSV))
        shifted = [
            functional.sz_lut(plane, table.ravel(), inplace=True)
            for plane, table in zip(planes, tables, strict=True)
        ]
        return np.asarray(cv2.cvtColor(cv2.merge(shifted), cv2.COLOR_HSV2RGB), np.uint8)


class FastColorJitter(A.ColorJitter):
    """`ColorJitter` with a hue that touches its own channel only: the same pixels."""

    def apply(self, img: Pixels, order: list[int], **params: Any) -> Pixels:
        """Change brightness, contrast, saturation and hue of uint8 RGB `img` in the drawn order."""
        steps = (*self.transforms[:3], _turn_hue)
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        for step in order:
            img = steps[step](img, factors[step])
        return img


def _turn_hue(img: Pixels, factor: float) -> Pixels:
    if factor == 0:
        return img
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
    hue = functional.sz_lut(cv2.extractChannel(hsv, 0), _hue_table(180 * factor).ravel())
    cv2.insertChannel(hue, hsv, 0)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv), np.uint8)


def _hue_table(shift: float) -> Pixels:
    return np.asarray(np.mod(_RAMP.astype(np.int16) + shift, 180).astype(np.uint8))


def _added(shift: float) -> Pixels:
    """The table of the library's own addition, whatever its rounding."""
    table = functional.add_constant(_RAMP.copy(), shift) if shift else _RAMP.copy()
    return np.asarray(table, np.uint8)


class FastGaussNoise(A.GaussNoise):
    """`GaussNoise` for bytes: whole steps, looked up under random bits.

    The library draws a normal deviate, cuts its decimals off and adds it to the pixel. Here what is
    left of the deviate is looked up under 16 random bits; the outermost of the 65536 places stand
    for the tails and are drawn again from these. Nothing touches the generator of cv2.
    """

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the noise, int16 of the image's shape."""
        del data
        shape = params["shape"]
        sigma = 255 * self.py_random.uniform(*self.std_range)
        mean = 255 * self.py_random.uniform(*self.mean_range)
        count = int(np.prod(shape))
        words = self.random_generator.integers(0, 2**64, -(-count // 4), dtype=np.uint64)
        bits = words.view(np.uint16)[:count]
        steps = np.trunc(mean + sigma * normal_table()).astype(np.int16)
        noise = np.take(steps, bits)
        tails = np.flatnonzero((bits + np.uint16(1)) < 2)
        noise[tails] = np.trunc(mean + sigma * self._tail(bits[tails] > 0))
        return {"noise_map": noise.reshape(shape)}

    def _tail(self, upper: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Normal deviates beyond the last place of the table on either side."""
        normal = NormalDist()
        shares = self.random_generator.random(len(upper)) / _LEVELS
        # Far below, where a float still tells the shares apart; the upper tail is its mirror image.
        low = np.array([normal.inv_cdf(max(share, 1e-300)) for share in shares.tolist()])
        return np.where(upper, -low, low)

    def apply(self, img: Pixels, noise_map: npt.NDArray[np.int16], **params: Any) -> Pixels:
        """Add the noise to uint8 `img`, saturated."""
        del params
        return np.asarray(cv2.add(img, noise_map, dtype=cv2.CV_8U), np.uint8)


@cache
def normal_table() -> npt.NDArray[np.float32]:
    """Standard normal deviates at the middles of 65536 intervals of equal probability, rising."""
    normal = NormalDist()
    lower = [normal.inv_cdf((place + 0.5) / _LEVELS) for place in range(_LEVELS // 2)]
    half = np.array(lower, np.float32)
    return np.concatenate([half, -half[::-1]])


class FastISONoise(A.ISONoise):
    """`ISONoise` on the pixels that it changes.

    Its Poisson noise has a mean near 0.1, so nine pixels in ten get none. Its turn of the hue has a
    standard deviation of at most 0.025 degrees, a tenth of a grey level in the purest colour, which
    rounding removes wherever the lightness stays. So the pixels that are hit are drawn as a Poisson
    process (their number, then their places), and only these are taken to HLS and back.

    Args:
        p: probability of applying the transform. The ranges are the library's own; wider ones
            would turn hues visibly everywhere.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p=p)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw which pixels are hit how often, and how far their hues turn."""
        del params
        turn = self.py_random.uniform(*self.color_shift)
        intensity = self.py_random.uniform(*self.intensity)
        image = data["image"]
        pixels = image.shape[0] * image.shape[1]
        rate = _lightness_deviation(image) * intensity
        hits = self.random_generator.integers(
            0, pixels, self.random_generator.poisson(rate * pixels)
        )
        counts = np.bincount(hits, minlength=pixels)
        places = np.flatnonzero(counts)
        return {
            "places": places,
            "lighter": (counts[places] * intensity).astype(np.float32),
            "turns": (turn * intensity * self.random_generator.standard_normal(len(places))).astype(
                np.float32
            ),
        }

    def apply(
        self,
        img: Pixels,
        places: npt.NDArray[np.intp],
        lighter: npt.NDArray[np.float32],
        turns: npt.NDArray[np.float32],
        **params: Any,
    ) -> Pixels:
        """Move the lightness of the pixels of uint8 RGB `img` at `places` towards white."""
        del params
        result = img.copy()
        if not len(places):
            return result
        flat = result.reshape(-1, 3)
        floats = flat[places][None].astype(np.float32) / 255
        hls: Any = cv2.cvtColor(floats, cv2.COLOR_RGB2HLS)
        hls[0, :, 0] += turns
        hls[0, :, 1] += lighter * (1 - hls[0, :, 1])
        changed = cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)[0]
        flat[places] = np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)
        return result


def _lightness_deviation(image: Pixels) -> float:
    """Standard deviation of (largest + smallest channel) / 2 of a uint8 image, as a share of 1."""
    red, green, blue = cv2.split(image)
    largest = cv2.max(cv2.max(red, green), blue)
    smallest = cv2.min(cv2.min(red, green), blue)
    _, deviation = cv2.meanStdDev(cv2.add(largest, smallest, dtype=cv2.CV_16U))
    return float(deviation[0, 0]) / 510


class SoftFog(A.RandomFog):
    """`RandomFog` with its thousand white discs counted on a coarse grid and laid on at once.

    The library blends the picture with white once for each disc (690 ms an image at 640 px). A
    pixel under n discs keeps the share (1 - alpha)^n of itself, whatever their order, so it is
    enough to know n: the discs' middles are counted in cells, and the counts are spread by kernels
    of the discs' sizes. The blur at the end is the library's.
    """

    GRID = 96
    """Cells along a side; the blur is wider than one."""
    SIZES = 4
    """Different radii, in place of all whole numbers between the smallest and the largest."""
    RINGS = 10
    """Squares around the middle, each nine tenths of the one before, among which discs lie."""

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the intensity and the discs; gives the share of the picture that stays, (G, G)."""
        del data
        height, width = params["shape"][:2]
        intensity = self.py_random.uniform(*self.fog_coef_range)
        x, y = self._middles(intensity, height, width)
        side = min(self.GRID, height, width)
        radii = _disc_radii(intensity, min(height, width), self.SIZES)
        # Each size in turn: the middles are in no order that could matter but that of the squares.
        size = self.random_generator.permutation(len(x)) % self.SIZES
        cell = (size * side + (y * side).astype(np.intp)) * side + (x * side).astype(np.intp)
        middles = np.bincount(cell, minlength=self.SIZES * side * side).astype(np.float32)
        counts = np.zeros((side, side), np.float32)
        for layer, radius in zip(middles.reshape(-1, side, side), radii, strict=True):
            kernel = _disc(int(radius), min(height, width) / side)
            counts += cv2.filter2D(layer, -1, kernel, borderType=cv2.BORDER_CONSTANT)
        return {"stays": (1 - self.alpha_coef * intensity) ** counts}

    def _middles(self, intensity: float, height: int, width: int) -> npt.NDArray[np.float64]:
        """Middles (2, N) of the library's N discs, as shares of width and of height."""
        region = max(1, int(width // 3 * intensity))
        across, down, rings = width, height, [np.zeros((2, 0))]
        for _ in range(self.RINGS):
            if across <= region or down <= region:
                break
            count = int(across * down / region**2 * intensity * 10)
            places = self.random_generator.uniform(-0.5, 0.5, (2, count))
            rings.append(0.5 + places * np.array([[across / width], [down / height]]))
            across, down = int(across * 0.9), int(down * 0.9)
        return np.minimum(np.concatenate(rings, axis=1), np.nextafter(1.0, 0.0))

    def apply(self, img: Pixels, stays: npt.NDArray[np.float32], **params: Any) -> Pixels:
        """Blend uint8 `img` (H, W, 3) with white by the enlarged field, then blur it."""
        del params
        height, width = img.shape[:2]
        coarse = np.rint(stays * 255).astype(np.uint8)
        share = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        dark = cv2.multiply(
            cv2.bitwise_not(img), cv2.cvtColor(share, cv2.COLOR_GRAY2RGB), scale=1 / 255
        )
        side = max(3, min(height, width) // 30) | 1
        return np.asarray(cv2.GaussianBlur(cv2.bitwise_not(dark), (side, side), 0), np.uint8)


def _disc_radii(intensity: float, side: int, sizes: int) -> npt.NDArray[np.float64]:
    """`sizes` radii in pixels spread evenly over those of the library's discs."""
    largest = max(2, int(side * 0.1 * intensity))
    smallest = max(1, largest // 2)  # the library draws the whole numbers below `largest`
    quantiles = (np.arange(sizes) + 0.5) / sizes
    return np.floor(smallest + quantiles * (largest - smallest))


def _disc(radius: int, cell: float) -> npt.NDArray[np.float32]:
    """A filled circle of `radius` pixels on a grid of `cell` pixels; sums to its area in cells."""
    drawn = np.zeros((2 * radius + 3, 2 * radius + 3), np.uint8)
    area = cv2.countNonZero(cv2.circle(drawn, (radius + 1, radius + 1), radius, 1, -1))
    reach = int(np.ceil(radius / cell)) + 1
    away = np.arange(-reach, reach + 1) * cell
    distance = np.hypot(away[:, None], away)
    cover = np.clip((radius - distance) / cell + 0.5, 0, 1)
    return np.asarray(cover * (area / cell**2 / cover.sum()), np.float32)
