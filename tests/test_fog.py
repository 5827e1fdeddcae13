"""Our fog against albumentations' own: the same statistics."""

import random

import albumentations as A
import cv2
import numpy as np
import pytest

from kd_trainer.data.augmentation import SoftFog

SIZE = 64
BOUND = 4.5  # standard errors, for two dozen figures at once


def images(count=6, size=SIZE):
    """Smooth coloured images that hold black, white and grey as well."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        image[: size // 8], image[-size // 8 :] = 0, 255
        image[:, : size // 8] = image[:, : size // 8, :1]
        made.append(image)
    return made


def draws(transform, count, *, seed=0, inputs=None):
    """`count` pairs of input and output; `seed` is of the noise, not of its strength."""
    compose = A.Compose([transform])
    inputs = inputs or images()
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        compose.set_random_state(generator, random.Random(index))
        image = inputs[index % len(inputs)]
        yield image, compose(image=image.copy())["image"]


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


class Even(SoftFog):
    """Wrong in space: the same density everywhere."""

    def apply(self, img, stays, **params):
        return super().apply(img, np.full_like(stays, stays.mean()), **params)


class Thin(SoftFog):
    """Wrong in the density, by a tenth."""

    def apply(self, img, stays, **params):
        return super().apply(img, 1 - (1 - stays) * 0.9, **params)


COUNT = 100


def test_statistics_are_those_of_the_original():
    """Training would meet weather that no list names; the loss would look the same."""
    original = A.RandomFog(p=1)
    reference = figures(original, COUNT)
    assert distance(reference, figures(original, COUNT, seed=1)) < BOUND
    assert distance(reference, figures(SoftFog(p=1), COUNT, seed=2)) < BOUND


@pytest.mark.parametrize("wrong", [Even(p=1), Thin(p=1)], ids=["even", "thin"])
def test_a_wrong_distribution_is_seen(wrong):
    """Else the comparison above would pass whatever the fog did."""
    reference = figures(A.RandomFog(p=1), COUNT)
    assert distance(reference, figures(wrong, COUNT, seed=2)) > BOUND + 1


def test_fog_hides_the_middle_more_than_the_edges_and_only_brightens():
    black = [np.zeros((SIZE, SIZE, 3), np.uint8)]
    fog = np.mean([out for _, out in draws(SoftFog(p=1), 40, inputs=black)], axis=(0, 3))
    assert fog[24:40, 24:40].mean() > 2 * fog[:8, :8].mean()
    assert fog.min() > 0
    white = [np.full((SIZE, SIZE, 3), 255, np.uint8)]
    assert all((out == 255).all() for _, out in draws(SoftFog(p=1), 5, inputs=white))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 50])
def test_any_size_is_taken(size):
    """The grid meets its smallest numbers here."""
    image = [np.full((size, size + 1, 3), 90, np.uint8)]
    for before, after in draws(SoftFog(p=1), 3, inputs=image):
        assert after.shape == before.shape
