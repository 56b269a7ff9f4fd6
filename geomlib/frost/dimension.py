"""Fractal dimension: the one fractal that the update makes, and estimators with their known errors.

The update of arXiv:2601.19551 (eq. 14) with no transition and a random input is an iterated function system,
whose attractor has a known dimension. Everything else here measures dimensions, of point sets and of series,
and knows sets to be calibrated on: the paper states dimensions of trajectories without naming its estimator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "box_counts",
    "box_dimension",
    "chaos_game",
    "circle",
    "fractional_brownian_motion",
    "higuchi",
    "koch_curve",
    "madogram",
    "similarity_dimension",
]


def chaos_game(
    inputs: Tensor,
    count: int,
    *,
    scale: float = 0.5,
    hurst: float = 0.8,
    walkers: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Iterate the update without a transition on inputs drawn at random, and return where it goes.

    With `A(h) = -h` the update is `h <- (1 - lambda) h + lambda^(1+H) b_j`. For a fixed `j` it contracts
    towards `lambda^H b_j`; with `j` drawn anew at each step it is an iterated function system.

    Parameters
    ----------
    inputs : Tensor
        `(m, d)` floating point, `m >= 2`: the injected vectors `B x_j`.
    count : int
        Number of points.
    scale : float
        Step `lambda` in (0, 1).
    hurst : float
        Exponent `H` in (0, 1].
    walkers : int
        States that run side by side.
    generator : torch.Generator, optional
        Draws the inputs, on the CPU.

    Returns
    -------
    Tensor
        `(count, d)`, dtype and device of `inputs`. Every point lies on the attractor up to rounding, since
        the walkers start at fixed points of the maps.

    Raises
    ------
    ValueError
        If a number is out of range or there are fewer than two inputs.

    Notes
    -----
    Source: arXiv:2601.19551, eqs. 14-15 with `A = -id`; reconstructed: the paper speaks of a fractal of
    transformations, and this is where one can be seen. Attractor and uniqueness: Hutchinson (1981).

    Examples
    --------
    >>> triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])
    >>> points = chaos_game(triangle, 500, generator=torch.Generator().manual_seed(0))
    >>> points.shape, round(points[:, 0].max().item(), 2) == round(0.5**0.8, 2)
    (torch.Size([500, 2]), True)
    """
    if inputs.dim() != 2 or len(inputs) < 2 or not inputs.is_floating_point():
        raise ValueError(
            "inputs must be floating point of shape (m, d) with m at least 2, got "
            f"{inputs.dtype} {tuple(inputs.shape)}: one map alone has a point for an attractor"
        )
    if not 0 < scale < 1:
        raise ValueError(f"scale must lie in (0, 1), got {scale}: the maps would not contract")
    if not 0 < hurst <= 1:
        raise ValueError(f"hurst must lie in (0, 1], got {hurst}: it is a Hurst exponent")
    for name, value in {"count": count, "walkers": walkers}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: there would be no point")
    walkers = min(walkers, count)
    steps = -(-count // walkers)
    # So many steps wash out where a walker began, to single precision.
    settle = min(200, math.ceil(math.log(1e-7) / math.log1p(-scale)))
    corners = scale**hurst * inputs
    moves = torch.randint(len(inputs), (settle + steps, walkers), generator=generator).to(inputs.device)
    state, path = corners[moves[0]], []
    for t, move in enumerate(moves):
        state = state + scale * (corners[move] - state)
        if t >= settle:
            path.append(state)
    return torch.cat(path)[:count]


def similarity_dimension(maps: int, ratio: float) -> float:
    """Return `log m / log(1 / r)`, the dimension of an attractor of `m` similarities of ratio `r`.

    It is the Hausdorff and the box dimension if the pieces do not overlap (open set condition).

    Parameters
    ----------
    maps : int
        Number of maps, at least 1.
    ratio : float
        Their common ratio in (0, 1); `1 - lambda` for :func:`chaos_game`.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: Hutchinson (1981), section 5.3.

    Examples
    --------
    >>> round(similarity_dimension(3, 0.5), 3), round(similarity_dimension(4, 1 / 3), 3)
    (1.585, 1.262)
    """
    if maps < 1:
        raise ValueError(f"maps must be at least 1, got {maps}: there would be no attractor")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), got {ratio}: the maps would not contract")
    return math.log(maps) / math.log(1 / ratio)


def box_counts(
    points: Tensor,
    exponents: Iterable[int] = range(2, 9),
    *,
    offsets: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Count the boxes that a set of points occupies, at sides `2^-k` of its own larger extent.

    Each grid is laid `offsets` times with random shifts, and the smallest count is kept: the definition of
    the box dimension asks for the cheapest cover, and a grid in one place is rarely that. With `offsets=0`
    one grid is laid from the corner of the set, which is common, and flatters coarse boxes.

    Parameters
    ----------
    points : Tensor
        `(n, d)` finite, floating point, not all equal.
    exponents : iterable of int
        The `k`, at least 0.
    offsets : int
        Shifts to try for each side, 0 for the one grid that starts at the corner.
    generator : torch.Generator, optional
        Draws the shifts, on the CPU.

    Returns
    -------
    Tensor
        `(len(exponents),)` int64.

    Raises
    ------
    ValueError
        If the shape is wrong, the points are not finite or all equal, or a number is out of range.

    Notes
    -----
    Source: standard; the choice of grids is reconstructed, since the paper names no estimator.

    Examples
    --------
    >>> line = torch.linspace(0, 1, 1000)[:, None]
    >>> box_counts(line, (1, 2, 3), offsets=0).tolist()
    [2, 4, 8]

    A shifted grid cuts both ends of it:

    >>> box_counts(line, (1, 2, 3), generator=torch.Generator().manual_seed(0)).tolist()
    [3, 5, 9]
    """
    _points(points)
    if offsets < 0:
        raise ValueError(f"offsets must be at least 0, got {offsets}: it is a number of grids")
    exponents = list(exponents)
    if any(k < 0 for k in exponents):
        raise ValueError(f"exponents must be at least 0, got {exponents}: boxes larger than the set")
    low = points.amin(0)
    extent = (points.amax(0) - low).max()
    unit = (points - low) / extent
    shape = (len(exponents), max(offsets, 1), points.shape[1])
    shifts = torch.rand(shape, generator=generator, dtype=torch.float64) if offsets else torch.zeros(shape)
    shifts = shifts.to(device=points.device, dtype=points.dtype)
    counts = []
    for row, k in zip(shifts, exponents, strict=True):
        cells = ((unit * 2**k)[None] + row[:, None]).floor().long()  # (offsets, n, d)
        if not offsets:
            cells = cells.clamp(max=2**k - 1)  # the far edge belongs to the last box
        key = cells[..., 0]
        for axis in range(1, points.shape[1]):
            key = key * (2**k + 2) + cells[..., axis]  # a shifted grid has at most 2^k + 1 cells a side
        key = key.sort(dim=1).values
        counts.append((key[:, 1:] != key[:, :-1]).sum(1).min() + 1)
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=points.device)


def box_dimension(
    points: Tensor,
    exponents: Iterable[int] = range(2, 9),
    *,
    offsets: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the box dimension of a set of points: the slope of log count against log(1 / side).

    It is biased, and the bias depends on the set, on the boxes and on where they lie: a Koch curve, 1.262,
    comes out at 1.296 with the grid at its corner and between 1.23 and 1.31 with four random shifts. Compare
    only what was measured with the same boxes and about as many points.

    Parameters
    ----------
    points, exponents, offsets, generator
        As for :func:`box_counts`; at least two exponents.

    Returns
    -------
    Tensor
        Scalar, float64.

    Raises
    ------
    ValueError
        As :func:`box_counts`, or if there are fewer than two exponents.

    Examples
    --------
    >>> square = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(0))
    >>> round(box_dimension(square, range(2, 6), offsets=0).item(), 2)
    2.0
    """
    exponents = list(exponents)
    if len(set(exponents)) < 2:
        raise ValueError(f"exponents must number at least two, got {exponents}: there would be no slope")
    counts = box_counts(points, exponents, offsets=offsets, generator=generator)
    sides = torch.tensor(exponents, dtype=torch.float64) * math.log(2)
    return _slope(sides, counts.cpu().double().log())


def madogram(series: Tensor, *, lags: int = 64) -> Tensor:
    """Estimate the dimension of the graph of a series from its mean absolute increments.

    `D = 2 - s`, where `s` is the slope of `log mean |x_{i+m} - x_i|` against `log m`.

    Parameters
    ----------
    series : Tensor
        `(..., n)` floating point.
    lags : int
        Largest `m`, at least 2 and below `n`.

    Returns
    -------
    Tensor
        `(...)`.

    Raises
    ------
    ValueError
        If `lags` is out of range, or an increment is zero throughout.

    Notes
    -----
    Source: the variogram of order one; for fractional Brownian motion `s = H`.

    Examples
    --------
    >>> line = torch.linspace(0, 1, 200, dtype=torch.float64)
    >>> round(madogram(line).item(), 6)
    1.0
    """
    if not series.is_floating_point():
        raise ValueError(f"series must be floating point, got {series.dtype}: logarithms are taken of it")
    if not 2 <= lags < series.shape[-1]:
        raise ValueError(
            f"lags must lie in [2, {series.shape[-1] - 1}] for a series of length {series.shape[-1]}, "
            f"got {lags}: there would be no slope"
        )
    sizes = torch.stack([(series[..., m:] - series[..., :-m]).abs().mean(-1) for m in range(1, lags + 1)], -1)
    if not (sizes > 0).all():
        raise ValueError("series must change at every lag, got a constant or periodic one: log of zero")
    steps = torch.arange(1, lags + 1, dtype=series.dtype).log().to(series.device)
    return 2 - _slope(steps, sizes.log())


def higuchi(series: Tensor, *, lags: int = 8) -> Tensor:
    """Estimate the dimension of the graph of a series by Higuchi's curve lengths.

    Parameters
    ----------
    series : Tensor
        `(..., n)` floating point.
    lags : int
        Largest interval `k`, at least 2 and at most `n // 2`.

    Returns
    -------
    Tensor
        `(...)`.

    Raises
    ------
    ValueError
        If `lags` is out of range, or the series is constant.

    Notes
    -----
    Source: Higuchi (1988), eqs. 2-4: length `L(k)` averaged over the `k` starts, `D` the slope of
    `log L(k)` against `log(1 / k)`.

    Examples
    --------
    >>> line = torch.linspace(0, 1, 200, dtype=torch.float64)
    >>> round(higuchi(line).item(), 6)
    1.0
    """
    if not series.is_floating_point():
        raise ValueError(f"series must be floating point, got {series.dtype}: logarithms are taken of it")
    n = series.shape[-1]
    if not 2 <= lags <= n // 2:
        raise ValueError(
            f"lags must lie in [2, {n // 2}] for a series of length {n}, got {lags}: no curve has two points"
        )
    lengths = []
    for k in range(1, lags + 1):
        curves = [
            series[..., m::k].diff(dim=-1).abs().sum(-1) * ((n - 1) / ((n - 1 - m) // k * k) / k)
            for m in range(k)
        ]
        lengths.append(torch.stack(curves).mean(0))
    sizes = torch.stack(lengths, -1)
    if not (sizes > 0).all():
        raise ValueError("series must change at every interval, got a constant or periodic one: log of zero")
    steps = -torch.arange(1, lags + 1, dtype=series.dtype).log().to(series.device)
    return _slope(steps, sizes.log())


def fractional_brownian_motion(
    count: int,
    hurst: float,
    *,
    paths: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw paths of fractional Brownian motion, exactly, on `0, 1, ..., count - 1`.

    Increments of lag `m` have variance `m^(2H)`, and the graph of a path has dimension `2 - H`.

    Parameters
    ----------
    count : int
        Points of a path, at least 2.
    hurst : float
        In (0, 1).
    paths : int
        Independent paths.
    generator : torch.Generator, optional
        Draws on the CPU.
    device, dtype
        Of the result; the default dtype by default. The computation is in float64.

    Returns
    -------
    Tensor
        `(paths, count)`, starting at 0.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: Davies and Harte (1987): the covariance of the increments, wrapped round to a circulant matrix,
    is diagonal in Fourier space, with eigenvalues that are not negative for `H` in (0, 1) (Craigmile, 2003).

    Examples
    --------
    >>> path = fractional_brownian_motion(64, 0.8, paths=3, generator=torch.Generator().manual_seed(0))
    >>> path.shape, path[:, 0].tolist()
    (torch.Size([3, 64]), [0.0, 0.0, 0.0])
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}: there would be no increment")
    if not 0 < hurst < 1:
        raise ValueError(f"hurst must lie in (0, 1), got {hurst}: there is no such motion")
    if paths < 1:
        raise ValueError(f"paths must be at least 1, got {paths}: there would be nothing to return")
    n = count - 1
    lag = torch.arange(n + 1, dtype=torch.float64)
    power = 2 * hurst
    covariance = ((lag + 1) ** power - 2 * lag**power + (lag - 1).abs() ** power) / 2
    wrapped = torch.cat([covariance, covariance[1:-1].flip(0)])  # (2n,)
    spectrum = torch.fft.fft(wrapped).real.clamp_min(0)  # rounding may push a zero below zero
    noise = torch.randn(2, paths, len(wrapped), generator=generator, dtype=torch.float64)
    transformed = torch.fft.fft(torch.complex(*noise) * (spectrum / len(wrapped)).sqrt())
    increments = transformed.real[:, :n]
    path = torch.nn.functional.pad(increments.cumsum(1), (1, 0))
    return path.to(device=device, dtype=dtype or torch.get_default_dtype())


def koch_curve(
    level: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the corners of a stage of the Koch curve, of dimension `log 4 / log 3 = 1.2619` in the limit.

    Parameters
    ----------
    level : int
        How often each segment is replaced by four, 0 to 12.
    device, dtype
        Of the result; the default dtype by default.

    Returns
    -------
    Tensor
        `(4**level + 1, 2)`, from (0, 0) to (1, 0).

    Raises
    ------
    ValueError
        If `level` is out of range.

    Examples
    --------
    >>> koch_curve(1)[:, 0].tolist()[:3]
    [0.0, 0.3333333432674408, 0.5]
    """
    if not 0 <= level <= 12:
        raise ValueError(f"level must lie in [0, 12], got {level}: the curve has 4**level segments")
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(math.pi / 3, dtype=torch.float64))
    corners = torch.tensor([0, 1], dtype=torch.complex128)
    for _ in range(level):
        start, third = corners[:-1], corners.diff() / 3
        pieces = torch.stack([start, start + third, start + third * (1 + turn), start + 2 * third], 1)
        corners = torch.cat([pieces.flatten(), corners[-1:]])
    return torch.view_as_real(corners).to(device=device, dtype=dtype or torch.get_default_dtype())


def circle(
    count: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return points evenly spaced on the unit circle, of dimension 1.

    Parameters
    ----------
    count : int
        At least 1.
    device, dtype
        Of the result; the default dtype by default.

    Returns
    -------
    Tensor
        `(count, 2)`.

    Raises
    ------
    ValueError
        If `count` is below 1.

    Examples
    --------
    >>> circle(4).round().abs().sum().item()
    4.0
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: there would be no point")
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], 1).to(
        device=device, dtype=dtype or torch.get_default_dtype()
    )


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Least-squares slope of `y` (..., k) against `x` (k,)."""
    x = x - x.mean()
    return (y * x).sum(-1) / (x * x).sum()


def _points(points: Tensor) -> None:
    if points.dim() != 2 or 0 in points.shape or not points.is_floating_point():
        raise ValueError(
            f"points must be floating point of shape (n, d), got {points.dtype} {tuple(points.shape)}: "
            "each row is a point"
        )
    if not torch.isfinite(points).all():
        raise ValueError("points must be finite, got NaN or infinity: they lie in no box")
    if (points == points[0]).all():
        raise ValueError("points must differ, got one point only: its extent gives boxes no size")
