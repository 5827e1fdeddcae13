"""What the demo promises, and that it fails where the promise is not kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import write_pairs

from kd_trainer.commands.demo import check, clear, demo
from kd_trainer.config import build, load_recipe
from kd_trainer.data import TransformedDataset, load_splits, transforms
from kd_trainer.doctor.teacher import Predictions
from kd_trainer.files import write_marker
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.students import parameter_counts

GOOD = {
    "teacher_miou": 0.85,
    "student_miou": 0.82,
    "constant_miou": 0.40,
    "eval_history": [{"miou": 0.45}, {"miou": 0.82}],
}


def test_a_demo_that_kept_its_promise_passes():
    """A check that always fails would be switched off."""
    check(GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_miou": 0.79}, r"its teacher to reach mIoU 0.80, got 0.7900"),
        ({"student_miou": 0.80}, r"its student to reach 95% .* got 0.8000"),
        ({"constant_miou": 0.50}, r"a constant prediction below mIoU 0.50, got 0.5000"),
        (
            {"eval_history": [{"miou": 0.71}]},
            r"its student after one epoch below mIoU 0.70, got 0.7100",
        ),
    ],
)
def test_a_demo_that_learned_nothing_is_an_error(change, message):
    """It would end with a table and exit code 0, and nobody reads the figures."""
    with pytest.raises(ValueError, match=f"^Expected of the demo {message}"):
        check(GOOD | change)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_demo_removes_what_a_demo_wrote_and_nothing_else(tmp_path: Path, monkeypatch):
    """`runs/demo` is also where a training from the recipe `demo` goes."""
    output = tmp_path / "demo"
    made = ("student/config.json", "teacher/student/config.json", "results.json")

    def interrupted(output: Path) -> None:
        write(output, *made)
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_trainer.commands.demo._train_both", interrupted)
    write(output, "notes.txt", "photos/mine.png")
    for _ in range(2):  # the second time over what the first has left
        with pytest.raises(KeyboardInterrupt):
            demo(output)
        assert all((output / name).is_file() for name in made)
    clear(output)
    left = {str(path.relative_to(output)) for path in output.rglob("*")}
    assert left == {".kd_trainer.json", "notes.txt", "photos", "photos/mine.png"}


@pytest.mark.parametrize("name", ["student/mine.safetensors", "checkpoint-7/x", "results.json"])
def test_the_demo_leaves_a_strangers_files_where_it_would_write(name: str, tmp_path: Path):
    """A marker in the folder says nothing about a file that was put beside those it names."""
    write(tmp_path, "student/config.json", "runs/events")
    write_marker(tmp_path, {"student/config.json", "runs/events", "../demo", "/etc/hosts"})
    write(tmp_path, name)
    with pytest.raises(ValueError, match=rf"^Expected .*demo, got {name}, which none has written"):
        clear(tmp_path)
    assert (tmp_path / name).is_file()
    assert (tmp_path / "student" / "config.json").is_file()


def test_the_demo_follows_no_link(tmp_path: Path):
    """A folder of panels may be a link to another disk."""
    (tmp_path / "demo").mkdir()
    write(tmp_path / "elsewhere", "panel.png")
    (tmp_path / "demo" / "panels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="got panels, which none has written"):
        clear(tmp_path / "demo")
    write_marker(tmp_path / "demo", {"panels", "panels/panel.png"})
    clear(tmp_path / "demo")
    assert not (tmp_path / "demo" / "panels").exists()
    assert (tmp_path / "elsewhere" / "panel.png").is_file()


def test_constant_prediction_is_counted_by_hand(tmp_path: Path):
    """The bound is worth something only if the constant is really the best one."""
    run = build({"dataset": str(write_pairs(tmp_path / "data")), "image_size": 64, "num_labels": 2})
    splits = load_splits(run.data)
    dataset = TransformedDataset(splits["validation"], transforms(splits, run.data, seed=0)[1])
    labels = torch.stack([dataset[index]["labels"].long() for index in range(len(dataset))])
    share = np.mean(labels.numpy())
    guess = Predictions(torch.zeros_like(labels), labels, run.data.id2label)
    assert guess.constant_miou == pytest.approx(max(share, 1 - share) / 2, abs=1e-9)


def test_the_demos_teacher_has_twice_the_parameters_of_its_student():
    """Two networks of one size would make a table that shows nothing."""
    used = {}
    for recipe in ("demo_teacher", "demo"):
        settings = load_recipe(recipe)
        used[recipe], _, _ = parameter_counts(
            SmpForSemanticSegmentation.create(
                settings["student_arch"],
                settings["student_encoder"],
                encoder_weights="none",
                decoder_channels=tuple(settings["decoder_channels"]),
            )
        )
    assert used["demo_teacher"] >= 2 * used["demo"]
