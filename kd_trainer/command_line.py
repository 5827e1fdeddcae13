"""Recipes and flags: a YAML file sets defaults, flags override, an unknown name is an error."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from kd_trainer.argument_checks import UNUSABLE, check_ends
from kd_trainer.arguments import DataArguments, DistillationArguments, ModelArguments
from kd_trainer.errors import is_own
from kd_trainer.fields import add_fields, closest, convert, expanded, flag_hint, hints_of
from kd_trainer.files import read_yaml

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

RECIPES = Path(__file__).parent / "recipes"
CONSOLE = "kd-trainer"
DEFAULT_RECIPE = "rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog"
ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "pictures": "hub_pictures",
}
# A flag given without a value means this.
WITHOUT_VALUE = {"mixed_precision": "auto", "resume": "latest"}
# Fields of transformers.TrainingArguments worth a line in --help; the others are flags too.
SHOWN = frozenset(
    {
        "max_steps",
        "gradient_accumulation_steps",
        "seed",
        "dataloader_num_workers",
        "eval_steps",
        "save_steps",
        "use_cpu",
        "torch_compile",
    }
)
_CLASSES = (ModelArguments, DataArguments, DistillationArguments)
# What a file must not choose for whoever is handed it: to run a stranger's code, and where to send
# a student and its figures, to show them to everybody, and images of the evaluation data with them.
ONLY_FLAGS = (
    *("trust_remote_code", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_pictures"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)
# Not written down: a secret, what each command line decides anew, and where a run goes on.
_LEFT_OUT = frozenset(
    {"hub_token", "resume", "no_preflight", "bf16", "fp16", "do_eval", "debug", "disable_tqdm"}
    | {"include_for_metrics", "activation_checkpointing", "gradient_checkpointing"}
    | {"trust_remote_code"}
)
# Set from other fields or from this machine, so written only as they were asked for: a
# configuration from a machine without a GPU would else keep the next one from using its own.
_DERIVED = frozenset(
    {"use_cpu", "bf16", "fp16", "mixed_precision", "dataloader_pin_memory", "data_seed"}
    | {"do_eval", "greater_is_better", "dataloader_num_workers"}
    | {"dataloader_persistent_workers", "accelerator_config"}
)

# What a saved student has decided already.
_OF_A_NEW_STUDENT = (
    *("student_arch", "student_encoder", "encoder_weights", "decoder_channels"),
    "student_options",
)


@dataclasses.dataclass
class RunArguments:
    """The settings of one run.

    `given` are those of the recipe and the flags, by field.
    """

    model: ModelArguments
    data: DataArguments
    training: DistillationArguments
    dry_run: bool = False
    given: dict[str, Any] = dataclasses.field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Every setting a recipe can hold; the Trainer's own only where they were changed."""
        values = dataclasses.asdict(self.model) | dataclasses.asdict(self.data)
        for field in dataclasses.fields(self.training):
            value = getattr(self.training, field.name)
            value = value.value if isinstance(value, Enum) else value
            if not field.init or field.name in _DERIVED:
                continue
            if field.name in own_fields() or value != default_of(field):
                values[field.name] = value
        values = {k: v for k, v in values.items() if _is_plain(v)}
        values |= {k: v for k, v in self.given.items() if k not in values}
        if self.training.mixed_precision != "no" and not values.get("mixed_precision"):
            # Asked for by --bf16, or by the accelerate configuration through the environment.
            values["mixed_precision"] = self.training.mixed_precision
        return {k: v for k, v in values.items() if k not in _LEFT_OUT}


def own_fields() -> frozenset[str]:
    """Fields that DistillationArguments adds or gives a default of its own."""
    return frozenset(DistillationArguments.__annotations__)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; None of one that has to be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """Settings of a recipe, without those that only a command line can set (`_read_recipe`)."""
    settings = _read_recipe(name_or_path)
    return {name: value for name, value in settings.items() if name not in ONLY_FLAGS}


def _read_recipe(name_or_path: str) -> dict[str, Any]:
    """Settings of a recipe, by the name of one of ours or the path of a YAML file.

    Raises:
        FileNotFoundError: if there is neither; names the nearest recipe.
        ValueError: if the file is not a mapping, or has an unknown key.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a recipe ({', '.join(recipe_names())}) or a YAML file, got {name_or_path}."
            f"{closest(name_or_path, recipe_names())}"
        )
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"Expected `name: value` lines in {path}, got {type(values).__name__}.")
    known = hints_of(_CLASSES)
    settings = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name not in known:
            raise ValueError(
                f"Expected known fields in {path.name}, got {key!r}."
                f"{flag_hint(str(key), [*known, *ALIASES])}"
            )
        settings[name] = convert(key, value, known[name])
    return settings


def build(settings: dict[str, Any], *, dry_run: bool = False) -> RunArguments:
    """The three dataclasses from one flat mapping of settings.

    Raises:
        ValueError: if a setting is out of range, or two contradict each other.
    """

    def part(cls: type) -> dict[str, Any]:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        return {k: v for k, v in settings.items() if k in names}

    model = ModelArguments(**part(ModelArguments))
    data = DataArguments(**part(DataArguments))
    try:
        training = DistillationArguments(**part(DistillationArguments))
    except (ValueError, ImportError) as error:
        if is_own(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected settings that transformers accepts, got: {reason}") from error
    return RunArguments(model, data, training, dry_run=dry_run, given=dict(settings))


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are errors like all the others instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"Expected a command line as --help shows it, got a fault: {message}.")


def program(script: str) -> str:
    """How a parser calls itself: by its script, or as the console command that was typed."""
    return sys.argv[0] if sys.argv[0].startswith(f"{CONSOLE} ") else script


def parser() -> argparse.ArgumentParser:
    """The parser of scripts/train.py."""
    result = Parser(
        prog=program("train.py"),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distil a large segmentation teacher into a small student.",
        epilog=f"Recipes: {', '.join(recipe_names())}.\n"
        "The other fields of transformers.TrainingArguments are flags too; some that cannot work "
        "here are refused.\n\n"
        "Examples:\n"
        "  train.py --dataset photos/ --teacher none --output_dir runs/teacher "
        "--student_encoder timm-efficientnet-b3 --unfreeze_start_epoch 0 --unfreeze_every 0\n"
        "  train.py --dataset photos/ --teacher runs/teacher/student --dry_run\n"
        "  train.py --dataset photos/ --teacher runs/teacher/student --epochs 50 "
        "--mixed_precision",
    )
    result.add_argument(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="NAME_OR_YAML",
        help="Recipe that sets the defaults (default: %(default)s).",
    )
    result.add_argument("--dry_run", action="store_true", help="Print the plan and stop.")
    add_fields(result, ModelArguments, title="teacher and student")
    add_fields(result, DataArguments, title="data")
    add_fields(
        result,
        DistillationArguments,
        title="training",
        aliases=ALIASES,
        without_value=WITHOUT_VALUE,
        shown=own_fields() | SHOWN,
    )
    return result


def given_flags(
    from_parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> dict[str, Any]:
    """Flags as text, by field; an unknown one is an error that names the nearest.

    Raises:
        ValueError: on an unknown flag, or a word that belongs to none.
    """
    namespace, unknown = from_parser.parse_known_args(arguments)
    flag = next((u.split("=")[0] for u in unknown if u.startswith("-")), None)
    if flag is not None:
        known = [option for a in from_parser._actions for option in a.option_strings]
        raise ValueError(f"Expected known flags, got {flag}.{flag_hint(flag, known)}")
    if unknown:
        raise ValueError(
            f"Expected each value behind its flag, got {unknown[0]!r} behind none. Write "
            "--name value; quote a value with spaces."
        )
    return {name: expanded(value) for name, value in vars(namespace).items()}


def parse(arguments: Sequence[str] | None = None) -> RunArguments:
    """Recipe, then flags.

    Raises:
        ValueError: on an unknown flag (names the nearest) or a value of the wrong type.
    """
    given = given_flags(parser(), arguments)
    config, dry_run = given.pop("config"), given.pop("dry_run")
    settings = merged(config, given)
    settings.setdefault("output_dir", f"runs/{Path(config).stem}")
    run = build(settings, dry_run=dry_run)
    check_given(run, given)
    return run


def check_given(run: RunArguments, given: Collection[str]) -> None:
    """Refuse flags that could only be ignored; the same values in a recipe are just its defaults.

    Raises:
        ValueError: names the flag.
    """
    if "do_eval" in run.given:
        raise ValueError(
            "Expected no --do_eval: --eval_strategy says when a run is measured, scripts/eval.py "
            "measures a saved student. Leave it out."
        )
    for name in ("do_train", "do_predict"):
        if name in run.given:
            raise ValueError(f"Expected no --{name}: {UNUSABLE[name]}.")
    check_ends(run.training, given)
    decided = [name for name in _OF_A_NEW_STUDENT if name in given]
    if run.model.student is not None and decided:
        raise ValueError(
            f"Expected --student alone, got it with --{decided[0]}, which only a new student can "
            "follow. Leave one of them out."
        )


def merged(config: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, overridden by flags that were given as text.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if a value is of the wrong type.
    """
    hints = hints_of(_CLASSES)
    recipe = _read_recipe(config)
    for name in ONLY_FLAGS:
        value = recipe.get(name)
        chosen = value is False if name == "hub_private_repo" else value
        if chosen and name not in given:
            raise ValueError(
                f"Expected --{name} on the command line, got it from {config}. A file cannot "
                "choose it: add the flag, or delete the line."
            )
    return recipe | {n: convert(n, value, hints[n]) for n, value in given.items()}


def command_parser(script: str, description: str, epilog: str) -> Parser:
    """The parser of a script, without flags yet."""
    return Parser(
        prog=program(script),
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
