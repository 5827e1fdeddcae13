"""The images and videos that a command line names, as arrays, and frames as a video.

Sound is not carried over.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from kd_trainer.data.images import decode_image
from kd_trainer.data.listing import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_input_files(sources: Sequence[str]) -> list[Path]:
    """Images and videos that files, folders (searched deeply) and globs name, in order, once.

    Raises:
        FileNotFoundError: if a source names neither.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_file():
            files.append(path)
            continue
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))  # noqa: PTH207
        named = sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        if not named:
            raise FileNotFoundError(
                f"Expected an image, a folder of images or a glob, got {source}, which names none. "
                "Put a glob in quotes."
            )
        files += named
    return list(dict.fromkeys(files))


def read_image(path: Path) -> Image.Image:
    """An image as the training reads it: RGB, upright, white where it is transparent.

    Raises:
        ValueError: if the file is no readable image.
    """
    return Image.fromarray(decode_image({"path": str(path), "bytes": None}, 0))


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file; two of the same stem get their folder or suffix into it."""
    stems = [p.stem for p in files]
    names: dict[Path, str] = {}
    for path in files:
        name = path.stem
        if stems.count(name) > 1:
            name = "_".join([path.parent.name, path.stem, path.suffix[1:]]).strip("_")
        number, unique = 1, name
        while unique in names.values():
            number += 1
            unique = f"{name}_{number}"
        names[path] = unique
    return names


# FFmpeg would print its own complaint about a broken file beside our error; read at first use.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# The one encoder that every build of OpenCV's wheels brings for .mp4.
_CODEC = cv2.VideoWriter.fourcc(*"mp4v")

# How containers begin: bytes from a position. FFmpeg goes by the content whatever the suffix is,
# and to it a text can be a list of further files and addresses to read (ffconcat, HLS).
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_BEGINNINGS = (
    *((4, box) for box in _BOXES),  # MP4, MOV
    (0, b"RIFF"),  # AVI
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    *((0, start) for start in (b"FLV", b"OggS", b"\x30\x26\xb2\x75", b"\x00\x00\x01\xba")),
    *((position, b"G") for position in (0, 4)),  # MPEG-TS: checked once more a packet later
)
_PACKET = 188
# Containers that count their frames; in others OpenCV estimates the count from the duration.
_COUNTED = frozenset({".mp4", ".m4v", ".mov", ".avi"})


def _is_container(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2 * _PACKET + 16)
    return any(
        start.startswith(sign, at) and (sign != b"G" or start.startswith(b"G", 2 * at + _PACKET))
        for at, sign in _BEGINNINGS
    )


@contextmanager
def _opened(path: Path) -> Iterator[cv2.VideoCapture]:
    if not _is_container(path):
        raise ValueError(
            f"Expected a video as its suffix says, got {path}, which begins like none. Convert it "
            "to .mp4 (H.264) first."
        )
    # By its whole path, which no protocol and no pattern of numbered images can be read into.
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise ValueError(
                f"Expected a readable video, got {path}. Convert it to .mp4 (H.264) first."
            )
        yield capture
    finally:
        capture.release()


def frame_count(path: Path) -> int:
    """Frames that a video says it has; 0 if it does not say.

    Raises:
        ValueError: if it cannot be read.
    """
    with _opened(path) as capture:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def frame_rate(path: Path) -> float:
    """Frames per second; 25 where the file does not say.

    Raises:
        ValueError: if it cannot be read.
    """
    with _opened(path) as capture:
        return float(capture.get(cv2.CAP_PROP_FPS)) or 25.0


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, each uint8 RGB (H, W, 3), upright.

    Raises:
        ValueError: if it cannot be read, or holds no frame.
        CutOffError: behind the last frame, if the file promises more.
    """
    with _opened(path) as capture:
        ok, frame = capture.read()
        if not ok:
            raise ValueError(f"Expected a video with frames, got none in {path}.")
        promised, number = capture.get(cv2.CAP_PROP_FRAME_COUNT), 0
        while ok:
            number += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            ok, frame = capture.read()
        if path.suffix.lower() not in _COUNTED:
            promised = 0.95 * promised - 2
        if number < promised:
            raise CutOffError(
                f"Expected the {promised:.0f} frames that {path} promises, got {number}: it is cut "
                "off or damaged, and frames behind a hole have the wrong number. Copy it anew, or "
                "convert it to .mp4 (H.264)."
            )


class CutOffError(ValueError):
    """A video ends before the number of frames that it promises."""


class VideoFile:
    """An .mp4 that grows frame by frame; made with the first one, closed by `close`."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = rate
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 RGB (H, W, 3) of the size of the first.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if the frame has another size, which OpenCV would leave out in silence.
        """
        size = (frame.shape[1], frame.shape[0])
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = size
            self._writer = cv2.VideoWriter(str(self.path), _CODEC, self.rate, size)
            if not self._writer.isOpened():
                raise OSError(f"Expected to write the video {self.path}, but it cannot be opened.")
        if size != self._size:
            raise ValueError(
                f"Expected frames of {self._size[0]}x{self._size[1]} for {self.path}, got one of "
                f"{size[0]}x{size[1]}. Convert the video to one size first."
            )
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: if it does not hold all frames, of which OpenCV says nothing (a full disk).
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            written = frame_count(self.path)
        except ValueError:
            written = 0
        if written != self._frames:
            raise OSError(
                f"Expected {self._frames} frames in {self.path}, got {written}. Is the disk full?"
            )
