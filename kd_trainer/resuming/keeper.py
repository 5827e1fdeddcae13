"""What a resumable run does at the events of the Trainer's loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from kd_trainer.resuming.trainer import ResumableTrainer


class Keeper(TrainerCallback):
    """Restores a run, moves saves behind the end of an epoch, and stops on request."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self._later = False

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
        """Save if asked to stop, but after the last update of an epoch wait for its evaluation.

        A checkpoint saved before it would start the next epoch when resumed, without one.
        """
        if self.trainer.stop is not None and self.trainer.stop.agree(args.device):
            control.should_save = True
        ends = control.should_epoch_stop or state.global_step >= state.max_steps
        closing = ends or float(state.epoch).is_integer()
        if control.should_save and closing:
            control.should_save, self._later = False, True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save now what had to wait, and if asked to stop."""
        stopping = self.trainer.stop is not None and self.trainer.stop.agree(args.device)
        if self._later or stopping:
            control.should_save, self._later = True, False

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
