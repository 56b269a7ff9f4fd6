r"""How many heads a fixed residual operator takes: planted spectra, greedy capture, exact counts and bounds.

For a fixed symmetric `A` and a threshold, greedy capture of top eigenvectors stops after exactly as many
directions as `A` has eigenvalues above it, and no fewer suffice (INCRT-7, INCRT-8). Three bounds say how
that number grows as the threshold falls: Ky Fan, Frobenius, and a law of the compressed-sensing type (arXiv
2604.10703; proofs reconstructed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.incrt.operator import antisym, sym
from geomlib.incrt.spectrum import check_square, extreme_eigenpairs, orthonormalise

__all__ = ["Greedy", "HeadCount", "Planted", "greedy_directions", "head_count_bounds", "planted_operator"]


class Planted(NamedTuple):
    """Second moments and a motor whose residual operator has a known spectrum.

    Attributes
    ----------
    S
        `(d, d)`, symmetric, positive semi-definite.
    Ma
        `(d, d)`, antisymmetric.
    """

    S: Tensor
    Ma: Tensor


def planted_operator(
    lambdas: Sequence[float] | Tensor,
    d: int,
    gap: float = 1.0,
    *,
    rotate: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Planted:
    r"""Plant eigenvalues `+-lambda_k` in a residual operator, one plane for each.

    Parameters
    ----------
    lambdas
        `(k,)`, with `2 k <= d`; the rest of the spectrum is zero.
    d
        Width.
    gap
        Difference of the two second moments in each plane, positive.
    rotate
        Turn everything by a random orthogonal matrix; without it the planes lie along the axes.
    generator
        Draws the rotation, on the CPU.
    device, dtype
        Of the result.

    Returns
    -------
    Planted

    Raises
    ------
    ValueError
        If the planes do not fit into `d` dimensions, `gap` is not positive, or a value is not finite.

    Notes
    -----
    Source: reconstructed. In plane `k` the second moments are `1 + gap` and `1`, and the motor turns by
    `2 lambda_k / gap`; the entry `(s_i - s_j) m_ij / 2` is then `lambda_k`.

    Examples
    --------
    >>> S, Ma = planted_operator([3.0, 1.0], 5, generator=torch.Generator().manual_seed(0))
    >>> from geomlib.incrt.operator import residual_operator
    >>> torch.linalg.eigvalsh(residual_operator(S, Ma)).round(decimals=4).abs()
    tensor([3., 1., 0., 1., 3.])
    """
    values = torch.as_tensor(lambdas, dtype=dtype or torch.get_default_dtype()).detach().cpu()
    if values.dim() != 1 or not 1 <= 2 * len(values) <= d:
        raise ValueError(
            f"lambdas must be a list of 1 ... {d // 2} values for d = {d}, got shape {tuple(values.shape)}: "
            "each takes a plane"
        )
    if not bool(values.isfinite().all()) or not 0 < gap < float("inf"):
        raise ValueError(f"lambdas must be finite and gap positive, got gap {gap}: the motor would not be")
    even = 2 * torch.arange(len(values))
    moments = values.new_ones(d)
    moments[even] += gap
    S, Ma = moments.diag(), values.new_zeros(d, d)
    Ma[even, even + 1] = 2 * values / gap
    Ma[even + 1, even] = -2 * values / gap
    if rotate:
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=values.dtype)).Q
        S, Ma = sym(basis @ S @ basis.mT), antisym(basis @ Ma @ basis.mT)
    return Planted(S.to(device), Ma.to(device))


class Greedy(NamedTuple):
    """Directions in the order in which they were captured.

    Attributes
    ----------
    Q
        `(d, m)`, orthonormal columns.
    captured
        Rayleigh quotients `q^T A q` of the columns `(m,)`.
    """

    Q: Tensor
    captured: Tensor


def greedy_directions(
    A: Tensor,
    theta: float,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Greedy:
    r"""Capture the top eigenvector of what is left of `A`, again and again, until none exceeds `theta`.

    Parameters
    ----------
    A
        `(d, d)`, symmetric.
    theta
        Threshold, at least 0.
    noise
        Norm of a random vector that is added to each unit direction before it is captured, as of a tracker
        that has not converged.
    generator
        Draws the noise, on the CPU.

    Returns
    -------
    Greedy

    Raises
    ------
    ValueError
        If `A` is not square or not finite, or `theta` or `noise` is negative.

    Notes
    -----
    Source: the growth rule of arXiv 2604.10703 for a fixed operator. Without noise it stops after exactly
    as many additions as `A` has eigenvalues above `theta` (INCRT-7).

    Examples
    --------
    >>> A = torch.diag(torch.tensor([5.0, 3.0, 1.0, -4.0]))
    >>> greedy_directions(A, 2.0).captured
    tensor([5., 3.])
    """
    _check_operator(A)
    if not theta >= 0:
        raise ValueError(
            f"theta must be at least 0, got {theta}: the zeros of captured directions would count"
        )
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}: it is the norm of a vector")
    d = A.shape[-1]
    Q = A.new_zeros(d, 0)
    while Q.shape[1] < d:
        left = A - Q @ (Q.mT @ A)
        left = sym(left - (left @ Q) @ Q.mT)
        found = extreme_eigenpairs(left)
        if not bool(found.top > theta):
            break
        u = found.u_top
        if noise:
            kick = torch.randn(d, generator=generator, dtype=A.dtype).to(A.device)
            u = u + noise * kick / torch.linalg.vector_norm(kick)
        Q = torch.cat([Q, orthonormalise(u, Q).unsqueeze(1)], 1)
    return Greedy(Q, ((A @ Q) * Q).sum(0))


@dataclass(frozen=True)
class HeadCount:
    """How many heads an operator takes at a threshold, and what bounds that.

    Attributes
    ----------
    count
        Eigenvalues above the threshold, int64.
    kyfan
        `tr(A_+) / theta`, for any orthogonal directions with quotients above the threshold.
    frobenius
        `|A|^2 / theta^2`, for the same.
    cs
        `1 + rank log(tr(A_+) / theta)`, the compressed-sensing-type law; 0 if `tr(A_+) <= theta`.
    rank
        `rho = max_k E(k) / lambda_{k+1}`, the effective rank of the positive part, over the heads that are
        counted.
    """

    count: Tensor
    kyfan: Tensor
    frobenius: Tensor
    cs: Tensor
    rank: Tensor


def head_count_bounds(A: Tensor, theta: float | Tensor) -> HeadCount:
    r"""Count the eigenvalues of `A` above thresholds, and bound the count in three ways.

    Parameters
    ----------
    A
        `(d, d)`, symmetric.
    theta
        Positive, a number or a tensor `(...)` of thresholds.

    Returns
    -------
    HeadCount
        Of tensors of the shape of `theta`.

    Raises
    ------
    ValueError
        If `A` is not square or not finite, or a threshold is not positive.

    Notes
    -----
    Source: reconstructed. Ky Fan's inequality for the first two bounds. For the third, with `E(k)` the sum
    of the positive eigenvalues after the first `k`: `E(k+1) = E(k) - lambda_{k+1} <= (1 - 1/rho) E(k)`, and
    growth goes on only while `E(k) >= lambda_{k+1} > theta`; so `rho` need only be taken over the heads
    that are counted. Positive parts, not norms, because `A` has trace zero and its negative half is never
    captured.

    Examples
    --------
    >>> bounds = head_count_bounds(torch.diag(torch.tensor([4.0, 2.0, 1.0, -7.0])), 1.5)
    >>> bounds.count, bounds.kyfan.round(decimals=2)
    (tensor(2), tensor(4.6700))
    """
    _check_operator(A)
    thresholds = torch.as_tensor(theta, dtype=A.dtype, device=A.device)
    if not bool((thresholds > 0).all()):
        raise ValueError(f"theta must be positive, got {thresholds.min().item()}: the bounds divide by it")
    spectrum = torch.linalg.eigvalsh(A)
    values = spectrum.flip(-1).clamp_min(0)  # (d,), descending
    energy = values.flip(0).cumsum(0).flip(0)  # E(k): from each value to the end, small ones summed first
    above = values > thresholds.unsqueeze(-1)  # (..., d)
    ratio = torch.where(above, energy / values.clamp_min(torch.finfo(A.dtype).tiny), 0.0)
    rank = ratio.amax(-1)
    growth = (energy[0] / thresholds).log()
    return HeadCount(
        above.sum(-1),
        energy[0] / thresholds,
        spectrum.square().sum() / thresholds.square(),
        torch.where(growth > 0, 1 + rank * growth, 0.0),
        rank,
    )


def _check_operator(A: Tensor) -> None:
    """Refuse what has no spectrum."""
    check_square(A, "A")
    if A.dim() != 2:
        raise ValueError(f"A must be one matrix, got shape {tuple(A.shape)}: each has its own count")
    if not bool(A.isfinite().all()):
        raise ValueError("A must be finite: the spectrum of a NaN is none")
