"""Panels: what is coloured, where, and how the sheet is laid out."""

from pathlib import Path

import numpy as np
from PIL import Image

from kd_trainer.reports.panels import (
    CLASS_COLOURS,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    IGNORED,
    class_colours,
    comparison_panel,
    error_map,
    overlay,
    panel,
    save_image,
)

GREY = np.full((4, 6, 3), 100, np.uint8)


def mask_of(**areas: int) -> np.ndarray:
    mask = np.zeros((4, 6), np.uint8)
    for column, value in areas.items():
        mask[:, int(column[1:])] = value
    return mask


def test_overlay_tints_classes_and_leaves_the_background():
    """A tinted background makes every prediction look like one class."""
    tinted = overlay(GREY, mask_of(c1=1, c2=2), num_labels=3, opacity=1.0)
    assert (tinted[:, 0] == 100).all()
    assert (tinted[:, 1] == CLASS_COLOURS[1]).all()
    assert (tinted[:, 2] == CLASS_COLOURS[2]).all()
    half = overlay(GREY, mask_of(c1=1), num_labels=2, opacity=0.5)
    assert np.abs(half[0, 1] - (100 + CLASS_COLOURS[1].astype(int)) / 2).max() <= 1
    assert (GREY == 100).all()  # the image itself is not painted on


def test_overlay_shows_ignored_pixels_in_grey():
    """255 taken as an index would be an error, or a colour of some class."""
    tinted = overlay(GREY, mask_of(c1=255), num_labels=2, opacity=1.0)
    assert (tinted[:, 1] == IGNORED).all()
    assert (tinted[:, 0] == 100).all()


def test_neighbouring_classes_have_different_colours_however_many_there_are():
    """Colours that run out repeat; none of them may be the background's."""
    colours = class_colours(20)
    assert colours.shape == (20, 3)
    assert (colours[0] == 0).all()
    assert (colours[1:].sum(axis=1) > 0).all()
    assert all((colours[i] != colours[i + 1]).any() for i in range(1, 19))
    assert len({tuple(c) for c in colours[1:9]}) == 8


def test_error_map_tells_too_much_from_missed():
    """With both in one colour nobody sees which way a model errs."""
    truth = mask_of(c1=1, c2=1, c4=255, c5=2)
    prediction = mask_of(c1=1, c3=1, c4=1, c5=1)
    errors = error_map(GREY, truth, prediction, ignore_index=255)
    right = errors[0, 0]
    assert right[0] == right[1] == right[2]
    assert (errors[:, 1] == right).all()  # found
    assert (errors[:, 2] == FALSE_NEGATIVE).all()
    assert (errors[:, 3] == FALSE_POSITIVE).all()
    assert (errors[:, 4] == IGNORED).all()  # counts nowhere
    assert (errors[:, 5] == FALSE_POSITIVE).all()  # foreground of the wrong class


def test_panel_has_a_place_for_each_image_in_order():
    """Swapped columns show the truth as the prediction."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    cells = [np.full((8, 16, 3), colour, np.uint8) for colour in colours]
    sheet = panel([cells[:2], cells[2:]], ["one", "two"], side=32)
    middles = {
        colour: np.argwhere((sheet == colour).all(axis=2)).mean(axis=0) for colour in colours
    }
    assert all((sheet == colour).all(axis=2).sum() == 32 * 16 for colour in colours)
    (red, green, blue, yellow) = (middles[colour] for colour in colours)
    assert red[0] == green[0] < blue[0] == yellow[0]
    assert red[1] == blue[1] < green[1] == yellow[1]
    assert (sheet[-1] == 255).all()


def test_comparison_has_a_teacher_column_only_with_a_teacher():
    """An empty column would be read as a teacher that finds nothing."""
    images = np.stack([GREY, GREY])
    mask = np.stack([mask_of(c1=1), mask_of(c2=1)])
    options = {"num_labels": 2, "ignore_index": 255}
    without = comparison_panel(images, mask, None, mask, **options)
    with_one = comparison_panel(images, mask, mask, mask, **options)
    assert with_one.shape[0] == without.shape[0]
    assert (with_one.shape[1] - 4) / 5 == (without.shape[1] - 4) / 4


def test_a_saved_image_is_the_image(tmp_path: Path):
    """The folder need not exist, and PNG changes no colour."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_image(image, tmp_path / "new" / "x.png")
    with Image.open(tmp_path / "new" / "x.png") as saved:
        assert (np.asarray(saved) == image).all()
