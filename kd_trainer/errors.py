"""Errors that a user can mend: one printable line on the terminal, and no traceback."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

PACKAGE = Path(__file__).parent
# Packages that only one part needs, as in pyproject.toml: imported late.
EXTRAS = {"export": ("onnx", "onnxruntime", "onnxscript"), "demo": ("gradio",)}
_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+', re.MULTILINE)


def printable(value: object) -> str:
    """Text without what a terminal would obey, or a table break at: names are a stranger's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def clipped(text: object, most: int = 80) -> str:
    """Text for a message, of at most so many characters."""
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def announce(text: str) -> None:
    """Say on the terminal, once for all processes of a run, what was understood."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr)


def require(name: str, *, extra: str) -> Any:
    """A module of an extra.

    Args:
        name: dotted name of the module.
        extra: a key of EXTRAS.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = name.partition(".")[0]
        raise ValueError(
            f"Expected the packages of the extra '{extra}' ({', '.join(EXTRAS[extra])}), got no "
            f"{missing}. pip install 'kd_trainer[{extra}]'."
        ) from error


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


class Stopped(Exception):  # noqa: N818 (no error: it was asked for)
    """A run that was told to stop and has saved itself.

    Attributes:
        code: with which a shell expects the process to end: 128 and the number of the signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


# What a user can mend. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)


GO_ON = "Go on with the same command and --resume."


def run_script(main: Callable[[], None], *, go_on: str = GO_ON) -> None:
    """Call `main`; print an error that the user can mend as one line and exit with 1.

    A training that was told to stop, and has saved itself, ends with 128 and the signal's number,
    and with the line `go_on`.
    """
    # One short file of weights needs no bar of its own beside those of the run.
    disable_progress_bar()
    try:
        main()
    except USER_ERRORS as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Stopped as stop:
        announce(f"{stop} {go_on}")
        sys.exit(stop.code)


def user_message(error: BaseException) -> str | None:
    """The message on one printable line, or None if the error is no fault of the user's.

    Messages of the operating system name a path. An error from a process that reads data arrives as
    the text of its traceback, whose end it is.
    """
    text = str(error)
    message = own_message_of_worker(text) if "DataLoader worker" in text else None
    if message is None and (is_own(error) or isinstance(error, OSError)):
        message = text
    return None if message is None else printable(" ".join(message.split()))
