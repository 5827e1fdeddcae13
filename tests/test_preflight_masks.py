"""Checks of a preflight that look at masks, files, the loss and the disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_student

from kd_trainer.doctor.data import (
    MaskStatistics,
    SplitMasks,
    find_shared,
    inverted_finding,
    mask_finding,
    occurrence_finding,
    sharing_finding,
)
from kd_trainer.doctor.finding import (
    GO_ON,
    Grade,
    error_message,
    fault,
    note,
    ok,
    summary,
    table,
)
from kd_trainer.doctor.loss import (
    Gradients,
    degenerate_finding,
    parameter_finding,
    share_finding,
)
from kd_trainer.doctor.resources import DiskNeed, disk_finding, memory_finding
from kd_trainer.losses import LossTerms, LossWeights, distillation_terms
from kd_trainer.losses.functions import softmax_kl

NAMES = {0: "background", 1: "hat", 2: "coat"}


def disc(inverted: bool = False) -> np.ndarray:
    """A foreground of 3/8 in the middle, its outermost columns ignored."""
    labels = np.zeros((8, 18), np.uint8)
    labels[1:7, 4:12] = 1
    labels[:, :1] = labels[:, -1:] = 255
    return np.where(labels == 255, 255, 1 - labels) if inverted else labels


def test_statistics_of_a_mask_are_those_counted_by_hand():
    """Ignored pixels are neither foreground nor border."""
    assert MaskStatistics.of(disc(), 255) == MaskStatistics(
        128 / 144, 48 / 128, 0.0, frozenset({0, 1})
    )
    assert MaskStatistics.of(disc(inverted=True), 255) == MaskStatistics(
        128 / 144, 80 / 128, 1.0, frozenset({0, 1})
    )
    assert MaskStatistics(0.0, 0.0, 0.0, frozenset()) == IGNORED


EMPTY = MaskStatistics.of(np.zeros((4, 4), np.uint8), 255)
IGNORED = MaskStatistics.of(np.full((4, 4), 255, np.uint8), 255)
FULL = MaskStatistics.of(disc(), 255)


@pytest.mark.parametrize(
    ("masks", "complete", "grade"),
    [
        ([EMPTY] * 5, True, Grade.FAULT),
        ([EMPTY] * 5, False, Grade.NOTE),
        ([EMPTY] * 100, False, Grade.FAULT),
        ([IGNORED] * 5, True, Grade.FAULT),
        ([EMPTY] * 3 + [FULL] * 2, True, Grade.NOTE),
        ([EMPTY] * 2 + [FULL] * 3, True, Grade.OK),
    ],
)
def test_masks_that_mark_nothing_are_found(masks, complete: bool, grade: Grade):
    """All-empty masks train to a perfect score; a few of many may be empty by chance."""
    assert mask_finding("train", SplitMasks(masks, complete)).grade == grade


@pytest.mark.parametrize(
    ("masks", "lost", "grade"),
    [
        ([EMPTY] * 5, 5, Grade.FAULT),
        ([EMPTY] * 2 + [FULL] * 8, 2, Grade.NOTE),
        ([EMPTY] + [FULL] * 9, 1, Grade.OK),
    ],
)
def test_masks_that_mark_something_in_their_own_size_only_are_counted(masks, lost, grade: Grade):
    """Thin things go when masks are made small; then the size is to blame and not the masks."""
    finding = mask_finding("train", SplitMasks(masks, complete=True, lost=lost))
    assert finding.grade == grade
    assert f"{lost} " in finding.text
    assert "--image_size" in finding.text
    assert "mask_values" not in finding.cure


def test_masks_that_look_inverted_are_a_note():
    """Without a teacher nothing else would say so; close-ups may look alike."""
    assert inverted_finding([MaskStatistics.of(disc(inverted=True), 255)] * 3).grade == Grade.NOTE
    assert inverted_finding([FULL] * 3).grade == Grade.OK
    portrait = np.zeros((8, 8), np.uint8)
    portrait[2:, 1:7] = 1  # more than half, and much of the lower border
    assert inverted_finding([MaskStatistics.of(portrait, 255)] * 3).grade == Grade.OK


def test_a_class_that_never_occurs_is_named():
    """It is neither learned nor measured, and the mean hides it."""
    finding = occurrence_finding([FULL, EMPTY], NAMES)
    assert finding.grade == Grade.NOTE
    assert finding.text.startswith("coat in none of 2 masks")
    both = [FULL, MaskStatistics.of(2 * (disc() == 1).astype(np.uint8), 255)]
    assert occurrence_finding(both, NAMES).grade == Grade.OK


def rows(folder: Path, contents: dict[str, bytes]) -> list[dict]:
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [{"image": {"bytes": None, "path": str(folder / name)}} for name in contents]


def test_shared_images_are_found_by_their_bytes(tmp_path: Path):
    """Under another name too, and in a parquet file; an equal size or an equal name is nothing."""
    training = rows(tmp_path / "train", {"a.jpg": b"1234", "b.jpg": b"same bytes", "c.jpg": b"12"})
    training.append({"image": {"bytes": b"in memory", "path": None}})
    contents = {"a.jpg": b"4321", "x.jpg": b"same bytes", "y.jpg": b"in memory", "z.jpg": b"12345"}
    evaluation = rows(tmp_path / "validation", contents)
    shared = find_shared(training, evaluation, seconds=60)
    assert shared.pairs == {"x.jpg": "b.jpg", "y.jpg": "row 3"}
    assert (shared.evaluation, shared.training, shared.complete) == (4, 4, True)
    finding = sharing_finding(shared)
    assert finding.grade == Grade.NOTE
    assert "2 images in both splits (x.jpg = b.jpg, y.jpg = row 3)" in finding.text
    most = find_shared(training, evaluation[1:], seconds=60)
    assert sharing_finding(most).grade == Grade.FAULT
    none = find_shared(training[:1], evaluation, seconds=60)
    assert sharing_finding(none).grade == Grade.OK


def test_a_search_that_ran_out_of_time_says_so(tmp_path: Path):
    """`none` after a tenth of the files would be a promise."""
    images = rows(tmp_path / "validation", {"a.jpg": b"1", "b.jpg": b"2"})
    shared = find_shared(images, images, seconds=-1)
    assert not shared.complete
    assert (shared.evaluation, shared.training) == (1, 1)
    finding = sharing_finding(shared)
    assert "that were looked at" in finding.text
    assert finding.grade == Grade.FAULT  # of one training image looked at, one


def gradients(norms: dict[str, float], **changed) -> Gradients:
    terms = dict.fromkeys(norms, 1.0) | changed.pop("terms", {})
    sizes = {"encoder.a": 90, "head.b": 10}
    return Gradients(terms, norms, changed.pop("missing", []), changed.pop("bad", []), sizes)


@pytest.mark.parametrize(
    ("norms", "grade", "words"),
    [
        ({"kl": 1.0, "mse": 6.0, "bce": 2.0, "dice": 1.0}, Grade.OK, "kl 10%, mse 60%, bce 20%"),
        ({"kl": 0.0, "bce": 1.0}, Grade.FAULT, "got none from kl"),
        ({"kl": 0.2, "mse": 9.5, "bce": 0.3}, Grade.NOTE, "mse makes up 95%"),
        ({"kl": 0.1, "bce": 9.9}, Grade.OK, "bce 99%"),
        ({"bce": 1.0}, Grade.OK, "bce 100%"),
        ({"mse": float("inf"), "bce": 1.0}, Grade.FAULT, "finite loss terms, got mse"),
    ],
)
def test_terms_without_gradient_or_with_all_of_it_are_found(norms, grade: Grade, words: str):
    """A term that steers nothing, or everything, does not show in the loss."""
    finding = share_finding(gradients(norms))
    assert finding.grade == grade
    assert words in finding.text


def test_parameters_that_are_not_reached_are_named():
    """They stay random in a student that is published."""
    fine = {"bce": 1.0}
    assert parameter_finding(gradients(fine)).grade == Grade.OK
    some = parameter_finding(gradients(fine, missing=["head.b"]))
    assert (some.grade, "10.0% of the values) got no gradient: head.b" in some.text) == (
        "note",
        True,
    )
    assert parameter_finding(gradients(fine, missing=["encoder.a", "head.b"])).grade == Grade.FAULT
    assert parameter_finding(gradients(fine, bad=["head.b"])).grade == Grade.FAULT


def loss(weights: LossWeights):
    def terms(student, teacher, batch) -> LossTerms:
        labels = batch["labels"]
        return distillation_terms(student, teacher, labels, temperature=4.0, weights=weights)

    return terms


@pytest.mark.parametrize("channels", [1, 2, 3, 9])
def test_no_term_of_ours_is_degenerate(channels: int):
    """For one logit the KL is the Bernoulli one, which is why it exists."""
    recipe = LossWeights(kl=0.3, mse=0.5, bce=0.5, dice=1.0)
    assert degenerate_finding(channels, loss(recipe)).grade == Grade.OK


def test_a_softmax_kl_of_one_logit_is_degenerate():
    """The commonest mistake: it is identically zero, and the run is one without a teacher."""

    def usual(student, teacher, batch) -> LossTerms:
        kl = softmax_kl(student, teacher, batch["labels"] >= 0, 4.0)
        return LossTerms(kl=kl, bce=loss(LossWeights(bce=1.0))(student, teacher, batch).bce)

    finding = degenerate_finding(1, usual)
    assert finding.grade == Grade.FAULT
    assert "got kl, degenerate there" in finding.text
    assert degenerate_finding(3, usual).grade == Grade.OK
    assert degenerate_finding(1, loss(LossWeights())).text.endswith("got none")


def test_bytes_on_the_disk_are_those_of_a_real_checkpoint(tmp_path: Path):
    """An estimate that leaves out the optimizer is a third of what a run writes."""
    student = tiny_student()
    numbers = list(student.parameters())
    optimizer = torch.optim.AdamW(numbers, lr=1e-3)
    for parameter in numbers:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    student.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    count = sum(p.numel() for p in numbers)
    one = DiskNeed(count, count, 1).bytes - DiskNeed(count, count, 0).bytes
    assert one == pytest.approx(written, rel=0.05)


def test_a_run_that_cannot_fit_is_found():
    """It would die in the night, in the middle of a checkpoint."""
    need = DiskNeed(10**6, 10**6, 3)
    assert disk_finding(need, need.bytes, "runs").grade == Grade.OK
    finding = disk_finding(need, need.bytes - 1, "runs")
    assert finding.grade == Grade.FAULT
    assert "--save_total_limit" in finding.cure
    assert memory_finding(95.0, 100.0, "this machine").grade == Grade.NOTE
    assert memory_finding(50.0, 100.0, "this machine").grade == Grade.OK


def test_what_is_found_is_shown_whole():
    """A table cuts lines, an error is one line, and a training without notes says one line."""
    bad = fault("masks", "Expected masks, got " + "very " * 20 + "bad ones", "Mend them.")
    findings = [ok("a", "fine"), note("b", "odd", "Look."), bad, bad]
    shown = table(findings)
    assert max(map(len, shown.splitlines())) <= 120
    assert shown.count("very") == 40
    line = error_message(findings)
    assert line is not None
    assert "\n" not in line
    assert line.startswith(bad.text + ". Mend them. 1 more fault: scripts/doctor.py lists them.")
    assert line.endswith(GO_ON)
    assert error_message(findings[:2]) is None
    assert summary(findings[:1], 1.25) == "Preflight: 1 checks passed in 1.2 s"
    assert summary(findings[:2], 3) == "Preflight: 2 checks, 1 note, in 3.0 s\n- b: odd. Look."
    assert json.dumps([f.grade for f in findings[:2]]) == '["ok", "note"]'
