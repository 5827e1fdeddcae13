"""Rows of docs/bad_input.md about files: what the loader makes of odd images and odd folders.

Others are held elsewhere: tests/test_masks.py (grey, palette, CMYK, RGBA, EXIF, 16-bit masks,
cut-off files), tests/test_transform.py (sizes), tests/test_data_sources.py (empty and broken
folders), tests/test_bad_samples.py (`--on_bad_sample`), tests/test_fuzz.py (mutated files).
"""

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
from PIL import Image
from small_runs import SIDE, write_pairs

from kd_trainer.data import (
    MaskRule,
    SegmentationTransform,
    TransformedDataset,
    load_splits,
    transforms,
)
from kd_trainer.data.images import (
    MAX_BYTES,
    MAX_PIXELS,
    decode_image,
    image_shape,
    read_image_bytes,
)
from kd_trainer.data.input_files import read_image
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data_arguments import DataArguments

EVERY = (decode_image, decode_mask, image_shape)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cell(data: bytes, name: str = "some.file") -> dict:
    return {"bytes": data, "path": name}


def grey(value: int, size: tuple[int, int] = (9, 6)) -> Image.Image:
    return Image.new("L", size, value)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(kind: str, side: int) -> bytes:
    """A file of a few hundred bytes that claims side x side pixels."""
    if kind == "PNG":
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + head + body
    data = bytearray(encode(Image.new("RGB", (16, 16)), kind))
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
    elif kind == "TIFF":
        for tag in (256, 257):
            place = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
            data[place : place + 4] = struct.pack("<I", side)
    return bytes(data)


@pytest.mark.parametrize("decode", EVERY)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_a_decompression_bomb_is_refused_by_its_head(kind, decode):
    """A file of 1 kB that claims 50,000 x 50,000 pixels would take 7 GiB to decode."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (50_000, 10_000):  # PIL raises for the first, and only warns for the second
        data = bomb(kind, side)
        assert len(data) < 4000
        said = rf"^Expected an image of at most 89,478,485.* got ({side:,} x {side:,}|{side**2:,}) "
        with pytest.raises(ValueError, match=said + ".*some.f"):
            decode(cell(data), 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, "kB"


def test_the_limit_is_ours_even_if_that_of_pil_is_switched_off(monkeypatch):
    """`Image.MAX_IMAGE_PIXELS = None` is in many scripts, and would count for us too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"got 50,000 x 50,000 in some.file"):
        decode_image(cell(bomb("PNG", 50_000)), 0)


@pytest.mark.parametrize("decode", EVERY)
@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused_as_nobody_knows_which_image_is_meant(kind, decode):
    """cv2 and PIL take the first frame without a word; the mask may belong to another."""
    frames = [grey(value).convert("RGB") for value in (10, 200, 90)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"^Expected one image, got several .* in some.file"):
        decode(cell(data), 0)
    still = encode(frames[0], kind)
    assert image_shape(cell(still), 0) == (6, 9)


def test_an_image_of_a_phone_with_a_depth_map_is_its_first_image():
    """These files end in .jpg and hold two images; refusing them would refuse most phones."""
    first, second = grey(200, (16, 16)).convert("RGB"), grey(10, (16, 16)).convert("RGB")
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert (decode_image(cell(data), 0) > 150).all()


@pytest.mark.parametrize("decode", EVERY)
def test_a_format_of_another_kind_is_refused(decode):
    """PIL starts Ghostscript for PostScript, whatever the name of the file says."""
    for data in (encode(grey(0), "EPS"), encode(grey(0), "PPM"), b"%PDF-1.4", b"\x00" * 50):
        with pytest.raises(ValueError, match=r"it is none of JPEG, PNG"):
            decode(cell(data, "photo.jpg"), 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_grey_image_of_sixteen_bits_is_refused_in_training_as_in_deployment(kind):
    """Of 12-bit values only the highest 4 bits would be left, and the image processor refuses."""
    data = encode(Image.fromarray(np.full((4, 4), 4000, np.uint16)), kind)
    with pytest.raises(ValueError, match=r"image of 8 bits a channel, got mode I;16 in some"):
        decode_image(cell(data), 0)


@pytest.mark.parametrize("kind", [".png", ".tif"])
def test_colours_of_sixteen_bits_are_treated_as_grey_is(kind):
    """Cameras and satellites store 12 bits in 16: their high bytes are nearly black."""
    data = cv2.imencode(kind, np.full((4, 4, 3), 4000, np.uint16))[1].tobytes()
    with pytest.raises(ValueError, match=r"image of 8 bits .*mode RGB of 16 bits in some.f"):
        decode_image(cell(data), 0)
    with pytest.raises(ValueError, match=r"mask with one channel .*mode RGB of 16 bits in some.f"):
        decode_mask(cell(data), 0)


def tiff_bands(further: int | None) -> bytes:
    """Four bands, of which the last is 9 throughout, with this meaning in its tag."""
    bands = Image.new("RGBA", (5, 4), (200, 100, 50, 9))
    data = bytearray(encode(bands, "TIFF"))
    place = data.index(struct.pack("<HHI", 338, 3, 1))
    if further is None:
        data[place : place + 2] = struct.pack("<H", 40_000)  # a tag that nobody knows
    else:
        data[place + 8 : place + 10] = struct.pack("<H", further)
    return bytes(data)


@pytest.mark.parametrize("decode", EVERY)
def test_a_fourth_band_is_transparency_only_where_the_file_says_so(decode):
    """PIL lays infrared over white, or drops it; which bands are meant is for the user to say."""
    of_cv2 = cv2.imencode(".tif", np.full((4, 4, 4), 90, np.uint8))[1].tobytes()
    for data in (tiff_bands(None), tiff_bands(0), of_cv2):
        with pytest.raises(ValueError, match=r"got 4 bands in some.file .* without a meaning"):
            decode(cell(data), 0)


def test_transparency_that_a_tiff_names_shows_white():
    assert decode_image(cell(tiff_bands(2)), 0)[0, 0].tolist() == [253, 250, 248]


def test_a_grey_tiff_of_four_bits_holds_class_ids():
    """PIL stretches them to 0..255, as it does those of a PNG."""
    tags = {256: 4, 257: 2, 258: 4, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 4}
    head = struct.pack("<2sHI4sH", b"II", 42, 12, bytes([0x01, 0x2F, 0x30, 0x45]), len(tags))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    mask = decode_mask(cell(head + body + bytes(4)), 0)
    np.testing.assert_array_equal(mask, [[0, 1, 2, 15], [3, 0, 4, 5]])


def scans(further: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(grey(90, (16, 16)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * further + b"\xff\xd9"


@pytest.mark.parametrize("decode", EVERY)
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(decode):
    """Each of them goes through all pixels: 40 kB of 200 scans can take half a minute."""
    decode(cell(scans(0)), 0)
    with pytest.raises(ValueError, match=r"JPEG of at most 32 scans, got 206 in some.file .*anew"):
        decode(cell(scans(200)), 0)


def test_what_looks_like_scans_elsewhere_in_a_jpeg_is_none():
    """A comment, a preview or a film behind the image holds any bytes."""
    plain = encode(grey(90, (16, 16)), "JPEG")
    noise = b"\xff\xda" * 100
    comment = b"\xff\xfe" + struct.pack(">H", len(noise) + 2) + noise
    for data in (plain[:2] + comment + plain[2:], plain + noise):
        assert decode_image(cell(data), 0).shape == (16, 16, 3)


def test_a_tiff_of_many_pages_is_refused_by_its_head():
    """PIL counts them one by one, in a time that grows with the square: 5 MB took 18 s."""
    values = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    size, count = len(entries) + 6, 20_000
    pages = (
        struct.pack("<H", len(values)) + entries + struct.pack("<I", 8 + size * (i + 1))
        for i in range(count)
    )
    data = struct.pack("<2sHI", b"II", 42, 8) + b"".join(pages)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"^Expected one image, got several"):
        decode_image(cell(data), 0)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGB", "BMP")),
        *(("RGB", "TIFF"), ("P", "GIF"), ("RGBA", "WEBP"), ("I;16", "TIFF"), ("L", "TIFF")),
    ],
)
def test_a_large_image_is_converted_in_strips_to_the_same_pixels(mode, kind, monkeypatch):
    draw = np.random.default_rng(3)
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 9, (37, 23), dtype=np.uint16))
    else:
        image = Image.fromarray(draw.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
        image = image.convert("RGB").quantize(9) if mode == "P" else image.convert(mode)
    options = {"transparency": 3} if (mode, kind) == ("P", "PNG") else {}
    data = encode(image, kind, **options)
    whole = [result(decode, data) for decode in EVERY]
    monkeypatch.setattr("kd_trainer.data.images._STRIP", 23 * 5)
    for before, decode in zip(whole, EVERY, strict=True):
        after = result(decode, data)
        assert type(before) is type(after)
        np.testing.assert_array_equal(before, after)


def result(decode, data: bytes) -> object:
    try:
        return decode(cell(data), 0)
    except ValueError as error:
        return str(error)


MEASURE = """
import io, resource, sys
from PIL import Image
from kd_trainer.data.images import decode_image
data = open(sys.argv[1], "rb").read()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 900 * 2**20,) * 2)
assert decode_image({"bytes": data, "path": None}, 0).shape == (9459, 9459, 3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_the_largest_transparent_image_takes_no_more_than_900_mib(turned, tmp_path):
    """A PNG of 0.4 MB took 1.47 GiB, in each worker."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    path = tmp_path / "large.png"
    Image.new("RGBA", (9459, 9459), (9, 9, 9, 9)).save(path, exif=exif)
    subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True)


def test_memory_that_a_file_asks_for_without_need_is_its_fault(monkeypatch):
    """Lengths in a broken file may ask for anything; a machine without memory is another matter."""

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    data = encode(grey(9).convert("RGBA"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(
        ValueError, match=r"^Expected a readable image, got some.file .*: MemoryErr"
    ):
        decode_image(cell(data), 0)
    monkeypatch.setattr("kd_trainer.data.images.np.empty", full)
    with pytest.raises(MemoryError):
        decode_image(cell(data), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_fits_the_image_that_exif_turns(orientation, tmp_path):
    """A mask made on the upright image fits; one of the image as it is stored is refused."""
    draw = np.random.default_rng(orientation)
    coarse = draw.integers(0, 2, (3, 5), dtype=np.uint8) * 255
    stored = Image.fromarray(np.kron(coarse, np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {"image": tmp_path / "a.jpg", "mask": tmp_path / "a.png", "raw": tmp_path / "b.png"}
    stored.convert("RGB").save(files["image"], exif=exif, quality=95)
    upright = Image.fromarray(red_channel(files["image"]) // 128 * 255)
    upright.save(files["mask"])
    stored.save(files["raw"])
    rule = MaskRule((0, 255))
    transform = SegmentationTransform(
        SIDE, rule, augmentation="none", seed=0, brightness_contrast_probability=0
    )
    row = {k: {"path": str(files[k]), "bytes": None} for k in ("image", "mask")}
    sample = transform(row, epoch=0, index=0)
    seen = sample["pixel_values"][0].numpy() > 127
    assert (seen == (sample["labels"].numpy() == 1)).mean() > 0.97
    row["mask"] = {"path": str(files["raw"]), "bytes": None}
    if orientation >= 5:
        with pytest.raises(ValueError, match=r"turned by its EXIF orientation; turn the mask too"):
            transform(row, epoch=0, index=0)


def red_channel(path: Path) -> np.ndarray:
    """What predict.py sees, one channel."""
    return np.asarray(read_image(path))[..., 0]


@pytest.mark.parametrize("what", ["loop", "folder", "pipe", "empty", "gone", "null"])
def test_what_is_no_file_is_named_and_not_waited_for(what, tmp_path):
    """A pipe is read until somebody writes into it, a device until the memory is full."""
    path = tmp_path / "photo.jpg"
    if what == "loop":
        path.symlink_to(path)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "empty":
        path.touch()
    elif what == "null":
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"^Expected .*photo.jpg"):
        read_image_bytes({"path": str(path), "bytes": None}, "photo.jpg")


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    """It takes no disk space to make one."""
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"at most 1,073,741,824 bytes, got 1,073,741,825 in .*hu"):
        read_image_bytes({"path": str(path), "bytes": None}, "huge.png")


def test_a_full_table_of_open_files_is_not_the_fault_of_an_image(tmp_path, monkeypatch):
    """`--on_bad_sample skip` would leave good data out."""
    (tmp_path / "a.png").write_bytes(encode(grey(0)))

    def full(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(OSError, match="Too many open files") as seen:
        read_image_bytes({"path": str(tmp_path / "a.png"), "bytes": None}, "a.png")
    assert not isinstance(seen.value, ValueError)


def samples(root: Path, **fields: object) -> list:
    data = DataArguments(dataset=str(root), image_size=SIDE, augmentation="none", **fields)
    splits = load_splits(data)
    dataset = TransformedDataset(splits["train"], transforms(splits, data, seed=0)[0])
    return [dataset[i] for i in range(len(dataset))]


def test_names_with_spaces_and_other_scripts_are_read_and_paired(tmp_path):
    """cv2 cannot open some of them by name, and a Mac writes é as two characters."""
    root = write_pairs(tmp_path, train=3, validation=2)
    names = [("写真 1", "写真 1"), ("n\u00e9e", "ne\u0301e"), ("a.b  c'\"$(x)", "a.b  c'\"$(x)")]
    for number, (image, mask) in enumerate(names):
        for kind, name in (("images", image), ("masks", mask)):
            folder = root / "train" / kind
            (folder / f"p {number}.png").rename(folder / f"{name}.png")
    assert len(samples(root)) == 3


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"tab\there.png", b"esc\x1b[2J.png"])
def test_names_that_no_table_or_terminal_can_show_are_refused(name, tmp_path):
    """Arrow fails on the first, deep inside and without a name."""
    root = write_pairs(tmp_path, train=2, validation=2)
    folder = os.fsencode(root / "train" / "images")
    os.rename(os.path.join(folder, b"p 0.png"), os.path.join(folder, name))  # noqa: PTH104, PTH118
    with pytest.raises(ValueError, match=r"^Expected file names in UTF-8 without control"):
        load_splits(DataArguments(dataset=str(root)))


def test_folders_that_contain_themselves_are_no_trap(tmp_path):
    """Only the files directly in the folders count, so a link to a parent is never entered."""
    root = write_pairs(tmp_path / "real", train=2, validation=2)
    for place in (root / "train" / "images", root / "train" / "masks", root):
        (place / "loop").symlink_to(root, target_is_directory=True)
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    assert len(samples(link)) == 2


def test_one_image_is_enough_to_train_on(tmp_path):
    assert len(samples(write_pairs(tmp_path, train=1, validation=1))) == 1


def test_a_class_that_never_occurs_is_no_fault_and_a_data_set_without_any_pixel_is(tmp_path):
    """A rare class may be missing in a split; masks of nothing but 255 would train on nothing."""
    root = write_pairs(tmp_path / "five", num_labels=4)
    found = samples(root, num_labels=6)
    assert max(int(s["labels"][s["labels"] != 255].max()) for s in found) == 3
    for path in root.glob("*/masks/*.png"):
        cv2.imwrite(str(path), np.full((SIDE, SIDE), 255, np.uint8))
    for fields in ({"mask_values": [0, 1, 2, 3]}, {}):
        with pytest.raises(ValueError, match=r"^Expected (masks with|class ids 0)"):
            samples(root, num_labels=4, **fields)


def test_one_mask_of_ignored_pixels_among_others_is_a_sample_that_counts_nowhere(tmp_path):
    """Its image is then distilled on nowhere either: somebody ruled it out."""
    root = write_pairs(tmp_path, num_labels=3, train=2)
    cv2.imwrite(str(root / "train" / "masks" / "p 0.png"), np.full((SIDE, SIDE), 255, np.uint8))
    first = samples(root, num_labels=3)[0]
    assert (first["labels"] == 255).all()
    assert not first["distil_mask"].any()


def test_a_row_without_an_image_is_named(tmp_path):
    """Tables hold rows whose image is null, and `None.get` names nobody."""
    features = datasets.Features(dict.fromkeys(("image", "mask"), datasets.Image(decode=False)))
    mask = {"path": None, "bytes": encode(grey(255))}
    rows = {"image": [mask, None], "mask": [mask, mask]}
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"^Expected an image with bytes or a path, .* at row 1"):
        samples(tmp_path)


def test_the_limit_on_pixels_is_what_the_table_says():
    """The page tells users a number; it has to be this one."""
    page = (Path(__file__).parents[1] / "docs" / "bad_input.md").read_text(encoding="utf-8")
    assert f"{MAX_PIXELS:,} pixels" in page


def test_a_jpeg_that_is_damaged_inside_is_the_documented_exception():
    """A reader that finds it one day makes this fail, and the page has to say so."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), "JPEG")
    half = whole[: len(whole) // 2]
    with pytest.raises(ValueError, match=r"^Expected a readable image"):
        decode_image(cell(half), 0)
    assert decode_image(cell(half + b"\xff\xd9"), 0).shape == (64, 64, 3)
