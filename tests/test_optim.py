"""Parameter groups: every free parameter, once, at the right rate."""

from pathlib import Path
from typing import Any

import torch
from tiny import Squares, arguments, tiny_student, tiny_teacher
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from kd_trainer.callbacks import ProgressiveUnfreezing
from kd_trainer.models.modeling import encoder_units
from kd_trainer.optim import parameter_groups, regroup, unit_parameters
from kd_trainer.trainer import DistillationTrainer


def test_every_parameter_that_is_used_is_in_exactly_one_group(tmp_path: Path):
    """One that is in no group never learns; one in two groups is stepped twice."""
    student = tiny_student("timm-efficientnet-b0")
    groups = parameter_groups(student, arguments(tmp_path), len(encoder_units(student)))
    grouped = [name for group in groups for name, _ in group["params"]]
    never_used = student.never_used_parameters()
    assert never_used
    assert sorted(grouped) == sorted(
        name for name, _ in student.named_parameters() if name not in never_used
    )


def test_parts_are_the_decoder_and_the_units_deepest_first(tmp_path: Path):
    """The stem has no unit of its own: it is freed with the shallowest one."""
    parts = unit_parameters(tiny_student("timm-efficientnet-b0"))
    shallow = {name.split(".")[1] for name, _ in parts["unit_0"]}
    assert next(iter(parts)) == "decoder"
    units = [int(name.removeprefix("unit_")) for name in list(parts)[1:]]
    assert units == sorted(units, reverse=True)
    assert shallow >= {"conv_stem", "bn1"}
    assert not any(name.startswith("encoder.") for name, _ in parts["decoder"])


def test_rates_and_weight_decay_of_the_groups(tmp_path: Path):
    """Decay on scales and biases pulls normalisation towards zero; the encoder learns slower."""
    args = arguments(tmp_path, learning_rate=1e-4, encoder_lr_scale=0.3, weight_decay=1e-4)
    student = tiny_student()
    groups = parameter_groups(student, args, len(encoder_units(student)))
    assert {group["lr"] for group in groups if group["name"] == "decoder"} == {1e-4}
    assert {group["lr"] for group in groups if group["name"] != "decoder"} == {1e-4 * 0.3}
    for group in groups:
        dimensions = {parameter.ndim for _, parameter in group["params"]}
        assert group["weight_decay"] == (0.0 if dimensions == {1} else 1e-4)
        assert dimensions == {1} or 1 not in dimensions


def names_of(groups: Any) -> list[str]:
    return list(dict.fromkeys(group["name"] for group in groups))


def test_regrouping_keeps_the_state_of_what_stays_and_drops_that_of_what_goes(tmp_path: Path):
    """AdamW would start anew on a decoder that it knows, or take old moments for new units."""
    student, args = tiny_student(), arguments(tmp_path)
    optimizer = torch.optim.AdamW(parameter_groups(student, args, 1))
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    before = {id(tensor): state for tensor, state in optimizer.state.items()}
    assert len(before) == sum(len(group["params"]) for group in optimizer.param_groups)

    regroup(optimizer, parameter_groups(student, args, 2))
    parts = list(unit_parameters(student))
    assert names_of(optimizer.param_groups) == parts[:3]
    assert {id(tensor): state for tensor, state in optimizer.state.items()} == before
    fresh = [g for g in optimizer.param_groups if g["name"] == parts[2]]
    assert {(g["betas"], g["eps"]) for g in fresh} == {((0.9, 0.999), 1e-8)}

    regroup(optimizer, parameter_groups(student, args, 0))
    decoder = {id(tensor) for _, tensor in unit_parameters(student)["decoder"]}
    assert names_of(optimizer.param_groups) == ["decoder"]
    assert {id(tensor) for tensor in optimizer.state} == decoder


class Freeing(TrainerCallback):
    """Frees units and leaves the optimizer alone."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.epochs = trainer.epochs

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        kwargs["model"].set_free_units(self.epochs.schedule.free_units(self.epochs.index))

    on_train_begin = on_epoch_begin


class FixedGroups(DistillationTrainer):
    """Groups of all parts, built once; the rate of a frozen one is 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressiveUnfreezing)
        self.add_callback(Freeing(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            units = self.schedule.unfreezing.units
            self.optimizer = kind(parameter_groups(self.model, self.args, units), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        rates = [self.schedule.rate(group["name"]) for group in self.optimizer.param_groups]
        self.lr_scheduler = LambdaLR(self.optimizer, rates)
        return self.lr_scheduler


class Groups(TrainerCallback):
    """Notes which parts the optimizer has in each epoch."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.parts.append(names_of(kwargs["optimizer"].param_groups))


def test_groups_that_come_with_their_units_train_as_groups_that_were_always_there(tmp_path: Path):
    """A new group that disturbed the others, their state or their rates would show in a weight."""
    states = []
    for kind in (DistillationTrainer, FixedGroups):
        spy, student = Groups(), tiny_student("timm-efficientnet-b0")
        args = arguments(
            tmp_path,
            num_train_epochs=50,
            unfreeze_start_epoch=5,
            unfreeze_every=3,
            unfreeze_warmup_epochs=2,
            warmup_epochs=5,
            encoder_lr_scale=0.3,
            weight_decay=0.01,
        )
        kind(
            student, args, teacher=tiny_teacher(), train_dataset=Squares(2), callbacks=[spy]
        ).train()
        states.append(student.state_dict())
        if kind is DistillationTrainer:
            parts = list(unit_parameters(student))
            free = args.unfreezing(len(parts) - 1)
            assert spy.parts == [parts[: 1 + free(epoch)] for epoch in range(50)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
