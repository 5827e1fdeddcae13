"""Configuration of a segmentation model built by segmentation_models_pytorch (smp).

The same `config.json` is read by transformers and by `smp.from_pretrained`, so it always holds
every argument of the smp architecture, its class name as `_model_class`, and `encoder_weights`
as null (any other value would make smp download weights again on each load).
Travels with a saved model as remote code; imports only its sibling.
"""

import inspect
import re
import warnings
from collections.abc import Collection
from typing import Any

import segmentation_models_pytorch as smp
import timm
from segmentation_models_pytorch.encoders import get_encoder_names, is_equivalent_to_timm_universal
from torch import nn
from transformers import AutoConfig

from .config_checks import (
    LARGEST_SIDE,
    MOST,
    PreTrainedConfig,
    bounded_size,
    check_arguments,
    check_encoder_arguments,
    check_entries,
    check_labels,
    check_statistics,
    check_whole,
    nearest_hint,
    refuse,
    shortened,
)
from .image_sizes import plain_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MULTI_LABEL = "multi_label_classification"
"""The `problem_type` of a model with several labels a pixel, K sigmoids."""
DEFAULT_LABELS = {0: "background", 1: "foreground"}
# Without a place: timm takes `local-dir:FOLDER` and `hf-hub:OWNER/NAME` as names too.
_ENCODER = re.compile(r"[\w.+-]{1,100}", re.ASCII)


def architecture_class(name: str) -> type[nn.Module]:
    """The smp class of an architecture, given as `unet` or as `Unet`.

    Raises:
        ValueError: if smp has no such architecture; names the nearest one.
    """
    known = smp.MODEL_ARCHITECTURES_MAPPING
    if not isinstance(name, str) or len(name) > 100:
        refuse("_model_class", "the name of an architecture of smp", name)
    if name.lower() not in known:
        hint = nearest_hint(name.lower(), known)
        raise ValueError(f"Expected an architecture of smp, got {name!r}. {hint}")
    return known[name.lower()]


def check_encoder_name(name: str) -> None:
    """Refuse an encoder that neither smp nor, after `tu-`, timm knows.

    Raises:
        ValueError: names the nearest encoder.
    """
    if not isinstance(name, str) or not _ENCODER.fullmatch(name):
        refuse("encoder_name", "the name of an encoder", name)
    if uses_timm_loader(name):
        if not timm.is_model(_timm_name(name)):
            near = nearest_hint(f"tu-{_timm_name(name)}", [f"tu-{m}" for m in timm.list_models()])
            raise ValueError(f"Expected an encoder of timm after 'tu-', got {name!r}. {near}")
    elif name not in get_encoder_names():
        hint = nearest_hint(name, [*get_encoder_names(), *(f"tu-{m}" for m in timm.list_models())])
        raise ValueError(f"Expected an encoder of smp, got {name!r}. {hint}")


def uses_timm_loader(encoder_name: str) -> bool:
    """Whether smp builds this encoder with `timm.create_model`, which takes further arguments."""
    return encoder_name.startswith("tu-") or is_equivalent_to_timm_universal(encoder_name)


def _timm_name(encoder_name: str) -> str:
    name = encoder_name.removeprefix("tu-").split(".")[0]
    if not encoder_name.startswith("timm-"):
        return name
    return name.replace("timm-", "tf_" if "mobilenetv3" in name else "")  # as smp renames them


def architecture_arguments(name: str) -> dict[str, Any]:
    """Names and defaults of all arguments of an smp architecture, tuples as lists (as in JSON)."""
    parameters = inspect.signature(architecture_class(name).__init__).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    return {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in named}


class SmpConfig(PreTrainedConfig):
    """What is needed to build an smp model and to feed it.

    Every argument of the architecture (`decoder_channels`, `encoder_depth`, ...) is an attribute
    too; the set depends on `_model_class`.

    Args:
        _model_class: class name of the smp architecture, `Unet` for instance.
        encoder_name: as `smp.create_model` takes it.
        classes: output channels. 1 is a binary model (background and one class, `num_labels` 2),
            2 a two-class softmax, otherwise equal to `num_labels`. With the `problem_type`
            multi_label_classification they are sigmoids, one a label, without a background.
        encoder_kwargs: further arguments of a `tu-*` encoder, passed to timm.
        image_size: of the input the model is meant for, in pixels: the side of a square, or
            [height, width].
        keep_aspect_ratio: whether images are shrunk or enlarged as a whole until they fit into it,
            and padded at the right or below, instead of being stretched to it.
        image_mean: per channel, of values in 0..1.
        image_std: per channel, of values in 0..1.
        semantic_loss_ignore_index: label of pixels that the loss leaves out.
        own_depth: images have `in_channels` channels, bytes divided by 255, 16-bit values by
            65535, floats as they are; else they are 8-bit RGB.

    Raises:
        ValueError: for an unknown architecture or encoder, an auxiliary classification head, or
            `classes` that do not go with `id2label`.
    """

    model_type = "smp"
    keys_to_ignore_at_inference = ["raw_logits"]  # noqa: RUF012 (annotated, it would be a field)

    _model_class: str = "Unet"
    encoder_name: str = "timm-efficientnet-b0"
    classes: int = 1
    encoder_kwargs: dict[str, Any] | None = None
    image_size: int | list[int] | tuple[int, ...] = 640
    keep_aspect_ratio: bool = False
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    semantic_loss_ignore_index: int = 255
    own_depth: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete smp's arguments and the label names, then check them."""
        self._model_class = architecture_class(self._model_class).__name__
        check_encoder_name(self.encoder_name)
        self._check_own()
        own_fields = type(self).__dataclass_fields__
        for name, default in architecture_arguments(self._model_class).items():
            if name not in own_fields:
                setattr(self, name, kwargs.pop(name, default))
        if self.aux_params is not None:
            raise ValueError(
                f"Expected no classification head, got aux_params={shortened(self.aux_params)}. "
                "Only the segmentation head is trained here: leave aux_params out."
            )
        # The outputs are logits by contract, and an activation has no weights to lose.
        self.activation = None
        self.encoder_weights = None
        check_arguments({n: getattr(self, n) for n in architecture_arguments(self._model_class)})
        check_whole("encoder_depth", self.encoder_depth, 1, 8)
        check_whole("in_channels", self.in_channels, 1, 64)
        where = "the model's config.json"
        check_statistics(self.image_mean, self.image_std, where, self.in_channels)
        num_labels = kwargs.pop("num_labels", None)
        check_labels(self.id2label, num_labels)
        if self.id2label is None:
            self.id2label = default_labels(num_labels or max(self.classes, 2))
        super().__post_init__(**kwargs)
        names = {int(index): str(label) for index, label in (self.id2label or {}).items()}
        labels = dict(sorted(names.items()))
        self.id2label, self.label2id = labels, {name: index for index, name in labels.items()}
        self._check_labels(num_labels)

    def _check_own(self) -> None:
        """Types and ranges of the fields of this class."""
        check_whole("classes", self.classes, 1, MOST)
        sides: Any = self.image_size
        several = isinstance(sides, list | tuple) and len(sides) in (1, 2)
        for side in sides if several else [sides]:
            check_whole("image_size", side, 1, LARGEST_SIDE)
        self.image_size = plain_size(self.image_size)
        if not isinstance(self.keep_aspect_ratio, bool):
            refuse("keep_aspect_ratio", "true or false", self.keep_aspect_ratio)
        check_whole("semantic_loss_ignore_index", self.semantic_loss_ignore_index, -(2**31), 2**31)
        if not isinstance(self.encoder_kwargs, dict | None):
            refuse("encoder_kwargs", "arguments by name", self.encoder_kwargs)
        if self.encoder_kwargs:
            of_timm = uses_timm_loader(self.encoder_name)
            model = _timm_name(self.encoder_name) if of_timm else None
            check_encoder_arguments(model, self.encoder_kwargs)

    def _check_labels(self, num_labels: int | None) -> None:
        count = len(self.id2label or {})
        fitting = (1, 2) if count == 2 and not self.multi_label else (count,)
        if num_labels not in (None, count) or self.classes not in fitting:
            raise ValueError(
                f"Expected as many output channels as labels (or 1 for two labels), got "
                f"classes={self.classes} and labels {shortened(self.id2label)}. Make them agree."
            )

    def to_dict(self) -> dict[str, Any]:
        """All entries of config.json; the aspect ratio only where it is kept."""
        entries: dict[str, Any] = super().to_dict()
        if not self.keep_aspect_ratio:
            entries.pop("keep_aspect_ratio", None)
        return entries

    @property
    def multi_label(self) -> bool:
        """Whether a pixel may have several labels: each logit is then read through a sigmoid."""
        return bool(self.problem_type == MULTI_LABEL)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also read the config.json of a pure smp folder, which has no `model_type`."""
        arguments = architecture_arguments(config_dict.get("_model_class", cls._model_class))
        # transformers takes one with timm's `pretrained_cfg` for a model of timm alone.
        if config_dict.get("model_type") != cls.model_type and "_model_class" in config_dict:
            entries = {k: v for k, v in config_dict.items() if k != "model_type"}
            config_dict = _from_smp_config(entries, arguments)
        config_dict = check_entries(config_dict, {*cls.__dataclass_fields__, *arguments})
        return super().from_dict(config_dict, **kwargs)


def default_labels(num_labels: int) -> dict[int, str]:
    """Names for models that came without: every class gets one, because the Hub wants them."""
    if num_labels == 2:
        return dict(DEFAULT_LABELS)
    return {i: "background" if i == 0 else f"class_{i}" for i in range(num_labels)}


def _from_smp_config(config: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Tell smp's own arguments from those it hands to timm, which it writes side by side."""
    check_encoder_name(config.get("encoder_name", SmpConfig.encoder_name))
    extra = {key: config.pop(key) for key in list(config) if key[0] != "_" and key not in known}
    if uses_timm_loader(config.get("encoder_name", "")):
        settings = timm.get_pretrained_cfg(_timm_name(config["encoder_name"]))
        # Some of timm's transformers accept one input size only, and smp does not record it.
        if settings is not None and settings.fixed_input_size:
            config["image_size"] = extra.get("img_size", settings.input_size[-1])
        config["encoder_kwargs"] = extra or None
    return config


def build_network(config: SmpConfig, encoder_weights: str | bool | None = None) -> Any:
    """The smp model of a configuration.

    Args:
        config: architecture, encoder and their arguments.
        encoder_weights: as smp takes it (True for the weights of a `tu-*` encoder); None for
            random ones.

    Raises:
        ValueError: if smp or timm refuses the arguments, or the encoder for this architecture.
    """
    defaults = architecture_arguments(config._model_class)
    arguments = {name: getattr(config, name) for name in defaults}
    arguments["encoder_weights"] = encoder_weights
    with warnings.catch_warnings():
        # smp says this at each construction, although its `tu-` encoders cannot replace the
        # folder format that `timm-` encoders allow.
        warnings.filterwarnings(
            "ignore", message="`timm-` encoders are deprecated", category=DeprecationWarning
        )
        # Without a download, whatever is raised is what smp, timm or torch say of the arguments.
        known = Exception if encoder_weights is None else (ValueError, TypeError)
        try:
            with bounded_size():
                return architecture_class(config._model_class)(
                    **arguments, **(config.encoder_kwargs or {})
                )
        except known as error:
            raise _refused(config, defaults, error) from error


def _refused(config: SmpConfig, defaults: dict[str, Any], error: Exception) -> ValueError:
    """The complaint of smp, with the arguments that differ from its defaults."""
    own = SmpConfig.__dataclass_fields__
    given = {n: (getattr(config, n), default) for n, default in defaults.items() if n not in own}
    changed = [
        f"{name} {value} (default {default})"
        for name, (value, default) in given.items()
        if name not in ("encoder_weights", "activation") and value != default
    ]
    changed += [f"{name} {value}" for name, value in (config.encoder_kwargs or {}).items()]
    return ValueError(
        f"Expected arguments that {config._model_class} takes with {config.encoder_name}, got "
        f"{', '.join(changed) or 'the defaults'}: {' '.join(str(error).split()).rstrip('.')}. Give "
        "each as its default is, or choose another architecture or encoder."
    )


# A remote copy registers nothing: two saved models may bring two versions of this file.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(SmpConfig.model_type, SmpConfig, exist_ok=True)
SmpConfig.register_for_auto_class()
