"""A whole run with a stock student, and everything that reads it afterwards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, serving
from PIL import Image
from small_runs import SIDE, save_network, train_flags, write_pairs
from stock_models import stock_model
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerForSemanticSegmentation,
    pipeline,
)

from kd_trainer.build import build_run
from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.doctor.checks import check_before_training
from kd_trainer.doctor.plan import describe
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.loading import load_student
from kd_trainer.models.image_processing import resize_image
from kd_trainer.students import student_logits

REPO = "me/stock"
MEAN, STD = [0.5, 0.45, 0.4], [0.2, 0.25, 0.3]


@dataclasses.dataclass
class Run:
    """A finished run with a SegFormer, which was pushed to a Hub; none of the tests changes it."""

    hub: Hub
    pairs: Path
    flags: list[str]
    folder: Path

    @property
    def student(self) -> Path:
        return self.folder / "student"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("stock")
    model = stock_model("segformer", num_labels=5)
    model.save_pretrained(root / "model")
    preprocessing = {"image_mean": MEAN, "image_std": STD, "size": {"height": 96, "width": 96}}
    (root / "model" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    pairs = write_pairs(root / "pairs", train=6, validation=3)
    flags = train_flags(
        pairs,
        root / "run",
        *("--student", str(root / "model"), "--unfreeze_start_epoch", "1"),
        *("--push_to_hub", "--hub_model_id", REPO, "--hub_license", "mit"),
        *("--report", "true", "--panel_images", "1"),
        teacher=save_network(root / "teacher"),
    )
    with serving(root / "cache") as hub:
        run_train(parse(flags))
        yield Run(hub, pairs, flags, root / "run")


def test_it_is_saved_as_the_stock_model_that_it_is(run: Run):
    """A folder with code of ours, or other names, would not load where nobody has this package."""
    assert {file.name for file in run.student.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }
    config = json.loads((run.student / "config.json").read_text())
    assert config["architectures"] == ["SegformerForSemanticSegmentation"]
    assert config["id2label"] == {"0": "background", "1": "foreground"}
    assert "auto_map" not in config
    code = "import sys; from transformers import AutoModelForSemanticSegmentation as A; "
    code += "m = A.from_pretrained(sys.argv[1]); assert 'kd_trainer' not in sys.modules; "
    code += "print(type(m).__name__)"
    command = [sys.executable, "-c", code, str(run.student)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=run.folder)
    assert done.stdout.strip() == "SegformerForSemanticSegmentation"


def image_of(run: Run) -> Path:
    return sorted((run.pairs / "validation" / "images").iterdir())[0]


def test_pipeline_and_predict_find_what_was_measured(run: Run, tmp_path: Path):
    """Each has a preprocessing of its own; the student is measured with that of the training."""
    path = image_of(run)
    student = load_student(run.student).eval()
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    inputs = normalise(resize_image(pixels, SIDE, SIDE)[None], pixel_statistics(student, "cpu"))
    with torch.no_grad():
        wanted = (student_logits(student, inputs)[0, 0] > 0).numpy()
    predict_main([str(run.student), str(path), "--output_dir", str(tmp_path)])
    (mask,) = (tmp_path / "masks").iterdir()
    assert np.array_equal(np.array(Image.open(mask)) > 127, wanted)
    segment = pipeline("image-segmentation", model=REPO, subtask="semantic")
    assert isinstance(segment.model, SegformerForSemanticSegmentation)
    found = np.zeros_like(wanted)
    for part in segment(Image.open(path)):
        found |= (np.array(part["mask"]) > 0) & (part["label"] == "foreground")
    assert (found == wanted).mean() > 0.99


def test_its_statistics_and_size_travel_with_it(run: Run):
    """Without them whoever loads it feeds other pixels than it was trained on."""
    saved = json.loads((run.student / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == MEAN
    assert saved["image_std"] == STD
    assert saved["size"] == {"height": SIDE, "width": SIDE}
    assert saved["image_processor_type"] == "SegformerImageProcessor"


def test_eval_finds_the_figures_of_the_run(run: Run, tmp_path: Path):
    """A saved student that is measured otherwise is another one."""
    evaluate_main([str(run.folder), "--dataset", str(run.pairs), "--output_dir", str(tmp_path)])
    measured = json.loads((tmp_path / "eval_results.json").read_text())
    results = json.loads((run.folder / "results.json").read_text())
    assert measured["student_miou"] == pytest.approx(results["student_miou"], abs=1e-9)
    assert results["student_parameters"] == 31_554
    assert (run.folder / "report.html").is_file()


def test_the_card_says_which_class_and_asks_for_no_code(run: Run):
    """A stranger would be told to run Python files that are not there."""
    card = run.hub.files(REPO)["README.md"].decode()
    assert "This `SegformerForSemanticSegmentation` finds the foreground in images" in card
    assert "trust_remote_code" not in card
    assert "smp" not in card.split("## Recipe")[0]
    assert "library_name: transformers" in card
    assert set(run.hub.files(REPO)) >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert not any(name.endswith(".py") for name in run.hub.files(REPO))
    AutoModelForSemanticSegmentation.from_pretrained(REPO)


def test_the_plan_names_its_units(run: Run, tmp_path: Path):
    """What is frozen until when is not to be guessed from the source of transformers."""
    flags = [*run.flags, "--output_dir", str(tmp_path / "other")]
    parsed = parse(flags)
    plan = describe(parsed, build_run(parsed))
    assert "segformer.stages.3, segformer.stages.2, segformer.stages.1, segformer.stages.0" in plan
    assert "SegformerForSemanticSegmentation" in plan


def test_the_preflight_does_not_judge_a_head_that_was_never_trained(
    run: Run, tmp_path: Path, capsys
):
    """Its answers are random: that masks are inverted, say, cannot be read off them."""
    flags = [flag for flag in run.flags if flag != "--no_preflight"]
    parsed = parse([*flags, "--output_dir", str(tmp_path), "--teacher", "none"])
    check_before_training(parsed, build_run(parsed))
    assert "student" not in capsys.readouterr().out.split("Preflight")[-1]


def test_onnx_is_checked_against_torch(run: Run, tmp_path: Path):
    """The resize and the difference of two logits have to be in the file."""
    pytest.importorskip("onnxruntime")
    flags = ["--format", "onnx", "--output", str(tmp_path), "--latency_repeats", "0"]
    export_main([str(run.student), *flags, "--images", str(image_of(run))])
    figures = json.loads((tmp_path / "export.json").read_text())["onnx"]
    assert figures["mask_iou"] >= 0.999
    predict_main(
        [str(tmp_path / "student.onnx"), str(image_of(run)), "--output_dir", str(tmp_path)]
    )
    with pytest.raises(ValueError, match=r"^Expected a student of smp for --format smp, got a Seg"):
        export_main(
            [str(run.student), "--format", "smp", *flags[2:], "--images", str(image_of(run))]
        )
