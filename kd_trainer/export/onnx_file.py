"""ONNX files: one file each, named input and output, metadata, no weight that is never used."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.export import ExportedProgram
from torch.onnx import export as torch_onnx_export

from kd_trainer import errors
from kd_trainer.export.graph import (
    IMAGE_INPUT,
    PROBABILITY_OUTPUT,
    RAW_INPUT,
    RAW_OUTPUT,
    read_metadata,
)
from kd_trainer.fields import expanded
from kd_trainer.models.image_sizes import size_text

OLDEST_OPSET = 18  # what torch's exporter writes
# Seconds an image: far more than a student takes, so that only a graph without an end meets it.
TIME_LIMIT = 60.0
Batch = np.ndarray[Any, np.dtype[Any]]
require = partial(errors.require, extra="export")


def require_all() -> None:
    """Refuse to start an ONNX export that could not be finished.

    Raises:
        ValueError: if one of the packages is not installed.
    """
    for name in errors.EXTRAS["export"]:
        require(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries print, and what they log for their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def write_onnx(
    program: ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    *,
    with_preprocessing: bool,
    opset: int | None = None,
) -> None:
    """Write a traced student as one ONNX file.

    Args:
        program: of `export_program`, traced with the same `with_preprocessing`.
        path: of the file.
        metadata: of `metadata_of`; stored in the file.
        opset: version of ONNX's operators, from 18; None takes the exporter's own choice.
        with_preprocessing: decides the names: `image` and `probabilities`, or `pixel_values` and
            `logits`.

    Raises:
        ValueError: if a package is missing, or the file would hold weights that nothing uses.
    """
    require_all()
    rows, columns = (1, 2) if with_preprocessing else (2, 3)
    with quiet():
        exported: Any = torch_onnx_export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[IMAGE_INPUT if with_preprocessing else RAW_INPUT],
            output_names=[PROBABILITY_OUTPUT if with_preprocessing else RAW_OUTPUT],
        )
    model = exported.model_proto
    if opset not in (None, model.opset_import[0].version):
        raise ValueError(
            f"Expected a network that can be written with --opset {opset}, got one that onnx "
            "cannot convert. Leave --opset out."
        )
    _forget_sources(model)
    for tensor, (height, width) in (
        (model.graph.input[0], (rows, columns)),
        (model.graph.output[0], (2, 3)),
    ):
        for axis, name in ((0, "batch"), (height, "height"), (width, "width")):
            size = tensor.type.tensor_type.shape.dim[axis]
            if not size.dim_value:  # a fixed side keeps its number
                size.dim_param = name
    del model.graph.value_info[:]  # it names the sizes as the tracer did
    save_onnx(model, path, metadata)


def check_opset(opset: int | None) -> None:
    """Refuse versions of the operators that cannot be written; the exporter would take another.

    Raises:
        ValueError: names the range.
    """
    newest: int = require("onnx").defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"Expected --opset from {OLDEST_OPSET} to {newest}, the newest of the installed onnx, "
            f"got {opset}."
        )


def _forget_sources(model: Any) -> None:
    """Drop what the exporter writes about its own sources: stack traces with paths of a machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:]
    del model.metadata_props[:]


def unused_initializers(model: Any) -> list[str]:
    """Names of the weights in a model that no node and no output reads."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {output.name for output in model.graph.output}
    return [weight.name for weight in model.graph.initializer if weight.name not in read]


def save_onnx(model: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Check a model and write it with its metadata as one file.

    Raises:
        ValueError: if it holds weights that nothing uses.
    """
    onnx = require("onnx")
    unused = unused_initializers(model)
    if unused:
        raise ValueError(
            f"Expected a graph that uses every weight, got {len(unused)} unused: "
            f"{', '.join(unused[:3])}. This is a defect: please report it with the model's name."
        )
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name = "kd_trainer"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


def write_half(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file in half precision; input and output keep their types.

    Args:
        source: of `write_onnx`.
        target: of the result, about half the size.
        metadata: as before, with its own `precision`.
    """
    onnx = require("onnx")
    half = require("onnxruntime.transformers.float16")
    model = half.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    representation = require("onnx_ir")
    ordered = representation.from_proto(model)
    ordered.graph.sort()  # the converter appends its casts behind the nodes that read them
    save_onnx(representation.to_proto(ordered), target, metadata)


class OnnxStudent:
    """Runs an ONNX file of scripts/export.py with onnxruntime on the CPU.

    Args:
        path: of the file.
        threads: that one image may use; 0 leaves the choice to onnxruntime.
        time_limit: seconds an image may take; a file can hold a loop without end.

    Attributes:
        class_names: name of each class, background first.
        image_size: (height, width) in pixels of the input the model is meant for.
        keep_aspect_ratio: whether images are fitted into it and padded, instead of stretched.
        size_multiple: height and width have to be multiples of it.
        fixed_size: whether height and width have to be `image_size`.
        image_mean: of each channel, of values in 0..1.
        image_std: likewise.
        with_preprocessing: whether it takes images (uint8, with `own_depth` scaled floats) and
            gives probabilities.
        multi_label: whether a pixel may have several of the classes.
        own_depth: whether images have as many channels as `image_mean`, of any bit depth.

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
        about = read_metadata(self.session.get_modelmeta().custom_metadata_map, path)
        self.path = path
        self.time_limit = time_limit
        self.metadata: dict[str, str] = about.text
        self.class_names = about.class_names
        self.image_size = about.image_size
        self.size_multiple = about.size_multiple
        self.keep_aspect_ratio = about.text.get("keep_aspect_ratio") == "true"
        self.fixed_size = about.text.get("fixed_size") == "true"
        self.image_mean, self.image_std = about.image_mean, about.image_std
        self.with_preprocessing = about.with_preprocessing
        self.multi_label, self.own_depth = about.multi_label, about.own_depth
        self._runtime = runtime
        self._input = self.session.get_inputs()[0].name

    def __call__(self, pixels: Batch) -> Batch:
        """Segment a batch.

        Args:
            pixels: normalised float32 (B, C, H, W), or if the preprocessing is inside uint8
                images (B, H, W, 3), with `own_depth` float32 (B, H, W, C).

        Returns:
            float32 (B, K, H, W): raw logits, or probabilities if the preprocessing is inside. K is
            1 for a binary model.

        Raises:
            ValueError: if shape or type are others, a side is no multiple of `size_multiple` (or
                not `image_size`, where that is fixed), or onnxruntime cannot run the file.
        """
        wanted = "uint8" if self.with_preprocessing and not self.own_depth else "float32"
        axis, rows = (3, 1) if self.with_preprocessing else (1, 2)
        count = len(self.image_mean)
        fits = pixels.ndim == 4 and pixels.shape[axis] == count and pixels.dtype == wanted
        if not fits:
            raise ValueError(
                f"Expected {self.metadata['input']}, got {pixels.dtype} {pixels.shape}. Convert it."
            )
        size = height, width = pixels.shape[rows : rows + 2]
        if self.fixed_size and size != self.image_size:
            raise ValueError(
                f"Expected height and width of {size_text(self.image_size)}, the one size of this "
                f"file, got {height}x{width}. Resize the image, or export without --fixed_size."
            )
        for side in size:
            if side < 1 or side % self.size_multiple:
                raise ValueError(
                    f"Expected height and width divisible by {self.size_multiple}, got {side}. "
                    f"Resize to {size_text(self.image_size)}, for which it was trained."
                )
        output = self._run(np.ascontiguousarray(pixels))
        binary = len(self.class_names) == 2 and not self.multi_label
        channels = 1 if binary else len(self.class_names)
        shapes = {(len(pixels), k, height, width) for k in (channels, len(self.class_names))}
        if getattr(output, "shape", None) not in shapes:
            raise ValueError(
                f"Expected {channels} channels of {height}x{width} from {self.path}, whose "
                f"metadata names {len(self.class_names)} classes, got "
                f"{getattr(output, 'shape', type(output).__name__)}. Export the student anew."
            )
        return output

    def _run(self, pixels: Batch) -> Batch:
        """One call of the graph, stopped between two of its nodes when its time is over."""
        options = self._runtime.RunOptions()
        seconds = self.time_limit * max(1, len(pixels))
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            output: Batch = self.session.run(None, {self._input: pixels}, options)[0]
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
        return output


def load_onnx(path: str | Path, *, threads: int = 0, time_limit: float = TIME_LIMIT) -> OnnxStudent:
    """The student in an ONNX file, as a function; see `OnnxStudent`."""
    return OnnxStudent(path, threads=threads, time_limit=time_limit)
