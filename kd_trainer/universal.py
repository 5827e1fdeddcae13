"""Semantic logits of the universal segmentation models of transformers.

MaskFormer and its kin answer with a few masks (queries) and the class of each. What a pixel shows
is the sum over the queries of class probability times mask probability, as in the
`post_process_semantic_segmentation` of their image processors, which is followed here step by step.
Source: Cheng et al. 2021, arXiv 2107.06278, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPES = ("mask2former", "maskformer", "oneformer", "eomt", "eomt_dinov3")
"""What can be a teacher."""

_FLOOR = 1e-6
"""Least sum of probabilities whose logarithm is taken: where no query says anything."""

Size = tuple[int, int]
TASK = "the task is semantic"
"""What a OneFormer is told beside each image, as its processor words it."""


class OneFormerForSemanticSegmentation(nn.Module):
    """A OneFormer that is asked for the classes of pixels, with images alone.

    Args:
        network: which also wants a task.
        task: token ids of `TASK`, padded by 0 to (1, `config.task_seq_len`).
    """

    task: Tensor

    def __init__(self, network: Any, task: Tensor) -> None:
        super().__init__()
        self.network = network
        self.config = network.config
        for module in network.modules():
            if "is_training" in vars(module):  # fine-tuned: it drops out, and wants words of masks
                module.is_training = False
        self.register_buffer("task", task, persistent=False)

    def forward(self, pixel_values: Tensor) -> Any:
        """Output of the network for images (B, C, H, W)."""
        return self.network(pixel_values, self.task.expand(len(pixel_values), -1))


def is_universal(output: Any) -> bool:
    """Whether an output consists of masks and their classes."""
    return hasattr(output, "masks_queries_logits") and hasattr(output, "class_queries_logits")


def mask_size(config: Any) -> Size | None:
    """To what the image processor of a model enlarges the masks before their sigmoid."""
    kind = getattr(config, "model_type", None)
    if kind == "mask2former":
        return (384, 384)
    side = fixed_side(config)
    return None if side is None else (side, side)


def fixed_side(config: Any) -> int | None:
    """The one input side that a network takes; None if it takes any."""
    if getattr(config, "model_type", None) in ("eomt", "eomt_dinov3"):
        return int(config.image_size)
    return None


def semantic_logits(
    output: Any, size: Size, *, masks_at: Size | None, groups: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Logarithms of the semantic scores of a batch, whose softmax shares them out.

    One image at a time: the masks of its queries are the largest tensor.

    Args:
        output: with `class_queries_logits` (B, Q, C + 1), the last for no object, and
            `masks_queries_logits` (B, Q, h, w).
        size: (H, W) of the result.
        masks_at: see `mask_size`; None leaves the masks as they are.
        groups: classes that are merged, for K of them; their scores are added.

    Returns:
        float32 (B, K, H, W), at least log(1e-6).
    """
    with torch.autocast(output.masks_queries_logits.device.type, enabled=False):
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        if groups is not None:
            classes = torch.stack([classes[..., list(ids)].sum(-1) for ids in groups], dim=-1)
        pairs = zip(classes, output.masks_queries_logits, strict=True)
        return torch.stack([_scores(*pair, size, masks_at) for pair in pairs]).clamp(_FLOOR).log()


def _scores(classes: Tensor, masks: Tensor, size: Size, masks_at: Size | None) -> Tensor:
    """(K, H, W) of (Q, K) probabilities and (Q, h, w) mask logits."""
    if masks_at is not None:
        masks = _resized(masks, masks_at)
    scores = torch.einsum("qk,qhw->khw", classes, masks.float().sigmoid())
    return _resized(scores, size)


def _resized(maps: Tensor, size: Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[None].float(), size, mode="bilinear", align_corners=False)[0]
