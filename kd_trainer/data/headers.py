"""What the head of an image file says, looked at before anything is decoded.

PIL opens more than a training should take: it takes the fourth band of a TIFF for transparency
where the file does not call it that, and drops the lower half of 16-bit colours.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import Image
from PIL import TiffImagePlugin as Tiff

from kd_trainer.data.cells import BadSampleError

MAX_SCANS = 32
"""Scans of a JPEG; a progressive one has about ten. Each of them goes through all pixels."""

# Phones keep a depth map or a preview behind the photograph: further pictures, but no animation.
_OF_SEVERAL_PARTS = "MPO"
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START_OF_SCAN, _END = 0xDA, 0xD9
_BANDS = {2: 3, 5: 4, 6: 3, 8: 3}  # of the colours of a TIFF, by its photometric tag; else 1
_ALPHA = ((1,), (2,))  # the further band multiplied in, or not


def check_header(image: Image.Image, data: bytes, name: str, most: int) -> None:
    """Refuse what claims too much, holds more than one picture, or bands without a meaning.

    Args:
        image: as PIL opened it.
        data: its file.
        name: of the file, for the message.
        most: pixels that it may have.

    Raises:
        BadSampleError: names the file.
    """
    width, height = image.size
    if width * height > most:
        raise too_large(f"{width:,} x {height:,}", name, most)
    if width < 1 or height < 1:
        raise BadSampleError(f"Expected a picture, got {width} x {height} pixels in {name}.")
    # Not `n_frames`, for which PIL goes through all of them.
    if image.format != _OF_SEVERAL_PARTS and getattr(image, "is_animated", False):
        raise BadSampleError(
            f"Expected one picture, got several (an animation, or pages) in {name}. Save the one "
            "that is meant as a file of its own."
        )
    if image.format == "TIFF":
        _check_bands(_tags(image), name)
    if image.format in ("JPEG", _OF_SEVERAL_PARTS):
        _check_scans(data, name)


def too_large(size: str, name: str, most: int) -> BadSampleError:
    """The error for a picture of more than `most` pixels."""
    return BadSampleError(
        f"Expected a picture of at most {most:,} pixels, got {size} in {name}. Shrink it, cut it "
        "into pieces, or remove it."
    )


def bits_of(image: Image.Image) -> int:
    """Bits of a channel as they are stored; 8 for all but some kinds of TIFF and PNG."""
    if image.format == "TIFF":
        bits = _tags(image).get(Tiff.BITSPERSAMPLE, (1,))
        return max(int(number) for number in bits)
    return 16 if ";16" in _raw_mode(image) else 8


def mode_of(image: Image.Image) -> str:
    """How the values are stored, for a message."""
    bits = bits_of(image)
    named = image.mode.startswith(("I", "F"))
    return f"mode {image.mode}" if named else f"mode {image.mode} of {bits} bits"


def grey_scale(image: Image.Image) -> int:
    """By how much PIL stretches the stored values: grey levels of 2 and 4 bits go to 0..255."""
    return {"L;2": 85, "L;4": 17}.get(_raw_mode(image), 1)


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _raw_mode(image: Image.Image) -> str:
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
    while found := _MARKER.search(data, place):
        kind = data[found.start() + 1]
        if kind == _END:
            break
        scans += kind == _START_OF_SCAN
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    if scans > MAX_SCANS:
        raise BadSampleError(
            f"Expected a JPEG of at most {MAX_SCANS} scans, got {scans} in {name}, which take a "
            "long time to decode. Save it anew."
        )
