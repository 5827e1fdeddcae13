"""Which columns of a table are the images and the masks, and its names of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kd_trainer.data.listing import did_you_mean
from kd_trainer.errors import clipped

_USUAL = {
    "image": ("image", "pixel_values", "img", "images"),
    "mask": (
        *("mask", "label", "annotation", "segmentation_mask", "labels", "segmentation"),
        *("masks", "annotations", "seg_mask", "ground_truth"),
    ),
}
ID2LABEL = "id2label.json"
_MOST_BYTES = 2**20


def find_columns(
    features: Mapping[str, Any], image_column: str, mask_column: str, name: str
) -> tuple[str, str]:
    """The columns of images and of masks, as named, else by type and usual names.

    Args:
        features: of the table, by column.
        image_column: of the images; the default, where it holds none, is looked for.
        mask_column: of the masks, likewise.
        name: of the data, for messages.

    Raises:
        ValueError: if a named column is missing or holds no images, or several could be meant;
            lists the columns.
    """
    if image_column == mask_column:
        raise ValueError(f"Expected two columns, got {image_column!r} for image and mask.")
    chosen: dict[str, str] = {}
    for side, column in (("image", image_column), ("mask", mask_column)):
        if column in features and _holds_images(features[column]):
            chosen[side] = column
        elif column != side:  # which is the default
            raise _no_column(features, column, side, name)
    for side, other in (("mask", "image"), ("image", "mask")):
        if side not in chosen:
            chosen[side] = _found(features, side, chosen.get(other), name)
    return chosen["image"], chosen["mask"]


def _found(features: Mapping[str, Any], side: str, taken: str | None, name: str) -> str:
    """The column of a side that nobody named: by its usual name, else the only one left."""
    images = [column for column in features if _is_image(features[column]) and column != taken]
    usual = [column for column in _USUAL[side] if column in images]
    others = {column for key, names in _USUAL.items() if key != side for column in names}
    left = usual or [column for column in images if column not in others]
    if not usual and taken is None and len(images) == 2 and len(left) == 2:
        return images[0 if side == "image" else 1]  # the image comes first
    if len(left) != 1:
        if not left:
            raise _no_column(features, side, side, name)
        raise ValueError(
            f"Expected one column of {side}s in {name}, got {', '.join(left)}. Name the one that "
            f"is meant with --{side}_column."
        )
    return left[0]


def _no_column(features: Mapping[str, Any], column: str, side: str, name: str) -> ValueError:
    if column in features:
        return ValueError(
            f"Expected images in the column {column!r} of {name}, got {features[column]}. Name "
            f"another column with --{side}_column."
        )
    return ValueError(
        f"Expected a column {column!r} in {name}, got {', '.join(features)}."
        f"{did_you_mean(column, features)} Name it with --{side}_column."
    )


def _holds_images(feature: Any) -> bool:
    """Whether a column can hold images: also as bytes or paths, if somebody names it."""
    value = isinstance(feature, datasets.Value) and feature.dtype in ("string", "binary")
    return value or _is_image(feature)


def _is_image(feature: Any) -> bool:
    """Whether a column holds images for certain; text may be paths, or anything else."""
    if isinstance(feature, datasets.Image):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def class_names_beside(dataset: str) -> list[str] | None:
    """The names in the `id2label.json` of a folder, or of a data set on the Hub; None without.

    Raises:
        ValueError: if there is such a file, and it is none.
    """
    path = Path(dataset)
    if path.exists():
        file = (path if path.is_dir() else path.parent) / ID2LABEL
    else:
        try:
            file = Path(hf_hub_download(dataset, ID2LABEL, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError, ValueError):
            return None  # no such file; a data set that is not there either is found when loaded
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return None
    return names_of_ids(file)


def names_of_ids(file: Path) -> list[str]:
    """The names in a json of ids and names, in the order of the ids, which begin at 0."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        names = {int(number): name for number, name in dict(content).items()}
        if sorted(names) != list(range(len(names))) or not names:
            raise ValueError("ids that are not 0, 1, 2, ...")
        if not all(isinstance(name, str) and name for name in names.values()):
            raise ValueError("names that are no text")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"Expected the name of each class by its number in {file}, got {clipped(str(error))}. "
            "Mend it or remove it."
        ) from None
    return [names[number] for number in range(len(names))]
