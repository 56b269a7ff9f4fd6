r"""One step of gradient descent on weights, in six geometries: how each of them meets the face `w_e = 0`.

The natural step `argmin_{z >= 0} <g, z - w> + |z - w|_G^2 / (2 eta)` is a strictly convex quadratic
programme, so that births and deaths of edges are the same formula as everything else. The others are here to
be compared with it (arXiv 2507.20088 announces face crossing by a natural gradient; the step is
reconstructed).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

__all__ = ["barrier_step", "diagonal_step", "entropic_step", "natural_step", "projected_gradient"]

SMALLEST, LARGEST = -30.0, 3.0
"""Exponents of one entropic step: beyond them lie overflow and steps that no line search would take back."""


def natural_step(metric: Tensor, weights: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Return `argmin_{z >= 0} <g, z - w> + |z - w|_G^2 / (2 step)`, with exact zeros on the faces.

    Parameters
    ----------
    metric
        `G`, `(M, M)`, symmetric positive definite.
    weights
        `(M,)`, at least zero.
    gradient
        `(M,)`, of all of them, dead edges included.
    step
        Positive.

    Returns
    -------
    Tensor
        `(M,)`, on the device and in the dtype of `weights`, detached.

    Raises
    ------
    ValueError
        If shapes or signs do not fit, or the metric is not positive definite.

    Notes
    -----
    Source: reconstructed (SGN-B5). With the Cholesky factor `G = C C^T` the programme is the least-squares
    problem `min_{z >= 0} |C^T z - C^T w + step C^-1 g|`, which Lawson and Hanson's active sets solve in
    finitely many changes; in double precision on the CPU. Clipping the unconstrained step would not be this
    minimiser and may ascend.

    Examples
    --------
    >>> metric = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> natural_step(metric, torch.tensor([1.0, 0.0]), torch.tensor([1.0, -3.0]), 1.0)
    tensor([0., 2.])
    """
    _check(weights, gradient, step)
    if metric.shape != (len(weights), len(weights)):
        raise ValueError(f"metric must have shape {(len(weights), len(weights))}, got {tuple(metric.shape)}")
    if not len(weights):
        return weights.detach().clone()
    w, g, tensor = (x.detach().cpu().double().numpy() for x in (weights, gradient, metric))
    try:
        upper = np.linalg.cholesky(tensor).T
    except np.linalg.LinAlgError as error:
        raise ValueError("metric must be positive definite, got one without a Cholesky factor") from error
    target = upper @ w - step * solve_triangular(upper, g, trans="T")
    return torch.from_numpy(nnls(upper, target, maxiter=50 * len(w))[0]).to(weights)


def diagonal_step(diagonal: Tensor, weights: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Return the natural step of a diagonal metric, `max(w - step g / G_ee, 0)`; ones make it Euclid's.

    Here, and only here, clipping is the projection of the metric.

    Parameters
    ----------
    diagonal
        `G_ee`, `(M,)`, positive.
    weights, gradient, step
        As in :func:`natural_step`.

    Raises
    ------
    ValueError
        If shapes or signs do not fit.

    Examples
    --------
    >>> diagonal_step(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), 1.0)
    tensor([0.0000, 0.5000])
    """
    _check(weights, gradient, step)
    if diagonal.shape != weights.shape or not bool((diagonal > 0).all()):
        raise ValueError(f"diagonal must hold {len(weights)} positive numbers, got {diagonal}")
    return (weights - step * gradient / diagonal).clamp_min(0)


def entropic_step(weights: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Return `w exp(-step g)`: the step of the metric `1 / w`, in which no edge dies and none is born.

    Parameters
    ----------
    weights, gradient, step
        As in :func:`natural_step`.

    Raises
    ------
    ValueError
        If shapes or signs do not fit.

    Notes
    -----
    Source: known (exponentiated gradient, Kivinen and Warmuth 1997). Exponents are kept in [-30, 3].

    Examples
    --------
    >>> entropic_step(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -5.0]), 1.0)
    tensor([0.3679, 0.0000])
    """
    _check(weights, gradient, step)
    return weights * (-step * gradient).clamp(SMALLEST, LARGEST).exp()


def barrier_step(weights: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Return `w / (1 + step g w)`: the step of the metric `1 / w^2`, whose faces are infinitely far away.

    Parameters
    ----------
    weights, gradient, step
        As in :func:`natural_step`.

    Raises
    ------
    ValueError
        If shapes or signs do not fit.

    Notes
    -----
    Source: known: mirror descent with `-log w`; exact for a constant gradient. Where it would leave the
    orthant through infinity, growth is kept to `exp(3)` in a step.

    Examples
    --------
    >>> barrier_step(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -5.0]), 1.0)
    tensor([0.5000, 0.0000])
    """
    _check(weights, gradient, step)
    return weights / (1 + step * gradient * weights).clamp_min(float(np.exp(-LARGEST)))


def projected_gradient(weights: Tensor, gradient: Tensor) -> Tensor:
    """Return `w - max(w - g, 0)`, `(M,)`: zero exactly where no first-order step within the orthant descends.

    It is the gradient on positive weights that are far enough from their face, its negative part on the
    face, and continuous in between; whether it vanishes does not depend on any metric.

    Parameters
    ----------
    weights
        `(M,)`, at least zero.
    gradient
        `(M,)`.

    Raises
    ------
    ValueError
        If the shapes differ or a weight is negative.

    Notes
    -----
    Source: known: the Karush-Kuhn-Tucker conditions `w >= 0`, `g >= 0`, `w g = 0` as one equation.

    Examples
    --------
    >>> projected_gradient(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.2, 0.3, -0.4]))
    tensor([ 0.2000,  0.0000, -0.4000])
    """
    _check(weights, gradient, 1.0)
    return weights - (weights - gradient).clamp_min(0)


def _check(weights: Tensor, gradient: Tensor, step: float) -> None:
    if weights.dim() != 1 or weights.shape != gradient.shape:
        raise ValueError(
            f"weights and gradient must have one shape (M,), got {tuple(weights.shape)} and "
            f"{tuple(gradient.shape)}"
        )
    if len(weights) and not bool((weights >= 0).all()):
        raise ValueError(f"weights must be at least 0, got {float(weights.min())}: project before the step")
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}: there would be no descent")
