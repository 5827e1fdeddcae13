"""Weight files of teachers as people have them: from Lightning, with averages, of other decoders.

A file is read without running code. What holds code (a whole pickled network, TorchScript) is
named as what it is, found by its zip members and pickle opcodes alone.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_trainer.errors import announce
from kd_trainer.models.config_checks import shortened
from kd_trainer.models.configuration_smp import (
    SmpConfig,
    architecture_arguments,
    architecture_class,
)
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.models.weights import (
    load_strictly,
    read_content,
    state_in,
    unused_state_keys,
)

State = dict[str, Tensor]

AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
"""Entries with averaged weights, which win over the raw ones beside them; the first there is."""

_HEAD = "segmentation_head.0.weight"
_AUXILIARY = "classification_head."
_MOST_PICKLE = 16 * 2**20  # bytes that are searched for names
_SHOWN = 6
# What a state dict itself needs; the rest of torch are layers.
_OF_TENSORS = re.compile(
    r"torch(\._utils|\.storage|\.serialization|\._tensor|\.nn\.parameter)?\.\w+|numpy\..*|"
    r"collections\.\w+|_codecs\.\w+|(__)?builtins?(__)?\.\w+"
)

# No part of a network or of its settings: what runs commands, opens files, ...
_ODD = sys.stdlib_module_names - {"argparse", "pathlib", "collections", "datetime", "enum"}


def network_from_file(
    path: str, arch: str, encoder: str, options: Mapping[str, Any]
) -> SmpForSemanticSegmentation:
    """The smp network of a weight file, whose shapes say more of it than its names.

    Args:
        path: of a state dict, bare or in a container.
        arch: its architecture.
        encoder: its encoder.
        options: further arguments of the architecture; they win over what the shapes say.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or weights of another network.
    """
    content = _read(path)
    state = _own_weights(state_in(_averaged(content, path), path), path)
    read_off = options_of_shapes(state, arch)
    described = {
        "_model_class": architecture_class(arch).__name__,
        "encoder_name": encoder,
        "classes": state[_HEAD].shape[0],
        **(read_off | dict(options)),
    }
    model = SmpForSemanticSegmentation(SmpConfig(**described))
    if (channels := _channels_seen(state, model.encoder)) != 3:
        described |= without_statistics(channels)
        model = SmpForSemanticSegmentation(SmpConfig(**described))
    optional = unused_state_keys(model, model.never_used_parameters())
    try:
        load_strictly(model, state, source=path, optional=optional)
    except ValueError as error:
        if hint := _written_beside(content):
            raise ValueError(f"{error} Its hyper_parameters say {hint}.") from error
        raise
    if read_off and not options:
        shown = ", ".join(f"{name} {_plain(value)}" for name, value in read_off.items())
        announce(f"{Path(path).name}: {shown}, as its shapes say. --teacher_options overrules it.")
    return model


def without_statistics(channels: int) -> dict[str, Any]:
    """Settings of an smp network of other images than RGB that nobody has said the mean of."""
    return {
        "in_channels": channels,
        "image_mean": [0.0] * channels,
        "image_std": [1.0] * channels,
    }


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def options_of_shapes(state: Mapping[str, Tensor], arch: str) -> dict[str, Any]:
    """What the weights of a U-Net's or MAnet's decoder say of it that is not smp's default.

    Args:
        state: with smp's names.
        arch: other architectures say nothing here.
    """
    if architecture_class(arch).__name__ not in ("Unet", "MAnet"):
        return {}
    defaults = architecture_arguments(arch)
    channels: list[int] = []
    while (name := f"decoder.blocks.{len(channels)}.conv1.0.weight") in state:
        channels.append(int(state[name].shape[0]))
    found: dict[str, Any] = {"decoder_channels": channels, "encoder_depth": len(channels)}
    if any(".attention1.attention." in name for name in state):
        found["decoder_attention_type"] = "scse"
    if "decoder.blocks.0.conv1.1.weight" not in state:
        found["decoder_use_norm"] = False
    return {n: v for n, v in found.items() if channels and n in defaults and v != defaults[n]}


def _read(path: str) -> Any:
    if _is_torchscript(Path(path)):  # which torch.load would hand on to torch.jit.load
        raise ValueError(_what_holds_code(Path(path)))
    try:
        return read_content(path)
    except ValueError as error:
        if message := _what_holds_code(Path(path)):
            raise ValueError(message) from error
        raise


def _averaged(content: Any, path: str) -> Any:
    """The averaged weights of a training loop's file, where they lie beside the raw ones."""
    if not isinstance(content, Mapping):
        return content
    name = next((n for n in AVERAGED if _holds_tensors(content.get(n))), None)
    if name is None:
        return content
    announce(f"{Path(path).name}: took {name}, the averaged weights, of what lies in it.")
    return content[name]


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) and value.ndim > 0


def _own_weights(state: State, path: str) -> State:
    """The weights of the segmentation network, by smp's names; says what was left out.

    Lightning, DataParallel and compile each put a prefix before the names, and a module keeps the
    network beside its loss and its statistics.
    """
    prefixes = [name.removesuffix(_HEAD) for name in state if name.endswith(_HEAD)]
    prefixes = [prefix for prefix in prefixes if prefix in ("",) or prefix.endswith(".")]
    if not prefixes:
        raise ValueError(
            f"Expected the weights of an smp model in {path!r}, got no {_HEAD!r} among its "
            f"{len(state)} names. Save the whole model's state_dict."
        )
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
    if len(averaged or prefixes) > 1:
        raise ValueError(
            f"Expected one network in {path!r}, got {len(prefixes)}: {', '.join(prefixes)}. Save "
            "the state_dict of the one that is to teach."
        )
    (prefix,) = averaged or prefixes
    if len(prefixes) > 1:
        announce(f"{Path(path).name}: took {prefix[:-1]}, the averaged weights, of what is in it.")
    own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    others = [n for n in state if not n.startswith(prefix)]
    others += [n for n in own if n.startswith(_AUXILIARY)]
    if others:
        shown = [f"{n}{_numbers(state.get(n))}" for n in others[:_SHOWN]]
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        announce(
            f"{Path(path).name}: left out {', '.join(shown)}{more}, which are no part of the "
            f"segmentation network.{_STATISTICS if {'mean', 'std'} <= {*others} else ''}"
        )
    return {n: v for n, v in own.items() if not n.startswith(_AUXILIARY)}


_STATISTICS = (
    " If images of values 0..1 were normalised with this mean and std, give them as --teacher_mean "
    "and --teacher_std; without these it is ImageNet's."
)


def _numbers(value: Tensor | None) -> str:
    """The values of a statistic."""
    if value is None or value.numel() > 3:
        return ""
    return f" ({' '.join(f'{v:g}' for v in value.flatten().tolist())})"


def _channels_seen(state: State, encoder: nn.Module) -> int:
    """Channels of the images of a network, by the shape of its first convolution.

    Args:
        state: its weights.
        encoder: of a network of its kind for RGB images.
    """
    convolutions = ((n, m) for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d))
    first = next((f"encoder.{n}.weight" for n, m in convolutions if m.in_channels == 3), None)
    return int(state[first].shape[1]) if first in state else 3


def _written_beside(content: Any) -> str:
    """What a Lightning checkpoint says of its network."""
    written = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not isinstance(written, Mapping):
        return ""
    plain = {k: v for k, v in written.items() if isinstance(v, str | int | float)}
    return ", ".join(f"{k} {shortened(v)}" for k, v in islice(plain.items(), _SHOWN))


def _what_holds_code(path: Path) -> str:
    """A message on a file that is a network with its code; empty if it is none.

    Nothing is unpickled: the names are read off the zip members and the pickle's opcodes.
    """
    new = f"{path.stem}_state.pth"
    only_you = "which is read by running its code. If you trust who made it, run: import torch;"
    save = f"torch.save(network.state_dict(), {new!r})"
    if _is_torchscript(path):
        load = f"network = torch.jit.load({path.name!r}, map_location='cpu')"
        return (
            f"Expected a state dict in {str(path)!r}, got a TorchScript network, {only_you} "
            f"{load}; {save}. Then name {new}."
        )
    first, classes = _classes_in(_pickle_of(path))
    others = [name for name in classes if not _OF_TENSORS.fullmatch(name)]
    if any(name.partition(".")[0] in _ODD for name in others):
        return ""  # that is no network: nobody should be told how to run it
    load = f"torch.load({path.name!r}, map_location='cpu', weights_only=False)"
    if first is not None and first != "collections.OrderedDict":
        return (
            f"Expected a state dict in {str(path)!r}, got a whole pickled network ({first}), "
            f"{only_you} network = {load}; {save}. Then name {new}."
        )
    if not others:
        return ""
    return (
        f"Expected a file of tensors only, got {str(path)!r} with objects of "
        f"{', '.join(others[:_SHOWN])} beside them, {only_you} content = {load}; "
        f"print(content.keys()); torch.save(content['state_dict'], {new!r}). Then name {new}."
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):  # also of no file at all
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in f"/{name}" for name in archive.namelist())


def _pickle_of(path: Path) -> bytes:
    """The pickle in a file of torch.save."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(_MOST_PICKLE)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("data.pkl")), None)
        if pickled is None:
            return b""
        with archive.open(pickled) as stream:
            return stream.read(_MOST_PICKLE)


def _classes_in(data: bytes) -> tuple[str | None, list[str]]:
    """The class of the pickled object itself (None of a plain one), and all classes it names.

    Before torch had its zip format it wrote several pickles, a number and a table first.
    """
    root: str | None = None
    names: dict[str, None] = {}
    while data:
        plain, texts, end = False, ["", ""], len(data)
        with contextlib.suppress(ValueError, IndexError):  # of a file that is cut off
            for opcode, argument, position in pickletools.genops(data):
                end = (position or 0) + 1
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    name = ".".join(texts) if argument is None else argument.replace(" ", ".")
                    names.setdefault(name)
                    root = root or (None if plain else name)
                elif isinstance(argument, str):
                    texts = [texts[1], argument]
                plain = plain or opcode.name in ("EMPTY_DICT", "EMPTY_LIST")
        data = data[end:] if data[end - 1 : end] == pickle.STOP else b""
    return root, list(names)
