"""What `--mask_colors` and `--merge_classes` say: of what each class is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

IGNORED = "ignore"
"""In place of a class: what counts nowhere."""
REST = "rest"
"""In place of a value: all that no class names."""

_HEXADECIMAL = re.compile(r"(?:#|0x)?([0-9a-f]{6})", re.IGNORECASE)
_MOST_VALUES = 2**16
_COLORS, _MERGED = "--mask_colors", "--merge_classes"


class ClassMembers(NamedTuple):
    """What each class is made of.

    Attributes:
        names: of the classes in order, or None where they have none.
        members: of each class: 0xRRGGBB of colours, else values, names or `REST`.
        ignored: likewise, of what counts nowhere.
    """

    names: list[str] | None
    members: list[list[int | str]]
    ignored: list[int | str]


def parse_color(text: str) -> tuple[str | None, int]:
    """Class name (None without one) and 0xRRGGBB of `255,0,0`, `#ff0000` or `person=255,0,0`.

    >>> parse_color("person=255,0,0") == parse_color("person=#ff0000") == ("person", 0xFF0000)
    True

    Raises:
        ValueError: if it is none of these.
    """
    name, separator, color = (part.strip() for part in str(text).rpartition("="))
    parts = color.replace(",", " ").split()
    if match := _HEXADECIMAL.fullmatch(color):
        number = int(match[1], 16)
    elif len(parts) == 3 and all(part.isdecimal() and int(part) < 256 for part in parts):
        red, green, blue = map(int, parts)
        number = red << 16 | green << 8 | blue
    else:
        number = -1
    if number < 0 or (separator and not name):
        raise ValueError(
            "Expected --mask_colors like 0,0,0 255,0,0, or with names like background=0,0,0 "
            f"person=#ff0000, got {text!r}."
        )
    return name or None, number


def show_color(number: int) -> str:
    """0xRRGGBB as `--mask_colors` takes it: 255,0,0."""
    return f"{number >> 16},{number >> 8 & 255},{number & 255}"


def parse_merge(text: str) -> tuple[str, list[int | str]]:
    """Class name, and the values or names that it is made of, of `person=11,12-14`.

    >>> parse_merge("vehicle=car,26-28")
    ('vehicle', ['car', 26, 27, 28])

    Raises:
        ValueError: if it is something else.
    """
    name, _, members = (part.strip() for part in str(text).partition("="))
    parts: list[int | str] = []
    for part in filter(None, (part.strip() for part in members.split(","))):
        numbers = part.split("-", 1)
        if all(number.isdecimal() and int(number) < _MOST_VALUES for number in numbers):
            parts += range(int(numbers[0]), int(numbers[-1]) + 1)
        else:
            parts.append(part)
    if not name or not parts:
        raise ValueError(
            "Expected --merge_classes like background=0-10 person=11,12 (the classes in order, "
            f"each with its values, or names that the data has), got {text!r}."
        )
    return name, parts


def color_members(texts: Sequence[str]) -> ClassMembers:
    """The colours of each class, in the order of the flag.

    Raises:
        ValueError: if one is no colour, stands twice, or some have names and others none.
    """
    pairs = [parse_color(text) for text in texts]
    bare = [name for name, _ in pairs if name is None]
    if bare and any(name not in (None, IGNORED) for name, _ in pairs):
        raise ValueError(
            f"Expected a name for each of --mask_colors or for none, got {' '.join(texts)}. Write "
            "background=0,0,0."
        )
    numbered = [(name or str(i), [color]) for i, (name, color) in enumerate(pairs)]
    members = _grouped(numbered, _COLORS)
    return members._replace(names=None) if bare else members


def merged_members(texts: Sequence[str]) -> ClassMembers:
    """The values or names of each class, in the order of the flag.

    Raises:
        ValueError: if one cannot be read, or stands twice.
    """
    return _grouped([parse_merge(text) for text in texts], _MERGED)


def numbered(members: ClassMembers, names: Sequence[str]) -> ClassMembers:
    """The same with the number of each class of the data in place of its name."""
    numbers: dict[int | str, int] = {name: number for number, name in enumerate(names)}
    groups = [[numbers.get(member, member) for member in one] for one in members.members]
    return ClassMembers(
        members.names, groups, [numbers.get(member, member) for member in members.ignored]
    )


def _grouped(pairs: Iterable[tuple[str, Sequence[int | str]]], flag: str) -> ClassMembers:
    groups: dict[str, list[int | str]] = {}
    owners: dict[int | str, str] = {}
    for name, members in pairs:
        for member in members:
            if owners.setdefault(member, name) != name:
                shown = show_color(int(member)) if flag == _COLORS else member
                raise ValueError(
                    f"Expected one class for {shown} in {flag}, got {owners[member]} and {name}. "
                    "Name it once."
                )
        groups.setdefault(name, []).extend(members)
    ignored = groups.pop(IGNORED, [])
    return ClassMembers(list(groups), list(groups.values()), ignored)
