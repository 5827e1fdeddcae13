"""A Trainer that goes on as if it had never been interrupted, or says why it cannot.

The stock Trainer writes checkpoints in place and deletes older ones before it is done, forgets
what it has summed up since the last log, draws the seed of its data workers from the generator
that DropPath draws from, and takes whatever settings it is resumed with.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as hf_logging

from kd_trainer.checkpointing.checkpoints import (
    Newest,
    check_complete,
    complete,
    fault,
    newest_complete,
    read_marker,
    remove,
    rotate,
    set_aside,
    settle,
)
from kd_trainer.checkpointing.fingerprint import (
    check_same_run,
    samples_digest,
    settings_of,
    tensors_digest,
)
from kd_trainer.checkpointing.stopping import StopRequest
from kd_trainer.data import StreamedDataset
from kd_trainer.data.loaders import seed_loader
from kd_trainer.errors import Stopped
from kd_trainer.files import replacing_file, writing
from kd_trainer.processes import Peer, naming_the_dead, processes_of_run, together
from kd_trainer.resuming.epochs import CountedTrainer
from kd_trainer.resuming.keeper import Keeper
from kd_trainer.teacher import Teacher
from kd_trainer.tracking import TermSums

CONTENT = {"train_content": "train_images", "eval_content": "eval_images"}


class ResumableTrainer(CountedTrainer):
    """Complete checkpoints, exact resume, and an end on request.

    Attributes:
        peers: the processes of the training, by rank.
        facts: what is compared on resume beside the arguments, the networks and the number of
            images: set by who knows more, such as the content of the data.
        stop: a request to stop, looked at after each update; None without one.
        teacher: the frozen network, or None.
        tracked: sums since the last log.
    """

    facts: Mapping[str, Any] = {}
    peers: Sequence[Peer] = ()
    stop: StopRequest | None = None
    teacher: Teacher | None
    tracked: TermSums
    _earlier = 0.0  # seconds of training before this process
    _began = 0.0
    _resumed: Path | None = None
    _checked: Path | None = None
    _fingerprint: dict[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What makes this run the one it is, as plain values."""
        student = self.accelerator.unwrap_model(self.model).state_dict()
        images: dict[str, Any] = {
            "train_images": self.train_dataset,
            "eval_images": self.eval_dataset,
        }
        known: dict[str, Any] = {
            **settings_of(self.args),  # type: ignore[arg-type] # DistillationArguments
            "student_tensors": tensors_digest(student, values=False),
            "teacher_weights": None,
            **{name: _announced(data) for name, data in images.items()},
        }
        if not self.facts:  # from Python nobody has looked at the files
            known |= {name: samples_digest(images[of]) for name, of in CONTENT.items()}
        if self.teacher is not None:
            known["teacher_weights"] = tensors_digest(self.teacher.state_dict(), values=True)
        plain: dict[str, Any] = json.loads(json.dumps(known | dict(self.facts)))
        return plain

    def check_resume(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that is incomplete, damaged, of another run, or without its best.

        Raises:
            FileNotFoundError: if there is no such folder, or the best checkpoint is gone.
            ValueError: names the damaged file, or shows what differs between the runs.
        """
        if self._checked == checkpoint:
            return
        check_complete(checkpoint)
        self._fingerprint, before = self.fingerprint(), read_marker(checkpoint)["run"]
        unknown = CONTENT.keys() - before.keys()  # of a version that did not look
        now = {name: value for name, value in self._fingerprint.items() if name not in unknown}
        check_same_run(before, now, str(checkpoint))
        best = self._best_of(checkpoint)
        wrong = None
        if self.args.load_best_model_at_end and best not in (None, checkpoint):
            wrong = fault(best) if best.is_dir() else "it is not there"
        if wrong is not None:
            raise FileNotFoundError(
                f"Expected the best student so far in {best}, got none: {wrong}. Put it back "
                f"beside {checkpoint.name}, or go on from another checkpoint with --resume FOLDER."
            )
        self._checked = checkpoint

    @staticmethod
    def _best_of(checkpoint: Path) -> Path | None:
        """The checkpoint of the best evaluation, which lies beside; None if none was saved."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.best_model_checkpoint is None:
            return None
        return checkpoint.parent / Path(state.best_model_checkpoint).name

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
        self._resumed = None
        if resume_from_checkpoint is True:
            self._resumed = newest_checkpoint(self.args).folder
        elif resume_from_checkpoint:
            self._resumed = Path(resume_from_checkpoint)
        if self._resumed is not None:
            self.check_resume(self._resumed)
        else:
            self._fingerprint = self.fingerprint()
        keeper = Keeper(self)
        self.add_callback(keeper)
        try:
            resumed = None if self._resumed is None else str(self._resumed)
            with naming_the_dead(self):
                return super().train(resumed, trial, ignore_keys_for_eval)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"Expected a checkpoint of tensors and plain values in {self._resumed}, got other "
                "objects, which are not loaded because they could run code. Go on from a "
                "checkpoint that a training of yours has written."
            ) from error
        except Stopped:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # boards, bars
            raise
        finally:
            self.remove_callback(keeper)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Without two warnings: `restore` finds a best checkpoint that moved, takes new logs."""
        before = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        try:
            return super()._init_training_state(*args, **kwargs)
        finally:
            hf_logging.set_verbosity(before)

    def _get_dataloader(  # type: ignore[override] # the options are handed on as they come
        self, dataset: Any, description: str, batch_size: int, **options: Any
    ) -> Any:
        loader = super()._get_dataloader(dataset, description, batch_size, **options)
        return seed_loader(loader, self.args.seed)

    def restore(self) -> None:
        """Set what the Trainer starts at zero to what it was in the checkpoint."""
        self.peers = processes_of_run()
        self._began, self._earlier = time.monotonic(), 0.0
        if self._resumed is None:
            return
        # Steps between logs and evaluations are the old run's in the file; a new logging counts.
        self.state.compute_steps(self.args, self.state.max_steps)
        best = self._best_of(self._resumed)
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.args.eval_on_start = False  # the log of it is in the checkpoint
        saved = self._saved_progress()
        self._earlier = saved["seconds"]
        self._tr_loss = saved["loss"].to(self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self._initial_global_step = 0  # so that means and speeds are those of the whole run
        self.tracked.restore(saved["terms"], self.args.device)

    def _seconds(self) -> float:
        """Seconds of training so far: the clock on the wall may be set meanwhile."""
        return self._earlier + time.monotonic() - self._began

    def save_state(self) -> None:
        """The Trainer's logs, as a whole file."""
        if self.is_world_process_zero():
            with replacing_file(Path(str(self.args.output_dir)) / TRAINER_STATE_NAME) as partial:
                self.state.save_to_json(str(partial))

    def _progress_file(self) -> str:
        return f"progress_{self.args.process_index}.pt"

    def _saved_progress(self) -> Any:
        assert self._resumed is not None
        # Not straight to the device: torch does not know the cpu:0 of several processes.
        file = self._resumed / self._progress_file()
        return torch.load(file, map_location="cpu", weights_only=True)

    def saved_position(self) -> dict[str, Any] | None:
        """Of the checkpoint; None in one of version 0.1, whose epochs all had the same length."""
        return None if self._resumed is None else self._saved_progress().get("position")

    def _save_rng_state(self, output_dir: str) -> None:
        """The state of the random generators, and beside it what each process has summed up."""
        super()._save_rng_state(output_dir)
        progress = {
            "seconds": self._seconds(),
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "terms": self.tracked.saved(),
            "position": self.position(),
        }
        torch.save(progress, Path(output_dir) / self._progress_file())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, declare it complete, and only then let older ones go."""
        output, args = Path(self._get_output_dir(trial=trial)), self.args
        folder = output / f"checkpoint-{self.state.global_step}"
        first = self.is_world_process_zero()
        limit, args.save_total_limit = args.save_total_limit, None

        def make_room() -> None:
            settle(output)
            set_aside(folder)

        def declare() -> None:
            complete(folder, self._fingerprint or self.fingerprint())

        def tidy() -> None:
            best = self.state.best_model_checkpoint
            settle(output)
            rotate(output, limit, folder, None if best is None else Path(best))

        write = super()._save_checkpoint
        try:
            with writing("a checkpoint", folder):
                try:
                    together(args, make_room if first else None)
                    together(args, lambda: write(model, trial))
                    together(args, declare if first else None)
                except BaseException:
                    if first:  # the end of another process leaves a complete one as it is
                        if fault(folder, contents=False) is not None:
                            remove(folder)  # its room may be needed
                        settle(output)
                    raise
                together(args, tidy if first else None)
        finally:
            args.save_total_limit = limit

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With `save_strategy best` this decides on a save, which a stop needs in any case."""
        best = super()._determine_best_metric(metrics, trial)
        return best or (self.stop is not None and self.stop.agreed)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Count the seconds of the parts before as well, by a clock that nobody can set."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # with a limit of 1 the Trainer would delete the newest checkpoint here
            start_time = time.time() - self._seconds()  # which is subtracted from time.time()
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit


def _announced(data: Any) -> Any:
    """Number of images, of several sets by name; of a stream before it has left any out."""
    if isinstance(data, Mapping):
        return {name: _announced(one) for name, one in data.items()}
    if data is None:
        return 0
    return data.announced if isinstance(data, StreamedDataset) else len(data)


def newest_checkpoint(args: TrainingArguments) -> Newest:
    """The newest complete checkpoint in the output folder, after a look at cut-off replacements.

    Raises:
        FileNotFoundError: if there are no checkpoints.
        ValueError: if none of them is complete.
    """
    settle_all(args)
    return newest_complete(Path(str(args.output_dir)))


def settle_all(args: TrainingArguments) -> None:
    """Finish or undo replacements in the output folder that were cut off, before anyone looks."""
    if args.process_index == 0:
        settle(Path(str(args.output_dir)))
    PartialState().wait_for_everyone()
