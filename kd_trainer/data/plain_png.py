"""Plain PNG masks, unpacked faster than PIL does.

libpng undoes a row's filter byte by byte. A mask written by cv2 has the filter `sub` in every row,
which stores differences to the left neighbour; almost all are 0, so only the others need work: half
the time of a general decoder. PIL chooses a filter for each row; such a mask goes through cv2,
which is a little faster than PIL. What has any fault is left to PIL, which has the words for it.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.uint8]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = 25  # its place in a file
_GREY, _PALETTE = 0, 3
_NONE, _SUB = 0, 1
_FIRST_ROWS = 64
# Chunks that say nothing about the values, with their lengths; any other is PIL's to judge.
_HARMLESS = {b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"tIME": 7}


def plain_png(data: bytes, most: int) -> Values | None:
    """Decode a PNG of one channel of 8 bits; with a palette only if all rows are filtered alike.

    Args:
        data: of the file.
        most: pixels that it may claim.

    Returns:
        uint8 (H, W), grey levels or palette indices as they are stored; None for every other file,
        sound or not.
    """
    chunks = _chunks(data)
    if chunks is None:
        return None
    width, height, packed = chunks
    if not 0 < width * height <= most:
        return None
    step = width + 1
    size = height * step
    unpacker = zlib.decompressobj()
    try:
        first = unpacker.decompress(packed, min(_FIRST_ROWS, height) * step)
        kinds = set(first[::step])
        # PIL writes the empty rows above a figure without a filter, whatever follows.
        if kinds != {_SUB} and (kinds != {_NONE} or data[_COLOUR_TYPE] == _GREY):
            return _by_cv2(data, height, width)
        raw = first + unpacker.decompress(unpacker.unconsumed_tail, size + 1 - len(first))
    except zlib.error:
        return None
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, step)
    kind = int(rows[0, 0])
    if (rows[:, 0] != kind).any():
        return _by_cv2(data, height, width)
    values = rows[:, 1:].copy()
    return values if kind == _NONE else _running_sums(values)


def _by_cv2(data: bytes, height: int, width: int) -> Values | None:
    """Grey levels of a file whose chunks are all whole; a palette would become colours."""
    if data[_COLOUR_TYPE] != _GREY:
        return None
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    sound = values is not None and values.dtype == np.uint8 and values.shape == (height, width)
    return np.asarray(values, np.uint8) if sound else None


def _chunks(data: bytes) -> tuple[int, int, bytes] | None:
    """Width, height and packed rows, if every chunk is whole and of an expected kind."""
    if not data.startswith(_SIGNATURE):
        return None
    place, seen = len(_SIGNATURE), b""
    packed: list[bytes] = []
    width = height = colour = -1
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        body = data[place + 8 : end]
        if zlib.crc32(data[place + 4 : end]).to_bytes(4) != data[end : end + 4]:
            return None
        if (kind == b"IHDR") != (not seen) or (kind == b"IDAT" and packed and seen != kind):
            return None
        if kind == b"IHDR" and length == 13:
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", body)
            if depth != 8 or colour not in (_GREY, _PALETTE) or any(rest):
                return None
        elif kind == b"IDAT":
            packed.append(body)
        elif kind == b"IEND" and not length:
            sound = bool(packed) and end + 4 == len(data) and colour != _PALETTE
            return (width, height, b"".join(packed)) if sound else None
        elif kind == b"PLTE" and colour == _PALETTE and not packed and length in range(3, 769, 3):
            colour = _GREY  # the palette that was missing is there
        elif length != _HARMLESS.get(kind) or packed:
            return None
        place, seen = end + 4, kind
    return None


def _running_sums(steps: Values) -> Values:
    """Sums from the left modulo 256 of each row, (H, W)."""
    height, width = steps.shape
    # As one long row: each row's first step comes back from where the row before ended.
    ends = np.add.reduce(steps, axis=1, dtype=np.uint8)
    steps[1:, 0] -= ends[:-1]
    flat = steps.ravel()
    places = np.flatnonzero(flat != 0)
    if 8 * len(places) > flat.size:
        return np.add.accumulate(flat, dtype=np.uint8).reshape(height, width)
    levels = np.zeros(len(places) + 1, np.uint8)
    np.add.accumulate(flat[places], dtype=np.uint8, out=levels[1:])
    lengths = np.diff(places, prepend=0, append=flat.size)
    return np.repeat(levels, lengths).reshape(height, width)
