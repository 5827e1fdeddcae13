"""The bare page of a report: style, tables, pictures. Everything is in the one file.

Whatever comes from outside (names of classes, paths, settings) goes through `text`, which escapes
it; functions here take plain text and give markup.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from kd_trainer.reports.panels import Picture

QUALITY = 85

STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f6f8fa;--line:#d0d7de;--text:#1f2328;
--faint:#59636e;--link:#0b62c4}
@media (prefers-color-scheme:dark){:root{--back:#14181d;--card:#1d232a;--line:#38424d;
--text:#e4e8ec;--faint:#9aa6b2;--link:#6cb2f5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:16px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.3em 0}
h2{font-size:1.25rem;margin:2.2em 0 .6em;padding-top:.4em;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6em 0 .5em}
p{max-width:75ch;margin:.5em 0}
a{color:var(--link)}
.faint,figcaption{color:var(--faint);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0}
nav a{padding:4px 0}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;max-width:100%;
width:fit-content}
table{border-collapse:collapse;overflow-wrap:normal;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
th{background:var(--card);font-weight:600;white-space:normal}
table.words th{text-align:left}
table.words td{text-align:left;vertical-align:top}
table.words td+td{white-space:normal;overflow-wrap:anywhere;min-width:9em}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,168px),1fr));gap:12px;
margin:16px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:1.35rem;white-space:nowrap;line-height:1.3;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:16px}
.charts figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:8px}
svg{display:block;width:100%;height:auto}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:8px;
margin:4px 0 20px}
.cells figure{margin:0;max-width:320px}
.cells img{display:block;width:100%;height:auto;border-radius:4px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;list-style:none;
font-size:.875rem}
.legend i{display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:6px;
vertical-align:-2px}
.legend i.bar{width:120px}
.note{border-left:4px solid #d55e00;background:var(--card);padding:8px 12px;margin:12px 0}
@media (max-width:480px){th,td{padding:5px 8px}table{font-size:.8rem}h2{margin-top:1.6em}}
details{margin:12px 0}
summary{cursor:pointer;padding:4px 0}
@media print{.cells{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: `name` is its anchor, `body` markup."""

    name: str
    heading: str
    body: str


def text(value: object) -> str:
    """Any value as escaped text: a missing figure as a dash, a number short."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return escape(str(value))


def share_of(part: float, whole: float) -> str:
    """A quotient in percent, a dash where there is nothing to divide by."""
    return f"{part / whole:.1%}" if whole and not math.isnan(part / whole) else "-"


Rows = Iterable[Sequence[object]]


def table(header: Sequence[object], rows: Rows, *, words: bool = False) -> str:
    """A table that scrolls inside its own box where it is wider than the page.

    Args:
        header: headings of the columns.
        rows: cells, first column left, the others right.
        words: cells are text that may break, all left.
    """
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any], *, name: str = "setting", value: str = "value") -> str:
    """A mapping as a table of two columns; numbers with all digits that matter."""
    shown = [(key, f"{v:.6g}" if isinstance(v, float) else v) for key, v in values.items()]
    return table([name, value], shown, words=True)


def details(heading: str, body: str) -> str:
    """Markup that is folded away until it is wanted."""
    return f"<details><summary>{text(heading)}</summary>{body}</details>"


def tile(label: str, figure: str, more: str = "") -> str:
    """One large figure with what it is above and what it compares with below."""
    below = f'<span class="faint">{text(more)}</span>' if more else ""
    above = f'<span class="faint">{text(label)}</span>'
    return f'<div class="tile">{above}<b>{text(figure)}</b>{below}</div>'


def picture(pixels: Picture, *, alt: str, caption: str, side: int) -> str:
    """A picture inside the page, as JPEG of at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Without chroma subsampling: thin coloured errors would fade into the grey around them.
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{text(alt)}" width="{image.width}"'
        f' height="{image.height}"><figcaption>{text(caption)}</figcaption></figure>'
    )


def legend(colours: Mapping[str, str]) -> str:
    """Samples of colours (CSS values of ours, or a gradient) with their names."""
    items = "".join(
        f'<li><i{" class=bar" if "gradient" in colour else ""} style="background:{colour}"></i>'
        f"{text(name)}</li>"
        for name, colour in colours.items()
    )
    return f'<ul class="legend">{items}</ul>'


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The whole document; sections without a body are left out."""
    full = [section for section in sections if section.body]
    links = "".join(f'<a href="#{s.name}">{text(s.heading)}</a>' for s in full)
    bodies = "".join(
        f'<section id="{s.name}"><h2>{text(s.heading)}</h2>{s.body}</section>' for s in full
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{text(title)}</h1>{intro}<nav>{links}</nav></header>\n"
        f"<main>{bodies}</main></body></html>\n"
    )
