"""Batched linear systems ``A x = b``, one per sample, by restarted GMRES.

Only products with ``A`` are asked for, one call for the whole batch. Source: Saad and Schultz 1986; classical
Gram-Schmidt is done twice, which is as stable as the modified form and needs two products instead of ``k``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["arnoldi", "gmres"]


def arnoldi(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal Krylov basis of each sample and the Hessenberg matrix of ``A`` in it.

    Parameters
    ----------
    apply : callable
        ``(batch, n) -> (batch, n)``, linear and separate for each sample.
    start : Tensor
        First vectors, shape ``(batch, n)``, not zero.
    steps : int
        Products to spend.

    Returns
    -------
    basis : Tensor
        Shape ``(batch, steps + 1, n)``: orthonormal rows, or zero rows once the space is exhausted.
    hessenberg : Tensor
        Shape ``(batch, steps + 1, steps)`` with ``A basis[:, :-1]^T = basis^T hessenberg``.

    Examples
    --------
    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> _, H = arnoldi(lambda v: v @ A, torch.ones(1, 3), steps=3)
    >>> [round(float(value), 4) for value in torch.linalg.eigvals(H[0, :3]).real.sort().values]
    [1.0, 2.0, 3.0]
    """
    batch, n = start.shape
    eps = torch.finfo(start.dtype).eps
    basis = start.new_zeros(batch, steps + 1, n)
    hessenberg = start.new_zeros(batch, steps + 1, steps)
    basis[:, 0] = _normalised(start, torch.linalg.vector_norm(start, dim=1), 0.0)
    for k in range(steps):
        vector = apply(basis[:, k]).unsqueeze(1)
        whole = torch.linalg.vector_norm(vector[:, 0], dim=1)
        known = basis[:, : k + 1]
        for _ in range(2):
            overlap = torch.bmm(vector, known.transpose(1, 2))
            vector = torch.baddbmm(vector, overlap, known, alpha=-1)
            hessenberg[:, : k + 1, k] += overlap[:, 0]
        left = torch.linalg.vector_norm(vector[:, 0], dim=1)
        # What is left after two passes is rounding when it is a few eps of the whole: the space is exhausted.
        left = torch.where(left > 10 * eps * whole, left, 0.0)
        hessenberg[:, k + 1, k] = left
        basis[:, k + 1] = _normalised(vector[:, 0], left, 0.0)
    return basis, hessenberg


def gmres(apply: Callable[[Tensor], Tensor], b: Tensor, *, steps: int) -> Tensor:
    """One cycle of GMRES from zero: the ``x`` of least residual in a Krylov space of dimension ``steps``.

    Parameters
    ----------
    apply : callable
        ``(batch, n) -> (batch, n)``, linear and separate for each sample.
    b : Tensor
        Right-hand sides, shape ``(batch, n)``.
    steps : int
        Products with ``A``, and the dimension of the Krylov space.

    Returns
    -------
    Tensor
        Approximate solutions, shape ``(batch, n)``; zero for a zero right-hand side.

    Examples
    --------
    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    >>> gmres(lambda v: v @ A.T, torch.tensor([[3.0, 3.0]]), steps=2).round(decimals=5)
    tensor([[1., 1.]])
    """
    size = torch.linalg.vector_norm(b, dim=1)
    basis, hessenberg = arnoldi(apply, b, steps)
    # Least squares min |size e_1 - H y| through the QR of the small H; exhausted columns get no share.
    q, r = torch.linalg.qr(hessenberg)
    diagonal = r.diagonal(dim1=1, dim2=2)
    scale = diagonal.abs().amax(dim=1, keepdim=True)
    dead = diagonal.abs() <= 10 * torch.finfo(b.dtype).eps * scale
    r = r + torch.diag_embed(torch.where(dead, 1.0, 0.0))
    right = torch.where(dead, 0.0, q[:, 0] * size.unsqueeze(1)).unsqueeze(-1)
    y = torch.linalg.solve_triangular(r, right, upper=True)
    return torch.bmm(y.transpose(1, 2), basis[:, :steps])[:, 0]


def _normalised(vector: Tensor, size: Tensor, otherwise: float) -> Tensor:
    return torch.where((size > 0).unsqueeze(1), vector / size.unsqueeze(1), otherwise)
