"""A stock student with what else the package does: comparisons, the demo, compile, ranks, ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SIDE, save_network, train_flags, write_pairs
from stock_models import stock_model
from test_distributed import TERMS, TIMES, launch
from tiny import Squares, arguments, tiny_teacher
from torch._dynamo.utils import counters
from transformers import AutoModelForSemanticSegmentation

from kd_trainer.commands.compare import run_compare
from kd_trainer.commands.export import export_main
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.web_demo import WebDemoArguments, load_models
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.students import as_student, processor_of, student_logits
from kd_trainer.trainer import DistillationTrainer
from kd_trainer.web_demo.models import examine

TESTS = Path(__file__).parent


def louder(network: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Weights whose answers differ from pixel to pixel."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return network


def save_stock(folder: Path, family: str, factor: float = 1.0) -> Path:
    student = as_student(louder(stock_model(family), factor), image_size=SIDE)
    student.save_pretrained(folder)
    processor_of(student).save_pretrained(folder)
    return folder


def picture(folder: Path) -> Path:
    pixels = np.random.default_rng(8).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "p.png")
    return folder / "p.png"


@pytest.mark.slow
def test_it_is_compared_with_and_without_its_teacher(tmp_path: Path):
    """Both kinds start from the same saved model, and their images are counted from what it is."""
    data = write_pairs(tmp_path / "data", train=4, validation=2)
    flags = train_flags(
        data,
        tmp_path / "out",
        *("--student", str(save_stock(tmp_path / "model", "segformer"))),
        *("--seeds", "1", "--latency_repeats", "1", "--bootstrap", "10", "--epochs", "1"),
        teacher=save_network(tmp_path / "teacher"),
    )
    summary = run_compare(parse_comparison(flags))
    for kind in ("baseline", "distilled"):
        folder = tmp_path / "out" / f"{kind}_seed0"
        results = json.loads((folder / "results.json").read_text())
        measured = summary["students"][kind]["metrics"]["miou"]["mean"]
        assert measured == pytest.approx(results["student_miou"], abs=1e-9)
        AutoModelForSemanticSegmentation.from_pretrained(folder / "student")


def test_the_demo_shows_the_masks_of_predict(tmp_path: Path):
    """Its logits are a quarter of the size, and two for one task: resized or read otherwise."""
    folder, image = save_stock(tmp_path / "model", "segformer", 2.0), picture(tmp_path)
    teacher = ModelArguments(teacher=str(save_network(tmp_path / "teacher")))
    models = load_models(str(folder), teacher, WebDemoArguments())
    result = examine(models, np.array(Image.open(image)), 0.5)
    predict_main([str(folder), str(image), "--output_dir", str(tmp_path / "out")])
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "p.png")) > 127
    assert mask.any()
    assert not mask.all()
    assert np.array_equal(result.masks["student"] > 0, mask)
    assert models["student"].name == "SegformerForSemanticSegmentation"


def test_a_compiled_run_learns_the_same(tmp_path: Path):
    """Units are freed by stages, and each is another graph."""

    def losses(folder: Path, **options) -> list[float]:
        torch.compiler.reset()
        counters.clear()
        trainer = DistillationTrainer(
            as_student(stock_model("segformer"), image_size=32),
            arguments(
                folder, num_train_epochs=2, unfreeze_start_epoch=1, learning_rate=1e-4, **options
            ),
            teacher=tiny_teacher(),
            train_dataset=Squares(4),
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert all(("compiled_graphs" in log) == bool(options) for log in logs)
        return [log["loss"] for log in logs]

    compiled = losses(tmp_path / "compiled", torch_compile_backend="eager")
    assert compiled == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.distributed
def test_two_ranks_have_the_same_weights_and_measure_them(tmp_path: Path):
    """Units are frozen after the wrap, and BatchNorms are those of the first rank: as with smp."""
    launch(str(TESTS / "workers" / "two_stock.py"), str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank_{i}.json").read_text()) for i in (0, 1))
    assert first["world"] == second["world"] == 2
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == len(first["digests"])
    assert first["free"] == second["free"]
    assert len(set(first["free"])) == 3
    student = as_student(stock_model("segformer"), image_size=32)
    student.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    args = arguments(tmp_path / "alone")
    alone = DistillationTrainer(student, args, teacher=tiny_teacher())
    figures = alone.evaluate(Squares(3, offset=50))
    kept = [n for n in figures if n not in TERMS and not any(time in n for time in TIMES)]
    kept.remove("epoch")
    for rank in (first, second):
        assert {n: rank["figures"][n] for n in kept} == pytest.approx(
            {n: figures[n] for n in kept}, rel=1e-6, nan_ok=True
        )


def test_onnx_of_a_plain_vision_transformer_is_that_of_torch(tmp_path: Path):
    """A third family beside SegFormer and UperNet; a DPT takes its own size alone."""
    pytest.importorskip("onnxruntime")
    folder, image = save_stock(tmp_path / "dpt", "dpt", 4.0), picture(tmp_path)
    flags = ["--format", "onnx", "--output", str(tmp_path / "out"), "--latency_repeats", "0"]
    with pytest.raises(ValueError, match=r"DPTForSemanticSegmentation: .* with --fixed_size"):
        export_main([str(folder), *flags, "--images", str(image)])
    export_main([str(folder), *flags, "--images", str(image), "--fixed_size"])
    figures = json.loads((tmp_path / "out" / "export.json").read_text())["onnx"]
    assert figures["mask_iou"] >= 0.999
    assert figures["relative_difference"] < 1e-4
    network = as_student(louder(stock_model("dpt"), 4.0), image_size=SIDE)
    with torch.no_grad():
        found = student_logits(network.eval(), torch.randn(1, 3, SIDE, SIDE)) > 0
    assert 0.05 < found.float().mean() < 0.95  # else every file has this mask
