"""What every pixel loss shares: the working precision and the mean over a set of pixels."""

import torch
from torch import Tensor


def working_precision(logits: Tensor) -> Tensor:
    """Logits as fp32, whatever the network ran in; float64 stays, so that gradients can be checked.

    Half precision holds neither the sum over a 640x640 picture nor the T² that follows it.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def keep_pixels(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, K, H, W) with zeros outside the mask (B, H, W).

    Multiplying the loss by the mask would not do: 0 times an infinite or NaN gradient is NaN.
    """
    return torch.where(mask.unsqueeze(1), logits, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, H, W) over the True pixels of mask (B, H, W); 0 where there is none.

    The count stays on the device: reading it would stop the stream at every step.
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
