r"""The weighted Laplacian of a plain graph, with exact gradients for states and weights.

`(L_w x)_u = sum_{e = uv} w_e (x_u - x_v)`, hence `dL / dx = L g` for a cotangent `g` and `dL / dw_e = <g_u -
g_v, x_u - x_v>`. On a CPU with MKL, and on CUDA, products go through one compressed sparse matrix; automatic
differentiation of such a matrix would ask for a dense gradient, so the derivative is written out. Elsewhere
edges are gathered and scattered.
"""

from __future__ import annotations

import warnings
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["EdgeIndex", "edge_dots", "laplacian_product", "weighted_laplacian"]

# Numbers on edges that are held at once: what stays in the second-level cache.
CHUNK = 1 << 18
# From so many columns on, one sampled product is faster than dot products of gathered rows.
SAMPLED = 32


class EdgeIndex:
    """The index arrays of one list of edges, made when they are first needed.

    Parameters
    ----------
    nodes
        Number of nodes.
    edges
        `(2, M)` int64.

    Examples
    --------
    >>> index = EdgeIndex(3, torch.tensor([[0, 1], [1, 2]]))
    >>> index.matrix(torch.tensor([1.0, 2.0])).to_dense()
    tensor([[ 1., -1.,  0.],
            [-1.,  3., -2.],
            [ 0., -2.,  2.]])
    """

    def __init__(self, nodes: int, edges: Tensor) -> None:
        self.nodes, self.edges = nodes, edges

    @cached_property
    def compressed(self) -> bool:
        """Whether compressed sparse matrices work where the edges are."""
        kind = self.edges.device.type
        works = kind == "cuda" or (kind == "cpu" and torch.backends.mkl.is_available())
        if works:
            _quieten()
        return works

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts, columns, and for each entry its edge, or `M` plus its node on the diagonal."""
        first, second = self.edges
        count, device = self.edges.shape[1], self.edges.device
        nodes = torch.arange(self.nodes, device=device)
        rows, columns = torch.cat([first, second, nodes]), torch.cat([second, first, nodes])
        order = torch.argsort(rows * self.nodes + columns)
        every = torch.arange(count, device=device)
        slots = torch.cat([every, every, nodes + count])
        return *_compress(rows, columns[order], self.nodes), slots[order]

    @cached_property
    def upper(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts and columns of the entries above the diagonal, and the edge of each."""
        first, second = self.edges
        order = torch.argsort(first * self.nodes + second)
        return *_compress(first, second[order], self.nodes), order

    def matrix(self, weights: Tensor) -> Tensor:
        """Return `L_w` as a compressed sparse matrix without history."""
        weights = weights.detach()
        starts, columns, slots = self._entries
        first, second = self.edges
        degrees = weights.new_zeros(self.nodes).index_add_(0, first, weights).index_add_(0, second, weights)
        values = torch.cat([-weights, degrees]).index_select(0, slots)
        return _sparse(starts, columns, values, self.nodes)


def weighted_laplacian(psi: Tensor, weights: Tensor, index: EdgeIndex) -> Tensor:
    """Return `L_w psi` for each sample and component, differentiable to any order.

    Parameters
    ----------
    psi
        `(B, n, d)`, real or complex.
    weights
        `(M,)`, real.
    index
        The edges.

    Notes
    -----
    Source: the definition; the derivative is reconstructed (SGN-A5). Time `O(M B d)` both ways.

    Examples
    --------
    >>> index = EdgeIndex(2, torch.tensor([[0], [1]]))
    >>> weighted_laplacian(torch.tensor([[[3.0], [1.0]]]), torch.tensor([2.0]), index)
    tensor([[[ 4.],
             [-4.]]])
    """
    if psi.requires_grad or weights.requires_grad:
        return _Laplacian.apply(psi, weights, index)
    return laplacian_product(psi, weights, index, index.matrix(weights) if index.compressed else None)


def laplacian_product(psi: Tensor, weights: Tensor, index: EdgeIndex, matrix: Tensor | None) -> Tensor:
    """Return `L_w psi` without history, by the matrix of the `index` where there is one.

    Examples
    --------
    >>> index, weights = EdgeIndex(2, torch.tensor([[0], [1]])), torch.tensor([2.0])
    >>> laplacian_product(torch.tensor([[[3.0], [1.0]]]), weights, index, index.matrix(weights)).flatten()
    tensor([ 4., -4.])
    """
    rows = _rows(psi)
    if matrix is not None and rows.numel():
        return _states(matrix @ rows, psi)
    first, second = index.edges
    image = torch.zeros_like(rows)
    chunk = max(1, CHUNK // max(1, rows.shape[1]))
    for u, v, w in zip(first.split(chunk), second.split(chunk), weights.split(chunk), strict=True):
        flow = (rows.index_select(0, u) - rows.index_select(0, v)) * w.unsqueeze(1)
        image.index_add_(0, u, flow).index_add_(0, v, flow, alpha=-1)
    return _states(image, psi)


def edge_dots(p: Tensor, psi: Tensor, index: EdgeIndex) -> Tensor:
    """Return `Re <p_u - p_v, psi_u - psi_v>` of each edge, summed over the batch, `(M,)`.

    Parameters
    ----------
    p, psi
        `(B, n, d)`, both real or both complex.
    index
        The edges.

    Examples
    --------
    >>> psi = torch.tensor([[[3.0], [1.0]]])
    >>> edge_dots(psi, psi, EdgeIndex(2, torch.tensor([[0], [1]])))
    tensor([4.])
    """
    a, b = _rows(p), _rows(psi)
    first, second = index.edges
    recorded = torch.is_grad_enabled() and (p.requires_grad or psi.requires_grad)
    if index.compressed and a.shape[1] >= SAMPLED and first.numel() and not recorded:
        # <a_u - a_v, b_u - b_v> from products of different rows; with the mean taken off they do not cancel.
        a, b = a - a.mean(0), b - b.mean(0)
        starts, columns, order = index.upper
        pattern = _sparse(starts, columns, a.new_zeros(len(columns)), index.nodes)
        both, swapped = torch.cat([a, b], 1), torch.cat([b, a], 1)
        mixed = torch.sparse.sampled_addmm(pattern, both, swapped.t(), beta=0.0).values()
        own = (a * b).sum(1)
        dots = own.index_select(0, first) + own.index_select(0, second)
        return dots.index_add_(0, order, mixed, alpha=-1)
    chunk = max(1, CHUNK // max(1, a.shape[1]))
    parts = []
    for u, v in zip(first.split(chunk), second.split(chunk), strict=True):
        jump = (a.index_select(0, u) - a.index_select(0, v)) * (b.index_select(0, u) - b.index_select(0, v))
        parts.append(jump.sum(1))
    return torch.cat(parts) if parts else a.new_zeros(0)


class _Laplacian(torch.autograd.Function):
    """The product, whose backward is a product and the dot products of edges."""

    @staticmethod
    def forward(ctx: Any, psi: Tensor, weights: Tensor, index: EdgeIndex) -> Tensor:
        ctx.index, ctx.matrix = index, index.matrix(weights) if index.compressed else None
        ctx.save_for_backward(psi, weights)
        return laplacian_product(psi, weights, index, ctx.matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        psi, weights = ctx.saved_tensors
        (grad,) = grads
        wants_psi, wants_weights, _ = ctx.needs_input_grad
        along = None
        if wants_psi and torch.is_grad_enabled():
            along = weighted_laplacian(grad, weights, ctx.index)
        elif wants_psi:
            along = laplacian_product(grad, weights, ctx.index, ctx.matrix)
        return (
            along,
            edge_dots(grad, psi, ctx.index) if wants_weights else None,
            None,
        )


def _rows(psi: Tensor) -> Tensor:
    """Return states `(B, n, d)` as one real row a node; a view for a single sample."""
    rows = torch.view_as_real(psi).flatten(2) if psi.is_complex() else psi
    return rows.transpose(0, 1).reshape(psi.shape[1], -1)


def _states(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as states again; for more than one sample they lie in memory by nodes."""
    batch, nodes, stalk = like.shape
    if like.is_complex():
        return torch.view_as_complex(rows.view(nodes, batch, stalk, 2)).transpose(0, 1)
    return rows.view(nodes, batch, stalk).transpose(0, 1)


def _compress(rows: Tensor, columns: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    starts = torch.zeros(nodes + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    # MKL works with 32-bit indices and would convert at every product.
    return starts.to(torch.int32), columns.to(torch.int32)


@cache
def _quieten() -> None:
    """Let torch say once, to nobody, that compressed sparse matrices are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _sparse(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1)


def _sparse(starts: Tensor, columns: Tensor, values: Tensor, nodes: int) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, (nodes, nodes), check_invariants=False)
