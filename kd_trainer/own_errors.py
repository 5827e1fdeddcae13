"""Telling an error of ours, whose message is written for the user, from one of a library."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent
_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+', re.MULTILINE)


def is_own(error: BaseException) -> bool:
    """Whether an error says `Expected ...` and was raised by a file of this package.

    The words alone say nothing: torch begins some of its own messages with `Expected` too.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = frames[-1].f_code.co_filename if frames else ""
    return str(error).startswith("Expected") and _is_ours(place)


def own_message_of_worker(text: str) -> str | None:
    """The message of an error of ours in the traceback that a data worker sends; else None."""
    before, *after = re.split(r"^[\w.]+Error: (?=Expected)", text, flags=re.MULTILINE)
    if not after:
        return None
    places = _FRAME.findall("".join([before, *after[:-1]]))
    return after[-1] if places and _is_ours(places[-1]) else None


def _is_ours(file: str) -> bool:
    return PACKAGE in Path(file).absolute().parents
