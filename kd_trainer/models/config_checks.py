"""What the configuration of a model may say: known entries with plain values within bounds.

A config.json comes from anybody. Its values reach constructors of smp and timm, among whose
arguments are paths, downloads and classes; here it is decided which may come from a file.
Travels with a saved model as remote code; imports nothing of the package.
"""

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import timm
import transformers
from timm.models import build_model_with_cfg
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

try:  # the newest names that saved code needs; its other files take them from here
    from transformers import PreTrainedConfig
    from transformers.image_processing_backends import TorchvisionBackend
except ImportError:
    raise ImportError(
        f"Expected transformers 5.4 or newer, got {transformers.__version__}. Run `pip install "
        "--upgrade transformers`, or use segmentation_models_pytorch.from_pretrained."
    ) from None

__all__ = ["PreTrainedConfig", "TorchvisionBackend"]  # besides what is defined here

MOST = 4096  # channels, classes, layers: far more than any published network has
LARGEST_SIDE = 16_384
_LARGEST_FILE = 4 * 2**20  # bytes; the largest known is some hundred KiB of class names
MOST_PARAMETERS = 1_500_000_000  # 6 GB
_LISTED = 12  # names in a message: all architectures of smp, but not the thousand encoders of timm
# Entries that transformers writes beside the fields of a configuration.
COMMON = frozenset(
    {"architectures", "auto_map", "dtype", "torch_dtype", "id2label", "num_labels"}
    | {"model_type", "problem_type", "transformers_version"}
)
# Entries that would change how weights are read or computed with.
_FOREIGN = ("quantization_config", "attn_implementation", "_attn_implementation")
_DTYPES = (None, "float32", "float16", "bfloat16", "float64")
_WORD = re.compile(r"[\w.+-]{0,64}", re.ASCII)
# What smp decides itself, and words in names of what weights or code are taken from.
_DECIDED = {"self", "kwargs", "num_classes", "in_chans", "out_indices", "output_stride"}
_SOURCES = re.compile(
    r"(^|_)(pretrained|checkpoint|cfgs?|file|filename|url|hub|hf|cache|dir|module|weights|device|"
    r"dtype)($|_)"
)


def refuse(name: str, wanted: str, value: Any, cure: str = "") -> NoReturn:
    """Raise the one kind of error of this file."""
    cure = cure or "Correct it in config.json, or in the flags that describe the model."
    raise ValueError(f"Expected {wanted} as {name} of a model, got {shortened(value)}. {cure}")


def shortened(value: Any) -> str:
    """A value for a message, of at most 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or the first ones when none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.65)
    if near:
        return f"Did you mean {near[0]!r}?"
    more = f" or {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"Choose one of {', '.join(names[:_LISTED])}{more}."


def read_config(source: str | Path, **hub: Any) -> dict[str, Any]:
    """What the config.json of a folder or a Hub id holds.

    Raises:
        OSError: if there is none, or it is no JSON object.
        ValueError: if it cannot be read for its size, depth or numbers.
    """
    file = Path(source) / "config.json"
    try:
        if file.is_file() and file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE / 2**20:g} MiB")
        config, _ = PreTrainedConfig.get_config_dict(str(source), **hub)
    except TypeError:  # transformers 5.6 adds entries to what it read, a list too
        config = None
    except (ValueError, RecursionError, AttributeError) as error:
        reason = "values nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(
            f"Expected a config.json that describes a model in {str(source)!r}, got "
            f"{' '.join(reason.split()).rstrip('.')}. Correct it, or download the model again."
        ) from error
    if not isinstance(config, dict):
        raise OSError("its config.json is no JSON object.")
    return config


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no whole number between two bounds."""
    if type(value) is not int or not low <= value <= high:
        refuse(name, f"a whole number from {low} to {high}", value)


def check_entries(entries: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The entries of a config.json that mean something here; others are left out.

    Args:
        entries: what the file holds.
        known: fields of the configuration and arguments of the architecture.

    Raises:
        ValueError: for an entry that would change how weights are read, or a wrong common one.
    """
    for name in _FOREIGN:
        if entries.get(name) is not None:
            cure = "These models are saved unquantised: take the original, or delete the entry."
            refuse(name, "nothing", entries[name], cure)
    for name in ("dtype", "torch_dtype"):
        if entries.get(name) not in _DTYPES:
            refuse(name, "float32, float16, bfloat16 or float64", entries[name])
    for name in ("transformers_version", "problem_type"):
        if not isinstance(entries.get(name), str | None):
            refuse(name, "text", entries[name])
    if not _is_list_of_text(entries.get("architectures") or []):
        refuse("architectures", "a list of names", entries["architectures"])
    parts = entries.get("auto_map") or {}
    if not (isinstance(parts, dict) and all(isinstance(v, str | list) for v in parts.values())):
        refuse("auto_map", "names of classes", parts)
    check_labels(entries.get("id2label"), entries.get("num_labels"))
    kept = (COMMON | set(known)) - {"label2id"}  # which follows from id2label
    return {name: value for name, value in entries.items() if name in kept}


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_labels(id2label: Any, num_labels: Any) -> None:
    """Refuse names of classes that are not numbered from 0."""
    if num_labels is not None:
        check_whole("num_labels", num_labels, 1, MOST)
    if id2label is None:
        return
    wanted = "the names of the classes, numbered from 0,"
    if not (isinstance(id2label, Mapping) and 0 < len(id2label) <= MOST):
        refuse("id2label", wanted, id2label)
    numbers = [str(key) for key in id2label]
    if sorted(numbers) != sorted(map(str, range(len(numbers)))):
        refuse("id2label", wanted, list(id2label))
    for label in id2label.values():
        if not isinstance(label, str | int) or len(str(label)) > 200:
            refuse("id2label", "names of up to 200 characters", label)


def check_statistics(mean: Any, std: Any, where: str, channels: int = 3) -> None:
    """Refuse what a file gives as mean or std of an image, and no image can be normalised with.

    NaN, or a std of 0, would make every logit NaN, which a class map does not show.

    Raises:
        ValueError: unless both are finite numbers, one a channel, those of the std above 0.
    """
    for name, values, least in (("image_mean", mean, -math.inf), ("image_std", std, 0.0)):
        fits = isinstance(values, list | tuple) and len(values) == channels
        if not (fits and all(is_finite_number(v) and v > least for v in values)):
            wanted = f"{'three' if channels == 3 else channels} finite numbers" + (
                " above 0" if least == 0 else ""
            )
            raise ValueError(
                f"Expected {name} of {wanted} in {where}, got {str(values)[:80]}. Give those that "
                "the model was trained with."
            )


def is_finite_number(value: Any) -> bool:
    """Whether a value of a file is a number to calculate with: true, 1e999 and NaN are none."""
    return type(value) is not bool and isinstance(value, int | float) and abs(value) < math.inf


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not below it either


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse values for an smp architecture that are not plain, or larger than any network's."""
    for name, value in arguments.items():
        if not _is_plain(value, depth=2):
            refuse(name, f"plain values up to {MOST}", value)


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple) and depth:
        return len(value) <= 64 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return _is_plain([*value, *value.values()], depth)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, bool) or (_is_number(value) and abs(value) <= MOST)


def check_encoder_arguments(model_name: str | None, arguments: Mapping[str, Any]) -> None:
    """Refuse what timm takes beyond the arguments of the network itself.

    `timm.create_model` and its builder also take files, downloads and classes.

    Args:
        model_name: of timm; None for an encoder of smp's own, which takes none.
        arguments: further ones of the encoder.
    """
    known = timm_arguments(model_name) if model_name else frozenset()
    for name, value in arguments.items():
        if name not in known:
            cure = "Leave it out; paths, weights and classes never come from a configuration."
            refuse("encoder_kwargs", "arguments of the encoder's own network", name, cure)
        if isinstance(value, dict) or not _is_plain(value, depth=2):
            refuse(f"encoder_kwargs {name}", f"plain values up to {MOST}", value)


def timm_arguments(model_name: str) -> frozenset[str]:
    """Names of the arguments that describe the network of one of timm's models.

    They are those of the network classes in its file, without what timm's factory and builder take.
    """
    file = sys.modules[timm.models.model_entrypoint(model_name).__module__]
    classes = [c for c in vars(file).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    signatures = [set(inspect.signature(c.__init__).parameters) for c in classes]
    names = set().union(*(names for names in signatures if "num_classes" in names))
    taken = {*_parameters(timm.create_model), *_parameters(build_model_with_cfg)}
    return frozenset(n for n in names - taken - _DECIDED if not _SOURCES.search(n))


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(function).parameters


@contextmanager
def bounded_size() -> Iterator[None]:
    """Refuse a network that outgrows the memory while it is built, instead of being killed.

    Raises:
        ValueError: at the first parameter beyond the bound.
    """
    total = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += parameter.numel() if parameter is not None else 0
        if total > MOST_PARAMETERS:
            raise ValueError(f"more than {MOST_PARAMETERS:,} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
