"""Recipes and flags: a YAML file sets defaults, flags override, an unknown name is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from kd_trainer.argument_checks import UNUSABLE, check_ends, check_weight_schedule
from kd_trainer.arguments import DistillationArguments
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import is_own
from kd_trainer.fields import closest, expanded
from kd_trainer.files import read_yaml
from kd_trainer.foreign_flags import flag_hint
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import Parser, convert, hints_of, settings_of
from kd_trainer.sources import SELF

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog"
_CLASSES = (DataArguments, ModelArguments, DistillationArguments)
# Fields that DistillationArguments adds or gives a default of its own, in their order there.
OWN_FIELDS = tuple(DistillationArguments.__annotations__)
# Short names, as the fields' flags have them.
ALIASES = {
    alias.removeprefix("--"): field.name
    for field in dataclasses.fields(DistillationArguments)
    if field.name in OWN_FIELDS
    for alias in field.metadata.get("aliases", ())
}

# Flags of the data and of a teacher that only a training needs: saved models bring their own.
ONLY_TRAINING = frozenset(
    {
        "train_split",
        "unlabelled",
        "multi_label",
        "in_channels",
        "augmentation",
        "brightness_contrast_probability",
    }
    | {"scale_jitter", "cutmix", "cutmix_mode", "strong_views"}
    | {
        "channel_mean",
        "channel_std",
        "synthetic_train",
        "max_train_samples",
        "student",
        "student_arch",
        "student_encoder",
    }
    | {"encoder_weights", "decoder_channels", "student_options"}
)
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

RUN_CONFIG = "config.yaml"
"""Name of the file in which a run's folder holds its settings."""
# Settings that may name a file or a folder.
_PATHS = (
    *("dataset", "unlabelled", "teacher", "teacher_maps", "student", "encoder_weights"),
    "teacher_cache",
)

# What a saved student has decided already.
_OF_A_NEW_STUDENT = (
    *("student_arch", "student_encoder", "encoder_weights", "decoder_channels"),
    "student_options",
)


# What `--teacher self` sets where nobody else does: UniMatch V2, arXiv 2410.10777.
_SELF_TAUGHT = {
    **{"kl_weight": 0.0, "mse_weight": 0.0, "pseudo_weight": 1.0, "pseudo_confidence": 0.95},
    **{"ema_decay": 0.996, "strong_views": 2, "labelled_share": ["0.5"]},
}


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

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))

    def resolved(self) -> dict[str, Any]:
        """Every setting a recipe can hold; the Trainer's own only where they were changed."""
        values = dataclasses.asdict(self.model) | dataclasses.asdict(self.data)
        for field in dataclasses.fields(self.training):
            value = getattr(self.training, field.name)
            value = value.value if isinstance(value, Enum) else value
            if not field.init or field.name in _DERIVED:
                continue
            if field.name in OWN_FIELDS or value != default_of(field):
                values[field.name] = value
        values = {k: v for k, v in values.items() if _is_plain(v)}
        values |= {k: v for k, v in self.given.items() if k not in values}
        if self.training.mixed_precision != "no" and not values.get("mixed_precision"):
            # Asked for by --bf16, or by the accelerate configuration through the environment.
            values["mixed_precision"] = self.training.mixed_precision
        return {k: v for k, v in values.items() if k not in _LEFT_OUT}


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


def _recipe_file(name_or_path: str) -> Path:
    """The YAML file that is meant: itself, that of a run's folder, or one of ours by its name."""
    path = Path(expanded(name_or_path))
    if (path / RUN_CONFIG).is_file():
        return path / RUN_CONFIG
    return path if path.suffix in (".yaml", ".yml") else RECIPES / f"{name_or_path}.yaml"


def _read_recipe(name_or_path: str) -> dict[str, Any]:
    """Settings of a recipe, by the name of one of ours or the path of a YAML file.

    Raises:
        FileNotFoundError: if there is neither; names the nearest recipe.
        ValueError: if the file is not a mapping, or has an unknown key.
    """
    path = _recipe_file(name_or_path)
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
    model = ModelArguments(**settings_of(ModelArguments, settings))
    data = DataArguments(**settings_of(DataArguments, settings))
    try:
        training = DistillationArguments(**settings_of(DistillationArguments, settings))
    except (ValueError, ImportError) as error:
        if is_own(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected settings that transformers accepts, got: {reason}") from error
    return RunArguments(model, data, training, dry_run=dry_run, given=dict(settings))


DESCRIPTION = """Distil a large segmentation teacher into a small student.

With a teacher at hand, first the plan and then the training:
  %(prog)s --dataset photos/ --teacher unet_b3.pth --dry_run
  %(prog)s --dataset photos/ --teacher unet_b3.pth --epochs 50 --mixed_precision

Without one, train it first; it is then --teacher runs/teacher:
  %(prog)s --dataset photos/ --teacher none --output_dir runs/teacher \\
      --student_encoder timm-efficientnet-b3 \\
      --unfreeze_start_epoch 0 --unfreeze_every 0

What is not given here is set by the recipe (--config)."""
# What --help shows first, in this order.
_FIRST = (
    *("dataset", "teacher", "output_dir", "dry_run", "num_train_epochs"),
    *("per_device_train_batch_size", "mixed_precision", "image_size", "num_labels", "augmentation"),
    *("student_encoder", "learning_rate", "dataloader_num_workers", "resume", "config", "help"),
)
# The heading in --help of a field, and of those that follow it in its class.
_HEADINGS = {
    "dataset": "data",
    "scale_jitter": "views",
    "synthetic_train": "data",
    "teacher": "teacher",
    "student_arch": "student",
    "kl_weight": "loss",
    "pseudo_weight": "images without masks",
    "teacher_targets": "teacher",
    "temperature_schedule": "temperature and unfreezing",
    "learning_rate": "optimisation",
    "output_dir": "run and resume",
    "eval_strategy": "evaluation and report",
    "push_to_hub": "Hub",
    "logging_nan_inf_filter": "rarely needed",
}
# Fields of transformers.TrainingArguments that get a line too.
_OF_TRANSFORMERS = {
    "gradient_accumulation_steps": "optimisation",
    **dict.fromkeys(("max_steps", "seed", "use_cpu", "torch_compile"), "run and resume"),
    **dict.fromkeys(("eval_steps", "save_steps"), "evaluation and report"),
}


def headings() -> dict[str, str]:
    """The heading in the help of each flag that has a line there, in the order of the help."""
    result = dict.fromkeys(_FIRST, "what most runs need")
    for cls in _CLASSES:
        heading = ""
        for name in cls.__annotations__:
            heading = _HEADINGS.get(name, heading)
            result.setdefault(name, heading)
    return result | _OF_TRANSFORMERS


def parser(
    script: str = "train.py",
    description: str = DESCRIPTION,
    epilog: str = "",
    *,
    own: Sequence[type] = (),
    hidden: Collection[str] = (),
) -> Parser:
    """The parser of scripts/train.py, or of a script that takes its flags too.

    Args:
        script: its name.
        description: for the help.
        epilog: likewise.
        own: dataclasses of further flags.
        hidden: fields without a line in the help.
    """
    shown = headings()
    names = [field.name for field in dataclasses.fields(DistillationArguments) if field.init]
    further = [name for name in names if name not in shown]
    usable = ", ".join(f"--{name}" for name in further if name not in UNUSABLE)
    texts = (
        epilog,
        "A switch that is on is turned off by --no_NAME or by --NAME false.",
        f"Also the other fields of transformers.TrainingArguments: {usable}.",
        f"Recipes: {', '.join(recipe_names())}. Without --config: {DEFAULT_RECIPE}.",
    )
    result = Parser(
        (*own, *_CLASSES),
        script,
        description,
        "\n\n".join(filter(None, texts)),
        hidden={*hidden, *further},
        headings=shown,
    )
    result.add_argument(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="NAME_OR_YAML",
        help="What sets the defaults: a recipe of those listed at the end, or a YAML file.",
    )
    result.add_argument("--dry_run", action="store_true", help="Print the plan and stop.")
    return result


def parser_of_saved(
    classes: Sequence[type], *texts: str, without: Collection[str] = ONLY_TRAINING
) -> Parser:
    """The parser of a script that takes a saved model, and data or a teacher beside it.

    Args:
        classes: dataclasses whose fields are flags.
        texts: name of the script, description and epilog.
        without: fields that get no flag.
    """
    shown = dict.fromkeys(DataArguments.__annotations__, "data")
    shown |= dict.fromkeys(ModelArguments.__annotations__, "teacher")
    return Parser(classes, *texts, without=without, headings=shown)


def parse(arguments: Sequence[str] | None = None) -> RunArguments:
    """Recipe, then flags.

    Raises:
        ValueError: on an unknown flag (names the nearest) or a value of the wrong type.
    """
    given = parser().given(arguments)
    config, dry_run = given.pop("config"), given.pop("dry_run")
    settings = merged(config, given)
    if given.get("resume") is not None and "output_dir" not in given:
        settings = _from_its_folder(_recipe_file(config), settings)
    settings.setdefault("output_dir", f"runs/{_recipe_file(config).stem}")
    run = build(settings, dry_run=dry_run)
    check_given(run, given)
    return run


def _from_its_folder(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that goes on from another folder than the one it was started in.

    Its configuration names paths as they were seen from there.
    """
    folder, output = file.absolute().parent, Path(str(settings.get("output_dir", "")))
    count = len(output.parts)
    if file.name != RUN_CONFIG or output.is_absolute() or folder.parts[-count:] != output.parts:
        return settings
    started = Path(*folder.parts[:-count])
    for name in _PATHS:
        path = settings.get(name)
        if isinstance(path, list):
            settings |= {name: [_seen_from(started, one) for one in path]}
        elif isinstance(path, str):
            settings |= {name: _seen_from(started, path)}
    below = folder.is_relative_to(Path.cwd())
    return settings | {"output_dir": str(folder.relative_to(Path.cwd()) if below else folder)}


def _seen_from(started: Path, path: str) -> str:
    elsewhere = not Path(path).exists() and (started / path).exists()
    return str(started / path) if elsewhere else path


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
    check_weight_schedule(run.training, given)
    decided = [name for name in _OF_A_NEW_STUDENT if name in given]
    if run.model.student is not None and decided:
        raise ValueError(
            f"Expected --student alone, got it with --{decided[0]}, which only a new student can "
            "follow. Leave one of them out."
        )


def merged(config: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, overridden by flags that were given.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it chooses what only a command line may.
    """
    recipe = _read_recipe(config)
    for name in ONLY_FLAGS:
        value = recipe.get(name)
        chosen = value is False if name == "hub_private_repo" else value
        if chosen and name not in given:
            raise ValueError(
                f"Expected --{name} on the command line, got it from {config}. A file cannot "
                "choose it: add the flag, or delete the line."
            )
    if (recipe | given).get("teacher") in (SELF, [SELF]):
        recipe = _self_taught(recipe, given)
    return recipe | given


def _self_taught(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A recipe with what a student that teaches itself needs, as far as it is not of such a one.

    The weights of others were written for a teacher that knows more than the student.
    """
    settings = dict(_SELF_TAUGHT)
    if (recipe | given).get("streaming"):
        del settings["labelled_share"]  # which needs an index
    if given.get("pseudo_weight") == 0:
        del settings["pseudo_confidence"]
    own = recipe.get("teacher") in (SELF, [SELF])
    return settings | recipe if own else recipe | settings
