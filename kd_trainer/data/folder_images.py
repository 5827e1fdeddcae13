"""The pictures and videos that a command line names, and what to call what is made of them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kd_trainer.data.images import decode_image
from kd_trainer.data.listing import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_pictures(sources: Sequence[str]) -> list[Path]:
    """Pictures and videos that files, folders (searched deeply) and globs name, in order, once.

    Raises:
        FileNotFoundError: if a source names neither.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            here = [path]
        else:
            inside = (
                path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))  # noqa: PTH207
            )
            known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
            here = sorted(p for p in inside if p.suffix.lower() in known)
        if not here:
            raise FileNotFoundError(
                f"Expected a picture, a folder of pictures or a glob, got {source}, which names "
                "none. Put a glob in quotes."
            )
        found |= dict.fromkeys(here)
    return list(found)


def read_picture(path: Path) -> Image.Image:
    """A picture as the training reads it: RGB, upright, white where it is transparent.

    Raises:
        ValueError: if the file is no readable picture.
    """
    return Image.fromarray(decode_image({"path": str(path), "bytes": None}, 0))


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file; two of the same stem get their folder or suffix into it."""
    stems = [p.stem for p in files]
    names: dict[Path, str] = {}
    for path in files:
        name = path.stem
        if stems.count(name) > 1:
            name = "_".join([path.parent.name, path.stem, path.suffix[1:]]).strip("_")
        number, unique = 1, name
        while unique in names.values():
            number += 1
            unique = f"{name}_{number}"
        names[path] = unique
    return names
