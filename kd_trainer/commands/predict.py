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
from torch import Tensor
from tqdm import tqdm

from kd_trainer.data.channels import Channels, visible
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
from kd_trainer.evaluation import input_statistics, labels_of
from kd_trainer.export import load_onnx
from kd_trainer.fields import check_at_least, check_choice, check_folder, help_field
from kd_trainer.inference import (
    Segmenter,
    classes_at,
    onnx_segmenter,
    planes_at,
    render,
    soft_map,
    torch_segmenter,
)
from kd_trainer.loading import load_student
from kd_trainer.parsing import Parser
from kd_trainer.students import has_several_labels, image_size_of, reads_own_depth

THRESHOLD = 0.5
# What can be written, and the suffix of its files.
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "cutouts": ".png"}
SOFT = "soft"


@dataclass
class PredictArguments:
    """Settings of scripts/predict.py."""

    model: str = help_field("", "Saved student: a folder, a Hub id or an ONNX file.")
    output_dir: str = help_field("runs/predictions", "Gets one folder for each kind of output.")
    outputs: list[str] = help_field(
        ["masks", "overlays"],
        "What to write: masks (0/255 of a binary model, else class ids; with several labels a "
        "pixel a .npy of 0 and 1, (K, H, W)), overlays (the image with its classes tinted), "
        "cutouts (the foreground on nothing).",
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

    @property
    def kinds(self) -> list[str]:
        """Folders that are written."""
        return [*self.outputs, *([SOFT] if self.soft else [])]


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


@dataclass(frozen=True)
class Masks:
    """What was found in an image.

    Attributes:
        mask: class of each pixel, uint8 (H, W), or of several labels planes (K, H, W).
        num_labels: of the model.
        soft: probabilities, as `soft_map` gives them; None where nobody asked.
    """

    mask: np.ndarray
    num_labels: int
    soft: np.ndarray | None = None


@dataclass(frozen=True)
class Loaded:
    """A model as it is shown images, and what its logits mean."""

    segmenter: Segmenter
    num_labels: int
    multi_label: bool = False
    channels: Channels | None = None

    def image(self, path: Path) -> np.ndarray:
        """An image as the training reads it: RGB, or normalised floats (H, W, C)."""
        if self.channels is None:
            return np.asarray(read_image(path))
        return self.channels.image({"path": str(path), "bytes": None}, 0)

    def masks(self, logits: Tensor, args: PredictArguments) -> Masks:
        """Of an image's logits (K, H, W)."""
        soft = soft_map(logits, multi_label=self.multi_label) if args.soft else None
        found = planes_at if self.multi_label else classes_at
        return Masks(found(logits, args.threshold), self.num_labels, soft)


def load_segmenter(args: PredictArguments) -> Loaded:
    """The model as `args` show images to it, a student on the GPU if there is one.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is no student and no ONNX file of scripts/export.py.
    """
    options = {name: getattr(args, name) for name in ("tile", "overlap", "flip", "batch_size")}
    if args.model.endswith(".onnx"):
        exported = load_onnx(args.model)
        mean, std, own_depth = exported.image_mean, exported.image_std, exported.own_depth
        return Loaded(
            onnx_segmenter(exported, **options),
            len(exported.class_names),
            exported.multi_label,
            Channels(tuple(mean), tuple(std)) if own_depth else None,
        )
    student = load_student(args.model)
    segmenter = torch_segmenter(student, image_size_of(student), **options)
    mean, std = input_statistics(student)
    channels = Channels(tuple(mean), tuple(std)) if reads_own_depth(student) else None
    return Loaded(segmenter, len(labels_of(student)), has_several_labels(student), channels)


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
    model = load_segmenter(args)
    check_threshold(args.threshold, 2 if model.multi_label else model.num_labels)
    if model.channels is not None and videos:
        raise ValueError(
            f"Expected images for a model of {len(model.channels.mean)} channels, got the video "
            f"{videos[0]}. Leave it out."
        )
    total = len(images) + sum(map(frame_count, videos))
    start, done = time.perf_counter(), len(images)
    cut_off: list[CutOffError] = []
    with tqdm(total=total, desc="predict", unit="image", disable=None) as bar:
        pixels = (model.image(path) for path in images)
        segmented = _segmented(model, pixels, args, bar)
        for path, (image, masks) in zip(images, segmented, strict=True):
            for output in args.kinds:
                _write(output, image, masks, folder / output / names[path])
        for path in videos:
            frames = _segmented(model, _whole_or_noted(path, cut_off), args, bar)
            done += _write_video(frames, args, names[path], rate=frame_rate(path))
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
        for output in args.kinds:
            suffixes = {OUTPUTS.get(output, ".png")}
            suffixes |= {".npy"} if output in ("masks", SOFT) else set()
            files = [name] if is_video(path) else [f"{name}{suffix}" for suffix in suffixes]
            target = next((t for f in files if (t := folder / output / f).exists()), None)
            if target is not None:
                raise ValueError(
                    f"Expected an --output_dir apart from the images, got {args.output_dir}, "
                    f"where {target.relative_to(folder)} would be written over. Name another one."
                )


def _whole_or_noted(path: Path, cut_off: list[CutOffError]) -> Iterator[np.ndarray]:
    """The frames of a video; that it is cut off is noted, so that the other videos are done too."""
    try:
        yield from read_frames(path)
    except CutOffError as error:
        cut_off.append(error)


def _segmented(
    model: Loaded, images: Iterable[np.ndarray], args: PredictArguments, bar: tqdm
) -> Iterator[tuple[np.ndarray, Masks]]:
    """Each image with what was found in it; only one batch is in memory at a time."""
    waiting = iter(images)
    while batch := list(itertools.islice(waiting, args.batch_size)):
        for image, logits in zip(batch, model.segmenter.logits(batch), strict=True):
            yield image, model.masks(logits, args)
            bar.update()


def _write_video(
    frames: Iterable[tuple[np.ndarray, Masks]], args: PredictArguments, name: str, *, rate: float
) -> int:
    """Write the outputs of a video; returns the number of its frames."""
    number, folder = 0, Path(args.output_dir)
    with closing(VideoFile(folder / "overlays" / f"{name}.mp4", rate)) as video:
        for number, (image, masks) in enumerate(frames, start=1):
            for output in args.kinds:
                if output == "overlays":
                    video.add(render(output, image, masks.mask, masks.num_labels))
                else:
                    _write(output, image, masks, folder / output / name / f"{number:06d}")
    return number


def _write(output: str, image: np.ndarray, masks: Masks, stem: Path) -> None:
    """One kind of output; `stem` is the place of the file without its suffix."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    array = {"masks": masks.mask, SOFT: masks.soft}.get(output)
    if array is not None and array.ndim == 3:
        np.save(f"{stem}.npy", array)
        return
    if output == SOFT and array is not None:
        Image.fromarray(array).save(f"{stem}.png")
        return
    image = visible(image) if image.dtype == np.float32 else image
    rendered = render(output, image, masks.mask, masks.num_labels)
    Image.fromarray(rendered).save(f"{stem}{OUTPUTS[output]}")


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
