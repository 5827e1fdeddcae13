"""Masks, overlays and cut-outs of a saved student for images and videos."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
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
from kd_trainer.inference import (
    Segmenter,
    classes_at,
    onnx_segmenter,
    render,
    soft_map,
    torch_segmenter,
)
from kd_trainer.loading import load_student
from kd_trainer.parsing import Parser
from kd_trainer.students import image_size_of

THRESHOLD = 0.5
# What can be written, and the suffix of its files.
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "cutouts": ".png"}
SOFT, SOFT_SUFFIXES = "soft", (".png", ".npy")  # of a binary model, of several classes


@dataclass
class PredictArguments:
    """Settings of scripts/predict.py."""

    model: str = help_field("", "Saved student: a folder, a Hub id or an ONNX file.")
    output_dir: str = help_field("runs/predictions", "Gets one folder for each kind of output.")
    outputs: list[str] = help_field(
        ["masks", "overlays"],
        "What to write: masks (0/255 of a binary model, else class ids), overlays (the image "
        "with its classes tinted), cutouts (the foreground on nothing).",
    )
    soft: bool = help_field(
        False,
        "Also write the probabilities, into the folder soft: of a binary model those of the "
        "foreground as a grey PNG of 16 bits, else float16 (classes, height, width) as .npy. A "
        "training reads them with --teacher_maps.",
    )
    threshold: float = help_field(
        THRESHOLD, "Probability from which a pixel of a binary model is kept."
    )
    tile: bool = help_field(
        False,
        "Cut images larger than the network's input into overlapping tiles at their own "
        "resolution instead of shrinking them: more detail, more time.",
    )
    overlap: float = help_field(0.25, "Share of a tile that its neighbour sees too.")
    flip: bool = help_field(False, "Average with the mirrored image: twice the time.")
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
    """The model as `args` show images to it (a student on the GPU if there is one), its labels.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is no student and no ONNX file of scripts/export.py.
    """
    options = {name: getattr(args, name) for name in ("tile", "overlap", "flip", "batch_size")}
    if args.model.endswith(".onnx"):
        exported = load_onnx(args.model)
        return onnx_segmenter(exported, **options), len(exported.class_names)
    student = load_student(args.model)
    return torch_segmenter(student, image_size_of(student), **options), len(labels_of(student))


def predict(args: PredictArguments, sources: Sequence[str]) -> float:
    """Write the outputs of every image and video that `sources` name.

    Images give `<output>/<name>.png` (overlays .jpg). Videos give `overlays/<name>.mp4`, and a
    folder of numbered images for each other output.

    Returns:
        Images (and frames) per second, reading and writing included.

    Raises:
        ValueError: after everything is written, if a video has fewer frames than it promises.
    """
    files = find_input_files(sources)
    names, folder = output_names(files), Path(args.output_dir)
    _check_targets(args, names)
    images = [path for path in files if not is_video(path)]
    videos = [path for path in files if is_video(path)]
    segmenter, num_labels = load_segmenter(args)
    check_threshold(args.threshold, num_labels)
    total = len(images) + sum(map(frame_count, videos))
    start, done = time.perf_counter(), len(images)
    cut_off: list[CutOffError] = []
    with tqdm(total=total, desc="predict", unit="image", disable=None) as bar:
        pixels = (np.asarray(read_image(path)) for path in images)
        segmented = _segmented(segmenter, pixels, args, bar, num_labels=num_labels)
        for path, made in zip(images, segmented, strict=True):
            for output, array in made.items():
                _write(array, folder / output, names[path], output)
        for path in videos:
            whole = _whole_or_noted(path, cut_off)
            frames = _segmented(segmenter, whole, args, bar, num_labels=num_labels)
            done += _write_video(frames, folder, names[path], rate=frame_rate(path))
    if cut_off:
        others = f" {len(cut_off) - 1} further videos likewise." if len(cut_off) > 1 else ""
        raise ValueError(f"{cut_off[0]}{others} What was found of it is written.")
    return done / (time.perf_counter() - start)


def _check_targets(args: PredictArguments, names: Mapping[Path, str]) -> None:
    """Refuse to write over what lies beside the images: `masks/` there may be labels by hand.

    Raises:
        ValueError: names the file.
    """
    folder = Path(args.output_dir).resolve()
    if not any(folder in path.resolve().parents for path in names):
        return
    for path, name in names.items():
        for output, suffix in _suffixes(args):
            target = folder / output / (name if is_video(path) else f"{name}{suffix}")
            if target.exists():
                raise ValueError(
                    f"Expected an --output_dir apart from the images, got {args.output_dir}, "
                    f"where {target.relative_to(folder)} would be written over. Name another one."
                )


def _suffixes(args: PredictArguments) -> list[tuple[str, str]]:
    """Kinds of outputs and what their files may end with."""
    soft = [(SOFT, suffix) for suffix in SOFT_SUFFIXES] if args.soft else []
    return [*((output, OUTPUTS[output]) for output in args.outputs), *soft]


def _whole_or_noted(path: Path, cut_off: list[CutOffError]) -> Iterator[np.ndarray]:
    """The frames of a video; that it is cut off is noted, so that the other videos are done too."""
    try:
        yield from read_frames(path)
    except CutOffError as error:
        cut_off.append(error)


def _segmented(
    segmenter: Segmenter,
    images: Iterable[np.ndarray],
    args: PredictArguments,
    bar: tqdm,
    *,
    num_labels: int,
) -> Iterator[dict[str, np.ndarray]]:
    """What is written of each image, by its kind; only one batch is in memory at a time."""
    waiting = iter(images)
    while batch := list(itertools.islice(waiting, args.batch_size)):
        for image, logits in zip(batch, segmenter.logits(batch), strict=True):
            mask = classes_at(logits, args.threshold)
            made = {output: render(output, image, mask, num_labels) for output in args.outputs}
            yield made | ({SOFT: soft_map(logits)} if args.soft else {})
            bar.update()


def _write_video(
    frames: Iterable[dict[str, np.ndarray]], folder: Path, name: str, *, rate: float
) -> int:
    """Write the outputs of a video; returns the number of its frames."""
    number = 0
    with closing(VideoFile(folder / "overlays" / f"{name}.mp4", rate)) as video:
        for number, made in enumerate(frames, start=1):
            for output, array in made.items():
                if output == "overlays":
                    video.add(array)
                else:
                    _write(array, folder / output / name, f"{number:06d}", output)
    return number


def _write(array: np.ndarray, folder: Path, name: str, output: str) -> None:
    suffix = SOFT_SUFFIXES[array.dtype == np.float16] if output == SOFT else OUTPUTS[output]
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def predict_main(arguments: Sequence[str] | None = None) -> None:
    """Write masks, overlays or cut-outs, and say how fast."""
    parser = Parser(
        [PredictArguments],
        "predict.py",
        "Masks, overlays and cut-outs of a saved student, for images and videos.",
        "Examples:\n  predict.py runs/demo/student photo.jpg\n"
        "  predict.py runs/demo/student photos/ 'more/*.png' holiday.mp4 --output_dir out\n"
        "  predict.py runs/demo/student poster.jpg --tile --flip --outputs cutouts",
        without={"model"},
    )
    parser.add_argument(
        "model",
        help="Saved student: a folder, a run's folder, a Hub id or an ONNX file of export.py.",
    )
    parser.add_argument("images", nargs="+", help="Images, videos, folders or globs.")
    flags = parser.given(arguments)
    sources = flags.pop("images")
    args = PredictArguments(**flags)
    speed = predict(args, sources)
    print(f"{speed:.1f} images per second. Written to {args.output_dir}")
