"""Students and teachers from what the user names."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from kd_trainer.data_arguments import DataArguments
from kd_trainer.evaluation import Measured, input_statistics, is_multi_label, labels_of
from kd_trainer.files import parse_yaml
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.config_checks import LARGEST_SIDE, check_labels, nearest_hint, read_config
from kd_trainer.models.configuration_smp import MULTI_LABEL, architecture_arguments
from kd_trainer.models.image_sizes import AnySize, Size, as_size, plain_size, size_text
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.models.weights import SUFFIXES, check_finite_weights
from kd_trainer.parsing import convert
from kd_trainer.sources import model_source, not_here
from kd_trainer.stock_models import load_stock, saved_preprocessing, saved_statistics, take_rgb
from kd_trainer.students import (
    as_student,
    channels_seen,
    has_one_logit,
    is_student,
    name_classes,
    never_used,
    parameter_counts,
    reads_own_depth,
    traits_of,
    units_of,
)
from kd_trainer.teacher import Teacher, load_teacher
from kd_trainer.teacher_ensemble import TeacherEnsemble, ensemble_of
from kd_trainer.universal import MODEL_TYPES


def make_student(model: ModelArguments, data: DataArguments) -> nn.Module:
    """A new student, or a saved one to go on from, for the images and names of this run."""
    if model.student is not None:
        return _go_on_from(model.student, data)
    student = SmpForSemanticSegmentation.create(
        model.student_arch,
        model.student_encoder,
        encoder_weights=model.encoder_weights,
        id2label=data.id2label,
        image_size=plain_size(data.input_size),
        keep_aspect_ratio=data.keep_aspect_ratio,
        semantic_loss_ignore_index=data.ignore_index,
        **({"problem_type": MULTI_LABEL} if data.multi_label else {}),
        **input_options(data),
        **student_options(model),
    )
    check_output_size(student)
    check_finite_weights(student, f"encoder_weights {model.encoder_weights}")
    return student


def input_options(data: DataArguments) -> dict[str, Any]:
    """What a new student of other images than 8-bit RGB is told of them."""
    if data.in_channels is None:
        return {}
    statistics = {"image_mean": data.channel_mean, "image_std": data.channel_std}
    return {"in_channels": data.in_channels, "own_depth": True, **statistics}


def _check_stretched(data: DataArguments) -> None:
    if data.keep_aspect_ratio:
        raise ValueError(
            f"Expected --resize stretch for a stock model of transformers as --student, got "
            f"{data.resize}: the processor that is saved beside it cannot pad, nor remove padding. "
            "Leave it out, or train a student of smp."
        )


def _go_on_from(source: str, data: DataArguments) -> nn.Module:
    """A saved model as the student of a run; a stock one gets a head for other classes."""
    config = _config_of_saved(source)
    if "_model_class" in config:
        student: Any = load_student(source, num_labels=data.num_labels)
        student.config.image_size = plain_size(data.input_size)
        student.config.keep_aspect_ratio = data.keep_aspect_ratio
    else:
        _check_stretched(data)
        student = load_stock_student(source, config, data.id2label, data.input_size)
    if is_multi_label(student) != data.multi_label:
        several = is_multi_label(student)
        raise ValueError(
            f"Expected {'' if several else 'no '}--multi_label with {source}, which has "
            f"{'several labels' if several else 'one class'} a pixel. "
            f"{'Add it' if several else 'Leave it out'}, or take another --student."
        )
    _take_channels(student, source, data)
    if data.class_names is not None:
        name_classes(student, data.id2label)
    student.config.semantic_loss_ignore_index = data.ignore_index
    return student


def _take_channels(student: Any, source: str, data: DataArguments) -> None:
    """Have a saved student read the images of the run, where these are not 8-bit RGB.

    Raises:
        ValueError: if it knows other images.
    """
    seen, of_smp = channels_seen(student), isinstance(student, SmpForSemanticSegmentation)
    deep = reads_own_depth(student)
    if deep and data.in_channels is None:
        raise ValueError(
            f"Expected --in_channels {seen} with {source}, which reads images by their own bit "
            "depth, got none. Add it, or take another --student."
        )
    if data.in_channels is None:
        return
    if not of_smp or seen != data.in_channels:
        kind = f"{seen} channels" if of_smp else "8-bit RGB images, a stock model"
        raise ValueError(
            f"Expected a --student of {data.in_channels} channels (--in_channels), got {source} of "
            f"{kind}. Leave it out: a new student is made for these images."
        )
    student.config.own_depth = True
    student.config.image_mean, student.config.image_std = data.channel_mean, data.channel_std


def saved_channels(source: str, count: int) -> tuple[list[float], list[float]] | None:
    """Mean and std of so many channels with which a saved student was trained, if it says them."""
    config = _config_of_saved(source)
    told: list[Any] = [config.get(name) for name in ("image_mean", "image_std")]
    fitting = all(isinstance(one, list) and len(one) == count for one in told)
    return (told[0], told[1]) if fitting else None


def load_student(source: str | Path, *, num_labels: int | None = None) -> nn.Module:
    """A saved student, from a folder (its own, or that of its run) or the Hub.

    Args:
        source: where it is.
        num_labels: that it has to have.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if it is no segmentation model, or has other classes than `num_labels`.
    """
    source = model_source(str(source))
    config = _config_of_saved(source)
    student: nn.Module
    if "_model_class" in config:
        student = SmpForSemanticSegmentation.from_pretrained(source)
        check_finite_weights(student, source)
    else:
        student = load_stock_student(source, config)
    labels = labels_of(student)
    if num_labels is not None and len(labels) != num_labels:
        raise ValueError(
            f"Expected a model of {num_labels} classes (--num_labels), got {source} with "
            f"{len(labels)}: {', '.join(labels.values())}."
        )
    return student


def _config_of_saved(source: str) -> dict[str, Any]:
    """The config.json of a saved model.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(source)
    looks_local = folder.exists() or source.startswith((".", "/", "~", "runs"))
    if looks_local and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected a saved model with a config.json, got {source}. A training run leaves it in "
            f"the folder `student` of its output folder.{not_here(source)}"
        )
    try:
        return read_config(source)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"Expected a saved model, a folder here or an id on the Hub, got {source}: {reason}"
            f"{not_here(source)}"
        ) from error


def load_stock_student(
    source: str,
    config: dict[str, Any],
    id2label: dict[int, str] | None = None,
    image_size: Size | None = None,
) -> nn.Module:
    """A model of `AutoModelForSemanticSegmentation` as a student, in fp32.

    Args:
        source: folder or Hub id; what is pretrained without a head, such as an image classifier,
            gets one too.
        config: what its config.json holds.
        id2label: of the run. A model of as many classes keeps its head; any other gets a new one,
            which is said. None takes the saved model as it is.
        image_size: of the run; None takes that of the model's own preprocessing.

    Raises:
        ValueError: if it is no such model, or weights of its encoder are missing or misshapen.
    """
    if (kind := config.get("model_type")) in MODEL_TYPES:
        raise ValueError(
            f"Expected a student that gives each pixel a logit for each class, got a {kind} of "
            f"masks and their classes at {source}. Name it as --teacher."
        )
    options: dict[str, Any] = {"dtype": torch.float32}
    check_labels(config.get("id2label"), None)
    classes = len(config.get("id2label") or (0, 1))
    if id2label is not None and classes not in _fitting_heads(id2label):
        names = {name: index for index, name in id2label.items()}
        options |= {"id2label": id2label, "label2id": names}
    if id2label is not None:
        options["new_head"] = True
    model, info = load_stock(source, config, **options)
    take_rgb(model, source)
    mean, std = saved_statistics(source, config)
    size = image_size or _saved_size(saved_preprocessing(source))
    student = as_student(model, image_size=size, mean=mean, std=std)
    check_finite_weights(student, source)
    if id2label is not None:
        traits_of(student).new_head = _say_what_is_new(model, info, source)
    return student


def _fitting_heads(id2label: dict[int, str]) -> tuple[int, ...]:
    """Channels of a head for these classes; one logit is kept where a saved model has one."""
    return (1, 2) if len(id2label) == 2 else (len(id2label),)


def _say_what_is_new(model: Any, info: dict[str, Any], source: str) -> bool:
    """Print which parts start from random weights; returns whether any do.

    Raises:
        ValueError: if parts of the encoder are among them.
    """
    unused = never_used(model)
    absent = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    new = sorted(name for name in absent if name not in unused)
    encoder = {name for unit in units_of(model) for name, _ in unit.parameters()}
    gone = [name for name in new if name in encoder]
    if gone:
        raise ValueError(
            f"Expected the weights of a {type(model).__name__} or of its encoder in {source!r}, "
            f"got none that fit {', '.join(gone[:5])}{', ...' if len(gone) > 5 else ''}. Check "
            "that config.json and the weights belong together."
        )
    head = f"keeps its head of {len(labels_of(model))} classes"
    if has_one_logit(model):
        head = (
            "keeps its head of one logit, above 0 where the class is. kd_trainer reads it so; a "
            "stock pipeline takes the argmax of one channel and finds the class everywhere"
        )
    if new:
        parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in new)
        head = f"gets a new head for {len(labels_of(model))} classes ({', '.join(parts)})"
    print(f"The student, a {type(model).__name__} from {source}, {head}.", file=sys.stderr)
    return bool(new)


def _saved_size(settings: Mapping[str, Any]) -> Size | None:
    """Height and width of what a preprocessing makes of an image; None if it does not say."""
    cropped = settings.get("do_center_crop") and settings.get("crop_size")
    size = cropped or settings.get("size")
    sides: list[Any] = [size, size]
    if isinstance(size, Mapping):
        sides = [size.get(name) or size.get("shortest_edge") for name in ("height", "width")]
    usable = all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)
    return (sides[0], sides[1]) if usable else None


def load_measured(
    source: str,
    *,
    arch: str | None = None,
    encoder: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> Measured:
    """Any saved model to measure: what can be a student, else what can be a teacher alone.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has other classes than `num_labels`, or is no segmentation model.
    """
    source = model_source(source)
    if not source.endswith(SUFFIXES):
        try:
            config = read_config(source)
        except OSError:
            config = {"_model_class": ""}  # `load_student` says what is missing
        foreign = trust_remote_code and config.get("auto_map")
        if not foreign and config.get("model_type") not in MODEL_TYPES:
            return load_student(source, num_labels=num_labels)
    return load_teacher(
        source,
        num_labels=num_labels,
        arch=arch,
        encoder=encoder,
        trust_remote_code=trust_remote_code,
    )


def make_teacher(
    model: ModelArguments, student: Measured, *, image_size: AnySize
) -> Teacher | None:
    """The teacher the settings name, fed with the student's input of `image_size` pixels."""
    if not model.teachers:
        return None
    return ensemble_of(
        [_member(model, source, student, image_size) for source in model.teachers],
        weights=model.teacher_shares,
        flip=model.teacher_flip,
    )


def _member(model: ModelArguments, source: str, student: Measured, image_size: AnySize) -> Teacher:
    """One of the teachers; of several, what describes the input is that of bare state dicts."""
    mean, std = input_statistics(student)
    told = len(model.teachers) == 1 or source.endswith(SUFFIXES)
    teacher = load_teacher(
        source,
        num_labels=len(labels_of(student)),
        arch=model.teacher_arch,
        encoder=model.teacher_encoder,
        options=teacher_options(model),
        image_size=model.teacher_image_size if told else None,
        mean=model.teacher_mean if told else None,
        std=model.teacher_std if told else None,
        input_mean=mean,
        input_std=std,
        id2label=labels_of(student),
        class_map=model.class_map,
        multi_label=is_multi_label(student),
        trust_remote_code=model.trust_remote_code,
    )
    check_finite_weights(teacher.network, f"the teacher {source}")
    if isinstance(teacher.network, SmpForSemanticSegmentation):
        check_image_size(teacher.image_size or image_size, teacher.network)
    return teacher


def network_name(network: nn.Module) -> str:
    """Architecture and encoder of an smp model, the class name of any other."""
    if isinstance(network, SmpForSemanticSegmentation):
        return f"{network.config._model_class} {network.config.encoder_name}"
    if isinstance(network, TeacherEnsemble):
        return " + ".join(network_name(member.network) for member in network.teachers)
    return type(network).__name__


def network_size(network: nn.Module) -> tuple[int, int]:
    """Number of parameters (used, never used by any forward pass)."""
    if is_student(network):
        used, idle, _ = parameter_counts(network)
        return used, idle
    return sum(p.numel() for p in network.parameters()), 0


# Decided by other settings, or by what a student is: logits for each class of an RGB picture.
_DECIDED = {
    "encoder_name": "Use --student_encoder",
    "encoder_weights": "Use --encoder_weights",
    "classes": "It follows from --num_labels",
    "in_channels": "Use --in_channels",
    "activation": "A student gives logits: leave it out",
    "aux_params": "Only the segmentation head is trained here: leave it out",
}
_DECIDED_FOR_TEACHER = {
    "encoder_name": "Use --teacher_encoder",
    "encoder_weights": "They are those of the file: leave it out",
    "classes": "It follows from the file",
    "in_channels": "It follows from the file",
    "activation": "A teacher gives logits: leave it out",
    "aux_params": "Only the segmentation head is asked: leave it out",
}


def student_options(model: ModelArguments) -> dict[str, Any]:
    """What a new student gives to its architecture beside encoder and classes.

    `--decoder_channels` is a list for some architectures and one number for others, which decides
    what it becomes here.

    Args:
        model: settings of the student.

    Raises:
        ValueError: if the architecture has no such argument (names the nearest), its value is of
            another type, it is given twice, or another setting decides it.
    """
    given = _options("student_options", model.student_options, model.student_arch, _DECIDED)
    if model.decoder_channels is not None:
        if "decoder_channels" in given:
            raise ValueError(
                "Expected the decoder's channels once, got --decoder_channels and "
                "--student_options decoder_channels. Leave one of them out."
            )
        defaults = architecture_arguments(model.student_arch)
        given["decoder_channels"] = _channels(model, defaults)
    return given


def teacher_options(model: ModelArguments) -> dict[str, Any]:
    """Likewise of a bare state dict, where its shapes do not say it."""
    texts, arch = model.teacher_options, model.teacher_arch
    return _options("teacher_options", texts, arch, _DECIDED_FOR_TEACHER)


def _options(
    flag: str, texts: list[str] | None, arch: str, decided: dict[str, str]
) -> dict[str, Any]:
    """Arguments of an architecture from KEY=VALUE, as the types of their defaults."""
    if not texts:
        return {}
    defaults = architecture_arguments(arch)
    given: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in given:
            raise ValueError(f"Expected {name} once in --{flag}, got it twice.")
        if name in decided:
            raise ValueError(f"Expected no {name} in --{flag}, got one. {decided[name]}.")
        if name not in defaults:
            hint = nearest_hint(name, [known for known in defaults if known not in decided])
            raise ValueError(f"Expected an argument of {arch} in --{flag}, got {name!r}. {hint}")
        given[name] = _converted(f"{flag} {name}", value, defaults[name])
    return given


def _converted(name: str, text: str, default: Any) -> Any:
    """Text as the type of the default; without one, as YAML reads it."""
    if default is None:
        try:
            return parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"Expected a plain value as --{name}, got {text[:80]!r}: "
                f"{' '.join(str(error).split())}. Write a number, a word, true or false."
            ) from None
    value = convert(name, text, list[int] if isinstance(default, list) else type(default))
    return tuple(value) if isinstance(value, list) else value


def _channels(model: ModelArguments, defaults: dict[str, Any]) -> Any:
    channels = tuple(model.decoder_channels or ())
    if "decoder_channels" not in defaults:
        hint = nearest_hint("decoder_channels", [n for n in defaults if n not in _DECIDED])
        raise ValueError(
            f"Expected no --decoder_channels for {model.student_arch}, got "
            f"{' '.join(map(str, channels))}. Its arguments are set by --student_options; "
            f"--decoder_channels null takes back those of a recipe. {hint}"
        )
    one_number = isinstance(defaults["decoder_channels"], int)
    if one_number and len(channels) != 1:
        raise ValueError(
            f"Expected one number as --decoder_channels of {model.student_arch} (default "
            f"{defaults['decoder_channels']}), got {' '.join(map(str, channels))}. Give one."
        )
    return channels[0] if one_number else channels


@torch.no_grad()
def check_output_size(student: SmpForSemanticSegmentation) -> None:
    """Refuse a student whose map is not as large as its picture; no arithmetic is done.

    Raises:
        ValueError: some options, such as `upsampling`, decide it.
    """
    size = as_size(student.config.image_size)
    twin: Any = copy.deepcopy(student)
    found = (
        twin.to("meta").eval()(torch.empty(1, channels_seen(student), *size, device="meta")).logits
    )
    got = tuple(found.shape[-2:])
    if got != size:
        raise ValueError(
            f"Expected a student whose map has the size of its picture, {size_text(size)}, got "
            f"{size_text(got)}. "
            "Leave upsampling out of --student_options, or let it make up for the encoder_depth."
        )
