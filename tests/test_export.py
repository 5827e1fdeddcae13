"""Exports against torch: the same outputs at every size, in one file that says what it takes."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from small_runs import write_pairs
from test_scripts import Used
from tiny import SIDE, tiny_student
from torch import Tensor

from kd_trainer.commands.export import export_main
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import user_message
from kd_trainer.export import exporter as export_module
from kd_trainer.export.exporter import (
    RESULTS,
    ExportArguments,
    Exporter,
    export_student,
    from_images,
    int8_fault,
    read_program,
    spread,
    versions,
    write_program,
    write_smp,
)
from kd_trainer.export.graph import ExportGraph, export_program, metadata_of, read_metadata
from kd_trainer.export.onnx_file import OnnxStudent, load_onnx, save_onnx, write_half, write_onnx
from kd_trainer.export.parity import Parity, Reference, compare
from kd_trainer.export.quantize import PERCENTILE, Quantiser, part_name, parts_of, write_ranges
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.models.modeling import SmpForSemanticSegmentation

ROOT = Path(__file__).parents[1]
FOUR = {0: "background", 1: "skin", 2: "hair", 3: "clothes"}
SIZES = [(1, SIDE, SIDE), (3, SIDE, 2 * SIDE), (2, 3 * SIDE, SIDE + 8)]


def pictures(batch: int, height: int, width: int) -> Tensor:
    """uint8 (B, 3, H, W)."""
    random = torch.Generator().manual_seed(height * width + batch)
    return torch.randint(0, 256, (batch, 3, height, width), generator=random, dtype=torch.uint8)


def trained(id2label: dict[int, str] | None = None) -> SmpForSemanticSegmentation:
    """A tiny student whose outputs spread as those of a trained one."""
    student = tiny_student(id2label=id2label).eval()
    with torch.no_grad():
        head = student.segmentation_head[0]
        logits = Reference(student, probabilities=False)(pictures(4, SIDE, SIDE))
        head.weight *= 4 / logits.std()
        head.bias -= 4 * logits.mean() / logits.std()
    return student


@pytest.fixture(scope="module")
def student() -> SmpForSemanticSegmentation:
    return trained()


def test_a_folder_that_no_export_wrote_is_not_deleted(student, tmp_path: Path):
    """`student_smp` may be the folder of a model that was put there by hand."""
    mine = tmp_path / "student_smp" / "notes.txt"
    mine.parent.mkdir()
    mine.touch()
    args = ExportArguments(format="smp", output=str(tmp_path), images="*.png")
    with pytest.raises(ValueError, match=r"holds notes\.txt of another origin"):
        export_student(student, args, DataArguments())
    assert mine.is_file()


@pytest.fixture(scope="module")
def plain(student: SmpForSemanticSegmentation, tmp_path_factory) -> Path:
    """The binary student as ONNX: normalised floats in, logits out."""
    path = tmp_path_factory.mktemp("plain") / "student.onnx"
    metadata = metadata_of(student, with_preprocessing=False, precision="fp32")
    program = export_program(student, prune=False)
    write_onnx(program, path, metadata, with_preprocessing=False)
    return path


@pytest.fixture(scope="module")
def four() -> SmpForSemanticSegmentation:
    return trained(FOUR)


@pytest.fixture(scope="module")
def inside(four: SmpForSemanticSegmentation, tmp_path_factory) -> Path:
    """The student of four classes as ONNX: uint8 pictures in, probabilities out."""
    path = tmp_path_factory.mktemp("inside") / "student.onnx"
    metadata = metadata_of(four, with_preprocessing=True, precision="fp32")
    program = export_program(four, with_preprocessing=True, prune=False)
    write_onnx(program, path, metadata, with_preprocessing=True)
    return path


@pytest.fixture(scope="module")
def folder(student: SmpForSemanticSegmentation, tmp_path_factory) -> Path:
    """A run's folder with the binary student, and data beside it."""
    root = tmp_path_factory.mktemp("run")
    student.save_pretrained(root / "run" / "student")
    write_pairs(root / "data", train=4, validation=4)
    return root


@pytest.fixture
def quick(plain: Path, monkeypatch) -> Path:
    """Takes the ONNX file of the fixture instead of tracing anew."""

    def copied(exporter: Exporter) -> Path:
        return Path(shutil.copy(plain, exporter.work / "full.onnx"))

    monkeypatch.setattr(Exporter, "_write_full", copied)
    return plain


@pytest.fixture
def used(monkeypatch, capfd, tmp_path) -> Used:
    monkeypatch.chdir(tmp_path)
    return Used(monkeypatch, capfd)


def processed(student: SmpForSemanticSegmentation, images: Tensor) -> Tensor:
    processor = SmpImageProcessor.from_model_config(student.config)
    return processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def raw(student: SmpForSemanticSegmentation, images: Tensor) -> np.ndarray:
    return student(pixel_values=processed(student, images))["raw_logits"].numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnx_gives_the_logits_of_torch_at_every_size(size, student, plain):
    """A batch or side that the tracer took for a constant shows only at another one."""
    images = pictures(*size)
    found = load_onnx(plain)(processed(student, images).numpy())
    np.testing.assert_allclose(found, raw(student, images), atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_inside_is_the_processor_and_torch(size, four, inside):
    """A mean in the wrong unit or order of channels costs accuracy on the device only."""
    images = pictures(*size)
    found = load_onnx(inside)(images.permute(0, 2, 3, 1).numpy())
    wanted = torch.from_numpy(raw(four, images)).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


@torch.no_grad()
def test_probability_of_one_logit_is_its_sigmoid(student):
    """A softmax over one channel is 1 everywhere."""
    images = pictures(2, SIDE, SIDE)
    found = ExportGraph(student, with_preprocessing=True)(images.permute(0, 2, 3, 1)).numpy()
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-raw(student, images))), atol=1e-5)


def test_one_file_holds_only_what_is_used(student, plain):
    """Unused weights travel to every device, and external data gets lost on the way."""
    assert [p.name for p in plain.parent.iterdir()] == ["student.onnx"]
    dead = student.never_used_parameters()
    assert dead
    model = onnx.load(str(plain), load_external_data=False)
    names = {weight.name for weight in model.graph.initializer}
    assert not names & dead
    used = sum(p.numel() for n, p in student.named_parameters() if n not in dead)
    stored = sum(int(np.prod(weight.dims)) for weight in model.graph.initializer)
    assert 0.95 * used < stored <= used  # norms are folded into the convolutions
    assert plain.stat().st_size < 4 * used + 100_000


def test_weights_without_use_are_refused(plain, tmp_path):
    """The exporter leaves them out today; if it stops to, files grow in silence."""
    model = onnx.load(str(plain))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "ghost"))
    with pytest.raises(ValueError, match=r"uses every weight, got 1 unused: ghost"):
        save_onnx(model, tmp_path / "x.onnx", {})


def test_file_says_nothing_about_the_machine(plain):
    """The exporter writes stack traces with the user's paths into each node."""
    stored = plain.read_bytes()
    for word in (str(ROOT), "site-packages", 'File "', "stack_trace"):
        assert word.encode() not in stored


def test_file_alone_tells_how_to_run_it(student, plain):
    """A consumer has no config.json: mean, std, classes and sizes have to be in the file."""
    session = onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(json.loads(told[k]), np.float32) for k in ("image_mean", "image_std"))
    side, names = int(told["image_size"]), json.loads(told["class_names"])
    images = pictures(2, side, side)
    pixels = (images.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255 - mean) / std
    (found,) = session.run(["logits"], {"pixel_values": pixels.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, raw(student, images), atol=1e-4)
    assert names == ["background", "person"]
    assert (told["preprocessing"], told["size_multiple"]) == ("outside", "8")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


def test_half_is_half_as_large_and_takes_the_same_input(student, plain, tmp_path):
    """Sizes are the reason for fp16; other input types would break every consumer."""
    write_half(plain, tmp_path / "half.onnx", OnnxStudent(plain).metadata)
    assert (tmp_path / "half.onnx").stat().st_size < 0.52 * plain.stat().st_size
    images = pictures(2, SIDE, 2 * SIDE)
    found = load_onnx(tmp_path / "half.onnx")(processed(student, images).numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, raw(student, images), atol=0.05)


@pytest.fixture(scope="module")
def quantiser(student, plain, tmp_path_factory) -> Quantiser:
    batches = [processed(student, pictures(1, SIDE, SIDE + 8 * i)).numpy() for i in range(4)]
    work = tmp_path_factory.mktemp("work")
    return Quantiser(plain, batches, work, OnnxStudent(plain).metadata)


def stored_types(path: Path) -> dict[str, str]:
    """Element type of each convolution's weight by part of the network."""
    model = onnx.load(str(path))
    kinds = {w.name: onnx.TensorProto.DataType.Name(w.data_type) for w in model.graph.initializer}
    weights = {n: k for n, k in kinds.items() if ".weight" in n and k in ("FLOAT", "INT8")}
    return {part_name(n.removesuffix("_quantized")): k for n, k in weights.items()}


def test_int8_follows_torch_and_keeps_the_named_parts_exact(student, quantiser, tmp_path):
    """An export that left everything in fp32 would pass every comparison with torch."""
    images = pictures(2, SIDE, SIDE)
    pixels, wanted = processed(student, images).numpy(), raw(student, images)
    errors = []
    for left_out in ([], ["segmentation_head.0", "encoder.conv1"]):
        path = tmp_path / f"{len(left_out)}.onnx"
        quantiser.write(path, left_out=left_out)
        assert path.stat().st_size < 0.45 * quantiser.source.stat().st_size
        kinds = stored_types(path)
        assert {part for part, kind in kinds.items() if kind == "FLOAT"} == set(left_out)
        assert len(kinds) > 6
        errors.append(float(np.abs(load_onnx(path)(pixels) - wanted).mean()))
    assert errors[0] < 0.1 * wanted.std()
    assert errors[1] < errors[0]


def test_sensitivity_ranks_every_part(quantiser):
    """A part that is forgotten can never be left out."""
    order = quantiser.by_sensitivity()
    assert sorted(order) == sorted(p for p in quantiser.parts if p)


def test_unknown_part_is_refused_with_the_nearest(quantiser, tmp_path):
    """A misspelt part would be quantised after all."""
    with pytest.raises(ValueError, match=r"Did you mean encoder.conv1\?"):
        quantiser.write(tmp_path / "x.onnx", left_out=["encoder.conv"])


def test_ranges_are_percentiles_of_the_activations(student, plain, tmp_path):
    """Ranges that hold the rarest extreme cost more than a point of mIoU."""
    batches = [processed(student, pictures(1, SIDE, SIDE * k)).numpy() for k in (1, 2, 3)]
    write_ranges(plain, [{"pixel_values": b} for b in batches], tmp_path / "ranges.json")
    calibration = pytest.importorskip("onnxruntime.quantization.calibrate")
    low, high = calibration.load_tensors_data(tmp_path / "ranges.json")["logits"].range_value
    network = load_onnx(plain)
    values = np.concatenate([network(b).ravel() for b in batches])
    rest = (100 - PERCENTILE) / 2
    width = 2 * np.abs(values).max() / 2048  # of one bin
    wanted = np.percentile(values, [rest, 100 - rest])
    np.testing.assert_allclose([low, high], wanted, atol=4 * width)


def test_preprocessing_and_probabilities_are_never_quantised(inside):
    """In int8 a probability has 256 values, and a threshold of 0.999 means nothing."""
    model = onnx.load(str(inside))
    kinds = {node.name: node.op_type for node in model.graph.node}
    left = [kinds[name] for name in parts_of(model)[""]]
    assert "Softmax" in left
    assert {"Cast", "Transpose", "Sub", "Div"} & set(left)
    assert "Conv" not in left


class FakeQuantiser:
    def by_sensitivity(self) -> list[str]:
        return ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("exclude", "tries"),
    [
        (["auto"], [[], ["a"], ["a", "b"]]),
        (["none"], [[]]),
        (["b", "x"], [["b", "x"]]),
    ],
)
def test_the_most_sensitive_parts_are_left_out_one_by_one(exclude, tries):
    """More parts in fp32 than needed make the file larger and slower."""
    assert list(versions(FakeQuantiser(), exclude)) == tries


def parity(**changes: float | None) -> Parity:
    figures = {"mask_iou": 0.9, "miou": 0.80, "torch_miou": 0.804} | changes
    return Parity(images=1, largest_difference=1.0, value_range=2.0, **figures)


def test_int8_is_judged_by_the_true_masks_where_they_are_known():
    """Half a point of mIoU is the promise; other masks that are as good are no loss."""
    assert int8_fault(parity()) is None
    assert "got 0.60 (0.8040 to 0.7980)" in int8_fault(parity(miou=0.798))
    assert "got 0.9000" in int8_fault(parity(miou=None))
    assert int8_fault(parity(miou=None, mask_iou=0.97)) is None


def test_figures_of_the_comparison_are_those_counted_by_hand(student):
    """An IoU of the export with itself would be 1 for every export."""
    images = pictures(3, SIDE, SIDE)
    reference = Reference(student, probabilities=False)
    wanted = reference(images)
    truth = (wanted[:, 0] > 0).to(torch.uint8)
    truth[:, :4] = 255
    found = compare(reference, lambda _: wanted - 1, [(images, truth)])
    ours, theirs = wanted.numpy() > 0, wanted.numpy() - 1 > 0
    ious = [(a & b).sum() / (a | b).sum() for a, b in ((ours, theirs), (~ours, ~theirs))]
    assert found.mask_iou == pytest.approx(np.mean(ious))
    assert found.largest_difference == pytest.approx(1, abs=1e-5)
    assert found.value_range == pytest.approx(np.ptp(wanted.numpy()), rel=1e-5)
    assert found.torch_miou == 1
    ours, theirs = ours[:, :, 4:], theirs[:, :, 4:]
    ious = [(a & b).sum() / (a | b).sum() for a, b in ((ours, theirs), (~ours, ~theirs))]
    assert found.drop == pytest.approx(100 * (1 - np.mean(ious)))


def test_not_a_number_is_no_small_difference(student):
    """max() passes over NaN, and NaN is neither above nor below a bound."""
    images = pictures(1, SIDE, SIDE)
    reference = Reference(student, probabilities=False)
    found = compare(reference, lambda p: reference(p) * torch.nan, [(images, None)])
    assert found.relative_difference == np.inf


def settings(folder: Path, output: Path, **own: object) -> tuple[ExportArguments, DataArguments]:
    given = {"format": "onnx", "output": str(output), "check_images": 3, "batch_size": 2}
    return ExportArguments(**(given | own)), DataArguments(
        dataset=str(folder / "data"), image_size=SIDE
    )


def test_exports_are_listed_together(student, folder, quick, tmp_path):
    """Each format is a run of its own, and the second must not forget the first."""
    first = export_student(student, *settings(folder, tmp_path / "out"))
    export_student(student, *settings(folder, tmp_path / "out", format="onnx-fp16"))
    listed = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert list(listed) == ["onnx", "onnx-fp16"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "student.onnx",
        "student_fp16.onnx",
        RESULTS,
    }
    assert first["images"] == 3
    assert first["relative_difference"] < 1e-5
    assert first["miou_drop_points"] == pytest.approx(0, abs=1e-9)
    assert listed["onnx"]["at_another_size"]["shape"] == [3, 3, SIDE + 8, SIDE + 16]
    assert listed["onnx-fp16"]["mib"] < 0.52 * listed["onnx"]["mib"]
    assert list(listed["onnx-fp16"]["latency"]) == ["torch", "file"]
    assert all(time["threads"] == 1 for time in listed["onnx-fp16"]["latency"].values())


def test_what_is_timed_is_the_file_and_the_student(student, quick, tmp_path, monkeypatch):
    """A time of something else, or with the preparation on one side only, says nothing."""
    timed = {}

    def call_each(calls, repeats, threads):
        timed.update({name: call() for name, call in calls.items()})
        return {}

    monkeypatch.setattr(export_module, "interleaved", call_each)
    samples = [(picture, None) for picture in pictures(2, SIDE, SIDE)]
    exporter = Exporter(student, ExportArguments(format="onnx"), samples, tmp_path)
    exporter.write()
    exporter.latency()
    expected = raw(student, samples[0][0][None])
    assert timed["torch"].shape == (1, 1, SIDE, SIDE)
    for found in timed.values():
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_int8_is_exported_from_a_run(student, folder, quick, tmp_path):
    """Calibration reads the split to train on, the check the other one."""
    args, data = settings(
        folder, tmp_path / "out", format="onnx-int8", calibration_images=2, latency_repeats=0
    )
    result = export_student(student, args, data)
    assert result["calibration_images"] == 2
    assert "latency" not in result
    assert result["kept_in_fp32"] == [] or result["miou_drop_points"] <= 0.5
    assert OnnxStudent(tmp_path / "out" / "student_int8.onnx").metadata["precision"] == "int8"


@pytest.mark.parametrize("format_name", ["onnx", "onnx-fp16", "onnx-int8"])
def test_a_corrupt_export_is_an_error_and_leaves_nothing(
    format_name, student, folder, quick, tmp_path, monkeypatch
):
    """A wrong network in a valid file is found by nobody who only loads it."""

    def corrupted(exporter: Exporter) -> Path:
        model = onnx.load(str(quick))
        weight = next(w for w in model.graph.initializer if w.name == "encoder.conv1.weight")
        weight.CopyFrom(
            onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name)
        )
        path = exporter.work / "full.onnx"
        save_onnx(model, path, OnnxStudent(quick).metadata)
        return path

    monkeypatch.setattr(Exporter, "_write_full", corrupted)
    args, data = settings(folder, tmp_path / "out", format=format_name, int8_exclude=["none"])
    with pytest.raises(ValueError, match=r"^Expected .* Nothing was written\."):
        export_student(student, args, data)
    assert not (tmp_path / "out").exists()


def test_torch_export_is_dynamic_and_holds_only_what_is_used(student, tmp_path):
    """torch.export keeps every parameter of the module, and its example input too."""
    path = tmp_path / "student.pt2"
    program = export_program(student)
    write_program(program, path, metadata_of(student, with_preprocessing=False, precision="fp32"))
    dead = student.never_used_parameters()
    assert not {*program.state_dict} & dead
    network = read_program(path)
    with torch.no_grad():
        for size in SIZES:
            images = pictures(*size)
            found = network(processed(student, images)).numpy()
            np.testing.assert_allclose(found, raw(student, images), atol=1e-4)
    extra = {"metadata.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["metadata.json"])["size_multiple"] == "8"
    used = sum(p.numel() for n, p in student.named_parameters() if n not in dead)
    assert path.stat().st_size < 4 * used + 1_000_000


def test_smp_reads_a_student_of_a_tu_encoder(tmp_path):
    """The student's own folder has keys that smp hands to timm, which refuses them."""
    student = tiny_student("tu-resnet18").eval()
    write_smp(student, tmp_path / "smp")
    network = smp.from_pretrained(str(tmp_path / "smp")).eval()
    assert {*network.state_dict()} == {*student.state_dict()}
    images = pictures(2, SIDE, SIDE)
    with torch.no_grad():
        found = network(processed(student, images)).numpy()
    np.testing.assert_allclose(found, raw(student, images), atol=1e-5)
    assert not (tmp_path / "smp" / "README.md").exists()


ENCODERS = {"segformer": "mit_b0", "dpt": "tu-vit_tiny_patch16_224.augreg_in21k"}
POOLS_INTO_A_GRID, ONE_SIZE = ("pspnet", "upernet"), ("dpt",)


def pictures_folder(folder: Path) -> str:
    """Two pictures of noise."""
    for index in range(2):
        noise = pictures(1, 80, 100 + index)[0].permute(1, 2, 0).numpy()
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    return str(folder)


def exported(arch: str, tmp_path: Path, **own: object) -> dict:
    # A map of one pixel, as SegFormer's decoder has at SIDE, is not dynamic.
    size = {"dpt": 224, "pan": 128, "segformer": 2 * SIDE}.get(arch, SIDE)
    student = SmpForSemanticSegmentation.create(
        arch, ENCODERS.get(arch, "resnet18"), encoder_weights="none", image_size=size
    )
    checked = {"check_images": 2, "batch_size": 2, "latency_repeats": 0}
    args = ExportArguments(
        output=str(tmp_path / "out"), images=[pictures_folder(tmp_path)], **checked, **own
    )
    return export_student(student, args, DataArguments(image_size=size))


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["onnx", "torch-export"])
@pytest.mark.parametrize("arch", sorted(smp.MODEL_ARCHITECTURES_MAPPING))
def test_every_architecture_is_exported_and_is_the_student(arch, format_name, tmp_path):
    """Those that pool into a grid ended in a traceback of onnxruntime."""
    fixed = arch in POOLS_INTO_A_GRID + ONE_SIZE
    result = exported(arch, tmp_path, format=format_name, fixed_size=fixed)
    assert result["relative_difference"] < 1e-3
    assert ("at_another_size" in result) is not fixed


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["onnx-fp16", "onnx-int8", "smp"])
@pytest.mark.parametrize("arch", sorted(smp.MODEL_ARCHITECTURES_MAPPING))
def test_every_architecture_is_exported_in_other_formats_or_refused_in_one_line(
    arch, format_name, tmp_path
):
    """int8 of random weights may lose too much; whoever is told so needs no traceback."""
    fixed = format_name != "smp" and arch in POOLS_INTO_A_GRID
    try:
        result = exported(arch, tmp_path, format=format_name, fixed_size=fixed)
    except ValueError as error:
        if not (format_name == "onnx-int8" or arch in ONE_SIZE):
            raise
        message = user_message(error)
    else:
        message = "none"
        assert result["relative_difference"] < (0.5 if format_name == "onnx-int8" else 2e-2)
    assert message is not None
    assert "\n" not in message


@pytest.mark.parametrize("format_name", ["onnx-fp16", "onnx-int8"])
def test_a_grid_is_refused_in_one_line_in_every_onnx_format(format_name, tmp_path):
    """Calibration has a session of its own, which ended in onnxruntime's traceback."""
    with pytest.raises(ValueError, match=r"^Expected an ONNX file .* --fixed_size\.$") as caught:
        exported("pspnet", tmp_path, format=format_name)
    assert "\n" not in str(caught.value)


def test_a_grid_of_fixed_size_needs_a_picture_of_fixed_size(tmp_path):
    """onnxruntime's own traceback did not say so."""
    with pytest.raises(ValueError, match=r"^Expected an ONNX file .* --fixed_size\.$") as caught:
        exported("pspnet", tmp_path, format="onnx")
    assert "\n" not in str(caught.value)
    assert exported("pspnet", tmp_path, format="onnx", fixed_size=True)["fixed_size"]
    session = load_onnx(tmp_path / "out" / "student.onnx")
    assert session.session.get_inputs()[0].shape == ["batch", 3, SIDE, SIDE]
    with pytest.raises(ValueError, match=rf"^Expected height and width of {SIDE}, the one size"):
        session(np.zeros((1, 3, 2 * SIDE, SIDE), np.float32))


def test_the_operators_are_of_the_version_that_was_asked_for(student, tmp_path):
    """The exporter takes another version than an unknown one, without an error."""
    metadata = metadata_of(student, with_preprocessing=False, precision="fp32")
    path = tmp_path / "student.onnx"
    program = export_program(student, prune=False)
    write_onnx(program, path, metadata, with_preprocessing=False, opset=19)
    assert onnx.load(path).opset_import[0].version == 19
    with pytest.raises(ValueError, match=r"^Expected --opset from 18 to \d+, .* got 99\.$"):
        ExportArguments(format="onnx", opset=99)
    with pytest.raises(ValueError, match=r"^Expected an ONNX format for --opset, got smp"):
        ExportArguments(format="smp", opset=18)
    with pytest.raises(ValueError, match=r"^Expected a format with a graph for --fixed_size"):
        ExportArguments(format="smp", fixed_size=True)


def test_images_are_spread_over_the_folder(folder):
    """The first hundred files of a sorted folder may show one place on one day."""
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 8) == [0, 1, 2]
    images = [str(folder / "data" / "train" / "images")]
    found = from_images(images, DataArguments(image_size=(SIDE, SIDE)), 2)
    assert [(tuple(p.shape), p.dtype, m) for p, m in found] == 2 * [
        ((3, SIDE, SIDE), torch.uint8, None)
    ]


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((1, 3, SIDE, SIDE)), "got float64"),
        (np.zeros((1, SIDE, SIDE, 3), np.float32), r"got float32 \(1, 32, 32, 3\)"),
        (np.zeros((1, 3, SIDE, 30), np.float32), "divisible by 8, got 30"),
    ],
)
def test_wrong_input_is_explained(pixels, reason, plain):
    """onnxruntime's own message names a node deep in the graph."""
    with pytest.raises(ValueError, match=reason):
        load_onnx(plain)(pixels)


def test_other_files_are_refused(tmp_path, plain):
    """An ONNX file from elsewhere would run with the wrong mean and be believed."""
    with pytest.raises(FileNotFoundError, match="Expected an ONNX file, got"):
        load_onnx(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no")
    with pytest.raises(ValueError, match="Expected a readable ONNX file"):
        load_onnx(tmp_path / "text.onnx")
    model = onnx.load(str(plain))
    save_onnx(model, tmp_path / "other.onnx", {})
    with pytest.raises(ValueError, match=r"ONNX file of scripts/export.py"):
        load_onnx(tmp_path / "other.onnx")


WRONG = {
    "format": ("--format onx", "one of onnx, onnx-int8"),
    "no format": ("", "Expected --format"),
    "preprocessing in smp": ("--format smp --with_preprocessing", "holds weights only"),
    "no images": ("--format smp", "got neither"),
    "both": ("--format smp --images x --dataset y", "got both"),
    "missing pictures": ("--format smp --images gone/*.jpg", "names none"),
    "video": ("--format smp --images {root}/film.mp4", "got only videos"),
    "missing data": ("--format smp --dataset gone", "gone"),
    "other classes": ("--format smp --dataset {root}/data --num_labels 4", "of 4 classes"),
    "no calibration": ("--format onnx-int8 --calibration_images 0", "of at least 1, got 0"),
    "broken figures": ("--format smp --dataset {root}/data --output {root}/bad", "Delete it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line(case, folder, used):
    """What is wrong has to be said before the minutes of an export."""
    (folder / "film.mp4").touch()
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / RESULTS).write_text("[]")
    flags, expected = WRONG[case]
    words = flags.format(root=folder).split()
    assert expected in used.error("export.py", folder / "run", *words)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_extra_is_one_line(package, folder, used, monkeypatch):
    """The packages are optional, and a traceback of an import names the wrong cure."""
    monkeypatch.setitem(sys.modules, package, None)
    line = used.error("export.py", folder / "run", "--format", "onnx", "--images", "x.jpg")
    assert f"extra 'export' (onnx, onnxruntime, onnxscript), got no {package}." in line
    assert line.endswith("pip install 'kd_trainer[export]'.")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--format onnx --with_preprocessing", "--format torch-export", "--format smp"]
)
def test_script_exports_a_run_as_a_user_calls_it(flags, folder, used, monkeypatch, tmp_path):
    """Parts that work alone can be wired wrongly."""
    words = ["--dataset", f"{folder}/data", "--output", str(tmp_path / "out"), *flags.split()]
    monkeypatch.setattr(sys, "argv", ["export.py", str(folder / "run"), *words])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_main()
    (result,) = json.loads((tmp_path / "out" / RESULTS).read_text()).values()
    assert (tmp_path / "out" / result["file"]).exists()
    assert result["mask_iou"] > 0.999


ODD_METADATA = {
    "size_multiple": ["0", "-8", "x", "9" * 5000, "²", "7", None],
    "image_size": ["0", "1e9", "999999999", "", "64x", "64x64x64", "64x-64", None],
    "class_names": ["{", "[]", "3", '["a"]', "[1, 2]", "[" * 100_000, None],
    "image_mean": ["[NaN, 0, 0]", "[0, 0]", "null", '["0", "0", "0"]', "[true, 0, 0]", None],
    "image_std": ["[0, 1, 1]", "[NaN, 1, 1]", "[1e999, 1, 1]", "[-1, 1, 1]", "5", None],
    "preprocessing": ["maybe", None],
    "architecture": [None],
    "input": [None],
}


@pytest.mark.parametrize("name", ODD_METADATA)
def test_odd_metadata_is_one_line_that_names_the_entry(name, student):
    """A size_multiple of 0 ended in a ZeroDivisionError, a std of 0 in a mask of NaN."""
    good = metadata_of(student, with_preprocessing=False, precision="fp32")
    assert read_metadata(good, "x.onnx").image_size == (student.config.image_size,) * 2
    for value in ODD_METADATA[name]:
        told = {k: v for k, v in good.items() if k != name}
        told |= {} if value is None else {name: value}
        with pytest.raises(ValueError, match=f"^Expected .*{name}.* of x.onnx"):
            read_metadata(told, "x.onnx")


def graph_file(path: Path, student: SmpForSemanticSegmentation, nodes: list, output: list) -> Path:
    """An ONNX file of these nodes, with the metadata of a student."""
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("pixel_values", floats, ["b", 3, "h", "w"])],
        [onnx.helper.make_tensor_value_info("logits", floats, output)],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    told = metadata_of(student, with_preprocessing=False, precision="fp32")
    onnx.helper.set_model_props(model, told)
    onnx.save(model, str(path))
    return path


def endless(student: SmpForSemanticSegmentation, path: Path) -> Path:
    """A file that counts without end."""
    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    body = make.make_graph(
        [make.make_node("Identity", ["go"], ["on"]), make.make_node("Abs", ["x"], ["y"])],
        "body",
        [
            make.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            make.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            make.make_tensor_value_info("x", floats, None),
        ],
        [
            make.make_tensor_value_info("on", onnx.TensorProto.BOOL, []),
            make.make_tensor_value_info("y", floats, None),
        ],
    )
    nodes = [
        make.make_node("Constant", [], ["true"], value_int=1),
        make.make_node("Cast", ["true"], ["go"], to=onnx.TensorProto.BOOL),
        make.make_node("Loop", ["", "go", "pixel_values"], ["logits"], body=body),
    ]
    return graph_file(path, student, nodes, ["b", 3, "h", "w"])


def test_a_file_that_never_ends_is_stopped(student, tmp_path):
    """The web demo and a script over many images would hang without a word."""
    run = load_onnx(endless(student, tmp_path / "endless.onnx"), time_limit=0.3)
    with pytest.raises(ValueError, match=r"endless.onnx to answer within 0.3 seconds"):
        run(np.zeros((1, 3, SIDE, SIDE), np.float32))


def test_outputs_of_another_shape_are_refused(student, tmp_path):
    """Three channels under two class names would be read as three classes."""
    nodes = [onnx.helper.make_node("Identity", ["pixel_values"], ["logits"])]
    run = load_onnx(graph_file(tmp_path / "three.onnx", student, nodes, ["b", 3, "h", "w"]))
    with pytest.raises(ValueError, match="names 2 classes, got"):
        run(np.zeros((1, 3, SIDE, SIDE), np.float32))


def test_what_onnxruntime_refuses_is_one_line(student, tmp_path):
    """Its traceback names a node deep in the graph and no file."""
    make = onnx.helper
    shape = make.make_tensor("shape", onnx.TensorProto.INT64, [1], [7])
    nodes = [
        make.make_node("Constant", [], ["shape"], value=shape),
        make.make_node("Reshape", ["pixel_values", "shape"], ["logits"]),
    ]
    run = load_onnx(graph_file(tmp_path / "seven.onnx", student, nodes, [7]))
    with pytest.raises(
        ValueError, match=r"^Expected an ONNX file that onnxruntime runs on float32"
    ) as found:
        run(np.zeros((1, 3, SIDE, SIDE), np.float32))
    assert "\n" not in str(found.value)
