"""What the sources share: the columns, lists of files, and errors that suggest the nearest name."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from kd_trainer.data.decoding import image_shape

FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# JPEG is lossy: its masks hold values that nobody wrote.
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"})
MAX_STREAM_SHARDS = 64
_SAMPLE = 200  # photographs without masks whose first bytes are read before a run


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the option nearest to `name`, else nothing."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def missing_path(path: Path, what: str) -> FileNotFoundError:
    """The error for a path that is not there: names the deepest part that is, and the nearest."""
    parent = path.absolute().parent
    missing = path.absolute()
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    suggestion = did_you_mean(missing.name, (p.name for p in parent.iterdir()))
    return FileNotFoundError(
        f"Expected {what} at {path}, got nothing there. {parent} exists, {missing.name!r} in it "
        f"does not.{suggestion}"
    )


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files directly in `folder`, sorted by name (so that row numbers never change)."""
    allowed = frozenset(suffixes)
    found = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in allowed and not p.name.startswith(".")
    )
    for path in found:
        # A half of a surrogate pair stands for a byte that is no UTF-8, which no table can store.
        odd = [c for c in path.name if unicodedata.category(c) in ("Cc", "Cs")]
        if odd:
            raise ValueError(
                f"Expected file names in UTF-8 without control characters, got {path.name!a} in "
                f"{folder}. Rename the file."
            )
    return found


def show_names(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def path_dataset(images: Sequence[Path], masks: Sequence[Path | None]) -> datasets.Dataset:
    """A data set of paths; nothing is read."""
    rows = {
        "image": [_cell(p) for p in images],
        "mask": [None if p is None else _cell(p) for p in masks],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def _cell(path: Path) -> dict[str, str | None]:
    return {"path": str(path), "bytes": None}


def unlabelled_dataset(folder: str, *, look: bool = True) -> datasets.Dataset:
    """The photographs of a folder, each with the mask None.

    Args:
        folder: that holds the files themselves.
        look: read the first bytes of a sample spread over them.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no images, or one of the sample is none.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise missing_path(path, "a folder of photographs (--unlabelled)")
    images = list_images(path)
    if not images:
        inside = show_names(subfolders(path)) or "nothing"
        raise ValueError(
            f"Expected photographs in {path} (--unlabelled), got none; its folders are: {inside}. "
            "Name the folder that holds the files."
        )
    count = min(_SAMPLE, len(images)) if look else 0
    for index in (len(images) * i // count for i in range(count)):
        image_shape(_cell(images[index]), index)
    return path_dataset(images, [None] * len(images))
