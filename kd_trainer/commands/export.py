"""Export a student, and print the table of all exports in the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.config import ONLY_TRAINING, parser_of_saved
from kd_trainer.console import markdown_table, number
from kd_trainer.data_arguments import DataArguments
from kd_trainer.export.exporter import RESULTS, ExportArguments, export_student
from kd_trainer.loading import load_student
from kd_trainer.measurement import data_arguments_of
from kd_trainer.parsing import settings_of
from kd_trainer.run_folder import EXPORTS_SHAPE, read_object

# The size is the student's; int8 is calibrated with images of the split to train on.
WITHOUT = ONLY_TRAINING - {"train_split"} | {
    "image_size",
    "resize",
    "eval_size",
    "max_eval_samples",
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
