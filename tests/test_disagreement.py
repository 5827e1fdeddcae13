"""Where two masks differ, counted by hand."""

import math

import numpy as np
import pytest

from kd_trainer.reports.panels import (
    CLASS_COLOURS,
    ONLY_STUDENT,
    ONLY_TEACHER,
    OTHER_CLASS,
    disagreement,
    disagreement_map,
    mask_image,
)

TEACHER = np.array([[0, 1, 1, 2], [0, 0, 2, 2]], np.uint8)
STUDENT = np.array([[0, 1, 2, 2], [1, 0, 0, 2]], np.uint8)


def test_figures_are_those_of_a_hand_count():
    """The background in the mean, or the classes that nobody found, would flatter both."""
    found = disagreement(TEACHER, STUDENT, 5)
    assert found.pixels == pytest.approx(3 / 8)
    # Class 1: one pixel of three; class 2: two of four; classes 3 and 4 do not occur.
    assert found.iou == pytest.approx((1 / 3 + 2 / 4) / 2)
    binary = disagreement(np.minimum(TEACHER, 1), np.minimum(STUDENT, 1), 2)
    assert (binary.pixels, binary.iou) == (pytest.approx(2 / 8), pytest.approx(4 / 6))


def test_two_empty_masks_have_no_iou():
    """0 would say that they have nothing in common, 1 that they found the same."""
    found = disagreement(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), 2)
    assert found.pixels == 0
    assert math.isnan(found.iou)


def test_colours_say_who_found_it():
    """Exchanged, the student's misses would look like inventions."""
    shown = disagreement_map(np.full((2, 4, 3), 90, np.uint8), TEACHER, STUDENT)
    grey = [134, 134, 134]
    assert shown.tolist() == [
        [grey, grey, list(OTHER_CLASS), grey],
        [list(ONLY_STUDENT), grey, list(ONLY_TEACHER), grey],
    ]
    assert len({ONLY_STUDENT, ONLY_TEACHER, OTHER_CLASS}) == 3


def test_masks_to_look_at_have_the_colours_of_the_overlays():
    """Ids of 0 and 1 are black and nearly black."""
    assert mask_image(np.array([[0, 1]]), 2).tolist() == [[[0] * 3, [255] * 3]]
    assert (mask_image(TEACHER, 3) == CLASS_COLOURS[TEACHER]).all()
