"""Masks: values as stored, one rule for a data set, errors for what the rule does not know."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from kd_trainer.data import load_splits, mask_rule
from kd_trainer.data.images import decode_image, image_shape
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.mask_survey import find_mask_rule
from kd_trainer.data.masks import MaskRule, present_values
from kd_trainer.data_arguments import DataArguments


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": "some.file"}


def cell(values, dtype=np.uint8):
    """An 8- or 16-bit PNG of one row of values."""
    return encode(Image.fromarray(np.array([values], dtype)))


def test_a_cure_of_a_few_ids_with_gaps_names_them():
    """Followed to the letter, a threshold merges the classes of Cityscapes without a word."""
    with pytest.raises(ValueError, match="set --num_labels 4 --mask_values 0 7 11 21, or take"):
        find_mask_rule([cell([0, 7, 11, 21], np.uint8)], num_labels=2, ignore_index=255)


@pytest.mark.parametrize(
    ("values", "cure", "classes"),
    [
        ([128, 255], "--mask_values 128 255, or .* --mask_threshold 192", None),
        ([*range(0, 255, 2), 255], "Take .* --mask_threshold 128", None),
        ([0, 3, 90, 254, 255], "Take .* --mask_threshold 128", None),
        ([0, 1, 2, 255], "--mask_values, or", 3),
        (list(range(150)), "--mask_values, or", 150),
        ([1, 2, 3], "--mask_values, or", 4),
    ],
    ids=["128/255", "soft", "few shades", "ids", "many ids", "1/2/3"],
)
def test_a_cure_names_only_as_many_classes_as_the_values_can_be(values, cure, classes):
    """129 classes of which 127 never occur train without a word, and are of no use to anybody."""
    mask = cell(values, np.uint16 if max(values) > 255 else np.uint8)
    with pytest.raises(ValueError, match=cure) as caught:
        find_mask_rule([mask], num_labels=2, ignore_index=255)
    said = str(caught.value)
    assert ("--num_labels" in said) == (classes is not None)
    assert classes is None or said.endswith(f"--num_labels {classes}.")
    assert ("--mask_threshold" in said) == (classes is None)


def thresholded(masks, **settings):
    image = encode(Image.fromarray(np.zeros((1, 4, 3), np.uint8)))
    rows = {"train": [{"image": image, "mask": mask} for mask in masks]}
    return mask_rule(rows, DataArguments(mask_threshold=128, **settings))


def test_a_threshold_makes_two_classes_of_any_values():
    masks = [
        cell([0, 127, 128, 255]),
        cell([0, 300, 65535, 100], np.uint16),
        bit_cell([0, 1, 1, 0]),
    ]
    expected = [[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
    rule = thresholded(masks)
    for mask, labels in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(rule.labels(decode_mask(mask, 0), "x")[0], labels)
    ignoring = thresholded(masks, ignore_index=200)
    np.testing.assert_array_equal(
        ignoring.labels(np.array([[199, 200, 201, 1]], np.uint8), "x")[0], [1, 200, 1, 0]
    )


def test_a_threshold_that_nothing_reaches_is_refused():
    """Every pixel would be background, and the student would learn that."""
    with pytest.raises(ValueError, match="no foreground in the 1 that"):
        thresholded([cell([0, 9, 9, 0])])


def test_a_threshold_reads_no_mask_of_0_and_1():
    """Among masks of grey levels one of class ids would be background alone."""
    with pytest.raises(ValueError, match="both sides of --mask_threshold 128, got 0 and 1 in"):
        thresholded([cell([0, 200, 90, 255]), cell([0, 1, 1, 0])])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_labels": 3}, "Expected --mask_threshold 128 for a binary task alone"),
        ({"mask_values": [0, 1]}, "either --mask_values or --mask_threshold"),
        ({"reduce_labels": True}, "either --reduce_labels or --mask_threshold"),
        ({"mask_colors": ["0,0,0", "#ff0000"]}, "either --mask_colors or --mask_threshold"),
    ],
)
def test_a_threshold_beside_another_rule_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(mask_threshold=128, **other)


def bit_cell(values):
    return encode(Image.fromarray(np.array([values], bool)))


def grey_png(values, depth):
    """A greyscale PNG of 2 or 4 bits, which PIL reads but does not write."""

    def chunk(name, body):
        crc = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + crc

    bits = "".join(f"{v:0{depth}b}" for v in values).ljust(8, "0")
    header = struct.pack(">IIBBBBB", len(values), 1, depth, 0, 0, 0, 0)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return {"bytes": b"\x89PNG\r\n\x1a\n" + body, "path": None}


def palette_cell(values, colours=((0, 0, 0), (200, 0, 0), (0, 200, 0), (255, 255, 255)), **options):
    image = Image.fromarray(np.array([values], np.uint8)).convert("P")
    image.putdata(values)
    image.putpalette([c for colour in colours for c in colour])
    return encode(image, **options)


def by_cv2(values):
    """A PNG as cv2 writes it, which has other filters than one of PIL."""
    png = cv2.imencode(".png", np.array([values], np.uint8))[1]
    return {"bytes": png.tobytes(), "path": None}


def with_alpha(values):
    return encode(Image.fromarray(np.array([[[v, 255] for v in values]], np.uint8), "LA"))


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (cell([0, 1, 255]), [0, 1, 255]),
        (cell([0, 8, 3]), [0, 8, 3]),
        (cell([0, 300, 65535], np.uint16), [0, 300, 65535]),
        (bit_cell([0, 1, 1]), [0, 1, 1]),
        (by_cv2([0, 7, 255, 255]), [0, 7, 255, 255]),
        (palette_cell([0, 2, 1]), [0, 2, 1]),
        (palette_cell([0, 3, 1], bits=2), [0, 3, 1]),
        (palette_cell([0, 2, 1], transparency=bytes([0, 9, 255])), [0, 2, 1]),
        (with_alpha([0, 5, 255]), [0, 5, 255]),
        (encode(Image.fromarray(np.array([[4, 2]], np.uint8)), transparency=4), [4, 2]),
        (grey_png([0, 1, 3], 2), [0, 1, 3]),
        (grey_png([0, 2], 4), [0, 2]),
        (encode(Image.fromarray(np.array([[0, 2, 7]], np.uint8)), "BMP"), [0, 2, 7]),
        (encode(Image.fromarray(np.array([[0, 2, 900]], np.uint16)), "TIFF"), [0, 2, 900]),
    ],
    ids=[
        *("0/1/255", "ids", "16-bit", "1-bit", "cv2", "palette", "2-bit palette"),
        *("transparent palette", "alpha", "transparent grey", "2-bit", "4-bit", "bmp", "tiff"),
    ],
)
def test_masks_decode_to_the_stored_values(made, expected):
    """Viewers scale 1, 2 and 4 bits to 255 and turn palettes into colours; classes would move."""
    assert decode_mask(made, 0).astype(int).tolist() == [expected]


def test_equal_channels_are_one_and_different_ones_an_error():
    equal = np.repeat(np.array([[[0], [3]]], np.uint8), 3, axis=2)
    assert decode_mask(encode(Image.fromarray(equal)), 0).tolist() == [[0, 3]]
    opaque = np.dstack([equal, np.full((1, 2), 255, np.uint8)])
    assert decode_mask(encode(Image.fromarray(opaque)), 0).tolist() == [[0, 3]]
    coloured = equal.copy()
    coloured[0, 1, 0] = 9
    with pytest.raises(ValueError, match=r"different colours in some.file"):
        decode_mask(encode(Image.fromarray(coloured)), 0)
    opaque[0, 0, 3] = 7
    with pytest.raises(ValueError, match="without transparency"):
        decode_mask(encode(Image.fromarray(opaque)), 0)


def test_sixteen_bit_colours_and_fractions_are_no_values():
    """PIL keeps only the high byte of 16-bit colours: all small class ids would become 0."""
    png = cv2.imencode(".png", np.full((2, 2, 3), 5, np.uint16))[1].tobytes()
    with pytest.raises(ValueError, match="one channel of whole numbers"):
        decode_mask({"bytes": png, "path": "a.png"}, 0)
    floats = encode(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF")
    with pytest.raises(ValueError, match="fractions between 0 and 1 in row 7"):
        decode_mask(floats | {"path": None}, 7)


def noise(size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_images_equal_those_of_pil(kind):
    made = encode(noise(), kind)
    expected = np.asarray(Image.open(io.BytesIO(made["bytes"])).convert("RGB"))
    np.testing.assert_array_equal(decode_image(made, 0), expected)


def test_grey_palette_gif_and_cmyk_become_rgb():
    for image, kind in (
        (noise().convert("L"), "JPEG"),
        (noise().quantize(8), "PNG"),
        (noise().quantize(8), "GIF"),
        (noise().convert("CMYK"), "JPEG"),
        (noise().convert("1"), "PNG"),
    ):
        made = encode(image, kind)
        expected = np.asarray(Image.open(io.BytesIO(made["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(decode_image(made, 0), expected)


def test_transparency_shows_white_as_in_the_image_processor():
    image = noise().convert("RGBA")
    image.putalpha(0)
    assert (decode_image(encode(image), 0) == 255).all()
    quantized = noise().quantize(4)
    decoded = decode_image(encode(quantized, transparency=bytes([0, 0, 0, 0])), 0)
    assert (decoded == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_image_and_mask_turn_alike_with_exif(kind):
    """cv2 turns an image upright, PIL does not: only one of the two turned would train on noise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(noise(), kind, exif=exif)
    assert decode_image(image, 0).shape == (30, 40, 3)
    assert image_shape(image, 0) == (30, 40)
    values = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    turned = decode_mask(encode(values, exif=exif), 0)
    assert turned.tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("decode", [decode_image, decode_mask])
def test_a_cut_off_file_is_an_error_that_names_it(kind, decode, tmp_path):
    """cv2 may fill the missing part with grey, which trains as an image."""
    data = encode(noise((300, 300)).convert("L"), kind)["bytes"]
    file = tmp_path / "cut.file"
    file.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match=r"readable image, got .*cut.file"):
        decode({"bytes": None, "path": str(file)}, 0)


def test_a_mask_of_which_a_byte_has_changed_is_an_error():
    """Its check sum is wrong; libpng can go on without a word, with the classes moved."""
    data = bytearray(encode(noise((60, 60)).convert("L"))["bytes"])
    data[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match="readable image, got row 0"):
        decode_mask({"bytes": bytes(data), "path": None}, 0)


def test_what_is_no_image_or_gone_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"readable image, got note.txt \(row 3\)"):
        decode_image({"bytes": b"hello", "path": "note.txt"}, 3)
    with pytest.raises(FileNotFoundError, match=r"gone.png"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 0)
    with pytest.raises(ValueError, match="empty cell at row 4"):
        decode_mask({"bytes": None, "path": None}, 4)


# --- the rule ------------------------------------------------------------------------------------


def find(*cells, num_labels=2, ignore_index=255):
    return find_mask_rule(cells, num_labels=num_labels, ignore_index=ignore_index)


def read(rule, made):
    return rule.labels(decode_mask(made, 0), "x.png").tolist()[0]


@pytest.mark.parametrize(
    ("cells", "mask", "labels"),
    [
        ([cell([0, 1])], cell([1, 0]), [1, 0]),
        ([cell([0, 255])], cell([255, 0]), [1, 0]),
        ([cell([0, 1, 255])], cell([0, 1, 255]), [0, 1, 255]),
        ([cell([0, 1]), cell([0, 1, 255])], cell([0, 255, 255]), [0, 255, 255]),
        ([cell([0, 1])], cell([0, 1, 255]), [0, 1, 255]),
        ([bit_cell([0, 1])], bit_cell([0, 1]), [0, 1]),
        ([bit_cell([0, 1]), cell([0, 255])], bit_cell([0, 1]), [0, 1]),
        ([bit_cell([0, 1]), cell([0, 255])], cell([0, 255]), [0, 1]),
        ([cell([0, 0]), cell([0, 255])], cell([0, 0]), [0, 0]),
        ([palette_cell([0, 1])], palette_cell([1, 0]), [1, 0]),
    ],
)
def test_the_binary_rule_is_found(cells, mask, labels):
    assert read(find(*cells), mask) == labels


def test_the_rule_does_not_depend_on_the_order_of_the_masks():
    cells = [cell([0, 1]), cell([0, 0]), cell([0, 1, 255]), bit_cell([0, 1])]
    assert find(*cells) == find(*reversed(cells))


def test_another_ignore_index_leaves_255_to_the_foreground():
    rule = find(cell([0, 255]), cell([0, 200]), ignore_index=200)
    assert read(rule, cell([0, 255, 200])) == [0, 1, 200]
    rule = find(cell([0, 1, 200]), ignore_index=200)
    assert read(rule, cell([0, 1, 200])) == [0, 1, 200]


def test_255_without_any_1_beside_it_is_ambiguous():
    """Some files 0/1, others 0/255: reading 255 as `ignored` would silently drop half the data."""
    with pytest.raises(ValueError, match=r"foreground or ignored.*--mask_values 0 1.*0 255"):
        find(cell([0, 1]), cell([0, 255]))
    with pytest.raises(ValueError, match="foreground or ignored"):
        find(cell([255, 255]))
    with pytest.raises(ValueError, match="of one kind"):
        find(cell([0, 1, 255]), ignore_index=200)


def test_a_later_mask_that_contradicts_the_rule_is_an_error():
    with pytest.raises(ValueError, match=r"0 and 1 as in the masks looked at first.*0, 255 in x"):
        read(find(cell([0, 1])), cell([0, 255]))
    with pytest.raises(ValueError, match=r"0, 255 \(classes 0..1\).*got 0, 1 in x.png"):
        read(find(cell([0, 255])), cell([0, 1]))


@pytest.mark.parametrize("values", [[0, 1, 128], [0, 1, 2], list(range(200))])
def test_unknown_values_are_listed_with_the_file_and_the_cure(values):
    with pytest.raises(ValueError, match=r"got the values 0, 1.*some.file.*--mask_values"):
        find(cell(values))


def test_class_ids_ask_for_the_right_number_of_labels():
    with pytest.raises(ValueError, match="--num_labels 9"):
        find(cell([0, 3, 8]))


def test_masks_without_foreground_are_an_error():
    """All zero: the mask folder is the wrong one, or the export failed."""
    with pytest.raises(ValueError, match="foreground in the masks, got only 0"):
        find(cell([0, 0]), cell([0]))
    with pytest.raises(ValueError, match="got none in the splits"):
        find(None, None)


def test_several_labels_are_class_ids():
    rule = find(cell([0, 3, 255]), cell([1]), num_labels=4)
    assert read(rule, cell([3, 2, 255])) == [3, 2, 255]
    with pytest.raises(ValueError, match=r"0, 1, 2, 3 \(classes 0..3\) .*got 3, 4 in x.png"):
        read(rule, cell([3, 4]))
    with pytest.raises(ValueError, match=r"got 0, 7 in the masks \(first in some.file"):
        find(cell([0, 7]), num_labels=4)


@pytest.mark.parametrize("made", [cell([0, 1]), cell([0, 255]), bit_cell([0, 1])])
def test_binary_masks_do_not_pass_for_several_labels(made):
    """0/255 masks with 9 labels would train on background and ignored pixels alone."""
    with pytest.raises(ValueError, match="--num_labels 2"):
        find(made, num_labels=9)


def test_known_class_ids_may_show_the_first_class_only():
    """COCO's categories say how many there are, and only some of the masks are looked at."""
    options = {"num_labels": 3, "ignore_index": 255, "class_ids": True}
    assert find_mask_rule([cell([0, 1])], **options).values == (0, 1, 2)
    for nothing in ([0], [0, 255]):
        with pytest.raises(ValueError, match="Expected class ids"):
            find_mask_rule([cell(nothing)], **options)


def test_explicit_values_are_classes_in_order():
    rule = MaskRule((7, 300, 0))
    assert read(rule, cell([0, 7, 300, 255], np.uint16)) == [2, 0, 1, 255]
    assert read(MaskRule((0, 255)), cell([0, 255])) == [0, 1]
    assert read(MaskRule((0, 1)), cell([0, 255, 255])) == [0, 255, 255]
    assert read(MaskRule((255, 0)), cell([0, 255])) == [1, 0]
    assert read(MaskRule((1, 0)), bit_cell([0, 1])) == [1, 0]
    with pytest.raises(ValueError, match="1-bit file"):
        read(MaskRule((0, 1, 2)), bit_cell([0, 1]))
    assert read(MaskRule((0, 1, 2)), bit_cell([0, 0])) == [0, 0]


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="different --mask_values"):
        MaskRule((0, 0))
    with pytest.raises(ValueError, match="--ignore_index between 3"):
        MaskRule((0, 1, 2), ignore_index=2)
    with pytest.raises(ValueError, match="255, got 300"):
        MaskRule((0, 1), ignore_index=300)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
def test_present_values_are_the_distinct_ones(dtype):
    mask = np.random.default_rng(0).integers(0, 200, (37, 23)).astype(dtype)
    assert present_values(mask) == tuple(np.unique(mask.astype(int)))


def test_reduced_labels_count_from_one_and_ignore_zero(tmp_path):
    """Read as class ids, the masks of a model of ADE20K's convention are all shifted by one."""
    root = tmp_path / "photos"
    for split in ("train", "validation"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        values = np.repeat(np.uint8([0, 1, 2, 3, 255]), 8)[None].repeat(40, 0)
        cv2.imwrite(str(root / split / "images" / "a.png"), np.zeros((40, 40, 3), np.uint8))
        cv2.imwrite(str(root / split / "masks" / "a.png"), values)
    data = DataArguments(dataset=str(root), num_labels=3, reduce_labels=True)
    splits = load_splits(data)
    rule = mask_rule(splits, data)
    labels = rule.labels(decode_mask(splits["train"][0]["mask"], 0), "a")
    assert np.unique(labels).tolist() == [0, 1, 2, 255]
    assert (labels[:, 8:16] == 0).all()
    assert (labels[:, :8] == 255).all()
    with pytest.raises(ValueError, match=r"^Expected either --reduce_labels or --mask_values"):
        DataArguments(num_labels=3, reduce_labels=True, mask_values=[1, 2, 3])


def test_masks_whose_whole_foreground_is_ignored_are_no_figures():
    """eval.py gave a mIoU of 0.085, or 0.0000, where train.py refuses the same masks."""
    masks = [cell([0, 255]), cell([255, 0, 0])]
    for every_class in (False, True):
        with pytest.raises(
            ValueError, match=r"^Expected class ids 0\.\.3 .* only the values 0, 255"
        ):
            find_mask_rule(masks, num_labels=4, ignore_index=255, every_class=every_class)
    some = [*masks, cell([0, 1])]  # images of the first classes alone can be measured
    assert find_mask_rule(some, num_labels=4, ignore_index=255, every_class=False).num_labels == 4
