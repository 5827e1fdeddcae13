"""From images of any size to logits of the same size, whole or in tiles.

Everything is averaged and resized as logits and thresholded last, so that edges stay smooth and
tiles, mirrored looks and plain predictions are cut at the same probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.evaluation import (
    Evaluator,
    Measured,
    Statistics,
    normalise,
    pixel_statistics,
    raw_logits,
)
from kd_trainer.export import OnnxStudent
from kd_trainer.models.image_processing import at_image_size, to_input
from kd_trainer.models.image_sizes import AnySize, Size, as_size
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.panels import overlay
from kd_trainer.students import keeps_aspect_ratio
from kd_trainer.teacher import Teacher

Network = Callable[[Tensor], Tensor]
"""Normalised floats (B, 3, H, W) to raw logits (B, K, H, W)."""

RgbImage = np.ndarray
"""uint8 RGB (H, W, 3)."""


@dataclass(frozen=True)
class Segmenter:
    """A network together with how images are shown to it.

    Args:
        network: normalised floats (B, 3, H, W) to raw logits (B, K, H, W) on the same device.
        image_size: of the input in pixels.
        statistics: mean and std for values 0..255, each (1, 3, 1, 1), on the network's device.
        keep_aspect_ratio: fit images in and pad them, instead of stretching them.
        tile: cut images that are larger than the input into tiles at their own resolution,
            instead of shrinking them.
        overlap: share of a tile that its neighbour sees too, 0 to below 1.
        flip: average with the prediction for the mirrored image; takes twice as long.
        batch_size: inputs the network sees at a time.
    """

    network: Network
    image_size: Size
    statistics: Statistics
    keep_aspect_ratio: bool = False
    tile: bool = False
    overlap: float = 0.25
    flip: bool = False
    batch_size: int = 4

    @torch.no_grad()
    def logits(self, images: Sequence[RgbImage]) -> list[Tensor]:
        """Raw logits (K, H, W) of each image at its own size, fp32 on the network's device."""
        whole = [p for p in images if not self._in_tiles(p)]
        found = iter(self._whole(whole))
        return [self._tiled(p) if self._in_tiles(p) else next(found) for p in images]

    def network_input(self, image: RgbImage) -> Tensor:
        """What the network sees of a whole image: normalised floats (1, 3, h, w)."""
        pixels = self._input(image)[None]
        return normalise(pixels.to(self.statistics[0].device), self.statistics)

    def _in_tiles(self, image: RgbImage) -> bool:
        height, width = self.image_size
        return self.tile and (image.shape[0] > height or image.shape[1] > width)

    def _whole(self, images: Sequence[RgbImage]) -> Iterator[Tensor]:
        inputs = [self._input(p) for p in images]
        for raw, image in zip(self._batches(inputs), images, strict=True):
            size = (image.shape[0], image.shape[1])
            yield at_image_size(raw[None], size, keep_aspect_ratio=self.keep_aspect_ratio)[0]

    def _input(self, image: RgbImage) -> Tensor:
        pixels = _channels_first(image)
        return to_input(pixels, self.image_size, keep_aspect_ratio=self.keep_aspect_ratio)

    def _tiled(self, image: RgbImage) -> Tensor:
        """Weighted mean of the tiles' logits; a tile counts most where it sees most around."""
        height, width = image.shape[:2]
        tall, wide = self.image_size
        padded = _channels_first(_padded(image, self.image_size))
        tiles = [
            (slice(top, top + tall), slice(left, left + wide))
            for top in tile_starts(padded.shape[1], tall, self.overlap)
            for left in tile_starts(padded.shape[2], wide, self.overlap)
        ]
        device = self.statistics[0].device
        weight = _ramp(tall, device)[:, None] * _ramp(wide, device)[None, :]
        total: Tensor | None = None
        weights = weight.new_zeros(padded.shape[1:])
        pixels = [padded[:, rows, columns] for rows, columns in tiles]
        for (rows, columns), raw in zip(tiles, self._batches(pixels), strict=True):
            if total is None:
                total = raw.new_zeros((raw.shape[0], *padded.shape[1:]))
            total[:, rows, columns] += raw * weight
            weights[rows, columns] += weight
        assert total is not None
        return (total / weights)[:, :height, :width]

    def _batches(self, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits (K, h, w) of each uint8 input (3, h, w), in order."""
        device = self.statistics[0].device
        for start in range(0, len(inputs), self.batch_size):
            pixels = torch.stack(list(inputs[start : start + self.batch_size])).to(device)
            images = normalise(pixels, self.statistics)
            raw = self.network(images).float()
            if self.flip:
                raw = (raw + self.network(images.flip(-1)).float().flip(-1)) / 2
            # NaN is no class, but argmax and a threshold make one of it.
            if not raw.isfinite().all():
                raise ValueError(
                    "Expected finite logits, got NaN or infinity from the model. Its weights or "
                    "its normalisation are broken: export or train it anew."
                )
            yield from raw


def tile_starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles of `side` pixels start, evenly spread so that they cover `length` pixels.

    Neighbours overlap by at least the share `overlap` of a tile. `length` is at least `side`.
    """
    step = max(1, int(side * (1 - overlap)))
    count = 1 + -(-(length - side) // step)
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def _ramp(length: int, device: torch.device) -> Tensor:
    """1, 2, 3 up to the middle and down to 1 again."""
    ramp = torch.arange(length, device=device, dtype=torch.float32)
    return torch.minimum(ramp + 1, length - ramp)


def _padded(image: RgbImage, size: Size) -> RgbImage:
    """At least of this size: what is missing mirrors the image's lower right edges."""
    missing = [(0, max(0, s - n)) for s, n in zip(size, image.shape[:2], strict=True)]
    return np.pad(image, [*missing, (0, 0)], mode="symmetric") if any(map(any, missing)) else image


def _channels_first(image: RgbImage) -> Tensor:
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)


def classes_at(logits: Tensor, threshold: float = 0.5) -> np.ndarray:
    """Class of each pixel, uint8 (H, W).

    Args:
        logits: raw logits (K, H, W); K up to 2 is foreground from `threshold` on, else the largest.
        threshold: probability between 0 and 1, of a binary model.
    """
    if len(logits) <= 2:  # the difference of two softmax logits is the logit of the second class
        foreground = logits[0] if len(logits) == 1 else logits[1] - logits[0]
        classes = foreground.sigmoid() >= threshold
    else:
        classes = logits.argmax(dim=0)
    return np.asarray(classes.to(torch.uint8).cpu().numpy())


def soft_map(logits: Tensor, *, multi_label: bool = False) -> np.ndarray:
    """Probabilities of an image, as `--teacher_maps` reads them.

    Args:
        logits: raw logits (K, H, W).
        multi_label: whether a pixel may have several of the labels.

    Returns:
        For K up to 2 that of the foreground, uint16 (H, W) from 0 to 65535, else (and of several
        labels a pixel) those of all classes, float16 (K, H, W).
    """
    if multi_label:
        return np.asarray(logits.float().sigmoid().half().cpu().numpy())
    if len(logits) > 2:
        return np.asarray(logits.float().softmax(dim=0).half().cpu().numpy())
    foreground = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    share = foreground.double().sigmoid() * np.iinfo(np.uint16).max
    return np.asarray(share.round().cpu().numpy().astype(np.uint16))


def torch_segmenter(model: Measured, image_size: AnySize, **looks: Any) -> Segmenter:
    """A network as it is shown images, on the GPU if there is one.

    Args:
        model: put there, and into eval mode.
        image_size: of its input in pixels.
        **looks: further fields of `Segmenter`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed = model.eval().to(device)
    statistics = pixel_statistics(model, device)
    keep = keeps_aspect_ratio(model.network if isinstance(model, Teacher) else model)
    size = as_size(image_size)
    return Segmenter(lambda images: raw_logits(placed, images), size, statistics, keep, **looks)


@dataclass
class NativeEvaluator(Evaluator):
    """An evaluator that answers for each image at its own size, one image at a time.

    Args:
        image_size: of the input in pixels.
        keep_aspect_ratio: fit images in and pad them, instead of stretching them.
        tile: read larger images by overlapping windows, instead of shrinking them.
    """

    image_size: Size = (640, 640)
    keep_aspect_ratio: bool = False
    tile: bool = False
    one_by_one: ClassVar[bool] = True

    @torch.no_grad()
    def logits(self, pixels: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """Raw logits (1, K, H, W) of each network for one uint8 image (1, 3, H, W).

        `targets` are the teacher's where they come with the samples.
        """
        image = pixels[0].permute(1, 2, 0).cpu().numpy()
        found = {STUDENT: self._segmenter(self.student).logits([image])[0][None]}
        if self.teacher is None:
            return found
        if self.teacher.from_samples and targets is not None:
            return found | {TEACHER: targets.to(self.device).float()}
        return found | {TEACHER: self._segmenter(self.teacher).logits([image])[0][None]}

    def _segmenter(self, network: Measured) -> Segmenter:
        return Segmenter(
            partial(raw_logits, network),
            self.image_size,
            self.statistics,
            self.keep_aspect_ratio,
            tile=self.tile,
        )


def evaluator_for(
    dataset: TransformedDataset | StreamedDataset,
    student: Measured,
    teacher: Teacher | None,
    ignore_index: int,
    device: torch.device | str,
) -> Evaluator:
    """The evaluator for the samples of a data set: of the input's size, or of their own."""
    transform = dataset.transform
    if transform.eval_size == "input":
        return Evaluator(student, teacher, ignore_index, device)
    return NativeEvaluator(
        student,
        teacher,
        ignore_index,
        device,
        image_size=transform.image_size,
        keep_aspect_ratio=transform.resize != "stretch",
        tile=transform.eval_size == "windows",
    )


def onnx_segmenter(exported: OnnxStudent, **looks: Any) -> Segmenter:
    """An ONNX file as it is shown images, on the CPU; `looks` are further fields."""
    statistics = (_pixels(exported.image_mean), _pixels(exported.image_std))
    keep = exported.keep_aspect_ratio
    return Segmenter(onnx_network(exported), exported.image_size, statistics, keep, **looks)


def _pixels(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values)).view(1, -1, 1, 1) * 255


def onnx_network(exported: OnnxStudent) -> Network:
    """An ONNX file as the network of a `Segmenter`: normalised floats to raw logits."""
    mean, std = _pixels(exported.image_mean), _pixels(exported.image_std)

    def logits(images: Tensor) -> Tensor:
        if not exported.with_preprocessing:
            return torch.from_numpy(exported(images.numpy()))
        # It takes images and gives probabilities: undo what the file does itself.
        raw_images = (images * std + mean).permute(0, 2, 3, 1)
        raw_images = raw_images / 255 if exported.own_depth else raw_images.round().to(torch.uint8)
        probability = torch.from_numpy(exported(raw_images.numpy())).double()
        binary = probability.shape[1] == 1 or exported.multi_label
        # A softmax may underflow to 0, whose logarithm would spread as NaN in a resize.
        smallest = torch.finfo(torch.float32).tiny
        raw = probability.logit(eps=1e-12) if binary else probability.clamp(min=smallest).log()
        return raw.float()

    return logits


def planes_at(logits: Tensor, threshold: float = 0.5) -> np.ndarray:
    """Of a model with several labels a pixel: uint8 (K, H, W), 1 from `threshold` on."""
    return np.asarray((logits.sigmoid() >= threshold).to(torch.uint8).cpu().numpy())


def render(output: str, image: np.ndarray, mask: np.ndarray, num_labels: int) -> np.ndarray:
    """One kind of output for an image.

    Args:
        output: a name of OUTPUTS.
        image: uint8 RGB (H, W, 3).
        mask: class ids, uint8 (H, W), or planes (K, H, W); of these no `masks`.
        num_labels: of the model, background included.

    Returns:
        uint8 (H, W), (H, W, 3) or (H, W, 4).
    """
    if output == "masks":
        return mask * 255 if num_labels == 2 else mask
    if output == "overlays":
        return overlay(image, mask, num_labels=num_labels)
    found = mask.any(axis=0) if mask.ndim == 3 else mask > 0
    opaque = np.where(found, 255, 0).astype(np.uint8)
    return np.dstack([image, opaque])
