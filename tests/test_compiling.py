"""torch.compile of student and teacher: the same results, and recompiles that are seen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch._dynamo.utils import counters

from kd_trainer.fast_layers import use_fast_layers
from kd_trainer.teacher import TeacherInference
from kd_trainer.trainer import DistillationTrainer


def logs_of(folder: Path, **options) -> list[dict[str, float]]:
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(
            folder, num_train_epochs=2, unfreeze_start_epoch=1, learning_rate=1e-4, **options
        ),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Code and counts of other tests would change what is seen here."""
    torch.compiler.reset()
    counters.clear()


def test_compiled_run_learns_the_same_and_counts_its_graphs(tmp_path: Path):
    """torch gives up after some recompiles without a word; the count in the log shows both."""
    plain = logs_of(tmp_path / "plain")
    compiled = logs_of(tmp_path / "compiled", torch_compile_backend="eager", compile_teacher=True)
    assert [log["loss"] for log in compiled] == pytest.approx(
        [log["loss"] for log in plain], rel=1e-4
    )
    graphs = [log["compiled_graphs"] for log in compiled]
    frozen, freed = graphs[1], graphs[-1]
    assert frozen >= 2  # student and teacher
    assert freed > frozen  # a unit was freed, which is another graph
    assert all("compiled_graphs" not in log for log in plain)


def test_compiled_teacher_answers_the_same():
    """A teacher compiled before it is folded would answer as another network."""
    teacher = tiny_teacher()
    pixels = torch.randn(2, 3, 32, 32)
    answers = TeacherInference(teacher, precision="no", backend="eager")
    assert torch.allclose(answers(pixels), teacher(pixels), rtol=1e-4, atol=1e-5)


# torch 2.10 warns so of what its own tracing does.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_student_keeps_its_fast_layers(monkeypatch: pytest.MonkeyPatch):
    """Without them its bf16 gradients of depthwise convolutions took most of a step."""
    monkeypatch.setattr("kd_trainer.fast_layers._ENOUGH_PIXELS", 0)
    torch.manual_seed(0)
    network = tiny_student("timm-efficientnet-b0")
    use_fast_layers(network)
    compiled = copy.deepcopy(network)
    pixels = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    kinds: list[set[str]] = []

    def seen(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        kinds.append({str(node.target) for node in graph.graph.nodes})
        return graph

    forward = torch.compile(compiled, backend=seen, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = [ask(pixel_values=pixels)["raw_logits"] for ask in (network, forward)]
    assert torch.equal(*found)
    for logits in found:
        logits.float().square().mean().backward()
    for one, other in zip(network.parameters(), compiled.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6)
    (calls,) = kinds
    assert any("autograd_function_apply" in call for call in calls)
    assert any("conv_transpose2d" in call for call in calls)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_training_of_a_student_is_its_own(tmp_path: Path, compiled: bool):
    """accelerate prepares a model once: the first one's precision stayed, uncompiled."""
    student, teacher = tiny_student(), tiny_teacher()
    precise: list[bool] = []
    encoder = next(student.children())
    encoder.register_forward_hook(lambda *_: precise.append(not torch.is_autocast_enabled("cpu")))
    for number, precision in enumerate(("bf16", "no", "bf16")):
        counters.clear()
        options = {"torch_compile_backend": "eager"} if compiled and number else {}
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path, max_steps=1, mixed_precision=precision, **options),
            teacher=teacher,
            train_dataset=Squares(4),
        )
        trainer.train()
        assert precise.pop() == (precision == "no")
        assert bool(counters["stats"]["unique_graphs"]) == bool(options)
        assert ("_original_forward" in vars(student)) == (precision == "bf16")
