"""Feature maps inside of student and teacher: which are compared, and what is learned for it.

A map is what a module gives; hooks take it out of the forward pass of a step and are gone after it,
so that neither network is changed. The projections that make two maps comparable belong to the
training, not to the student: they are trained beside it, saved in checkpoints, and left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from kd_trainer.arguments import DistillationArguments
from kd_trainer.errors import announce
from kd_trainer.fast_layers import logits_of
from kd_trainer.fields import closest
from kd_trainer.losses import TERMS, ComparedMaps, LossWeights, pooled_mask
from kd_trainer.models.image_sizes import Size, as_size
from kd_trainer.students import channels_seen, image_size_of, units_of
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_ensemble import TeacherEnsemble
from kd_trainer.universal import is_universal

STRIDES = (8, 16, 32)
"""Of the encoder's stages that are compared where no pairs are named."""
_FILE = "projections.pt"
_MOST_TOKENS = 10  # of a vision transformer that stand for no patch
_DROPOUTS = (nn.Dropout, nn.Dropout2d)
# Where the encoder lies in a universal model, one of smp, and stock ones.
_ENCODERS = ("model.pixel_level_module.encoder", "encoder", "backbone")


@dataclass(frozen=True)
class Place:
    """Where a feature map is had in a network.

    Attributes:
        name: of the module that gives it.
        channels: of the map.
        size: (h, w), of the input that it was looked at with.
        stride: pixels of the input for a cell.
        layout: (B, C, h, w), (B, h, w, C), or (B, N, C) with other tokens before those of the map.
    """

    name: str
    channels: int
    size: Size
    stride: int
    layout: Literal["channels first", "channels last", "tokens"]

    def __str__(self) -> str:
        return f"{self.name} ({self.channels} channels, 1/{self.stride})"

    def map_of(self, output: Tensor) -> Tensor:
        """The map (B, C, h, w) in what the module gave, in fp32."""
        if self.layout == "tokens":
            cells = self.size[0] * self.size[1]
            output = output[:, -cells:].unflatten(1, self.size)
        return (output if self.layout == "channels first" else output.movedim(-1, 1)).float()


class Pair(NamedTuple):
    """A map of the student and the one of the teacher that it follows."""

    student: Place
    teacher: Place


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in what a module gives: itself, or of a tuple or a mapping.

    Of a list, which holds the maps of all stages, none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Mapping | tuple):
        return next((found for value in values if (found := first_tensor(value)) is not None), None)
    return None


def place_of(name: str, output: Any, size: Size) -> Place | None:
    """Where the map in a module's output is had; None if it is no map of an image of this size."""
    tensor = first_tensor(output)
    if tensor is None or tensor.ndim not in (3, 4):
        return None
    if tensor.ndim == 4:
        if stride := _stride(tuple(tensor.shape[2:]), size):
            cells = (tensor.shape[2], tensor.shape[3])
            return Place(name, tensor.shape[1], cells, stride, "channels first")
        if stride := _stride(tuple(tensor.shape[1:3]), size):
            cells = (tensor.shape[1], tensor.shape[2])
            return Place(name, tensor.shape[3], cells, stride, "channels last")
        return None
    for stride in (s for s in range(1, min(size) + 1) if not (size[0] % s or size[1] % s)):
        cells = (size[0] // stride, size[1] // stride)
        if 0 <= tensor.shape[1] - cells[0] * cells[1] <= _MOST_TOKENS:
            return Place(name, tensor.shape[2], cells, stride, "tokens")
    return None


def _stride(cells: tuple[int, ...], size: Size) -> int:
    """Pixels for a cell, alike in both directions; 0 if the cells are none of such an image."""
    strides = {pixels // cell for pixels, cell in zip(size, cells, strict=True) if cell}
    fits = all(cell and pixels % cell == 0 for pixels, cell in zip(size, cells, strict=True))
    return strides.pop() if fits and len(strides) == 1 else 0


class Survey:
    """The maps that a network makes of one image, by the modules that give them.

    Args:
        network: is asked in eval mode and left as it was.
        ask: runs it, and gives its output.
        size: (H, W) of its input.

    Attributes:
        places: in the order in which they are finished.
        decoder: the last map before the logits, before a dropout; None if no module gives it.
    """

    def __init__(self, network: nn.Module, ask: Any, size: Size) -> None:
        self.network, self.size = network, size
        self.places: dict[str, Place] = {}
        self.calls: Counter[str] = Counter()
        self._entered: dict[str, int] = {}  # stride of what a module was given
        self._given: dict[str, str | None] = {}  # which module made what a module was given
        modes = {module: module.training for module in network.modules()}
        hooks = [
            hook
            for name, module in network.named_modules()
            for hook in (
                module.register_forward_pre_hook(partial(self._before, name)),
                module.register_forward_hook(partial(self._after, name)),
            )
        ]
        outputs: list[Any] = []
        hooks.append(network.register_forward_hook(lambda *called: outputs.append(called[2])))
        try:
            network.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                ask()
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
        self.decoder = self._decoder(outputs[0])

    def _before(self, name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._given.pop(name, None)
        self._given[name] = getattr(inputs[0], "made_by", None) if inputs else None
        place = place_of(name, inputs, self.size)
        self._entered[name] = place.stride if place else 0

    def _after(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        self.calls[name] += 1
        self.places.pop(name, None)
        place = place_of(name, output, self.size) if name else None
        if place is not None:
            self.places[name] = place
        # The outermost module that hands a tensor on is the best known one; dropout may be in it.
        if isinstance(output, Tensor):
            marked: Any = output
            if isinstance(module, _DROPOUTS):
                marked.is_settled = True
            elif not getattr(marked, "is_settled", False):
                marked.made_by = name

    def _decoder(self, output: Any) -> str | None:
        """What the last layer with a channel for each logit is given; auxiliary heads apart."""
        if is_universal(output):
            return None
        channels = logits_of(output).shape[1]
        modules = dict(self.network.named_modules())
        heads = [
            name
            for name in self._given
            if isinstance(layer := modules[name], nn.Conv2d)
            and layer.out_channels == channels
            and "aux" not in name
        ]
        for name in heads[-1:]:
            around = name.rpartition(".")[0]  # a layer of a convolution, which may pad before it
            for maker in (self._given[name], self._given.get(around)):
                if maker in self.places:
                    return maker
        return None

    def stages(self, inside: Sequence[str]) -> dict[int, str]:
        """The last map of each of `STRIDES` among modules and what is in them."""
        stages: dict[int, str] = {}
        modules = dict(self.network.named_modules())
        for stride in STRIDES:
            places = [
                place
                for place in self.places.values()
                if any(place.name == one or place.name.startswith(f"{one}.") for one in inside)
                and place.stride == stride
                and place.size[0] * place.size[1] > 1  # one cell alone says nothing of where
                and self.calls[place.name] == 1
                and not isinstance(modules[place.name], nn.Conv2d)  # what follows may be folded in
            ]
            # A stage that shrinks its map at its end has no map of its own stride after it.
            places = [place for place in places if not self._in_next_stage(place)] or places
            # Deep inside of blocks something else may have the shape of a map by chance.
            depth = min((place.name.count(".") for place in places), default=0) + 1
            ends = [place.name for place in places if place.name.count(".") <= depth]
            if ends:
                stages[stride] = ends[-1]
        return stages

    def _in_next_stage(self, place: Place) -> bool:
        """Whether a module around it goes from this stride to a larger one."""
        parts = place.name.split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts)))
        return any(
            self._entered.get(name) == place.stride < self.places[name].stride
            for name in around
            if name in self.places
        )

    def __getitem__(self, name: str) -> Place:
        """The place that a user names.

        Raises:
            ValueError: if there is none; names the nearest.
        """
        if name in self.places:
            return self.places[name]
        modules = [known for known, _ in self.network.named_modules() if known]
        kind = type(self.network).__name__
        if name in modules:
            raise ValueError(
                f"Expected modules that give a feature map in --feature_pairs, got {name} of the "
                f"{kind}, which gives none. Name another, such as {', '.join(_some(self.places))}."
            )
        hint = closest(name, self.places) or f" There are {', '.join(_some(self.places))}, ..."
        raise ValueError(
            f"Expected names of modules in --feature_pairs, got {name!r}, which the {kind} has "
            f"not.{hint}"
        )


def _some(names: Mapping[str, Any], count: int = 8) -> list[str]:
    """The outermost ones."""
    return sorted(names, key=lambda name: name.count("."))[:count]


def survey_student(student: nn.Module) -> Survey:
    """The maps of a student, of an image of its size."""
    size, device = image_size_of(student), next(student.parameters()).device
    pixels = torch.zeros(1, channels_seen(student), *size, device=device)
    return Survey(student, lambda: student(pixels), size)


def survey_teacher(teacher: Teacher, student: nn.Module) -> Survey:
    """The maps of a teacher's network, where it is given images of the student's size."""
    network, size = teacher.network, image_size_of(student)
    device = next(network.parameters()).device
    pixels = torch.zeros(1, channels_seen(student), *size, device=device)
    own_size = size if teacher.image_size is None else as_size(teacher.image_size)
    return Survey(network, lambda: teacher(pixels), own_size)


def _encoder(network: nn.Module) -> list[str]:
    """Names of the modules that are the encoder: one, or the units of a student."""
    modules = dict(network.named_modules())
    names = [name for name in _ENCODERS if name in modules]
    if not names and isinstance(network, PreTrainedModel) and network.base_model_prefix in modules:
        names = [network.base_model_prefix]
    if not names and "student_traits" in vars(network):
        owners = {module: name for name, module in modules.items()}
        return [owners[module] for unit in units_of(network) for module in unit.modules]
    return names[:1]


def feature_pairs(
    student: nn.Module, teacher: Teacher, named: Sequence[str] | None = None
) -> list[Pair]:
    """The maps that are compared, in the order in which the student makes them.

    Args:
        student: and
        teacher: on any device.
        named: STUDENT=TEACHER by names of modules; None finds the stages of the encoders of equal
            stride, of `STRIDES`, and the last maps of the decoders.

    Raises:
        ValueError: if there are none; or no such modules: names the nearest.
    """
    one, other = survey_student(student), survey_teacher(teacher, student)
    if named:
        pairs = [Pair(one[left], other[right]) for left, right in (n.split("=") for n in named)]
        order = list(one.places)
        return sorted(pairs, key=lambda pair: order.index(pair.student.name))
    stages = one.stages(_encoder(student)), other.stages(_encoder(teacher.network))
    names = [
        (stages[0][stride], stages[1][stride])
        for stride in STRIDES
        if stride in stages[0] and stride in stages[1]
    ]
    if one.decoder is not None and other.decoder is not None:
        names.append((one.decoder, other.decoder))
    if not names:
        raise ValueError(
            f"Expected feature maps of equal stride in student and teacher, found none in "
            f"{type(student).__name__} and {type(teacher.network).__name__}. Name modules with "
            f"--feature_pairs, of the student's {', '.join(_some(one.places))}, and the teacher's "
            f"{', '.join(_some(other.places))}."
        )
    return [Pair(one.places[left], other.places[right]) for left, right in names]


@contextmanager
def recorded(
    network: nn.Module, places: Sequence[Place], outputs: dict[str, Tensor]
) -> Iterator[None]:
    """Keep what modules of a network give in the forward passes that are made meanwhile.

    Args:
        network: itself, not what DDP has wrapped around it.
        places: in it; without any nothing is done.
        outputs: gets the tensor of each place by its name, in the order of the forward pass.

    Raises:
        ValueError: names a module that was not called, once all is over.
    """

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            outputs[name] = tensor

    hooks = [
        network.get_submodule(place.name).register_forward_hook(partial(keep, place.name))
        for place in places
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [place.name for place in places if place.name not in outputs]:
        raise ValueError(
            f"Expected a feature map from {silent[0]}, got none: the forward pass of the "
            f"{type(network).__name__} did not call it. Name another module in --feature_pairs."
        )


class FeatureHeads(nn.Module):
    """What the terms on features learn beside the student: for each term a module a pair."""

    def __init__(self, pairs: Sequence[Pair], weights: LossWeights) -> None:
        super().__init__()
        counted = [term for term in TERMS if term.name in weights.feature_terms]
        self.of = nn.ModuleDict(
            {
                term.name: nn.ModuleList(
                    term.head(pair.student.channels, pair.teacher.channels) for pair in pairs
                )
                for term in counted
                if term.head is not None
            }
        )

    def forward(self, maps: list[Tensor], terms: list[str]) -> dict[str, list[Tensor]]:
        """The student's maps, projected for each of these terms that learns to."""
        return {
            term: [head(one) for head, one in zip(heads, maps, strict=True)]  # type: ignore[call-overload]
            for term, heads in self.of.items()
            if term in terms
        }


class FeatureMatching:
    """The pairs of maps that a training compares, and the projections that it learns for them.

    Without a term on features there are no pairs, and nothing is done.

    Args:
        args: of the run.
        weights: of the loss, with those of the terms on features.
        student: that is trained.
        teacher: one network, see `check_one_network`.

    Attributes:
        pairs: in the order in which the student makes them.
        heads: the projections, on the device of the run.
        of_student: places of the student's maps.
        of_teacher: likewise.
    """

    def __init__(
        self,
        args: DistillationArguments,
        weights: LossWeights,
        student: nn.Module,
        teacher: Teacher | None,
    ) -> None:
        self.pairs: list[Pair] = []
        if weights.feature_terms and teacher is not None:
            several = isinstance(teacher.network, TeacherEnsemble)
            check_one_network(weights, several=several, maps=teacher.from_samples)
            self.pairs = feature_pairs(student, teacher, args.feature_pairs)
            if args.feature_pairs and args.fold_teacher:
                check_not_folded(self.pairs, teacher)
            announce(
                f"Features, student = teacher: {paired(self.pairs)}. --feature_pairs overrules."
            )
            if args.teacher_targets == "cached":
                announce(
                    "The teacher's logits are cached, but its feature maps are not: it runs in "
                    "each step, on the images as the student sees them."
                )
        self.of_student = tuple(dict.fromkeys(pair.student for pair in self.pairs))
        self.of_teacher = tuple(dict.fromkeys(pair.teacher for pair in self.pairs))
        # The student's first weights and its draws of DropPath must not depend on these.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(args.seed)
            self.heads = FeatureHeads(self.pairs, weights).to(args.device)
        self._heads: nn.Module = self.heads

    def prepare(self, accelerator: Accelerator) -> None:
        """Let several processes average the gradients of the projections."""
        if accelerator.num_processes > 1 and self._heads is self.heads and self.parameters():
            on_gpu = accelerator.device.type == "cuda"
            self._heads = DistributedDataParallel(
                self.heads,
                device_ids=[accelerator.device] if on_gpu else None,
                find_unused_parameters=True,  # a term may have no weight for a while
            )

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of the projections, by name."""
        return [(f"projections.{name}", p) for name, p in self.heads.of.named_parameters()]

    def compared(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor,
        terms: list[str],
    ) -> dict[str, list[ComparedMaps]]:
        """What each of the terms compares.

        Args:
            student: what `recorded` took of it.
            teacher: likewise; its maps are resized to the student's.
            mask: bool (B, H, W), the pixels that count, of any size.
            terms: on features, by name.
        """
        if not (self.pairs and terms):
            return {}
        maps = [pair.student.map_of(student[pair.student.name]) for pair in self.pairs]
        targets = [
            _resized(pair.teacher.map_of(teacher[pair.teacher.name]), one).detach()
            for pair, one in zip(self.pairs, maps, strict=True)
        ]
        masks = [pooled_mask(mask, (one.shape[-2], one.shape[-1])) for one in maps]
        projected = self._heads(maps, terms)
        return {
            term: [
                ComparedMaps(*one)
                for one in zip(projected.get(term, maps), targets, masks, strict=True)
            ]
            for term in terms
        }

    def save(self, folder: Path) -> None:
        """Write the projections into a checkpoint, if there are any."""
        if self.parameters():
            torch.save(self.heads.state_dict(), folder / _FILE)

    def load(self, folder: str | Path) -> None:
        """Go on from those of a checkpoint."""
        if self.parameters():
            saved = torch.load(Path(folder) / _FILE, map_location="cpu", weights_only=True)
            self.heads.load_state_dict(saved)


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def first_trained(outputs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The first of the recorded outputs that has a gradient, else the logits: all terms meet there.

    A term on a stage of the encoder has no gradient at the logits.
    """
    return next((one for one in outputs.values() if one.requires_grad), logits)


def paired(pairs: Sequence[Pair]) -> str:
    """The pairs in a line."""
    return ", ".join(f"{pair.student} = {pair.teacher}" for pair in pairs)


def check_one_network(weights: LossWeights, *, several: bool, maps: bool) -> None:
    """Refuse terms on features of a teacher that is several networks, or maps in a folder.

    Raises:
        ValueError: names the flag.
    """
    if weights.feature_terms and (several or maps):
        got = "--teacher_maps" if maps else "several, or one that is mirrored (--teacher_flip)"
        raise ValueError(
            f"Expected one network as the teacher with --{weights.feature_terms[0]}_weight, got "
            f"{got}. Name one teacher, or set the weight to 0."
        )


def check_not_folded(pairs: Sequence[Pair], teacher: Teacher) -> None:
    """Refuse a convolution of the teacher's, which may also do what the BatchNorm after it does.

    Raises:
        ValueError: names it.
    """
    for name in (pair.teacher.name for pair in pairs):
        if isinstance(teacher.network.get_submodule(name), nn.Conv2d):
            raise ValueError(
                f"Expected a block of the teacher in --feature_pairs, got the convolution {name}, "
                "into which the BatchNorm after it may be folded. Name what follows it, or use "
                "--fold_teacher false."
            )
