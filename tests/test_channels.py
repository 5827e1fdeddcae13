"""Images of any channels and depth: read as they are stored, scaled by one rule, measured."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from small_runs import SIDE, run_card, train_flags, write_pairs
from transformers import AutoImageProcessor

from kd_trainer.commands.doctor import examine
from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.push import push_main
from kd_trainer.commands.train import train
from kd_trainer.config import parse
from kd_trainer.data.augmentation import Augmentation
from kd_trainer.data.channels import (
    Channels,
    channels_shape,
    decode_channels,
    measured,
    visible,
)
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.images import BadSampleError
from kd_trainer.data.masks import MaskRule
from kd_trainer.export import load_onnx
from kd_trainer.loading import load_student
from kd_trainer.models.configuration_smp import SmpConfig
from kd_trainer.models.image_processing import SmpImageProcessor, resize_image
from kd_trainer.web_demo.models import load_demo_student

RANDOM = np.random.default_rng(0)


def cell(data: bytes) -> dict:
    return {"bytes": data, "path": None}


def encoded(image: np.ndarray, suffix: str) -> dict:
    """A file whose channels are stored in the order of the array."""
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(image.shape[-1] if image.ndim == 3 else 1)
    turned = image if order is None else image[..., order]
    return cell(cv2.imencode(suffix, turned)[1].tobytes())


def npy(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, image)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_values_are_those_of_the_file_scaled_by_their_depth(suffix, channels, kind):
    """PIL drops the lower half of 16-bit colours, and takes a fourth band for transparency."""
    if kind is np.float32 and suffix == ".png":
        pytest.skip("a PNG holds no floats")
    stored = RANDOM.integers(0, 60_000 if kind is np.uint16 else 250, (7, 9, channels)).astype(kind)
    scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    file = encoded(stored, suffix)
    got = decode_channels(file, 0, channels)
    assert got.dtype == np.float32
    assert np.allclose(got, stored.astype(np.float64) / scale, rtol=1e-6)
    assert channels_shape(file, 0) == (7, 9)


@pytest.mark.parametrize("last", [False, True])
def test_arrays_of_more_bands_are_read_in_both_orders(last):
    """Read the wrong way round, rows would be bands."""
    image = RANDOM.integers(0, 250, (7, 9, 6), dtype=np.uint8)
    file = cell(npy(image if last else np.moveaxis(image, 2, 0)))
    assert np.allclose(decode_channels(file, 0, 6) * 255, image)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        (encoded(np.zeros((4, 4, 4), np.uint8), ".tif"), "an image of 3 channels"),
        (encoded(np.full((4, 4, 3), np.nan, np.float32), ".tif"), "finite values"),
        (cell(b"II*\x00\xff\xff\xff\x7f"), "Expected "),
        (cell(b"no image"), "Expected "),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name(file, match):
    """A NaN would be every weight's end in one step."""
    with pytest.raises(BadSampleError, match=match):
        decode_channels(file, 0, 3)


def test_a_tiff_that_claims_to_be_huge_is_not_decoded(monkeypatch):
    """A file of a few bytes can claim any size."""
    data = bytearray(encoded(np.zeros((4, 5, 4), np.uint16), ".tif")["bytes"])
    tags = int.from_bytes(data[4:8], "little")
    for entry in range(tags + 2, tags + 2 + 12 * 2, 12):  # width and height come first
        data[entry + 2 : entry + 12] = b"\x04\x00\x01\x00\x00\x00" + (60_000).to_bytes(4, "little")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadSampleError, match=r"at most 89,478,485 pixels, got 60,000 x 60,000"):
        decode_channels(cell(bytes(data)), 0, 4)


def test_mean_and_std_are_those_of_all_pixels():
    """A mean of means would weigh a small image as much as a large one."""
    images = [RANDOM.integers(0, 60_000, (h, 8, 2)).astype(np.uint16) for h in (4, 12)]
    mean, std, count = measured([{"image": cell(npy(image))} for image in images], 2)
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]) / 65535
    assert count == 2
    assert mean == pytest.approx(pixels.mean(axis=0), rel=1e-5)
    assert std == pytest.approx(pixels.std(axis=0), rel=1e-5)
    with pytest.raises(ValueError, match=r"^Expected channels that differ .* channel 1 of the 1"):
        measured([{"image": cell(npy(images[0] * np.uint16([1, 0])))}], 2)


def test_only_geometry_is_drawn_and_what_comes_in_is_the_mean():
    """Colour changes are made for bytes: on floats they would clip everything to 0..1."""
    image = RANDOM.normal(size=(32, 32, 5)).astype(np.float32)
    mask = np.zeros((32, 32), np.int16)
    options = {"image_size": 32, "seed": 0, "brightness_contrast_probability": 0.8}
    for kind in ("heavy", "seed", "none"):
        augment = Augmentation(kind, floats=True, **options)
        for epoch in range(8):
            changed, _ = augment(image, mask, epoch=epoch, index=0)
            assert any(np.array_equal(changed, i) for i in (image, image[:, ::-1]))
    light, outside = Augmentation("light", floats=True, **options), 0
    for epoch in range(20):
        changed, moved = light(image + 50, mask, epoch=epoch, index=0)
        assert changed.shape == image.shape
        deep = cv2.erode((moved < 0).astype(np.uint8), np.ones((5, 5))).astype(bool)
        outside += deep.sum()
        assert np.allclose(changed[deep], 0, atol=1e-3)
    assert outside


def test_the_resize_of_floats_is_that_of_bytes():
    """A student would see sharper images than it is measured on."""
    image = cv2.GaussianBlur(RANDOM.integers(0, 255, (40, 50, 3), dtype=np.uint8), (0, 0), 2)
    wanted = resize_image(torch.from_numpy(image).permute(2, 0, 1), 16, 24).permute(1, 2, 0)
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    got = resize_image(pixels, 16, 24).permute(1, 2, 0).numpy()
    assert np.abs(got - wanted.numpy()).max() <= 1
    assert visible(got).dtype == np.uint8


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("resize", ["stretch", "fit"])
def test_the_saved_processor_gives_what_the_training_saw(kind, resize, tmp_path):
    """Fed otherwise, a published student would see images it has never seen."""
    stored = (RANDOM.random((20, 30, 5)) * (200 if kind is np.uint8 else 9000)).astype(kind)
    scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    mean, std = ((stored.reshape(-1, 5) / scale).mean(0), (stored.reshape(-1, 5) / scale).std(0))
    reader = Channels(tuple(mean.tolist()), tuple(std.tolist()))
    row = {"image": cell(npy(stored)), "mask": None}
    options = {"augmentation": "none", "seed": 0, "brightness_contrast_probability": 0}
    make = SegmentationTransform(32, MaskRule((0, 1)), resize=resize, channels=reader, **options)
    wanted = make(row, epoch=0, index=0)["pixel_values"]
    config = SmpConfig(
        encoder_name="resnet18",
        in_channels=5,
        own_depth=True,
        image_size=32,
        keep_aspect_ratio=resize == "fit",
        image_mean=list(reader.mean),
        image_std=list(reader.std),
    )
    SmpImageProcessor.from_model_config(config).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for image in (stored, np.moveaxis(stored, 2, 0), stored.astype(stored.dtype.newbyteorder(">"))):
        got = processor(image, return_tensors="pt")["pixel_values"][0]
        assert got.shape == (5, 32, 32)
        assert torch.allclose(got, wanted, atol=1e-4)
    if resize == "fit":
        assert (wanted[:, 22:] == 0).all()
        assert torch.allclose(got[:, 22:], torch.zeros(()), atol=1e-6)
    with pytest.raises(ValueError, match=r"^Expected an image of 5 channels"):
        processor(stored[..., :4], return_tensors="pt")


def deep_pairs(root: Path, channels: int, kind: type) -> Path:
    """A pair folder whose images are TIFFs of so many channels."""
    write_pairs(root, train=4, validation=2)
    for file in root.glob("*/images/*.png"):
        image = cv2.imread(str(file)).astype(np.float64) / 255
        bands = np.dstack([image, image[..., :1]])[..., :channels]
        scaled = bands * {np.uint8: 255, np.uint16: 4000, np.float32: 1}[kind]
        cv2.imwrite(str(file.with_suffix(".tif")), scaled.astype(kind))
        file.unlink()
    return root


@pytest.mark.parametrize(
    ("channels", "kind", "resize"), [(4, np.uint16, "crop"), (1, np.float32, "stretch")]
)
def test_a_run_measures_its_channels_and_its_student_is_read_back_with_them(
    channels, kind, resize, tmp_path, capsys
):
    """Normalised otherwise at prediction, the student would see images it has never seen."""
    data = deep_pairs(tmp_path / "data", channels, kind)
    more = ["--in_channels", str(channels), "--augmentation", "light", "--epochs", "1"]
    more += ["--resize", resize]
    teacher = tmp_path / "teacher"
    train(parse(train_flags(data, teacher, *more)))
    assert "Channels of 4 training images" in capsys.readouterr().err
    results = train(parse(train_flags(data, tmp_path / "run", *more, teacher=teacher)))
    assert results["teacher_miou"] >= 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    student = load_student(tmp_path / "run")
    assert list(student.config.image_mean) == pytest.approx(settings["channel_mean"])
    assert (student.config.in_channels, student.config.own_depth) == (channels, True)
    out = tmp_path / "out"
    evaluate_main([str(tmp_path / "run"), "--dataset", str(data), "--output_dir", str(out)])
    figures = json.loads((out / "eval_results.json").read_text())
    assert figures["student_miou"] == pytest.approx(results["student_miou"], abs=1e-6)
    image = next((data / "validation" / "images").glob("*.tif"))
    predict_main([str(tmp_path / "run"), str(image), "--output_dir", str(out)])
    found = cv2.imread(str(out / "masks" / f"{image.stem}.png"), 0)
    reader = Channels(tuple(student.config.image_mean), tuple(student.config.image_std))
    pixels = torch.from_numpy(reader.image({"path": str(image), "bytes": None}, 0))
    assert pixels.shape == (SIDE, SIDE, channels)
    with torch.no_grad():
        raw = student.eval()(pixels.permute(2, 0, 1)[None]).raw_logits[0, 0]
    assert np.array_equal(found > 0, (raw >= 0).numpy())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A student of four deep bands."""
    root = tmp_path_factory.mktemp("bands")
    data = deep_pairs(root / "data", 4, np.uint16)
    shown = ["--in_channels", "4", "--epochs", "1", "--report", "true", "--panel_images", "2"]
    results = train(parse(train_flags(data, root / "run", *shown)))
    return root, data, results


def test_report_and_panels_show_the_first_three_channels(finished):
    """Normalised floats taken for bytes are black."""
    root, data, _ = finished
    page = (root / "run" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * 4
    (panel,) = (root / "run" / "panels").glob("*.png")
    shown = cv2.imread(str(panel))[18 : 18 + 192, 4 : 4 + 192]
    stored = cv2.imread(str(sorted((data / "validation" / "images").glob("*.tif"))[0]), -1)
    wanted = cv2.resize(stored[..., :3].astype(np.float32), (192, 192))
    for channel in range(3):
        pair = shown[..., channel].ravel(), wanted[..., channel].ravel()
        assert np.corrcoef(*pair)[0, 1] > 0.95
        assert np.ptp(pair[0]) > 200


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_an_exported_file_takes_all_channels(inside, finished, tmp_path):
    """Cut to three, or divided by 255, they would be other images."""
    root, data, results = finished
    shared = ["--dataset", str(data), "--output", str(tmp_path), "--latency_repeats", "0"]
    more = ["--with_preprocessing"] if inside else []
    export_main([str(root / "run"), *shared, "--format", "onnx", *more])
    (file,) = tmp_path.glob("*.onnx")
    (told,) = json.loads((tmp_path / "export.json").read_text()).values()
    assert told["torch_miou"] == pytest.approx(results["student_miou"], abs=1e-6)
    assert told["mask_iou"] == 1
    image = next((data / "validation" / "images").glob("*.tif"))
    exported = load_onnx(file)
    assert exported.own_depth
    assert len(exported.image_mean) == 4
    if inside:
        values = decode_channels({"path": str(image), "bytes": None}, 0, 4)
        assert exported(values[None]).shape == (1, 1, SIDE, SIDE)
    for model, name in ((root / "run", "torch"), (file, "file")):
        predict_main([str(model), str(image), "--soft", "--output_dir", str(tmp_path / name)])
    soft = [
        cv2.imread(str(tmp_path / n / "soft" / f"{image.stem}.png"), -1).astype(int)
        for n in ("torch", "file")
    ]
    assert np.abs(soft[0] - soft[1]).max() <= 4  # of 65535


@pytest.mark.slow
def test_code_of_the_card_reads_all_channels(finished, tmp_path):
    """Without the scale of 16 bits a stranger's copy would see white."""
    root, data, _ = finished
    hub = tmp_path / "hub"
    flags = ["--dry_run", "--license", "mit", "--output_dir", str(hub)]
    push_main([str(root / "run"), "me/bands", *flags])
    image = next((data / "validation" / "images").glob("*.tif"))
    stored = cv2.imread(str(image), cv2.IMREAD_UNCHANGED)[..., [2, 1, 0, 3]]
    np.save(tmp_path / "image.npy", stored)
    found = run_card(hub, "me/bands", tmp_path, "classes", "mask", "logits")
    student = load_student(root / "run").eval()
    reader = Channels(tuple(student.config.image_mean), tuple(student.config.image_std))
    pixels = torch.from_numpy(reader.image({"path": str(image), "bytes": None}, 0))
    with torch.no_grad():
        raw = student(pixels.permute(2, 0, 1)[None]).raw_logits[0, 0].numpy()
    assert found["logits"][0, 0] == pytest.approx(raw, abs=1e-4)
    assert np.array_equal(found["mask"], raw > 0)
    assert np.array_equal(found["classes"], raw > 0)
    assert "pipeline(" not in (hub / "README.md").read_text()


def test_a_saved_student_goes_on_with_its_own_statistics(finished, tmp_path, capsys):
    """Normalised by those of other data, its images would be shifted under its weights."""
    root, _, _ = finished
    student, brighter = ["--student", str(root / "run")], deep_pairs(tmp_path / "d", 4, np.uint8)
    more = ["--in_channels", "4", "--max_steps", "1", *student]
    train(parse(train_flags(brighter, tmp_path / "run", *more)))
    assert "normalised as those of the saved student" in capsys.readouterr().err
    first, second = (load_student(run / "run").config for run in (root, tmp_path))
    assert list(second.image_mean) == list(first.image_mean)
    assert second.own_depth
    for flags, match in (
        (
            ["--in_channels", "1", *student],
            r"student of 1 channels .* of 4 channels\. Leave",
        ),
        (student, r"^Expected --in_channels 4 with"),
    ):
        data = deep_pairs(tmp_path / flags[1][-1], 1, np.uint8)
        with pytest.raises(ValueError, match=match):
            train(parse(train_flags(data, tmp_path / "other", *flags)))


def test_the_doctor_looks_at_such_images(finished, tmp_path):
    """Read as RGB they would be an error, or other images."""
    root, data, _ = finished
    more = ["--in_channels", "4", "--resize", "fit"]
    run = parse(train_flags(data, tmp_path / "run", *more, teacher=root / "run"))
    findings = {finding.check: finding for finding in examine(run)}
    wanted = {"masks, train", "masks, validation", "teacher output", "teacher quality"}
    wanted |= {"normalisation", "shared images", "loss", "gradients", "plan", "disk", "time"}
    assert wanted <= findings.keys()
    assert findings["normalisation"].text.startswith("not tried in other ways")


def test_the_demo_says_that_browsers_send_rgb(finished):
    """The first image of a visitor would be the one to fail."""
    with pytest.raises(ValueError, match=r"8-bit RGB images, .* of 4 channels .* Use predict\.py"):
        load_demo_student(str(finished[0] / "run"))


def test_a_teacher_of_other_channels_is_refused(tmp_path):
    """It would see bands for colours."""
    rgb = write_pairs(tmp_path / "rgb", train=4, validation=2)
    train(parse(train_flags(rgb, tmp_path / "teacher", "--max_steps", "1")))
    data = deep_pairs(tmp_path / "data", 4, np.uint8)
    flags = train_flags(data, tmp_path / "run", "--in_channels", "4", teacher=tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"a teacher of 4 channels, .*, got one of 3\. Take"):
        train(parse(flags))


def test_a_weight_file_of_the_same_channels_teaches_and_says_how_it_is_fed(tmp_path, capsys):
    """The shape of its first convolution says how many channels it takes, and nothing the mean."""
    data = deep_pairs(tmp_path / "data", 4, np.uint16)
    teacher = smp.Unet("resnet18", encoder_weights=None, in_channels=4)
    torch.save(teacher.state_dict(), tmp_path / "four.pth")
    names = ["--teacher_arch", "unet", "--teacher_encoder", "resnet18"]
    flags = ["--in_channels", "4", "--augmentation", "light", "--max_steps", "1", *names]
    flags = train_flags(data, tmp_path / "run", *flags, teacher=tmp_path / "four.pth")
    results = train(parse(flags))
    assert results["teacher_miou"] >= 0
    mean = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["channel_mean"]
    told = " ".join(f"{value:.4g}" for value in mean)
    said = capsys.readouterr().err
    assert f"made for images of 4 channels, it sees the student's, with {told} and" in said


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--channel_mean", "0.5"], "--in_channels with --channel_mean"),
        (["--in_channels", "2", "--channel_mean", "0.5", "0.5"], "Give both"),
        (["--in_channels", "4", "--on_bad_sample", "skip"], "no --on_bad_sample skip"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more, match, tmp_path):
    """Statistics of one channel would be spread over all."""
    with pytest.raises(ValueError, match=match):
        parse(train_flags(tmp_path, tmp_path / "run", *more))
