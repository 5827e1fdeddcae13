"""Several labels a pixel: planes of 0 and 1, a sigmoid a class, counts a class."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from small_runs import SIDE, run_card, train_flags, write_pairs
from test_losses import IGNORE
from transformers import AutoImageProcessor

from kd_trainer.commands.compare import run_compare
from kd_trainer.commands.data import data_main
from kd_trainer.commands.doctor import examine
from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.push import push_main
from kd_trainer.commands.train import train
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.config import parse
from kd_trainer.data.augmentation import Augmentation
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.images import BadSampleError
from kd_trainer.data.planes import PlaneRule
from kd_trainer.data.sources import load_splits
from kd_trainer.doctor.finding import Grade
from kd_trainer.doctor.teacher import (
    Predictions,
    classes_finding,
    position_finding,
    quality_finding,
)
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.loading import load_student
from kd_trainer.losses import LossWeights, distillation_terms, labelled_images
from kd_trainer.metrics import multi_label_metrics, plane_counts
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.reports.panels import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    IGNORED,
    MIXED_UP,
    error_map,
    label_colours,
    overlay,
)
from kd_trainer.web_demo.models import (
    Result,
    drawings,
    load_demo_student,
    load_demo_teacher,
    read_upload,
)
from kd_trainer.web_demo.models import examine as examine_image
from kd_trainer.web_demo.page import shares_table

CLASSES = 3
EVERY = LossWeights(kl=1, mse=1, bce=1, dice=1, focal=1, lovasz=1, tversky=1)


def drawn(batch=2, classes=CLASSES, size=(6, 5), seed=0):
    """Logits of student and teacher, and overlapping planes with gaps."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch, classes, *size)
    student, teacher = (3 * torch.randn(shape, generator=random).double() for _ in range(2))
    planes = torch.randint(0, 2, shape, generator=random)
    planes[torch.rand(shape, generator=random) < 0.2] = IGNORE
    return student, teacher, planes


def write_planes(root: Path, *, last: bool = False, classes: int = CLASSES) -> Path:
    """A pair folder with `.npy` masks of overlapping classes, (K, H, W) or (H, W, K)."""
    for split, count in (("train", 4), ("validation", 2)):
        random = np.random.default_rng(count)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
            planes = np.zeros((classes, SIDE, SIDE), np.uint8)
            for k in range(classes):
                top, left = random.integers(0, SIDE // 2, 2)
                planes[k, top : top + SIDE // 2, left : left + SIDE // 2] = 1
                image[..., k][planes[k] == 1] += 150
            cv2.imwrite(str(root / split / "images" / f"p{index}.png"), image[..., ::-1])
            stored = np.moveaxis(planes, 0, 2) if last else planes
            np.save(root / split / "masks" / f"p{index}.npy", stored)
    return root


def flags(data: Path, out: Path, *more: str, teacher: Path | str = "none") -> list[str]:
    several = ["--multi_label", "--num_labels", str(CLASSES), "--class_names", "red", "green"]
    return train_flags(data, out, *several, "blue", *more, teacher=teacher)


@pytest.mark.parametrize("size", [(6, 5), (12, 10)])
def test_each_term_is_the_mean_over_the_classes_of_its_binary_form(size):
    """A softmax over them would make the labels shut each other out."""
    student, teacher, planes = drawn(size=size)
    mask = torch.rand((2, *size), generator=torch.Generator().manual_seed(1)) < 0.8
    options = {"temperature": 2.5, "weights": EVERY}
    for distil_mask in (None, mask):
        got = distillation_terms(student, teacher, planes, distil_mask=distil_mask, **options)
        for name, term in got.named().items():
            parts, sizes = [], []
            for k in range(CLASSES):
                one = slice(k, k + 1)
                alone = distillation_terms(
                    student[:, one],
                    teacher[:, one],
                    planes[:, k],
                    distil_mask=distil_mask,
                    **options,
                )
                valid = planes[:, k] != IGNORE
                inside = valid if distil_mask is None or name not in ("kl", "mse") else distil_mask
                per_image = name in ("dice", "lovasz", "tversky")
                sizes.append(2 if per_image else int(inside.sum()))
                parts.append(getattr(alone, name).item())
            assert term.item() == pytest.approx(np.average(parts, weights=sizes), rel=1e-6), name


def test_planes_of_another_number_of_classes_are_refused():
    """Broadcast, one plane would teach every class."""
    student, _, planes = drawn()
    with pytest.raises(ValueError, match=r"^Expected a plane of labels for each logit"):
        distillation_terms(student, None, planes[:, :1], temperature=1.0)


def test_classes_that_count_nowhere_are_no_images_of_the_dice():
    """Their zeros would pull the mean of the others down."""
    _, _, planes = drawn(batch=2)
    planes[0, 1] = IGNORE
    assert labelled_images([{"labels": planes}], IGNORE).item() == 2 * CLASSES - 1


def test_figures_are_those_of_the_counted_pixels():
    """A class that a confusion table sends to its neighbour would hide behind the mean."""
    student, _, planes = drawn(batch=3)
    found, truth = (student > 0).numpy(), planes.numpy()
    rows = plane_counts(student > 0, planes)
    figures = multi_label_metrics(rows, {0: "a", 1: "b", 2: "c"})
    valid = truth != IGNORE
    ious, dices = [], []
    for k in range(CLASSES):
        p, y = found[:, k] & valid[:, k], (truth[:, k] == 1) & valid[:, k]
        ious.append((p & y).sum() / (p | y).sum())
        dices.append(2 * (p & y).sum() / (p.sum() + y.sum()))
    assert [figures[f"iou_{n}"] for n in "abc"] == pytest.approx(ious)
    assert figures["miou"] == pytest.approx(np.mean(ious))
    assert figures["dice"] == pytest.approx(np.mean(dices))
    assert figures["pixel_accuracy"] == pytest.approx(
        np.mean([(found[:, k] == truth[:, k])[valid[:, k]].mean() for k in range(CLASSES)])
    )
    images = []
    for p, y, v in zip(found, truth, valid, strict=True):
        pairs = [(p[k] & v[k], (y[k] == 1) & v[k]) for k in range(CLASSES)]
        images.append(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))
    assert figures["mean_image_iou"] == pytest.approx(np.mean(images))


def npy(tmp_path, array):
    np.save(tmp_path / "mask.npy", array)
    return {"path": str(tmp_path / "mask.npy"), "bytes": None}


def test_planes_are_read_in_both_orders_and_as_one_tall_image(tmp_path):
    """Read the wrong way round, each class would get stripes of all of them."""
    planes = np.random.default_rng(0).integers(0, 2, (CLASSES, 6, 5), dtype=np.uint8)
    planes[0, 0, 0] = IGNORE
    rule, wanted = PlaneRule(CLASSES), np.moveaxis(planes, 0, 2)
    for stored in (planes, wanted, planes.astype(np.int64), planes.astype(np.float32)):
        assert np.array_equal(rule.planes(npy(tmp_path, stored), 0, (6, 5)), wanted)
    tall = cv2.imencode(".png", planes.reshape(-1, 5))[1].tobytes()
    assert np.array_equal(rule.planes({"bytes": tall, "path": None}, 0, (6, 5)), wanted)
    assert (rule.planes(None, 0, (6, 5)) == IGNORE).all()


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 6, 5), np.uint8), "mask of 3 planes like its image"),
        (np.full((3, 6, 5), 7, np.uint8), "planes of 0, 1 and 255"),
        (np.full((3, 6, 5), 0.5, np.float32), "planes of 0, 1 and 255"),
        (np.full((3, 6, 5), np.nan, np.float32), "planes of 0, 1 and 255"),
        (np.array([[[{}]]], object), "an array of numbers"),
    ],
)
def test_what_is_no_stack_of_planes_is_refused_by_its_name(tmp_path, array, match):
    """Objects would be unpickled, which runs code; other values would be cut to some class."""
    np.save(tmp_path / "mask.npy", array, allow_pickle=True)
    cell = {"path": str(tmp_path / "mask.npy"), "bytes": None}
    with pytest.raises(BadSampleError, match=match):
        PlaneRule(CLASSES).planes(cell, 0, (6, 5))


def test_an_array_that_claims_more_than_it_holds_is_not_made_room_for(tmp_path):
    """A file of 128 bytes would take a terabyte."""
    np.save(tmp_path / "mask.npy", np.zeros((3, 6, 5), np.uint8))
    data = (tmp_path / "mask.npy").read_bytes().replace(b"(3, 6, 5)", b"(3,6,999)")
    with pytest.raises(BadSampleError, match=r"bytes behind the head of the array, got 90"):
        PlaneRule(CLASSES).planes({"bytes": data, "path": "x.npy"}, 0, (6, 5))


def test_planes_move_as_one_mask_moves(tmp_path):
    """A plane that is turned by its own draw would no longer lie on the image."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    planes = np.random.default_rng(1).integers(0, 2, (CLASSES, 32, 32), dtype=np.uint8)
    png = cv2.imencode(".png", image)[1].tobytes()
    options = {"image_size": 32, "seed": 0, "brightness_contrast_probability": 0.8}
    make = SegmentationTransform(
        32,
        PlaneRule(CLASSES),
        augmentation="light",
        seed=0,
        brightness_contrast_probability=0.8,
    )
    row = {"image": {"bytes": png, "path": None}, "mask": npy(tmp_path, planes)}
    alone = Augmentation("light", **options)
    for epoch in range(4):
        sample = make(row, epoch=epoch, index=3)
        assert sample["labels"].shape == (CLASSES, 32, 32)
        for k in range(CLASSES):
            plane = planes[k].astype(np.int16)
            _, moved = alone(image[..., ::-1].copy(), plane, epoch=epoch, index=3)
            wanted = np.where(moved < 0, IGNORE, moved)
            assert np.array_equal(sample["labels"][k], wanted)
        assert torch.equal(sample["distil_mask"], torch.from_numpy(moved >= 0))


def test_objects_of_a_coco_file_that_overlap_have_a_plane_each(tmp_path):
    """Drawn over each other, the smaller one would cut a hole into the larger."""
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((20, 30, 3), np.uint8))

    def box(number, category, corners, crowd=0):
        (x, y), (u, v) = corners
        polygon = [[x, y, u, y, u, v, x, v]]
        if crowd:
            polygon = {"size": [20, 30], "counts": [0, 40, 560]}
        area = (u - x) * (v - y)
        return {"id": number, "image_id": 1, "category_id": category, "segmentation": polygon,
                "area": area, "iscrowd": crowd}  # fmt: skip

    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 4, "name": "person"}, {"id": 9, "name": "shirt"}],
        "annotations": [
            box(1, 4, ((4, 4), (24, 16))),
            box(2, 9, ((8, 6), (16, 12))),
            box(3, 9, ((0, 0), (2, 20)), 1),
        ],
    }
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = parse(
        ["--dataset", str(tmp_path / "train.json"), "--multi_label", "--num_labels", "2"]
    ).data
    row = load_splits(data, ["train"])["train"][0]
    planes = PlaneRule(2).planes(row["mask"], 0, (20, 30))
    assert planes[10, 12].tolist() == [1, 1]
    assert planes[5, 5].tolist() == [1, 0]
    assert planes[5, 1].tolist() == [0, IGNORE]


def test_a_look_at_the_data_shows_planes_and_all_channels(tmp_path, capsys):
    """Whoever asks how the data is read would be told that it is no mask, or no image."""
    data, classes = write_planes(tmp_path / "data"), ["--class_names", "red", "green", "blue"]
    as_deep_bands(data)
    out = tmp_path / "look.png"
    bands = ["--in_channels", "4", "--output", str(out)]
    data_main([str(data), "--multi_label", "--num_labels", "3", *classes, *bands])
    said = capsys.readouterr().out
    assert re.search(r"red[ |]+25\.00%[ |]+6[ |]+green", said)
    assert re.search(r"blue[ |]+25\.00%[ |]+6[ |]+light blue", said)
    assert np.ptp(cv2.imread(str(out))[20:200, 10:200]) > 200
    pairs = as_deep_bands(write_pairs(tmp_path / "pairs"))
    data_main([str(pairs), *bands])
    assert "--in_channels 4" in capsys.readouterr().out


def as_deep_bands(data: Path) -> Path:
    """Images of 8 bits as TIFFs of four channels of 16 bits."""
    for file in data.glob("*/images/*.png"):
        image = cv2.imread(str(file))
        bands = np.dstack([image, image[..., :1]]) * np.uint16(9)
        cv2.imwrite(str(file.with_suffix(".tif")), bands)
        file.unlink()
    return data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A teacher of several labels, and a student that learned from it."""
    root = tmp_path_factory.mktemp("several")
    data = write_planes(root / "data")
    train(parse(flags(data, root / "teacher", "--epochs", "1")))
    more = ("--augmentation", "light", "--focal_weight", "0.5")
    more += ("--report", "true", "--panel_images", "2")
    results = train(parse(flags(data, root / "run", *more, teacher=root / "teacher")))
    return root, data, results


def test_a_run_is_trained_measured_and_saved_without_a_background(finished):
    """Named `background`, the first class would be left out of every mean."""
    root, _, results = finished
    config = json.loads((root / "run" / "student" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["red", "green", "blue"]
    for who in ("student", "teacher"):
        ious = [results[f"{who}_iou_{name}"] for name in ("red", "green", "blue")]
        assert results[f"{who}_miou"] == pytest.approx(np.nanmean(ious))
    assert 0 <= results["agreement"] <= 1
    best = max(log["miou"] for log in results["eval_history"])
    assert best == pytest.approx(results["student_miou"], abs=1e-6)
    assert yaml.safe_load((root / "run" / "config.yaml").read_text())["multi_label"] is True


def test_a_saved_student_is_measured_by_what_it_says_of_itself(finished, tmp_path):
    """Without its problem type the planes would be refused, or read as classes."""
    root, data, results = finished
    out = tmp_path / "eval"
    evaluate_main([str(root / "run"), "--dataset", str(data), "--output_dir", str(out)])
    measured = json.loads((out / "eval_results.json").read_text())
    assert measured["student_miou"] == pytest.approx(results["student_miou"], abs=1e-6)


def test_overlapping_labels_are_mixed_and_each_is_outlined():
    """Drawn over each other, the last label would hide the others."""
    image, planes = np.full((64, 64, 3), 100, np.uint8), np.zeros((2, 64, 64), np.uint8)
    planes[0, 8:40, 8:40] = planes[1, 24:56, 24:56] = 1
    planes[:, 60:] = IGNORE
    first, second = label_colours(2).astype(float)
    shown = overlay(image, planes, num_labels=2, opacity=0.5).astype(float)
    assert shown[16, 16] == pytest.approx((100 + first) / 2, abs=1)
    assert shown[32, 32] == pytest.approx((100 + (first + second) / 2) / 2, abs=1)
    assert shown[30, 8] == pytest.approx(first)
    assert shown[30, 39] == pytest.approx(first)  # inside of the other one
    assert (shown[4, 4] == 100).all()
    assert shown[62, 4] == pytest.approx((100 + np.array(IGNORED)) / 2, abs=1)
    found = planes.copy()
    found[0, :, :16] = 0
    found[1, 2:6, 2:6] = 1
    found[:, 50, 50] = 1, 0
    errors = error_map(image, planes, found, ignore_index=IGNORE)
    wanted = {(16, 10): FALSE_NEGATIVE, (4, 4): FALSE_POSITIVE, (50, 50): MIXED_UP}
    wanted |= {(62, 4): IGNORED}
    assert {place: tuple(errors[place]) for place in wanted} == wanted


def test_the_report_has_a_row_a_label_and_an_overlay(finished):
    """Counted as classes, the labels would shut each other out, or the first be a background."""
    root, _, results = finished
    page = (root / "run" / "report.html").read_text()
    for name in ("red", "green", "blue"):
        assert f"<td>{name}</td>" in page.replace("<th>", "<td>").replace("</th>", "</td>")
        assert f"{results[f'student_iou_{name}']:.4f}" in page
    assert "largest distance of any label" in page
    assert "expected calibration error" in page
    assert page.count("data:image/jpeg") == 2 * 6
    assert len(list((root / "run" / "panels").glob("*.png"))) == 2


def test_predictions_are_planes_that_a_training_could_read(finished, tmp_path):
    """One class map of them would drop every second label."""
    root, data, _ = finished
    image = data / "validation" / "images" / "p0.png"
    out = tmp_path / "found"
    predict_main([str(root / "run"), str(image), "--output_dir", str(out)])
    planes = np.load(out / "masks" / "p0.npy")
    student = load_student(root / "run").eval()
    pixels = torch.from_numpy(cv2.imread(str(image))[..., ::-1].copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = student(normalise(pixels, pixel_statistics(student, "cpu"))).raw_logits[0]
    assert np.array_equal(planes, (logits >= 0).numpy().astype(np.uint8))
    assert (out / "overlays" / "p0.jpg").is_file()
    assert PlaneRule(CLASSES).planes(npy(tmp_path, planes), 0, (SIDE, SIDE)).shape[-1] == CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("more", [["onnx", "--with_preprocessing"], ["onnx-int8"]])
def test_an_exported_file_gives_a_plane_a_label(more, finished, tmp_path):
    """A softmax over them, or their argmax, would silently drop labels."""
    root, data, results = finished
    shared = ["--dataset", str(data), "--output", str(tmp_path), "--latency_repeats", "0"]
    export_main([str(root / "run"), *shared, "--format", *more])
    (file,) = tmp_path.glob("*.onnx")
    (told,) = json.loads((tmp_path / "export.json").read_text()).values()
    exact = "int8" not in file.name
    assert told["torch_miou"] == pytest.approx(results["student_miou"], abs=1e-6)
    assert not exact or (told["mask_iou"] == 1 and told["largest_difference"] < 1e-4)
    image = data / "validation" / "images" / "p0.png"
    for model, name in ((root / "run", "torch"), (file, "file")):
        predict_main([str(model), str(image), "--soft", "--output_dir", str(tmp_path / name)])
    found = [np.load(tmp_path / name / "masks" / "p0.npy") for name in ("torch", "file")]
    soft = [np.load(tmp_path / name / "soft" / "p0.npy") for name in ("torch", "file")]
    assert found[1].shape == (CLASSES, SIDE, SIDE)
    assert not exact or np.array_equal(*found)
    assert np.abs(soft[0] - soft[1]).max() < (0.002 if exact else 0.2)


def test_code_of_the_card_gives_the_planes_of_the_trained_student(finished, tmp_path):
    """Read by an argmax, a stranger's copy would drop labels without a word."""
    root, data, _ = finished
    hub = tmp_path / "hub"
    flags = ["--dry_run", "--license", "mit", "--output_dir", str(hub)]
    push_main([str(root / "run"), "me/planes", *flags])
    shutil.copy(data / "validation" / "images" / "p0.png", tmp_path / "photograph.jpg")
    found = run_card(hub, "me/planes", tmp_path, "masks", "logits")
    image = cv2.imread(str(tmp_path / "photograph.jpg"))[..., ::-1].copy()
    student = load_student(root / "run").eval()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        raw = student(normalise(pixels, pixel_statistics(student, "cpu"))).raw_logits[0].numpy()
    assert np.array_equal(found["masks"], raw > 0)  # those of the last block, smp's
    assert found["logits"][0] == pytest.approx(raw, abs=1e-4)
    card = (hub / "README.md").read_text()
    assert "any of these labels a pixel, or none: red, green, blue." in card
    assert "pipeline(" not in card
    processor = AutoImageProcessor.from_pretrained(root / "run" / "student")
    with torch.no_grad():
        output = student(**processor(image, return_tensors="pt"))
    (planes,) = processor.post_process_multi_label(output, [(2 * SIDE, SIDE)])
    assert planes.shape == (CLASSES, 2 * SIDE, SIDE)
    (planes,) = processor.post_process_multi_label(output)
    assert np.array_equal(planes, raw >= 0)
    with pytest.raises(ValueError, match=r"Call post_process_multi_label"):
        processor.post_process_semantic_segmentation(output)


def predictions(classes, labels):
    return Predictions(classes, labels, dict(enumerate("abc")))


def test_the_doctor_finds_planes_in_another_order_or_place():
    """Each plane would look like a teacher that has learned nothing."""
    random = np.random.default_rng(0)
    truth = torch.zeros(6, CLASSES, 64, 64, dtype=torch.long)
    for image in truth:
        for plane in image:
            top, left = random.integers(0, 32, 2)
            plane[top : top + 24, left : left + 24] = 1
    right = predictions(truth, truth)
    assert right.miou == 1
    assert right.constant_miou == pytest.approx(24**2 / 64**2, abs=0.01)
    assert classes_finding(right).grade == position_finding(right).grade == Grade.OK
    assert quality_finding(right).text.endswith("(every label everywhere: 0.141)")
    turned = classes_finding(predictions(truth.roll(1, dims=1), truth))
    assert turned.grade == Grade.FAULT
    assert "a → b, b → c, c → a" in turned.text
    assert turned.cure.startswith("Put the planes into the order of its classes")
    moved = position_finding(predictions(truth.roll(6, dims=3), truth))
    assert moved.grade == Grade.FAULT
    assert "too far" in moved.text
    every = quality_finding(predictions(torch.ones_like(truth), truth))
    assert every.grade == Grade.FAULT


def test_the_doctor_looks_at_planes_as_at_masks(finished, tmp_path):
    """A check that is left out without a word looks like one that was passed."""
    root, data, _ = finished
    run = parse(flags(data, tmp_path / "run", teacher=root / "teacher"))
    findings = {finding.check: finding for finding in examine(run)}
    wanted = {"masks, train", "masks, validation", "class ids", "teacher output", "classes"}
    wanted |= {"shared images", "loss", "loss terms", "gradients", "plan", "disk", "time"}
    assert wanted <= findings.keys()
    assert findings["class ids"].text == "each of 3 classes occurs in 6 masks"
    assert findings["masks, train"].text.startswith("4 of 4 masks mark something")
    assert findings["loss"].text == "no term is degenerate for 3 logits a pixel"


@pytest.mark.slow
def test_a_comparison_counts_labels_and_channels(tmp_path):
    """With the counts of classes its interval would be that of another task."""
    data = as_deep_bands(write_planes(tmp_path / "data"))
    more = ["--in_channels", "4", "--epochs", "1"]
    train(parse(flags(data, tmp_path / "teacher", *more)))
    more += ["--seed_list", "0", "--bootstrap", "50", "--latency_repeats", "0"]
    command = flags(data, tmp_path / "out", *more, teacher=tmp_path / "teacher")
    run_compare(parse_comparison(command))
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    runs = {one["kind"]: one for one in told["runs"]}
    difference = runs["distilled"]["miou"] - runs["baseline"]["miou"]
    interval = told["students"]["distilled"]["bootstrap"]
    assert interval["estimate"] == pytest.approx(difference)
    assert interval["low"] <= difference <= interval["high"]
    results = json.loads((tmp_path / "out" / "distilled_seed0" / "results.json").read_text())
    assert runs["distilled"]["miou"] == pytest.approx(results["student_miou"])
    assert told["teacher"]["metrics"]["miou"] == pytest.approx(results["teacher_miou"])


def test_the_demo_shows_a_mask_a_label(finished):
    """By an argmax every pixel would have exactly one label, the first one included."""
    root, data, _ = finished
    student = load_demo_student(str(root / "run"))
    teacher = load_demo_teacher(ModelArguments(teacher=[str(root / "teacher")]), student)
    models = {"teacher": teacher, "student": student}
    image, _ = read_upload(data / "validation" / "images" / "p0.png")
    result = examine_image(models, image, 0.4)
    logits = student.segmenter.logits([image])[0]
    assert np.array_equal(result.masks["student"], (logits.sigmoid() >= 0.4).numpy())
    drawn = drawings(result, CLASSES)
    for shown in (drawn.left, drawn.right, *drawn.masks.values(), drawn.difference):
        assert shown.shape == image.shape
    pair = result.masks["student"] == 1, result.masks["teacher"] == 1
    ious = [(s & t).sum() / (s | t).sum() for s, t in zip(*pair, strict=True) if (s | t).any()]
    assert result.difference.iou == pytest.approx(np.mean(ious))
    assert result.difference.pixels == pytest.approx((pair[0] != pair[1]).any(axis=0).mean())
    everything = Result(image, {"student": np.ones((CLASSES, SIDE, SIDE), np.uint8)}, None)
    shares = shares_table(everything, student.class_names)
    assert [shares.count(name) for name in student.class_names] == [2, 2, 2]
    assert shares.count("100.0 %") == CLASSES


def test_cached_targets_are_those_of_the_teacher(tmp_path):
    """One logit for two labels, or bytes for floats, would be kept of each image."""
    data = as_deep_bands(write_planes(tmp_path / "data", classes=2))
    labels = ["--multi_label", "--num_labels", "2", "--class_names", "red", "green"]
    more = ["--in_channels", "4", "--epochs", "1", *labels]
    train(parse(train_flags(data, tmp_path / "teacher", *more)))
    more += ["--resize", "fit"]
    results = {}
    for how in ("online", "cached"):
        cache = ["--teacher_targets", how]
        cache += ["--teacher_cache", str(tmp_path / "cache")] if how == "cached" else []
        command = train_flags(data, tmp_path / how, *more, *cache, teacher=tmp_path / "teacher")
        results[how] = train(parse(command))
    online, cached = results.values()
    for figure in ("teacher_miou", "student_miou", "agreement"):
        assert cached[figure] == pytest.approx(online[figure], abs=0.005), figure
    losses = [one["eval_history"][-1]["loss"] for one in (online, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_another_kind_of_student_or_teacher_is_refused(finished, tmp_path):
    """Its logits mean something else."""
    root = finished[0]
    one_class = train_flags(write_pairs(tmp_path / "pairs", num_labels=3), tmp_path / "out")
    one_class += ["--num_labels", "3"]
    with pytest.raises(
        ValueError, match=r"one class a pixel .* of several labels\. Its logits mean"
    ):
        train(parse([*one_class, "--teacher", str(root / "run")]))
    student = ["--student", str(root / "run")]
    kept = train_flags(tmp_path / "pairs", tmp_path / "out", *student, "--num_labels", "3")
    with pytest.raises(ValueError, match=r"^Expected --multi_label with .* Add it"):
        train(parse(kept))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--mask_values", "0", "1", "2"], "no --mask_values with --multi_label"),
        (["--on_bad_sample", "skip"], "no --on_bad_sample with --multi_label"),
    ],
)
def test_what_says_how_one_class_is_read_is_refused(more, match, tmp_path):
    """It would be ignored."""
    with pytest.raises(ValueError, match=match):
        parse(flags(tmp_path, tmp_path / "run", *more))


@pytest.mark.parametrize("more", [("--class_weights", "balanced"), ("--pos_weight", "2")])
def test_settings_of_one_class_a_pixel_are_refused_before_the_training(more, tmp_path):
    """A weight of the background has nothing to weigh."""
    data = write_planes(tmp_path / "data", last=True)
    with pytest.raises(ValueError, match=r"^Expected no --\w+ .* with --multi_label"):
        train(parse(flags(data, tmp_path / "run", *more)))
