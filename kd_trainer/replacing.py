"""Folders that are written anew: only what a marker of ours names goes, once all is written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_trainer.safe_files import write_text

MARKER = ".kd_trainer.json"  # lists the files beside it that were written with it


def check_replaceable(folder: Path, flag: str, *, sources: Collection[Path] = ()) -> None:
    """Refuse a folder that holds anything but what `replacing` put there.

    Args:
        folder: to be written anew.
        flag: which names it.
        sources: folders that are read; neither they nor those above them are written to.

    Raises:
        ValueError: says what is in the way.
    """
    cure = f"Name another --{flag}."
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise ValueError(
            f"Expected a folder to write into, got {folder}, which is a {kind}. {cure}"
        )
    place = folder.resolve()
    held = {"the source": [s.resolve() for s in sources], "the working folder": [Path.cwd()]}
    for name, paths in held.items():
        for path in paths:
            if path == place or place in path.parents:
                relation = "is" if path == place else "holds"
                raise ValueError(
                    f"Expected a folder to write a copy into, got {folder}, which {relation} "
                    f"{name}. {cure}"
                )
    foreign = sorted(entries(folder) - marked(folder))
    if foreign:
        raise ValueError(
            f"Expected an empty folder or one that was written here before, got {folder}, which "
            f"holds {foreign[0]} of another origin. {cure[:-1]}, or empty it yourself."
        )


@contextmanager
def replacing(folder: Path, flag: str, *, sources: Collection[Path] = ()) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well.

    Raises:
        ValueError: as `check_replaceable` does.
    """
    check_replaceable(folder, flag, sources=sources)
    place = folder.resolve()
    new, old = (place.with_name(f".{place.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        mark(new, entries(new))
        check_replaceable(folder, flag, sources=sources)  # it may have changed meanwhile
        if place.exists():
            place.rename(old)
        new.rename(place)
    finally:
        _delete(new)
    _delete(old)


def entries(folder: Path) -> set[str]:
    """Names of all that is in a folder but real folders and the marker: links are not followed."""
    found = set()
    for root, folders, files in os.walk(folder):
        place = Path(root)
        links = [name for name in folders if (place / name).is_symlink()]
        found |= {str((place / name).relative_to(folder)) for name in (*files, *links)}
    return found - {MARKER}


def mark(folder: Path, names: Collection[str]) -> None:
    """Write down that these files were written here."""
    write_text(folder / MARKER, json.dumps({"files": sorted(names)}) + "\n")


def marked(folder: Path) -> set[str]:
    """Names of the files that were written here."""
    marker = folder / MARKER
    if marker.is_symlink() or not marker.is_file():
        return set()
    try:
        return {str(name) for name in json.loads(marker.read_text(encoding="utf-8"))["files"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return set()  # not ours, or cut off: nothing is known to be ours


def _delete(folder: Path) -> None:
    """Delete a folder of ours, whose entries were looked at; links go, not what they lead to."""
    if not folder.is_dir():
        return
    for name in (*entries(folder), MARKER):
        (folder / name).unlink(missing_ok=True)
    for root, _, _ in os.walk(folder, topdown=False):
        Path(root).rmdir()
