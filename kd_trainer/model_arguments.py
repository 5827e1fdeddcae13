"""The settings of teacher and student, and the only place with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from kd_trainer.fields import check_at_least, expanded, help_field
from kd_trainer.sources import model_source


@dataclass
class ModelArguments:
    """The frozen teacher and the student that learns from it."""

    teacher: str = help_field(
        "",
        "Teacher: a folder (also that of a run), a Hub id or a checkpoint file (.pth, "
        ".safetensors; name its architecture with --teacher_arch and --teacher_encoder). `none` "
        "trains the student alone.",
        metavar="SOURCE",
    )
    teacher_arch: str = help_field("unet", "Architecture of a bare teacher checkpoint.")
    teacher_encoder: str = help_field(
        "timm-efficientnet-b3", "Encoder of a bare teacher checkpoint."
    )
    teacher_image_size: int | None = help_field(
        None, "Input side of the teacher in pixels, where it differs from the student's."
    )
    teacher_mean: list[float] | None = help_field(
        None, "Mean the teacher was trained with, where it differs from the student's."
    )
    teacher_std: list[float] | None = help_field(None, "Standard deviation, likewise.")
    trust_remote_code: bool = help_field(
        False, "Run Python code that comes with a teacher from the Hub. Off unless asked for."
    )
    student_arch: str = help_field("unet", "Student architecture, as in smp.create_model.")
    student_encoder: str = help_field("timm-efficientnet-b0", "Student encoder, as smp names it.")
    encoder_weights: str = help_field(
        "imagenet",
        "First weights of the student's encoder: imagenet (downloads), none (random) or a file.",
    )
    decoder_channels: list[int] | None = help_field(
        None, "Channels of the student's decoder blocks, deepest first (fewer are faster)."
    )
    student_options: list[str] | None = help_field(
        None,
        "Further arguments of the student's architecture, as KEY=VALUE: for fpn "
        "decoder_pyramid_channels=64, say.",
    )
    student: str | None = help_field(
        None,
        "A saved student to go on from, or any semantic segmentation model of transformers (folder "
        "or Hub id), instead of a new network of smp.",
    )

    def __post_init__(self) -> None:
        self.teacher = model_source(self.teacher)
        self.encoder_weights = expanded(self.encoder_weights)
        if self.student is not None:
            self.student = model_source(self.student)
        if (self.teacher_mean is None) != (self.teacher_std is None):
            raise ValueError(
                "Expected --teacher_mean and --teacher_std together, got only one. Give both."
            )
        if self.teacher_image_size is not None:
            check_at_least("teacher_image_size", self.teacher_image_size, 32)
        for channels in self.decoder_channels or ():
            check_at_least("decoder_channels", channels, 1)
        for option in self.student_options or ():
            if not all(option.partition("=")):
                raise ValueError(
                    f"Expected --student_options like decoder_dropout=0.1, got {option!r}. Write "
                    "KEY=VALUE without spaces around the sign."
                )

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is named."""
        return self.teacher.lower() not in ("", "none")
