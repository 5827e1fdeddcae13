"""The report: its figures are true, nothing is loaded from elsewhere, nothing outside is markup."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import save_network, train_flags, write_pairs

from kd_trainer.build import evaluation_dataset
from kd_trainer.commands import train as training
from kd_trainer.commands.report import ReportArguments, build_report, report_main
from kd_trainer.commands.shown_images import samples_at
from kd_trainer.config import parse
from kd_trainer.data.synthetic import synthetic_pair
from kd_trainer.data_arguments import DataArguments
from kd_trainer.loading import load_student
from kd_trainer.measurement import evaluate_model
from kd_trainer.reports.charts import merged
from kd_trainer.reports.contents import Contents, Network, ShownImage
from kd_trainer.reports.page import class_figures, duration, report_html

EVIL = '<script>"&'
CHROMIUM = shutil.which("chromium")


@dataclass
class Run:
    """A finished run; none of the tests changes it."""

    data: Path
    output: Path
    teacher: Path | None
    num_labels: int
    results: dict[str, Any]

    @property
    def page(self) -> str:
        return (self.output / "report.html").read_text(encoding="utf-8")


def small_run(root: Path, num_labels: int, *, teacher: bool, streaming: bool) -> Run:
    data = write_pairs(root / "data", num_labels=num_labels)
    guide = save_network(root / "teacher", num_labels=num_labels) if teacher else None
    names = ["background", EVIL, "b", "c"][:num_labels]
    flags = train_flags(
        data,
        root / "out",
        *("--num_labels", str(num_labels), "--class_names", *names),
        *("--report", "true", "--logging_steps", "1", "--streaming", str(streaming)),
        teacher=guide or "none",
    )
    results = training.train(parse(flags))
    return Run(data, root / "out", guide, num_labels, results)


RUNS = {
    "binary with teacher": (2, True, False),
    "4 classes alone": (4, False, False),
    "streamed": (2, True, True),
}


@pytest.fixture(scope="module", params=RUNS)
def finished(request, tmp_path_factory) -> Run:
    num_labels, teacher, streaming = RUNS[request.param]
    root = tmp_path_factory.mktemp("report")
    return small_run(root, num_labels, teacher=teacher, streaming=streaming)


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Run:
    return small_run(tmp_path_factory.mktemp("binary"), 2, teacher=True, streaming=False)


class Page(HTMLParser):
    """Tags and attributes, and whether every tag is closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def images(self) -> list[Image.Image]:
        sources = [a["src"] or "" for tag, a in self.tags if tag == "img"]
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        coded = [source.partition(",")[2] for source in sources]
        return [Image.open(io.BytesIO(base64.b64decode(code))) for code in coded]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def loads(markup: str) -> list[str]:
    """Everything that a browser would fetch, run, or take from another file."""
    found = [tag for tag, _ in Page(markup).tags if tag in ("script", "link", "iframe", "object")]
    for tag, attributes in Page(markup).tags:
        for name, value in attributes.items():
            value = value or ""
            inside = value.startswith(("#", "data:image/"))
            if name in ("src", "srcset", "data", "poster", "background", "xlink:href"):
                found += [] if inside else [value]
            elif name == "href" and not inside and tag != "a":
                found.append(value)
            elif name.startswith("on"):
                found.append(name)
    return found + re.findall(r"@import|url\([^)]*\)", markup)


def test_the_page_loads_nothing(finished: Run):
    """A report that is mailed would tell a server who reads it, or lack its images."""
    assert loads(finished.page) == []
    addresses = set(re.findall(r"https?://[^\s\"'<]+", finished.page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language, not a place


@pytest.mark.parametrize(
    "markup",
    [
        '<img src="https://a.example/x.png">',
        '<link href="style.css">',
        "<script>1</script>",
        '<p onclick="x()">a</p>',
        "<style>p{background:url(x.png)}</style>",
        "<style>@import 'x.css'</style>",
    ],
)
def test_the_check_for_loads_finds_them(markup: str):
    """A check that finds nothing looks like a page that loads nothing."""
    assert loads(markup) != []


def test_the_page_is_whole_and_its_charts_are_xml(finished: Run):
    """A tag that is not closed moves everything below it into a table."""
    page = Page(finished.page)
    assert page.open == []
    charts = re.findall(r"<svg.*?</svg>", finished.page, re.DOTALL)
    assert len(charts) >= 8
    for chart in charts:
        ElementTree.fromstring(chart)
    anchors = [a["href"] for tag, a in page.tags if tag == "a"]
    ids = {f"#{a['id']}" for tag, a in page.tags if tag == "section"}
    assert set(anchors) == ids
    wanted = {"summary", "curves", "images", "calibration", "classes", "configuration"}
    assert {f"#{name}" for name in wanted} <= ids
    assert ("Temperature" in page.text) == (finished.teacher is not None)


def test_names_are_shown_and_are_no_markup(finished: Run):
    """A class or a folder with a < in its name could put anything on the page."""
    assert EVIL in Page(finished.page).text
    assert EVIL not in finished.page


def test_figures_are_those_of_the_results(finished: Run):
    """Two figures of one student in two files make both worthless."""
    page = Page(finished.page).text
    for key in ("miou", "dice", "boundary_iou", "mean_image_iou", "iou_background"):
        assert f"{finished.results[f'student_{key}']:.4f}" in page, key
        if finished.teacher:
            assert f"{finished.results[f'teacher_{key}']:.4f}" in page, key
    if finished.teacher:
        assert f"{finished.results['agreement']:.2%}" in page
    assert f"{finished.results['eval_images']} images" in page
    assert str(finished.output) in page  # of the configuration
    assert finished.results["versions"]["timm"] in page


def test_every_image_of_a_small_set_is_shown_once_with_all_its_views(finished: Run):
    """They are what most readers look at, and a missing column is hard to notice."""
    page = Page(finished.page)
    views = 6 if finished.teacher else 4
    assert len(page.images()) == 5 * views  # the set has five images, the default is six
    numbers = re.findall(r"image (\d) ", page.text)
    assert sorted(numbers) == list("01234")
    headings = re.findall(r"\b(Best|Median|Worst)\b", page.text.partition("Ordered by")[2])
    assert headings[:3] == ["Best", "Median", "Worst"]


def test_stream_and_folder_are_counted_alike(binary: Run):
    """A stream that loses its tail, or counts other pixels, gives other figures unnoticed."""
    student = load_student(binary.output / "student")
    found = []
    for streaming in (False, True):
        data = DataArguments(dataset=str(binary.data), image_size=64, streaming=streaming)
        dataset = evaluation_dataset(data, batch_size=2)
        seen = evaluate_model(student, dataset, batch_size=2 if streaming else 3)
        picked = dict(samples_at(dataset, {1, 4}))
        found.append((seen, picked))
    (left, right) = (seen for seen, _ in found)
    assert (left.rows["student"] == right.rows["student"]).all()
    assert len(left.rows["student"]) == 5
    assert left.reliability["student"].counts == pytest.approx(right.reliability["student"].counts)
    assert found[0][1].keys() == found[1][1].keys() == {1, 4}
    for index in (1, 4):
        one, other = (picked[index]["pixel_values"] for _, picked in found)
        assert torch.equal(one, other)


def written(run: Run, folder: Path, *flags: str) -> str:
    """The page that scripts/report.py makes of a run."""
    path = folder / "page.html"
    report_main([str(run.output), "--output", str(path), *flags])
    return path.read_text(encoding="utf-8")


def test_the_script_writes_the_page_of_the_training_again(binary: Run, tmp_path: Path, capsys):
    """The page of an old run has to be that which it would have left."""
    assert written(binary, tmp_path) == binary.page
    assert "page.html" in capsys.readouterr().out


def test_the_script_limits_images_and_takes_another_split(binary: Run, tmp_path: Path):
    """A report on the training images that says it is one on the others is a lie."""
    page = Page(written(binary, tmp_path, "--eval_split", "train", "--max_images", "2"))
    assert len(page.images()) == 2 * 6
    assert "8 images of the split train" in page.text


def test_a_teacher_that_is_gone_is_named_and_one_asked_for_is_needed(binary: Run, tmp_path: Path):
    """Runs are moved without their teacher; a report without a word would look undistilled."""
    copy = tmp_path / "copy"
    shutil.copytree(binary.output, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(binary.teacher), str(tmp_path / "gone")))
    page = Page(build_report(copy).read_text())
    assert "could not be loaded" in page.text
    assert len(page.images()) == 5 * 4
    assert f"{binary.results['teacher_miou']:.4f}" in page.text  # as the training measured it
    with pytest.raises(FileNotFoundError, match="gone"):
        build_report(copy, changed={"teacher": str(tmp_path / "gone")})
    again = Page(build_report(copy, changed={"teacher": str(binary.teacher)}).read_text())
    assert len(again.images()) == 5 * 6


def test_curves_come_from_a_checkpoint_too_and_are_missed_aloud(binary: Run, tmp_path: Path):
    """Runs from before there was a trainer_state.json have their logs in a checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(binary.output, copy)
    quick = ReportArguments(max_images=0)
    (copy / "trainer_state.json").unlink()
    pages = [build_report(copy, quick).read_text()]
    for folder in copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    pages.append(build_report(copy, quick).read_text())
    assert "mIoU at each evaluation" in pages[0]
    assert 'id="images"' not in pages[0]
    assert "so no curves but" not in pages[0]
    assert "so no curves but" in pages[1]
    assert "mIoU at each evaluation" in pages[1]
    assert "Learning rates" in pages[0]
    assert "Learning rates" not in pages[1]


def test_without_images_the_figures_are_those_of_the_results(binary: Run, tmp_path: Path):
    """The data may be on another machine, and the curves are still worth a page."""
    page = Page(written(binary, tmp_path, "--dataset", "none"))
    assert page.images() == []
    assert "No evaluation data" in page.text
    for who in ("student", "teacher"):
        assert f"{binary.results[f'{who}_boundary_iou']:.4f}" in page.text


def test_a_run_that_never_evaluated_has_a_report(tmp_path: Path):
    """Its evaluation split may not even exist."""
    data = write_pairs(tmp_path / "data", train=4)
    shutil.rmtree(data / "validation")
    more = ("--eval_strategy", "no", "--report", "true", "--epochs", "1", "--logging_steps", "1")
    training.train(parse(train_flags(data, tmp_path / "out", *more)))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No evaluation data" in page
    assert "Learning rates" in page


def test_a_fault_of_the_report_loses_no_result(tmp_path: Path, monkeypatch):
    """Hours of training must not depend on an image, and the fault must not pass for success."""

    def fail(*_: Any, **__: Any) -> Path:
        raise RuntimeError("no space left")

    monkeypatch.setattr(training, "build_report", fail)
    flags = train_flags(write_pairs(tmp_path / "data", train=4), tmp_path / "out", "--epochs", "1")
    with pytest.raises(RuntimeError, match="no space"):
        training.train(parse([*flags, "--report", "true"]))
    assert "student_miou" in json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_figures_of_a_class_are_counted_by_hand():
    """Precision and recall swapped would send somebody to mend the wrong thing."""
    confusion = np.array([[50, 10, 0], [5, 20, 0], [15, 0, 0]])  # [truth, prediction]
    figures = class_figures(confusion)
    assert figures["precision"][1] == pytest.approx(20 / 30)
    assert figures["recall"][1] == pytest.approx(20 / 25)
    assert figures["IoU"][1] == pytest.approx(20 / 35)
    assert figures["Dice"][1] == pytest.approx(40 / 55)
    assert math.isnan(figures["precision"][2])
    assert figures["recall"][2] == 0


def test_curves_that_coincide_are_one_with_all_names():
    """Of seven learning rates on one line only the last would be seen."""
    first, second = [(0.0, 1.0), (1.0, math.nan)], [(0.0, 2.0)]
    found = merged({"a": first, "b": list(first), "x": second, "c": list(first)})
    assert list(found) == ["a to c", "x"]
    assert list(merged({"a": second, "b": second})) == ["a, b"]


def compared(comparison: Any) -> Page:
    """The page of a run with this comparison.json and without images."""
    markup = report_html(replace(contents(0, 64), comparison=comparison))
    assert EVIL not in markup
    return Page(markup)


def test_comparison_shows_every_value_of_whatever_it_is_given():
    """The file is written by another command, whose figures must not be lost on the way."""
    held = {
        "gap_closed": 0.52,
        "sentence": EVIL,
        "seeds": [0, 1],
        "nothing": None,
        "metrics": {"teacher": {"miou": 0.91, "dice": 0.95}, "student": {"miou": 0.83}},
        "runs": [{"seed": 0, "miou": 0.8123}, {"seed": 1, "time": 77.0}],
        "deep": {"latency": {"torch": {"median": 12.5}, "note": "one thread"}},
    }
    page = compared(held)
    assert page.open == []
    for shown in ("0.52", EVIL, "0, 1", "0.9100", "0.9500", "0.8300", "0.8123", "77", "12.5"):
        assert shown in page.text, shown
    assert "one thread" in page.text
    assert "Comparison" not in compared([]).text
    assert "plain" in compared("plain").text


def contents(images: int, side: int) -> Contents:
    """A page of images of this size, each another."""
    shown = []
    for index in range(images):
        pixels, _ = synthetic_pair("validation", index, size=side, seed=0)
        views = {f"view {i}": np.roll(pixels, i * 40, axis=1) for i in range(6)}
        shown.append(ShownImage("best", f"image {index}", {"student": 0.5}, views))
    network = Network("Unet x", 1000)
    return Contents("run", ["background", "person"], {"student": network}, "", images=shown)


def test_whatever_is_printed_is_escaped():
    """Folders are other people's: files, settings, results, logs and a comparison hold any text."""
    logs = [{"epoch": 1.0, "eval_miou": 0.5, f"eval_iou_{EVIL}": 0.5, f"lr/{EVIL}": 1e-4}]
    held = {EVIL: [EVIL], "one row each": {EVIL: {EVIL: EVIL}}, "deep": {EVIL: {EVIL: {"a": EVIL}}}}
    network = Network(EVIL, 1000, {"miou": 0.5}, np.eye(3, dtype=int))
    pixels = np.zeros((8, 8, 3), np.uint8)
    evil = Contents(
        title=EVIL,
        class_names=["background", EVIL, f"_{EVIL}"],
        networks={"student": network, "teacher": network},
        measured=EVIL,
        notes=[EVIL],
        images=[ShownImage("best", EVIL, {"student": 0.5}, {EVIL: pixels})],
        results={"device": EVIL, "versions": {EVIL: EVIL}},
        settings={EVIL: EVIL, "list": [EVIL]},
        logs=logs,
        comparison=held,
        versions={EVIL: EVIL},
    )
    markup = report_html(evil)
    page = Page(markup)
    assert page.open == []
    assert page.text.count(EVIL) > 30
    assert "<script" not in markup
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts == [f"{EVIL} of {EVIL}"]


def test_a_report_at_640_pixels_stays_small():
    """Uncompressed, six images of the usual size would be 44 MiB."""
    markup = report_html(contents(6, 640))
    assert len(markup) < 3 * 2**20
    images = Page(markup).images()
    assert len(images) == 36
    assert all(max(image.size) == 320 for image in images)
    small = Page(report_html(contents(1, 64))).images()
    assert all(image.size == (64, 64) for image in small)  # nothing to gain from enlarging


def test_a_broken_file_in_the_folder_is_named(binary: Run, tmp_path: Path):
    """A comparison that was cut off while it was written."""
    copy = tmp_path / "copy"
    shutil.copytree(binary.output, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    (copy / "comparison.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"Expected JSON in .*comparison\.json"):
        build_report(copy)
    (copy / "comparison.json").write_text('{"gap": {"a": {"x": 1}, "b": {"x": 2}}}')
    assert 'id="comparison"' in build_report(copy).read_text()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str):
    """60 s is a minute, not `60 s` and not `0 min 60 s`."""
    assert duration(seconds) == said


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_never_wider_than_the_screen(width: int, binary: Run, tmp_path: Path):
    """On a phone a page that scrolls sideways is put away."""
    # The window of a browser has a least width, a frame in it has not.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe id="f" width="{width}" height="800" style="border:0" '
        f'srcdoc="{html.escape(binary.page)}"></iframe><script>onload=()=>{{document.title='
        "'wide '+document.getElementById('f').contentDocument.documentElement.scrollWidth}"
        "</script></body>"
    )
    switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
    switches += ["disable-sync", "disable-background-networking", "disable-component-update"]
    switches += ["dump-dom"]
    switches.append(f"user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        [str(CHROMIUM), *(f"--{switch}" for switch in switches), f"file://{outer}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(r"<title>wide (\d+)</title>", done.stdout)
    assert int(found) <= width


def test_settings_out_of_range_are_refused():
    """A negative number of images would show some and say nothing."""
    for name in ("max_images", "batch_size", "workers"):
        with pytest.raises(ValueError, match=f"--{name} of at least"):
            replace(ReportArguments(), **{name: -1})
