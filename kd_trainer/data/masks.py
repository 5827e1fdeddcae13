"""From the values in mask files to classes, by one rule for the whole data set.

With `--mask_values` the i-th value is class i. Without it the rule is found in a sample of masks:

- more than two labels: the values are the class ids 0..num_labels-1;
- binary, values 0 and 1 only: these are background and foreground;
- binary, values 0 and 255 only: 255 is the **foreground**, also where `ignore_index` is 255;
- binary, 0, 1 and 255, with 1 and 255 together in at least one mask: 255 is `ignore_index`. If no
  mask has both, files of both kinds may be mixed: an error asks for `--mask_values`;
- with `--mask_threshold` (a binary task) values from the threshold on are foreground, all below
  are background: for soft edges and for values that differ from file to file;
- 1-bit files say which pixels are foreground without a number, so they fit each rule.

`ignore_index` is honoured in each case but the third. What the sample did not show and the rule
cannot read is an error when it comes, never a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from kd_trainer.data.images import BadSampleError, EncodedImage, decode_mask, image_name

_VALUES = 2**16
_UNKNOWN = -1
_MOST_CLASSES_A_VALUE, _MOST_CLASSES = 3, 240
_FEW = 20  # values that somebody would name one by one


def present_values(mask: npt.NDArray[Any]) -> tuple[int, ...]:
    """The distinct values of a mask (H, W), bool, uint8 or uint16, rising."""
    mask = mask.astype(np.uint8) if mask.dtype == np.bool_ else mask
    if mask.dtype == np.uint8:  # a histogram: 20 times faster than sorting
        counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
    else:
        counts = np.bincount(mask.ravel())
    return tuple(int(v) for v in np.flatnonzero(counts))


def show_values(values: Iterable[int]) -> str:
    """At most ten values as text."""
    values = sorted(values)
    head = ", ".join(str(v) for v in values[:10])
    return head if len(values) <= 10 else f"{head} ... ({len(values)} values)"


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

    Raises:
        ValueError: if values repeat, or labels and `ignore_index` do not fit into a byte.
    """

    values: tuple[int, ...]
    ignore_index: int = 255
    ignore_alone: bool = True
    also_ignored: tuple[int, ...] = ()
    threshold: int | None = None

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values) or not all(
            0 <= v < _VALUES for v in self.values
        ):
            raise ValueError(
                "Expected different --mask_values between 0 and 65535, got "
                f"{' '.join(map(str, self.values))}."
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
        if self.threshold is not None:
            table = (np.arange(_VALUES) >= self.threshold).astype(np.int16)
            if self.ignore_index != 255:
                table[self.ignore_index] = self.ignore_index
            return table
        table = np.full(_VALUES, _UNKNOWN, np.int16)
        table[[self.ignore_index, *self.also_ignored]] = self.ignore_index
        table[list(self.values)] = np.arange(self.num_labels)
        return table

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return self._table.astype(np.uint8)

    @cached_property
    def _doubtful(self) -> npt.NDArray[np.uint8]:
        """1 for the bytes that call for `check`, which takes four times as long as a table."""
        doubtful = (self._table[:256] == _UNKNOWN).astype(np.uint8)
        doubtful[self.ignore_index] |= not self.ignore_alone
        return doubtful

    def labels(self, mask: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
        """Translate a mask.

        Args:
            mask: values of the file, (H, W); bool for a 1-bit file.
            name: what to call the file in a message.

        Returns:
            uint8 (H, W), 0..num_labels-1 and `ignore_index`.

        Raises:
            BadSampleError: if the mask holds a value that the rule does not know.
        """
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
            raise _unknown_values(self, values, name)
        ignored = self.ignore_index in values and self.ignore_index not in self.values
        if ignored and not self.ignore_alone and self.values[1] not in values:
            raise BadSampleError(
                f"Expected mask values 0 and 1 as in the masks looked at first, got "
                f"{show_values(values)} in {name}, where {self.ignore_index} may be foreground or "
                f"ignored. Say which with --mask_values 0 1 (ignored) or --mask_values 0 "
                f"{self.ignore_index} (foreground), and do not mix both kinds."
            )


def _unknown_values(rule: MaskRule, values: Iterable[int], where: str) -> BadSampleError:
    return BadSampleError(
        f"Expected the mask values {show_values(rule.values)} (classes 0..{rule.num_labels - 1}) "
        f"or {rule.ignore_index} (ignored), got {show_values(values)} in {where}. Name the value "
        "of each class in order with --mask_values, or set --num_labels."
    )


def find_mask_rule(
    masks: Iterable[EncodedImage | None],
    *,
    num_labels: int,
    ignore_index: int,
    every_class: bool = True,
    class_ids: bool = False,
) -> MaskRule:
    """Find the rule of a data set in some of its masks (see the module's text).

    Args:
        masks: cells of the column `mask`; None is skipped.
        num_labels: classes with the background.
        ignore_index: value of pixels that count nowhere.
        every_class: doubt `num_labels` where the masks hold no foreground, or of several classes
            only the first.
        class_ids: the values are certainly class ids and `ignore_index`, as in masks drawn from
            COCO annotations.

    Returns:
        The rule; it reads every one of the masks.

    Raises:
        ValueError: if the values fit no rule, or fit two.
    """
    seen: dict[int, str] = {}
    together = bits = count = 0
    for index, cell in enumerate(masks):
        if cell is None:
            continue
        count += 1
        mask = decode_mask(cell, index)
        values = present_values(mask)
        if mask.dtype == np.bool_:
            bits += 1 in values
            continue
        together += {1, ignore_index} <= set(values)
        seen |= {v: seen.get(v, image_name(cell, index)) for v in values}
    if not count:
        raise ValueError("Expected masks to learn from, got none in the splits. Check --dataset.")
    if num_labels > 2:
        rule = MaskRule(tuple(range(num_labels)), ignore_index)
        if unknown := set(seen) - {*rule.values, ignore_index}:
            raise _unknown_values(rule, seen, f"the masks (first in {seen[min(unknown)]})")
        # The first classes alone are no fault of the images that a model is measured on, nor where
        # categories say how many there are; masks that mark everything as ignored are one.
        if (
            (every_class and not (class_ids and 1 in seen))
            or bits
            or set(seen) - {0} == {ignore_index}
        ):
            _check_several(seen, bits, num_labels, ignore_index)
        return rule
    if class_ids and (1 in seen or not every_class):
        return MaskRule((0, 1), ignore_index)
    if class_ids:
        seen = {0: "all"}
    if not every_class and not bits and not set(seen) - {0}:
        return MaskRule((0, 1), ignore_index, ignore_alone=False)
    return _binary_rule(seen, bits, together, ignore_index)


def _check_several(seen: dict[int, str], bits: int, num_labels: int, ignore_index: int) -> None:
    if bits or not set(seen) - {0, 1, ignore_index}:
        content = "1-bit masks" if bits else f"only the values {show_values(seen)} in the masks"
        raise ValueError(
            f"Expected class ids 0..{num_labels - 1} in the masks, got {content}. Set --num_labels "
            "2, or name the value of each class with --mask_values."
        )


def _binary_rule(seen: dict[int, str], bits: int, together: int, ignore_index: int) -> MaskRule:
    foreground = set(seen) - {0}
    if ignore_index != 255:
        foreground -= {ignore_index}
    if other := foreground - {1, 255}:
        raise ValueError(
            f"Expected masks of 0 and 1 or of 0 and 255, got the values {show_values(seen)} (first "
            f"in {seen[min(other)]}). {_binary_cure({*foreground, 0} & {*seen})}"
        )
    if not foreground and not bits:
        raise ValueError(
            f"Expected foreground in the masks, got only {show_values(seen)} in all that were "
            "looked at. Check the masks, or name both values with --mask_values."
        )
    if foreground == {255}:
        if 0 not in seen:
            raise _two_readings(seen)
        return MaskRule((0, 255), ignore_index)
    if foreground == {1, 255} and (ignore_index != 255 or not together):
        raise _two_readings(seen)
    return MaskRule((0, 1), ignore_index, ignore_alone=255 in foreground or ignore_index != 255)


def _binary_cure(values: Collection[int]) -> str:
    """What makes classes of these values: never a number of classes far above theirs."""
    low, high = min(values), max(values)
    cures = []
    if len(values) == 2:
        cures.append(f"name background and foreground with --mask_values {low} {high}")
    ids = {*values} - {255}
    # A few more classes than the sample has shown; near 255 they are shades of an edge.
    if max(ids) < min(_MOST_CLASSES_A_VALUE * len(ids), _MOST_CLASSES):
        cures.append(f"if these are class ids, set --num_labels {max(ids) + 1}")
        if len(values) > 2:
            cures.insert(0, "name background and foreground with --mask_values")
    else:
        if len(values) > 2 and len(ids) <= _FEW and max(ids) < _MOST_CLASSES:
            listed = " ".join(str(value) for value in sorted(ids))
            cures.append(
                f"if these are class ids, set --num_labels {len(ids)} --mask_values {listed}"
            )
        threshold = f"--mask_threshold {(low + high + 1) // 2}"
        cures.append(f"take the values from a threshold on as foreground with {threshold}")
    text = ", or ".join(cures)
    return text[0].upper() + text[1:] + "."


def _two_readings(seen: dict[int, str]) -> ValueError:
    return ValueError(
        f"Expected masks of one kind, got the values {show_values(seen)} with 255 (first in "
        f"{seen[255]}) where it may be foreground or ignored. Say which with --mask_values 0 1 "
        "(ignored) or --mask_values 0 255 (foreground)."
    )
