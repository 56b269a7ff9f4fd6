r"""The residual operator of INCRT: what directed attention could still use, and how many heads that takes.

The logits of a head are a bilinear form `x_i^T M x_j`. Its antisymmetric part `M_a` says who looks at whom
more than back. With the second moments `S` of the tokens and the projector `P` off the directions already
given to heads, `A = P sym(S M_a) P = P [S, M_a] P / 2` (arXiv 2604.10703; the letters are those of the
author's public code). Heads grow along its top eigenvectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.incrt.spectrum import check_directions, check_square

__all__ = [
    "Factors",
    "antisym",
    "asymmetry_index",
    "residual_matvec",
    "residual_operator",
    "sym",
    "threshold_floor",
]


def sym(M: Tensor) -> Tensor:
    """Return the symmetric part `(M + M^T) / 2` of square matrices `(..., d, d)`.

    Raises
    ------
    ValueError
        If `M` is not square or not floating.

    Notes
    -----
    The part of the logits that is the same from `i` to `j` as back.

    Examples
    --------
    >>> sym(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[1., 1.],
            [1., 3.]])
    """
    check_square(M, "M")
    return (M + M.mT) / 2


def antisym(M: Tensor) -> Tensor:
    """Return the antisymmetric part `(M - M^T) / 2` of square matrices `(..., d, d)`.

    Raises
    ------
    ValueError
        If `M` is not square or not floating.

    Notes
    -----
    The part of the logits that is directed: `s_ij - s_ji = 2 x_i^T M_a x_j / sqrt(dk)`.

    Examples
    --------
    >>> antisym(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    check_square(M, "M")
    return (M - M.mT) / 2


class Factors(NamedTuple):
    """A sum of bilinear forms in factors, `M = sum_h W_Q W_K^T`, which is how a layer holds it.

    Attributes
    ----------
    queries, keys
        `(H, d, dk)`, or `(d, dk)` for one head.
    """

    queries: Tensor
    keys: Tensor

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Return the factors of all heads beside each other, `(d, H dk)` each: a sum is then one product."""
        d, dk = self.queries.shape[-2:]
        stacked = (part.reshape(-1, d, dk).transpose(0, 1).reshape(d, -1) for part in self)
        return next(stacked), next(stacked)

    def dense(self) -> Tensor:
        """Return `M (d, d)`, the sum over heads."""
        queries, keys = self.side_by_side()
        return queries @ keys.mT

    def apply_antisym(self, v: Tensor) -> Tensor:
        """Return `M_a v` of columns `v (d, k)` in `O(H d dk k)`."""
        queries, keys = self.side_by_side()
        return (queries @ (keys.mT @ v) - keys @ (queries.mT @ v)) / 2

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return the Frobenius norms of `M` and `M_a` of each head, through `dk x dk` matrices alone."""
        cross = self.keys.mT @ self.queries  # (..., dk, dk)
        whole = ((self.queries.mT @ self.queries) * (self.keys.mT @ self.keys)).sum((-2, -1))
        # |M_a|^2 = (|M|^2 - tr M M) / 2 cancels for a nearly symmetric head, and may fall below zero.
        part = (whole - (cross * cross.mT).sum((-2, -1))) / 2
        return whole.clamp_min(0).sqrt(), part.clamp_min(0).sqrt()


def asymmetry_index(M: Tensor | Factors) -> Tensor:
    r"""Return `|M_a| / |M|` in Frobenius norms: 0 for a symmetric form, 1 for a purely directed one.

    Parameters
    ----------
    M
        `(..., d, d)`, or factors, whose index is found per head without forming `M`.

    Returns
    -------
    Tensor
        `(...)`, in [0, 1]; 0 where `M` is zero.

    Raises
    ------
    ValueError
        If a matrix is not square or not floating, or factors are not of one shape.

    Notes
    -----
    Source: `alpha` of the author's public code; random independent factors have it near `1 / sqrt(2)`. From
    factors the squared norm is a difference, so that an index below `sqrt(eps)` is rounding.

    Examples
    --------
    >>> asymmetry_index(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor(1.)
    >>> W = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    >>> bool(asymmetry_index(Factors(W, W)).max() < 1e-3)
    True
    """
    if isinstance(M, Factors):
        _check_factors(M)
        whole, part = M.norms()
    else:
        part = torch.linalg.matrix_norm(antisym(M))
        whole = torch.linalg.matrix_norm(M)
    return torch.where(whole > 0, part / whole, 0.0)


def residual_operator(S: Tensor, Ma: Tensor, Q: Tensor | None = None) -> Tensor:
    r"""Return `A = P sym(S M_a) P = P (S M_a - M_a S) P / 2` with `P = 1 - Q Q^T`.

    Parameters
    ----------
    S
        `(..., d, d)`, symmetric: second moments of the tokens.
    Ma
        `(..., d, d)`, antisymmetric: the motor.
    Q
        `(d, m)`, orthonormal columns: directions already given to heads.

    Returns
    -------
    Tensor
        `(..., d, d)`, symmetric to the last bit, with trace zero if there is no `Q`.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Source: the operator of arXiv 2604.10703 as the author's code has it, with `S` divided by the number of
    tokens so that thresholds do not depend on it. In the eigenbasis of `S` the entries are `(s_i - s_j)
    m_ij / 2`, so that an isotropic `S` gives zero for every motor.

    Examples
    --------
    >>> S, Ma = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    >>> residual_operator(S, Ma)
    tensor([[0., 2.],
            [2., 0.]])
    >>> residual_operator(torch.eye(2), Ma).abs().max()
    tensor(0.)
    """
    check_pair(S, Ma)
    if Q is not None:
        check_directions(Q, S.shape[-1])
    product = S @ Ma
    A = (product + product.mT) / 2  # (S M_a)^T = -M_a S
    if Q is not None:
        A = A - Q @ (Q.mT @ A)
        A = A - (A @ Q) @ Q.mT
        A = (A + A.mT) / 2
    return A


def residual_matvec(S: Tensor, Ma: Tensor | Factors, Q: Tensor | None, v: Tensor) -> Tensor:
    r"""Return `A v` without forming `A`: three products with `S` and `M_a` and two projections.

    Parameters
    ----------
    S, Q
        See :func:`residual_operator`.
    Ma
        `(d, d)`, antisymmetric, or the factors of a form of which the antisymmetric part is taken.
    v
        `(d,)` or `(d, k)`.

    Returns
    -------
    Tensor
        The shape of `v`.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Source: reconstructed. `O(d^2)` a vector, and `O(d^2 + H d dk)` with factors, where forming `A` takes
    `O(d^3)`.

    Examples
    --------
    >>> S, Ma = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    >>> residual_matvec(S, Ma, None, torch.tensor([1.0, 0.0]))
    tensor([0., 2.])
    """
    if isinstance(Ma, Factors):
        check_square(S, "S")
        _check_factors(Ma, S.shape[-1])
    else:
        check_pair(S, Ma)
    if Q is not None:
        check_directions(Q, S.shape[-1])
    if v.dim() not in (1, 2) or v.shape[0] != S.shape[-1]:
        raise ValueError(f"v must have shape (d,) or (d, k) with d = {S.shape[-1]}, got {tuple(v.shape)}")
    columns = v.unsqueeze(-1) if v.dim() == 1 else v

    def motor(w: Tensor) -> Tensor:
        return Ma.apply_antisym(w) if isinstance(Ma, Factors) else Ma @ w

    if Q is not None:
        columns = columns - Q @ (Q.mT @ columns)
    result = (S @ motor(columns) - motor(S @ columns)) / 2
    if Q is not None:
        result = result - Q @ (Q.mT @ result)
    return result.reshape(v.shape)


def threshold_floor(S: Tensor, Ma: Tensor) -> Tensor:
    """Return the size below which an eigenvalue of the residual operator is rounding.

    Parameters
    ----------
    S, Ma
        See :func:`residual_operator`.

    Returns
    -------
    Tensor
        `4 eps |S| |M_a|` in Frobenius norms, shape `(...)`.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Source: reconstructed from the rounding of the two products; without it whitened tokens, for which `A`
    is zero, would grow heads out of noise.

    Examples
    --------
    >>> S, Ma = torch.eye(3), torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> bool(threshold_floor(S, Ma) < 2e-6)
    True
    """
    check_pair(S, Ma)
    eps = torch.finfo(S.dtype).eps
    return 4 * eps * torch.linalg.matrix_norm(S) * torch.linalg.matrix_norm(Ma)


def check_pair(S: Tensor, Ma: Tensor) -> None:
    """Refuse moments and a motor that do not fit together."""
    check_square(S, "S")
    check_square(Ma, "Ma")
    if S.shape[-1] != Ma.shape[-1]:
        raise ValueError(f"S and Ma must have one width, got {S.shape[-1]} and {Ma.shape[-1]}")


def _check_factors(M: Factors, d: int | None = None) -> None:
    """Refuse factors of two shapes, or of another width than `d`."""
    queries, keys = M
    if queries.dim() < 2 or queries.shape != keys.shape:
        raise ValueError(
            f"queries and keys must both be (heads, d, dk), got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if d is not None and queries.shape[-2] != d:
        raise ValueError(f"queries and keys must have the width {d} of S, got {queries.shape[-2]}")
