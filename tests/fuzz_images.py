"""Feeds mutated images and masks to the loader; a process of its own, which a crash may end.

    python tests/fuzz_images.py FIRST LAST PLACE

See `fuzzing` for the arguments and for what it prints.
"""

from __future__ import annotations

import io
import zlib
from functools import cache

import numpy as np
from fuzzing import run
from PIL import Image

from kd_trainer.data import MaskRule, SegmentationTransform
from kd_trainer.data.images import image_shape

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MASK_KINDS = ("PNG", "GIF", "BMP", "TIFF")


@cache
def sound(number: int, is_mask: bool) -> tuple[str, bytes]:
    """A sound file, small enough that a mutation hits its structure as often as its pixels."""
    draw = np.random.default_rng(number)
    side = (int(draw.integers(16, 49)), int(draw.integers(16, 49)))
    if number % 4 == 0:  # may be turned
        side = (side[0], side[0])
    kinds = MASK_KINDS if is_mask else KINDS
    kind = kinds[number % len(kinds)]
    if is_mask:
        values = (draw.random(side[::-1]) < 0.4).astype(np.uint8)
        image = Image.fromarray(values * 255)
        image = image.convert("P" if kind == "GIF" else ("L", "1", "P", "RGB")[number // 2 % 4])
    else:
        coarse = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC)
        modes = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"), "BMP": ("RGB", "L", "P")}
        some = modes.get(kind, ("RGB", "L", "RGBA"))
        image = image.convert(some[number // 2 % len(some)])
    options: dict[str, object] = {}
    if number % 4 == 0 and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 1 + number // 4 % 8
    if kind == "TIFF":
        options["compression"] = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")[number % 4]
    if kind == "GIF":
        options["optimize"] = False  # would renumber the classes
    if kind == "JPEG":
        options["progressive"] = number % 2 == 0
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return kind, stream.getvalue()


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """One to three changes of the kinds that broken disks, cut downloads and enemies make."""
    changed = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        if len(changed) < 4:
            break
        # A third of the changes fall into the head, where lengths, sizes and offsets stand.
        reach = len(changed) if draw.random() < 0.67 else min(len(changed), 120)
        place = int(draw.integers(reach))
        size = int(draw.integers(1, 33))
        match int(draw.integers(8)):
            case 0:
                changed[place] ^= 1 << int(draw.integers(8))
            case 1:
                changed[place] = int(draw.choice([0, 1, 127, 128, 254, 255]))
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = draw.bytes(size)
            case 4:
                del changed[place : place + size]
            case 5:  # a length, size or offset
                width = int(draw.choice([2, 4]))
                value = int(draw.choice([0, 1, 0x7FFF, 0xFFFF, 50_000, 2**31 - 1, 2**32 - 1]))
                order = "big" if draw.random() < 0.5 else "little"
                number = (value % 256**width).to_bytes(width, order)
                changed[place : place + width] = number
            case 6:  # two blocks exchanged
                other = int(draw.integers(len(changed)))
                one, two = changed[place : place + size], changed[other : other + size]
                changed[place : place + size], changed[other : other + size] = two, one
            case _:  # a block of another file
                _, foreign = sound(int(draw.integers(48)), bool(draw.integers(2)))
                start = int(draw.integers(len(foreign)))
                changed[place : place + size] = foreign[start : start + size]
    whole = bytes(changed)
    return checked(whole) if draw.random() < 0.5 else whole


def checked(data: bytes) -> bytes:
    """A PNG with right checksums, without which its readers look no further."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    place, parts = 8, [data[:8]]
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        if len(body) < length + 4:
            break
        parts += [data[place : place + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        place += length + 12
    return b"".join(parts) + data[place:]


def case(number: int) -> dict[str, dict[str, object]]:
    """The row of a case: image, mask or both are broken."""
    if number < 0:
        pair = {"image": sound(-number - 1, False), "mask": sound(-number - 1, True)}
        return {k: {"bytes": data, "path": f"{k}.file"} for k, (_, data) in pair.items()}
    draw = np.random.default_rng([7, number])
    base = int(draw.integers(48))
    which = draw.random()
    row: dict[str, dict[str, object]] = {}
    for column, is_mask in (("image", False), ("mask", True)):
        _, data = sound(base, is_mask)
        if which < 0.1 or (which < 0.6) != is_mask:
            data = mutated(data, draw)
        row[column] = {"bytes": data, "path": f"{column}.file"}
    return row


def outcome(number: int) -> str:
    """`sample`, `error`, or what should not be; a negative number is a pair that nobody changed."""
    row = case(number)
    try:
        sample = TRANSFORM(row, epoch=0, index=abs(number))
    except ValueError as error:
        text = str(error)
        named = text.startswith("Expected") and (".file" in text or f"row {number}" in text)
        return "error" if named else f"another message: {error!r}"
    except Exception as error:
        return f"another exception: {error!r}"
    labels = sample["labels"].numpy()
    sound_sample = (
        sample["pixel_values"].shape == (3, 32, 32)
        and labels.shape == (32, 32)
        and set(np.unique(labels)) <= {0, 1, 255}
        and set(image_shape(row["image"], number)) <= set(range(1, 100_000))
    )
    return "sample" if sound_sample else "a sample of another kind"


TRANSFORM = SegmentationTransform(
    32, MaskRule((0, 255)), augmentation="none", seed=0, brightness_contrast_probability=0
)

if __name__ == "__main__":
    run(outcome)
