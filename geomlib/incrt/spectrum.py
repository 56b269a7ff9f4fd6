r"""Extreme eigenpairs of a symmetric operator, and orthonormal sets of directions that grow by one.

An eigenvector has no sign of its own, so one is fixed; a set of directions stays orthonormal to rounding by
two passes of Gram-Schmidt ("twice is enough", Kahan and Parlett); and above a few hundred dimensions the
two ends of the spectrum come from Lanczos, which asks for products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.core import arnoldi

__all__ = ["Extremes", "extreme_eigenpairs", "fix_sign", "lanczos_extremes", "orthonormalise"]


class Extremes(NamedTuple):
    """Both ends of a symmetric spectrum.

    Attributes
    ----------
    top, bottom
        Largest and smallest eigenvalue `()`, or estimates from inside the spectrum.
    u_top, u_bottom
        Unit vectors `(d,)`, the sign such that the entry of largest magnitude is positive.
    residual
        The larger of `|A u - lambda u|` of the two pairs `()`: an eigenvalue lies this near to each estimate.
    """

    top: Tensor
    bottom: Tensor
    u_top: Tensor
    u_bottom: Tensor
    residual: Tensor


def fix_sign(vectors: Tensor) -> Tensor:
    """Turn each column so that its entry of largest magnitude is positive.

    Parameters
    ----------
    vectors
        `(d,)` or `(d, k)`.

    Returns
    -------
    Tensor
        The shape of `vectors`; a zero column stays zero.

    Notes
    -----
    Source: reconstructed, since eigenvectors are unique up to sign and a run should be repeatable. Nearly
    equal magnitudes may still be ordered by rounding.

    Examples
    --------
    >>> fix_sign(torch.tensor([[0.6, 0.0], [-0.8, 1.0]]))
    tensor([[-0.6000,  0.0000],
            [ 0.8000,  1.0000]])
    """
    index = vectors.abs().argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, index) < 0, -vectors, vectors)


def orthonormalise(vectors: Tensor, Q: Tensor | None = None) -> Tensor:
    """Make columns orthonormal, each against `Q` and against those before it, in two Gram-Schmidt passes.

    Parameters
    ----------
    vectors
        `(d,)` or `(d, k)`, floating.
    Q
        `(d, m)`, orthonormal columns that stay as they are.

    Returns
    -------
    Tensor
        The shape of `vectors`.

    Raises
    ------
    ValueError
        If a vector lies in the span of those before it, or the space is full (`m + k > d`).

    Notes
    -----
    Source: Kahan and Parlett's "twice is enough". One pass leaves an error of `eps / |what is left|`, two
    leave `eps`.

    Examples
    --------
    >>> Q = torch.eye(3)[:, :1]
    >>> orthonormalise(torch.tensor([3.0, 0.0, 2.0]), Q)
    tensor([0., 0., 1.])
    """
    columns = vectors.unsqueeze(-1) if vectors.dim() == 1 else vectors
    d, k = columns.shape
    known = columns.new_zeros(d, 0) if Q is None else Q
    check_directions(known, d)
    if known.shape[1] + k > d:
        raise ValueError(
            f"vectors must leave at most d = {d} directions, got {known.shape[1]} + {k}: "
            "the space is full, and nothing is left to capture"
        )
    eps = torch.finfo(columns.dtype).eps
    for column in columns.unbind(1):
        left = column
        for _ in range(2):
            left = left - known @ (known.mT @ left)
        size = torch.linalg.vector_norm(left)
        if not bool(size > 10 * eps * torch.linalg.vector_norm(column)):
            raise ValueError("vectors must not lie in the span of those before them: nothing of one is left")
        known = torch.cat([known, (left / size).unsqueeze(1)], 1)
    return known[:, -k:].reshape(vectors.shape)


def extreme_eigenpairs(A: Tensor) -> Extremes:
    """Return both ends of the spectrum of a symmetric matrix by a full decomposition.

    Parameters
    ----------
    A
        `(d, d)`, symmetric, floating; the lower triangle is read.

    Returns
    -------
    Extremes

    Raises
    ------
    ValueError
        If `A` is not square.

    Notes
    -----
    Costs `O(d^3)`. Where the extreme eigenvalue is multiple, the vector is one of many.

    Examples
    --------
    >>> found = extreme_eigenpairs(torch.diag(torch.tensor([1.0, -2.0, 0.5])))
    >>> found.top, found.u_bottom
    (tensor(1.), tensor([0., 1., 0.]))
    """
    check_square(A, "A")
    values, vectors = torch.linalg.eigh(A)
    ends = fix_sign(vectors[:, [-1, 0]])
    residual = torch.linalg.vector_norm(A @ ends - ends * values[[-1, 0]], dim=0).amax()
    return Extremes(values[-1], values[0], ends[:, 0], ends[:, 1], residual)


def lanczos_extremes(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int = 20,
    restarts: int = 10,
    tol: float = 1e-5,
) -> Extremes:
    """Return both ends of the spectrum of a symmetric operator from products with it.

    Parameters
    ----------
    apply
        Symmetric, `(d,) -> (d,)`.
    start
        `(d,)`, not zero; the sum of the two eigenvectors is the best start, a random vector a safe one.
    steps
        Products in a cycle, which is the memory as well: `steps + 1` vectors.
    restarts
        Cycles after the first, each from the sum of the two vectors found.
    tol
        Stop when both residuals are below `tol` times the larger of the two estimates in magnitude.

    Returns
    -------
    Extremes
        `residual` says how good they are; the Ritz values lie inside the spectrum.

    Raises
    ------
    ValueError
        If `steps < 1`, `restarts < 0`, `tol <= 0`, or `start` is zero.

    Notes
    -----
    Source: Lanczos with full orthogonalisation (:func:`geomlib.core.arnoldi`), restarted. From a start that
    is orthogonal to `Q` the vectors stay so, if the operator is projected.

    Examples
    --------
    >>> values = torch.linspace(-1, 1, 600, dtype=torch.float64) ** 3
    >>> start = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = lanczos_extremes(lambda v: values * v, start)
    >>> bool((found.top - 1).abs() < 1e-4), bool((found.bottom + 1).abs() < 1e-4)
    (True, True)
    """
    if steps < 1 or restarts < 0 or not tol > 0:
        raise ValueError(
            f"steps must be at least 1, restarts at least 0 and tol positive, got {steps}, {restarts}, "
            f"{tol}: no cycle could run or stop"
        )
    if start.dim() != 1 or not bool(torch.linalg.vector_norm(start) > 0):
        raise ValueError(f"start must be a vector that is not zero, got shape {tuple(start.shape)} or zeros")
    steps = min(steps, len(start))
    for cycle in range(restarts + 1):
        basis, hessenberg = arnoldi(lambda v: apply(v[0]).unsqueeze(0), start.unsqueeze(0), steps)
        basis, hessenberg = basis[0, :-1], hessenberg[0]
        tridiagonal = (hessenberg[:-1] + hessenberg[:-1].mT) / 2
        # A space that is exhausted early leaves zero rows, whose zero eigenvalues are nobody's.
        alive = (basis != 0).any(1)
        values, small = torch.linalg.eigh(tridiagonal[alive][:, alive])
        ends = small[:, [-1, 0]]
        vectors = basis[alive].mT @ ends
        found = values[[-1, 0]]
        last = hessenberg[-1, -1] if bool(alive.all()) else hessenberg.new_zeros(())
        residual = (last * ends[-1]).abs().amax()
        if cycle == restarts or bool(residual <= tol * found.abs().amax()):
            break
        start = vectors.sum(1)
    vectors = fix_sign(vectors)
    return Extremes(found[0], found[1], vectors[:, 0], vectors[:, 1], residual)


def check_square(M: Tensor, name: str) -> None:
    """Refuse what is no square floating matrix, or a stack of them."""
    if M.dim() < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"{name} must be square, got shape {tuple(M.shape)}")
    if not M.is_floating_point():
        raise ValueError(f"{name} must be floating, got {M.dtype}: eigenvalues are no integers")


def check_directions(Q: Tensor, d: int) -> None:
    """Refuse what are no columns of length `d`, or more of them than there are dimensions."""
    if Q.dim() != 2 or Q.shape[0] != d or Q.shape[1] > d:
        raise ValueError(f"Q must hold at most {d} columns of length {d}, got shape {tuple(Q.shape)}")
