"""A Trainer that knows what its teacher says: it asks, or the batch brings the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kd_trainer.arguments import DistillationArguments
from kd_trainer.teacher import Teacher


class TaughtTrainer(Trainer):
    """Has a frozen teacher, or none.

    Attributes:
        teacher: a plain attribute: inside the student it would be saved, trained and counted.
    """

    args: DistillationArguments
    teacher: Teacher | None

    def placed(self, teacher: Teacher | None) -> Teacher | None:
        """The teacher on the device, unless its cached logits are all that is needed of it."""
        if teacher is None or self.args.teacher_targets == "cached":
            return teacher
        return teacher.to(self.args.device)

    def teacher_logits(self, inputs: dict[str, Any]) -> Tensor | None:
        """The teacher's raw logits, fp32 (B, K, H, W), without gradient; None without a teacher.

        Args:
            inputs: a prepared batch, with `teacher_logits` where they are cached.

        Raises:
            ValueError: if they should be and are not.
        """
        if self.teacher is None:
            return None
        if self.args.teacher_targets == "cached":
            if "teacher_logits" not in inputs:
                raise ValueError(
                    "Expected teacher_logits in every sample with --teacher_targets cached, got "
                    f"{', '.join(inputs)}. Give them with the data, or use online."
                )
            return inputs["teacher_logits"].float()
        # Without autocast the teacher would run in fp32 beside a bf16 student.
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(inputs["pixel_values"])
