"""The Gaussian field whose precision matrix is a grounded Laplacian: samples, score, information, likelihood.

It gives the log-det metric its statistical meaning: the metric is twice the Fisher information, and the
Hessian of the negative log likelihood, so that a natural step of length one is a projected Newton step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geomlib.stationary.geometry import (
    check_metric,
    grounded_laplacian,
    log_det_potential,
    metric,
    resistances,
)
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.objectives import Slope

__all__ = ["LogDetLikelihood", "fisher_information", "sample_field", "score"]


def fisher_information(graph: SheafGraph, epsilon: float) -> Tensor:
    """Return the Fisher information `(M, M)` of the weights in the field `x ~ N(0, (L_w + epsilon I)^-1)`.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon
        Positive.

    Raises
    ------
    ValueError
        If `epsilon` is not positive.

    Notes
    -----
    Source: known for Gaussian fields with a Laplacian precision matrix; half the metric without `rho`
    (SGN-B7).

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> fisher_information(graph, 0.5)
    tensor([[0.3200]])
    """
    return metric(graph, epsilon, rho=0.0) / 2


def sample_field(
    graph: SheafGraph, epsilon: float, samples: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw signals `(samples, n)` of the field `N(0, (L_w + epsilon I)^-1)`.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon
        Positive.
    samples
        At least one.
    generator
        On the CPU.

    Raises
    ------
    ValueError
        If `epsilon` is not positive or `samples` is less than one.

    Notes
    -----
    Source: known: `x = C^-T z` with the Cholesky factor `C C^T = L_w + epsilon I` and white `z`.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> sample_field(graph, 0.5, 7, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([7, 2])
    """
    check_metric(epsilon)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: there would be no signal")
    precision = grounded_laplacian(graph, epsilon)
    white = torch.randn(samples, graph.nodes, generator=generator, dtype=precision.dtype)
    factor = torch.linalg.cholesky(precision)
    return torch.linalg.solve_triangular(factor.T, white.to(precision.device).T, upper=True).T


def score(graph: SheafGraph, epsilon: float, signals: Tensor) -> Tensor:
    """Return the derivatives `(N, M)` of the log likelihood of each signal `(N, n)` by the weights.

    Parameters
    ----------
    graph
        Weights `(M,)`.
    epsilon
        Positive.
    signals
        `(N, n)`, real.

    Raises
    ------
    ValueError
        If `epsilon` is not positive or the signals have another number of nodes.

    Notes
    -----
    Source: known: `(R_ee - (x_u - x_v)^2) / 2`.

    Examples
    --------
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> score(graph, 0.5, torch.tensor([[1.0, 0.0]]))  # (0.8 - 1) / 2
    tensor([[-0.1000]])
    """
    if signals.dim() != 2 or signals.shape[1] != graph.nodes:
        raise ValueError(
            f"signals must have shape (N, {graph.nodes}), got {tuple(signals.shape)}: one number per node"
        )
    u, v = graph.edges
    return (resistances(graph, epsilon).diagonal() - (signals[:, u] - signals[:, v]).square()) / 2


class LogDetLikelihood:
    """Negative log likelihood of a graph, given signals of its Gaussian field.

    Up to constants and the factor 1/2, `tr(S (L_w + epsilon I)) - log det(L_w + epsilon I)`, convex in the
    weights; its Hessian is the log-det metric.

    Parameters
    ----------
    covariance
        `S`, `(n, n)`: second moments of the signals, real.
    epsilon
        Positive: conductance to the ground.

    Raises
    ------
    ValueError
        If the covariance is not square or `epsilon` is not positive.

    Notes
    -----
    Source: known (graphical lasso with a Laplacian precision); see SGN-B7.

    Examples
    --------
    >>> truth = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> covariance = torch.linalg.inv(grounded_laplacian(truth, 0.5))
    >>> LogDetLikelihood(covariance, 0.5).slope(truth).gradient.abs() < 1e-6
    tensor([True])
    """

    connection = False

    def __init__(self, covariance: Tensor, epsilon: float) -> None:
        check_metric(epsilon)
        if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance must have shape (n, n), got {tuple(covariance.shape)}: not square")
        self.covariance, self.epsilon = covariance, epsilon

    def loss(self, graph: SheafGraph) -> Tensor:
        """Return the loss, a scalar."""
        trace = (self.covariance * grounded_laplacian(graph, self.epsilon)).sum()
        return trace + log_det_potential(graph, self.epsilon)

    def slope(self, graph: SheafGraph) -> Slope:
        """Return loss and derivatives `(x_u - x_v)^2 - R_ee`, averaged over the signals."""
        (u, v), diagonal = graph.edges, self.covariance.diagonal()
        spread = diagonal[u] + diagonal[v] - self.covariance[u, v] - self.covariance[v, u]
        gradient = spread - resistances(graph, self.epsilon).diagonal()
        return Slope(self.loss(graph), gradient, graph, None)

    def curvature(self, graph: SheafGraph) -> Tensor:
        """Return the Hessian `(M, M)`, which is the log-det metric."""
        return metric(graph, self.epsilon, rho=0.0)
