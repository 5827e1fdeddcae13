"""The recipe's heavy list as it is written down, of albumentations' own transforms alone.

Nothing trains with it: it is what the benchmark's plain loop uses, and what ours is compared with.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a server for its version
import albumentations as A


def stock_list(image_size: int) -> Any:
    """Resize, the heavy list with the library's own fog, and Normalize to floats.

    Args:
        image_size: side of the square result in pixels.

    Returns:
        An `A.Compose` to call with `image` uint8 (H, W, 3) and `mask` (H, W).
    """
    flare = max(1, round(0.3 * image_size))
    return A.Compose(
        [
            A.Resize(image_size, image_size),
            A.HorizontalFlip(p=0.5),
            A.OneOf(
                [A.ColorJitter(0.2, 0.2, 0.2, 0.1), A.HueSaturationValue(), A.RGBShift()], p=0.8
            ),
            A.OneOf([A.RandomBrightnessContrast(), A.CLAHE(), A.RandomGamma()], p=0.8),
            A.OneOf([A.RandomRain(), A.RandomFog(), A.RandomSunFlare(src_radius=flare)], p=0.1),
            A.OneOf([A.MotionBlur(), A.GaussianBlur(), A.MedianBlur()], p=0.05),
            A.OneOf([A.GaussNoise(std_range=(0.02, 0.08)), A.ISONoise()], p=0.05),
            A.OneOf(
                [A.ImageCompression(quality_range=(40, 95)), A.Downscale(scale_range=(0.4, 0.9))],
                p=0.1,
            ),
            A.Normalize(),
        ]
    )
