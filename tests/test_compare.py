"""Comparisons of runs: equal budgets, restart, merge, and figures that are those of the files."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import sem
from small_runs import save_network, train_flags, write_pairs
from test_statistics import by_hand
from transformers import Trainer

from kd_trainer.checkpointing.checkpoints import complete
from kd_trainer.commands import compare
from kd_trainer.commands.compare import run_compare
from kd_trainer.commands.report import ReportArguments, build_report
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.compare.budget import Budget, baseline_settings
from kd_trainer.compare.estimate import finished_speed, seconds_left
from kd_trainer.compare.image_counts import ImageCounts, load_counts
from kd_trainer.compare.report import METRICS, summarise
from kd_trainer.compare.results import FILES, FinishedRun, check_comparable, read_runs
from kd_trainer.compare.runs import COUNTS, NOTE, PlannedRun
from kd_trainer.compare.tables import markdown
from kd_trainer.config import build
from kd_trainer.costs import duration, peak_memory_mib, reset_peak_memory
from kd_trainer.data import TransformedDataset
from kd_trainer.doctor.resources import Speed
from kd_trainer.hub import Publication, find_source, write_folder
from kd_trainer.trainer import DistillationTrainer

NAMES = ["baseline_seed0", "baseline_seed1", "distilled_seed0", "distilled_seed1"]
RESAMPLES = 100


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """Folder with a data set and a teacher of random weights."""
    root = tmp_path_factory.mktemp("compare")
    write_pairs(root / "data", train=4, validation=3)
    save_network(root / "teacher")
    return root


def flags(ground: Path, output: Path, *more: str) -> list[str]:
    """The command line of a comparison of seconds."""
    quick = ["--epochs", "1", "--latency_repeats", "0", "--bootstrap", str(RESAMPLES)]
    return train_flags(ground / "data", output, *quick, *more, teacher=ground / "teacher")


def compared(*arguments: object) -> tuple[dict[str, Any], str]:
    """What a comparison returns and prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = run_compare(parse_comparison(list(map(str, arguments))))
    return summary, printed.getvalue()


@dataclass
class Finished:
    """A comparison of two seeds that several tests look at; none changes it."""

    output: Path
    summary: dict[str, Any]
    printed: str
    first: dict[str, dict[str, torch.Tensor]]
    order: dict[str, list[int]]
    updates: dict[str, int]

    def results(self, name: str) -> dict[str, Any]:
        return json.loads((self.output / name / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(ground: Path) -> Iterator[Finished]:
    """Two seeds of both kinds, with the first weights and the order of the data noted."""
    found = Finished(ground / "out", {}, "", {}, {}, {})
    train, getitem = DistillationTrainer.train, TransformedDataset.__getitem__

    def noted(self, *args, **kwargs):
        name, rows = Path(self.args.output_dir).name, []
        found.first[name] = {k: v.clone() for k, v in self.model.state_dict().items()}
        found.order[name] = rows
        self.train_dataset.rows = rows
        result = train(self, *args, **kwargs)
        found.updates[name] = self.state.global_step
        return result

    def watched(self, index):
        if hasattr(self, "rows"):
            self.rows.append(index)
        return getitem(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", noted)
        patch.setattr(TransformedDataset, "__getitem__", watched)
        found.summary, found.printed = compared(*flags(ground, found.output, "--seeds", "2"))
    return found


@pytest.fixture
def copied(finished: Finished, ground: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison that may be damaged."""
    return Path(shutil.copytree(finished.output, tmp_path / "copy"))


@pytest.fixture
def forbidden(monkeypatch):
    """Training, also of the few updates of an estimate, fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(compare, "train", refuse)
    monkeypatch.setattr(compare, "measure_speed", refuse)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_kinds_spend_the_same_on_the_same(finished: Finished, seed: int):
    """A baseline of other weights, images or updates makes any teacher look good, or bad."""
    baseline, distilled = f"baseline_seed{seed}", f"distilled_seed{seed}"
    first = finished.first[baseline]
    assert first.keys() == finished.first[distilled].keys()
    assert all(torch.equal(v, finished.first[distilled][k]) for k, v in first.items())
    assert finished.order[baseline] == finished.order[distilled]
    assert finished.updates[baseline] == finished.updates[distilled] == 2
    assert sorted(finished.order[baseline]) == [0, 1, 2, 3]
    configs = [
        yaml.safe_load((finished.output / name / "config.yaml").read_text())
        for name in (baseline, distilled)
    ]
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing == {"teacher", "output_dir"}


def test_seeds_are_different_runs(finished: Finished):
    """The same run three times has a standard error too, and it is 0."""
    one, other = finished.first["baseline_seed0"], finished.first["baseline_seed1"]
    assert not all(torch.equal(v, other[k]) for k, v in one.items())


def test_report_and_card_of_a_run_find_the_comparison(finished: Finished, copied: Path):
    """It lies beside the folders of the runs, where neither would look by itself."""
    run = copied / "distilled_seed0"
    page = build_report(run, ReportArguments(max_images=0), changed={"dataset": "none"})
    assert 'id="comparison"' in page.read_text(encoding="utf-8")
    about = Publication("me/student", "mit")
    card = (write_folder(find_source(run), run / "hub", about) / "README.md").read_text()
    miou = finished.summary["students"]["baseline"]["metrics"]["miou"]["mean"]
    assert f"{miou:.4f}" in card


def test_counts_are_those_of_the_results(finished: Finished):
    """The interval is made of the counts, the table of the results: they have to agree."""
    for run in read_runs([finished.output]):
        for name, value in run.figures["student"].items():
            if run.kind == "distilled" or "agreement" not in name:
                written = run.results[name if "agreement" in name else f"student_{name}"]
                assert written == pytest.approx(value, abs=1e-9), name
        for name, value in run.figures["teacher"].items():
            if run.kind == "distilled":
                assert run.results[f"teacher_{name}"] == pytest.approx(value, abs=1e-9)


def test_figures_are_those_of_the_result_files(finished: Finished):
    """A table that is computed from the wrong runs looks like any other."""
    written = json.loads((finished.output / "comparison.json").read_text())
    for kind in ("baseline", "distilled"):
        results = [finished.results(f"{kind}_seed{seed}") for seed in (0, 1)]
        assert written["students"][kind]["seeds"] == [0, 1]
        for name in ("miou", "iou_foreground", "dice", "boundary_iou"):
            values = [r[f"student_{name}"] for r in results]
            mean = written["students"][kind]["metrics"][name]
            assert mean["mean"] == pytest.approx(np.mean(values))
            assert mean["standard_error"] == pytest.approx(sem(values))
        seconds = [r["train_seconds"] for r in results]
        assert written["students"][kind]["train_seconds"]["mean"] == pytest.approx(np.mean(seconds))
    agreement = [finished.results(f"distilled_seed{seed}")["agreement"] for seed in (0, 1)]
    taught = written["students"]["distilled"]
    assert taught["metrics"]["agreement"]["mean"] == pytest.approx(np.mean(agreement))
    teacher = finished.results("distilled_seed0")["teacher_miou"]
    assert written["teacher"]["metrics"]["miou"] == pytest.approx(teacher)
    difference = [
        finished.results(f"distilled_seed{s}")["student_miou"]
        - finished.results(f"baseline_seed{s}")["student_miou"]
        for s in (0, 1)
    ]
    assert taught["difference"]["mean"] == pytest.approx(np.mean(difference))
    assert taught["difference"]["standard_error"] == pytest.approx(sem(difference))
    assert taught["updates"] == 2
    assert written["eval_images"] == 3
    assert written["versions"] == finished.results("baseline_seed0")["versions"]


def test_interval_is_that_of_the_counts(finished: Finished):
    """The bootstrap has to see the runs it speaks of, in the order distilled minus baseline."""
    tables = {
        kind: np.stack(
            [load_counts(finished.output / f"{kind}_seed{s}" / COUNTS).confusion() for s in (0, 1)]
        )
        for kind in ("baseline", "distilled")
    }
    draws = by_hand(tables["distilled"], tables["baseline"], RESAMPLES, seed=0)
    taught = finished.summary["students"]["distilled"]
    found = taught["bootstrap"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    assert found["estimate"] == pytest.approx(taught["difference"]["mean"])


def test_costs_are_those_of_the_folders(finished: Finished, ground: Path):
    """Sizes are published; a table of sizes of other networks would not be noticed."""
    costs = finished.summary["costs"]
    for who, folder in (
        ("student", finished.output / "baseline_seed0" / "student"),
        ("teacher", ground / "teacher"),
    ):
        size = (folder / "model.safetensors").stat().st_size / 2**20
        assert costs[who]["file_mib"] == pytest.approx(size)
        assert costs[who]["macs"] > costs[who]["parameters"] > 10**5
        assert costs[who]["latency"] == []
    assert costs["student"]["parameters"] == finished.results(NAMES[0])["student_parameters"]


def test_time_is_estimated_before_anything_is_trained(finished: Finished):
    """Who learns after a night that it takes a week would have chosen fewer epochs."""
    printed = finished.printed
    assert printed.index("Estimated time: about") < printed.index("[1/4] baseline seed 0: to train")
    for number, name in enumerate(["baseline seed 0", "distilled seed 0", "baseline seed 1"]):
        assert f"[{number + 1}/4] {name}: mIoU 0." in printed
    assert "4 runs. Every run makes 2 steps (epochs of the same images: 1)." in printed


def test_files_to_carry_are_small(finished: Finished):
    """What is merged from other machines has to go by mail."""
    for name in NAMES:
        sizes = [(finished.output / name / file).stat().st_size for file in FILES]
        assert sum(sizes) < 16 * 1024


def test_complete_runs_are_not_repeated(finished: Finished, ground: Path, forbidden):
    """A comparison that starts again from nothing after a crash in the last run costs days."""
    before = {p: p.stat().st_mtime_ns for p in finished.output.glob("*_seed*/*.*")}
    summary, printed = compared(*flags(ground, finished.output, "--seeds", "2"))
    assert printed.count("complete, not repeated") == 4
    assert {p: p.stat().st_mtime_ns for p in finished.output.glob("*_seed*/*.*")} == before
    assert summary == finished.summary


def test_fewer_seeds_report_only_those(finished: Finished, ground: Path, copied: Path, forbidden):
    """Runs that were not asked for must not slip into the means."""
    summary, _ = compared(*flags(ground, copied, "--seed_list", "1"))
    assert (
        summary["students"]["baseline"]["seeds"] == summary["students"]["distilled"]["seeds"] == [1]
    )
    assert summary["students"]["distilled"]["gap_closed"]["standard_error"] is None


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--learning_rate", "2e-3"], "learning_rate 0.001 → 0.002"),
        (["--temperature_end", "2", "--only", "distilled"], "temperature_end 1.0 → 2.0"),
    ],
)
def test_other_settings_in_a_folder_are_refused(
    finished: Finished, ground: Path, copied: Path, forbidden, more, named
):
    """Half of the seeds of one setting and half of another make a mean of nothing."""
    with pytest.raises(ValueError, match="Expected the settings of the run") as error:
        compared(*flags(ground, copied, "--seeds", "2", *more))
    assert named in str(error.value)


def test_settings_without_effect_may_change(finished: Finished, ground: Path, copied, forbidden):
    """A comparison goes on elsewhere, with another number of processes that read data."""
    more = ["--logging_steps", "3", "--panel_images", "2", "--dataloader_num_workers", "1"]
    _, printed = compared(*flags(ground, copied, "--seeds", "2", *more))
    assert printed.count("complete, not repeated") == 4


@pytest.mark.parametrize(
    ("was", "instead", "named"),
    [
        ('weights": "', 'weights": "0', "the weights of the teacher"),
        ('"updates": 2', '"updates": 4', "updates 4 → 2"),
    ],
)
def test_another_teacher_or_data_under_the_same_name_is_refused(
    finished: Finished, ground: Path, copied: Path, forbidden, was, instead, named
):
    """A teacher that was trained again has the same path and teaches something else."""
    note = copied / "distilled_seed0" / NOTE
    note.write_text(note.read_text().replace(was, instead))
    with pytest.raises(ValueError, match="Expected the settings of the run") as error:
        compared(*flags(ground, copied, "--seeds", "2"))
    assert named in str(error.value)


@pytest.mark.slow
def test_lost_counts_are_counted_again(finished: Finished, ground: Path, copied: Path, forbidden):
    """Between the end of a training and its counts a machine may go down too."""
    lost = copied / "distilled_seed1" / COUNTS
    before = load_counts(lost)
    lost.unlink()
    (copied / "baseline_seed1" / NOTE).unlink()  # as train.py leaves a run
    summary, printed = compared(*flags(ground, copied, "--seeds", "2"))
    for name in ("[3/4] baseline", "[4/4] distilled"):
        assert f"{name} seed 1: trained, its images are to be counted" in printed
    assert np.array_equal(load_counts(lost).student, before.student)
    seconds = [row["train_seconds"] for row in summary["runs"]]
    assert [value is None for value in seconds] == [False, False, True, False]


@pytest.mark.slow
def test_interrupted_run_goes_on_from_its_checkpoint(ground: Path, tmp_path: Path, monkeypatch):
    """Nobody would leave a comparison of days to a machine on which it cannot be interrupted."""
    monkeypatch.setattr(compare, "measure_speed", lambda *args: Speed(1.0, 1.0))
    step, steps = Trainer.training_step, []

    def counting(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counting)
    run = flags(ground, tmp_path, "--epochs", "2", "--seeds", "1", "--only", "baseline")
    with pytest.raises(KeyboardInterrupt):
        compared(*run)
    assert steps == [0, 1, 2, 3]
    summary, printed = compared(*run)
    assert steps[4:] == [2, 3]
    assert "goes on after step 2 of 4" in printed
    assert ", started 2 times" in printed
    assert summary["students"]["baseline"]["train_seconds"] is not None
    # The peak of the first part is not known.
    assert summary["students"]["baseline"]["peak_memory_mib"] is None
    assert list(summary["students"]) == ["baseline"]
    assert "no runs of both kinds" in printed


@pytest.mark.slow
def test_baselines_serve_other_weights_and_temperatures(finished: Finished, ground: Path, tmp_path):
    """Trained again for each of them, half of the time would be spent on the same runs."""
    more = ["--seeds", "2", "--baselines", finished.output]
    other = ["--kl_weight", "1", "--mse_weight", "0", "--temperature_start", "2"]
    summary, printed = compared(*flags(ground, tmp_path / "soft", *map(str, [*more, *other])))
    assert sorted(p.name for p in (tmp_path / "soft").glob("*_seed*")) == NAMES[2:]
    assert "2 runs" in printed
    assert summary["students"]["baseline"] == finished.summary["students"]["baseline"]
    assert summary["students"]["distilled"]["seeds"] == [0, 1]
    assert (
        summary["students"]["distilled"]["metrics"]
        != finished.summary["students"]["distilled"]["metrics"]
    )
    assert summary["students"]["distilled"]["gap_closed"] is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "3"], "baseline of each seed in .*, got none of 2. Finish"),
        (["--seeds", "2", "--bce_weight", "2"], r"got others: bce_weight 0.5 → 2.0"),
        (["--only", "baseline"], "Expected --only or --baselines, got both"),
        (["--merge", "x"], "Expected --merge with .*got --"),
    ],
)
def test_baselines_of_another_comparison_are_refused(
    more: list[str], message: str, finished: Finished, ground: Path, tmp_path, forbidden
):
    """A baseline of other settings is none."""
    with pytest.raises(ValueError, match=message):
        compared(*flags(ground, tmp_path, *more, "--baselines", str(finished.output)))


def carry(finished: Finished, seeds: list[int], folder: Path) -> Path:
    """A folder as somebody brings it from another machine: the small files only."""
    for seed in seeds:
        for kind in ("baseline", "distilled"):
            name = f"{kind}_seed{seed}"
            (folder / name).mkdir(parents=True)
            for file in FILES:
                shutil.copy(finished.output / name / file, folder / name / file)
    return folder


def test_merged_folders_equal_one_folder(finished: Finished, tmp_path: Path, forbidden):
    """Seeds of two machines are a sample like any other, or merging is no use."""
    parts = [carry(finished, [seed], tmp_path / f"machine{seed}") for seed in (1, 0)]
    for path in tmp_path.glob("machine1/*/config.yaml"):  # the same things lie elsewhere there
        config = yaml.safe_load(path.read_text())
        config |= {"dataset": "elsewhere/data", "output_dir": "elsewhere"}
        path.write_text(yaml.safe_dump(config))
    merged = tmp_path / "merged"
    more = ["--output_dir", merged, "--bootstrap", RESAMPLES, "--latency_repeats", "0"]
    summary, printed = compared("--merge", *parts, *more)
    whole = finished.summary | {"costs": {"student": None, "teacher": None, "load": None}}
    assert summary == whole
    assert "not measured" in printed
    assert json.loads((merged / "comparison.json").read_text()) == json.loads(json.dumps(whole))


def test_a_run_that_lies_in_two_folders_counts_once(finished: Finished, tmp_path: Path):
    """Copied twice, it would halve the variance."""
    twice = [carry(finished, [0, 1], tmp_path / "a"), carry(finished, [1], tmp_path / "b")]
    assert len(read_runs(twice)) == 4


def spoil_seed(folder: Path) -> None:
    for kind in ("baseline", "distilled"):
        (folder / f"{kind}_seed1").rename(folder / f"{kind}_seed0")


def spoil_settings(folder: Path) -> None:
    path = folder / "baseline_seed1" / "config.yaml"
    path.write_text(path.read_text().replace("num_train_epochs: 1.0", "num_train_epochs: 9.0"))


def spoil_file(folder: Path) -> None:
    (folder / "baseline_seed1" / COUNTS).unlink()


def spoil_results(folder: Path) -> None:
    (folder / "baseline_seed1" / "results.json").write_text('{"student_mi')


def spoil_figures(folder: Path) -> None:
    (folder / "baseline_seed1" / "results.json").write_text('{"student_miou": null}')


def spoil_counts(folder: Path) -> None:
    (folder / "baseline_seed1" / COUNTS).write_bytes(b"this is no archive")


def spoil_images(folder: Path) -> None:
    path = folder / "baseline_seed1" / COUNTS
    counts = load_counts(path)
    student = counts.student.copy()
    student[:2, 0] += [1, -1]  # the same sums, so the same figures, of other pictures
    replace(counts, student=student).save(path)


def spoil_student(folder: Path) -> None:
    path = folder / "distilled_seed1" / COUNTS
    load_counts(folder / "baseline_seed1" / COUNTS).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_seed, "Expected one run of baseline seed 0, got two"),
        (spoil_settings, "num_train_epochs 1.0 → 9.0"),
        (spoil_file, "without ['image_counts.npz']"),
        (spoil_results, "got: Unterminated string"),
        (spoil_figures, "without its figures"),
        (spoil_counts, "a file that cannot be read"),
        (spoil_images, "measured on the same images"),
        (spoil_student, "of one student"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(
    finished: Finished, tmp_path: Path, spoil, message
):
    """Merged without a word, they would give a table that means nothing."""
    parts = [carry(finished, [seed], tmp_path / f"machine{seed}") for seed in (0, 1)]
    spoil(parts[1])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_runs(parts)
    assert message in str(error.value)


def made(kind: str, seed: int, wrong: int, **notes: Any) -> FinishedRun:
    """A run on two images of 100 pixels, half foreground, of which `wrong` are missed in each."""
    row = np.array([[50, 0, wrong, 50 - wrong, 40, 50, 50, 50]] * 2, np.int32)
    teacher = np.array([[50, 0, 0, 50, 50, 50, 50, 50]] * 2, np.int32)
    iou = (50 / (50 + wrong) + (50 - wrong) / 50) / 2
    return FinishedRun(
        kind,
        seed,
        Path(f"{kind}_seed{seed}"),
        {"num_labels": 2, "image_size": 64, "seed": seed, "teacher": kind},
        {"student_miou": iou, "train_seconds": 90.0, "peak_memory_mib": 512.0, "epochs": 12},
        {"starts": 1, "memory_is_its_own": True, "updates": 24, **notes},
        ImageCounts(row, teacher, row),
    )


def miou_of(wrong: int) -> float:
    return (50 / (50 + wrong) + (50 - wrong) / 50) / 2


def table_of(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Header and rows, by their first cell, of the table under Quality."""
    lines = text.split("## Quality")[1].split("## Cost")[0].splitlines()
    cells = [[c.strip() for c in x.strip().strip("|").split("|")] for x in lines if x[:1] == "|"]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


def test_table_says_what_was_counted_by_hand():
    """The table is what is read; everything before it may be right and it still wrong."""
    runs = [made("baseline", s, w) for s, w in ((0, 20), (1, 24))]
    runs += [made("distilled", s, w) for s, w in ((0, 10), (1, 12))]
    check_comparable(runs)
    summary = summarise(runs, 50) | {"costs": {"student": None, "teacher": None, "load": None}}
    baseline, distilled = [miou_of(20), miou_of(24)], [miou_of(10), miou_of(12)]
    closed = (np.mean(distilled) - np.mean(baseline)) / (1 - np.mean(baseline))
    variance = sem(distilled) ** 2 + (1 - closed) ** 2 * sem(baseline) ** 2
    error = np.sqrt(variance) / (1 - np.mean(baseline))
    gap = summary["students"]["distilled"]["gap_closed"]
    assert gap["value"] == pytest.approx(closed)
    assert gap["standard_error"] == pytest.approx(error)
    assert gap["conditional_on_the_teacher"]
    text = markdown(summary)
    assert f"Gap closed G = {closed:.3f} ± {error:.3f}" in text
    header, rows = table_of(text)
    assert header[:4] == ["", "seeds", "mIoU", "gap closed"]
    cells = [f"{np.mean(v):.4f} ± {sem(v):.4f}" for v in (baseline, distilled)]
    assert rows["teacher"][:3] == ["", "1.0000", "—"]
    assert rows["baseline"][:3] == ["2", cells[0], "—"]
    assert rows["distilled"][:3] == ["2", cells[1], f"{closed:.3f} ± {error:.3f}"]
    # Every image is the same, so another sample of images changes nothing.
    difference = np.mean(distilled) - np.mean(baseline)
    assert f"{difference:+.4f}, 95% interval {difference:+.4f} to {difference:+.4f}" in text
    assert "24 steps each" in text
    assert "1 min" not in text
    assert text.count("90 s") == 6


def test_unknown_figures_are_not_invented():
    """A 0, or the figure of another run, would be read as measured."""
    runs = [made("baseline", 0, 20, starts=2), made("distilled", 0, 10, memory_is_its_own=False)]
    summary = summarise(runs, 50) | {"costs": {"student": None, "teacher": None, "load": None}}
    assert summary["students"]["baseline"]["train_seconds"] is None
    assert summary["students"]["distilled"]["train_seconds"]["mean"] == 90
    assert summary["students"]["distilled"]["peak_memory_mib"] is None
    text = markdown(summary)
    assert "one seed" in text
    assert "cannot be said whether the gap is large enough" in text
    (line,) = [x for x in text.splitlines() if x.startswith("| teacher | not measured")]
    assert line.count("not measured") == 5
    assert text.count("Not measured.") == 1  # latency


def test_runs_of_other_budgets_are_refused():
    """More updates for one side is the oldest way to win a comparison."""
    with pytest.raises(ValueError, match="updates 24 → 48"):
        check_comparable([made("baseline", 0, 20), made("distilled", 0, 10, updates=48)])


def test_metrics_of_the_report_are_those_the_counts_have():
    """A misspelt name would be `not measured` for ever."""
    assert set(METRICS) <= made("baseline", 0, 5).figures["student"].keys()


SETTINGS = {
    "output_dir": "runs/never",
    "teacher": "teacher",
    "unlabelled": "more",
    "num_train_epochs": 8,
    "warmup_epochs": 2,
    "unfreeze_start_epoch": 2,
    "unfreeze_every": 1,
    "use_cpu": True,
    "report_to": "none",
}


BUDGET = Budget(800, {"baseline": 40, "distilled": 100}, {"baseline": 80, "distilled": 200})


@pytest.mark.parametrize("more", [{}, {"plan_epochs": 50.0}])
def test_learning_rates_of_both_kinds_are_those_of_the_same_steps(more: dict, tmp_path: Path):
    """Fewer images a pass would else mean another warm-up; scaled twice, one of twice the steps."""
    settings = SETTINGS | {"output_dir": str(tmp_path / "never")} | more
    distilled = build(settings).training
    baseline = build(baseline_settings(settings, distilled, BUDGET)).training
    tables = baseline.schedule(7, 20.0, 40), distilled.schedule(7, 8.0, 100)
    for step in range(0, 800, 7):
        rates = [table.rate_at(step / table.steps_per_epoch) for table in tables]
        assert rates[0] == pytest.approx(rates[1])


def test_baseline_without_the_unlabelled_images_keeps_the_steps(tmp_path: Path):
    """Fewer images a pass would else mean fewer steps, and units that are freed later."""
    settings = SETTINGS | {"output_dir": str(tmp_path / "never")}
    distilled = build(settings).training
    run = build(baseline_settings(settings, distilled, BUDGET))
    baseline = run.training
    assert (run.model.teacher, run.data.unlabelled) == ("none", None)
    assert (baseline.max_steps, baseline.num_train_epochs) == (800, 20)
    assert (baseline.eval_strategy, baseline.eval_steps) == ("steps", 100)
    assert (baseline.save_strategy, baseline.save_steps) == ("steps", 100)
    tables = baseline.schedule(7, 20.0, 40), distilled.schedule(7, 8.0, 100)
    freed = [[table.free_from(f"unit_{u}") for u in range(7)] for table in tables]
    steps = np.array(freed[0]) * 40, np.array(freed[1]) * 100
    # The first unit is freed at the nearest epoch, the distance between units is rounded too.
    assert steps[0][-1] == steps[1][-1] == 200
    assert baseline.unfreeze_every == 2
    assert "20 epochs of 80 images, the distilled student in 8 of 200" in BUDGET.sentence()


@pytest.mark.parametrize("more", [{}, {"plan_epochs": 50.0, "weight_schedule": ["bce=0:1,9:2"]}])
def test_runs_of_stretched_settings_are_compared(more: dict, tmp_path: Path):
    """What is stretched on purpose would be refused as another setting, after all trainings."""
    settings = SETTINGS | {"output_dir": str(tmp_path / "never")} | more
    run = build(settings)
    alone = build(baseline_settings(settings, run.training, BUDGET))
    left_out = BUDGET.left_out
    runs = [
        replace(made("baseline", 0, 20, left_out=left_out), config=alone.resolved()),
        replace(made("distilled", 0, 10), config=run.resolved()),
    ]
    check_comparable(runs)
    other = replace(runs[1], config=run.resolved() | {"encoder_lr_scale": 0.7})
    with pytest.raises(ValueError, match="encoder_lr_scale"):
        check_comparable([runs[0], other])


@pytest.mark.slow
def test_runs_with_unlabelled_images_make_the_same_updates(ground: Path, tmp_path: Path):
    """The arithmetic of the plan is worth nothing if the Trainer counts otherwise."""
    more = ["--seeds", "1", "--unlabelled", str(ground / "data" / "validation" / "images")]
    summary, printed = compared(*flags(ground, tmp_path / "out", "--epochs", "2", *more))
    assert "cannot use the 3 images without masks" in printed
    assert summary["students"]["baseline"]["left_out"] == 3
    for kind in ("baseline", "distilled"):
        folder = tmp_path / "out" / f"{kind}_seed0"
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["global_step"] == 6
        assert len(json.loads((folder / "results.json").read_text())["eval_history"]) == 2
    assert (
        summary["students"]["baseline"]["epochs"],
        summary["students"]["distilled"]["epochs"],
    ) == (3, 2)
    assert "leaves out 3 images" in (tmp_path / "out" / "comparison.md").read_text()


def test_dry_run_shows_both_plans_and_trains_nothing(ground: Path, tmp_path: Path, forbidden):
    """A plan is read before a week is spent."""
    summary, printed = compared(*flags(ground, tmp_path / "out", "--seeds", "1", "--dry_run"))
    assert summary == {}
    assert printed.count("## Timeline") == 2
    assert "- distilled seed 0: to train" in printed
    assert not (tmp_path / "out").exists()


def planned(folder: Path, **options: Any) -> PlannedRun:
    run = build(
        SETTINGS | {"output_dir": str(folder), "unlabelled": None, "report": False} | options
    )
    budget = Budget(800, {"baseline": 100, "distilled": 100}, {"baseline": 1, "distilled": 1})
    return PlannedRun("distilled", 0, run, run, budget, None)


def test_runs_of_a_comparison_write_no_page_that_nobody_asked_for():
    """Six of them would cost six more passes over the evaluation images."""
    assert parse_comparison(["--dataset", "x"]).variants[0].settings["report"] is False
    assert (
        parse_comparison(["--dataset", "x", "--report", "true"]).variants[0].settings["report"]
        is True
    )


def test_estimate_is_updates_and_evaluations(tmp_path: Path):
    """A checkpoint that is not counted, or an evaluation, doubles the time that is told."""
    one, speed = planned(tmp_path), Speed(update=2.0, image=0.5)
    evaluation = 0.5 * 10
    assert seconds_left(one, speed, 10) == pytest.approx(1600 + 8 * evaluation + 2 * evaluation)
    for update in (600, 200):
        (tmp_path / f"checkpoint-{update}").mkdir()
        complete(tmp_path / f"checkpoint-{update}", {})
    (tmp_path / "checkpoint-700").mkdir()  # cut off while it was written
    assert seconds_left(one, speed, 10) == pytest.approx(400 + 2 * evaluation + 2 * evaluation)
    (tmp_path / "results.json").write_text('{"student_miou": 0.5, "train_seconds": 400}')
    assert seconds_left(one, speed, 10) == pytest.approx(evaluation)
    for name in (COUNTS, NOTE):
        (tmp_path / name).touch()
    assert seconds_left(one, speed, 10) == 0
    steps = {f"{what}_strategy": "steps" for what in ("eval", "save")}
    often = planned(tmp_path / "other", **steps, eval_steps=50, save_steps=50)
    assert seconds_left(often, speed, 10) == pytest.approx(1600 + 18 * evaluation)


def test_estimate_learns_from_whole_runs_only(tmp_path: Path):
    """The time of the last part of an interrupted run would promise too much."""
    one = planned(tmp_path)
    (tmp_path / "results.json").write_text('{"student_miou": 0.5, "train_seconds": 400}')
    assert finished_speed(one) is None
    (tmp_path / NOTE).write_text('{"starts": 2}')
    assert finished_speed(one) is None
    (tmp_path / NOTE).write_text('{"starts": 1}')
    assert finished_speed(one) == Speed(0.5, 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (99, "99 s"), (119, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")],
)
def test_times_are_told_as_people_do(seconds: float, text: str):
    """7500 s says nothing to anybody."""
    assert duration(seconds) == text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot reset its peak")
def test_peak_memory_is_counted_anew():
    """The second run would else be charged with the memory of the first."""
    block = np.ones(2**25)  # 256 MiB
    high = peak_memory_mib()
    del block
    assert reset_peak_memory()
    assert peak_memory_mib() < high - 200
