"""Figures and probabilities at the size of the images on the disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_runs import save_network, train_flags, write_pairs
from test_image_sizes import write_wide_pairs
from tiny import tiny_student
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.data import MaskRule, SegmentationTransform
from kd_trainer.inference import evaluator_for, soft_map, torch_segmenter
from kd_trainer.teacher_maps import TeacherMaps

SIDE = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that keeps the aspect ratio and is measured at the images' own size."""
    root = tmp_path_factory.mktemp("native")
    flags = train_flags(
        write_wide_pairs(root / "data"),
        root / "out",
        *("--resize", "fit", "--eval_size", "native", "--report", "--learning_rate", "0.01"),
        teacher=save_network(root / "teacher"),
    )
    run_train(parse(flags))
    return root


def counted(run: Path) -> tuple[float, int]:
    """mIoU and pixels, counted pixel by pixel against the masks as they lie on the disk."""
    folder = run / "out/student"
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    confusion = np.zeros((2, 2), dtype=int)
    for file in sorted((run / "data/validation/images").glob("*.png")):
        image = Image.open(file)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            raw = model(pixels)["raw_logits"]
        scale = min(SIDE / image.height, SIDE / image.width)
        inside = raw[..., : round(image.height * scale), : round(image.width * scale)]
        own = F.interpolate(inside, size=(image.height, image.width), mode="bilinear")
        guess = (own[0, 0] > 0).numpy().astype(int)
        truth = np.asarray(Image.open(run / "data/validation/masks" / file.name)) // 255
        for wanted in (0, 1):
            for found in (0, 1):
                confusion[wanted, found] += int(((truth == wanted) & (guess == found)).sum())
    hits = np.diag(confusion)
    return float((hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean()), confusion.sum()


def test_native_figures_are_those_of_a_count_by_hand(run: Path, tmp_path: Path):
    """Figures at the input's size cannot be compared with published ones."""
    miou, pixels = counted(run)
    assert pixels == 40 * 90 + 48 * 94 + 56 * 98
    results = json.loads((run / "out/results.json").read_text())
    assert results["student_miou"] == pytest.approx(miou, abs=1e-6)
    assert (results["eval_size"], results["eval_images"]) == ("native", 3)
    data = ["--dataset", str(run / "data"), "--output_dir", str(tmp_path)]
    found = {}
    for size in ("native", "input", "windows"):
        evaluate_main([str(run / "out/student"), *data, "--eval_size", size, "--batch_size", "2"])
        found[size] = json.loads((tmp_path / "eval_results.json").read_text())
        assert found[size]["eval_size"] == size
    assert found["native"]["student_miou"] == pytest.approx(miou, abs=1e-6)
    assert len({one["student_miou"] for one in found.values()}) == 3
    report = (run / "out/report.html").read_text()
    assert "their own size (the input has 64 x 64 pixels)" in report


def test_a_teacher_is_measured_at_the_same_size(run: Path, tmp_path: Path):
    """Two networks counted on different pixels cannot be compared."""
    evaluate_main(
        [
            *(str(run / "out/student"), "--dataset", str(run / "data"), "--eval_size", "native"),
            *("--teacher", str(run / "teacher"), "--output_dir", str(tmp_path)),
        ]
    )
    found = json.loads((tmp_path / "eval_results.json").read_text())
    results = json.loads((run / "out/results.json").read_text())
    names = ("student_miou", "teacher_miou", "agreement")
    assert [found[name] for name in names] == [results[name] for name in names]


def test_windows_show_larger_images_at_their_own_resolution():
    """Windows put back in another place would shift every map."""
    transform = SegmentationTransform(
        32, MaskRule((0, 1), 255), augmentation="none", seed=0, brightness_contrast_probability=0
    )

    transform.eval_size = "windows"
    student, samples = tiny_student(), SimpleNamespace(transform=transform)
    evaluator = evaluator_for(samples, student, None, 255, "cpu")
    pixels = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    segmenter = torch_segmenter(student, 32, tile=True)
    (wanted,) = segmenter.logits([pixels[0].permute(1, 2, 0).numpy()])
    assert torch.equal(evaluator.logits(pixels)["student"][0], wanted)
    transform.eval_size = "native"
    whole = evaluator_for(samples, student, None, 255, "cpu").logits(pixels)["student"][0]
    assert whole.shape == wanted.shape
    assert not torch.equal(whole, wanted)


def test_samples_of_a_native_evaluation_are_the_files_as_they_are():
    """Any resize on the way changes what is counted."""
    transform = SegmentationTransform(
        32,
        MaskRule((0, 255), 254),
        resize="fit",
        augmentation="none",
        seed=0,
        brightness_contrast_probability=0,
    )
    transform.eval_size = "native"
    image = np.random.default_rng(0).integers(0, 256, (21, 47, 3), dtype=np.uint8)
    mask = (image[..., 0] > 128).astype(np.uint8) * 255
    cells = [{"bytes": cv2.imencode(".png", one)[1].tobytes()} for one in (image, mask)]
    sample = transform(dict(zip(("image", "mask"), cells, strict=True)), epoch=0, index=0)
    assert (sample["pixel_values"].permute(1, 2, 0).numpy() == image[..., ::-1]).all()
    assert (sample["labels"].numpy() == mask // 255).all()


def test_soft_probabilities_are_whole_steps_of_a_16_bit_grey_or_add_up_to_one():
    """Eight bits have no probability between 0.996 and 1, where a good teacher mostly is."""
    logits = torch.randn(1, 5, 6, dtype=torch.float64) * 8
    found = soft_map(logits)
    assert (found.dtype, found.shape) == (np.uint16, (5, 6))
    wanted = 1 / (1 + np.exp(-logits[0].numpy()))
    assert np.abs(found / 65535 - wanted).max() <= 0.5 / 65535 + 1e-9
    two = torch.stack([torch.zeros(5, 6), logits[0].float()])
    assert np.abs(soft_map(two).astype(int) - found).max() <= 1
    several = soft_map(torch.randn(4, 5, 6))
    assert (several.dtype, several.shape) == (np.float16, (4, 5, 6))
    assert np.abs(several.astype(float).sum(axis=0) - 1).max() < 2e-3


def test_predict_writes_probabilities_that_agree_with_its_masks(run: Path, tmp_path: Path):
    """A labelling tool whose probabilities lie beside its masks would teach something else."""
    images = run / "data/validation/images"
    predict_main([str(run / "out/student"), str(images), "--soft", "--output_dir", str(tmp_path)])
    for file in images.glob("*.png"):
        soft = cv2.imread(str(tmp_path / "soft" / file.name), cv2.IMREAD_UNCHANGED)
        mask = cv2.imread(str(tmp_path / "masks" / file.name), cv2.IMREAD_UNCHANGED)
        assert soft.dtype == np.uint16
        assert soft.shape == mask.shape == cv2.imread(str(file)).shape[:2]
        assert ((soft > 32767) == (mask > 0)).all()
        maps = TeacherMaps({"x": tmp_path / "soft" / file.name}, 1, soft.shape, ids=False)
        read = torch.from_numpy(maps.logits(b"", "x")).float().sigmoid()[0].numpy()
        assert np.abs(read - soft / 65535).max() < 2e-3
    assert soft.min() < soft.max()


def test_predict_writes_an_array_for_several_classes(tmp_path: Path):
    """A PNG a class would be many files, and the classes' order a matter of their names."""
    student = save_network(tmp_path / "student", num_labels=3)
    image = write_pairs(tmp_path / "data") / "validation/images/p 0.png"
    flags = ["--soft", "--outputs", "masks", "--output_dir", str(tmp_path / "out")]
    predict_main([str(student), str(image), *flags])
    soft = np.load(tmp_path / "out/soft/p 0.npy", allow_pickle=False)
    mask = cv2.imread(str(tmp_path / "out/masks/p 0.png"), cv2.IMREAD_UNCHANGED)
    assert soft.shape == (3, *mask.shape)
    best = soft.astype(float)
    chosen = np.take_along_axis(best, mask[None].astype(int), axis=0)[0]
    assert (chosen >= best.max(axis=0) - 1e-3).all()
