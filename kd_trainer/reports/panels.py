"""Images of masks: overlays, errors, differences of two networks, and panels of them.

A mask holds class ids (H, W), or of several labels a pixel planes (K, H, W) of 0, 1 and whatever is
ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from kd_trainer.files import replacing_file

Pixels = np.ndarray
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
OTHER_CLASS = MIXED_UP = (160, 50, 190)
_NOTHING_IGNORED = -1
_HEADER = 18
_GAP = 4


def class_colours(num_labels: int) -> np.ndarray:
    """Colours of the classes, uint8 (num_labels, 3); they repeat after eight foreground classes."""
    index = np.arange(num_labels)
    repeated = np.where(index == 0, 0, (index - 1) % (len(CLASS_COLOURS) - 1) + 1)
    return CLASS_COLOURS[repeated]


def label_colours(count: int) -> np.ndarray:
    """Colours of labels of which a pixel may have several, uint8 (count, 3): none is background."""
    return class_colours(count + 1)[1:]


def colours_of(num_labels: int, *, multi_label: bool) -> np.ndarray:
    """Colours of classes, or of labels of which a pixel may have several, by their index."""
    return label_colours(num_labels) if multi_label else class_colours(num_labels)


def label_maps(mask: np.ndarray, num_labels: int) -> dict[int, np.ndarray]:
    """Where each label but a background is, by its index, bool (H, W)."""
    if mask.ndim == 3:
        return {index: plane == 1 for index, plane in enumerate(mask)}
    return {index: mask == index for index in range(1, num_labels)}


def overlay(image: Pixels, mask: np.ndarray, *, num_labels: int, opacity: float = 0.55) -> Pixels:
    """The image with its classes tinted.

    Args:
        image: uint8 (H, W, 3).
        mask: class ids (H, W); ids outside 0..num_labels-1 (ignored pixels) turn grey. Planes
            (K, H, W) are tinted by the mean of their colours, and each is outlined in its own.
        num_labels: number of classes, background first where there is one.
        opacity: share of the colour, 0 to 1.
    """
    if mask.ndim == 3:
        return _planes_overlay(image, mask, opacity)
    ignored = (mask < 0) | (mask >= num_labels)
    colours = class_colours(num_labels)[np.where(ignored, 0, mask)]
    colours[ignored] = IGNORED
    tinted = (image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return np.where((mask != 0)[..., None], tinted, image)


def _planes_overlay(image: Pixels, planes: np.ndarray, opacity: float) -> Pixels:
    found, colours = planes == 1, label_colours(len(planes))
    mixed = np.tensordot(found, colours.astype(float), axes=(0, 0))  # (H, W, 3)
    count = found.sum(axis=0)[..., None]
    ignored = ((planes != 0) & ~found).any(axis=0)[..., None] & (count == 0)
    mixed = np.where(ignored, IGNORED, mixed / np.maximum(count, 1))
    tinted = (image * (1 - opacity) + mixed * opacity).astype(np.uint8)
    shown = np.where((count > 0) | ignored, tinted, image)
    # As wide as what is left of it in a panel; at the border of the image there is no edge.
    width = 2 * max(1, min(image.shape[:2]) // 128) + 1
    around = np.ones((width, width), np.uint8)
    for plane, colour in zip(found, colours, strict=True):
        inner = cv2.erode(plane.astype(np.uint8), around).astype(bool)
        shown[plane & ~inner] = colour
    return shown


def error_map(
    image: Pixels, truth: np.ndarray, prediction: np.ndarray, *, ignore_index: int
) -> Pixels:
    """A grey image with wrong pixels in colour: orange for too much, blue for missed.

    For several classes a foreground pixel of the wrong class counts as too much. Of several labels
    a pixel those of any label are shown; purple is one label too much and another one missed.
    """
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.6 + 80
    if truth.ndim == 3:
        counts = truth != ignore_index
        extra = (counts & (truth != 1) & (prediction == 1)).any(axis=0)
        missed = (counts & (truth == 1) & (prediction != 1)).any(axis=0)
        grey[extra], grey[missed], grey[extra & missed] = FALSE_POSITIVE, FALSE_NEGATIVE, MIXED_UP
        grey[~counts.any(axis=0)] = IGNORED
        return grey.astype(np.uint8)
    valid = truth != ignore_index
    grey[valid & (prediction != truth) & (prediction != 0)] = FALSE_POSITIVE
    grey[valid & (truth != 0) & (prediction == 0)] = FALSE_NEGATIVE
    grey[~valid] = IGNORED
    return grey.astype(np.uint8)


def difference_map(image: Pixels, difference: np.ndarray) -> Pixels:
    """A pale grey image tinted by a difference of probabilities.

    Args:
        image: uint8 (H, W, 3).
        difference: floats (H, W) in -1..1: orange above 0, blue below, as strong as it is large.
    """
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.4 + 140
    colour = np.where((difference > 0)[..., None], FALSE_POSITIVE, FALSE_NEGATIVE)
    strength = np.abs(difference).clip(0, 1)[..., None]
    return (grey * (1 - strength) + colour * strength).astype(np.uint8)


def panel(rows: Sequence[Sequence[Pixels]], titles: Sequence[str], *, side: int = 192) -> Pixels:
    """Images in a grid under column titles.

    Args:
        rows: images of each row, as many as there are titles.
        titles: heading of each column.
        side: width of a column in pixels; the height follows the image.

    Returns:
        uint8 (H, W, 3).
    """
    scaled = [[_fit(image, side) for image in row] for row in rows]
    heights = [max(image.height for image in row) for row in scaled]
    lefts = [_GAP + column * (side + _GAP) for column in range(len(titles))]
    width = lefts[-1] + side + _GAP
    sheet = Image.new("RGB", (width, _HEADER + sum(heights) + _GAP * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + 2, 3), title, fill="black")
    top = _HEADER
    for row, height in zip(scaled, heights, strict=True):
        for left, image in zip(lefts, row, strict=True):
            sheet.paste(image, (left, top))
        top += height + _GAP
    return np.asarray(sheet)


def _fit(pixels: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((side, max(1, round(side * image.height / image.width))))


def comparison_panel(
    images: np.ndarray,
    truth: np.ndarray,
    teacher: np.ndarray | None,
    student: np.ndarray,
    *,
    num_labels: int,
    ignore_index: int,
) -> Pixels:
    """Image, truth, teacher (if any), student and errors; one row an image.

    Args:
        images: uint8 (B, H, W, 3).
        truth: masks, (B, H, W) or (B, K, H, W).
        teacher: likewise, or None.
        student: likewise.
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


def save_image(pixels: Pixels, path: Path) -> None:
    """Write an image, making its folder."""
    with replacing_file(path) as partial:
        Image.fromarray(pixels).save(partial)


@dataclass(frozen=True)
class Disagreement:
    """How far two masks of one image are apart.

    Attributes:
        pixels: share of the pixels of which the class differs, 0 to 1.
        iou: mean over the foreground classes of either mask; NaN if they have none.
    """

    pixels: float
    iou: float


def disagreement(teacher: np.ndarray, student: np.ndarray, num_labels: int) -> Disagreement:
    """Compare two masks.

    Args:
        teacher: class ids (H, W), or planes (K, H, W).
        student: likewise.
        num_labels: number of classes, background first where there is one.
    """
    ious, found = [], label_maps(student, num_labels)
    for index, one in label_maps(teacher, num_labels).items():
        union = one | found[index]
        if union.any():
            ious.append((one & found[index]).sum() / union.sum())
    differs = teacher != student
    differs = differs.any(axis=0) if differs.ndim == 3 else differs
    return Disagreement(float(differs.mean()), float(np.mean(ious)) if ious else math.nan)


def disagreement_map(image: Pixels, teacher: np.ndarray, student: np.ndarray) -> Pixels:
    """A grey image, coloured where the masks differ.

    Blue where only the teacher found something, orange where only the student did, purple where
    both did and disagree about the class.

    Args:
        image: uint8 (H, W, 3).
        teacher: class ids (H, W), or planes (K, H, W).
        student: likewise.
    """
    shown = error_map(image, teacher, student, ignore_index=_NOTHING_IGNORED)
    if teacher.ndim == 3:
        return shown
    shown[(teacher != student) & (teacher != 0) & (student != 0)] = OTHER_CLASS
    return shown


def mask_image(mask: np.ndarray, num_labels: int) -> Pixels:
    """A mask to look at: white on black for two classes, else in the colours of the classes."""
    if mask.ndim == 3:
        black = np.zeros((*mask.shape[1:], 3), np.uint8)
        return overlay(black, mask, num_labels=num_labels, opacity=1)
    if num_labels == 2:
        return np.where((mask > 0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    return class_colours(num_labels)[mask]
