r"""Discrete scale invariance: whether a count repeats itself at one ratio of scales and at no other.

An observable obeys discrete scale invariance with ratio `lam` if `O(lam r) = mu O(r)`; its general form is
`r^a F(log r / log lam)` with `F` of period one (Sornette 1998). A set built by a rule on a `lam`-adic grid
has equal local slopes at sizes `lam^k` and unequal ones at other ratios; a line or a plane has equal ones at
all. Sampled at one ratio alone, every straight line looks like discrete scale invariance: we compare several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from geomlib.weightspace.boxes import box_counts

__all__ = ["Periodogram", "RatioTest", "dsi_periodogram", "dsi_ratio_test"]


@dataclass(frozen=True, eq=False)
class RatioTest:
    """How unequal the local slopes are at each ratio of scales.

    Attributes
    ----------
    verdict : str
        `"DSI"`, `"continuous_or_trivial"`, `"none"` or `"undetermined"`.
    ratio : int or None
        The ratio of `"DSI"`.
    spread : dict of int to float
        Population standard deviation of the local slopes of each usable ratio.
    slopes : dict of int to tuple of float
        The local slopes themselves.
    """

    verdict: str
    ratio: int | None
    spread: dict[int, float]
    slopes: dict[int, tuple[float, ...]]

    def __repr__(self) -> str:
        name = f"DSI({self.ratio})" if self.ratio else self.verdict
        return f"RatioTest({name}: {', '.join(f's({k}) {v:.3f}' for k, v in self.spread.items())})"


@dataclass(frozen=True, eq=False)
class Periodogram:
    """Oscillation of the mass around its power law, against the logarithm of the scale.

    Attributes
    ----------
    verdict : str
        `"log_periodic"` (power at least one half), `"none"` or `"undetermined"` (fewer than two periods).
    ratio : float
        Ratio of scales of the strongest oscillation, NaN if there is none.
    power : float
        Share of what a quadratic leaves over that the oscillation explains.
    periods : float
        How many periods the scales span.
    ratios, powers : Tensor
        `(frequencies,)` float64: the whole periodogram.
    radii, mass : Tensor
        `(scales,)`: what was analysed, the mean mass of squares of side `2 r + 1` centred on the set.
    """

    verdict: str
    ratio: float
    power: float
    periods: float
    ratios: Tensor
    powers: Tensor
    radii: Tensor
    mass: Tensor

    def __repr__(self) -> str:
        return (
            f"Periodogram({self.verdict}: ratio {self.ratio:.3f}, power {self.power:.2f}, "
            f"{self.periods:.1f} periods)"
        )


def dsi_ratio_test(mask: Tensor, ratios: Sequence[int] = (2, 3, 5, 7)) -> RatioTest:
    """Compare the scatter of the local slopes over several ratios of scales.

    Parameters
    ----------
    mask : Tensor
        `(n_1, n_2)` or `(n_1, n_2, n_3)`, boolean or integer: one set.
    ratios : sequence of int
        Ratios to compare, none a power of another (it would share the invariance).

    Returns
    -------
    RatioTest
        `"DSI"` if the least scatter is at most 0.02, on four sizes or more, and every other is at least 0.04
        and three times that; `"continuous_or_trivial"` if none exceeds 0.04; `"undetermined"` if fewer than
        two ratios are usable.

    Raises
    ------
    ValueError
        If the mask is not one grid of two or three axes, or the ratios are fewer than two, below 2 or powers
        of one another.

    Notes
    -----
    Source: arXiv 2503.14298 claims discrete scale invariance under recursive dilation (abstract); the test is
    reconstructed. Sizes start at one cell, boxes are anchored at the origin and only whole ones count;
    scales with more than 0.9 of the boxes occupied are saturated and left out, and three sizes must remain.

    Examples
    --------
    >>> seed = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    >>> carpet = torch.kron(torch.kron(seed, seed), torch.kron(seed, torch.kron(seed, seed)))
    >>> dsi_ratio_test(carpet).ratio
    3
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"mask must be one grid of two or three axes, got {tuple(mask.shape)}")
    _check_ratios(ratios)
    spread: dict[int, float] = {}
    slopes: dict[int, tuple[float, ...]] = {}
    for ratio in ratios:
        sizes = [1]
        while sizes[-1] * ratio <= min(mask.shape) // 2:
            sizes.append(sizes[-1] * ratio)
        found = box_counts(mask, sizes, border="full", d=mask.ndim)
        share, counts = found.fraction.tolist(), found.normalised.tolist()
        usable = [math.log(n) for n, part in zip(counts, share, strict=True) if 0 < part <= 0.9]
        if len(usable) < 3:
            continue
        local = [(a - b) / math.log(ratio) for a, b in pairwise(usable)]
        mean = sum(local) / len(local)
        slopes[ratio] = tuple(local)
        spread[ratio] = math.sqrt(sum((s - mean) ** 2 for s in local) / len(local))
    verdict, winner = _judge(spread, slopes)
    return RatioTest(verdict, winner, spread, slopes)


def dsi_periodogram(
    mask: Tensor,
    *,
    scales: int = 70,
    r_max: int | None = None,
    ratios: tuple[float, float] = (1.5, 6.0),
    frequencies: int = 200,
) -> Periodogram:
    """Look for an oscillation of the mass against the logarithm of the scale.

    Parameters
    ----------
    mask : Tensor
        `(n_1, n_2)`, boolean or integer: one set.
    scales : int
        Radii, spaced evenly in the logarithm from 1 to `r_max`, before equal ones are merged.
    r_max : int, optional
        Largest radius, a sixth of the shortest side by default; centres keep this distance from the border.
    ratios : (float, float)
        Least and largest ratio of scales to look for.
    frequencies : int
        How many ratios are tried, evenly spaced in `1 / log(ratio)`.

    Returns
    -------
    Periodogram

    Raises
    ------
    ValueError
        If the mask is not one grid of two axes, or a range is empty.

    Notes
    -----
    Source: Sornette (1998) for the log-periodic form; the estimator is reconstructed. At each frequency a
    cosine and a sine are fitted together with a quadratic in the logarithm of the side. How large a power
    chance reaches has to be seen on sets of the same dimension without a preferred ratio, level sets of
    fractional Brownian surfaces for example: a shuffled mask, with a power near 0.1, is too easy a rival.

    Examples
    --------
    >>> gasket = torch.ones(1, 1, dtype=torch.int64)
    >>> for _ in range(8):
    ...     gasket = torch.kron(gasket, torch.tensor([[1, 0], [1, 1]]))
    >>> dsi_periodogram(gasket).verdict
    'log_periodic'
    """
    if mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask must be one boolean grid of two axes, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    r_max = min(mask.shape) // 6 if r_max is None else r_max
    if not 1 <= r_max <= (min(mask.shape) - 1) // 2:
        raise ValueError(f"r_max must leave centres in a grid {tuple(mask.shape)}, got {r_max}: none would")
    if not 1 < ratios[0] < ratios[1] or frequencies < 2 or scales < 2:
        raise ValueError(
            f"ratios must grow from above 1, frequencies and scales be at least 2, got {ratios}, "
            f"{frequencies} and {scales}: nothing would be compared"
        )
    radii = torch.logspace(0, math.log10(r_max), scales, dtype=torch.float64).round().long().unique()
    mass = _mass(mask.detach() != 0, radii.tolist())
    f = torch.linspace(1 / math.log(ratios[1]), 1 / math.log(ratios[0]), frequencies, dtype=torch.float64)
    found = (1 / f).exp()
    # A quadratic, a cosine and a sine take five of the points.
    if len(radii) < 8 or not bool((mass > 0).all()):
        return Periodogram("undetermined", math.nan, math.nan, 0.0, found, f * math.nan, radii, mass)
    powers = _gain((2 * radii + 1).double().log(), mass.log(), f)
    best = int(powers.argmax())
    ratio, power = float(found[best]), float(powers[best])
    periods = math.log(r_max) / math.log(ratio)
    if power == 0:
        return Periodogram("none", math.nan, 0.0, periods, found, powers, radii, mass)
    verdict = "undetermined" if periods < 2 else "log_periodic" if power >= 0.5 else "none"
    return Periodogram(verdict, ratio, power, periods, found, powers, radii, mass)


def _check_ratios(ratios: Sequence[int]) -> None:
    if len(ratios) < 2 or min(ratios) < 2:
        raise ValueError(
            f"ratios must be at least two numbers from 2 on, got {tuple(ratios)}: compared to what?"
        )
    for a in ratios:
        for b in ratios:
            if any(a**k == b for k in range(2, 8)) or (a == b and ratios.count(a) > 1):
                raise ValueError(f"ratios must not be powers of one another, got {a} and {b}: both would win")


def _judge(spread: dict[int, float], slopes: dict[int, tuple[float, ...]]) -> tuple[str, int | None]:
    if len(spread) < 2:
        return "undetermined", None
    winner = min(spread, key=lambda ratio: spread[ratio])
    best = spread[winner]
    others = [s for ratio, s in spread.items() if ratio != winner]
    if best <= 0.02 and len(slopes[winner]) >= 3 and all(s >= max(0.04, 3 * best) for s in others):
        return "DSI", winner
    return ("continuous_or_trivial" if max(spread.values()) <= 0.04 else "none"), None


def _mass(mask: Tensor, radii: list[int]) -> Tensor:
    """Mean number of cells within `r` (sup norm) of the points of the set that lie far inside."""
    height, width = mask.shape
    margin = radii[-1]
    rows, columns = mask[margin : height - margin, margin : width - margin].nonzero().unbind(1)
    if len(rows) == 0:
        return torch.zeros(len(radii), dtype=torch.float64)
    total = pad(mask.to(torch.int64).cumsum(0).cumsum(1), (1, 0, 1, 0)).flatten()
    corner = (rows + margin) * (width + 1) + columns + margin
    means = []
    for r in radii:
        low, high = corner - r * (width + 2), corner + (r + 1) * (width + 2)
        side = 2 * r + 1
        square = total[high] - total[high - side] - total[low + side] + total[low]
        means.append(square.double().mean())
    return torch.stack(means).cpu()


def _gain(x: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """Share of the residual of a quadratic that an oscillation of each frequency explains: `(len(f),)`."""
    x = x - x.mean()
    smooth = torch.stack([torch.ones_like(x), x, x**2], 1)
    left = y - smooth @ torch.linalg.lstsq(smooth, y[:, None]).solution[:, 0]
    phase = 2 * math.pi * f[:, None] * x
    design = torch.cat([smooth.expand(len(f), -1, -1), torch.stack([phase.cos(), phase.sin()], 2)], 2)
    target = y[:, None].expand(len(f), -1, -1)
    residual = target - design @ torch.linalg.lstsq(design, target).solution
    variance = left.square().sum()
    # A power law to rounding, a line or a plane: what is left over is noise of the arithmetic.
    if variance <= 1e-20 * y.square().sum():
        return torch.zeros_like(f)
    return 1 - residual.square().sum((1, 2)) / variance
