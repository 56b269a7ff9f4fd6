"""Bring every chapter's notebook up to date with its twin, and run it where its code has changed.

    python tools/notebooks.py                              every chapter whose code or outputs are stale
    python tools/notebooks.py book/sim/equilibrium.myst.md one chapter
    python tools/notebooks.py --preset smoke               run quickly and store nothing
    python tools/notebooks.py -p PRESET full -p SEED 3     run with other parameters and store nothing

The twin (``*.myst.md``) is the text that people edit; the notebook is made from it and holds the
outputs. A notebook is run again when the code of its twin is not the code that made its outputs.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill
from nbformat import NotebookNode
from project import PINS, ROOT, TWIN, chapters, notebook_of

SET_UP = (Path(__file__).parent / "setup_cell.py").read_text(encoding="utf8").rstrip("\n")
SET_UP_TITLE = "# @title Set-up"
LEDGER = Path("book/appendix/ledger.md")
FAILED = ROOT / "_build" / "notebooks"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 900

# What papermill and nbclient write down beside the outputs changes with every run and says nothing.
NOISE = ("papermill", "execution", "collapsed", "trusted")


def code_hash(notebook: NotebookNode) -> str:
    """Return a short digest of the code that decides the outputs: all cells but the set-up."""
    sources = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    code = "\0".join(source for source in sources if not source.startswith(SET_UP_TITLE))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def read_twin(twin: Path) -> NotebookNode:
    """Read a twin as a notebook with the metadata that Jupyter, Colab and nbval want."""
    notebook = nbformat.from_dict(jupytext.read(twin))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "GPU",
            "colab": {"name": notebook_of(twin).name, "provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"},
        }
    )
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        if cell.cell_type == "code" and cell.source.startswith(SET_UP_TITLE):
            cell.metadata["cellView"] = "form"  # Colab folds it
    return notebook


def is_fresh(source: NotebookNode, stored: NotebookNode) -> bool:
    """Say whether the stored outputs were made by a whole run of the code in ``source``."""
    return stored.metadata.get("geomlib", {}).get("executed") == code_hash(source) == code_hash(stored)


def describe_picture(cell: NotebookNode) -> None:
    """Put the words that the code gave its picture where the site looks for them, unless the twin did."""
    for output in cell.outputs:
        words = output.get("metadata", {}).get("image/png", {}).get("alt")
        if words:
            cell.metadata.setdefault("mystnb", {}).setdefault("image", {}).setdefault("alt", words)


def keep_outputs(source: NotebookNode, stored: NotebookNode) -> NotebookNode:
    """Return ``source`` with the outputs of ``stored``, whose code is the same."""
    have = (cell for cell in stored.cells if cell.cell_type == "code")
    for cell in source.cells:
        if cell.cell_type == "code":
            old = next(have)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
            describe_picture(cell)
    source.metadata["geomlib"] = stored.metadata["geomlib"]
    if "widgets" in stored.metadata:
        source.metadata["widgets"] = stored.metadata["widgets"]
    return source


def run(path: Path, parameters: dict[str, Any], cwd: Path) -> NotebookNode:
    """Run the notebook at ``path`` from top to bottom with papermill and return it with outputs.

    Raises
    ------
    ValueError
        A parameter is not in the chapter's parameters cell: papermill would only log a line.
    papermill.PapermillExecutionError
        A cell failed. The notebook up to there is kept under ``_build/notebooks``.
    """
    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"no such parameter: {', '.join(unknown)}; the chapter has {', '.join(known)}")
    FAILED.mkdir(parents=True, exist_ok=True)
    output = FAILED / f"{cwd.name}_{path.name}"
    os.environ.update(PINS)
    papermill.execute_notebook(
        str(path),
        str(output),
        parameters=parameters,
        kernel_name="python3",
        language="python",
        cwd=str(cwd),
        progress_bar=False,
        execution_timeout=CELL_TIMEOUT,
    )
    result = nbformat.read(output, as_version=4)
    output.unlink()
    return result


def without_places(text: str) -> str:
    """Replace what names this machine (folders, kernel files, addresses) by what any reader has."""
    text = re.sub(r"/tmp/ipykernel_\d+/\d+\.py", "<cell>", text)
    text = re.sub(r"\S*/site-packages/", "", text)
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    text = text.replace(str(Path.home()) + "/", "~/")
    return re.sub(r"0x[0-9a-f]{8,}", "0x...", text)


def widgets_in_view(notebook: NotebookNode, models: dict[str, Any]) -> list[str]:
    """Return the names of the widget models that a view needs, in the order a reader meets them."""
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in models and name not in found:
            found[name] = None
            for other in references[name]:
                visit(other)

    references = {name: re.findall(r"IPY_MODEL_(\w+)", json.dumps(model)) for name, model in models.items()}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            visit(output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id", ""))
    # No view refers to a link between two widgets; a link refers to them.
    place = {name: number for number, name in enumerate(found)}
    links = [
        name for name in models.keys() - found if references[name] and found.keys() >= {*references[name]}
    ]
    return [*found, *sorted(links, key=lambda name: [place[other] for other in references[name]])]


def renumber_widgets(notebook: NotebookNode) -> NotebookNode:
    """Give the widget models names that do not change with every run, and drop those not in view."""
    models = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    wanted = widgets_in_view(notebook, models)
    for name in models.keys() - set(wanted):
        del models[name]
    text = nbformat.writes(notebook)
    for number, name in enumerate(wanted):
        text = text.replace(name, hashlib.sha256(f"widget {number}".encode()).hexdigest()[:32])
    return nbformat.reads(text, as_version=4)


def tidy(source: NotebookNode, ran: NotebookNode) -> NotebookNode:
    """Return ``source`` with the outputs of its run, as they are stored: no timings, no places."""
    ran.metadata["geomlib"] = {"executed": code_hash(source)}
    notebook = keep_outputs(source, ran)
    for cell in notebook.cells:
        for noise in NOISE:
            cell.metadata.pop(noise, None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = without_places(output.text)
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = without_places(output.data["text/plain"])
    return renumber_widgets(notebook)


def write(path: Path, notebook: NotebookNode) -> bool:
    """Write the notebook in one step if that changes it, and say whether it did."""
    text = nbformat.writes(notebook) + "\n"
    if str(ROOT) in text:
        raise RuntimeError(f"{path.name}: an output names a folder of this machine, {ROOT}")
    if path.exists() and path.read_text(encoding="utf8") == text:
        return False
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
    return True


def set_up_cell(notebook: NotebookNode) -> str | None:
    """Return the source of the chapter's set-up cell, or None where there is none."""
    sources = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    return next((source for source in sources if source.startswith(SET_UP_TITLE)), None)


def formatted(notebook: NotebookNode, path: Path) -> NotebookNode:
    """Return the notebook with its code as ruff writes it, by the rules for ``path``."""
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--stdin-filename", str(path), "-"]
    done = subprocess.run(ruff, input=nbformat.writes(notebook), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"ruff cannot read the code of {path.name}: {done.stderr.strip()}")
    return nbformat.reads(done.stdout, as_version=4)


def tidy_twin(twin: Path) -> None:
    """Give the twin the present text of the set-up cell and its code the project's format."""
    notebook = read_twin(twin)
    if set_up_cell(notebook) is None:
        raise ValueError(f"{twin.name} has no set-up cell: a code cell with the text of tools/setup_cell.py")
    text = before = twin.read_text(encoding="utf8")
    for cell, want in zip(notebook.cells, formatted(notebook, notebook_of(twin)).cells, strict=True):
        source = SET_UP if cell.source == set_up_cell(notebook) else want.source
        if cell.cell_type == "code" and cell.source != source:
            text = text.replace(f"{cell.source}\n```", f"{source}\n```", 1)
    if text != before:
        twin.write_text(text, encoding="utf8")


def update(twin: Path, force: bool = False) -> str:
    """Make the notebook of ``twin`` current and return in words what was done."""
    tidy_twin(twin)
    path, source = notebook_of(twin), read_twin(twin)
    stored = nbformat.read(path, as_version=4) if path.exists() else None
    if stored is not None and not force and is_fresh(source, stored):
        return "text updated" if write(path, keep_outputs(source, stored)) else "up to date"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        nbformat.write(source, plain)
        ran = run(plain, {}, cwd=path.parent)
    write(path, tidy(source, ran))
    return f"run in {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e6:.2f} MB"


def rehearse(twin: Path, parameters: dict[str, Any]) -> str:
    """Run the chapter with other parameters, store nothing, and return in words how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / notebook_of(twin).name
        nbformat.write(read_twin(twin), plain)
        run(plain, parameters, cwd=twin.parent)
    return f"ran in {time.monotonic() - start:.0f} s, nothing stored"


def literal(text: str) -> Any:
    """Return a command-line value as the Python literal it looks like, else as text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main() -> int:
    """Update or rehearse the chapters named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("twins", nargs="*", type=Path, help="twins or notebooks; all chapters by default")
    parser.add_argument("--preset", help="run with this preset and store nothing")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    options = parser.parse_args()
    parameters = {name: literal(value) for name, value in options.p}
    if options.preset:
        parameters["PRESET"] = options.preset
    named = [path if path.name.endswith(TWIN) else path.with_suffix(TWIN) for path in options.twins]
    failures = 0
    for twin in [path.resolve() for path in named] or chapters():
        print(f"{twin.relative_to(ROOT)}: ", end="", flush=True)
        try:
            print(rehearse(twin, parameters) if parameters else update(twin, options.force))
        except (ValueError, RuntimeError, papermill.PapermillExecutionError) as error:
            print(f"failed\n{error}", file=sys.stderr)
            failures += 1
    if not parameters and not failures:
        ledger = [sys.executable, "-m", "geomlib.lab.ledger", "book", str(LEDGER)]
        failures += subprocess.run(ledger, cwd=ROOT, check=False).returncode != 0
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
