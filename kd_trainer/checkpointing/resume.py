"""What a run goes on from, and how it is saved: several processes, one folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging as hf_logging

from kd_trainer.checkpointing.checkpoints import (
    Newest,
    check_complete,
    complete,
    fault,
    move_to_backup,
    newest_complete,
    read_marker,
    recover_interrupted_replace,
    remove,
    rotate,
)
from kd_trainer.checkpointing.fingerprint import check_same_run
from kd_trainer.files import writing
from kd_trainer.processes import run_on_all_ranks


def newest_checkpoint(args: TrainingArguments) -> Newest:
    """The newest complete checkpoint in the output folder, after a look at cut-off replacements.

    Raises:
        FileNotFoundError: if there are no checkpoints.
        ValueError: if none of them is complete.
    """
    recover_on_all_ranks(args)
    return newest_complete(Path(str(args.output_dir)))


def recover_on_all_ranks(args: TrainingArguments) -> None:
    """Finish or undo replacements in the output folder that were cut off, before anyone looks."""
    if args.process_index == 0:
        recover_interrupted_replace(Path(str(args.output_dir)))
    PartialState().wait_for_everyone()


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The checkpoint of the best evaluation, which lies beside; None if none was saved."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.best_model_checkpoint is None:
        return None
    return checkpoint.parent / Path(state.best_model_checkpoint).name


def check_resumable(checkpoint: Path, run: Mapping[str, Any], args: TrainingArguments) -> None:
    """Refuse a checkpoint that is incomplete, damaged, of another run, or without its best.

    Args:
        checkpoint: its folder.
        run: fingerprint of the run that is to go on.
        args: of that run: whether it takes the best student so far from its checkpoint.

    Raises:
        FileNotFoundError: if there is no such folder, or the best checkpoint is gone.
        ValueError: names the damaged file, shows what differs between the runs, or says that an
            earlier version wrote it.
    """
    check_complete(checkpoint)
    check_same_run(read_marker(checkpoint)["run"], run, str(checkpoint))
    with loading_safely(checkpoint):
        read_progress(checkpoint, args)
    best = best_checkpoint(checkpoint)
    if not args.load_best_model_at_end or best in (None, checkpoint):
        return
    wrong = fault(best) if best.is_dir() else "it is not there"
    if wrong is not None:
        raise FileNotFoundError(
            f"Expected the best student so far in {best}, got none: {wrong}. Put it back "
            f"beside {checkpoint.name}, or go on from another checkpoint with --resume FOLDER."
        )


def save_checkpoint(
    folder: Path,
    write: Callable[[], None],
    args: TrainingArguments,
    *,
    run: Callable[[], Mapping[str, Any]],
    best: Callable[[], str | None],
) -> None:
    """Save on all processes, declare it complete, and only then let older ones go.

    Args:
        folder: of the checkpoint.
        write: puts this process's files into it.
        args: how many checkpoints stay, and which process this is.
        run: gives the fingerprint of the run.
        best: gives the best checkpoint once this one is written.

    Raises:
        OSError: if a process could not write.
    """
    output, first = folder.parent, args.process_index == 0

    def make_room() -> None:
        recover_interrupted_replace(output)
        move_to_backup(folder)

    def tidy() -> None:
        kept = best()
        recover_interrupted_replace(output)
        rotate(output, args.save_total_limit, folder, None if kept is None else Path(kept))

    with writing("a checkpoint", folder):
        try:
            run_on_all_ranks(args, make_room if first else None)
            run_on_all_ranks(args, write)
            run_on_all_ranks(args, (lambda: complete(folder, run())) if first else None)
        except BaseException:
            if first:  # the end of another process leaves a complete one as it is
                if fault(folder, contents=False) is not None:
                    remove(folder)  # its room may be needed
                recover_interrupted_replace(output)
            raise
        run_on_all_ranks(args, tidy if first else None)


def progress_file(checkpoint: Path, args: TrainingArguments) -> Path:
    """What this process had summed up when the checkpoint was saved."""
    return checkpoint / f"progress_{args.process_index}.pt"


def read_progress(checkpoint: Path, args: TrainingArguments) -> dict[str, Any]:
    """The same, read back.

    Raises:
        ValueError: if an earlier version wrote it, whose optimizer had other groups.
    """
    # Not straight to the device: torch does not know the cpu:0 of several processes.
    file = progress_file(checkpoint, args)
    progress: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if "free_units" not in progress:
        raise ValueError(
            f"Expected a checkpoint of this version, got {checkpoint} of an earlier one, whose "
            "optimizer had other groups. Finish the run with that version, or start anew."
        )
    return progress


@contextmanager
def loading_safely(checkpoint: Path | None) -> Iterator[None]:
    """Say what torch's refusal to load an object from a checkpoint means."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected a checkpoint of tensors and plain values in {checkpoint}, got other "
            "objects, which are not loaded because they could run code. Go on from a "
            "checkpoint that a training of yours has written."
        ) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the warnings of transformers for a while."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


@contextmanager
def no_stock_rotation(args: TrainingArguments) -> Iterator[None]:
    """Keep the Trainer from deleting and pushing checkpoints: `rotate` and our callback do."""
    limit, strategy = args.save_total_limit, args.hub_strategy
    args.save_total_limit, args.hub_strategy = None, HubStrategy.END
    try:
        yield
    finally:
        args.save_total_limit, args.hub_strategy = limit, strategy
