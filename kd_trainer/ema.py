"""A moving average of the student: measured and saved beside it, or its own teacher.

    average = d·average + (1 − d)·student        d = min(1 − 1/(step + 1), decay)

after each optimizer step, counted from 0: the first one copies the student. Statistics of BatchNorm
are averaged as parameters are, whole numbers copied.

Source: Tarvainen & Valpola 2017, arXiv 1703.01780; the ramp as in UniMatch V2, arXiv 2410.10777.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kd_trainer.fast_layers import reset_accelerate_prepare
from kd_trainer.processes import share_buffers
from kd_trainer.students import student_logits

EMA_FILE = "ema.pt"


class StudentEma(TrainerCallback):
    """Keeps the average of a student, from the start of a training on.

    Args:
        decay: what `d` above rises to, in 0..1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: Any = None

    @property
    def network(self) -> nn.Module | None:
        """The averaged student, in eval mode; None before the training."""
        return self._average and self._average.module

    def start(self, student: nn.Module) -> None:
        """Begin with a copy of a student that is where it will be trained, and not wrapped yet."""
        # With gamma and power 1 the warm-up is the ramp above.
        self._average = ModelEmaV3(
            student, self.decay, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0
        )
        self._average.requires_grad_(False)
        reset_accelerate_prepare(self._average.module)  # of an earlier training of the student

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw logits fp32 (B, K, H, W) of normalised images (B, 3, H, W)."""
        return student_logits(self._average.module, pixels).float()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move towards the student that this step has made."""
        # DDP takes the statistics of the first process at the next step anyway.
        share_buffers(kwargs["model"])
        self._average.update(kwargs["model"], step=state.global_step)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        torch.save(self._average.module.state_dict(), folder / EMA_FILE)

    def restore(self, folder: Path) -> None:
        """Go on with that of a checkpoint."""
        saved = torch.load(folder / EMA_FILE, map_location="cpu", weights_only=True)
        self._average.module.load_state_dict(saved)
