"""The published figures against the small result files they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
COLUMNS = {
    "mIoU": "student_miou",
    "IoU person": "student_iou_foreground",
    "Dice": "student_dice",
    "boundary IoU": "student_boundary_iou",
    "agreement": "agreement",
    "images/s": "images_per_second",
}
SHARES = {"KL": "kl", "MSE": "mse", "BCE": "bce", "Dice share": "dice"}
_LINK = re.compile(r"\[[^\]]+\]\(((?:docs/)?results/[\w.]+\.json)\)")


def figure_rows(page: Path) -> list[tuple[Path, dict[str, str]]]:
    """(file, cell by column) of each table row that links to a result file."""
    found, header = [], []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| run"):
            header = cells
        elif line.startswith("| ") and (link := _LINK.search(cells[0])):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_published_figures_are_those_of_the_files(page: Path):
    """A figure that was typed, or is older than the last run, misleads whoever chooses by it."""
    rows = figure_rows(page)
    assert len(rows) >= 3
    for file, cells in rows:
        figures = json.loads(file.read_text(encoding="utf-8"))
        for column, cell in list(cells.items())[1:]:
            value = expected(figures, column)
            if cell == "":
                assert value is None, (file.name, column)
                continue
            shown = cell.removesuffix(" %")
            digits = len(shown.partition(".")[2])
            assert value is not None, (file.name, column)
            assert abs(value - float(shown)) <= 0.5000001 * 10**-digits, (file.name, column)


def test_every_result_file_is_published():
    """A run that did not fit the story would be easy to leave out."""
    shown = {file.resolve() for page in PAGES for file, _ in figure_rows(page)}
    assert shown == set((ROOT / "docs" / "results").glob("*.json"))
