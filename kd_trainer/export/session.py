"""An exported ONNX file as a function of a batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from kd_trainer.export.files import read_metadata, require
from kd_trainer.fields import expanded

# Seconds an image: far more than a student takes, so that only a graph without an end meets it.
TIME_LIMIT = 60.0
Batch = np.ndarray[Any, np.dtype[Any]]


class OnnxStudent:
    """Runs an ONNX file of scripts/export.py with onnxruntime on the CPU.

    Args:
        path: of the file.
        threads: that one picture may use; 0 leaves the choice to onnxruntime.
        time_limit: seconds an image may take; a file can hold a loop without end.

    Attributes:
        class_names: name of each class, background first.
        image_size: side in pixels of the square input the model is meant for.
        size_multiple: height and width have to be multiples of it.
        fixed_size: whether height and width have to be `image_size`.
        image_mean: of each channel, of values in 0..1.
        image_std: likewise.
        with_preprocessing: whether it takes uint8 pictures and gives probabilities.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a package is missing, or the file is not one of scripts/export.py.
    """

    def __init__(
        self, path: str | Path, *, threads: int = 0, time_limit: float = TIME_LIMIT
    ) -> None:
        path = expanded(str(path))
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Expected an ONNX file, got {path}, which does not exist. scripts/export.py "
                "writes one."
            )
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised as well
        try:
            self.session: Any = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base class of their own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"Expected a readable ONNX file, got {path}: {reason}") from error
        told = read_metadata(self.session.get_modelmeta().custom_metadata_map, path)
        self.path = path
        self.time_limit = time_limit
        self.metadata: dict[str, str] = told.text
        self.class_names = told.class_names
        self.image_size = told.image_size
        self.size_multiple = told.size_multiple
        self.fixed_size = told.text.get("fixed_size") == "true"
        self.image_mean, self.image_std = told.image_mean, told.image_std
        self.with_preprocessing = told.with_preprocessing
        self._runtime = runtime
        self._input = self.session.get_inputs()[0].name

    def __call__(self, pixels: Batch) -> Batch:
        """Segment a batch.

        Args:
            pixels: normalised float32 (B, 3, H, W), or uint8 pictures (B, H, W, 3) if the
                preprocessing is inside.

        Returns:
            float32 (B, K, H, W): raw logits, or probabilities if the preprocessing is inside. K is
            1 for a binary model.

        Raises:
            ValueError: if shape or type are others, a side is no multiple of `size_multiple` (or
                not `image_size`, where that is fixed), or onnxruntime cannot run the file.
        """
        wanted = "uint8" if self.with_preprocessing else "float32"
        channels, rows = (3, 1) if self.with_preprocessing else (1, 2)
        fits = pixels.ndim == 4 and pixels.shape[channels] == 3 and pixels.dtype == wanted
        if not fits:
            raise ValueError(
                f"Expected {self.metadata['input']}, got {pixels.dtype} {pixels.shape}. Convert it."
            )
        for side in pixels.shape[rows : rows + 2]:
            if self.fixed_size and side != self.image_size:
                raise ValueError(
                    f"Expected height and width of {self.image_size}, the one size of this file, "
                    f"got {side}. Resize the picture, or export without --fixed_size."
                )
            if side < 1 or side % self.size_multiple:
                raise ValueError(
                    f"Expected height and width divisible by {self.size_multiple}, got {side}. "
                    f"Resize to {self.image_size}x{self.image_size}, for which it was trained."
                )
        found = self._run(np.ascontiguousarray(pixels))
        height, width = pixels.shape[rows : rows + 2]
        channels = 1 if len(self.class_names) == 2 else len(self.class_names)
        shapes = {(len(pixels), k, height, width) for k in (channels, len(self.class_names))}
        if getattr(found, "shape", None) not in shapes:
            raise ValueError(
                f"Expected {channels} channels of {height}x{width} from {self.path}, whose "
                f"metadata names {len(self.class_names)} classes, got "
                f"{getattr(found, 'shape', type(found).__name__)}. Export the student anew."
            )
        return found

    def _run(self, pixels: Batch) -> Batch:
        """One call of the graph, stopped between two of its nodes when its time is over."""
        options = self._runtime.RunOptions()
        seconds = self.time_limit * max(1, len(pixels))
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            found: Batch = self.session.run(None, {self._input: pixels}, options)[0]
        except Exception as error:  # onnxruntime's errors share no base class of their own
            if options.terminate:
                raise ValueError(
                    f"Expected {self.path} to answer within {seconds:g} seconds, got no answer. "
                    "Export a smaller network, or raise time_limit of load_onnx."
                ) from error
            reason = " ".join(str(error).split())[:200].rstrip(".")
            cure = "--format torch-export" if self.fixed_size else "--fixed_size"
            raise ValueError(
                f"Expected an ONNX file that onnxruntime runs on {pixels.dtype} {pixels.shape}, "
                f"got {self.path}: {reason}. Export the student with {cure}."
            ) from error
        finally:
            timer.cancel()
        return found


def load_onnx(path: str | Path, *, threads: int = 0, time_limit: float = TIME_LIMIT) -> OnnxStudent:
    """The student in an ONNX file, as a function; see `OnnxStudent`."""
    return OnnxStudent(path, threads=threads, time_limit=time_limit)
