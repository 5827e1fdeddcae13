import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.models.weights import load_strictly, read_weights

SMALL = {"decoder_channels": (16, 16, 8, 8, 8), "image_size": 64}
HEAD = ("conv_head.", "bn2.")


def create(weights, encoder="timm-efficientnet-b0"):
    return SmpForSemanticSegmentation.create(encoder=encoder, encoder_weights=str(weights), **SMALL)


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(1)
    return create("none")


def assert_encoder_equal(model, state):
    own = model.encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items() if name in own)


def test_half_precision_file_is_read_as_float(donor, tmp_path):
    """Half-precision weights would make the optimizer's small steps vanish."""
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in donor.encoder.state_dict().items()
    }
    save_file(state, tmp_path / "encoder.safetensors")
    model = create(tmp_path / "encoder.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_encoder_equal(model, {k: v.float() for k, v in state.items() if v.is_floating_point()})


def test_encoder_of_a_whole_model_is_found_by_its_prefix(donor, tmp_path):
    """A trained student's own file should start the next one."""
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "model.pth")
    assert_encoder_equal(create(tmp_path / "model.pth"), donor.encoder.state_dict())


def test_file_without_the_never_used_head_is_complete(donor, tmp_path):
    """Exports leave the head out; it changes no output."""
    state = {k: v for k, v in donor.encoder.state_dict().items() if not k.startswith(HEAD)}
    save_file(state, tmp_path / "encoder.safetensors")
    assert_encoder_equal(create(tmp_path / "encoder.safetensors"), state)


def test_classifier_of_a_checkpoint_is_left_behind(donor, tmp_path):
    """Timm's published files carry the ImageNet classifier, which no encoder has."""
    state = {**donor.encoder.state_dict(), "classifier.weight": torch.zeros(10, 1280)}
    save_file(state, tmp_path / "encoder.safetensors")
    assert_encoder_equal(create(tmp_path / "encoder.safetensors"), donor.encoder.state_dict())
    universal = create(tmp_path / "encoder.safetensors", "tu-efficientnet_b0")
    expected = {f"model.{k}": v for k, v in donor.encoder.state_dict().items()}
    assert_encoder_equal(universal, expected)


def test_missing_and_extra_keys_are_listed(donor, tmp_path):
    """Loading what fits would train a half-random encoder without a word."""
    state = donor.encoder.state_dict()
    for name in [n for n in state if n.startswith("blocks.6.")]:
        state[name.replace("blocks.6.", "other.")] = state.pop(name)
    save_file(state, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.6\..* more; extra: other\.") as caught:
        create(tmp_path / "encoder.safetensors")
    assert str(caught.value).count("blocks.6.") == 5
    assert "\n" not in str(caught.value)


def test_weights_of_another_width_are_refused(tmp_path):
    """Torch's own message would be one line for each of 400 tensors."""
    wide, narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"weight \(8, 3, 1, 1\) for \(4, 3, 1, 1\)"):
        load_strictly(narrow, wide.state_dict(), source="wide.pth")


def test_missing_file_is_named(tmp_path):
    """A path that does not exist must not be taken for a Hub id."""
    with pytest.raises(FileNotFoundError, match="Expected a weight file, got"):
        create(tmp_path / "none.safetensors")


class Surprise:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", [Surprise(), {"epoch": 3, "weight": torch.ones(1)}, [1, 2]])
def test_anything_but_tensors_is_refused(content, tmp_path, capsys):
    """A pickle may run code when it is read."""
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"Save the model's state_dict"):
        read_weights(tmp_path / "weights.pth")
    assert capsys.readouterr().out == ""


def test_broken_safetensors_file_is_refused(tmp_path):
    """A download cut short is a usual fault and must be told in one line."""
    (tmp_path / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read as one"):
        read_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "tu-resnet18"])
def test_imagenet_without_a_network_names_the_cures(encoder, monkeypatch, tmp_path):
    """The first thing a user on a closed machine meets must say how to go on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Pass `none` or a safetensors file") as caught:
        create("imagenet", encoder)
    assert "\n" not in str(caught.value)
