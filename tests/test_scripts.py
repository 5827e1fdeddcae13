"""Wrong use of the scripts: one clear line, a non-zero exit, no traceback, nothing written."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_runs import ENCODER, save_network, train_flags, write_pairs

from kd_trainer.checkpointing.checkpoints import complete
from kd_trainer.config import DEFAULT_RECIPE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Folder with a data set `data`, one of four classes `data4`, and networks of 2 and 4.

    Further folders hold the network of two classes with one fault each.
    """
    root = tmp_path_factory.mktemp("good")
    write_pairs(root / "data", train=4, validation=2)
    write_pairs(root / "data4", num_labels=4, train=4, validation=2)
    save_network(root / "two")
    save_network(root / "four", num_labels=4)
    state = load_file(root / "two" / "model.safetensors")
    state.pop(next(name for name in state if name.startswith("decoder")))
    save_file(state, root / "short.safetensors")
    (root / "broken.mp4").write_bytes(b"no video")
    state["segmentation_head.0.bias"].fill_(float("nan"))
    broken = shutil.copytree(root / "two", root / "broken") / "model.safetensors"
    save_file(
        load_file(broken) | {"segmentation_head.0.bias": state["segmentation_head.0.bias"]},
        broken,
        {"format": "pt"},
    )
    for fault in ("short", "wide", "other", "cut", "bare", "garbled", "soft"):
        spoil(shutil.copytree(root / "two", root / fault), fault, root)
    shutil.copytree(root / "data" / "train" / "images", root / "photographs")
    (root / "photographs" / "bad.jpg").write_bytes(b"this is no picture")
    (root / "stranger").mkdir()
    (root / "stranger" / "config.json").write_text('{"model_type": "segformer"}')
    return root


def spoil(folder: Path, fault: str, root: Path) -> None:
    """Put a fault into a saved network."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = json.loads(config.read_text())
    if fault == "short":
        shutil.copy(root / "short.safetensors", weights)
    elif fault == "wide":
        settings["decoder_channels"][0] *= 2
    elif fault == "other":
        settings["encoder_name"] = "resnet18"
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif fault == "bare":
        weights.unlink()
    elif fault == "soft":  # two channels for two classes, as smp.Unet(classes=2) has them
        settings["classes"] = 2
        state = load_file(weights)
        for name in [name for name in state if name.startswith("segmentation_head")]:
            state[name] = state[name].repeat_interleave(2, dim=0)
        save_file(state, weights)
    config.write_text('{"no": json' if fault == "garbled" else json.dumps(settings))


class Used:
    """Runs a script in this process and holds what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capfd = capfd

    def error(self, script: str, *arguments: object) -> str:
        """The only line on stderr of a script that has to fail."""
        self.monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        assert stop.value.code not in (0, None)
        out, err = self.capfd.readouterr()
        assert out == ""
        # A bar that was drawn over and over is progress, not a message.
        lines = [line for line in err.splitlines() if line.strip() and "it/s]" not in line]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: Expected ")
        assert "Traceback" not in err
        return lines[0]


@pytest.fixture
def used(monkeypatch, capfd, tmp_path) -> Used:
    monkeypatch.chdir(tmp_path)
    return Used(monkeypatch, capfd)


# `{good}` is the folder of the fixture; the first word is the data set.
TRAIN = {
    "unknown recipe": ("data", "--config {recipe}", "Did you mean rgb_hier"),
    "unknown flag": ("data", "--temprature_start 3", "Did you mean --temperature_start?"),
    "unknown encoder": ("data", "--student_encoder timm-eficientnet-b0", "timm-efficientnet-b0"),
    "unknown architecture": ("data", "--student_arch unett", "Did you mean 'unet'?"),
    "missing folder": ("dta", "", "Did you mean 'data'?"),
    "missing split": ("data", "--train_split trein", "Did you mean 'train'?"),
    "missing encoder weights": ("data", "--encoder_weights gone.safetensors", "gone.safetensors"),
    "student and encoder": (
        "data",
        "--student {good}/two --student_encoder resnet18",
        "got it with --student_encoder",
    ),
    "missing teacher": ("data", "--teacher {good}/nobody", "nobody"),
    "teacher with other classes": ("data", "--teacher {good}/four", "teacher of 2 classes, got 4"),
    "teacher with missing keys": (
        "data",
        f"--teacher {{good}}/short.safetensors --teacher_encoder {ENCODER}",
        "missing",
    ),
    "too few labels for the masks": ("data4", "--num_labels 2", "set --num_labels 4"),
    "too many labels for the masks": (
        "data",
        "--num_labels 4",
        "Expected class ids 0..3",
    ),
    "image size": ("data", "--image_size 100", "divisible by 32, got 100. Use 96 or 128"),
    "teacher's image size": (
        "data",
        "--teacher {good}/two --teacher_image_size 100",
        "divisible by 32, got 100",
    ),
    "batch larger than the data": ("data", "--batch_size 5", "at least 5 training images"),
    "weight of the foreground": ("data4", "--num_labels 4 --pos_weight 2", "pos_weight"),
    "missing photographs": (
        "data",
        "--unlabelled {good}/nowhere --teacher {good}/two",
        "--unlabelled",
    ),
    "photographs for nobody": ("data", "--unlabelled {good}", "Expected a --teacher"),
    "nothing to resume": ("data", "--resume", "Expected a checkpoint"),
    "encoder far from any": ("data", "--student_encoder zzqzzq", "resnet18, resnet34"),
    "teacher folder with missing keys": ("data", "--teacher {good}/short", "missing: decoder"),
    "student with missing keys": ("data", "--student {good}/short", "missing: decoder"),
    "teacher of other shapes": ("data", "--teacher {good}/wide", "(16, 1376, 3, 3) for (32, 1376"),
    "student of other shapes": ("data", "--student {good}/wide", "(16, 1376, 3, 3) for (32, 1376"),
    "teacher of another encoder": ("data", "--teacher {good}/other", "extra: encoder.features"),
    "cut-off teacher": ("data", "--teacher {good}/cut", "cut/model.safetensors"),
    "cut-off student": ("data", "--student {good}/cut", "cut/model.safetensors"),
    "teacher without weights": ("data", "--teacher {good}/bare", "Check that model.safetensors"),
    "student without weights": ("data", "--student {good}/bare", "Check that model.safetensors"),
    "teacher with a garbled config": ("data", "--teacher {good}/garbled", "no JSON object"),
    "student with a garbled config": ("data", "--student {good}/garbled", "not a valid JSON"),
    "two channels beside a teacher": (
        "data",
        "--student {good}/soft --teacher {good}/two",
        "one logit for two classes",
    ),
    "too few decoder channels": ("data", "--decoder_channels 16 8", "for 2 blocks"),
    "unknown option of the decoder": (
        "data",
        "--student_options decoder_chanels=8",
        "Did you mean 'decoder_channels'?",
    ),
    "decoder channels of another kind": ("data", "--student_arch pan", "(default 32)"),
    "batch larger than the stream": ("data", "--batch_size 5 --streaming", "at least 5 training"),
    "unreadable photographs": (
        "data",
        "--unlabelled {good}/photographs --teacher {good}/two",
        "bad.jpg",
    ),
    "category of masks": ("data", "--category cat", "Leave --category out"),
    "output folder that is a file": (
        "data",
        "--output_dir {good}/short.safetensors/x",
        "short.safetensors is a file",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_wrong_use_of_train_is_one_line(case: str, good: Path, used: Used, tmp_path: Path):
    """A page of traceback, or an error after an hour of training, is what a user remembers."""
    data, flags, expected = TRAIN[case]
    more = flags.format(good=good, recipe=DEFAULT_RECIPE[:-1]).split()
    line = used.error("train.py", *train_flags(good / data, tmp_path / "out", *more))
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_dry_run_finds_what_the_run_would_find(good: Path, used: Used, tmp_path: Path):
    """A plan that is printed for data that cannot be trained on is worth nothing."""
    flags = train_flags(good / "data", tmp_path / "out", "--dry_run", "--image_size", "100")
    assert "divisible by 32" in used.error("train.py", *flags)


@pytest.mark.parametrize("how", ["newest", "named"])
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (None, "checkpoint-3: no COMPLETE.json"),
        ({"teacher": "another"}, "augmentation heavy, data_seed None, "),
        ({"seed": 5}, "more), got "),
    ],
)
def test_checkpoint_that_does_not_fit_is_one_line(
    how: str, run: dict | None, expected: str, good: Path, used: Used, tmp_path: Path
):
    """The Trainer would fail with a line for each tensor, or train on from what happens to fit."""
    checkpoint = tmp_path / "out" / "checkpoint-3"
    shutil.copytree(good / "two", checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    if run is not None:
        complete(checkpoint, run)
    resume = ["--resume", *([str(checkpoint)] if how == "named" else [])]
    out = tmp_path / ("out" if how == "newest" else "else")
    line = used.error("train.py", *train_flags(good / "data", out, *resume))
    assert expected in line
    assert len(line) < 1000
    assert [p.name for p in tmp_path.glob("*/*")] == ["checkpoint-3"]


def test_missing_dataset_is_asked_for(used: Used):
    """The commonest first command."""
    assert "Expected --dataset" in used.error("train.py")


def test_forgotten_teacher_is_asked_for(good: Path, used: Used):
    """Fifty epochs without distillation would look like a run with it."""
    line = used.error("train.py", "--dataset", good / "data")
    assert "Expected --teacher" in line
    assert "--teacher none" in line


@pytest.mark.parametrize(("saved", "expected"), [("four", "of 2 classes"), ("data", "config.json")])
def test_student_that_cannot_go_on_is_one_line(saved: str, expected: str, good: Path, used: Used):
    """Its classes are its own; only names and image size follow the run."""
    flags = ("--dataset", good / "data", "--teacher", "none", "--student", good / saved)
    assert expected in used.error("train.py", *flags, "--use_cpu")


@pytest.mark.parametrize(
    ("precision", "line"),
    [("fp16", "bf16 or no on a CPU, got fp16"), ("fp8", "one of auto, bf16, fp16, no, got 'fp8'")],
)
def test_other_precisions_of_the_launcher_are_refused(
    precision: str, line: str, good: Path, used: Used, monkeypatch
):
    """The run would be in fp32, and config.yaml say otherwise."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    flags = ("--dataset", good / "data", "--teacher", "none", "--use_cpu")
    assert line in used.error("train.py", *flags)


def broken(good: Path, folder: Path, fault: str) -> Path:
    """A copy of the data with one fault in it."""
    shutil.copytree(good / "data", folder)
    image, mask = (folder / "train" / kind / "p 2.png" for kind in ("images", "masks"))
    if fault == "image without mask":
        mask.unlink()
    elif fault == "mask without image":
        image.unlink()
    elif fault == "mask of another size":
        cv2.imwrite(str(mask), np.zeros((32, 64), np.uint8))
    elif fault == "unreadable image":
        image.write_bytes(b"this is no picture")
    elif fault == "unreadable mask":
        mask.write_bytes(mask.read_bytes()[:60])
    elif fault == "wrong class ids":
        cv2.imwrite(str(mask), np.full((64, 64), 7, np.uint8))
    elif fault == "cut-off image":
        image.unlink()
        jpeg = image.with_suffix(".jpg")
        cv2.imwrite(str(jpeg), np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
        jpeg.write_bytes(jpeg.read_bytes()[:2000])
    return folder


@pytest.mark.parametrize(
    "fault",
    [
        "image without mask",
        "mask without image",
        "mask of another size",
        "unreadable image",
        "unreadable mask",
        "wrong class ids",
    ],
)
def test_fault_in_the_data_is_one_line_that_names_the_file(
    fault: str, good: Path, used: Used, tmp_path: Path
):
    """In ten thousand files nobody finds the one that an error does not name."""
    data = broken(good, tmp_path / "data", fault)
    line = used.error("train.py", *train_flags(data, tmp_path / "out"))
    assert "p 2.png" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_fault_that_shows_during_training_is_one_line_too(
    workers: str, good: Path, used: Used, tmp_path: Path
):
    """A file whose head is sound is found when it is decoded, maybe in another process."""
    data = broken(good, tmp_path / "data", "cut-off image")
    flags = train_flags(data, tmp_path / "out", "--dataloader_num_workers", workers)
    line = used.error("train.py", *flags)
    assert "Expected a readable image" in line
    assert "p 2.jpg" in line


EVAL = {
    "no model": ("", "the following arguments are required: model"),
    "missing model": ("{good}/nobody --dataset {good}/data", "config.json"),
    "model without weights": (
        "{good}/stranger --dataset {good}/data",
        "Check that model.safetensors",
    ),
    "no dataset": ("{good}/two", "Expected --dataset"),
    "missing dataset": ("{good}/two --dataset {good}/dta", "Did you mean 'data'?"),
    "missing split": ("{good}/two --dataset {good}/data --eval_split test", "--eval_split"),
    "masks of other classes": ("{good}/two --dataset {good}/data4", "0 and 255"),
    "model of other classes": ("{good}/two --dataset {good}/data4 --num_labels 4", "4 classes"),
    "teacher of other classes": (
        "{good}/two --dataset {good}/data --teacher {good}/four",
        "teacher of 2 classes, got 4",
    ),
    "image size": ("{good}/two --dataset {good}/data --image_size 100", "divisible by 32"),
    "unknown flag": ("{good}/two --data_set x", "Did you mean --dataset?"),
    "flag of the training": ("{good}/two --augmentation light", "got --augmentation"),
    "batch size": ("{good}/two --dataset {good}/data --batch_size 0", "--batch_size of at least"),
    "workers": ("{good}/two --dataset {good}/data --workers -1", "--workers of at least 0, got -1"),
    "missing keys": ("{good}/short --dataset {good}/data", "missing: decoder"),
    "cut-off weights": ("{good}/cut --dataset {good}/data", "cut/model.safetensors"),
    "output folder that is a file": (
        "{good}/nobody --dataset {good}/data --output_dir {good}/short.safetensors",
        "short.safetensors is a file",
    ),
}


@pytest.mark.parametrize("case", EVAL)
def test_wrong_use_of_eval_is_one_line(case: str, good: Path, used: Used, tmp_path: Path):
    """Figures of the wrong data are worse than none."""
    arguments, expected = EVAL[case]
    assert expected in used.error("eval.py", *arguments.format(good=good).split())
    assert not (tmp_path / "runs").exists()


PREDICT = {
    "missing model": ("{good}/nobody {good}/data", "config.json"),
    "missing picture": ("{good}/two {good}/gone.jpg", "gone.jpg"),
    "glob without pictures": ("{good}/two {good}/*.jpg", "names none"),
    "file that is no picture": ("{good}/two {good}/two/config.json", "Expected a readable image"),
    "threshold": ("{good}/two {good}/data --threshold 50", "--threshold between 0 and 1"),
    "threshold of several classes": ("{good}/four {good}/data --threshold 0.6", "of 4 classes"),
    "broken weights": ("{good}/broken {good}/data", "Expected finite weights"),
    "overlap": ("{good}/two {good}/data --overlap 1", "--overlap from 0 to below 1"),
    "output": ("{good}/two {good}/data --outputs mask", "one of masks, overlays, cutouts"),
    "file that is no video": (
        "{good}/two {good}/broken.mp4",
        "Expected a video as its suffix says",
    ),
    "no picture": ("{good}/two", "images"),
    "missing keys": ("{good}/short {good}/data", "missing: decoder"),
    "cut-off weights": ("{good}/cut {good}/data", "cut/model.safetensors"),
    "output folder that is a file": (
        "{good}/two {good}/data --output_dir {good}/short.safetensors",
        "short.safetensors is a file",
    ),
}


@pytest.mark.parametrize("case", PREDICT)
def test_wrong_use_of_predict_is_one_line(case: str, good: Path, used: Used, tmp_path: Path):
    """A glob that matches nothing must not look like success."""
    arguments, expected = PREDICT[case]
    assert expected in used.error("predict.py", *arguments.format(good=good).split())
    assert not (tmp_path / "runs").exists()


REPORT = {
    "no run": ("", "the following arguments are required: run"),
    "missing run": ("{good}/nobody", "has no config.yaml"),
    "a model instead of a run": ("{good}/two", "Name the folder that holds config.yaml"),
    "unknown flag": ("{good}/two --max_image 3", "Did you mean --max_images?"),
    "output that is a folder": ("{good}/two --output {good}", "Expected --output to be a file"),
    "number of images": ("{good}/two --max_images -1", "--max_images of at least 0"),
    "no number": ("{good}/two --max_images many", "--max_images to be a whole number"),
}


@pytest.mark.parametrize("case", REPORT)
def test_wrong_use_of_report_is_one_line(case: str, good: Path, used: Used, tmp_path: Path):
    """Who names the student's folder instead of the run's wants to be told so."""
    arguments, expected = REPORT[case]
    assert expected in used.error("report.py", *arguments.format(good=good).split())
    assert list(tmp_path.iterdir()) == []


COMPARE = {
    "no dataset": ("--teacher {good}/two", "Expected --dataset"),
    "missing dataset": ("--dataset {good}/dta --teacher {good}/two", "Did you mean 'data'?"),
    "no teacher": ("--dataset {good}/data", "Expected a --teacher to compare"),
    "missing teacher": ("--dataset {good}/data --teacher {good}/nobody", "nobody"),
    "maps for a teacher": (
        "--dataset {good}/data --teacher_maps {good}/data",
        "got --teacher_maps",
    ),
    "no seeds": ("--seeds 0", "--seeds of at least 1, got 0"),
    "seeds twice": ("--seeds 2 --seed_list 0 1", "--seeds or --seed_list, got both"),
    "the same seed twice": ("--seed_list 1 1", "different seeds from 0, got 1 1"),
    "seed of a training": ("--seed 3", "Expected --seeds or --seed_list, got --seed"),
    "resume": ("--resume", "Expected no --resume"),
    "push": ("--push_to_hub", "Expected no --push_to_hub"),
    "student and encoder": (
        "--dataset {good}/data --teacher {good}/two --student {good}/two --student_encoder x",
        "got it with --student_encoder",
    ),
    "unknown kind": ("--only destilled", "one of baseline, distilled, got 'destilled'"),
    "no evaluation": (
        "--dataset {good}/data --teacher {good}/two --eval_strategy no",
        "Expected --eval_strategy epoch or steps",
    ),
    "unknown flag": ("--seedlist 3", "Did you mean --seed_list?"),
    "merge of nothing": ("--merge {good}/nowhere", "no such folder"),
    "merge of another folder": ("--merge {good}/data", "a folder without one"),
    "merge that trains": ("--merge {good} --dataset {good}/data", "got --dataset"),
    "merge of a seed": ("--merge {good} --seeds 2", "got --seeds"),
}


@pytest.mark.parametrize("case", COMPARE)
def test_wrong_use_of_compare_is_one_line(case: str, good: Path, used: Used, tmp_path: Path):
    """What is wrong with a comparison of days has to be said before it starts."""
    arguments, expected = COMPARE[case]
    flags = ["--student_encoder", ENCODER, "--encoder_weights", "none", "--image_size", "64"]
    given = arguments.format(good=good).split()
    assert expected in used.error("compare.py", *(given if "--merge" in given else given + flags))
    assert not (tmp_path / "runs").exists()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train.py --config nobody", "error: Expected a recipe"),
        ("predict.py {good}/short {good}/data", "error: Expected every weight of "),
    ],
)
def test_error_of_a_real_process_is_one_line(
    arguments: str, expected: str, good: Path, tmp_path: Path
):
    """Warnings of libraries at import, or their report of missing weights, would bury it."""
    script, *words = arguments.format(good=good).split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_accelerate_launches_a_run_that_leaves_a_student(good: Path, tmp_path: Path):
    """The command of the README, on a CPU, from another folder."""
    flags = train_flags(good / "data", tmp_path / "out", "--epochs", "1", teacher=good / "two")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    done = subprocess.run(
        [*launch, str(config), str(ROOT / "scripts" / "train.py"), *flags, "--mixed_precision"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    assert "warn" not in done.stderr.lower()
