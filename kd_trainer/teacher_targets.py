"""Cached targets of a run: the teacher sees each clean image before the training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from kd_trainer.arguments import DistillationArguments
from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.data.images import EncodedImage, image_name, read_image_bytes
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.fields import expanded, parse_size
from kd_trainer.processes import run_on_all_ranks
from kd_trainer.teacher import HALF_TYPES, Teacher, TeacherInference
from kd_trainer.teacher_cache import (
    CacheBudget,
    CacheWriter,
    TeacherCache,
    cache_file,
    cache_key,
    image_digest,
    show_size,
)


def cache_root(args: DistillationArguments) -> Path:
    """The folder that holds a cache file a teacher."""
    if args.teacher_cache is not None:
        return Path(args.teacher_cache)
    users = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(users) / "kd_trainer" / "teacher_logits"


def use_cached_targets(
    args: DistillationArguments,
    teacher: Teacher,
    datasets: Sequence[TransformedDataset | StreamedDataset | None],
) -> None:
    """Fill the cache with what is missing in it, and let the data sets read it.

    All processes of a run call this and share the work. The teacher ends on the CPU.

    Args:
        args: where the cache lies, how large it may get, and the precision of the run.
        teacher: is asked.
        datasets: of one image size, for training and evaluation; they get their targets. None
            stands for one that the run does not have.

    Raises:
        ValueError: if the logits do not fit the bound; or if an image changes meanwhile.
        OSError: if they cannot be written.
    """
    began, images = time.monotonic(), _Images(datasets)
    key = images.key(teacher, args)
    bound = parse_size(args.teacher_cache_size, "teacher_cache_size")
    budget = CacheBudget(cache_root(args), bound)
    file, rows, new = cache_file(budget.root, key), images.rows(args), 0

    def fill() -> None:
        nonlocal new
        writer = CacheWriter(
            file,
            key,
            budget,
            rows,
            images.read,
            _inference(teacher, args),
            # One by one on a CPU, where it costs nothing: rounding would depend on the company.
            batch_size=1 if args.device.type == "cpu" else args.per_device_eval_batch_size,
            threads=max(1, args.dataloader_num_workers),
        )
        new = writer.fill(rank=args.process_index, world_size=args.world_size, quiet=_quiet(args))

    run_on_all_ranks(args, fill)
    teacher.to("cpu")
    binary = teacher.num_labels == 2 and not teacher.multi_label
    classes = 1 if binary else teacher.num_labels
    cache = TeacherCache(file, (classes, *images.transform.image_size))
    for dataset in images.datasets:
        dataset.transform.targets = cache
    if args.process_index == 0:
        taken, took = show_size(budget.used()[file]), time.monotonic() - began
        print(
            f"teacher cache: {len(rows):,} images, {new:,} of them new, in {took:.0f} s; "
            f"{taken} in {file}",
            flush=True,
        )


def _quiet(args: DistillationArguments) -> bool | None:
    return True if args.disable_tqdm or args.process_index else None


class _Images:
    """The images of all data sets of a run, numbered through."""

    def __init__(self, datasets: Sequence[TransformedDataset | StreamedDataset | None]) -> None:
        self.datasets = [data for data in datasets if isinstance(data, TransformedDataset)]
        self.transform = self.datasets[0].transform
        self._rows = [(data, index) for data in self.datasets for index in range(len(data))]

    def key(self, teacher: Teacher, args: DistillationArguments) -> dict[str, Any]:
        """What decides the teacher's logits of these images."""
        return cache_key(
            teacher,
            image_size=self.transform.image_size,
            keep_aspect_ratio=self.transform.resize != "stretch",
            precision=args.mixed_precision or "no",
            folded=args.fold_teacher,
            own_depth=self.transform.channels is not None,
        )

    def _file(self, row: int) -> tuple[EncodedImage, int]:
        """Bytes and path of an image, and its number in its own data set."""
        data, index = self._rows[row]
        image = data.dataset[index]["image"]
        content = read_image_bytes(image, image_name(image, index))
        return {"bytes": content, "path": image.get("path")}, index

    def _digest(self, row: int) -> bytes:
        return image_digest(self._file(row)[0]["bytes"])

    def read(self, row: int) -> tuple[bytes, Tensor]:
        """Digest of the file, and the image as `clean_image` gives it."""
        image, index = self._file(row)
        return image_digest(image["bytes"]), self.transform.clean_image(image, index)

    def rows(self, args: DistillationArguments) -> dict[bytes, int]:
        """Number of an image by its digest; the processes of a run read a share each."""
        share = range(args.process_index, len(self._rows), args.world_size)
        pairs: list[tuple[bytes, int]] = []

        def read() -> None:
            with ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
                digests = pool.map(self._digest, share)
                bar = tqdm(digests, "read images", len(share), unit="image", disable=_quiet(args))
                pairs.extend(zip(bar, share, strict=True))

        run_on_all_ranks(args, read)
        return dict(gather_object(pairs))


def _inference(teacher: Teacher, args: DistillationArguments) -> Callable[[Tensor], Tensor]:
    """From pixels to logits, asked as an online training asks."""
    device = args.device
    teacher.to(device)
    ask = TeacherInference(teacher, precision=args.mixed_precision, fold=args.fold_teacher)
    statistics = pixel_statistics(teacher, device)
    dtype = HALF_TYPES.get(args.mixed_precision)

    def infer(pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return ask(normalise(pixels.to(device), statistics))

    return infer
