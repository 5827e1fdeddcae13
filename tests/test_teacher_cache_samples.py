"""Samples with cached logits: the same images and labels, and logits that moved with them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from kd_trainer.data import MaskRule, SegmentationTransform, TransformedDataset, collate
from kd_trainer.data.augmentation import OUTSIDE, Augmentation

SIZE = 64
KINDS = ("heavy", "light", "none")


def augmentation(kind: str, seed: int = 0) -> Augmentation:
    return Augmentation(kind, image_size=SIZE, seed=seed, brightness_contrast_probability=0.8)


def encoded(array: np.ndarray) -> dict[str, object]:
    return {"bytes": cv2.imencode(".png", array)[1].tobytes(), "path": "x.png"}


def rows(count: int) -> list[dict[str, object]]:
    """Smooth images with discs as masks, larger than the samples."""
    made = []
    for index in range(count):
        draw = np.random.default_rng(index)
        image = cv2.resize(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8), (90, 80))
        mask = np.zeros((80, 90), np.uint8)
        cv2.circle(mask, (30 + index, 40), 20, 1, -1)
        made.append({"image": encoded(image), "mask": encoded(mask) if index % 3 else None})
    return made


class Known:
    """Logits that are a function of the file's bytes, with several classes."""

    def logits(self, data: bytes, name: str) -> np.ndarray:
        draw = np.random.default_rng(len(data))
        coarse = draw.normal(0, 5, (3, 8, 8)).astype(np.float32)
        return np.stack([cv2.resize(one, (SIZE, SIZE)) for one in coarse]).astype(np.float16)


def dataset(kind: str, targets: Known | None = None) -> TransformedDataset:
    transform = SegmentationTransform(
        SIZE, MaskRule((0, 1)), augmentation=kind, seed=3, brightness_contrast_probability=0.8
    )
    transform.targets = targets
    return TransformedDataset(rows(24), transform)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_labels_are_those_of_the_online_run(kind: str):
    """A third target must not draw anything: else the two ways could not be compared."""
    online, cached = dataset(kind), dataset(kind, Known())
    for epoch in range(3):
        online.set_epoch(epoch)
        cached.set_epoch(epoch)
        for index in range(len(online)):
            one, other = online[index], cached[index]
            logits = other.pop("teacher_logits")
            assert (logits.dtype, tuple(logits.shape)) == (torch.float16, (3, SIZE, SIZE))
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert torch.equal(value, other[name]), (epoch, index, name)


def test_a_batch_carries_the_logits_as_two_bytes_each():
    """As floats they would be the largest part of what workers hand over."""
    samples = dataset("heavy", Known())
    batch = collate([samples[0], samples[1]])
    assert batch["teacher_logits"].dtype == torch.float16
    assert tuple(batch["teacher_logits"].shape) == (2, 3, SIZE, SIZE)


def test_without_augmentation_the_logits_come_as_they_are():
    row, sample = rows(1)[0], dataset("none", Known())[0]
    expected = Known().logits(row["image"]["bytes"], "x")
    np.testing.assert_array_equal(sample["teacher_logits"].numpy(), expected)


def marks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, a mask and logits that all say the column of each pixel."""
    columns = np.tile(np.arange(SIZE), (SIZE, 1))
    image = np.repeat(columns[..., None].astype(np.uint8), 3, axis=2)
    return image, columns.astype(np.int16), columns[..., None].astype(np.float32)


def test_flips_of_the_logits_are_exact():
    """Mirrored logits of an unmirrored image teach that left is right."""
    augment, flipped = augmentation("heavy"), 0
    for index in range(40):
        _, mask, logits = augment.with_logits(*marks(), epoch=0, index=index)
        np.testing.assert_array_equal(logits[..., 0], mask)
        flipped += bool(mask[0, 0] != 0)
    assert 8 < flipped < 32


def test_affine_changes_move_the_logits_with_the_mask():
    """A shift of a pixel would teach borders that are nowhere in the image."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    distance = 18 - np.hypot(x - 30, y - 28)  # positive inside a disc: logits of that class
    maps = np.stack([np.zeros_like(distance), distance, 2 * distance - 9], axis=-1)
    mask = np.where(distance > 0, 1, 0) + np.where(distance - 9 > 0, 1, 0)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    augment, wrong, inside, moved = augmentation("light"), 0, 0, 0
    for index in range(60):
        _, labels, logits = augment.with_logits(
            image, mask.astype(np.int16), maps, epoch=0, index=index
        )
        seen = labels != OUTSIDE
        inside += int(seen.sum())
        wrong += int((logits.argmax(-1) != labels)[seen].sum())
        moved += int((labels != mask).sum())
    assert moved > 0.02 * inside  # the images were changed at all
    assert wrong < 0.02 * inside  # pixels on the two circles, which nearest rounds


def test_the_edge_of_the_image_does_not_fade():
    """Interpolating with what lies outside would halve the logits along the border."""
    image, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.int16)
    logits = np.full((SIZE, SIZE, 1), 8.0, np.float32)
    augment, outside = augmentation("light"), 0
    for index in range(40):
        _, labels, moved = augment.with_logits(image, mask, logits, epoch=0, index=index)
        np.testing.assert_allclose(moved[labels != OUTSIDE], 8.0, rtol=1e-6)
        outside += int((labels == OUTSIDE).any())
    assert outside > 10


@pytest.mark.parametrize("channels", [1, 2, 5, 9])
def test_any_number_of_classes_is_moved(channels: int):
    """cv2 takes four channels at a time, and drops the last axis of one."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(SIZE, SIZE, channels)).astype(np.float32)
    image, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.int16)
    augment = augmentation("light")
    for index in range(6):
        whole = augment.with_logits(image, mask, logits, epoch=0, index=index)[2]
        assert whole.shape == logits.shape
        for k in range(channels):
            alone = augment.with_logits(image, mask, logits[..., [k]], epoch=0, index=index)[2]
            np.testing.assert_array_equal(alone[..., 0], whole[..., k])


def test_colour_and_noise_leave_the_logits_alone():
    """They are of the clean image, whatever was done to what the student sees."""
    logits = np.random.default_rng(1).normal(size=(SIZE, SIZE, 1)).astype(np.float32)
    image = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    augment, changed = augmentation("heavy"), 0
    for index in range(40):
        mask = marks()[1]
        augmented, columns, moved = augment.with_logits(image, mask, logits, epoch=0, index=index)
        flip = columns[0, 0] != 0
        np.testing.assert_array_equal(moved, logits[:, ::-1] if flip else logits)
        changed += int((augmented != (image[:, ::-1] if flip else image)).any())
    assert changed > 30
