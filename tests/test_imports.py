"""Who may import whom: the house stands on four packages, and rooms do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geomlib

PACKAGE = Path(geomlib.__file__).parent
NOT_ROOMS = {"core", "lab", "testing"}
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
ROOMS = [name for name in ROOMS if name not in NOT_ROOMS]
ALLOWED = {"torch", "numpy", "scipy", "safetensors"} | set(sys.stdlib_module_names)


def imports(source, package):
    """Yield the absolute name of every module that a source text imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from geomlib import lab` imports geomlib.lab.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def faults(source, package, inside):
    """Return what a source text of ``package`` imports and may not; ``inside`` are the parts it may use."""
    found = []
    for name in imports(source, package):
        top, *rest = name.split(".")
        if top == "geomlib":
            # The package itself holds nothing but its version.
            if not rest or rest[0] not in {*inside, "__version__"}:
                found.append(name)
        elif top not in ALLOWED:
            found.append(name)
    return found


@pytest.mark.parametrize("part", ["core", *ROOMS])
def test_core_and_rooms_stand_on_four_packages_and_on_core(part):
    wrong = {}
    for path in sorted((PACKAGE / part).rglob("*.py")):
        package = ".".join(["geomlib", *path.relative_to(PACKAGE).parts[:-1]])
        if found := faults(path.read_text(encoding="utf-8"), package, inside={part, "core"}):
            wrong[path.relative_to(PACKAGE).as_posix()] = found
    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "import matplotlib.pyplot as plt",
        "from sklearn import datasets",
        "from geomlib.lab import viz",
        "from geomlib import lab",
        "from geomlib.frost import block",
        "import geomlib.testing",
        "from .. import lab",
        "from ..lab.viz import show",
        "def f():\n    import einops",
    ],
)
def test_a_forbidden_import_is_found(line):
    assert faults(line, "geomlib.sim", inside={"sim", "core"})


@pytest.mark.parametrize(
    "line",
    [
        "import torch.nn.functional as F",
        "from scipy.linalg import expm",
        "import math, tomllib",
        "from geomlib.core.fixed_point import solve",
        "from geomlib.sim.mix import SpectralMix",
        "from . import mix",
        "from .mix import SpectralMix",
        "from ..core import contraction",
        "from safetensors.torch import save_file",
    ],
)
def test_an_allowed_import_passes(line):
    assert faults(line, "geomlib.sim", inside={"sim", "core"}) == []


def test_the_import_contracts_hold():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_room_is_under_contract():
    import tomllib

    contracts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    bound = {module for contract in contracts for module in contract.get("source_modules", [])}
    assert {f"geomlib.{name}" for name in ["core", "lab", *ROOMS]} <= bound


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


HEAVY = {"matplotlib", "torchvision", "sklearn", "ipywidgets", "IPython", "accelerate", "mnist1d", "PIL"}


@pytest.mark.parametrize("part", ["core", *ROOMS])
def test_a_model_is_imported_without_the_lab(part):
    assert loaded_by(f"import geomlib.{part}") & HEAVY == set()


def test_the_lab_is_imported_without_anything():
    assert loaded_by("import geomlib.lab") & {*HEAVY, "torch", "numpy"} == set()


def test_the_modules_of_the_lab_are_reached_through_it():
    from geomlib import lab

    assert lab.presets.NAMES == ("smoke", "quick", "full")
    assert "viz" in dir(lab)
    with pytest.raises(AttributeError, match="no attribute 'vis'"):
        _ = lab.vis
