"""Image files to arrays: photographs as RGB, masks as the values that were stored.

A cell is what `datasets.Image(decode=False)` gives: a dict with `bytes` and `path`, either of
which may be None. cv2 decodes JPEG and PNG photographs 1.4 times faster than PIL, to the same
pixels; the rest (CMYK, transparency, other formats) is left to PIL.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import fsspec  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

Cell = Mapping[str, Any]

# cv2 can fill the missing part of a cut-off file with grey and say nothing, where PIL raises; so it
# gets only files that end as their format does.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_OPAQUE = ("RGB", "L", "P", "1", "I;16")
_PNG_GREY = 0
_FIRST_TURNED = 5  # EXIF orientations 5 to 8 exchange height and width


def cell_name(cell: Cell | None, index: int) -> str:
    """What to call a row's file in a message: its path, else the number of the row."""
    cell = cell or {}
    path = cell.get("path")
    if path and not cell.get("bytes"):
        return str(path)
    return f"{path} (row {index})" if path else f"row {index}"


def read_cell(cell: Cell, name: str) -> bytes:
    """The encoded bytes of a cell, from memory, a local file or a remote address (hf://, ...).

    Raises:
        FileNotFoundError: if the file is gone.
        ValueError: if the cell has neither bytes nor a path.
    """
    if cell.get("bytes"):
        return bytes(cell["bytes"])
    path = cell.get("path")
    if not path:
        raise ValueError(f"Expected an image with bytes or a path, got an empty cell at {name}.")
    if "://" in path:
        with fsspec.open(path, "rb") as remote:
            return bytes(remote.read())
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Expected the file {path}, got nothing there. Was it moved after the data was listed?"
        ) from None


def decode_photograph(cell: Cell, index: int) -> npt.NDArray[np.uint8]:
    """Decode a photograph.

    Args:
        cell: `bytes` and `path` of the file.
        index: number of the row, for messages.

    Returns:
        uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    Raises:
        ValueError: if the file is no readable image; names the file.
    """
    name = cell_name(cell, index)
    data = read_cell(cell, name)
    header = _open(data, name, load=False)
    opaque = header.mode in _OPAQUE and "transparency" not in header.info
    ending = _ENDINGS.get(header.format or "")
    if opaque and ending and data.rstrip(b"\x00").endswith(ending):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is not None:
            return np.asarray(image, np.uint8)
    return np.array(_on_white(_open(data, name), name), np.uint8)  # a copy: torch needs to write


def _on_white(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB as image processors do: what is transparent shows white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"Expected a photograph of 8 bits a channel, got mode {image.mode} in {name}. Scale "
            "its values to 0..255 first."
        )
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def decode_mask(cell: Cell, index: int) -> npt.NDArray[Any]:
    """Decode a mask to the values its file holds, before any viewer scales or colours them.

    Args:
        cell: `bytes` and `path` of the file.
        index: number of the row, for messages.

    Returns:
        (H, W): bool for a 1-bit file, palette indices of a palette file, else uint8 or uint16.

    Raises:
        ValueError: if the file is unreadable or its colour channels differ; names the file.
    """
    name = cell_name(cell, index)
    data = read_cell(cell, name)
    image = _open(data, name)
    if image.mode in ("1", "P"):
        return np.asarray(image)
    values = np.asarray(image)
    if values.ndim == 2 and values.dtype.kind in "iu":
        return _small(values, name, _grey_scale(data))
    if image.mode in ("LA", "RGB", "RGBA") and not (_is_png(data) and data[24] == 16):
        return _one_channel(values, image.mode, name)
    raise ValueError(
        f"Expected a mask with one channel of whole numbers, got mode {image.mode} in {name}. "
        "Store class ids in a PNG with one channel of 8 or 16 bits."
    )


def image_shape(cell: Cell, index: int) -> tuple[int, int]:
    """Height and width of an image as it is decoded, from the head of the file.

    Raises:
        ValueError: if the file is no image; names it.
    """
    name = cell_name(cell, index)
    image = _open(read_cell(cell, name), name, load=False)
    try:
        exif = image.getexif()  # which decodes the whole of a PNG
    except _UNREADABLE as error:
        raise _unreadable(error, name) from None
    turned = exif.get(ExifTags.Base.Orientation, 1) >= _FIRST_TURNED
    turned &= image.format != "TIFF"  # whose size PIL has turned already
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(data: bytes, name: str, load: bool = True) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        if not load:
            return image
        image.load()
        return ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise _unreadable(error, name) from None


def _unreadable(error: Exception, name: str) -> ValueError:
    reason = "it holds no image that cv2 or PIL can read" if "identify" in str(error) else error
    return ValueError(
        f"Expected a readable image, got {name}: {reason}. Replace or remove the file."
    )


def _is_png(data: bytes) -> bool:
    return data[:4] == b"\x89PNG"


def _grey_scale(data: bytes) -> int:
    """By how much PIL stretched the stored values: greyscale PNGs of 2 and 4 bits go to 0..255."""
    if not _is_png(data) or data[25] != _PNG_GREY:
        return 1
    return {2: 85, 4: 17}.get(data[24], 1)


def _small(values: npt.NDArray[Any], name: str, scale: int) -> npt.NDArray[Any]:
    if values.dtype == np.uint8:
        return values if scale == 1 else values // scale
    if values.min(initial=0) < 0 or values.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError(
            f"Expected mask values 0..65535, got {values.min()}..{values.max()} in {name}."
        )
    return values.astype(np.uint16)


def _one_channel(values: npt.NDArray[Any], mode: str, name: str) -> npt.NDArray[Any]:
    colours = values[..., : {"LA": 1, "RGB": 3, "RGBA": 3}[mode]]
    if mode.endswith("A") and (values[..., -1] != 255).any():
        raise ValueError(
            f"Expected a mask without transparency, got {mode} with an alpha channel in {name}. "
            "Store the class ids in one channel."
        )
    if (colours != colours[..., :1]).any():
        raise ValueError(
            f"Expected a mask with one channel (or equal ones), got different colours in {name}. "
            "Store class ids, or a palette PNG, instead of a coloured picture."
        )
    return np.ascontiguousarray(colours[..., 0])
