"""Surfaces and measures whose roughness or spectrum of dimensions is known.

The grey-level counterparts of `shapes`, which exports them: rough surfaces by spectral synthesis (Voss
1985) and the multiplicative cascade (Mandelbrot 1974). None comes from arXiv 2503.14298.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cascade", "cascade_dimension", "fbm_surface", "kronecker_power", "plane"]


def fbm_surface(
    n: int,
    hurst: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a rough surface of Hurst index `hurst`: `(n, n)`, its graph has dimension `3 - hurst`.

    Parameters
    ----------
    n : int
        Side of the grid.
    hurst : float
        In `(0, 1)`; the larger, the smoother.
    generator
        Source of randomness, on the CPU.
    device
        Of the result.

    Returns
    -------
    Tensor
        float64, mean 0 and standard deviation 1 over the grid.

    Raises
    ------
    ValueError
        If `n` is below 2 or `hurst` not in `(0, 1)`.

    Notes
    -----
    Source: spectral synthesis (Voss 1985) with amplitude `|k|^-(hurst + 1)` on a torus twice as wide, of
    which one quarter is kept, so that opposite borders do not match.

    Examples
    --------
    >>> surface = fbm_surface(32, 0.5, generator=torch.Generator().manual_seed(0))
    >>> surface.shape, round(surface.std(correction=0).item(), 6)
    (torch.Size([32, 32]), 1.0)
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: a surface needs neighbours")
    if not 0 < hurst < 1:
        raise ValueError(f"hurst must lie in (0, 1), got {hurst}: the surface would not be self-affine")
    noise = torch.randn(2 * n, 2 * n, generator=generator, dtype=torch.float64)
    k = torch.fft.fftfreq(2 * n, dtype=torch.float64) * 2 * n
    radius = (k[:, None].square() + k[: n + 1].square()).sqrt()
    radius[0, 0] = torch.inf  # no constant
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * radius ** -(hurst + 1), s=(2 * n, 2 * n))[:n, :n]
    field = field - field.mean()
    return (field / field.std(correction=0)).to(device)


def plane(n: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return a tilted plane `(n, n)`, float64: the smoothest surface, graph dimension 2.

    Parameters
    ----------
    n : int
        Side of the grid.
    device
        Of the result.

    Returns
    -------
    Tensor
        `(i + j) / (2 n - 2)`.

    Raises
    ------
    ValueError
        If `n` is below 2.

    Examples
    --------
    >>> plane(2).tolist()
    [[0.0, 0.5], [0.5, 1.0]]
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: a plane needs a slope")
    x = torch.arange(n, dtype=torch.float64, device=device)
    return (x[:, None] + x) / (2 * n - 2)


def cascade(
    level: int, p: Sequence[float] = (0.4, 0.3, 0.2, 0.1), *, device: torch.device | str | None = None
) -> Tensor:
    """Return the multiplicative cascade, a measure whose generalised dimensions all differ.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    p : sequence of float
        Shares of the four quarters, positive and with sum 1.
    device
        Of the result.

    Returns
    -------
    Tensor
        `(2**level, 2**level)`, float64, sum 1.

    Raises
    ------
    ValueError
        If the shares are not four positive numbers with sum 1, or the level is not positive.

    Notes
    -----
    Source: the binomial measure (Mandelbrot 1974); its dimensions are `cascade_dimension`.

    Examples
    --------
    >>> cascade(1).tolist()
    [[0.4, 0.3], [0.2, 0.1]]
    """
    _check_shares(p)
    return kronecker_power(torch.tensor(p, dtype=torch.float64).reshape(2, 2), level).to(device)


def cascade_dimension(q: float, p: Sequence[float] = (0.4, 0.3, 0.2, 0.1)) -> float:
    """Generalised dimension `D_q = log2(sum p^q) / (1 - q)` of the cascade.

    Parameters
    ----------
    q : float
        Order; 1 is the limit, the entropy of `p`.
    p : sequence of float
        As in `cascade`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the shares are not four positive numbers with sum 1.

    Notes
    -----
    Source: Hentschel and Procaccia (1983), Renyi's entropies at vanishing box size.

    Examples
    --------
    >>> round(cascade_dimension(0), 6), round(cascade_dimension(1), 6)
    (2.0, 1.846439)
    """
    _check_shares(p)
    if q == 1:
        return -sum(share * math.log2(share) for share in p)
    return math.log2(sum(share**q for share in p)) / (1 - q)


def kronecker_power(seed: Tensor | Sequence[object], level: int) -> Tensor:
    """Replace every occupied cell by the seed, again and again.

    Parameters
    ----------
    seed : Tensor or nested sequence
        `(b_1, ..., b_d)`: 0/1 for a set, numbers for a measure.
    level : int
        Number of factors, at least 1.

    Returns
    -------
    Tensor
        `(b_i ** level,)`: the dtype of the seed; a set stays 0/1.

    Raises
    ------
    ValueError
        If the seed is empty or the level not positive.

    Notes
    -----
    Source: the deterministic iterated function system on a `b`-adic grid (Falconer 2003, chapter 9); its
    dimension is `log(cells) / log(b)` for a seed with equal sides.

    Examples
    --------
    >>> kronecker_power([[1, 0], [1, 1]], 2).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    """
    tile = seed if isinstance(seed, Tensor) else torch.tensor(seed)
    if tile.numel() == 0 or level < 1:
        raise ValueError(f"seed must hold cells and level be at least 1, got {tuple(tile.shape)} and {level}")
    power = tile
    for _ in range(level - 1):
        power = torch.kron(power, tile)
    return power


def _check_shares(p: Sequence[float]) -> None:
    if len(p) != 4 or min(p) <= 0 or abs(sum(p) - 1) > 1e-12:
        raise ValueError(f"p must hold four positive shares with sum 1, got {tuple(p)}: mass would be lost")
