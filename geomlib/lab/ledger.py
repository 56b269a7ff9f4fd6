"""The ledger: one page that says of every claim of every paper what the chapters found.

Written by ``python -m geomlib.lab.ledger BOOK_FOLDER PAGE.md`` from the stored notebooks and nothing else.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from geomlib.lab.claims import MARKS, Claim, collect, registry, shown

__all__ = ["page", "summary", "write"]

# From the verdict that a reader must not miss to the one that needs no attention.
_GRAVEST_FIRST = ("not supported", "holds under conditions", "holds", "not judged")

_INTRODUCTION = """(ch-ledger)=
# The ledger of claims

Each statement of a paper that can be checked has an id. A chapter measures it, and the verdict stands here:

- **✓ holds**: what we measured agrees with the statement, or with the proved bound.
- **◐ holds under conditions**: it agrees under the conditions named, and not without them.
- **✗ not supported**: what we saw does not support it, at our scale and with our reconstruction.
- **○ not judged**: no chapter has measured it yet.

A claim that several chapters judge is counted once, by its gravest verdict. A program wrote this page
from the outputs stored in the chapters.
"""


def write(book: str | Path, target: str | Path) -> str:
    """Write the ledger of the notebooks in ``book`` to ``target``.

    Returns
    -------
    str
        One line that counts the verdicts.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from geomlib.lab import ledger
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(ledger.write(folder, pathlib.Path(folder) / "ledger.md").split(", ")[0])
    0 hold
    """
    book, target = Path(book), Path(target)
    records = collect(book)
    target.write_text(page(records, base=os.path.relpath(book, target.parent)), encoding="utf-8")
    counts = Counter(summary(records).values())
    return (
        f"{counts['holds']} hold, {counts['holds under conditions']} hold under conditions, "
        f"{counts['not supported']} not supported, {counts['not judged']} not judged"
    )


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the gravest verdict of every registered claim, ``"not judged"`` where there is no record.

    Examples
    --------
    >>> from geomlib.lab import ledger
    >>> found = ledger.summary([{"id": "SIM-1", "verdict": "holds"}])
    >>> found["SIM-1"], found["SIM-2"]
    ('holds', 'not judged')
    """
    verdicts: dict[str, list[str]] = {name: [] for name in registry()}
    for record in records:
        verdicts[record["id"]].append(record["verdict"])
    return {
        name: min(found, key=_GRAVEST_FIRST.index) if found else "not judged"
        for name, found in verdicts.items()
    }


def page(records: Sequence[Mapping[str, Any]], *, base: str) -> str:
    """Return the page as MyST Markdown.

    Parameters
    ----------
    records : sequence of mapping
        From :func:`geomlib.lab.claims.collect`.
    base : str
        The way from the page to the folder that was collected, for the links.

    Examples
    --------
    >>> from geomlib.lab import ledger
    >>> "never been measured" in ledger.page([], base="..")
    True
    """
    verdicts = summary(records)
    parts = [_INTRODUCTION, _counts(verdicts)]
    for _, group in groupby(registry().values(), key=lambda entry: entry.room):
        entries = sorted(group, key=_natural)
        parts.append(_room(entries, records, verdicts, base))
    return "\n".join(parts)


def _counts(verdicts: Mapping[str, str]) -> str:
    rooms = {name: entry.room for name, entry in registry().items()}
    lines = [
        "| Paper | " + " | ".join(f"{MARKS[v]} {v}" for v in MARKS) + " | all |",
        "|---|" + "---:|" * (len(MARKS) + 1),
    ]
    for room in [*dict.fromkeys(rooms.values()), None]:
        found = Counter(v for name, v in verdicts.items() if room in (None, rooms[name]))
        label = "**all**" if room is None else _heading(room)
        lines.append(f"| {label} | " + " | ".join(str(found[v]) for v in MARKS) + f" | {found.total()} |")
    return "\n".join(lines) + "\n"


def _room(
    entries: Sequence[Claim], records: Sequence[Mapping[str, Any]], verdicts: Mapping[str, str], base: str
) -> str:
    papers = dict.fromkeys(entry.paper for entry in entries)
    links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    lines = [f"## {_heading(entries[0].room)}", "", f"Paper: {links}.", ""]
    for entry in entries:
        verdict = verdicts[entry.id]
        own = [record for record in records if record["id"] == entry.id]
        lines += [
            f"(claim-{entry.id.lower()})=",
            f"### {entry.id} {MARKS[verdict]} {verdict}",
            "",
            _markdown(entry.statement),
            "",
            f"- {entry.kind.capitalize()}; source: {_markdown(entry.source.rstrip('.'))}.",
            *([_finding(record, base) for record in own] or ["- It has never been measured in a chapter."]),
            "",
        ]
    return "\n".join(lines)


def _finding(record: Mapping[str, Any], base: str) -> str:
    facts = [f"measured {_markdown(shown(record['measured']))}"]
    if record["bound"] is not None:
        facts.append(f"bound {_markdown(shown(record['bound'], exact=True))}")
    if "conditions" in record:
        facts.append(f"condition: {_markdown(record['conditions'])}")
    if "why" in record:
        facts.append(f"because {_markdown(record['why'])}")
    if "seeds" in record:
        facts.append(f"seeds {', '.join(map(str, record['seeds']))}")
    if record["preset"] is not None:
        facts.append(f"preset {record['preset']}")
    link = f"[{record['title']}]({Path(base, record['notebook']).as_posix()})"
    return f"- {MARKS[record['verdict']]} {record['verdict']} in {link}: {'; '.join(facts)}."


def _heading(room: str) -> str:
    return next(entry.id.rpartition("-")[0] for entry in registry().values() if entry.room == room)


def _natural(entry: Claim) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry.id)]


def _markdown(text: str) -> str:
    # Statements are plain text; what Markdown would read as markup is escaped.
    return re.sub(r"([\\`*_{}\[\]<>$|~^])", r"\\\1", str(text))


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m geomlib.lab.ledger BOOK_FOLDER PAGE.md")
    print(write(*arguments))


if __name__ == "__main__":
    _main(sys.argv[1:])
