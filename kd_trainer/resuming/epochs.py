"""Epochs that are counted, not derived from the number of updates.

The Trainer takes each epoch to be as long as the loader says at the start. A stream that leaves
rows out, or a callback that ends an epoch, makes it shorter: `state.epoch` and every schedule over
updates would then lag behind, and a resumed run would start in an earlier epoch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from kd_trainer.data import BadSample, StreamedDataset
from kd_trainer.schedules import RunningEpoch, TrainingSchedule


class CountedTrainer(Trainer):
    """Knows in which epoch it is, and how long that one is.

    Attributes:
        schedule: what happens when, for the length that the running epoch has.
        running: the running epoch; one object, which callbacks hold too.
    """

    schedule: TrainingSchedule
    running: RunningEpoch

    def saved_position(self) -> dict[str, Any] | None:
        """`position` of the checkpoint that the run goes on from, or None."""
        return None

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """As many epochs as `--max_steps` can need: one may be as short as a single update."""
        values = super().set_initial_training_values(args, dataloader)
        self.running.index = self.running.first_update = 0
        self._set_length(values[1])
        return (max(values[0], args.max_steps), *values[1:])

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Where to start: the counted epoch, and the batches of it that were trained on."""
        index, batches = super()._init_training_state(max_steps, updates, epochs, *rest)
        first = self.state.global_step - batches // self.args.gradient_accumulation_steps
        saved = self.saved_position()
        if saved is not None:
            index, first = saved["epoch"], saved["first_update"]
            if not self.args.ignore_data_skip:
                done = self.state.global_step - first
                batches = done * self.args.gradient_accumulation_steps
            if isinstance(self.train_dataset, StreamedDataset):
                self.train_dataset.restore([BadSample(**bad) for bad in saved["bad_samples"]])
        if 0 < self.args.max_steps <= self.state.global_step:
            index = epochs  # nothing is left to do
        running = self.running
        running.index, running.first_update = index, first
        running.over = running.entered = False
        return index, batches

    def _run_epoch(  # type: ignore[override] # all are given by name
        self,
        *,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        **rest: Any,
    ) -> None:
        """With the length that the loader has now."""
        if has_length(train_dataloader):
            steps_in_epoch = len(train_dataloader)
            num_update_steps_per_epoch = self._updates_of(train_dataloader)
        super()._run_epoch(
            train_dataloader=train_dataloader,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **rest,
        )

    def begin_epoch(self, loader: Any) -> None:
        """Count, tell the data its epoch, and set the schedules to the length of this one."""
        running = self.running
        if running.entered:
            running.index += 1
            running.first_update = self.state.global_step
        running.entered, running.over = True, False
        self.state.epoch = max(self.state.epoch or 0.0, float(running.index))
        # accelerate forwards it neither to several processes nor in a resumed epoch.
        set_epoch = getattr(loader.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(running.index)
        if has_length(loader):
            self._set_length(self._updates_of(loader))
        self._set_rates()
        # Micro-batches that a short epoch left behind filled no update, and a checkpoint does not
        # hold their gradients.
        assert self.model is not None
        self.model.zero_grad()

    def position(self) -> dict[str, Any]:
        """What a resumed run has to know of the epochs, as plain values."""
        running, stream = self.running, self.train_dataset
        over = running.over or self.control.should_epoch_stop
        bad = []
        if isinstance(stream, StreamedDataset):
            bad = stream.bad_samples if over else stream.left_out
        return {
            "epoch": running.index + over,
            "first_update": self.state.global_step if over else running.first_update,
            "bad_samples": [asdict(sample) for sample in bad],
        }

    def _updates_of(self, loader: Any) -> int:
        return max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))

    def _set_length(self, updates: int) -> None:
        """Fit the run's length to epochs of so many updates from the running one on."""
        args, running = self.args, self.running
        missed = running.index * updates - running.first_update
        if args.max_steps > 0:
            epochs = (args.max_steps + missed) / updates
        else:
            epochs = args.num_train_epochs
            self.state.max_steps = math.ceil(epochs * updates) - missed
        self.schedule = replace(
            self.schedule, epochs=epochs, steps_per_epoch=updates, missed=missed
        )

    def _set_rates(self) -> None:
        """Of the next update, which were computed at the end of an epoch that was short."""
        scheduler = self.lr_scheduler
        if not (self._created_lr_scheduler and isinstance(scheduler, LambdaLR)):
            return
        rates = [
            base * rate(scheduler.last_epoch)
            for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


class EpochCounter(TrainerCallback):
    """Tells the trainer where epochs begin and end; before all callbacks that ask it."""

    def __init__(self, trainer: CountedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Go on to this epoch."""
        self.trainer.begin_epoch(kwargs["train_dataloader"])

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note that it is over; one whose data came to its end was a whole one."""
        running = self.trainer.running
        running.over = True
        if not (control.should_epoch_stop or control.should_training_stop):
            state.epoch = float(running.index + 1)
