"""Cached targets of a run: the teacher looks at each clean image before the training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from kd_trainer.arguments import DistillationArguments
from kd_trainer.data import StreamedDataset, TransformedDataset, clean_picture
from kd_trainer.data.images import cell_name, read_cell
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.fields import expanded, parse_size
from kd_trainer.resuming import together
from kd_trainer.teacher import Answers, Teacher
from kd_trainer.teacher_cache import (
    Room,
    TargetCache,
    Work,
    about,
    describe,
    fill,
    folder_name,
    image_digest,
    show_size,
)
from kd_trainer.teacher_cache.shards import BUCKETS

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cache_root(args: DistillationArguments) -> Path:
    """The folder that holds the caches of all teachers."""
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
        ValueError: if the logits do not fit the bound; or if a photograph changes meanwhile.
        OSError: if they cannot be written.
    """
    began, pictures = time.monotonic(), _Pictures(datasets)
    size, asked = pictures.size, 0
    ingredients = about(
        teacher,
        image_size=size,
        precision=args.mixed_precision or "no",
        folded=args.fold_teacher,
    )
    room = Room(cache_root(args), parse_size(args.teacher_cache_size, "teacher_cache_size"))
    folder = room.root / folder_name(ingredients)
    images = pictures.numbers(args)

    def fill_it() -> None:
        nonlocal asked
        # One by one on a CPU, where it costs nothing: rounding would depend on the company.
        batch_size = 1 if args.device.type == "cpu" else args.per_device_eval_batch_size
        threads = max(1, args.dataloader_num_workers)
        work = Work(images, pictures.look, _asking(teacher, args), batch_size, threads)
        first = BUCKETS * args.process_index // args.world_size
        asked = fill(folder, work, room, first=first, quiet=_quiet(args))
        describe(folder, json.dumps(ingredients, indent=1))

    together(args, fill_it)
    teacher.to("cpu")
    cache = TargetCache(folder, (1 if teacher.num_labels == 2 else teacher.num_labels, size, size))
    for dataset in pictures.datasets:
        dataset.transform.targets = cache
    if args.process_index == 0:
        taken, took = show_size(room.used().get(folder, 0)), time.monotonic() - began
        print(
            f"teacher cache: {len(images):,} images, {asked:,} of them new, in {took:.0f} s; "
            f"{taken} in {folder}",
            flush=True,
        )


def _quiet(args: DistillationArguments) -> bool | None:
    return True if args.disable_tqdm or args.process_index else None


class _Pictures:
    """The photographs of all data sets of a run, numbered through."""

    def __init__(self, datasets: Sequence[TransformedDataset | StreamedDataset | None]) -> None:
        self.datasets = [data for data in datasets if isinstance(data, TransformedDataset)]
        self.size = self.datasets[0].transform.image_size

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def _cell(self, number: int) -> tuple[dict[str, Any], int]:
        for data in self.datasets:
            if number < len(data):
                return data.dataset[number]["image"], number
            number -= len(data)
        raise IndexError(number)

    def digest(self, number: int) -> bytes:
        """Digest of the file of a photograph."""
        cell, index = self._cell(number)
        return image_digest(read_cell(cell, cell_name(cell, index)))

    def look(self, number: int) -> tuple[bytes, Tensor]:
        """Digest of the file and uint8 (3, S, S) of a photograph."""
        cell, index = self._cell(number)
        data = read_cell(cell, cell_name(cell, index))
        known = {"bytes": data, "path": cell.get("path")}
        return image_digest(data), clean_picture(known, index, self.size)

    def numbers(self, args: DistillationArguments) -> dict[bytes, int]:
        """Number of a photograph by its digest; the processes of a run read a share each."""
        mine = range(args.process_index, len(self), args.world_size)
        pairs: list[tuple[bytes, int]] = []

        def read() -> None:
            with ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
                found = pool.map(self.digest, mine)
                bar = tqdm(found, "read images", len(mine), unit="image", disable=_quiet(args))
                pairs.extend(zip(bar, mine, strict=True))

        together(args, read)
        if args.world_size > 1:
            shares: list[Any] = [None] * args.world_size
            dist.all_gather_object(shares, pairs)
            pairs = [pair for share in shares for pair in share]
        return dict(pairs)


def _asking(teacher: Teacher, args: DistillationArguments) -> Callable[[Tensor], Tensor]:
    """From uint8 pixels to logits, asked as an online training asks."""
    device = args.device
    teacher.to(device)
    answers = Answers(teacher, precision=args.mixed_precision, fold=args.fold_teacher)
    statistics = pixel_statistics(teacher, device)
    dtype = _DTYPES.get(args.mixed_precision)

    def ask(pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return answers.ask(normalise(pixels.to(device), statistics))

    return ask
