"""Reading files that somebody else may have made, and writing so that nobody meets half of one.

A link in a stranger's folder points wherever its maker wants: reading through it shows a private
file, writing through it empties one. So no link is followed, and nothing read grows unbounded.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

MOST_BYTES = 256 * 2**20  # of a JSON file; the logs of a long run are some MiB
_MOST_YAML_BYTES = 2**20
_MOST_NODES = 100_000  # of a YAML file, aliases written out
_LARGEST = 2**63  # whole number in a YAML file
_DEEPEST = 50  # brackets in brackets
MARKER = ".kd_trainer.json"  # lists the files beside it that were written with it
# How torch.save says that a write failed: its archive writer passes no reason on.
_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


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


def read_json(path: Path) -> Any:
    """What a JSON file holds; None without the file.

    NaN and Infinity, which Python writes for figures that do not exist, become None.

    Raises:
        ValueError: if it is no JSON, or no regular file.
    """
    try:
        content = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=lambda _: None)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        reason = "values nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"Expected JSON in {path}, got: {reason}. Delete the file, or write it again."
        ) from None
    return value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, of plain values and a bounded size; links that a user names count.

    Raises:
        ValueError: if it is no YAML, or holds more than settings do.
    """
    # a value that its own tag contradicts (`!!int x`) fails in many ways
    contradictions = (LookupError, TypeError, AttributeError, ArithmeticError)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_YAML_BYTES + 1)
        if len(content) > _MOST_YAML_BYTES:
            raise ValueError("more than 1 MiB")
        return parse_yaml(content.decode("utf-8"))
    except (yaml.YAMLError, ValueError, *contradictions) as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "values nested too deep"
    raise ValueError(f"Expected YAML in {path}, got: {reason}.")


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
    _check_values(value, largest=_LARGEST)
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


def _check_values(value: Any, *, largest: float = math.inf) -> None:
    """Refuse what could be neither walked through nor written down again.

    Raises:
        RecursionError: if it is nested too deep.
        ValueError: for a larger whole number, or text that is half of a surrogate pair.
    """
    level = [value]
    for _ in range(_DEEPEST):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list | tuple | set):
                inside += item
            elif isinstance(item, str):
                item.encode()
            elif isinstance(item, int) and abs(item) > largest:
                raise ValueError(f"a number of {item.bit_length():,} bits")
        if not inside:
            return
        level = inside
    raise RecursionError


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
    partial.unlink(missing_ok=True)  # left by a process of this number, or put there as a link
    try:
        yield partial
        sync(partial)  # else a power cut may leave the new name without its content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, see `replacing_file`."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values`, a figure that does not exist (a class that never occurs) as null."""
    text = json.dumps(_without_nan(values), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in `folder` when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        yield Path(partial)
        for file in sorted(p for p in Path(partial).rglob("*") if p.is_file()):
            place = folder / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            file.replace(place)


@contextmanager
def replacing_folder(folder: Path, flag: str, *, sources: Collection[Path] = ()) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well.

    Raises:
        ValueError: as `check_replaceable` does.
    """
    check_replaceable(folder, flag, sources=sources)
    place = folder.resolve()
    new, old = (place.with_name(f".{place.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        write_marker(new, file_names(new))
        check_replaceable(folder, flag, sources=sources)  # it may have changed meanwhile
        if place.exists():
            place.rename(old)
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # of links the link goes, not what it leads to
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, flag: str, *, sources: Collection[Path] = ()) -> None:
    """Refuse a folder that holds anything but what `replacing_folder` put there.

    Args:
        folder: to be written anew.
        flag: which names it.
        sources: folders that are read; neither they nor those above them are written to.

    Raises:
        ValueError: says what is in the way.
    """
    cure = f"Name another --{flag}."
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise ValueError(
            f"Expected a folder to write into, got {folder}, which is a {kind}. {cure}"
        )
    place = folder.resolve()
    held = {"the source": [s.resolve() for s in sources], "the working folder": [Path.cwd()]}
    for name, paths in held.items():
        for path in paths:
            if path == place or place in path.parents:
                relation = "is" if path == place else "holds"
                raise ValueError(
                    f"Expected a folder to write a copy into, got {folder}, which {relation} "
                    f"{name}. {cure}"
                )
    foreign = sorted(file_names(folder) - marked_files(folder))
    if foreign:
        raise ValueError(
            f"Expected an empty folder or one that was written here before, got {folder}, which "
            f"holds {foreign[0]} of another origin. {cure[:-1]}, or empty it yourself."
        )


def file_names(folder: Path) -> set[str]:
    """Names of all that is in a folder but real folders and the marker: links are not followed."""
    names = set()
    for root, folders, files in os.walk(folder):
        place = Path(root)
        links = [name for name in folders if (place / name).is_symlink()]
        names |= {str((place / name).relative_to(folder)) for name in (*files, *links)}
    return names - {MARKER}


def write_marker(folder: Path, names: Collection[str]) -> None:
    """Write down that these files were written here."""
    write_text(folder / MARKER, json.dumps({"files": sorted(names)}) + "\n")


def marked_files(folder: Path) -> set[str]:
    """Names of the files that were written here."""
    try:
        return {str(name) for name in read_json(folder / MARKER)["files"]}
    except (ValueError, TypeError, KeyError):
        return set()  # no marker, not ours, or cut off: nothing is known to be ours


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.absolute()
    return next(p for p in (place, *place.parents) if p.exists())


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to; leaves nothing behind.

    Raises:
        OSError: says why not.
    """
    place = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"Expected an --output_dir that can be written to, got {folder}: {error.strerror} in "
            f"{place}. Name another folder, or make room or change the rights there."
        ) from None


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn what libraries raise when a write fails into one error that names the place.

    Raises:
        OSError: says what could not be written, where and why.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(nearest_existing(folder)).free / 2**20
        raise OSError(
            f"Expected to write {what} into {folder}, got: {reason} ({free:,.0f} MiB are free "
            "there). Make room or mend the disk, then go on from the last complete checkpoint, if "
            "there is one, with --resume."
        ) from error


def _reason(error: BaseException) -> str | None:
    """Why the disk did not take it; None if the error is not of the disk, or says it already."""
    text = " ".join(str(error).split())
    if text.startswith("Expected"):
        return None
    if isinstance(error, SafetensorError):
        return text.partition("I/O error: ")[2] or None
    if isinstance(error, OSError):
        return error.strerror or text
    return "a file could not be written to its end" if _OF_TORCH.search(text) else None


class FolderLock:
    """Keeps two runs out of one output folder; a process that ends, however, gives it back.

    A lock of the system rather than a file that marks: nothing is left behind by a SIGKILL.
    """

    FILE = ".training"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Take it if the folder is there; once taken, nothing happens.

        Raises:
            OSError: if another process has it.
        """
        if self._handle is not None or not self.folder.is_dir():
            return
        check_writable(self.folder)
        handle = open_regular(self.folder / self.FILE, os.O_RDWR | os.O_CREAT)
        try:
            # Not flock, which a process that reads data would inherit, and hold on to for a moment.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 64, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # some network disks know no locks
            raise OSError(
                f"Expected an --output_dir in which no training is running, got {self.folder}, in "
                f"which process {owner or 'another'} is at work. Wait for its end, stop it, or "
                "name another folder."
            ) from None
        self._handle = handle
        with suppress(OSError):  # of a full disk, say: the number is for the message alone
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give it back, if it was taken."""
        if self._handle is not None:
            (self.folder / self.FILE).unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
