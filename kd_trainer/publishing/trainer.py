"""A Trainer that pushes the student and its card, where the stock one pushes its output folder.

That folder holds training_args.bin, and the checkpoints in it optimizer and random state.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer

from kd_trainer.errors import printable
from kd_trainer.files import check_replaceable, replacing_files
from kd_trainer.hub import Publication, Pushed, Source, check_access, publish, upload, write_folder

HUB_FOLDER = "hub"


class PublishingTrainer(Trainer):
    """Pushes at each save and at the end exactly what `scripts/push.py` would push."""

    _pusher: ThreadPoolExecutor | None = None
    _push: Future[Pushed] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out before the training whether a push will be possible."""
        if token is not None:
            raise ValueError(
                "Expected no token as an argument, got one. Log in with `hf auth login`, or put it "
                "into HF_TOKEN."
            )
        if self.args.hub_model_id is None or self.args.hub_license is None:  # type: ignore[attr-defined]
            raise ValueError(
                "Expected hub_model_id and hub_license in the arguments for a push, got none. Set "
                "both."
            )
        if self.processing_class is None:
            raise ValueError(
                "Expected processing_class for a push, got none: nobody could feed the student. "
                "Pass SmpImageProcessor.from_model_config(model.config)."
            )
        if self.is_world_process_zero():
            check_replaceable(Path(str(self.args.output_dir)) / HUB_FOLDER, "output_dir")
            wanted = self.args.hub_private_repo if private is None else private
            check_access(self.args.hub_model_id, private=wanted is not False)
        vars(self)["hub_model_id"] = self.args.hub_model_id  # the base class declares it as None

    def publication(self, **options: Any) -> Publication:
        """What the arguments say about the publication."""
        license_id = str(self.args.hub_license)  # type: ignore[attr-defined]
        pictures: bool = self.args.hub_pictures  # type: ignore[attr-defined]
        return Publication(str(self.args.hub_model_id), license_id, pictures=pictures, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the student of a checkpoint in the background, as `--hub_strategy` says.

        While one is running the next is left out, as in the stock Trainer; with `hub_always_push`
        the training waits for it instead.
        """
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        if self._push is not None and not (args.hub_always_push or self._push.done()):
            return
        self._report()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        step, total = self.state.global_step, self.state.max_steps
        about = self.publication(
            results=figures(self.state.log_history, step), progress=f"update {step} of {total}"
        )
        folder = Path(tempfile.mkdtemp(prefix="kd_trainer-push-")) / HUB_FOLDER
        source = Source(Path(checkpoint_folder), Path(str(args.output_dir)))
        write_folder(source, folder, about)
        if self._pusher is None:
            self._pusher = ThreadPoolExecutor(max_workers=1)
        message = f"Training in progress, update {step}"
        self._push = self._pusher.submit(_upload, folder, about.repo_id, message)

    def _finish_current_push(self) -> None:
        """Wait for a push in the background."""
        if self._push is not None:
            self._push.exception()
            self._report()

    def _report(self) -> None:
        """Print what went wrong in the background; the push at the end tries again, and raises."""
        if self._push is not None and (error := self._push.exception()) is not None:
            reason = " ".join(str(error).split())
            tqdm.write(f"push during the training failed: {printable(reason)}", file=sys.stderr)
        self._push = None

    def push_to_hub(  # type: ignore[override] # what is pushed is not the caller's choice
        self, commit_message: str | None = "Push a student", **kwargs: Any
    ) -> Pushed | None:
        """Save the student into the output folder and push it with its card.

        Raises:
            TypeError: for any other argument of the stock method.
        """
        if kwargs:
            raise TypeError(
                f"Expected commit_message alone, got {', '.join(kwargs)}. Everything else is set "
                "by the hub_ fields of the arguments."
            )
        if self.hub_model_id is None:
            self.init_hf_repo()
        self._finish_current_push()
        if not self.is_world_process_zero():
            return None
        output = Path(str(self.args.output_dir))
        processor: Any = self.processing_class
        with replacing_files(output / "student") as partial:
            self.accelerator.unwrap_model(self.model).save_pretrained(partial)
            processor.save_pretrained(partial)
        about = self.publication()
        message = commit_message or "Push a student"
        return publish(output, output / HUB_FOLDER, about, message=message)


def figures(log_history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The evaluation at an update, under the names of results.json; empty if there was none."""
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
