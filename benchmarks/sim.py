"""Measure a stable invariant model beside the equilibrium models that it replaces.

All models see the same digits in the same batches, take the same optimiser, have states of the same width
and, where they iterate, the same tolerance. They are trained in turn, one epoch each, so that load hits all
alike.

    python benchmarks/sim.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

from harness import Timing, clocked, interleave, machine, pin, show, write

pin()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from geomlib.core import ConvergenceWarning  # noqa: E402
from geomlib.lab import data  # noqa: E402
from geomlib.sim import DEQ, SIM, MonDEQ, mlp  # noqa: E402
from geomlib.testing import saved_tensor_bytes  # noqa: E402

warnings.simplefilter("ignore", ConvergenceWarning)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdeq import get_deq

TOL = 1e-4
MAX_STEPS = 60
BATCH = 64
ROUNDS = 7
GOAL = 5.0
AUTHORS = "SIM, free"  # the block as the authors have it; the others are variants
CONTROL = "MLP (SIM without mix)"


class TorchDEQ(nn.Module):
    """The cell of our DEQ, its weights included, solved by torchdeq with the implicit gradient."""

    def __init__(self, width: int, solver: str, generator: torch.Generator) -> None:
        super().__init__()
        self.model = DEQ(64, width, 10, generator=generator)
        self.deq = get_deq(
            f_solver=solver,
            b_solver=solver,
            f_max_iter=MAX_STEPS,
            b_max_iter=MAX_STEPS,
            f_tol=TOL,
            b_tol=TOL,
            f_stop_mode="rel",
            b_stop_mode="rel",
            ift=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.model.inject(x)
        z = self.deq(lambda z: self.model.cell(z, u), torch.zeros_like(u))[0][-1]
        return self.model.readout(z)


def contestants(width: int) -> dict[str, nn.Module]:
    """All models with states of one width, each from the same seed."""

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def sim(generator: torch.Generator, **options: object) -> SIM:
        basis = mlp(64, width, width, width, generator=generator)
        return SIM(basis, width, 10, generator=generator, **options)

    return {
        AUTHORS: sim(seed(), mode="free"),
        "SIM, orth": sim(seed(), mode="orth"),
        "SIM, two-tier": sim(seed(), second_features=width),
        CONTROL: sim(seed(), mix=False),
        "DEQ": DEQ(64, width, 10, tol=TOL, max_steps=MAX_STEPS, generator=seed()),
        "MonDEQ": MonDEQ(64, width, 10, tol=TOL, max_steps=MAX_STEPS, generator=seed()),
        "torchdeq fixed_point_iter": TorchDEQ(width, "fixed_point_iter", seed()),
        "torchdeq anderson": TorchDEQ(width, "anderson", seed()),
    }


def trainer(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Make a candidate that trains one more epoch and returns its seconds."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> float:
        model.train()
        order = torch.randperm(len(x), generator=generator)
        start = time.perf_counter()
        for batch in order.split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
        return time.perf_counter() - start

    return epoch


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    return model(x)


def steps_of(model: nn.Module) -> str:
    diagnostics = getattr(model, "diagnostics", None)
    return "" if diagnostics is None else f"{diagnostics.mean_steps:.1f}"


def compare(width: int) -> tuple[list[list[object]], dict[str, float], float]:
    """Rows for one width; ratios to DEQ of SIM's epoch and inference; the ratio of the control's epoch."""
    dataset = data.load("digits", flatten=True)
    x, y = dataset.train.x, dataset.train.y
    models = contestants(width)
    epochs = interleave({name: trainer(model, x, y) for name, model in models.items()}, ROUNDS)
    passes = interleave(
        {name: clocked(partial(infer, model, dataset.test.x)) for name, model in models.items()}, ROUNDS
    )

    rows: list[list[object]] = []
    for name, model in models.items():
        accuracy = float((infer(model, dataset.test.x).argmax(1) == dataset.test.y).float().mean())
        iterations = steps_of(model)
        batch = x[:BATCH]
        saved = saved_tensor_bytes(partial(model.train(), batch), exclude=[batch, *model.parameters()])
        rows.append(
            [
                name,
                width,
                sum(p.numel() for p in model.parameters()),
                f"{1e3 * epochs[name].seconds:.1f}",
                f"{1e3 * passes[name].seconds:.2f}",
                iterations,
                f"{saved / 1024:.0f}",
                f"{100 * accuracy:.1f}",
                *[_ratio(timing, name) for timing in (epochs, passes)],
            ]
        )
    ratios = {
        f"the {what} of {sim}": timings[sim].times_faster_than(timings["DEQ"])
        for sim in (AUTHORS, "SIM, orth")
        for what, timings in (("training epoch", epochs), ("inference", passes))
    }
    # What no middle block can beat: the network around it, which SIM shares with the plain one.
    control = epochs[CONTROL].times_faster_than(epochs["DEQ"])
    return rows, ratios, control


def _ratio(timings: dict[str, Timing], name: str) -> str:
    return f"{timings[AUTHORS].times_faster_than(timings[name]):.2f}"


if __name__ == "__main__":
    print(machine())
    rows: list[list[object]] = []
    notes = [
        f"digits, 64 inputs; batch {BATCH}, Adam 3e-3; {ROUNDS} timed epochs after one that is not",
        "inference on the whole test split at once, after those epochs",
        f"equilibria to a relative residual of {TOL:.0e}, at most {MAX_STEPS} steps; mean steps in inference",
        "one batch of inference waits for its slowest sample; the mean hides it",
        "after eight epochs, unregularised, the accuracy of a DEQ still moves by points an epoch",
    ]
    for width in (64, 128):
        found, ratios, control = compare(width)
        rows += found
        for what, ratio in ratios.items():
            verdict = "reached" if ratio >= GOAL else "missed"
            notes.append(
                f"width {width}: {what} is {ratio:.1f} times as fast as DEQ's; goal {GOAL}: {verdict}"
            )
        notes.append(
            f"width {width}: the training epoch of the plain network, layers and optimiser without any "
            f"middle block, is {control:.1f} times as fast as DEQ's: the room that a SIM has"
        )
    columns = [
        "model",
        "width",
        "parameters",
        "epoch ms",
        "inference ms",
        "mean steps",
        "saved kB",
        "accuracy %",
        "epoch, times SIM free's",
        "inference, times SIM free's",
    ]
    title = "A stable invariant model beside equilibrium models"
    show(title, columns, rows)
    print(*notes, sep="\n")
    write(
        "sim",
        {
            "title": title,
            "machine": machine(),
            "protocol": f"one process, one thread, models in turn within each round; median of {ROUNDS}",
            "columns": columns,
            "rows": rows,
            "notes": notes,
        },
    )
