"""Videos as frames, and frames as a video. Sound is not carried over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

# FFmpeg would print its own complaint about a broken file beside our error; read at first use.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# The one encoder that every build of OpenCV's wheels brings for .mp4.
_CODEC = cv2.VideoWriter.fourcc(*"mp4v")
_USUAL_RATE = 25.0


@contextmanager
def _opened(path: Path) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(str(path))
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
        return float(capture.get(cv2.CAP_PROP_FPS)) or _USUAL_RATE


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, each uint8 RGB (H, W, 3), upright.

    Raises:
        ValueError: if it cannot be read, or holds no frame.
    """
    with _opened(path) as capture:
        ok, frame = capture.read()
        if not ok:
            raise ValueError(f"Expected a video with frames, got none in {path}.")
        while ok:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            ok, frame = capture.read()


class VideoFile:
    """An .mp4 that grows frame by frame; made with the first one, closed by `close`."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = rate
        self._writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 RGB (H, W, 3) of the size of the first.

        Raises:
            OSError: if the file cannot be written.
        """
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self.path), _CODEC, self.rate, size)
            if not self._writer.isOpened():
                raise OSError(f"Expected to write the video {self.path}, but it cannot be opened.")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()
