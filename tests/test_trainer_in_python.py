"""What a script may hand to the trainer: it works, or one line says what is expected."""

from pathlib import Path

import pytest
import torch
from same_run import assert_same_tensors
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd_trainer.arguments import DistillationArguments
from kd_trainer.evaluation import evaluation_rows, normalise
from kd_trainer.teacher import Teacher
from kd_trainer.trainer import DistillationTrainer


class Changed(Squares):
    """The squares with some entries replaced."""

    def __init__(self, length: int, **changes) -> None:
        super().__init__(length)
        self.changes = changes

    def __getitem__(self, index: int):
        sample = super().__getitem__(index)
        for name, change in self.changes.items():
            sample[name] = change(sample[name])
        return sample


def trainer_of(folder: Path, *, data=None, teacher="tiny", student=None, more=None, **options):
    return DistillationTrainer(
        tiny_student() if student is None else student,
        arguments(folder, **({"max_steps": 2} | options)),
        teacher=tiny_teacher() if teacher == "tiny" else teacher,
        train_dataset=Squares(4) if data is None else data,
        eval_dataset=Squares(2, offset=50),
        **(more or {}),
    )


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_float_labels_are_refused_and_not_truncated(tmp_path: Path):
    """0.9 of a mask that was scaled or resized would silently be background."""
    trainer = trainer_of(tmp_path, data=Changed(4, labels=lambda labels: labels * 0.9))
    with pytest.raises(TypeError, match=r"^Expected integer labels, got torch\.float32"):
        trainer.train()
    logits, labels = torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), 0.9)
    with pytest.raises(TypeError, match=r"^Expected integer labels, got torch\.float32"):
        evaluation_rows(logits, None, labels, trainer.settings, teacher_figures=False)


def test_a_teacher_in_train_mode_neither_drifts_nor_drops(tmp_path: Path):
    """Its statistics would follow the student's batches, and its logits with them."""
    teacher = tiny_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.network.train()
    trainer_of(tmp_path, teacher=teacher, fold_teacher=False).train()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("whole", [False, True])
def test_a_teacher_that_a_callback_changes_is_asked_as_it_is(tmp_path: Path, whole: bool):
    """A folded copy that is kept would teach what the teacher no longer says."""
    other = tiny_teacher(seed=8)

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if whole:
                trainer.teacher = other
            else:
                trainer.teacher.load_state_dict(other.state_dict())

    trainer = trainer_of(tmp_path, more={"callbacks": [Change()]})
    figures = trainer.evaluate()
    trainer.train()
    batch = {"pixel_values": pixels()}
    torch.testing.assert_close(
        trainer.teacher_logits(batch), other(batch["pixel_values"]), rtol=1e-3, atol=1e-3
    )
    assert trainer.evaluate()["eval_teacher_miou"] != figures["eval_teacher_miou"]


def test_a_teacher_is_fed_with_the_statistics_of_the_student(tmp_path: Path):
    """A teacher loaded in a script knows no student: ImageNet's statistics would be assumed."""
    student = tiny_student()
    student.config.image_mean, student.config.image_std = [0.5] * 3, [0.25] * 3
    network = tiny_student(seed=7)
    trainer = trainer_of(tmp_path, student=student, teacher=Teacher(network, num_labels=2))
    values = torch.rand(2, 3, SIDE, SIDE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.config.image_mean, [1.0] * 3))
    std = torch.tensor(network.config.image_std).view(1, 3, 1, 1)
    expected = network.eval()((values - mean) / std)["raw_logits"]
    got = trainer.teacher_logits({"pixel_values": (values - 0.5) / 0.25})
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_removing_unused_columns_leaves_what_the_loss_reads(tmp_path: Path):
    """Without `distil_mask` an image without labels teaches nothing."""
    data = Changed(4, labels=lambda labels: torch.full_like(labels, 255))
    trainer = trainer_of(tmp_path, data=data, remove_unused_columns=True)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0


def test_a_resume_on_other_images_of_the_same_number_is_refused(tmp_path: Path):
    """The run would go on with other data and call itself the same."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="the training images or masks are not those"):
        trainer_of(tmp_path, data=Squares(4, offset=9), **options).train(checkpoint)
    trainer_of(tmp_path, **options).train(checkpoint)


def test_a_resume_on_the_data_set_that_was_trained_on_goes_on(tmp_path: Path):
    """In a notebook it is the same object, which stands at its last epoch."""

    class Drawn(Squares):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> dict:
            sample = super().__getitem__(index)
            return sample | {"pixel_values": sample["pixel_values"] + self.epoch}

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 4}
    data = Drawn(4)
    trainer_of(tmp_path, data=data, **options).train()
    assert data.epoch > 0
    trainer_of(tmp_path, data=data, **options).train(str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_data_that_draws_freely_can_be_resumed(tmp_path: Path):
    """Two draws of its samples differ anyway, and say nothing about the images."""
    noise = lambda values: values + torch.randint(0, 9, values.shape, dtype=values.dtype)  # noqa: E731
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, data=Changed(4, pixel_values=noise), **options).train()
    resumed = trainer_of(tmp_path, data=Changed(4, pixel_values=noise), **options)
    resumed.train(str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def sgd(network=None, *, lr: float = 1e-3, **options) -> torch.optim.SGD:
    """As the arguments of these tests have rate and weight decay."""
    parameters = (network or nn.Linear(1, 1)).parameters()
    decay = {"weight_decay": DistillationArguments.weight_decay}
    return torch.optim.SGD(parameters, lr=lr, **(decay | options))


def test_an_optimizer_of_the_users_gets_the_groups_of_the_free_parts(tmp_path: Path):
    """Left with its one group it would go on training what is frozen, at one rate for all."""
    student = tiny_student()
    rates = {"learning_rate": 1e-3, "max_steps": -1, "num_train_epochs": 3}
    options = rates | {"unfreeze_start_epoch": 1, "unfreeze_every": 1}
    given = sgd(student, momentum=0.7)
    trainer = trainer_of(tmp_path, student=student, more={"optimizers": (given, None)}, **options)
    trainer.train()
    assert [group["name"] for group in given.param_groups[::2]] == ["decoder", "unit_1", "unit_0"]
    assert {group["momentum"] for group in given.param_groups} == {0.7}
    same = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.7})}
    other = trainer_of(tmp_path, more=same, **options)
    other.train()
    assert_same_tensors(other.model.state_dict(), student.state_dict())


@pytest.mark.parametrize(
    ("more", "start"),
    [
        ({"compute_loss_func": print}, "Expected no compute_loss_func, got one"),
        (
            {"optimizers": (None, torch.optim.lr_scheduler.ConstantLR(sgd()))},
            "Expected no scheduler in optimizers, got a ConstantLR",
        ),
        ({"optimizers": (sgd(lr=0.5), None)}, "Expected lr of the optimizer to be learning_rate"),
        ({"preprocess_logits_for_metrics": print}, "Expected no preprocess_logits_for_metrics"),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})},
            "Expected lr as learning_rate of the arguments",
        ),
    ],
)
def test_what_could_only_be_ignored_is_refused_by_name(tmp_path: Path, more, start):
    """A loss or optimizer that is taken and not used gives another run than was asked for."""
    with pytest.raises(ValueError, match=f"^{start}"):
        trainer_of(tmp_path, more=more)


def test_other_networks_and_arguments_end_in_one_line(tmp_path: Path):
    """Errors from inside the Trainer do not say what it is that does not fit."""
    with pytest.raises(TypeError, match=r"^Expected a network as student, got str"):
        trainer_of(tmp_path, student="unet")
    with pytest.raises(TypeError, match=r"^Expected a student as model, or a function .*got both"):
        trainer_of(tmp_path, more={"model_init": tiny_student})
    with pytest.raises(TypeError, match=r"^Expected a kd_trainer.Teacher, got Conv2d\. Wrap it"):
        trainer_of(tmp_path, teacher=nn.Conv2d(3, 1, 1))
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match=r"^Expected args as DistillationArguments, got Training"):
        DistillationTrainer(tiny_student(), plain)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_names", ["mask"]),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("train_sampling_strategy", "group_by_length"),
    ],
)
def test_settings_that_do_nothing_here_are_refused_by_name(tmp_path: Path, option, value):
    """They were taken without a word, or ended in a traceback of torch."""
    with pytest.raises(ValueError, match=f"^Expected .*--{option}"):
        arguments(tmp_path, **{option: value})


def test_an_own_optimizer_class_and_own_metrics_are_used(tmp_path: Path):
    """Both are what a script changes first."""
    more = {
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5}),
        "compute_metrics": lambda prediction: {"images": float(len(prediction.predictions[0]))},
    }
    trainer = trainer_of(tmp_path, more=more, teacher=tiny_student(seed=7))
    figures = trainer.evaluate()
    assert figures["eval_images"] == 2
    assert "eval_miou" in figures
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    trainer.own_metrics = lambda prediction: {"miou": 1.0}
    with pytest.raises(ValueError, match=r"^Expected other names .*, got miou"):
        trainer.evaluate()


def test_several_evaluation_sets_are_measured_each(tmp_path: Path):
    """The Trainer takes a dict of them; the best student is then found by one of them."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    sets = {"day": Squares(2, offset=50), "night": Squares(2, offset=60)}
    args = arguments(tmp_path, max_steps=2, panel_images=1, **options)
    data = {"train_dataset": Squares(4), "eval_dataset": sets, "teacher": tiny_teacher()}
    with pytest.raises(ValueError, match="There are day_miou"):
        DistillationTrainer(tiny_student(), args, **data)
    args.metric_for_best_model = "night_miou"
    of_a_term = arguments(tmp_path, metric_for_best_model="night_kl", **options)
    assert of_a_term.greater_is_better is False  # else the worst student would be kept
    trainer = DistillationTrainer(tiny_student(), args, **data)
    trainer.train()
    keys = {key for log in trainer.state.log_history for key in log}
    assert {"eval_day_miou", "eval_night_miou", "eval_night_teacher_miou"} <= keys
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("floats", [False, True], ids=["bytes", "normalised"])
def test_panels_show_the_batches_of_the_trainers_own_collator(tmp_path: Path, floats: bool):
    """Samples of one's own have other names and types; ours would fail at the first evaluation."""

    class Arrays(Squares):
        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            return {"photo": sample["pixel_values"].numpy(), "mask": sample["labels"].numpy()}

    def stack(samples):
        names = {"pixel_values": "photo", "labels": "mask"}
        batch = {n: torch.stack([torch.tensor(s[k]) for s in samples]) for n, k in names.items()}
        if floats:
            batch["pixel_values"] = normalise(batch["pixel_values"], trainer.statistics)
        return batch

    trainer = DistillationTrainer(
        tiny_student(),
        arguments(tmp_path, panel_images=2),
        train_dataset=Arrays(4),
        eval_dataset=Arrays(2),
        data_collator=stack,
    )
    plain = arguments(tmp_path / "plain", panel_images=2)
    for one in (trainer, DistillationTrainer(tiny_student(), plain, eval_dataset=Squares(2))):
        one.evaluate()
    name = Path("panels", "step_000000.png")
    assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_prediction_is_the_logits_of_each_image(tmp_path: Path, labelled: bool):
    """Users of transformers expect them; counts say nothing about a single image."""

    class Bare(Squares):
        def __getitem__(self, index: int):
            return {"pixel_values": super().__getitem__(index)["pixel_values"]}

    def bare_collate(samples):
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}

    more = {} if labelled else {"data_collator": bare_collate}
    trainer = trainer_of(tmp_path, more=more)
    data = Squares(3, offset=50)
    output = trainer.predict(data if labelled else Bare(3, offset=50))
    pixels = torch.stack([data[index]["pixel_values"] for index in range(3)])
    inputs = normalise(pixels, trainer.statistics)
    with torch.no_grad():
        wanted = trainer.model.eval()(inputs).raw_logits
    assert output.predictions.shape == (3, 1, SIDE, SIDE)
    assert torch.allclose(torch.from_numpy(output.predictions), wanted, atol=1e-5)
    assert ("test_miou" in output.metrics) == labelled
    if labelled:
        assert torch.equal(torch.from_numpy(output.label_ids[1]), data[1]["labels"])
        assert output.metrics["test_miou"] == trainer.evaluate(data)["eval_miou"]
    else:
        with pytest.raises(ValueError, match=r"^Expected labels in every sample, got pixel_values"):
            trainer.evaluate(Bare(2))


def test_a_function_makes_the_student_of_each_training(tmp_path: Path):
    """A second training would go on from the weights of the first."""
    options = {"train_dataset": Squares(4), "model_init": lambda: tiny_student()}
    trainer = DistillationTrainer(args=arguments(tmp_path, max_steps=2), **options)
    trainer.train()
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(first[name], v) for name, v in trainer.model.state_dict().items())


def test_a_search_trains_each_trial_as_its_arguments_say(tmp_path: Path):
    """Weights and schedules are derived from the arguments, which a search changes afterwards."""
    pytest.importorskip("optuna")
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            schedule = trainer.schedule
            seen.append((trainer.loss_weights.kl, schedule.temperature(0), schedule.epochs))

    trainer = DistillationTrainer(
        args=arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch"),
        model_init=lambda trial: tiny_student(),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
        eval_dataset=Squares(2, offset=50),
        callbacks=[Watch()],
    )

    def space(trial):
        return {
            "kl_weight": trial.suggest_categorical("kl_weight", [0.1]),
            "temperature_start": trial.suggest_categorical("temperature_start", [8.0]),
            "num_train_epochs": trial.suggest_categorical("num_train_epochs", [1]),
        }

    best = trainer.hyperparameter_search(space, n_trials=2, backend="optuna")
    assert seen == [(0.1, 8.0, 1)] * 2
    assert 0 <= best.objective <= 1  # the mIoU, not the sum of all figures
    assert (tmp_path / "run-1" / "checkpoint-2" / "COMPLETE.json").is_file()


def test_streams_are_read_as_the_arguments_say(tmp_path: Path):
    """Each of these settings was honoured for tables alone."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (Squares(4)[index] for index in range(4))

    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3}
    trainer = trainer_of(tmp_path, data=Stream(), **options)
    loader = trainer.get_train_dataloader()
    assert loader.prefetch_factor == 3
    trainer.args.dataloader_pin_memory = True
    assert trainer.get_train_dataloader().pin_memory


def test_a_prediction_has_the_precision_of_its_own_trainer(tmp_path: Path):
    """accelerate leaves the first trainer's autocast on a student that a second one is given."""
    student = tiny_student()
    trainer_of(tmp_path / "a", student=student, mixed_precision="bf16").train()
    again = trainer_of(tmp_path / "b", student=student)
    predicted = again.predict(Squares(4, offset=50)).metrics["test_loss"]
    assert predicted == again.evaluate(Squares(4, offset=50))["eval_loss"]


def test_an_evaluation_before_the_training_leaves_the_student_to_be_prepared(tmp_path: Path):
    """accelerate takes it for prepared: under DDP each process would train on its own."""
    trainer = trainer_of(tmp_path)
    trainer.evaluate()
    prepared = []
    prepare = trainer.accelerator.prepare_model

    def watched(model, **options):
        prepared.append(vars(model).get("_is_accelerate_prepared", False))
        return prepare(model, **options)

    trainer.accelerator.prepare_model = watched
    trainer.train()
    assert prepared[0] is False


def test_a_scheduler_that_cannot_follow_the_groups_is_refused(tmp_path: Path):
    """It would end in a traceback when the first unit is freed, or leave its rate at the base."""
    trainer = trainer_of(tmp_path)
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(TypeError, match=r"^Expected the scheduler that the trainer makes, got Lam"):
        trainer.train()


def test_a_save_begins_with_what_marks_it_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill right after the Trainer's own files would pass for a finished save of the Trainer."""
    seen = []
    write = Trainer._save_checkpoint

    def watched(self, *args):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        seen.append([file.name for file in folder.iterdir()])
        write(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", watched)
    trainer_of(tmp_path, save_strategy="steps", save_steps=1).train()
    assert seen
    assert all(names == ["progress_0.pt"] for names in seen)
