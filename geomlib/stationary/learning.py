r"""Learn a graph: descend over the weights of all candidate edges, through the faces where edges come and go.

One loop for six geometries. Each step solves for the state and its adjoint, offers dead edges their best
transport, moves in the metric, and is accepted by Armijo's rule; what happened is kept (arXiv 2507.20088
announces such a descent over a stratified space of graphs; this form of it is reconstructed).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core.solution import ConvergenceError
from geomlib.stationary.births import unitary_step
from geomlib.stationary.geometry import metric as log_det_metric
from geomlib.stationary.geometry import resistances
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.natural import (
    barrier_step,
    diagonal_step,
    entropic_step,
    natural_step,
    projected_gradient,
)
from geomlib.stationary.objectives import Objective, Slope
from geomlib.stationary.penalties import Linear, Penalty

__all__ = ["METRICS", "Event", "GraphHistory", "learn_graph"]

ARMIJO = 1e-4
HALVINGS = 60
GROWTH = 1.5

Geometry = Callable[[Objective, SheafGraph, Tensor, float, float], Tensor]
"""From objective, graph, working set `(K,)`, epsilon and rho to a metric `(K, K)` or its diagonal `(K,)`."""


def _log_det(_: Objective, graph: SheafGraph, chosen: Tensor, epsilon: float, rho: float) -> Tensor:
    return log_det_metric(graph, epsilon, rho, edges=graph.edges[:, chosen])


def _diagonal(_: Objective, graph: SheafGraph, chosen: Tensor, epsilon: float, rho: float) -> Tensor:
    return resistances(graph, epsilon, edges=graph.edges[:, chosen]).diagonal().square() + rho


def _gauss_newton(objective: Objective, graph: SheafGraph, chosen: Tensor, _: float, rho: float) -> Tensor:
    bent = objective.curvature(graph)[chosen][:, chosen]
    # A direction that no sample feels must not make the programme singular.
    floor = rho * (1 + float(bent.diagonal().max())) if len(bent) else rho
    return bent + floor * torch.eye(len(bent), dtype=bent.dtype, device=bent.device)


def _euclid(_: Objective, graph: SheafGraph, chosen: Tensor, __: float, ___: float) -> Tensor:
    return torch.ones_like(graph.weights[chosen])


def _entropic(_: Objective, graph: SheafGraph, chosen: Tensor, __: float, ___: float) -> Tensor:
    return 1 / graph.weights[chosen]


def _barrier(_: Objective, graph: SheafGraph, chosen: Tensor, __: float, ___: float) -> Tensor:
    return 1 / graph.weights[chosen].square()


METRICS: dict[str, Geometry] = {
    "logdet": _log_det,
    "diag": _diagonal,
    "gauss_newton": _gauss_newton,
    "euclid": _euclid,
    "entropic": _entropic,
    "logbarrier": _barrier,
}
"""The geometries of :func:`learn_graph` by name."""


@dataclass(frozen=True)
class Event:
    """An edge that appeared or disappeared.

    Attributes
    ----------
    step
        Counted from 1: the step after which the weights differ.
    edge
        Index among the candidates.
    """

    step: int
    edge: int


@dataclass(frozen=True, repr=False)
class GraphHistory:
    """A learned graph and how it came about.

    Attributes
    ----------
    graph
        The last one; dead edges have weight exactly zero.
    weights
        `(steps + 1, M)`, the start first.
    transport
        `(steps + 1, ...)` of all candidates, or `None`; dead edges hold what they would be born with.
    loss
        `(steps + 1,)`, penalty included.
    projected
        `(steps + 1,)`: largest entry of the projected gradient over all candidates.
    lengths
        `(steps,)`: accepted step lengths.
    births, deaths
        Events in order.
    evaluations
        Losses that were computed, line searches included.
    converged
        Whether `projected` fell to the tolerance. Nothing else counts.
    reason
        `"converged"`, `"max_steps"`, `"stuck"` (the geometry leaves no way down) or `"line search"` (no step
        lowers the loss, most often because of rounding).
    """

    graph: SheafGraph
    weights: Tensor
    transport: Tensor | None
    loss: Tensor
    projected: Tensor
    lengths: Tensor
    births: list[Event]
    deaths: list[Event]
    evaluations: int
    converged: bool
    reason: str

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return len(self.lengths)

    def steps_to(self, tol: float) -> int | None:
        """Return the first step after which the projected gradient is at most `tol`, or `None`."""
        below = (self.projected <= tol).nonzero()
        return int(below[0]) if len(below) else None

    def __repr__(self) -> str:
        return (
            f"GraphHistory({self.reason} after {self.steps} steps, loss {float(self.loss[-1]):.4g}, "
            f"projected gradient {float(self.projected[-1]):.1e}, {int((self.graph.weights > 0).sum())} of "
            f"{self.graph.weights.numel()} edges, {len(self.births)} births, {len(self.deaths)} deaths)"
        )


@torch.no_grad()
def learn_graph(
    objective: Objective,
    graph: SheafGraph,
    *,
    metric: str = "logdet",
    epsilon: float = 0.5,
    rho: float = 1e-8,
    penalty: Penalty | None = None,
    step: float = 1.0,
    max_step: float = math.inf,
    tol: float = 1e-6,
    tol_birth: float = 1e-8,
    max_steps: int = 300,
) -> GraphHistory:
    """Minimise a loss of graphs over weights `w >= 0`, and over transports if the objective learns them.

    Parameters
    ----------
    objective
        See :class:`StationaryObjective` and :class:`LogDetLikelihood`.
    graph
        Where to start, with all candidates as edges; weights may be zero. It needs transports exactly if the
        objective learns them.
    metric
        One of `METRICS`.
    epsilon, rho
        Of the log-det metric and its diagonal; `rho` also keeps Gauss-Newton definite.
    penalty
        Added to the loss.
    step, max_step
        First and largest step length; between them it grows by 1.5 after each success and is halved until
        Armijo's rule holds. With `max_step=1` a metric that is the Hessian gives projected Newton.
    tol
        Largest entry of the projected gradient at which to stop.
    tol_birth
        A dead edge is admitted when its derivative is below `-tol_birth` times the largest entry of the
        first gradient, so that rounding does not make edges flicker.
    max_steps
        Largest number of steps.

    Returns
    -------
    GraphHistory

    Raises
    ------
    ValueError
        If an argument is out of range.
    ConvergenceError
        If a stationary solve fails where the line search can retreat no further.

    Notes
    -----
    Source: reconstructed (SGN-B5). Phases move in the same metric as their weights (the metric of the tube is
    block diagonal in both), unitary matrices in its diagonal.

    Examples
    --------
    >>> from geomlib.stationary.field import LogDetLikelihood
    >>> from geomlib.stationary.geometry import grounded_laplacian
    >>> weights = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    >>> truth = SheafGraph.complete(3, weights=weights)
    >>> objective = LogDetLikelihood(torch.linalg.inv(grounded_laplacian(truth, 0.5)), 0.5)
    >>> history = learn_graph(objective, truth.replace(weights=0 * weights), max_step=1.0)
    >>> history.converged, bool((history.graph.weights - weights).abs().max() < 1e-5)
    (True, True)
    """
    _check(objective, graph, metric, step, max_step, tol, tol_birth, max_steps)
    penalty = Linear(0.0) if penalty is None else penalty
    slope = objective.slope(graph)
    gradient = slope.gradient + penalty.derivative(graph.weights)
    admit = -tol_birth * float(gradient.abs().max()) if gradient.numel() else 0.0
    record = _Record(slope.graph, slope.loss + penalty.value(graph.weights), gradient)
    length, reason = step, "max_steps"
    for _ in range(max_steps):
        if record.projected[-1] <= tol:
            break
        mover = _Mover(objective, slope, gradient, metric, epsilon, rho, admit)
        proposal, length, reason = _search(mover, objective, penalty, record, length)
        if proposal is None:
            break
        slope = objective.slope(proposal)
        gradient = slope.gradient + penalty.derivative(proposal.weights)
        record.add(slope.graph, slope.loss + penalty.value(proposal.weights), gradient, length)
        length = min(GROWTH * length, max_step)
    converged = bool(record.projected[-1] <= tol)
    return record.finish(converged, "converged" if converged else reason)


class _Mover:
    """Proposals of one geometry from one graph: the metric is computed once for all step lengths."""

    def __init__(
        self,
        objective: Objective,
        slope: Slope,
        gradient: Tensor,
        name: str,
        epsilon: float,
        rho: float,
        admit: float,
    ) -> None:
        self.slope, self.gradient, self.name = slope, gradient, name
        weights = slope.graph.weights
        multiplicative = name in ("entropic", "logbarrier")
        # Where the metric is infinite no edge is born: the working set is the support.
        self.chosen = ((weights > 0) | (not multiplicative) & (gradient < admit)).nonzero().flatten()
        self.tensor = METRICS[name](objective, slope.graph, self.chosen, epsilon, rho)

    def propose(self, length: float) -> tuple[SheafGraph, float]:
        """Return the graph at this step length, and the first-order change of the loss on the way."""
        graph, g = self.slope.graph, self.gradient[self.chosen]
        before = graph.weights[self.chosen]
        if self.name == "entropic":
            after = entropic_step(before, g, length)
        elif self.name == "logbarrier":
            after = barrier_step(before, g, length)
        elif self.tensor.dim() == 2:
            after = natural_step(self.tensor, before, g, length)
        else:
            after = diagonal_step(self.tensor, before, g, length)
        change = float(g @ (after - before))
        weights = graph.weights.clone()
        weights[self.chosen] = after
        if self.slope.transport_gradient is None:
            return graph.replace(weights=weights), change
        transport, turned = self._turn(before, length)
        return graph.replace(weights=weights, transport=transport), change + turned

    def _turn(self, before: Tensor, length: float) -> tuple[Tensor, float]:
        """Move the transports of living edges in the same metric."""
        transport, gradient = self.slope.graph.transport, self.slope.transport_gradient
        assert transport is not None
        assert gradient is not None
        alive = self.chosen[before > 0]
        transport, local = transport.clone(), gradient[alive]
        tensor = self.tensor[before > 0]
        if transport.dim() == 1:
            square = tensor.dim() == 2
            move = torch.linalg.solve(tensor[:, before > 0], local) if square else local / tensor
            transport[alive] -= length * move
            return transport, -length * float(local @ move)
        diagonal = tensor[:, before > 0].diagonal() if tensor.dim() == 2 else tensor
        inner = transport[alive].mT.conj_physical() @ local
        skew = (inner - inner.mT.conj_physical()) / 2
        transport[alive] = unitary_step(transport[alive], local, length / diagonal)
        return transport, -length * float((skew.abs().square().sum((1, 2)) / diagonal).sum())


def _search(
    mover: _Mover, objective: Objective, penalty: Penalty, record: _Record, length: float
) -> tuple[SheafGraph | None, float, str]:
    """Halve the step until Armijo's rule holds."""
    start = float(record.loss[-1])
    slack = 8 * torch.finfo(mover.gradient.dtype).eps * abs(start)
    failure: ConvergenceError | None = None
    reason = "stuck"
    for _ in range(HALVINGS):
        proposal, change = mover.propose(length)
        if change == 0.0:
            break
        reason = "line search"
        try:
            record.evaluations += 1
            loss = float(objective.loss(proposal) + penalty.value(proposal.weights))
            if loss <= start + ARMIJO * change + slack:
                return proposal, length, "max_steps"
        except ConvergenceError as error:
            failure = error
        length /= 2
    if failure is not None:
        raise failure
    return None, length, reason


class _Record:
    """What is kept while learning."""

    def __init__(self, graph: SheafGraph, loss: Tensor, gradient: Tensor) -> None:
        self.graphs, self.loss, self.lengths = [graph], [loss], list[float]()
        self.projected = [_largest(graph, gradient)]
        self.births, self.deaths = list[Event](), list[Event]()
        self.evaluations = 1

    def add(self, graph: SheafGraph, loss: Tensor, gradient: Tensor, length: float) -> None:
        """Append one accepted step."""
        before, after = self.graphs[-1].weights > 0, graph.weights > 0
        self.lengths.append(length)
        for events, edges in ((self.births, after & ~before), (self.deaths, before & ~after)):
            events += [Event(len(self.lengths), edge) for edge in edges.nonzero().flatten().tolist()]
        self.graphs.append(graph)
        self.loss.append(loss)
        self.projected.append(_largest(graph, gradient))

    def finish(self, converged: bool, reason: str) -> GraphHistory:
        """Return the whole as tensors."""
        turns = [graph.transport for graph in self.graphs if graph.transport is not None]
        return GraphHistory(
            graph=self.graphs[-1],
            weights=torch.stack([graph.weights for graph in self.graphs]),
            transport=torch.stack(turns) if turns else None,
            loss=torch.stack(self.loss),
            projected=torch.tensor(self.projected),
            lengths=torch.tensor(self.lengths),
            births=self.births,
            deaths=self.deaths,
            evaluations=self.evaluations,
            converged=converged,
            reason=reason,
        )


def _largest(graph: SheafGraph, gradient: Tensor) -> float:
    size = projected_gradient(graph.weights, gradient).abs()
    return float(size.max()) if size.numel() else 0.0


def _check(
    objective: Objective,
    graph: SheafGraph,
    metric: str,
    step: float,
    max_step: float,
    tol: float,
    tol_birth: float,
    max_steps: int,
) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if objective.connection != (graph.transport is not None):
        have = "a plain graph" if graph.transport is None else "transports"
        raise ValueError(
            f"graph must have transports exactly if the objective learns them, got {have} and "
            f"connection={objective.connection}"
        )
    if objective.connection and metric == "gauss_newton":
        raise ValueError(
            "metric must be another one to learn transports, got 'gauss_newton': it bends weights only"
        )
    if not 0 < step <= max_step:
        raise ValueError(f"step must lie in (0, max_step], got {step} and max_step {max_step}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}: rounding never lets a gradient vanish")
    if not tol_birth >= 0:
        raise ValueError(f"tol_birth must be at least 0, got {tol_birth}: it is a share of the gradient")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}: nothing would be learned")
