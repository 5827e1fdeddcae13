"""Fields of the settings: their help, checks that several share, names that are nearly right."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_PREFIXES = " kmgt"


def help_field(default: Any, text: str, **options: Any) -> Any:
    """A dataclass field whose flag has this help.

    Args:
        default: of the field; a list is copied for each object.
        text: for `--help`.
        options: of `argparse.ArgumentParser.add_argument`; and `aliases`, further flags.
    """
    metadata = {"help": text} | options
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    """Refuse a value that is not among the options."""
    if value not in options:
        raise ValueError(f"Expected --{name} to be one of {', '.join(options)}, got {value!r}.")


def check_at_least(name: str, value: float, bound: float, cure: str = "") -> None:
    """Refuse a number that is not finite or lies below the bound."""
    if not (math.isfinite(value) and value >= bound):
        raise ValueError(f"Expected --{name} of at least {bound:g}, got {value!r}.{cure}")


def check_folder(name: str, path: str) -> None:
    """Refuse a folder to write to whose place, or a part of whose path, is taken by a file."""
    place = Path(path).absolute()
    taken = next((p for p in (place, *place.parents) if p.exists()), place)
    if taken.is_file():
        raise ValueError(
            f"Expected a folder as --{name}, got {path}, where {taken.name} is a file. Name "
            "another folder."
        )


def expanded(value: Any) -> Any:
    """Text that names a place in a home folder, in full; anything else as it is.

    A shell expands only the `~` that starts a word, so `--flag=~/x` and YAML arrive as written.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if isinstance(value, str) and value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # `~name` of nobody is a file of that name
            return str(Path(value).expanduser())
    return value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` may be a misspelling of; None if none is like it.

    The dashes before a flag, which all flags share, say nothing; neither do capitals.
    """
    by_word = {word.lstrip("-").casefold(): word for word in reversed(list(known))}
    near = get_close_matches(name.lstrip("-").casefold(), by_word, n=1, cutoff=0.65)
    return by_word[near[0]] if near else None


def closest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing if no name is near."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def parse_point(
    text: str, like: str = "--temperature_points like 0:4.0 10:2.0 49:1.0"
) -> tuple[float, float]:
    """EPOCH:VALUE as two numbers; `like` is how a message says what was expected."""
    epoch, separator, value = str(text).partition(":")
    try:
        return float(epoch), float(value) if separator else math.nan
    except ValueError:
        raise ValueError(f"Expected {like}, got {text!r}.") from None


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as 20GB, 500 MB or 1.5GiB.

    Raises:
        ValueError: if it is none, or zero.
    """
    size = 0
    if match := _SIZE.fullmatch(text.strip()):
        number, prefix, binary = match.groups()
        power = _PREFIXES.index((prefix or " ").lower())
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size <= 0:
        raise ValueError(f"Expected --{flag} as 20GB, 500MB or 1.5GiB, got {text!r}.")
    return size
