r"""One step of a tracker: towards the top eigenvector by Oja's rule, towards the bottom by minor components.

Both keep unit vectors and ask for one product with the operator (Oja 1982; MCA EXIN, Cirrincione et al.
2002). The minor-component step comes in the form that is averaged over data, which works, and as the
author's public code of INCRT has it, which stops where the Rayleigh quotient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["mca_step", "oja_step"]

Apply = Callable[[Tensor], Tensor]


def oja_step(u: Tensor, A: Tensor | Apply, eta: float | Tensor) -> Tensor:
    r"""Return `normalise(u + eta (A u - (u^T A u) u))`, one step towards the top eigenvector.

    Parameters
    ----------
    u
        Unit vectors `(..., d)`.
    A
        `(d, d)`, symmetric, or a function of `u` that applies it.
    eta
        Step, positive.

    Returns
    -------
    Tensor
        The shape of `u`.

    Raises
    ------
    ValueError
        If `eta` is a number that is not positive, or `A` is not square.

    Notes
    -----
    Source: Oja 1982, averaged over the data. Converges from almost every start if `eta (lambda_max -
    lambda_min) < 2`, and the top repels if that is above 2 (INCRT-16): relative to the top, the component
    of eigenvalue `lambda` is multiplied by `1 - eta (lambda_max - lambda)` near the end. `eta = 1 / |A|` in
    the Frobenius norm is always small enough.

    Examples
    --------
    >>> u = torch.tensor([0.6, 0.8])
    >>> for _ in range(50):
    ...     u = oja_step(u, torch.diag(torch.tensor([1.0, -1.0])), 0.5)
    >>> u.round(decimals=4)
    tensor([1., 0.])
    """
    image, quotient = _image(u, A, eta)
    return normalise(u + eta * (image - quotient * u))


def mca_step(
    u: Tensor,
    A: Tensor | Apply,
    eta: float | Tensor,
    *,
    form: Literal["averaged", "published"] = "averaged",
) -> Tensor:
    r"""Return `normalise(u - eta (A u - (u^T A u) u))`, one step towards the bottom eigenvector.

    Parameters
    ----------
    u, A, eta
        See :func:`oja_step`.
    form
        `"averaged"`, or `"published"`: the step of the author's public code, which is multiplied by `y =
        u^T A u`.

    Returns
    -------
    Tensor
        The shape of `u`.

    Raises
    ------
    ValueError
        If `form` is unknown, `eta` is a number that is not positive, or `A` is not square.

    Notes
    -----
    Source: MCA EXIN of Cirrincione et al. 2002, whose step for one sample `x` is `-eta y (x - y u)`, `y =
    u^T x`. Averaged over samples with covariance `A`, `y x` becomes `A u` and `y^2` becomes `u^T A u`. The
    published form puts `A u` in the place of `x`; on an operator with eigenvalues of both signs its step
    turns where `y < 0`, and it stops at `y = 0`.

    Examples
    --------
    >>> A, start = torch.diag(torch.tensor([2.0, -1.0])), torch.tensor([0.6, 0.8])
    >>> ends = {}
    >>> for form in ("averaged", "published"):
    ...     u = start
    ...     for _ in range(400):
    ...         u = mca_step(u, A, 0.2, form=form)
    ...     ends[form] = round((u @ A @ u).item(), 2)
    >>> ends
    {'averaged': -1.0, 'published': 0.0}
    """
    if form not in ("averaged", "published"):
        raise ValueError(f"form must be averaged or published, got {form!r}: no other step is known here")
    image, quotient = _image(u, A, eta)
    change = image - quotient * u
    return normalise(u - eta * (quotient * change if form == "published" else change))


def normalise(u: Tensor) -> Tensor:
    """Return unit vectors `(..., d)`."""
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def _image(u: Tensor, A: Tensor | Apply, eta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return `A u` and the Rayleigh quotients `(..., 1)`."""
    if not isinstance(eta, Tensor) and not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}: the step would go the other way")
    if isinstance(A, Tensor):
        if A.dim() != 2 or A.shape[0] != A.shape[1] or A.shape[0] != u.shape[-1]:
            raise ValueError(f"A must be square of width {u.shape[-1]}, got {tuple(A.shape)}")
        image = (u.unsqueeze(0) @ A).squeeze(0)
    else:
        image = A(u)
    return image, (u * image).sum(-1, keepdim=True)
