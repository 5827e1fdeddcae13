"""Multiplications against a hand count, sizes on disk, and latencies measured in turn."""

import os
import time

import numpy as np
import pytest
import torch
from small_runs import SIDE, save_network
from tiny import tiny_student
from torch import nn

from kd_trainer import costs as costs_module
from kd_trainer.arguments import usable_processors
from kd_trainer.costs import (
    RawLogits,
    costs,
    file_mib,
    image_milliseconds,
    interleaved,
    macs,
    onnx_bytes,
    onnx_call,
)


class Mixed(nn.Module):
    """One layer of each kind that is counted, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.linear = nn.Linear(4, 6)
        self.dead = nn.Conv2d(3, 999, 3)

    def forward(self, x):
        x = self.up(torch.relu(self.depthwise(self.norm(self.first(x)))))
        return self.linear(x.mean(dim=(2, 3)))


def test_macs_are_those_counted_by_hand():
    """Twice too much (operations for multiplications) is the commonest error in such tables."""
    first = 16 * 16 * 8 * 3 * 3 * 3
    depthwise = 16 * 16 * 8 * 5 * 5
    up = 16 * 16 * 8 * 4 * 2 * 2
    linear = 4 * 6
    network = Mixed().train()
    assert macs(network, 32) == first + depthwise + up + linear
    assert network.training
    assert torch.equal(network.norm.running_mean, torch.zeros(8))


def test_macs_of_a_student_are_those_of_its_layers():
    """A counter that misses a kind of layer of a real network makes it look cheap."""
    student = tiny_student().eval()
    found, expected = macs(RawLogits(student), 32), 0

    def count(layer, inputs, output):
        nonlocal expected
        height, width = output.shape[-2:]
        expected += layer.weight.numel() * height * width

    for layer in student.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    student(pixel_values=torch.zeros(1, 3, 32, 32))
    assert found == expected > 0


def test_raw_logits_come_from_any_output():
    """A teacher may answer with a tensor, with our output, or with that of transformers."""
    student, pixels = tiny_student().eval(), torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(RawLogits(student)(pixels), student(pixels).raw_logits)
    assert RawLogits(nn.Identity())(pixels) is pixels


def test_latency_is_the_time_of_a_call():
    """A unit that is off by a thousand, or a mean that one slow call moves, would go unnoticed."""
    pauses = iter([0.05, 0.05, *[0.002] * 9, 0.2])
    found = interleaved({"a": lambda: time.sleep(next(pauses))}, 10, 1)["a"]
    assert 2 <= found.median < 20
    assert 20 < found.percentile_95 < 250
    assert (found.repeats, found.threads) == (10, 1)


def test_networks_are_timed_in_turn_with_the_threads_asked_for():
    """Measured one after the other, the second gets the hot machine."""
    before, calls, threads = torch.get_num_threads(), [], set()

    def note(name):
        threads.add(torch.get_num_threads())
        calls.append(name)

    found = interleaved({"a": lambda: note("a"), "b": lambda: note("b")}, 3, 2)
    pairs = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert pairs == ["ba", "ab", "ba", "ab", "ba"]
    assert threads == {2}
    assert torch.get_num_threads() == before
    assert found["a"].repeats == found["b"].repeats == 3


def test_calls_that_warm_up_can_be_chosen_and_are_not_measured():
    """Somebody waits for the page on which these figures stand."""
    pauses = iter([0.2, *[0.002] * 3])
    found = interleaved({"a": lambda: time.sleep(next(pauses))}, 3, 1, warm_up=1)
    assert 2 <= found["a"].percentile_95 < 100


@pytest.mark.parametrize(("repeats", "threads"), [(0, 1), (1, 0)])
def test_latency_refuses_to_measure_nothing(repeats, threads):
    """The median of no call is NaN."""
    with pytest.raises(ValueError, match="of at least 1, got 0"):
        interleaved({"a": print}, repeats, threads)


def test_each_network_is_timed_at_its_own_size(monkeypatch):
    """A teacher of other input size, timed with the student's images, would look too fast."""
    seen = []

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, pixels):
            seen.append((tuple(pixels.shape), pixels.dtype))
            time.sleep(0.01)
            return pixels

    monkeypatch.setattr(costs_module, "FINAL_CALLS", 2)
    networks = {"student": tiny_student(), "teacher": Sized()}
    found = image_milliseconds(networks, {"student": 32, "teacher": 64})
    assert set(seen) == {((1, 3, 64, 64), torch.bfloat16)}
    assert found["teacher_ms"] >= 10
    assert found["latency_threads"] == torch.get_num_threads()


def test_file_size_counts_what_is_there(tmp_path):
    """A size made up from the parameters is wrong for half precision."""
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2**19)
    (tmp_path / "config.json").write_text("{}")
    assert file_mib(tmp_path) == 0.5
    assert file_mib(tmp_path / "a.safetensors") == 0.5
    assert file_mib(tmp_path / "nobody") is None


def test_costs_without_onnxruntime_have_no_such_row(monkeypatch):
    """The package is an extra; a row that is missing must not look like one of 0 ms."""
    monkeypatch.setattr(costs_module, "find_spec", lambda name: None)
    monkeypatch.setattr(costs_module, "usable_processors", lambda: 1)
    found = costs({"student": tiny_student()}, {"student": 32}, 1)["student"]
    assert [row["engine"] for row in found["latency"]] == ["torch"]
    assert found["side"] == 32
    assert costs({"student": tiny_student()}, {"student": 32}, 0)["student"]["latency"] == []


@pytest.mark.slow
def test_onnx_runtime_computes_the_network_it_times(tmp_path):
    """The time of a graph that computes something else is worth nothing."""
    pytest.importorskip("onnxruntime")
    from kd_trainer.loading import load_student

    student = RawLogits(load_student(save_network(tmp_path / "net")).eval())
    pixels = torch.randn(1, 3, SIDE, SIDE)
    found = onnx_call(onnx_bytes(student, SIDE), pixels, 1)()
    with torch.no_grad():
        np.testing.assert_allclose(found, student(pixels), atol=1e-4)


def test_usable_processors_are_what_this_process_may_use():
    """A container with two processors on a machine of 64 must not start 64 threads."""
    assert 1 <= usable_processors() <= (os.cpu_count() or 1)
