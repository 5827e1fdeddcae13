"""The figures of docs/what_survives_what.md against the tests that they count."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import test_checkpoints

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "what_survives_what.md").read_text(encoding="utf-8")


def times(file: str) -> str:
    """What the page says of how often a test file tries something."""
    return next(
        line.split("|")[2].strip() for line in PAGE.splitlines() if line.endswith(f"`{file}` |")
    )


def test_cases_are_those_that_are_collected():
    """A page that counts by hand is wrong after the next test."""
    files = (
        "tests/test_interruptions.py",
        "tests/test_stopped_launches.py",
        "tests/test_deaths.py",
    )
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    for file in files:
        count = collected.stdout.count(f"{file}::")
        assert count > 1
        assert times(file) == f"{count} cases"


def test_damages_and_resumes_are_those_that_are_tried():
    """Likewise; each number in the list of a resume test is an update after which it goes on."""
    assert times("tests/test_checkpoints.py") == f"{len(test_checkpoints.DAMAGES)} kinds"
    runs, resumes = 0, 0
    tree = ast.parse((TESTS / "test_resume.py").read_text(encoding="utf-8"))
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") == "assert_resumes_exactly":
                ways = (
                    2 if any("parametrize" in ast.dump(d) for d in function.decorator_list) else 1
                )
                runs, resumes = runs + ways, resumes + ways * len(call.args[2].elts)
    assert times("tests/test_resume.py") == f"{resumes} resumes of {runs} runs"
