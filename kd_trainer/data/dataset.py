"""From a row to the tensors of a sample, the map-style data set of samples, and its batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_trainer.data.augmentation import OUTSIDE, Augmentation, StrongView
from kd_trainer.data.channels import Channels
from kd_trainer.data.images import (
    BadSample,
    BadSampleError,
    EncodedImage,
    decode_image,
    image_name,
    read_image_bytes,
)
from kd_trainer.data.masks import MaskRule
from kd_trainer.data.planes import PlaneRule
from kd_trainer.data.views import STRONG, STRONG_STREAM, Views
from kd_trainer.models.image_processing import PADDING, fitted_size, resize_image, to_input
from kd_trainer.models.image_sizes import AnySize, Size, as_size

Pixel = TypeVar("Pixel", bound=np.generic)


@cache
def one_thread_per_worker(process: int) -> None:
    """Keep cv2 to one thread in a DataLoader worker: the workers are the parallelism there.

    Threads of cv2 do not survive the fork that makes a worker either. The number of the process
    is the cache's key, because a fork inherits the cache.
    """
    del process
    if torch.utils.data.get_worker_info() is not None:
        cv2.setNumThreads(0)


class TeacherTargets(Protocol):
    """Where the teacher's logits of an image are found by the bytes of its file."""

    def logits(self, data: bytes, name: str) -> npt.NDArray[np.float16]:
        """float16 (K, H, W) for the file `data`, which messages call `name`."""
        ...


SCALES = (0.5, 2.0)
"""Between which `crop` scales an image that fits the input: the usual range (DeepLab, mmseg)."""


class SegmentationTransform:
    """Turns a row with an `image` and a `mask` into a sample.

    The image goes through `resize_image`, the same resize as in evaluation and deployment,
    and the mask through nearest neighbour; then one random draw changes both. What is missing at
    the right or below is padded last, so that augmentation never moves or colours the padding.

    Args:
        image_size: of the sample in pixels.
        rule: how mask values are read.
        resize: `stretch`, `fit` (keep the aspect ratio, pad) or `crop` (of the fitted image, scaled
            by a random factor, a random part of the input's size).
        augmentation: `heavy`, `light` or `none`.
        seed: first of the three numbers (seed, epoch, index) that decide a draw.
        brightness_contrast_probability: of that group in `heavy`.
        channels: how images are read that are not 8-bit RGB; samples then hold normalised floats.
        scales: between which the image in its input size is scaled at random, before a random part
            of the input's size is taken; None leaves it whole, but for `crop`.
        views: strong views of each sample, and how it is mixed with another.

    Attributes:
        targets: the teacher's logits of the clean images; None leaves them out of the samples.
        eval_size: of `DataArguments`; with another than `input` image and mask stay as large as
            they are, for an evaluation image by image.

    Raises:
        ValueError: if `augmentation` is unknown or `seed` negative.
    """

    targets: TeacherTargets | None = None
    eval_size: str = "input"

    def __init__(
        self,
        image_size: AnySize,
        rule: MaskRule | PlaneRule,
        *,
        resize: str = "stretch",
        augmentation: str,
        seed: int,
        brightness_contrast_probability: float,
        channels: Channels | None = None,
        scales: tuple[float, float] | None = None,
        views: Views | None = None,
    ) -> None:
        self.channels = channels
        self.image_size = as_size(image_size)
        self.rule = rule
        self.resize = resize
        self.scales = scales or (SCALES if resize == "crop" else None)
        self.views, self.strong_view = views or Views(), StrongView()
        self.augment = Augmentation(
            augmentation,
            image_size=self.image_size,
            seed=seed,
            brightness_contrast_probability=brightness_contrast_probability,
            floats=channels is not None,
            colours=not self.views.strong,
        )

    def __call__(self, row: Mapping[str, Any], *, epoch: int, index: int) -> dict[str, Tensor]:
        """Make the sample of one row.

        Args:
            row: cells `image` and `mask` (None for an image without one).
            epoch: the epoch, from 0.
            index: number of the row in its data set.

        Returns:
            `pixel_values` uint8 (3, H, W) RGB, with `channels` normalised float32 (C, H, W);
            `labels` uint8 (H, W), or (K, H, W) of a `PlaneRule`, with the rule's `ignore_index`;
            `distil_mask` bool (H, W): True where the labels count, and on a image without a mask on
            every pixel that is not from outside of it. With `targets` also `teacher_logits` float16
            (K, H, W), moved as the mask is; with `views` what `_views` says.

        Raises:
            BadSampleError: if a file is unreadable, the sizes of image and mask differ, or the
                mask holds values that the rule does not know. The message names the file.
        """
        one_thread_per_worker(os.getpid())
        targets: dict[str, Tensor] = {}
        cell, logits = self._with_targets(row["image"], index)
        image = self._image(cell, index)
        labels = self._labels(row, image.shape[:2], index)
        view = self._view(image.shape[:2], epoch=epoch, index=index)
        size = self.image_size if self.eval_size == "input" else view.size
        pixels = resize_image(torch.from_numpy(image).permute(2, 0, 1), *view.size)
        mask = view.part(resize_labels(labels, view.size))
        clean = view.part(pixels.permute(1, 2, 0).numpy()), mask.astype(np.int16)
        if logits is None:
            changed, changed_mask = self.augment(*clean, epoch=epoch, index=index)
        else:
            # torch converts half precision ten times as fast as numpy.
            maps = torch.from_numpy(logits).float().permute(1, 2, 0).contiguous().numpy()
            maps = view.part(resized_maps(maps, self.content_size(image.shape[:2]), view.size))
            changed, changed_mask, maps = self.augment.with_logits(
                *clean, maps, epoch=epoch, index=index
            )
            maps = padded(maps, size, [0] * maps.shape[-1])
            moved = torch.from_numpy(np.ascontiguousarray(maps)).half()
            targets = {"teacher_logits": moved.permute(2, 0, 1).contiguous()}
        shown = self._views(changed, size, [self.augment.seed, epoch, index])
        changed = padded(changed, size, PADDING if self.channels is None else 0)
        changed_mask = padded(changed_mask, size, OUTSIDE)
        inside = changed_mask != OUTSIDE  # (H, W, K) of planes, all of which move together
        ignored = changed_mask.astype(np.uint8)
        ignored[~inside] = self.rule.ignore_index
        # With a mask the teacher is followed where the labels count; without one everywhere.
        labelled = row.get("mask") is not None
        followed = ignored != self.rule.ignore_index if labelled else inside
        if ignored.ndim == 3:
            ignored, followed = planes(ignored), followed.any(axis=2)
        return {
            "pixel_values": torch.from_numpy(planes(changed)),
            "labels": torch.from_numpy(ignored),
            "distil_mask": torch.from_numpy(followed),
            **targets,
            **shown,
        }

    def _views(
        self, image: npt.NDArray[np.uint8], size: Size, numbers: list[int]
    ) -> dict[str, Tensor]:
        """What the student sees in place of an image (H, W, 3) without padding: see `Views`.

        Returns:
            `strong_views` uint8 (V, 3, H, W), where there are any; and that of `Views.draw_mix`.
        """
        mixing = self.views.draw_mix(numbers, size)
        if not self.views.strong:
            return mixing
        strong = (
            self.strong_view(image, [*numbers, STRONG_STREAM, view])
            for view in range(self.views.strong)
        )
        stacked = np.stack([planes(padded(view, size, PADDING)) for view in strong])
        return {STRONG: torch.from_numpy(stacked), **mixing}

    def clean_image(self, cell: EncodedImage, index: int) -> Tensor:
        """An image as every network sees it before any augmentation, uint8 (3, H, W).

        With `channels` normalised float32 (C, H, W).
        """
        image = torch.from_numpy(self._image(cell, index)).permute(2, 0, 1)
        return to_input(image, self.image_size, keep_aspect_ratio=self.resize != "stretch")

    def _image(self, cell: EncodedImage, index: int) -> npt.NDArray[Any]:
        if self.channels is None:
            return decode_image(cell, index)
        return self.channels.image(cell, index)

    def content_size(self, shape: tuple[int, ...]) -> Size:
        """(height, width) of an image of this shape in the input, without the padding."""
        if self.resize == "stretch":
            return self.image_size
        return fitted_size((shape[0], shape[1]), self.image_size)

    def _view(self, shape: tuple[int, ...], *, epoch: int, index: int) -> View:
        """The part of an image of this shape that a sample shows; a function of the numbers."""
        if self.eval_size != "input":
            own = shape[0], shape[1]
            return View(own, 0, 0, own)
        fitted = self.content_size(shape)
        if self.scales is None:
            return View(fitted, 0, 0, fitted)
        # The 1 makes it another stream than that of the augmentation, of the first three numbers.
        draw = np.random.default_rng([self.augment.seed, epoch, index, 1])
        factor = draw.uniform(*self.scales)
        height, width = (max(1, round(side * factor)) for side in fitted)
        wanted = min(height, self.image_size[0]), min(width, self.image_size[1])
        top, left = (
            int(draw.integers(0, side - part + 1))
            for side, part in zip((height, width), wanted, strict=True)
        )
        return View((height, width), top, left, wanted)

    def _with_targets(
        self, cell: EncodedImage, index: int
    ) -> tuple[EncodedImage, npt.NDArray[np.float16] | None]:
        """The image's cell, read but once, and the teacher's logits where they are known."""
        if self.targets is None:
            return cell, None
        name = image_name(cell, index)
        data = read_image_bytes(cell, name)
        return {"bytes": data, "path": cell.get("path")}, self.targets.logits(data, name)

    def _labels(
        self, row: Mapping[str, Any], shape: tuple[int, ...], index: int
    ) -> npt.NDArray[np.uint8]:
        cell = row.get("mask")
        if isinstance(self.rule, PlaneRule):
            return self.rule.planes(cell, index, shape)
        if cell is None:
            return np.full(shape, self.rule.ignore_index, np.uint8)
        mask = self.rule.decode(cell, index)
        check_same_size(row, index, mask=mask.shape, image=shape)
        return self.rule.labels(mask, image_name(cell, index))


def resize_labels(labels: npt.NDArray[np.uint8], size: Size) -> npt.NDArray[np.uint8]:
    """Class ids (H, W), or planes (H, W, K), at the size of the training.

    What is thinner than a pixel may go.
    """
    resized = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(np.uint8)


@dataclass(frozen=True)
class View:
    """What a sample shows of an image: a part of it at another size.

    Attributes:
        size: (height, width) that the whole image is brought to.
        top: where the part begins.
        left: likewise.
        shape: (height, width) of the part.
    """

    size: Size
    top: int
    left: int
    shape: Size

    def part(self, maps: npt.NDArray[Pixel]) -> npt.NDArray[Pixel]:
        """That part of an array (H, W, ...) of the whole."""
        height, width = self.shape
        rows, columns = slice(self.top, self.top + height), slice(self.left, self.left + width)
        return np.ascontiguousarray(maps[rows, columns])


def resized_maps(
    maps: npt.NDArray[np.float32], content: Size, size: Size
) -> npt.NDArray[np.float32]:
    """Logits (H, W, K) of a clean input without those of its padding, at another size, linearly."""
    maps = maps[: content[0], : content[1]]
    if content == size:
        return maps
    bands = [  # cv2 takes at most four channels at a time
        cv2.resize(band, size[::-1], interpolation=cv2.INTER_LINEAR)
        for band in np.moveaxis(maps, -1, 0)
    ]
    return np.stack(bands, axis=-1).astype(np.float32)


def padded(maps: npt.NDArray[Pixel], size: Size, value: Any) -> npt.NDArray[Pixel]:
    """An array (H, W, ...) with `value` at the right and below, up to `size`."""
    height, width = maps.shape[:2]
    if (height, width) == size:
        return maps
    result = np.empty((*size, *maps.shape[2:]), maps.dtype)
    result[:] = value
    result[:height, :width] = maps
    return result


def planes(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Channels first: (H, W, C) to (C, H, W), four times as fast as numpy's transposed copy."""
    height, width, channels = image.shape
    result = np.empty((channels, height, width), image.dtype)
    cv2.split(image, list(result))
    return result


def check_same_size(
    row: Mapping[str, Any], index: int, *, mask: tuple[int, ...], image: tuple[int, ...]
) -> None:
    """Refuse a mask (H, W) whose size is not that of its image (H, W).

    Raises:
        BadSampleError: names both files.
    """
    if mask == image:
        return
    turned = " The image is turned by its EXIF orientation; turn the mask too."
    hint = turned if mask == image[::-1] else " Make the mask again from this image."
    raise BadSampleError(
        f"Expected a mask of {image[1]}x{image[0]} pixels like its image "
        f"{image_name(row['image'], index)}, got {mask[1]}x{mask[0]} in "
        f"{image_name(row['mask'], index)}.{hint}"
    )


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of equal size.

    Args:
        samples: dicts of `pixel_values` (3, H, W), `labels` (H, W) or (K, H, W), `distil_mask`
            (H, W), and the `teacher_logits` (K, H, W) where they are cached; what else they hold is
            stacked likewise.

    Returns:
        The same names with a leading batch axis; bytes stay bytes, the trainer normalises them.
    """
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def padding_like(sample: dict[str, Tensor], ignore_index: int) -> dict[str, Tensor]:
    """A sample of the same shapes without a pixel that counts."""
    return sample | {
        "labels": torch.full_like(sample["labels"], ignore_index),
        "distil_mask": torch.zeros_like(sample["distil_mask"]),
    }


class SharedEpoch:
    """An epoch number in shared memory, so that persistent workers see it change."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """Set the epoch for all processes that hold this object."""
        if epoch < 0:
            raise ValueError(f"Expected an epoch >= 0, got {epoch}.")
        self._value.fill_(epoch)

    def get(self) -> int:
        """The epoch that was set last, 0 at first."""
        return int(self._value)


class TransformedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples of a `datasets.Dataset` with the columns `image` and `mask`.

    Args:
        dataset: rows by number, and a length.
        transform: makes a sample of a row.
        bad_samples: what was left out of it.
    """

    def __init__(
        self, dataset: Any, transform: SegmentationTransform, bad_samples: Sequence[BadSample] = ()
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.bad_samples = list(bad_samples)
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next draws; call it before the DataLoader's iterator is made."""
        self._epoch.set(epoch)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epoch.get()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """The sample of row `index` in the current epoch.

        Of a pair the second number says how often the epoch has shown the row before: each time it
        is drawn as if it were another row.
        """
        index, turn = index if isinstance(index, tuple) else (index, 0)
        index = range(len(self))[index]  # a negative index means the same row, so the same draw
        draw = index + turn * len(self)
        return self.transform(self.dataset[index], epoch=self.epoch, index=draw)
