"""Sets and surfaces whose dimension is known: what every estimator of the room is measured against.

Kronecker powers of a 0/1 seed are exact on the grid of their own ratio: `N(ratio^(m-j)) = cells^j`.
Percolation and rough surfaces are exact in the limit only. None of them comes from arXiv 2503.14298; they
are the standard examples of fractal geometry (Falconer 2003) and percolation (Stauffer and Aharony 1994).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from geomlib.weightspace.fields import cascade, cascade_dimension, fbm_surface, kronecker_power, plane

__all__ = [
    "DIMENSIONS",
    "cantor_dust",
    "carpet",
    "cascade",
    "cascade_dimension",
    "diagonal",
    "disk",
    "fbm_surface",
    "filled",
    "gasket",
    "koch",
    "kronecker_power",
    "menger",
    "percolation",
    "plane",
    "point",
    "random_mask",
    "vicsek",
]

DIMENSIONS: Mapping[str, float] = MappingProxyType(
    {
        "carpet": math.log(8) / math.log(3),
        "gasket": math.log(3) / math.log(2),
        "cantor_dust": math.log(4) / math.log(3),
        "vicsek": math.log(5) / math.log(3),
        "menger": math.log(20) / math.log(3),
        "koch": math.log(4) / math.log(3),
        "percolation": 91 / 48,
        "diagonal": 1.0,
        "filled": 2.0,
        "point": 0.0,
    }
)
"""Exact dimension of each set, by the name of its function."""

CRITICAL_DENSITY = 0.592746
"""Site percolation threshold of the square lattice (Stauffer and Aharony 1994; known numerically)."""


def carpet(level: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the Sierpinski carpet: `(3**level, 3**level)`, boolean, dimension `log 8 / log 3`.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If the level is not positive.

    Notes
    -----
    Source: Falconer (2003).

    Examples
    --------
    >>> carpet(1).int().tolist()
    [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    """
    return _set([[1, 1, 1], [1, 0, 1], [1, 1, 1]], level, device)


def gasket(level: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the Sierpinski gasket, Pascal's triangle modulo 2: `(2**level, 2**level)`, `log 3 / log 2`.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If the level is not positive.

    Notes
    -----
    Source: Falconer (2003); Lucas' theorem for Pascal's triangle.

    Examples
    --------
    >>> gasket(3).sum().item()
    27
    """
    return _set([[1, 0], [1, 1]], level, device)


def cantor_dust(level: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the product of two Cantor sets: `(3**level, 3**level)`, boolean, dimension `log 4 / log 3`.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If the level is not positive.

    Notes
    -----
    Source: Falconer (2003).

    Examples
    --------
    >>> cantor_dust(2).sum().item()
    16
    """
    return _set([[1, 0, 1], [0, 0, 0], [1, 0, 1]], level, device)


def vicsek(level: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the Vicsek fractal, plus signs of plus signs: `(3**level, 3**level)`, `log 5 / log 3`.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If the level is not positive.

    Notes
    -----
    Source: Vicsek (1983).

    Examples
    --------
    >>> vicsek(1).int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """
    return _set([[0, 1, 0], [1, 1, 1], [0, 1, 0]], level, device)


def menger(level: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the Menger sponge: `(3**level,) * 3`, boolean, dimension `log 20 / log 3`.

    Parameters
    ----------
    level : int
        Depth, at least 1.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If the level is not positive.

    Notes
    -----
    Source: Menger (1926): a cell goes if two or three of its coordinates are central.

    Examples
    --------
    >>> menger(1).sum().item()
    20
    """
    central = torch.tensor([0, 1, 0])
    number = central[:, None, None] + central[:, None] + central
    return _set((number < 2).int(), level, device)


def koch(n: int, *, device: torch.device | str | None = None) -> Tensor:
    """Draw the Koch curve on a grid of `n` columns: `(n, n)`, boolean, dimension `log 4 / log 3`.

    Parameters
    ----------
    n : int
        Side of the grid, at least 2.
    device
        Of the result.

    Returns
    -------
    Tensor
        Every cell that holds one of the points at most a third of a cell apart along the curve.

    Raises
    ------
    ValueError
        If `n` is below 2.

    Notes
    -----
    Source: von Koch (1904), the curve from (0, 0) to (1, 0) with its peak at height `sqrt(3) / 6`.

    Examples
    --------
    >>> koch(64).any(0).all().item()
    True
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: a curve has no shape on one cell")
    turns = np.exp(1j * np.pi / 3 * np.array([0, 1, -1, 0]))
    steps = np.ones(1, dtype=np.complex128)
    for _ in range(math.ceil(math.log(3 * n, 3))):
        steps = (steps / 3 * turns[:, None]).reshape(-1)
    points = np.concatenate([[0], steps.cumsum()])
    columns = np.clip((points.real * n).astype(int), 0, n - 1)
    rows = np.clip((points.imag * n + 1e-9).astype(int), 0, n - 1)
    mask = np.zeros((n, n), dtype=bool)
    mask[n - 1 - rows, columns] = True
    return torch.from_numpy(mask).to(device)


def diagonal(n: int, *, d: int = 2, device: torch.device | str | None = None) -> Tensor:
    """Return a straight line through `(n,) * d` cells: dimension 1 at every dyadic scale.

    Parameters
    ----------
    n : int
        Side of the grid.
    d : int
        Number of axes.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If `n` or `d` is not positive.

    Examples
    --------
    >>> diagonal(3).int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    mask = filled(n, d=d, device="cpu").logical_not()
    mask[(torch.arange(n),) * d] = True
    return mask.to(device)


def filled(n: int, *, d: int = 2, device: torch.device | str | None = None) -> Tensor:
    """Return all of `(n,) * d` cells: dimension `d`.

    Parameters
    ----------
    n : int
        Side of the grid.
    d : int
        Number of axes.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If `n` or `d` is not positive.

    Examples
    --------
    >>> filled(2).tolist()
    [[True, True], [True, True]]
    """
    if n < 1 or d < 1:
        raise ValueError(f"n and d must be positive, got {n} and {d}: there is no grid")
    return torch.ones((n,) * d, dtype=torch.bool, device=device)


def point(n: int, *, d: int = 2, device: torch.device | str | None = None) -> Tensor:
    """Return one cell in the middle of `(n,) * d`: dimension 0.

    Parameters
    ----------
    n : int
        Side of the grid.
    d : int
        Number of axes.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If `n` or `d` is not positive.

    Examples
    --------
    >>> point(3).int().tolist()
    [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    """
    mask = filled(n, d=d, device="cpu").logical_not()
    mask[(n // 2,) * d] = True
    return mask.to(device)


def disk(n: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return a filled disk of diameter `n`: dimension 2, approached slowly because of its edge.

    Parameters
    ----------
    n : int
        Side of the grid.
    device
        Of the result.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If `n` is not positive.

    Examples
    --------
    >>> disk(4).int().tolist()
    [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}: there is no grid")
    x = torch.arange(n, device=device) - (n - 1) / 2
    return x[:, None].square() + x.square() <= (n / 2) ** 2


def random_mask(
    shape: Sequence[int],
    p: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Occupy each cell independently: a set without any geometry.

    Parameters
    ----------
    shape : sequence of int
        Of the grid.
    p : float
        Density, in `[0, 1]`.
    generator
        Source of randomness, on the CPU.
    device
        Of the result.

    Returns
    -------
    Tensor
        `shape`, boolean.

    Raises
    ------
    ValueError
        If `p` is not a probability.

    Examples
    --------
    >>> random_mask((2, 2), 1.0).all().item()
    True
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}: it is a probability")
    return (torch.rand(tuple(shape), generator=generator, dtype=torch.float64) < p).to(device)


def percolation(
    n: int,
    *,
    p: float = CRITICAL_DENSITY,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the largest cluster of site percolation: `(n, n)`, dimension `91 / 48` at the critical density.

    Parameters
    ----------
    n : int
        Side of the grid.
    p : float
        Density of open sites.
    generator
        Source of randomness, on the CPU.
    device
        Of the result.

    Returns
    -------
    Tensor
        Boolean, the largest set of open sites joined by common edges; all false if no site is open.

    Raises
    ------
    ValueError
        If `n` is not positive or `p` not a probability.

    Notes
    -----
    Source: Stauffer and Aharony (1994). The exponent holds for large clusters; estimates on a few hundred
    cells a side lie near 1.8.

    Examples
    --------
    >>> cluster = percolation(32, generator=torch.Generator().manual_seed(0))
    >>> 0 < cluster.sum().item() < 32 * 32
    True
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}: there is no grid")
    label, clusters = ndimage.label(random_mask((n, n), p, generator=generator).numpy())
    if clusters == 0:
        return torch.zeros(n, n, dtype=torch.bool, device=device)
    mass = np.bincount(label.ravel())
    mass[0] = 0
    return torch.from_numpy(label == mass.argmax()).to(device)


def _set(seed: Tensor | Sequence[object], level: int, device: torch.device | str | None) -> Tensor:
    return kronecker_power(seed, level).bool().to(device)
