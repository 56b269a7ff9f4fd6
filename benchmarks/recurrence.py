"""Measure linear recurrences, forward and backward, beside the scans that pip can install.

All contestants get the same coefficients, each in the memory layout it asks for, and their values and
gradients are compared to a loop in double precision before any is timed.

    python benchmarks/recurrence.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

from harness import Timing, interleave, machine, pin, show, write

pin()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from geomlib.core import linear_recurrence  # noqa: E402

warnings.simplefilter("ignore")

BATCH = 4
SIZES = [(length, width) for length in (64, 256, 1024, 4096) for width in (64, 256)] + [(1021, 256)]
ROUNDS = 15
PROTOCOL = (
    "one process, one thread, processor time, scans in turn within each round, each after a call that does "
    f"not count; median of {ROUNDS}"
)
LONG, WIDE, FASTER = 1024, 256, 3.0
OURS = "geomlib"
Scan = Callable[[Tensor, Tensor], Tensor]


def transposed(scan: Scan) -> tuple[Scan, bool]:
    """Mark a scan that wants `(batch, channels, time)`: it gets its inputs so, and nothing is charged."""
    return scan, True


def contestants() -> tuple[dict[str, tuple[Scan, bool]], list[str]]:
    """All scans by name, with whether they want time last; and the peers that are not there."""
    scans: dict[str, tuple[Scan, bool]] = {
        OURS: (linear_recurrence, False),
        **{
            f"{OURS}, {form}": (partial(linear_recurrence, method=form), False)
            for form in ("loop", "pairs", "doubling")
        },
    }
    missing = []
    try:
        from mambapy.pscan import pscan

        # (batch, time, channels, states): the channels may stand in either place.
        scans["mambapy"] = (lambda a, b: pscan(a.unsqueeze(3), b.unsqueeze(3)).squeeze(3), False)
        scans["mambapy, as states"] = (lambda a, b: pscan(a.unsqueeze(2), b.unsqueeze(2)).squeeze(2), False)
    except ImportError:
        missing.append("mambapy")
    try:
        from assoc_scan import AssocScan

        scans["assoc-scan"] = (AssocScan(), False)
    except ImportError:
        missing.append("assoc-scan")
    try:
        from accelerated_scan.ref import scan

        scans["accelerated-scan, ref"] = transposed(scan)
    except ImportError:
        missing.append("accelerated-scan")
    try:
        from torch._higher_order_ops.associative_scan import associative_scan

        def join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        scans["torch associative_scan"] = (
            lambda a, b: associative_scan(join, (a, b), dim=1, combine_mode="generic")[1],
            False,
        )
    except ImportError:
        missing.append("torch associative_scan")
    return scans, missing


def spent(work: Callable[[], object]) -> Callable[[], float]:
    """Make a candidate that works once, for its caches, and then returns processor seconds of a call."""

    def candidate() -> float:
        work()
        times, start = 0, time.process_time()
        while True:
            work()
            times += 1
            seconds = time.process_time() - start
            if seconds > 2e-3:
                return seconds / times

    return candidate


def exact(a: Tensor, b: Tensor, cotangent: Tensor) -> list[Tensor]:
    """States and both gradients by a loop in double precision."""
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    h = linear_recurrence(a, b, method="loop")
    return [h.detach(), *torch.autograd.grad(h, (a, b), cotangent.double())]


def compare(
    length: int, width: int, scans: dict[str, tuple[Scan, bool]]
) -> tuple[list[list[object]], list[str]]:
    """Rows for one size, and what they say about the goal."""
    generator = torch.Generator().manual_seed(0)
    a = 0.5 + 0.5 * torch.rand(BATCH, length, width, generator=generator)
    b, cotangent = (torch.randn(BATCH, length, width, generator=generator) for _ in range(2))
    truth = exact(a, b, cotangent)
    forwards, both, errors = {}, {}, {}
    for name, (scan, time_last) in scans.items():
        mine = [x.mT.contiguous() if time_last else x for x in (a, b, cotangent)]
        inputs = [x.clone().requires_grad_() for x in mine[:2]]

        def forward(scan: Scan = scan, inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return scan(*inputs)

        def backward(scan: Scan = scan, inputs: list[Tensor] = inputs, g: Tensor = mine[2]) -> list[Tensor]:
            h = scan(*inputs)
            return [h.detach(), *torch.autograd.grad(h, inputs, g)]

        try:
            found = [x.mT if time_last else x for x in backward()]
        except Exception as error:
            errors[name] = type(error).__name__
            continue
        errors[name] = " / ".join(
            f"{float((x.double() - y).abs().max() / y.abs().max()):.0e}"
            for x, y in zip(found, truth, strict=True)
        )
        forwards[name], both[name] = spent(forward), spent(backward)
    once, twice = interleave(forwards, ROUNDS), interleave(both, ROUNDS)
    rows = []
    for name in scans:
        if name in once:
            rows.append([name, length, width, errors[name], *_cells(once, name), *_cells(twice, name)])
        else:
            rows.append([name, length, width, f"fails: {errors[name]}", None, None, None, None])
    notes = []
    goal = FASTER if length >= LONG and width >= WIDE else 1.0
    for what, timings in (("forward", once), ("forward and backward", twice)):
        peers = [name for name in timings if not name.startswith(OURS)]
        if not peers:
            notes.append(f"L = {length}, D = {width}: no peer ran")
            continue
        ratios = {name: timings[OURS].times_faster_than(timings[name]) for name in peers}
        nearest = min(ratios, key=ratios.__getitem__)
        if (length, width) in SIZES[:-1]:
            verdict = f"; goal {goal:.0f}: {'reached' if ratios[nearest] >= goal else 'missed'}"
        else:
            verdict = ", a prime length"
        notes.append(
            f"L = {length}, D = {width}, {what}: {ratios[nearest]:.2f} times as fast as the fastest peer, "
            f"{nearest}{verdict}"
        )
    return rows, notes


def _cells(timings: dict[str, Timing], name: str) -> list[str]:
    return [f"{1e3 * timings[name].seconds:.3f}", f"{timings[OURS].times_faster_than(timings[name]):.2f}"]


if __name__ == "__main__":
    print(machine())
    scans, missing = contestants()
    rows: list[list[object]] = []
    notes = [
        f"batch {BATCH}, float32, decays uniform in (0.5, 1); `geomlib` is `linear_recurrence` as it comes",
        "error: largest, relative to the largest entry, of states / gradient of a / gradient of b",
        "accelerated-scan: all but `ref` need a GPU; `ref` gets contiguous (batch, channels, time)",
        *(f"{name}: not installed, not measured" for name in missing),
    ]
    for length, width in SIZES:
        found, verdicts = compare(length, width, scans)
        rows += found
        notes += verdicts
    columns = [
        "scan",
        "L",
        "D",
        "error",
        "forward ms",
        "times geomlib's",
        "forward and backward ms",
        "times geomlib's ",
    ]
    title = "Linear recurrences beside the scans of other libraries"
    show(title, columns, rows)
    print(*notes, sep="\n")
    write(
        "recurrence",
        {
            "title": title,
            "machine": machine(),
            "protocol": PROTOCOL,
            "columns": columns,
            "rows": rows,
            "notes": notes,
        },
    )
