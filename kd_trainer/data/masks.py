"""From the numbers in mask files to classes, by one rule for the whole data set.

With `--mask_values` the i-th value is class i, with `--mask_colors` the i-th colour; without them
`mask_survey` finds the rule. What the rule cannot read is an error when it comes, never a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from kd_trainer.data.images import BadSampleError, EncodedImage
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.mask_flags import REST, ClassMembers, show_color

_VALUES, _COLORS = 2**16, 2**24
_UNKNOWN = -1


def value_counts(mask: npt.NDArray[Any]) -> dict[int, int]:
    """Pixels of each value of a mask (H, W), bool, uint8, uint16 or uint32, values rising."""
    mask = mask.astype(np.uint8) if mask.dtype == np.bool_ else mask
    if mask.dtype == np.uint8:  # a histogram: 20 times faster than sorting
        counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
    elif mask.dtype == np.uint32:  # colours come in runs, of which there are few to sort
        flat = mask.ravel()
        starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
        values, owners = np.unique(flat[starts], return_inverse=True)
        lengths = np.diff(np.r_[starts, flat.size])
        pixels = np.bincount(owners, lengths)
        return {int(v): int(n) for v, n in zip(values, pixels, strict=True)}
    else:
        counts = np.bincount(mask.ravel())
    return {int(v): int(counts[v]) for v in np.flatnonzero(counts)}


def present_values(mask: npt.NDArray[Any]) -> tuple[int, ...]:
    """The distinct values of a mask (H, W), bool, uint8, uint16 or uint32, rising."""
    return tuple(value_counts(mask))


def show_values(values: Iterable[int], kind: str = "values") -> str:
    """At most ten values, or colours, as text."""
    values = sorted(values)
    shown = [show_color(v) if kind == "colors" else str(v) for v in values[:10]]
    head = (" " if kind == "colors" else ", ").join(shown)
    return head if len(values) <= 10 else f"{head} ... ({len(values)} {kind})"


@dataclass(frozen=True)
class MaskRule:
    """Which value of a mask file is which class.

    Args:
        values: value i stands for class i; one for each label.
        ignore_index: the value, in files and in labels, of pixels that count nowhere.
        ignore_alone: whether a binary mask may hold `ignore_index` without any foreground. Only
            data whose sample showed it, or that came with `--mask_values`, may: elsewhere such a
            mask could as well be a 0/255 one.
        also_ignored: further values, in files alone, of pixels that count nowhere.
        threshold: the lowest value of the foreground; `values` are then those of the labels, and
            255 is foreground even where it is `ignore_index`.
        kind: what the numbers of the files are (`mask_files`); `ignore_index` is no colour.
        merged: further (value, class).
        rest: the class of all other values.
        note: one line on what was understood, where somebody could want it otherwise.

    Raises:
        ValueError: if values repeat, or labels and `ignore_index` do not fit into a byte.
    """

    values: tuple[int, ...]
    ignore_index: int = 255
    ignore_alone: bool = True
    also_ignored: tuple[int, ...] = ()
    threshold: int | None = None
    kind: str = "values"
    merged: tuple[tuple[int, int], ...] = ()
    rest: int | None = None
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        most = _COLORS if self.kind == "colors" else _VALUES
        if len(set(self.values)) != len(self.values) or not all(0 <= v < most for v in self.values):
            raise ValueError(
                "Expected different --mask_values between 0 and 65535, got "
                f"{' '.join(map(str, self.values))}."
            )
        if twice := {*self.also_ignored} & {*self.values, *(v for v, _ in self.merged)}:
            raise ValueError(
                f"Expected values that are either a class or ignored, got {show_values(twice)} as "
                "both. Leave them out of --ignore_values, or of the classes."
            )
        if not len(self.values) <= self.ignore_index <= 255:
            raise ValueError(
                f"Expected --ignore_index between {len(self.values)} (the number of labels) and "
                f"255, got {self.ignore_index}. Lower values are classes: where 0 is to be "
                "ignored and classes begin at 1, use --reduce_labels; else store ignored pixels as "
                "255."
            )

    @property
    def num_labels(self) -> int:
        """Number of classes with the background."""
        return len(self.values)

    @cached_property
    def _table(self) -> npt.NDArray[np.int16]:
        ignored = [*self.also_ignored]
        if self.kind != "colors" and not (self.threshold is not None and self.ignore_index == 255):
            ignored.append(self.ignore_index)
        if self.threshold is not None:
            table = (np.arange(_VALUES) >= self.threshold).astype(np.int16)
            table[ignored] = self.ignore_index
            return table
        others = _UNKNOWN if self.rest is None else self.rest
        table = np.full(_COLORS if self.kind == "colors" else _VALUES, others, np.int16)
        table[ignored] = self.ignore_index
        table[list(self.values)] = np.arange(self.num_labels)
        for value, label in self.merged:
            table[value] = label
        return table

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return self._table[:_VALUES].astype(np.uint8)

    @cached_property
    def _doubtful(self) -> npt.NDArray[np.uint8]:
        """1 for the bytes that call for `check`, which takes four times as long as a table."""
        doubtful = (self._table[:256] == _UNKNOWN).astype(np.uint8)
        doubtful[self.ignore_index] |= not self.ignore_alone
        doubtful[1] |= (self.threshold or 0) > 1
        return doubtful

    def decode(self, cell: EncodedImage, index: int) -> npt.NDArray[Any]:
        """The numbers (H, W) of a mask file, as `labels` takes them; see `read_mask`."""
        return decode_mask(cell, index, self.kind)

    def labels(self, mask: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
        """Translate a mask.

        Args:
            mask: numbers of the file, (H, W), as `decode` gives them; bool for a 1-bit file.
            name: what to call the file in a message.

        Returns:
            uint8 (H, W), 0..num_labels-1 and `ignore_index`.

        Raises:
            BadSampleError: if the mask holds a value that the rule does not know.
        """
        if mask.dtype == np.uint32:
            classes = self._table[mask]
            if (classes == _UNKNOWN).any():
                self.check(present_values(mask), name)
            return classes.astype(np.uint8)
        bits = mask.dtype == np.bool_
        if mask.dtype != np.uint8 or cv2.countNonZero(cv2.LUT(mask, self._doubtful)):
            self.check(present_values(mask), name, bits=bits)
        if mask.dtype == np.uint8:
            return np.asarray(cv2.LUT(mask, self._bytes[:256]), np.uint8)
        if bits and self.threshold is not None:
            return mask.astype(np.uint8)
        if bits:  # without a value for the set bit, no bit is set
            mask = mask * np.uint8(self._bit_value or 0)
        return self._bytes[mask]

    @property
    def _bit_value(self) -> int | None:
        # In a 1-bit file the set bit has no number of its own: it is 1 or 255, as the rule says.
        return next((bit for bit in (1, 255) if set(self.values) == {0, bit}), None)

    def check(self, values: Collection[int], name: str, *, bits: bool = False) -> None:
        """Refuse a mask that the rule cannot read.

        Args:
            values: that the mask holds.
            name: what to call the file in a message.
            bits: whether it is a 1-bit file, whose values say no more than set or not.

        Raises:
            BadSampleError: names the file and the values.
        """
        if bits and self._bit_value is not None:
            return
        if bits and 1 in values:
            raise BadSampleError(
                f"Expected the mask values {show_values(self.values)}, got a 1-bit file, which has "
                f"none, in {name}. Store class ids, or use --num_labels 2."
            )
        if any(self._table[v] == _UNKNOWN for v in values):
            raise self.unknown(values, name)
        if (self.threshold or 0) > 1 and 1 in values and {*values} <= {0, 1}:
            raise BadSampleError(
                f"Expected grey levels on both sides of --mask_threshold {self.threshold}, got 0 "
                f"and 1 in {name}, which are both below. Store all masks alike."
            )
        ignored = self.ignore_index in values and self.ignore_index not in self.values
        if ignored and not self.ignore_alone and self.values[1] not in values:
            raise BadSampleError(
                f"Expected mask values 0 and 1 as in the masks looked at first, got "
                f"{show_values(values)} in {name}, where {self.ignore_index} may be foreground or "
                f"ignored. Say which with --mask_values 0 1 (ignored) or --mask_values 0 "
                f"{self.ignore_index} (foreground), and do not mix both kinds."
            )

    def unknown(self, values: Iterable[int], where: str) -> BadSampleError:
        """The error for values that the rule does not know."""
        known = [*self.values, *(value for value, _ in self.merged)]
        if self.kind == "colors":
            others = sorted(v for v in values if self._table[v] == _UNKNOWN)
            return BadSampleError(
                f"Expected the colours {show_values(known, 'colors')}, got also "
                f"{show_values(others, 'colors')} in {where}. Name the colours of each class with "
                "--mask_colors, ignore=... for what counts nowhere."
            )
        return BadSampleError(
            f"Expected the mask values {show_values(known)} (classes 0..{self.num_labels - 1}) "
            f"or {self.ignore_index} (ignored), got {show_values(values)} in {where}. Name the "
            "value of each class in order with --mask_values, or set --num_labels."
        )


def merged_rule(
    members: ClassMembers, ignored: tuple[int, ...], options: dict[str, Any]
) -> MaskRule:
    """The rule of `--merge_classes`.

    Args:
        members: of each class; names are numbers by now.
        ignored: further values that count nowhere.
        options: further arguments of the rule.

    Raises:
        ValueError: if a member is a name.
    """
    everything = [member for one in (*members.members, members.ignored) for member in one]
    if words := [m for m in everything if isinstance(m, str) and m != REST]:
        raise ValueError(
            f"Expected values in --merge_classes, got {words[0]!r}: the data has no names of "
            "classes. Name the values in the mask files."
        )
    rest = next((i for i, one in enumerate(members.members) if REST in one), None)
    rest = options["ignore_index"] if REST in members.ignored else rest
    numbers = [[m for m in one if isinstance(m, int)] for one in members.members]
    unnamed = next(value for value in range(_VALUES) if value not in everything)
    firsts = tuple(one[0] if one else unnamed for one in numbers)  # only one class is the rest
    return MaskRule(
        firsts,
        also_ignored=(*ignored, *(m for m in members.ignored if isinstance(m, int))),
        merged=tuple((value, i) for i, one in enumerate(numbers) for value in one[1:]),
        rest=rest,
        **options,
    )
