"""Benchmark tables: measured by ``make bench``, committed, and shown where a chapter speaks of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import geomlib
from geomlib.lab import output

__all__ = ["find", "table"]


def table(name: str) -> None:
    """Show ``benchmarks/results/<name>.json`` as a table, or say in one sentence how to produce it.

    The file holds an object with ``rows``, a list of objects with the same keys, the first of which names
    the row. An optional ``caption`` stands above the table; everything else in the object is a condition of
    the measurement (threads, versions, processor) and stands below it.

    Parameters
    ----------
    name : str
        For example ``"fixed_point"``.

    Raises
    ------
    ValueError
        If the file is there and has no rows, or rows with different keys.

    Examples
    --------
    >>> from geomlib.lab import results
    >>> results.table("no_such_benchmark")
    The table no_such_benchmark is not here: run `make bench` in a clone of the repository to measure it.
    """
    path = find(name)
    if path is None:
        print(f"The table {name} is not here: run `make bench` in a clone of the repository to measure it.")
        return
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = content.pop("rows", [])
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{path.name} must have rows with the same keys, got {rows}: it is no table")
    caption = content.pop("caption", f"Benchmark {name}")
    plain, html = output.table(
        list(rows[0]), [[_shown(entry) for entry in row.values()] for row in rows], caption=caption
    )
    conditions = _shown(content)
    if content:
        plain += f"\nMeasured with {conditions}."
        html += f"<p>Measured with {escape(conditions)}.</p>"
    output.publish(plain, html)


def find(name: str) -> Path | None:
    """Return the path of a results file, looked for above the working directory and beside the package.

    Examples
    --------
    >>> from geomlib.lab import results
    >>> results.find("no_such_benchmark") is None
    True
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(geomlib.__file__).resolve().parents[1]):
        path = folder / "benchmarks" / "results" / f"{name}.json"
        if path.is_file():
            return path
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(entry) for entry in value)
    return str(value)
