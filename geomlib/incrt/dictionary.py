r"""What a dictionary has become: distances, scatter, codes in use; where it should part, how it may start.

arXiv 2604.01740 speaks of separation and concentration and gives no formula that could be read; those here
are the simplest that tell coincident prototypes from spread ones, and used codes from dead ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.incrt.energy import critical_temperature
from geomlib.incrt.quantise import Mode, check_mode

__all__ = [
    "Separation",
    "Splits",
    "between_scatter",
    "close_pairs",
    "covariance",
    "draw_tokens",
    "effective_rank",
    "perplexity",
    "separation",
    "splits",
    "used_codes",
]


class Separation(NamedTuple):
    """Distances between prototypes.

    Attributes
    ----------
    mean, minimum
        `()`, over pairs of different prototypes.
    """

    mean: Tensor
    minimum: Tensor


class Splits(NamedTuple):
    """Which prototypes would part at a temperature, and along which line.

    Attributes
    ----------
    eigenvalue
        Largest eigenvalue of the covariance of each prototype's own tokens `(K,)`.
    direction
        Its unit eigenvector `(K, d)`.
    critical
        Temperature below which two children of the prototype would part `(K,)`.
    """

    eigenvalue: Tensor
    direction: Tensor
    critical: Tensor


def separation(P: Tensor) -> Separation:
    """Return mean and least distance between prototypes.

    Parameters
    ----------
    P
        Prototypes `(..., K, d)`, at least two.

    Raises
    ------
    ValueError
        If there is no pair.

    Notes
    -----
    Source: arXiv 2604.01740 names a separation; the formula is reconstructed. The minimum tells coincident
    prototypes, which the mean hides.

    Examples
    --------
    >>> separation(torch.tensor([[0.0], [1.0], [3.0]]))
    Separation(mean=tensor(2.), minimum=tensor(1.))
    """
    K = P.shape[-2]
    if K < 2:
        raise ValueError(f"P must hold at least two prototypes, got {K}: there is no distance")
    rows, columns = torch.triu_indices(K, K, 1, device=P.device)
    distances = (P[..., rows, :] - P[..., columns, :]).norm(dim=-1)
    return Separation(distances.mean(-1), distances.amin(-1))


def covariance(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the covariance of tokens about their mean, divided by their number, `(d, d)`.

    Parameters
    ----------
    z
        Tokens `(..., d)`.
    mask
        Valid tokens `(...)`, boolean.

    Examples
    --------
    >>> covariance(torch.tensor([[1.0], [3.0]]))
    tensor([[1.]])
    """
    x = z.reshape(-1, z.shape[-1])
    if mask is not None:
        x = x[mask.reshape(-1)]
    x = x - x.mean(0)
    return x.T @ x / len(x)


def between_scatter(P: Tensor, usage: Tensor) -> Tensor:
    """Return the covariance of the prototypes, each weighted with its share of the tokens, `(d, d)`.

    Parameters
    ----------
    P
        Prototypes `(K, d)`.
    usage
        Shares `(K,)`, one in sum, as `Quantised.usage`.

    Examples
    --------
    >>> between_scatter(torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5]))
    tensor([[1.]])
    """
    centred = P - usage @ P
    return centred.T @ (usage[:, None] * centred)


def effective_rank(matrix: Tensor) -> Tensor:
    """Return `(sum lambda)^2 / sum lambda^2` of a symmetric positive matrix `()`, and 0 for the zero matrix.

    Parameters
    ----------
    matrix
        `(..., d, d)`, symmetric, no negative eigenvalue.

    Examples
    --------
    >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    tensor(2.)
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = matrix.square().sum((-2, -1))
    return torch.where(square > 0, trace.square() / square, 0)


def perplexity(usage: Tensor) -> Tensor:
    """Return the exponential of the entropy of shares `()`: how many codes are used as if equally often.

    Parameters
    ----------
    usage
        Shares `(..., K)`, one in sum.

    Examples
    --------
    >>> perplexity(torch.tensor([0.5, 0.5, 0.0]))
    tensor(2.)
    """
    return (-torch.xlogy(usage, usage).sum(-1)).exp()


def used_codes(q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how many prototypes are the first choice of a token `()`, int64.

    Parameters
    ----------
    q
        Assignments `(..., K)`.
    mask
        Valid tokens `(...)`, boolean.

    Examples
    --------
    >>> used_codes(torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]]))
    tensor(1)
    """
    choices = q.argmax(-1).reshape(-1)
    valid = torch.ones_like(choices) if mask is None else mask.reshape(-1).to(choices.dtype)
    return (choices.new_zeros(q.shape[-1]).index_add(0, choices, valid) > 0).sum()


def draw_tokens(
    x: Tensor, number: int, *, spread: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Draw tokens to start a dictionary with, `(number, d)`.

    Parameters
    ----------
    x
        Tokens `(N, d)` on the CPU.
    number
        How many; tokens repeat only if there are fewer.
    spread
        Draw each next one in proportion to its squared distance from those before, instead of evenly.
    generator
        Source of the draws.

    Raises
    ------
    ValueError
        If there is no token.

    Notes
    -----
    Source: the spread draw is that of k-means++ (Arthur and Vassilvitskii, 2007).

    Examples
    --------
    >>> x = torch.tensor([[0.0], [0.0], [5.0]])
    >>> draw_tokens(x, 2, spread=True, generator=torch.Generator().manual_seed(0)).sum()
    tensor(5.)
    """
    if len(x) == 0:
        raise ValueError(f"x must hold a token to draw, got shape {tuple(x.shape)}")
    if not spread:
        rounds = [torch.randperm(len(x), generator=generator) for _ in range(-(-number // len(x)))]
        return x[torch.cat(rounds)[:number]]
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = torch.full((len(x),), math.inf, dtype=x.dtype)
    for _ in range(number - 1):
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest)  # fewer places than draws
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
    return x[chosen]


def splits(z: Tensor, q: Tensor, mode: Mode = "full", mask: Tensor | None = None) -> Splits:
    """Return, for each prototype, the temperature below which it would part, and the line along which.

    Parameters
    ----------
    z
        Tokens `(..., d)`.
    q
        Their assignments `(..., K)`.
    mode
        Of the loss that the prototypes are trained with.
    mask
        Valid tokens `(...)`, boolean.

    Raises
    ------
    ValueError
        If the mode is unknown or the shapes do not fit.

    Notes
    -----
    Source: reconstructed: whether arXiv 2604.01880 lets dictionaries grow could not be seen. The criterion is
    the phase transition of the whole, applied to the tokens of one prototype.

    Examples
    --------
    >>> z = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> splits(z, torch.ones(2, 1)).critical
    tensor([4.])
    """
    check_mode(mode)
    if q.shape[:-1] != z.shape[:-1]:
        raise ValueError(f"q must assign every token of z {tuple(z.shape)}, got shape {tuple(q.shape)}")
    x, rows = z.detach().reshape(-1, z.shape[-1]), q.detach().reshape(-1, q.shape[-1])
    if mask is not None:
        rows = torch.where(mask.reshape(-1, 1), rows, 0)
        x = torch.where(mask.reshape(-1, 1), x, 0)
    mass = rows.sum(0).clamp_min(torch.finfo(rows.dtype).tiny)
    shares = (rows / mass).T  # (K, N)
    means = shares @ x
    # One product per prototype: all at once would take K times the memory of the tokens.
    second = torch.stack([x.T @ (share[:, None] * x) for share in shares])
    values, vectors = torch.linalg.eigh(second - means[:, :, None] * means[:, None])
    eigenvalue = values[:, -1].clamp_min(0)
    critical = critical_temperature(eigenvalue, mode)
    assert isinstance(critical, Tensor)
    return Splits(eigenvalue, vectors[..., -1], critical)


def close_pairs(P: Tensor, distance: float | Tensor) -> Tensor:
    """Return the pairs of prototypes that are closer than a distance `(pairs, 2)` int64, smaller index first.

    Parameters
    ----------
    P
        Prototypes `(K, d)`.
    distance
        Positive; a thousandth of the root of the trace of the token covariance tells what has met.

    Examples
    --------
    >>> close_pairs(torch.tensor([[0.0], [1.0], [1e-6]]), 1e-3)
    tensor([[0, 2]])
    """
    gaps = (P[:, None] - P[None]).norm(dim=-1)
    return (gaps < distance).triu(1).nonzero()
