"""Folders of images and masks, however they are nested: one rule instead of a list of layouts.

The path of each folder is read as words: of a split (train, val, testing, ...), of masks (masks,
labels, annot, gtFine, ...), of images (images, img, JPEGImages, ...), and the rest. Folders of the
same split and the same rest are partners, whichever comes first in their paths, and also where the
words are glued together (`trainannot`, `train_masks`, `imagesTr`). A folder whose words say nothing
of images is one of images if it has a partner. Without a partner a folder may hold both.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from kd_trainer.data.listing import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    list_images,
    list_masks,
    split_names,
)
from kd_trainer.data.pairing import (
    IMAGE_WORDS,
    MASK_WORDS,
    Pair,
    divide_files,
    pair_files,
)

MOST_ENTRIES = 5_000_000
"""Files and folders below a data set that are looked at: about ten seconds."""

_DEEPEST = 8
# Words of a path, as the split is called in what follows.
SPLIT_WORDS = {
    **{word: word for word in ("train", "training", "val", "valid", "validation", "dev")},
    **{word: word for word in ("test", "testing")},
    **{"tr": "train", "ts": "test", "eval": "validation", "evaluation": "validation"},
}
# What lies beside the masks of large data sets and is none: other pictures of the same classes.
OTHER_WORDS = frozenset(
    {"color", "colors", "colour", "colours", "colored", "coloured", "instance", "instances"}
    | {"instanceids", "object", "overlay", "overlays", "preview", "previews", "visualization"}
    | {"visualizations", "vis", "viz", "depth", "disparity", "edge", "edges", "polygons"}
)
# Of DRIVE: its `mask` is where the camera sees anything, its `2nd_manual` another's opinion.
_BY_HAND = "1st_manual"
_FILLERS = frozenset({"dir", "dirs", "folder", "data", "set", "files", "of", "and", "the"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_FIRST_WORD = re.compile(r"[^\W\d_]+")
_GLUED = re.compile(
    rf"(?:(?P<s1>{'|'.join(SPLIT_WORDS)})(?P<k1>{'|'.join(MASK_WORDS | IMAGE_WORDS)})"
    rf"|(?P<k2>{'|'.join(MASK_WORDS | IMAGE_WORDS)})(?P<s2>{'|'.join(SPLIT_WORDS)}))"
)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on the disk, as it was read.

    Attributes:
        name: of the kind, as `--layout` takes it.
        description: what was found where, in a few words.
        splits: what gives the pairs of each split, by its name there; nothing is listed before.
        flags: that say the same (`image_folder`, `mask_folder`, ...).
        without_masks: folders of images for which there are no masks, by split.
        class_names: of all classes, where the layout itself decides them.
        mask_values: the value of each class in the files, likewise.
        ignored_values: further values, of pixels that count nowhere.
    """

    name: str
    description: str
    splits: Mapping[str, Callable[[], list[Pair]]]
    flags: Mapping[str, str] = field(default_factory=dict)
    without_masks: Mapping[str, Path] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    mask_values: tuple[int, ...] | None = None
    ignored_values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A folder with image files in it, and what its path says.

    Attributes:
        path: of the folder.
        parts: of its path below the data set.
        split: name of the split, or None.
        kind: `masks`, `images`, `other`, or None where no word says it.
        rest: the other words of the path.
        family: the part that says the kind, `*` in the place of the split: `*_masks`.
    """

    path: Path
    parts: tuple[str, ...]
    split: str | None
    kind: str | None
    rest: tuple[str, ...]
    family: str

    @property
    def pattern(self) -> str:
        """Its path with SPLIT in the place of the split."""
        return "/".join(_starred(part, "SPLIT") for part in self.parts) or "."


def walk(root: Path) -> Iterator[tuple[Path, tuple[str, ...], bool]]:
    """Every folder below `root` that holds images or masks; what systems leave is none of them.

    Each with the parts of its path, and whether it holds images: a mask may be an array (.npy).

    Links to folders are followed, but for those that lead to a folder they lie in.

    Raises:
        ValueError: if there is more than anybody would keep in one data set.
    """
    waiting: list[tuple[Path, tuple[str, ...], tuple[str, ...]]]
    waiting, seen = [(root, (), (os.path.realpath(root),))], 0
    while waiting:
        folder, parts, above = waiting.pop()
        has_images = has_arrays = False
        with os.scandir(folder) as entries:
            for entry in entries:
                seen += 1
                if entry.name.startswith((".", "@", "#", "$", "__")):
                    continue
                ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                if ending in IMAGE_SUFFIXES:
                    has_images = has_images or entry.is_file()
                elif ending in MASK_SUFFIXES:
                    has_arrays = has_arrays or entry.is_file()
                elif len(parts) < _DEEPEST and entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in above:
                        waiting.append((Path(entry.path), (*parts, entry.name), (*above, real)))
        if seen > MOST_ENTRIES:
            raise ValueError(
                f"Expected at most {MOST_ENTRIES:,} files below {root}, got more. Name the folder "
                "of the data set itself as --dataset."
            )
        if has_images or has_arrays:
            yield folder, parts, has_images


def words_of(part: str) -> list[str]:
    """The words of a part of a path, in lower case, glued ones apart.

    >>> words_of("trainannot"), words_of("labelsTr"), words_of("ISIC_Training_GroundTruth")
    (['train', 'annot'], ['labels', 'tr'], ['isic', 'training', 'groundtruth'])
    """
    whole = re.sub(r"[\W_]+", "", part).lower()
    if whole in MASK_WORDS | IMAGE_WORDS:
        return [whole]
    words: list[str] = []
    for word in map(str.lower, _WORD.findall(part)):
        glued = None if word in SPLIT_WORDS else _GLUED.fullmatch(word)
        if words and words[-1] + word == "groundtruth":
            words[-1] += word
        elif glued:
            words += [text for text in glued.groups() if text]
        else:
            words.append(word)
    return words


def classify(
    path: Path,
    parts: tuple[str, ...],
    named: Mapping[str, str | None],
    splits: Sequence[str],
) -> Folder:
    """Read the path of a folder.

    Args:
        path: of the folder.
        parts: of its path below the data set.
        named: `images` and `masks`: what the user says these folders are called, or None.
        splits: further names of splits.
    """
    split = kind = None
    rest: list[str] = []
    family, left = "", parts
    for name, pattern in named.items():
        if pattern is not None and (found := _matching(parts, pattern)) is not None:
            kind, family = name, pattern
            left = (*parts[: found.start], *parts[found.stop :])
            split = next(map(split_in, filter(split_in, parts[found])), None)
    chosen = kind is not None
    for part in left:
        if part in splits:
            split = part
            continue
        words = words_of(part)
        if not chosen:
            of_part = _kind_of(words, named)
            kind, family = (of_part, _starred(part, "*")) if of_part else (kind, family)
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), split)
        known = SPLIT_WORDS.keys() | MASK_WORDS | IMAGE_WORDS | _FILLERS
        rest += [word for word in words if word not in known]
    return Folder(path, parts, split, kind, tuple(rest), family)


def _kind_of(words: Sequence[str], named: Mapping[str, str | None]) -> str | None:
    if OTHER_WORDS & {*words}:
        return "other"
    # Where the user names the masks, no other folder is one, whatever it is called.
    kinds = {"masks": MASK_WORDS, "images": IMAGE_WORDS}
    for kind, known in kinds.items():
        if known & {*words}:
            return kind if named.get(kind) is None else "other"
    return None


def _matching(parts: tuple[str, ...], pattern: str) -> slice | None:
    """Where in a path a folder of this name (or names with slashes, or with `*`) is."""
    wanted = [name for name in pattern.split("/") if name]
    for start in range(len(parts) - len(wanted) + 1):
        found = slice(start, start + len(wanted))
        if all(map(fnmatchcase, parts[found], wanted)):
            return found
    return None


def split_in(part: str) -> str | None:
    """The split that a part of a path, or a column, names; None if it names none."""
    return next((SPLIT_WORDS[word] for word in words_of(part) if word in SPLIT_WORDS), None)


def _starred(part: str, star: str) -> str:
    """A part of a path with `star` in the place of the name of its split."""
    for word in words_of(part):
        if word in SPLIT_WORDS:
            at = part.lower().rindex(word)
            return part[:at] + star + part[at + len(word) :]
    return part


def read_folders(
    root: Path, *, image_folder: str | None, mask_folder: str | None, splits: Sequence[str]
) -> Layout | None:
    """Find the folders of images and of masks of each split; None if there are no masks.

    Args:
        root: of the data set.
        image_folder: what the folders of images are called, or None.
        mask_folder: what those of masks are called, or None.
        splits: names of splits that were asked for.

    Raises:
        ValueError: if the folders can be read in several ways; lists them.
    """
    found = sorted(walk(root), key=lambda folder: folder[1])
    drawn = any(_BY_HAND in parts for _, parts, _ in found)
    named = {"images": image_folder, "masks": mask_folder or (_BY_HAND if drawn else None)}
    above = _common_parts([parts for _, parts, _ in found])
    folders = []
    for path, parts, has_images in found:
        folder = classify(path, parts[above:], named, splits)
        if folder.kind == "masks" or (has_images and folder.kind != "other"):
            folders.append(folder)
    partners, faults = _partners(root, folders)
    couples = {**partners, **_both_in_one(folders, partners)}
    if not couples and faults:
        raise next(iter(faults.values()))
    if not couples:
        return None
    names = {folder.split for folder in couples}
    if "train" in names or "training" in names:  # what lies beside the splits is in none of them
        names -= {None}
        faults.pop(None, None)
    by_split = {
        name or "train": [pair for pair in couples.items() if pair[0].split == name]
        for name in sorted(names, key=str)
    }
    readers = {name: partial(_pairs_of, pairs) for name, pairs in by_split.items()}
    in_names = _splits_in_names(couples) if names == {None} else set()
    readers |= {name: partial(_pairs_of, by_split["train"], name) for name in in_names}
    left_over = [f for f in folders if f not in couples and f not in partners.values()]
    without = {f.split: f.path for f in left_over if f.split and f.kind != "masks"}
    images, masks = next(iter(couples.items()))
    flags = {"image_folder": images.family, "mask_folder": masks.family}
    return Layout(
        "folders",
        _described(images, masks) + (", names begin with their split" if in_names else ""),
        readers | {name or "train": partial(_raise, fault) for name, fault in faults.items()},
        {name: family for name, family in flags.items() if family},
        {name: path for name, path in without.items() if name not in by_split},
    )


def _common_parts(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all paths begin with that say nothing: the folders of an archive."""
    count = 0
    for names in zip(*(parts[:-1] for parts in paths), strict=False):
        if len({*names}) > 1 or split_in(names[0]):
            break
        count += 1
    return count


def _partners(
    root: Path, folders: Sequence[Folder]
) -> tuple[dict[Folder, Folder], dict[str | None, ValueError]]:
    """The folder of masks of each folder of images, by split and the rest of their paths.

    And what is wrong with a split, to be said when it is asked for.
    """
    couples: dict[Folder, Folder] = {}
    faults: dict[str | None, ValueError] = {}

    def couple(key: Callable[[Folder], Any]) -> None:
        done = {folder.split for folder in couples}
        groups: dict[Any, list[Folder]] = defaultdict(list)
        for folder in folders:
            if folder.split not in done:
                groups[key(folder)].append(folder)
        for group in groups.values():
            try:
                couples.update(_couple(root, group))
            except ValueError as error:
                faults[group[0].split] = error

    couple(lambda folder: (folder.split, folder.rest))
    couple(lambda folder: folder.split)  # the rest may differ where there is one of each
    return couples, faults


def _couple(root: Path, group: Sequence[Folder]) -> dict[Folder, Folder]:
    """The one folder of images with the one of masks, if both kinds are there.

    Raises:
        ValueError: if there are several of a kind.
    """
    kinds = {kind: [f for f in group if f.kind == kind] for kind in ("images", "masks", None)}
    sides = {"images": kinds["images"] or kinds[None], "masks": kinds["masks"]}
    if not all(sides.values()):
        return {}
    # In a pair folder these two are the ones, whatever else lies there.
    usual = {kind: [f for f in found if f.parts[1:] == (kind,)] for kind, found in sides.items()}
    sides = usual if all(usual.values()) else sides
    for (kind, folders), flag in zip(sides.items(), ("image_folder", "mask_folder"), strict=True):
        if len(folders) > 1:
            paths = [str(folder.path.relative_to(root)) for folder in folders]
            names = [folder.family or folder.parts[-1] for folder in folders]
            names = names if names[0] != names[1] else ["/".join(f.parts) for f in folders]
            raise ValueError(
                f"Expected one folder of {kind} in {root}, got {len(folders)}: "
                f"{', '.join(paths[:4])}{' ...' if len(paths) > 4 else ''}. Say which with "
                f"--{flag} {names[0]!r} or --{flag} {names[1]!r}."
            )
    return {sides["images"][0]: sides["masks"][0]}


def _both_in_one(
    folders: Sequence[Folder], partners: Mapping[Folder, Folder]
) -> dict[Folder, Folder]:
    """Folders that hold images and masks, in the splits that have no folders of masks."""
    paired = {folder.split for folder in partners}
    alone = [folder for folder in folders if folder.split not in paired]
    return {folder: folder for folder in alone if divide_files(_files(folder.path))[1]}


def _files(folder: Path) -> list[Path]:
    return list_images(folder, IMAGE_SUFFIXES | MASK_SUFFIXES)


def _described(images: Folder, masks: Folder) -> str:
    if images is masks:
        return f"images and masks in {images.pattern}"
    return f"images in {images.pattern}, masks in {masks.pattern}"


def _raise(fault: ValueError) -> list[Pair]:
    raise fault


def _pairs_of(couples: Sequence[tuple[Folder, Folder]], split: str | None = None) -> list[Pair]:
    """The pairs of folders, all or those whose images are called after a split."""
    pairs = (pair for images, masks in couples for pair in pairs_in(images.path, masks.path))
    return [pair for pair in pairs if split is None or _split_of_name(pair[0]) == split]


def _split_of_name(image: Path) -> str | None:
    """`train` of `train_0.jpg`; None if the name begins with no split."""
    word = _FIRST_WORD.match(image.stem)
    return None if word is None else SPLIT_WORDS.get(word[0].lower())


def _splits_in_names(couples: Mapping[Folder, Folder]) -> set[str]:
    """The splits that all images are called after, if one of several is to be trained on."""
    splits: set[str | None] = set()
    for images, masks in couples.items():
        files = (
            divide_files(_files(images.path))[0] if images is masks else list_images(images.path)
        )
        splits |= {_split_of_name(file) for file in files}
    named = {split for split in splits if split is not None}
    return (
        named if named == splits and len(named) > 1 and named & {*split_names("train")} else set()
    )


def pairs_in(image_folder: Path, mask_folder: Path) -> list[Pair]:
    """The images of a folder with their masks, in the order of their names; reads no file.

    Args:
        image_folder: whose files count, not those of the folders in it.
        mask_folder: likewise, or the same folder.

    Raises:
        ValueError: if there are no images, a name is there twice, or a partner is missing.
    """
    if image_folder == mask_folder:
        images, masks = divide_files(_files(image_folder))
    else:
        images, masks = list_images(image_folder), list_masks(mask_folder)
    if not images:
        raise ValueError(
            f"Expected images in {image_folder}, got an empty split. Files directly in that folder "
            "count (jpg, png, webp, bmp, tif, gif), deeper ones do not."
        )
    return pair_files(images, masks, mask_folder)
