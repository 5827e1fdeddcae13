"""The web demo without its page: models, what is said of a picture, settings."""

import ast
import os
import socket
import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SIDE, save_network

from kd_trainer.commands import web_demo as web_demo
from kd_trainer.commands.predict import predict_main
from kd_trainer.commands.web_demo import WebDemoArguments, load_models, web_demo_main
from kd_trainer.costs import Latency
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.onnx_file import write_onnx
from kd_trainer.loading import load_student
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.web_demo import page, server
from kd_trainer.web_demo.models import LONGEST, drawings, examine, milliseconds, read_upload
from kd_trainer.web_demo.page import difference_text, figures_table, shares_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two networks of two classes, two of three, a picture, a text that is called one."""
    root = tmp_path_factory.mktemp("demo")
    for seed, name in enumerate(("student", "teacher")):
        save_network(root / name, seed=seed)
        save_network(root / f"{name}3", num_labels=3, seed=seed)
    draw = np.random.default_rng(8)
    Image.fromarray(draw.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(root / "p.png")
    (root / "text.jpg").write_text("no picture")
    return root


def models_of(folders: Path, student: str, teacher: str | None = None, **options):
    model = ModelArguments(teacher=str(folders / teacher) if teacher else "", **options)
    return load_models(str(folders / student), model, WebDemoArguments())


@pytest.fixture(scope="module")
def pair(folders: Path) -> dict:
    """Teacher and student of two classes."""
    return models_of(folders, "student", "teacher")


def test_masks_are_those_of_predict(pair, folders: Path, tmp_path: Path):
    """A resize or threshold of its own would show another model than the one that is used."""
    masks = {}
    for threshold in ("0.5", "0.45"):
        result = examine(pair, read_upload(folders / "p.png")[0], float(threshold))
        masks[threshold] = result.masks["student"]
        assert list(result.masks) == ["teacher", "student"]
        for role, mask in result.masks.items():
            out = tmp_path / threshold / role
            flags = ["--outputs", "masks", "--output_dir", str(out), "--threshold", threshold]
            predict_main([str(folders / role), str(folders / "p.png"), *flags])
            assert (mask * 255 == np.asarray(Image.open(out / "masks" / "p.png"))).all()
        assert (result.masks["teacher"] != result.masks["student"]).any() or threshold != "0.5"
    assert 0 < masks["0.5"].mean() < 1
    assert (masks["0.5"] != masks["0.45"]).any()


@pytest.mark.parametrize("suffix", ["", "3"])
def test_what_is_drawn_is_what_was_found(suffix: str, folders: Path):
    """Teacher and student exchanged would praise the wrong one."""
    models = models_of(folders, f"student{suffix}", f"teacher{suffix}")
    names = models["student"].class_names
    picture, _ = read_upload(folders / "p.png")
    result = examine(models, picture, 0.5)
    shown = drawings(result, len(names))
    for role, drawn in (("teacher", shown.left), ("student", shown.right)):
        tinted = (drawn != picture).any(axis=2)
        assert (tinted <= (result.masks[role] > 0)).all()
        assert tinted.sum() > 0.95 * (result.masks[role] > 0).sum()
        mask = shown.masks[role]
        assert ((mask > 0).any(axis=2) == (result.masks[role] > 0)).all()
    teacher, student = result.masks["teacher"], result.masks["student"]
    coloured = np.ptp(shown.difference.astype(int), axis=2) > 0
    assert (coloured == (teacher != student)).all()
    assert f"{100 * (teacher != student).mean():.1f} %" in difference_text(result, names)
    told = shares_table(result, names)
    for index in range(1, len(names)):
        if (teacher == index).any() or (student == index).any():
            assert f"<td>{names[index]}</td>" in told


def test_a_student_alone_is_compared_with_the_picture(folders: Path):
    """The teacher is optional, and a page that needs one shows nothing to those without."""
    models = models_of(folders, "student")
    picture, _ = read_upload(folders / "p.png")
    result = examine(models, picture, 0.5)
    shown = drawings(result, 2)
    assert (shown.left == picture).all()
    assert (shown.right != picture).any()
    assert (shown.difference[..., 3] == result.masks["student"] * 255).all()
    assert difference_text(result, models["student"].class_names) == ""
    assert "ratio" not in figures_table(models, None)


def picture_file(folder: Path, kind: str) -> Path:
    """A picture that is red above and blue below, in a form that cameras and editors leave."""
    path = folder / f"{kind}.{'jpg' if kind in ('cmyk', 'turned') else 'png'}"
    pixels = np.zeros((40, 30, 3), np.uint8)
    pixels[:20, :, 0], pixels[20:, :, 2] = 200, 200
    image = Image.fromarray(pixels)
    if kind == "cmyk":
        image.convert("CMYK").save(path, quality=95)
    elif kind == "palette":
        image.quantize(8).save(path)
    elif kind == "transparent":
        image.putalpha(Image.fromarray(np.where(pixels[..., 0] > 0, 255, 0).astype(np.uint8)))
        image.save(path)
    elif kind == "turned":
        exif = Image.Exif()
        exif[274] = 6  # stored on its side
        image.rotate(90, expand=True).save(path, exif=exif, quality=95)
    else:
        image.crop((0, 0, 1, 1)).save(path)
    return path


@pytest.mark.parametrize("kind", ["cmyk", "palette", "transparent", "turned", "one_pixel"])
def test_pictures_of_all_kinds_work(kind: str, pair, tmp_path: Path):
    """Visitors drop what they have; a picture on its side is segmented wrongly without an error."""
    picture, original = read_upload(picture_file(tmp_path, kind))
    assert picture.shape == ((1, 1, 3) if kind == "one_pixel" else (40, 30, 3))
    assert original == picture.shape[:2]
    assert picture[0, 0, 0] > 150 > 100 > picture[0, 0, 2]
    below = picture[-1, -1].astype(int)
    if kind == "transparent":
        assert (below == 255).all()
    elif kind != "one_pixel":
        assert below[2] > 150 > 100 > below[0]
    result = examine(pair, picture, 0.5)
    assert drawings(result, 2).difference.shape == picture.shape


def test_a_large_picture_is_shrunk_and_says_so(tmp_path: Path):
    """The logits of a large camera's picture would fill the memory of a small machine."""
    Image.new("RGB", (2 * LONGEST, 300), (9, 90, 200)).save(tmp_path / "wide.png")
    picture, original = read_upload(tmp_path / "wide.png")
    assert picture.shape == (150, LONGEST, 3)
    assert (picture == (9, 90, 200)).all()
    assert original == (300, 2 * LONGEST)


def test_a_file_that_is_no_picture_is_named_without_its_folder(folders: Path):
    """The page is read by strangers, and the folder is one of the server's."""
    with pytest.raises(ValueError, match=r"Expected a readable image, got text\.jpg: ") as error:
        read_upload(folders / "text.jpg")
    assert str(folders) not in str(error.value)


def test_milliseconds_and_sizes_stand_under_their_model(pair, folders: Path):
    """Columns that are exchanged make the slower network the faster one."""
    measured = milliseconds(pair, read_upload(folders / "p.png")[0], 2)
    assert {role: one.repeats for role, one in measured.items()} == {"teacher": 2, "student": 2}
    assert min(one.median for one in measured.values()) > 0
    times = {"teacher": Latency(30, 40, 5, 1), "student": Latency(20, 40, 5, 1)}
    told = figures_table(pair, times)
    assert "<td>milliseconds</td><td>30.0</td><td>20.0</td><td>1.50</td>" in told
    mib = (folders / "student" / "model.safetensors").stat().st_size / 2**20
    assert f"<td>weight file, MiB</td><td>{mib:.1f}</td><td>{mib:.1f}</td><td>1.00</td>" in told
    count = sum(p.numel() for p in load_student(folders / "student").parameters())
    assert f"<td>{count / 1e6:.2f}</td>" in told
    assert "<td>milliseconds</td><td>-</td><td>-</td><td>-</td>" in figures_table(pair, None)


def test_names_of_classes_are_text(pair, folders: Path):
    """A name from the Hub that is markup would run in the visitor's browser."""
    result = examine(pair, read_upload(folders / "p.png")[0], 0.5)
    told = shares_table(result, ("background", "<script>x</script>"))
    assert "<script>" not in told
    assert "&lt;script&gt;" in told


def test_uploads_and_the_queue_are_bounded(pair, monkeypatch):
    """One visitor with files of 600 MB fills the disk, and a thousand waiting pictures the rest."""
    gradio = MagicMock()
    blocks = gradio.Blocks.return_value.__enter__.return_value
    for module in (page, server):
        monkeypatch.setattr(module, "require", lambda *_, **__: gradio)
    built = page.build_page(pair, threshold=0.5, repeats=1)
    blocks.queue.assert_called_once_with(max_size=page.MOST_WAITING)
    assert built is blocks.queue.return_value
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    monkeypatch.setattr(server.threading, "Event", MagicMock(side_effect=KeyboardInterrupt))
    server.serve(built, host=None, port=None, open_browser=False)
    assert built.launch.call_args.kwargs["max_file_size"] == page.MOST_BYTES
    told = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert f"more than {page.MOST_BYTES // 2**20} MiB" in told
    assert f"while {page.MOST_WAITING} wait" in told


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra demo")
def test_gradio_has_these_bounds():
    """A name that gradio changes would be noticed in the browser's test alone."""
    blocks = import_module("gradio").Blocks
    assert "max_size" in signature(blocks.queue).parameters
    assert "max_file_size" in signature(blocks.launch).parameters


@pytest.mark.slow
def test_an_onnx_file_is_a_student_and_a_teacher(folders: Path, tmp_path: Path):
    """What runs on the device is what people want to try."""
    pytest.importorskip("onnxruntime")
    student = load_student(folders / "student")
    told = metadata_of(student, with_preprocessing=False, precision="fp32")
    program = export_program(student, with_preprocessing=False)
    write_onnx(program, folders / "student.onnx", told, with_preprocessing=False)
    picture, _ = read_upload(folders / "p.png")
    plain = examine(models_of(folders, "student"), picture, 0.5)
    models = models_of(folders, "student.onnx", "student.onnx")
    result = examine(models, picture, 0.5)
    assert (result.masks["student"] == plain.masks["student"]).mean() > 0.999
    assert result.difference.pixels == 0
    assert models["student"].runs_on.startswith("onnxruntime, CPU")
    assert "<td>million parameters</td><td>-</td><td>-</td><td>-</td>" in figures_table(
        models, None
    )
    with pytest.raises(ValueError, match="Expected a teacher of the student's classes"):
        models_of(folders, "student3", "student.onnx")


def test_the_teacher_sees_its_own_size_and_the_students_classes(folders: Path, tmp_path: Path):
    """At the student's size a teacher is worse than it is; in its own order, classes are wrong."""
    teacher = load_student(folders / "teacher3")
    teacher.config.image_size = 2 * SIDE
    teacher.config.id2label = {0: "background", 1: "class_2", 2: "class_1"}
    teacher.save_pretrained(tmp_path / "teacher")
    models = models_of(folders, "student3", str(tmp_path / "teacher"))
    assert models["teacher"].segmenter.image_size == (2 * SIDE, 2 * SIDE)
    assert models["student"].segmenter.image_size == (SIDE, SIDE)
    picture, _ = read_upload(folders / "p.png")
    turned = examine(models, picture, 0.5).masks["teacher"]
    alone = load_models(str(tmp_path / "teacher"), ModelArguments(), WebDemoArguments())
    wanted = np.array([0, 2, 1], np.uint8)[examine(alone, picture, 0.5).masks["student"]]
    assert (turned == wanted).all()
    sized = models_of(folders, "student3", "teacher3", teacher_image_size=96)
    assert sized["teacher"].segmenter.image_size == (96, 96)


def test_a_teacher_with_weights_that_are_not_finite_is_refused(folders: Path, tmp_path: Path):
    """NaN is never above 0: it would look like a teacher that finds nothing."""
    state = load_file(folders / "teacher" / "model.safetensors")
    state["segmentation_head.0.bias"].fill_(torch.nan)
    save_network(tmp_path / "bad")
    save_file(state, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="Expected finite weights"):
        models_of(folders, "student", str(tmp_path / "bad"))


def test_variables_stand_for_the_command_line_of_a_space():
    """A Space has no command line; a variable of this name elsewhere has nothing to do with us."""
    space = {"STUDENT": "me/s", "TEACHER": "me/t", "THRESHOLD": "0.4", "X": "y"}
    read = web_demo.from_environment
    assert read({}, space) == {"model": "me/s", "teacher": "me/t", "threshold": 0.4}
    assert read({"model": None, "teacher": "z"}, space)["teacher"] == "z"
    assert read({"model": "here"}, space) == {"model": "here"}
    with pytest.raises(ValueError, match=r"Expected a student, got none\. Name its folder"):
        read({"model": None}, {"STUDENT": ""})


def test_a_taken_port_or_foreign_address_is_refused():
    """Two demos on one port: the browser shows the other one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"free --port, got 127.0.0.1 and {port}: Address"):
            server.check_address("127.0.0.1", port)
    server.check_address("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"Expected an address .*, got 192\.0\.2\.1: "):
        server.check_address("192.0.2.1", None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "Expected a student, got none. Name its folder"),
        ("{root}/nothing", "Expected a saved model with a config.json, got"),
        ("{root}/student --teacher {root}/nothing", "Expected a teacher's config.json"),
        ("{root}/student --teacher {root}/teacher3", "Expected a teacher of 2 classes, got 3"),
        ("{root}/student --threshold 1", "Expected --threshold between 0 and 1"),
        ("{root}/student3 --threshold 0.4", "Expected no --threshold for a model of 3 classes"),
        ("{root}/student --port 70000", "Expected --port from 1 to 65535, got 70000"),
        ("{root}/student --repeats 0", "Expected --repeats of at least 1, got 0"),
        ("{root}/student --examples {root}/none", "Expected an image, a folder of images"),
        ("{root}/student --examples {root}/text.jpg", "Expected a readable image, got"),
        ("{root}/student --share", "Expected known flags, got --share"),
        (
            "{root}/student --teacher {root}/teacher --teacher_image_size 50",
            "Expected an image size divisible by 32, got 50",
        ),
    ],
)
def test_wrong_use_is_said_before_the_page_is_served(flags, message, folders, monkeypatch):
    """A page that opens and then fails looks like a fault of the model."""

    def served(*_):
        raise AssertionError("the page was served")

    for name in web_demo.SPACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(web_demo, "prepare_environment", lambda _: None)
    monkeypatch.setattr(web_demo, "require", lambda *_, **__: None)
    monkeypatch.setattr(web_demo, "build_page", served)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        web_demo_main(flags.format(root=folders).split())
    assert str(error.value).startswith(message)


def test_missing_gradio_is_one_line(folders: Path, monkeypatch):
    """It is an extra, and a traceback of an import names no cure."""
    monkeypatch.setattr(web_demo, "prepare_environment", lambda _: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"extra 'demo' \(gradio\), got no gradio\.") as error:
        web_demo_main([str(folders / "student")])
    assert str(error.value).endswith("pip install 'kd_trainer[demo]'.")


def test_nothing_imports_gradio():
    """The package has to work where the extra is not installed."""
    for file in [*ROOT.glob("kd_trainer/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "gradio" for name in names), file


def test_gradio_is_told_to_be_quiet_before_it_is_imported(monkeypatch):
    """It reads these once, and would report each start to its makers."""
    monkeypatch.setattr(os, "environ", {"NO_PROXY": "intra.example"})
    server.prepare_environment("uploads")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["GRADIO_TEMP_DIR"] == "uploads"
    assert os.environ["NO_PROXY"] == "intra.example,127.0.0.1,localhost"
