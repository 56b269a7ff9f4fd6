"""How far a stationary state moves when its graph changes: through the weights, and through the metric.

Two graphs are near if their weights are, or if their nodes are as far apart in effective resistance. Both
bound the change of the state (C1 and C5 of the room; arXiv 2507.20088 names such bounds in its abstracts, and
their form is reconstructed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from geomlib.stationary.graph import SheafGraph

__all__ = [
    "LipschitzChain",
    "MetricStability",
    "distortion",
    "green_from_resistance",
    "lipschitz_chain",
    "metric_stability",
    "resistance_metric",
]

MOST_PERMUTED = 8


@dataclass(frozen=True, eq=False)
class LipschitzChain:
    """Three numbers of each sample, each at most the next (C1).

    Attributes
    ----------
    distance : Tensor
        `(B,)`: how far the two states are apart.
    residual : Tensor
        `(B,)`: `|L psi' - L' psi'| / mu`, from one residual and no second solve.
    uniform : Tensor
        `(B,)`: `2 degree |f| / mu^2 * change`, known before any solve.
    degree : int
        Largest degree of the union of both supports.
    change : float
        Largest change of a weight.
    """

    distance: Tensor
    residual: Tensor
    uniform: Tensor
    degree: int
    change: float


def lipschitz_chain(
    graph: SheafGraph, other: SheafGraph, state: Tensor, other_state: Tensor, drive: Tensor, *, mu: float
) -> LipschitzChain:
    """Compare the states of two graphs with what strong monotonicity promises (C1).

    Parameters
    ----------
    graph, other : SheafGraph
        The same nodes, candidate edges and transport; other weights.
    state, other_state : Tensor
        `(B, n, d)`: the stationary states of both for the same drive and potential.
    drive : Tensor
        `(B, n, d)`.
    mu : float
        Modulus of strong monotonicity of both, positive.

    Returns
    -------
    LipschitzChain

    Raises
    ------
    ValueError
        If `mu` is not positive, the shapes differ, or the graphs differ in more than their weights.

    Notes
    -----
    Source: reconstructed. At `other_state` the residual of `graph` is `(L - L') other_state`, and strong
    monotonicity divides it by `mu`; then `|L_x| <= 2 degree max|x_e|` and `|psi'| <= |f| / mu`.

    Examples
    --------
    >>> edge, f = torch.tensor([[0], [1]]), torch.tensor([[[1.0], [-1.0]]])
    >>> graph, other = SheafGraph(2, edge, torch.tensor([1.0])), SheafGraph(2, edge, torch.tensor([2.0]))
    >>> chain = lipschitz_chain(graph, other, f / 3, f / 5, f, mu=1.0)  # (2 w + 1) psi = f
    >>> [round(float(part), 3) for part in (chain.distance, chain.residual, chain.uniform)]
    [0.189, 0.566, 2.828]
    """
    _check_mu(mu, "the layer would not be strongly monotone")
    if not state.shape == other_state.shape == drive.shape:
        raise ValueError(
            f"state, other_state and drive must have one shape, got {tuple(state.shape)}, "
            f"{tuple(other_state.shape)} and {tuple(drive.shape)}"
        )
    _check_same_candidates(graph, other)
    support = (graph.weights > 0) | (other.weights > 0)
    ends = graph.edges[:, support].flatten()
    degree = int(torch.bincount(ends, minlength=1).max())
    change = float((graph.weights - other.weights).abs().max()) if len(graph.weights) else 0.0
    # Two Laplacians and not that of the difference, whose weights may be negative.
    residual = graph.laplacian(other_state) - other.laplacian(other_state)
    size = _norm(drive)
    return LipschitzChain(
        _norm(state - other_state), _norm(residual) / mu, 2 * degree * size / mu**2 * change, degree, change
    )


def resistance_metric(graph: SheafGraph, *, mu: float) -> Tensor:
    """Return the effective resistances of a plain graph whose nodes are all grounded by `mu` (C5).

    Parameters
    ----------
    graph : SheafGraph
        Plain (without transport).
    mu : float
        Conductance of every node to the ground, positive.

    Returns
    -------
    Tensor
        `(n, n)`, symmetric, zero on the diagonal: a metric on the nodes.

    Raises
    ------
    ValueError
        If `mu` is not positive or the graph has a connection.

    Notes
    -----
    Source: known (Klein and Randic 1993), applied to the graph with one more node, the ground.
    `R_uv = (e_u - e_v)^T (L + mu)^-1 (e_u - e_v)`.

    Examples
    --------
    >>> pair = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0], dtype=torch.float64))
    >>> round(float(resistance_metric(pair, mu=1.0)[0, 1]), 6)  # 2 / (1 + 2 w)
    0.4
    """
    _check_mu(mu, "a graph in two pieces would have infinite resistance")
    if graph.transport is not None:
        raise ValueError("graph must have no transport: resistance is defined on a plain graph")
    laplacian = graph.dense_laplacian(stalk=1)
    unit = torch.eye(graph.nodes, dtype=laplacian.dtype, device=laplacian.device)
    green = torch.linalg.inv(laplacian + mu * unit)
    at_node = green.diagonal()
    found = at_node[:, None] + at_node - green - green.mT
    return found - torch.diag(found.diagonal())


def green_from_resistance(metric: Tensor, *, mu: float) -> Tensor:
    """Rebuild `(L + mu)^-1` from the resistances alone (C5).

    Parameters
    ----------
    metric : Tensor
        `(n, n)`, of :func:`resistance_metric`.
    mu : float
        The same conductance.

    Returns
    -------
    Tensor
        `(n, n)`: `11^T / (n mu) - C R C / 2` with `C = I - 11^T / n`.

    Raises
    ------
    ValueError
        If `metric` is not square or `mu` not positive.

    Notes
    -----
    Source: known for the ungrounded Laplacian (Klein and Randic 1993); that the grounded one keeps the form
    is reconstructed, from `(L + mu) 1 = mu 1`.

    Examples
    --------
    >>> pair = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0], dtype=torch.float64))
    >>> [
    ...     [round(x, 6) for x in row]
    ...     for row in green_from_resistance(resistance_metric(pair, mu=1.0), mu=1.0).tolist()
    ... ]
    [[0.6, 0.4], [0.4, 0.6]]
    """
    _check_mu(mu, "constants would have no inverse")
    _check_square("metric", metric)
    n = len(metric)
    centred = metric - metric.mean(0) - metric.mean(1, keepdim=True) + metric.mean()
    return 1 / (n * mu) - centred / 2


def distortion(metric: Tensor, other: Tensor, *, relabel: bool = False) -> float:
    """Return the largest difference of two metrics on as many nodes; half of it bounds Gromov-Hausdorff.

    Parameters
    ----------
    metric, other : Tensor
        `(n, n)`.
    relabel : bool
        Whether the nodes bear no labels: the least distortion over all permutations, by trying them all, for
        at most 8 nodes.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the shapes differ, or there are too many nodes to permute.

    Notes
    -----
    Source: known (Burago, Burago and Ivanov 2001, section 7.3): the Gromov-Hausdorff distance is half of the
    least distortion of a correspondence, and a permutation is one.

    Examples
    --------
    >>> path = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    >>> other = path[[1, 0, 2]][:, [1, 0, 2]]
    >>> distortion(path, other), distortion(path, other, relabel=True)
    (1.0, 0.0)
    """
    _check_square("metric", metric)
    if metric.shape != other.shape:
        raise ValueError(
            f"metric and other must have one shape, got {tuple(metric.shape)} and {tuple(other.shape)}"
        )
    n = len(metric)
    if not relabel:
        return float((metric - other).abs().max()) if n else 0.0
    if n > MOST_PERMUTED:
        raise ValueError(
            f"relabel must be asked for at most {MOST_PERMUTED} nodes, got {n}: all permutations are tried"
        )
    orders = torch.tensor(list(permutations(range(n))), device=metric.device)
    moved = other[orders[:, :, None], orders[:, None, :]]  # (n!, n, n)
    return float((metric - moved).abs().flatten(1).amax(1).min()) if n else 0.0


@dataclass(frozen=True, eq=False)
class MetricStability:
    """How far two graphs are apart as metric spaces, and how far their outputs (C5).

    Attributes
    ----------
    distortion : float
        Largest difference of the resistances.
    gromov_hausdorff : float
        Half of it: an upper bound of the Gromov-Hausdorff distance.
    gap : Tensor
        `(B,)`: how far the outputs of the two linear layers are apart.
    bound : Tensor
        `(B,)`: `n / 2 * distortion * |f|`.
    """

    distortion: float
    gromov_hausdorff: float
    gap: Tensor
    bound: Tensor


def metric_stability(graph: SheafGraph, other: SheafGraph, drive: Tensor, *, mu: float) -> MetricStability:
    """Compare two plain graphs as metrics and as linear layers, `(L + mu) psi = f` (C5).

    Parameters
    ----------
    graph, other : SheafGraph
        Plain, with as many nodes; their edges may differ.
    drive : Tensor
        `(B, n, d)`, real or complex.
    mu : float
        The constant potential, positive.

    Returns
    -------
    MetricStability

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: reconstructed: `|C X C| <= |X| <= n max|X_uv|` for the difference `X` of the resistances.

    Examples
    --------
    >>> edge, f = torch.tensor([[0], [1]]), torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    >>> one, two = (SheafGraph(2, edge, torch.tensor([w], dtype=torch.float64)) for w in (1.0, 2.0))
    >>> found = metric_stability(one, two, f, mu=1.0)
    >>> round(found.distortion, 3), bool(found.gap <= found.bound)
    (0.267, True)
    """
    first, second = resistance_metric(graph, mu=mu), resistance_metric(other, mu=mu)
    if drive.dim() != 3 or drive.shape[1] != graph.nodes:
        raise ValueError(f"drive must have shape (B, {graph.nodes}, d), got {tuple(drive.shape)}")
    apart = distortion(first, second)
    difference = green_from_resistance(first, mu=mu) - green_from_resistance(second, mu=mu)
    gap = _norm(torch.einsum("uv,bvd->bud", difference.to(drive.dtype), drive))
    return MetricStability(apart, apart / 2, gap, graph.nodes / 2 * apart * _norm(drive))


def _norm(state: Tensor) -> Tensor:
    return torch.linalg.vector_norm(state.flatten(1), dim=1)


def _check_mu(mu: float, consequence: str) -> None:
    if not (mu > 0 and math.isfinite(mu)):
        raise ValueError(f"mu must be positive and finite, got {mu}: {consequence}")


def _check_square(name: str, metric: Tensor) -> None:
    if metric.dim() != 2 or metric.shape[0] != metric.shape[1]:
        raise ValueError(f"{name} must be square, got shape {tuple(metric.shape)}: one row for each node")


def _check_same_candidates(graph: SheafGraph, other: SheafGraph) -> None:
    if graph.nodes != other.nodes or not torch.equal(graph.edges, other.edges):
        raise ValueError("graph and other must have the same nodes and candidate edges, in the same order")
    first, second = graph.transport, other.transport
    same = first is second if first is None or second is None else torch.equal(first, second)
    if not same:
        raise ValueError("graph and other must have the same transport: only the weights may differ")
