"""Cut-outs and videos; masks and overlays of pictures are tested in test_workflows.py."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SIDE, save_network

from kd_trainer.commands.predict import PredictArguments, predict, predict_main
from kd_trainer.data.input_files import CutOffError, VideoFile, frame_count, frame_rate, read_frames
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.onnx_file import write_onnx
from kd_trainer.inference import Segmenter, onnx_network
from kd_trainer.loading import load_student
from kd_trainer.models.configuration_smp import SmpConfig
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.stock_models import saved_statistics

FRAMES, RATE = 7, 12.0


def export(folder: Path, path: Path, *, with_preprocessing: bool) -> None:
    student = load_student(folder)
    program = export_program(student, with_preprocessing=with_preprocessing)
    told = metadata_of(student, with_preprocessing=with_preprocessing, precision="fp32")
    write_onnx(program, path, told, with_preprocessing=with_preprocessing)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return str(save_network(tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """A bright square that walks to the right over a dark ground."""
    path = tmp_path_factory.mktemp("videos") / "walk.mp4"
    video = VideoFile(path, RATE)
    for number in range(FRAMES):
        frame = np.full((48, 80, 3), 40, np.uint8)
        frame[10:40, 8 * number : 8 * number + 20] = (230, 120, 30)
        video.add(frame)
    video.close()
    return path


def test_a_video_comes_back_frame_by_frame(walk: Path):
    """A dropped or doubled frame, or BGR taken for RGB, shows in no figure."""
    frames = list(read_frames(walk))
    assert len(frames) == frame_count(walk) == FRAMES
    assert frame_rate(walk) == pytest.approx(RATE)
    for number, frame in enumerate(frames):
        square = frame[15:35, 8 * number + 5 : 8 * number + 15].reshape(-1, 3).mean(axis=0)
        assert np.abs(square - (230, 120, 30)).max() < 25


def test_overlays_of_a_video_are_a_video_and_masks_are_numbered_pictures(
    walk: Path, student: str, tmp_path: Path, capsys
):
    """A video encoder would turn the ids of a mask into other ids."""
    outputs = ["masks", "overlays", "cutouts"]
    predict_main([student, str(walk), "--output_dir", str(tmp_path), "--outputs", *outputs])
    (speed,) = re.findall(r"([\d.]+) images per second", capsys.readouterr().out)
    assert float(speed) > 0, "a bar that is not drawn counts nothing"
    shown = list(read_frames(tmp_path / "overlays" / "walk.mp4"))
    assert len(shown) == FRAMES
    assert shown[0].shape == (48, 80, 3)
    for kind in ("masks", "cutouts"):
        names = sorted(p.name for p in (tmp_path / kind / "walk").iterdir())
        assert names == [f"{n:06d}.png" for n in range(1, FRAMES + 1)]
    mask = np.asarray(Image.open(tmp_path / "masks" / "walk" / "000003.png"))
    assert mask.shape == (48, 80)
    assert set(np.unique(mask)) <= {0, 255}


def test_cutouts_keep_the_picture_and_hide_the_background(student: str, tmp_path: Path):
    """Premultiplied or inverted, they look right in one viewer and wrong in the next."""
    picture = np.random.default_rng(3).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    flags = ["--output_dir", str(tmp_path / "out"), "--outputs", "masks", "cutouts"]
    predict_main([student, str(tmp_path / "x.png"), *flags])
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "x.png"))
    cutout = np.asarray(Image.open(tmp_path / "out" / "cutouts" / "x.png"))
    assert 0 < (mask > 0).mean() < 1
    assert (cutout[..., 3] == mask).all()
    assert (cutout[..., :3] == picture).all()


def test_labels_beside_the_pictures_are_not_written_over(tmp_path: Path):
    """`--output_dir photos` is the natural wish, and photos/masks may hold days of work."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / kind / "x.png")
    before = (tmp_path / "masks" / "x.png").read_bytes()
    args = PredictArguments("no-model", output_dir=str(tmp_path), outputs=["masks"])
    with pytest.raises(ValueError, match=r"^Expected an --output_dir apart .* masks/x\.png would"):
        predict(args, [str(tmp_path / "images")])
    assert (tmp_path / "masks" / "x.png").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("num_labels", "inside"), [(2, True), (3, False)])
def test_an_onnx_file_gives_the_masks_of_its_student(num_labels: int, inside: bool, tmp_path: Path):
    """Normalised twice, or not at all, it would still give masks."""
    pytest.importorskip("onnxruntime")
    folder = save_network(tmp_path / "student", num_labels=num_labels)
    picture = np.random.default_rng(5).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    export(folder, tmp_path / "student.onnx", with_preprocessing=inside)
    masks = []
    for model in (folder, tmp_path / "student.onnx"):
        flags = ["--outputs", "masks", "--output_dir", str(tmp_path / "out")]
        flags += ["--threshold", "0.4"] if num_labels == 2 else []
        predict_main([str(model), str(tmp_path / "x.png"), *flags])
        masks.append(np.asarray(Image.open(tmp_path / "out" / "masks" / "x.png")))
    assert (masks[0] == masks[1]).mean() > 0.995


def test_tiles_and_flip_reach_the_command_line(student: str, tmp_path: Path):
    """A flag that nothing reads looks like one that changes nothing."""
    picture = np.random.default_rng(4).integers(0, 256, (2 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    masks = {}
    for name, more in {"whole": [], "tile": ["--tile"], "flip": ["--flip"]}.items():
        flags = ["--outputs", "masks", "--output_dir", str(tmp_path / name)]
        predict_main([student, str(tmp_path / "x.png"), *flags, *more])
        masks[name] = cv2.imread(str(tmp_path / name / "masks" / "x.png"), cv2.IMREAD_UNCHANGED)
        assert masks[name].shape == (2 * SIDE, 3 * SIDE)
    assert (masks["tile"] != masks["whole"]).any()
    assert (masks["flip"] != masks["whole"]).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("image_mean", math.nan), ("image_mean", math.inf)),
        *(("image_std", math.nan), ("image_std", math.inf), ("image_std", 0.0)),
    ],
)
def test_statistics_that_normalise_nothing_are_refused(name: str, value: float, tmp_path: Path):
    """Every logit would be NaN, and the masks would be empty with exit code 0."""
    odd = {name: [value, 0.5, 0.5]}
    SmpImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    for make in (
        lambda: SmpConfig(**odd),
        lambda: SmpImageProcessor.from_pretrained(str(tmp_path)),
        lambda: saved_statistics(str(tmp_path), {}),
    ):
        with pytest.raises(ValueError, match=f"Expected {name} of three finite numbers"):
            make()


@pytest.mark.parametrize("value", [math.nan, 0.0, "1/255"])
def test_a_factor_that_rescales_nothing_is_refused(value: object):
    """0 makes every picture black."""
    with pytest.raises(ValueError, match="Expected rescale_factor as a finite number above 0"):
        SmpImageProcessor(rescale_factor=value)


def test_a_softmax_that_underflows_is_no_hole_in_the_mask():
    """The logarithm of 0 times a weight of 0 is NaN, which a resize spreads."""
    probability = np.zeros((1, 3, 4, 4), np.float32)
    probability[:, 2] = 1

    class Exported:
        image_mean, image_std, with_preprocessing = [0.5] * 3, [0.5] * 3, True
        own_depth = multi_label = False

        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            return probability

    logits = onnx_network(Exported())(torch.zeros(1, 3, 4, 4))
    assert logits.isfinite().all()
    assert (logits.argmax(dim=1) == 2).all()


def test_logits_that_are_no_numbers_are_refused():
    """argmax takes NaN for the largest, a threshold for background; both look like a mask."""
    statistics = (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    broken = Segmenter(lambda images: images[:, :1] * math.nan, (8, 8), statistics)
    with pytest.raises(ValueError, match="Expected finite logits"):
        broken.logits([np.zeros((8, 8, 3), np.uint8)])


def cut(video: Path, target: Path, *, start: float, stop: float) -> Path:
    """A copy of a video whose image data is zero from one share of it to another."""
    data = bytearray(video.read_bytes())
    begin = data.index(b"mdat") + 4
    length = data.index(b"moov") - 4 - begin
    first, last = begin + int(start * length), begin + int(stop * length)
    data[first:last] = bytes(last - first)
    target.write_bytes(data)
    return target


def test_a_damaged_video_is_an_error_after_all_others_are_done(
    walk: Path, student: str, tmp_path: Path
):
    """24 of 40 frames, with exit code 0, look like a video that is that long."""
    damaged = cut(walk, tmp_path / "a_damaged.mp4", start=0.5, stop=1.0)
    assert 0 < len(list(frames_of(damaged))) < FRAMES
    whole = tmp_path / "b_whole.mp4"
    whole.write_bytes(walk.read_bytes())
    flags = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=rf"Expected the {FRAMES} frames .*a_damaged.mp4"):
        predict_main([student, str(damaged), str(whole), *flags])
    assert frame_count(tmp_path / "out" / "overlays" / "b_whole.mp4") == FRAMES


def frames_of(path: Path) -> Iterator[np.ndarray]:
    with contextlib.suppress(CutOffError):
        yield from read_frames(path)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile walk.mp4\n", "#EXTM3U\nwalk.mp4\n"])
def test_a_list_of_files_is_no_video(text: str, walk: Path):
    """FFmpeg goes by the content, so that a text called .mp4 chooses files to read."""
    path = walk.with_name("list.mp4")
    path.write_text(text)
    for read in (frame_count, frame_rate, lambda p: list(read_frames(p))):
        with pytest.raises(ValueError, match=r"list.mp4, which begins like none"):
            read(path)


def test_a_name_is_no_pattern_of_numbered_pictures(tmp_path: Path):
    """OpenCV would read frame_01.jpg and so on beside the file."""
    for number in (1, 2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"frame_{number:02d}.jpg")
    path = tmp_path / "frame_%02d.mp4"
    path.write_bytes(b"\0\0\0\x08free")
    with pytest.raises(ValueError, match="Expected a readable video"):
        frame_count(path)


def test_a_video_that_lost_frames_in_writing_is_an_error(tmp_path: Path):
    """OpenCV says nothing of a frame of another size, nor of a full disk."""
    video = VideoFile(tmp_path / "x.mp4", RATE)
    frame = np.zeros((48, 80, 3), np.uint8)
    video.add(frame)
    with pytest.raises(ValueError, match="Expected frames of 80x48"):
        video.add(frame[:40])
    video._frames += 1
    with pytest.raises(OSError, match=r"Expected 2 frames in .*x.mp4, got 1"):
        video.close()
