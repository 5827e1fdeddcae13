"""Which versions pyproject.toml allows: ranges tested at both ends, none with a known hole."""

import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = {
    found.name: found
    for text in (*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values()))
    if (found := Requirement(text)).name != "kd_trainer"
}
# Tools are always the newest; the extras `demo` and `search` are tested with the newest only.
NEWEST_ONLY = {
    Requirement(text).name
    for extra in ("dev", "demo", "search")
    for text in PROJECT["optional-dependencies"][extra]
}


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    named = [line.split("#")[0].strip().split("==") for line in lines if "==" in line]
    return {name: Version(version) for name, version in named}


def bounds(name: str) -> dict[str, Version]:
    return {bound.operator: Version(bound.version) for bound in NAMED[name].specifier}


@pytest.mark.parametrize("name", NAMED)
def test_each_range_ends_before_the_first_number_that_was_not_tested(name):
    """A new major version would be installed untested."""
    newest = pins("constraints.txt")[name.lower()]
    if bounds(name) == {"==": newest}:
        return
    assert bounds(name).keys() == {">=", "<"}
    *head, last = bounds(name)["<"].release
    assert newest.release[: len(head) + 1] == (*head, last - 1)


def test_each_range_begins_with_the_lowest_version_that_was_tested():
    """Whoever has the lowest version that is allowed would else be the first to try it."""
    tested = NAMED.keys() - NEWEST_ONLY
    lowest = {name: bounds(name).get("==") or bounds(name)[">="] for name in tested}
    assert pins("constraints-lowest.txt") == lowest


@pytest.mark.parametrize(
    ("name", "hole"),
    [
        ("torch", "2.9.1"),  # CVE-2026-24747: memory corruption in `torch.load(weights_only=True)`
        ("timm", "1.0.25"),  # `checkpoint_path` loads a pickle
        ("pillow", "12.1.1"),
        ("tqdm", "4.66.2"),
        ("onnx", "1.19.1"),
    ],
)
def test_a_version_with_a_known_hole_is_not_allowed(name, hole):
    assert not NAMED[name].specifier.contains(hole)
    if name != "onnx":  # of an extra
        assert NAMED[name].specifier.contains(version(name))
