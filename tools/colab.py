"""Write ``dist/colab/*.ipynb``: every chapter with the library inside, for Colab, Kaggle or any Jupyter.

Uploading the one file is enough: its set-up cell unpacks the ``geomlib`` wheel that it carries, asks pip
only for third-party packages that are missing, and never for torch or numpy that are there.
"""

import base64
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat
import notebooks
from plain import Plain
from project import BOOK, ROOT, chapters, notebook_of

OUTPUT = ROOT / "dist" / "colab"

SET_UP = """\
{title}: geomlib comes inside this notebook; torch and numpy stay as they are
import base64
import io
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distributions

from packaging.requirements import Requirement

WHEEL = "{wheel}"
NEEDED = {needed}

have = {{d.name.lower().replace("_", "-"): d.version for d in distributions() if d.name}}
missing = [need for need in map(Requirement, NEEDED) if not need.specifier.contains(have.get(need.name, "0"))]
if missing:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as pins:
        pins.writelines(f"{{n}}=={{have[n]}}\\n" for n in ("torch", "torchvision", "numpy") if n in have)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", pins.name]
    if subprocess.run([*pip, *map(str, missing)], check=False).returncode:
        raise RuntimeError(f"pip could not install {{', '.join(map(str, missing))}}: is this machine online?")

folder = tempfile.mkdtemp(prefix="geomlib-")
zipfile.ZipFile(io.BytesIO(base64.b64decode(WHEEL))).extractall(folder)
sys.path.insert(0, folder)

from geomlib.lab import environment

environment.report()"""


def build_wheel(folder: Path) -> Path:
    """Build the library's wheel into ``folder`` and return it."""
    hatch = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(hatch, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def requirements() -> list[str]:
    """Return what the library and a chapter need, as ``pyproject.toml`` says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["lab"]]


def self_contained(twin: Path, set_up: str) -> nbformat.NotebookNode:
    """Return a chapter without outputs, in plain Markdown, with ``set_up`` as its set-up cell."""
    notebook = notebooks.read_twin(twin)
    plain = Plain(notebook_of(twin))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
        elif cell.source.startswith(notebooks.SET_UP_TITLE):
            cell.source = set_up
    return notebook


def write(output: Path) -> list[Path]:
    """Write every chapter into the folder, named by room and topic, and return the files."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = base64.b64encode(build_wheel(Path(folder)).read_bytes()).decode()
    needed = "[\n" + "".join(f'    "{need}",\n' for need in requirements()) + "]"
    set_up = SET_UP.format(title=notebooks.SET_UP_TITLE, wheel=wheel, needed=needed)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    paths = []
    for twin in chapters():
        paths.append(output / "_".join(notebook_of(twin).relative_to(BOOK).parts))
        notebook = self_contained(twin, set_up)
        notebook.metadata.colab.name = paths[-1].name
        nbformat.write(notebook, paths[-1])
    return paths


if __name__ == "__main__":
    for path in write(OUTPUT):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")
