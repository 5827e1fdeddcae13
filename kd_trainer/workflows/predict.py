"""Masks and overlays of a saved student for a file, a folder or a glob."""

from __future__ import annotations

import glob
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from kd_trainer.data.decoding import decode_photograph
from kd_trainer.evaluation import labels_of
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.image_processing import SmpImageProcessor
from kd_trainer.modeling import SmpForSemanticSegmentation
from kd_trainer.reports.panels import overlay
from kd_trainer.workflows.assemble import load_student

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


@dataclass
class PredictArguments:
    """Settings of scripts/predict.py."""

    model: str = help_field("", "Saved student: a folder or a Hub id.")
    output_dir: str = help_field("runs/predictions", "Gets masks/ and overlays/.")
    batch_size: int = help_field(4, "Images at a time.")
    threshold: float = help_field(0.5, "Probability from which a pixel of a binary model is kept.")
    overlays: bool = help_field(True, "Also write the pictures with their classes tinted.")

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"Expected --threshold between 0 and 1 (both excluded), got {self.threshold}."
            )
        check_at_least("batch_size", self.batch_size, 1)
        check_folder("output_dir", self.output_dir)


def find_pictures(sources: Sequence[str]) -> list[Path]:
    """The pictures that files, folders (searched deeply) and globs name, in order, once each.

    Raises:
        FileNotFoundError: if a source names no picture.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            here = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            here = [path]
        else:
            here = sorted(
                p
                for p in map(Path, glob.glob(source, recursive=True))  # noqa: PTH207
                if p.suffix.lower() in SUFFIXES
            )
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
    return Image.fromarray(decode_photograph({"path": str(path), "bytes": None}, 0))


@torch.no_grad()
def predict_masks(
    student: SmpForSemanticSegmentation,
    processor: SmpImageProcessor,
    pictures: Sequence[Image.Image],
    *,
    threshold: float = 0.5,
) -> list[np.ndarray]:
    """Class of each pixel of each picture, uint8 (H, W) at the picture's own size.

    The logits are resized, not the mask, so that edges stay smooth.
    """
    device = next(student.parameters()).device
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)
    raw = student(pixel_values=pixels)["raw_logits"].float()
    masks = []
    for logits, picture in zip(raw, pictures, strict=True):
        size = (picture.height, picture.width)
        large = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
        binary = len(large) == 1
        mask = large[0].sigmoid() >= threshold if binary else large.argmax(dim=0)
        masks.append(mask.to(torch.uint8).cpu().numpy())
    return masks


def predict(args: PredictArguments, sources: Sequence[str]) -> float:
    """Write `masks/<name>.png` (0/255 of a binary model, else class ids), `overlays/<name>.jpg`.

    Returns:
        Images per second, reading and writing included.
    """
    pictures = find_pictures(sources)
    student = load_student(args.model).eval()
    student.to("cuda" if torch.cuda.is_available() else "cpu")
    processor, labels = (
        SmpImageProcessor.from_model_config(student.config),
        len(labels_of(student)),
    )
    names = _output_names(pictures)
    output, start = Path(args.output_dir), time.perf_counter()
    with tqdm(total=len(pictures), desc="predict", unit="image", disable=None) as bar:
        for batch in _batches(pictures, args.batch_size):
            images = [read_picture(path) for path in batch]
            masks = predict_masks(student, processor, images, threshold=args.threshold)
            for path, image, mask in zip(batch, images, masks, strict=True):
                values = mask * 255 if labels == 2 else mask
                _write(Image.fromarray(values), output / "masks" / f"{names[path]}.png")
                if args.overlays:
                    tinted = overlay(np.asarray(image), mask, num_labels=labels)
                    _write(Image.fromarray(tinted), output / "overlays" / f"{names[path]}.jpg")
            bar.update(len(batch))
    return len(pictures) / (time.perf_counter() - start)


def _batches(pictures: list[Path], size: int) -> Iterator[list[Path]]:
    return (pictures[i : i + size] for i in range(0, len(pictures), size))


def _output_names(pictures: list[Path]) -> dict[Path, str]:
    """A name for each picture; two of the same stem get their folder or suffix into it."""
    stems = [p.stem for p in pictures]
    names: dict[Path, str] = {}
    for path in pictures:
        name = path.stem
        if stems.count(name) > 1:
            name = "_".join([path.parent.name, path.stem, path.suffix[1:]]).strip("_")
        number, unique = 1, name
        while unique in names.values():
            number += 1
            unique = f"{name}_{number}"
        names[path] = unique
    return names


def _write(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
