"""The page on adding a loss, followed to the letter on a copy of the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest
from tiny import Squares, arguments, tiny_student, tiny_teacher

import kd_trainer
from kd_trainer.trainer import DistillationTrainer

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"
# Beside the page's own: one that teaches nothing to a student of one logit.
REFUSED_ROW = """
Term(
    "twin",
    takes=("student", "teacher", "mask", "temperature"),
    binary=None,
    softmax=huber,
    softmax_from=3,
    degenerate="two classes always correlate",
    title="DIST",
)
"""

RUN = """
import json, sys
from pathlib import Path

import torch
from tiny import Squares, arguments, tiny_student, tiny_teacher

import kd_trainer
from kd_trainer.model_card import CardFacts, render
from kd_trainer.build import build_run
from kd_trainer.config import parse
from kd_trainer.compare.runs import OF_THE_DISTILLATION
from kd_trainer.console import console_line
from kd_trainer.doctor.loss import Gradients, share_finding
from kd_trainer.reports.charts import history_charts
from kd_trainer.trainer import DistillationTrainer

out = Path(sys.argv[1])
none = {"kl_weight": 0.0, "mse_weight": 0.0}
teacher = tiny_teacher()

def refusal(run):
    try:
        run()
    except ValueError as error:
        return str(error)

def trainer(**weights):
    return DistillationTrainer(tiny_student(), arguments(out, **none | weights), teacher=teacher)

args = arguments(out, max_steps=2, eval_strategy="steps", eval_steps=2, huber_weight=3.0, **none)
data = {"train_dataset": Squares(4), "eval_dataset": Squares(2)}
distillation = DistillationTrainer(tiny_student(), args, teacher=teacher, **data)
distillation.train()
logs = distillation.state.log_history
settings = {"huber_weight": 3.0, "dice_weight": 1.0, "max_steps": 2}
settings |= {"temperature_schedule": "constant", "temperature_start": 3.0}
facts = CardFacts(
    "me/x", "mit", tiny_student().config.to_dict(), (1, 0), 1.0, "photos",
    {"teacher": "big"}, settings,
)
few = {"huber": 9.9, "bce": 0.1}
flags = ["--dataset", "synthetic", "--teacher", "some", "--twin_weight", "1"]
logits, labels = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
every = kd_trainer.distillation_terms(logits, logits, labels, temperature=1.0)
print(json.dumps({
    "package": kd_trainer.__file__,
    "train": logs[0],
    "eval": next(log for log in logs if "eval_miou" in log),
    "console": console_line(logs[0]),
    "charts": history_charts(logs, ["a", "b"]),
    "card": render(facts),
    "doctor": share_finding(Gradients(few, few, [], [], {})).text,
    "compare": sorted(OF_THE_DISTILLATION),
    "flag": parse(["--huber_weight", "0.5"]).training.loss_weights.huber,
    "without terms": refusal(trainer),
    "degenerate": [
        refusal(lambda: trainer(twin_weight=1.0)), refusal(lambda: build_run(parse(flags)))
    ],
    "every": sorted(every.named()),
}))
"""


def put(file: Path, before: str, text: str) -> None:
    """Write a text before the only place of another."""
    source = file.read_text()
    assert source.count(before) == 1, (file, before)
    file.write_text(source.replace(before, text + before))


@pytest.mark.slow
def test_a_teacher_term_of_any_name_is_computed_logged_and_shown(tmp_path: Path):
    """A list of names kept elsewhere would give a run that never asks its teacher."""
    package = tmp_path / "kd_trainer"
    here = Path(kd_trainer.__file__).parent
    shutil.copytree(here, package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"^ +```py\n(.*?)^ +```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    function, row, field = map(dedent, blocks)
    functions, settings = package / "losses/functions.py", package / "arguments.py"
    put(functions, "Input = Literal[", f"{function}\n\n")
    rows = f"{row.rstrip()},{REFUSED_ROW.rstrip()},\n"
    put(functions, '    Term(\n        "bce",', indent(rows, "    "))
    fields = field + field.replace("huber", "twin")
    put(settings, "    bce_weight: float", indent(fields, "    "))
    paths = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n"
    command = [sys.executable, "-c", paths + RUN, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["package"].startswith(str(tmp_path))
    log = seen["train"]
    assert log["huber"] > 0
    assert log["loss"] == pytest.approx(3 * log["huber"] + 0.5 * log["bce"] + log["dice"], rel=1e-4)
    assert log["grad_share/huber"] > 0
    assert seen["eval"]["eval_huber"] > 0
    assert "huber " in seen["console"]
    assert " T 4.00" in seen["console"]
    charts = seen["charts"]
    assert sum(">huber<" in chart for chart in charts) == 3  # training, evaluation, shares
    assert any(">Temperature<" in chart for chart in charts)
    assert "3 Huber + 1 Dice" in seen["card"]
    assert "3 throughout" in seen["card"]
    assert "huber makes up 99%" in seen["doctor"]
    assert "huber_weight" in seen["compare"]
    assert seen["flag"] == 0.5
    assert seen["without terms"].startswith("Expected a loss term that follows the teacher")
    assert "--huber_weight" in seen["without terms"]
    assert all("two classes always correlate" in message for message in seen["degenerate"])
    assert seen["every"] == ["bce", "dice", "huber", "kl", "mse"]


def test_a_teacher_that_no_term_needs_is_refused(tmp_path: Path):
    """It would be loaded, held in memory, and teach nothing."""
    args = arguments(tmp_path, kl_weight=0.0, mse_weight=0.0)
    with pytest.raises(ValueError, match=r"^Expected a loss term that follows the teacher"):
        DistillationTrainer(tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(4))
