"""Image files to arrays: photographs as RGB, masks as the values that were stored.

cv2 decodes JPEG and PNG photographs into arrays 1.3 times faster than PIL, to the same pixels, and
`plain_png` unpacks the plainest masks; the rest (CMYK, transparency, other formats) is left to PIL,
which opens a file once. The size that a file claims, its bits, bands and scans are looked at before
it is decoded (`headers`), and large pictures are converted in strips. Whatever is wrong with a file
is a `BadSampleError` that names it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from kd_trainer.data.cells import BadSampleError, Cell, cell_name, read_cell
from kd_trainer.data.headers import bits_of, check_header, grey_scale, mode_of, too_large
from kd_trainer.data.plain_png import plain_png

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
"""What PIL may read. Its other readers are many, and one of them starts Ghostscript."""

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded, about 9,460 x 9,460: 256 MiB as RGB.

A file of a few bytes can claim any size. PIL has the same limit but only warns up to its double.
"""

# cv2 can fill the missing part of a cut-off file with grey and say nothing, where PIL raises; so it
# gets only files that end as their format does.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_OPAQUE = ("RGB", "L", "P", "1")
_FIRST_TURNED = 5  # EXIF orientations 5 to 8 exchange height and width
_STRIP = 2**20
"""Pixels that are converted at once."""
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_photograph(cell: Cell, index: int) -> npt.NDArray[np.uint8]:
    """Decode a photograph.

    Args:
        cell: `bytes` and `path` of the file.
        index: number of the row, for messages.

    Returns:
        uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    Raises:
        BadSampleError: if the file is no readable image; names the file.
    """
    name = cell_name(cell, index)
    data = read_cell(cell, name)
    header = _open(data, name)
    if header.mode.startswith(("I", "F")) or bits_of(header) > 8:
        raise BadSampleError(
            f"Expected a photograph of 8 bits a channel, got {mode_of(header)} in {name}. Scale "
            "its values to 0..255 first, by the range that they really have."
        )
    opaque = header.mode in _OPAQUE and "transparency" not in header.info
    ending = _ENDINGS.get(header.format or "")
    if opaque and ending and data.rstrip(b"\x00").endswith(ending):
        image = _by_cv2(data)
        if image is not None and sorted(image.shape[:2]) == sorted(header.size):
            return image
    return _filled(_load(header, name), lambda strip: _on_white(strip, name))


def _by_cv2(data: bytes) -> npt.NDArray[np.uint8] | None:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # PIL has the last word, and names the file
        return None
    return None if image is None else np.asarray(image, np.uint8)


def _filled(
    image: Image.Image, convert: Callable[[Image.Image], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """A new array of what `convert` makes of a picture, of a large one strip by strip.

    Each conversion is a copy: of a whole transparent picture of `MAX_PIXELS` they take 1.5 GiB.
    """
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return convert(image)
    whole: npt.NDArray[Any] | None = None
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = convert(image.crop((0, top, image.width, bottom)))
        if whole is None:
            whole = np.empty((image.height, *strip.shape[1:]), strip.dtype)
        whole[top:bottom] = strip
    assert whole is not None
    return whole


def _on_white(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """Convert to RGB as image processors do: what is transparent shows white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)  # a copy: torch needs to write
    try:
        image = image.convert("RGBA")
    except (ValueError, OSError) as error:  # CIE LAB, and other spaces that PIL cannot leave
        raise _unreadable(error, name) from None
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def decode_mask(cell: Cell, index: int) -> npt.NDArray[Any]:
    """Decode a mask to the values its file holds, before any viewer scales or colours them.

    Args:
        cell: `bytes` and `path` of the file.
        index: number of the row, for messages.

    Returns:
        (H, W): bool for a 1-bit file, palette indices of a palette file, else uint8 or uint16.

    Raises:
        BadSampleError: if the file is unreadable or its colour channels differ; names the file.
    """
    name = cell_name(cell, index)
    data = read_cell(cell, name)
    plain = plain_png(data, MAX_PIXELS)
    if plain is not None:
        return plain
    image = _open(data, name)
    scale = grey_scale(image)
    if bits_of(image) > 8 and not image.mode.startswith(("I", "F")):
        raise _no_mask(mode_of(image), name)
    return _filled(_load(image, name), lambda strip: _values(strip, name, scale))


def _values(image: Image.Image, name: str, scale: int) -> npt.NDArray[Any]:
    values = np.asarray(image)
    if image.mode in ("1", "P"):
        return values
    if values.ndim == 2 and values.dtype.kind in "iu":
        return _small(values, name, scale)
    if image.mode in ("LA", "RGB", "RGBA"):
        return _one_channel(values, image.mode, name)
    raise _no_mask(f"mode {image.mode}", name)


def _no_mask(what: str, name: str) -> BadSampleError:
    return BadSampleError(
        f"Expected a mask with one channel of whole numbers, got {what} in {name}. Store class ids "
        "in a PNG with one channel of 8 or 16 bits."
    )


def image_shape(cell: Cell, index: int) -> tuple[int, int]:
    """Height and width of an image as it is decoded, from the head of the file.

    Raises:
        BadSampleError: if the file is no image; names it.
    """
    name = cell_name(cell, index)
    image = _open(read_cell(cell, name), name)
    try:
        exif = image.getexif()  # which decodes the whole of a PNG
    except Exception as error:
        raise _unreadable(error, name) from None
    turned = exif.get(ExifTags.Base.Orientation, 1) in range(_FIRST_TURNED, 9)
    turned &= image.format != "TIFF"  # whose size PIL has turned already
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(data: bytes, name: str) -> Image.Image:
    """Read the head of a file; nothing is decoded."""
    # PIL's readers raise whatever they stumble over in a broken file: struct.error, KeyError, ...
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_header(image, data, name, MAX_PIXELS)
    except BadSampleError:
        raise
    except Exception as error:
        raise _unreadable(error, name) from None
    return image


def _load(image: Image.Image, name: str) -> Image.Image:
    """Decode an open image and turn it as its EXIF orientation says."""
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except MemoryError as error:
        # Of the file, if there is room for what its pixels take; else of the machine.
        np.empty((image.height, image.width, 4), np.uint8)
        raise _unreadable(error, name) from None
    except Exception as error:
        raise _unreadable(error, name) from None


def _unreadable(error: Exception, name: str) -> BadSampleError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        pixels = re.search(r"\d+", str(error))
        return too_large(f"{int(pixels[0]):,}" if pixels else "more", name, MAX_PIXELS)
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = f"it is none of {', '.join(FORMATS)}, or its head is broken"
    return BadSampleError(
        f"Expected a readable image, got {name}: {reason}. Replace or remove the file."
    )


def _small(values: npt.NDArray[Any], name: str, scale: int) -> npt.NDArray[Any]:
    if values.dtype == np.uint8:
        return values if scale == 1 else values // scale
    if values.min(initial=0) < 0 or values.max(initial=0) > np.iinfo(np.uint16).max:
        raise BadSampleError(
            f"Expected mask values 0..65535, got {values.min()}..{values.max()} in {name}."
        )
    return values.astype(np.uint16)


def _one_channel(values: npt.NDArray[Any], mode: str, name: str) -> npt.NDArray[Any]:
    colours = values[..., : {"LA": 1, "RGB": 3, "RGBA": 3}[mode]]
    if mode.endswith("A") and (values[..., -1] != 255).any():
        raise BadSampleError(
            f"Expected a mask without transparency, got {mode} with an alpha channel in {name}. "
            "Store the class ids in one channel."
        )
    if (colours != colours[..., :1]).any():
        raise BadSampleError(
            f"Expected a mask with one channel (or equal ones), got different colours in {name}. "
            "Store class ids, or a palette PNG, instead of a coloured picture."
        )
    return np.ascontiguousarray(colours[..., 0])
