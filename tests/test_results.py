"""The published figures against the small result files they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "when_it_pays.md")
COLUMNS = {
    "mIoU": "student_miou",
    "IoU person": "student_iou_foreground",
    "Dice": "student_dice",
    "boundary IoU": "student_boundary_iou",
    "agreement": "agreement",
    "images/s": "images_per_second",
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
    gap, interval = figures["gap_closed"], figures["bootstrap"]
    columns = {
        "teacher": [figures["teacher"]["metrics"]["miou"]],
        "alone": mean_of((figures["baseline"]["metrics"] or {}).get("miou")),
        "distilled": mean_of((figures["distilled"]["metrics"] or {}).get("miou")),
        "difference": mean_of(figures["difference"]),
        "95 % interval over images": [interval["low"], interval["high"]] if interval else [],
        "gap closed": [gap["value"], gap["standard_error"]] if gap and gap["value"] else [],
        "updates": [figures["updates"]],
    }
    return columns[column]


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
            too_small = bool(figures["gap_closed"] and figures["gap_closed"]["too_small_to_judge"])
            assert column != "gap closed" or too_small == ("too small" in cell), file.name


def test_every_result_file_is_published():
    """A run that did not fit the story would be easy to leave out."""
    kinds = ("run", "setting")
    shown = {f.resolve() for page in PAGES for kind in kinds for f, _ in figure_rows(page, kind)}
    assert len(shown) > 3
    assert shown == set((ROOT / "docs" / "results").glob("*.json"))
