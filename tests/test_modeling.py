import json
import subprocess
import sys

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from tiny import tiny_student
from torch import nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from kd_trainer.models.modeling import (
    SmpConfig,
    SmpForSemanticSegmentation,
    check_image_size,
    encoder_units,
)

PERSON = {0: "background", 1: "person"}
SMALL = {"decoder_channels": (16, 16, 8, 8, 8), "image_size": 64}


def small(encoder="mobilenet_v2", arch="unet", **options):
    return SmpForSemanticSegmentation.create(
        arch, encoder, encoder_weights="none", **{"id2label": PERSON, **SMALL, **options}
    )


def same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return small().eval()


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    student.save_pretrained(path)
    return path


def test_one_folder_is_read_by_auto_classes_and_by_smp(student, folder):
    """The published folder must serve both libraries with the very same weights."""
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder)
    theirs = smp.from_pretrained(folder).eval()
    assert type(loaded) is SmpForSemanticSegmentation
    assert type(theirs) is smp.Unet
    assert same_weights(student, loaded)
    assert same_weights(student, theirs)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        raw = student(images).raw_logits
        torch.testing.assert_close(loaded(images).raw_logits, raw, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(images), raw, rtol=1e-4, atol=1e-4)


def test_config_json_always_holds_every_smp_argument(folder):
    """Left out as defaults, smp would fill in its own, `encoder_weights: imagenet` among them."""
    config = json.loads((folder / "config.json").read_text())
    assert config["_model_class"] == "Unet"
    assert config["encoder_weights"] is None
    assert config["decoder_channels"] == [16, 16, 8, 8, 8]
    assert {"encoder_name", "encoder_depth", "in_channels", "classes", "activation"} <= set(config)
    assert config["id2label"] == {"0": "background", "1": "person"}
    assert config["label2id"] == {"background": 0, "person": 1}
    assert config["model_type"] == "smp"


def test_labels_and_sizes_survive_the_round_trip(folder):
    """Lost labels silently become LABEL_0 and LABEL_1."""
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == PERSON
    assert config.num_labels == 2
    assert config.image_size == 64


def test_a_pure_smp_folder_is_read_by_our_class(tmp_path):
    """Teachers and students trained with smp alone come without model_type and labels."""
    theirs = smp.FPN("resnet18", encoder_weights=None, classes=3, activation="softmax")
    theirs.save_pretrained(tmp_path)
    ours = SmpForSemanticSegmentation.from_pretrained(tmp_path)
    assert same_weights(theirs, ours)
    assert ours.config.id2label == {0: "background", 1: "class_1", 2: "class_2"}
    theirs.segmentation_head[-1] = nn.Identity()  # ours gives logits whatever the activation was
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), ours(images).raw_logits)


def test_loading_is_strict(student, tmp_path):
    """Transformers alone would load a folder with half its weights and only log it."""
    state = student.state_dict()
    state.pop("segmentation_head.0.bias")
    student.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing: segmentation_head\.0\.bias"):
        SmpForSemanticSegmentation.from_pretrained(tmp_path)


def test_other_shapes_are_an_error_unless_they_are_asked_for(student, tmp_path):
    """transformers' own flag for a new head on old weights goes on working, and only it."""
    student.save_pretrained(tmp_path)
    config = SmpConfig.from_pretrained(tmp_path, classes=4, id2label=dict(enumerate("abcd")))
    message = r"got of another shape: segmentation_head\.0\.bias \(1,\) for \(4,\), "
    with pytest.raises(ValueError, match=message):
        SmpForSemanticSegmentation.from_pretrained(tmp_path, config=config)
    loaded = SmpForSemanticSegmentation.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True
    )
    assert loaded.segmentation_head[0].weight.shape[0] == 4
    first = next(name for name in student.state_dict() if name.startswith("encoder."))
    assert torch.equal(loaded.state_dict()[first], student.state_dict()[first])


def test_remote_code_loads_where_the_package_is_not_installed(folder, tmp_path):
    """Users of a published student have smp and transformers, not this package."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kd_trainer":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
import torch, PIL.Image
folder = sys.argv[1]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(PIL.Image.new("RGB", (50, 40), "red"), return_tensors="pt")
with torch.no_grad():
    output = model(**batch)
maps = processor.post_process_semantic_segmentation(output, target_sizes=[(40, 50)])
assert maps[0].shape == (40, 50), maps[0].shape
assert "kd_trainer" not in sys.modules
model.save_pretrained(sys.argv[2])
print(type(model).__module__, model.free_units)
"""
    from kd_trainer.models.image_processing import SmpImageProcessor

    processor = SmpImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(folder)
    again = tmp_path / "again"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(again)],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith("transformers_modules.")
    assert (again / "modeling.py").exists()


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("unet", {}),
        ("unetplusplus", {}),
        ("manet", {"decoder_pab_channels": 8}),
        ("linknet", {"decoder_channels": None}),
        ("fpn", {"decoder_channels": None, "decoder_pyramid_channels": 16}),
        ("pspnet", {"decoder_channels": None, "psp_out_channels": 16}),
        ("deeplabv3", {"decoder_channels": 16}),
        ("deeplabv3plus", {"decoder_channels": 16}),
        ("pan", {"decoder_channels": 16}),
        ("upernet", {"decoder_channels": 16}),
        ("segformer", {"decoder_channels": None, "decoder_segmentation_channels": 16}),
    ],
)
def test_every_architecture_is_dual(arch, options, tmp_path):
    """Each has its own arguments and head; one that smp cannot read would be found too late."""
    options = {name: value for name, value in options.items() if value is not None}
    if arch in ("unet", "unetplusplus", "manet"):
        options["decoder_channels"] = (16, 16, 8, 8, 8)
    model = SmpForSemanticSegmentation.create(
        arch, "resnet18", encoder_weights="none", image_size=128, **options
    ).eval()
    with torch.no_grad():  # 128 because PAN pools the deepest map three times
        output = model(torch.randn(1, 3, 128, 128))
    assert output.logits.shape == (1, 2, 128, 128)
    assert output.raw_logits.shape == (1, 1, 128, 128)
    model.save_pretrained(tmp_path)
    assert same_weights(model, smp.from_pretrained(tmp_path))
    assert same_weights(model, SmpForSemanticSegmentation.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "encoder", ["timm-efficientnet-b0", "mit_b0", "tu-convnext_atto", "tu-mobilenetv3_small_050"]
)
def test_encoders_survive_saving_and_loading(encoder, tmp_path):
    """from_pretrained builds on the meta device, which drops what is not in the state dict."""
    torch.manual_seed(0)
    model = small(encoder).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images).raw_logits, model(images).raw_logits, rtol=1e-3, atol=1e-3
        )
    assert loaded.never_used_parameters() == model.never_used_parameters()
    assert not any(loaded.get_parameter(n).requires_grad for n in loaded.never_used_parameters())


def test_buffers_that_are_not_saved_are_right_after_loading(tmp_path):
    """Transformers fills them with uninitialised memory: attention would be garbage."""
    model = small("tu-tiny_vit_5m_224", image_size=224).eval()
    constants = dict(model.named_non_persistent_buffers())
    assert constants
    model.save_pretrained(tmp_path)
    loaded = SmpForSemanticSegmentation.from_pretrained(tmp_path)
    for name, value in loaded.named_non_persistent_buffers():
        assert torch.equal(value, constants[name])


def test_dpt_with_its_own_forward_runs_and_is_cut_into_units(tmp_path):
    """Its encoder hands prefix tokens to the decoder; the common forward would fail on them."""
    model = SmpForSemanticSegmentation.create(
        "dpt",
        "tu-vit_tiny_patch16_224",
        encoder_weights="none",
        image_size=64,
        img_size=64,
        decoder_intermediate_channels=(8, 8, 8, 8),
        decoder_fusion_channels=8,
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = model(images)
    assert output.raw_logits.shape == (1, 1, 64, 64)
    assert len(encoder_units(model)) == 12
    assert "encoder.model.pos_embed" in dict(encoder_units(model)[0].parameters())
    model.save_pretrained(tmp_path)
    loaded = SmpForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.encoder_kwargs == {"img_size": 64}
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).raw_logits, output.raw_logits)


def test_two_channel_logits_are_the_sigmoid_of_the_raw_logit(student):
    """Stock processors take the argmax; over one channel it would make every pixel background."""
    with torch.no_grad():
        output = student(torch.randn(1, 3, 64, 64))
    probability = output.logits.softmax(dim=1)[:, 1:]
    torch.testing.assert_close(probability, output.raw_logits.sigmoid())


def test_several_classes_give_one_channel_each():
    """A multi-class model has no separate raw logit."""
    model = small(id2label={0: "background", 1: "skin", 2: "hair"}).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    assert output.raw_logits.shape == (1, 3, 64, 64)
    assert output.logits is output.raw_logits


def test_loss_is_the_mean_over_valid_pixels(student):
    """Ignored pixels in the mean would weaken the loss by their share."""
    images = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
    labels[0, :32] = 255
    with torch.no_grad():
        output = student(images, labels)
    valid = labels != 255
    expected = F.binary_cross_entropy_with_logits(
        output.raw_logits[:, 0][valid], labels[valid].float()
    )
    torch.testing.assert_close(output.loss, expected)
    with torch.no_grad():
        assert student(images, torch.full_like(labels, 255)).loss == 0


def test_frozen_units_do_not_change_at_all():
    """Running statistics that drift change the features by a third in ten steps."""
    torch.manual_seed(0)
    model = small("timm-efficientnet-b0")
    model.set_free_units(3)
    frozen = [module for unit in encoder_units(model)[:4] for module in unit.modules]
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in frozen]
    free = encoder_units(model)[-1].parameters()[0][1].detach().clone()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model.train()
        labels = torch.randint(0, 2, (2, 64, 64))
        model(torch.randn(2, 3, 64, 64), labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module, state in zip(frozen, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not torch.equal(free, encoder_units(model)[-1].parameters()[0][1])


def test_frozen_units_stay_in_eval_mode_and_free_ones_train():
    """The Trainer calls train() at every step, which would switch DropPath and BatchNorm on."""
    model = small("timm-efficientnet-b0")
    model.set_free_units(2)
    for mode in (True, False, True):
        model.train(mode)
    units = encoder_units(model)
    frozen = [m for unit in units[:5] for part in unit.modules for m in part.modules()]
    free = [m for unit in units[5:] for part in unit.modules for m in part.modules()]
    assert not any(m.training for m in frozen)
    assert all(m.training for m in free)
    assert any(isinstance(m, DropPath) for m in frozen)
    assert model.decoder.training
    assert model.free_units == 2


def test_synchronised_batchnorm_changes_neither_answers_nor_names():
    """PyTorch's own conversion drops the activations that timm keeps in these layers."""
    student = tiny_student("timm-efficientnet-b0").eval()
    student.set_free_units(1)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, names = student(pixels).raw_logits, list(student.state_dict())
        norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
        student.synchronise_batchnorm()
        assert torch.equal(student(pixels).raw_logits, before)
    assert list(student.state_dict()) == names
    kept = [m for m in student.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(kept) == len(norms) > 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    student.train()
    frozen = [m for m in student.encoder.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert {m.training for m in frozen} == {True, False}
    assert student.free_units == 1


def test_freeing_units_again_restores_them():
    """Units freed later must train exactly as if they had never been frozen."""
    model = small("timm-efficientnet-b0").train()
    model.set_free_units(0)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    model.set_free_units(None)
    assert model.free_units == 7
    assert all(m.training for m in model.modules())
    never_used = model.never_used_parameters()
    assert all(p.requires_grad == (n not in never_used) for n, p in model.named_parameters())


def test_units_are_freed_from_the_deepest():
    """The recipe frees the deepest first; the other order would train the stem alone."""
    model = small("resnet18")
    model.set_free_units(1)
    free = {
        name.split(".")[1] for name, p in model.encoder.named_parameters("e") if p.requires_grad
    }
    assert free == {"layer4"}


@pytest.mark.parametrize("count", [-1, 8])
def test_impossible_number_of_free_units_is_refused(count):
    """A schedule for another encoder would otherwise end silently early."""
    with pytest.raises(ValueError, match="Expected 0 to 7 free units"):
        small("timm-efficientnet-b0").set_free_units(count)


def test_image_size_must_be_divisible_by_the_output_stride(student):
    """The decoder's skip connections would not fit, with a message about tensor sizes."""
    check_image_size(96, student)
    check_image_size((64, 96), student)
    with pytest.raises(ValueError, match=r"divisible by 32, got 100\. Use 96 or 128"):
        check_image_size(100, student)
    with pytest.raises(ValueError, match=r"divisible by 32, got 16\. Use 32 or 64"):
        check_image_size((64, 16), student)
    with pytest.raises(ValueError, match="divisible by 32"):
        student(torch.randn(1, 3, 64, 70))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "unett"}, "an architecture of smp, got 'unett'. Did you mean 'unet'"),
        ({"encoder": "timm-efficientnet-b00"}, "Did you mean 'timm-efficientnet-b0'"),
        ({"encoder": "tu-resnet81"}, "an encoder of timm after 'tu-', got 'tu-resnet81'. Did you"),
        ({"decoder_chanels": 3}, "an argument of unet, got 'decoder_chanels'. Did you mean"),
        ({"aux_params": {"classes": 2}}, "Expected no classification head"),
        ({"encoder_weights": "imagnet"}, "`imagenet`, `none` or a weight file"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments, message):
    """Smp swallows unknown arguments, and its own messages list hundreds of encoders."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        SmpForSemanticSegmentation.create(**{"encoder_weights": "none", **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_size_of_a_new_model_is_checked():
    """The first batch would fail instead, after the data had been prepared."""
    with pytest.raises(ValueError, match="divisible by 32, got 100"):
        small(image_size=100)


def test_channels_and_labels_must_agree():
    """One channel for three classes would be trained as a binary model."""
    with pytest.raises(ValueError, match="as many output channels as labels"):
        SmpConfig(classes=1, id2label={0: "a", 1: "b", 2: "c"})
