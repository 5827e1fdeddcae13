"""The page on adding a loss, followed word by word on a copy of the package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Squares, arguments, tiny_student, tiny_teacher

import kd_trainer
from kd_trainer.losses import TERMS, LossTerms, LossWeights
from kd_trainer.trainer import DistillationTrainer

FUNCTION = '''
"""Channel-wise distillation (Shu et al. 2021, arXiv 2011.13256), of one channel or several."""

from torch import Tensor


def channel_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL between the distributions over pixels that each channel's logits make."""
    s = (student.flatten(2) / temperature).log_softmax(dim=2)
    t = (teacher.flatten(2) / temperature).log_softmax(dim=2)
    return temperature**2 * (t.exp() * (t - s)).sum(dim=2).mean()
'''

# File, text that is there, text that is put before it: steps 2 and 3 of the page.
EDITS = (
    (
        "losses/terms.py",
        "from kd_trainer.losses.functions",
        "from kd_trainer.losses.channels import channel_kl\n",
    ),
    (
        "losses/terms.py",
        '    Term("bce"',
        '    Term("cwd", needs_teacher=True, title="CWD", softened=True),\n',
    ),
    ("losses/terms.py", "    bce: Tensor | None", "    cwd: Tensor | None = None\n"),
    ("losses/terms.py", "    bce: float", "    cwd: float = 0.0\n"),
    (
        "losses/terms.py",
        '    if "mse" in wanted:',
        '    if "cwd" in wanted:\n'
        '        terms["cwd"] = channel_kl(student, teacher, temperature)\n',
    ),
    (
        "arguments.py",
        "    bce_weight: float",
        '    cwd_weight: float = help_field(0.0, "Weight of CWD.")\n',
    ),
)

RUN = """
import json, sys
from pathlib import Path
import kd_trainer
from tiny import Squares, arguments, tiny_student, tiny_teacher
from kd_trainer.config import parse
from kd_trainer.console import console_line

from kd_trainer import model_card
from kd_trainer.doctor.loss import Gradients, share_finding
from kd_trainer.reports.charts import history_charts
from kd_trainer.trainer import DistillationTrainer
from kd_trainer.compare.runs import OF_THE_DISTILLATION

out = Path(sys.argv[1])
none = {f"{name}_weight": 0.0 for name in ("kl", "mse")}
args = arguments(out, max_steps=2, eval_strategy="steps", eval_steps=2, cwd_weight=2.0, **none)
data = {"train_dataset": Squares(4), "eval_dataset": Squares(2)}
trainer = DistillationTrainer(tiny_student(), args, teacher=tiny_teacher(), **data)
trainer.train()
logs = trainer.state.log_history
settings = {"cwd_weight": 2.0, "dice_weight": 1.0, "max_steps": 2}
settings |= {"temperature_schedule": "constant", "temperature_start": 3.0}
facts = type("Facts", (), {"settings": settings, "teacher": "some", "side": 32, "results": {}})
few = {"cwd": 9.9, "bce": 0.1}
try:
    DistillationTrainer(tiny_student(), arguments(out, **none), teacher=tiny_teacher())
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(json.dumps({
    "package": kd_trainer.__file__,
    "train": logs[0],
    "eval": next(log for log in logs if "eval_miou" in log),
    "console": console_line(logs[0]),
    "charts": history_charts(logs, ["a", "b"]),
    "card": str(model_card.recipe(facts)),
    "doctor": share_finding(Gradients(few, few, [], [], {})).text,
    "compare": sorted(OF_THE_DISTILLATION),
    "flag": parse(["--cwd_weight", "0.5"]).training.loss_weights.cwd,
    "refusal": refusal,
}))
"""


@pytest.mark.slow
def test_a_teacher_term_of_any_name_is_computed_logged_and_shown(tmp_path: Path):
    """A list of names kept elsewhere would give a run that never asks its teacher."""
    copied = tmp_path / "kd_trainer"
    here = Path(kd_trainer.__file__).parent
    shutil.copytree(here, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (copied / "losses" / "channels.py").write_text(FUNCTION)
    for name, before, more in EDITS:
        source = (copied / name).read_text()
        assert source.count(before) == 1, (name, before)
        (copied / name).write_text(source.replace(before, more + before))
    paths = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n"
    command = [sys.executable, "-c", paths + RUN, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["package"].startswith(str(tmp_path))
    log = seen["train"]
    assert log["cwd"] > 0
    assert log["loss"] == pytest.approx(2 * log["cwd"] + 0.5 * log["bce"] + log["dice"], rel=1e-4)
    assert log["grad_share/cwd"] > 0
    assert seen["eval"]["eval_cwd"] > 0
    assert "cwd " in seen["console"]
    assert " T 4.00" in seen["console"]
    charts = seen["charts"]
    assert sum(">cwd<" in chart for chart in charts) == 3  # training, evaluation, shares
    assert any(">Temperature<" in chart for chart in charts)
    assert "2 CWD + 1 Dice" in seen["card"]
    assert "3 throughout" in seen["card"]
    assert "cwd makes up 99%" in seen["doctor"]
    assert "cwd_weight" in seen["compare"]
    assert seen["flag"] == 0.5
    assert seen["refusal"].startswith("Expected a loss term that follows the teacher")
    assert "--cwd_weight" in seen["refusal"]


def test_terms_have_a_row_a_value_and_a_weight():
    """A row without a field is found here, and not in a run."""
    names = [term.name for term in TERMS]
    assert list(LossTerms.__dataclass_fields__) == names
    assert list(LossWeights.__dataclass_fields__) == [*names, "task"]


def test_a_teacher_that_no_term_needs_is_refused(tmp_path: Path):
    """It would be loaded, held in memory, and teach nothing."""
    args = arguments(tmp_path, kl_weight=0.0, mse_weight=0.0)
    with pytest.raises(ValueError, match=r"^Expected a loss term that follows the teacher"):
        DistillationTrainer(tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(4))
