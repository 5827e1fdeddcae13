"""Masks in which each class has a colour: the rule found in a sample, or named by `--mask_colors`.

Without names: one colour on black is the foreground of a binary task; colours of the palette of
Pascal VOC, which many tools write, are its ids; all others are classes in a fixed order, black
first, then by their numbers, if there are as many as labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kd_trainer.data.masks import MaskRule
from kd_trainer.mask_flags import IGNORED, ClassMembers, show_color

MOST_COLORS = 64
"""More are a photograph, or colours that JPEG or a resize has mixed."""

_BLACK = 0
_SHOWN = 12
_VOC_BORDER = 0xE0E0C0  # around the objects of Pascal VOC, which counts nowhere
_VOC_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)


def voc_color(number: int) -> int:
    """0xRRGGBB of an id in the palette of Pascal VOC: its bits, dealt out to the three channels.

    >>> [hex(voc_color(number)) for number in (0, 1, 15)]
    ['0x0', '0x800000', '0xc08080']

    Source: VOClabelcolormap.m of the Pascal VOC development kit.
    """
    red = green = blue = 0
    for place in range(8):
        bits = number >> 3 * place
        red |= (bits & 1) << 7 - place
        green |= (bits >> 1 & 1) << 7 - place
        blue |= (bits >> 2 & 1) << 7 - place
    return red << 16 | green << 8 | blue


def named_color_rule(members: ClassMembers, ignore_index: int) -> MaskRule:
    """The rule of `--mask_colors`."""
    colors = [[int(color) for color in one] for one in members.members]
    return MaskRule(
        tuple(one[0] for one in colors),
        ignore_index,
        also_ignored=tuple(int(color) for color in members.ignored),
        kind="colors",
        merged=tuple((color, i) for i, one in enumerate(colors) for color in one[1:]),
    )


def color_flags(rule: MaskRule) -> list[str]:
    """`--mask_colors` that says what a rule that was found says, with the names of Pascal VOC."""
    named: Sequence[str] = [""] * rule.num_labels
    if rule.values == tuple(map(voc_color, range(len(_VOC_NAMES)))):
        named = [f"{name}=" for name in _VOC_NAMES]
    elif rule.values[0] != _BLACK:
        named = [f"{name}=" for name in _names(rule.values)]
    flags = [name + show_color(color) for name, color in zip(named, rule.values, strict=False)]
    return [*flags, *(f"{IGNORED}={show_color(color)}" for color in rule.also_ignored)]


def _names(order: Sequence[int]) -> list[str]:
    """Names of colours that nobody has named: without black nothing says which is background."""
    names = [f"class_{i}" for i in range(len(order))]
    return ["background", *names[1:]] if order[0] == _BLACK else names


def color_count(pixels: Mapping[int, int], seen: Mapping[int, str]) -> int:
    """Classes that the colours of a sample stand for: one each, or those of Pascal VOC.

    Its palette is that of many tools, for any classes: only most of its colours are its classes.

    Raises:
        ValueError: if there are too many for a mask.
    """
    if len(pixels) > MOST_COLORS:
        raise _too_many(seen)
    if not _is_of_voc(pixels, len(_VOC_NAMES)):
        return len(pixels)
    count = len({*pixels} - {_VOC_BORDER})
    return len(_VOC_NAMES) if 2 * count > len(_VOC_NAMES) else count


def _is_of_voc(pixels: Mapping[int, int], num_labels: int) -> bool:
    """Whether more than a background and a foreground have the colours of Pascal VOC."""
    voc = {voc_color(number) for number in range(max(num_labels, len(_VOC_NAMES)))}
    return len(pixels) > 2 and {*pixels} <= {*voc, _VOC_BORDER}


def _too_many(seen: Mapping[int, str]) -> ValueError:
    return ValueError(
        f"Expected masks of at most {MOST_COLORS} colours, got more, as in photographs (last in "
        f"{list(seen.values())[-1]}). JPEG and resizing mix colours: store PNG, in the size it was "
        "drawn in. For cut-out photographs set --mask_kind alpha."
    )


def color_rule(
    pixels: Mapping[int, int], seen: Mapping[int, str], num_labels: int, ignore_index: int
) -> MaskRule:
    """The rule for the colours of a sample.

    Args:
        pixels: how many there are of each colour.
        seen: the first file of each colour.
        num_labels: classes with the background.
        ignore_index: label of pixels that count nowhere.

    Returns:
        The rule, with the colours and their shares in its note.

    Raises:
        ValueError: if there are not as many colours as labels; lists them.
    """
    if len(pixels) > MOST_COLORS:
        raise _too_many(seen)
    voc = [voc_color(number) for number in range(max(num_labels, len(_VOC_NAMES)))]
    of_voc = _is_of_voc(pixels, num_labels)
    ignored = {_VOC_BORDER} & {*pixels} if of_voc else set()
    order = tuple(sorted({*pixels} - ignored))  # of which black is the first
    if of_voc and num_labels > 2 and {*order} <= {*voc[:num_labels]}:
        order, reading = tuple(voc[:num_labels]), "the palette of Pascal VOC, whose ids they are."
    elif len(order) != num_labels or (num_labels == 2 and order[0] != _BLACK):
        raise _other_number(pixels, seen, num_labels, order, of_voc=of_voc)
    elif num_labels == 2:
        reading = f"{show_color(order[1])} is foreground."
    else:
        reading = f"classes 0 to {num_labels - 1} in the order {_flags(order)}."
        if order[0] != _BLACK:
            reading += " Without black none is background; figures of the foreground omit class 0."
    return MaskRule(
        order,
        ignore_index,
        also_ignored=tuple(ignored),
        kind="colors",
        note=f"Masks: {_listing(pixels)}; {reading} --mask_colors overrules.",
    )


def _other_number(
    pixels: Mapping[int, int],
    seen: Mapping[int, str],
    num_labels: int,
    order: tuple[int, ...],
    *,
    of_voc: bool,
) -> ValueError:
    rarest = min(pixels, key=lambda color: (pixels[color], color))
    named = " ".join(f"{n}={show_color(c)}" for n, c in zip(_names(order), order, strict=True))
    flags = f"--num_labels {len(order)} --mask_colors {named}"
    cure = f"Name the classes in their order, such as {flags}"
    if of_voc:
        highest = max(number for number in range(256) if voc_color(number) in order)
        cure += f", or take the ids of these colours in Pascal VOC with --num_labels {highest + 1}"
    wanted = f"{num_labels} colours" if len(order) != num_labels else "black and one colour"
    return ValueError(
        f"Expected {wanted} in the masks (--num_labels {num_labels}), got {_listing(pixels)}; "
        f"{show_color(rarest)} first in {seen[rarest]}. {cure}. One name twice is one class, "
        "ignore=... counts nowhere."
    )


def _flags(colors: Iterable[int]) -> str:
    return " ".join(show_color(color) for color in colors)


def _listing(pixels: Mapping[int, int]) -> str:
    """The colours with their shares of the pixels, the most frequent first."""
    total = sum(pixels.values())
    ordered = sorted(pixels, key=lambda color: (-pixels[color], color))
    shown = [f"{show_color(color)} ({_share(pixels[color] / total)})" for color in ordered]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{len(shown)} colours: {' '.join(shown[:_SHOWN])}{more}"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
