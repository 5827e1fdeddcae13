"""The settings of teacher and student, and the only place with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from kd_trainer.argument_checks import FlagSize, image_size
from kd_trainer.class_map import class_map_text
from kd_trainer.fields import check_at_least, expanded, help_field
from kd_trainer.sources import SELF, model_source, public_name

# What describes a teacher that is a network of its own, or its answers.
OF_A_NETWORK = (
    *("teacher_maps", "teacher_shares", "teacher_flip", "teacher_image_size"),
    *("teacher_mean", "teacher_std", "teacher_options", "class_map"),
)


@dataclass
class ModelArguments:
    """The frozen teacher and the student that learns from it."""

    teacher: str | list[str] = help_field(
        "",
        "Teacher: a folder (also that of a run), a Hub id or a checkpoint file (.pth, "
        ".safetensors; name its architecture with --teacher_arch and --teacher_encoder); several "
        "teach the mean of their probabilities. `none` trains the student alone; with `self` its "
        "own moving average teaches it on images without masks.",
        metavar="SOURCE",
    )
    teacher_shares: list[float] | None = help_field(
        None,
        "Weight of each of several teachers in the mean of their probabilities.",
        aliases=["--teacher_weights"],
    )
    teacher_flip: bool = help_field(
        False, "Ask the teacher for the mirrored image too, and take the mean of both answers."
    )
    teacher_arch: str = help_field("unet", "Architecture of a bare teacher checkpoint.")
    teacher_encoder: str = help_field(
        "timm-efficientnet-b3", "Encoder of a bare teacher checkpoint."
    )
    teacher_options: list[str] | None = help_field(
        None,
        "Further arguments of the architecture of a bare teacher checkpoint, as KEY=VALUE, where "
        "its shapes do not say them.",
    )
    teacher_maps: str | None = help_field(
        None,
        "Folder of a teacher's answers instead of a teacher: a map for each image, by its stem "
        "(PNG, or .npy of probabilities).",
    )
    teacher_image_size: FlagSize | None = help_field(
        None,
        "Input size of the teacher in pixels, where it differs from the student's: one number, or "
        "height and width.",
    )
    teacher_mean: list[float] | None = help_field(
        None, "Mean the teacher was trained with, where it differs from the student's."
    )
    teacher_std: list[float] | None = help_field(None, "Standard deviation, likewise.")
    class_map: str | None = help_field(
        None,
        "Which of the teacher's classes are which of the student's, by name or id: "
        "'person=person+rider; background=*', or a YAML or JSON file of such lines.",
    )
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
        named = [self.teacher] if isinstance(self.teacher, str) else self.teacher
        sources = [source if source == SELF else model_source(source) for source in named]
        self.teacher = sources[0] if len(sources) == 1 else sources
        self.teacher_maps = expanded(self.teacher_maps)
        self._check_teachers()
        self.encoder_weights = expanded(self.encoder_weights)
        if self.class_map is not None:  # what the file says belongs to the run, not its place
            self.class_map = class_map_text(self.class_map)
        if self.student is not None:
            self.student = model_source(self.student)
        if (self.teacher_mean is None) != (self.teacher_std is None):
            raise ValueError(
                "Expected --teacher_mean and --teacher_std together, got only one. Give both."
            )
        if self.teacher_image_size is not None:
            self.teacher_image_size = image_size("teacher_image_size", self.teacher_image_size)
        for channels in self.decoder_channels or ():
            check_at_least("decoder_channels", channels, 1)
        for flag in ("student_options", "teacher_options"):
            for option in getattr(self, flag) or ():
                if not all(option.partition("=")):
                    raise ValueError(
                        f"Expected --{flag} like decoder_dropout=0.1, got {option!r}. Write "
                        "KEY=VALUE without spaces around the sign."
                    )

    def _check_teachers(self) -> None:
        count = len(self.teachers)
        if self.teacher_maps is not None and count:
            raise ValueError(
                f"Expected --teacher or --teacher_maps, got {self.teacher_name} and "
                f"{self.teacher_maps}. Leave one out."
            )
        if isinstance(self.teacher, list) and not all(map(_is_named, self.teacher)):
            raise ValueError(
                f"Expected the names of several teachers, got {' '.join(self.teacher)}. `none` "
                "and `self` stand alone."
            )
        if self.teaches_itself:
            for name in OF_A_NETWORK:
                if getattr(self, name) not in (None, False):
                    raise ValueError(
                        f"Expected no --{name} with --teacher self, got {getattr(self, name)}: the "
                        "student's own average teaches it. Leave one of them out."
                    )
        if self.teacher_shares is None or not count:
            return
        right = len(self.teacher_shares) == count and all(w > 0 for w in self.teacher_shares)
        if not right:
            raise ValueError(
                f"Expected --teacher_shares above 0 for each of {count} teachers, got "
                f"{' '.join(map(str, self.teacher_shares))}. Give one for each, in their order."
            )

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is named, or a folder of its answers; its own average is none."""
        return bool(self.teachers) or self.teacher_maps is not None

    @property
    def teaches_itself(self) -> bool:
        """Whether the student's own moving average is its teacher."""
        return self.teacher == SELF

    @property
    def is_taught(self) -> bool:
        """Whether something answers where there are no labels."""
        return self.has_teacher or self.teaches_itself

    @property
    def teachers(self) -> list[str]:
        """All of them, as `load_teacher` takes each; empty without one."""
        named = [self.teacher] if isinstance(self.teacher, str) else self.teacher
        return [source for source in named if _is_named(source)]

    @property
    def teacher_name(self) -> str:
        """What the teacher is called in public: `A + B` for several."""
        return " + ".join(map(public_name, self.teachers or [self.teacher_maps or ""]))


def _is_named(source: str) -> bool:
    return source.lower() not in ("", "none", SELF)
