"""Augmentation: draws that depend on (seed, epoch, index) only, one geometry for image and mask."""

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pytest

import kd_trainer.data.augmentation
from kd_trainer.data.augmentation import OUTSIDE, Augmentation
from kd_trainer.data_arguments import AUGMENTATIONS, DataArguments
from kd_trainer.models.image_processing import PADDING


def make(kind, *, seed=0, size=32, probability=0.8):
    return Augmentation(
        kind, image_size=size, seed=seed, brightness_contrast_probability=probability
    )


def sample(size=32):
    """A dark image with a bright rectangle in its upper left, and the mask of that."""
    rng = np.random.default_rng(1)
    image = rng.integers(20, 60, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), np.int16)
    mask[size // 8 : size // 2, size // 8 : size // 2] = 1
    image[mask == 1] = 220
    return image, mask


@pytest.mark.parametrize("kind", ["heavy", "seed", "light"])
def test_a_draw_depends_on_seed_epoch_and_index_only(kind):
    """Else a resumed run, or one with other workers, would see other images."""
    forward, backward = make(kind), make(kind)
    there = [forward(*sample(), epoch=3, index=i) for i in range(150)]
    back = [backward(*sample(), epoch=3, index=i) for i in reversed(range(150))][::-1]
    for (image, mask), (again, mask_again) in zip(there, back, strict=True):
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(mask, mask_again)


@pytest.mark.parametrize("kind", ["heavy", "light"])
@pytest.mark.parametrize("changed", ["seed", "epoch", "index"])
def test_each_of_the_three_numbers_changes_the_draws(kind, changed):
    """The library repeats its draws in each epoch and each worker; that would train on less."""
    base = make(kind)
    other = make(kind, seed=1 if changed == "seed" else 0)
    shift = {"epoch": (1, 0), "index": (0, 100)}.get(changed, (0, 0))
    different = 0
    for i in range(20):
        one = base(*sample(), epoch=0, index=i)[0]
        two = other(*sample(), epoch=shift[0], index=i + shift[1])[0]
        different += not np.array_equal(one, two)
    assert different >= 18


def test_a_draw_ignores_and_leaves_the_global_generators():
    """Else evaluation or another library would move the training draws, or be moved by them."""
    augmentation = make("heavy")
    np.random.seed(1)
    cv2.setRNGSeed(1)
    first = [augmentation(*sample(), epoch=0, index=i)[0] for i in range(150)]
    state = np.random.get_state()[1].copy()
    np.random.seed(2)
    cv2.setRNGSeed(2)
    second = [augmentation(*sample(), epoch=0, index=i)[0] for i in range(150)]
    np.testing.assert_array_equal(first, second)
    np.random.seed(1)
    np.testing.assert_array_equal(state, np.random.get_state()[1])


GROUPS = {
    "flip": (0.5, {"HorizontalFlip"}),
    "colour": (0.8, {"ColorJitter", "HueSaturationValue", "RGBShift"}),
    "light": (0.8, {"RandomBrightnessContrast", "CLAHE", "RandomGamma"}),
    "weather": (0.1, {"RandomRain", "SoftFog", "RandomSunFlare"}),
    "blur": (0.05, {"MotionBlur", "GaussianBlur", "MedianBlur"}),
    "noise": (0.05, {"GaussNoise", "ISONoise"}),
    "quality": (0.1, {"ImageCompression", "Downscale"}),
}


def fired(augmentation, count):
    """Which transforms ran, for `count` samples."""
    augmentation.compose.save_applied_params = True
    image, mask = sample(16)
    names = []
    for index in range(count):
        augmentation.reseed(epoch=0, index=index)
        result = augmentation.compose(image=image, mask=mask)
        names.append({name for name, _ in result["applied_transforms"]})
    return names


def test_the_groups_fire_at_their_rates_and_independently():
    """The library's seeding fires all rare groups in the same 7 % of the samples, unseen."""
    count = 3000
    names = fired(make("heavy", size=16), count)
    hits = {g: np.array([bool(n & members) for n in names]) for g, (_, members) in GROUPS.items()}
    for group, (rate, _) in GROUPS.items():
        tolerance = 5 * np.sqrt(rate * (1 - rate) / count)
        assert abs(hits[group].mean() - rate) < tolerance, group
    for one in GROUPS:
        for two in GROUPS:
            if one < two:
                expected = GROUPS[one][0] * GROUPS[two][0]
                tolerance = 5 * np.sqrt(expected / count)
                assert abs((hits[one] & hits[two]).mean() - expected) < tolerance, (one, two)


def test_every_transform_of_the_heavy_list_occurs_and_only_one_of_a_group():
    names = fired(make("heavy", size=16), 1500)
    seen = Counter(name for sample in names for name in sample)
    assert set(seen) == set().union(*(members for _, members in GROUPS.values()))
    assert all(len(sample & members) <= 1 for sample in names for _, members in GROUPS.values())


def test_the_seed_list_draws_each_of_its_transforms_at_its_own_rate_and_independently():
    """In a group colour jitter comes with 0.27 and Gaussian blur with 0.017: another list."""
    rates = {
        "HorizontalFlip": 0.5,
        "ColorJitter": 0.8,
        "RandomBrightnessContrast": 0.8,
        "GaussianBlur": 0.05,
    }
    count = 3000
    names = fired(make("seed", size=16), count)
    assert set().union(*names) == set(rates)
    hits = {name: np.array([name in sample for sample in names]) for name in rates}
    for name, rate in rates.items():
        assert abs(hits[name].mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / count), name
    for one, two in itertools.combinations(rates, 2):
        expected = rates[one] * rates[two]
        assert abs((hits[one] & hits[two]).mean() - expected) < 5 * np.sqrt(expected / count)


def test_heavy_stays_the_augmentation_that_nobody_asked_for():
    assert DataArguments().augmentation == "heavy"
    assert set(AUGMENTATIONS) == set(kd_trainer.data.augmentation.KINDS)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_brightness_probability_is_that_of_its_group(probability):
    names = fired(make("heavy", size=16, probability=probability), 60)
    rate = np.mean([bool(n & GROUPS["light"][1]) for n in names])
    assert rate == probability


@pytest.mark.parametrize("kind", ["heavy", "light"])
def test_image_and_mask_get_the_same_geometry(kind):
    """A mask that is flipped another way than its image teaches nonsense at a plausible loss."""
    augmentation = make(kind, size=64)
    flips = 0
    for index in range(80):
        image, mask = augmentation(*sample(64), epoch=0, index=index)
        inside = mask != OUTSIDE
        bright = image.astype(float).mean(axis=2)
        margin = bright[mask == 1].mean() - bright[inside & (mask == 0)].mean()
        assert margin > 60, index
        if kind == "light":  # the mask can be read off the image, but at the blurred edges
            read = (bright > (bright[mask == 1].mean() + bright[mask == 0].mean()) / 2) & inside
            assert (read != (mask == 1)).mean() < 0.03, index
        flips += np.argwhere(mask == 1)[:, 1].mean() > 32
    assert 20 < flips < 60


def test_light_marks_what_lies_outside_and_fills_it_with_the_mean():
    augmentation = make("light", size=64)
    outside = 0
    for index in range(40):
        image, mask = sample(64)
        image[:] = PADDING
        changed, mask = augmentation(image, mask, epoch=0, index=index)
        assert set(np.unique(mask)) <= {OUTSIDE, 0, 1}
        outside += (mask == OUTSIDE).any()
        assert np.ptp(changed, axis=(0, 1)).max() <= 2  # no black wedge: the fill is the mean
    assert 10 < outside < 40


def test_none_changes_nothing():
    image, mask = sample()
    changed, same = make("none")(image, mask, epoch=4, index=2)
    np.testing.assert_array_equal(changed, image)
    np.testing.assert_array_equal(same, mask)


def test_types_and_shapes_stay():
    for kind in ("heavy", "light", "none"):
        for index in range(60):
            image, mask = make(kind)(*sample(), epoch=0, index=index)
            assert (image.dtype, image.shape) == (np.uint8, (32, 32, 3))
            assert (mask.dtype, mask.shape) == (np.int16, (32, 32))


def test_it_survives_pickling():
    """Workers that are spawned get a pickled copy."""
    augmentation = make("heavy")
    copy = pickle.loads(pickle.dumps(augmentation))
    for index in range(20):
        one = augmentation(*sample(), epoch=1, index=index)[0]
        np.testing.assert_array_equal(one, copy(*sample(), epoch=1, index=index)[0])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="heavy, seed, light, none, got 'hevy'"):
        make("hevy")
    with pytest.raises(ValueError, match="seed >= 0, got -1"):
        make("none", seed=-1)


def test_importing_it_asks_no_server():
    """Albumentations looks up its newest version on import unless told not to."""
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('asked a server')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "runpy.run_path(sys.argv[1])\n"  # without the package, whose import takes seconds
        "assert 'albumentations' in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", code, kd_trainer.data.augmentation.__file__]
    subprocess.run(command, check=True, timeout=120, env=environment)
