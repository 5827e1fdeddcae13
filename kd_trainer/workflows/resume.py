"""Where a run goes on, and what it must have in common with the one that was interrupted."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_trainer.checkpoints import check_complete, checkpoint_folders, never_complete
from kd_trainer.command_line import RunArguments
from kd_trainer.data.images import content_digest
from kd_trainer.disk import check_writable
from kd_trainer.resuming import newest_checkpoint, settle_all
from kd_trainer.safe_files import plain
from kd_trainer.workflows.assemble import Parts


def facts_of(run: RunArguments, parts: Parts) -> dict[str, Any]:
    """What a resumed run is compared by, beside what the trainer knows: networks and data."""
    data = {"train_content": parts.train_dataset, "eval_content": parts.eval_dataset}
    digests = {name: content_digest(d.dataset) if d else None for name, d in data.items()}
    settings = asdict(run.model) | asdict(run.data) | digests
    return {name: value for name, value in settings.items() if name != "trust_remote_code"}


def find_checkpoint(run: RunArguments) -> Path | None:
    """What `--resume` names, complete; says what it skips.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        OSError: if the output folder cannot be written to.
        ValueError: if there are checkpoints of another run that nobody mentioned, or those that are
            named are damaged.
    """
    args = run.training
    resume, output = args.resume, Path(str(args.output_dir))
    settle_all(args)  # else one that waits to be replaced would be found by nobody here
    own = checkpoint_folders(output)
    if resume == "auto":  # for what restarts the same command: it may have died before any save
        resume = None if all(map(never_complete, own)) else "latest"
    elif resume is None and own:
        raise ValueError(
            f"Expected --resume or an output folder without checkpoints, got {output}, which has "
            "some. Add --resume to go on (--resume auto starts or goes on), name another "
            "--output_dir, or delete it."
        )
    found = None
    if resume == "latest":
        found, skipped = newest_checkpoint(args)
        for folder, wrong in skipped.items():
            if args.process_index == 0:
                told = f"skipped {folder}: {wrong}. Going on from {found.name}: what came after it"
                print(f"{plain(told)} is done again.", file=sys.stderr)
    elif resume is not None:
        found = Path(resume)
        check_complete(found)
        if own and found.resolve().parent != output.resolve():
            raise ValueError(
                f"Expected --resume with a checkpoint in {output}, which holds some, got {found}. "
                "Two runs in one folder would mix: name another --output_dir."
            )
    check_writable(output)
    return found
