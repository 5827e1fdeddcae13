"""The quick way through plain PNG masks: PIL's values, and nothing that PIL would refuse."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from kd_trainer.data import images
from kd_trainer.data.plain_png import plain_png

MOST = 10_000


def chunk(name, body):
    crc = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + crc


def png(values, *, filter_type=1, extra=b"", colour=0, interlace=0, idats=1, tail=b""):
    """A PNG (H, W) whose rows all have one filter, none or sub."""
    values = np.asarray(values, np.uint8)
    height, width = values.shape
    steps = values.copy()
    if filter_type == 1:
        steps[:, 1:] -= values[:, :-1]
    rows = np.concatenate([np.full((height, 1), filter_type, np.uint8), steps], axis=1)
    packed = zlib.compress(rows.tobytes())
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlace)
    parts = [
        packed[len(packed) * i // idats : len(packed) * (i + 1) // idats] for i in range(idats)
    ]
    body = b"".join(chunk(b"IDAT", part) for part in parts)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + extra + body + tail + chunk(b"IEND", b"")


def by_filters(values, **options):
    """A PNG whose rows have different filters, as PIL writes them; it is not what `values` says."""
    data = png(values, filter_type=0, **options)
    place = data.index(b"IDAT") + 4
    length = int.from_bytes(data[place - 8 : place - 4])
    rows = bytearray(zlib.decompress(data[place : place + length]))
    step = values.shape[1] + 1
    rows[::step] = bytes(row % 5 for row in range(values.shape[0]))
    return data[: place - 8] + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")


def blob(height=30, width=41, seed=0):
    """A mask of three values with few edges."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 3, (4, 4), dtype=np.uint8) * 100
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


def by_pil(data):
    return np.asarray(Image.open(io.BytesIO(data)))


MASKS = [
    blob(),
    np.zeros((3, 5), np.uint8),
    np.full((4, 4), 255, np.uint8),
    np.array([[7]], np.uint8),
    np.arange(250, dtype=np.uint8)[:, None],
    np.random.default_rng(0).integers(0, 256, (20, 33), dtype=np.uint8),
    np.eye(40, dtype=np.uint8),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: "x".join(map(str, m.shape)))
def test_values_are_those_that_were_stored(mask):
    """One wrong carry at the end of a row would shift the class of a whole line."""
    written = [png(mask), png(mask, filter_type=0), png(mask, idats=3)]
    written.append(cv2.imencode(".png", mask)[1].tobytes())
    assert plain_png(written[0], MOST) is not None
    for data in written:
        found = plain_png(data, MOST)
        if found is not None:
            np.testing.assert_array_equal(found, mask)
            assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        np.testing.assert_array_equal(by_pil(data), mask)


def test_masks_as_cv2_writes_them_take_the_quick_way():
    """The decoder would be right and slow, and no other test would notice."""
    for seed in range(5):
        mask = blob(seed=seed)
        assert plain_png(cv2.imencode(".png", mask)[1].tobytes(), MOST) is not None
    palette = Image.fromarray(blob()).convert("P")
    stream = io.BytesIO()
    palette.save(stream, "PNG")
    np.testing.assert_array_equal(plain_png(stream.getvalue(), MOST), by_pil(stream.getvalue()))


def test_masks_as_pil_writes_them_do_not_need_pil():
    """Every filter, and a mask that PIL saved; the values are PIL's."""
    saved = io.BytesIO()
    Image.fromarray(blob(90, 120)).save(saved, "PNG")
    for data in (saved.getvalue(), by_filters(blob())):
        found = plain_png(data, 20_000)
        np.testing.assert_array_equal(found, by_pil(data))
        assert (found.dtype, found.ndim) == (np.uint8, 2)


PALETTE = chunk(b"PLTE", bytes(range(9)))


@pytest.mark.parametrize(
    "data",
    [
        png(blob())[:-4],
        png(blob()) + b"\0",
        png(blob(), interlace=1),
        png(blob(), colour=3),
        png(blob(), extra=PALETTE),
        png(blob(), colour=3, extra=PALETTE + PALETTE),
        png(blob(), colour=4),
        png(blob(), extra=chunk(b"tRNS", b"\0\0")),
        png(
            blob(), extra=chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
        ),
        png(blob(), extra=chunk(b"acTL", struct.pack(">II", 1, 0))),
        png(blob(), extra=chunk(b"pHYs", b"short")),
        png(blob(), tail=chunk(b"pHYs", bytes(9)) + chunk(b"IDAT", b"")),
        png(blob(200, 200)),
        png(np.zeros((0, 4))),
        by_filters(blob(), colour=3, extra=PALETTE),
        cv2.imencode(".png", blob().astype(np.uint16))[1].tobytes(),
        cv2.imencode(".png", np.dstack([blob()] * 3))[1].tobytes(),
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
    ],
)
def test_anything_else_is_left_to_pil(data):
    assert plain_png(data, MOST) is None


def outcome(data):
    try:
        values = images.decode_mask({"bytes": data, "path": None}, 0)
    except ValueError as error:
        return str(error)
    return values.dtype, values.shape, values.tobytes()


def mutated(draw):
    """A plain PNG with a few bytes changed; in half of them the sums of the chunks fit again."""
    options = {"extra": PALETTE, "colour": 3} if draw.random() < 0.3 else {}
    mask = blob(8, 9, int(draw.integers(9)))
    if draw.random() < 0.4:
        data = bytearray(by_filters(mask, **options))
    else:
        data = bytearray(png(mask, idats=int(draw.integers(1, 3)), **options))
    for _ in range(int(draw.integers(1, 4))):
        data[int(draw.integers(len(data)))] = int(draw.integers(256))
    if draw.random() < 0.2:
        data = data[: int(draw.integers(len(data)))]
    place = 8
    while draw.random() < 0.95 and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(data)


def test_a_mutated_file_ends_as_it_does_without_the_quick_way(monkeypatch):
    """A quick way that is less strict lets damaged masks into the training."""
    draw = np.random.default_rng(5)
    files = [mutated(draw) for _ in range(800)]
    quick = [plain_png(data, images.MAX_PIXELS) is not None for data in files]
    found = [outcome(data) for data in files]
    monkeypatch.setattr(images, "plain_png", lambda *_: None)
    assert found == [outcome(data) for data in files]
    assert 20 < sum(quick) < 700
