"""Write a student in a format of a device, and check it against torch on real images."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kd_trainer.build import evaluation_dataset
from kd_trainer.costs import Latency, interleaved
from kd_trainer.data.channels import channels_of_data
from kd_trainer.data.images import decode_image
from kd_trainer.data.input_files import find_input_files, is_video
from kd_trainer.data_arguments import DataArguments
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.onnx_file import (
    OnnxStudent,
    check_opset,
    quiet,
    require_all,
    write_half,
    write_onnx,
)
from kd_trainer.export.parity import CheckBatch, Network, Parity, Reference, compare
from kd_trainer.export.quantize import Quantiser
from kd_trainer.fields import check_at_least, check_choice, help_field
from kd_trainer.files import check_replaceable, replacing_file, replacing_folder, write_json
from kd_trainer.models.configuration_smp import build_network
from kd_trainer.models.image_processing import resize_image, to_input
from kd_trainer.models.image_sizes import Size, plain_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.run_folder import EXPORTS_SHAPE, read_object
from kd_trainer.sources import public_name
from kd_trainer.students import size_multiple, statistics_of

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
METADATA_FILE = "metadata.json"
RESULTS = "export.json"
PACKAGES = {"onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch": ("torch",)}
Sample = tuple[Tensor, Tensor | None]


@dataclass
class ExportArguments:
    """Settings of scripts/export.py beside those of the data."""

    format: str = help_field("", f"{', '.join(FILES)}.")
    output: str = help_field("runs/export", "Folder that gets the file and export.json.")
    with_preprocessing: bool = help_field(
        False,
        "Normalisation and sigmoid (softmax) inside: uint8 images (batch, height, width, 3) in "
        "(of --in_channels scaled floats), probabilities out.",
    )
    fixed_size: bool = help_field(
        False,
        "Take images of the student's own size only (needed by networks that pool into a fixed "
        "grid, such as PSPNet and UPerNet, and by some vision transformers).",
    )
    opset: int | None = help_field(
        None, "onnx: version of the operators, 18 or newer (default: the exporter's choice)."
    )
    images: list[str] | None = help_field(
        None, "Images to check on (files, folders, globs) instead of a data set with masks."
    )
    check_images: int = help_field(100, "On how many images to compare with torch.")
    calibration_images: int = help_field(
        64, "onnx-int8: on how many images to measure ranges, from the split to train on."
    )
    int8_exclude: list[str] = help_field(
        ["auto"],
        "onnx-int8: parts that stay in fp32: auto (those that int8 hurts most, as many as needed), "
        "none, or their names (such as decoder.blocks.0).",
    )
    batch_size: int = help_field(4, "Images at a time in the check.")
    latency_repeats: int = help_field(
        20, "Measured calls of torch and of the file, one image on one thread; 0 measures none."
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
        samples: images, with masks where they are known.
        work: an empty folder.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(
        self,
        student: nn.Module,
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
        self.metadata = metadata_of(
            student,
            with_preprocessing=self.inside,
            precision=PRECISIONS.get(args.format, "fp32"),
            fixed_size=args.fixed_size,
        )

    def write(self) -> None:
        """Write every format but int8."""
        if isinstance(self.student, SmpForSemanticSegmentation) and self.args.format == "smp":
            write_smp(self.student, self.path)
        elif self.args.format == "torch-export":
            write_program(self._program(prune=True), self.path, self.metadata)
        elif self.args.format == "onnx-fp16":
            write_half(self._write_full(), self.path, self.metadata)
        else:
            self._write_full().rename(self.path)

    def write_int8(self, calibration: Sequence[Sample]) -> tuple[list[str], Parity]:
        """Write int8, leaving out what has to be left out; returns that and the figures.

        Raises:
            ValueError: if no version is good enough.
        """
        batches = [self._feed(image[None]).numpy() for image, _ in calibration]
        full = self._write_full()
        OnnxStudent(full)(batches[0])  # says in one line why a graph cannot be run
        quantiser = Quantiser(full, batches, self.work, self.metadata)
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
        run = self._runner(torch.get_num_threads())
        return compare(
            self.reference,
            lambda images: run(self._feed(images)),
            batches,
            ignore_index=self.ignore_index,
            title=title,
        )

    def latency(self) -> dict[str, Latency]:
        """Student and written file by turns: one image, on one thread.

        The preparation of the image counts for both where the file does it itself, else for none.
        """
        image = self.samples[0][0][None]
        pixels = self.reference.prepare(image)
        network = partial(self.reference.output, pixels)
        torch_call = partial(self.reference, image) if self.inside else network
        calls = {"torch": torch_call, "file": partial(self._runner(threads=1), self._feed(image))}
        return interleaved(calls, self.args.latency_repeats, threads=1)

    def _program(self, *, prune: bool) -> ExportedProgram:
        fixed = self.args.fixed_size
        return export_program(
            self.student, with_preprocessing=self.inside, prune=prune, fixed_size=fixed
        )

    def _write_full(self) -> Path:
        """The student as ONNX in fp32, from which the other precisions are made."""
        path, opset = self.work / "full.onnx", self.args.opset
        program = self._program(prune=False)
        write_onnx(program, path, self.metadata, with_preprocessing=self.inside, opset=opset)
        return path

    def _feed(self, images: Tensor) -> Tensor:
        """Images of a `CheckBatch` as the exported file takes them."""
        if not self.inside:
            return self.reference.prepare(images)
        if images.is_floating_point():
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in statistics_of(self.student))
            images = images * std + mean
        return images.permute(0, 2, 3, 1)

    def _runner(self, threads: int) -> Network:
        """The written file as a function of what it takes."""
        if self.args.format == "smp":
            return read_smp(self.path)
        if self.args.format == "torch-export":
            return read_program(self.path)
        session = OnnxStudent(self.path, threads=threads)
        return lambda fed: torch.from_numpy(session(fed.numpy()))


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


def write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a traced student as one file for `torch.export.load`.

    The metadata is in it too: `torch.export.load(path, extra_files={"metadata.json": ""})`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    program.example_inputs = None  # they would be in the file: 10 MiB at 640 pixels
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(dict(metadata))})


def read_program(path: Path) -> Network:
    """The network in such a file, as a function of a batch.

    Raises:
        ValueError: on a call, if the program does not run on that batch.
    """
    module: Network = torch.export.load(path).module()

    def run(pixels: Tensor) -> Tensor:
        try:
            return module(pixels)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ValueError(
                f"Expected a program that runs on {tuple(pixels.shape)}, got one that does not: "
                f"{reason}. Export the student with --fixed_size."
            ) from error

    return run


def write_smp(student: SmpForSemanticSegmentation, folder: Path) -> None:
    """Write the folder that `smp.from_pretrained` reads, strictly: with all weights.

    It has none of our keys in its config.json, so that `tu-*` students can be read.
    """
    network = build_network(student.config)
    network.load_state_dict(student.state_dict())
    network.save_pretrained(folder)
    # smp's card names a licence that nobody has chosen.
    (folder / "README.md").unlink(missing_ok=True)


def read_smp(folder: Path) -> Network:
    """The network in such a folder, as a function of a batch, in eval mode."""
    with quiet():  # it tells where it found them
        network: Network = smp.from_pretrained(str(folder)).eval()
    return network


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `length`: a folder is often sorted by its contents."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def from_dataset(data: DataArguments, split: str, count: int) -> list[Sample]:
    """Images (C, H, W) and labels (H, W), or (K, H, W), of a split, without augmentation."""
    other = data.train_split if split == data.eval_split else data.eval_split
    dataset: Any = evaluation_dataset(
        replace(data, eval_split=split, train_split=other, eval_size="input"),
        batch_size=1,
        # A file is not measured on what it was calibrated with.
        apart_from=other if split == data.train_split else None,
    )
    if data.streaming:
        rows = list(itertools.islice(dataset, count))
    else:
        rows = [dataset[i] for i in spread(len(dataset), count)]
    return [(row["pixel_values"], row["labels"]) for row in rows]


def from_images(sources: Sequence[str], data: DataArguments, count: int) -> list[Sample]:
    """Images (C, H, W) of files, folders and globs, at the size of the input, without masks.

    Raises:
        FileNotFoundError: if a source names no image.
        ValueError: if a file is no readable image.
    """
    paths = [path for path in find_input_files(sources) if not is_video(path)]
    if not paths:
        raise ValueError(
            f"Expected images as --images, got only videos: {' '.join(sources)}. Export single "
            "frames of them first."
        )
    chosen = [paths[i] for i in spread(len(paths), count)]
    channels = channels_of_data(data)
    decode = decode_image if channels is None else channels.image
    images = (decode({"path": str(p), "bytes": None}, 0) for p in chosen)
    tensors = (torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in images)
    size, keep = data.input_size, data.keep_aspect_ratio
    return [(to_input(tensor, size, keep_aspect_ratio=keep), None) for tensor in tensors]


def batches_of(samples: Sequence[Sample], batch_size: int) -> list[CheckBatch]:
    """Samples stacked, in order."""
    batches = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        labels = [label for _, label in some if label is not None]
        batches.append(
            (torch.stack([image for image, _ in some]), torch.stack(labels) if labels else None)
        )
    return batches


def at_another_size(samples: Sequence[Sample], size: Size, multiple: int) -> list[CheckBatch]:
    """One batch of another number, height and width than any other, without masks."""
    images = [image for image, _ in samples[:3]]
    height, width = size[0] + multiple, size[1] + 2 * multiple
    return [(torch.stack([resize_image(p, height, width) for p in images]), None)]


def export_student(
    student: nn.Module, args: ExportArguments, data: DataArguments
) -> dict[str, Any]:
    """Export a student, check it, and only then put the file and the figures into the folder.

    Args:
        student: moved to the CPU and set to eval mode.
        args: format, folder and images.
        data: where the images come from, unless `args.images` names them.

    Returns:
        What export.json says about this format.

    Raises:
        ValueError: if there are no images, or the export is not good enough; nothing is written.
        FileNotFoundError: if images are missing.
    """
    output = Path(args.output)
    earlier = read_object(output / RESULTS, EXPORTS_SHAPE)
    student.cpu().eval()
    target = output / args.file_name
    if args.format == "smp":
        if not isinstance(student, SmpForSemanticSegmentation):
            raise ValueError(
                f"Expected a student of smp for --format smp, got a {type(student).__name__}. Its "
                "folder is read by transformers as it is; choose onnx or torch-export."
            )
        check_replaceable(target, "output")
    samples = samples_of(args, data, data.eval_split, args.check_images)
    with tempfile.TemporaryDirectory(prefix="kd_trainer-export-") as work:
        exporter = Exporter(student, args, samples, Path(work), ignore_index=data.ignore_index)
        result = _result(exporter, data)
        output.mkdir(parents=True, exist_ok=True)
        _put(exporter.path, target)
    result["images_of"] = public_name(data.dataset) if data.dataset else "pictures"
    write_json(output / RESULTS, earlier | {args.entry: result})
    return result


def _put(made: Path, target: Path) -> None:
    """Put a checked file or folder where it belongs, whole."""
    if made.is_dir():
        with replacing_folder(target, "output") as folder:
            shutil.copytree(made, folder, dirs_exist_ok=True)
        return
    with replacing_file(target) as partial:
        shutil.copyfile(made, partial)  # from another disk, maybe


def samples_of(args: ExportArguments, data: DataArguments, split: str, count: int) -> list[Sample]:
    """Images to check or to calibrate with, from `--images` or of a split."""
    if args.images:
        return from_images(args.images, data, count)
    return from_dataset(data, split, count)


def _result(exporter: Exporter, data: DataArguments) -> dict[str, Any]:
    """Write, check at both sizes, and describe."""
    args, student = exporter.args, exporter.student
    more: dict[str, Any] = {}
    if args.format == "onnx-int8":
        calibration = samples_of(args, data, data.train_split, args.calibration_images)
        left_out, parity = exporter.write_int8(calibration)
        more = {"calibration_images": len(calibration), "kept_in_fp32": left_out}
    else:
        exporter.write()
        parity = exporter.compare(batches_of(exporter.samples, args.batch_size))
        check(args, parity, "on the images")
    if args.format != "smp" and not args.fixed_size:
        multiple = size_multiple(student)
        batches = at_another_size(exporter.samples, data.input_size, multiple)
        other = exporter.compare(batches, "another size")
        if args.format != "onnx-int8":  # whose ranges are those of the size it is meant for
            check(args, other, "at another size")
        more["at_another_size"] = {"shape": list(batches[0][0].shape), **_figures(other)}
    if args.format != "smp" and args.latency_repeats:  # smp's folder is the same network
        more["latency"] = {name: vars(one) for name, one in exporter.latency().items()}
    files = [exporter.path, *exporter.path.rglob("*")]
    packages = PACKAGES["onnx" if args.format.startswith("onnx") else "torch"]
    return {
        "file": args.file_name,
        "mib": sum(f.stat().st_size for f in files if f.is_file()) / 2**20,
        "output": "probabilities" if args.with_preprocessing else "logits",
        "image_size": plain_size(data.input_size),
        "resize": "fit" if data.keep_aspect_ratio else "stretch",
        "fixed_size": args.fixed_size,
        **_figures(parity),
        **more,
        "versions": {name: version(name) for name in packages},
    }


def _figures(parity: Parity) -> dict[str, Any]:
    return asdict(parity) | {
        "relative_difference": parity.relative_difference,
        "miou_drop_points": parity.drop,
    }
