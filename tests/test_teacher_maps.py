"""A folder of maps as a teacher."""

import json

import cv2
import numpy as np
import pytest
import torch
from small_runs import SIDE, train_flags, write_pairs

from kd_trainer.build import build_run
from kd_trainer.commands.train import run_train
from kd_trainer.config import build, parse
from kd_trainer.console import summary_table
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.teacher_maps import TeacherMaps, as_logits, probabilities, read_map

LEAST = 1 / 256


def maps_like(root, folder, make):
    """A map for each image of a pair folder, from its mask."""
    for file in sorted(root.rglob("masks/*.png")):
        split = file.parent.parent.name
        (folder / split).mkdir(parents=True, exist_ok=True)
        make(folder / split / file.stem, cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
    return folder


def png(path, mask):
    cv2.imwrite(f"{path}.png", mask)


def settings(dataset, maps, **more):
    flags = {"dataset": str(dataset), "teacher_maps": str(maps), "image_size": SIDE}
    flags |= {"student_encoder": "resnet18", "encoder_weights": "none", "use_cpu": True}
    return flags | {"augmentation": "none", "num_labels": 2} | more


def read(values, classes=1, *, ids=False, size=None, tmp_path=None):
    file = tmp_path / "map.npy"
    np.save(file, values)
    reader = TeacherMaps({"x.jpg": file}, classes, size or values.shape[-2:], ids)
    return torch.from_numpy(reader.logits(b"", "x.jpg")).float()


def test_levels_are_probabilities_and_become_logits_within_bounds(tmp_path):
    """Sure pixels would else have infinite logits, and the loss with them."""
    levels = np.array([[0, 64, 255, 200]] * 4, np.uint8)
    logits = read(levels, tmp_path=tmp_path)
    expected = torch.tensor(levels / 255.0).clamp(LEAST, 1 - LEAST).logit().float()
    torch.testing.assert_close(logits[0], expected, rtol=1e-3, atol=1e-3)
    deep = read(levels.astype(np.uint16) * 257, tmp_path=tmp_path)
    assert deep.max() == pytest.approx(np.log(2**16 - 1), rel=1e-3)
    soft = read(np.array([[0.0, 0.25], [0.5, 1.0]], np.float32), tmp_path=tmp_path)
    torch.testing.assert_close(soft[0, 0, 1].sigmoid(), torch.tensor(0.25), rtol=1e-3, atol=1e-3)


def test_several_classes_come_as_ids_or_as_channels(tmp_path):
    """Ids become smoothed one-hot vectors; channels what they are."""
    ids = np.array([[0, 1], [2, 2]], np.uint8)
    logits = read(ids, 3, tmp_path=tmp_path)
    torch.testing.assert_close(logits.exp().sum(0), torch.ones(2, 2), rtol=1e-2, atol=1e-2)
    assert torch.equal(logits.argmax(0), torch.from_numpy(ids).long())
    assert logits.min() == pytest.approx(np.log(LEAST / (1 + 2 * LEAST)), rel=1e-3)
    soft = np.random.default_rng(0).dirichlet([1, 1, 1], (4, 4)).transpose(2, 0, 1)
    found = read(soft.astype(np.float32), 3, tmp_path=tmp_path).exp()
    torch.testing.assert_close(found, torch.tensor(soft).float(), rtol=1e-2, atol=1e-3)
    two = read(soft[:2].astype(np.float32), tmp_path=tmp_path)
    share = soft[1] / (soft[0] + soft[1])
    torch.testing.assert_close(two[0].sigmoid(), torch.tensor(share).float(), rtol=0.02, atol=2e-3)


def test_maps_are_resized_before_the_logarithm(tmp_path):
    """The mean of two sure pixels that disagree is no certainty."""
    probability = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert as_logits(probability, (1, 1), 8).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (np.full((2, 2), 3, np.uint8), 3, "class ids 0 to 2 .* got 3"),
        (np.full((2, 2), 1.5, np.float32), 1, "probabilities in 0..1"),
        (np.full((2, 2), np.nan, np.float32), 1, "probabilities in 0..1"),
        (np.full((4, 2, 2), 0.25, np.float32), 3, r"\(3, H, W\) .* got the shape \(4, 2, 2\)"),
        (np.full((2, 2), 0.5, np.float32), 3, r"\(3, H, W\)"),
        (np.array(["a"]), 1, "numbers"),
        (np.zeros(4), 1, "numbers"),
    ],
)
def test_maps_of_something_else_are_refused_by_name(values, classes, message, tmp_path):
    """What is taken for a probability and is none teaches nonsense."""
    np.save(tmp_path / "map.npy", values)
    with pytest.raises(ValueError, match=message) as caught:
        probabilities(read_map(tmp_path / "map.npy"), classes=classes, ids=False, file=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_numbers_is_no_pickle_and_no_larger_than_it_is(tmp_path):
    """numpy's own loader would run the one and make room for the other."""
    file = tmp_path / "map.npy"
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="numbers"):
        read_map(file)
    np.save(file, np.zeros((2, 2)))
    file.write_bytes(file.read_bytes().replace(b"(2, 2)", b"(9999999, 9999999)"))
    with pytest.raises(ValueError, match="numbers"):
        read_map(file)
    link = tmp_path / "link.npy"
    link.symlink_to(file)
    with pytest.raises(ValueError, match="a link"):
        read_map(link)


def test_samples_carry_the_maps_of_their_images(tmp_path):
    """By the stem, and where both splits have one, by the split."""
    root = write_pairs(tmp_path / "data", train=4, validation=2)
    maps = maps_like(root, tmp_path / "maps", png)
    parts = build_run(build(settings(root, maps)))
    for dataset in (parts.train_dataset, parts.eval_dataset):
        for index in range(len(dataset)):
            sample = dataset[index]
            found = sample["teacher_logits"].float()
            assert found.shape == (1, SIDE, SIDE)
            assert torch.equal(found[0] > 0, sample["labels"] == 1)
    ones = maps_like(root, tmp_path / "ones", lambda p, mask: png(p, mask // 255))
    again = build_run(build(settings(root, ones)))
    first = again.train_dataset[0]  # 0 and 1 are classes, where no map holds more
    assert torch.equal(first["teacher_logits"][0] > 0, first["labels"] == 1)
    assert not torch.equal(again.teacher.network.digest, parts.teacher.network.digest)
    (maps / "validation" / "p 1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"got none of .*validation.*p 1\.png"):
        build_run(build(settings(root, maps)))
    (maps / "train" / "p 0.npy").touch()
    with pytest.raises(ValueError, match="one map of"):
        build_run(build(settings(root, maps)))


@pytest.mark.parametrize("resize", ["fit", "crop"])
def test_maps_keep_the_aspect_ratio_where_the_images_do(resize, tmp_path):
    """Squashed to the whole input, each would lie beside what it shows."""
    root = write_pairs(tmp_path / "data", train=4, validation=2)
    for file in root.rglob("*.png"):  # as wide as half of their height
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[:, : SIDE // 2])
    maps = maps_like(root, tmp_path / "maps", png)
    parts = build_run(build(settings(root, maps, resize=resize)))
    for dataset in (parts.train_dataset, parts.eval_dataset):
        for index in range(len(dataset)):
            sample = dataset[index]
            labels, inside = sample["labels"], sample["distil_mask"]
            agree = (sample["teacher_logits"][0] > 0) == (labels == 1)
            assert agree[inside].float().mean() > 0.97
            assert inside.any()


def test_a_teacher_and_a_folder_of_its_maps_are_one_too_many():
    """Which of them teaches would be a guess."""
    with pytest.raises(ValueError, match="--teacher or --teacher_maps"):
        ModelArguments(teacher="x", teacher_maps="maps")
    assert ModelArguments(teacher="none", teacher_maps="maps").has_teacher


def test_the_table_of_a_run_says_nothing_of_the_size_of_maps():
    figures = dict.fromkeys(("miou", "iou_foreground", "dice", "boundary_iou"), 0.5)
    figures["pixel_accuracy"] = 0.5
    both = {
        f"{who}_{key}": value for who in ("teacher", "student") for key, value in figures.items()
    }
    teacher, student = summary_table(both | {"student_parameters": 1234}).splitlines()[2:]
    assert "1,234" in student
    assert [cell.strip() for cell in teacher.split("|")[-5:]] == [""] * 5


@pytest.mark.slow
def test_a_run_learns_from_maps_and_is_measured_against_them(tmp_path):
    """From the command line to the figures; maps that are the masks are a teacher of mIoU 1."""
    root = write_pairs(tmp_path / "data")
    maps = maps_like(root, tmp_path / "maps", png)
    flags = train_flags(root, tmp_path / "run", "--teacher_maps", str(maps), "--report", "true")
    flags += ["--logging_steps", "1"]
    run = parse(flags)
    results = run_train(run)
    assert results["teacher_miou"] == pytest.approx(1)
    assert results["teacher"] == "maps"
    assert 0 < results["agreement"] <= 1
    logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("kl" in entry for entry in logs)
    assert (tmp_path / "run" / "report.html").is_file()
