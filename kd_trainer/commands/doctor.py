"""What scripts/doctor.py does: all checks of a run, as a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from kd_trainer.build import build_run
from kd_trainer.config import RunArguments, parse, parser
from kd_trainer.doctor.checks import THOROUGH, Preflight
from kd_trainer.doctor.finding import Finding, Grade, fault, graded, ok, several, table
from kd_trainer.doctor.resources import cost_findings
from kd_trainer.errors import USER_ERRORS, user_message
from kd_trainer.parsing import Parser

DESCRIPTION = """Look for what makes a training pointless, in under a minute, and say what to do.

All flags of train.py are taken, and mean the same: put doctor.py in its place. A few images are
looked at and a few steps are measured; nothing is written. The exit status is 0 if nothing is at
fault, else 1. train.py does the quicker of these checks itself, unless --no_preflight is given."""
EPILOG = """Examples:
  doctor.py --dataset photos/ --teacher teacher/
  doctor.py --config demo --teacher none
  doctor.py --dataset photos/ --teacher model.pth --teacher_encoder timm-efficientnet-b3"""
SETTINGS = "settings"  # the check of what would stop the start
_NOT_TAKEN = {"dry_run": "nothing is trained here", "no_preflight": "this is the preflight"}


def doctor_parser() -> Parser:
    """The parser of scripts/doctor.py: that of train.py."""
    return parser("doctor.py", DESCRIPTION, EPILOG, hidden=_NOT_TAKEN)


def parse_doctor(arguments: Sequence[str] | None = None) -> RunArguments:
    """Recipe, then flags, as train.py reads them.

    Raises:
        ValueError: on unknown flags, wrong values, or what only a training can follow.
    """
    flags = doctor_parser().given(arguments)
    for name, reason in _NOT_TAKEN.items():
        if flags.get(name):
            raise ValueError(f"Expected no --{name}, got it: {reason}. Leave it out.")
    run = parse(arguments)
    if run.training.world_size > 1:
        raise ValueError(
            f"Expected one process, got {run.training.world_size}. Start it with python."
        )
    return run


def examine(run: RunArguments) -> Iterator[Finding]:
    """All findings of a run; an error that would stop its start is the last of them."""
    try:
        parts = build_run(run)
        yield ok(SETTINGS, "data, masks, teacher and student fit together")
        preflight = Preflight(run, parts, THOROUGH)
        yield from preflight.findings()
        if preflight.step_seconds:  # else there is no step to measure
            yield from cost_findings(
                run,
                parts,
                step_seconds=preflight.step_seconds,
                eval_seconds=preflight.eval_seconds,
            )
    except USER_ERRORS as error:
        message = user_message(error)
        if message is None:
            raise
        text, _, cure = message.partition(". ")
        yield fault(SETTINGS, text.rstrip("."), cure)


def doctor(run: RunArguments) -> list[Finding]:
    """Examine a run and print what was found."""
    start = time.monotonic()
    findings = list(examine(run))
    print(table(findings))
    faults, notes = graded(findings, Grade.FAULT), graded(findings, Grade.NOTE)
    if faults:
        starts = all(f.check != SETTINGS for f in faults)
        what = "be pointless" if starts else "not start"
        verdict = f"{several(len(faults), 'fault')}: this training would {what}."
    else:
        verdict = "Nothing is at fault."
    also = f" {several(len(notes), 'note')}." if notes else ""
    print(f"\n{verdict}{also} Looked for {time.monotonic() - start:.0f} s.")
    return findings


def doctor_main(arguments: Sequence[str] | None = None) -> None:
    """Examine the run of a command line; exits with 1 if something is at fault."""
    if graded(doctor(parse_doctor(arguments)), Grade.FAULT):
        sys.exit(1)
