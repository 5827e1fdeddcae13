"""Which versions pyproject.toml allows: bounded on both sides, and none with a known hole."""

import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = {
    found.name: found
    for text in (*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values()))
    if (found := Requirement(text)).name != "kd_trainer"
}
PINNED = dict(
    line.split("#")[0].strip().split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)


@pytest.mark.parametrize("name", NAMED)
def test_each_library_has_a_lower_and_an_upper_bound(name):
    """A new major version would be installed untested, and an old one with its faults."""
    operators = {bound.operator for bound in NAMED[name].specifier}
    assert operators == {"=="} or ({">="} <= operators and operators & {"<", "<="}), NAMED[name]


@pytest.mark.parametrize("name", NAMED)
def test_the_versions_that_were_tested_together_are_within_the_bounds(name):
    pins = {key.lower().replace("_", "-"): value for key, value in PINNED.items()}
    assert NAMED[name].specifier.contains(pins[name.lower()])


@pytest.mark.parametrize(
    ("name", "hole"),
    [
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
