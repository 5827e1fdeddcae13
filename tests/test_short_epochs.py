"""Epochs that are shorter than announced: counted, trained to the end and resumed all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from same_run import assert_resumes_exactly
from test_resume import maker
from tiny import SIDE, arguments, tiny_student
from transformers import TrainerCallback

from kd_trainer.data import StreamedDataset
from kd_trainer.data.images import BadSampleError
from kd_trainer.data.streaming import with_lengths
from kd_trainer.trainer import DistillationTrainer

EPOCHS = 6


class Transform:
    """Squares whose place is drawn from epoch and row; some rows cannot be used."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.bad = bad
        self.calls: list[tuple[int, int]] = []

    def __call__(self, row: dict[str, Any], *, epoch: int, index: int) -> dict[str, torch.Tensor]:
        self.calls.append((epoch, index))
        if index in self.bad:
            raise BadSampleError(f"Expected an image, got row {index}.")
        draw = np.random.default_rng([epoch, index])
        labels = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        top, left = draw.integers(0, SIDE // 2, 2)
        labels[top : top + 16, left : left + 16] = 1
        return {
            "pixel_values": (labels * 200).repeat(3, 1, 1),
            "labels": labels,
            "distil_mask": torch.ones(SIDE, SIDE, dtype=torch.bool),
        }


def stream(rows: int = 8, bad: tuple[int, ...] = (3,), **options: Any) -> StreamedDataset:
    columns = {"image": [{"path": f"{i}.png"} for i in range(rows)], "mask": [0] * rows}
    data = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    return StreamedDataset(
        with_lengths(data, [rows]),
        Transform(bad),
        batch_size=2,
        max_bad_share=0.9,
        **{"shuffle": True, "seed": 1, **options},
    )


class Watch(TrainerCallback):
    """What is in use at each update, and in which epoch of the Trainer's loop."""

    def __init__(self) -> None:
        self.trainer: DistillationTrainer | None = None
        self.loops = -1
        self.seen: list[tuple[int, int, float, float]] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.loops += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        temperature = trainer.schedule.temperature(state.global_step)
        rate = trainer.optimizer.param_groups[0]["lr"]
        self.seen.append((self.loops, kwargs["model"].free_units, temperature, rate))


class EndAfter(TrainerCallback):
    """Ends some epochs after their first updates."""

    def __init__(self, updates: int, epochs: range) -> None:
        self.updates, self.epochs = updates, epochs
        self.epoch, self.first = -1, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch, self.first = self.epoch + 1, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.epoch in self.epochs and state.global_step - self.first == self.updates:
            control.should_epoch_stop = True


def watched_run(folder: Path, data: Any, *callbacks: Any, **options: Any) -> Any:
    watch = Watch()
    settings = {"num_train_epochs": EPOCHS, "unfreeze_start_epoch": 1, "unfreeze_every": 1}
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(folder, **(settings | options)),
        train_dataset=data,
        callbacks=[watch, *callbacks],
    )
    watch.trainer = trainer
    trainer.train()
    return trainer, watch.seen


@pytest.mark.parametrize("short", ["bad row", "callback"])
def test_schedules_follow_the_epochs_and_not_the_number_of_updates(tmp_path: Path, short: str):
    """Derived from updates of full epochs, the last unit is never freed and the cosine never ends.

    Of 8 rows in batches of 2 one cannot be used, or each epoch is ended after 3 of 4 updates.
    """
    rows = stream() if short == "bad row" else stream(bad=())
    callbacks = [] if short == "bad row" else [EndAfter(3, range(EPOCHS))]
    trainer, seen = watched_run(tmp_path, rows, *callbacks)
    assert [epoch for epoch, *_ in seen] == [e for e in range(EPOCHS) for _ in range(3)]
    args = trainer.args
    for epoch, free, temperature, _ in seen:
        assert free == args.unfreezing(trainer.schedule.unfreezing.units)(epoch)
        assert temperature == pytest.approx(args.temperature(epoch / (EPOCHS - 1)))
    firsts = {epoch: rate for epoch, _, _, rate in reversed(seen)}
    for epoch, rate in firsts.items():
        assert rate == pytest.approx(1e-3 * trainer.schedule.rate_at(epoch))
    drawn = {index: [e for e, i in rows.transform.calls if i == index] for index in (0, 1)}
    if short == "bad row":
        assert drawn[0] == list(range(EPOCHS))  # never the same augmentation twice
        last = trainer.lr_scheduler.get_last_lr()[0]
        assert last == pytest.approx(args.min_learning_rate)
        assert trainer.state.epoch == EPOCHS


def test_known_bad_rows_shorten_the_stream_from_the_next_epoch_on():
    """A length that stays wrong leaves each epoch's last update without its micro-batches."""
    rows = stream(bad=(0, 3, 5))
    assert len(rows) == 8
    list(rows)
    assert len(rows) == 8  # not within the epoch
    rows.set_epoch(1)
    assert (len(rows), rows.announced) == (5, 8)
    assert sorted(bad.row for bad in rows.left_out) == [0, 3, 5]


def test_batches_without_known_bad_rows_do_not_depend_on_the_workers():
    """Rows that are still counted would go to one worker, which then has a short batch more."""
    batches = []
    for workers in (0, 2):
        rows = stream(rows=14, bad=(1, 2, 5))
        list(rows)
        rows.set_epoch(1)
        loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=workers)
        batches.append([batch["pixel_values"] for batch in loader])
        assert len(loader) == len(batches[-1]) == 6
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


@pytest.mark.parametrize(("options", "updates"), [({}, 18), ({"max_steps": 11}, 11)])
def test_a_run_of_short_epochs_has_the_length_it_was_given(
    tmp_path: Path, options: dict[str, Any], updates: int
):
    """`--max_steps` counts updates, `--epochs` epochs, however long these turn out to be."""
    trainer, _ = watched_run(tmp_path, stream(), **options)
    assert trainer.state.global_step == updates
    assert trainer.state.epoch == pytest.approx(updates / 3)
    last = trainer.lr_scheduler.get_last_lr()[0]
    assert last == pytest.approx(trainer.args.min_learning_rate)


def test_half_an_epoch_at_the_end_is_half_of_a_short_one(tmp_path: Path):
    """Ended by the number of updates that was expected, it would be a whole one."""
    trainer, _ = watched_run(tmp_path, stream(rows=16, bad=(0, 1, 2, 3)), num_train_epochs=1.5)
    assert trainer.state.global_step == 6 + 3
    assert trainer.state.epoch == 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (8, {}),
        (8, {"max_steps": 10}),
        (12, {"gradient_accumulation_steps": 2}),  # an epoch of 5 micro-batches leaves one over
    ],
)
def test_run_of_short_epochs_is_resumed_exactly(tmp_path: Path, rows: int, options: dict[str, Any]):
    """Inside epochs, at their ends, and before the first one is known to be short."""
    data: list[Callable[[], StreamedDataset]] = [lambda: stream(rows=rows)]

    def make(folder: Path, **more: Any) -> DistillationTrainer:
        return maker(
            data[0](),
            num_train_epochs=4,
            logging_steps=2,
            unfreeze_start_epoch=1,
            unfreeze_every=1,
            warmup_epochs=1,
            **options,
        )(folder, **more)

    torch.manual_seed(0)
    assert_resumes_exactly(make, tmp_path, [1, 2, 3, 4, 6])


@pytest.mark.slow
def test_run_whose_epochs_a_callback_ends_is_resumed_exactly(tmp_path: Path):
    """The epoch of a checkpoint cannot be told from its number of updates."""
    first = maker(stream(bad=()), num_train_epochs=4, logging_steps=2, unfreeze_every=1)

    def make(folder: Path, **more: Any) -> DistillationTrainer:
        trainer = first(folder, **more)
        trainer.add_callback(EndAtUpdates((2, 5, 8)))
        return trainer

    assert_resumes_exactly(make, tmp_path, [1, 2, 4, 5])


class EndAtUpdates(TrainerCallback):
    """Ends the epoch at certain updates: all that a resumed run knows too."""

    def __init__(self, updates: tuple[int, ...]) -> None:
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step in self.updates
