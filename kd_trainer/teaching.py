"""A Trainer that knows what its teacher says: it asks, or the batch brings the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kd_trainer.arguments import DistillationArguments
from kd_trainer.evaluation import input_statistics
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher, TeacherInference


class TaughtTrainer(Trainer):
    """Has a frozen teacher, or none.

    Attributes:
        teacher: a plain attribute: inside the student it would be saved, trained and counted.
    """

    args: DistillationArguments
    model: SmpForSemanticSegmentation
    teacher: Teacher | None
    _inference: TeacherInference | None = None

    def placed(self, teacher: Teacher | None) -> Teacher | None:
        """The teacher, on the device and ready to be asked unless its cached logits are enough."""
        args = self.args
        if teacher is not None:
            teacher.expect_input(*input_statistics(self.model))
        if teacher is None or args.teacher_targets == "cached":
            return teacher
        teacher = teacher.to(args.device)
        self._inference = TeacherInference(
            teacher,
            precision=str(self.accelerator.mixed_precision),
            fold=args.fold_teacher,
            backend=args.teacher_backend,
        )
        return teacher

    def teacher_logits(self, inputs: dict[str, Any]) -> Tensor | None:
        """The teacher's raw logits, fp32 (B, K, H, W), without gradient; None without a teacher.

        Args:
            inputs: a prepared batch, with `teacher_logits` where they are cached.

        Raises:
            ValueError: if they should be cached and are not there.
        """
        if self.teacher is None:
            return None
        if self._inference is not None and self._inference.teacher is not self.teacher:
            self.teacher = self.placed(self.teacher)  # a callback has put another one here
        if self._inference is None:
            if "teacher_logits" not in inputs:
                raise ValueError(
                    "Expected teacher_logits in every sample with --teacher_targets cached, got "
                    f"{', '.join(inputs)}. Give them with the data, or use online."
                )
            return inputs["teacher_logits"].float()
        # Without autocast the teacher would run in fp32 beside a bf16 student.
        with torch.no_grad(), self.accelerator.autocast():
            return self._inference(inputs["pixel_values"])
