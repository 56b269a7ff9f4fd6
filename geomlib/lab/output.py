"""Cell outputs that read as text, in a light page and in a dark one, and tables made of the same stuff.

A stored output holds ``text/plain`` and ``text/html``; what a program should read goes into the output's
metadata. Colours are the page's own (``currentColor``), so that both themes stay legible.
"""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["publish", "publish_image", "table"]

CELL = "padding: 0.2em 0.9em 0.2em 0; text-align: left; background: none; border: none"
HEAD = f"{CELL}; border-bottom: 1px solid currentColor"


def publish(plain: str, html: str, metadata: Mapping[str, Any] | None = None) -> None:
    """Show an output: rich in a notebook, a printed text elsewhere.

    Parameters
    ----------
    plain : str
        What a terminal, a diff and nbval see.
    html : str
        What a page shows. No fixed colours.
    metadata : mapping, optional
        Stored in the output's metadata; must be JSON.

    Examples
    --------
    >>> from geomlib.lab.output import publish
    >>> publish("3 steps", "<b>3</b> steps")
    3 steps
    """
    if not _in_notebook():
        print(plain)
        return
    from IPython.display import display

    record = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    display({"text/plain": plain, "text/html": html}, raw=True, metadata=record)


def publish_image(picture: bytes, alt: str) -> None:
    """Show a PNG with alternative text; outside a notebook, print the text.

    Examples
    --------
    >>> from geomlib.lab.output import publish_image
    >>> publish_image(b"", "A spiral")
    [figure: A spiral]
    """
    plain = f"[figure: {alt}]"
    if not _in_notebook():
        print(plain)
        return
    from IPython.display import display

    data = {"text/plain": plain, "image/png": b64encode(picture).decode()}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, marked: int | None = None
) -> tuple[str, str]:
    """Lay out a table as text and as HTML.

    Parameters
    ----------
    columns : sequence of str
        Headings. The first column names the rows.
    rows : sequence of sequence of str
        As many texts in each as there are columns.
    caption : str
        One sentence above the table.
    marked : int, optional
        Index of a column that is set in bold.

    Returns
    -------
    plain, html : str

    Raises
    ------
    ValueError
        If a row has another length than ``columns``.

    Examples
    --------
    >>> from geomlib.lab.output import table
    >>> print(table(["solver", "steps"], [["Picard", "64"], ["Anderson", "22"]], caption="Steps to 1e-4")[0])
    Steps to 1e-4
    solver    steps
    Picard    64
    Anderson  22
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"rows must have {len(columns)} entries, got {list(row)}: the columns would shift"
            )
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]

    def cell(tag: str, text: str, column: int, scope: str) -> str:
        weight = "; font-weight: bold" if column == marked else ""
        style = (HEAD if scope == "col" else CELL) + weight
        attribute = f' scope="{scope}"' if scope else ""
        return f'<{tag}{attribute} style="{style}">{escape(text)}</{tag}>'

    head = "".join(cell("th", text, i, "col") for i, text in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(cell("td" if i else "th", text, i, "" if i else "row") for i, text in enumerate(row))
        + "</tr>"
        for row in rows
    )
    html = (
        '<div style="overflow-x: auto; color: inherit" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}">'
        '<table style="border-collapse: collapse; color: inherit; background: none; width: auto">'
        f'<caption style="caption-side: top; text-align: left; color: inherit">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return "\n".join([caption, *padded]), html


def _in_notebook() -> bool:
    # No notebook can be running if nobody has imported IPython, and importing it takes half a second.
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None
