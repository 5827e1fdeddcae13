"""How much of the disk the teacher's logits may take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kd_trainer.disk import existing
from kd_trainer.teacher_cache.shards import SUFFIX


def show_size(size: float) -> str:
    """A size as people say it: 412 kB, 9.8 MB, 24.6 GB."""
    for unit, step in (("GB", 10**9), ("MB", 10**6)):
        if size >= step:
            return f"{size / step:,.1f} {unit}"
    return f"{size / 1000:,.0f} kB"


@dataclass(frozen=True)
class Room:
    """The bound of a folder of caches.

    Attributes:
        root: folder that holds one folder a teacher.
        bound: bytes that all of them together may take.
    """

    root: Path
    bound: int

    def used(self) -> dict[Path, int]:
        """Bytes of logits in each teacher's folder; files of others do not count."""
        sizes: dict[Path, int] = {}
        for path in self.root.glob(f"*/*{SUFFIX}*"):
            try:
                size = path.stat().st_size
            except FileNotFoundError:  # a partial file that has just become a shard
                continue
            sizes[path.parent] = sizes.get(path.parent, 0) + size
        return sizes

    def check_fits(self, own: Path, used: dict[Path, int], images: int, each: float) -> None:
        """Refuse to begin what cannot be ended.

        Args:
            own: folder that is to be filled.
            used: what `used` said before it was looked up how many images are missing.
            images: how many are missing.
            each: bytes that one of them takes, about.

        Raises:
            ValueError: says what is needed, what is there, and what could go.
        """
        need, taken = images * each, sum(used.values())
        if taken + need > self.bound:
            beside = f", beside {show_size(taken)} that are there" if taken else ""
            raise ValueError(
                f"Expected the teacher's logits within {show_size(self.bound)} "
                f"(--teacher_cache_size), got {images:,} images of about {show_size(each)}, "
                f"together {show_size(need)}{beside}.{self._cure(own, used)}"
            )
        free = shutil.disk_usage(existing(self.root)).free
        if need > free:
            raise ValueError(
                f"Expected {show_size(need)} of free disk at {self.root} for the teacher's logits "
                f"of {images:,} images, about {show_size(each)} each, got {show_size(free)}. Make "
                "room, or name another folder with --teacher_cache."
            )

    def check_write(self, own: Path, size: int) -> None:
        """Refuse to grow beyond the bound, as when several teachers fill one folder at once.

        Raises:
            ValueError: says what could go.
        """
        used = self.used()
        if sum(used.values()) + size > self.bound:
            raise ValueError(
                f"Expected the teacher's logits within {show_size(self.bound)} "
                f"(--teacher_cache_size), got more: {show_size(sum(used.values()))} are there."
                f"{self._cure(own, used)}"
            )

    def _cure(self, own: Path, used: dict[Path, int]) -> str:
        others = {path: size for path, size in used.items() if path != own}
        if not others:
            return " Raise it, or train with --teacher_targets online."
        largest = max(others, key=lambda path: others[path])
        return (
            f" Raise it, or delete what is no longer used: {len(others)} other "
            f"folder{'s' if len(others) > 1 else ''} in {self.root}, the largest {largest.name} "
            f"with {show_size(others[largest])}."
        )
