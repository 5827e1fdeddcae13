"""`--teacher self`: the student's moving average teaches it, and no teacher is claimed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from same_run import assert_resumes_exactly
from small_runs import SIDE as LARGE
from small_runs import train_flags, write_pairs
from test_views import IGNORE, Mixed
from tiny import arguments, tiny_student

from kd_trainer.build import build_run, evaluation_dataset
from kd_trainer.commands.compare import run_compare
from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.report import ReportArguments, build_report
from kd_trainer.commands.train import run_train
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.config import parse
from kd_trainer.data import collate
from kd_trainer.data.views import Views, student_batch
from kd_trainer.data_arguments import DataArguments
from kd_trainer.loading import load_student
from kd_trainer.losses import distillation_terms, weighted_sum
from kd_trainer.measurement import evaluate_model
from kd_trainer.model_card import CardFacts, render
from kd_trainer.parsing import settings_of
from kd_trainer.run_folder import written_settings
from kd_trainer.students import student_logits
from kd_trainer.trainer import DistillationTrainer

WEIGHTS = {"kl_weight": 1.0, "mse_weight": 0.0, "pseudo_weight": 1.0, "pseudo_confidence": 0.51}


def trainer_in(folder: Path, *, blank: bool = False, **options: Any) -> DistillationTrainer:
    student = tiny_student()
    if blank:
        student.load_state_dict({k: v * 0 for k, v in student.state_dict().items()})
    settings = {"ema_decay": 0.9, "per_device_train_batch_size": 4} | WEIGHTS
    return DistillationTrainer(
        student,
        arguments(folder, **(settings | options)),
        teacher="self",
        train_dataset=Mixed(8, Views(strong=2, mix=0.5)),
    )


def test_its_average_answers_about_the_weak_view_and_the_student_sees_the_strong_ones(
    tmp_path: Path,
):
    """Asked about the strong views, it would teach what the student says there already."""
    trainer = trainer_in(tmp_path, max_steps=3)
    trainer.train()
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    weak = trainer._normalised(batch)["pixel_values"]
    average = trainer.ema.network
    assert not torch.equal(*(next(n.parameters()) for n in (average, trainer.model)))
    with torch.no_grad():
        answers = student_logits(average, weak)
    by_hand = student_batch({**batch, "teacher_logits": answers}, None, ignore_index=IGNORE)
    (seen,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    torch.testing.assert_close(seen["teacher_logits"], by_hand["teacher_logits"])
    loss = trainer.compute_loss(trainer.model.eval(), seen)
    pixels = trainer._normalised(by_hand)["pixel_values"]
    terms = distillation_terms(
        student_logits(trainer.model, pixels),
        by_hand["teacher_logits"],
        by_hand["labels"],
        temperature=trainer.schedule.temperature(trainer.state.global_step),
        distil_mask=by_hand["distil_mask"],
        weights=trainer.args.loss_weights,
        pseudo=trainer.args.pseudo,
    )
    assert min(terms.kl, terms.pseudo_bce, terms.pseudo_dice) > 0
    torch.testing.assert_close(loss, weighted_sum(terms, trainer.args.loss_weights))
    loss.backward()
    assert all(p.grad is None for p in average.parameters())


def test_it_goes_on_as_if_it_had_not_stopped(tmp_path: Path):
    """With another average at the resume the teacher would be another one."""
    assert_resumes_exactly(trainer_in, tmp_path, [1, 3])


def test_a_student_without_an_average_cannot_teach_itself(tmp_path: Path):
    """Nobody would answer, and the terms that follow a teacher would be left out silently."""
    with pytest.raises(ValueError, match="Expected --ema_decay with --teacher self"):
        trainer_in(tmp_path, ema_decay=None)


def test_terms_on_features_are_refused_by_name(folders: Path, tmp_path: Path):
    """Its average has the student's own features: nothing could be learned from them."""
    message = "Expected no --mgd_weight with --teacher self, got it.*Set it to 0, or name a teacher"
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, mgd_weight=1.0)
    with pytest.raises(ValueError, match=message):
        build_run(parse(flags(folders, tmp_path, "--mgd_weight", "1")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "data", train=4)
    (root / "more").mkdir()
    draw = np.random.default_rng(5)
    for index in range(6):
        image = draw.integers(0, 255, (LARGE, LARGE, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "more" / f"{index}.png"), image)
    return root


def flags(folders: Path, output: Path, *more: str) -> list[str]:
    words = train_flags(folders / "data", output, *more, teacher="self")
    return [*words, "--unlabelled", str(folders / "more")]


def test_one_flag_beside_the_images_makes_a_sensible_run(folders: Path, tmp_path: Path, capsys):
    """A recipe's weights follow a teacher that knows more; what is named stays."""
    run = parse(flags(folders, tmp_path))
    args = run.training
    assert (args.ema_decay, run.data.strong_views) == (0.996, 2)
    assert (args.kl_weight, args.mse_weight, args.pseudo_weight) == (0, 0, 1)
    assert (args.pseudo_confidence, args.pseudo_labels) == (0.95, "hard")
    assert args.labelled_share == ["0.5"]
    assert parse(flags(folders, tmp_path, "--pseudo_weight", "0")).training.pseudo_confidence == 0
    assert parse(flags(folders, tmp_path, "--streaming")).training.labelled_share is None
    named = parse(flags(folders, tmp_path, "--kl_weight", "0.2", "--ema_decay", "0.9"))
    assert (named.training.kl_weight, named.training.ema_decay) == (0.2, 0.9)
    build_run(named)
    assert "The student teaches itself" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "own"
    words = flags(folders, out, "--ema_decay", "0.5", "--save_strategy", "epoch")
    words[words.index("--report") + 1] = "true"
    words.remove("--no_preflight")
    run_train(parse(words))
    return out


def test_what_a_run_leaves_claims_no_teacher(finished: Path):
    """The average of a student is no teacher whose figures or agreement could be told."""
    results = json.loads((finished / "results.json").read_text())
    assert results["teacher"] == "self"
    assert not any(name.startswith(("teacher_", "agreement")) for name in results)
    assert results["ema_miou"] >= 0
    assert (finished / "ema" / "model.safetensors").is_file()
    state = json.loads((finished / "trainer_state.json").read_text())
    logged = {name for log in state["log_history"] for name in log}
    assert {"pseudo_bce", "pseudo_dice"} < logged
    assert "kl" not in logged
    assert "eval_ema_miou" in logged
    assert not any("teacher" in name or "agreement" in name for name in logged)
    assert "taught by" not in (finished / "report.html").read_text()


def cells_of(page: str, name: str) -> list[str]:
    """The figures of a row of the first table that has it."""
    (cells,) = re.findall(rf"<tr><td>{name}</td>((?:<td>[^<]*</td>)+)</tr>", page)[:1]
    return re.findall(r"<td>([^<]*)</td>", cells)


def test_its_report_shows_the_average_beside_the_student(
    finished: Path, folders: Path, tmp_path: Path
):
    """Written again for other images, it must not show the figures of those of the training."""
    results = json.loads((finished / "results.json").read_text())
    page = (finished / "report.html").read_text()
    assert "its moving average" in page
    row = [f"{results[f'{who}_miou']:.4f}" for who in ("student", "ema")]
    assert cells_of(page, "mIoU") == row
    args = ReportArguments(max_images=0, output=str(tmp_path / "train.html"))
    again = build_report(finished, args, changed={"eval_split": "train"}).read_text()
    settings = settings_of(DataArguments, written_settings(finished) | {"eval_split": "train"})
    data = evaluation_dataset(DataArguments(**settings), batch_size=4)
    for who, cell in zip(("student", "ema"), cells_of(again, "mIoU"), strict=True):
        found = evaluate_model(load_student(finished / who), data).student["miou"]
        assert cell == f"{found:.4f}" != f"{results[f'{who}_miou']:.4f}"


def test_its_card_names_what_taught_it(finished: Path):
    """`Distilled from self` would send a reader looking for that teacher."""
    results = json.loads((finished / "results.json").read_text())
    settings = written_settings(finished)
    config = tiny_student().config.to_dict()
    card = render(CardFacts("me/x", "mit", config, (1, 0), 1.0, "photos", results, settings))
    assert "Its own moving average taught it" in card
    assert "pseudo BCE" in card
    assert "distilled from" not in card


def test_its_configuration_is_the_run(finished: Path, folders: Path):
    """Read again, it must not get the weights of the first command line's recipe."""
    again = parse(["--config", str(finished)])
    assert again.model.teaches_itself
    assert again.training.kl_weight == 0
    assert again.training.ema_decay == 0.5
    assert again.data.strong_views == 2


def test_it_does_not_go_on_without_its_teacher(finished: Path, folders: Path):
    """The name of a teacher alone may change where its weights are the same; here are none."""
    with pytest.raises(ValueError, match="teacher"):
        run_train(
            parse(["--config", str(finished), "--teacher", "none", "--resume", "--epochs", "2"])
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--teacher_targets", "cached"), "no --teacher_targets with --teacher self, got cached"),
        (("--compile_teacher",), "no --compile_teacher with --teacher self, got True"),
        (("--teacher_maps", "maps"), "no --teacher_maps with --teacher self"),
        (("--teacher_flip",), "no --teacher_flip with --teacher self"),
        (("--class_map", "a=b"), "no --class_map with --teacher self"),
    ],
)
def test_what_only_a_teacher_with_a_file_has_is_refused(
    folders: Path, tmp_path: Path, more: tuple[str, ...], message: str
):
    """Taken without a word, each would do nothing."""
    with pytest.raises(ValueError, match=message):
        build_run(parse(flags(folders, tmp_path, *more)))


def test_without_images_to_teach_on_it_is_refused(folders: Path, tmp_path: Path):
    """Its hard answers teach on images without masks alone."""
    words = train_flags(folders / "data", tmp_path, teacher="self")
    with pytest.raises(ValueError, match="Expected images without masks with --teacher self"):
        build_run(parse(words))


def test_figures_of_a_teacher_cannot_be_asked_of_it(folders: Path, finished: Path):
    """`eval.py` and `compare.py` need a teacher that is a model of its own."""
    data = ["--dataset", str(folders / "data")]
    with pytest.raises(ValueError, match="got self: the average"):
        evaluate_main([str(finished / "student"), *data, "--teacher", "self"])
    words = flags(folders, finished / "compared")
    with pytest.raises(ValueError, match=r"there is no gap.*--variants own='--teacher self'"):
        run_compare(parse_comparison(words))


def test_the_plan_says_who_teaches(folders: Path, tmp_path: Path, capsys):
    """A plan that is silent on it looks like one of a student alone."""
    run_train(parse(flags(folders, tmp_path, "--dry_run")))
    assert "moving average, its teacher (decay 0.996)" in capsys.readouterr().out
