"""`comparison.json` as tables, whatever it holds: mappings, lists of them, and single values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_trainer.reports.contents import Contents
from kd_trainer.reports.page import Section, pairs, table, text


def comparison(contents: Contents) -> Section:
    """The comparison that lies in the folder of the run, if any."""
    body = "" if contents.comparison is None else tables(contents.comparison)
    return Section("comparison", "Comparison", body)


def tables(value: Any) -> str:
    """Single values in one table of two columns, then a table or heading for each part."""
    if not isinstance(value, Mapping):
        return _one(value)
    single = {key: item for key, item in value.items() if _is_single(item)}
    parts = [pairs(single, name="")] if single else []
    if len(value) > 1 and not single and all(map(_is_row, value.values())):
        return _rows({str(key): dict(item) for key, item in value.items()})
    for key, item in value.items():
        if key not in single:
            parts.append(f"<h3>{text(str(key).replace('_', ' '))}</h3>{tables(item)}")
    return "".join(parts)


def _one(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(map(_is_row, value)):
            return _rows({str(index + 1): dict(row) for index, row in enumerate(value)})
        return "".join(tables(item) for item in value)
    return f"<p>{text(value)}</p>"


def _rows(rows: dict[str, dict[str, Any]]) -> str:
    """One row a mapping, one column a key that any of them has."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    header = ["", *(str(key).replace("_", " ") for key in keys)]
    return table(header, [[name, *(row.get(key) for key in keys)] for name, row in rows.items()])


def _is_single(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(item is None or isinstance(item, str | int | float) for item in value)
    return not isinstance(value, Mapping)


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_single, value.values()))
