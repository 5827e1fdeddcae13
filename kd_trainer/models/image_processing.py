"""The image processor saved beside a student, and the one resize of the whole project.

Training data, evaluation and deployment all shrink images with `resize_image`, so the network
meets the same pixels everywhere. Travels with a saved model as remote code; imports only siblings.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from transformers import AutoImageProcessor, AutoVideoProcessor
from transformers.image_utils import PILImageResampling, SizeDict

from .config_checks import TorchvisionBackend, check_statistics, is_finite_number
from .configuration_smp import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SmpConfig,
)
from .image_sizes import Size, as_size

PADDING = (124, 116, 104)
"""RGB of what lies outside an image: ImageNet's mean, so about 0 once it is normalised."""
_FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0}


def fitted_size(image: Size, size: Size) -> Size:
    """The largest size of an image's aspect ratio that fits into `size`.

    Args:
        image: (height, width) of the image.
        size: (height, width) of what it has to fit into.
    """
    scale = min(size[0] / image[0], size[1] / image[1])
    height, width = (round(side * scale) for side in image)
    return max(1, min(height, size[0])), max(1, min(width, size[1]))


def to_input(
    image: Tensor, size: Size, *, keep_aspect_ratio: bool, padding: Sequence[float] | None = None
) -> Tensor:
    """Images at the size of a network's input.

    Args:
        image: uint8 RGB (..., 3, H, W), or float32 (..., C, H, W).
        size: (height, width) of the result.
        keep_aspect_ratio: fit it in, at the upper left, and pad at the right or below, as the
            processors of transformers do (DETR, Mask2Former, SAM): the pixel (0, 0) stays the
            pixel (0, 0), and who knows the image's size can cut the padding off.
        padding: a value for each channel. None takes `PADDING` for bytes, and for floats, which
            are normalised then, 0: the mean of the channel.

    Returns:
        (..., C, height, width) of the same type.
    """
    if not keep_aspect_ratio:
        return resize_image(image, *size)
    height, width = fitted_size((image.shape[-2], image.shape[-1]), size)
    if (height, width) == size:
        return resize_image(image, height, width)
    values = padding or (PADDING if image.dtype == torch.uint8 else (0,))
    padded = image.new_tensor(values).view(-1, 1, 1).expand(*image.shape[:-2], *size).clone()
    padded[..., :height, :width] = resize_image(image, height, width)
    return padded


def at_image_size(logits: Tensor, image: Size, *, keep_aspect_ratio: bool) -> Tensor:
    """Logits of `to_input` at the size of the image, without those of the padding.

    Args:
        logits: (B, K, H, W) at the size of the input.
        image: (height, width) of the image.
        keep_aspect_ratio: as it was for the input.

    Returns:
        (B, K, height, width).
    """
    if keep_aspect_ratio:
        height, width = fitted_size(image, (logits.shape[-2], logits.shape[-1]))
        logits = logits[..., :height, :width]
    return F.interpolate(logits, size=image, mode="bilinear", align_corners=False)


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Resize images to an exact size: bilinear with antialiasing.

    Args:
        image: uint8 or float32 (..., C, H, W).
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        (..., C, height, width) of the same type; the image itself if it has that size already.

    Raises:
        TypeError: if the image is neither uint8 nor float32.
        ValueError: if the size is not positive.
    """
    if image.dtype not in (torch.uint8, torch.float32):
        raise TypeError(
            f"Expected a uint8 or float32 image, got {image.dtype}. Pass bytes 0..255, or scale "
            "the values first."
        )
    if height < 1 or width < 1:
        raise ValueError(f"Expected a positive size, got {height}x{width}. Name it in pixels.")
    if image.shape[-2:] == (height, width):
        return image
    size = [height, width]
    return tvf.resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True)


def scaled_channels(values: npt.NDArray[Any], channels: int) -> npt.NDArray[np.float32]:
    """An image of any depth as floats (H, W, C): bytes / 255, 16 bits / 65535, others as they are.

    Args:
        values: (H, W), (H, W, C) or (C, H, W).
        channels: C.

    Raises:
        ValueError: if it has another number of channels, or holds NaN or infinity.
    """
    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and shape[2] != channels and shape[0] == channels:
        values = np.moveaxis(values, 0, 2)
    if values.ndim != 3 or values.shape[2] != channels:
        raise ValueError(f"an image of {channels} channels, got {shape}")
    image = values.astype(np.float32) / np.float32(_FULL_SCALE.get(values.dtype.name, 1.0))
    if not np.isfinite(image).all():
        raise ValueError("finite values, got NaN or infinity")
    return image


class SmpImageProcessor(TorchvisionBackend):
    """Pictures of any mode to normalised floats, and logits back to masks of the original size.

    Takes PIL images, uint8 arrays and uint8 tensors. Transparency is laid on white; greyscale,
    palette and CMYK images become RGB. `keep_aspect_ratio` says how images get to the size of the
    input, see `to_input`.

    With `own_depth` it takes images of as many channels as `image_mean` has, of any bit depth, see
    `scaled_channels`. With `multi_label` a pixel may have several labels, see
    `post_process_multi_label`.
    """

    own_depth = False
    multi_label = False
    keep_aspect_ratio = False
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    size = {"height": 640, "width": 640}  # noqa: RUF012 (copied for each instance by the base)
    default_to_square = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        """The processor of these settings.

        Raises:
            ValueError: if nothing can be normalised with them.
        """
        super().__init__(**kwargs)
        channels = len(self.image_mean) if isinstance(self.image_mean, list | tuple) else 3
        check_statistics(self.image_mean, self.image_std, "preprocessor_config.json", channels)
        if not (is_finite_number(self.rescale_factor) and self.rescale_factor > 0):
            raise ValueError(
                "Expected rescale_factor as a finite number above 0 in preprocessor_config.json, "
                f"got {str(self.rescale_factor)[:80]}. It is 1/255 unless the training says else."
            )

    @classmethod
    def from_model_config(cls, config: SmpConfig, **options: Any) -> "SmpImageProcessor":
        """The processor that feeds a model of this configuration; `options` are saved with it."""
        height, width = as_size(config.image_size)
        if config.keep_aspect_ratio:
            options["keep_aspect_ratio"] = True
        if config.own_depth:  # scaled by its own depth, which no one factor can say
            options |= {"own_depth": True, "do_rescale": False, "do_convert_rgb": False}
        if config.multi_label:
            options["multi_label"] = True
        return cls(
            size={"height": height, "width": width},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            **options,
        )

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Convert one image to a (C, H, W) tensor.

        Raises:
            ValueError: for PIL images of more than 8 bits, which PIL would clip to white. With
                `own_depth` for images of other channels, or that are not finite.
        """
        if self.own_depth:
            return self._of_own_depth(image)
        mode = getattr(image, "mode", None)
        if isinstance(mode, str) and mode.startswith(("I", "F")):
            raise ValueError(
                f"Expected an image of 8 bits a channel, got PIL mode {mode!r}. "
                "Scale its values to 0..255 first."
            )
        if isinstance(image, Image.Image) and image.has_transparency_data:
            # transformers below 5.22 would show the colours that lie hidden under it
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return super().process_image(image, *args, **kwargs)

    def _of_own_depth(self, image: Any) -> Tensor:
        values = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        try:
            pixels = scaled_channels(values, len(self.image_mean))
        except ValueError as error:
            raise ValueError(
                f"Expected {error}. Pass arrays (H, W, C) like those of the training."
            ) from None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def resize(self, image: Tensor, size: SizeDict, *_: Any, **__: Any) -> Tensor:
        """Bring images (..., C, H, W) to the size of the input, see `to_input`."""
        if not (size.height and size.width):
            raise ValueError(f"Expected size with height and width, got {size}. Name both.")
        if image.dtype != torch.uint8 and not self.own_depth:
            raise TypeError(f"Expected a uint8 image, got {image.dtype}. Pass values 0..255.")
        wanted, padding = (size.height, size.width), self.image_mean if self.own_depth else None
        return to_input(image, wanted, keep_aspect_ratio=self.keep_aspect_ratio, padding=padding)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Turn a model's output into class maps.

        Args:
            outputs: with `logits` (B, num_labels, H, W).
            target_sizes: (height, width) of each original image; None keeps H and W, with the
                padding. The logits are resized, not the classes, so edges stay smooth.

        Returns:
            One int64 map (height, width) an image.

        Raises:
            ValueError: if there are not as many sizes as images, or with `multi_label`.
        """
        if self.multi_label:
            raise ValueError(
                "Expected a model of one class a pixel, got one of several labels a pixel: a class "
                "map cannot show them. Call post_process_multi_label(outputs, target_sizes)."
            )
        return [one.argmax(dim=0) for one in self._at_sizes(outputs.logits, target_sizes)]

    def post_process_multi_label(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | None = None,
        threshold: float = 0.5,
    ) -> list[Tensor]:
        """Turn the output of a model with several labels a pixel into a mask for each label.

        Args:
            outputs: with `logits` (B, num_labels, H, W).
            target_sizes: as for `post_process_semantic_segmentation`.
            threshold: probability from which a pixel has a label.

        Returns:
            One bool tensor (num_labels, height, width) an image.

        Raises:
            ValueError: if there are not as many sizes as images, or a pixel has one class.
        """
        if not self.multi_label:
            raise ValueError(
                "Expected a model of several labels a pixel, got one of one class a pixel. Call "
                "post_process_semantic_segmentation(outputs, target_sizes)."
            )
        maps = self._at_sizes(outputs.logits, target_sizes)
        return [one.sigmoid() >= threshold for one in maps]

    def _at_sizes(
        self, logits: Tensor, target_sizes: list[tuple[int, int]] | None
    ) -> Iterator[Tensor]:
        """Logits (K, height, width) of each image."""
        if target_sizes is None:
            yield from logits
            return
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"Expected {len(logits)} target sizes, got {len(target_sizes)}. "
                "Pass one (height, width) an image."
            )
        for one, (height, width) in zip(logits, target_sizes, strict=True):
            size, keep = (int(height), int(width)), self.keep_aspect_ratio
            yield at_image_size(one[None], size, keep_aspect_ratio=keep)[0]


# A remote copy registers nothing: two saved models may bring two versions of this file.
if not __name__.startswith("transformers_modules."):
    AutoImageProcessor.register(
        SmpConfig, image_processor_classes={"torchvision": SmpImageProcessor}, exist_ok=True
    )
    # A pipeline also looks for a video processor. It would guess one from the entry of the image
    # processor in a saved student, and ask whether to run code that does not exist.
    AutoVideoProcessor.register(SmpConfig, None, exist_ok=True)
SmpImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "PADDING",
    "SmpImageProcessor",
    "at_image_size",
    "fitted_size",
    "resize_image",
    "scaled_channels",
    "to_input",
]
