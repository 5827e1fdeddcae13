"""Images of any number of channels and any bit depth, as `--in_channels` has them read.

Bytes are divided by 255 and 16-bit values by 65535; floats and other whole numbers are taken as
they are. Then each channel is normalised by its own mean and std, measured over training images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import TiffImagePlugin as Tiff

from kd_trainer.data.images import (
    MAX_PIXELS,
    BadSampleError,
    EncodedImage,
    image_name,
    open_image,
    read_image_bytes,
)
from kd_trainer.data.mask_files import raw_array
from kd_trainer.data_arguments import DataArguments
from kd_trainer.models.image_processing import scaled_channels

FloatImage = npt.NDArray[np.float32]
"""(H, W, C)."""

_TIFF = (b"II*\x00", b"MM\x00*")
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class Channels:
    """How images are read and normalised: mean and std a channel, of scaled values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def image(self, cell: EncodedImage, index: int) -> FloatImage:
        """A normalised image.

        Raises:
            BadSampleError: if the file is unreadable, or of another number of channels.
        """
        image = decode_channels(cell, index, len(self.mean))
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return np.asarray((image - mean) / std, np.float32)


def channels_of_data(data: DataArguments) -> Channels | None:
    """How images are read that are not 8-bit RGB; None where they are, or were not measured yet."""
    if data.channel_mean is None or data.channel_std is None:
        return None
    return Channels(tuple(data.channel_mean), tuple(data.channel_std))


def decode_channels(cell: EncodedImage, index: int, count: int) -> FloatImage:
    """Decode an image by its own depth, scaled, its channels in the order of the file.

    Args:
        cell: `bytes` and `path` of a TIFF, PNG or any other image, or of a `.npy` array (H, W),
            (H, W, C) or (C, H, W).
        index: number of the row, for messages.
        count: of the channels.

    Raises:
        BadSampleError: if it is unreadable, too large, not finite, or of other channels.
    """
    name = image_name(cell, index)
    data = read_image_bytes(cell, name)
    values = raw_array(data, name)
    try:
        return scaled_channels(_decoded(data, name) if values is None else values, count)
    except ValueError as error:
        raise BadSampleError(
            f"Expected {error} in {name}. Set --in_channels to what the images have, the same for "
            "all, and fill gaps first."
        ) from None


def channels_shape(cell: EncodedImage, index: int) -> tuple[int, int]:
    """Height and width of such an image, from the head of the file but for arrays.

    Raises:
        BadSampleError: if it has none, or is too large.
    """
    name = image_name(cell, index)
    data = read_image_bytes(cell, name)
    array = raw_array(data, name)
    if array is None:
        return _header_shape(data, name)
    shape = array.shape if array.ndim < 3 or array.shape[2] <= array.shape[0] else array.shape[1:]
    return int(shape[0]), int(shape[1])


def measured(rows: Any, count: int) -> tuple[list[float], list[float], int]:
    """Mean and std of each channel over the pixels of images, and how many were looked at.

    Args:
        rows: with the column `image`.
        count: of the channels.

    Raises:
        BadSampleError: if an image cannot be used.
        ValueError: if a channel is the same everywhere.
    """
    total, squares, pixels, images = np.zeros(count), np.zeros(count), 0, 0
    for index, row in enumerate(rows):
        values = decode_channels(row["image"], index, count).reshape(-1, count).astype(np.float64)
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        pixels += len(values)
        images += 1
    mean = total / max(pixels, 1)
    std = np.sqrt(np.maximum(squares / max(pixels, 1) - mean**2, 0))
    if flat := [str(number) for number in range(count) if std[number] < _LEAST_STD]:
        raise ValueError(
            f"Expected channels that differ from pixel to pixel, got the same value everywhere in "
            f"channel {', '.join(flat)} of the {images:,} images that were looked at. Give "
            "--channel_mean and --channel_std, or leave the channel out."
        )
    return [float(f"{v:.6g}") for v in mean], [float(f"{v:.6g}") for v in std], images


def visible(image: FloatImage) -> npt.NDArray[np.uint8]:
    """The first three channels, or the first, as an RGB image for people: 1 to 99 % as 0..255."""
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1))
    return (
        np.asarray((shown - low) / np.maximum(high - low, _LEAST_STD) * 255)
        .clip(0, 255)
        .astype(np.uint8)
    )


def _header_shape(data: bytes, name: str) -> tuple[int, int]:
    """Height and width in the head of a file; PIL knows no TIFF of several deep bands."""
    if not data.startswith(_TIFF):
        image = open_image(data, name)
        return image.height, image.width
    try:
        tags, stream = Tiff.ImageFileDirectory_v2(data[:8]), io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        height, width = int(tags[Tiff.IMAGELENGTH]), int(tags[Tiff.IMAGEWIDTH])
    except Exception as error:  # whatever PIL stumbles over in a broken head
        raise BadSampleError(
            f"Expected a readable TIFF, got {name}: {str(error)[:100] or type(error).__name__}. "
            "Replace or remove the file."
        ) from None
    if not 0 < height * width <= MAX_PIXELS:
        raise BadSampleError(
            f"Expected an image of at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,} in "
            f"{name}. Shrink it, cut it into pieces, or remove it."
        )
    return height, width


def _decoded(data: bytes, name: str) -> npt.NDArray[Any]:
    """(H, W, C) of an image file, RGB or RGBA first."""
    shape = _header_shape(data, name)  # before anything is decoded
    # It complains of each TIFF whose bands have no meaning, which is what is wanted here.
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None or image.shape[:2] != shape:
        raise BadSampleError(
            f"Expected an image of one to four channels that OpenCV reads, got {name}. Save more "
            "bands as a .npy array (H, W, C)."
        )
    if image.ndim == 2:
        return image[..., None]
    order = {3: (2, 1, 0), 4: (2, 1, 0, 3)}.get(image.shape[2])  # OpenCV turns them round
    return image if order is None else image[..., order]
