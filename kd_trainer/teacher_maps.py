"""Maps in a folder as a teacher: what any tool has written, by the stem of the image.

They take the way of cached logits: read with each image, moved as its mask is.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.data.images import image_name, image_shape
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.files import read_regular
from kd_trainer.models.image_processing import fitted_size
from kd_trainer.models.image_sizes import Size
from kd_trainer.teacher import Teacher

_SUFFIXES = (".png", ".npy")
_MOST_BYTES = 2**30  # of one file
_PROBED = 32  # maps that show whether values are classes or probabilities
_SHOWN = 3
_ROW = re.compile(r" \(row \d+\)$")  # what `image_name` adds to the path of an image in a table

Half = npt.NDArray[np.float16]


class MapTeacher(Teacher):
    """Stands for the teacher that is not here: its answers come with the samples.

    Args:
        digest: of the maps, by which a run is recognised as by the weights of a network.
        num_labels: of the student.
        id2label: likewise.
    """

    from_samples = True

    def __init__(self, digest: bytes, *, num_labels: int, id2label: dict[int, str]) -> None:
        network = nn.Module()
        network.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        super().__init__(network, num_labels=num_labels, id2label=id2label)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Refuse: nothing here can look at an image.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"Expected the teacher's maps with the images, got {len(pixel_values)} images alone. "
            "Maps of --teacher_maps are known for the images of the run only."
        )


@dataclass(frozen=True)
class TeacherMaps:
    """Reads the maps of images as logits.

    Attributes:
        files: the map of each image, by the image's name.
        classes: K, 1 for a binary student.
        size: (H, W) of the samples in pixels.
        ids: whether the whole numbers of a binary map are class ids, not levels of probability.
        keep_aspect_ratio: whether samples do, with a padding at the right and below.
    """

    files: Mapping[str, Path]
    classes: int
    size: Size
    ids: bool
    keep_aspect_ratio: bool = False

    def logits(self, data: bytes, name: str) -> Half:
        """float16 (K, H, W) for the image that messages call `name`.

        Raises:
            ValueError: if its map cannot be read as one of these classes.
        """
        file, content = self.files[name], self.size
        if self.keep_aspect_ratio:
            content = fitted_size(image_shape({"bytes": data, "path": name}, 0), self.size)
        levels = read_map(file)
        bits = 16 if levels.dtype.kind == "f" or levels.dtype.itemsize > 1 else 8
        maps = probabilities(levels, classes=self.classes, ids=self.ids, file=file)
        padding = (0, self.size[1] - content[1], 0, self.size[0] - content[0])
        return np.asarray(F.pad(as_logits(maps, content, bits), padding).numpy(), np.float16)


def as_logits(probability: Tensor, size: Size, bits: int) -> Tensor:
    """Logits (K, *size) of probabilities (K, H, W), which keep 2^-bits away from 0 and 1.

    Resized as the images are, before the logarithm.
    """
    if probability.shape[-2:] != size:
        probability = F.interpolate(
            probability[None], size, mode="bilinear", align_corners=False, antialias=True
        )[0]
    least = 2.0**-bits
    if len(probability) == 1:
        return probability.clamp(least, 1 - least).logit()
    probability = probability.clamp(min=least)
    return (probability / probability.sum(0)).log()


def probabilities(levels: npt.NDArray[Any], *, classes: int, ids: bool, file: Path) -> Tensor:
    """Probabilities (K, H, W) of what a map holds.

    Args:
        levels: (H, W) or (K, H, W); whole numbers are levels up to the largest of their type, or
            class ids, fractions lie in 0..1.
        classes: K, 1 for a binary student, whose map may also have a channel for each class.
        ids: whether whole numbers in a binary map are class ids.
        file: for messages.

    Raises:
        ValueError: if it is a map of something else.
    """
    whole = levels.dtype.kind in "biu"
    if levels.ndim == 2 and whole and (classes > 1 or ids or levels.dtype.kind == "b"):
        highest, known = int(levels.max(initial=0)), max(classes, 2)
        if highest >= known:
            raise _wrong(file, f"class ids 0 to {known - 1}", f"{highest}")
        one_hot = F.one_hot(torch.from_numpy(levels.astype(np.int64)), known)
        found = one_hot.permute(2, 0, 1).float()
        return found[1:] if classes == 1 else found
    top = float(np.iinfo(levels.dtype).max) if whole else 1.0
    values = torch.from_numpy(np.asarray(levels, np.float32) / np.float32(top))
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise _wrong(file, "probabilities in 0..1 (not logits)", "others, or NaN")
    values = values[None] if values.ndim == 2 else values
    if len(values) not in ((1, 2) if classes == 1 else (classes,)):
        shape = f"({classes}, H, W)" if classes > 1 else "(H, W) or (2, H, W)"
        raise _wrong(file, f"probabilities {shape}", f"the shape {tuple(levels.shape)}")
    if len(values) > 1:
        values = values / values.sum(0, keepdim=True).clamp(min=1e-6)
    return values[1:] if classes == 1 and len(values) == 2 else values


def _wrong(file: Path, wanted: str, got: str) -> ValueError:
    return ValueError(f"Expected {wanted} in the teacher's map {file}, got {got}. Write it anew.")


def read_map(file: Path) -> npt.NDArray[Any]:
    """The numbers of a map: (H, W) of a PNG, (H, W) or (K, H, W) of a `.npy` file.

    Raises:
        ValueError: if it cannot be read, or is no such array.
    """
    content = read_regular(file, _MOST_BYTES)
    if file.suffix.lower() != ".npy":
        return decode_mask({"bytes": content, "path": str(file)}, 0)
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, in_columns, dtype = read(stream)
        # Looked at before anything of that size is made.
        if dtype.kind not in "biuf" or len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"{dtype} {shape}")
        values = np.frombuffer(content, dtype, offset=stream.tell())
        array = values.reshape(shape, order="F" if in_columns else "C")
    except (ValueError, OverflowError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _wrong(file, "numbers (H, W) or (K, H, W)", reason) from error
    return array


def use_teacher_maps(
    folder: str, datasets: Sequence[TransformedDataset | StreamedDataset | None], labels: list[str]
) -> MapTeacher:
    """Let data sets read their teacher's answers from a folder.

    Args:
        folder: with a map for each image, by its stem; where several have one stem, each lies in
            a folder that is named on the path of its image, such as that of the split.
        datasets: of one image size, for training and evaluation; they get their targets.
        labels: names of the student's classes.

    Returns:
        What stands for the teacher.

    Raises:
        FileNotFoundError: if there is no such folder, or no map of an image.
        ValueError: if an image has two maps, two images share one, or a map cannot be read.
    """
    present = [data for data in datasets if isinstance(data, TransformedDataset)]
    files = _needed(Path(folder), present)
    probed = (read_map(file) for file in islice(files.values(), _PROBED))
    ids = all(array.dtype.kind in "biu" and array.max(initial=0) <= 1 for array in probed)
    classes = 1 if len(labels) == 2 else len(labels)
    for data in present:
        transform = data.transform
        keep = transform.resize != "stretch"
        transform.targets = TeacherMaps(files, classes, transform.image_size, ids, keep)
    digest = hashlib.sha256()
    for file in sorted(files.values(), key=lambda file: file.name):
        digest.update(f"{file.name}\n".encode())
        digest.update(hashlib.sha256(read_regular(file, _MOST_BYTES)).digest())
    names = dict(enumerate(labels))
    return MapTeacher(digest.digest(), num_labels=len(labels), id2label=names)


def _needed(folder: Path, datasets: Iterable[TransformedDataset]) -> dict[str, Path]:
    """The map of each image, by the image's name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder as --teacher_maps, got none at {folder}.")
    by_stem: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in _SUFFIXES:
            by_stem.setdefault(file.stem, []).append(file)
    rows = ((data.dataset[i]["image"], i) for data in datasets for i in range(len(data)))
    names = list(dict.fromkeys(image_name(cell, index) for cell, index in rows))
    found = {name: _map_beside(name, by_stem.get(_path(name).stem, []), folder) for name in names}
    taken = {file for file in found.values() if file is not None}
    for name in (name for name, file in found.items() if file is None):
        others = [file for file in by_stem.get(_path(name).stem, []) if file not in taken]
        found[name] = others[0] if len(others) == 1 else None
    missing = [name for name, file in found.items() if file is None]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise FileNotFoundError(
            f"Expected a map (STEM.png or STEM.npy) of every image in {folder}, got none of "
            f"{', '.join(missing[:_SHOWN])}{more}. Write them, or take the images away."
        )
    images: dict[Path, str] = {}
    files = {name: file for name, file in found.items() if file is not None}
    for name, file in files.items():
        if other := images.get(file):
            raise ValueError(
                f"Expected a map for each image, got {file} for {other} and {name}. Put the maps "
                "of each split into a folder of its name."
            )
        images[file] = name
    return files


def _map_beside(name: str, files: Sequence[Path], folder: Path) -> Path | None:
    """Of the maps with the stem of an image, that whose folders are also on the image's path."""
    parts = set(_path(name).parts)
    beside = [file for file in files if parts.issuperset(file.relative_to(folder).parent.parts)]
    if len(beside) > 1:
        raise ValueError(
            f"Expected one map of {name}, got {' and '.join(map(str, beside))}. Take one away."
        )
    return beside[0] if beside else None


def _path(name: str) -> Path:
    return Path(_ROW.sub("", name))
