"""Encoders trained in processes of their own: memory that is corrupted stops only some runs."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import Squares, arguments, tiny_student
from torch import nn

from kd_trainer.fast_layers import SubsampledPointwise, use_fast_layers
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.trainer import DistillationTrainer

WORKER = Path(__file__).parent / "workers" / "two_steps.py"
# The smallest of every family that segmentation_models_pytorch has, and some of timm's own.
FAMILIES = (
    *("resnet18", "resnext50_32x4d", "dpn68", "vgg11", "vgg11_bn", "se_resnet50", "densenet121"),
    *("inceptionv4", "inceptionresnetv2", "efficientnet-b0", "timm-efficientnet-b0", "xception"),
    *("mobilenet_v2", "timm-tf_efficientnet_lite0", "timm-skresnet18", "mit_b0"),
    *(f"mobileone_s{size}" for size in range(5)),
    *("tu-mobilenetv3_small_050", "tu-convnext_atto", "tu-regnety_002", "tu-resnet18"),
)


def ends_of(*encoders: str) -> dict[str, int]:
    """Exit status of the training of each encoder."""
    checked = ctypes.util.find_library("c_malloc_debug")
    found = {"LD_PRELOAD": checked, "MALLOC_CHECK_": "3"} if checked else {}
    package = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | found | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *encoders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return {name: int(end) for name, end in map(str.split, done.stdout.splitlines())}


def test_no_layer_that_corrupts_memory_is_left_in_mobileone():
    """Its stem has a 1 x 1 convolution with a stride on three channels."""
    model = SmpForSemanticSegmentation.create("unet", "mobileone_s0", encoder_weights="none")
    use_fast_layers(model)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    strided = [m for m in convolutions if m.kernel_size == (1, 1) and m.stride != (1, 1)]
    few = [m for m in strided if 1 < m.in_channels < 16]
    assert [type(m) for m in few] == [SubsampledPointwise]


def test_the_trainer_leaves_no_such_layer_either(tmp_path: Path):
    """From Python nobody has made the layers fast, and the images are in channels_last."""
    student = tiny_student("mobileone_s0")
    trainer = DistillationTrainer(
        student, arguments(tmp_path, max_steps=1), train_dataset=Squares(2)
    )
    assert not any(isinstance(module, SubsampledPointwise) for module in student.modules())
    trainer.train()
    assert any(isinstance(module, SubsampledPointwise) for module in student.modules())


@pytest.mark.slow
def test_mobileone_trains_without_writing_outside_its_memory():
    """The weight gradient of its stem in channels_last does, and some runs crash much later."""
    assert ends_of("mobileone_s0") == {"mobileone_s0": 0}


@pytest.mark.slow
def test_every_family_of_encoders_trains():
    """One crash of a layer that nobody tried takes the whole run with it."""
    assert ends_of(*FAMILIES) == dict.fromkeys(FAMILIES, 0)


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": (2, 3), "bias": False}])
def test_subsampled_pointwise_computes_what_the_layer_did(options):
    """Its result and gradients must be those of the layer that it stands for."""
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 1, **options)
    pixels = torch.randn(2, 3, 9, 14, requires_grad=True)
    expected = plain(pixels)
    wanted = torch.autograd.grad(expected.square().sum(), [pixels, *plain.parameters()])
    use_fast_layers(plain)
    assert type(plain) is SubsampledPointwise
    got = plain(pixels)
    torch.testing.assert_close(got, expected)
    found = torch.autograd.grad(got.square().sum(), [pixels, *plain.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
