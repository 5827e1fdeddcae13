"""A run that is pushed, and what strangers make of its id alone: all against a Hub on loopback."""

import dataclasses
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Hub, serving
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from small_runs import SIDE, save_network, train_flags, write_pairs
from test_hub import contents
from tiny import Squares, arguments, tiny_student
from transformers import pipeline

from kd_trainer.commands.push import push_main
from kd_trainer.commands.train import run_train, train
from kd_trainer.config import parse
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
BINARY, CLASSES = "me/binary", "org/classes"
HUB_FLAGS = ("--push_to_hub", "--hub_model_id", BINARY, "--hub_license", "mit")
STUDENT_FILES = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "modeling.py",
    "image_processing.py",
    "configuration_smp.py",
    "config_checks.py",
    "encoder_units.py",
    "image_sizes.py",
    "weights.py",
}


@dataclasses.dataclass
class World:
    """A Hub with a student of a run and one of four classes; none of the tests changes them."""

    hub: Hub
    root: Path
    binary: Path
    classes: Path

    @property
    def run(self) -> Path:
        return self.binary.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with serving(root / "cache") as hub:
        flags = train_flags(
            write_pairs(root / "photos", train=6, validation=2),
            root / "run",
            *(*HUB_FLAGS, "--hub_strategy", "every_save", "--hub_always_push", "true"),
            *("--report_to", "tensorboard", "--panel_images", "1"),
            *("--hub_private_repo", "false", "--pictures"),
            teacher=save_network(root / "jane" / "big"),
        )
        run_train(parse(flags))
        classes = make_student(root / "four")
        flags = ["--public", "--license", "cc-by-4.0", "--dataset_name", "Boxes"]
        push_main([str(classes), CLASSES, *flags])
        yield World(hub, root, root / "run" / "student", classes)


def make_student(folder: Path) -> Path:
    """A student of four classes that finds each of them somewhere."""
    student = SmpForSemanticSegmentation.from_pretrained(save_network(folder, num_labels=4))
    student.train()
    for _ in range(30):  # running statistics, so that the answers are not all one class
        student(torch.randn(2, 3, SIDE, SIDE))
    student.save_pretrained(folder)
    SmpImageProcessor.from_model_config(student.config).save_pretrained(folder)
    return folder


def test_what_strangers_download_is_the_local_folder_byte_for_byte(world: World):
    """A student that changed on its way is another student."""
    for repo, student in ((BINARY, world.binary), (CLASSES, world.classes)):
        downloaded = contents(Path(snapshot_download(repo)))
        local = contents(student.parent / "hub" if student == world.binary else student / "hub")
        assert downloaded == local
        for name in STUDENT_FILES:
            assert downloaded[name] == (student / name).read_bytes(), name
    results = json.loads(world.hub.files(BINARY)["results.json"])
    assert results["student_miou"] == pytest.approx(figure(world.hub, BINARY, "mean_iou"), abs=1e-6)


def figure(hub: Hub, repo: str, metric: str) -> float:
    data = ModelCard(hub.files(repo)["README.md"].decode()).data
    return {r.metric_type: r.metric_value for r in data.eval_results}[metric]


def test_exactly_the_promised_files_are_pushed_at_each_push(world: World):
    """The stock Trainer pushes training_args.bin, which names this machine, and more."""
    shared = {*STUDENT_FILES, "README.md", "panel.png", "trainer_state.json"}
    commits = world.hub.repos["models", BINARY].commits[1:]
    assert [message for _, message, _ in commits] == [
        "Training in progress, step 3",
        "Training in progress, step 6",
        "Push a student",
    ]
    for _, message, files in commits:
        assert set(files) == shared | ({"results.json"} if message == "Push a student" else set())
        assert not any(str(world.root).encode() in content for content in files.values())
        assert not any(TOKEN.encode() in content for content in files.values())


def test_a_student_in_training_comes_with_its_own_figures(world: World):
    """Figures of another epoch on the card would belong to no student at all."""
    history = json.loads((world.run / "results.json").read_text())["eval_history"]
    for (_, _, files), logged in zip(
        world.hub.repos["models", BINARY].commits[1:3], history, strict=True
    ):
        card = files["README.md"].decode()
        assert "**In training, step" in card
        found = {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}
        assert found["mean_iou"] == pytest.approx(logged["miou"], abs=1e-6)
    assert "In training" not in world.hub.files(BINARY)["README.md"].decode()


def test_pushing_the_run_again_by_hand_changes_nothing(world: World, capsys):
    """Two ways to publish that differ would have to be explained to everybody."""
    before = len(world.hub.messages(BINARY))
    push_main([str(world.run), BINARY, "--public", "--pictures"])
    assert len(world.hub.messages(BINARY)) == before
    assert "no commit" in capsys.readouterr().out


def test_no_checkpoint_holds_a_token(world: World):
    """training_args.bin is a pickle of every argument, and hub_token one of them."""
    saved = list(world.run.rglob("training_args.bin"))
    assert len(saved) == 2
    for path in saved:
        args = torch.load(path, weights_only=False)
        assert args.hub_token is None
        assert args.push_to_hub
        assert TOKEN.encode() not in path.read_bytes()
    assert not any(TOKEN in path.read_text() for path in world.run.glob("*.[jy]*"))


def test_dry_run_writes_the_folder_and_asks_nobody(world: World, tmp_path: Path, capsys):
    """It is there to look at what would become public, without a token or a network."""
    asked = len(world.hub.requests)
    flags = ["--license", "apache-2.0", "--dry_run", "--output_dir", str(tmp_path / "look")]
    push_main([str(world.run), "me/other", *flags, "--dataset_name", "Boxes"])
    assert len(world.hub.requests) == asked
    card = (tmp_path / "look" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "split `validation` of Boxes" in card
    assert not (tmp_path / "look" / "panel.png").exists()
    assert "nothing was pushed" in capsys.readouterr().out


def test_a_push_into_the_working_folder_deletes_nothing(world: World, tmp_path: Path, monkeypatch):
    """With a README.md and only familiar names in it, such a folder passed for an earlier push."""
    shutil.copytree(world.run, tmp_path / "runs" / "mine")
    (tmp_path / "README.md").write_text("# My experiments")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for place in (".", "..", str(tmp_path), "runs"):
        with pytest.raises(ValueError, match=r"^Expected a folder .* --output_dir"):
            push_main(["runs/mine", "me/x", "--license", "mit", "--dry_run", "--output_dir", place])
    assert contents(tmp_path) == before


def test_the_teacher_is_named_without_its_folders(world: World):
    """The path of a teacher says on whose disk, and in which project, it lies."""
    assert json.loads((world.run / "results.json").read_text())["teacher"] == "big"
    assert json.loads(world.hub.files(BINARY)["results.json"])["teacher"] == "big"


def test_baseline_stands_beside_the_student(world: World, tmp_path: Path):
    """Only against the same student without a teacher can one see what the teacher gave."""
    alone = tmp_path / "results.json"
    alone.write_text(json.dumps({"student_miou": 0.125, "teacher": None}))
    flags = ["--dry_run", "--output_dir", str(tmp_path / "look"), "--baseline"]
    push_main([str(world.run), BINARY, *flags, str(alone)])
    assert "| 0.1250 |" in (tmp_path / "look" / "README.md").read_text()
    with pytest.raises(ValueError, match="got one taught by big"):
        push_main([str(world.run), BINARY, *flags, str(world.run / "results.json")])


def test_checked_exports_and_measured_latencies_stand_on_the_card(world: World, tmp_path: Path):
    """Whoever chooses a model for a device looks for milliseconds, and for what int8 costs."""
    run = shutil.copytree(world.run, tmp_path / "compare" / "distilled_seed0")
    times = {"torch": {"median": 12.34}, "file": {"median": 5.67}}
    export = {"mib": 6.5, "mask_iou": 0.975, "miou_drop_points": 0.25, "latency": times}
    (run / "export.json").write_text(json.dumps({"onnx-int8": export, "smp": {"mib": 22.0}}))
    row = {"engine": "onnxruntime", "threads": 1, "median": 8.9, "percentile_95": 9.8}
    costs = {"teacher": None, "student": {"latency": [row]}, "load": 0.0}
    (run.parent / "comparison.json").write_text(json.dumps({"costs": costs}))
    push_main([str(run), BINARY, "--dry_run", "--output_dir", str(tmp_path / "look")])
    card = (tmp_path / "look" / "README.md").read_text()
    assert "| onnx-int8 | 6.5 | 0.975 | 0.25 | 5.67 | 12.34 |" in card
    assert "| smp | 22 |  |  |  |  |" in card
    assert "| student | onnxruntime | 1 | 8.9 | 9.8 |" in card
    measured = json.loads((run / "results.json").read_text())
    for who in ("student", "teacher"):
        (line,) = re.findall(rf"^\| {who} \|.* ([\d.]+) \|$", card, re.MULTILINE)[:1]
        assert float(line) == pytest.approx(measured[f"{who}_ms"], abs=0.05)


# What a stranger runs: the code of the card, in a process that has never heard of kd_trainer.
STRANGER = """
import re, sys
import numpy as np

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kd_trainer":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from huggingface_hub import hf_hub_download

for number, repo in enumerate(sys.argv[1:]):
    card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
    blocks = re.findall(r"^```python\\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3, len(blocks)
    names = {}
    for block in blocks:
        exec(block, names)
    parts = names["segment"]("photograph.jpg")
    masks = {"pipeline " + part["label"]: np.array(part["mask"]) > 0 for part in parts}
    np.savez(f"{number}.npz", auto=names["classes"].numpy(), smp=names["mask"].numpy(), **masks)
assert "kd_trainer" not in sys.modules
"""


@pytest.fixture(scope="module")
def stranger(world: World, tmp_path_factory) -> Path:
    """Where that process left the masks of both students, and its photograph."""
    folder = tmp_path_factory.mktemp("stranger")
    photograph().save(folder / "photograph.jpg", quality=95)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, BINARY, CLASSES],
        cwd=folder,
        env=clean
        | {"HF_ENDPOINT": world.hub.url, "HF_HOME": str(folder / "home")}
        | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def photograph() -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((70, 90), Image.Resampling.BICUBIC)


def reference(
    student: SmpForSemanticSegmentation, image: Image.Image
) -> tuple[np.ndarray, np.ndarray]:
    """Class maps of the local student: of the picture's size, and of the network's."""
    processor = SmpImageProcessor.from_model_config(student.config)
    with torch.no_grad():
        output = student(**processor(image, return_tensors="pt"))
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        plain = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
        mean, std = (
            torch.tensor(list(values)).view(1, 3, 1, 1)
            for values in (student.config.image_mean, student.config.image_std)
        )
        resized = student((plain - mean) / std).logits.argmax(dim=1)[0]
    (large,) = processor.post_process_semantic_segmentation(output, [(image.height, image.width)])
    return large.numpy(), resized.numpy()


@pytest.mark.parametrize(("number", "kind"), [(0, "binary"), (1, "classes")])
def test_code_of_the_card_gives_the_masks_of_the_trained_student(number, kind, stranger, world):
    """A snippet that was never run is a promise; a stranger has no other documentation."""
    student = SmpForSemanticSegmentation.from_pretrained(getattr(world, kind)).eval()
    expected, small = reference(student, Image.open(stranger / "photograph.jpg"))
    found = np.load(stranger / f"{number}.npz")
    assert len(np.unique(expected)) > 1
    assert (found["auto"] == expected).mean() > 0.9995
    assert (found["smp"].astype(int) == small).mean() > 0.9995
    for index, name in student.config.id2label.items():
        mask = found.get(f"pipeline {name}", np.zeros(expected.shape, bool))
        assert (mask == (expected == index)).mean() > 0.9995, name
    if kind == "binary":  # that of the background is written over by the other student
        (file,) = stranger.glob("*_foreground.png")
        written = np.array(Image.open(file)) > 0
        assert (written == (expected == 1)).mean() > 0.9995


@pytest.mark.parametrize(("repo", "kind"), [(BINARY, "binary"), (CLASSES, "classes")])
def test_pipeline_with_the_package_takes_every_picture(repo, kind, world, capfd, monkeypatch):
    """With kd_trainer installed no foreign code has to run, and nothing has to be said."""
    asked = []  # an exception would be swallowed by the pipeline
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "n")
    segment = pipeline("image-segmentation", model=repo)
    assert type(segment.model) is SmpForSemanticSegmentation
    student = SmpForSemanticSegmentation.from_pretrained(getattr(world, kind)).eval()
    for mode, size in itertools.product(("L", "RGBA", "P", "CMYK"), ((70, 90), (333, 41))):
        image = photograph().resize(size).convert(mode)
        expected, _ = reference(student, image.convert("RGB"))
        for part in segment(image):
            index = segment.model.config.label2id[part["label"]]
            mask = np.array(part["mask"]) > 0
            assert mask.shape == (size[1], size[0])
            assert (mask == (expected == index)).mean() > 0.9995
    assert asked == []
    out, printed = capfd.readouterr()
    assert out == ""
    assert not re.search(r"warn|error|not supported|kd_trainer", printed, re.IGNORECASE), printed


def wrong_train(root: Path, *flags: str) -> list[str]:
    return train_flags(root / "photos", root / "unborn", *flags)


WRONG = {
    "token": (("--hub_token", "hf_abc"), "training_args.bin of every checkpoint. Log in"),
    "all checkpoints": (("--hub_strategy", "all_checkpoints"), "only the student is published"),
    "checkpoint": (("--hub_strategy", "checkpoint"), "got checkpoint: checkpoints hold"),
    "strategy": (("--hub_strategy", "sometimes"), "one of end, every_save, got 'sometimes'"),
    "branch": (("--hub_revision", "dev"), "Expected no --hub_revision, got dev"),
    "no id": (("--push_to_hub",), "Expected --hub_model_id OWNER/NAME with --push_to_hub"),
    "id of one part": (("--push_to_hub", "--hub_model_id", "student"), "like me/student"),
    "no licence": (HUB_FLAGS[:3], "Expected --hub_license for a push, got none. Name the"),
    "no licence id": (("--hub_license", "Apache 2.0"), "Try apache-2.0"),
    "id without a push": (HUB_FLAGS[1:3], "Expected --push_to_hub with --hub_model_id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_when_they_are_parsed(case: str, tmp_path: Path):
    """Each of them would fail hours later, or publish what must stay here."""
    flags, message = WRONG[case]
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        parse(wrong_train(tmp_path, *flags))
    assert message in str(caught.value)
    assert "hf_abc" not in str(caught.value)


def test_permission_is_asked_for_before_the_training(hub: Hub, tmp_path: Path, monkeypatch):
    """A run of hours that ends with HTTP 403 has wasted them."""
    monkeypatch.setenv("HF_TOKEN", "token-to-read")
    with pytest.raises(PermissionError, match="This token may only read"):
        train(parse(wrong_train(tmp_path, *HUB_FLAGS)))  # not even the data is there
    assert not (tmp_path / "unborn").exists()


def test_a_push_that_fails_in_training_does_not_end_it(hub: Hub, tmp_path: Path, capfd):
    """The student is worth more than its publication; but nobody must believe it is public."""
    write_pairs(tmp_path / "photos", train=4, validation=2)
    hub.fail("/commit/", 403, message="Storage is full")
    flags = [*HUB_FLAGS, "--hub_strategy", "every_save", "--epochs", "1"]
    with pytest.raises(PermissionError, match="Storage is full"):
        train(parse(train_flags(tmp_path / "photos", tmp_path / "run", *flags)))
    assert (tmp_path / "run" / "results.json").is_file()
    assert "push during the training failed: Expected a token that may" in capfd.readouterr().err
    hub.faults.clear()
    push_main([str(tmp_path / "run"), BINARY])
    assert hub.messages(BINARY) == ["Push a student"]
    assert "Trained without a teacher" in hub.files(BINARY)["README.md"].decode()


def python_trainer(folder: Path, **options: Any) -> DistillationTrainer:
    student = tiny_student()
    args = arguments(folder, num_train_epochs=1, **options)
    processor = SmpImageProcessor.from_model_config(student.config)
    return DistillationTrainer(student, args, train_dataset=Squares(2), processing_class=processor)


def test_trainer_pushes_the_same_kind_of_folder_from_python(hub: Hub, tmp_path: Path):
    """Whoever calls the Trainer's own method must not publish its whole output folder."""
    options = {"hub_model_id": BINARY, "hub_license": "mit", "hub_private_repo": True}
    trainer = python_trainer(tmp_path / "run", push_to_hub=True, **options)
    trainer.train()
    assert hub.messages(BINARY) == [], "nothing before it is asked for"
    pushed = trainer.push_to_hub("Mine")
    assert pushed.url == f"{hub.url}/{BINARY}"
    assert set(hub.files(BINARY)) == {*STUDENT_FILES, "README.md"}
    assert hub.repos["models", BINARY].private
    with pytest.raises(TypeError, match="Expected commit_message alone, got tags"):
        trainer.push_to_hub(tags="x")
    with pytest.raises(ValueError, match="Expected no token as an argument"):
        trainer.init_hf_repo(token="hf_abc")


def test_trainer_without_id_licence_or_processor_says_so(hub: Hub, tmp_path: Path):
    """The stock method would push under the folder's name, without a licence."""
    with pytest.raises(ValueError, match="Expected hub_model_id and hub_license"):
        python_trainer(tmp_path).push_to_hub()
    trainer = python_trainer(tmp_path, push_to_hub=True, hub_model_id=BINARY, hub_license="mit")
    mine = tmp_path / "hub" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(ValueError, match=r"which holds mine\.txt"):
        trainer.init_hf_repo()
    trainer.processing_class = None
    with pytest.raises(ValueError, match="Expected processing_class for a push"):
        trainer.init_hf_repo()


PUSH: dict[str, tuple[str, str]] = {
    "no folder": ("", "the following arguments are required"),
    "no student": ("{root} me/x --license mit", "Expected a run folder or a saved student"),
    "no licence": ("{four} me/x", "Expected --license for a push, got none. Name the licence"),
    "no id": ("{four} x --license mit", "Write it like me/student"),
    "unknown flag": ("{four} me/x --licence mit", "Did you mean --license?"),
    "somebody else's": ("{four} eve/x --license mit", "may write to eve/x, got HTTP 403"),
    "missing baseline": ("{four} me/x --license mit --baseline gone.json", "got gone.json"),
    "source as target": ("{four} me/x --license mit --output_dir {four}", "which is the source"),
    "folder of others": ("{four} me/x --license mit --output_dir {root}", "which holds"),
    "public before": (
        "{four} org/classes --license mit",
        "to be private, got a public",
    ),
    "both": ("{four} me/x --license mit --public --private", "got both. Without either"),
    "private false": ("{four} me/x --private false", "got --private false alone"),
    "empty message": ("{four} me/x --license mit --commit_message=", "got an empty one"),
}


@pytest.mark.parametrize("case", PUSH)
def test_wrong_use_of_push_is_one_line(case: str, world: World, monkeypatch, capfd):
    """What is wrong shows before anything is uploaded, and says what to do."""
    arguments, message = PUSH[case]
    words = arguments.format(root=world.root, four=world.classes).split()
    monkeypatch.setattr(sys, "argv", ["push.py", *words])
    before: Any = len(world.hub.messages(CLASSES))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "push.py"), run_name="__main__")
    assert stop.value.code == 1
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: Expected ")
    assert message in line
    assert out == ""
    assert len(world.hub.messages(CLASSES)) == before
