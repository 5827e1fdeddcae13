"""Trainings with terms on feature maps: what is paired, what is learned, saved and left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from same_run import assert_resumes_exactly, assert_same_tensors
from stock_models import stock_model
from test_views import Mixed
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch import nn
from transformers import TrainerCallback

from kd_trainer.data.views import STRONG, Views
from kd_trainer.feature_maps import feature_pairs, recorded, survey_student
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.students import as_student
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_ensemble import ensemble_of
from kd_trainer.trainer import DistillationTrainer

EVERY = {"fitnet_weight": 2.0, "at_weight": 2.0, "feature_cwd_weight": 50.0, "mgd_weight": 2.0}
NAMES = [name.removesuffix("_weight") for name in EVERY]


def smp_network(encoder: str, arch: str = "unet", side: int = 64) -> SmpForSemanticSegmentation:
    torch.manual_seed(0)
    return SmpForSemanticSegmentation.create(
        arch, encoder, encoder_weights="none", image_size=side, id2label={0: "a", 1: "b", 2: "c"}
    )


def teacher_of(network: nn.Module, num_labels: int = 3) -> Teacher:
    return Teacher(network, num_labels=num_labels)


def trainer(folder: Path, student: Any = None, images: Any = None, **options: Any) -> Any:
    teacher = options.pop("teacher", None) or tiny_teacher()
    return DistillationTrainer(
        student or tiny_student(),
        arguments(folder, **options),
        teacher=teacher,
        train_dataset=images or Squares(8),
        eval_dataset=options.pop("eval_dataset", None),
    )


def named(pairs: Any) -> list[tuple[str, str]]:
    return [(pair.student.name, pair.teacher.name) for pair in pairs]


# What each network hands on from one stride to the next.
PLACES = {
    "timm-efficientnet-b0": ["encoder.blocks.2", "encoder.blocks.4", "encoder.blocks.6"],
    "efficientnet-b0": ["encoder._blocks.4", "encoder._blocks.10", "encoder._blocks.15"],
    "resnet18": ["encoder.layer2", "encoder.layer3", "encoder.layer4"],
    "mobilenet_v2": ["encoder.features.6", "encoder.features.13", "encoder.features.18"],
    "mit_b0": ["encoder.norm2", "encoder.norm3", "encoder.norm4"],
}


@pytest.mark.parametrize("encoder", PLACES)
def test_stages_of_smp_are_found_with_the_end_of_the_decoder(encoder: str):
    """Inside the next stage there are wider maps of the same stride, before it shrinks them."""
    network = smp_network(encoder)
    pairs = feature_pairs(network, teacher_of(smp_network("resnet18")))
    wanted = [*PLACES[encoder], "decoder"]
    assert named(pairs) == list(zip(wanted, [*PLACES["resnet18"], "decoder"], strict=True))
    assert [pair.student.stride for pair in pairs] == [8, 16, 32, 1]
    maps: dict[str, torch.Tensor] = {}
    with recorded(network.eval(), [pair.student for pair in pairs], maps):
        pixels = torch.randn(1, 3, 64, 64)
        network(pixels)
    stages = {tuple(stage.shape): stage for stage in network.encoder(pixels)}
    for pair in pairs[:3]:
        found = pair.student.map_of(maps[pair.student.name])
        assert torch.allclose(found, stages[tuple(found.shape)], atol=1e-5)


STOCK = {
    "segformer": (["segformer.stages.1", "segformer.stages.2", "segformer"], "decode_head"),
    "upernet": ([f"backbone.hidden_states_norms.stage{i}" for i in (2, 3, 4)], "decode_head"),
    "upernet_swin": ([f"backbone.hidden_states_norms.stage{i}" for i in (2, 3, 4)], "decode_head"),
    "mobilevit": ([f"mobilevit.encoder.layer.{i}" for i in (2, 3)] + ["mobilevit"], "segmentation"),
    "beit": (["beit"], "decode_head"),
    "dpt": (["dpt"], "head.head"),
    "mobilenet": (["mobilenet_v2.layer.4", "mobilenet_v2"], "segmentation_head"),
}


@pytest.mark.parametrize("family", STOCK)
def test_stages_of_stock_models_are_found_as_maps(family: str):
    """Some give tokens, with and without others before them, or channels last."""
    student = as_student(stock_model(family, 3), image_size=64)
    pairs = feature_pairs(student, teacher_of(copy.deepcopy(student)))
    *stages, (decoder, _) = named(pairs)
    wanted, around = STOCK[family]
    assert [name for name, _ in stages] == wanted
    assert decoder.startswith(around)
    maps: dict[str, torch.Tensor] = {}
    with recorded(student, [pair.student for pair in pairs], maps):
        student(torch.randn(2, 3, 64, 64))
    for pair in pairs:
        place = pair.student
        assert place.map_of(maps[place.name]).shape == (2, place.channels, *place.size)
        assert place.size == (64 // place.stride,) * 2


def test_tokens_become_maps_row_by_row():
    """Columns for rows would teach a mirrored image, which no shape betrays."""
    student = as_student(stock_model("segformer", 3), image_size=[64, 128])
    survey = survey_student(student)
    norm = survey["segformer.stages.1.layer_norm"]
    assert (norm.layout, norm.size) == ("tokens", (8, 16))
    maps: dict[str, torch.Tensor] = {}
    both = [norm, survey["segformer.stages.1"]]
    with recorded(student.eval(), both, maps):
        student(torch.randn(1, 3, 64, 128))
    one, other = (place.map_of(maps[place.name]) for place in both)
    assert torch.equal(one, other)


def test_teachers_of_another_size_and_family_are_paired(tmp_path: Path):
    """The teacher's maps are those of its own input size: they are resized."""
    network = as_student(stock_model("segformer"), image_size=64)
    teacher = Teacher(network, num_labels=2, image_size=64)
    one = trainer(tmp_path, teacher=teacher, max_steps=2, **EVERY)
    assert named(one.matching.pairs)[0] == ("encoder.layer2", "segformer.stages.1")
    one.train()
    assert all(one.state.log_history[0][name] > 0 for name in NAMES)


def test_named_pairs_overrule_and_unknown_names_give_the_nearest(tmp_path: Path):
    pairs = ["decoder=encoder.layer2", "encoder.layer1=encoder.layer1"]
    one = trainer(tmp_path, feature_pairs=pairs, at_weight=1.0)
    assert named(one.matching.pairs) == [
        ("encoder.layer1", "encoder.layer1"),
        ("decoder", "encoder.layer2"),
    ]
    for wrong, message in (
        ("encoder.layr2=decoder", "Did you mean encoder.layer2"),
        ("decoder=encoder.layr2", "Did you mean encoder.layer2"),
        ("decoder=nothing", "There are "),
        ("encoder.layer4=decoder", "gives none"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_pairs(tiny_student(), tiny_teacher(), [wrong])
    folded = ["decoder=encoder.layer1.0.conv1"]
    with pytest.raises(ValueError, match=r"the convolution encoder\.layer1\.0\.conv1"):
        trainer(tmp_path, feature_pairs=folded, at_weight=1.0)
    trainer(tmp_path, feature_pairs=folded, at_weight=1.0, fold_teacher=False)


def test_a_module_that_is_not_called_is_an_error_that_names_it():
    """A term that silently compares the maps of the step before would go unnoticed."""
    student = tiny_student()
    place = survey_student(student)["encoder.layer2"]
    with pytest.raises(ValueError, match=r"from encoder\.layer2, got none"):  # noqa: SIM117
        with recorded(student, [place], {}):
            pass


def test_hooks_are_gone_after_a_step_and_nothing_else_changes(tmp_path: Path):
    """A hook that stays would be copied, saved, and called in every evaluation."""
    student, teacher = tiny_student(), tiny_teacher()
    modes = {name: module.training for name, module in student.named_modules()}
    before = copy.deepcopy(student.state_dict())
    one = trainer(tmp_path, student, teacher=teacher, max_steps=1, **EVERY)
    assert_same_tensors(student.state_dict(), before)
    assert {name: module.training for name, module in student.named_modules()} == modes
    one.train()
    for network in (student, teacher.network, one._inference.prepared.network):
        assert not any(module._forward_hooks for module in network.modules())


class Watch(TrainerCallback):
    """Notes the gradients' norms of the student and the projections, and the groups' names."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.rates: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        groups = kwargs["optimizer"].param_groups
        self.groups.append([group["name"] for group in groups])
        self.rates.append({group["name"]: group["lr"] for group in groups})


def test_projections_keep_their_group_and_rate_while_units_are_freed(tmp_path: Path):
    """The optimizer is regrouped each epoch: a group that got lost would stop learning."""
    one = trainer(
        tmp_path,
        num_train_epochs=3,
        unfreeze_start_epoch=1,
        unfreeze_every=1,
        projection_learning_rate=5e-3,
        **EVERY,
    )
    watch = Watch()
    one.add_callback(watch)
    first = {name: p.detach().clone() for name, p in one.matching.parameters()}
    one.train()
    assert all(names.count("projections") == 2 for names in watch.groups)
    assert watch.groups[0] == ["decoder"] * 2 + ["projections"] * 2
    assert watch.groups[-1][-2:] == ["projections"] * 2
    assert "unit_0" in watch.groups[-1]
    assert watch.rates[-1]["projections"] == pytest.approx(5 * watch.rates[-1]["decoder"])
    moments = one.optimizer.state
    for name, parameter in one.matching.parameters():
        assert not torch.equal(first[name], parameter), name
        assert moments[parameter]["step"] == 12  # one a step since the beginning


def test_gradients_of_projections_do_not_pile_up(tmp_path: Path):
    """The Trainer sets those of the student to zero, and no others."""
    one = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0, **EVERY)
    one.train()
    one.matching.heads.zero_grad()
    samples = [one._prepare_inputs(one.data_collator([Squares(8)[i]])) for i in (0, 1)]
    gradients = []
    for _ in range(2):
        one.get_batch_samples(iter(samples), 2, one.args.device)
        one.compute_loss(one.model.train(), samples[0]).backward()
        gradients.append([p.grad.clone() for _, p in one.matching.parameters()])
    sizes = [sum(float(g.norm()) for g in some) for some in gradients]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)  # MGD draws other cells


def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path: Path):
    """The projections, their moments and BatchNorms are part of where a run is."""
    first, teacher = tiny_student("timm-efficientnet-b0"), tiny_teacher()

    def make(folder: Path, *, blank: bool = False, **more: Any) -> DistillationTrainer:
        student = copy.deepcopy(first)
        args = {"num_train_epochs": 3, "unfreeze_start_epoch": 1, "unfreeze_every": 1}
        args |= {"logging_steps": 2, "load_best_model_at_end": False}
        made = DistillationTrainer(
            student,
            arguments(folder, **args, **EVERY, **more),
            teacher=teacher,
            train_dataset=Squares(6),
        )
        if blank:
            for state in (student.state_dict(), made.matching.heads.state_dict()):
                for tensor in state.values():
                    tensor.zero_()
        made_trainers.append(made)
        return made

    made_trainers: list[DistillationTrainer] = []
    assert_resumes_exactly(make, tmp_path, [1, 3, 5])
    whole, _, *resumed = made_trainers
    for one in resumed:
        assert_same_tensors(one.matching.heads.state_dict(), whole.matching.heads.state_dict())


def test_projections_are_in_checkpoints_and_in_no_saved_student(tmp_path: Path):
    """The Hub would get weights that no student has."""
    one = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **EVERY)
    one.train()
    one.save_model(str(tmp_path / "student"))
    names = {file.name for file in (tmp_path / "student").iterdir()}
    assert "projections.pt" not in names
    saved = SmpForSemanticSegmentation.from_pretrained(tmp_path / "student")
    assert saved.state_dict().keys() == tiny_student().state_dict().keys()
    assert (tmp_path / "checkpoint-2" / "projections.pt").is_file()
    plain = trainer(tmp_path / "plain", max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    assert not (tmp_path / "plain" / "checkpoint-1" / "projections.pt").exists()


def test_making_projections_draws_nothing_from_the_generator_of_the_run(tmp_path: Path):
    """The student's DropPath, and weights that are made later, would be others."""
    states = []
    for weights in ({}, EVERY):
        student, teacher = tiny_student(), tiny_teacher()
        torch.manual_seed(5)
        trainer(tmp_path, student, teacher=teacher, **weights)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_frozen_encoder_gets_no_gradient_and_a_free_one_does(tmp_path: Path):
    """Of what is frozen only the projections learn."""
    one = trainer(tmp_path, fitnet_weight=1.0, unfreeze_start_epoch=1)
    batch = one._prepare_inputs(one.data_collator([Squares(2)[i] for i in (0, 1)]))
    for free in (0, 2):
        one.model.set_free_units(free)
        one.model.zero_grad()
        one.tracked.drain(one.accelerator)
        one.compute_loss(one.model, batch).backward()
        got = one.model.encoder.layer2[0].conv1.weight.grad
        assert (got is not None) == bool(free)
        assert not any(p.grad is not None for p in one.teacher.parameters())
        assert all(p.grad is not None and p.grad.any() for _, p in one.matching.parameters())


def test_shares_of_the_gradient_are_those_at_the_first_map_that_is_trained(tmp_path: Path):
    """At the logits a term on a stage has none, and would seem to do nothing."""
    one = trainer(tmp_path, max_steps=1, **EVERY)
    one.train()
    log = one.state.log_history[0]
    shares = {name: log[f"grad_share/{name}"] for name in ("kl", "mse", "bce", "dice", *NAMES)}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) > 0


def test_cached_logits_leave_the_teacher_to_be_asked_for_its_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Cached(Squares):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            return sample | {"teacher_logits": torch.zeros(1, SIDE, SIDE, dtype=torch.float16)}

    options = {"max_steps": 1, "teacher_targets": "cached"}
    one = trainer(tmp_path, images=Cached(4), fitnet_weight=1.0, **options)
    assert "it runs in each step" in capsys.readouterr().err
    one.train()
    log = one.state.log_history[0]
    assert log["fitnet"] > 0
    without = trainer(tmp_path, images=Cached(4), **options)
    without.train()
    assert without._inference is None  # who needs no maps never asks
    assert log["mse"] == without.state.log_history[0]["mse"]


@pytest.mark.parametrize("targets", ["online", "cached"])
def test_of_mixed_images_the_maps_are_those_of_what_the_student_sees(tmp_path: Path, targets: str):
    """Logits are of the images before mixing; maps of these would teach one place about another."""
    data = Mixed(4, Views(strong=1, mix=1.0))
    options = {"per_device_train_batch_size": 4, "max_steps": 1, **EVERY}
    one = trainer(tmp_path, images=data, **options)
    batch = one.data_collator([data[i] for i in range(4)])
    if targets == "cached":
        batch["teacher_logits"] = one.teacher_logits(one._normalised(batch))
        one.args.teacher_targets = targets
    (seen,), _ = one.get_batch_samples(iter([batch]), 1, one.args.device)
    compared: list[dict[str, torch.Tensor]] = []
    take = one.matching.compared

    def watched(student: Any, teacher: Any, *rest: Any) -> Any:
        compared.append(dict(teacher))
        return take(student, teacher, *rest)

    one.matching.compared = watched
    loss = one.compute_loss(one.model.train(), seen)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None for _, p in one.matching.parameters())

    def maps_of(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}
        inputs = one._normalised({"pixel_values": pixels})["pixel_values"]
        with torch.no_grad(), recorded(one.teacher.network, one.matching.of_teacher, maps):
            one.teacher(inputs)
        return maps

    mixed = maps_of(seen["pixel_values"])
    others = [maps_of(pixels) for pixels in (batch["pixel_values"], batch[STRONG][:, 0])]
    for name, found in compared[0].items():
        torch.testing.assert_close(found, mixed[name], rtol=1e-3, atol=1e-4)
        assert not any(torch.allclose(found, maps[name], rtol=1e-2, atol=1e-3) for maps in others)
    assert compared[0].keys() == {place.name for place in one.matching.of_teacher}
    log = trainer(tmp_path / "run", images=data, **options)
    log.train()
    assert all(log.state.log_history[0][name] > 0 for name in NAMES)


def test_folding_the_teacher_changes_rounding_only(tmp_path: Path):
    """Hooks sit on the copy that runs, whose BatchNorms are gone."""
    logs = []
    for fold in (True, False):
        one = trainer(tmp_path, max_steps=1, fold_teacher=fold, **EVERY)
        one.train()
        logs.append({name: one.state.log_history[0][name] for name in NAMES})
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "got --torch_compile"),
        ({"compile_teacher": True}, "got --compile_teacher"),
        ({"kl_weight": 0, "mse_weight": 0, "task_weight": 0}, "a term on logits"),
        ({"feature_pairs": ["decoder"]}, "as STUDENT=TEACHER"),
        ({"at_weight": 0.0, "feature_pairs": ["a=b"]}, "--feature_pairs, got none"),
        ({"projection_learning_rate": 1e-3}, "--projection_learning_rate, got none"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"at_weight": 1.0} | options)


def test_several_teachers_and_maps_from_files_are_refused_by_name(tmp_path: Path):
    """The mean of two answers has no feature maps."""
    teacher = ensemble_of([tiny_teacher(), tiny_teacher(seed=8)])
    with pytest.raises(ValueError, match="one network as the teacher with --at_weight, got sev"):
        trainer(tmp_path, teacher=teacher, at_weight=1.0)
    maps = tiny_teacher()
    maps.from_samples = True
    with pytest.raises(ValueError, match="got --teacher_maps"):
        trainer(tmp_path, teacher=maps, at_weight=1.0)


def test_each_term_falls_while_a_student_is_trained_on_it(tmp_path: Path):
    one = trainer(tmp_path, num_train_epochs=8, logging_steps=8, **EVERY)
    one.train()
    for name in NAMES:
        values = [log[name] for log in one.state.log_history if name in log]
        assert values[-1] < 0.9 * values[0], (name, values)
