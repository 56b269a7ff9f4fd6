r"""The geometry of weighted graphs: a metric on weights that is finite at every face of the orthant.

The potential `phi(w) = -log det(L_w + epsilon I) + rho / 2 |w|^2` is smooth on and beyond the faces `w_e =
0`. Its Hessian `G(w)`, the entrywise square of effective resistances, measures weights and phases alike
(arXiv 2507.20088 announces a non-degenerate Kähler-Hessian metric; its own potential could not be read, so
this one is reconstructed).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.stationary.graph import SheafGraph

__all__ = [
    "Tube",
    "codazzi",
    "log_det_potential",
    "metric",
    "metric_bounds",
    "relabel",
    "resistances",
    "tube",
]


def log_det_potential(graph: SheafGraph, epsilon: float, rho: float = 0.0) -> Tensor:
    """Return `-log det(L_w + epsilon I) + rho / 2 |w|^2`, differentiable in the weights.

    Parameters
    ----------
    graph
        Weights `(M,)`; transports play no part.
    epsilon
        Conductance from every node to the ground, positive.
    rho
        Weight of the square, at least zero.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    ValueError
        If `epsilon` is not positive or `rho` is negative.

    Notes
    -----
    Source: reconstructed: finite on and beyond every face, invariant under relabelling, and its Hessian is
    twice a Fisher information.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0], dtype=torch.float64))
    >>> round(float(log_det_potential(graph, 0.5)), 4)  # -log(0.5 * 2.5)
    -0.2231
    """
    check_metric(epsilon, rho)
    lower = torch.linalg.cholesky(grounded_laplacian(graph, epsilon))
    return -2 * lower.diagonal().log().sum() + rho / 2 * graph.weights.square().sum()


def grounded_laplacian(graph: SheafGraph, epsilon: float) -> Tensor:
    """Return `L_w + epsilon I`, `(n, n)`, of the plain graph without its transports."""
    laplacian = graph.with_tensors(graph.weights, None).dense_laplacian()
    return laplacian + epsilon * torch.eye(graph.nodes, dtype=laplacian.dtype, device=laplacian.device)


def resistances(graph: SheafGraph, epsilon: float, *, edges: Tensor | None = None) -> Tensor:
    """Return the Gram matrix `R = B (L_w + epsilon I)^-1 B^T` of edges.

    Its diagonal holds the effective resistances between the ends of each edge, in the graph whose every node
    is grounded by a conductance `epsilon`.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon
        Positive.
    edges
        `(2, K)` int64: which pairs of nodes to look at; all candidates by default.

    Returns
    -------
    Tensor
        `(K, K)`, symmetric.

    Raises
    ------
    ValueError
        If `epsilon` is not positive.

    Notes
    -----
    Source: reconstructed. Four entries of one inverse per pair of edges; `B` is never formed.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> resistances(graph, 0.5)  # 2 / (2 w + epsilon)
    tensor([[0.8000]])
    """
    check_metric(epsilon)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(grounded_laplacian(graph, epsilon)))
    u, v = graph.edges if edges is None else edges
    difference = covariance[u] - covariance[v]
    return difference[:, u] - difference[:, v]


def metric(graph: SheafGraph, epsilon: float, rho: float = 1e-8, *, edges: Tensor | None = None) -> Tensor:
    """Return the Hessian `G(w)` of the log-det potential: squared resistances plus `rho` on the diagonal.

    Parameters
    ----------
    graph
        Weights `(M,)`, zeros allowed.
    epsilon
        Positive: the smaller, the further away are the faces at which the graph falls apart.
    rho
        At least zero.
    edges
        `(2, K)` int64: restrict to these candidates, which is the metric of that stratum.

    Returns
    -------
    Tensor
        `(K, K)`, symmetric positive definite.

    Raises
    ------
    ValueError
        If `epsilon` is not positive or `rho` is negative.

    Notes
    -----
    Source: reconstructed (SGN-B1): twice the Fisher information of the field `N(0, (L_w + epsilon I)^-1)`.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([0.0], dtype=torch.float64))
    >>> metric(graph, 0.5, rho=0.0)  # finite on the face: (2 / epsilon)^2
    tensor([[16.0000]], dtype=torch.float64)
    """
    check_metric(epsilon, rho)
    squared = resistances(graph, epsilon, edges=edges).square()
    return squared + rho * torch.eye(len(squared), dtype=squared.dtype, device=squared.device)


def metric_bounds(graph: SheafGraph, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return bounds of the eigenvalues of `metric(graph, epsilon, rho=0)`.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon
        Positive.

    Returns
    -------
    tuple of Tensor
        `2 / (lambda_max(L_w) + epsilon)^2` and `(2 + 2 Delta) / epsilon^2`, scalars, with the largest number
        `Delta` of candidates at one node.

    Raises
    ------
    ValueError
        If `epsilon` is not positive.

    Notes
    -----
    Source: reconstructed (SGN-B2): `x^T G x = |S^(1/2) L_x S^(1/2)|^2` in the Frobenius norm, `S` the inverse
    of `L_w + epsilon I`, and `2 |x|^2 <= |L_x|^2 <= (2 + 2 Delta) |x|^2`. Both are attained at `w = 0` on
    the complete graph.

    Examples
    --------
    >>> lower, upper = metric_bounds(SheafGraph.complete(8, weights=torch.zeros(28)), 0.5)
    >>> float(lower), float(upper)
    (8.0, 64.0)
    """
    check_metric(epsilon)
    top = torch.linalg.eigvalsh(grounded_laplacian(graph, epsilon))[-1]
    counts = torch.bincount(graph.edges.flatten(), minlength=graph.nodes)
    return 2 / top.square(), (2 + 2 * counts.max()) / torch.full_like(top, epsilon).square()


def codazzi(graph: SheafGraph, epsilon: float) -> Tensor:
    """Return the derivative `C[e, f, g] = dG_ef / dw_g = -2 R_ef R_fg R_ge`, `(M, M, M)`.

    It is symmetric under every exchange of two places, which is Codazzi's equation, and which makes the
    metric of the tube Kähler: its form is closed.

    Parameters
    ----------
    graph
        Weights `(M,)`; the result has `M^3` entries.
    epsilon
        Positive.

    Raises
    ------
    ValueError
        If `epsilon` is not positive.

    Notes
    -----
    Source: known for Hessian metrics (Shima 2007); the formula by differentiating the inverse (SGN-B3).

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> codazzi(graph, 0.5)  # d/dw 4 / (2 w + epsilon)^2
    tensor([[[-1.0240]]])
    """
    r = resistances(graph, epsilon)
    return -2 * r[:, :, None] * r[None] * r[:, None, :]


class Tube(NamedTuple):
    """Kähler structure on weights and phases `(w, theta)`, at one point.

    Attributes
    ----------
    metric
        `g`, `(2M, 2M)`: `G / 4` twice on the diagonal.
    form
        `omega(a, b) = g(J a, b)`, `(2M, 2M)`, antisymmetric.
    structure
        `J`, `(2M, 2M)`: turns a weight into its phase, `J^2 = -I`.
    """

    metric: Tensor
    form: Tensor
    structure: Tensor


def tube(graph: SheafGraph, epsilon: float, rho: float = 1e-8) -> Tube:
    """Return the Kähler structure whose potential is the log-det potential of the real part of `w + i theta`.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon, rho
        As in :func:`metric`.

    Raises
    ------
    ValueError
        As in :func:`metric`.

    Notes
    -----
    Source: known (Shima 2007; Cheng and Yau 1982); reading `theta` as the phase of a U(1) connection is
    reconstructed: one metric then drives weights and phases, and it does not degenerate at `w_e = 0`.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([0.0]))
    >>> tube(graph, 0.5, rho=0.0).metric.round(decimals=4)
    tensor([[4., 0.],
            [0., 4.]])
    """
    quarter = metric(graph, epsilon, rho) / 4
    edges = len(quarter)
    turn = torch.zeros(2 * edges, 2 * edges, dtype=quarter.dtype, device=quarter.device)
    turn[edges:, :edges].fill_diagonal_(1)
    turn[:edges, edges:].fill_diagonal_(-1)
    g = torch.block_diag(quarter, quarter)
    return Tube(g, turn.T @ g, turn)


def relabel(graph: SheafGraph, permutation: Tensor) -> tuple[SheafGraph, Tensor]:
    """Rename node `i` to `permutation[i]`.

    Parameters
    ----------
    graph
        Any.
    permutation
        `(n,)` int64, a permutation of `0 ... n - 1`.

    Returns
    -------
    tuple of SheafGraph and Tensor
        The renamed graph, its edges sorted, and `order`, `(M,)` int64: edge `k` of the new graph is edge
        `order[k]` of the old one. An edge whose ends change sides has its transport inverted.

    Raises
    ------
    ValueError
        If `permutation` is none.

    Examples
    --------
    >>> graph = SheafGraph(3, torch.tensor([[0, 0], [1, 2]]), torch.tensor([1.0, 2.0]))
    >>> renamed, order = relabel(graph, torch.tensor([2, 0, 1]))
    >>> renamed.edges.tolist(), renamed.weights.tolist(), order.tolist()
    ([[0, 1], [2, 2]], [1.0, 2.0], [0, 1])
    """
    if permutation.shape != (graph.nodes,) or sorted(permutation.tolist()) != list(range(graph.nodes)):
        raise ValueError(
            f"permutation must hold each of 0 ... {graph.nodes - 1} once, got {permutation.tolist()}"
        )
    u, v = permutation[graph.edges]
    order = (torch.minimum(u, v) * graph.nodes + torch.maximum(u, v)).argsort()
    edges = torch.stack([torch.minimum(u, v), torch.maximum(u, v)])[:, order]
    transport = graph.transport
    if transport is not None:
        flipped = (u > v)[order]
        transport = transport[order]
        if transport.dim() == 1:
            transport = torch.where(flipped, -transport, transport)
        else:
            transport = torch.where(flipped[:, None, None], transport.mT.conj_physical(), transport)
    return SheafGraph(graph.nodes, edges, graph.weights[order], transport), order


def check_metric(epsilon: float, rho: float = 0.0) -> None:
    """Raise `ValueError` unless `epsilon > 0` and `rho >= 0`."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}: a graph without edges would be singular")
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho}: the potential would not be convex")
