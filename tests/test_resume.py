"""A run that was interrupted and resumed is the run that never was, bit for bit on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from same_run import assert_resumes_exactly
from timm.layers import DropPath
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.data import StreamedDataset, TransformedDataset, load_splits, transforms
from kd_trainer.data_arguments import DataArguments
from kd_trainer.trainer import DistillationTrainer

STAGED = {"unfreeze_start_epoch": 1, "unfreeze_every": 1, "warmup_epochs": 1}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def splits() -> Any:
    data = DataArguments(
        dataset="synthetic",
        image_size=SIDE,
        synthetic_train=6,
        synthetic_eval=2,
        augmentation="heavy",
    )
    loaded = load_splits(data)
    return loaded, transforms(loaded, data, seed=0)


def maker(train: Any, evaluated: Any = None, encoder: str = "mobilenet_v2", **options: Any) -> Any:
    """Makes trainers; only output folder, saving and the student's first weights change."""

    options = {"load_best_model_at_end": False, **options}
    first, teacher = tiny_student(encoder), tiny_teacher()
    # At the few per cent of these blocks, other draws would hardly ever give other weights.
    for block in first.modules():
        if isinstance(block, DropPath):
            block.drop_prob = 0.5

    def make(folder: Path, *, blank: bool = False, **more: Any) -> DistillationTrainer:
        student = copy.deepcopy(first)
        if blank:  # so that every weight has to come from the checkpoint
            student.load_state_dict({k: v * 0 for k, v in student.state_dict().items()})
        return DistillationTrainer(
            student,
            arguments(folder, **{**options, **more}),
            teacher=teacher,
            train_dataset=train,
            eval_dataset=evaluated,
        )

    return make


def test_with_droppath_augmentation_and_staged_unfreezing(tmp_path: Path, splits: Any):
    """Every update of a real encoder: inside epochs, at their ends, where units are freed.

    Logs every two updates, so that some interruptions fall between two of them; sums that started
    anew would give the next log other means. Evaluated at each update that is saved.
    """
    loaded, (augmented, clean) = splits
    make = maker(
        TransformedDataset(loaded["train"], augmented),
        TransformedDataset(loaded["validation"], clean),
        "timm-efficientnet-b0",
        num_train_epochs=3,
        logging_steps=2,
        temperature_per="step",
        **STAGED,
        **EACH_STEP,
    )
    assert_resumes_exactly(make, tmp_path, [1, 2, 3, 5, 6])


def test_with_accumulation_and_bf16(tmp_path: Path):
    """The last update of each epoch has one micro-batch instead of two.

    The rates fall otherwise than along the cosine of the other tests.
    """
    make = maker(
        Squares(6),
        gradient_accumulation_steps=2,
        mixed_precision="bf16",
        num_train_epochs=3,
        logging_steps=3,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 0.9},
        **STAGED,
    )
    assert_resumes_exactly(make, tmp_path, [1, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(tmp_path: Path, splits: Any, persistent: bool):
    """The seed of the workers is drawn once a run or once an epoch: never from DropPath's draws."""
    loaded, (augmented, _) = splits
    make = maker(
        TransformedDataset(loaded["train"], augmented),
        encoder="timm-efficientnet-b0",
        num_train_epochs=3,
        dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
    )
    assert_resumes_exactly(make, tmp_path, [3, 4])


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
def test_with_a_stream(tmp_path: Path, shuffle: bool):
    """A buffer of shuffled rows is not saved: it is filled again from the epoch's first row."""
    data = DataArguments(
        dataset="synthetic",
        image_size=SIDE,
        synthetic_train=7,
        streaming=True,
        augmentation="light",
    )
    rows = load_splits(data, ["train"])
    transform, _ = transforms(rows, data, seed=0)
    stream = StreamedDataset(
        rows["train"], transform, shuffle=shuffle, seed=3, batch_size=2, buffer_size=3
    )
    make = maker(stream, num_train_epochs=3, logging_steps=2)
    assert_resumes_exactly(make, tmp_path, [1, 3])


def test_saved_at_the_last_update_of_an_epoch_that_is_evaluated_at_its_end(tmp_path: Path):
    """Saved before the evaluation, the resumed run would begin the next epoch without one."""
    make = maker(Squares(4), Squares(2, offset=50), eval_strategy="epoch", num_train_epochs=3)
    assert_resumes_exactly(make, tmp_path, [1, 2, 4])
