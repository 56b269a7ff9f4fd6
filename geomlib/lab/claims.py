"""Claims: what a paper states, what a chapter measured, and the verdict, where the reader meets it.

Each statement that can be checked has a stable id and stands in ``geomlib/<room>/claims.toml``. A chapter
judges it with :func:`claim`; the verdict is shown in one line and stored in the metadata of that output, so
that :func:`collect` reads every verdict out of the notebooks and ``python -m geomlib.lab.ledger BOOK PAGE``
writes the ledger of all of them.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from geomlib.lab import presets
from geomlib.lab.output import publish

__all__ = ["MARKS", "METADATA_KEY", "Claim", "claim", "collect", "registry", "shown"]

METADATA_KEY = "geomlib_claim"
"""Where a verdict stands in the metadata of a stored output."""

MARKS = {
    "holds": "✓",
    "holds under conditions": "◐",
    "not supported": "✗",
    "not judged": "○",
}
"""The verdicts, and the sign beside each."""


@dataclass(frozen=True)
class Claim:
    """A statement that can be checked.

    Attributes
    ----------
    id : str
        ``"SIM-3"``: the room and a number that never changes.
    room : str
        Sub-package of ``geomlib`` that registers it.
    paper : str
        arXiv id.
    statement : str
        One sentence.
    source : str
        Where the paper says so, or why it was reconstructed.
    kind : str
        ``"law"`` for what is proved, ``"empirical"`` for what only measurement can support.
    """

    id: str
    room: str
    paper: str
    statement: str
    source: str
    kind: str


@cache
def registry() -> Mapping[str, Claim]:
    """Return every registered claim by id, room by room, without importing a room.

    Raises
    ------
    ValueError
        If an id is registered twice or an entry lacks a field.

    Examples
    --------
    >>> from geomlib.lab import claims
    >>> claims.registry()["SIM-11"].paper
    '2207.07475'
    """
    found: dict[str, Claim] = {}
    for room in sorted(resources.files("geomlib").iterdir(), key=lambda folder: folder.name):
        source = room / "claims.toml"
        if not source.is_file():
            continue
        for name, entry in tomllib.loads(source.read_text(encoding="utf-8")).items():
            if name in found:
                raise ValueError(f"claim {name} is registered in {found[name].room} and in {room.name}")
            try:
                found[name] = Claim(id=name, room=room.name, **entry)
            except TypeError as error:
                raise ValueError(
                    f"claim {name} in {room.name}/claims.toml has the fields {sorted(entry)}: {error}"
                ) from error
    return found


def claim(
    id: str,
    *,
    holds: Any,
    measured: Any,
    bound: Any = None,
    law: bool = False,
    conditions: str | None = None,
    why: str | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Judge a claim: show one line and store the verdict in the metadata of this output.

    Under the ``smoke`` preset an empirical claim is never judged, since nothing is trained long enough.

    Parameters
    ----------
    id : str
        A registered id, such as ``"SIM-3"``.
    holds : bool, str or None
        What came out. ``None`` leaves the claim open; a string is a condition under which it holds. A tensor
        or an array with one boolean will do.
    measured, bound : number, Tensor, str, sequence or mapping
        What was measured and what it was compared with. A sequence holds one number per seed and is shown as
        mean and standard deviation; a mapping names several. Numbers are rounded to three digits, and those
        below 1e-4 to a power of ten, so that the line is the same on every machine.
    law : bool
        Whether the claim is proved, so that a failure is a mistake of ours.
    conditions : str, optional
        Turns ``holds=True`` into "holds under conditions" and says which.
    why : str, optional
        One clause on the reason of the verdict.
    seeds : sequence of int, optional
        The seeds behind ``measured``.

    Raises
    ------
    AssertionError
        If ``law`` and the claim does not hold; the verdict is shown first.
    ValueError
        If the id is not registered, or ``holds`` is not a truth value.

    Examples
    --------
    >>> from geomlib.lab.claims import claim
    >>> claim("SIM-11", holds=True, measured=3e-16, bound=1e-10, law=True)
    ✓ SIM-11 holds: measured < 1e-12, bound 1e-10. The middle block U V^T has the non-zero eigenvalues of ...
    """
    known = registry()
    if id not in known:
        raise ValueError(f"id must be a registered claim, got {id!r}: known are {', '.join(known)}")
    truth, conditions = _truth(holds, conditions)
    preset = presets.current()
    if preset == "smoke" and not law:
        truth, conditions, why = None, None, "the smoke preset is too small to judge it"
    record = {
        "id": id,
        "paper": known[id].paper,
        "statement": known[id].statement,
        "verdict": _verdict(truth, conditions),
        "measured": _plain(measured),
        "bound": _plain(bound),
        "preset": preset,
        "kind": known[id].kind,
        "conditions": conditions,
        "why": why,
        "seeds": None if seeds is None else [int(seed) for seed in seeds],
    }
    record = {key: value for key, value in record.items() if value is not None or key in _ALWAYS}
    publish(_line(record), _html(record), metadata={METADATA_KEY: record})
    if law and truth is False:
        raise AssertionError(
            f"{id} is proved and yet failed: measured {shown(record['measured'])}, "
            f"bound {shown(record['bound'], exact=True)}"
        )


def collect(folder: str | Path) -> list[dict[str, Any]]:
    """Read the verdicts stored in the notebooks of a folder.

    Parameters
    ----------
    folder : str or Path
        Searched to any depth for ``*.ipynb``; hidden and build folders are left out.

    Returns
    -------
    list of dict
        The records in the order of the notebooks and of their cells. ``notebook`` is the path from
        ``folder``, ``title`` the first heading.

    Raises
    ------
    ValueError
        If a notebook judges a claim that is not registered.

    Examples
    --------
    >>> from geomlib.lab.claims import collect
    >>> collect("no/such/folder")
    []
    """
    root = Path(folder)
    records = []
    for path in sorted(root.rglob("*.ipynb")):
        inside = path.relative_to(root)
        if any(part.startswith((".", "_")) for part in inside.parts):
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            for output in cell.get("outputs", []):
                record = output.get("metadata", {}).get(METADATA_KEY)
                if record is None:
                    continue
                if record["id"] not in registry():
                    raise ValueError(f"{inside} judges {record['id']}, which no room registers: run it again")
                records.append({**record, "notebook": inside.as_posix(), "title": _title(cells, path.stem)})
    return records


def shown(value: Any, *, exact: bool = False) -> str:
    """Round a value for reading and for comparison between machines.

    Parameters
    ----------
    value : number, str, sequence or mapping
        As a record stores it.
    exact : bool
        Keep the digits of a number below 1e-4, as a bound deserves. A measured one that small is rounding
        error, which differs from one processor to the next while its order of magnitude hardly does.

    Examples
    --------
    >>> from geomlib.lab.claims import shown
    >>> shown(0.123456), shown(2e-9), shown(2e-9, exact=True), shown([0.90, 0.92])
    ('0.123', '< 1e-8', '2e-9', '0.91 ± 0.014 (2 seeds)')
    >>> shown({"SIM": 0.97, "DEQ": 0.96})
    'SIM 0.97, DEQ 0.96'
    """
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(entry, exact=exact)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return _spread(value, exact)
    if not isinstance(value, float):
        return str(value)
    if exact or not math.isfinite(value) or abs(value) >= 1e-4:
        return re.sub(r"e([+-])0?", lambda found: "e" + found[1].strip("+"), f"{value:.3g}")
    power = max(-12, math.floor(math.log10(abs(value))) + 1) if value else -12
    return f"> -1e{power}" if value < 0 else f"< 1e{power}"


_ALWAYS = ("id", "paper", "statement", "verdict", "measured", "bound", "preset")


def _truth(holds: Any, conditions: str | None) -> tuple[bool | None, str | None]:
    if isinstance(holds, str):
        if conditions is not None:
            raise ValueError(
                f"holds is the condition {holds!r} already, got conditions={conditions!r} as well"
            )
        holds, conditions = True, holds
    elif hasattr(holds, "item") and math.prod(holds.shape) == 1:
        holds = holds.item()  # a tensor or a numpy scalar
    if holds is not None and not isinstance(holds, bool):
        raise ValueError(
            f"holds must be True, False, None or a condition in words, got {holds!r}: no verdict"
        )
    return holds, conditions


def _verdict(truth: bool | None, conditions: str | None) -> str:
    if truth is None:
        return "not judged"
    if not truth:
        return "not supported"
    return "holds under conditions" if conditions else "holds"


def _plain(value: Any) -> Any:
    """Turn numbers of any make into what JSON can hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # tensors and arrays
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    number = float(value)
    # Six digits: enough to read, few enough that a stored notebook does not change for nothing.
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def _spread(values: Sequence[Any], exact: bool) -> str:
    if not values or not all(isinstance(v, numbers.Real) for v in values):
        return ", ".join(shown(entry, exact=exact) for entry in values) or "none"
    mean = shown(math.fsum(values) / len(values), exact=exact)
    if len(values) == 1:
        return f"{mean} (1 seed)"
    spread = statistics.stdev(values)
    if spread < 1e-4:
        return f"{mean} ± 0 ({len(values)} seeds)"
    return f"{mean} ± {spread:.2g} ({len(values)} seeds)"


def _facts(record: Mapping[str, Any]) -> str:
    """Measured, bound, conditions and reason, in one phrase."""
    facts = [f"measured {shown(record['measured'])}"]
    if record["bound"] is not None:
        facts.append(f"bound {shown(record['bound'], exact=True)}")
    if "conditions" in record:
        facts.append(f"condition: {record['conditions']}")
    if "why" in record:
        facts.append(f"because {record['why']}")
    return ", ".join(facts)


def _line(record: Mapping[str, Any]) -> str:
    verdict = record["verdict"]
    return f"{MARKS[verdict]} {record['id']} {verdict}: {_facts(record)}. {record['statement']}"


def _html(record: Mapping[str, Any]) -> str:
    verdict = record["verdict"]
    return (
        f'<div class="geomlib-claim" role="note" aria-label="Claim {escape(record["id"])}: {verdict}" '
        'style="border-left: 0.25em solid currentColor; padding: 0.2em 0 0.2em 0.8em; color: inherit">'
        f'<strong><span aria-hidden="true">{MARKS[verdict]} </span>{escape(record["id"])} {verdict}</strong>'
        f": {escape(_facts(record))}.<br>{escape(record['statement'])}</div>"
    )


def _title(cells: Sequence[Mapping[str, Any]], fallback: str) -> str:
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return fallback
