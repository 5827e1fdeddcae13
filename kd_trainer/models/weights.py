"""Read weight files safely, load them strictly, and fill an encoder with pretrained ones.

Travels with a saved model as remote code and imports only its sibling.
"""

import logging
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .configuration_smp import SmpConfig, build_network, uses_timm_loader

_SHOWN = 5  # keys listed in a message
_CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module"),
    *("weights", "model_weights"),
)
# What a classification checkpoint carries beyond the encoder.
_CLASSIFIERS = ("classifier.", "fc.", "_fc.", "head.", "last_linear.")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Tables of a window's size: some versions of transformers save them, some compute them.
_DERIVED = ".relative_position_index"
_UNREADABLE = (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, unwrapped from the containers that training loops put around it.

    Args:
        path: a `.safetensors` file, or one written by `torch.save` (read with weights_only).

    Returns:
        Name to tensor on the CPU; floating point tensors as float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable file of tensors.
    """
    return state_in(read_content(path), path)


def read_content(path: str | Path) -> Any:
    """All that a weight file holds; arguments and errors as of `read_weights`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"Expected a weight file, got {str(path)!r}. Check the path.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"Expected a file of tensors only, got {str(path)!r}, which cannot be read as one. "
            "Save the model's state_dict, best with safetensors, or copy the file again if it was "
            "cut off."
        ) from error


def state_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, unwrapped from its containers.

    Args:
        content: as `read_content` gives it.
        path: where it was read, for the message.

    Raises:
        ValueError: if there is none in it.
    """
    state = _unwrap(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"Expected names and tensors in {str(path)!r}, got {_some(_odd_entries(state))}. "
            "Save the model's state_dict alone."
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _unwrap(content: Any) -> dict[str, Any]:
    while isinstance(content, Mapping):
        inner = [content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
        if not inner:
            return dict(content)
        content = inner[0]
    return {}


def _odd_entries(state: Mapping[str, Any]) -> list[str]:
    return [f"{k}: {type(v).__name__}" for k, v in state.items() if not isinstance(v, Tensor)]


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Collection[str] = ()
) -> None:
    """Copy `state` into `module`; any difference of names or shapes is an error.

    Args:
        module: gets the values.
        state: name to tensor.
        source: where the state comes from, for the message.
        optional: names of the module that may be missing in `state`.

    Raises:
        ValueError: lists up to five missing, extra and misshapen names.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and name not in optional]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or extra or shapes:
        raise ValueError(
            f"Expected the weights of exactly this {type(module).__name__} in {source!r}, "
            f"got {_faults(missing, extra, shapes)}. Name the architecture and encoder that the "
            "file was made with."
        )
    module.load_state_dict({**own, **state})


def load_pretrained(
    load: Callable[..., Any], source: str | Path, *args: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Call a `from_pretrained`; every weight has to be there and to fit.

    transformers fills what is missing with random numbers, and reports a line for each tensor.

    Args:
        load: the `from_pretrained` of a class of transformers.
        source: a folder or a Hub id.
        *args: further ones of `load`.
        **options: of `load`; `ignore_mismatched_sizes` lets other shapes pass, `new_head` leaves
            it to the caller what may be missing, extra or misshapen.

    Returns:
        (model, loading info).

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if they cannot be read; or lists names that are missing, extra or misshapen.
    """
    any_shape, new_head = (options.pop(n, False) for n in ("ignore_mismatched_sizes", "new_head"))
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _without_report():
            model, info = load(source, *args, **options)
    except _UNREADABLE as error:
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            for file in sorted(Path(source).glob(pattern)):
                read_weights(file)  # raises for the broken one, by its name
        raise ValueError(
            f"Expected readable weights in {str(source)!r}, got: {_first_line(error)} Copy or "
            "download them again."
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"Expected the weights of {str(source)!r}, got: {_first_line(error)} Check that "
            "model.safetensors lies beside config.json, or that the Hub can be reached."
        ) from error
    if new_head:
        return model, info
    other = [] if any_shape else sorted(info["mismatched_keys"])
    shapes = [f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in other]
    missing, extra = (
        sorted(name for name in info[kind] if not name.endswith(_DERIVED))
        for kind in ("missing_keys", "unexpected_keys")
    )
    faults = _faults(missing, extra, shapes)
    if faults:
        raise ValueError(
            f"Expected every weight of {type(model).__name__} in {str(source)!r}, got {faults}. "
            "Check that config.json and the weights belong together and were trained for "
            "segmentation."
        )
    return model, info


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep the report of transformers off stderr: what it says is an error of ours."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _faults(missing: Collection[str], extra: Collection[str], shapes: Collection[str]) -> str:
    """What does not fit, up to five names of each kind; empty if everything does."""
    found = [("missing", missing), ("extra", extra), ("of another shape", shapes)]
    return "; ".join(f"{what}: {_some(names)}" for what, names in found if names)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    rest = len(names) - _SHOWN
    return (shown or "nothing") + (f" and {rest} more" if rest > 0 else "")


def unused_state_keys(module: nn.Module, never_used: Collection[str]) -> frozenset[str]:
    """State-dict keys that no output depends on: never-used parameters and their norms' buffers."""
    keys = set(never_used)
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = [dot + name for name, _ in child.named_parameters(recurse=False)]
        if own and all(name in never_used for name in own):
            keys.update(dot + name for name, _ in child.named_buffers(recurse=False))
    return frozenset(keys)


def fill_encoder(
    encoder: nn.Module, encoder_weights: str, config: SmpConfig, never_used: Collection[str]
) -> None:
    """Give an encoder its pretrained weights.

    Args:
        encoder: of the model that `config` describes.
        encoder_weights: `imagenet`, `none` (changes nothing) or a weight file of the encoder, of a
            whole model, or of a classifier on the same encoder.
        config: names the encoder.
        never_used: the encoder's parameters that may be missing in a file.

    Raises:
        FileNotFoundError: if the weights cannot be downloaded, or there is no such file.
        ValueError: if there are no such weights, or the file does not fit the encoder.
    """
    if encoder_weights == "none":
        return
    if encoder_weights == "imagenet":
        encoder.load_state_dict(_downloaded_encoder(config).state_dict())
        return
    if not encoder_weights.endswith(SUFFIXES):
        raise ValueError(
            f"Expected `imagenet`, `none` or a weight file ({', '.join(SUFFIXES)}) as "
            f"encoder_weights, got {encoder_weights!r}. Check the spelling."
        )
    own = encoder.state_dict()
    state = _encoder_state(read_weights(encoder_weights), own)
    optional = unused_state_keys(encoder, never_used)
    load_strictly(encoder, state, source=encoder_weights, optional=optional)


def _encoder_state(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a file's names to the encoder's: from a whole model, or from a classifier."""
    inside = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    state = inside or state
    in_model = all(name.startswith("model.") for name in own)  # timm's own encoders
    if in_model and not any(name.startswith("model.") for name in state):
        state = {f"model.{name}": value for name, value in state.items()}
    heads = tuple(f"model.{head}" for head in _CLASSIFIERS) if in_model else _CLASSIFIERS
    if in_model:  # they end before the head that the `timm-` ones carry unused
        heads = (*heads, "model.conv_head.", "model.bn2.")
    return {k: v for k, v in state.items() if k in own or not k.startswith(heads)}


def _downloaded_encoder(config: SmpConfig) -> nn.Module:
    weights = True if uses_timm_loader(config.encoder_name) else "imagenet"
    cure = "Pass `none` or a safetensors file as encoder_weights."
    try:
        encoder: nn.Module = build_network(config, weights).encoder
        return encoder
    except (OSError, EntryNotFoundError) as error:  # a network fault of the Hub is an OSError
        raise FileNotFoundError(
            f"Expected to download the ImageNet weights of {config.encoder_name}, got no answer "
            f"from the Hub ({type(error).__name__}). {cure}"
        ) from error
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"Expected ImageNet weights for {config.encoder_name}, got none published. {cure}"
        ) from error


def check_finite_weights(model: nn.Module, where: str) -> None:
    """Raise if a parameter or buffer is not finite; one transfer from the device.

    A finite loss can have a gradient that is not, and AdamW then writes it into the weights. Such a
    model still predicts: NaN is never above 0, so it finds nothing.

    Args:
        model: to look at.
        where: it is, for the message: after which step, or in which folder.

    Raises:
        FloatingPointError: naming the first one.
    """
    floating = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in floating.values()]).tolist()
    bad = next((name for name, fine in zip(floating, finite, strict=True) if not fine), None)
    if bad is not None:
        raise FloatingPointError(
            f"Expected finite weights, got NaN or infinity in {bad} ({where}). Take an earlier "
            "checkpoint; lower the learning rate, or look for extreme inputs or logits."
        )
