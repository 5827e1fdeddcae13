import time

import pytest
import torch
from torch import nn

from kd_trainer.models.encoder_units import encoder_units, find_never_used
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.students import parameter_counts

SMALL = {"decoder_channels": (16, 16, 8, 8, 8), "image_size": 64}


def small(encoder, arch="unet", **options):
    return SmpForSemanticSegmentation.create(
        arch, encoder, encoder_weights="none", **({**SMALL, **options})
    )


@pytest.mark.parametrize(
    ("encoder", "count", "deepest"),
    [
        ("timm-efficientnet-b0", 7, "encoder.blocks.6"),
        ("efficientnet-b0", 7, "encoder._blocks.15"),
        ("resnet18", 4, "encoder.layer4"),
        ("mobilenet_v2", 5, "encoder.features.18"),
        ("mit_b0", 4, "encoder.norm4"),
        ("densenet121", 4, "encoder.features.denseblock4"),
        ("mobileone_s0", 4, "encoder.stage4"),
        ("tu-efficientnet_b0", 7, "encoder.model.blocks.6"),
        ("tu-mobilenetv3_small_050", 6, "encoder.model.blocks.5"),
        ("tu-resnet18", 4, "encoder.model.layer4"),
        ("tu-convnext_atto", 4, "encoder.model.stages_3"),
        ("tu-regnety_002", 4, "encoder.model.s4"),
    ],
)
def test_units_hold_every_used_encoder_parameter_once(encoder, count, deepest):
    """A parameter in no unit would train from the first epoch; one in two would be ambiguous."""
    model = small(encoder)
    units = encoder_units(model)
    assert len(units) == count
    assert units[-1].name == deepest
    named = [name for unit in units for name, _ in unit.parameters()]
    used = {
        n
        for n, _ in model.named_parameters()
        if n.startswith("encoder.") and n not in model.never_used_parameters()
    }
    assert len(named) == len(set(named))
    assert set(named) == used


def test_stem_belongs_to_the_first_stage():
    """A stem of its own would shift every unit of the recipe's timeline by one."""
    for encoder, stem in [
        ("timm-efficientnet-b0", "encoder.conv_stem.weight"),
        ("resnet18", "encoder.conv1.weight"),
        ("mit_b0", "encoder.patch_embed1.proj.weight"),
        ("tu-convnext_atto", "encoder.model.stem_0.weight"),
    ]:
        first = encoder_units(small(encoder))[0]
        names = [name for name, _ in first.parameters()]
        assert stem in names
        assert len(names) > 3


def test_unit_modules_cover_the_units_parameters():
    """Modules missing from a unit would stay in train mode while its parameters are frozen."""
    for encoder in ("timm-efficientnet-b0", "mit_b0", "mobilenet_v2", "efficientnet-b0"):
        for unit in encoder_units(small(encoder)):
            inside = {id(p) for module in unit.modules for p in module.parameters()}
            assert {id(p) for _, p in unit.parameters()} <= inside


def test_units_of_a_bare_encoder_have_its_own_names():
    """Names of the whole model would not be found in an encoder alone."""
    encoder = small("timm-efficientnet-b0").encoder
    units = encoder_units(encoder)
    assert len(units) == 7
    assert units[-1].name == "blocks.6"
    names = {name for unit in units for name, _ in unit.parameters()}
    assert names < {name for name, _ in encoder.named_parameters()}
    assert "conv_head.weight" not in names


def test_unknown_encoder_has_one_unit_for_each_child_with_parameters():
    """Any other encoder must still be unfrozen in steps, in the order of its children."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.drop = nn.Dropout()
            self.second = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return [self.second(self.drop(self.first(x)))]

    units = encoder_units(Plain())
    assert [unit.name for unit in units] == ["first", "second"]
    assert [type(m).__name__ for m in units[0].modules] == ["Conv2d", "Dropout"]


def test_b0_never_uses_412160_parameters():
    """Counted as trainable they would inflate the size and stop DistributedDataParallel."""
    model = small("timm-efficientnet-b0")
    used, never_used, trainable = parameter_counts(model)
    assert never_used == 412_160
    assert trainable == used
    assert used + never_used == model.num_parameters()
    assert "encoder.conv_head.weight" in model.never_used_parameters()


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "tu-resnet18", "mit_b0"])
def test_never_used_are_exactly_those_without_a_gradient(encoder):
    """The graph is walked without arithmetic; a real backward pass must agree with it."""
    model = small(encoder).eval()
    model.requires_grad_(True)
    model(torch.randn(1, 3, 64, 64)).raw_logits.sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == model.never_used_parameters()


def test_stages_beyond_the_depth_are_never_used_and_no_unit():
    """Freeing a stage that PSPNet never runs would look like progress and change nothing."""
    model = SmpForSemanticSegmentation.create(
        "pspnet", "resnet18", encoder_weights="none", image_size=64, psp_out_channels=16
    )
    assert [unit.name for unit in encoder_units(model)] == ["encoder.layer1", "encoder.layer2"]
    assert "encoder.layer4.1.conv2.weight" in model.never_used_parameters()


def test_search_for_never_used_leaves_random_state_and_buffers_alone():
    """A drawn number or a moved running mean would make a resumed run differ."""
    model = small("timm-efficientnet-b0").train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state = torch.get_rng_state()
    start = time.perf_counter()
    find_never_used(model.encoder, 640)
    assert time.perf_counter() - start < 5  # about 0.2 s: no arithmetic at any size
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model.encoder.training


def test_size_that_the_encoder_refuses_is_named():
    """Without it the user would meet an assertion from inside timm."""
    with pytest.raises(ValueError, match=r"Expected an image size that Unet accepts, got 64\."):
        small("tu-swin_tiny_patch4_window7_224", image_size=64)
