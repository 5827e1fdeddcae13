"""The quick transforms against albumentations' own: the same pixels, or the same statistics."""

import random

import albumentations as A
import cv2
import numpy as np
import pytest

from kd_trainer.fast_transforms import (
    FastColorJitter,
    FastGaussNoise,
    FastHueSaturationValue,
    FastISONoise,
    FastRGBShift,
    SoftFog,
    normal_table,
)

SIZE = 64
BOUND = 4.5  # standard errors, for two dozen figures at once


def pictures(count=6, size=SIZE):
    """Smooth coloured pictures that hold black, white and grey as well."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        picture[: size // 8], picture[-size // 8 :] = 0, 255
        picture[:, : size // 8] = picture[:, : size // 8, :1]
        made.append(picture)
    return made


def draws(transform, count, *, seed=0, inputs=None):
    """`count` pairs of input and output; `seed` is of the noise, not of its strength."""
    compose = A.Compose([transform])
    inputs = inputs or pictures()
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        compose.set_random_state(generator, random.Random(index))
        image = inputs[index % len(inputs)]
        yield image, compose(image=image.copy())["image"]


@pytest.mark.parametrize(
    ("original", "fast"),
    [
        (A.RGBShift(p=1), FastRGBShift(p=1)),
        (A.HueSaturationValue(p=1), FastHueSaturationValue(p=1)),
        (A.ColorJitter(0.2, 0.2, 0.2, 0.1, p=1), FastColorJitter(0.2, 0.2, 0.2, 0.1, p=1)),
        (A.ColorJitter(0.2, 0, 0.2, 0, p=1), FastColorJitter(0.2, 0, 0.2, 0, p=1)),
    ],
)
def test_colours_are_those_of_the_original(original, fast):
    """A table that rounds otherwise shifts every picture by a level, and nobody sees it."""
    pairs = zip(draws(original, 150), draws(fast, 150), strict=True)
    for (_, one), (_, two) in pairs:
        np.testing.assert_array_equal(one, two)


def figures(transform, count, *, seed=0, inputs=None):
    """One row of statistics a draw: brightness, contrast, noise, its shape in space and tails."""
    rows = []
    for image, changed in draws(transform, count, seed=seed, inputs=inputs):
        assert (changed.dtype, changed.shape) == (np.uint8, image.shape)
        change = changed.astype(float) - image
        centred = change - change.mean(axis=(0, 1))
        power = centred.var() + 1e-9
        red, green = centred[..., 0], centred[..., 1]
        middle = slice(len(image) // 4, 3 * len(image) // 4)
        histogram = np.bincount(changed.ravel() // 32, minlength=8) / changed.size
        rows.append(
            [
                *change.mean(axis=(0, 1)),
                *change.std(axis=(0, 1)),
                changed.mean(),
                changed.std(),
                change.mean() - change[middle, middle].mean(),
                (centred[1:] * centred[:-1]).mean() / power,
                (centred[:, 1:] * centred[:, :-1]).mean() / power,
                (centred[8:] * centred[:-8]).mean() / power,
                (red * green).mean() / power,
                (change == 0).mean(),
                *np.quantile(change, [0.001, 0.05, 0.95, 0.999]),
                change.min(),
                change.max(),
                *histogram,
            ]
        )
    return np.array(rows)


def distance(one, two):
    """Largest difference of the mean or the spread of a figure, in standard errors.

    The draws are paired: both transforms got the same strengths. A bias of a five-hundredth of the
    figure counts like a standard error, so that exact figures may differ by a hundredth.
    """

    def errors(one, two):
        gap = one - two
        noise = gap.std(axis=0) / np.sqrt(len(gap)) + 0.002 * np.abs(one).mean(axis=0) + 1e-4
        return (np.abs(gap.mean(axis=0)) / noise).max()

    return max(
        errors(one, two), errors((one - one.mean(axis=0)) ** 2, (two - two.mean(axis=0)) ** 2)
    )


class Tiled(FastGaussNoise):
    """Wrong in space: one tile of noise again and again."""

    def get_params_dependent_on_data(self, params, data):
        noise = super().get_params_dependent_on_data(params, data)["noise_map"]
        return {"noise_map": np.tile(noise[:8, :8], (SIZE // 8, SIZE // 8, 1))}


class Grey(FastGaussNoise):
    """Wrong between channels: all get the same noise."""

    def get_params_dependent_on_data(self, params, data):
        noise = super().get_params_dependent_on_data(params, data)["noise_map"]
        return {"noise_map": np.repeat(noise[..., :1], 3, axis=2)}


class Biased(FastGaussNoise):
    """Wrong in the rounding: half a level darker."""

    def apply(self, img, noise_map, **params):
        return super().apply(img, noise_map - (noise_map < 0).astype(np.int16))


class Short(FastGaussNoise):
    """Wrong in the tails: none beyond the table."""

    def _tail(self, upper):
        return np.where(upper, 1.0, -1.0) * 3.0


class Rare(FastISONoise):
    """Wrong in the number of pixels: a tenth fewer."""

    def apply(self, img, places, lighter, turns, **params):
        keep = np.arange(len(places)) % 10 > 0
        return super().apply(img, places[keep], lighter[keep], turns[keep])


class Even(SoftFog):
    """Wrong in space: the same density everywhere."""

    def apply(self, img, stays, **params):
        return super().apply(img, np.full_like(stays, stays.mean()), **params)


class Thin(SoftFog):
    """Wrong in the density, by a tenth."""

    def apply(self, img, stays, **params):
        return super().apply(img, 1 - (1 - stays) * 0.9, **params)


RANGE = {"std_range": (0.02, 0.08)}
RANDOM = [
    (A.GaussNoise(**RANGE, p=1), FastGaussNoise(**RANGE, p=1), 150),
    (A.ISONoise(p=1), FastISONoise(p=1), 150),
    (A.RandomFog(p=1), SoftFog(p=1), 100),
]


@pytest.mark.parametrize(("original", "fast", "count"), RANDOM, ids=["gauss", "iso", "fog"])
def test_statistics_are_those_of_the_original(original, fast, count):
    """Training would meet weather and noise that no list names; the loss would look the same."""
    reference = figures(original, count)
    assert distance(reference, figures(original, count, seed=1)) < BOUND
    assert distance(reference, figures(fast, count, seed=2)) < BOUND


@pytest.mark.parametrize(
    ("original", "wrong", "count"),
    [
        (RANDOM[0][0], FastGaussNoise(std_range=(0.021, 0.084), p=1), 150),
        (RANDOM[0][0], Tiled(**RANGE, p=1), 150),
        (RANDOM[0][0], Grey(**RANGE, p=1), 150),
        (RANDOM[0][0], Biased(**RANGE, p=1), 150),
        (RANDOM[1][0], Rare(p=1), 150),
        (RANDOM[2][0], Even(p=1), 100),
        (RANDOM[2][0], Thin(p=1), 100),
    ],
    ids=["stronger", "tiled", "grey", "biased", "rare", "even", "thin"],
)
def test_a_wrong_distribution_is_seen(original, wrong, count):
    """Else the comparison above would pass whatever the transforms did."""
    assert distance(figures(original, count), figures(wrong, count, seed=2)) > BOUND + 1


def test_normal_deviates_have_the_moments_and_tails_of_a_normal():
    table = normal_table().astype(float)
    assert len(table) == 65536
    assert (np.diff(table) > 0).all()
    np.testing.assert_allclose([table.mean(), table.std()], [0, 1], atol=1e-4)
    np.testing.assert_allclose((table**4).mean(), 3, atol=2e-3)
    noise = FastGaussNoise(p=1)
    noise.set_random_state(np.random.default_rng(0), random.Random(0))
    tails = noise._tail(np.arange(4000) % 2 == 0)
    assert (np.abs(tails) > -table[0] - 0.2).all()  # nothing between the table and its tails
    share = (np.abs(tails) > 4.5).mean()  # of P(|x| > 4.5) in P(|x| > 4.1698)
    assert abs(share - 0.2226) < 0.03
    assert np.abs(tails).max() > 5.2


def test_fog_hides_the_middle_more_than_the_edges_and_only_brightens():
    black = [np.zeros((SIZE, SIZE, 3), np.uint8)]
    fog = np.mean([out for _, out in draws(SoftFog(p=1), 40, inputs=black)], axis=(0, 3))
    assert fog[24:40, 24:40].mean() > 2 * fog[:8, :8].mean()
    assert fog.min() > 0
    white = [np.full((SIZE, SIZE, 3), 255, np.uint8)]
    assert all((out == 255).all() for _, out in draws(SoftFog(p=1), 5, inputs=white))


@pytest.mark.parametrize("fast", [fast for _, fast, _ in RANDOM], ids=["gauss", "iso", "fog"])
def test_draws_come_from_the_given_generators_alone(fast):
    """A draw from cv2's or numpy's own generator would differ between workers."""
    first = [out for _, out in draws(fast, 5)]
    cv2.setRNGSeed(99)
    np.random.seed(99)
    random.seed(99)
    list(draws(fast, 3, seed=8))
    np.testing.assert_array_equal(first, [out for _, out in draws(fast, 5)])


@pytest.mark.parametrize("size", [1, 2, 3, 16, 50])
def test_any_size_is_taken(size):
    """Grids, tails and rings meet their smallest numbers here."""
    image = [np.full((size, size + 1, 3), 90, np.uint8)]
    for fast in (FastRGBShift, FastHueSaturationValue, FastGaussNoise, FastISONoise, SoftFog):
        for before, after in draws(fast(p=1), 3, inputs=image):
            assert after.shape == before.shape
