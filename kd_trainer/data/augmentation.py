"""Random changes of images and their masks: the lists `heavy`, `seed`, `light` and `none`.

albumentations 2.0.8 is unmaintained, so only this module imports it. Its own seeding gives every
transform the same stream, makes DataLoader workers repeat each other, and lets rare groups fire
together; here a draw is a function of (seed, epoch, index) and of nothing else. Of its transforms
fog alone is written anew: its thousand circles take more time than all others of a list together.
"""

from __future__ import annotations

import os
import random
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a server for its version
import albumentations as A

from kd_trainer.models.image_processing import PADDING
from kd_trainer.models.image_sizes import AnySize, Size, as_size

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.int16]
Logits = npt.NDArray[np.float32]

OUTSIDE = -1
"""Mask value of pixels that the geometry brought in from outside the image."""

KINDS = ("heavy", "seed", "light", "none")


class SoftFog(A.RandomFog):
    """`RandomFog` with its thousand white discs counted on a coarse grid and laid on at once.

    The library blends the image with white once for each disc (690 ms an image at 640 px). A
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
        """Draw the intensity and the discs; gives the share of the image that stays, (G, G)."""
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


def _heavy(image_size: Size, brightness_contrast_probability: float) -> list[Any]:
    flare = max(
        1, round(0.3 * min(image_size))
    )  # the library's 400 pixels would cover a small image
    return [
        A.HorizontalFlip(p=0.5),
        A.OneOf(
            [
                A.ColorJitter(0.2, 0.2, 0.2, 0.1, p=1),
                A.HueSaturationValue(p=1),
                A.RGBShift(p=1),
            ],
            p=0.8,
        ),
        A.OneOf(
            [A.RandomBrightnessContrast(p=1), A.CLAHE(p=1), A.RandomGamma(p=1)],
            p=brightness_contrast_probability,
        ),
        A.OneOf([A.RandomRain(p=1), SoftFog(p=1), A.RandomSunFlare(src_radius=flare, p=1)], p=0.1),
        A.OneOf([A.MotionBlur(p=1), A.GaussianBlur(p=1), A.MedianBlur(p=1)], p=0.05),
        # The library's own range is extreme: 54 grey levels on average, against 10 here.
        A.OneOf([A.GaussNoise(std_range=(0.02, 0.08), p=1), A.ISONoise(p=1)], p=0.05),
        # The library's defaults are no compression at all, and a quarter of the size.
        A.OneOf(
            [
                A.ImageCompression(quality_range=(40, 95), p=1),
                A.Downscale(
                    scale_range=(0.4, 0.9),
                    interpolation_pair={
                        "downscale": cv2.INTER_AREA,
                        "upscale": cv2.INTER_LINEAR,
                    },
                    p=1,
                ),
            ],
            p=0.1,
        ),
    ]


def _seed(brightness_contrast_probability: float) -> list[Any]:
    """The recipe's short list: each transform has its probability to itself, in no group.

    As the first of a group of `heavy` colour jitter has 0.27 and Gaussian blur 0.017.
    """
    return [
        A.HorizontalFlip(p=0.5),
        A.ColorJitter(0.2, 0.2, 0.2, 0.1, p=0.8),
        A.RandomBrightnessContrast(p=brightness_contrast_probability),
        A.GaussianBlur(p=0.05),
    ]


class LogitAffine(A.Affine):
    """`A.Affine`, which moves floating point maps linearly, and those with whole numbers nearest.

    At the edge of the image it goes on with the last value: what lies outside is masked, and
    fading into it would change the pixels beside.
    """

    def apply_to_mask(
        self,
        mask: npt.NDArray[Any],
        matrix: npt.NDArray[np.float64],
        output_shape: tuple[int, int],
        **params: Any,
    ) -> npt.NDArray[Any]:
        """Move a mask, or logits float32 (H, W, K), as the image is moved."""
        if mask.dtype != np.float32:
            return np.asarray(super().apply_to_mask(mask, matrix, output_shape, **params))
        height, width = output_shape
        bands = [  # cv2 takes at most four channels at a time
            cv2.warpAffine(
                mask[..., k], matrix[:2], (width, height), borderMode=cv2.BORDER_REPLICATE
            )
            for k in range(mask.shape[-1])
        ]
        return np.stack(bands, axis=-1)


def _light() -> list[Any]:
    return [
        A.HorizontalFlip(p=0.5),
        LogitAffine(
            scale=(0.85, 1.2),
            keep_ratio=True,
            translate_percent=(-0.06, 0.06),
            rotate=(-8, 8),
            fill=PADDING,
            fill_mask=OUTSIDE,
            p=0.7,
        ),
        A.ColorJitter(0.15, 0.15, 0.15, 0.05, p=0.5),
    ]


class Augmentation:
    """One random change of an image and its mask, the same geometry for both.

    Args:
        kind: `heavy` (the groups of the recipe's code), `seed` (the recipe's short list), `light`
            (flip, small affine, mild colour) or `none`.
        image_size: of the image in pixels.
        seed: first of the three numbers that decide a draw, >= 0.
        brightness_contrast_probability: of the brightness, CLAHE and gamma group of `heavy`,
            and of brightness and contrast in `seed`.
        floats: images are normalised floats of any channels: only the geometry of `kind` is left,
            and what comes in from outside is 0, their mean.
        colours: whether its changes of colour are left; geometry alone makes a weak view.

    Raises:
        ValueError: if `kind` is unknown or `seed` negative.
    """

    def __init__(
        self,
        kind: str,
        *,
        floats: bool = False,
        colours: bool = True,
        image_size: AnySize,
        seed: int,
        brightness_contrast_probability: float,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Expected augmentation {', '.join(KINDS)}, got {kind!r}.")
        if seed < 0:
            raise ValueError(f"Expected a seed >= 0, got {seed}.")
        self.kind = kind
        self.seed = seed
        transforms = {
            "heavy": lambda: _heavy(as_size(image_size), brightness_contrast_probability),
            "seed": lambda: _seed(brightness_contrast_probability),
            "light": _light,
            "none": list,
        }[kind]()
        if floats or not colours:
            transforms = [t for t in transforms if isinstance(t, A.HorizontalFlip | LogitAffine)]
        if floats:
            for affine in (t for t in transforms if isinstance(t, LogitAffine)):
                affine.fill = 0
        # Of the kind `mask`, so that geometry moves logits and nothing else touches them.
        self.compose = A.Compose(transforms, additional_targets={"logits": "mask"})

    def __call__(self, image: Pixels, mask: Mask, *, epoch: int, index: int) -> tuple[Pixels, Mask]:
        """Change one image.

        Args:
            image: uint8 RGB (H, W, 3).
            mask: int16 (H, W), any values but `OUTSIDE`.
            epoch: second of the three numbers, >= 0.
            index: number of the image in its data set, the third.

        Returns:
            Image and mask of the same shapes; the mask is `OUTSIDE` where the geometry brought in
            pixels from outside the image.
        """
        changed = self._change(epoch, index, image=image, mask=mask)
        return changed["image"], changed["mask"]

    def with_logits(
        self, image: Pixels, mask: Mask, logits: Logits, *, epoch: int, index: int
    ) -> tuple[Pixels, Mask, Logits]:
        """The same change of the image and the mask, and its geometry on logits of the image.

        Args:
            image: uint8 RGB (H, W, 3).
            mask: int16 (H, W), any values but `OUTSIDE`.
            logits: float32 (H, W, K), moved with linear interpolation.
            epoch: as in a call.
            index: as in a call.

        Returns:
            Image and mask, bit for bit those of a call, and logits of the same shape, without
            meaning where the mask is `OUTSIDE`.
        """
        changed = self._change(epoch, index, image=image, mask=mask, logits=logits)
        return changed["image"], changed["mask"], changed["logits"]

    def _change(self, epoch: int, index: int, **targets: npt.NDArray[Any]) -> dict[str, Any]:
        if self.kind == "none":
            return targets
        self.reseed(epoch=epoch, index=index)
        return dict(self.compose(**targets))

    def reseed(self, *, epoch: int, index: int) -> None:
        """Set both generators of every transform for one sample; takes about 30 microseconds."""
        _reseed(self.compose, [self.seed, epoch, index])


def _reseed(compose: A.Compose, numbers: list[int]) -> None:
    sequence = np.random.SeedSequence(numbers)
    python_seed = int(sequence.generate_state(1, np.uint64)[0])
    compose.set_random_state(np.random.default_rng(sequence), random.Random(python_seed))


class StrongView:
    """A change of colours and sharpness alone, so that labels and the teacher's answers stay.

    Source: the strong augmentation of UniMatch V2, Yang et al. 2024, arXiv 2410.10777.
    """

    def __init__(self) -> None:
        self.compose = A.Compose(
            [
                A.ColorJitter(0.5, 0.5, 0.5, 0.25, p=0.8),
                A.ToGray(p=0.2),
                # A kernel of 0 is as wide as the blur needs.
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            ]
        )

    def __call__(self, image: Pixels, numbers: list[int]) -> Pixels:
        """A view of uint8 RGB (H, W, 3); a function of the numbers."""
        _reseed(self.compose, numbers)
        return np.asarray(self.compose(image=image)["image"], np.uint8)
