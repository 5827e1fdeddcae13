"""Result files that every JSON reader accepts."""

import json
import math
from pathlib import Path

from kd_trainer.run_folder import write_json


def test_figures_that_do_not_exist_become_null(tmp_path: Path):
    """Python writes NaN, which is no JSON: most other readers refuse the whole file."""
    path = tmp_path / "new" / "results.json"
    write_json(path, {"iou_bag": math.nan, "history": [{"loss": math.inf}], "miou": 0.5, "n": 3})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"iou_bag": None, "history": [{"loss": None}], "miou": 0.5, "n": 3}
