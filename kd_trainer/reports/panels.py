"""Images of masks: overlays, errors, differences of two networks, and panels of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from kd_trainer.files import replacing_file

Picture = np.ndarray
"""uint8 (H, W, 3)."""

# Okabe and Ito's colours, told apart with every kind of colour vision; class 0 stays untinted.
CLASS_COLOURS = np.array(
    [
        (0, 0, 0),
        (0, 158, 115),
        (230, 159, 0),
        (86, 180, 233),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
        (150, 150, 150),
    ],
    dtype=np.uint8,
)
FALSE_POSITIVE = (230, 80, 0)
FALSE_NEGATIVE = (0, 114, 218)
IGNORED = (128, 128, 128)
# As errors of the student, with the teacher's mask in the place of the truth.
ONLY_STUDENT = FALSE_POSITIVE
ONLY_TEACHER = FALSE_NEGATIVE
OTHER_CLASS = (160, 50, 190)
_NOTHING_IGNORED = -1
_HEADER = 18
_GAP = 4


def class_colours(num_labels: int) -> np.ndarray:
    """Colours of the classes, uint8 (num_labels, 3); they repeat after eight foreground classes."""
    index = np.arange(num_labels)
    repeated = np.where(index == 0, 0, (index - 1) % (len(CLASS_COLOURS) - 1) + 1)
    return CLASS_COLOURS[repeated]


def overlay(image: Picture, mask: np.ndarray, *, num_labels: int, opacity: float = 0.55) -> Picture:
    """The image with its classes tinted.

    Args:
        image: uint8 (H, W, 3).
        mask: class ids (H, W); ids outside 0..num_labels-1 (ignored pixels) turn grey.
        num_labels: number of classes, background first.
        opacity: share of the colour, 0 to 1.
    """
    known = (mask >= 0) & (mask < num_labels)
    colours = class_colours(num_labels)[np.where(known, mask, 0)]
    colours[~known] = IGNORED
    tinted = (image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return np.where(((mask != 0) | ~known)[..., None], tinted, image)


def error_map(
    image: Picture, truth: np.ndarray, prediction: np.ndarray, *, ignore_index: int
) -> Picture:
    """A grey image with wrong pixels in colour: orange where too much was found, blue where missed.

    For several classes a foreground pixel of the wrong class counts as too much.
    """
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.6 + 80
    valid = truth != ignore_index
    grey[valid & (prediction != truth) & (prediction != 0)] = FALSE_POSITIVE
    grey[valid & (truth != 0) & (prediction == 0)] = FALSE_NEGATIVE
    grey[~valid] = IGNORED
    return grey.astype(np.uint8)


def difference_map(image: Picture, difference: np.ndarray) -> Picture:
    """A pale grey image tinted by a difference of probabilities.

    Args:
        image: uint8 (H, W, 3).
        difference: floats (H, W) in -1..1: orange above 0, blue below, as strong as it is large.
    """
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.4 + 140
    colour = np.where((difference > 0)[..., None], FALSE_POSITIVE, FALSE_NEGATIVE)
    strength = np.abs(difference).clip(0, 1)[..., None]
    return (grey * (1 - strength) + colour * strength).astype(np.uint8)


def panel(rows: Sequence[Sequence[Picture]], titles: Sequence[str], *, side: int = 192) -> Picture:
    """Pictures in a grid under column titles.

    Args:
        rows: one sequence of pictures an image, as many as there are titles.
        titles: heading of each column.
        side: width of a cell in pixels; the height follows the picture.

    Returns:
        uint8 (H, W, 3).
    """
    cells = [[_fit(picture, side) for picture in row] for row in rows]
    heights = [max(cell.height for cell in row) for row in cells]
    width = len(titles) * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEADER + sum(heights) + _GAP * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (side + _GAP) + 2, 3), title, fill="black")
    top = _HEADER
    for row, height in zip(cells, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (side + _GAP), top))
        top += height + _GAP
    return np.asarray(sheet)


def comparison_panel(
    images: np.ndarray,
    truth: np.ndarray,
    teacher: np.ndarray | None,
    student: np.ndarray,
    *,
    num_labels: int,
    ignore_index: int,
) -> Picture:
    """Image, truth, teacher (if any), student and errors; one row an image.

    Args:
        images: uint8 (B, H, W, 3).
        truth: class ids (B, H, W).
        teacher: class ids (B, H, W) or None.
        student: class ids (B, H, W).
        num_labels: number of classes.
        ignore_index: id of the pixels that count nowhere.
    """
    masks = {"truth": truth, "teacher": teacher, "student": student}
    shown = {title: mask for title, mask in masks.items() if mask is not None}
    rows = []
    for i, image in enumerate(images):
        tinted = [overlay(image, mask[i], num_labels=num_labels) for mask in shown.values()]
        errors = error_map(image, truth[i], student[i], ignore_index=ignore_index)
        rows.append([image, *tinted, errors])
    return panel(rows, ["image", *shown, "errors (orange: too much, blue: missed)"])


def _fit(picture: Picture, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((side, max(1, round(side * image.height / image.width))))


def save_picture(picture: Picture, path: Path) -> None:
    """Write a picture, making its folder."""
    with replacing_file(path) as partial:
        Image.fromarray(picture).save(partial)


@dataclass(frozen=True)
class Disagreement:
    """How far two masks of one picture are apart.

    Attributes:
        pixels: share of the pixels of which the class differs, 0 to 1.
        iou: mean over the foreground classes that either found; NaN if neither found any.
    """

    pixels: float
    iou: float


def disagreement(teacher: np.ndarray, student: np.ndarray, num_labels: int) -> Disagreement:
    """Compare two masks.

    Args:
        teacher: class ids (H, W).
        student: class ids (H, W).
        num_labels: number of classes, background first.
    """
    ious = []
    for index in range(1, num_labels):
        found = np.stack([teacher == index, student == index])
        if found.any():
            ious.append(found.all(axis=0).sum() / found.any(axis=0).sum())
    return Disagreement(
        float((teacher != student).mean()), float(np.mean(ious)) if ious else math.nan
    )


def disagreement_map(image: Picture, teacher: np.ndarray, student: np.ndarray) -> Picture:
    """A grey image, coloured where the masks differ.

    Blue where only the teacher found something, orange where only the student did, purple where
    both did and disagree about the class.

    Args:
        image: uint8 (H, W, 3).
        teacher: class ids (H, W).
        student: class ids (H, W).
    """
    shown = error_map(image, teacher, student, ignore_index=_NOTHING_IGNORED)
    shown[(teacher != student) & (teacher != 0) & (student != 0)] = OTHER_CLASS
    return shown


def mask_picture(mask: np.ndarray, num_labels: int) -> Picture:
    """A mask to look at: white on black for two classes, else in the colours of the classes."""
    if num_labels == 2:
        return np.where((mask > 0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    return class_colours(num_labels)[mask]
