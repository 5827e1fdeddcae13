"""`report.html`: one file that holds everything it shows."""

from __future__ import annotations

from kd_trainer.reports import quality, sections
from kd_trainer.reports.comparison import comparison
from kd_trainer.reports.contents import STUDENT, TEACHER, Contents
from kd_trainer.reports.page import page, text


def report_html(contents: Contents) -> str:
    """The report as one HTML document.

    Pictures are inside the file, there is no script, and nothing is loaded from anywhere. It reads
    on narrow screens, in light and dark as the reader's system asks for.
    """
    student, teacher = contents.networks[STUDENT], contents.networks.get(TEACHER)
    taught = f", taught by {teacher.name}" if teacher is not None else ""
    return page(
        contents.title,
        f'<p class="faint">{text(student.name + taught)}</p>',
        [
            sections.summary(contents),
            comparison(contents),
            sections.curves(contents),
            sections.images(contents),
            quality.calibration(contents),
            quality.classes(contents),
            sections.configuration(contents),
            sections.environment(contents),
        ],
    )
