"""Sizes of images: what is read as one, and rectangles through a whole run."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import save_network, train_flags
from transformers import AutoConfig, AutoImageProcessor, pipeline

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.train import run_train
from kd_trainer.config import build, parse
from kd_trainer.data.synthetic import synthetic_pair
from kd_trainer.doctor.teacher import input_size_finding
from kd_trainer.inference import Segmenter
from kd_trainer.models.configuration_smp import SmpConfig
from kd_trainer.models.image_sizes import as_size, plain_size, size_text

HEIGHT, WIDTH = 32, 64


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (640, (640, 640)),
        ([640], (640, 640)),
        ([512, 1024], (512, 1024)),
        ((512, 1024), (512, 1024)),
        ("640", (640, 640)),
        ("512x1024", (512, 1024)),
        ("512 X 1024", (512, 1024)),
        (["512x1024"], (512, 1024)),
        (["512", "1024"], (512, 1024)),
    ],
)
def test_a_size_is_read_as_people_write_it_and_back(written, size):
    """Height and width exchanged would train on images of the wrong shape without an error."""
    assert as_size(written) == size
    assert as_size(plain_size(size)) == as_size(size_text(size)) == size


@pytest.mark.parametrize("wrong", ["", "x", "512x1024x3", [1, 2, 3], -5, 33.5, True, "²", None])
def test_what_is_no_size_is_an_error(wrong):
    """`True` is a number in Python, and would be a square of one pixel."""
    with pytest.raises(ValueError, match=r"^Expected height and width in pixels"):
        as_size(wrong)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--image_size", "96"], 96),
        (["--image_size", "96", "96"], 96),
        (["--image_size", "64", "96"], [64, 96]),
        (["--image_size", "64x96"], [64, 96]),
        (["--image_size=64,96"], [64, 96]),
    ],
)
def test_a_flag_names_a_square_or_a_rectangle(flags, size):
    """A square is kept as one number: files of square students stay what they were."""
    assert parse(["--dataset", "synthetic", *flags]).data.image_size == size


def test_a_recipe_with_a_plain_number_or_a_list_is_read_and_written_back(tmp_path: Path):
    """config.yaml of a run is read again by report, compare and resume."""
    for written, size in (("96", 96), ("[64, 96]", [64, 96]), ("64x96", [64, 96])):
        file = tmp_path / "recipe.yaml"
        file.write_text(f"image_size: {written}\nteacher_image_size: {written}\n")
        run = parse(["--config", str(file), "--dataset", "synthetic"])
        told = yaml.safe_load(yaml.safe_dump(run.resolved()))
        assert (told["image_size"], told["teacher_image_size"]) == (size, size)
        assert build(told).data.input_size == as_size(size)


@pytest.mark.parametrize("wrong", [[64], [64, 16], [64, 64, 64]])
def test_a_side_that_is_too_small_or_one_too_many_is_refused(wrong):
    """The smallest side counts, not the first."""
    if wrong == [64]:
        build({"dataset": "synthetic", "image_size": wrong})
        return
    with pytest.raises(ValueError, match=r"^Expected --image_size .*got"):
        build({"dataset": "synthetic", "image_size": wrong})


def test_a_saved_configuration_holds_a_number_for_a_square_and_two_for_a_rectangle(tmp_path: Path):
    """Students from before have a plain number, and readers of theirs expect one."""
    for given, saved in ((96, 96), ([96, 96], 96), ((64, 96), [64, 96])):
        SmpConfig(encoder_name="resnet18", image_size=given).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["image_size"] == saved
        assert AutoConfig.from_pretrained(tmp_path).image_size == saved
    for wrong in ([], [64, 0], [64, 64, 64], [64, "96"], [True, 96], {"height": 64}):
        with pytest.raises(ValueError, match="as image_size of a model"):
            SmpConfig(encoder_name="resnet18", image_size=wrong)


def test_a_synthetic_rectangle_shows_part_of_the_square_with_most_of_the_people():
    """A window anywhere would often show nobody, and nothing could be learned."""
    for index in range(4):
        image, mask = synthetic_pair("train", index, size=(40, 96), seed=0)
        square, whole = synthetic_pair("train", index, size=96, seed=0)
        assert (image.shape, mask.shape) == ((40, 96, 3), (40, 96))
        tops = [whole[top : top + 40].sum(dtype=int) for top in range(57)]
        assert mask.sum(dtype=int) == max(tops) > 0
        top = int(np.argmax(tops))
        assert (image == square[top : top + 40]).all()
        tall, _ = synthetic_pair("train", index, size=(96, 40), seed=0)
        assert tall.shape == (96, 40, 3)


def test_the_doctor_compares_the_sizes_of_a_teacher_side_by_side():
    """A rectangle of a square's area may be far from it."""
    assert input_size_finding([64, 128], (64, 128)).grade.name == "OK"
    found = input_size_finding([64, 512], [512, 64])
    assert "64x512 px and gets 512x64 px" in found.text
    assert "--teacher_image_size 64x512, or a larger" in found.cure


@pytest.mark.parametrize(("height", "width"), [(50, 90), (20, 200), (32, 64), (10, 20)])
def test_rectangular_tiles_are_put_back_where_they_were_cut(height: int, width: int):
    """Sides exchanged leave seams, or rows that no tile covers."""
    statistics = torch.full((1, 3, 1, 1), 100.0), torch.full((1, 3, 1, 1), 50.0)
    shapes = set()

    def network(images: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(images.shape[-2:]))
        return images[:, :1]

    segmenter = Segmenter(network, (HEIGHT, WIDTH), statistics, tile=True)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (found,) = segmenter.logits([image])
    assert shapes == {(HEIGHT, WIDTH)}
    assert found.shape == (1, height, width)
    if height > HEIGHT or width > WIDTH:
        wanted = (torch.from_numpy(image)[..., 0].float() - 100) / 50
        torch.testing.assert_close(found[0], wanted)


def write_wide_pairs(root: Path) -> Path:
    """Images of several shapes, each with a bright block as its foreground."""
    for split, count in (("train", 4), ("validation", 3)):
        draw = np.random.default_rng(count)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            height, width = 40 + 8 * index, 90 + 4 * index
            image = draw.integers(0, 120, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[10:30, 20 + 5 * index : 60] = 255
            image[mask > 0] += 120
            cv2.imwrite(str(root / split / "images" / f"{index}.png"), image)
            cv2.imwrite(str(root / split / "masks" / f"{index}.png"), mask)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training on rectangles, with a cached teacher of a size of its own."""
    root = tmp_path_factory.mktemp("run")
    more = ("--image_size", str(HEIGHT), str(WIDTH), "--teacher_image_size", "64x96")
    cache = ("--teacher_targets", "cached", "--teacher_cache", str(root / "cache"))
    flags = train_flags(
        write_wide_pairs(root / "data"),
        root / "out",
        *(*more, *cache, "--save_strategy", "epoch"),
        teacher=save_network(root / "teacher"),
    )
    run_train(parse(flags))
    (root / "flags.json").write_text(json.dumps(flags))
    return root


def test_a_run_says_its_size_in_every_file(run: Path):
    """One file with a square in it would make the next command see other images."""
    saved = json.loads((run / "out/student/preprocessor_config.json").read_text())
    assert saved["size"] == {"height": HEIGHT, "width": WIDTH}
    config = json.loads((run / "out/student/config.json").read_text())
    results = json.loads((run / "out/results.json").read_text())
    assert config["image_size"] == results["image_size"] == [HEIGHT, WIDTH]
    assert yaml.safe_load((run / "out/config.yaml").read_text())["image_size"] == [HEIGHT, WIDTH]


def test_a_run_on_rectangles_goes_on_as_if_it_had_not_stopped(run: Path):
    """The size is one of the settings that make two runs the same."""
    flags = json.loads((run / "flags.json").read_text())
    checkpoints = sorted((run / "out").glob("checkpoint-*"))
    before = load_file(run / "out/student/model.safetensors")
    first = checkpoints[0]
    run_train(parse([*flags, "--resume", str(first)]))
    after = load_file(run / "out/student/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match=r"image_size 32 64, got 64"):
        run_train(parse([*flags, "--image_size", "64", "--resume", str(first)]))


def test_evaluation_of_a_saved_rectangle_finds_the_figures_of_the_training(
    run: Path, tmp_path: Path
):
    """eval.py reads the size from the student."""
    data = ["--dataset", str(run / "data"), "--output_dir", str(tmp_path)]
    evaluate_main([str(run / "out/student"), *data])
    found = json.loads((tmp_path / "eval_results.json").read_text())
    wanted = json.loads((run / "out/results.json").read_text())
    assert found["student_miou"] == wanted["student_miou"]


def test_predictions_and_pipeline_show_the_student_the_same_rectangle(run: Path, tmp_path: Path):
    """The pipeline knows the processor alone, predict.py the configuration."""
    image = run / "data/validation/images/0.png"
    predict_main(
        [str(run / "out/student"), str(image), "--output_dir", str(tmp_path), "--outputs", "masks"]
    )
    ours = cv2.imread(str(tmp_path / "masks/0.png"), cv2.IMREAD_UNCHANGED) > 0
    assert ours.shape == (40, 90)
    found = pipeline("image-segmentation", str(run / "out/student"))(str(image))
    theirs = next(np.asarray(one["mask"]) for one in found if one["label"] != "background") > 0
    assert (ours == theirs).mean() > 0.99
    processor = AutoImageProcessor.from_pretrained(run / "out/student")
    pixels = processor(cv2.imread(str(image)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_an_export_is_checked_at_its_rectangle_and_names_it(run: Path, tmp_path: Path, fixed: bool):
    """A graph of fixed size with the sides exchanged runs on no image of the training."""
    more = ["--fixed_size"] if fixed else []
    flags = ["--output", str(tmp_path), "--dataset", str(run / "data"), "--latency_repeats", "0"]
    export_main([str(run / "out/student"), "--format", "onnx", *flags, *more])
    told = json.loads((tmp_path / "export.json").read_text())["onnx"]
    assert told["image_size"] == [HEIGHT, WIDTH]
    assert told["mask_iou"] > 0.999
    assert fixed or told["at_another_size"]["shape"][-2:] == [HEIGHT + 32, WIDTH + 64]
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    assert session.get_modelmeta().custom_metadata_map["image_size"] == f"{HEIGHT}x{WIDTH}"
    sides = session.get_inputs()[0].shape[-2:]
    assert sides == ([HEIGHT, WIDTH] if fixed else ["height", "width"])
    predict_main(
        [
            *(str(tmp_path / "student.onnx"), str(run / "data/validation/images/0.png")),
            *("--output_dir", str(tmp_path / "out")),
        ]
    )
