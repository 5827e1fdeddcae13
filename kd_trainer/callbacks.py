"""What happens between epochs: they are counted, units are freed, a run is kept, panels are drawn.

What is free, and at which rate, follows from the epoch alone. It is counted and saved, so a resumed
run frees the same units as one that was never interrupted.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import has_length

from kd_trainer.data import BadSample, StreamedDataset
from kd_trainer.evaluation import visible_images
from kd_trainer.optim import NamedParameters, PartLR, parameter_groups, regroup
from kd_trainer.reports.panels import comparison_panel, save_image
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.students import set_free_units

# TensorBoard's files only grow, and its page shows ten images of a run.
_SHOWN_PARTS = 10


class EpochCounter(TrainerCallback):
    """Counts epochs, and fits the schedules and the run's length to how long they are.

    The Trainer takes each epoch to be as long as the loader says at the start. A stream that leaves
    rows out, or a callback that ends an epoch, makes it shorter: `state.epoch` and every schedule
    over steps would then lag behind, and a resumed run would start in an earlier epoch.

    Attributes:
        schedule: what happens when, for the length that the running epoch has.
        index: of the running epoch, from 0.
        first_step: steps of the run before it.
    """

    def __init__(self, schedule: TrainingSchedule) -> None:
        self.schedule = schedule
        self.index = 0
        self.first_step = 0
        self._over = False
        self._entered = False

    def start(self, args: TrainingArguments, state: TrainerState, steps: int) -> None:
        """Begin a run at epoch 0, with epochs of so many steps."""
        self.index = self.first_step = 0
        self._over = self._entered = False
        self._fit_to(steps, args, state)

    def go_on(self, index: int, first_step: int) -> None:
        """Go on in a later epoch, which was begun before that step."""
        self.index, self.first_step = index, first_step

    def position(self, state: TrainerState, control: TrainerControl, data: Any) -> dict[str, Any]:
        """What a resumed run has to know of the epochs, as plain values."""
        over = self._over or control.should_epoch_stop
        bad: list[BadSample] = []
        if isinstance(data, StreamedDataset):
            bad = data.bad_samples if over else data.left_out
        return {
            "epoch": self.index + over,
            "first_step": state.global_step if over else self.first_step,
            "bad_samples": [asdict(sample) for sample in bad],
        }

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count, tell the data its epoch, and set the schedules to the length of this one."""
        loader = kwargs["train_dataloader"]
        if self._entered:
            self.index += 1
            self.first_step = state.global_step
        self._entered, self._over = True, False
        state.epoch = max(state.epoch or 0.0, float(self.index))
        # accelerate forwards it neither to several processes nor in a resumed epoch.
        set_epoch = getattr(loader.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.index)
        if has_length(loader):
            self._fit_to(steps_of(loader, args), args, state)
        # Micro-batches that a short epoch left behind filled no step, and a checkpoint does not
        # hold their gradients.
        kwargs["model"].zero_grad()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note that it is over; one whose data came to its end was a whole one."""
        self._over = True
        if not (control.should_epoch_stop or control.should_training_stop):
            state.epoch = float(self.index + 1)

    def _fit_to(self, steps: int, args: TrainingArguments, state: TrainerState) -> None:
        """Fit the run's length to epochs of so many steps from the running one on."""
        missed = self.index * steps - self.first_step
        if args.max_steps > 0:
            epochs = (args.max_steps + missed) / steps
        else:
            epochs = args.num_train_epochs
            state.max_steps = math.ceil(epochs * steps) - missed
        self.schedule = replace(self.schedule, epochs=epochs, steps_per_epoch=steps, missed=missed)


def steps_of(loader: Any, args: TrainingArguments) -> int:
    """Optimizer steps of an epoch, at least one."""
    return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))


class ProgressiveUnfreezing(TrainerCallback):
    """Frees the student's encoder units at epoch begin, deepest first, and regroups the optimizer.

    Afterwards the optimizer's groups are exactly the free parts: decoder and head first, then each
    free unit with its own learning rate. At `on_train_begin` too, so that a run resumed in the
    middle of an epoch starts with the right units, and so that freezing happens after the DDP wrap:
    a parameter that is frozen before the wrap would never be reduced between processes.

    Args:
        epochs: counts them: `state.epoch` lags behind after a short one.
        projections: gives what is trained beside the student, always.
    """

    def __init__(
        self, epochs: EpochCounter, projections: Callable[[], NamedParameters] = list
    ) -> None:
        self.epochs = epochs
        self.projections = projections

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that the run starts (or goes on) in."""
        self._free(args, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that begins."""
        self._free(args, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])

    def _free(self, args: Any, model: Any, optimizer: Any, scheduler: Any) -> None:
        if not isinstance(scheduler, PartLR):
            raise TypeError(
                f"Expected the scheduler that the trainer makes, got {type(scheduler).__name__}, "
                "which cannot follow groups that come while it runs. Leave lr_scheduler unset."
            )
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward pass without backward leaves other tensors in its place
        free = self.epochs.schedule.free_units(self.epochs.index)
        set_free_units(model, free)
        regroup(optimizer, parameter_groups(model, args, free, self.projections()))
        scheduler.refresh()


class ResumeCallback(TrainerCallback):
    """Restores a run, moves saves behind the end of an epoch, and stops on request.

    Args:
        trainer: has `restore`, and the request as `stop` or None.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._save_at_epoch_end = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set what the Trainer has just set to zero."""
        self.trainer.restore()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save if asked to stop, but after the last step of an epoch wait for its evaluation.

        A checkpoint saved before it would start the next epoch when resumed, without one.
        """
        if self.trainer.stop is not None and self.trainer.stop.agree(args.device):
            control.should_save = True
        ends = control.should_epoch_stop or state.global_step >= state.max_steps
        if control.should_save and (ends or float(state.epoch or 0.0).is_integer()):
            control.should_save, self._save_at_epoch_end = False, True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save now what had to wait, and if asked to stop."""
        stopping = self.trainer.stop is not None and self.trainer.stop.agree(args.device)
        if self._save_at_epoch_end or stopping:
            control.should_save, self._save_at_epoch_end = True, False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """End the run once it is saved, if asked to.

        Raises:
            Stopped: on every process.
        """
        stop = self.trainer.stop
        if stop is not None and stop.agreed:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            raise stop.stopped(folder, state.global_step, state.max_steps)


class EvaluationPanels(TrainerCallback):
    """Saves an image of a few evaluation images at each evaluation, and shows some in TensorBoard.

    Of the files, the newest `args.panel_limit` stay, that of the best evaluation among them.
    TensorBoard gets the first of each tenth of the run.

    Args:
        trainer: tells what student and teacher find in a batch, by `predict_masks`.
        dataset: the evaluation data; its first `args.panel_images` samples are drawn.
    """

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.trainer = trainer
        self.dataset = dataset

    def draw(self, count: int) -> np.ndarray:
        """The panel of the first samples, uint8 (H, W, 3)."""
        samples = self.dataset
        if not isinstance(samples, IterableDataset):
            samples = (self.dataset[i] for i in range(len(self.dataset)))
        batch = self.trainer.data_collator(list(itertools.islice(samples, count)))
        student, teacher = self.trainer.predict_masks(batch)
        return comparison_panel(
            visible_images(batch["pixel_values"], self.trainer.model),
            batch["labels"].cpu().numpy(),
            None if teacher is None else teacher.cpu().numpy(),
            student.cpu().numpy(),
            num_labels=self.trainer.settings.num_labels,
            ignore_index=self.trainer.settings.ignore_index,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Draw, save as `panels/step_<step>.png`, delete old ones, and send to TensorBoard."""
        if not state.is_world_process_zero:
            return
        picture = self.draw(args.panel_images)  # type: ignore[attr-defined]
        folder = Path(str(args.output_dir)) / "panels"
        save_image(picture, folder / f"step_{state.global_step:06d}.png")
        if args.panel_limit > 0:  # type: ignore[attr-defined]
            _delete_old_panels(folder, args.panel_limit, state)  # type: ignore[attr-defined]
        callbacks = self.trainer.callback_handler.callbacks
        boards = [one.tb_writer for one in callbacks if isinstance(one, TensorBoardCallback)]
        for board in filter(None, boards if _is_first_of_its_part(state) else []):
            board.add_image("panel", picture, state.global_step, dataformats="HWC")


def _delete_old_panels(folder: Path, limit: int, state: TrainerState) -> None:
    """Leave `limit` images; this evaluation's and the best one's stay in any case.

    First go those beyond this step, which an interrupted or earlier run left, then the oldest.
    """
    now = state.global_step
    found = ((path, re.fullmatch(r"step_(\d+)\.png", path.name)) for path in folder.iterdir())
    steps = {int(match[1]): path for path, match in found if match}
    # The best until now: whether this evaluation is better is decided after it.
    old = sorted(steps.keys() - {now, state.best_global_step}, key=lambda s: (s <= now, s))
    for step in old[: max(0, len(steps) - limit)]:
        steps[step].unlink()


def _is_first_of_its_part(state: TrainerState) -> bool:
    """Whether this evaluation, which is the last log, is the first in its tenth of the run."""

    def part(step: int) -> int:
        return step * _SHOWN_PARTS // max(state.max_steps, 1)

    earlier = (log for log in state.log_history[:-1] if any(n.startswith("eval_") for n in log))
    return part(state.global_step) not in {part(int(log["step"])) for log in earlier}
