"""What every benchmark needs: a pinned process, honest timings, and a table written in one piece.

Import this before torch and call :func:`pin` first: it starts the process again with one thread and with
glibc told to keep large blocks, because page faults otherwise cost more than the arithmetic.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"
PEERS = (
    "torchdeq",
    "mambapy",
    "assoc-scan",
    "accelerated-scan",
    "boxcounting",
    "porespy",
    "torch-geometric",
    "vector-quantize-pytorch",
)
PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def pin() -> None:
    """Start this process again with threads and allocator pinned, unless they are."""
    if any(os.environ.get(name) != value for name, value in PINNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **PINNED})


def machine() -> dict[str, str]:
    """Describe what the numbers were taken on and with."""
    import torch

    torch.set_num_threads(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for peer in PEERS:
        with suppress(PackageNotFoundError):
            versions[peer] = version(peer)
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
        **{name: os.environ[name] for name in PINNED if name.startswith("MALLOC")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, and their median."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return median(self.rounds)

    def times_faster_than(self, other: Timing) -> float:
        """Median over the rounds of the ratio within a round: load that comes and goes cancels."""
        return median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=True))


def interleave(candidates: dict[str, Callable[[], float]], rounds: int = 7) -> dict[str, Timing]:
    """Time all candidates in turn, ``rounds`` times over, after one unmeasured round.

    A candidate does its work and returns the seconds of the part that counts, so that set-up can stay
    outside.
    """
    for candidate in candidates.values():
        candidate()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            taken[name].append(candidate())
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def clocked(work: Callable[[], object]) -> Callable[[], float]:
    """Make a candidate of ``work`` all of which counts; very short work is repeated to fill a millisecond."""

    def run() -> float:
        times, start = 0, time.perf_counter()
        while True:
            work()
            times += 1
            seconds = time.perf_counter() - start
            if seconds > 1e-3:
                return seconds / times

    return run


def write(name: str, table: dict[str, object]) -> Path:
    """Write ``results/<name>.json`` in one piece: a reader sees the old table or the new one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    handle, temporary = tempfile.mkstemp(dir=RESULTS, suffix=".tmp")
    with os.fdopen(handle, "w") as stream:
        json.dump(table, stream, indent=1)
        stream.write("\n")
    os.replace(temporary, path)
    return path


def show(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """Print a table with aligned columns."""
    cells = [columns, *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
