"""Arrays in numpy's own file format, read without unpickling and within the limits of images."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from kd_trainer.data.images import MAX_BYTES, BadSampleError

MAGIC = b"\x93NUMPY"


def is_npy(data: bytes) -> bool:
    """Whether the bytes of a file are an array of numpy."""
    return data.startswith(MAGIC)


def read_npy(data: bytes, name: str) -> npt.NDArray[Any]:
    """The array of a `.npy` file of numbers.

    Args:
        data: the whole file.
        name: what to call it in a message.

    Raises:
        BadSampleError: if it is broken, holds objects (which would be unpickled), or not as many
            numbers as its head says: a few bytes can claim any size.
    """
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(stream)
    except ValueError as error:
        raise BadSampleError(
            f"Expected an array of numpy, got a broken head in {name}: "
            f"{' '.join(str(error).split())[:200]}. Save it again with numpy.save."
        ) from None
    size = math.prod(shape) * kind.itemsize
    if kind.hasobject or kind.kind not in "buif":
        raise BadSampleError(
            f"Expected an array of numbers, got the type {str(kind)[:80]} in {name}. Save whole "
            "numbers or floats."
        )
    if not 0 < size <= MAX_BYTES or size != len(data) - stream.tell():
        raise BadSampleError(
            f"Expected {size:,} bytes for the shape {shape}, got {len(data) - stream.tell():,} in "
            f"{name}. Save it again with numpy.save."
        )
    return np.load(io.BytesIO(data), allow_pickle=False)
