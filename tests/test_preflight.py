"""The preflight of whole runs: each fault is found, and nothing is changed."""

import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from preflight_runs import Green, bad, flags, knowing, looked, teach
from small_runs import SIDE, save_network, write_pairs
from torch import nn

from kd_trainer.build import build_run
from kd_trainer.commands.doctor import examine
from kd_trainer.config import parse
from kd_trainer.doctor.checks import QUICK, Preflight
from kd_trainer.doctor.finding import Grade


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("preflight") / "data", train=10, validation=6)


def test_a_healthy_run_has_no_findings(data: Path, tmp_path: Path, monkeypatch):
    """A check that cries wolf is switched off with all the others."""
    teach(monkeypatch, knowing())
    found = looked(parse(flags(data, tmp_path / "out", teacher="one")))
    assert bad(found) == {}
    wanted = {"teacher output", "teacher quality", "classes", "mask position", "normalisation"}
    wanted |= {"masks, train", "masks, validation", "shared images", "plan", "disk"}
    assert set(found) == wanted | {"loss", "loss terms", "gradients"}
    assert found["loss terms"].text.count("%") == 4


FAULTY = {
    "probabilities": (knowing(Green(output=nn.Sigmoid())), {"teacher output"}),
    "raw pixels": (knowing(Green(), std=1 / 255), {"teacher quality", "normalisation"}),
    "the other class": (knowing(Green(sharpness=-8.0)), {"classes"}),
    "nothing learned": (knowing(Green(sharpness=0.0)), {"teacher output", "teacher quality"}),
}


@pytest.mark.parametrize("case", FAULTY)
def test_each_fault_of_a_teacher_is_found(case: str, data: Path, tmp_path: Path, monkeypatch):
    """One for each way in which a run goes through and teaches nothing."""
    teacher, checks = FAULTY[case]
    teach(monkeypatch, teacher)
    found = looked(parse(flags(data, tmp_path / "out", teacher="one")))
    assert checks <= set(bad(found)), bad(found)
    assert all(found[name].grade == Grade.FAULT for name in checks)
    assert all(f.cure.endswith(".") for f in found.values() if f.grade != Grade.OK)


@pytest.fixture
def spoiled(data: Path, tmp_path: Path):
    """A copy of the data whose masks were changed, the images left."""

    def make(change, splits: str = "*") -> Path:
        copy = tmp_path / "spoiled"
        shutil.copytree(data, copy)
        for file in copy.glob(f"{splits}/masks/*.png"):
            mask = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(file), np.ascontiguousarray(change(mask)))
        return copy

    return make


@pytest.mark.parametrize(
    ("change", "splits", "check", "word"),
    [
        (lambda m: 255 - m, "*", "classes", "inverted"),
        (lambda m: 255 - m, "validation", "classes", "inverted"),
        (lambda m: np.roll(m, 6, axis=1), "*", "mask position", "too far right by 9.4%"),
        (lambda m: m[:, ::-1], "train", "mask position", "mirrored"),
    ],
    ids=["inverted", "one split inverted", "moved", "one split mirrored"],
)
def test_each_fault_of_masks_is_found(
    change, splits, check, word, spoiled, tmp_path: Path, monkeypatch
):
    """Masks are made by other people's scripts, and often those of one split only."""
    teach(monkeypatch, knowing())
    found = looked(parse(flags(spoiled(change, splits), tmp_path / "out", teacher="one")))
    assert found[check].grade == Grade.FAULT
    assert word in found[check].text
    assert splits == "*" or found[check].text.endswith(f"(in the split {splits})")


def test_masks_are_counted_at_the_size_of_the_training(data: Path, tmp_path: Path):
    """A line of one pixel in a large image is no line in a small one: 7 of 10 masks are empty."""
    copy = shutil.copytree(data, tmp_path / "thin")
    side = 4 * SIDE  # pixels 2, 6, 10, ... of it are those that are taken
    for number, file in enumerate(sorted((copy / "train" / "masks").glob("*.png"))):
        mask = np.zeros((side, side), np.uint8)
        mask[20 + 2 * (number < 3)] = 255
        cv2.imwrite(str(file), mask)
        image = file.parents[1] / "images" / file.name
        cv2.imwrite(str(image), cv2.resize(cv2.imread(str(image)), (side, side)))
    found = looked(parse(flags(copy, tmp_path / "out")))["masks, train"]
    assert found.grade == Grade.NOTE
    assert found.text.startswith("3 of 10 masks mark something")
    assert "7 more only before they are resized to --image_size" in found.text


def test_inverted_masks_of_one_split_show_without_a_teacher(spoiled, tmp_path: Path):
    """Together with the other split half of the border would be foreground."""
    found = looked(parse(flags(spoiled(lambda m: 255 - m, "validation"), tmp_path / "out")))
    assert bad(found) == {"foreground": "note"}
    assert found["foreground"].text.endswith("(in the split validation)")


def test_a_folder_of_smp_does_not_say_what_size_it_is_for(data: Path, tmp_path: Path):
    """Our own default of 640 px would be taken for what it was trained with."""
    smp.Unet("mobilenet_v2", encoder_weights=None).save_pretrained(str(tmp_path / "smp"))
    found = looked(parse(flags(data, tmp_path / "out", teacher=tmp_path / "smp")))
    assert "teacher size" not in found
    own = save_network(tmp_path / "own")
    found = looked(parse(flags(data, tmp_path / "out", teacher=own)))
    assert found["teacher size"].text == "made for 64 px, gets 64 px"


def test_a_saved_student_judges_where_there_is_no_teacher(data: Path, tmp_path: Path):
    """It has seen such images as well; random weights say nothing, and blame nobody."""
    saved = save_network(tmp_path / "saved")
    found = looked(parse(flags(data, tmp_path / "out", "--student", str(saved))))
    assert {"classes", "mask position"} <= set(found)
    assert "the student" in found["classes"].text
    assert bad(found) == {"classes": "note"}  # which says that nothing could be compared


def test_a_teacher_is_not_judged_by_masks_of_one_class(spoiled, tmp_path: Path, monkeypatch):
    """Of rare objects a few masks may all be empty; beside them no teacher beats a constant."""
    teach(monkeypatch, knowing())
    more = ("--mask_values", "0", "255")
    found = looked(parse(flags(spoiled(lambda m: 0 * m), tmp_path / "out", *more, teacher="one")))
    assert bad(found) == {"masks, train": "fault", "masks, validation": "fault"}
    assert "teacher output" in found
    assert "teacher quality" not in found


def test_images_of_both_splits_are_found(data: Path, tmp_path: Path):
    """Figures of images that were trained on are the commonest too good result."""
    copy = shutil.copytree(data, tmp_path / "shared")
    for kind in ("images", "masks"):
        source = copy / "train" / kind / "p 7.png"
        shutil.copyfile(source, copy / "validation" / kind / "late.png")
    found = looked(parse(flags(copy, tmp_path / "out")))
    assert bad(found) == {"shared images": "note"}
    assert "1 image in both splits (late.png = p 7.png)" in found["shared images"].text


def test_a_stream_and_several_classes_are_looked_at_too(tmp_path: Path):
    """The first images of a stream; hashes would need all of it."""
    data = write_pairs(tmp_path / "data", num_labels=4, train=6, validation=4)
    more = ("--streaming", "--num_labels", "4")
    found = looked(parse(flags(data, tmp_path / "out", *more)))
    assert bad(found) == {}
    assert "not looked for" in found["shared images"].text
    assert found["class ids"].text == "each of 4 classes occurs in 10 masks"


def test_a_loss_without_terms_is_found_before_the_first_step(data: Path, tmp_path: Path):
    """Without a teacher nothing is left of a loss of distillation terms only."""
    more = ("--bce_weight", "0", "--dice_weight", "0")
    found = looked(parse(flags(data, tmp_path / "out", *more)))
    assert bad(found) == {"loss": "fault"}
    assert "time" not in {f.check for f in examine(parse(flags(data, tmp_path / "out", *more)))}


def test_nothing_of_the_run_is_changed(data: Path, tmp_path: Path, monkeypatch):
    """Weights, running statistics, training mode, random state and the epoch of the data."""
    teach(monkeypatch, knowing())
    run = parse(flags(data, tmp_path / "out", "--augmentation", "light", teacher="one"))
    parts = build_run(run)
    parts.train_dataset.set_epoch(3)
    parts.student.set_free_units(2)
    parts.student.train()

    def state() -> tuple:
        modes = [module.training for module in parts.student.modules()]
        needed = [p.requires_grad for p in parts.student.parameters()]
        rest = (
            parts.train_dataset._epoch.get(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )
        return modes, needed, torch.get_rng_state().tolist(), rest

    weights = {k: v.clone() for k, v in parts.student.state_dict().items()}
    before = state()
    assert list(Preflight(run, parts, QUICK).findings())
    assert state() == before
    assert all(p.grad is None for p in parts.student.parameters())
    now = parts.student.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())


def test_synchronised_batchnorm_waits_for_nobody(data: Path, tmp_path: Path):
    """The other processes do not look, so that the first would wait for them for half an hour."""
    run = parse(flags(data, tmp_path / "out"))
    parts = build_run(run)
    parts.student.synchronise_batchnorm()
    preflight = Preflight(run, parts, QUICK)
    assert bad({f.check: f for f in preflight.findings()}) == {}
    modes = {m.training for m in preflight.student.modules() if isinstance(m, nn.SyncBatchNorm)}
    assert modes == {False}
    assert preflight.student.training
