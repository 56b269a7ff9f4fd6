"""Weights as a rough surface: differential box counting, Haar details, increments.

No threshold: the graph `{(x, W(x))}` is measured itself. Differential box counting is what image analysis
uses, and mostly reads the tails of the distribution of values; the Haar exponent is made of the
transformation `T` and reads their order. Where a surface is self-affine with Hurst index `H`, its graph has
dimension `d + 1 - H`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from geomlib.weightspace.dimension import DimFit, fit_dimension
from geomlib.weightspace.transform import as_signal

__all__ = ["Roughness", "dbc", "haar_energies", "haar_exponent", "ranks", "variogram"]

Variant = Literal["dbc", "rdbc"]


@dataclass(frozen=True)
class Roughness:
    """A power law `value ~ scale**zeta` of a surface.

    Attributes
    ----------
    zeta : float
        Exponent; NaN where the status says that there is none.
    se : float
        Standard error of the least-squares slope (lack of fit, not sampling).
    D : float
        Dimension of the graph that a self-affine surface with this exponent has, `d + 1 - zeta / 2`; NaN
        unless `zeta` is positive.
    scales : tuple of float
        Sides or lags in the fit.
    values : tuple of float
        Energies or mean squared increments in the fit.
    status : str
        "ok", "constant" or "insufficient_scales".
    """

    zeta: float
    se: float
    D: float
    scales: tuple[float, ...]
    values: tuple[float, ...]
    status: str

    @property
    def hurst(self) -> float:
        """Half the exponent: the Hurst index of a self-affine surface."""
        return self.zeta / 2


def dbc(
    W: Tensor, *, variant: Variant = "dbc", rank: bool = False, sizes: Sequence[int] | None = None
) -> DimFit:
    """Estimate the dimension of the graph of a tensor by differential box counting.

    Parameters
    ----------
    W : Tensor
        `(n_1, ..., n_d)` real; two axes for an image or a matrix.
    variant : {"dbc", "rdbc"}
        How many boxes of height `h` a block needs: `floor(max / h) - floor(min / h) + 1`, or
        `ceil((max - min) / h)` and at least one.
    rank : bool
        Replace the values by their ranks first, which leaves only their order.
    sizes : sequence of int, optional
        Sides of the blocks; the powers of two in `[2, n / 4]` of the shortest side if not given.

    Returns
    -------
    DimFit
        `counts` are boxes over the whole blocks, scaled up to the whole grid. A constant tensor has the
        dimension of its grid and the status "constant"; fewer than four sizes give "insufficient_scales".

    Raises
    ------
    ValueError
        If the tensor is empty or not finite, or a size does not fit into it.

    Notes
    -----
    Source: Sarkar and Chaudhuri (1994), with box height `h = r / n` for values scaled to `[0, 1]`; "rdbc"
    is the relative variant of Jin, Ong and Jayasooriah (1995). On a few hundred cells both press rough
    surfaces together (a true 2.9 reads 2.3), and both fall with heavier tails at no spatial structure at all:
    compare with shuffled values, or use ranks.

    Examples
    --------
    >>> round(dbc(torch.arange(64.0).expand(64, 64), variant="rdbc").D, 2)
    2.0
    """
    values = as_signal(W.detach()).double()
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    if values.ndim == 0:
        raise ValueError("W must have at least one axis, got a single number: it has no graph")
    side = min(values.shape)
    if sizes is None:
        sizes = [2**k for k in range(1, side.bit_length()) if 2**k <= side / 4]
    elif not sizes or sizes[0] < 1 or sizes[-1] > side or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"sizes must grow and fit into a side of {side}, got {tuple(sizes)}")
    low, high = values.amin(), values.amax()
    if bool(low == high):
        blocks = [float(math.prod(n / r for n in values.shape)) for r in sizes]
        nan, d = math.nan, float(values.ndim)
        return DimFit(d, nan, (nan, nan), nan, nan, (), tuple(map(float, sizes)), tuple(blocks), "constant")
    if not sizes:
        nan = math.nan
        return DimFit(nan, nan, (nan, nan), nan, nan, (), (), (), "insufficient_scales")
    values = ranks(values) if rank else (values - low) / (high - low)
    counts, least, most, done = [], values, values, 1
    for r in sizes:
        if r % done:
            least, most, done = values, values, 1
        least, most = _block(least, r // done, torch.minimum), _block(most, r // done, torch.maximum)
        done, h = r, r / side
        if variant == "dbc":
            boxes = (most / h).floor() - (least / h).floor() + 1
        else:
            boxes = ((most - least) / h).ceil().clamp(min=1)
        counts.append(boxes.sum() * (values.numel() / (boxes.numel() * r**values.ndim)))
    return fit_dimension(list(sizes), torch.stack(counts), window="full")


def haar_exponent(W: Tensor, *, ratio: int = 2, levels: int = 5, first: int = 0) -> Roughness:
    """Fit the growth of what the transformation loses from scale to scale.

    Parameters
    ----------
    W : Tensor
        `(n_1, ..., n_d)` real.
    ratio : int
        Factor between two scales.
    levels : int
        Number of scales in the fit.
    first : int
        First of them; a larger one forgets what discretisation does to the finest scales.

    Returns
    -------
    Roughness
        `zeta = 2H` for a surface of Hurst index `H`, `-d` for white noise; status "constant" if some scale
        loses nothing, "insufficient_scales" if fewer than three scales exist.

    Raises
    ------
    ValueError
        If the tensor is empty or not finite, or `ratio`, `levels` or `first` is out of range.

    Notes
    -----
    Source: reconstructed. `E_k = mean((T_k W - T_(-1) T_(k+1) W)^2) / (1 - ratio^-d)` grows like `ratio^(k
    zeta)`; a wavelet estimate of the spectral exponent (Abry and Veitch 1998) with the wavelet that box
    averages come from. On a few hundred cells it comes out low, by up to 0.2 for smooth surfaces.

    Examples
    --------
    >>> noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    >>> round(haar_exponent(noise).zeta, 1)
    -2.0
    """
    if levels < 3 or first < 0:
        raise ValueError(f"levels must be at least 3 and first at least 0, got {levels} and {first}")
    energies = haar_energies(W, ratio=ratio)[first : first + levels].cpu()
    return _power_law([float(ratio**k) for k in range(first, first + len(energies))], energies, W.ndim)


def haar_energies(W: Tensor, *, ratio: int = 2, d: int | None = None) -> Tensor:
    """Return the mean energy that each scale loses when it is averaged to the next.

    Parameters
    ----------
    W : Tensor
        `(..., n_1, ..., n_d)` real.
    ratio : int
        Factor between two scales.
    d : int, optional
        Number of trailing axes that form the grid; all axes if not given.

    Returns
    -------
    Tensor
        `(..., levels)` float64: `E_k` of `haar_exponent` for every `k` at which the shortest side holds a
        whole box. Cells that do not fill a box are cropped.

    Raises
    ------
    ValueError
        If the tensor is empty or not finite, or `ratio` or `d` is out of range.

    Notes
    -----
    Source: reconstructed, see `haar_exponent`. The division makes `E_0` the variance for white noise.

    Examples
    --------
    >>> haar_energies(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist()
    [1.3333333333333333]
    """
    if ratio < 2:
        raise ValueError(f"ratio must be at least 2, got {ratio}: no scale would lose anything")
    values = as_signal(W.detach()).double()
    d = values.ndim if d is None else d
    if not 1 <= d <= values.ndim:
        raise ValueError(f"d must lie between 1 and the {values.ndim} axes of W, got {d}")
    lead, energies = values.ndim - d, []
    while min(values.shape[lead:]) >= ratio:
        blocks = values
        for axis in reversed(range(lead, lead + d)):
            n = blocks.shape[axis] // ratio
            blocks = blocks.narrow(axis, 0, n * ratio).unflatten(axis, (n, ratio))
        inside = tuple(range(lead + 1, lead + 2 * d, 2))
        means = blocks
        for axis in inside:  # sums of slices: several times as fast as a mean over short axes
            means = (reduce(torch.add, means.unbind(axis)) / ratio).unsqueeze(axis)
        # Energy before minus energy after, by Pythagoras, would cancel for smooth signals: subtract first.
        lost = (blocks - means).square().flatten(lead).mean(-1)
        energies.append(lost / (1 - float(ratio) ** -d))
        values = means.squeeze(inside)
    if not energies:
        return torch.zeros(*values.shape[:lead], 0, dtype=torch.float64, device=values.device)
    return torch.stack(energies, -1)


def variogram(W: Tensor, *, lags: Sequence[int] = (1, 2, 4, 8, 16)) -> Roughness:
    """Fit the growth of squared increments with the distance of two cells.

    Parameters
    ----------
    W : Tensor
        `(n_1, ..., n_d)` real.
    lags : sequence of int
        Distances along the axes, growing; those that do not fit the shortest side are left out.

    Returns
    -------
    Roughness
        `zeta = 2H`; the mean is over all pairs on all axes.

    Raises
    ------
    ValueError
        If the tensor is empty or not finite, or the lags are not positive and growing.

    Notes
    -----
    Source: Matheron's variogram; for a self-affine surface `E (W(x + l) - W(x))^2 ~ l^(2H)`.

    Examples
    --------
    >>> variogram(torch.arange(64.0).expand(64, 64)).hurst
    1.0
    """
    if not lags or lags[0] < 1 or any(a >= b for a, b in pairwise(lags)):
        raise ValueError(f"lags must be positive and growing, got {tuple(lags)}")
    values = as_signal(W.detach()).double()
    side = min(values.shape, default=0)
    used = [lag for lag in lags if lag < side]
    means = []
    for lag in used:
        steps = [
            values.narrow(axis, lag, n - lag) - values.narrow(axis, 0, n - lag)
            for axis, n in enumerate(values.shape)
        ]
        squares = torch.stack([step.square().sum() for step in steps]).sum()
        means.append(squares / sum(step.numel() for step in steps))
    found = torch.stack(means).cpu() if means else torch.zeros(0, dtype=torch.float64)
    return _power_law([float(lag) for lag in used], found, values.ndim)


def ranks(W: Tensor) -> Tensor:
    """Replace each value by its rank, scaled to `[0, 1]`: the order without the distribution.

    Parameters
    ----------
    W : Tensor
        Any shape, real.

    Returns
    -------
    Tensor
        Same shape, float64. Equal values get their mean rank, since an order by index would be a pattern
        of its own.

    Raises
    ------
    ValueError
        If the tensor is empty or not finite.

    Notes
    -----
    Source: the rank transform of nonparametric statistics; reconstructed as the way to take the marginal
    distribution out of differential box counting.

    Examples
    --------
    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist()
    [0.5, 0.0, 0.5, 1.0]
    """
    values = as_signal(W.detach())
    _, index, number = values.unique(return_inverse=True, return_counts=True)
    last = number.cumsum(0)
    middle = last.double() - (number + 1).double() / 2
    spread = (middle[-1] - middle[0]).clamp(min=1.0)
    return ((middle - middle[0]) / spread)[index]


def _block(x: Tensor, factor: int, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Reduce whole blocks of side `factor` to their least or largest value."""
    for axis in range(x.ndim):
        x = x.narrow(axis, 0, x.shape[axis] // factor * factor)
        x = reduce(extreme, x.unflatten(axis, (-1, factor)).unbind(axis + 1))
    return x


def _power_law(scales: list[float], values: Tensor, d: int) -> Roughness:
    nan = math.nan
    kept = tuple(values.tolist())
    if kept and min(kept) <= 0:
        return Roughness(nan, nan, nan, tuple(scales), kept, "constant")
    if len(kept) < 3:
        return Roughness(nan, nan, nan, tuple(scales), kept, "insufficient_scales")
    fit = fit_dimension(scales, kept, window="full", min_scales=2)
    zeta = -fit.D
    return Roughness(zeta, fit.se, d + 1 - zeta / 2 if zeta > 0 else nan, tuple(scales), kept, "ok")
