"""Whole systems written out: real coordinates of states, sparse Hessians, symmetric solves of any operator.

What the supra-graph of arXiv 2507.20088 needs below its equations. Real coordinates are those of
`torch.view_as_real`: real and imaginary parts interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import sparse
from torch import Tensor

from geomlib.core import Solution, conjugate_gradient
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import UnstableBranchError
from geomlib.stationary.potential import Potential

__all__ = [
    "as_real",
    "empty_solution",
    "layer_bias",
    "layer_shape",
    "like_state",
    "realify",
    "refined",
    "sparse_hessian",
    "symmetric_solve",
    "transport_matrices",
]

# Real unknowns up to which a whole system is written out and factorised.
DENSE_LIMIT = 200
# Relative residual of linear solves that are not inside a Newton iteration, and how often they are refined.
LINEAR = 1e-14
REFINEMENTS = 3


def as_real(psi: Tensor) -> Tensor:
    """Return states `(B, size)` as real vectors, real and imaginary parts interleaved."""
    return torch.view_as_real(psi.resolve_conj()).flatten(1) if psi.is_complex() else psi


def like_state(flat: Tensor, psi: Tensor) -> Tensor:
    """Undo :func:`as_real` for a state of the dtype of `psi`."""
    return torch.view_as_complex(flat.unflatten(1, (-1, 2)).contiguous()) if psi.is_complex() else flat


def empty_solution(psi: Tensor) -> Solution:
    """Return what there is to say of no samples at all."""
    none = psi.new_zeros(0, dtype=psi.dtype.to_real())
    return Solution(psi, none, None, none.long(), none.bool(), "converged", none.view(0, 0))


def realify(matrix: Tensor) -> Tensor:
    """Return complex matrices `(..., p, q)` as real ones `(..., 2 p, 2 q)`, real and imaginary interleaved.

    Examples
    --------
    >>> import torch
    >>> realify(torch.tensor([[1j]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    upper = torch.stack([matrix.real, -matrix.imag], -1)
    lower = torch.stack([matrix.imag, matrix.real], -1)
    blocks = torch.stack([upper, lower], -2)  # (..., p, q, 2, 2)
    *lead, p, q = matrix.shape
    return blocks.transpose(-3, -2).reshape(*lead, 2 * p, 2 * q)


def transport_matrices(graph: SheafGraph, stalk: int) -> Tensor:
    """Return the transports as unitary matrices `(M, stalk, stalk)`, real where they are given so."""
    weights, transport = graph.weights, graph.transport
    if transport is not None and transport.dim() == 3:
        return transport
    unit = torch.eye(stalk, dtype=weights.dtype, device=weights.device)
    if transport is None:
        return unit.expand(len(weights), stalk, stalk)
    phases = transport.to(weights.dtype)
    return torch.polar(torch.ones_like(phases), phases)[:, None, None] * unit


def sparse_hessian(graph: SheafGraph, potential: Potential, state: Tensor) -> sparse.coo_array:
    """Assemble the real Hessian of one layer at a state `(1, n, d)`; the potential must act inside nodes."""
    _, n, d = state.shape
    real = 2 * d if state.is_complex() else d
    weights = graph.weights.detach()
    blocks = transport_matrices(graph, d).detach()
    blocks = realify(blocks + 0j) if state.is_complex() else blocks
    u, v = graph.edges
    inner = torch.arange(real, device=weights.device)
    off_rows = (u[:, None, None] * real + inner[:, None]).expand(-1, real, real)
    off_columns = (v[:, None, None] * real + inner).expand(-1, real, real)
    off = -weights[:, None, None] * blocks.to(weights)
    degree = torch.zeros(n, dtype=weights.dtype, device=weights.device)
    degree = degree.index_add(0, u, weights).index_add(0, v, weights).repeat_interleave(real)
    local = potential.blocks(state)[0]  # (n, row, column)
    at = torch.arange(n, device=weights.device)
    local_rows = (at[:, None, None] * real + inner[:, None]).expand(-1, real, real)
    local_columns = (at[:, None, None] * real + inner).expand(-1, real, real)
    diagonal = torch.arange(n * real, device=weights.device)
    rows = [off_rows, off_columns, local_rows, diagonal]
    columns_ = [off_columns, off_rows, local_columns, diagonal]
    values = [off, off, local, degree]
    r, c, a = (
        torch.cat([part.flatten().cpu() for part in parts]).numpy() for parts in (rows, columns_, values)
    )
    return sparse.coo_array((a, (r, c)), shape=(n * real, n * real))


def symmetric_solve(
    product: Callable[..., Tensor], given: tuple[Tensor, ...], right: Tensor, accuracy: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Solve `product(*given, v) = right` for each sample, and say which are not positive definite.

    `given` are tensors with one row a sample. Small systems are written out and factorised.
    """
    flat = as_real(right)
    batch, entries = flat.shape
    if entries > DENSE_LIMIT:
        step, info = conjugate_gradient(lambda v: product(*given, v), right, tol=accuracy)
        return step, info.negative
    basis = torch.eye(entries, dtype=flat.dtype, device=flat.device).repeat(batch, 1)
    repeated = [tensor.repeat_interleave(entries, 0) for tensor in given]
    columns = as_real(product(*repeated, like_state(basis, right))).unflatten(0, (batch, entries))
    factor, failed = torch.linalg.cholesky_ex((columns + columns.mT) / 2)
    solved = torch.cholesky_solve(flat[..., None], factor)[..., 0]
    indefinite = failed != 0
    return like_state(torch.where(indefinite[:, None], 0.0, solved), right), indefinite


def refined(product: Callable[..., Tensor], given: tuple[Tensor, ...], right: Tensor) -> Tensor:
    """Solve down to rounding, with iterative refinement for entries of small weight."""
    x = torch.zeros_like(right)
    for _ in range(REFINEMENTS):
        step, indefinite = symmetric_solve(product, given, right - product(*given, x), LINEAR)
        if indefinite.any():
            raise UnstableBranchError(
                f"the relaxed Hessian is not positive definite for {int(indefinite.sum())} of {len(right)} "
                "samples: raise the strength"
            )
        x = x + step
    return x


def layer_shape(place: int, nodes: int, K: Tensor, columns: int | None, first: Tensor) -> tuple[int, int]:
    """Return `(nodes, stalk)` of the layer that the map at `place` writes to, or say what does not fit."""
    if K.dim() != 2 or (columns is not None and K.shape[1] != columns):
        raise ValueError(
            f"map {place} must have shape (rows, {'inputs' if columns is None else columns}), got "
            f"{tuple(K.shape)}: it reads the layer before"
        )
    if nodes < 1 or not len(K) or len(K) % nodes:
        raise ValueError(f"map {place} must have a multiple of {nodes} rows, one stalk a node, got {len(K)}")
    if K.dtype != first.dtype or K.device != first.device:
        raise ValueError(
            f"maps must share dtype and device, got {K.dtype} beside {first.dtype} at map {place}"
        )
    if not torch.isfinite(K).all():
        raise ValueError(f"map {place} must be finite, got NaN or infinity")
    return nodes, len(K) // nodes


def layer_bias(place: int, bias: Tensor | None, shape: tuple[int, int], K: Tensor) -> Tensor:
    """Return a bias in the shape of its layer, zero if there is none."""
    if bias is None:
        return K.new_zeros(shape)
    if bias.numel() != math.prod(shape):
        raise ValueError(f"bias {place} must have shape {shape}, got {tuple(bias.shape)}")
    return bias.to(K.dtype).reshape(shape)
