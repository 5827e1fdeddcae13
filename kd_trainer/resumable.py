"""A Trainer whose checkpoints are complete or do not count, and whose runs go on bit for bit.

What a run is recognised by, what is saved of it beside the Trainer's own state, and what is set
again when it goes on. Where a private method of the Trainer is overridden, a comment says what
would go wrong without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from kd_trainer.arguments import DistillationArguments
from kd_trainer.callbacks import EpochCounter, ResumeCallback
from kd_trainer.checkpointing.fingerprint import fingerprint_of
from kd_trainer.checkpointing.resume import (
    best_checkpoint,
    check_resumable,
    loading_safely,
    newest_checkpoint,
    no_stock_rotation,
    progress_file,
    read_progress,
    save_checkpoint,
    without_warnings,
)
from kd_trainer.checkpointing.stopping import StopRequest
from kd_trainer.data import BadSample, StreamedDataset
from kd_trainer.errors import Stopped
from kd_trainer.fast_layers import allow_recompiles, reset_accelerate_prepare
from kd_trainer.models.weights import check_finite_weights
from kd_trainer.processes import Peer, naming_dead_processes, processes_of_run, run_on_all_ranks
from kd_trainer.students import free_units, load_renamed, save_traits
from kd_trainer.teacher import Teacher
from kd_trainer.tracking import TermSums


class ResumableTrainer(Trainer):
    """What of `DistillationTrainer` is about checkpoints.

    Attributes:
        teacher: its weights are part of what makes the run the one it is.
        epochs: counts them, and knows the schedules.
        tracked: sums of the loss terms since the last log.
        facts: what is compared on resume beside the arguments, the networks and the number of
            images: set by who knows more, such as the content of the data.
        peers: the processes of the training, by rank.
        stop: a request to stop, looked at after each step; None without one.
    """

    model: Any  # a network: of smp, of transformers, or a module of the user's
    args: DistillationArguments
    teacher: Teacher | None
    epochs: EpochCounter
    tracked: TermSums
    facts: Mapping[str, Any] = {}
    peers: Sequence[Peer] = ()
    stop: StopRequest | None = None
    _took_model = _has_trained = False
    _earlier_seconds = 0.0  # of training, before this process
    _began = 0.0
    _resumed: Path | None = None
    _checked: Path | None = None
    _fingerprint: dict[str, Any] | None = None

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss term since the last log, or a weight, went bad."""
        self.tracked.check_finite(self.state.global_step)
        check_finite_weights(self.model, f"after step {self.state.global_step}")

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the Trainer does; a checkpoint is checked first.

        Raises:
            FileNotFoundError: if there is no checkpoint to go on from.
            ValueError: if it is damaged, or that of another run.
            Stopped: after a request to stop, once a checkpoint is saved.
        """
        if not self._has_trained:  # an evaluation before it would pass for DDP's preparation
            reset_accelerate_prepare(self.model)
            self.model_wrapped, self._took_model, self._has_trained = self.model, True, True
        if self.args.torch_compile:
            allow_recompiles(self.epochs.schedule.unfreezing.units)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(self.args).folder)
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None:
            self.check_resume(self._resumed)
        elif trial is None:
            self._fingerprint = self.fingerprint()
        resuming = ResumeCallback(self)
        self.add_callback(resuming)
        try:
            with naming_dead_processes(self), loading_safely(self._resumed):
                resumed = str(self._resumed) if self._resumed else None
                return super().train(resumed, trial, ignore_keys_for_eval)
        except Stopped:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # boards, bars
            raise
        finally:
            self.remove_callback(resuming)

    def _take_model(self) -> None:
        """Forget, once, that another Trainer of this process has trained the same student."""
        if not self._took_model:
            reset_accelerate_prepare(self.model)
            self._took_model = True

    def fingerprint(self) -> dict[str, Any]:
        """What makes this run the one it is, as plain values."""
        student = self.accelerator.unwrap_model(self.model)
        data = {"train": self.train_dataset, "eval": self.eval_dataset}
        return fingerprint_of(self.args, student, self.teacher, data, self.facts)

    def check_resume(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that this run cannot go on from: see `check_resumable`."""
        if self._checked == checkpoint:
            return
        self._fingerprint = self.fingerprint()
        check_resumable(checkpoint, self._fingerprint, self.args)
        self._checked = checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does; beside the weights of a module what it has to be told."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_traits(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Under the names that a stock model has now.

        transformers saves some models under the names of their first release, and the Trainer only
        warns of names that it does not know: the run would go on from other weights.
        """
        if not load_renamed(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Likewise."""
        if not load_renamed(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def restore(self) -> None:
        """Set what the Trainer starts at zero, private fields too, to what it was at the save."""
        self.peers = processes_of_run()
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        if self._resumed is None:
            return
        # Steps between logs and evaluations are the old run's in the file; a new logging counts.
        self.state.compute_steps(self.args, self.state.max_steps)
        best = best_checkpoint(self._resumed)
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.args.eval_on_start = False  # the log of it is in the checkpoint
        saved = self._saved_progress()
        self._earlier_seconds = saved["seconds"]
        self._tr_loss = saved["loss"].to(self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self._initial_global_step = 0  # so that means and speeds are those of the whole run
        self.tracked.restore(saved["terms"], self.args.device)

    def _save_progress(self, folder: Path) -> None:
        """What this process has summed up, and where in its epochs the run is."""
        progress = {
            "seconds": self._seconds(),
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "terms": self.tracked.saved(),
            "position": self.epochs.position(self.state, self.control, self.train_dataset),
            "free_units": free_units(self.model),
        }
        torch.save(progress, progress_file(folder, self.args))

    def _saved_progress(self) -> dict[str, Any]:
        return read_progress(self._resumed, self.args) if self._resumed else {}

    def _seconds(self) -> float:
        """Seconds of training so far: the clock on the wall may be set meanwhile."""
        return self._earlier_seconds + time.monotonic() - self._began

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, declare it complete, and only then let older ones go.

        The Trainer writes in place and deletes before it is done: a kill would leave half a
        checkpoint, or none. Nothing non-finite is ever kept.
        """
        run_on_all_ranks(self.args, self.check_finite)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_progress(folder)  # first: without it a folder is no half save of ours
            with no_stock_rotation(self.args):
                super(ResumableTrainer, self)._save_checkpoint(model, trial)

        save_checkpoint(
            folder,
            write,
            self.args,
            run=lambda: self._fingerprint or self.fingerprint(),
            best=lambda: self.state.best_model_checkpoint,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With `save_strategy best` this alone decides on a save: a stop needs one in any case."""
        best = super()._determine_best_metric(metrics, trial)
        return best or (self.stop is not None and self.stop.agreed)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Count the seconds of the parts before as well, by a clock that nobody can set.

        The Trainer knows those of this process alone, and with a limit of 1 it would delete the
        newest checkpoint here.
        """
        with no_stock_rotation(self.args):
            start = time.time() - self._seconds()  # which is subtracted from time.time()
            return super()._finalize_training(trial, num_train_samples, start)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Start in the counted epoch, after the batches of it that were trained on.

        The Trainer divides by the length of an epoch: after a short one a resumed run would start
        in an earlier one. It also warns of a best checkpoint that moved, which `restore` finds.
        """
        with without_warnings():
            index, _ = super()._init_training_state(max_steps, steps_per_epoch, epochs, *rest)
        batches = 0
        if self._resumed is not None:
            saved = self._saved_progress()["position"]
            index, first_step = saved["epoch"], saved["first_step"]
            self.epochs.go_on(index, first_step)
            if not self.args.ignore_data_skip:
                steps = self.state.global_step - first_step
                batches = steps * self.args.gradient_accumulation_steps
            if isinstance(self.train_dataset, StreamedDataset):
                self.train_dataset.restore([BadSample(**bad) for bad in saved["bad_samples"]])
        if 0 < self.args.max_steps <= self.state.global_step:
            index = epochs  # nothing is left to do
        return index, batches
