"""The rule of a data set, found in a sample of its masks.

- more than two labels: the values are the class ids 0..num_labels-1; without any 0, and with
  num_labels, they are 1..num_labels;
- binary, values 0 and 1 only: these are background and foreground;
- binary, values 0 and 255 only: 255 is the **foreground**, also where `ignore_index` is 255;
- binary, 0, 1 and 255, with 1 and 255 together in at least one mask: 255 is `ignore_index`. If no
  mask has both, files of both kinds may be mixed: an error asks for `--mask_values`;
- binary, two other values only: the higher one is the foreground;
- binary, soft edges: 0 and 255 with others along the outlines, or JPEG, which has them there: from
  128 on it is foreground;
- colours: `mask_colors`; so are palettes of two colours with black at index 1;
- with `--mask_threshold` (a binary task) values from the threshold on are foreground, all below
  are background: for values that differ from file to file;
- 1-bit files say which pixels are foreground without a number, so they fit each rule.

`ignore_index` is honoured in each case but the third.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from kd_trainer.data.images import BadSampleError, EncodedImage, image_name
from kd_trainer.data.mask_colors import MOST_COLORS, color_count, color_rule
from kd_trainer.data.mask_files import MaskFile, OtherKindError, read_mask
from kd_trainer.data.masks import MaskRule, show_values, value_counts

_MIDDLE = 128
_BLACK = (0, 0, 0)
_NEAR = 32  # grey levels by which JPEG misses black and white
_MOST_SOFT = 0.3  # of the pixels of a sample
_MANY_LEVELS = 8  # between 0 and 255: edges have all of them, the classes of a trimap three
_MOST_CLASSES_A_VALUE, _MOST_CLASSES = 3, 240
_FEW = 20  # values that somebody would name one by one


@dataclass
class MaskSurvey:
    """What a sample of masks holds.

    Attributes:
        kind: what the numbers are (`mask_files`).
        count: masks that were looked at.
        seen: the first file of each value.
        pixels: how many there are of each value.
        together: masks with both 1 and `ignore_index`.
        bits: 1-bit masks with a set bit.
        lossy: name of a JPEG among them.
        soft: pixels that are neither black nor white, on outlines; None once any lie elsewhere.
    """

    kind: str
    count: int = 0
    seen: dict[int, str] = field(default_factory=dict)
    pixels: Counter[int] = field(default_factory=Counter)
    together: int = 0
    bits: int = 0
    lossy: str = ""
    soft: int | None = 0
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, mask: MaskFile, name: str, ignore_index: int) -> None:
        """Count a mask.

        Raises:
            OtherKindError: if an index of a palette has another colour than in an earlier file.
        """
        self.count += 1
        self.lossy = self.lossy or (name if mask.lossy else "")
        counts = value_counts(mask.values)
        if mask.values.dtype == np.bool_ and self.kind != "colors":
            self.bits += 1 in counts
            return
        if mask.palette and self.kind == "values":
            self._compare_palette(mask.palette, counts, name)
        self.together += {1, ignore_index} <= set(counts)
        self.seen |= {value: self.seen.get(value, name) for value in counts}
        self.pixels.update(counts)
        if self.soft is not None and self.kind != "colors":
            soft = _soft_pixels(mask.values, counts, _NEAR if mask.lossy else 0)
            self.soft = None if soft is None else self.soft + soft

    def _compare_palette(self, palette: tuple[int, ...], counts: Iterable[int], name: str) -> None:
        for value in counts:
            color = palette[3 * value : 3 * value + 3]
            if self.palette.setdefault(value, color) != color:
                raise OtherKindError(
                    "colors",
                    f"Expected one colour for each index of a palette, got two for {value}: one in "
                    f"{self.seen[value]}, another in {name}. If the colours are the classes, name "
                    "them with --mask_colors.",
                )

    def without(self, values: Collection[int]) -> MaskSurvey:
        """The same without values that count nowhere."""
        seen = {value: name for value, name in self.seen.items() if value not in values}
        return replace(self, seen=seen)

    @property
    def black_is_one(self) -> bool:
        """Whether all masks have two colours, of which black is index 1 of the palette.

        So a tool writes them that sorts the colours; as ids, black would be the foreground.
        """
        colors = [self.palette.get(index) for index in (0, 1)]
        return set(self.seen) == {0, 1} and colors[1] == _BLACK != colors[0] is not None

    @property
    def is_soft(self) -> bool:
        """Whether all masks are black and white but for their outlines."""
        between = len(self.seen.keys() - {0, 255})
        black_and_white = min(self.seen, default=255) <= _NEAR and max(self.seen, default=0) > 223
        return (
            self.soft is not None
            and black_and_white
            and (bool(self.lossy) or between >= _MANY_LEVELS)
            and self.soft <= _MOST_SOFT * self.pixels.total()
        )


def _soft_pixels(mask: npt.NDArray[Any], counts: Collection[int], near: int) -> int | None:
    """Pixels between black and white, all along the outlines; None if some lie elsewhere."""
    if all(value <= near or 255 - near <= value <= 255 for value in counts):
        return 0
    if max(counts) > 255:
        return None
    white = (mask >= _MIDDLE).astype(np.uint8)
    reach = max(6, round(0.02 * max(mask.shape)))
    kernel = np.ones((3, 3), np.uint8)
    edges = cv2.morphologyEx(white, cv2.MORPH_GRADIENT, kernel)
    outlines = cv2.dilate(edges, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    between = (mask > near) & (mask < 255 - near)
    return None if (between & (outlines == 0)).any() else int(between.sum())


def survey_masks(
    masks: Iterable[EncodedImage | None],
    ignore_index: int,
    kind: str | None = None,
    *,
    skip_bad: bool = False,
) -> MaskSurvey:
    """Look at masks.

    Args:
        masks: cells of the column `mask`; None is skipped.
        ignore_index: value of pixels that count nowhere.
        kind: what the numbers are; None finds it.
        skip_bad: leave out what cannot be read.

    Raises:
        BadSampleError: if a mask cannot be read as that kind.
    """
    masks = list(masks)
    try:
        survey = _survey(masks, MaskSurvey(kind or "values"), ignore_index, skip_bad=skip_bad)
        if kind is not None or not survey.black_is_one:
            return survey
        other = "colors"
    except OtherKindError as error:
        if kind is not None:
            raise
        other = error.kind
    return _survey(masks, MaskSurvey(other), ignore_index, skip_bad=skip_bad)


def _survey(
    masks: Sequence[EncodedImage | None], survey: MaskSurvey, ignore_index: int, *, skip_bad: bool
) -> MaskSurvey:
    for index, cell in enumerate(masks):
        if cell is None:
            continue
        try:
            survey.add(read_mask(cell, index, survey.kind), image_name(cell, index), ignore_index)
        except OtherKindError:
            raise
        except BadSampleError:
            if not skip_bad:
                raise
        if survey.kind == "colors" and len(survey.seen) > MOST_COLORS:
            break
    return survey


def find_mask_rule(
    masks: Iterable[EncodedImage | None],
    *,
    num_labels: int,
    ignore_index: int,
    every_class: bool = True,
    class_ids: bool = False,
    ignored: Sequence[int] = (),
    kind: str | None = None,
    skip_bad: bool = False,
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
        ignored: further values of pixels that count nowhere.
        kind: what the numbers of the files are; None finds it.
        skip_bad: leave out what cannot be read.

    Returns:
        The rule; it reads every one of the masks that were not left out.

    Raises:
        ValueError: if the values fit no rule, or fit two.
    """
    survey = survey_masks(masks, ignore_index, kind, skip_bad=skip_bad)
    if not survey.count:
        raise ValueError("Expected masks to learn from, got none in the splits. Check --dataset.")
    if survey.kind == "colors":
        return color_rule(survey.pixels, survey.seen, num_labels, ignore_index)
    survey = survey.without(ignored)
    if num_labels > 2:
        rule = _several_rule(
            survey, num_labels, ignore_index, every_class=every_class, class_ids=class_ids
        )
    elif class_ids:
        rule = _drawn_rule(survey, ignore_index, every_class=every_class)
    elif not every_class and not survey.bits and not set(survey.seen) - {0}:
        rule = MaskRule((0, 1), ignore_index, ignore_alone=False)
    else:
        rule = _binary_rule(survey, ignore_index)
    if survey.kind != "values":
        rule = replace(rule, note=_KINDS[survey.kind].format(rule.note).strip())
    return replace(rule, kind=survey.kind, also_ignored=tuple(ignored))


class LabelCount(NamedTuple):
    """Classes that masks show.

    Attributes:
        classes: how many.
        ids: of those that were seen, where the values are class ids; else none.
    """

    classes: int
    ids: tuple[int, ...] = ()


def count_labels(
    masks: Iterable[EncodedImage | None],
    *,
    ignore_index: int,
    reduced: bool = False,
    ignored: Sequence[int] = (),
    kind: str | None = None,
    skip_bad: bool = False,
) -> LabelCount:
    """The number of classes that some masks of a data set show.

    Two, if they can be read as masks of one foreground; else they are ids, of which the sample
    shows at least every second one, or a colour for each class.

    Args:
        masks: cells of the column `mask`; None is skipped.
        ignore_index: value of pixels that count nowhere.
        reduced: whether value i is class i - 1.
        ignored: further values of pixels that count nowhere.
        kind: what the numbers of the files are; None finds it.
        skip_bad: leave out what cannot be read.

    Raises:
        ValueError: if they show neither.
    """
    masks = list(masks)
    if skip_bad and not reduced and _most_are_binary(masks, kind or "values"):
        return LabelCount(2)  # what the others hold is bad
    survey = survey_masks(masks, ignore_index, kind, skip_bad=skip_bad)
    if survey.kind == "colors":
        return LabelCount(color_count(survey.pixels, survey.seen))
    survey = survey.without(ignored)
    ids = {*survey.seen} - {ignore_index, 255}
    highest = max(ids, default=2 if reduced else 0)
    if reduced:
        return LabelCount(highest)
    try:
        _binary_rule(survey, ignore_index)
    except ValueError:
        if len(ids) < 3 or survey.lossy or survey.kind != "values" or highest >= 2 * len(ids):
            raise
        from_one = ids == {*range(1, highest + 1)}
        return LabelCount(highest) if from_one else LabelCount(highest + 1, tuple(sorted(ids)))
    return LabelCount(2)


def _most_are_binary(masks: Sequence[EncodedImage | None], kind: str) -> bool:
    """Whether more than half of the masks that can be read hold nothing but 0, 1 and 255."""
    binary = count = 0
    for index, cell in enumerate(masks):
        if cell is not None:
            with suppress(BadSampleError):
                values = value_counts(read_mask(cell, index, kind).values)
                binary += values.keys() <= {0, 1, 255}
                count += 1
    return binary > count / 2


_KINDS = {
    "alpha": "Masks: how opaque a pixel is (the alpha channel), whatever its colour. {}",
    "fractions": "Masks: fractions from 0.0 to 1.0; from 0.5 on it is foreground.",
}


def _several_rule(
    survey: MaskSurvey, num_labels: int, ignore_index: int, *, every_class: bool, class_ids: bool
) -> MaskRule:
    seen, bits = survey.seen, survey.bits
    rule = MaskRule(tuple(range(num_labels)), ignore_index)
    if unknown := set(seen) - {*rule.values, ignore_index}:
        if unknown == {num_labels} and 0 not in seen:
            return MaskRule(
                tuple(range(1, num_labels + 1)),
                ignore_index,
                note=f"Masks: 1 to {num_labels} and no 0; value i is class i - 1. --mask_values "
                "overrules.",
            )
        if survey.lossy:
            raise ValueError(
                f"Expected the class ids 0..{num_labels - 1}, got {show_values(seen)} in masks of "
                f"which {survey.lossy} is a JPEG, which changes values: between two classes it "
                "writes ids of others. Store PNG. (Binary masks may be JPEG.)"
            )
        if unknown == {num_labels}:
            raise ValueError(
                f"Expected the class ids 0..{num_labels - 1}, got {show_values(seen)} (first in "
                f"{seen[num_labels]}). If 0 means not labelled and the classes begin at 1, set "
                f"--ignore_index 0; if it is a class, set --num_labels {num_labels + 1}."
            )
        raise rule.unknown(seen, f"the masks (first in {seen[min(unknown)]})")
    # The first classes alone are no fault of the images that a model is measured on, nor where
    # categories say how many there are; masks that mark everything as ignored are one.
    if (
        (every_class and not (class_ids and 1 in seen)) or bits or set(seen) - {0} == {ignore_index}
    ) and (bits or not set(seen) - {0, 1, ignore_index}):
        content = "1-bit masks" if bits else f"only the values {show_values(seen)} in the masks"
        raise ValueError(
            f"Expected class ids 0..{num_labels - 1} in the masks, got {content}. Set --num_labels "
            "2, or name the value of each class with --mask_values."
        )
    return rule


def _drawn_rule(survey: MaskSurvey, ignore_index: int, *, every_class: bool) -> MaskRule:
    if every_class and 1 not in survey.seen:
        survey = replace(survey, seen={0: "all"})
        return _binary_rule(survey, ignore_index)
    return MaskRule((0, 1), ignore_index)


def _binary_rule(survey: MaskSurvey, ignore_index: int) -> MaskRule:
    seen = survey.seen
    foreground = set(seen) - {0}
    if ignore_index != 255:
        foreground -= {ignore_index}
    if other := foreground - {1, 255}:
        values = {*foreground, 0} & {*seen}
        return _other_binary_rule(survey, values, min(other), ignore_index)
    if not foreground and not survey.bits:
        raise ValueError(
            f"Expected foreground in the masks, got only {show_values(seen)} in all that were "
            "looked at. Check the masks, or name both values with --mask_values."
        )
    if foreground == {255}:
        if 0 not in seen:
            raise _two_readings(seen)
        return MaskRule((0, 255), ignore_index)
    if foreground == {1, 255} and (ignore_index != 255 or not survey.together):
        raise _two_readings(seen)
    return MaskRule((0, 1), ignore_index, ignore_alone=255 in foreground or ignore_index != 255)


def _other_binary_rule(
    survey: MaskSurvey, values: Collection[int], other: int, ignore_index: int
) -> MaskRule:
    """Of two values that are neither 0 and 1 nor 0 and 255, or of soft edges."""
    if survey.is_soft or survey.kind == "fractions":
        content = "JPEG, which blurs values" if survey.lossy else "black and white with soft edges"
        return MaskRule(
            (0, 1),
            ignore_index,
            threshold=_MIDDLE,
            note=f"Masks: {content}; from {_MIDDLE} on it is foreground. --mask_threshold "
            "overrules.",
        )
    if len(values) == 2 and not survey.bits and not {255} & {*values}:
        low, high = sorted(values)
        note = f"Masks: {low} and {high}; {high} is foreground. --mask_values overrules."
        return MaskRule((low, high), ignore_index, note=note)
    raise ValueError(
        f"Expected masks of 0 and 1 or of 0 and 255, got the values {show_values(survey.seen)} "
        f"(first in {survey.seen[other]}). {_binary_cure(values)}"
    )


def _binary_cure(values: Collection[int]) -> str:
    """What makes classes of these values: never a number of classes far above theirs."""
    low, high = min(values), max(values)
    cures = []
    if len(values) == 2:
        cures.append(f"name background and foreground with --mask_values {low} {high}")
    ids = {*values} - {255}
    if len(values) == 3 and {0, 255} < {*values}:
        cures.append(f"leave {max(ids)} out with --ignore_values {max(ids)}")
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
