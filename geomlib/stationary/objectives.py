r"""What a graph can be learned for: a loss of its stationary states, seen through one adjoint field.

An objective gives `learn_graph` a loss, the derivatives by all candidate weights, dead ones included, and by
the transports. All of it comes from one stationary solve and one linear solve (SGN-A5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from geomlib.stationary.births import birth
from geomlib.stationary.equation import dense_hessian
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import adjoint_field, edge_gradient, solve_stationary
from geomlib.stationary.potential import Potential

__all__ = ["Objective", "Slope", "StationaryObjective", "best_scale", "transport_gradient"]


class Slope(NamedTuple):
    """What an objective says at one graph.

    Attributes
    ----------
    loss
        Scalar.
    gradient
        `(M,)`: by the weights of all candidates; at dead edges from above, with their best transports.
    graph
        The graph, its dead edges given the transports with which they would be born.
    transport_gradient
        By phases `(M,)` or, Euclidean, by matrices `(M, d, d)`; `None` if transports are not learned.
    """

    loss: Tensor
    gradient: Tensor
    graph: SheafGraph
    transport_gradient: Tensor | None


class Objective(Protocol):
    """A loss of graphs; `connection` says whether it is one of transports as well."""

    connection: bool

    def loss(self, graph: SheafGraph) -> Tensor:
        """Return the loss, a scalar."""
        ...

    def slope(self, graph: SheafGraph) -> Slope:
        """Return loss and derivatives."""
        ...

    def curvature(self, graph: SheafGraph) -> Tensor:
        """Return a positive semi-definite approximation `(M, M)` of the Hessian by the weights."""
        ...


class StationaryObjective:
    """A loss of the stationary states that a batch of drives has on a graph.

    Parameters
    ----------
    potential
        Of the layer.
    drive
        `(B, n, d)`, real or complex.
    loss
        `loss(psi)` returns a differentiable scalar for states `(B, n, d)`.
    connection
        Learn transports as well: dead edges are then offered with their best transport.
    tol
        Of the stationary solve and the adjoint solve.
    max_steps
        Of the stationary solve, which starts from the states of the last graph and raises
        `ConvergenceError` if they do not suffice.

    Notes
    -----
    Source: reconstructed; the adjoint is arXiv 2507.20088's in name only, since its body could not be read.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> half = torch.full((2,), 0.5, dtype=torch.float64)
    >>> drive = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    >>> objective = StationaryObjective(Quartic(half, 0 * half), drive, lambda psi: -psi[:, 1].sum())
    >>> empty = SheafGraph(2, torch.tensor([[0], [1]]), 0 * half[:1])
    >>> objective.slope(empty).gradient.round()  # an edge would help
    tensor([-4.], dtype=torch.float64)
    """

    def __init__(
        self,
        potential: Potential,
        drive: Tensor,
        loss: Callable[[Tensor], Tensor],
        *,
        connection: bool = False,
        tol: float = 1e-11,
        max_steps: int = 200,
    ) -> None:
        self.potential, self.drive, self.readout = potential, drive, loss
        self.connection, self.tol, self.max_steps = connection, tol, max_steps
        self._start: Tensor | None = None

    def state(self, graph: SheafGraph) -> Tensor:
        """Return the stationary states `(B, n, d)`."""
        solution = solve_stationary(
            graph, self.potential, self.drive, start=self._start, tol=self.tol, max_steps=self.max_steps
        )
        self._start = solution.value
        return solution.value

    def loss(self, graph: SheafGraph) -> Tensor:
        """Return the loss of the stationary states, a scalar."""
        with torch.no_grad():
            return self.readout(self.state(graph))

    def slope(self, graph: SheafGraph) -> Slope:
        """Return loss and derivatives, from one stationary and one adjoint solve."""
        psi = self.state(graph)
        with torch.enable_grad():
            leaf = psi.detach().requires_grad_()
            loss = self.readout(leaf)
            (slope,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            p = adjoint_field(graph, self.potential, psi, slope)
            if not self.connection:
                return Slope(loss.detach(), edge_gradient(graph, p, psi), graph, None)
            born = birth(p, psi, graph.edges)
            have = None if graph.transport is None else tuple(graph.transport.shape)
            if graph.transport is None or have != tuple(born.transport.shape):
                raise ValueError(
                    f"graph must have transports {tuple(born.transport.shape)} for states "
                    f"{tuple(psi.shape)}, got {have}: births would not fit"
                )
            alive = graph.weights > 0
            shape = (-1,) + (1,) * (born.transport.dim() - 1)
            transport = torch.where(alive.view(shape), graph.transport, born.transport)
            graph = graph.replace(transport=transport)
            gradient = torch.where(alive, edge_gradient(graph, p, psi), born.derivative)
            return Slope(loss.detach(), gradient, graph, transport_gradient(graph, p, psi))

    @torch.no_grad()
    def curvature(self, graph: SheafGraph) -> Tensor:
        """Return the Gauss-Newton matrix `J^T loss'' J`, `(M, M)`, with `J_e = -H^-1 L_e psi`."""
        psi = self.state(graph)
        flow = torch.eye(graph.weights.numel(), dtype=psi.dtype, device=psi.device)
        # Column e: the unit flow along edge e only, (B, M, d) per edge, scattered to its two ends.
        difference = graph.coboundary(psi)
        columns = torch.stack(
            [_real(graph.divergence(difference * flow[e, None, :, None])) for e in range(len(flow))], -1
        )
        jacobian = -torch.linalg.solve(dense_hessian(graph, self.potential, psi), columns)

        with torch.enable_grad():
            point = _real(psi).requires_grad_()
            (slope,) = torch.autograd.grad(self.readout(_like(point, psi)), point, create_graph=True)
        if not slope.requires_grad:  # a linear loss does not bend
            return jacobian.new_zeros(len(flow), len(flow))
        (bent,) = torch.autograd.grad(slope, point, jacobian.movedim(-1, 0), is_grads_batched=True)
        return torch.einsum("bie,fbi->ef", jacobian, bent)


def transport_gradient(graph: SheafGraph, p: Tensor, psi: Tensor) -> Tensor:
    """Return the derivatives of a loss by the transports of all edges.

    Parameters
    ----------
    graph
        With transports: phases `(M,)` or matrices `(M, d, d)`.
    p
        Adjoint field `(B, n, d)`.
    psi
        Stationary state `(B, n, d)`.

    Returns
    -------
    Tensor
        `(M,)` by phases, or the Euclidean gradient `(M, d, d)` by matrices. Zero at dead edges.

    Raises
    ------
    ValueError
        If the graph has no transports.

    Notes
    -----
    Source: reconstructed (SGN-A5): `-w_e [(delta psi)_e p_v^* + (delta p)_e psi_v^*]`, summed over the batch;
    a phase is its component along `i tau`.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), one, torch.zeros(1, dtype=torch.float64))
    >>> psi = torch.tensor([[[1.0], [1j]]], dtype=torch.complex128)
    >>> transport_gradient(graph, psi, psi)  # of |psi_u - exp(i theta) psi_v|^2
    tensor([2.], dtype=torch.float64)
    """
    if graph.transport is None:
        raise ValueError("graph must have transports, got a plain graph: nothing to differentiate by")
    v = graph.edges[1]
    outer = torch.einsum("bka,bkc->kac", graph.coboundary(psi), p[:, v].conj_physical())
    outer = outer + torch.einsum("bka,bkc->kac", graph.coboundary(p), psi[:, v].conj_physical())
    euclidean = -graph.weights[:, None, None] * outer
    if graph.transport.dim() > 1:
        return euclidean
    along = 1j * torch.polar(torch.ones_like(graph.transport), graph.transport)
    return (euclidean[:, 0, 0].conj_physical() * along).real


def best_scale(logits: Tensor, labels: Tensor, *, steps: int = 30) -> Tensor:
    """Return the positive factor of the logits with the smallest mean cross-entropy.

    Parameters
    ----------
    logits
        `(N, K)`.
    labels
        `(N,)`, int64.
    steps
        Of Newton's method in one dimension, where the loss is convex.

    Returns
    -------
    Tensor
        Scalar in [1e-3, 1e3].

    Examples
    --------
    >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> best_scale(logits, torch.tensor([0, 0, 0, 1]))  # log 3: three of four are right
    tensor(1.0986)
    """
    scale = logits.new_ones(())
    right = logits.gather(1, labels[:, None])[:, 0].mean()
    for _ in range(steps):
        shares = (scale * logits).softmax(1)
        mean = (shares * logits).sum(1)
        slope = mean.mean() - right
        bend = ((shares * logits.square()).sum(1) - mean.square()).mean().clamp_min(1e-12)
        # At most a factor of three at a time: far out the curvature vanishes faster than the slope.
        scale = torch.minimum(torch.maximum(scale - slope / bend, scale / 3), scale * 3).clamp(1e-3, 1e3)
    return scale


def _real(psi: Tensor) -> Tensor:
    """Flatten `(B, n, d)` to real coordinates `(B, n d)` or `(B, 2 n d)`, node by node."""
    return (torch.view_as_real(psi) if psi.is_complex() else psi).flatten(1)


def _like(x: Tensor, psi: Tensor) -> Tensor:
    """Undo :func:`_real`."""
    if not psi.is_complex():
        return x.view(psi.shape)
    return torch.view_as_complex(x.view(*psi.shape, 2))
