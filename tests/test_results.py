"""The published figures against the small result files they come from."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path

import matplotlib
import pytest

from benchmarks.frontier import frontier_chart

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md",
        *("docs/results.md", "docs/when_it_pays.md", "docs/frontier.md", "docs/teacher_cache.md"),
    )
)
FRONTIER = ROOT / "docs" / "frontier.md"
SEARCH = ROOT / "docs" / "results" / "frontier_search.json"
MEMORY = ROOT / "docs" / "results" / "frontier_memory.json"
COLUMNS = {
    "mIoU": "student_miou",
    "IoU person": "student_iou_foreground",
    "Dice": "student_dice",
    "boundary IoU": "student_boundary_iou",
    "agreement": "agreement",
    "images/s": "images_per_second",
}
TITLES = {
    "plain": "plain loop",
    "student": "student alone",
    "ours": "ours",
    "cached": "ours, cached targets",
}
SHARES = {"KL": "kl", "MSE": "mse", "BCE": "bce", "Dice share": "dice"}
NUMBER = re.compile(r"[+-]?\d[\d,]*\.?\d*")
_LINK = re.compile(r"\[[^\]]+\]\(((?:docs/)?results/[\w.]+\.json)\)")


def figure_rows(page: Path, first_column: str = "run") -> list[tuple[Path, dict[str, str]]]:
    """(file, cell by column) of each table row that links to a result file."""
    found, header = [], []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and not _LINK.search(line) and "---" not in line:
            header = cells if cells[0] == first_column else []
        elif header and (link := _LINK.search(cells[0])):
            found.append((page.parent / link[1], dict(zip(header, cells, strict=True))))
    return found


def expected(figures: dict, column: str) -> float | None:
    if column in SHARES:
        return figures["mean_gradient_share"].get(SHARES[column])
    if column == "minutes":
        return figures["train_seconds"] / 60
    if column == "clipped":
        return 100 * figures["share_of_logged_updates_clipped"]
    return figures.get(COLUMNS.get(column, f"student_iou_{column.replace(' ', '_')}"))


def mean_of(figures: dict | None) -> list[float]:
    return [figures["mean"], figures["standard_error"]] if figures else []


def compared(figures: dict, column: str) -> list[float]:
    """What a cell of a comparison's row has to show, in its order."""
    alone, taught = (figures["students"][kind] for kind in ("baseline", "distilled"))
    gap, interval = taught["gap_closed"], taught["bootstrap"]
    columns = {
        "teacher": [figures["teacher"]["metrics"]["miou"]],
        "alone": mean_of(alone["metrics"]["miou"]),
        "distilled": mean_of(taught["metrics"]["miou"]),
        "difference": mean_of(taught["difference"]),
        "95 % interval over images": [interval["low"], interval["high"]] if interval else [],
        "gap closed": [gap["value"], gap["standard_error"]] if gap and gap["value"] else [],
        "updates": [taught["updates"]],
    }
    return columns[column]


def measured(figures: dict, column: str) -> list[float]:
    """What a cell of the frontier's tables has to show, in its order."""
    mib = figures["mib"]
    single = {
        "mIoU": figures["miou"],
        "of the teacher's": figures["miou_share"] and 100 * figures["miou_share"],
        "boundary IoU": figures["boundary_iou"],
        "int8 mIoU": figures["int8_miou"],
        "parameters (M)": figures["parameters"] / 1e6,
        "GFLOP": figures["gflop"],
        "in the encoder": figures["encoder_gflop"],
        "MiB": mib["onnx"],
        "MiB int8": mib["int8"],
        "epochs": figures["epochs"],
    }
    if column in single:
        return [] if single[column] is None else [single[column]]
    engine = {"torch": "torch fp32", "ONNX Runtime": "onnxruntime fp32"}
    name = engine.get(column, "onnxruntime int8")
    return [figures["latency"][name]["median"], figures["speed"][name]]


def same_figure(shown: str, value: float) -> bool:
    digits = len(shown.partition(".")[2])
    return abs(value - float(shown.replace(",", ""))) <= 0.5000001 * 10**-digits


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_published_figures_are_those_of_the_files(page: Path):
    """A figure that was typed, or is older than the last run, misleads whoever chooses by it."""
    for file, cells in figure_rows(page):
        figures = json.loads(file.read_text(encoding="utf-8"))
        for column, cell in list(cells.items())[1:]:
            value = expected(figures, column)
            if cell == "":
                assert value is None, (file.name, column)
                continue
            shown = cell.removesuffix(" %")
            assert value is not None, (file.name, column)
            assert same_figure(shown, value), (file.name, column)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_published_comparisons_are_those_of_the_files(page: Path):
    """The same for means, their errors, intervals and shares of a gap."""
    for file, cells in figure_rows(page, "setting"):
        figures = json.loads(file.read_text(encoding="utf-8"))
        for column, cell in list(cells.items())[1:]:
            expected_values, shown = compared(figures, column), NUMBER.findall(cell)
            assert len(shown) == len(expected_values), (file.name, column)
            pairs = zip(shown, expected_values, strict=True)
            assert all(same_figure(*pair) for pair in pairs), (file.name, column)
            gap = figures["students"]["distilled"]["gap_closed"]
            too_small = bool(gap and gap["too_small_to_judge"])
            assert column != "gap closed" or too_small == ("too small" in cell), file.name


def check_row(figures: dict, cells: dict[str, str], name: str) -> None:
    for column, cell in list(cells.items())[1:]:
        wanted, shown = measured(figures, column), NUMBER.findall(cell)
        assert len(shown) == len(wanted), (name, column)
        assert all(map(same_figure, shown, wanted)), (name, column)


def test_published_frontier_is_that_of_the_files():
    """The same for times, ratios and sizes of models."""
    rows = figure_rows(FRONTIER, "model")
    assert len(rows) > 3
    for file, cells in rows:
        check_row(json.loads(file.read_text(encoding="utf-8")), cells, file.name)


def test_published_search_is_that_of_the_file():
    """And of the decoders that were only timed: all of them, the bad ones too."""
    figures = {row["name"]: row for row in json.loads(SEARCH.read_text(encoding="utf-8"))}
    lines = FRONTIER.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| candidate |"))
    header, *rows = (
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines[start:])
    )
    shown = {row[0]: dict(zip(header, row, strict=True)) for row in rows[1:]}
    assert shown.keys() == figures.keys()
    for name, cells in shown.items():
        check_row(figures[name], cells, name)


@pytest.mark.skipif(matplotlib.__version__ < "3.11", reason="3.10 writes the same lines otherwise")
def test_chart_of_the_frontier_is_drawn_from_the_files():
    """A picture of an older measurement contradicts the table beside it, and nobody looks twice."""
    files = list(dict.fromkeys(file for file, _ in figure_rows(FRONTIER, "model")))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    drawn = (ROOT / "docs" / "images" / "frontier.svg").read_text(encoding="utf-8")
    assert drawn.strip() == frontier_chart(rows, title="mIoU at 128 px, latency at 640 px")


def test_every_result_file_is_published():
    """A run that did not fit the story would be easy to leave out."""
    kinds = ("run", "setting", "model")
    shown = {f.resolve() for page in PAGES for kind in kinds for f, _ in figure_rows(page, kind)}
    assert len(shown) > 3
    parts = ("", "_compiled", "_processes", "_data", "_evaluation")
    speed = {ROOT / "docs" / "results" / f"speed{part}.json" for part in parts}
    assert shown | speed | {SEARCH, MEMORY} == set((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("compiled", [False, True])
def test_speed_is_that_of_its_files(compiled: bool):
    """The tables of steps and the ratios in the text, against docs/results/speed*.json."""
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    name = "speed_compiled.json" if compiled else "speed.json"
    found = json.loads((ROOT / "docs" / "results" / name).read_text())
    assert (found["machine"]["busy"], found["work"]["image_size"]) == (False, 256)
    assert found["work"]["compile"] == compiled
    table = text.split(f"(results/{name})")[1]
    for contender, title in TITLES.items():
        own, memory = found["median"][contender], found["memory"][contender]["training_mib"]
        images = found["work"]["batch_size"] / own["seconds"]
        row = f"{own['seconds']:.3f} | {own['cpu_seconds']:.3f} | {images:.2f} | {memory:.0f}"
        assert f"| {title} | {row} |" in table
    rows = {"plain / ours": 2.5, "plain / cached": 2.8}
    rows |= {"ours / student": 1.25, "cached / student": 1.03}
    goals = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    for ratio, goal in rows.items():
        (cells,) = [c for c in goals if len(c) == 7 and c[2] == f" {goal}x "]
        value, cell = found["ratios"][ratio]["seconds"], cells[4 if compiled else 3]
        assert same_figure(NUMBER.findall(cell)[0], value), ratio
        met = value >= goal if ratio.startswith("plain") else value <= goal
        assert met == ("missed" not in cell), ratio
    if not compiled:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for contender, ratio in (("ours", "plain / ours"), ("cached", "plain / cached")):
            assert f"{found['median'][contender]['seconds']:.2f} s" in readme
            assert f"({found['ratios'][ratio]['seconds']:.1f} times" in readme


def test_speed_of_two_processes_is_that_of_its_file():
    """A goal that was missed, and by how much."""
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    processes = json.loads((ROOT / "docs" / "results" / "speed_processes.json").read_text())
    assert f"**{processes['ratio']:.2f}x, missed**" in text


def test_speed_of_the_data_path_is_that_of_its_files():
    """The goals that other rows of docs/speed.md say were met or missed, and docs/speed_data.md."""
    folder = ROOT / "docs" / "results"
    data = json.loads((folder / "speed_data.json").read_text())
    growth = json.loads((folder / "speed_evaluation.json").read_text())["growth_mib"]
    summary = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "speed_data.md").read_text(encoding="utf-8")
    whole, decoding = data["augmentation"]["list"], data["decoding"]
    assert not data["machine"]["busy"]
    library = f"**{whole['library']:.1f}** with Normalize, {whole['without_normalize']:.1f} without"
    assert f"| {library} | **{whole['ours']:.1f}** |" in page
    assert f"| 9 ms | {whole['ours']:.1f} ms |" in summary
    for writer in ("cv2", "PIL"):
        own = decoding[writer]
        assert f"| {writer} | {own['pil']:.2f} | {own['ours']:.2f} | {own['ratio']:.2f} |" in page
        assert f"{own['ratio']:.2f}x" in summary
    for kind, title in (("map", "map-style"), ("stream", "streaming")):
        small, large = (data["growth"][images][kind] for images in ("100", "100000"))
        assert f"| {title} | {small:.0f} | {large:.0f} |" in page
        assert f"{small:.0f} and {large:.0f} images/s" in summary
    shown = [f"{growth[images]:.1f}" for images in ("100", "1000", "10000")]
    assert f"{', '.join(shown[:2])} and {shown[2]} MiB" in summary


def test_published_memory_is_that_of_its_file():
    """A promise that is not kept has to stay told, with the figures that were measured."""
    found = json.loads(MEMORY.read_text("utf-8"))
    page = FRONTIER.read_text(encoding="utf-8")
    assert (found["side"], found["batch_size"], found["device"]) == (640, 1, "cpu")
    teacher = found["models"]["teacher, B3"]["mib"]
    for name, row in found["models"].items():
        cells = [
            f"{row['mib'][work]:.0f} ({100 * row['mib'][work] / teacher[work]:.0f} %)"
            for work in ("inference", "training")
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page
