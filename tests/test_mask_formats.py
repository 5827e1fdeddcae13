"""Masks as people have them: what is understood, what is said, and how it is overruled."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import write_pairs

from kd_trainer.build import evaluation_dataset
from kd_trainer.data import (
    layouts,
    learned,
    load_splits,
    mask_rule,
    usable_splits,
    with_label_count,
)
from kd_trainer.data.images import MAX_PIXELS
from kd_trainer.data.mask_colors import voc_color
from kd_trainer.data.mask_files import decode_mask, mask_shape
from kd_trainer.data.mask_survey import count_labels
from kd_trainer.data.masks import present_values, value_counts
from kd_trainer.data_arguments import DataArguments
from kd_trainer.mask_flags import color_members, merged_members
from kd_trainer.measurement import settings_of_run

SIDE = 48
COLORS = np.uint8([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])


def ids(number, classes=2):
    """Class ids (48, 48): a disc of each class but the first, elsewhere in each mask."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for label in range(1, classes):
        centre = 12 + (7 * number + 9 * label) % 24, 10 + (5 * number + 11 * label) % 28
        cv2.circle(mask, centre, 8 - label, label, -1)
    return mask


def encode(values, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": f"some.{kind.lower()}"}


def array(values):
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return {"bytes": stream.getvalue(), "path": "some.npy"}


IMAGE = encode(np.zeros((SIDE, SIDE, 3), np.uint8))


def rows_of(make, count=4, classes=2):
    return {
        "train": [{"image": IMAGE, "mask": make(ids(n, classes))} for n in range(count)],
    }


def labels_of(rule, rows):
    return [rule.labels(rule.decode(row["mask"], 0), "mask") for row in rows["train"]]


def understood(make, classes=2, *, expected=None, **settings):
    """The rule of masks and its settings; the labels are those expected, also by the settings."""
    rows, data = rows_of(make, classes=classes), DataArguments(**settings)
    rule = mask_rule(rows, data)
    for number, labels in enumerate(labels_of(rule, rows)):
        truth = ids(number, classes)
        np.testing.assert_array_equal(labels, truth if expected is None else expected[truth])
    written = learned(rule, data)
    assert mask_rule(rows, written) == rule
    return rule, written


def refusal(make, classes=2, **settings):
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        mask_rule(rows_of(make, classes=classes), DataArguments(**settings))
    return str(caught.value)


# --- numbers -------------------------------------------------------------------------------------

TWO_VALUES = {
    "0 and 128": lambda m: encode(m * 128),
    "0 and 65535": lambda m: encode(m.astype(np.uint16) * 65535),
    "1 and 2": lambda m: encode(m + 1),
}


@pytest.mark.parametrize("values", TWO_VALUES)
def test_of_two_values_the_higher_one_is_the_foreground(values):
    rule, data = understood(TWO_VALUES[values])
    assert rule.note == (
        f"Masks: {values}; {values.split()[-1]} is foreground. --mask_values overrules."
    )
    assert data.mask_values == [int(value) for value in values.split(" and ")]


def test_a_value_that_the_sample_did_not_hold_is_an_error_when_it_comes():
    rule, _ = understood(TWO_VALUES["0 and 128"])
    with pytest.raises(ValueError, match=r"0, 128 \(classes 0..1\) .* got 0, 7 in later.png"):
        rule.labels(np.uint8([[0, 7]]), "later.png")


def test_the_usual_masks_are_read_without_a_word():
    """A note for every data set would be read by nobody; the written settings stay as given."""
    for make, classes in ((encode, 2), (lambda m: encode(m * 255), 2), (encode, 4)):
        rule, data = understood(make, classes, num_labels=classes)
        assert (rule.note, data) == ("", DataArguments(num_labels=classes))


def test_ids_from_1_without_any_0_are_classes_in_order():
    rule, data = understood(lambda m: encode(m + 1), 3, num_labels=3)
    assert "1 to 3 and no 0; value i is class i - 1" in rule.note
    assert data.mask_values == [1, 2, 3]
    assert data.id2label == {0: "class_1", 1: "class_2", 2: "class_3"}


def test_ids_from_1_with_0_ask_what_0_is():
    said = refusal(encode, 4, num_labels=3)
    assert "set --ignore_index 0; if it is a class, set --num_labels 4." in said


def test_value_0_may_count_nowhere():
    """Users of mmsegmentation say reduce_zero_label; classes are the values from 1 on."""
    expected = np.uint8([255, 0, 1, 2])
    _, data = understood(encode, 4, expected=expected, num_labels=3, ignore_index=0)
    assert (data.reduce_labels, data.ignore_index) == (True, 255)
    named = {"mask_values": [1, 3, 2], "num_labels": 3, "ignore_index": 0}
    understood(encode, 4, expected=np.uint8([255, 0, 2, 1]), **named)
    with pytest.raises(ValueError, match="above 0 with --reduce_labels false"):
        DataArguments(ignore_index=0, reduce_labels=False)


def test_further_values_may_count_nowhere():
    understood(encode, 4, expected=np.uint8([0, 1, 2, 255]), num_labels=3, ignore_values=[3])
    understood(
        lambda m: encode(np.uint8([0, 128, 255])[m]),
        3,
        expected=np.uint8([0, 255, 1]),
        ignore_values=[128],
    )
    said = refusal(lambda m: encode(np.uint8([0, 128, 255])[m]), 3)
    assert "Leave 128 out with --ignore_values 128" in said
    assert "got 1 as both" in refusal(encode, 4, num_labels=4, ignore_values=[1])


@pytest.mark.parametrize(
    ("merge", "labels", "names"),
    [
        (["background=0,1", "x=2-3"], [0, 0, 1, 1], ["background", "x"]),
        (["background=rest", "x=2"], [0, 0, 1, 0], ["background", "x"]),
        (["a=1", "b=2", "ignore=rest"], [255, 0, 1, 255], ["a", "b"]),
        (["a=0", "b=1", "ignore=2", "b=3"], [0, 1, 255, 1], ["a", "b"]),
    ],
)
def test_values_are_merged_into_classes(merge, labels, names):
    _, data = understood(encode, 4, expected=np.uint8(labels), merge_classes=merge)
    assert list(data.id2label.values()) == names


def test_a_value_that_no_merged_class_names_is_an_error():
    assert "got 0, 1, 2, 3 in" in refusal(encode, 4, merge_classes=["a=0", "b=1,2"])
    assert "got 'car': the data has no names" in refusal(encode, 4, merge_classes=["a=0", "b=car"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_classes": ["a", "b=1"]}, "like background=0-10 person=11,12"),
        ({"merge_classes": ["a=0", "b=0"]}, "one class for 0 in --merge_classes, got a and b"),
        ({"merge_classes": ["a=0", "b=1", "c=2"]}, "2 classes .* got 3. Set --num_labels 3"),
        ({"mask_colors": ["0,0,0", "0,0,256"]}, "--mask_colors like 0,0,0 255,0,0"),
        ({"mask_colors": ["a=0,0,0", "255,0,0"]}, "a name for each of --mask_colors or for none"),
        ({"mask_colors": ["0,0,0", "#000000"]}, "one class for 0,0,0 in --mask_colors"),
        ({"mask_colors": ["0,0,0"], "num_labels": 2}, r"got 1\. Set --num_labels 1"),
        ({"mask_colors": ["0,0,0", "f00000"], "mask_kind": "alpha"}, "--mask_kind colors with"),
        ({"mask_kind": "colours"}, "--mask_kind to be one of values, colors"),
        ({"mask_values": [0, 1], "merge_classes": ["a=0", "b=1"]}, "either --mask_values or --m"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_any_file_is_read(settings, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        DataArguments(**settings)


def test_flags_of_classes_are_read():
    named = color_members(["bg=0,0,0", "bg=#0000ff", "x=255,0,0", "ignore=0xE0E0C0"])
    assert named == (["bg", "x"], [[0, 255], [0xFF0000]], [0xE0E0C0])
    assert color_members(["0,0,0", "255,0,0"]).names is None
    assert merged_members(["a=0-2,7", "b=rest"]) == (["a", "b"], [[0, 1, 2, 7], ["rest"]], [])


# --- soft edges and JPEG -------------------------------------------------------------------------


def blurred(mask, sigma=1.5):
    return cv2.GaussianBlur(mask * 255, (0, 0), sigma)


def close(rule, rows, share=0.01):
    """Whether labels are those drawn but for a share of the pixels, which lie on outlines."""
    return all(
        (labels != ids(number)).mean() < share
        for number, labels in enumerate(labels_of(rule, rows))
    )


def test_soft_edges_are_cut_in_the_middle():
    rows = rows_of(lambda m: encode(blurred(m)))
    rule = mask_rule(rows, DataArguments())
    assert "soft edges; from 128 on it is foreground. --mask_threshold overrules" in rule.note
    assert close(rule, rows)
    written = learned(rule, DataArguments())
    assert written.mask_threshold == 128
    assert mask_rule(rows, written) == rule


def gradient(mask):
    return np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))


def trimap(mask):
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return np.where(edge, 128, mask * 255).astype(np.uint8)


@pytest.mark.parametrize("make", [gradient, trimap, lambda m: blurred(m, 9)])
def test_what_lies_between_but_on_no_outline_asks_for_a_threshold(make):
    """A depth map, a trimap's unknown border and a matte of hair are no masks with soft edges."""
    assert "Expected masks of 0 and 1 or of 0 and 255" in refusal(lambda m: encode(make(m)))


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_binary_jpeg_is_cut_in_the_middle(quality):
    rows = rows_of(lambda m: encode(m * 255, "JPEG", quality=quality))
    rule = mask_rule(rows, DataArguments())
    assert "JPEG, which blurs values; from 128 on it is foreground" in rule.note
    assert close(rule, rows)


def test_a_jpeg_of_class_ids_or_of_a_photograph_is_refused():
    said = refusal(lambda m: encode(m * 20, "JPEG", quality=60), 4, num_labels=4)
    assert "is a JPEG, which changes values" in said
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    assert "--mask_threshold" in refusal(lambda m: encode(noise, "JPEG"))
    said = refusal(lambda m: encode(COLORS[m], "JPEG", quality=50), 4, num_labels=4)
    assert "JPEG and resizing mix colours" in said


def test_jpeg_masks_of_a_folder_are_found_and_a_png_comes_first(tmp_path):
    for split in ("train", "validation"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for name in "ab":
            cv2.imwrite(str(tmp_path / split / "images" / f"{name}.jpg"), blurred(ids(0)))
            cv2.imwrite(str(tmp_path / split / "masks" / f"{name}.jpg"), ids(0) * 255)
        cv2.imwrite(str(tmp_path / split / "masks" / "b.png"), ids(0) * 255)
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    names = [Path(row["mask"]["path"]).name for row in splits["train"]]
    assert names == ["a.jpg", "b.png"]


# --- floats, alpha, arrays -----------------------------------------------------------------------


def test_floats_are_class_ids_or_fractions():
    understood(lambda m: encode(m.astype(np.float32), "TIFF"))
    understood(lambda m: encode(m.astype(np.float32), "TIFF"), 4, num_labels=4)
    rows = rows_of(lambda m: encode(cv2.GaussianBlur(m.astype(np.float32), (0, 0), 1), "TIFF"))
    rows["train"] += rows_of(lambda m: encode(m.astype(np.float32), "TIFF"), count=1)["train"]
    rule = mask_rule(rows, DataArguments())
    assert rule.note == "Masks: fractions from 0.0 to 1.0; from 0.5 on it is foreground."
    assert mask_rule(rows, learned(rule, DataArguments())) == rule
    labels = labels_of(rule, rows)
    assert np.array_equal(labels[-1], ids(0))
    assert (labels[0] == ids(0)).mean() > 0.98
    with pytest.raises(ValueError, match=r"fractions between 0 and 1 as in the other .* up to 255"):
        rule.decode(encode(ids(0) * 255), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 70000, 1.5])
def test_floats_that_are_no_mask_are_refused(value):
    values = np.full((SIDE, SIDE), value, np.float32)
    for made in (encode(values, "TIFF"), array(values)):
        with pytest.raises(ValueError, match=r"mask values 0..65535|whole numbers, got fractions"):
            decode_mask(made, 0)


def test_fractions_in_a_lower_part_of_a_large_image_are_not_cut_off(monkeypatch):
    """Strips are decoded one by one: the type of the first must not decide for the others."""
    monkeypatch.setattr("kd_trainer.data.images._STRIP", SIDE)
    values = np.zeros((SIDE, SIDE), np.float32)
    values[-1] = 0.75
    with pytest.raises(ValueError, match="fractions between 0 and 1"):
        decode_mask(encode(values, "TIFF"), 0)
    assert decode_mask(encode(values, "TIFF"), 0, "fractions")[-1].tolist() == [191] * SIDE


def with_alpha(colour, mask):
    return encode(np.dstack([np.full((SIDE, SIDE, 3), colour, np.uint8), mask * np.uint8(255)]))


@pytest.mark.parametrize("colour", [0, 255])
def test_an_alpha_channel_on_one_colour_is_the_mask(colour):
    """Also where a file is wholly opaque: black would then be background."""
    rule, data = understood(lambda m: with_alpha(colour, m))
    assert rule.note.startswith("Masks: how opaque a pixel is (the alpha channel)")
    assert (data.mask_kind, data.mask_values) == ("alpha", [0, 255])
    full = with_alpha(colour, np.ones((SIDE, SIDE), np.uint8))
    assert rule.labels(rule.decode(full, 0), "full").all()
    with pytest.raises(ValueError, match=r"an alpha channel .* got mode L in some.png"):
        rule.decode(encode(ids(0)), 0)


def test_cut_out_photographs_are_masks_when_it_is_said():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)

    def cut_out(mask):
        return encode(np.dstack([noise, mask * np.uint8(255)]))

    assert "--mask_kind alpha" in refusal(cut_out)
    understood(cut_out, mask_kind="alpha")


ARRAYS = {
    "bool": (2, lambda m: m > 0),
    "int64": (4, lambda m: m.astype(np.int64)),
    "Fortran order": (4, np.asfortranarray),
    "one channel": (4, lambda m: m[..., None]),
    "one-hot": (4, lambda m: np.eye(4, dtype=np.float32)[m]),
    "one-hot, channels first": (4, lambda m: np.eye(4, dtype=bool)[m].transpose(2, 0, 1)),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_masks(kind):
    classes, make = ARRAYS[kind]
    understood(lambda m: array(make(m)), classes, num_labels=classes)
    assert mask_shape(array(make(ids(0))), 0) == (SIDE, SIDE)


def claims(shape, dtype="|u1", behind=b""):
    """An array whose head claims a shape."""
    head = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return {
        "bytes": b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + behind,
        "path": "some.npy",
    }


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (array(np.array([[object()]])), "array of numbers, got object"),
        (claims((10**9, 10**9)), "bytes behind the head"),
        (claims((-1, -4), behind=bytes(4)), "bytes behind the head"),
        (claims((4, 4), "|O", bytes(128)), "array of numbers, got object"),
        (claims((4, 4), behind=bytes(15)), "16 bytes behind the head .* got 15"),
        (array(np.zeros((2, 2, 2, 2), np.uint8)), r"array \(H, W\).* got \(2, 2, 2, 2\)"),
        (array(np.zeros((0, 4), np.uint8)), r"array \(H, W\)"),
        (array(np.ones((4, 4, 3), np.uint8)), "one channel that is 1 in each pixel"),
        (array(np.array([["a"]])), "array of numbers"),
        ({"bytes": b"\x93NUMPY\x09\x00abc", "path": "some.npy"}, "readable array"),
        ({"bytes": b"\x93NUMPY\x01\x00\xff\xff{", "path": "some.npy"}, "readable array"),
    ],
)
def test_an_array_that_is_no_mask_is_refused_by_its_head(made, message):
    """Nothing is unpickled, and no size is believed that the file does not have."""
    with pytest.raises(ValueError, match=f"{message}.* in|got some.npy"):
        decode_mask(made, 0)


def test_an_array_beyond_the_largest_image_is_refused(monkeypatch):
    monkeypatch.setattr("kd_trainer.data.mask_files.MAX_PIXELS", 15)
    with pytest.raises(ValueError, match="at most 15 pixels"):
        decode_mask(array(np.zeros((4, 4), np.uint8)), 0)
    assert MAX_PIXELS > 10**7


# --- colours -------------------------------------------------------------------------------------


def coloured(mask):
    return encode(COLORS[mask])


def test_one_colour_on_black_is_the_foreground():
    rule, data = understood(coloured)
    assert rule.note.startswith("Masks: 2 colours: 0,0,0 (")
    assert "255,0,0 is foreground. --mask_colors overrules." in rule.note
    assert data.mask_colors == ["0,0,0", "255,0,0"]
    understood(lambda m: encode(np.repeat(m[..., None] * np.uint8(255), 3, 2)))


def test_colours_are_classes_in_a_fixed_order_that_is_said():
    rule, data = understood(coloured, 4, expected=np.uint8([0, 3, 2, 1]), num_labels=4)
    assert "classes 0 to 3 in the order 0,0,0 0,0,255 0,255,0 255,0,0" in rule.note
    assert data.mask_colors == ["0,0,0", "0,0,255", "0,255,0", "255,0,0"]
    with pytest.raises(ValueError, match=r"got also 1,2,3 in later.png"):
        rule.labels(rule.decode(encode(np.full((2, 2, 3), (1, 2, 3), np.uint8)), 0), "later.png")


def test_without_black_no_colour_is_called_background():
    """The report and the card would say that the student finds no class of that name."""

    def bright(mask):
        return encode((COLORS | np.uint8([40, 0, 0]))[mask])

    rule, data = understood(bright, 4, expected=np.uint8([0, 3, 2, 1]), num_labels=4)
    assert list(data.id2label.values()) == ["class_0", "class_1", "class_2", "class_3"]
    assert "Without black none is background; figures of the foreground omit class 0." in rule.note
    assert "--mask_colors class_0=40,0,0 class_1=40,0,255" in refusal(bright, 4)
    black, data = rows_of(coloured, classes=4), DataArguments(num_labels=4)
    assert learned(mask_rule(black, data), data).id2label[0] == "background"


def test_the_wrong_number_of_labels_gets_the_line_to_copy():
    said = refusal(coloured, 4)
    flags = said.partition("such as ")[2].partition(". One name")[0].split()
    assert "4 colours: 0,0,0 (" in said
    assert flags[:3] == ["--num_labels", "4", "--mask_colors"]
    settings = {"num_labels": 4, "mask_colors": flags[3:]}
    understood(coloured, 4, expected=np.uint8([0, 3, 2, 1]), **settings)


def test_named_colours_overrule_and_may_be_merged_or_ignored():
    colors = ["bg=0,0,0", "x=#ff0000", "x=0,255,0", "ignore=0,0,255"]
    _, data = understood(coloured, 4, expected=np.uint8([0, 1, 1, 255]), mask_colors=colors)
    assert data.id2label == {0: "bg", 1: "x"}
    assert "got also 0,0,255 0,255,0 in" in refusal(coloured, 4, mask_colors=["0,0,0", "255,0,0"])


def test_pure_blue_is_no_ignored_pixel():
    """Its number is 255."""
    blue = ["0,0,0", "0,0,255"]
    understood(lambda m: encode(COLORS[m * 3]), mask_colors=blue)
    understood(lambda m: encode(COLORS[m * 3]))


def voc_colors(numbers):
    return np.uint8([[c >> 16, c >> 8 & 255, c & 255] for c in map(voc_color, numbers)])


def voc(mask):
    picture = voc_colors((0, 15, 7))[mask]
    picture[0] = (224, 224, 192)
    return encode(picture)


def test_colours_of_pascal_voc_are_its_ids():
    rows = rows_of(voc, classes=3)
    rule = mask_rule(rows, DataArguments(num_labels=21))
    assert "the palette of Pascal VOC" in rule.note
    for number, labels in enumerate(labels_of(rule, rows)):
        assert (labels[0] == 255).all()
        assert np.array_equal(labels[1:], np.uint8([0, 15, 7])[ids(number, 3)][1:])
    names = learned(rule, DataArguments(num_labels=21)).id2label
    assert (names[15], names[7]) == ("person", "car")
    assert "--num_labels 16" in refusal(voc, 3)


@pytest.mark.parametrize(("colors", "classes"), [(3, 3), (4, 4), (10, 10), (11, 21), (21, 21)])
def test_few_colours_of_pascal_voc_are_as_many_classes_where_nobody_says_how_many(colors, classes):
    """Labelling tools use this palette for classes of their own."""
    stripes = encode(voc_colors(range(colors))[None].repeat(2, 0))
    assert count_labels([stripes], ignore_index=255).classes == classes
    assert count_labels([voc(ids(0, 3))], ignore_index=255).classes == 3


def test_a_class_of_few_masks_counts_too(monkeypatch: pytest.MonkeyPatch):
    """One that the sample did not show ended the run in the middle of its first epoch."""
    monkeypatch.setattr("kd_trainer.data.pipeline.SAMPLE", 2)
    monkeypatch.setattr("kd_trainer.data.pipeline.known_label_count", lambda _: None)
    rows = [{"image": IMAGE, "mask": encode(ids(i, 4 if i == 9 else 3))} for i in range(10)]
    data = DataArguments(dataset="nowhere")
    assert with_label_count({"train": rows}, data).num_labels == 4
    assert with_label_count({"train": rows[:9]}, data).num_labels == 3


@pytest.mark.parametrize(
    ("values", "unseen", "cure"),
    [([0, 1, 2, 4], "3", "0 1 2 4"), ([1, 1, 2, 4], "0, 3", "1 2 4"), ([0, 1, 2, 3], "", "")],
)
def test_a_gap_in_the_class_ids_is_said(values, unseen, cure, capsys, monkeypatch):
    """BraTS has 0, 1, 2 and 4: one more class than there is, with a figure of its own."""
    monkeypatch.setattr(layouts, "_SAID", set())
    monkeypatch.setattr("kd_trainer.data.pipeline.known_label_count", lambda _: None)
    rows = rows_of(lambda mask: encode(np.uint8(values)[mask]), classes=4)
    data = with_label_count(rows, DataArguments(dataset="nowhere"))
    assert data.num_labels == max(values) + 1
    said = capsys.readouterr().err
    assert bool(said) == bool(unseen)
    if unseen:
        assert f"none of those looked at holds {unseen}: classes all the same" in said
        assert f"--mask_values {cure} and --class_names" in said
        numbers = [int(value) for value in cure.split()]
        data = with_label_count(rows, DataArguments(dataset="nowhere", mask_values=numbers))
        assert data.num_labels == mask_rule(rows, data).num_labels == len(numbers)


def test_black_and_grey_files_among_coloured_ones_are_colours():
    """A mask without any object has one channel where a tool saves as little as it can."""
    rows = rows_of(coloured, classes=3)
    grey = np.zeros((SIDE, SIDE), np.uint8)
    rows["train"].insert(0, {"image": IMAGE, "mask": encode(grey)})
    rows["train"].append({"image": IMAGE, "mask": encode(grey.astype(bool))})
    rule = mask_rule(rows, DataArguments(num_labels=3))
    assert [int(labels.max()) for labels in labels_of(rule, rows)] == [0, 2, 2, 2, 2, 0]


def test_transparent_pixels_of_coloured_masks_are_black():
    def overlay(mask):
        return encode(np.dstack([COLORS[mask], (mask > 0) * np.uint8(255)]))

    understood(overlay, 3, expected=np.uint8([0, 2, 1]), num_labels=3)


def palette(mask, order):
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[mask], "P")
    image.putpalette(COLORS[order].tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "some.png"}


def test_of_a_palette_of_two_colours_black_is_background_at_any_index():
    """PIL's `quantize` puts the brighter colour first."""
    rule, data = understood(lambda m: palette(m, [1, 0]))
    assert (rule.kind, data.mask_colors) == ("colors", ["0,0,0", "255,0,0"])
    assert "255,0,0 is foreground" in rule.note
    understood(lambda m: palette(m, [1, 0]), expected=np.uint8([1, 0]), mask_values=[0, 1])
    assert understood(lambda m: palette(m, [0, 1]))[0].kind == "values"


def test_a_palette_gives_ids_unless_files_disagree_about_it():
    """Tools that reduce an image to its colours number them anew in each file."""
    rule, _ = understood(lambda m: palette(m, [0, 1, 2, 3]), 4, num_labels=4)
    assert rule.kind == "values"
    orders = iter([[0, 1, 2, 3], [0, 3, 1, 2], [2, 1, 3, 0], [3, 2, 1, 0]])
    rows = rows_of(lambda m: palette(m, next(orders)), classes=4)
    rule = mask_rule(rows, DataArguments(num_labels=4))
    assert rule.kind == "colors"
    for number, labels in enumerate(labels_of(rule, rows)):
        assert np.array_equal(labels, np.uint8([0, 3, 2, 1])[ids(number, 4)])


def test_photographs_are_no_masks():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert "at most 64 colours, got more, as in photographs" in refusal(lambda m: encode(noise))


def test_counts_of_colours_are_those_of_numpy():
    mask = np.random.default_rng(0).integers(0, 5, (37, 23)).astype(np.uint32) * 70001
    values, counts = np.unique(mask, return_counts=True)
    assert value_counts(mask) == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert present_values(mask) == tuple(values.tolist())


# --- the data set --------------------------------------------------------------------------------


def coloured_folder(root):
    write_pairs(root, train=4, validation=2)
    for file in root.glob("*/masks/*.png"):
        mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(file), COLORS[(mask > 0).astype(np.uint8)][..., ::-1])
    return root


def test_a_coloured_mask_that_cannot_be_read_is_left_out_alone(tmp_path):
    root = coloured_folder(tmp_path / "photos")
    broken = sorted(root.glob("train/masks/*.png"))[1]
    broken.write_bytes(broken.read_bytes()[:60])
    data = DataArguments(dataset=str(root), on_bad_sample="skip", max_bad_share=0.5)
    splits, bad = usable_splits(load_splits(data), data)
    assert [sample.row for sample in bad["train"]] == [1]
    assert bad["validation"] == []
    assert mask_rule(splits, data).kind == "colors"


def test_an_evaluation_says_how_it_reads_the_masks(tmp_path, capsys):
    root = coloured_folder(tmp_path / "photos")
    dataset = evaluation_dataset(DataArguments(dataset=str(root), image_size=32), batch_size=1)
    assert set(np.unique(dataset[0]["labels"])) <= {0, 1}
    assert "255,0,0 is foreground" in capsys.readouterr().err


def test_an_evaluation_reads_the_masks_as_the_run_did(tmp_path):
    """Of one split alone another rule may be found."""
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    settings = {"dataset": "photos", "mask_colors": ["0,0,0", "255,0,0"], "num_labels": 2}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    same = {"mask_colors": ["0,0,0", "255,0,0"]}
    for source in (student, student.parent):
        assert settings_of_run(str(source), {"dataset": "photos"}) == same
        # Found anew, as many colours in another order would be other classes.
        assert settings_of_run(str(source), {"dataset": "others"}) == same
        assert settings_of_run(str(source), {"dataset": "others", "mask_kind": "values"}) == {}
        assert settings_of_run(str(source), {"dataset": "photos", "mask_values": [0, 1]}) == {}
    assert settings_of_run(str(tmp_path), {"dataset": "photos"}) == {}
