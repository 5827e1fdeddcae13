"""What makes the data path fast, without a clock."""

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.data import in_library, members
from kd_trainer.data import MaskRule, SegmentationTransform, dataset, images, mask_files
from kd_trainer.data.augmentation import Augmentation

SIZE = 32


def png(pixels):
    return {"bytes": cv2.imencode(".png", pixels)[1].tobytes(), "path": None}


def heavy():
    return Augmentation("heavy", image_size=SIZE, seed=0, brightness_contrast_probability=0.8)


def counted(monkeypatch, owner, name):
    """Count the calls of `owner.name`, which still does its work."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_a_sample_reads_and_decodes_each_file_once(monkeypatch, tmp_path):
    """A second look at a file costs a third of the sample and changes no result."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mask = (np.indices((40, 50)).sum(0) > 50).astype(np.uint8)
    files = {"image": tmp_path / "a.jpg", "mask": tmp_path / "a.png"}
    cv2.imwrite(str(files["image"]), image)
    cv2.imwrite(str(files["mask"]), mask)
    make = SegmentationTransform(
        SIZE, MaskRule((0, 1)), augmentation="heavy", seed=0, brightness_contrast_probability=0.8
    )
    row = {name: {"bytes": None, "path": str(file)} for name, file in files.items()}
    opens = counted(monkeypatch, Image, "open")
    loads = counted(monkeypatch, mask_files, "load_image")
    decodes = counted(monkeypatch, cv2, "imdecode")
    reads = counted(monkeypatch, images, "read_image_bytes")
    mask_reads = counted(monkeypatch, mask_files, "read_image_bytes")
    resizes = counted(monkeypatch, dataset, "resize_image")
    index = next(i for i in range(99) if not compresses(make, i))
    make(row, epoch=0, index=index)
    assert len(reads) == len(mask_reads) == 1
    assert len(opens) == 2
    assert len(loads) == 1
    assert len(decodes) == 1
    assert len(resizes) == 1


def compresses(make, index):
    """Whether this draw has the JPEG compression, which decodes as well."""
    make.augment.compose.save_applied_params = True
    make.augment.reseed(epoch=0, index=index)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    applied = make.augment.compose(image=image)["applied_transforms"]
    make.augment.compose.save_applied_params = False
    return any(name == "ImageCompression" for name, _ in applied)


def test_an_image_that_cv2_cannot_take_is_opened_once(monkeypatch):
    transparent = png(np.full((9, 9, 4), 200, np.uint8))
    opens = counted(monkeypatch, Image, "open")
    assert images.decode_image(transparent, 0).shape == (9, 9, 3)
    assert len(opens) == 1


def test_no_float_image_passes_between_transforms():
    """Floats are four times as many bytes for every later step and for the way to the device."""
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    names = []
    for member, _ in members(heavy().compose):
        member.p = 1.0
        changed = member(image=image.copy())["image"]
        assert (changed.dtype, changed.shape) == (np.uint8, image.shape), type(member)
        names.append(type(member).__name__)
    assert len(names) == 17


def test_the_slow_fog_is_not_in_the_list():
    """It takes longer than all other transforms of the list together."""
    used = {type(member).__name__ for member, _ in members(heavy().compose)}
    assert "SoftFog" in used
    assert "RandomFog" not in used


def test_the_library_list_holds_the_originals_with_our_settings():
    """A comparison with other settings, or with ourselves, would still print a ratio."""
    for ours, _ in members(heavy().compose):
        theirs = in_library(ours)
        assert type(theirs).__module__.startswith("albumentations")
        assert theirs is ours or theirs.get_transform_init_args() == ours.get_transform_init_args()
    probabilities = [p for _, p in members(heavy().compose)]
    assert sum(probabilities) == pytest.approx(0.5 + 0.8 + 0.8 + 0.1 + 0.05 + 0.05 + 0.1)
