"""What the command lines of the scripts beside train.py share."""

from __future__ import annotations

import dataclasses
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.command_line import Parser
from kd_trainer.fields import convert, hints_of

# Flags of the teacher beside a model that is evaluated.
TEACHER = frozenset(f.name for f in dataclasses.fields(ModelArguments) if "teacher" in f.name) | {
    "trust_remote_code"
}
# Flags of the data that an evaluation looks at.
EVALUATION_DATA = frozenset(f.name for f in dataclasses.fields(DataArguments)) - {
    "train_split",
    "unlabelled",
    "augmentation",
    "brightness_contrast_probability",
    "synthetic_train",
    "max_train_samples",
}


def command_parser(prog: str, description: str, epilog: str) -> Parser:
    """The parser of a script, without flags yet."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )


def given_settings(classes: Sequence[type], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Flags that were given, as the types of their fields, for each of these dataclasses."""
    hints = hints_of(classes)
    values = {name: convert(name, value, hints[name]) for name, value in given.items()}
    names = [{f.name for f in dataclasses.fields(cls)} for cls in classes]
    return [{k: v for k, v in values.items() if k in own} for own in names]
