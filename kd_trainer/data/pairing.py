"""Which mask belongs to which image, by the names of their files.

The names are equal but for the ending, or one has a word more (`x.jpg` with `x_mask.png`), or each
has a word of its own (`img_1.png` with `mask_1.png`). What was taken off is the same for all files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kd_trainer.data.listing import IMAGE_SUFFIXES, LOSSY_SUFFIXES, show_names

Pair = tuple[Path, Path]
"""An image and its mask."""
Key = Callable[[str], str | None]
"""From the stem of a file to what it shares with its partner; None if it has none by this rule."""

MASK_WORDS = frozenset(
    {"mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "anno"}
    | {"ann", "gt", "gts", "gtfine", "groundtruth", "groundtruths", "segmentation", "seg", "segs"}
    | {"segmentations", "segm", "segmentationclass", "target", "targets", "matte", "mattes"}
    | {"alpha", "trimap", "trimaps", "parsing", "labelids", "labeltrainids", "semantic"}
)
IMAGE_WORDS = frozenset(
    {"image", "images", "img", "imgs", "photo", "photos", "photograph", "photographs", "picture"}
    | {"pictures", "pic", "pics", "input", "inputs", "rgb", "jpegimages", "leftimg8bit", "sat"}
    | {"frame", "frames", "original", "originals"}
)


def _affixes(words: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The words in front of a name and behind it, with what separates them from it."""
    either = "|".join(sorted(words | {"ground_truth"}, key=len, reverse=True))
    flags = re.IGNORECASE
    return re.compile(rf"^(?:(?:{either})[\W_]+)+", flags), re.compile(
        rf"(?:[\W_]+(?:{either}))+$", flags
    )


_OF_MASKS, _OF_BOTH = _affixes(MASK_WORDS), _affixes(MASK_WORDS | IMAGE_WORDS)
_TRIED = 20  # images whose name may be a part of one mask's


def stem_of(file: Path) -> str:
    """The name without its ending. A Mac writes é as two characters, to the eye it is the same."""
    return unicodedata.normalize("NFC", file.stem)


def bare(stem: str) -> str:
    """A stem without words for images and masks at its ends.

    >>> bare("mask_0007"), bare("ISIC_1_segmentation"), bare("mask")
    ('0007', 'ISIC_1', 'mask')
    """
    front, back = _OF_BOTH
    return back.sub("", front.sub("", stem)) or stem


def divide_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images and the masks of a folder that holds both; without masks if it is none.

    Masks are arrays (.npy) or called so (`x_mask.png`, `mask_x.png`), or they are the lossless ones
    where each name is there twice (`x.jpg` and `x.png`).
    """
    front, back = _OF_MASKS
    arrays = [f for f in files if f.suffix.lower() not in IMAGE_SUFFIXES]
    masks = arrays or [f for f in files if front.search(f.stem) or back.search(f.stem)]
    if not masks:
        lossy = {stem_of(f) for f in files if f.suffix.lower() in LOSSY_SUFFIXES}
        masks = [f for f in files if f.suffix.lower() not in LOSSY_SUFFIXES]
        masks = masks if {stem_of(f) for f in masks} == lossy else []
    of_masks = set(masks)
    return [f for f in files if f not in of_masks], masks


def pair_files(images: Sequence[Path], masks: Sequence[Path], mask_folder: Path) -> list[Pair]:
    """Pair images and masks, in the order of the images; reads no file.

    Args:
        images: their files.
        masks: likewise.
        mask_folder: where the masks are, for messages.

    Raises:
        ValueError: if a partner is missing, or two files mean the same.
    """
    of_image, of_mask = find_naming([stem_of(i) for i in images], [stem_of(m) for m in masks])
    by_image = _by_key(images, of_image)
    by_mask = _by_key(masks, of_mask)
    _check_pairs(by_image, by_mask, mask_folder)
    return [(image, by_mask[key]) for key, image in by_image.items()]


def example(image: Path, mask: Path) -> str:
    """What an image and its mask are called; nothing if that is the same, in two folders."""
    if stem_of(image) == stem_of(mask) and image.parent != mask.parent:
        return ""
    return f"as {image.name} with {mask.name}"


def find_naming(images: Sequence[str], masks: Sequence[str]) -> tuple[Key, Key]:
    """By what names of images and of masks are alike.

    The first way in which all fit, else the one in which most do and at least half; else the names
    as they are, so that the message is about these.
    """
    best: tuple[Key, Key]
    best, most, least = (_as_it_is, _as_it_is), 0, (len(images) + 1) // 2
    for number, naming in enumerate(_namings(images, masks)):
        left, right = (
            _keys(stems, key) for stems, key in zip((images, masks), naming, strict=True)
        )
        if left is None or right is None:
            if number == 0:  # a name that is there twice is to be said of the names as they are
                break
            continue
        if left == right:
            return naming
        matched = len(left & right)
        if number == 0 or matched >= max(most + 1, least):
            best, most = naming, matched
    return best


def _as_it_is(stem: str) -> str | None:
    return stem


def _keys(stems: Sequence[str], key: Key) -> set[str] | None:
    """What the stems come to; None if two of them come to the same."""
    keys = [name for name in map(key, stems) if name is not None]
    return set(keys) if len(set(keys)) == len(keys) else None


def _namings(images: Sequence[str], masks: Sequence[str]) -> Iterator[tuple[Key, Key]]:
    yield _as_it_is, _as_it_is
    yield _as_it_is, _without_ending
    for mask in {masks[0]: None, masks[-1]: None} if masks else ():
        parts = sorted((i for i in images if i and i in mask), key=len, reverse=True)
        for image in parts[:_TRIED]:
            front, _, back = mask.partition(image)
            if _is_word(front[-1:], front) and _is_word(back[:1], back):
                yield _as_it_is, _cut(front, back)
    yield bare, bare
    if len(images) == len(masks) > 1:  # one of each has nothing in common but that it is one
        yield _cut(*_common(images)), _cut(*_common(masks))


def _without_ending(stem: str) -> str | None:
    """`x` of the mask `x.jpg.png`."""
    name, ending = os.path.splitext(stem)  # noqa: PTH122
    return name if ending.lower() in IMAGE_SUFFIXES else None


def _is_word(junction: str, text: str) -> bool:
    """Whether a text beside a name is a word of its own, and not a part of the name."""
    return not junction.isalnum() or text.lower() in MASK_WORDS


def _cut(front: str, back: str) -> Key:
    def key(stem: str) -> str | None:
        fits = stem.startswith(front) and stem.endswith(back)
        fits = fits and len(stem) > len(front) + len(back)
        return stem[len(front) : len(stem) - len(back)] if fits else None

    return key


def _common(stems: Sequence[str]) -> tuple[str, str]:
    """What all stems begin with, and what they end with.

    Where names of images and masks differ in a word only, what is left of both is the same, also
    where the numbers have digits in common.
    """
    front = os.path.commonprefix(list(stems))  # noqa: RUF071 (characters are what is compared)
    back = os.path.commonprefix([s[len(front) :][::-1] for s in stems])[::-1]  # noqa: RUF071
    return front, back


def _by_key(files: Sequence[Path], key: Key) -> dict[str, Path]:
    by_key: dict[str, Path] = {}
    for file in files:
        stem = stem_of(file)
        name = key(stem)
        # What does not fit the naming of the others stands for itself, and has no partner.
        name = stem if name is None else name
        if name in by_key:
            raise ValueError(
                f"Expected one file for each name, got {by_key[name].name} and {file.name} in "
                f"{file.parent}. Remove one, or rename it and give it a mask of its own name."
            )
        by_key[name] = file
    return by_key


def _other_side(names: dict[str, Path], partners: dict[str, Path], label: str) -> str:
    """A name of the other side, without a partner if there is one: it shows how names differ."""
    alone = [file.name for key, file in names.items() if key not in partners]
    shown = alone or [file.name for file in names.values()]
    return f" ({label if alone else 'there is'}: {shown[0]})" if shown else ""


def _check_pairs(images: dict[str, Path], masks: dict[str, Path], mask_folder: Path) -> None:
    unmarked = [file.name for key, file in images.items() if key not in masks]
    if unmarked:
        lossy = [p for p in sorted(mask_folder.iterdir()) if p.suffix.lower() in LOSSY_SUFFIXES]
        used = {*images.values(), *masks.values()}
        lossy = [path for path in lossy if path not in used]
        hint = f" {lossy[0].name} is no mask: JPEG changes values, store PNG." if lossy else ""
        raise ValueError(
            f"Expected a mask of the same stem for each image, got none in {mask_folder} for "
            f"{len(unmarked)} of {len(images)}: {show_names(unmarked)}"
            f"{_other_side(masks, images, 'masks without an image')}.{hint} Add the masks, or "
            "move the images to a folder of their own and pass it as --unlabelled."
        )
    orphans = [file.name for key, file in masks.items() if key not in images]
    if orphans:
        raise ValueError(
            f"Expected an image of the same stem for each mask, got none for {len(orphans)} of "
            f"{len(masks)} in {mask_folder}: {show_names(orphans)}"
            f"{_other_side(images, masks, 'the images')}. Add the images or remove the "
            "masks."
        )
