"""The variants of a comparison: what each is called, and the flags by which it differs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_trainer.config import build, check_given, merged, parser
from kd_trainer.fields import closest
from kd_trainer.model_arguments import OF_A_NETWORK
from kd_trainer.sources import SELF

BASELINE, DISTILLED = "baseline", "distilled"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# One table has one teacher and one set of images.
_OF_ALL = ("dataset", "eval_split", "teacher", "teacher_maps", "output_dir", "trust_remote_code")
_OF_COMPARISON = ("seed", "resume", "push_to_hub")
# What says nothing to a student that teaches itself: it is about the comparison's teacher.
_OF_THE_TEACHER = (
    *OF_A_NETWORK,
    *("teacher_targets", "teacher_cache", "teacher_cache_size", "compile_teacher"),
)


@dataclass(frozen=True)
class Variant:
    """A student with its teacher, trained in one of the ways that are compared.

    Attributes:
        name: of its row, and of the folders of its runs.
        flags: by which it differs from the command line, as they were typed.
        settings: of a run of it, but for seed and folder.
        beside: settings of the comparison's teacher, where the student teaches itself.
    """

    name: str
    flags: str
    settings: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> dict[str, Any]:
        """The settings by which it is measured: with the teacher of the comparison."""
        return self.settings | self.beside


def is_baseline(kind: str) -> bool:
    """Whether runs of this name have no teacher."""
    return kind == BASELINE or kind.startswith(f"{BASELINE}_of_")


def read_variants(
    words: Sequence[str] | None, config: str, flags: dict[str, Any], common: dict[str, Any]
) -> list[Variant]:
    """The variants that `--variants` names; without it one, the command line itself.

    Args:
        words: NAME=FLAGS each; NAME= alone is the command line itself, a recipe or YAML file alone
            is called as the file is.
        config: recipe of the command line.
        flags: that it gives.
        common: settings that hold for a comparison whatever the flags say.

    Raises:
        ValueError: if a name is none or stands twice, or flags cannot be those of a variant.
    """
    if words is None:
        settings = merged(config, flags) | common
        check_given(build(settings), flags)
        return [Variant(DISTILLED, "", settings)]
    variants = [_variant(word, config, flags, common) for word in words]
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        got = f"{twice} twice" if names else "none"
        raise ValueError(f"Expected --variants of different names, got {got}. Rename one.")
    for flag in _OF_ALL[:-2]:
        values = {str(variant.reference.get(flag)) for variant in variants}
        if len(values) > 1:  # of their files
            raise ValueError(
                f"Expected one --{flag} for all variants, got {', '.join(sorted(values))}. Give it "
                "outside of --variants."
            )
    return variants


def _variant(word: str, config: str, flags: dict[str, Any], common: dict[str, Any]) -> Variant:
    name, equals, text = word.partition("=")
    if not equals:  # a recipe or a YAML file
        name, text = Path(word).stem, f"--config {shlex.quote(word)}"
    if not _NAME.fullmatch(name) or name.startswith(BASELINE):
        raise ValueError(
            f"Expected --variants NAME=FLAGS with a name of letters, digits and _ . - that does "
            f"not begin with {BASELINE}, got {word!r}. Write soft='--kl_weight 1 --mse_weight 0'."
        )
    own = parser("compare.py").given(shlex.split(text))
    own_config, dry_run = own.pop("config"), own.pop("dry_run")
    teaches_itself = own.get("teacher") in (SELF, [SELF])
    wrong = [flag for flag in (*_OF_ALL, *_OF_COMPARISON) if flag in own]
    if teaches_itself:
        wrong.remove("teacher")
    if wrong or dry_run:
        raise ValueError(
            f"Expected flags of the student's training in the variant {name}, got "
            f"--{(wrong or ['dry_run'])[0]}, which is one for all. Give it outside of --variants, "
            "or make another comparison."
        )
    if not any(part.partition("=")[0] == "--config" for part in shlex.split(text)):
        own_config = config
    settings, beside = merged(own_config, flags | own) | common, {}
    if teaches_itself:
        of_all = {"teacher": ""} | merged(config, flags)
        beside = {k: v for k, v in of_all.items() if k in ("teacher", *OF_A_NETWORK)}
        settings = {k: v for k, v in settings.items() if k in own or k not in _OF_THE_TEACHER}
    try:
        check_given(build(settings), flags | own)
    except ValueError as error:
        raise ValueError(f"{error} (variant {name})") from error
    return Variant(name, text.strip(), settings, beside)


def check_wanted(only: str, variants: Sequence[Variant]) -> None:
    """Refuse an `--only` that is neither the baseline nor a variant."""
    names = [BASELINE, *(variant.name for variant in variants)]
    if only and only not in names:
        raise ValueError(
            f"Expected --only to be one of {', '.join(names)}, got {only!r}.{closest(only, names)}"
        )
