r"""The stationary equation `F(psi) = L psi + grad U(psi) - f = 0`, its energy and its Hessian.

`Phi(psi) = <psi, L psi> / 2 + U(psi) - <f, psi>` has the gradient `F`, and a layer of arXiv 2507.20088 is a
solution of `F = 0`: the end of the dissipative Schrodinger flow `d psi / dt = -(gamma + i) F(psi)`.
Everything is symmetric for the real inner product; for a nonlinear potential the Hessian is not
complex-linear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from geomlib.core import real_inner
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.potential import Potential

__all__ = ["Equation", "Path", "dense_hessian", "energy", "hessian_product", "residual"]

Path = Literal["auto", "dense", "sparse"]
# Up to so many real unknowns of a sample the Hessian is written out and factorised.
DENSE = 200
# Entries of Hessians that are held at once.
ENTRIES = 1 << 24


class Equation:
    """One stationary equation for a batch of drives: what solvers work on.

    Parameters
    ----------
    graph, potential
        The layer.
    drive
        `(B, n, d)`, real or complex.
    path
        `"dense"` writes Hessians out and factorises them, `"sparse"` only multiplies by them; `"auto"` is
        dense up to 200 real unknowns in a sample.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit, or the drive is not finite.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> graph, one = SheafGraph.complete(3, torch.ones(3)), torch.ones(3)
    >>> Equation(graph, Quartic(one, 0 * one), torch.ones(2, 3, 1)).residual(torch.ones(2, 3, 1)).abs().max()
    tensor(0.)
    """

    def __init__(self, graph: SheafGraph, potential: Potential, drive: Tensor, path: Path = "auto") -> None:
        self.graph, self.potential, self.drive = graph, potential, drive
        if path not in ("auto", "dense", "sparse"):
            raise ValueError(f"path must be 'auto', 'dense' or 'sparse', got {path!r}")
        check_state(graph, potential, drive, "drive")
        self.unknowns = graph.nodes * drive.shape[2] * (2 if drive.is_complex() else 1)
        couples = getattr(potential, "couples_nodes", False)
        self.dense = path == "dense" or (path == "auto" and self.unknowns <= DENSE and not couples)
        self.drive = self.by_nodes(drive)

    @cached_property
    def scale(self) -> Tensor:
        """`max(1, |f|)` of each sample: what residuals are relative to."""
        return real_inner(self.drive, self.drive).sqrt().clamp_min(1.0)

    @cached_property
    def convex(self) -> bool:
        """Whether strong monotonicity is certain: no negative weights, a strongly convex potential."""
        return self.monotonicity > 0

    @cached_property
    def monotonicity(self) -> float:
        """The constant `mu` of strong monotonicity if it is certain, else 0."""
        bound = getattr(self.potential, "convexity", lambda: None)()
        if bound is None or self.graph.signed or self.drive.is_meta:
            return 0.0
        return max(0.0, float(bound))

    @cached_property
    def plain(self) -> bool:
        """Whether nothing is turned on the way and nothing recorded, so that one sparse matrix is all."""
        return self.graph.transport is None and not self.graph.weights.requires_grad

    @cached_property
    def compressed(self) -> Tensor | None:
        """The Laplacian of a plain graph as a sparse matrix `(n, n)`, where the device has them."""
        return self.graph.compressed()

    @cached_property
    def matrix(self) -> Tensor:
        """The Laplacian `(n d, n d)`."""
        return self.graph.dense_laplacian(self.drive.shape[2])

    @cached_property
    def rows(self) -> Tensor:
        """The Laplacian on real coordinates, `(N, N)`."""
        matrix = self.matrix
        return realified(matrix) if self.drive.is_complex() else matrix

    def laplacian(self, psi: Tensor) -> Tensor:
        """Return `L psi`, `(B, n, d)`."""
        if not self.dense:
            return self.graph.prepared(psi, self.compressed) if self.plain else self.graph.laplacian(psi)
        if psi.is_complex() and not self.matrix.is_complex():
            rows = torch.view_as_real(psi).flatten(2)  # (B, n, 2 d): a real L acts on both parts alike
            return torch.view_as_complex((rows.flatten(1) @ self.rows).view(*psi.shape, 2))
        return (psi.flatten(1) @ self.matrix.mT).view(psi.shape)

    def energy(self, psi: Tensor) -> Tensor:
        """Return `Phi`, `(B,)`."""
        return real_inner(psi, self.laplacian(psi) / 2 - self.drive) + self.potential.value(psi)

    def residual(self, psi: Tensor) -> Tensor:
        """Return `F`, `(B, n, d)`."""
        return self.laplacian(psi) + self.potential.gradient(psi) - self.drive

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return `H(psi) x`, `(B, n, d)`."""
        return self.laplacian(x) + self.potential.hessian_product(psi, x)

    def linearised(self, psi: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return `x -> H(psi) x` and the inverse of a typical diagonal entry of each node, `(B, n, 1)`."""
        psi = self.by_nodes(psi)
        local, curvature = linearise(self.potential, psi)
        diagonal = (self.graph.degrees() + curvature).unsqueeze(2)
        # Where it is not positive the Hessian is not either, and any positive number will do.
        inverse = torch.where(diagonal > 0, diagonal, 1.0).reciprocal()
        return lambda x: local(x, self.laplacian(x)), inverse

    def by_nodes(self, psi: Tensor) -> Tensor:
        """Return the same states in the order of memory that products with the sparse matrix want."""
        if self.dense or not self.plain or len(psi) < 2:
            return psi
        return psi.transpose(0, 1).contiguous().transpose(0, 1)

    def hessian(self, psi: Tensor) -> Tensor:
        """Return `H(psi)` on real coordinates, `(B, N, N)`."""
        nodes = self.graph.nodes
        if getattr(self.potential, "couples_nodes", False):
            return self._columns(psi)
        local = blocks(self.potential, psi)
        size = local.shape[2]
        matrix = self.rows.expand(len(psi), -1, -1).clone().view(len(psi), nodes, size, nodes, size)
        matrix.diagonal(dim1=1, dim2=3).add_(local.permute(0, 2, 3, 1))
        return matrix.view(len(psi), self.unknowns, self.unknowns)

    def _columns(self, psi: Tensor) -> Tensor:
        """Return the Hessian of a potential that has no blocks, a product for each column."""
        columns = []
        for position in range(self.unknowns):
            unit = torch.zeros_like(self.flat(psi))
            unit[:, position] = 1.0
            columns.append(self.flat(self.hessian_product(psi, self.shaped(unit))))
        return torch.stack(columns, 2)

    def shaped(self, flat: Tensor) -> Tensor:
        """Real rows `(B, N)` as states."""
        if self.drive.is_complex():
            return torch.view_as_complex(flat.reshape(*self.drive.shape, 2))
        return flat.view(self.drive.shape)

    def flat(self, psi: Tensor) -> Tensor:
        """States as real rows `(B, N)`."""
        return (torch.view_as_real(psi) if psi.is_complex() else psi).flatten(1)


def energy(graph: SheafGraph, potential: Potential, drive: Tensor, psi: Tensor) -> Tensor:
    """Return `Phi(psi) = sum_e w_e |psi_u - tau_e psi_v|^2 / 2 + U(psi) - <f, psi>` of each sample.

    Parameters
    ----------
    graph, potential
        The layer.
    drive, psi
        `(B, n, d)`, both real or both complex.

    Returns
    -------
    Tensor
        `(B,)`, differentiable in everything.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or `drive` is not finite.

    Notes
    -----
    Source: reconstructed: the simplest energy with a weighted Laplacian and a local potential.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0]))
    >>> psi = torch.tensor([[[1.0], [0.0]]])
    >>> energy(graph, Quartic(torch.ones(2), torch.zeros(2)), torch.zeros(1, 2, 1), psi)
    tensor([1.5000])
    """
    check_state(graph, potential, drive, "drive")
    jump = graph.coboundary(psi)
    tension = (graph.weights * _square(jump)).sum(1) / 2
    return tension + potential.value(psi) - real_inner(drive, psi)


def residual(graph: SheafGraph, potential: Potential, drive: Tensor, psi: Tensor) -> Tensor:
    """Return `F(psi) = L psi + grad U(psi) - f`, the gradient of the energy, `(B, n, d)`.

    Parameters
    ----------
    graph, potential
        The layer.
    drive, psi
        `(B, n, d)`, both real or both complex.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or `drive` is not finite.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0]))
    >>> psi = torch.tensor([[[1.0], [0.0]]])
    >>> residual(graph, Quartic(torch.ones(2), torch.zeros(2)), torch.zeros(1, 2, 1), psi).flatten()
    tensor([ 3., -2.])
    """
    check_state(graph, potential, drive, "drive")
    return graph.laplacian(psi) + potential.gradient(psi) - drive


def hessian_product(graph: SheafGraph, potential: Potential, psi: Tensor, x: Tensor) -> Tensor:
    """Return the Hessian of the energy at `psi` applied to `x`; symmetric for the real inner product.

    Parameters
    ----------
    graph, potential
        The layer.
    psi, x
        `(B, n, d)`, both real or both complex.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or `psi` is not finite.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> graph, potential = SheafGraph.complete(1, torch.ones(0)), Quartic(torch.ones(1), torch.ones(1))
    >>> hessian_product(graph, potential, torch.tensor([[[2.0]]]), torch.ones(1, 1, 1))
    tensor([[[13.]]])
    """
    check_state(graph, potential, psi, "psi")
    return graph.laplacian(x) + potential.hessian_product(psi, x)


def dense_hessian(graph: SheafGraph, potential: Potential, psi: Tensor) -> Tensor:
    """Return the Hessian of the energy at `psi` as a symmetric real matrix of each sample.

    Rows are ordered by node, then by component, then real before imaginary part: the order of
    `torch.view_as_real(psi).flatten(1)`.

    Parameters
    ----------
    graph, potential
        The layer.
    psi
        `(B, n, d)`.

    Returns
    -------
    Tensor
        `(B, 2 n d, 2 n d)` for complex states, `(B, n d, n d)` for real ones.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or `psi` is not finite.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> graph, potential = SheafGraph.complete(1, torch.ones(0)), Quartic(torch.ones(1), torch.ones(1))
    >>> dense_hessian(graph, potential, torch.tensor([[[2.0 + 0j]]]))
    tensor([[[13.,  0.],
             [ 0.,  5.]]])
    """
    return Equation(graph, potential, psi, "dense").hessian(psi)


def blocks(potential: Potential, psi: Tensor) -> Tensor:
    """Return the Hessian of the potential at each node, `(B, n, r, r)`, of any potential.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> blocks(Quartic(torch.ones(1), torch.ones(1)), torch.tensor([[[2.0]]]))
    tensor([[[[13.]]]])
    """
    return potential.blocks(psi) if hasattr(potential, "blocks") else Potential.blocks(potential, psi)


def linearise(potential: Potential, psi: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Return `(x, y) -> y + U''(psi) x` of any potential, and a typical curvature of each node, `(B, n)`.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> one = torch.ones(1, 1, 1)
    >>> add, curvature = linearise(Quartic(torch.ones(1), torch.ones(1)), 2 * one)
    >>> add(one, one), curvature
    (tensor([[[14.]]]), tensor([[13.]]))
    """
    if hasattr(potential, "linearise"):
        return potential.linearise(psi)
    return Potential.linearise(potential, psi)


def realified(matrix: Tensor) -> Tensor:
    """Return a matrix on `C^k`, or a real one, as it acts on interleaved real and imaginary parts.

    Examples
    --------
    >>> realified(torch.tensor([[1j]])).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    real = matrix.real if matrix.is_complex() else matrix
    imaginary = matrix.imag if matrix.is_complex() else torch.zeros_like(matrix)
    rows = torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], -3)
    return rows.reshape(2 * len(matrix), -1)


def check_state(graph: SheafGraph, potential: Potential, state: Tensor, name: str) -> None:
    """Raise `ValueError` unless a state `(B, n, d)` fits the graph and the potential and is finite.

    Examples
    --------
    >>> from geomlib.stationary.potential import Quartic
    >>> one = torch.ones(2)
    >>> check_state(SheafGraph.complete(2, one[:1]), Quartic(one, one), torch.ones(3, 2, 1), "drive")
    """
    if not (state.is_floating_point() or state.is_complex()) or state.dim() != 3:
        raise ValueError(
            f"{name} must be (batch, nodes, stalk), real or complex, got {tuple(state.shape)} {state.dtype}"
        )
    if state.shape[1] != graph.nodes:
        raise ValueError(f"{name} must have {graph.nodes} nodes as the graph has, got {tuple(state.shape)}")
    graph.check_stalk(state.shape[2])
    real = state.dtype.to_real()
    if graph.weights.dtype != real:
        raise ValueError(
            f"{name} and weights must be of one precision, got {state.dtype} and {graph.weights.dtype}"
        )
    tau = graph.transport
    if tau is not None:
        if not state.is_complex() and (tau.is_complex() or tau.dim() == 1):
            raise ValueError(f"{name} must be complex, got {state.dtype}: the transport turns phases")
        if tau.dtype.to_real() != real:
            raise ValueError(
                f"{name} and transport must be of one precision, got {state.dtype} and {tau.dtype}"
            )
    V = getattr(potential, "V", None)
    if isinstance(V, Tensor) and V.dim() == 1 and len(V) != graph.nodes:
        raise ValueError(f"V and kappa must be one number for each of the {graph.nodes} nodes, got {len(V)}")
    if not state.is_meta and state.numel() and not bool(torch.isfinite(state.detach()).all()):
        raise ValueError(f"{name} must be finite, got infinities or NaN")


def _square(jump: Tensor) -> Tensor:
    rows = torch.view_as_real(jump).flatten(2) if jump.is_complex() else jump
    return rows.square().sum(2)
