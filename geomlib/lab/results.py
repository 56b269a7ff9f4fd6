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

    The file holds an object with ``title``, ``columns`` (names), ``rows`` (lists with one entry per column,
    the first of which names the row) and, shown below the table, ``notes`` (sentences), ``protocol`` (how it
    was measured) and ``machine`` (on what).

    Parameters
    ----------
    name : str
        For example ``"fixed_point"``.

    Raises
    ------
    ValueError
        If the file is there and holds no such table.

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
    if missing := {"title", "columns", "rows"} - set(content):
        raise ValueError(
            f"{path.name} must hold title, columns and rows, got no {', '.join(sorted(missing))}"
        )
    rows = [[_shown(entry) for entry in row] for row in content["rows"]]
    plain, html = output.table(content["columns"], rows, caption=content["title"])
    below = [_sentence(note) for note in content.get("notes", [])]
    how = [_shown(content[key]) for key in ("protocol", "machine") if key in content]
    if how:
        below.append(_sentence("Measured: " + "; ".join(how)))
    output.publish("\n".join([plain, *below]), html + "".join(f"<p>{escape(line)}</p>" for line in below))


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
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
    return str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
