"""Where a COCO data set keeps its annotation files and photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_trainer.data.foreign_paths import is_inside
from kd_trainer.data.listing import MissingSplitError, missing_path, show_names


def file_for_split(path: Path, split: str, other_splits: Sequence[str]) -> Path:
    """The sibling of `path` for another split: the same name with the split's name exchanged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name of `path` holds no split's name.
    """
    for name in sorted((split, *other_splits), key=len, reverse=True):
        if name in path.name:
            sibling = path.with_name(path.name.replace(name, split))
            if not sibling.is_file():
                missing = missing_path(sibling, f"the file of split {split!r}")
                raise MissingSplitError(split, str(missing))
            return sibling
    names = " or ".join(repr(n) for n in (split, *other_splits))
    raise ValueError(
        f"Expected a file name that holds the split's name ({names}), got {path.name}. Rename the "
        "file, name the splits with --train_split and --eval_split, or pass the folder."
    )


def _candidates(root: Path, split: str) -> list[Path]:
    folder = root / "annotations"
    return [
        folder / f"{split}.json",
        folder / f"instances_{split}.json",
        root / f"{split}.json",
        root / f"instances_{split}.json",
        root / split / "_annotations.coco.json",
        root / split / "annotations.json",
    ]


def is_coco_folder(root: Path, splits: Sequence[str]) -> bool:
    """Whether a folder holds COCO annotations of one of the splits, or an `annotations` folder."""
    found = any(file.is_file() for split in splits for file in _candidates(root, split))
    return found or any((root / "annotations").glob("*.json"))


def find_annotations(path: Path, split: str, other_splits: Sequence[str]) -> Path:
    """The annotation file of a split, for a folder or a json file of any split.

    Raises:
        FileNotFoundError: if there is none; says where it was looked for.
    """
    if path.suffix == ".json":
        return file_for_split(path, split, other_splits)
    candidates = _candidates(path, split)
    for file in candidates:
        if file.is_file():
            return file
    found = sorted(p.name for p in (path / "annotations").glob("*.json"))
    raise MissingSplitError(
        split,
        f"Expected COCO annotations of split {split!r} at {candidates[0]} (or "
        f"annotations/instances_{split}.json), got {show_names(found) or 'no json file'}. Name "
        "the splits with --train_split and --eval_split.",
    )


def find_images(
    annotations: Path, path: Path, split: str, names: Sequence[str]
) -> tuple[Path, list[str]]:
    """The folder that holds the photographs `names`, and what each is called in it.

    Raises:
        FileNotFoundError: if no folder holds any of them, or one of them is missing.
        ValueError: if two names that lead out of the folder end in the same file.
    """
    beside = annotations.parent
    root = path if path.is_dir() else beside.parent if beside.name == "annotations" else beside
    places = (root / "images" / split, root / split / "images", root / split, root / "images")
    for folder in (*places, root, beside):
        found = {name: _name_in(folder, name) for name in names}
        missing = [name for name in names if found[name] is None]
        if names and len(missing) == len(names):
            continue
        if missing:
            raise FileNotFoundError(
                f"Expected each image of {annotations} in {folder}, got none for {len(missing)} of "
                f"{len(names)}: {show_names(missing)}. Add the files or remove their entries."
            )
        _check_own_files(found, annotations, folder)
        return folder, [found[name] or name for name in names]
    raise FileNotFoundError(
        f"Expected the images of {annotations} in one of {', '.join(map(str, places))}, got none "
        f"of {show_names(list(names))}. Move them there."
    )


def _name_in(folder: Path, name: str) -> str | None:
    """What the file of a `file_name` is called in a folder; never a place outside of it.

    Labelling tools write the paths of their own machine, absolute, upwards or of Windows. The
    longest end of such a path that is a file here is meant.
    """
    slashed = name.replace("\\", "/")
    readings = [name, slashed]
    if not is_inside(name) or "://" in name:
        parts = slashed.split("/")
        readings = ["/".join(parts[i:]) for i in range(len(parts)) if ".." not in parts[i:]]
    return next((r for r in readings if is_inside(r) and (folder / r).is_file()), None)


def _check_own_files(found: dict[str, str | None], annotations: Path, folder: Path) -> None:
    """Refuse two paths of another machine that would be one file here."""
    owners: dict[str | None, str] = {}
    for name, here in found.items():
        other = owners.setdefault(here, name)
        if other != name:
            raise ValueError(
                f"Expected each file_name of {annotations} to mean another file, got {other} and "
                f"{name}, which are both {here} in {folder}. Keep the folders of the names there."
            )
