"""A Trainer that asks a frozen teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Trainer

from kd_trainer.arguments import DistillationArguments
from kd_trainer.teacher import Answers, Teacher


class TaughtTrainer(Trainer):
    """Has a frozen teacher, or none.

    Attributes:
        teacher: a plain attribute: inside the student it would be saved, trained and counted.
    """

    args: DistillationArguments
    teacher: Teacher | None
    _answers: Answers | None = None

    def placed(self, teacher: Teacher | None) -> Teacher | None:
        """The teacher on the device, and ready to be asked."""
        if teacher is None:
            return None
        args = self.args
        teacher = teacher.to(args.device)
        self._answers = Answers(
            teacher,
            precision=str(self.accelerator.mixed_precision),
            fold=args.fold_teacher,
            backend=args.teacher_backend,
            stream=args.teacher_stream,
        )
        return teacher

    def teacher_logits(self, pixel_values: Tensor, *, join: bool = True) -> Tensor | None:
        """The teacher's raw logits, fp32 (B, K, H, W), without gradient; None without a teacher.

        Without `join` they may still be on their way, and have to be joined before they are read.
        """
        if self._answers is None:
            return None
        # Without autocast the teacher would run in fp32 beside a bf16 student.
        with torch.no_grad(), self.accelerator.autocast():
            logits = self._answers.ask(pixel_values)
        return self.joined(logits) if join else logits

    def joined(self, logits: Tensor | None) -> Tensor | None:
        """The same logits, once they may be read."""
        return logits if self._answers is None else self._answers.join(logits)
