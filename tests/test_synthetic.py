import io
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from kd_trainer.data.synthetic import (
    PATTERNS,
    Drawing,
    draw_clutter,
    draw_person,
    synthetic_pair,
    synthetic_splits,
    texture,
)


def decode(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])))


@pytest.fixture(scope="module")
def pairs():
    return [synthetic_pair("train", index, size=96, seed=0) for index in range(80)]


def test_splits_hold_undecoded_png_pairs():
    """Readers of the data set rely on bytes, RGB order and masks of 0 and 255."""
    splits = synthetic_splits(3, 2, size=48, seed=5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 2}
    for name, split in splits.items():
        assert split.column_names == ["image", "mask"]
        assert not split.features["image"].decode
        for index, row in enumerate(split):
            image, mask = synthetic_pair(name, index, size=48, seed=5)
            assert row["image"]["bytes"].startswith(b"\x89PNG")
            np.testing.assert_array_equal(decode(row["image"]), image)
            np.testing.assert_array_equal(decode(row["mask"]), mask)


def test_an_image_depends_on_seed_split_and_index_alone():
    """If the order or the number of images mattered, a smaller set would be another set."""
    large = synthetic_splits(6, 4, size=40, seed=1)
    small = synthetic_splits(2, 1, size=40, seed=1)
    assert small["train"][:]["image"] == large["train"][:2]["image"]
    assert small["validation"][:]["mask"] == large["validation"][:1]["mask"]
    np.random.seed(99)
    again = synthetic_pair("train", 1, size=40, seed=1)[0]
    np.testing.assert_array_equal(again, decode(large["train"][1]["image"]))


@pytest.mark.parametrize("other", [("validation", 0, 0), ("train", 1, 0), ("train", 0, 1)])
def test_seed_split_and_index_each_change_the_image(other):
    """Held-out images that repeat training images would make every figure worthless."""
    split, index, seed = other
    first = synthetic_pair("train", 0, size=40, seed=0)[0].astype(int)
    second = synthetic_pair(split, index, size=40, seed=seed)[0].astype(int)
    assert abs(first - second).mean() > 5


def test_masks_are_binary_and_neither_empty_nor_full(pairs):
    """A constant prediction scores above 0.50 mIoU where people are very rare or very common."""
    shares = []
    for image, mask in pairs:
        assert image.shape == (96, 96, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
        shares.append((mask > 0).mean())
    assert 0.2 < np.mean(shares) < 0.4
    assert max(shares) < 0.8
    assert sum(share > 0.01 for share in shares) >= 0.95 * len(shares)


def test_people_cannot_be_told_by_place_or_brightness(pairs):
    """A set that a fixed shape or a threshold can solve says nothing about a network."""
    truth = np.stack([mask > 0 for _, mask in pairs])
    average = truth.mean(axis=0) > 0.5
    grey = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image, _ in pairs])
    guesses = [np.broadcast_to(average, truth.shape), grey > 128, grey < 96]
    for guess in guesses:
        overlap = [(guess == side) & (truth == side) for side in (False, True)]
        union = [(guess == side) | (truth == side) for side in (False, True)]
        miou = np.mean([a.sum() / b.sum() for a, b in zip(overlap, union, strict=True)])
        assert miou < 0.6


def test_a_thing_in_front_takes_the_pixels_from_the_person():
    """A mask that goes on behind an occluder would teach the network to guess."""
    drawing = Drawing(np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), np.uint8))
    draw_person(np.random.default_rng(0), drawing, (100.0, 100.0), 160.0)
    before = drawing.mask.copy()
    assert (before > 0).mean() > 0.08
    drawing.limb((100, 0), (100, 199), 20, (10, 200, 10))
    assert not drawing.mask[:, 95:105].any()
    assert before[:, 95:105].any()


def test_clutter_is_drawn_but_never_labelled():
    """Clutter in the mask would be taught as people."""
    for seed in range(12):
        drawing = Drawing(np.zeros((120, 120, 3), np.uint8), np.zeros((120, 120), np.uint8))
        draw_clutter(np.random.default_rng(seed), drawing, (60.0, 110.0), 90.0)
        assert drawing.image.any()
        assert not drawing.mask.any()


def test_people_may_stand_partly_outside():
    """Drawing outside the frame must cut the person, neither fail nor wrap around."""
    drawing = Drawing(np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8))
    draw_person(np.random.default_rng(3), drawing, (2.0, 95.0), 90.0)
    assert drawing.mask[:, :30].any()
    assert not drawing.mask[:, 70:].any()


@pytest.mark.parametrize("kind", PATTERNS)
def test_each_texture_stays_between_its_two_colours(kind):
    """An overflow in uint8 shows as speckles of foreign colours."""
    made = texture(np.random.default_rng(0), 64, kind, ((40, 60, 80), (90, 100, 110)), 9.0)
    assert made.shape == (64, 64, 3)
    assert (made >= [40, 60, 80]).all()
    assert (made <= [90, 100, 110]).all()
    assert kind == "plain" or made.std(axis=(0, 1)).min() > 1


def test_an_image_of_96_px_is_drawn_in_a_few_milliseconds():
    """The demo draws some hundred images at each start."""
    synthetic_pair("train", 0, size=96, seed=0)
    started = time.process_time()
    for index in range(40):
        synthetic_pair("train", index, size=96, seed=0)
    assert (time.process_time() - started) / 40 < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 1, "evaluation": 1, "size": 16}, "Expected size >= 32 pixels, got 16"),
        ({"train": 0, "evaluation": 1, "size": 32}, "at least one image a split, got 0"),
        ({"train": 1, "evaluation": -1, "size": 32}, "and -1 held out"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    """An empty split would only fail later, far from its cause."""
    with pytest.raises(ValueError, match=message):
        synthetic_splits(**arguments, seed=0)
