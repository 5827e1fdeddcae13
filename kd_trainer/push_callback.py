"""Pushes the student and its card while it is trained, where the stock Trainer pushes its folder.

That folder holds training_args.bin, and the checkpoints in it optimizer and random state.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kd_trainer.errors import printable
from kd_trainer.files import check_replaceable, replacing_files
from kd_trainer.hub import Publication, Pushed, Source, check_access, publish, upload, write_folder
from kd_trainer.processes import run_on_all_ranks

HUB_FOLDER = "hub"


def publication_of(args: Any, **options: Any) -> Publication:
    """What the arguments of a training say about its publication."""
    license_id, pictures = str(args.hub_license), args.hub_pictures
    return Publication(str(args.hub_model_id), license_id, pictures=pictures, **options)


def check_push(args: Any, processor: Any, *, token: str | None, private: bool | None) -> None:
    """Find out before the training whether a push will be possible.

    Raises:
        ValueError: names what is missing.
        OSError: if the Hub does not let us.
    """
    if token is not None:
        raise ValueError(
            "Expected no token as an argument, got one. Log in with `hf auth login`, or put it "
            "into HF_TOKEN."
        )
    if args.hub_model_id is None or args.hub_license is None:
        raise ValueError(
            "Expected hub_model_id and hub_license in the arguments for a push, got none. Set both."
        )
    if processor is None:
        raise ValueError(
            "Expected processing_class for a push, got none: nobody could feed the student. "
            "Pass SmpImageProcessor.from_model_config(model.config)."
        )
    if args.process_index == 0:
        check_replaceable(Path(str(args.output_dir)) / HUB_FOLDER, "output_dir")
        wanted = args.hub_private_repo if private is None else private
        check_access(args.hub_model_id, private=wanted is not False)


def check_only_message(options: Mapping[str, Any]) -> None:
    """Refuse what else the stock `push_to_hub` takes: it would be ignored.

    Raises:
        TypeError: names what was given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TypeError(
            f"Expected commit_message alone, got {', '.join(given)}. Everything else is set by the "
            "hub_ fields of the arguments."
        )


def push_student(student: Any, processor: Any, args: Any, message: str) -> Pushed:
    """Save a student into the output folder and push it with its card."""
    output = Path(str(args.output_dir))
    with replacing_files(output / "student") as partial:
        student.save_pretrained(partial)
        processor.save_pretrained(partial)
    return publish(output, output / HUB_FOLDER, publication_of(args), message=message)


class PushCallback(TrainerCallback):
    """Pushes the student of each checkpoint in the background, as `--hub_strategy` says.

    While one push is running the next is left out, as in the stock Trainer; with `hub_always_push`
    the training waits for it instead.

    Args:
        trainer: whose callbacks hear of each push.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Pushed] | None = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Push what was saved."""
        if args.hub_strategy != "end":
            push = partial(self._push, args, state, control)
            run_on_all_ranks(args, push if state.is_world_process_zero else None)

    def _push(self, args: Any, state: TrainerState, control: TrainerControl) -> None:
        if self._running is not None and not (args.hub_always_push or self._running.done()):
            return
        self.finish()
        self.trainer.callback_handler.on_push_begin(args, state, control)
        output, step = Path(str(args.output_dir)), state.global_step
        publication = publication_of(
            args,
            results=figures(state.log_history, step),
            progress=f"step {step} of {state.max_steps}",
        )
        folder = Path(tempfile.mkdtemp(prefix="kd_trainer-push-")) / HUB_FOLDER
        try:
            write_folder(Source(output / f"checkpoint-{step}", output), folder, publication)
        except BaseException:
            shutil.rmtree(folder.parent)
            raise
        message = f"Training in progress, step {step}"
        self._running = self._pool.submit(_upload, folder, publication.repo_id, message)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wait for a push in the background."""
        self.finish()

    def finish(self) -> None:
        """Wait for a push in the background, and print what went wrong.

        The push at the end tries again, and raises.
        """
        if self._running is not None and (error := self._running.exception()) is not None:
            reason = " ".join(str(error).split())
            tqdm.write(f"push during the training failed: {printable(reason)}", file=sys.stderr)
        self._running = None


def figures(log_history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The evaluation at a step, under the names of results.json; empty if there was none."""
    logs = [log for log in log_history if log.get("step") == step and "eval_miou" in log]
    if not logs:
        return {}
    named = {key.removeprefix("eval_"): value for key, value in logs[-1].items() if "eval_" in key}
    shared = {key: named.pop(key) for key in list(named) if key.startswith(("teacher", "agree"))}
    return {f"student_{key}": value for key, value in named.items()} | shared


def _upload(folder: Path, repo_id: str, message: str) -> Pushed:
    try:
        return upload(folder, repo_id, message=message, progress=False)
    finally:
        shutil.rmtree(folder.parent)
