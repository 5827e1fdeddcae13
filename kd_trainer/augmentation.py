"""Random changes of photographs and their masks: the lists `heavy`, `seed`, `light` and `none`.

albumentations 2.0.8 is unmaintained, so only this module and `fast_transforms` import it. Its own
seeding gives every transform the same stream, makes DataLoader workers repeat each other, and lets
rare groups fire together; here a draw is a function of (seed, epoch, index) and of nothing else.
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

from kd_trainer.fast_transforms import (
    FastColorJitter,
    FastGaussNoise,
    FastHueSaturationValue,
    FastISONoise,
    FastRGBShift,
    SoftFog,
)

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.int16]
Logits = npt.NDArray[np.float32]

OUTSIDE = -1
"""Mask value of pixels that the geometry brought in from outside the photograph."""

KINDS = ("heavy", "seed", "light", "none")
# Grey of ImageNet's mean: what lies outside is close to zero once the image is normalised.
FILL = (124, 116, 104)


def _heavy(image_size: int, brightness_contrast_probability: float) -> list[Any]:
    flare = max(1, round(0.3 * image_size))  # the library's 400 pixels would cover a small image
    return [
        A.HorizontalFlip(p=0.5),
        A.OneOf(
            [
                FastColorJitter(0.2, 0.2, 0.2, 0.1, p=1),
                FastHueSaturationValue(p=1),
                FastRGBShift(p=1),
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
        A.OneOf([FastGaussNoise(std_range=(0.02, 0.08), p=1), FastISONoise(p=1)], p=0.05),
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
        FastColorJitter(0.2, 0.2, 0.2, 0.1, p=0.8),
        A.RandomBrightnessContrast(p=brightness_contrast_probability),
        A.GaussianBlur(p=0.05),
    ]


class LogitAffine(A.Affine):
    """`A.Affine`, which moves floating point maps linearly, and those with whole numbers nearest.

    At the edge of the picture it goes on with the last value: what lies outside is masked, and
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
            fill=FILL,
            fill_mask=OUTSIDE,
            p=0.7,
        ),
        FastColorJitter(0.15, 0.15, 0.15, 0.05, p=0.5),
    ]


class Augmentation:
    """One random change of an image and its mask, the same geometry for both.

    Args:
        kind: `heavy` (the groups of the recipe's code), `seed` (the recipe's short list), `light`
            (flip, small affine, mild colour) or `none`.
        image_size: side of the square image in pixels.
        seed: first of the three numbers that decide a draw, >= 0.
        brightness_contrast_probability: of the brightness, CLAHE and gamma group of `heavy`,
            and of brightness and contrast in `seed`.

    Raises:
        ValueError: if `kind` is unknown or `seed` negative.
    """

    def __init__(
        self, kind: str, *, image_size: int, seed: int, brightness_contrast_probability: float
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Expected augmentation {', '.join(KINDS)}, got {kind!r}.")
        if seed < 0:
            raise ValueError(f"Expected a seed >= 0, got {seed}.")
        self.kind = kind
        self.seed = seed
        transforms = {
            "heavy": lambda: _heavy(image_size, brightness_contrast_probability),
            "seed": lambda: _seed(brightness_contrast_probability),
            "light": _light,
            "none": list,
        }[kind]()
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
        if self.kind == "none":
            return image, mask
        self.reseed(epoch=epoch, index=index)
        changed = self.compose(image=image, mask=mask)
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
        if self.kind == "none":
            return image, mask, logits
        self.reseed(epoch=epoch, index=index)
        changed = self.compose(image=image, mask=mask, logits=logits)
        return changed["image"], changed["mask"], changed["logits"]

    def reseed(self, *, epoch: int, index: int) -> None:
        """Set both generators of every transform for one sample; takes about 30 microseconds."""
        sequence = np.random.SeedSequence([self.seed, epoch, index])
        python_seed = int(sequence.generate_state(1, np.uint64)[0])
        self.compose.set_random_state(np.random.default_rng(sequence), random.Random(python_seed))
