r"""Energies and forces of a dictionary: what falls, what pulls, what repels, and when prototypes part.

The gradient of the variance at fixed assignments pulls prototypes together; what parts them is that the
assignments depend on the prototypes, and it wins below a critical temperature. (arXiv 2604.01740 claims
separation, feedback and stability; the statements here are reconstructed with their proofs.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from geomlib.core.precision import full_precision, working_dtype
from geomlib.incrt.quantise import Mode, check_mode, check_tokens, cold

__all__ = [
    "concentration",
    "critical_temperature",
    "free_energy",
    "growth_rate",
    "implicit_force",
    "rival_weights",
]


def free_energy(
    z: Tensor, P: Tensor, T: float | Tensor, mask: Tensor | None = None, *, log_prior: Tensor | None = None
) -> Tensor:
    r"""Return `-T mean log sum_k exp(-D_k / T)` `()`, the energy that falls when the gradient ignores q.

    It equals the loss minus `T` times the mean entropy of the assignments, and its gradient is that of the
    loss with assignments held fixed.

    Parameters
    ----------
    z, P, T, mask, log_prior
        As in `soft_quantise`.

    Raises
    ------
    ValueError
        If shapes do not fit or the temperature is not positive.

    Notes
    -----
    Source: reconstructed: makes "energy monotonically decreasing" of arXiv 2604.01740 exact; known from
    deterministic annealing.

    Examples
    --------
    >>> z, P = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5]])
    >>> free_energy(z, P, T=2.0)
    tensor(0.2500)
    """
    check_tokens(z, P, T, mask=mask, log_prior=log_prior)
    dtype = working_dtype(torch.promote_types(z.dtype, P.dtype))
    with full_precision(z.device):
        centre = P.detach().to(dtype).mean(0)
        x, p = (z.to(dtype) - centre).reshape(-1, z.shape[-1]), P.to(dtype) - centre
        degree = cold(T, x)
        scores = torch.addmm(-p.square().sum(1) / degree, x, (p * (2 / degree)).T)
        if log_prior is not None:
            scores = scores + log_prior.to(dtype)
        values = x.square().sum(1) - degree * scores.logsumexp(1)
        if mask is None:
            return values.mean()
        valid = mask.reshape(-1)
        return torch.where(valid, values, 0).sum() / valid.sum().clamp_min(1)


def rival_weights(q: Tensor) -> Tensor:
    r"""Return the weights with which tokens pull prototypes under the full gradient, `(..., K)`.

    The gradient of the loss with respect to prototype `j` is the mean of `2 w_j (p_j - z)`, with
    `w_j = q_j [1 - (D_j - sum_k q_k D_k) / T] = q_j [1 + log q_j + H(q)]`. They add up to one and may be
    negative: a token repels a prototype that is farther than its loss by more than `T`.

    Parameters
    ----------
    q
        Assignments `(..., K)`, one in sum.

    Notes
    -----
    Source: reconstructed: the derivative of arXiv 2604.01740's loss with assignments differentiated through.

    Examples
    --------
    >>> rival_weights(torch.tensor([0.9, 0.1]))
    tensor([ 1.0978, -0.0978])
    """
    entropy = -torch.xlogy(q, q).sum(-1, keepdim=True)
    return q * (1 + entropy) + torch.xlogy(q, q)


def implicit_force(q: Tensor, P: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return the gradient of the variance at fixed assignments, mean of `2 (diag q - q q^T) P`, `(K, d)`.

    Parameters
    ----------
    q
        Assignments `(..., K)`.
    P
        Prototypes `(K, d)`.
    mask
        Valid tokens `(...)`, boolean.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: arXiv 2604.01740 calls it the implicit separation force. Descent moves against it: row `k` is
    `2 q_k (p_k - zhat)`, so that at fixed assignments the variance pulls prototypes together.

    Examples
    --------
    >>> implicit_force(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0], [-1.0]]))
    tensor([[ 1.],
            [-1.]])
    """
    if q.shape[-1] != len(P):
        raise ValueError(f"q must have one column per prototype, got {q.shape[-1]} for {len(P)} prototypes")
    rows = q.reshape(-1, len(P))
    if mask is not None:
        rows = torch.where(mask.reshape(-1, 1), rows, 0)
    n = len(rows) if mask is None else mask.sum().clamp_min(1)
    return 2 * (rows.sum(0)[:, None] * P - rows.T @ rows @ P) / n


def concentration(q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of the largest assignment `()`: 1 / K if undecided, 1 if hard.

    Parameters
    ----------
    q
        Assignments `(..., K)`.
    mask
        Valid tokens `(...)`, boolean.

    Notes
    -----
    Source: arXiv 2604.01740 names an assignment concentration; the formula is reconstructed: the simplest
    that bounds the force, since the norm of `diag q - q q^T` is at most `2 (1 - max_k q_k)`.

    Examples
    --------
    >>> concentration(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor(0.7500)
    """
    largest = q.amax(-1)
    if mask is None:
        return largest.mean()
    return torch.where(mask, largest, 0).sum() / mask.sum().clamp_min(1)


def growth_rate(eigenvalue: float | Tensor, T: float | Tensor, K: int, loss: str = "full") -> float | Tensor:
    """Return the rate at which coincident prototypes part along an eigenvector of the token covariance.

    Parameters
    ----------
    eigenvalue
        Of the covariance of the tokens.
    T
        Temperature.
    K
        Number of prototypes.
    loss
        `"full"`, `"em"`, `"ols"` (the error of the barycentre alone) or `"variance"`.

    Raises
    ------
    ValueError
        If `loss` is none of these.

    Notes
    -----
    Source: reconstructed: second-order expansion of each loss around prototypes that all stand at the mean
    of the tokens. The `"em"` case is the phase transition of deterministic annealing (Rose, 1998).

    Examples
    --------
    >>> growth_rate(1.0, 4.0, 2), growth_rate(1.0, 2.0, 2, "em")
    (0.0, 0.0)
    """
    if loss not in ("full", "em", "ols", "variance"):
        raise ValueError(f"loss must be full, em, ols or variance, got {loss!r}: no rate is known")
    gain = {"full": 8, "em": 4, "ols": 8, "variance": 0}[loss]
    pull = {"full": 2, "em": 2, "ols": 0, "variance": 2}[loss]
    return (gain * eigenvalue / T - pull) / K


def critical_temperature(eigenvalue: float | Tensor, mode: Mode = "full") -> float | Tensor:
    """Return the temperature below which coincident prototypes part: 4 (full) or 2 (em) eigenvalues.

    Parameters
    ----------
    eigenvalue
        The largest of the covariance of the tokens.
    mode
        As in `soft_quantise`.

    Raises
    ------
    ValueError
        If the mode is unknown.

    Notes
    -----
    Source: where `growth_rate` changes its sign.

    Examples
    --------
    >>> critical_temperature(0.7), critical_temperature(0.7, "em")
    (2.8, 1.4)
    """
    check_mode(mode)
    return (4 if mode == "full" else 2) * eigenvalue
