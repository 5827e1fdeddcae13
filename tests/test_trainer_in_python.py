"""What a script may hand to the trainer: it works, or one line says what is expected."""

from pathlib import Path

import pytest
import torch
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from transformers import TrainerCallback

from kd_trainer.evaluation import evaluation_rows
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
        arguments(folder, max_steps=2, **options),
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


@pytest.mark.slow
def test_data_that_draws_freely_can_be_resumed(tmp_path: Path):
    """Two draws of its samples differ anyway, and say nothing about the images."""
    noise = lambda values: values + torch.randint(0, 9, values.shape, dtype=values.dtype)  # noqa: E731
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, data=Changed(4, pixel_values=noise), **options).train()
    resumed = trainer_of(tmp_path, data=Changed(4, pixel_values=noise), **options)
    resumed.train(str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
