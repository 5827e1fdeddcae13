"""Trainings with cached targets: what they learn from, what they leave out, how they go on."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from same_run import assert_resumes_exactly
from small_runs import save_network, train_flags, write_pairs
from test_distributed import launch
from test_resume import maker
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.build import build_run
from kd_trainer.checkpointing.fingerprint import differences, settings_of
from kd_trainer.commands.train import run_train, train
from kd_trainer.config import parse
from kd_trainer.data import TransformedDataset, load_splits, transforms
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import run_script
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_cache import cached_images
from kd_trainer.teacher_targets import cache_root, use_cached_targets
from kd_trainer.trainer import DistillationTrainer

CACHED = {"teacher_targets": "cached"}


class WithLogits(Squares):
    """Squares with the teacher's logits beside them."""

    def __init__(self, length: int, *, offset: int = 0) -> None:
        super().__init__(length, offset=offset)
        self.teacher = tiny_teacher()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        pixels = sample["pixel_values"][None]
        logits = self.teacher(normalise(pixels, pixel_statistics(self.teacher, "cpu")))[0]
        return sample | {"teacher_logits": logits.half()}


def calls_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that any teacher is shown from now on."""
    seen: list[int] = []
    forward = Teacher.forward

    def counted(self: Teacher, pixel_values: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(Teacher, "forward", counted)
    return seen


def trained(folder: Path, **options: Any) -> DistillationTrainer:
    cached = options.get("teacher_targets") == "cached"
    kind = WithLogits if cached else Squares
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(folder, eval_strategy="epoch", load_best_model_at_end=False, **options),
        teacher=tiny_teacher(),
        train_dataset=kind(6),
        eval_dataset=kind(5, offset=50),
    )
    trainer.train()
    return trainer


def figures(trainer: DistillationTrainer, kind: str) -> list[dict[str, float]]:
    """What was logged, but for times; of evaluations or of steps."""
    times = ("runtime", "per_second")
    logs = [log for log in trainer.state.log_history if (kind in log)]
    return [{k: v for k, v in log.items() if not k.endswith(times)} for log in logs]


def test_cached_logits_train_and_evaluate_as_the_teacher_would(tmp_path: Path):
    """On clean images both are the same: every figure of each step and each evaluation."""
    online, cached = trained(tmp_path / "a"), trained(tmp_path / "b", **CACHED)
    for kind in ("loss", "eval_miou"):
        one, other = figures(online, kind), figures(cached, kind)
        assert len(one) == len(other) == {"loss": 6, "eval_miou": 2}[kind]
        for expected, found in zip(one, other, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=2e-2, abs=2e-3), name
    # Counts do not feel half precision, unless a student changed with the rounding of its targets.
    first = figures(online, "eval_miou")[0], figures(cached, "eval_miou")[0]
    for name in ("eval_teacher_miou", "eval_teacher_dice"):
        assert first[0][name] == first[1][name]


def test_the_teacher_is_not_asked_in_training_nor_at_evaluations(tmp_path: Path, monkeypatch):
    """Else the cache would cost disk and save nothing."""
    data = (WithLogits(6), WithLogits(5, offset=50))
    samples = [[one[i] for i in range(len(one))] for one in data]
    teacher = tiny_teacher()
    seen = calls_of_the_teacher(monkeypatch)
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, eval_strategy="epoch", panel_images=2, **CACHED),
        teacher=teacher,
        train_dataset=samples[0],
        eval_dataset=samples[1],
    )
    trainer.train()
    assert seen == []
    assert len(list((tmp_path / "panels").glob("*.png"))) == 2


def test_a_teacher_that_is_not_needed_stays_where_it_is(tmp_path: Path):
    """Its weights would take memory of the device for nothing."""
    moved: list[Any] = []

    class Spy(Teacher):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            moved.append(args)
            return super().to(*args, **kwargs)

    for targets in ("cached", "online"):
        args = arguments(tmp_path, teacher_targets=targets)
        teacher = Spy(tiny_student(), num_labels=2)
        trainer = DistillationTrainer(tiny_student(), args, teacher=teacher)
        with suppress(ValueError):  # these samples have no cached logits
            trainer.evaluate(Squares(2))
        assert bool(moved) == (targets == "online")


def test_samples_without_logits_are_refused_instead_of_asking(tmp_path: Path):
    """A data set without its cache would train online and look as if it were cached."""
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, **CACHED),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    with pytest.raises(ValueError, match="Expected teacher_logits in every sample"):
        trainer.train()


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path):
    """The logits come from the disk in all parts, moved by each sample's own draw."""
    data = DataArguments(
        dataset="synthetic",
        image_size=SIDE,
        synthetic_train=6,
        synthetic_eval=3,
        augmentation="light",
    )
    splits = load_splits(data)
    both = zip(splits.values(), transforms(splits, data, seed=0), strict=True)
    train, evaluated = (TransformedDataset(rows, transform) for rows, transform in both)
    args = arguments(tmp_path, **CACHED, teacher_cache=str(tmp_path / "cache"))
    use_cached_targets(args, tiny_teacher(), [train, evaluated])
    make = maker(train, evaluated, eval_strategy="steps", eval_steps=1, **CACHED)
    assert_resumes_exactly(make, tmp_path / "runs", [1, 3, 5])


def test_where_the_logits_lie_is_no_part_of_a_run_but_their_kind_is(tmp_path: Path):
    """Cached and online are different losses; a cache that was moved is still the same."""
    one = settings_of(arguments(tmp_path, **CACHED))
    moved = settings_of(
        arguments(tmp_path, **CACHED, teacher_cache=str(tmp_path / "x"), teacher_cache_size="1GB")
    )
    assert differences(one, moved) == []
    found = differences(settings_of(arguments(tmp_path)), one)
    assert [(d.name, d.before, d.now) for d in found] == [("teacher_targets", "online", "cached")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any) -> Path:
    """`data` with three classes, `more` photographs without masks, `teacher`."""
    root = tmp_path_factory.mktemp("ground")
    write_pairs(root / "data", num_labels=3)
    extra = write_pairs(root / "extra", num_labels=5, train=3, validation=1)
    (extra / "train" / "images").rename(root / "more")
    save_network(root / "teacher", num_labels=3)
    return root


def flags(ground: Path, output: Path, *more: str) -> list[str]:
    own = ["--num_labels", "3", "--unlabelled", str(ground / "more"), *more]
    return train_flags(ground / "data", output, *own, teacher=ground / "teacher")


def cached(cache: Path) -> list[str]:
    return ["--teacher_targets", "cached", "--teacher_cache", str(cache)]


def test_a_run_asks_for_every_image_once_and_a_second_one_for_none(
    ground: Path, tmp_path: Path, monkeypatch, capsys
):
    """Photographs without masks among them; the final figures, in fp32, ask the teacher itself."""
    seen = calls_of_the_teacher(monkeypatch)
    results = []
    for number in range(2):
        output = tmp_path / f"run{number}"
        results.append(train(parse(flags(ground, output, *cached(tmp_path / "cache")))))
        told = capsys.readouterr().out
        new = 0 if number else 16
        assert f"teacher cache: 16 images, {new} of them new" in told
        # Eight of them are also measured, one is looked at to fold the teacher; the five of the
        # evaluation come in batches at the end.
        assert seen == [1] * ((new + 8 + 1) if new else 0) + [4, 1]
        seen.clear()
    for name in ("student_miou", "agreement", "teacher_miou"):
        assert results[0][name] == results[1][name]


def test_a_run_learns_from_its_own_teacher_and_images(ground: Path, tmp_path: Path):
    """The logits of each sample, augmented or not, are the teacher's of that very image."""
    run = parse(flags(ground, tmp_path, "--augmentation", "none", *cached(tmp_path / "cache")))
    parts = build_run(run)
    use_cached_targets(run.training, parts.teacher, [parts.train_dataset, parts.eval_dataset])
    statistics = pixel_statistics(parts.teacher, "cpu")
    for dataset in (parts.train_dataset, parts.eval_dataset):
        for index in range(len(dataset)):
            sample = dataset[index]
            own = parts.teacher(normalise(sample["pixel_values"][None], statistics))[0]
            found = sample["teacher_logits"].float()
            np.testing.assert_allclose(found.numpy(), own.numpy(), rtol=1e-3, atol=1e-5)
    assert len(parts.train_dataset) == 11


@pytest.mark.distributed
def test_two_processes_of_a_run_fill_one_folder_and_train_from_it(ground: Path, tmp_path: Path):
    """Each image once, whichever process asked for it; and both read what the other wrote."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = [*flags(ground, run, *cached(cache)), "--batch_size", "1", "--epochs", "1"]
    launch(str(Path(__file__).parents[1] / "scripts" / "train.py"), *words)
    assert (run / "results.json").is_file()
    (file,) = cache.iterdir()
    assert len(cached_images(file)) == 16
    assert yaml.safe_load((run / "config.yaml").read_text())["teacher_targets"] == "cached"
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["max_steps"] == 5  # of 11 images, two at a time: there were two processes


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch):
    """Runs of several seeds share what they would else compute once each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    args = arguments(tmp_path, **CACHED)
    assert cache_root(args) == tmp_path / "own" / "kd_trainer" / "teacher_logits"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(args) == tmp_path / ".cache" / "kd_trainer" / "teacher_logits"


def script(*words: str) -> int:
    """Exit code of scripts/train.py."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_train(parse(words)) and sys.exit(0))
    return int(ended.value.code)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher_targets", "kept"], "one of online, cached, got 'kept'"),
        (["--teacher_cache", "x"], "--teacher_targets cached with --teacher_cache x, got online"),
        (["--teacher_cache_size", "5GB"], "cached with --teacher_cache_size 5GB, got online"),
        (["--teacher_targets", "cached", "--teacher_cache_size", "5 houses"], "as 20GB, 500MB"),
        (["--teacher_targets", "cached", "--streaming"], "got --streaming"),
        (["--teacher_targets", "cached", "--teacher_cache_size", "9kB"], "(--teacher_cache_size)"),
    ],
)
def test_wrong_use_ends_in_one_line(ground: Path, tmp_path: Path, capsys, more, message):
    """A flag that does nothing, or fails after an hour, is worse than an error."""
    if "9kB" in more:
        more = [*more, "--teacher_cache", str(tmp_path / "cache")]
    assert script(*flags(ground, tmp_path / "out", *more)) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: Expected")
    assert message in told


def test_a_run_without_a_teacher_has_nothing_to_cache(ground: Path, tmp_path: Path, capsys):
    words = train_flags(ground / "data", tmp_path, "--num_labels", "3", *cached(tmp_path / "cache"))
    assert script(*words) == 1
    assert "Expected a --teacher with --teacher_targets cached" in capsys.readouterr().err
