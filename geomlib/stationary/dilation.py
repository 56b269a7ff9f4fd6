r"""Any matrix as part of a unitary one, and any contraction as the mean of two unitaries (arXiv 2507.20088).

Sheaf networks carry states by unitary maps only. Halmos' dilation writes every map between layers as a
multiple of (projection, unitary, zero-padding); the mean of two unitaries writes every block between two
nodes as two parallel edges. Both are known; here they are read off one singular value decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geomlib.stationary.lifts import Lift

__all__ = ["halmos", "unitary_pair"]


def halmos(K: Tensor, *, scale: float | None = None) -> Lift:
    r"""Write a matrix as :math:`K=c\,P\,Q\,\iota` with a unitary :math:`Q`.

    Parameters
    ----------
    K
        `(p, q)`, real or complex.
    scale
        `c`, at least the spectral norm of `K`, which is the default.

    Returns
    -------
    Lift
        `target` is `Q` of shape `(p + q, p + q)`, `lift` pads `(..., q)` with zeros, `pull` takes the first
        `p` entries times `c`, so that `pull(Q @ lift(x)) == K @ x`.

    Raises
    ------
    ValueError
        If `K` is not a finite matrix, or `scale` is below its norm.

    Notes
    -----
    Source: Halmos 1950, the unitary dilation of a contraction,
    :math:`Q=\begin{pmatrix}A&(I-AA^*)^{1/2}\\(I-A^*A)^{1/2}&-A^*\end{pmatrix}` with :math:`A=K/c`. With the
    singular vectors of `A` both roots are exact, also where a singular value is one.

    Examples
    --------
    >>> import torch
    >>> found = halmos(torch.tensor([[3.0, 4.0]]))
    >>> found.target.shape, torch.allclose(found.target @ found.target.T, torch.eye(3), atol=1e-6)
    (torch.Size([3, 3]), True)
    """
    if K.dim() != 2:
        raise ValueError(f"K must have shape (p, q), got {tuple(K.shape)}: it maps one layer to the next")
    if not torch.isfinite(K).all():
        raise ValueError("K must be finite, got NaN or infinity: its norm is not defined")
    rows, columns = K.shape
    norm = float(torch.linalg.matrix_norm(K, 2)) if K.numel() else 0.0
    c = (norm or 1.0) if scale is None else float(scale)
    # A norm that was computed may lie a rounding below the true one.
    if not c >= norm * (1 - 1e-12) or not c > 0:
        raise ValueError(f"scale must be at least |K| = {norm:g} and positive, got {scale}: no contraction")
    U, S, Vh = torch.linalg.svd(K / c, full_matrices=True)
    S = S.clamp_max(1)
    short = len(S)
    root_rows = torch.ones(rows, dtype=S.dtype, device=S.device)
    root_columns = torch.ones(columns, dtype=S.dtype, device=S.device)
    root_rows[:short] = root_columns[:short] = (1 - S**2).sqrt()
    A = (U[:, :short] * S) @ Vh[:short]
    top = torch.cat([A, (U * root_rows) @ U.mH], 1)
    low = torch.cat([(Vh.mH * root_columns) @ Vh, -A.mH], 1)

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:-1], rows)], -1)

    return Lift(
        target=torch.cat([top, low]),
        lift=pad,
        pull=lambda y: c * y[..., :rows],
        admissible=True,
        lambda_min=float("nan"),
        deficit=S.new_zeros(()),
        drive=pad,
    )


def unitary_pair(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Write each matrix as :math:`X=\frac c2(U_1+U_2)` with unitary :math:`U_1,U_2` and :math:`c=\|X\|`.

    Parameters
    ----------
    X
        `(..., d, d)`; the unitaries are complex, since two real orthogonal matrices do not suffice.

    Returns
    -------
    c, first, second : Tensor
        `(...)` real and two times `(..., d, d)` complex. A multiple of a unitary gives two equal ones, a zero
        matrix `c = 0` with unitaries that mean nothing.

    Raises
    ------
    ValueError
        If the matrices are not square.

    Notes
    -----
    Source: known. :math:`U_{1,2}=W(\Sigma\pm i\sqrt{1-\Sigma^2})V^*` for :math:`X/c=W\Sigma V^*`.

    Examples
    --------
    >>> import torch
    >>> c, first, second = unitary_pair(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> c, (c / 2 * (first + second)).real.round(decimals=4)
    (tensor(3.), tensor([[3., 0.],
            [0., 1.]]))
    """
    if X.dim() < 2 or X.shape[-1] != X.shape[-2]:
        raise ValueError(f"X must have shape (..., d, d), got {tuple(X.shape)}: a block acts between stalks")
    W, S, Vh = torch.linalg.svd(X.to(torch.promote_types(X.dtype, torch.complex64)))
    c = S[..., 0] if S.shape[-1] else S.new_zeros(S.shape[:-1])
    cosine = torch.where(c[..., None] > 0, S / c[..., None].clamp_min(torch.finfo(S.dtype).tiny), 1.0)
    sine = (1 - cosine**2).clamp_min(0).sqrt()
    # The root of rounding is no angle: a multiple of a unitary gives that unitary twice.
    sine = torch.where(1 - cosine > 64 * torch.finfo(S.dtype).eps, sine, 0.0)
    angle = torch.complex(cosine, sine)
    return c, (W * angle[..., None, :]) @ Vh, (W * angle.conj()[..., None, :]) @ Vh
