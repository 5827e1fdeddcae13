"""What a check found, and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from kd_trainer.errors import printable

GO_ON = "(--no_preflight goes on all the same)"
_HEADER = ("check", "", "finding", "what to do")
_WIDTHS = (16, 5, 44, 40)
_SHOWN = 3  # names of a list


class Grade(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"  # worth knowing; the training goes on
    FAULT = "fault"  # the training would be pointless


@dataclass(frozen=True)
class Finding:
    """One line of a preflight; made by `ok`, `note` and `fault`.

    Attributes:
        check: what was looked at.
        grade: how bad it is.
        text: what was found; of a fault `Expected <what>, got <value>`, without a full stop.
        cure: what to do, as sentences; nothing if all is well.
    """

    check: str
    grade: Grade
    text: str
    cure: str = ""


def ok(check: str, text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Grade.OK, text)


def note(check: str, text: str, cure: str) -> Finding:
    """Something that can be right, and often is not."""
    return Finding(check, Grade.NOTE, text, cure)


def fault(check: str, text: str, cure: str) -> Finding:
    """Something that makes the training pointless."""
    return Finding(check, Grade.FAULT, text, cure)


def graded(findings: Iterable[Finding], grade: Grade) -> list[Finding]:
    """Those of one grade."""
    return [f for f in findings if f.grade == grade]


def worst(findings: Iterable[Finding]) -> Finding:
    """The first fault, else the first note, else the first finding."""
    return max(findings, key=lambda finding: list(Grade).index(finding.grade))


def table(findings: Sequence[Finding]) -> str:
    """All findings as a table that fits into a terminal."""
    rows = [(f.check, str(f.grade), printable(f.text), printable(f.cure)) for f in findings]
    lines = [_line(_HEADER), "-+-".join("-" * width for width in _WIDTHS)]
    for row in rows:
        cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, _WIDTHS, strict=True)]
        lines += [_line(line) for line in zip_longest(*cells, fillvalue="")]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
    return " | ".join(padded).rstrip()


def error_message(findings: Sequence[Finding]) -> str | None:
    """The line with which a training stops; None if nothing is at fault."""
    faults = graded(findings, Grade.FAULT)
    if not faults:
        return None
    more = len(faults) - 1
    others = f" {several(more, 'more fault')}: scripts/doctor.py lists them." if more else ""
    return f"{faults[0].text}. {faults[0].cure}{others} {GO_ON}"


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """What a training prints: one line, and one more for each note."""
    notes = graded(findings, Grade.NOTE)
    how = f"checks, {several(len(notes), 'note')}," if notes else "checks passed"
    first = f"Preflight: {len(findings)} {how} in {seconds:.1f} s"
    return "\n".join([first, *(printable(f"- {f.check}: {f.text}. {f.cure}") for f in notes)])


def several(count: int, word: str) -> str:
    """A number of things: `1 note`, `6 notes`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
