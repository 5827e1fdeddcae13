"""Mask files, decoded to whole numbers before any viewer scales or colours them.

What the numbers are is the same in all files of a data set, its kind:

- `values`: class ids, grey levels, the indices of a palette, set or unset bits;
- `colors`: 0xRRGGBB of colours, those of a palette too;
- `alpha`: how opaque each pixel is, 0..255, whatever its colour;
- `fractions`: 0.0..1.0 of files of floats, as 0..255.

Nobody has to say which: a file that does not fit the kind names the one that it would fit
(`OtherKindError`), and `mask_survey` takes that for all of them.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from kd_trainer.data.images import (
    MAX_PIXELS,
    BadSampleError,
    EncodedImage,
    bits_of,
    by_strips,
    image_name,
    image_shape,
    load_image,
    mode_of,
    open_image,
    raw_mode,
    read_image_bytes,
)

# PIL stretches grey levels of 2 and 4 bits to 0..255, each by this factor.
_GREY_SCALES = {"L;2": 85, "L;4": 17}
_LARGEST = np.iinfo(np.uint16).max


class OtherKindError(BadSampleError):
    """A mask does not fit the kind it was decoded as, but might fit another.

    Args:
        kind: that it might fit.
        message: what is wrong, and the cure.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class MaskFile(NamedTuple):
    """A decoded mask.

    Attributes:
        values: (H, W): bool for a 1-bit file, uint32 for `colors`, else uint8 or uint16.
        palette: colours of the indices, r, g, b, r, ...; empty where there is no palette.
        lossy: whether it was a JPEG, which changes values.
    """

    values: npt.NDArray[Any]
    palette: tuple[int, ...] = ()
    lossy: bool = False


def decode_mask(cell: EncodedImage, index: int, kind: str = "values") -> npt.NDArray[Any]:
    """The numbers of a mask (H, W); see `read_mask`."""
    return read_mask(cell, index, kind).values


def read_mask(cell: EncodedImage, index: int, kind: str = "values") -> MaskFile:
    """Decode a mask.

    Args:
        cell: `bytes` and `path` of the file: an image, or an array (`.npy`) of numbers (H, W) or
            of one channel for each class.
        index: number of the row, for messages.
        kind: what its numbers are, see the module's text.

    Raises:
        OtherKindError: if it is of another kind.
        BadSampleError: if the file is unreadable or no mask; names the file.
    """
    name = image_name(cell, index)
    data = read_image_bytes(cell, name)
    if data.startswith(_NUMPY):
        values = _array(data, name)
        return MaskFile(_of_kind(values, kind, name))
    image = open_image(data, name)
    scale = _GREY_SCALES.get(raw_mode(image), 1)
    if bits_of(image) > 8 and not image.mode.startswith(("I", "F")):
        raise _no_mask(mode_of(image), name)
    image = load_image(image, name)
    palette = tuple(image.getpalette() or ()) if image.mode == "P" else ()
    if kind == "alpha":
        values = _alpha(image, name)
    elif kind == "colors":
        values = by_strips(image, lambda strip: _colors(strip, name))
    else:
        values = by_strips(image, lambda strip: _values(strip, image, name))
        values = _of_kind(_whole(values, name) if scale == 1 else values // scale, kind, name)
    return MaskFile(values, palette, image.format in ("JPEG", "MPO"))


def mask_shape(cell: EncodedImage, index: int) -> tuple[int, int]:
    """Height and width of a mask as it is decoded, from the head of the file.

    Raises:
        BadSampleError: if the file is neither an image nor an array of a mask; names it.
    """
    if cell.get("bytes") is None and not str(cell.get("path")).endswith(".npy"):
        return image_shape(cell, index)
    name = image_name(cell, index)
    data = read_image_bytes(cell, name)
    if not data.startswith(_NUMPY):
        return image_shape(cell, index)
    return _sides(_head(data, name)[0], name)[0]


def _values(strip: Image.Image, image: Image.Image, name: str) -> npt.NDArray[Any]:
    """The numbers of a part of an image; floats stay floats."""
    values = np.asarray(strip)
    if strip.mode in ("1", "P") or (values.dtype == np.uint8 and values.ndim == 2):
        return values
    if strip.mode in ("LA", "RGB", "RGBA"):
        return _one_channel(values, image, name)
    if values.ndim != 2:
        raise _no_mask(f"mode {strip.mode}", name)
    return values


def _one_channel(values: npt.NDArray[Any], image: Image.Image, name: str) -> npt.NDArray[Any]:
    if image.mode.endswith("A"):
        ranges: Any = image.getextrema()  # of the whole image, whatever strip this is
        if ranges[-1] != (255, 255):
            one_colour = all(low == high for low, high in ranges[:-1])
            raise OtherKindError(
                "alpha" if one_colour else "colors",
                f"Expected a mask without transparency, got {image.mode} with an alpha channel in "
                f"{name}. If that is the mask, set --mask_kind alpha.",
            )
    colours = values[..., :1] if image.mode == "LA" else values[..., :3]
    if (colours != colours[..., :1]).any():
        raise OtherKindError(
            "colors",
            "Expected a mask with one channel (or equal ones), got different colours in "
            f"{name}. If each class has a colour, the same in all masks, name them with "
            "--mask_colors.",
        )
    return np.ascontiguousarray(colours[..., 0])


def _whole(values: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Numbers as uint8 or uint16 where they are whole ones, else as float32.

    Raises:
        BadSampleError: if 16 bits cannot hold them, or they are neither whole nor fractions of one.
    """
    if values.dtype in (np.uint8, np.bool_):
        return values
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= _LARGEST):  # which is not so either for what is no number
        raise BadSampleError(f"Expected mask values 0..65535, got {low}..{high} in {name}.")
    if values.dtype.kind != "f" or (values == np.trunc(values)).all():
        return values.astype(np.uint16)
    if high > 1:
        raise _no_mask(f"fractions up to {high:g}", name)
    return values.astype(np.float32)


def _of_kind(values: npt.NDArray[Any], kind: str, name: str) -> npt.NDArray[Any]:
    """Numbers as `values` or `fractions` have them; of an array also as the other kinds."""
    if kind in ("colors", "alpha"):
        raise BadSampleError(
            f"Expected {kind} as in the other masks, got an array of numbers in {name}. Store all "
            "masks alike."
        )
    whole = values.dtype.kind != "f"
    if kind == "values":
        if not whole:
            raise OtherKindError(
                "fractions",
                f"Expected a mask of whole numbers, got fractions between 0 and 1 in {name}. "
                "--mask_kind fractions reads them.",
            )
        return values
    if values.dtype == np.bool_:
        return values
    if values.max(initial=0) > 1:
        raise BadSampleError(
            f"Expected fractions between 0 and 1 as in the other masks, got values up to "
            f"{values.max()} in {name}. Store all masks alike."
        )
    return np.floor(values.astype(np.float32) * 255 + 0.5).astype(np.uint8)


def _alpha(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    if image.mode not in ("LA", "RGBA"):
        raise BadSampleError(
            f"Expected an alpha channel (--mask_kind alpha), got mode {image.mode} in {name}. "
            "Store all masks alike."
        )
    return np.asarray(image.getchannel("A"))


def _colors(strip: Image.Image, name: str) -> npt.NDArray[np.uint32]:
    """0xRRGGBB of each pixel; what is wholly transparent is black."""
    if strip.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise BadSampleError(
            f"Expected colours as in the other masks, got mode {strip.mode} in {name}. Store all "
            "masks alike."
        )
    if strip.mode.endswith("A"):
        alpha = np.asarray(strip.getchannel("A"))
        if ((alpha != 0) & (alpha != 255)).any():
            raise BadSampleError(
                f"Expected colours that are opaque or wholly transparent, got some in between in "
                f"{name}. If how opaque they are is the mask, set --mask_kind alpha."
            )
        visible = (alpha == 255).astype(np.uint32)
    else:
        visible = np.uint32(1)
    strip.info.pop("transparency", None)  # of a palette, of which the colours are meant
    red, green, blue = np.moveaxis(np.asarray(strip.convert("RGB"), np.uint32), -1, 0)
    return np.asarray((red << 16 | green << 8 | blue) * visible, np.uint32)


def _no_mask(content: str, name: str) -> BadSampleError:
    return BadSampleError(
        f"Expected a mask with one channel of whole numbers, got {content} in {name}. Store class "
        "ids in a PNG with one channel of 8 or 16 bits."
    )


_NUMPY = b"\x93NUMPY"
_MOST_CHANNELS = 256
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _head(data: bytes, name: str) -> tuple[tuple[int, ...], bool, Any, int]:
    """Shape, order, type and length of the head of an array; refuses pickles and wrong sizes."""
    stream = io.BytesIO(data)
    try:
        reader = _READERS[np.lib.format.read_magic(stream)]
        shape, fortran, dtype = reader(stream)
    except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadSampleError(
            f"Expected a readable array, got {name}: {str(error)[:100]}. Replace or remove the "
            "file."
        ) from None
    if dtype.hasobject or dtype.kind not in "buif":
        raise BadSampleError(
            f"Expected an array of numbers, got {str(dtype)[:100]} in {name}. Store class ids as "
            "uint8."
        )
    length = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if any(side < 0 for side in shape) or length != len(data) - stream.tell():
        raise BadSampleError(
            f"Expected {length:,} bytes behind the head of the array, got "
            f"{len(data) - stream.tell():,} in {name}. Replace or remove the file."
        )
    return shape, fortran, dtype, stream.tell()


def _sides(shape: tuple[int, ...], name: str) -> tuple[tuple[int, int], int | None]:
    """Height and width of an array, and its axis of classes if it has one."""
    axis = None
    if len(shape) == 3:  # the classes are fewer than the pixels of a side
        axis = 2 if shape[2] <= shape[0] else 0
    sides = tuple(side for number, side in enumerate(shape) if number != axis)
    channels = 1 if axis is None else shape[axis]
    if len(sides) != 2 or not 0 < sides[0] * sides[1] <= MAX_PIXELS or channels > _MOST_CHANNELS:
        raise BadSampleError(
            f"Expected an array (H, W), or one with a channel of at most {_MOST_CHANNELS} for each "
            f"class, and at most {MAX_PIXELS:,} pixels, got {shape} in {name}. Store class ids as "
            "(H, W)."
        )
    return (sides[0], sides[1]), axis


def raw_array(data: bytes, name: str) -> npt.NDArray[Any] | None:
    """The numbers of a `.npy` file as they are, of any shape; None if the bytes are none.

    Raises:
        BadSampleError: if it holds objects, or other than its head says.
    """
    if not data.startswith(_NUMPY):
        return None
    shape, fortran, dtype, start = _head(data, name)
    values = np.frombuffer(data, dtype, offset=start)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def _array(data: bytes, name: str) -> npt.NDArray[Any]:
    """The numbers (H, W) of an array; of one with a channel for each class the class."""
    shape = _head(data, name)[0]
    _, axis = _sides(shape, name)
    values = raw_array(data, name)
    assert values is not None
    if axis is None or shape[axis] == 1:
        values = values if axis is None else values.squeeze(axis)
        return np.ascontiguousarray(_whole(values, name))
    ones = values == 1
    if not (ones | (values == 0)).all() or not (ones.sum(axis) == 1).all():
        raise BadSampleError(
            f"Expected one channel that is 1 in each pixel, the others 0, got something else in "
            f"{name}, of shape {shape}. Store class ids as (H, W), or a channel of the background "
            "too."
        )
    return np.asarray(ones.argmax(axis), np.uint8)
