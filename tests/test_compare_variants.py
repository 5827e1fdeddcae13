"""Several ways to distil beside one set of baselines, and figures on images that chose nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_runs import save_network, write_pairs
from test_compare import compared, flags, made, miou_of, table_of

from kd_trainer.commands import compare
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.compare.budget import Budget
from kd_trainer.compare.image_counts import load_counts
from kd_trainer.compare.report import summarise
from kd_trainer.compare.results import check_comparable
from kd_trainer.compare.runs import (
    COUNTS,
    EMA_COUNTS,
    OF_THE_DISTILLATION,
    baseline_names,
    plan_runs,
)
from kd_trainer.compare.tables import markdown
from kd_trainer.compare.variants import read_variants

NO_COSTS = {"costs": {"student": None, "teacher": None, "load": None}}
BUDGET = Budget(8, {"baseline": 4, "distilled": 4}, {"baseline": 4, "distilled": 4})


def variants_of(*words: str, more: tuple[str, ...] = ()) -> list:
    return parse_comparison(
        ["--dataset", "x", "--teacher", "t", *more, "--variants", *words]
    ).variants


def names_of(folder: Path, *words: str) -> list[str]:
    return baseline_names([(variant, BUDGET) for variant in variants_of(*words)], folder)


def test_a_variant_is_the_command_line_but_for_its_flags(tmp_path: Path):
    """A variant that lost a flag of the command line differs in more than its name says."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("kl_weight: 7\nlearning_rate: 0.5\n")
    words = [
        "plain=",
        "soft=--kl_weight 1 --mse_weight 0",
        str(recipe),
        f"r=--config {recipe} --kl_weight 2",
    ]
    plain, soft, mine, both = variants_of(*words, more=("--learning_rate", "2e-3"))
    for key, values in {
        "kl_weight": [None, 1, 7, 2],
        "mse_weight": [None, 0, None, None],
        "learning_rate": [2e-3] * 4,
    }.items():
        for variant, value in zip((plain, soft, mine, both), values, strict=True):
            assert value is None or variant.settings[key] == value, (variant.name, key)
    assert [v.name for v in (plain, soft, mine, both)] == ["plain", "soft", "mine", "r"]
    assert soft.flags == "--kl_weight 1 --mse_weight 0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=", "a=--kl_weight 1"], "different names, got a twice"),
        (["baseline=--kl_weight 1"], "does not begin with baseline"),
        (["a b=--kl_weight 1"], "letters, digits"),
        (["a=--teacher other"], "in the variant a, got --teacher"),
        (["a=--seed 3"], "in the variant a, got --seed"),
        (["a=--dry_run"], "in the variant a, got --dry_run"),
        (["a=--kl_wieght 1"], "got --kl_wieght. Did you mean --kl_weight"),
        (["a=--kl_weight -1"], r"got -1.0. Use 0 to leave it out. \(variant a\)"),
        (["no_such_recipe"], "Expected a recipe"),
    ],
)
def test_variants_that_cannot_be_are_refused_before_anything_is_loaded(words, message):
    """Found after the first variant's seeds, a misspelt flag of the last one costs a night."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        variants_of(*words)


def test_a_variant_that_teaches_itself_is_measured_with_the_teacher_of_the_comparison():
    """What describes that teacher would else be refused, or taken for the student's average."""
    of_teacher = ("--teacher_flip", "--teacher_targets", "cached", "--learning_rate", "2e-3")
    words = ("recipe=", "own=--teacher self --ema_decay 0.9")
    recipe, own = variants_of(*words, more=of_teacher)
    assert (own.settings["teacher"], own.reference["teacher"]) == (["self"], ["t"])
    assert (own.settings["pseudo_weight"], own.settings["ema_decay"]) == (1, 0.9)
    assert own.settings["learning_rate"] == 2e-3
    assert "teacher_targets" not in own.settings
    assert ("teacher_flip" in own.settings, own.reference["teacher_flip"]) == (False, True)
    assert recipe.reference == recipe.settings
    with pytest.raises(ValueError, match=r"no --teacher_flip with --teacher self.*variant own"):
        variants_of("own=--teacher self --teacher_flip")


def test_only_names_what_is_there():
    """`--only sof` would else train nothing and say that all is complete."""
    with pytest.raises(ValueError, match=r"Did you mean soft\?"):
        variants_of("soft=--kl_weight 1", more=("--only", "sofd"))


def test_variants_that_are_equal_without_a_teacher_share_a_baseline(tmp_path: Path):
    """Trained for each of them, half the time goes into the same runs; shared by variants of other
    data or steps, the table shows the levers of the data as the teacher's."""
    words = [
        "a=",
        "b=--kl_weight 1 --mse_weight 0",
        "c=--augmentation light",
        "d=--augmentation light --kl_weight 1",
    ]
    assert names_of(tmp_path, *words) == ["baseline", "baseline", *["baseline_of_c"] * 2]
    for weight in ("bce_weight", "dice_weight"):  # terms that compare with labels
        assert names_of(tmp_path, "a=", f"b=--{weight} 3") == ["baseline", "baseline_of_b"]
    assert weight not in OF_THE_DISTILLATION


def test_a_variant_that_comes_later_trains_no_baseline_again(tmp_path: Path):
    """A baseline called after the first variant in the list would move when another one comes."""
    (tmp_path / "baseline_of_d_seed0").mkdir()
    words = ["a=", "c=--augmentation light", "d=--augmentation light --kl_weight 1"]
    assert names_of(tmp_path, *words) == ["baseline", *["baseline_of_d"] * 2]


def test_variants_of_other_steps_have_baselines_of_as_many(tmp_path: Path):
    """More steps for the student with a teacher alone is the oldest way to win."""
    a, b = variants_of("a=", "b=")
    budgets = [(a, BUDGET), (b, Budget(16, BUDGET.per_epoch, BUDGET.images))]
    planned = plan_runs(budgets, seeds=[0, 1], folder=tmp_path)
    steps = {one.kind: one.budget.steps for one in planned}
    assert steps == {"baseline": 8, "baseline_of_b": 16, "a": 8, "b": 16}
    assert [one.name for one in planned[:4]] == [f"{kind} seed 0" for kind in steps]


def test_one_table_has_a_row_for_each_variant_against_its_own_baseline():
    """G of a variant against another one's baseline is the share of no gap."""
    runs = []
    for seed, more in ((0, 0), (1, 2)):
        runs.append(made("baseline", seed, 20 + more))
        runs.append(made("baseline_of_c", seed, 16 + more))
        runs += [made(k, seed, w + more, flags=f"--{k} 1") for k, w in (("a", 10), ("b", 12))]
        runs.append(made("c", seed, 8 + more, baseline="baseline_of_c"))
    check_comparable(runs)
    summary = summarise(runs, 20) | NO_COSTS
    text = markdown(summary)
    header, rows = table_of(text)
    assert list(rows) == ["teacher", "baseline", "baseline_of_c", "a", "b", "c"]
    for name, alone, taught in (("a", 20, 10), ("b", 20, 12), ("c", 16, 8)):
        means = [(miou_of(w) + miou_of(w + 2)) / 2 for w in (alone, taught)]
        closed = (means[1] - means[0]) / (1 - means[0])
        assert rows[name][header.index("gap closed") - 1].startswith(f"{closed:.3f} ± ")
        assert summary["students"][name]["gap_closed"]["value"] == pytest.approx(closed)
    assert "a: seeds 0 1, 24 steps each, with `--a 1`, beside baseline." in text
    assert "beside baseline_of_c" in text


def test_averages_are_told_where_all_runs_of_a_name_have_one():
    """The mean of two averages and a student is the figure of nothing."""
    runs = []
    for seed in (0, 1):
        for kind, wrong in (("baseline", 20), ("a", 12), ("b", 10)):
            run = made(kind, seed, wrong)
            average, final = (made(kind, seed, wrong - less).counts for less in (2, 4))
            run.results["ema_miou"] = miou_of(wrong - 2)
            kept = average if (kind, seed) != ("b", 1) else None
            more = {"final_counts": run.counts, "final_ema_counts": final, "ema_counts": kept}
            runs.append(replace(run, note=run.note | {"final": "test"}, **more))
    check_comparable(runs)
    summary = summarise(runs, 20) | NO_COSTS
    assert list(summary["ema"]) == ["baseline", "a"]
    header, rows = table_of(markdown(summary))
    assert header[2:10:2] == ["mIoU", "EMA mIoU", "test mIoU", "test EMA mIoU"]
    assert [cell[:6] for cell in rows["b"][1:8:2]] == [
        *(f"{miou_of(10):.4f}", "—", f"{miou_of(10):.4f}", f"{miou_of(6):.4f}")
    ]
    closed = (miou_of(10) - miou_of(18)) / (1 - miou_of(18))
    assert rows["a"][4].startswith(f"{closed:.3f}")
    runs[0].results["ema_miou"] = 0.5
    with pytest.raises(ValueError, match=f"results.json and {EMA_COUNTS} of one student"):
        check_comparable(runs)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """Data with a third split, and a teacher of random weights."""
    root = tmp_path_factory.mktemp("variants")
    write_pairs(root / "data", train=4, validation=3)
    write_pairs(root / "more", train=2, validation=5)
    shutil.copytree(root / "more" / "validation", root / "data" / "test")
    save_network(root / "teacher")
    return root


@pytest.mark.slow
def test_variants_train_what_is_missing_and_are_measured_on_other_images(
    ground: Path, tmp_path: Path, monkeypatch
):
    """A variant that is added to a table of days must not repeat the days, and figures of the
    images that chose the student are high for all."""
    start = flags(ground, tmp_path / "out", "--seeds", "1")
    compared(*start, "--variants", "distilled=")
    trained = []
    train = compare.train
    monkeypatch.setattr(compare, "train", lambda run: trained.append(run.output.name) or train(run))
    more = [
        "--variants",
        "distilled=",
        "soft=--kl_weight 1 --mse_weight 0",
        "--final_split",
        "test",
    ]
    summary, printed = compared(*start, *more)
    assert trained == ["soft_seed0"]
    assert printed.count("trained, its images are to be counted") >= 2
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(written["students"]) == ["baseline", "distilled", "soft"]
    assert written["eval_images"] == 3
    final: dict[str, Any] = written["final"]
    assert (final["data"], final["eval_images"]) == ("test", 5)
    rows = {row["kind"]: row for row in written["runs"]}
    for kind, one in final["students"].items():
        assert one["metrics"]["miou"]["mean"] == rows[kind]["final_miou"] != rows[kind]["miou"]
    assert final["students"]["soft"]["difference"]["mean"] == pytest.approx(
        rows["soft"]["final_miou"] - rows["baseline"]["final_miou"]
    )
    assert "test mIoU" in (tmp_path / "out" / "comparison.md").read_text()
    trained.clear()
    assert compared(*start, *more)[0] == summary
    assert trained == []


@pytest.fixture(scope="module")
def with_self(ground: Path, tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """A recipe and a student that teaches itself: folder, summary, what was printed."""
    output = tmp_path_factory.mktemp("self") / "out"
    more = ["--seeds", "1", "--unlabelled", str(ground / "more" / "validation" / "images")]
    own = "own=--teacher self --ema_decay 0.5"
    return output, *compared(*flags(ground, output, *more), "--variants", "recipe=", own)


@pytest.mark.slow
def test_a_student_that_teaches_itself_is_one_row_against_the_same_teacher(
    with_self: tuple[Path, dict[str, Any], str],
):
    """Measured with its own average, it would agree with its teacher and have no gap to close."""
    output, summary, _ = with_self
    students = summary["students"]
    assert list(students) == ["baseline", "baseline_of_own", "recipe", "own"]
    config = {k: yaml.safe_load((output / f"{k}_seed0/config.yaml").read_text()) for k in students}
    assert [config[k]["teacher"] for k in students] == [
        "none",
        "none",
        config["recipe"]["teacher"],
        "self",
    ]
    alone = config["baseline_of_own"]
    assert (alone["strong_views"], alone["ema_decay"], alone["unlabelled"]) == (2, 0.5, None)
    assert students["own"]["baseline"] == "baseline_of_own"
    counts = {k: load_counts(output / f"{k}_seed0" / COUNTS) for k in students}
    for one in counts.values():
        assert np.array_equal(one.teacher, counts["recipe"].teacher)
    written = json.loads((output / "own_seed0" / "results.json").read_text())
    assert students["own"]["metrics"]["miou"]["mean"] == written["student_miou"]
    assert "agreement" not in written
    assert 0 < students["own"]["metrics"]["agreement"]["mean"] < 1
    assert summary["teacher"]["source"] == "teacher"
    assert summary["costs"]["teacher"] is not None


@pytest.mark.slow
def test_averages_are_columns_of_their_own_against_averages_of_the_baseline(
    with_self: tuple[Path, dict[str, Any], str],
):
    """An average beside a baseline without one wins by what averaging alone brings."""
    output, summary, printed = with_self
    assert list(summary["ema"]) == ["baseline_of_own", "own"]  # those with --ema_decay
    miou = {}
    for kind, one in summary["ema"].items():
        written = json.loads((output / f"{kind}_seed0" / "results.json").read_text())
        miou[kind] = one["metrics"]["miou"]["mean"]
        assert miou[kind] == pytest.approx(written["ema_miou"]) != written["student_miou"]
    own = summary["ema"]["own"]
    assert own["baseline"] == "baseline_of_own"
    assert own["difference"]["mean"] == pytest.approx(miou["own"] - miou["baseline_of_own"])
    header, rows = table_of(printed)
    column = header.index("EMA mIoU") - 1
    assert rows["own"][column] == f"{miou['own']:.4f} (one seed)"
    assert rows["teacher"][column] == rows["teacher"][1]
    assert rows["recipe"][column : column + 2] == ["—", "—"]
    assert "own (EMA):" in printed


@pytest.mark.slow
def test_nothing_of_it_is_trained_twice(
    with_self: tuple[Path, dict[str, Any], str], ground: Path, monkeypatch
):
    """A run whose note names another teacher would be refused as one of other settings."""
    output, summary, _ = with_self
    monkeypatch.setattr(compare, "train", None)
    (output / "own_seed0" / EMA_COUNTS).unlink()  # as before averages were counted
    more = ["--seeds", "1", "--unlabelled", str(ground / "more" / "validation" / "images")]
    own = "own=--teacher self --ema_decay 0.5"
    again, printed = compared(*flags(ground, output, *more), "--variants", "recipe=", own)
    assert printed.count("complete, not repeated") == 3
    assert printed.count("own seed 0: trained, its images are to be counted") == 1
    assert again == summary


def test_images_that_choose_are_no_final_ones(ground: Path, tmp_path: Path):
    """The figure would be called honest, and be the one that chose."""
    start = flags(ground, tmp_path / "out", "--seeds", "1", "--dry_run")
    with pytest.raises(ValueError, match="Expected other images as --final_dataset"):
        compared(*start, "--final_dataset", str(ground / "data"))
    with pytest.raises(ValueError, match="nobody has trained on as --final_split, got train"):
        compared(*start, "--final_split", "train")


def test_without_variants_the_command_line_is_the_one_that_is_compared():
    """Its runs have had this name before there were variants."""
    (only,) = read_variants(
        None, "rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog", {}, {}
    )
    assert only.name == "distilled"
