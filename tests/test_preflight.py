"""The preflight of whole runs, alone, before a training, and as scripts/doctor.py."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SIDE, save_network, train_flags, write_pairs
from torch import Tensor, nn

from kd_trainer.command_line import parse
from kd_trainer.configuration_smp import IMAGENET_MEAN, IMAGENET_STD
from kd_trainer.preflight.finding import Finding, Grade, graded
from kd_trainer.teacher import Teacher
from kd_trainer.workflows import assemble as assembling
from kd_trainer.workflows import compare, preflight_start
from kd_trainer.workflows.assemble import assemble
from kd_trainer.workflows.compare_arguments import parse_comparison
from kd_trainer.workflows.disk import disk_need
from kd_trainer.workflows.doctor import doctor, doctor_main, examine, parse_doctor
from kd_trainer.workflows.preflight import Preflight
from kd_trainer.workflows.preflight_limits import QUICK, THOROUGH
from kd_trainer.workflows.run_costs import affordable
from kd_trainer.workflows.train import train

ROOT = Path(__file__).parents[1]
TIMES = ("_seconds", "_per_second", "_ms", "peak_memory_mib", "_threads")


class Green(nn.Module):
    """Finds the foreground of `write_pairs`, whose green is above 120, of values in 0..1."""

    def __init__(self, sharpness: float = 8.0, output: nn.Module | None = None) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.output = output or nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        smooth = nn.functional.avg_pool2d(pixels[:, 1:2], 5, 1, 2)
        return self.output(self.sharpness * (smooth - 120 / 255))


def knowing(network: nn.Module, mean: float = 0.0, std: float = 1.0) -> Teacher:
    """A teacher that is told to normalise its pictures so."""
    statistics = {"mean": (mean,) * 3, "std": (std,) * 3}
    given = {"input_mean": IMAGENET_MEAN, "input_std": IMAGENET_STD}
    return Teacher(network, num_labels=2, **statistics, **given)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("preflight") / "data", train=10, validation=6)


def flags(data: Path, output: Path, *more: str, teacher: Path | str = "none") -> list[str]:
    """A run with its preflight."""
    given = train_flags(data, output, *more, teacher=teacher)
    given.remove("--no_preflight")  # the first one: a test may give its own
    return given


def looked(run, limits=QUICK) -> dict[str, Finding]:
    return {f.check: f for f in Preflight(run, assemble(run), limits).findings()}


@pytest.fixture
def taught(monkeypatch):
    """Let every run have this teacher, whatever its settings name."""

    def use(teacher: Teacher) -> None:
        monkeypatch.setattr(assembling, "make_teacher", lambda *_, **__: teacher)

    return use


def bad(found: dict[str, Finding]) -> dict[str, str]:
    return {name: str(f.grade) for name, f in found.items() if f.grade != Grade.OK}


def test_a_healthy_run_has_no_findings(data: Path, tmp_path: Path, taught):
    """A check that cries wolf is switched off with all the others."""
    taught(knowing(Green()))
    found = looked(parse(flags(data, tmp_path / "out", teacher="one")))
    assert bad(found) == {}
    wanted = {"teacher output", "teacher quality", "classes", "mask position", "normalisation"}
    wanted |= {"masks, train", "masks, validation", "shared images", "disk"}
    assert set(found) == wanted | {"loss", "loss terms", "gradients"}
    assert found["loss terms"].text.count("%") == 4


FAULTY = {
    "probabilities": (knowing(Green(output=nn.Sigmoid())), {"teacher output"}),
    "raw pixels": (knowing(Green(), std=1 / 255), {"teacher quality", "normalisation"}),
    "the other class": (knowing(Green(sharpness=-8.0)), {"classes"}),
    "nothing learned": (knowing(Green(sharpness=0.0)), {"teacher output", "teacher quality"}),
}


@pytest.mark.parametrize("case", FAULTY)
def test_each_fault_of_a_teacher_is_found(case: str, data: Path, tmp_path: Path, taught):
    """One for each way in which a run goes through and teaches nothing."""
    teacher, checks = FAULTY[case]
    taught(teacher)
    found = looked(parse(flags(data, tmp_path / "out", teacher="one")))
    assert checks <= set(bad(found)), bad(found)
    assert all(found[name].grade == Grade.FAULT for name in checks)
    assert all(f.cure.endswith(".") for f in found.values() if f.grade != Grade.OK)


@pytest.fixture
def spoiled(data: Path, tmp_path: Path):
    """A copy of the data whose masks were changed, the pictures left."""
    import cv2

    def make(change) -> Path:
        copy = tmp_path / "spoiled"
        shutil.copytree(data, copy)
        for file in copy.glob("*/masks/*.png"):
            mask = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(file), np.ascontiguousarray(change(mask)))
        return copy

    return make


@pytest.mark.parametrize(
    ("change", "check", "word"),
    [
        (lambda m: 255 - m, "classes", "inverted"),
        (lambda m: np.roll(m, 6, axis=1), "mask position", "too far right by 9.4%"),
        (lambda m: m[:, ::-1], "mask position", "mirrored"),
    ],
    ids=["inverted", "moved", "mirrored"],
)
def test_each_fault_of_masks_is_found(change, check, word, spoiled, tmp_path: Path, taught):
    """Masks are made by other people's scripts."""
    taught(knowing(Green()))
    found = looked(parse(flags(spoiled(change), tmp_path / "out", teacher="one")))
    assert found[check].grade == Grade.FAULT
    assert word in found[check].text


def test_a_saved_student_judges_where_there_is_no_teacher(data: Path, tmp_path: Path):
    """It has seen such pictures as well; random weights say nothing, and blame nobody."""
    saved = save_network(tmp_path / "saved")
    found = looked(parse(flags(data, tmp_path / "out", "--student", str(saved))))
    assert {"classes", "mask position"} <= set(found)
    assert "the student" in found["classes"].text
    assert bad(found) == {}


def test_a_teacher_is_not_judged_by_masks_of_one_class(spoiled, tmp_path: Path, taught):
    """Of rare objects a few masks may all be empty; beside them no teacher beats a constant."""
    taught(knowing(Green()))
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


def test_nothing_of_the_run_is_changed(data: Path, tmp_path: Path, taught):
    """Weights, running statistics, training mode, random state and the epoch of the data."""
    taught(knowing(Green()))
    run = parse(flags(data, tmp_path / "out", "--augmentation", "light", teacher="one"))
    parts = assemble(run)
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
    parts = assemble(run)
    parts.student.synchronise_batchnorm()
    preflight = Preflight(run, parts, QUICK)
    assert bad({f.check: f for f in preflight.findings()}) == {}
    modes = {m.training for m in preflight.student.modules() if isinstance(m, nn.SyncBatchNorm)}
    assert modes == {False}
    assert preflight.student.training


def test_a_training_is_the_same_with_and_without(data: Path, tmp_path: Path, taught, capsys):
    """A look that changes what it looks at would make two different runs of one command."""
    taught(knowing(Green()))
    results = {}
    for name, extra in (("with", ()), ("without", ("--no_preflight",))):
        more = ("--epochs", "1", "--max_train_samples", "6", "--augmentation", "light", *extra)
        run = parse(flags(data, tmp_path / name, *more, teacher="one"))
        results[name] = train(run)
        assert ("Preflight: 12 checks passed in " in capsys.readouterr().out) == (name == "with")
    weights = [load_file(tmp_path / n / "student" / "model.safetensors") for n in results]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    plain = [
        {k: v for k, v in result.items() if not k.endswith(TIMES)} for result in results.values()
    ]
    assert plain[0] == plain[1]
    written = [(tmp_path / n / "config.yaml").read_text() for n in results]
    assert written[0].replace("/with", "/without") == written[1]


def test_a_training_with_a_fault_stops_before_anything_is_written(data: Path, tmp_path: Path):
    """One line with the cure, and the way to go on all the same."""
    teacher = save_network(tmp_path / "random")
    run = parse(flags(data, tmp_path / "out", teacher=teacher))
    with pytest.raises(ValueError, match=r"^Expected a teacher better than .*--no_preflight goes"):
        train(run)
    assert not (tmp_path / "out").exists()


def test_a_comparison_looks_once(data: Path, tmp_path: Path, monkeypatch):
    """Six runs would look six times at the same pictures."""

    def stop(run, parts) -> None:
        assert run.training.no_preflight is False
        assert parts.teacher is not None
        raise ValueError("Expected a better teacher, got this one.")

    monkeypatch.setattr(compare, "check_before_training", stop)
    teacher = save_network(tmp_path / "random")
    given = flags(data, tmp_path / "out", "--eval_strategy", "epoch", teacher=teacher)
    with pytest.raises(ValueError, match="a better teacher"):
        compare.run_compare(parse_comparison(given))
    monkeypatch.setattr(compare, "measure_speed", lambda *_: 1 / 0)  # the next thing it does
    with pytest.raises(ZeroDivisionError):
        compare.run_compare(parse_comparison([*given, "--no_preflight"]))


def test_the_first_process_tells_the_others(data: Path, tmp_path: Path, monkeypatch):
    """Each rank would look for itself, or all but one would wait for it for half an hour."""
    told = []
    run = parse(flags(data, tmp_path / "out"))

    def broadcast(message: list) -> None:
        told.append(list(message))
        message[0] = "Expected a teacher, got none."

    monkeypatch.setattr(preflight_start, "broadcast_object_list", broadcast)
    monkeypatch.setattr(type(run.training), "world_size", 2)
    monkeypatch.setattr(type(run.training), "process_index", 1)
    with pytest.raises(ValueError, match="Expected a teacher, got none"):
        preflight_start.check_before_training(run, parts=None)  # type: ignore[arg-type]
    assert told == [[None]]


@pytest.mark.distributed
def test_two_processes_stop_with_the_same_line(data: Path, tmp_path: Path):
    """A rank that does not hear of the fault hangs in the first exchange of gradients."""
    teacher = save_network(tmp_path / "random")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(ROOT / "scripts" / "train.py")]
    command += flags(data, tmp_path / "out", teacher=teacher)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [lines[0]] * 2, done.stderr[-2000:]
    assert "Expected a teacher better than" in lines[0]


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ([], 2),  # two epochs, a checkpoint each
        (["--epochs", "50"], 3),  # --save_total_limit 2, and the next one
        (["--epochs", "50", "--save_total_limit", "1"], 3),  # the best, the newest and the next
        (["--epochs", "50", "--save_total_limit", "null"], 50),
        (["--save_strategy", "no"], 0),
        (["--max_steps", "40", "--save_strategy", "steps", "--save_steps", "0.25"], 3),
    ],
)
def test_checkpoints_on_the_disk_are_counted(more: list[str], kept: int, data, tmp_path: Path):
    """While a checkpoint is written those it will replace are still there."""
    settings = ["--eval_strategy", "no"] if "--max_steps" in more else []
    run = parse(flags(data, tmp_path / "out", *more, *settings))
    assert disk_need(run, assemble(run)).checkpoints == kept


@pytest.mark.parametrize(
    ("batch", "seconds", "expected"),
    [(4, 0.01, (3, 4)), (4, 1.5, (2, 4)), (4, 4.0, (1, 2)), (64, 0.2, (2, 32)), (2, 60.0, (1, 2))],
)
def test_what_is_measured_fits_into_the_time(batch: int, seconds: float, expected):
    """The recipe at 640 px takes 20 s an update on a slow machine; the doctor has a minute."""
    assert affordable(batch, seconds, 20.0) == expected


def test_doctor_prints_a_table_with_the_cost_of_the_run(data: Path, tmp_path: Path, taught, capsys):
    """All of it: checks, memory and hours, and nothing is written."""
    taught(knowing(Green()))
    run = parse_doctor(flags(data, tmp_path / "out", "--epochs", "100", teacher="one"))
    findings = doctor(run)
    assert graded(findings, Grade.FAULT) == graded(findings, Grade.NOTE) == []
    out = capsys.readouterr().out
    time = next(f.text for f in findings if f.check == "time")
    assert "for 500 updates of" in time
    assert [f.check for f in findings][-2:] == ["memory", "time"]
    assert "check            |" in out.splitlines()[0]
    assert "Nothing is at fault. Looked for" in out
    assert not (tmp_path / "out").exists()
    assert THOROUGH.images > QUICK.images


@pytest.mark.slow
def test_doctor_script_ends_with_1_at_a_fault(data: Path, tmp_path: Path):
    """A script that calls it reads the status, not the table; and random weights are a fault."""
    teacher = save_network(tmp_path / "random")
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py")]
    command += flags(data, tmp_path / "out", teacher=teacher)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "teacher quality  | fault | Expected a teacher better than" in done.stdout
    assert "1 fault: this training would be pointless." in done.stdout
    assert "Traceback" not in done.stderr


WRONG = {
    "unknown flag": (["--techer", "x"], "Did you mean --teacher?"),
    "dry run": (["--dry_run"], "Expected no --dry_run, got it: nothing is trained here"),
    "no preflight": (["--no_preflight"], "Expected no --no_preflight"),
    "value": (["--image_size", "big"], "Expected --image_size to be a whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_of_doctor_is_an_error(case: str, data: Path, tmp_path: Path):
    """Before anything is loaded."""
    more, words = WRONG[case]
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        parse_doctor(flags(data, tmp_path / "out") + more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image_size", str(SIDE + 1)], "divisible by 32"),
        (["--train_split", "trian"], "Did you mean 'train'?"),
        (["--teacher", "{four}"], "teacher of 2 classes, got 4"),
    ],
)
def test_what_would_stop_the_start_is_a_fault_in_the_table(
    more, words, data, tmp_path: Path, capsys
):
    """Sizes, splits and class counts that do not fit are what a doctor is asked about."""
    four = save_network(tmp_path / "four", num_labels=4)
    given = flags(data, tmp_path / "out") + [word.format(four=four) for word in more]
    (finding,) = examine(parse_doctor(given))
    assert finding.grade == Grade.FAULT
    assert words in f"{finding.text}. {finding.cure}"
    with pytest.raises(SystemExit) as stop:
        doctor_main(given)
    assert stop.value.code == 1
    assert "1 fault: this training would be pointless." in capsys.readouterr().out
