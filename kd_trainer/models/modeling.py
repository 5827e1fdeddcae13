"""Any architecture of segmentation_models_pytorch (smp) as a transformers model.

The network's `encoder`, `decoder` and `segmentation_head` are attributes of the model itself, so
the state dict has smp's own keys and one folder is read by `AutoModelForSemanticSegmentation` and
by `smp.from_pretrained` (not for `tu-*` encoders, whose loader refuses our keys in config.json).

A binary model has one logit z in its weights. `logits` then is (0, z), whose softmax equals
sigmoid(z): stock processors and pipelines take the argmax, which over one channel is always 0.

This file travels with a saved model as remote code and imports only its siblings.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

# transformers 5.8 copies only those files of a folder that this one itself imports.
from .config_checks import nearest_hint
from .configuration_smp import (
    MULTI_LABEL,
    SmpConfig,
    architecture_arguments,
    architecture_class,
    build_network,
    default_labels,
    uses_timm_loader,
)
from .encoder_units import EncoderUnit, encoder_units, find_never_used, free_deepest
from .image_sizes import AnySize, as_size
from .weights import fill_encoder, load_pretrained


@dataclass
class SmpOutput(ModelOutput):
    """Output of `SmpForSemanticSegmentation`.

    Args:
        loss: scalar, if labels were given.
        logits: (B, num_labels, H, W); of a binary model zeros and the raw logit. Of a model with
            several labels a pixel each is read through a sigmoid of its own.
        raw_logits: (B, K, H, W), what the network gave; K = 1 for a binary model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    raw_logits: Tensor | None = None


class SmpForSemanticSegmentation(PreTrainedModel):
    """A segmentation network of smp with transformers' loading, saving and training interface."""

    config_class = SmpConfig
    config: SmpConfig
    base_model_prefix = ""  # the state dict keeps smp's keys
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 (as transformers declares it)
    encoder: nn.Module
    decoder: nn.Module
    segmentation_head: nn.Module
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer must not divide by its own count

    def __init__(self, config: SmpConfig) -> None:
        super().__init__(config)
        # from_pretrained builds on the meta device, where smp's encoders call .item() and timm's
        # constant buffers would be lost; the networks are small.
        with torch.device("cpu"):
            network = build_network(config)
            check_image_size(config.image_size, network)
            self._never_used = find_never_used(network, config.image_size, config.in_channels)
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.segmentation_head = network.segmentation_head
        self._frozen: tuple[nn.Module, ...] = ()
        self._free_units = 0
        self.post_init()
        self._constants = {n: b.clone() for n, b in self.named_non_persistent_buffers()}
        self.set_free_units(None)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as smp initialised it."""

    @classmethod
    def create(
        cls,
        arch: str = "unet",
        encoder: str = "timm-efficientnet-b0",
        *,
        encoder_weights: str = "imagenet",
        id2label: dict[int, str] | None = None,
        **options: Any,
    ) -> Self:
        """Build a new model.

        Args:
            arch: name of an smp architecture, in any case.
            encoder: name of an encoder, as `smp.create_model` takes it.
            encoder_weights: `imagenet` (downloaded by smp), `none`, or a safetensors or .pth file.
            id2label: name of each class, background first; two names make a one-logit model. With
                `problem_type="multi_label_classification"` there is no background.
            **options: fields of SmpConfig (`image_size`, `image_mean`, `image_std`) and arguments
                of the architecture (`decoder_channels`, ...); for a `tu-*` encoder anything else
                goes to timm.

        Raises:
            ValueError: for unknown names or options, or weights that do not fit the encoder.
            FileNotFoundError: if the weights can be found neither here nor on the Hub.
        """
        labels = dict(id2label or default_labels(2))
        known = {*architecture_arguments(arch), *SmpConfig.__dataclass_fields__}
        known -= {"classes", "encoder_name", "encoder_weights", "activation", "_model_class"}
        extra = {name: options.pop(name) for name in list(options) if name not in known}
        if extra and not uses_timm_loader(encoder):
            name = next(iter(extra))
            hint = nearest_hint(name, sorted(known & set(architecture_arguments(arch))))
            raise ValueError(f"Expected an argument of {arch}, got {name!r}. {hint}")
        one_logit = len(labels) == 2 and options.get("problem_type") != MULTI_LABEL
        config = SmpConfig(
            _model_class=architecture_class(arch).__name__,
            encoder_name=encoder,
            classes=1 if one_logit else len(labels),
            id2label=labels,
            encoder_kwargs=extra or None,
            **options,
        )
        model = cls(config)
        never_used = {name.removeprefix("encoder.") for name in model.never_used_parameters()}
        fill_encoder(model.encoder, encoder_weights, config, never_used)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load strictly from a folder or the Hub; a pure smp folder is read as well.

        Raises:
            FileNotFoundError: if there are no weights.
            ValueError: if they cannot be read; lists those that are missing, extra or misshapen.
        """
        with_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        model, info = load_pretrained(load, pretrained_model_name_or_path, *args, **kwargs)
        # transformers replaces these by uninitialised memory, and parameters by trainable ones.
        for name, value in model._constants.items():
            model.get_buffer(name).copy_(value)
        model.set_free_units(None)
        return (model, info) if with_info else model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SmpOutput:
        """Segment a batch.

        Args:
            pixel_values: normalised floats (B, 3, H, W); H and W divisible by the output stride.
            labels: integers (B, H, W), optional; (B, K, H, W) with several labels a pixel.

        Raises:
            ValueError: if the size is not divisible by the encoder's output stride.
        """
        # A traced or exported graph keeps its sizes dynamic.
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined]
            check_image_size((pixel_values.shape[-2], pixel_values.shape[-1]), self)
        features = self.encoder(pixel_values)
        # A vision transformer's prefix tokens come beside its features.
        decoded = self.decoder(*features) if self._is_dpt else self.decoder(features)
        raw = self.segmentation_head(decoded)
        logits = torch.cat([torch.zeros_like(raw), raw], dim=1) if raw.shape[1] == 1 else raw
        loss = None if labels is None else self._mean_cross_entropy(logits, labels)
        return SmpOutput(loss=loss, logits=logits, raw_logits=raw)

    @property
    def _is_dpt(self) -> bool:
        return self.config._model_class == "DPT"

    def _mean_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the valid pixels, 0 without any; of (0, z) it is the binary cross entropy."""
        ignore = self.config.semantic_loss_ignore_index
        if self.config.multi_label:  # a binary map for each class
            logits, labels = logits.reshape(-1, 1, *logits.shape[2:]), labels.flatten(0, 1)
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        target = labels.long()
        total = F.cross_entropy(logits.float(), target, ignore_index=ignore, reduction="sum")
        return total / (target != ignore).sum().clamp(min=1)

    def never_used_parameters(self) -> frozenset[str]:
        """Full names of the parameters that no output depends on; they are always frozen."""
        return self._never_used

    @property
    def free_units(self) -> int:
        """How many encoder units are free, counted from the deepest."""
        return self._free_units

    def set_free_units(self, count: int | None) -> None:
        """Free the `count` deepest encoder units and freeze the others.

        Frozen units get no gradient and stay wholly in eval mode, also after `train()`: running
        statistics do not move, Dropout and DropPath are off.

        Args:
            count: 0 to the number of units; None frees them all.

        Raises:
            ValueError: if there are not so many units.
        """
        units = encoder_units(self)
        free = len(units) if count is None else count
        self._frozen = free_deepest(self, units, self._never_used, free)
        self._free_units = free
        self.train(self.training)

    def synchronise_batchnorm(self) -> None:
        """Take one BatchNorm statistic over all processes while training; GPUs only.

        Names and values of the weights stay. timm's conversion, because PyTorch's own drops the
        activations that timm's encoders keep in these layers.
        """
        convert_sync_batchnorm(self)
        self.set_free_units(self._free_units)  # which names the layers that stay in eval mode

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; frozen encoder units stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def check_image_size(size: AnySize, model: nn.Module) -> None:
    """Refuse an image size that the encoder cannot halve as often as it does.

    Args:
        size: as `as_size` reads it, in pixels.
        model: a segmentation model with an smp encoder.

    Raises:
        ValueError: if a side is not a positive multiple of the encoder's output stride.
    """
    stride = int(model.encoder.output_stride)  # type: ignore[union-attr, arg-type]
    for side in as_size(size):
        if side < stride or side % stride:
            lower = max(side // stride, 1) * stride
            raise ValueError(
                f"Expected an image size divisible by {stride}, got {side}. "
                f"Use {lower} or {lower + stride}."
            )


MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[SmpConfig.model_type] = "SmpForSemanticSegmentation"
# A remote copy registers nothing: two saved models may bring two versions of this file.
if not __name__.startswith("transformers_modules."):
    AutoModelForSemanticSegmentation.register(SmpConfig, SmpForSemanticSegmentation, exist_ok=True)
SmpForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "EncoderUnit",
    "SmpConfig",
    "SmpForSemanticSegmentation",
    "SmpOutput",
    "check_image_size",
    "encoder_units",
]
