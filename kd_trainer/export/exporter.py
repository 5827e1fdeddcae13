"""Write a student in a format of a device, and check it against torch on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kd_trainer.costs import Latency, interleaved
from kd_trainer.export.files import read_program, read_smp, require_all, write_program, write_smp
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.images import Sample, batches_of
from kd_trainer.export.onnx_file import check_opset, write_half, write_onnx
from kd_trainer.export.parity import CheckBatch, Network, Parity, Reference, compare
from kd_trainer.export.quantize import Quantiser
from kd_trainer.export.session import OnnxStudent
from kd_trainer.fields import check_at_least, check_choice, help_field
from kd_trainer.models.modeling import SmpForSemanticSegmentation

FILES = {
    "onnx": "student.onnx",
    "onnx-int8": "student_int8.onnx",
    "onnx-fp16": "student_fp16.onnx",
    "torch-export": "student.pt2",
    "smp": "student_smp",
}
PRECISIONS = {"onnx-int8": "int8", "onnx-fp16": "fp16"}
# What an export may differ from the student, see docs/export.md.
MOST_DIFFERENCE, LEAST_MASK_IOU = 1e-3, 0.999
LEAST_MASK_IOU_HALF = 0.99
MOST_DROP, LEAST_MASK_IOU_INT8 = 0.5, 0.97


@dataclass
class ExportArguments:
    """Settings of scripts/export.py beside those of the data."""

    format: str = help_field("", f"{', '.join(FILES)}.")
    output: str = help_field("runs/export", "Folder that gets the file and export.json.")
    with_preprocessing: bool = help_field(
        False,
        "Normalisation and sigmoid (softmax) inside: uint8 pictures (batch, height, width, 3) in, "
        "probabilities out.",
    )
    fixed_size: bool = help_field(
        False,
        "Take pictures of the student's own size only (needed by networks that pool into a fixed "
        "grid, such as PSPNet and UPerNet, and by some vision transformers).",
    )
    opset: int | None = help_field(
        None, "onnx: version of the operators, 18 or newer (default: the exporter's choice)."
    )
    images: list[str] | None = help_field(
        None, "Pictures to check on (files, folders, globs) instead of a data set with masks."
    )
    check_images: int = help_field(100, "On how many pictures to compare with torch.")
    calibration_images: int = help_field(
        64, "onnx-int8: on how many pictures to measure ranges, from the split to train on."
    )
    int8_exclude: list[str] = help_field(
        ["auto"],
        "onnx-int8: parts that stay in fp32: auto (those that int8 hurts most, as many as needed), "
        "none, or their names (such as decoder.blocks.0).",
    )
    batch_size: int = help_field(4, "Pictures at a time in the check.")
    latency_repeats: int = help_field(
        20, "Measured calls of torch and of the file, one picture on one thread; 0 measures none."
    )

    def __post_init__(self) -> None:
        check_choice("format", self.format, tuple(FILES))
        for name in ("check_images", "calibration_images", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("latency_repeats", self.latency_repeats, 0)
        for flag in ("with_preprocessing", "fixed_size"):
            if getattr(self, flag) and self.format == "smp":
                raise ValueError(
                    f"Expected a format with a graph for --{flag}, got smp, whose folder holds "
                    "weights only. Choose onnx or torch-export."
                )
        if self.opset is not None and not self.format.startswith("onnx"):
            raise ValueError(
                f"Expected an ONNX format for --opset, got {self.format}. Leave it out."
            )
        if self.format.startswith("onnx"):
            require_all()
            check_opset(self.opset)

    @property
    def entry(self) -> str:
        """Name of this export in export.json."""
        return self.format + ("+preprocessing" if self.with_preprocessing else "")

    @property
    def file_name(self) -> str:
        """Name of the file, or of smp's folder."""
        name = Path(FILES[self.format])
        ending = "_preprocessing" if self.with_preprocessing else ""
        return f"{name.stem}{ending}{name.suffix}"


class Exporter:
    """Writes one format into a folder and compares it with the student.

    Args:
        student: on the CPU, in eval mode.
        args: the settings.
        samples: pictures, with masks where they are known.
        work: an empty folder.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(
        self,
        student: SmpForSemanticSegmentation,
        args: ExportArguments,
        samples: Sequence[Sample],
        work: Path,
        *,
        ignore_index: int = 255,
    ) -> None:
        self.student = student
        self.args = args
        self.samples = samples
        self.path = work / args.file_name
        self.work = work
        self.ignore_index = ignore_index
        self.inside = args.with_preprocessing
        self.reference = Reference(student, probabilities=self.inside)

    def write(self) -> None:
        """Write every format but int8."""
        if self.args.format == "smp":
            write_smp(self.student, self.path)
        elif self.args.format == "torch-export":
            program = export_program(
                self.student, with_preprocessing=self.inside, fixed_size=self.args.fixed_size
            )
            write_program(program, self.path, self._metadata())
        else:
            full = self._write_full()
            if self.args.format == "onnx-fp16":
                write_half(full, self.path, self._metadata())
            else:
                full.rename(self.path)

    def write_int8(self, calibration: Sequence[Sample]) -> tuple[list[str], Parity]:
        """Write int8, leaving out what has to be left out; returns that and the figures.

        Raises:
            ValueError: if no version is good enough.
        """
        batches = [self._feed(picture[None]).numpy() for picture, _ in calibration]
        full = self._write_full()
        OnnxStudent(full)(batches[0])  # says in one line why a graph cannot be run
        quantiser = Quantiser(full, batches, self.work, self._metadata())
        for left_out in versions(quantiser, self.args.int8_exclude):
            quantiser.write(self.path, left_out=left_out)
            title = f"check, {len(left_out)} parts in fp32" if left_out else "check"
            parity = self.compare(batches_of(self.samples, self.args.batch_size), title)
            if int8_fault(parity) is None:
                return left_out, parity
        tried = f" with {', '.join(left_out)} in fp32" if left_out else ""
        raise ValueError(
            f"Expected an int8 export {int8_fault(parity)}{tried}. Nothing was written. Calibrate "
            f"on more images (--calibration_images {4 * len(batches)}), keep more parts in fp32 "
            f"(--int8_exclude PART ..., of {', '.join(p for p in quantiser.parts if p)}), or use "
            "onnx-fp16."
        )

    def compare(self, batches: Sequence[CheckBatch], title: str = "check") -> Parity:
        """The written file against the student."""
        return compare(
            self.reference,
            self._exported(torch.get_num_threads()),
            batches,
            ignore_index=self.ignore_index,
            title=title,
        )

    def latency(self) -> dict[str, Latency]:
        """Student and written file by turns: one picture, on one thread.

        The preparation of the picture counts for both where the file does it itself, else for none.
        """
        picture = self.samples[0][0][None]
        pixels = self.reference.prepare(picture)
        network = partial(self.reference.output, pixels)
        torch_call = partial(self.reference, picture) if self.inside else network
        calls = {"torch": torch_call, "file": partial(self._runner(threads=1), self._feed(picture))}
        return interleaved(calls, [], self.args.latency_repeats, threads=1)

    def _write_full(self) -> Path:
        path = self.work / "full.onnx"
        program = export_program(
            self.student,
            with_preprocessing=self.inside,
            prune=False,
            fixed_size=self.args.fixed_size,
        )
        write_onnx(
            program,
            path,
            self._metadata(),
            with_preprocessing=self.inside,
            opset=self.args.opset,
        )
        return path

    def _metadata(self) -> dict[str, str]:
        precision = PRECISIONS.get(self.args.format, "fp32")
        return metadata_of(
            self.student,
            with_preprocessing=self.inside,
            precision=precision,
            fixed_size=self.args.fixed_size,
        )

    def _feed(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) as the exported file takes them."""
        return pictures.permute(0, 2, 3, 1) if self.inside else self.reference.prepare(pictures)

    def _exported(self, threads: int) -> Network:
        """The written file as a function of uint8 pictures (B, 3, H, W)."""
        run = self._runner(threads)
        return lambda pictures: run(self._feed(pictures))

    def _runner(self, threads: int) -> Network:
        """The written file as a function of what it takes."""
        if self.args.format == "smp":
            return read_smp(self.path)
        if self.args.format == "torch-export":
            return partial(_run_program, read_program(self.path))
        session = OnnxStudent(self.path, threads=threads)
        return lambda fed: torch.from_numpy(session(fed.numpy()))


def _run_program(program: Network, pixels: Tensor) -> Tensor:
    try:
        return program(pixels)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"Expected a program that runs on {tuple(pixels.shape)}, got one that does not: "
            f"{reason}. Export the student with --fixed_size."
        ) from error


def versions(quantiser: Quantiser, exclude: Sequence[str]) -> Iterator[list[str]]:
    """What to leave out of int8, one try after the other, at most half of the parts."""
    if list(exclude) not in (["auto"], ["none"]):
        yield list(exclude)
        return
    yield []
    if list(exclude) == ["auto"]:
        order = quantiser.by_sensitivity()
        for count in range(1, len(order) // 2 + 1):
            yield order[:count]


def int8_fault(parity: Parity) -> str | None:
    """What is wrong with an int8 export, None if it is good enough."""
    if parity.drop is not None:
        if parity.drop <= MOST_DROP:
            return None
        return (
            f"that loses at most {MOST_DROP} points of mIoU, got {parity.drop:.2f} "
            f"({parity.torch_miou:.4f} to {parity.miou:.4f})"
        )
    if parity.mask_iou >= LEAST_MASK_IOU_INT8:
        return None
    return (
        f"whose masks have an IoU of at least {LEAST_MASK_IOU_INT8} with the student's, got "
        f"{parity.mask_iou:.4f}"
    )


def check(args: ExportArguments, parity: Parity, where: str) -> None:
    """Refuse an export in floating point that is not the student.

    Raises:
        ValueError: if it differs by more than its format explains.
    """
    exact = args.format != "onnx-fp16"
    least = LEAST_MASK_IOU if exact else LEAST_MASK_IOU_HALF
    wanted = f"masks of IoU >= {least} with the student's"
    if exact:
        wanted = f"outputs within {MOST_DIFFERENCE:g} of their range and {wanted}"
    fine = parity.mask_iou >= least
    if not fine or (exact and not parity.relative_difference <= MOST_DIFFERENCE):
        raise ValueError(
            f"Expected {wanted} from {args.entry}, got a difference of "
            f"{parity.relative_difference:.2g} and IoU {parity.mask_iou:.4f} {where}. Nothing was "
            "written. Check that student and images belong together; if they do, please report it."
        )
