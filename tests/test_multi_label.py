"""Several labels a pixel: planes of 0 and 1, a sigmoid a class, counts a class."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from small_runs import SIDE, train_flags, write_pairs
from test_losses import IGNORE

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.train import train
from kd_trainer.config import parse
from kd_trainer.data.augmentation import Augmentation
from kd_trainer.data.dataset import SegmentationTransform
from kd_trainer.data.images import BadSampleError
from kd_trainer.data.planes import PlaneRule
from kd_trainer.data.sources import load_splits
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.loading import load_student
from kd_trainer.losses import LossWeights, distillation_terms, labelled_images
from kd_trainer.metrics import multi_label_metrics, plane_counts

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


def write_planes(root: Path, *, last: bool = False) -> Path:
    """A pair folder with `.npy` masks of three overlapping classes, (K, H, W) or (H, W, K)."""
    for split, count in (("train", 4), ("validation", 2)):
        random = np.random.default_rng(count)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
            planes = np.zeros((CLASSES, SIDE, SIDE), np.uint8)
            for k in range(CLASSES):
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A teacher of several labels, and a student that learned from it."""
    root = tmp_path_factory.mktemp("several")
    data = write_planes(root / "data")
    train(parse(flags(data, root / "teacher", "--epochs", "1")))
    more = ("--augmentation", "light", "--focal_weight", "0.5")
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


def test_predictions_are_planes_that_a_training_could_read(finished, tmp_path):
    """One class map of them would drop every second label."""
    root, data, _ = finished
    image = data / "validation" / "images" / "p0.png"
    out = tmp_path / "found"
    predict_main([str(root / "run"), str(image), "--output_dir", str(out)])
    planes = np.load(out / "masks" / "p0.npy")
    student = load_student(root / "run", multi_label=True).eval()
    pixels = torch.from_numpy(cv2.imread(str(image))[..., ::-1].copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = student(normalise(pixels, pixel_statistics(student, "cpu"))).raw_logits[0]
    assert np.array_equal(planes, (logits >= 0).numpy().astype(np.uint8))
    assert (out / "overlays" / "p0.jpg").is_file()
    assert PlaneRule(CLASSES).planes(npy(tmp_path, planes), 0, (SIDE, SIDE)).shape[-1] == CLASSES


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


@pytest.mark.parametrize("more", [("--class_weights", "balanced"), ("--teacher_targets", "cached")])
def test_settings_of_one_class_a_pixel_are_refused_before_the_training(more, tmp_path):
    """A weight of the background has nothing to weigh."""
    data = write_planes(tmp_path / "data", last=True)
    teacher = tmp_path if "cached" in more else "none"
    with pytest.raises(ValueError, match=r"^Expected no --\w+ .* with --multi_label"):
        train(parse(flags(data, tmp_path / "run", *more, teacher=teacher)))
