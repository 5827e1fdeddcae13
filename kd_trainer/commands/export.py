"""The command line of scripts/export.py: parse, export, check, keep what passed, print."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_trainer.arguments import DataArguments
from kd_trainer.config import ONLY_TRAINING, parser_of_saved
from kd_trainer.console import markdown_table, number
from kd_trainer.export.exporter import (
    ExportArguments,
    Exporter,
    Sample,
    at_another_size,
    batches_of,
    check,
    from_dataset,
    from_images,
)
from kd_trainer.export.parity import Parity
from kd_trainer.files import check_replaceable, replacing_file, replacing_folder, write_json
from kd_trainer.loading import load_student
from kd_trainer.measurement import data_arguments_of
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.parsing import settings_of
from kd_trainer.run_folder import EXPORTS_SHAPE, read_object
from kd_trainer.sources import public_name

RESULTS = "export.json"
# The size is the student's; int8 is calibrated with images of the split to train on.
WITHOUT = ONLY_TRAINING - {"train_split"} | {"image_size", "max_eval_samples"}
PACKAGES = {"onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch": ("torch",)}


def export_student(
    student: SmpForSemanticSegmentation, args: ExportArguments, data: DataArguments
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
        check_replaceable(target, "output")
    samples = _images(args, data, data.eval_split, args.check_images)
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


def _images(args: ExportArguments, data: DataArguments, split: str, count: int) -> list[Sample]:
    if args.images:
        return from_images(args.images, data.image_size, count)
    return from_dataset(data, split, count)


def _result(exporter: Exporter, data: DataArguments) -> dict[str, Any]:
    """Write, check at both sizes, and describe."""
    args, student = exporter.args, exporter.student
    more: dict[str, Any] = {}
    if args.format == "onnx-int8":
        calibration = _images(args, data, data.train_split, args.calibration_images)
        left_out, parity = exporter.write_int8(calibration)
        more = {"calibration_images": len(calibration), "kept_in_fp32": left_out}
    else:
        exporter.write()
        parity = exporter.compare(batches_of(exporter.samples, args.batch_size))
        check(args, parity, "on the images")
    if args.format != "smp" and not args.fixed_size:
        multiple = int(student.encoder.output_stride)  # type: ignore[arg-type]
        batches = at_another_size(exporter.samples, data.image_size, multiple)
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
        "image_size": data.image_size,
        "fixed_size": args.fixed_size,
        **_figures(parity),
        **more,
        "versions": {name: version(name) for name in packages},
    }


def _figures(parity: Parity) -> dict[str, Any]:
    return dataclasses.asdict(parity) | {
        "relative_difference": parity.relative_difference,
        "miou_drop_points": parity.drop,
    }


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """The exports in a folder as a Markdown table."""
    columns = {"mib": ".1f", "images": ",", "largest_difference": ".2g", "mask_iou": ".4f"}
    columns |= {"torch_miou": ".4f", "miou": ".4f", "miou_drop_points": ".2f"}
    rows = [
        [
            name,
            result.get("file") or "",
            *(number(result.get(key), form) for key, form in columns.items()),
            *(
                number(result.get("latency", {}).get(who, {}).get("median"), ".1f")
                for who in ("torch", "file")
            ),
        ]
        for name, result in results.items()
    ]
    header = ["format", "file", "MiB", "images", "largest difference", "mask IoU"]
    header += ["mIoU torch", "mIoU", "points lost", "ms torch", "ms file"]
    return markdown_table(header, rows)


def export_main(arguments: Sequence[str] | None = None) -> None:
    """Export, check, print the table of all exports in the folder."""
    parser = parser_of_saved(
        (ExportArguments, DataArguments),
        "export.py",
        "Write a student for a device, and check it against torch on real images. An export that "
        "is not good enough is an error and leaves no file.",
        "Examples:\n  export.py runs/distilled --format onnx --dataset photos/\n"
        "  export.py runs/distilled --format onnx --with_preprocessing --images 'more/*.jpg'\n"
        "  export.py runs/distilled --format onnx-int8 --dataset photos/ --output device/",
        without=WITHOUT,
    )
    parser.add_argument("model", help="Saved student: a folder, a run's folder or a Hub id.")
    flags = parser.given(arguments)
    source = flags.pop("model")
    args = ExportArguments(**settings_of(ExportArguments, flags))
    if bool(args.images) == bool(flags.get("dataset")):
        raise ValueError(
            "Expected either --dataset or --images, the images to check the export on, got "
            f"{'both' if args.images else 'neither'}. Name images like those the device sees."
        )
    student = load_student(source, num_labels=flags.get("num_labels"))
    data = data_arguments_of(student, source, settings_of(DataArguments, flags))
    result = export_student(student, args, data)
    if result.get("kept_in_fp32"):
        print(f"Kept in fp32: {', '.join(result['kept_in_fp32'])}")
    output = Path(args.output)
    results = read_object(output / RESULTS, EXPORTS_SHAPE)
    print(f"\n{results_table(results)}\n\nWritten to {output / args.file_name} and {RESULTS}")
