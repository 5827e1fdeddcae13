"""Batches with a fixed share of images that have masks, and the order of an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from preflight_runs import flags as preflight_flags
from preflight_runs import knowing, looked, teach
from small_runs import save_network, train_flags, write_pairs
from test_resume import assert_resumes_exactly, maker
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch.utils.data import BatchSampler

from kd_trainer.build import build_run, images_an_epoch
from kd_trainer.commands.train import train
from kd_trainer.compare.budget import Budget, baseline_settings
from kd_trainer.config import build, parse
from kd_trainer.costs import steps_per_epoch, without_teacher
from kd_trainer.data import TransformedDataset, load_splits, transforms
from kd_trainer.data.quota import QuotaSampler, has_mask
from kd_trainer.data_arguments import DataArguments
from kd_trainer.doctor.data import label_finding
from kd_trainer.schedules import LabelledShare
from kd_trainer.trainer import DistillationTrainer


def some_without(labelled: int, unlabelled: int) -> TransformedDataset:
    """Synthetic images, of which the last ones have lost their masks."""
    data = DataArguments(
        dataset="synthetic",
        image_size=SIDE,
        synthetic_train=labelled + unlabelled,
        synthetic_eval=2,
        augmentation="light",
    )
    splits = load_splits(data)
    transform, _ = transforms(splits, data, seed=0)
    rows = list(splits["train"])
    rows[labelled:] = [row | {"mask": None} for row in rows[labelled:]]
    return TransformedDataset(rows, transform)


def sampler(labelled: int, unlabelled: int, *points: Any, batch_size: int = 8, **options: Any):
    share = LabelledShare(points if isinstance(points[0], tuple) else [(0, points[0])])
    dataset = some_without(labelled, unlabelled)
    return QuotaSampler(dataset, share, batch_size=batch_size, **{"seed": 3} | options)


def batches(one: QuotaSampler, epoch: int = 0) -> list[list[tuple[int, int]]]:
    one.dataset.set_epoch(epoch)
    return list(BatchSampler(one, one.batch_size, drop_last=True))


@pytest.mark.parametrize(
    ("share", "counts"),
    [(0.5, (4, 4)), (0.25, (2, 6)), (0.01, (1, 7)), (0.99, (7, 1)), (0.3, (2, 6))],
)
def test_each_batch_has_its_share_and_an_epoch_shows_the_others_once(share, counts):
    """43 batches of 100 hold no mask where a tenth has one, and Dice and BCE then teach nothing."""
    one = sampler(3, 2 * counts[1] * 3, share)
    drawn = batches(one)
    assert len(drawn) == 2 * 3 == len(one) / 8
    for batch in drawn:
        assert sum(row < 3 for row, _ in batch) == counts[0]
    shown = Counter(row for batch in drawn for row, _ in batch)
    assert all(shown[row] == 1 for row in range(3, 3 + 6 * counts[1]))
    assert max(shown[row] for row in range(3)) - min(shown[row] for row in range(3)) <= 1
    places = {place for batch in drawn for place, (row, _) in enumerate(batch) if row < 3}
    assert len(places) > min(counts)  # not always the first ones


def test_where_labels_need_more_batches_each_of_them_comes_once():
    """Cut off after the images without masks, most masks would not be seen in an epoch."""
    shown = Counter(row for batch in batches(sampler(24, 5, 0.5)) for row, _ in batch)
    assert [shown[row] for row in range(24)] == [1] * 24
    assert sorted(shown[row] for row in range(24, 29)) == [4, 5, 5, 5, 5]


def test_the_last_batch_is_filled_up_from_a_further_round():
    """A short one would shift the mean; one that is dropped would leave images out."""
    drawn = batches(sampler(3, 10, 0.5))
    assert [len(batch) for batch in drawn] == [8, 8, 8]
    shown = Counter(row for batch in drawn for row, _ in batch)
    assert sorted(shown[row] for row in range(3, 13)) == [1] * 8 + [2] * 2


def test_a_schedule_ends_with_masks_alone_and_keeps_the_length_of_an_epoch():
    """Epochs of another length would be other steps, rates and evaluations beside a baseline."""
    one = sampler(6, 16, (0, 0.5), (2, 0.25), (3, 1))
    labelled = [
        [sum(row < 6 for row, _ in batch) for batch in batches(one, epoch)] for epoch in range(5)
    ]
    assert labelled == [[4] * 4, [4] * 4, [2] * 4, [8] * 4, [8] * 4]
    only = sampler(16, 6, 1)
    assert sorted(row for batch in batches(only) for row, _ in batch) == list(range(16))


def test_shares_keep_to_the_plan_of_a_shorter_run(tmp_path: Path):
    """The weights of the last stretch would come without its images: no epoch 45 in a run of 4."""
    shares = []

    class Watched(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"].flatten(1)
            shares.append((self.epochs.index, int((labels != 255).any(dim=1).sum())))
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"labelled_share": ["0:0.5", "30:1"], "plan_epochs": 40.0, "num_train_epochs": 4}
    args = arguments(tmp_path, per_device_train_batch_size=4, **options)
    dataset = some_without(4, 4)
    Watched(tiny_student(), args, teacher=tiny_teacher(), train_dataset=dataset).train()
    assert shares == [(epoch, 2 if epoch < 3 else 4) for epoch in range(4) for _ in range(2)]
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=8, **options)
    shares.clear()
    Watched(tiny_student(), args, teacher=tiny_teacher(), train_dataset=dataset).train()
    assert [count for _, count in shares] == [2] * 6 + [4] * 2


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    """Another generator's state in it would end a resumed run elsewhere."""
    first, again, other = sampler(3, 12, 0.5), sampler(3, 12, 0.5), sampler(3, 12, 0.5, seed=4)
    order = batches(first, 1)
    batches(again, 0)
    torch.manual_seed(99)
    np.random.seed(99)
    assert batches(again, 1) == order
    assert batches(again, 2) != order
    assert batches(other, 1) != order


def test_each_round_of_an_image_is_another_augmentation_and_the_first_is_its_own():
    """Sixty images shown ten times an epoch would else be sixty images, not six hundred views."""
    dataset = some_without(2, 2)
    first, second = dataset[(1, 0)], dataset[(1, 1)]
    assert torch.equal(first["pixel_values"], dataset[1]["pixel_values"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(second["pixel_values"], dataset[(1, 1)]["pixel_values"])
    with pytest.raises(IndexError):
        dataset[(4, 0)]
    turns = [turn for batch in batches(sampler(2, 12, 0.5)) for row, turn in batch if row == 0]
    assert sorted(turns) == list(range(len(turns)))


def test_two_processes_have_disjoint_batches_each_with_its_share():
    """The quota of a step would else be met by one process, and unlabelled images come twice."""
    one = sampler(3, 20, 0.5, processes=2)
    assert one.batches == 6  # five would be filled up with the first one again
    whole = BatchSampler(one, 8, drop_last=True)
    ranks = [list(BatchSamplerShard(whole, 2, rank)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [3, 3]
    assert all(sum(row < 3 for row, _ in batch) == 4 for rank in ranks for batch in rank)
    samples = [[sample for batch in rank for sample in batch] for rank in ranks]
    assert not set(samples[0]) & set(samples[1])
    shown = Counter(row for rank in samples for row, _ in rank)
    assert all(shown[row] >= 1 for row in range(3, 23))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(workers: int, tmp_path: Path):
    """Within an epoch, at its end, and in one of another share."""
    make = maker(
        some_without(2, 8),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        labelled_share=["0:0.5", "2:1"],
        pseudo_weight=1.0,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    assert_resumes_exactly(make, tmp_path, [1, 4, 5] if not workers else [5])


def test_a_training_takes_its_batches_and_counts_its_steps(tmp_path: Path):
    """A loader that took the sampler for a plain one would draw as it comes, and log as many."""
    seen = []

    class Watched(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"].flatten(1)
            seen.append(int((labels != 255).any(dim=1).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    dataset = some_without(3, 13)
    args = arguments(
        tmp_path, per_device_train_batch_size=4, labelled_share=["0.5"], pseudo_weight=1.0
    )
    trainer = Watched(tiny_student(), args, teacher=tiny_teacher(), train_dataset=dataset)
    trainer.train()
    assert seen == [2] * 14
    assert trainer.state.max_steps == 2 * steps_per_epoch(images_an_epoch(dataset, args), args)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["bce"] > 0 and log["pseudo_bce"] > 0 for log in logs)


def test_a_run_of_the_command_trains_on_a_folder_without_masks(tmp_path: Path):
    """From flags to a student: what joins the rows knows which of them have masks."""
    data = write_pairs(tmp_path / "data", train=2)
    more = write_pairs(tmp_path / "more", train=6) / "train" / "images"
    teacher = save_network(tmp_path / "teacher")
    flags = train_flags(data, tmp_path / "out", "--unlabelled", str(more), teacher=teacher)
    flags += ["--labelled_share", "0.5", "--pseudo_weight", "1", "--pseudo_confidence", "0.4"]
    parts = build_run(parse(flags))
    assert has_mask(parts.train_dataset.dataset).tolist() == [True] * 2 + [False] * 6
    results = train(parse(flags))
    assert np.isfinite(results["student_miou"])
    lines = (tmp_path / "out" / "config.yaml").read_text().splitlines()
    assert {"pseudo_weight: 1.0", "pseudo_confidence: 0.4"} <= set(lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labelled_share", "1.5"], "--labelled_share from 0 to 1, got"),
        (["--labelled_share", "half"], "--labelled_share like 0.5, or 0:0.5 36:1, got"),
        (["--labelled_share", "1:0.5"], "whole epochs rising from 0, got epochs"),
        (["--labelled_share", "0:0.5", "2.5:1"], "whole epochs rising from 0"),
        (["--labelled_share", "0.5", "--streaming"], "--labelled_share, got --streaming"),
        (
            ["--labelled_share", "0.5", "--train_sampling_strategy", "sequential"],
            "random with --labelled_share, got sequential",
        ),
        (["--labelled_share", "0.5"], "with and without masks .* got 8 with and 0 without"),
        (["--pseudo_weight", "1"], "--pseudo_weight 1, got a mask for each of the 8 training"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_cure(flags, message, tmp_path: Path):
    """An option that does nothing would be taken for one that does not help."""
    data = write_pairs(tmp_path / "data")
    teacher = save_network(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        build_run(parse([*train_flags(data, tmp_path / "out", teacher=teacher), *flags]))


def test_a_batch_without_a_place_for_both_and_other_data_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--batch_size 2 or more with --labelled_share 0.5"):
        sampler(2, 2, 0.5, batch_size=1)
    args = arguments(tmp_path, labelled_share=["0.5"])
    trainer = DistillationTrainer(
        tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(4)
    )
    with pytest.raises(TypeError, match=r"TransformedDataset with --labelled_share, got a Squares"):
        trainer.train()


def test_a_baseline_has_no_share_of_what_it_cannot_use(tmp_path: Path):
    """It has masks for all of its images, and no answers to follow."""
    settings = {
        "output_dir": str(tmp_path), "teacher": "x", "unlabelled": "y", "use_cpu": True,
        "report_to": "none", "pseudo_weight": 2.0, "pseudo_labels": "soft",
        "labelled_share": ["0.5"],
    }  # fmt: skip
    distilled = build(settings).training
    budget = Budget(80, {"baseline": 4, "distilled": 10}, {"baseline": 8, "distilled": 20})
    baseline = build(baseline_settings(settings, distilled, budget)).training
    assert (baseline.pseudo_weight, baseline.labelled_share) == (0.0, None)
    assert baseline.pseudo_labels == "hard"
    kept = without_teacher({"labelled_share": ["0.5"]})  # whose own rows lack masks
    assert kept["labelled_share"] == ["0.5"]


def test_the_doctor_says_how_many_batches_will_hold_no_label():
    """Nobody sees it in a log, where the terms of such a batch are 0 among others."""
    finding = label_finding(60, 600, 8)
    assert finding.grade == "note"
    assert "about 43% of the batches of 8 will hold none" in finding.text
    assert "--labelled_share" in finding.cure
    assert label_finding(500, 600, 8).grade == "ok"


def test_the_preflight_tries_pseudo_labels_on_an_image_as_if_it_had_no_mask(
    tmp_path: Path, monkeypatch
):
    """Tried on labelled images alone they would have no gradient, and pass for a fault."""
    data = write_pairs(tmp_path / "data", train=4)
    more = write_pairs(tmp_path / "more", train=6) / "train" / "images"
    teach(monkeypatch, knowing())
    flags = preflight_flags(
        data, tmp_path / "out", "--unlabelled", str(more), "--pseudo_weight", "1", teacher="one"
    )
    found = looked(parse(flags))
    assert "4 of 10 images have a mask: about 33% of the batches of 2" in found["labels"].text
    assert found["labels"].grade == "note"
    for name in ("bce", "pseudo_bce", "pseudo_dice"):
        assert f"{name} 0%" not in found["loss terms"].text
        assert f"{name} " in found["loss terms"].text
    assert found["loss terms"].grade != "fault"
    quota = looked(parse([*flags, "--labelled_share", "0.5"]))
    assert "labels" not in quota
