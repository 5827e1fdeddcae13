"""Masks, overlays and cut-outs of a saved student for pictures and videos."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from kd_trainer.data.input_files import (
    CutOffError,
    VideoFile,
    find_input_files,
    frame_count,
    frame_rate,
    is_video,
    output_names,
    read_frames,
    read_image,
)
from kd_trainer.evaluation import labels_of
from kd_trainer.export import load_onnx
from kd_trainer.fields import check_at_least, check_choice, check_folder, help_field
from kd_trainer.inference import Segmenter, classes_at, drawn, onnx_segmenter, torch_segmenter
from kd_trainer.loading import load_student
from kd_trainer.parsing import Parser

THRESHOLD = 0.5
# What can be written, and the suffix of its files.
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "cutouts": ".png"}


@dataclass
class PredictArguments:
    """Settings of scripts/predict.py."""

    model: str = help_field("", "Saved student: a folder, a Hub id or an ONNX file.")
    output_dir: str = help_field("runs/predictions", "Gets one folder for each kind of output.")
    outputs: list[str] = help_field(
        ["masks", "overlays"],
        "What to write: masks (0/255 of a binary model, else class ids), overlays (the picture "
        "with its classes tinted), cutouts (the foreground on nothing).",
    )
    threshold: float = help_field(
        THRESHOLD, "Probability from which a pixel of a binary model is kept."
    )
    tile: bool = help_field(
        False,
        "Cut pictures larger than the network's input into overlapping tiles at their own "
        "resolution instead of shrinking them: more detail, more time.",
    )
    overlap: float = help_field(0.25, "Share of a tile that its neighbour sees too.")
    flip: bool = help_field(False, "Average with the mirrored picture: twice the time.")
    batch_size: int = help_field(4, "Inputs at a time.")

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not 0 <= self.overlap < 1:
            raise ValueError(f"Expected --overlap from 0 to below 1, got {self.overlap}.")
        check_at_least("batch_size", self.batch_size, 1)
        for output in self.outputs:
            check_choice("outputs", output, tuple(OUTPUTS))
        check_folder("output_dir", self.output_dir)


def check_threshold(threshold: float, num_labels: int = 2) -> None:
    """Refuse a probability that is none, and one for a model that has no use for it.

    Raises:
        ValueError: likewise.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"Expected --threshold between 0 and 1 (both excluded), got {threshold}.")
    if num_labels > 2 and threshold != THRESHOLD:
        raise ValueError(
            f"Expected no --threshold for a model of {num_labels} classes, got {threshold}: "
            "each pixel gets the likeliest class. Leave it out."
        )


def load_segmenter(args: PredictArguments) -> tuple[Segmenter, int]:
    """The model as `args` show pictures to it (a student on the GPU if there is one), its labels.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is no student and no ONNX file of scripts/export.py.
    """
    looks = {name: getattr(args, name) for name in ("tile", "overlap", "flip", "batch_size")}
    if args.model.endswith(".onnx"):
        exported = load_onnx(args.model)
        return onnx_segmenter(exported, **looks), len(exported.class_names)
    student = load_student(args.model)
    return torch_segmenter(student, student.config.image_size, **looks), len(labels_of(student))


def predict(args: PredictArguments, sources: Sequence[str]) -> float:
    """Write the outputs of every picture and video that `sources` name.

    Pictures give `<output>/<name>.png` (overlays .jpg). Videos give `overlays/<name>.mp4`, and a
    folder of numbered pictures for each other output.

    Returns:
        Images (and frames) per second, reading and writing included.

    Raises:
        ValueError: after everything is written, if a video has fewer frames than it promises.
    """
    files = find_input_files(sources)
    names = output_names(files)
    _check_targets(args, names)
    pictures = [path for path in files if not is_video(path)]
    videos = [path for path in files if is_video(path)]
    total = len(pictures) + sum(map(frame_count, videos))
    segmenter, num_labels = load_segmenter(args)
    check_threshold(args.threshold, num_labels)
    start, done = time.perf_counter(), 0
    with tqdm(total=total, desc="predict", unit="image", disable=None) as bar:
        images = (np.asarray(read_image(path)) for path in pictures)
        found = _masks(segmenter, images, args, bar)
        for path, (image, mask) in zip(pictures, found, strict=True):
            for output in args.outputs:
                picture = drawn(output, image, mask, num_labels)
                file = f"{names[path]}{OUTPUTS[output]}"
                _write(picture, Path(args.output_dir) / output / file)
            done += 1
        cut_off: list[CutOffError] = []
        for path in videos:
            frames = _whole_or_noted(path, cut_off)
            found = _masks(segmenter, frames, args, bar)
            done += _write_video(
                found, args, names[path], rate=frame_rate(path), num_labels=num_labels
            )
    if cut_off:
        others = f" {len(cut_off) - 1} further videos likewise." if len(cut_off) > 1 else ""
        raise ValueError(f"{cut_off[0]}{others} What was found of it is written.")
    return done / (time.perf_counter() - start)


def _check_targets(args: PredictArguments, names: Mapping[Path, str]) -> None:
    """Refuse to write over what lies beside the pictures: `masks/` there may be labels by hand.

    Raises:
        ValueError: names the file.
    """
    folder = Path(args.output_dir).resolve()
    if not any(folder in path.resolve().parents for path in names):
        return
    for path, name in names.items():
        for output in args.outputs:
            target = folder / output / (name if is_video(path) else f"{name}{OUTPUTS[output]}")
            if target.exists():
                raise ValueError(
                    f"Expected an --output_dir apart from the pictures, got {args.output_dir}, "
                    f"where {target.relative_to(folder)} would be written over. Name another one."
                )


def _whole_or_noted(path: Path, cut_off: list[CutOffError]) -> Iterator[np.ndarray]:
    """The frames of a video; that it is cut off is noted, so that the other videos are done too."""
    try:
        yield from read_frames(path)
    except CutOffError as error:
        cut_off.append(error)


def _masks(
    segmenter: Segmenter, images: Iterable[np.ndarray], args: PredictArguments, bar: tqdm
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each image with its classes; only one batch is in memory at a time."""
    waiting = iter(images)
    while batch := list(itertools.islice(waiting, args.batch_size)):
        for image, logits in zip(batch, segmenter.logits(batch), strict=True):
            yield image, classes_at(logits, args.threshold)
            bar.update()


def _write_video(
    frames: Iterable[tuple[np.ndarray, np.ndarray]],
    args: PredictArguments,
    name: str,
    *,
    rate: float,
    num_labels: int,
) -> int:
    """Write the outputs of a video; returns the number of its frames."""
    number = 0
    folder = Path(args.output_dir)
    video = VideoFile(folder / "overlays" / f"{name}.mp4", rate)
    try:
        for number, (image, mask) in enumerate(frames, start=1):
            for output in args.outputs:
                picture = drawn(output, image, mask, num_labels)
                if output == "overlays":
                    video.add(picture)
                else:
                    _write(picture, folder / output / name / f"{number:06d}{OUTPUTS[output]}")
    finally:
        video.close()
    return number


def _write(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def predict_main(arguments: Sequence[str] | None = None) -> None:
    """Write masks, overlays or cut-outs, and say how fast."""
    parser = Parser(
        [PredictArguments],
        "predict.py",
        "Masks, overlays and cut-outs of a saved student, for pictures and videos.",
        "Examples:\n  predict.py runs/demo/student photo.jpg\n"
        "  predict.py runs/demo/student photos/ 'more/*.png' holiday.mp4 --output_dir out\n"
        "  predict.py runs/demo/student poster.jpg --tile --flip --outputs cutouts",
        without={"model"},
    )
    parser.add_argument(
        "model",
        help="Saved student: a folder, a run's folder, a Hub id or an ONNX file of export.py.",
    )
    parser.add_argument("pictures", nargs="+", help="Pictures, videos, folders or globs.")
    given = parser.given(arguments)
    pictures = given.pop("pictures")
    args = PredictArguments(**given)
    speed = predict(args, pictures)
    print(f"{speed:.1f} images per second. Written to {args.output_dir}")
