"""Data sets with bad files in them, and what has to be left when these are left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
from small_runs import SIDE, write_pairs

REASONS = {
    "cut": "readable image",
    "empty": "an empty file",
    "size": "Expected a mask of 64x64 pixels",
    "value": "Expected mask values among 0, 1, 255, got 7",
    "colour": "different colours",
}


def spoil(root: Path, name: str, fault: str) -> None:
    """Put a fault into one pair of the split `train`."""
    image, mask = (root / "train" / kind / f"{name}.png" for kind in ("images", "masks"))
    if fault == "cut":
        image.write_bytes(image.read_bytes()[:-200])
    elif fault == "empty":
        image.write_bytes(b"")
    elif fault == "size":
        cv2.imwrite(str(mask), np.zeros((SIDE, SIDE // 2), np.uint8))
    elif fault == "value":
        cv2.imwrite(str(mask), np.full((SIDE, SIDE), 7, np.uint8))
    elif fault == "colour":
        cv2.imwrite(str(mask), np.tile(np.uint8([0, 9, 200]), (SIDE, SIDE, 1)))


def spoiled_pairs(root: Path) -> tuple[Path, Path]:
    """A pair folder of 12 pairs with each fault of REASONS once, and one with the 7 good ones."""
    bad, good = write_pairs(root / "bad", train=12, validation=3), root / "good"
    shutil.copytree(bad, good)
    for number, fault in enumerate(REASONS):
        name = f"p {2 * number}"
        spoil(bad, name, fault)
        for kind in ("images", "masks"):
            (good / "train" / kind / f"{name}.png").unlink()
    return bad, good
