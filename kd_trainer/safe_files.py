"""Files in folders that somebody else may have made: no link is followed, nothing grows unbounded.

A link in such a folder points wherever its maker wants: reading through it shows a private file,
writing through it empties one.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 * 2**20  # of a JSON file; the logs of a long run are some MiB
_MOST_YAML_BYTES = 2**20
_MOST_NODES = 100_000  # of a YAML file, aliases written out
_LARGEST = 2**63
_DEEPEST = 50  # brackets in brackets of a JSON file


def check_regular(path: Path) -> None:
    """Refuse a link, a device or a pipe; a file that is not there yet passes.

    Raises:
        ValueError: says what it is.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"))
        kind = next((name for is_kind, name in kinds if is_kind(mode)), "a device or pipe")
        raise ValueError(
            f"Expected a regular file as {path}, got {kind}. Put the file itself there, or take it "
            "away."
        )


def open_regular(path: Path, flags: int) -> int:
    """`os.open` that neither follows a link nor waits for a pipe; new files get the usual mode.

    Raises:
        FileNotFoundError: without the file, unless `flags` make one.
        ValueError: if it is no regular file.
    """
    check_regular(path)  # for its message; what is swapped afterwards fails below
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        check_regular(path)
        raise OSError(f"Expected {path} to stay as it is while it is opened, got another file.")
    return handle


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        FileNotFoundError: without the file.
        ValueError: if it is no regular file, or larger.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"Expected at most {most / 2**20:g} MiB in {path}, got more.")
    return content


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block has ended well.

    So a reader meets the file before or the new one, never half of one, however the process ends.

    Raises:
        ValueError: if there is a folder or a device in its place; a link is replaced, not followed.
    """
    if not path.is_symlink():
        check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)  # else a power cut may leave the new name without its content
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, see `replacing_file`."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(file: Path) -> None:
    """Have the disk hold what was written to a file."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None without the file.

    NaN and Infinity, which Python writes for figures that do not exist, become None.

    Raises:
        ValueError: if it is no JSON, or no regular file.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8"), parse_constant=lambda _: None)
        _check_tree(value)
        return value
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Expected a"):
            raise
        reason = "values nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"Expected JSON in {path}, got: {reason}. Delete the file, or write it again."
        ) from None


def _check_tree(value: Any) -> None:
    """Refuse what could be neither walked through nor written down again.

    Raises:
        RecursionError: if it is nested too deep.
        ValueError: if a text is none, as half of a surrogate pair is.
    """
    level = [value]
    for _ in range(_DEEPEST):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list):
                inside += item
            elif isinstance(item, str):
                item.encode()
        if not inside:
            return
        level = inside
    raise RecursionError


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, of plain values and a bounded size; links that a user names count.

    Raises:
        ValueError: if it is no YAML, or holds more than settings do.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_YAML_BYTES + 1)
        if len(content) > _MOST_YAML_BYTES:
            raise ValueError("more than 1 MiB")
        return parse_yaml(content.decode("utf-8"))
    # a value that its own tag contradicts (`!!int x`) fails in many ways
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as e:
        raise ValueError(f"Expected YAML in {path}, got: {' '.join(str(e).split())}.") from None
    except RecursionError:
        raise ValueError(f"Expected YAML in {path}, got: values nested too deep.") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: if it grows beyond what settings need, as aliases of aliases do.
        yaml.YAMLError: if it is no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    _check_values(value)
    return value


def _check_size(node: yaml.Node) -> None:
    """Count nodes as if aliases were written out; one that holds itself never ends."""
    waiting: list[Any] = [node]
    for _ in range(_MOST_NODES):
        if not waiting:
            return
        value = waiting.pop().value
        for item in value if isinstance(value, list) else ():
            waiting += item if isinstance(item, tuple) else (item,)
    raise ValueError(f"more than {_MOST_NODES:,} values, with aliases written out")


def _check_values(value: Any) -> None:
    """Refuse what could not be written down again: such whole numbers, and half characters."""
    if isinstance(value, str):
        value.encode()
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"a number of {value.bit_length():,} bits")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for item in value if isinstance(value, list | tuple | set) else ():
        _check_values(item)


def plain(value: object) -> str:
    """Text without what a terminal would obey, or a table break at: names are a stranger's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def clipped(text: object, most: int = 80) -> str:
    """Text for a message, of at most so many characters."""
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
