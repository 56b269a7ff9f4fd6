r"""Edges that do not exist yet: what one adjoint field says of each, and the transport it should begin with.

For a dead edge the derivative by its weight is `a - Re tr(tau Q)`, linear in the transport `tau` that it
would have; the best unitary is the polar factor of a small matrix (orthogonal Procrustes problem, Schönemann
1966).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Birth", "birth", "polar", "unitary_step"]


class Birth(NamedTuple):
    """How candidates would best be born.

    Attributes
    ----------
    transport
        `(K, d, d)` unitary (orthogonal for real states); phases `(K,)` for complex states with `d = 1`.
    derivative
        `(K,)`: of the loss by the weight at zero, from above; negative where a birth lowers the loss.
    """

    transport: Tensor
    derivative: Tensor


def birth(p: Tensor, psi: Tensor, edges: Tensor) -> Birth:
    """Return for each candidate the transport that lowers the loss most, and the derivative it has then.

    Parameters
    ----------
    p
        Adjoint field `(B, n, d)`, solution of `H p = -grad loss`.
    psi
        Stationary state `(B, n, d)`.
    edges
        `(2, K)` int64.

    Returns
    -------
    Birth

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: reconstructed (SGN-A5). `Q = sum (psi_v p_u^* + p_v psi_u^*)` over the batch; the minimum of
    `a - Re tr(tau Q)` over unitary `tau` is `a - |Q|_*` (nuclear norm). For `d = 1` the phase is `-arg Q`.
    An edge that nothing passes, `Q = 0`, gets the identity.

    Examples
    --------
    >>> p, psi = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[1.0], [2.0]]])
    >>> birth(p, psi, torch.tensor([[0], [1]]))
    Birth(transport=tensor([[[1.]]]), derivative=tensor([-1.]))
    """
    if p.shape != psi.shape or p.dim() != 3:
        raise ValueError(
            f"p and psi must have one shape (B, n, d), got {tuple(p.shape)} and {tuple(psi.shape)}"
        )
    if edges.dim() != 2 or len(edges) != 2:
        raise ValueError(f"edges must have shape (2, K), got {tuple(edges.shape)}: two ends each")
    u, v = edges
    alone = (p.conj_physical() * psi).real.sum((0, 2)) if p.is_complex() else (p * psi).sum((0, 2))
    q = torch.einsum("bka,bkc->kac", psi[:, v], p[:, u].conj_physical())
    q = q + torch.einsum("bka,bkc->kac", p[:, v], psi[:, u].conj_physical())
    if q.is_complex() and q.shape[-1] == 1:
        transport, size = -q[:, 0, 0].angle(), q[:, 0, 0].abs()
    else:
        transport, size = _procrustes(q)
    return Birth(transport, alone[u] + alone[v] - size)


def polar(matrices: Tensor) -> Tensor:
    """Return the nearest unitary of each matrix, `(..., d, d)`.

    Parameters
    ----------
    matrices
        `(..., d, d)`, real or complex.

    Raises
    ------
    ValueError
        If they are not square.

    Notes
    -----
    Source: known: `U V^*` of the singular value decomposition.

    Examples
    --------
    >>> polar(torch.tensor([[2.0, 0.0], [0.0, -0.1]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices must have shape (..., d, d), got {tuple(matrices.shape)}: not square")
    left, _, right = torch.linalg.svd(matrices)
    return left @ right


def unitary_step(transport: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Return `tau exp(-step skew(tau^* gradient))`: a gradient step that stays on the unitary group.

    Parameters
    ----------
    transport
        `(M, d, d)`, unitary.
    gradient
        `(M, d, d)`, Euclidean.
    step
        `(M,)`: one length per edge, as the inverse of a diagonal metric gives them.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: known Riemannian gradient, `skew(X) = (X - X^*) / 2`; rounding is taken off by :func:`polar`.

    Examples
    --------
    >>> turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    >>> unitary_step(torch.eye(2)[None], -turn, torch.tensor([torch.pi / 2])).round(decimals=4)
    tensor([[[ 0., -1.],
             [ 1.,  0.]]])
    """
    if transport.shape != gradient.shape or step.shape != transport.shape[:1]:
        raise ValueError(
            f"gradient must have the shape {tuple(transport.shape)} of transport and step one number per "
            f"edge, got {tuple(gradient.shape)} and {tuple(step.shape)}"
        )
    inner = transport.mT.conj_physical() @ gradient
    skew = (inner - inner.mT.conj_physical()) / 2
    return polar(transport @ torch.matrix_exp(-step[:, None, None] * skew))


def _procrustes(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unitary with the largest `Re tr(tau q)`, and that trace."""
    left, sizes, right = torch.linalg.svd(q)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    empty = (sizes.sum(-1) == 0)[:, None, None]
    return torch.where(empty, identity, (left @ right).mT.conj_physical()), sizes.sum(-1)
