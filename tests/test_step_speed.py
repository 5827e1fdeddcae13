"""What makes a step fast changes no result, and stays in place; nothing is timed here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath, StdConv2d
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from benchmarks.plain_loop import PlainLoop
from kd_trainer.commands.train import speed_up
from kd_trainer.fast_layers import (
    FastDepthwise,
    FastSqueezeExcite,
    FastSwish,
    FastUnetBlock,
    folded,
    use_fast_layers,
)
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher, TeacherInference
from kd_trainer.trainer import DistillationTrainer

EFFICIENT = "timm-efficientnet-b0"


@pytest.fixture(autouse=True)
def small_maps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder blocks take their quick way however small the images are."""
    monkeypatch.setattr("kd_trainer.fast_layers._ENOUGH_PIXELS", 0)


def used(network: nn.Module) -> nn.Module:
    """A network whose BatchNorms have statistics and scales of their own, as after a training."""
    draw = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(shape, generator=draw))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=draw))
            module.weight.data.copy_(0.5 + torch.rand(shape, generator=draw))
            module.bias.data.copy_(0.2 * torch.randn(shape, generator=draw))
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@torch.no_grad()
def called_norms(network: nn.Module, pixels: Tensor) -> int:
    """BatchNorms that a forward pass reaches: encoders may hold more."""
    calls: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda m, *_: calls.append(m))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    network(pixels)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize("encoder", ["resnet18", EFFICIENT, "mobilenet_v2"])
def test_folded_network_has_the_same_logits_in_float64(encoder: str):
    """A scale folded into the wrong convolution would give a teacher that teaches something else,
    with logits that look as good as any.
    """
    network = used(tiny_student(encoder)).double()
    kept = copy.deepcopy(network.state_dict())
    pixels = torch.randn(2, 3, SIDE, 2 * SIDE, dtype=torch.float64)
    quick = folded(network, torch.float64, pixels[:1, ..., :SIDE])
    with torch.no_grad():
        expected, got = network(pixels).raw_logits, quick(pixels).raw_logits
    assert expected.abs().max() > 1e-2
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)
    assert called_norms(quick, pixels) == 0 < called_norms(network, pixels)
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())


class Twice(nn.Module):
    """A convolution whose result is read beside its BatchNorm, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.shared = nn.Conv2d(3, 3, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        mapped = self.encoder(pixels)
        once = self.norm(mapped) + mapped
        return self.other(self.shared(once)) + self.shared(pixels)


def test_a_convolution_that_is_read_elsewhere_is_not_folded():
    """Its other readers would get the normalised result."""
    network = used(Twice()).double()
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    quick = folded(network, torch.float64, pixels)
    assert norms(quick) == 2
    assert torch.allclose(quick(pixels), network(pixels), rtol=1e-12)


class Odd(nn.Module):
    """A convolution before a BatchNorm, which does more with its weights than to convolve."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.encoder, self.norm = convolution, nn.BatchNorm2d(4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.encoder(pixels))


def hooked() -> nn.Module:
    convolution = nn.Conv2d(3, 4, 1)
    convolution.register_forward_hook(lambda module, inputs, output: 2 * output)
    return convolution


@pytest.mark.parametrize(
    "convolution",
    [lambda: StdConv2d(3, 4, 1), hooked, lambda: weight_norm(nn.Conv2d(3, 4, 1))],
    ids=["standardised", "hooked", "parametrised"],
)
def test_a_convolution_that_does_more_is_not_folded(convolution: Any):
    """The scale would be normalised away, or meet the hook in the wrong place."""
    network = used(Odd(convolution())).double()
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    quick = folded(network, torch.float64, pixels)
    assert torch.allclose(quick(pixels), network(pixels), rtol=1e-12)


class Reading(Odd):
    """Looks into its BatchNorm, which is gone once it is folded."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) * self.norm.weight.mean()


def test_a_copy_that_answers_otherwise_is_refused():
    """Whatever the rules of folding miss would teach something else without a word."""
    network = used(Reading(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match=r"^Expected a teacher that answers alike .* Use --fold_"):
        folded(network, torch.float32, torch.randn(1, 3, 8, 8))


def test_a_teacher_is_folded_with_images_of_the_size_that_it_gets():
    """PAN halves its deepest map three times more, and fails on small images."""
    network = SmpForSemanticSegmentation.create(
        "pan", "resnet18", encoder_weights="none", image_size=128
    )
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    given = {"input_mean": (0.5,) * 3, "input_std": (0.5,) * 3}
    teacher = Teacher(used(network), num_labels=2, **statistics, **given)
    pixels = torch.randn(1, 3, 128, 128)
    inference = TeacherInference(teacher, precision="no")
    assert torch.allclose(inference(pixels), teacher(pixels), rtol=1e-3, atol=1e-4)
    assert norms(inference.prepared.network) < norms(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_layers_have_the_same_values_and_gradients(dtype: torch.dtype):
    """A student would otherwise be trained as a slightly different network than it is saved as."""
    torch.manual_seed(0)
    plain = used(tiny_student(EFFICIENT)).to(dtype)
    quick = copy.deepcopy(plain)
    use_fast_layers(quick)
    kinds = {type(module) for module in quick.modules()}
    assert {FastSwish, FastDepthwise, FastSqueezeExcite, FastUnetBlock} <= kinds
    assert quick.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randn(2, 3, SIDE, SIDE, dtype=dtype)
    for network in (plain, quick):
        network(pixels).raw_logits.square().mean().backward()
    assert torch.allclose(quick(pixels).raw_logits, plain(pixels).raw_logits, rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        if one.grad is not None:
            worst = (other.grad - one.grad).abs().max() / one.grad.abs().max().clamp(min=1e-12)
            assert worst < (1e-3 if dtype == torch.float32 else 1e-9), name


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_depthwise_gradient_in_bf16_is_nearer_to_float64_than_the_stock_one(size: int, stride: int):
    """Its backward pass is written by hand: a wrong one trains, only worse."""
    torch.manual_seed(1)
    stock = nn.Conv2d(8, 8, size, stride, size // 2, groups=8)
    quick = copy.deepcopy(stock)
    use_fast_layers(quick)
    exact = copy.deepcopy(stock).double()
    pixels = torch.randn(2, 8, 16, 16).bfloat16().float()
    with torch.no_grad():
        for module in (stock, quick, exact):
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
    gradients: dict[str, list[Tensor]] = {}
    for name, module in (("exact", exact), ("stock", stock), ("quick", quick)):
        own = pixels.to(exact.weight.dtype if name == "exact" else torch.float32).clone()
        own.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            result = module(own)
        assert result.dtype == (torch.float64 if name == "exact" else torch.bfloat16)
        slope = torch.linspace(-1, 1, result.numel()).view(result.shape).bfloat16()
        result.backward(slope.to(result.dtype))
        gradients[name] = [own.grad, module.weight.grad, module.bias.grad]
    for true, of_stock, of_quick in zip(*gradients.values(), strict=True):
        error, stock_error = ((g - true).norm() / true.norm() for g in (of_quick, of_stock))
        assert error < 4e-3  # half a unit in the last place of bf16
        assert error <= stock_error + 1e-3


def test_a_frozen_depthwise_convolution_passes_the_gradient_on():
    """Units are frozen from the shallow end; what lies above still learns."""
    layer = nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False)
    use_fast_layers(layer)
    assert type(layer) is FastDepthwise
    layer.requires_grad_(False)
    pixels = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(pixels).sum().backward()
    assert layer.weight.grad is None
    assert pixels.grad.abs().sum() > 0


def test_squeeze_and_excitation_averages_a_large_map_in_bf16():
    """A sum of 16,384 numbers in bf16 would stop growing at 256."""
    network = tiny_student(EFFICIENT)
    use_fast_layers(network)
    layer = next(m for m in network.modules() if isinstance(m, FastSqueezeExcite))
    channels = layer.conv_reduce.in_channels
    pixels = 1 + torch.rand(1, channels, 128, 128)
    rounded = pixels.bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        given = rounded.clone()
        got = layer(given)
    assert got.data_ptr() == given.data_ptr()  # without gradients in place
    expected = super(FastSqueezeExcite, layer).forward(rounded.float())
    before = rounded.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(rounded), got)
    assert torch.equal(rounded, before)  # the backward pass needs it
    assert torch.allclose(got.float(), expected, rtol=3e-2)


def test_a_folded_copy_is_asked_and_the_teacher_left_alone():
    """A run is recognised by its teacher's weights; a copy for speed must not show there."""
    teacher = tiny_teacher()
    used(teacher.network)
    before = copy.deepcopy(teacher.state_dict())
    pixels = torch.randn(2, 3, SIDE, SIDE)
    inference = TeacherInference(teacher, precision="no")
    assert torch.allclose(inference(pixels), teacher(pixels), rtol=1e-4, atol=1e-4)
    assert called_norms(inference.prepared.network, pixels) == 0
    assert called_norms(teacher.network, pixels) > 0
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    plain = TeacherInference(teacher, precision="no", fold=False)
    plain(pixels)
    assert plain.prepared is teacher


def plain_trajectory(
    student: SmpForSemanticSegmentation, teacher: nn.Module, data: Squares, order: list[list[int]]
) -> list[float]:
    """Train in place, by the benchmark's plain loop, on the images of `order`; gives the losses."""
    dtype = next(student.parameters()).dtype
    mean = torch.tensor(student.config.image_mean, dtype=dtype).view(1, 3, 1, 1)
    std = torch.tensor(student.config.image_std, dtype=dtype).view(1, 3, 1, 1)
    batches = []
    for indices in order:
        samples = [data[i] for i in indices]
        pixels = torch.stack([s["pixel_values"] for s in samples]).to(dtype) / 255
        target = torch.stack([s["labels"] for s in samples]).to(dtype)[:, None]
        batches.append(((pixels - mean) / std, target))
    loop = PlainLoop(student, teacher, data, batch_size=2, device=torch.device("cpu"), workers=0)
    loop.batches = iter(batches)
    weights = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    loop.optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False, fused=False)
    return [loop.step()[0] for _ in order]


class Recorded(Squares):
    """Remembers which samples were read, in order."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        return super().__getitem__(index)


def distance(one: nn.Module, other: nn.Module) -> float:
    """Mean absolute difference of all weights and running statistics."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    gaps = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in pairs])
    return float(gaps.mean())


@pytest.mark.parametrize("encoder", ["resnet18", EFFICIENT])
def test_ten_steps_are_those_of_the_plain_loop(tmp_path: Path, encoder: str):
    """Every optimisation lies on this path: folded teacher, other layers, channels last, fused
    AdamW, images as bytes. None may change what is learned beyond what rounding does: BatchNorm
    and Adam amplify that, so the measure is how far a plain loop in fp32 comes from one in float64.
    """
    teacher = tiny_teacher()
    used(teacher.network)
    student = tiny_student(encoder)
    for module in student.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # the loops would have to share their draws
    plain, exact = copy.deepcopy(student), copy.deepcopy(student).double()
    first = copy.deepcopy(student)
    use_fast_layers(student)
    data = Recorded(20)
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            max_steps=10,
            encoder_lr_scale=1.0,
            min_learning_rate=1e-3,
            weight_decay=0.01,
            temperature_schedule="constant",
        ),
        teacher=teacher,
        train_dataset=data,
    )
    trainer.facts = {"train_content": None}  # else some samples are read to know them again
    trainer.train()
    ours = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    order = [data.read[i : i + 2] for i in range(0, 20, 2)]
    losses = plain_trajectory(plain, teacher.network, data, order)
    truth = plain_trajectory(exact, copy.deepcopy(teacher.network).double(), data, order)
    assert ours[:3] == pytest.approx(truth[:3], rel=1e-5)
    assert ours == pytest.approx(truth, rel=2e-3)
    rounding = distance(plain, exact)
    assert losses == pytest.approx(truth, rel=2e-3)
    assert 0 < distance(student, exact) < 3 * rounding
    assert 10 * rounding < distance(first, exact)  # a bound that a wrong step could not keep


class Reads(TorchDispatchMode):
    """Names the operations that make the host wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.patches = pytest.MonkeyPatch()

    def __enter__(self) -> Any:
        for name in ("tolist", "cpu", "numpy"):  # on a CPU these read without an operation
            self.patches.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.undo()

    def _noting(self, name: str, method: Any) -> Any:
        def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(name)
            return method(tensor, *args, **kwargs)

        return noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Inside(TrainerCallback):
    """Watches from one log to the next, without the data, which is read on the host."""

    def __init__(self) -> None:
        self.reads = Reads()
        self.steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (2, 3):
            self.steps += 1
            self.reads.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (3, 4):
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_between_logs_never_waits_for_the_device(tmp_path: Path, precision: str):
    """One `.item()` a step leaves a GPU idle while the host queues the next one."""
    inside = Inside()
    trainer = DistillationTrainer(
        tiny_student(EFFICIENT),
        arguments(tmp_path, max_steps=5, logging_steps=100, mixed_precision=precision),
        teacher=tiny_teacher(),
        train_dataset=Squares(12),
        callbacks=[inside],
    )
    trainer.train()
    assert inside.steps == 2
    assert inside.reads.found == []


@pytest.mark.parametrize("method", ["item", "__float__", "tolist", "cpu", "numpy"])
def test_the_watch_for_waiting_finds_every_way_to_read(method: str):
    """A watch that sees nothing would call every step fast."""
    with Reads() as reads:
        getattr(torch.ones(()), method)()
    assert len(reads.found) >= 1


def test_teacher_is_not_asked_when_no_term_needs_it(tmp_path: Path, monkeypatch):
    """Its forward pass would be paid for at each step, and no figure would show it."""
    asked = []
    monkeypatch.setattr(
        TeacherInference, "__call__", lambda self, pixels: asked.append(len(pixels))
    )
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, max_steps=2),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    trainer.loss_weights = trainer.loss_weights.without_teacher()  # as at the end of a curriculum
    trainer.train()
    assert asked == []


def test_what_makes_a_step_fast_is_in_place(tmp_path: Path):
    """Each of these can be lost by a changed default, and only a clock would tell."""
    seen: list[Tensor] = []
    args = arguments(tmp_path, max_steps=1, mixed_precision="bf16", keep_freed_memory=False)
    student = tiny_student(EFFICIENT)
    speed_up(student, args)  # as the command does; a trainer changes nothing outside of it
    trainer = DistillationTrainer(
        student,
        args,
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: (seen.append(inputs["pixel_values"]), prepare(inputs))[
        1
    ]
    trainer.train()
    assert [pixels.dtype for pixels in seen] == [torch.uint8]
    assert trainer.optimizer.optimizer.defaults["fused"] is True
    teacher = trainer._inference.prepared.network
    assert norms(teacher) < norms(trainer.teacher.network)
    assert teacher.decoder.blocks[0].conv1[0].weight.dtype == torch.bfloat16
    assert {FastSwish, FastDepthwise} <= {type(m) for m in trainer.model.modules()}
    weight = trainer.model.decoder.blocks[0].conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
