"""Measure what leaving early saves, and what a training step of Frost costs beside an untied network.

Depths are dealt out, not learned, so that every mean depth can be set: a rule that stops each sample at a
depth drawn beforehand runs in the place of the halting score, which is computed all the same.

    python benchmarks/frost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from harness import Timing, interleave, machine, pin, show, write

pin()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from geomlib.frost import HaltingLoss, Rule, infer, sequence, vector  # noqa: E402
from geomlib.testing import saved_tensor_bytes  # noqa: E402

WIDTHS = (64, 256, 512)
STEPS = 16
SAMPLES = 1024
LARGEST = (3, 7, 11, 16)  # depths uniform in 1 ... largest: mean depths 2, 4, 6 and 8.5
CLASSES = 10
ROUNDS = 7
WITHIN = 0.8  # of the ideal saving, for widths from 256 on
BATCH = 256
PROTOCOL = (
    f"one process, one thread, processor time, contestants in turn within each round; median of {ROUNDS}"
)


def spent(work: Callable[[], object]) -> Callable[[], float]:
    """Make a candidate that returns the processor seconds of a call, of several if one is very short."""

    def candidate() -> float:
        times, start = 0, time.process_time()
        while True:
            work()
            times += 1
            seconds = time.process_time() - start
            if seconds > 1e-2:
                return seconds / times

    return candidate


class Dealt(Rule):
    """Stops each sample at a depth given beforehand."""

    def __init__(self, depths: Tensor) -> None:
        super().__init__()
        self.depths = depths

    def observe(self, seen, memory):  # type: ignore[no-untyped-def]
        (depths,) = memory or (self.depths,)
        return (depths <= seen.t).to(torch.float32), (depths,)


@torch.no_grad()
def unrolled(model: nn.Module, x: Tensor, steps: int = STEPS) -> Tensor:
    """All steps, nothing asked on the way, one readout: what a fixed depth costs."""
    context = model.inject(x)
    state = model.start(context)
    for t in range(1, steps + 1):
        state = model.step(state, context, t)
    return model.read(state, context)


def exits(width: int) -> tuple[list[list[object]], list[str]]:
    """Rows and verdicts for states of one width."""
    generator = torch.Generator().manual_seed(0)
    model = vector(width, CLASSES, width=width, steps=STEPS, generator=generator).eval()
    x = torch.randn(SAMPLES, width, generator=generator)
    candidates: dict[str, Callable[[], float]] = {
        "full": spent(partial(unrolled, model, x)),
        "one step": spent(partial(unrolled, model, x, 1)),
    }
    depths = {m: torch.randint(1, m + 1, (SAMPLES,), generator=generator) for m in LARGEST}
    for largest, drawn in depths.items():
        rule = Dealt(drawn)
        for name, compact in (("shrunk", 1.0), ("masked", 0.0)):
            run = partial(infer, model, x, 0.5, rule=rule, compact=compact)
            halted = run()
            answers = torch.stack([unrolled(model, x, t) for t in range(1, largest + 1)])
            expected = answers[drawn - 1, torch.arange(SAMPLES)]
            assert torch.equal(halted.depth, drawn)
            torch.testing.assert_close(halted.logits, expected, rtol=1e-4, atol=1e-5)
            candidates[f"{name} {largest}"] = spent(run)
    timings = interleave(candidates, ROUNDS)
    full, first = timings["full"], timings["one step"]
    # One step with what is done once, and the other fifteen: the rest of the ideal is what is done once.
    step = Timing(tuple((a - b) / (STEPS - 1) for a, b in zip(full.rounds, first.rounds, strict=True)))
    once = max(first.seconds - step.seconds, 0.0) / step.seconds
    rows: list[list[object]] = []
    cost = f"a step takes {1e3 * step.seconds:.2f} ms"
    notes = [f"d = {width}: {cost}, what is done once for a batch as much as {once:.1f} steps"]
    for largest, drawn in depths.items():
        mean = float(drawn.float().mean())
        shrunk, masked = timings[f"shrunk {largest}"], timings[f"masked {largest}"]
        saving, ideal = shrunk.times_faster_than(full), STEPS / mean
        reachable = (STEPS + once) / (mean + once)
        rows.append(
            [
                width,
                f"{mean:.2f}",
                *(f"{1e3 * timing.seconds:.1f}" for timing in (full, masked, shrunk)),
                f"{masked.times_faster_than(full):.2f}",
                f"{saving:.2f}",
                f"{ideal:.2f}",
                f"{100 * saving / ideal:.0f}",
                f"{100 * saving / reachable:.0f}",
            ]
        )
        if width >= 256:
            verdict = "reached" if saving >= WITHIN * ideal else "missed"
            share = f"{100 * saving / ideal:.0f} % of the ideal {ideal:.2f}"
            notes.append(
                f"d = {width}, mean depth {mean:.2f}: {saving:.2f} times as fast, {share}; goal "
                f"{100 * WITHIN:.0f} %: {verdict}"
            )
    return rows, notes


def trainer(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Callable[[], float]:
    """Make a candidate that takes one more training step and returns its seconds."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        start = time.process_time()
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
        return time.process_time() - start

    return step


def last(trajectory, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Return the task loss of the last step alone."""
    return F.cross_entropy(trajectory.final, y)


def training(kind: str, width: int) -> list[list[object]]:
    """Rows for one kind of state: the untied network first, whose blocks do the same arithmetic."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    x = torch.randn(BATCH, width, *(() if kind == "vector" else (24,)), generator=generator)
    build = vector if kind == "vector" else sequence

    def model(mode: str, **options: object) -> nn.Module:
        seed = torch.Generator().manual_seed(0)
        return build(width, CLASSES, width=width, steps=STEPS, mode=mode, generator=seed, **options)

    untied = "vanilla, untied"
    contestants = {
        untied: (model("vanilla"), last),
        **{mode: (model(mode), last) for mode in ("recurrent", "basic_ssm", "euler", "leaky", "certified")},
        "certified, orthogonal": (model("certified", parametrisation="orthogonal"), last),
        "certified, recomputed": (model("certified", checkpoint=True), last),
        "certified, ranks": (model("certified"), HaltingLoss()),
    }
    timings = interleave(
        {name: trainer(network, x, y, loss) for name, (network, loss) in contestants.items()}, ROUNDS
    )
    rows: list[list[object]] = []
    for name, (network, _) in contestants.items():
        saved = saved_tensor_bytes(
            lambda network=network: network(x).final, exclude=[x, *network.parameters()]
        )
        rows.append(
            [
                kind,
                width,
                name,
                sum(p.numel() for p in network.parameters()),
                f"{1e3 * timings[name].seconds:.1f}",
                f"{1 / timings[untied].times_faster_than(timings[name]):.2f}",
                f"{saved / 1e6:.1f}",
            ]
        )
    return rows


def report(name: str, title: str, columns: list[str], rows: list[list[object]], notes: list[str]) -> None:
    show(title, columns, rows)
    print(*notes, sep="\n")
    table = {"title": title, "machine": machine(), "protocol": PROTOCOL}
    write(name, {**table, "columns": columns, "rows": rows, "notes": notes})


if __name__ == "__main__":
    print(machine())
    rows: list[list[object]] = []
    notes = [
        f"certified model of vectors, {SAMPLES} samples, at most {STEPS} steps; depths uniform from 1 on",
        "saving: time of all steps and one readout, over time with early exits; ideal: steps over mean depth",
        "masked: every row is stepped until the last sample leaves, as where a batch is not shrunk",
        "reachable: the ideal, if stem, projections and normalised weights, done once, are counted in",
    ]
    for width in WIDTHS:
        found, verdicts = exits(width)
        rows += found
        notes += verdicts
    report(
        "frost_exit",
        "Early exit with a shrinking batch",
        [
            "d",
            "mean depth",
            "all steps ms",
            "masked ms",
            "shrunk ms",
            "saving, masked",
            "saving, shrunk",
            "ideal",
            "% of ideal",
            "% of reachable",
        ],
        rows,
        notes,
    )
    report(
        "frost_training",
        "A training step of Frost beside an untied residual network of equal compute",
        ["state", "width", "model", "parameters", "step ms", "speed, untied = 1", "saved MB"],
        [
            row
            for kind, width in (("vector", 64), ("vector", 256), ("sequence", 24))
            for row in training(kind, width)
        ],
        [
            f"batch {BATCH}, {STEPS} steps, AdamW, sequences of 24",
            "every block has two maps, from the width to twice the width and back",
            "recomputed: only states are kept, and each step is done again on the way back",
        ],
    )
