"""What the web demo says about one picture: masks, difference, milliseconds. Knows no browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kd_trainer.costs import Latency, interleaved
from kd_trainer.data.folder_images import read_picture
from kd_trainer.inference import classes_at, drawn
from kd_trainer.models.image_processing import resize_image
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.panels import (
    Disagreement,
    disagreement,
    disagreement_map,
    mask_picture,
    overlay,
)
from kd_trainer.web_demo.models import DemoModel

# Longer side of what is shown and predicted. More than any screen shows, and the logits of nine
# classes at the 100 megapixels of a large camera are 3.6 GB.
LONGEST = 2048

Models = Mapping[str, DemoModel]
"""The student, and perhaps a teacher, under the names of `kd_trainer.reports.contents`."""


@dataclass(frozen=True)
class Result:
    """One picture as all models see it.

    Attributes:
        picture: uint8 (H, W, 3), as it was shown to the models.
        masks: class ids, uint8 (H, W), of each model.
        difference: between teacher and student; None without a teacher.
    """

    picture: np.ndarray
    masks: dict[str, np.ndarray]
    difference: Disagreement | None


@dataclass(frozen=True)
class Drawings:
    """A result to look at.

    Attributes:
        left: uint8 (H, W, 3), left of the slider: the teacher's overlay, else the picture.
        right: the student's overlay.
        masks: uint8 (H, W, 3) of each model.
        difference: uint8 (H, W, 3) where the masks differ; without a teacher the cut-out of the
            student, (H, W, 4).
    """

    left: np.ndarray
    right: np.ndarray
    masks: dict[str, np.ndarray]
    difference: np.ndarray


def read_upload(path: str | Path) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture that a visitor sent, read as for training.

    Args:
        path: of the file on this machine.

    Returns:
        uint8 RGB (H, W, 3) of at most LONGEST pixels a side, and the height and width of the file.

    Raises:
        ValueError: if it is no readable picture; names the file without its folder.
    """
    file = Path(path)
    try:
        picture = np.asarray(read_picture(file))
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error
    height, width = picture.shape[:2]
    if max(height, width) <= LONGEST:
        return picture, (height, width)
    small = [max(1, round(side * LONGEST / max(height, width))) for side in (height, width)]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    shrunk = resize_image(pixels, small[0], small[1]).permute(1, 2, 0).contiguous()
    return shrunk.numpy(), (height, width)


def examine(models: Models, picture: np.ndarray, threshold: float) -> Result:
    """Masks of all models and how they differ.

    Args:
        models: as `Models` says.
        picture: uint8 RGB (H, W, 3).
        threshold: probability from which a binary model's pixel is foreground.
    """
    masks = {
        role: classes_at(model.segmenter.logits([picture])[0], threshold)
        for role, model in models.items()
    }
    difference = None
    if TEACHER in masks:
        num_labels = len(models[STUDENT].class_names)
        difference = disagreement(masks[TEACHER], masks[STUDENT], num_labels)
    return Result(picture, masks, difference)


def drawings(result: Result, num_labels: int) -> Drawings:
    """The pictures of a result; `num_labels` counts the background too."""
    picture, masks = result.picture, result.masks
    tinted = {role: overlay(picture, mask, num_labels=num_labels) for role, mask in masks.items()}
    if TEACHER in masks:
        difference = disagreement_map(picture, masks[TEACHER], masks[STUDENT])
    else:
        difference = drawn("cutouts", picture, masks[STUDENT], num_labels)
    return Drawings(
        tinted.get(TEACHER, picture),
        tinted[STUDENT],
        {role: mask_picture(mask, num_labels) for role, mask in masks.items()},
        difference,
    )


def milliseconds(models: Models, picture: np.ndarray, repeats: int) -> dict[str, Latency]:
    """How long each network takes for this picture at its own input size.

    The networks alone, in turn: reading, resizing and drawing cost the same with either.

    Args:
        models: as `Models` says.
        picture: uint8 RGB (H, W, 3).
        repeats: measured calls of each, after one that warms up.
    """
    calls = {
        role: partial(model.segmenter.network, model.segmenter.network_input(picture))
        for role, model in models.items()
    }
    threads = torch.get_num_threads()
    return interleaved(calls, [], repeats, threads, warm_up=1, progress=False)
