"""Photographs and masks to read from the disk: drawn ones, or those of a pair folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
from tqdm import tqdm

from benchmarks.arguments import StepArguments
from kd_trainer.data.synthetic import synthetic_pair

SHAPE = (480, 640)
"""Height and width of drawn pictures: those of a small photograph."""
COUNT = 64
_JPEG_QUALITY = 92


def draw_pairs(folder: Path, count: int = COUNT) -> Path:
    """Write JPEG photographs and PNG masks as a pair folder with the split `train`."""
    for kind in ("images", "masks"):
        (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), desc="drawing", unit="picture", disable=None):
        picture, mask = synthetic_pair("train", index, size=SHAPE[1], seed=0)
        name, rows = f"{index:04d}", slice(0, SHAPE[0])
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        image = folder / "train" / "images" / f"{name}.jpg"
        cv2.imwrite(str(image), cv2.cvtColor(picture[rows], cv2.COLOR_RGB2BGR), quality)
        cv2.imwrite(str(folder / "train" / "masks" / f"{name}.png"), mask[rows])
    return folder


@contextmanager
def pair_folder(args: StepArguments) -> Iterator[Path]:
    """The folder of `--dataset`, or a temporary one with drawn pictures."""
    if args.dataset is not None:
        count = len(pair_files(Path(args.dataset), args.train_split))
        if count < args.batch_size:
            raise ValueError(
                f"Expected at least {args.batch_size} pictures for a batch, got {count} in "
                f"{args.dataset}. Lower --batch_size, or name a larger folder."
            )
        yield Path(args.dataset)
        return
    with TemporaryDirectory(prefix="kd_trainer-benchmark-") as folder:
        count = max(COUNT, 2 * args.batch_size)
        yield draw_pairs(Path(folder), count)


def pair_files(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Photograph and mask of each pair.

    Raises:
        FileNotFoundError: if there are none, or a mask is missing.
    """
    masks = {path.stem: path for path in (folder / split / "masks").glob("*")}
    images = sorted((folder / split / "images").glob("*"))
    missing = next((path for path in images if path.stem not in masks), None)
    if not images or missing is not None:
        got = f"no photographs in {folder / split / 'images'}"
        if missing is not None:
            got = f"no mask of {missing.name}"
        raise FileNotFoundError(
            f"Expected a pair folder as --dataset, got {got}. Put photographs into "
            "SPLIT/images and masks of the same stem into SPLIT/masks."
        )
    return [(path, masks[path.stem]) for path in images]
