"""Images of a data set as they are stored, and decoded: names, bytes, headers and arrays.

An encoded image, a cell of the table, is what `datasets.Image(decode=False)` gives: a dict with
`bytes` and `path`, either of which may be None. cv2 decodes JPEG and PNG images into arrays 1.3
times faster than PIL, to the same pixels; the rest (CMYK, transparency, other formats, masks) is
left to PIL, which opens a file only after its header was looked at: it takes the fourth band of a
TIFF for transparency where the file does not call it that, and drops the lower half of 16-bit
colours.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff

from kd_trainer.errors import printable

EncodedImage = Mapping[str, Any]

MAX_BYTES = 2**30
"""Largest file that is read as one image: 1 GiB."""

# What is wrong with the one file; anything else (a full table of open files, a broken disk) is
# wrong with the machine, and no reason to go on without the sample.
_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


class BadSampleError(ValueError):
    """An image or a mask that cannot be used; the message names the file."""


@dataclass(frozen=True)
class BadSample:
    """One row that was left out."""

    split: str
    row: int
    file: str
    reason: str

    def line(self) -> str:
        """All four between tabs, as in bad_samples.txt."""
        return "\t".join(map(printable, astuple(self)))

    def __str__(self) -> str:
        return printable(f"{self.split} row {self.row}: {self.reason}")


class MissingFileError(BadSampleError, FileNotFoundError):
    """A file that was listed and is not there."""


def image_name(cell: EncodedImage | None, index: int) -> str:
    """What to call a row's file in a message: its path, else the number of the row."""
    cell = cell or {}
    path = cell.get("path")
    if path and cell.get("bytes") is None:
        return str(path)
    return f"{path} (row {index})" if path else f"row {index}"


def read_image_bytes(cell: EncodedImage | None, name: str) -> bytes:
    """The encoded bytes of a cell, from memory, a local file or a remote address (hf://, ...).

    Raises:
        MissingFileError: if the file is gone.
        BadSampleError: if the cell has neither bytes nor a path, or the file cannot be read.
    """
    cell = cell or {}
    stored = cell.get("bytes")
    if stored is not None:
        if not stored:
            raise BadSampleError(f"Expected an image, got no bytes at {name}. Remove the row.")
        return bytes(stored)
    path = cell.get("path")
    if not path:
        raise BadSampleError(
            f"Expected an image with bytes or a path, got an empty cell at {name}."
        )
    if "://" in path:
        with fsspec.open(path, "rb") as remote:
            content = bytes(remote.read(MAX_BYTES + 1))
        _check_length(len(content), "more", path)
        return content
    try:
        status = Path(path).stat()
        # A pipe or a device would be read without end.
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise BadSampleError(f"Expected a file, got {kind} at {path}. Rename or remove it.")
        _check_length(status.st_size, f"{status.st_size:,}", path)
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(
            f"Expected the file {path}, got nothing there. Was it moved after the data was listed?"
        ) from None
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise BadSampleError(
            f"Expected a readable file, got {path}: {error.strerror}. Mend or remove it."
        ) from None


def _check_length(length: int, shown: str, path: str) -> None:
    if not length:
        raise BadSampleError(f"Expected an image, got an empty file: {path}. Replace or remove it.")
    if length > MAX_BYTES:
        raise BadSampleError(
            f"Expected an image of at most {MAX_BYTES:,} bytes, got {shown} in {path}. Make it "
            "smaller, or cut it into pieces."
        )


FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
"""What PIL may read. Its other readers are many, and one of them starts Ghostscript."""

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, about 9,460 x 9,460: 256 MiB as RGB.

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


def decode_image(cell: EncodedImage, index: int) -> npt.NDArray[np.uint8]:
    """Decode an image.

    Args:
        cell: `bytes` and `path` of the file.
        index: number of the row, for messages.

    Returns:
        uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    Raises:
        BadSampleError: if the file is no readable image; names the file.
    """
    name = image_name(cell, index)
    data = read_image_bytes(cell, name)
    header = open_image(data, name)
    if header.mode.startswith(("I", "F")) or bits_of(header) > 8:
        raise BadSampleError(
            f"Expected an image of 8 bits a channel, got {mode_of(header)} in {name}. Scale "
            "its values to 0..255 first, by the range that they really have."
        )
    opaque = header.mode in _OPAQUE and "transparency" not in header.info
    ending = _ENDINGS.get(header.format or "")
    if opaque and ending and data.rstrip(b"\x00").endswith(ending):
        with suppress(cv2.error):  # PIL has the last word, and names the file
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None and sorted(image.shape[:2]) == sorted(header.size):
                return np.asarray(image, np.uint8)
    return by_strips(load_image(header, name), lambda strip: _on_white(strip, name))


def by_strips(
    image: Image.Image, convert: Callable[[Image.Image], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """A new array of what `convert` makes of an image, of a large one strip by strip.

    Each conversion is a copy: of a whole transparent image of `MAX_PIXELS` they take 1.5 GiB.
    """
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return convert(image)
    strip = convert(image.crop((0, 0, image.width, rows)))
    whole = np.empty((image.height, *strip.shape[1:]), strip.dtype)
    whole[:rows] = strip
    for top in range(rows, image.height, rows):
        bottom = min(top + rows, image.height)
        whole[top:bottom] = convert(image.crop((0, top, image.width, bottom)))
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


def image_shape(cell: EncodedImage, index: int) -> tuple[int, int]:
    """Height and width of an image as it is decoded, from the head of the file.

    Raises:
        BadSampleError: if the file is no image; names it.
    """
    name = image_name(cell, index)
    image = open_image(read_image_bytes(cell, name), name)
    try:
        exif = image.getexif()  # which decodes the whole of a PNG
    except Exception as error:
        raise _unreadable(error, name) from None
    turned = exif.get(ExifTags.Base.Orientation, 1) in range(_FIRST_TURNED, 9)
    turned &= image.format != "TIFF"  # whose size PIL has turned already
    return (image.width, image.height) if turned else (image.height, image.width)


def open_image(data: bytes, name: str) -> Image.Image:
    """Read the head of a file; nothing is decoded."""
    # PIL's readers raise whatever they stumble over in a broken file: struct.error, KeyError, ...
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_header(image, data, name)
    except BadSampleError:
        raise
    except Exception as error:
        raise _unreadable(error, name) from None
    return image


def load_image(image: Image.Image, name: str) -> Image.Image:
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
        return _too_large(f"{int(pixels[0]):,}" if pixels else "more", name)
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = f"it is none of {', '.join(FORMATS)}, or its head is broken"
    return BadSampleError(
        f"Expected a readable image, got {name}: {reason}. Replace or remove the file."
    )


MAX_SCANS = 32
"""Scans of a JPEG; a progressive one has about ten. Each of them goes through all pixels."""

# Phones keep a depth map or a preview behind the main image: further images, but no animation.
_OF_SEVERAL_PARTS = "MPO"
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START_OF_SCAN, _END = 0xDA, 0xD9
_BANDS = {2: 3, 5: 4, 6: 3, 8: 3}  # of the colours of a TIFF, by its photometric tag; else 1
_ALPHA = ((1,), (2,))  # the further band multiplied in, or not


def _check_header(image: Image.Image, data: bytes, name: str) -> None:
    """Refuse what claims too much, holds more than one image, or bands without a meaning."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width:,} x {height:,}", name)
    if width < 1 or height < 1:
        raise BadSampleError(f"Expected an image, got {width} x {height} pixels in {name}.")
    # Not `n_frames`, for which PIL goes through all of them.
    if image.format != _OF_SEVERAL_PARTS and getattr(image, "is_animated", False):
        raise BadSampleError(
            f"Expected one image, got several (an animation, or pages) in {name}. Save the one "
            "that is meant as a file of its own."
        )
    if image.format == "TIFF":
        _check_bands(_tags(image), name)
    if image.format in ("JPEG", _OF_SEVERAL_PARTS):
        _check_scans(data, name)


def _too_large(size: str, name: str) -> BadSampleError:
    return BadSampleError(
        f"Expected an image of at most {MAX_PIXELS:,} pixels, got {size} in {name}. Shrink it, cut "
        "it into pieces, or remove it."
    )


def bits_of(image: Image.Image) -> int:
    """Bits of a channel as they are stored; 8 for all but some kinds of TIFF and PNG."""
    if image.format == "TIFF":
        bits = _tags(image).get(Tiff.BITSPERSAMPLE, (1,))
        return max(int(number) for number in bits)
    return 16 if ";16" in raw_mode(image) else 8


def mode_of(image: Image.Image) -> str:
    """How the values are stored, for a message."""
    bits = bits_of(image)
    named = image.mode.startswith(("I", "F"))
    return f"mode {image.mode}" if named else f"mode {image.mode} of {bits} bits"


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def raw_mode(image: Image.Image) -> str:
    """The layout of the stored values in PIL's words, before they are loaded."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _check_bands(tags: Any, name: str) -> None:
    samples = int(tags.get(Tiff.SAMPLESPERPIXEL, 1))
    further = samples - _BANDS.get(tags.get(Tiff.PHOTOMETRIC_INTERPRETATION), 1)
    if further > 0 and tags.get(Tiff.EXTRASAMPLES) not in _ALPHA:
        raise BadSampleError(
            f"Expected grey or colours, with transparency only where the file calls it that, got "
            f"{samples} bands in {name}, {further} of them without a meaning (infrared?). Save the "
            "bands to train on as grey or RGB."
        )


def _check_scans(data: bytes, name: str) -> None:
    if data.count(bytes((0xFF, _START_OF_SCAN))) <= MAX_SCANS:  # which is quick, and enough
        return
    place, scans = 2, 0
    while marker := _MARKER.search(data, place):
        kind = data[marker.start() + 1]
        if kind == _END:
            break
        scans += kind == _START_OF_SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    if scans > MAX_SCANS:
        raise BadSampleError(
            f"Expected a JPEG of at most {MAX_SCANS} scans, got {scans} in {name}, which take a "
            "long time to decode. Save it anew."
        )


READ_ROWS = 16
"""Rows whose images and masks are read: a few milliseconds each."""


def content_digest(rows: Any) -> str:
    """A short hash of a data set with the columns `image` and `mask`, undecoded.

    Of a stream the first rows are hashed. Of any other data set some rows spread over it, and where
    it names files, the name and size of every one. Where the files lie does not matter.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` as `load_splits` gives it.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    if isinstance(rows, datasets.Dataset):
        count = min(READ_ROWS, len(rows))
        sample = [rows[len(rows) * i // count] for i in range(count)]
        for column in ("image", "mask"):
            _add_files(digest, rows, column, sample)
    else:
        sample = list(islice(rows, READ_ROWS))
    for row in sample:
        for column in ("image", "mask"):
            digest.update(_content(row[column]))
    return digest.hexdigest()[:16]


def _add_files(digest: Any, rows: datasets.Dataset, column: str, sample: list[Any]) -> None:
    """Names and sizes of all files, unless the table itself holds their bytes."""
    cells = [row[column] for row in sample if row[column] is not None]
    if any(cell["bytes"] is not None for cell in cells):
        digest.update(f"{column} {len(rows)}\n".encode())
        return
    for cell in rows.select_columns(column)[:][column]:
        path = None if cell is None else cell["path"]
        name = None if path is None else os.path.basename(path)  # noqa: PTH119 (Path is slow)
        digest.update(f"{column} {name} {_size(path)}\n".encode())


def _size(path: str | None) -> int:
    """Bytes of a file; 0 if it is none. One call of the system: 100,000 files take a second."""
    if path is None:
        return 0
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _content(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        return b"none\n"
    if cell["bytes"] is not None:
        return hashlib.sha256(cell["bytes"]).digest()
    path = Path(cell["path"])
    return hashlib.sha256(path.read_bytes() if path.is_file() else path.name.encode()).digest()
