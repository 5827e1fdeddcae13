"""Batches of one image, which a BatchNorm behind a pooling to one pixel cannot normalise."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from preflight_runs import flags
from small_runs import write_pairs
from tiny import arguments
from torch import nn

from kd_trainer import data as data_package
from kd_trainer.build import build_run, smallest_batch
from kd_trainer.config import parse
from kd_trainer.data import TransformedDataset
from kd_trainer.doctor.checks import QUICK, Preflight
from kd_trainer.errors import is_own, run_script, user_message


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("batches") / "data", train=5, validation=1)


def deeplab(data: Path, output: Path, *more: str) -> list[str]:
    given = flags(data, output, "--student_arch", "deeplabv3", *more)
    start = given.index("--decoder_channels")
    return given[:start] + given[start + 6 :] + ["--decoder_channels", "16"]


@pytest.mark.parametrize(
    ("more", "got"),
    [
        (("--batch_size", "1"), "got --batch_size 1. Set --batch_size 2 or more"),
        (
            ("--dataloader_drop_last", "false"),
            "got a last batch of one (5 images, --dataloader_drop_last false). Set "
            "--dataloader_drop_last true, or another --batch_size",
        ),
        (("--dataloader_drop_last", "false", "--streaming"), "got a last batch of one (5 images"),
    ],
)
def test_a_batch_of_one_is_refused_before_the_training(more, got: str, data: Path, tmp_path: Path):
    """torch says so at the end of the first epoch, in its own words and without the cure."""
    with pytest.raises(ValueError, match="at least 2 images for DeepLabV3, .*" + re.escape(got)):
        build_run(parse(deeplab(data, tmp_path / "out", *more)))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--dataloader_drop_last", "false", "--batch_size", "3"),
        ("--batch_size", "4"),
        ("--dataloader_drop_last", "false", "--batch_size", "4", "--max_steps", "1"),
    ],
)
def test_other_batches_are_taken(more, data: Path, tmp_path: Path):
    """No batch of one occurs: a short last batch is dropped, holds two, or comes after the run."""
    build_run(parse(deeplab(data, tmp_path / "out", *more)))


def test_networks_that_can_are_given_batches_of_one(data: Path, tmp_path: Path):
    """A U-Net normalises over the pixels of its one image; the random state is left alone."""
    states = []
    for size in ("1", "2"):
        build_run(parse(flags(data, tmp_path / "out", "--batch_size", size)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("images", "batch", "processes", "drop", "streamed", "smallest"),
    [
        (9, 4, 1, True, False, 4),
        (9, 4, 1, False, False, 1),
        (8, 4, 1, False, False, 4),
        (3, 4, 1, False, False, 3),
        (9, 4, 2, False, False, 4),  # accelerate fills it up
        (11, 4, 2, False, True, 1),  # five rows each
    ],
)
def test_smallest_batch_of_an_epoch(images, batch, processes, drop, streamed, smallest, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=batch, dataloader_drop_last=drop)
    assert smallest_of(args, images, processes, streamed) == smallest


@pytest.mark.parametrize(
    ("length", "smallest"),
    [
        ({"max_steps": 2}, 4),
        ({"max_steps": 3}, 1),
        ({"max_steps": 2, "num_train_epochs": 9}, 4),
        ({"max_steps": 1, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 1),
        ({"num_train_epochs": 0.6}, 4),
        ({"num_train_epochs": 0.7}, 1),  # three updates, as the Trainer rounds up
    ],
)
def test_a_short_batch_that_the_run_never_reaches_does_not_count(length, smallest, tmp_path):
    """Nine images in batches of four: the last of three batches holds one of them."""
    args = arguments(tmp_path, per_device_train_batch_size=4, dataloader_drop_last=False, **length)
    assert smallest_of(args, 9, 1, False) == smallest


def smallest_of(args, images: int, processes: int, streamed: bool) -> int:
    class Several(type(args)):
        world_size = processes

    args.__class__ = Several
    return smallest_batch(images, args, streamed=streamed)


def test_a_preflight_of_a_single_image_takes_it_twice(data: Path, tmp_path: Path):
    """The run has batches of two; a look at one image must not fail where the run does not."""
    more = ("--eval_strategy", "no", "--save_strategy", "no")
    run = parse(deeplab(data, tmp_path / "out", *more))
    parts = build_run(run)
    whole = parts.train_dataset
    assert isinstance(whole, TransformedDataset)
    one = TransformedDataset(whole.dataset.select([0]), whole.transform, [])
    looked = Preflight(run, dataclasses.replace(parts, train_dataset=one), QUICK)
    assert {f.check: str(f.grade) for f in looked.findings()}["loss terms"] == "ok"


def test_errors_of_torch_keep_their_traceback(capsys):
    """Its "Expected more than 1 value per channel" is a defect of ours, and no advice to a user."""

    def fail() -> None:
        nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))

    with pytest.raises(ValueError, match=r"^Expected more than 1 value") as caught:
        run_script(fail)
    assert not is_own(caught.value)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"^Expected --image_size") as own:
        parse(["--image_size", "big"])
    assert user_message(own.value) == str(own.value)


WORKER = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "{file}", line 7, in function
    raise error
ValueError: Expected a thing, got
another."""


def test_errors_of_data_workers_are_told_by_the_file_that_raised_them():
    """They arrive as text, raised again by torch."""
    assert user_message(ValueError(WORKER.format(file=data_package.__file__))) == (
        "Expected a thing, got another."
    )
    assert user_message(ValueError(WORKER.format(file=nn.__file__))) is None
