"""Two processes over gloo against each other and against one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import save_network, train_flags, write_pairs
from tiny import Squares, arguments, tiny_student, tiny_teacher
from workers import two_ranks

from kd_trainer.build import evaluation_dataset
from kd_trainer.data_arguments import DataArguments
from kd_trainer.loading import load_student
from kd_trainer.measurement import evaluate_model
from kd_trainer.trainer import DistillationTrainer

TESTS = Path(__file__).parent
pytestmark = pytest.mark.distributed
TIMES = ("runtime", "per_second", "_time")
TERMS = ("eval_kl", "eval_mse", "eval_bce", "eval_dice_loss", "eval_loss")


def launch(*command: str) -> None:
    """Start two processes of a script."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    done = subprocess.run(
        [*start, *command], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Results of two ranks.

    Some ways to launch two processes start one, so each test asserts their number.
    """
    folder = tmp_path_factory.mktemp("two")
    launch(str(TESTS / "workers" / "two_ranks.py"), str(folder))
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """As each rank has: more threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"rank_{rank}.json").read_text())[name] for rank in (0, 1)]
    assert [rank["world"] for rank in found] == [2, 2]
    return found


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if not any(time in k for time in TIMES)}


def assert_same_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Counts are whole numbers; a term is as exact as the logits of another batch in fp32."""
    found = without_times(found)
    counted = {k: v for k, v in expected.items() if k not in TERMS}
    assert {k: found[k] for k in counted} == pytest.approx(counted, rel=1e-9, nan_ok=True)
    assert {k: found[k] for k in TERMS} == pytest.approx({k: expected[k] for k in TERMS}, rel=1e-6)
    assert found.keys() - counted.keys() - set(TERMS) <= {"epoch"}


def test_ranks_have_the_same_weights_after_each_update_while_units_are_freed(two: Path):
    """A unit that is frozen before the DDP wrap is never reduced: the ranks drift apart."""
    first, second = ranks(two, "staged")
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 12
    assert first["free"] == second["free"] == [0] * 4 + [1] * 4 + [2] * 4


def test_ranks_have_the_same_moving_average_of_the_student(two: Path):
    """Each has BatchNorm statistics of its own, of which an average would be its own too."""
    first, second = ranks(two, "averaged")
    assert first["digest"] == second["digest"]


def test_ranks_measure_the_student_that_is_saved(two: Path, tmp_path: Path):
    """Each has BatchNorm statistics of its own, and a mean over two students is that of none."""
    first, second = ranks(two, "staged")
    student = tiny_student("timm-efficientnet-b0")
    student.load_state_dict(torch.load(two / "staged.pt", weights_only=True))
    args = arguments(tmp_path, per_device_eval_batch_size=2)
    alone = DistillationTrainer(student, args, teacher=tiny_teacher())
    expected = without_times(alone.evaluate(Squares(two_ranks.UNEVEN, offset=50)))
    for rank in (first, second):
        assert_same_figures(rank["figures"], {k: v for k, v in expected.items() if k != "epoch"})


def test_two_ranks_take_the_updates_of_one_process_with_the_whole_batch(two: Path, tmp_path: Path):
    """Of a net without BatchNorm and DropPath: with a wrong mean of gradients it would not."""
    with one_thread():
        alone = two_ranks.plain(tmp_path, 4)
    assert alone["world"] == 1
    first, _ = ranks(two, "plain")
    expected = torch.load(tmp_path / "plain.pt", weights_only=True)
    found = torch.load(two / "plain.pt", weights_only=True)
    start = tiny_student(norm=False).state_dict()
    moved = max((expected[k] - start[k]).abs().max().item() for k in expected)
    assert moved > 1e-3
    assert max((found[k] - expected[k]).abs().max().item() for k in expected) < 1e-6
    logged = [without_times(log) for log in first["logs"]]
    wanted = [without_times(log) for log in alone["logs"]]
    assert len(logged) == len(wanted) == 13
    for log, other in zip(logged[:-1], wanted[:-1], strict=True):
        kept = {k: v for k, v in log.items() if not k.startswith("grad_share")}
        assert kept == pytest.approx({k: other[k] for k in kept}, rel=1e-5)


def test_projections_of_feature_maps_are_those_of_one_process(two: Path, tmp_path: Path):
    """They are outside of the student: whose gradients alone DDP averages."""
    first, second = ranks(two, "features")
    assert first["digest"] == second["digest"]
    with one_thread():
        alone = two_ranks.features(tmp_path, 4)
    assert alone["world"] == 1
    expected = torch.load(tmp_path / "features.pt", weights_only=True)
    found = torch.load(two / "features.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert sum(name.startswith("of.feature_cwd") for name in found) == 2
    assert max((found[k] - expected[k]).abs().max().item() for k in expected) < 1e-6
    assert len(first["logs"]) == len(alone["logs"]) == 13
    for log, other in zip(first["logs"][:-1], alone["logs"][:-1], strict=True):
        for name in ("at", "feature_cwd", "loss"):
            assert log[name] == pytest.approx(other[name], rel=1e-5), name


def test_dice_of_unevenly_labelled_ranks_is_that_of_one_process(two: Path, tmp_path: Path):
    """A mean of the means of the ranks would weigh the images beside unlabelled ones twice."""
    with one_thread():
        alone = two_ranks.dice(tmp_path, 4)
    assert alone["world"] == 1
    for name in ("dice", "pseudo_dice"):
        logged, wanted = (
            [log[name] for log in run["logs"][:-1]] for run in (ranks(two, "dice")[0], alone)
        )
        assert logged == pytest.approx(wanted, rel=1e-6)
        assert len(wanted) == 2
        assert sum(wanted) > 0.1
    steps = zip(
        *(torch.load(f / "gradients.pt", weights_only=True) for f in (two, tmp_path)), strict=True
    )
    for found, expected in steps:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("source", ["fixed", "stream"])
def test_figures_do_not_depend_on_the_number_of_ranks(two: Path, tmp_path: Path, source: str):
    """Seven images on two ranks: a doubled or dropped one would change the ninth digit."""
    alone = two_ranks.measured(tmp_path)
    assert alone["world"] == 1
    expected = without_times(alone["fixed"])
    assert expected["eval_miou"] > 0
    for found in (alone[source], *(rank[source] for rank in ranks(two, "measured"))):
        assert_same_figures(found, expected)


def test_a_streamed_run_of_two_processes_sees_and_measures_every_image(tmp_path: Path):
    """The stock pipeline shards twice: each process would see a quarter of the images.

    Nine and five images on two ranks: one is left out of the training in each epoch, none of the
    evaluation.
    """
    data = write_pairs(tmp_path / "data", train=9)
    teacher = save_network(tmp_path / "teacher")
    output = tmp_path / "out"
    flags = train_flags(data, output, "--streaming", "true", teacher=teacher)
    launch(str(TESTS.parent / "scripts" / "train.py"), *flags)
    results = json.loads((output / "results.json").read_text())
    assert (results["train_images"], results["eval_images"]) == (9, 5)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["max_steps"] == 4  # two epochs of four images a rank, in batches of two
    settings = yaml.safe_load((output / "config.yaml").read_text())
    fixed = DataArguments(dataset=str(data), image_size=settings["image_size"], augmentation="none")
    student = load_student(output / "student")
    measured = evaluate_model(student, evaluation_dataset(fixed, batch_size=2))
    assert results["student_miou"] == pytest.approx(measured.student["miou"], rel=1e-9)
    best = max(log["eval_miou"] for log in state["log_history"] if "eval_miou" in log)
    assert best == pytest.approx(measured.student["miou"], rel=1e-9)


def test_two_processes_share_the_batches_of_a_quota(tmp_path: Path):
    """Nine images without masks, one a batch: a tenth batch is filled up, and each takes five."""
    data = write_pairs(tmp_path / "data", train=3)
    more = write_pairs(tmp_path / "more", train=9) / "train" / "images"
    teacher, output = save_network(tmp_path / "teacher"), tmp_path / "out"
    options = ["--unlabelled", str(more), "--labelled_share", "0.5", "--pseudo_weight", "1"]
    flags = train_flags(data, output, *options, "--logging_steps", "1", teacher=teacher)
    launch(str(TESTS.parent / "scripts" / "train.py"), *flags)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["max_steps"] == 2 * 5
    logs = [log for log in state["log_history"] if "pseudo_bce" in log]
    assert len(logs) == 10
    assert all(log["bce"] > 0 and log["pseudo_bce"] > 0 for log in logs)


def test_groups_of_a_sharded_student_hold_what_is_trained(tmp_path: Path):
    """An evaluation leaves gathered tensors in a FSDP2 module: groups made of them never move."""
    launch(str(TESTS / "workers" / "sharded_groups.py"))
