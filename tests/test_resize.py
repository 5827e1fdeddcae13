"""`--resize fit` and `crop`: where images lie in the input, and that padding is nothing."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from small_runs import save_network, train_flags
from test_image_sizes import write_wide_pairs
from transformers import AutoImageProcessor, pipeline

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.data import MaskRule, SegmentationTransform
from kd_trainer.data.augmentation import Augmentation
from kd_trainer.losses import LossWeights, distillation_terms
from kd_trainer.metrics import image_counts
from kd_trainer.models.configuration_smp import SmpConfig
from kd_trainer.models.image_processing import (
    PADDING,
    SmpImageProcessor,
    at_image_size,
    fitted_size,
    to_input,
)
from kd_trainer.models.modeling import SmpOutput

SIZE = (32, 64)
RULE = MaskRule((0, 255), 255 - 1)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row_of(image: np.ndarray, mask: np.ndarray | None) -> dict:
    def cell(pixels: np.ndarray) -> dict:
        return {"bytes": cv2.imencode(".png", pixels)[1].tobytes(), "path": None}

    return {"image": cell(image[..., ::-1]), "mask": None if mask is None else cell(mask)}


def transform(resize: str, augmentation: str = "none") -> SegmentationTransform:
    return SegmentationTransform(
        SIZE,
        RULE,
        resize=resize,
        augmentation=augmentation,
        seed=3,
        brightness_contrast_probability=0.8,
    )


@given(*[st.integers(1, 400)] * 4)
def test_a_fitted_image_touches_both_ends_of_one_side(height, width, tall, wide):
    """Smaller wastes pixels, larger does not fit, and no side may vanish."""
    found = fitted_size((height, width), (tall, wide))
    assert 1 <= found[0] <= tall
    assert 1 <= found[1] <= wide
    assert found[0] == tall or found[1] == wide
    scale = min(tall / height, wide / width)
    assert max(abs(found[0] - scale * height), abs(found[1] - scale * width)) <= 1


@pytest.mark.parametrize(("shape", "content"), [((40, 40), (32, 32)), ((20, 100), (13, 64))])
def test_fit_shrinks_as_pillow_does_and_pads_right_and_below(shape, content):
    """Pillow's bilinear filter is the independent reference; a centred image would be moved."""
    image = cv2.GaussianBlur(picture(*shape), (0, 0), 2)
    found = to_input(torch.from_numpy(image).permute(2, 0, 1), SIZE, keep_aspect_ratio=True)
    wanted = np.asarray(Image.fromarray(image).resize(content[::-1], Image.Resampling.BILINEAR))
    inside = found.permute(1, 2, 0)[: content[0], : content[1]].numpy()
    assert np.abs(inside.astype(int) - wanted).max() <= 1
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[: content[0], : content[1]] = False
    assert (found[:, outside] == torch.tensor(PADDING)[:, None]).all()


def test_a_batch_and_a_flat_image_are_fitted_alike():
    """The processor gets batches of equal images, the data one image."""
    batch = torch.from_numpy(np.stack([picture(50, 60, seed) for seed in range(2)]))
    batch = batch.permute(0, 3, 1, 2)
    together = to_input(batch, SIZE, keep_aspect_ratio=True)
    alone = [to_input(one, SIZE, keep_aspect_ratio=True) for one in batch]
    assert torch.equal(together, torch.stack(alone))


def test_logits_come_back_without_those_of_the_padding():
    """A map stretched with its padding lies beside its image."""
    ramp = torch.linspace(-1, 1, 32).view(1, 1, 32, 1).expand(1, 1, 32, 64).clone()
    ramp[..., 32:] = 100  # the padding of a square image
    found = at_image_size(ramp, (80, 80), keep_aspect_ratio=True)
    wanted = F.interpolate(ramp[..., :32], size=(80, 80), mode="bilinear", align_corners=False)
    assert torch.equal(found, wanted)
    assert found.max() <= 1
    assert at_image_size(ramp, (80, 80), keep_aspect_ratio=False).max() == 100


@pytest.mark.parametrize("augmentation", ["none", "light", "heavy", "seed"])
def test_padding_of_a_sample_counts_nowhere_and_stays_where_it_is(augmentation):
    """Flips would move it, colour would tint it, and deployment knows neither."""
    image, mask = picture(40, 40), np.full((40, 40), 255, np.uint8)
    for epoch in range(6):
        one = transform("fit", augmentation)(row_of(image, mask), epoch=epoch, index=1)
        assert (one["pixel_values"][..., 32:] == torch.tensor(PADDING).view(3, 1, 1)).all()
        assert (one["labels"][:, 32:] == RULE.ignore_index).all()
        assert not one["distil_mask"][:, 32:].any()
        assert one["distil_mask"][:, :32].float().mean() > 0.5
        bare = transform("fit", augmentation)(row_of(image, None), epoch=epoch, index=1)
        assert not bare["distil_mask"][:, 32:].any()
        assert torch.equal(bare["distil_mask"], one["distil_mask"])


def test_a_sample_is_what_the_saved_processor_makes_of_the_same_image():
    """Another rounding there would feed the deployed student other pixels."""
    image = picture(37, 41)
    sample = transform("fit")(row_of(image, np.zeros((37, 41), np.uint8)), epoch=0, index=0)
    config = SmpConfig(encoder_name="resnet18", image_size=SIZE, keep_aspect_ratio=True)
    processor = SmpImageProcessor.from_model_config(config)
    found = processor(image, return_tensors="pt", do_normalize=False, do_rescale=False)
    assert torch.equal(found["pixel_values"][0].byte(), sample["pixel_values"])


def test_crops_are_functions_of_seed_epoch_and_row_and_cut_all_alike():
    """Image, mask and logits from three places would teach nonsense without an error."""
    height, width = 60, 90
    ramp = np.arange(height, dtype=np.uint8)[:, None] * 4 + np.zeros((1, width), np.uint8)
    across = np.arange(width, dtype=np.uint8)[None] * 2 + np.zeros((height, 1), np.uint8)
    image = np.stack([ramp, across, ramp], axis=-1)
    mask = np.where(ramp > 120, 255, 0).astype(np.uint8)
    make = transform("crop")
    fitted = fitted_size((height, width), SIZE)
    logits = np.zeros((2, *SIZE), np.float16)
    clean = cv2.resize(image, fitted[::-1], interpolation=cv2.INTER_AREA)
    logits[:, : fitted[0], : fitted[1]] = clean[..., :2].transpose(2, 0, 1)

    class Targets:
        def logits(self, data: bytes, name: str) -> np.ndarray:
            del data, name
            return logits

    make.targets = Targets()
    contents, shown = set(), set()
    for epoch in range(12):
        one, again = (make(row_of(image, mask), epoch=epoch, index=5) for _ in range(2))
        assert all(torch.equal(one[name], again[name]) for name in one)
        inside = one["distil_mask"]
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert inside[:rows, :columns].all()
        assert int(inside.sum()) == rows * columns
        contents.add((rows, columns))
        core = (slice(2, rows - 2), slice(2, columns - 2))
        pixels, found = one["pixel_values"][:2].float(), one["teacher_logits"].float()
        assert (pixels - found)[:, *core].abs().max() <= 14  # both are ramps of the same place
        edge = (pixels[0] > 124)[core] == (one["labels"][core] == 1)
        assert edge.float().mean() > 0.9
        shown.add(one["pixel_values"].numpy().tobytes())
    assert len(shown) >= 8
    smallest, largest = min(contents), max(contents)
    assert smallest[0] < 0.8 * SIZE[0]  # shrunk, so padded
    assert largest == SIZE  # enlarged, so cut


def test_crops_do_not_follow_the_draws_of_the_augmentation():
    """Two draws from one stream would always flip the same places of an image."""
    plain = transform("crop")
    first = plain.augment.seed
    sequence = np.random.SeedSequence([first, 0, 5]).generate_state(4)
    assert (np.random.SeedSequence([first, 0, 5, 1]).generate_state(4) != sequence).all()
    assert isinstance(plain.augment, Augmentation)


@pytest.mark.parametrize("classes", [1, 3])
def test_loss_and_counts_of_a_padded_batch_are_those_of_the_unpadded_region(classes):
    """Padding in a mean makes the loss of tall images smaller than that of wide ones."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, classes, 20, 24, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, max(classes, 2), (2, 20, 24), generator=draw)
    padding = (0, 8, 0, 12)
    large = [F.pad(one, padding, value=1e3) for one in (student, -teacher)]
    ignored = F.pad(labels, padding, value=255)
    followed = F.pad(torch.ones_like(labels, dtype=torch.bool), padding, value=False)
    settings = {"temperature": 2.0, "weights": LossWeights()}
    inner = distillation_terms(student, -teacher, labels, **settings)
    outer = distillation_terms(*large, ignored, distil_mask=followed, **settings)
    for name, value in inner.named().items():
        torch.testing.assert_close(outer.named()[name], value, rtol=1e-6, atol=1e-7)
    ours = (student[:, 0] > 0).long() if classes == 1 else student.argmax(1)
    theirs = F.pad(ours, padding, value=1)
    count = max(classes, 2)
    assert torch.equal(
        image_counts(ours, labels, count, boundary=False),
        image_counts(theirs, ignored, count, boundary=False),
    )


@pytest.fixture(scope="module", params=["fit", "crop"])
def run(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with cached targets, on images of several shapes."""
    root = tmp_path_factory.mktemp(request.param)
    flags = train_flags(
        write_wide_pairs(root / "data"),
        root / "out",
        *("--image_size", "64", "--resize", request.param, "--augmentation", "light"),
        *("--teacher_targets", "cached", "--teacher_cache", str(root / "cache")),
        *("--save_strategy", "epoch"),
        teacher=save_network(root / "teacher"),
    )
    run_train(parse(flags))
    (root / "flags.json").write_text(json.dumps(flags))
    return root


def test_what_a_run_saves_says_that_the_aspect_ratio_is_kept(run: Path, tmp_path: Path):
    """A student that was trained so and is fed stretched images is another student."""
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((run / "out/student" / name).read_text())["keep_aspect_ratio"] is True
    SmpConfig(encoder_name="resnet18").save_pretrained(tmp_path)
    assert "keep_aspect_ratio" not in json.loads((tmp_path / "config.json").read_text())
    stretched = SmpImageProcessor.from_model_config(SmpConfig(encoder_name="resnet18"))
    assert "keep_aspect_ratio" not in stretched.to_dict()


def test_a_run_goes_on_as_if_it_had_not_stopped_and_not_with_another_resize(run: Path):
    """Crops are drawn anew from (seed, epoch, row) after a resume."""
    flags = json.loads((run / "flags.json").read_text())
    first = sorted((run / "out").glob("checkpoint-*"))[0]
    before = load_file(run / "out/student/model.safetensors")
    run_train(parse([*flags, "--resume", str(first)]))
    after = load_file(run / "out/student/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match=r"got stretch\. Go on with"):
        run_train(parse([*flags, "--resize", "stretch", "--resume", str(first)]))


@pytest.mark.slow
def test_every_consumer_of_a_fitted_student_sees_and_answers_the_same(run: Path, tmp_path: Path):
    """Pipeline, eval.py, predict.py and the ONNX file each have a way of their own to the input."""
    student, image = str(run / "out/student"), run / "data/validation/images/1.png"
    evaluate_main([student, "--dataset", str(run / "data"), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert (
        found["student_miou"] == json.loads((run / "out/results.json").read_text())["student_miou"]
    )
    flags = ["--output", str(tmp_path), "--dataset", str(run / "data"), "--latency_repeats", "0"]
    export_main([student, "--format", "onnx", *flags])
    told = json.loads((tmp_path / "export.json").read_text())["onnx"]
    assert told["resize"] == "fit"
    assert told["mask_iou"] > 0.999
    masks = []
    for name, model in (("torch", student), ("onnx", str(tmp_path / "student.onnx"))):
        out = tmp_path / name
        predict_main([model, str(image), "--output_dir", str(out), "--outputs", "masks"])
        masks.append(cv2.imread(str(out / "masks/1.png"), cv2.IMREAD_UNCHANGED) > 0)
    answers = pipeline("image-segmentation", student)(str(image))
    person = [np.asarray(one["mask"]) for one in answers if one["label"] != "background"]
    masks.append(person[0] > 0 if person else np.zeros_like(masks[0]))
    assert masks[0].shape == (48, 94)
    assert all((mask == masks[0]).mean() > 0.99 for mask in masks)
    processor = AutoImageProcessor.from_pretrained(student)
    pixels = processor(Image.open(image), return_tensors="pt", do_normalize=False)["pixel_values"]
    expected = torch.tensor(PADDING).view(3, 1, 1) / 255
    torch.testing.assert_close(pixels[0, :, 33:], expected.expand(3, 31, 64))
    logits = torch.full((1, 2, 64, 64), 5.0)
    logits[:, 0, :33] = 9.0  # background inside, nothing below
    outputs = SmpOutput(logits=logits)
    (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 94)])
    assert classes.shape == (48, 94)
    assert not classes.any()
