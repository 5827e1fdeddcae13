"""JSON files of a run that hold something else than they should: one line that names the entry."""

import json
from pathlib import Path

import pytest

from kd_trainer.run_folder import EXPORTS_SHAPE, RESULTS_SHAPE, STATE_SHAPE, read_object

FAULTS = {
    "a list": (RESULTS_SHAPE, "[1]", r"a JSON object in .*results.json, got \[1\]"),
    "a text": (RESULTS_SHAPE, '{"student_miou": "x"}', "a finite number as student_miou in"),
    "a yes": (RESULTS_SHAPE, '{"epochs": true}', "a finite number as epochs in"),
    "infinite": (RESULTS_SHAPE, '{"epochs": 1e999}', "a finite number as epochs in .*, got inf"),
    "long": (RESULTS_SHAPE, f'{{"epochs": 1{"0" * 400}}}', "a finite number as epochs in"),
    "no logs": (STATE_SHAPE, '{"log_history": 5}', "a list as log_history in"),
    "epoch": (
        STATE_SHAPE,
        '{"log_history": [{"epoch": {}}]}',
        r".* as log_history\[0\].epoch",
    ),
    "term": (
        STATE_SHAPE,
        '{"log_history": [{"kl": "x"}]}',
        r".* as log_history\[0\].kl in",
    ),
    "export": (EXPORTS_SHAPE, '{"onnx": 3}', "a JSON object as onnx in"),
    "median": (
        EXPORTS_SHAPE,
        '{"a": {"latency": {"file": {"median": []}}}}',
        ".* as a.latency.file.median in",
    ),
    "deep": (RESULTS_SHAPE, f'{{"a": {"[" * 60}1{"]" * 60}}}', "JSON in .*too deep"),
    "very deep": (RESULTS_SHAPE, "[" * 100_000, "JSON in .*too deep"),
    "half a character": (RESULTS_SHAPE, r'{"teacher": "\ud800"}', "JSON in .*results.json"),
    "cut off": (RESULTS_SHAPE, '{"student_miou": 0.', "JSON in .*results.json"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_of_another_shape_is_one_line_that_names_the_entry(name, tmp_path: Path):
    """Whoever formats it would end in a traceback that names neither file nor entry."""
    shape, text, message = FAULTS[name]
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^Expected {message}") as caught:
        read_object(file, shape)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_null_nan_and_a_missing_file_are_figures_that_do_not_exist(tmp_path: Path):
    """The Trainer writes NaN for the IoU of a class that never occurs."""
    file = tmp_path / "results.json"
    assert read_object(file, RESULTS_SHAPE) == {}
    written = {"student_miou": float("nan"), "teacher": None, "versions": None, "mine": [None]}
    file.write_text(json.dumps(written))
    read = {"student_miou": None, "teacher": None, "versions": {}, "mine": [None]}
    assert read_object(file, RESULTS_SHAPE) == read
