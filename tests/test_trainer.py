"""DistillationTrainer: what it trains, what it leaves alone, what it logs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import BINARY, Squares, arguments, tiny_student, tiny_teacher
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kd_trainer.evaluation import classes_of, figure_names
from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.models.modeling import encoder_units
from kd_trainer.trainer import DistillationTrainer

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def test_teacher_weights_are_the_same_bit_for_bit_after_training(tmp_path: Path):
    """A teacher put in train mode, or into the optimizer, would drift without any error."""
    teacher = tiny_teacher()
    before = state_of(teacher)
    student = tiny_student()
    first = state_of(student)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, eval_strategy="epoch"),
        teacher=teacher,
        train_dataset=Squares(8),
        eval_dataset=Squares(4, offset=50),
    )
    trainer.train()
    assert_same(before, state_of(teacher))
    assert any(not torch.equal(first[n], v) for n, v in student.state_dict().items())


def test_checkpoint_holds_no_teacher_key(tmp_path: Path):
    """A teacher that is part of the student would be saved and published with it."""
    student = tiny_student()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, save_strategy="epoch", num_train_epochs=1),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == student.state_dict().keys()
    assert not any("teacher" in name for name in saved)


class Spy(TrainerCallback):
    """Records, at the end of each epoch, the student's state and which parameters are free."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.moments: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.states.append(state_of(kwargs["model"]))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.states.append(state_of(kwargs["model"]))
        self.moments.append(len(kwargs["optimizer"].state))


def test_frozen_units_do_not_change_and_have_no_optimizer_state(tmp_path: Path):
    """Statistics of a frozen BatchNorm drift in train mode, and weight decay shrinks weights
    without any gradient: both would change a unit that the plan calls frozen.
    """
    student = tiny_student("timm-efficientnet-b0")
    units = encoder_units(student)
    spy = Spy()
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            num_train_epochs=len(units) + 1,
            unfreeze_start_epoch=1,
            unfreeze_every=1,
            weight_decay=0.1,
        ),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
        callbacks=[spy],
    )
    trainer.train()
    prefixes = [tuple(dict(unit.parameters())) for unit in units]
    names = {id(m): n for n, m in student.named_modules()}
    owned = [tuple(names[id(m)] + "." for m in unit.modules) for unit in units]
    for epoch in range(len(units) + 1):
        before, after = spy.states[epoch], spy.states[epoch + 1]
        for index in range(len(units)):
            keys = [k for k in before if k.startswith(owned[index])]
            assert keys
            changed = [k for k in keys if not torch.equal(before[k], after[k])]
            is_free = len(units) - index <= epoch
            assert bool(changed) == is_free, (epoch, index)
    decoder = sum(
        len(g["params"]) for g in trainer.optimizer.param_groups if g["name"] == "decoder"
    )
    assert spy.moments[0] == decoder
    assert spy.moments[1] == decoder + len(prefixes[-1])


def test_groups_are_decoder_first_then_units_deepest_first(tmp_path: Path):
    """The Trainer logs the first group's rate as `learning_rate`; a resumed run needs one order."""
    student = tiny_student()
    trainer = DistillationTrainer(
        student, arguments(tmp_path, encoder_lr_scale=0.25), train_dataset=Squares(4)
    )
    groups = trainer.create_optimizer().param_groups
    order = list(dict.fromkeys(group["name"] for group in groups))
    assert order == [
        "decoder",
        *(f"unit_{i}" for i in reversed(range(len(encoder_units(student))))),
    ]
    assert {g["lr"] for g in groups if g["name"] != "decoder"} == {0.25e-3}
    for group in groups:
        decays = group["weight_decay"] > 0
        assert all((p.ndim > 1) == decays for p in group["params"])
    named = [name for group in groups for name in group["param_names"]]
    assert len(named) == len(set(named))
    assert (
        set(named) == {n for n, _ in student.named_parameters()} - student.never_used_parameters()
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_of_four_single_images_equals_one_batch_of_four(tmp_path: Path, precision):
    """A loss that is scaled twice, or a Dice over the batch, gives gradients that are wrong by the
    number of accumulation steps, which only shows as a strange learning rate.
    """
    states = []
    for batch, steps in ((4, 1), (1, 4)):
        student = tiny_student(norm=False)
        trainer = DistillationTrainer(
            student,
            arguments(
                tmp_path / str(batch),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                max_grad_norm=0.0,
                mixed_precision=precision,
                learning_rate=1e-4,
                num_train_epochs=1,
            ),
            teacher=tiny_teacher(),
            train_dataset=Squares(12),
        )
        trainer.train()
        states.append(
            (state_of(student), [h["loss"] for h in trainer.state.log_history if "loss" in h])
        )
    (one, one_loss), (four, four_loss) = states
    assert one_loss == pytest.approx(four_loss, rel=1e-5 if precision == "no" else 2e-2)
    # Adam divides by the gradient's size, so it amplifies rounding where the gradient is tiny.
    worst = max(float((one[n] - four[n]).abs().max()) for n in one)
    assert worst < (5e-5 if precision == "no" else 3e-4)


def gradients_after_one_step(
    tmp_path: Path, data=None, **options
) -> tuple[dict[str, Tensor], float]:
    seen: dict[str, Tensor] = {}

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, p in kwargs["model"].named_parameters():
                if p.grad is not None:
                    seen[name] = p.grad.clone()

    trainer = DistillationTrainer(
        tiny_student(norm=False),
        arguments(tmp_path, max_steps=1, **options),
        teacher=tiny_teacher(),
        train_dataset=data or Squares(4),
        callbacks=[Grab()],
    )
    trainer.train()
    return seen, trainer.state.log_history[0]["grad_norm"]


def test_accumulated_gradient_is_the_gradient_of_the_whole_batch(tmp_path: Path):
    """Adam hides a wrong scale of the gradient; clipping and the logged norm do not."""
    one, one_norm = gradients_after_one_step(
        tmp_path / "one", per_device_train_batch_size=4, max_grad_norm=0.0
    )
    four, four_norm = gradients_after_one_step(
        tmp_path / "four",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
    )
    assert one_norm == pytest.approx(four_norm, rel=1e-5)
    for name in one:
        assert torch.allclose(one[name], four[name], rtol=1e-4, atol=1e-6), name


class HalfLabelled(Squares):
    """Squares of which the first and the last are unlabelled."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return (
            sample | {"labels": sample["labels"].clone().fill_(255)} if index % 3 == 0 else sample
        )


def test_accumulated_dice_beside_unlabelled_images_is_that_of_the_whole_batch(tmp_path: Path):
    """Averaged over micro-batches, one without a label would halve the gradient of the others."""
    # Nearly all of it: beside a teacher one of its terms needs a weight.
    dice = {"kl_weight": 1e-9, "mse_weight": 0.0, "bce_weight": 0.0, "max_grad_norm": 0.0}
    data = HalfLabelled(4)
    one, one_norm = gradients_after_one_step(
        tmp_path / "one", data, per_device_train_batch_size=4, **dice
    )
    four, four_norm = gradients_after_one_step(
        tmp_path / "four",
        data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **dice,
    )
    assert one_norm == pytest.approx(four_norm, rel=1e-5)
    for name in one:
        assert torch.allclose(one[name], four[name], rtol=1e-4, atol=1e-6), name


def test_clipping_is_over_all_trainable_parameters(tmp_path: Path):
    """Clipping each group on its own would change the direction of the step."""
    gradients, norm = gradients_after_one_step(tmp_path, max_grad_norm=0.05)
    total = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
    assert norm > 0.05  # the logged norm is the one before clipping
    assert total == pytest.approx(0.05, rel=1e-3)


WATCHED = {
    "loss",
    "kl",
    "mse",
    "bce",
    "dice",
    "temperature",
    "free_units",
    "trainable_parameters",
    "lr/decoder",
    "lr/unit_0",
    "grad_norm",
    "grad_share/kl",
    "grad_share/mse",
    "grad_share/bce",
    "grad_share/dice",
}


def test_log_has_every_watched_value_and_the_terms_add_up(tmp_path: Path):
    """A term logged with another weight or another mean than it is trained with misleads."""
    args = arguments(tmp_path, temperature_per="epoch", logging_steps=2, num_train_epochs=3)
    trainer = DistillationTrainer(
        tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(8)
    )
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert len(logs) == 6
    for log in logs:
        assert log.keys() >= WATCHED
        total = 0.3 * log["kl"] + 0.5 * log["mse"] + 0.5 * log["bce"] + log["dice"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)
        shares = [log[f"grad_share/{name}"] for name in ("kl", "mse", "bce", "dice")]
        assert sum(shares) == pytest.approx(1.0, rel=1e-5)
    assert [log["temperature"] for log in logs] == pytest.approx([4.0, 4.0, 2.5, 2.5, 1.0, 1.0])


def test_temperature_per_step_reaches_both_ends(tmp_path: Path):
    """A schedule that is one step short never reaches its end."""
    args = arguments(tmp_path, temperature_per="step", temperature_schedule="linear")
    trainer = DistillationTrainer(
        tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(4)
    )
    trainer.train()
    logs = [h["temperature"] for h in trainer.state.log_history if "loss" in h]
    assert logs == pytest.approx([4.0, 3.0, 2.0, 1.0])


def test_without_a_teacher_only_the_task_terms_are_trained(tmp_path: Path):
    """The baseline must be the same code without the teacher, not a teacher of zeros."""
    trainer = DistillationTrainer(tiny_student(), arguments(tmp_path), train_dataset=Squares(4))
    trainer.train()
    log = trainer.state.log_history[0]
    assert "kl" not in log
    assert "mse" not in log
    assert log["loss"] == pytest.approx(0.5 * log["bce"] + log["dice"], rel=1e-5)


def test_non_finite_term_stops_the_run_and_is_named(tmp_path: Path):
    """A NaN that is filtered or replaced trains on nonsense until somebody looks."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.network.segmentation_head[0].bias.fill_(math.inf)
    trainer = DistillationTrainer(
        tiny_student(), arguments(tmp_path), teacher=teacher, train_dataset=Squares(4)
    )
    with pytest.raises(FloatingPointError, match=r"Expected finite loss terms, got (kl|mse) = "):
        trainer.train()


def test_nothing_non_finite_is_saved_between_two_logs(tmp_path: Path):
    """With rare logs a checkpoint would be written before anybody noticed."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.network.segmentation_head[0].bias.fill_(math.nan)
    args = arguments(tmp_path, logging_steps=1000, save_strategy="epoch")
    trainer = DistillationTrainer(tiny_student(), args, teacher=teacher, train_dataset=Squares(4))
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_weights_that_went_bad_under_a_finite_loss_are_not_saved(tmp_path: Path):
    """The loss is looked at before the update: the update itself may write NaN."""
    args = arguments(tmp_path, logging_steps=1000, save_strategy="steps", save_steps=1)
    trainer = DistillationTrainer(tiny_student(), args, train_dataset=Squares(4))
    weight = trainer.model.segmentation_head[0].weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"Expected finite weights.*after step 1\)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_evaluation_of_a_broken_student_is_an_error(tmp_path: Path):
    """NaN is never above 0, so a broken student would look like one that finds nothing."""
    student = tiny_student()
    with torch.no_grad():
        student.segmentation_head[0].bias.fill_(math.nan)
    trainer = DistillationTrainer(student, arguments(tmp_path), eval_dataset=Squares(3))
    with pytest.raises(FloatingPointError, match=r"in the evaluation, got bce = nan"):
        trainer.evaluate()


@pytest.mark.parametrize("num_labels", [2, 4])
def test_evaluation_equals_counting_by_hand(tmp_path: Path, num_labels: int):
    """A bare tensor from prediction_step loses the first image of each batch, silently."""
    labels = {0: "background"} | {i: f"part_{i}" for i in range(1, num_labels)}
    student, teacher = tiny_student(id2label=labels), tiny_teacher(num_labels=num_labels)
    data = Squares(5, num_labels=num_labels)  # an uneven tail
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=2),
        teacher=teacher,
        eval_dataset=data,
    )
    figures = trainer.evaluate()
    counts = {who: SegmentationCounts.zero(num_labels) for who in ("student", "teacher", "agree")}
    mean = torch.tensor(student.config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(student.config.image_std).view(1, 3, 1, 1)
    for sample in data:
        pixels = (sample["pixel_values"][None] / 255 - mean) / std
        truth = sample["labels"][None].long()
        with torch.no_grad():
            found = classes_of(student.eval()(pixel_values=pixels).raw_logits)
            guide = classes_of(teacher(pixels))
        for who, prediction, reference in (
            ("student", found, truth),
            ("teacher", guide, truth),
            ("agree", found, guide),
        ):
            counts[who] = counts[who].add(image_counts(prediction, reference, num_labels).numpy())
    own = counts["student"].metrics(labels)
    for name, value in own.items():
        assert figures[f"eval_{name}"] == pytest.approx(value, abs=1e-9), name
    for name, value in counts["teacher"].metrics(labels).items():
        assert figures[f"eval_teacher_{name}"] == pytest.approx(value, abs=1e-9), name
    agree = counts["agree"].metrics(labels)["pixel_accuracy"]
    assert figures["eval_agreement"] == pytest.approx(agree, abs=1e-9)
    assert {"eval_kl", "eval_mse", "eval_bce", "eval_dice_loss", "eval_loss"} <= figures.keys()


def test_loss_terms_of_an_evaluation_do_not_depend_on_the_batch_size(tmp_path: Path):
    """A mean of batch means weights the images of a short last batch more."""
    results = []
    for size in (1, 3):
        trainer = DistillationTrainer(
            tiny_student(),
            arguments(tmp_path, per_device_eval_batch_size=size),
            teacher=tiny_teacher(),
            eval_dataset=Squares(5),
        )
        results.append(trainer.evaluate())
    for name in ("loss", "kl", "mse", "bce", "dice_loss"):
        assert results[0][f"eval_{name}"] == pytest.approx(results[1][f"eval_{name}"], rel=1e-5)


def test_evaluation_leaves_the_random_state_as_it_was(tmp_path: Path):
    """Otherwise how often a run is evaluated would change its DropPath draws."""
    trainer = DistillationTrainer(tiny_student(), arguments(tmp_path), eval_dataset=Squares(3))
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state())


def test_teacher_figures_are_computed_once(tmp_path: Path):
    """They cannot change: the teacher is frozen."""
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(
            tmp_path, eval_strategy="epoch", num_train_epochs=3, per_device_eval_batch_size=2
        ),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
        eval_dataset=Squares(3),
    )
    steps: list[int] = []
    original = trainer.prediction_step

    def counting(*args, **kwargs):
        result = original(*args, **kwargs)
        steps.append(len(result[1]))
        return result

    trainer.prediction_step = counting
    trainer.train()
    assert steps == [4, 4, 3, 3, 3, 3]
    seen = [h["eval_teacher_miou"] for h in trainer.state.log_history if "eval_miou" in h]
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_best_student_is_the_one_of_the_highest_miou(tmp_path: Path):
    """The loss is not what a user asks for, and its minimum is often elsewhere."""
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=4),
        train_dataset=Squares(8),
        eval_dataset=Squares(4, offset=50),
    )
    trainer.train()
    seen = {h["step"]: h["eval_miou"] for h in trainer.state.log_history if "eval_miou" in h}
    best = max(seen, key=seen.__getitem__)
    assert trainer.state.best_global_step == best
    assert_same(
        state_of(trainer.model),
        load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"),
    )


def test_best_student_by_loss_is_the_one_of_the_lowest(tmp_path: Path):
    """With `greater_is_better` left on, the worst student would be kept."""
    args = arguments(
        tmp_path,
        num_train_epochs=4,
        learning_rate=3e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="loss",
    )
    student = tiny_student()
    trainer = DistillationTrainer(
        student, args, train_dataset=Squares(4), eval_dataset=Squares(4, offset=50)
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(set(losses)) == 4
    assert trainer.state.best_metric == min(losses)


def test_best_is_least_of_each_loss_and_most_of_each_metric(tmp_path: Path):
    """A term of the loss does not end in `loss`: the worst student would be kept."""
    names = figure_names(BINARY, arguments(tmp_path).loss_weights, teacher=True)
    least = {"kl", "mse", "bce", "dice_loss", "loss"}
    assert least < set(names)
    for name in names:
        for metric in (name, f"eval_{name}"):
            args = arguments(tmp_path, metric_for_best_model=metric)
            assert args.greater_is_better is (name not in least), metric


@pytest.mark.parametrize(
    ("metric", "message"),
    [("mIoU", "Did you mean miou"), ("agreement", "There are miou"), ("kl", "There are miou")],
)
def test_a_best_metric_that_no_evaluation_has_is_refused_before_training(
    tmp_path: Path, metric: str, message: str
):
    """The Trainer would say KeyError, after the first epoch."""
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": metric}
    with pytest.raises(ValueError, match=f"Expected --metric_for_best_model.*{message}"):
        DistillationTrainer(
            tiny_student(),
            arguments(tmp_path, **best),
            train_dataset=Squares(4),
            eval_dataset=Squares(4),
        )


def test_panel_is_drawn_at_each_evaluation_and_sent_to_tensorboard(tmp_path: Path):
    """A picture shows in a second what a mean hides."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, eval_strategy="epoch", panel_images=2, report_to="tensorboard"),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
        eval_dataset=Squares(3),
    )
    trainer.train()
    assert len(list((tmp_path / "panels").glob("step_*.png"))) == 2
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["panel"]
    scalars = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in WATCHED} <= scalars
    assert {"eval/miou", "eval/teacher_miou", "eval/agreement", "eval/kl"} <= scalars


def test_a_long_run_keeps_few_panels_and_that_of_the_best(tmp_path: Path):
    """Each takes 0.2 MiB, twice with TensorBoard: a thousand evaluations would fill the disk."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluations = {"eval_strategy": "epoch", "num_train_epochs": 12}
    best = {"metric_for_best_model": "early", "greater_is_better": True}
    saves = {"save_strategy": "steps", "save_steps": 1000, "load_best_model_at_end": False}
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(
            tmp_path, **evaluations, **best, **saves, panel_images=1, report_to="tensorboard"
        ),
        train_dataset=Squares(4),
        eval_dataset=Squares(1),
        compute_metrics=lambda _: {"early": -abs(trainer.state.global_step - 4)},
    )
    trainer.train()
    assert panel_steps(tmp_path / "panels") == [4, 24]
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    shown = [image.step for image in events.Images("panel")]
    assert shown == [2, 4, 6, 8, 10, 12, 16, 18, 20, 22, 24], "14 is in the same tenth as 12"


def panel_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_0*.png"))


@pytest.mark.parametrize(
    ("limit", "left"),
    [(0, [2, 4, 6, 8, 50]), (1, [4, 8]), (2, [4, 8]), (3, [4, 6, 8]), (5, [2, 4, 6, 8, 50])],
)
def test_as_many_panels_are_kept_as_asked_for(tmp_path: Path, limit: int, left: list[int]):
    """The best student's is published; one of later updates is of another run."""
    args = arguments(tmp_path, panel_images=1, panel_limit=limit)
    trainer = DistillationTrainer(tiny_student(), args, eval_dataset=Squares(1))
    folder = tmp_path / "panels"
    folder.mkdir()
    for name in ("000002", "000004", "000006", "000050", "mine"):
        (folder / f"step_{name}.png").touch()
    trainer.state.global_step, trainer.state.best_global_step = 8, 4
    trainer.evaluate()
    assert panel_steps(folder) == left
    assert (folder / "step_mine.png").exists()


def test_state_of_the_trainer_is_json(tmp_path: Path):
    """Logged values must be plain numbers, or the checkpoint cannot be written."""
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, save_strategy="epoch"),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][0]["kl"] > 0


def test_of_transformers_private_methods_only_nine_are_overridden():
    """Each may change with any release: a new one needs its reason in docs/design.md."""
    private = {name for name in vars(DistillationTrainer) if re.match(r"_[a-z]", name)}
    overridden = private & set(dir(Trainer))
    listed = set(re.findall(r"^\| `(_\w+)` \|", DESIGN.read_text(), flags=re.MULTILINE))
    assert overridden == listed
    assert len(listed) == 9


def test_a_subclass_may_answer_for_the_teacher_without_knowing_of_feature_maps(tmp_path: Path):
    """The method is public: one of the signature that it had must go on working."""

    class Answering(DistillationTrainer):
        asked = 0

        def teacher_logits(self, inputs):
            self.asked += 1
            return super().teacher_logits(inputs)

    trainer = Answering(
        tiny_student(), arguments(tmp_path), teacher=tiny_teacher(), train_dataset=Squares(4)
    )
    trainer.train()
    assert trainer.asked == trainer.state.global_step > 0
