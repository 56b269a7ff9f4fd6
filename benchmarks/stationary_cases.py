"""The stationary layers that are raced, and those that race: the library, torchdeq, plain unrolling."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from harness import Timing, machine, show
from torch import Tensor
from torchdeq import get_deq

from geomlib.stationary import Quartic, SheafGraph, residual, solve_stationary, stationary_layer

DEGREE = 8
MAX_STEPS = 500
ROUNDS = 5
PROTOCOL = (
    "one process, one thread, processor time, contestants in turn within each round, each after a call that "
    f"does not count; median of {ROUNDS}, of 2 for n = 4096 and batch 64"
)
Layer = tuple[SheafGraph, Quartic, Tensor]


class Case:
    """A random graph of mean degree 8 with a quartic potential, drives, and a cotangent."""

    def __init__(self, nodes: int, batch: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def uniform(size: int, low: float) -> Tensor:
            return low + torch.rand(size, generator=generator, dtype=dtype)

        edges = torch.randint(nodes, (2, nodes * DEGREE // 2), generator=generator).sort(0).values
        edges = edges[:, edges[0] < edges[1]].unique(dim=1)
        self.graph = SheafGraph(nodes, edges, uniform(edges.shape[1], 0.5))
        self.potential = Quartic(uniform(nodes, 0.5), uniform(nodes, 0.0))
        draw = torch.randn(2, batch, nodes, 1, generator=generator, dtype=dtype)
        self.drive, self.cotangent = 2 * draw[0], draw[1]

    def layer(self) -> tuple[Layer, list[Tensor]]:
        """Return the layer on fresh leaves, and the leaves."""
        leaves = [
            x.clone().requires_grad_()
            for x in (self.graph.weights, self.potential.V, self.potential.kappa, self.drive)
        ]
        w, V, kappa, drive = leaves
        return (self.graph.replace(weights=w), Quartic(V, kappa), drive), leaves

    def left(self, psi: Tensor) -> float:
        """Largest residual `|F| / max(1, |f|)` of a sample."""
        slope = residual(self.graph, self.potential, self.drive, psi).flatten(1)
        size = torch.linalg.vector_norm(self.drive.flatten(1), dim=1).clamp_min(1)
        return float((torch.linalg.vector_norm(slope, dim=1) / size).max())

    def gradients(self, solve: Callable[[Layer], Tensor]) -> list[Tensor]:
        """Gradients of all leaves through a solve."""
        layer, leaves = self.layer()
        return list(torch.autograd.grad(solve(layer), leaves, self.cotangent))


class Ours:
    """The library, with one solver on one path."""

    def __init__(self, solver: object, path: str = "auto") -> None:
        self.options = {"solver": solver, "path": path, "max_steps": MAX_STEPS, "throw": False}

    def __call__(self, layer: Layer, tol: float, backward_tol: float | None = None) -> Tensor:
        if backward_tol is None:
            return solve_stationary(*layer, tol=tol, **self.options).value
        return stationary_layer(*layer, tol=tol, adjoint_tol=backward_tol, **self.options).value


class Theirs:
    """torchdeq on the forward-backward map, the same solver both ways, with the implicit gradient."""

    def __init__(self, solver: str) -> None:
        self.solver = solver
        self.built: dict[tuple[float, float | None], torch.nn.Module] = {}

    def __call__(self, layer: Layer, tol: float, backward_tol: float | None = None) -> Tensor:
        deq = self.built.get((tol, backward_tol))
        if deq is None:
            options = {"f_solver": self.solver, "b_solver": self.solver, "ift": True}
            for way, asked in (("f", tol), ("b", backward_tol or 1.0)):
                options |= {f"{way}_max_iter": MAX_STEPS, f"{way}_tol": asked, f"{way}_stop_mode": "rel"}
            deq = self.built[tol, backward_tol] = get_deq(**options)
        deq.train(torch.is_grad_enabled())
        return deq(forward_backward(layer), torch.zeros_like(layer[2]))[0][-1]


class Unrolled:
    """Backpropagation through forward-backward steps, as many as the residual needs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, layer: Layer, tol: float = 0.0, backward_tol: float | None = None) -> Tensor:
        step, psi = forward_backward(layer), torch.zeros_like(layer[2])
        for _ in range(self.steps):
            psi = step(psi)
        return psi


def forward_backward(layer: Layer) -> Callable[[Tensor], Tensor]:
    """Return `psi -> prox_{tU}(psi - t (L psi - f))`, on the library's sparse Laplacian."""
    graph, potential, drive = layer
    with torch.no_grad():
        t = 1 / float(graph.degrees().max())
    return lambda psi: potential.prox(psi - t * (graph.laplacian(psi) - drive), t)


def loosest(target: float, first: int, achieved: Callable[[float], float]) -> tuple[float | None, float]:
    """Find the loosest tolerance of a grid whose measured error meets the target, and that error."""
    error = math.inf
    for k in range(first, 14):
        tol = 10.0**-k
        error = achieved(tol)
        if error <= target:
            return tol, error
    return None, error


def spent(work: Callable[[], object]) -> Callable[[], float]:
    """Make a candidate that returns processor seconds of a call; short work is repeated."""

    def candidate() -> float:
        times, start = 0, time.process_time()
        while True:
            work()
            times += 1
            seconds = time.process_time() - start
            if seconds > 5e-3:
                return seconds / times

    return candidate


def cells_of(timings: dict[str, Timing], name: str) -> list[str]:
    """Milliseconds, and how many times the library's they are."""
    return [
        f"{1e3 * timings[name].seconds:.2f}",
        f"{timings['geomlib'].times_faster_than(timings[name]):.2f}",
    ]


def table(
    title: str, columns: list[str], rows: list[list[object]], notes: list[str], protocol: str
) -> dict[str, object]:
    show(title, columns, rows)
    print(*notes, sep="\n")
    return {
        "title": title,
        "machine": machine(),
        "protocol": protocol,
        "columns": columns,
        "rows": rows,
        "notes": notes,
    }
