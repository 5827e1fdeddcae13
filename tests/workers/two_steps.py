"""Trains two steps of each named encoder in a process of its own, under glibc's checked malloc."""

import os
import sys
import warnings

import torch

from kd_trainer.fast_layers import use_fast_layers
from kd_trainer.models.modeling import SmpForSemanticSegmentation

SIDE = 128  # smaller maps take other kernels


def train(encoder: str) -> None:
    """Two updates in channels_last, as the trainer runs them on a CPU."""
    torch.manual_seed(0)
    model = SmpForSemanticSegmentation.create(
        "unet", encoder, encoder_weights="none", image_size=SIDE
    )
    use_fast_layers(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        pixels = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        model(pixel_values=pixels)["raw_logits"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(value.isfinite().all()) for value in model.parameters())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for encoder in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            train(encoder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(encoder, os.waitstatus_to_exitcode(status), flush=True)
