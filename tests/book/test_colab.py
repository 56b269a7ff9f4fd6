"""The self-contained notebooks run where there is torch and no ``geomlib``, alone in a folder, offline."""

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import colab
import nbformat
import plain
import pytest
from project import BOOK, chapters, notebook_of, pinned_environment

# Loaded by every Python of the environment below. Jupyter itself talks to its kernel over loopback.
REFUSE_OTHER_HOSTS = """
import socket

_connect = socket.socket.connect


def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"this test is offline, got {address}")
    return _connect(self, address)


socket.socket.connect = connect
"""
NAMES = ["_".join(notebook_of(twin).relative_to(BOOK).parts) for twin in chapters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the self-contained notebooks."""
    target = tmp_path_factory.mktemp("dist") / "colab"
    colab.write(target)
    return target


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with torch and friends, without pip, geomlib or a network."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    program = home / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([program, "-c", ask], text=True).strip())
    # A folder named in a .pth file has its own .pth files ignored, the one of an editable install too.
    (packages / "everything.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "sitecustomize.py").write_text(REFUSE_OTHER_HOSTS)
    return program


def call(python: Path, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the bare environment's Python in a folder."""
    environment = {**pinned_environment(), "JUPYTER_DATA_DIR": str(cwd / "jupyter"), "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_bare_environment_has_torch_and_no_geomlib(python: Path, tmp_path: Path) -> None:
    assert call(python, ["-c", "import torch"], tmp_path).returncode == 0
    assert "No module named 'geomlib'" in call(python, ["-c", "import geomlib"], tmp_path).stderr


def test_the_bare_environment_is_offline(python: Path, tmp_path: Path) -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "this test is offline" in call(python, ["-c", code], tmp_path).stderr


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_alone(name: str, folder: Path, python: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    papermill = ["-m", "papermill", name, "out.ipynb", "-p", "PRESET", "smoke", "--no-progress-bar"]
    done = call(python, [*papermill, "-k", "python3", "-l", "python"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_text_reads_without_myst(name: str, folder: Path) -> None:
    cells = nbformat.read(folder / name, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    patterns = (plain.OPEN, plain.LABEL, plain.OPTION, re.compile(r"^(:{3,})\s*$"))
    assert not [line for line in text.splitlines() if any(pattern.match(line) for pattern in patterns)]
    assert not plain.ROLE.findall(text)
    assert not plain.EQUATION.findall(text)


@pytest.mark.parametrize("name", NAMES)
def test_links_work_from_anywhere(name: str, folder: Path) -> None:
    cells = nbformat.read(folder / name, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not [match[0] for match in plain.LINK.finditer(text) if not match[3].startswith("https://")]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_valid_and_small(name: str, folder: Path) -> None:
    nbformat.validate(nbformat.read(folder / name, as_version=4))
    assert os.stat(folder / name).st_size < 1_500_000


def test_wheel_asks_for_no_torch_or_numpy_that_is_there() -> None:
    # Lower bounds alone: with an upper one, or a pin, pip would have to move what Colab brought.
    for need in colab.requirements():
        assert re.fullmatch(r"[a-z0-9-]+>=[\w.]+", need), need
