"""ONNX files: one file each, named input and output, metadata, no weight that is never used."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.onnx import export as torch_onnx_export

from kd_trainer.export.files import require, require_all
from kd_trainer.export.graph import PICTURE_INPUT, PROBABILITY_OUTPUT, RAW_INPUT, RAW_OUTPUT


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
    with _quiet():
        made: Any = torch_onnx_export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[PICTURE_INPUT if with_preprocessing else RAW_INPUT],
            output_names=[PROBABILITY_OUTPUT if with_preprocessing else RAW_OUTPUT],
        )
    model = made.model_proto
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


OLDEST_OPSET = 18  # what torch's exporter writes


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


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
