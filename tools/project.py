"""Facts about the project that several tools share: where things lie and how kernels are pinned."""

import os
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
SITE = ROOT / "_build" / "html"
TWIN = ".myst.md"

# Two threads beside another busy process can be far slower than one, and stored numbers have to come
# out the same on any machine: every tool that runs a chapter or a test pins these.
PINS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def pinned_environment() -> dict[str, str]:
    """Return the process environment with one thread per process and quiet progress bars."""
    return {**os.environ, **PINS}


def chapters() -> list[Path]:
    """Return the twins of all chapters, sorted: the texts that people edit."""
    return sorted(path for path in BOOK.rglob(f"*{TWIN}") if ".ipynb_checkpoints" not in path.parts)


def notebook_of(twin: Path) -> Path:
    """Return the executed notebook beside a twin."""
    return twin.with_name(twin.name.removesuffix(TWIN) + ".ipynb")


def repository_url() -> str:
    """Return the repository address, which stands in ``_config.yml`` alone."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
    return str(config["repository"]["url"]).rstrip("/")
