"""From box counts to a dimension: a slope over a window of scales, and how much to believe it.

A finite grid has no Hausdorff dimension; every number here is the slope of `log N` against `log 1/r` over
some scales. Its interval measures how far the points are from a line, which is not a sampling error, and
`R^2` near one is the rule for noise. What can be believed is the difference from `null_counts` (arXiv
2503.14298 gives no estimator that could be read; reconstructed throughout).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

__all__ = ["DimFit", "Window", "fit_dimension", "line_slope", "local_slopes", "self_similarity", "slopes"]

Window = Literal["inner", "full", "plateau"] | tuple[float, float]
Status = Literal["ok", "insufficient_scales", "empty", "space_filling", "no_scaling", "constant"]


@dataclass(frozen=True)
class DimFit:
    """A slope and what is known about it.

    Attributes
    ----------
    D : float
        Estimate; NaN where the status says that there is none.
    se : float
        Standard error of the least-squares slope.
    ci : tuple of float
        95 % interval of the slope under independent errors. The residuals of box counts are neither random
        nor independent: it shows curvature, and can be a thousand times the sampling error.
    r2 : float
        Share of the variance of `log N` on the line.
    intercept : float
        `log N` that the line has at `r = 1`.
    local : tuple of float
        Slope from each size to the next within the window.
    sizes : tuple of float
        Sizes in the fit.
    counts : tuple of float
        Counts in the fit.
    status : str
        "ok", "insufficient_scales", "empty", "space_filling", "no_scaling" or "constant".
    """

    D: float
    se: float
    ci: tuple[float, float]
    r2: float
    intercept: float
    local: tuple[float, ...]
    sizes: tuple[float, ...]
    counts: tuple[float, ...]
    status: Status

    @property
    def window(self) -> tuple[float, float]:
        """Smallest and largest size in the fit, NaN if there is none."""
        return (self.sizes[0], self.sizes[-1]) if self.sizes else (math.nan, math.nan)

    def __repr__(self) -> str:
        low, high = self.window
        return (
            f"DimFit(D={self.D:.4f} +- {self.ci[1] - self.D:.4f}, r2={self.r2:.4f}, "
            f"window=[{low:g}, {high:g}], status={self.status!r})"
        )


def fit_dimension(
    sizes: Sequence[float],
    counts: Tensor | Sequence[float],
    *,
    window: Window = "inner",
    shape: Sequence[int] | None = None,
    weights: Literal["counts"] | None = None,
    min_scales: int = 4,
    tol: float = 0.05,
) -> DimFit:
    """Fit the slope of `log counts` against `log 1/sizes`.

    Parameters
    ----------
    sizes : sequence of float
        Sides of the boxes, growing.
    counts : Tensor or sequence of float
        `(len(sizes),)`, occupied boxes; zeros are left out.
    window : {"inner", "full", "plateau"} or (low, high)
        "inner" is `[2, n / 4]` with the shortest side `n`; "full" takes all sizes; "plateau" the longest run
        of at least three local slopes within `2 tol` of each other, among scales with at most nine tenths
        of the boxes occupied.
    shape : sequence of int, optional
        Sides of the grid. Needed for "plateau" and to recognise a set that fills the grid; without it
        "inner" takes the largest size for the shortest side.
    weights : {"counts"}, optional
        Weight each point by its count, as for Poisson errors.
    min_scales : int
        Points below which no dimension is reported; at least 2.
    tol : float
        Half-width of a plateau.

    Returns
    -------
    DimFit

    Raises
    ------
    ValueError
        If sizes and counts do not match or are not finite and in order, the window is unknown, or the
        plateau has no shape to refer to.

    Notes
    -----
    Source: ordinary least squares with Student's interval. Reconstructed: windows and statuses. A set whose
    every box is occupied has the dimension of the grid, whatever a ragged border does to its counts.

    Examples
    --------
    >>> fit_dimension([1, 2, 4, 8], [27, 9, 3, 1], window="full")
    DimFit(D=1.5850 +- 0.0000, r2=1.0000, window=[1, 8], status='ok')
    """
    r = np.asarray(sizes, dtype=np.float64)
    n = np.asarray(counts.detach().cpu().double() if isinstance(counts, Tensor) else counts, np.float64)
    _check(r, n, window, shape, min_scales)
    if not (n > 0).any():
        return _nothing("empty")
    if shape is not None and _fills(r, n, shape):
        low, high = _window(r, window, shape)
        inside = (r >= low) & (r <= high) if isinstance(window, tuple) or window == "inner" else r > 0
        found = _least_squares(r[inside], n[inside], weights) if inside.any() else _nothing("space_filling")
        return _replaced(found, D=float(len(shape)), status="space_filling")
    if window == "plateau":
        assert shape is not None  # checked above
        keep = (n > 0) & (n <= 0.9 * _boxes(r, shape))
        r, n = r[keep], n[keep]
        run = _plateau(_local(r, n), tol)
        if run is None:
            return _replaced(_least_squares(r, n, weights), D=math.nan, status="no_scaling")
        r, n = r[run[0] : run[1] + 1], n[run[0] : run[1] + 1]
    else:
        low, high = _window(r, window, shape)
        keep = (n > 0) & (r >= low) & (r <= high)
        r, n = r[keep], n[keep]
    found = _least_squares(r, n, weights)
    if len(r) < min_scales:
        return _replaced(found, D=math.nan, status="insufficient_scales")
    return found


def slopes(
    sizes: Sequence[float],
    counts: Tensor,
    *,
    window: Literal["inner", "full"] | tuple[float, float] = "full",
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Fit the dimension of many sets at once, without intervals: for permutations and batches.

    Parameters
    ----------
    sizes : sequence of float
        Sides of the boxes, growing.
    counts : Tensor
        `(..., len(sizes))`.
    window : {"inner", "full"} or (low, high)
        As in `fit_dimension`; a plateau differs from set to set and has no batch.
    shape : sequence of int, optional
        Sides of the grid, as in `fit_dimension`.

    Returns
    -------
    Tensor
        `(...)`, float64, on the device of the counts: the `D` of `fit_dimension`, NaN where a count in the
        window is zero or the window holds fewer than two sizes.

    Raises
    ------
    ValueError
        If sizes and counts do not match, or the window is unknown.

    Notes
    -----
    Source: least squares, as in `fit_dimension`.

    Examples
    --------
    >>> slopes([1, 2, 4], torch.tensor([[9, 3, 1], [16, 4, 1]]))
    tensor([1.5850, 2.0000], dtype=torch.float64)
    """
    r = np.asarray(sizes, dtype=np.float64)
    if counts.ndim == 0 or counts.shape[-1] != len(r) or len(r) == 0:
        raise ValueError(f"counts must be (..., {len(r)}) for {len(r)} sizes, got {tuple(counts.shape)}")
    if window not in ("inner", "full") and not isinstance(window, tuple):
        raise ValueError(f"window must be 'inner', 'full' or (low, high), got {window!r}")
    low, high = _window(r, window, shape)
    inside = ((r >= low) & (r <= high)).nonzero()[0].tolist()
    chosen = counts.detach()[..., inside].double()
    if len(inside) < 2:
        return torch.full(counts.shape[:-1], math.nan, dtype=torch.float64, device=counts.device)
    y = torch.where(chosen > 0, chosen, math.nan).log()
    return line_slope([-math.log(r[i]) for i in inside], y)


def line_slope(x: Sequence[float], y: Tensor) -> Tensor:
    """Slope of the least-squares line through `(x, y)`, for a batch of `y`.

    Parameters
    ----------
    x : sequence of float
        At least two different abscissae.
    y : Tensor
        `(..., len(x))`, floating point.

    Returns
    -------
    Tensor
        `(...)`, float64.

    Raises
    ------
    ValueError
        If lengths differ or all of `x` is one point.

    Examples
    --------
    >>> line_slope([0.0, 1.0, 2.0], torch.tensor([1.0, 3.0, 5.0])).item()
    2.0
    """
    if y.ndim == 0 or y.shape[-1] != len(x) or len(set(x)) < 2:
        raise ValueError(
            f"x must hold two points or more, one for each y, got {list(x)} and {tuple(y.shape)}"
        )
    t = torch.tensor(list(x), dtype=torch.float64)
    t = t - t.mean()
    return y.double() @ (t / t.square().sum()).to(y.device)


def local_slopes(sizes: Sequence[float], counts: Tensor) -> Tensor:
    """Slope from each size to the next.

    Parameters
    ----------
    sizes : sequence of float
        Sides of the boxes, growing.
    counts : Tensor
        `(..., len(sizes))`.

    Returns
    -------
    Tensor
        `(..., len(sizes) - 1)`, float64. For nested boxes each lies between 0 and the dimension of the
        grid, because an occupied box contains between one and `(r' / r)^d` occupied ones.

    Raises
    ------
    ValueError
        If sizes and counts do not match.

    Notes
    -----
    Source: reconstructed; the finite-difference form of the box dimension.

    Examples
    --------
    >>> local_slopes([1, 2, 4], torch.tensor([12, 4, 1]))
    tensor([1.5850, 2.0000], dtype=torch.float64)
    """
    if counts.ndim == 0 or counts.shape[-1] != len(sizes):
        raise ValueError(f"counts must be (..., {len(sizes)}), got {tuple(counts.shape)}")
    steps = torch.tensor(list(sizes), dtype=torch.float64).log().diff()
    return -counts.detach().double().log().diff(dim=-1) / steps.to(counts.device)


def self_similarity(local: DimFit | Sequence[float] | Tensor) -> float:
    """Degree of self-similarity: one minus the relative spread of the local slopes.

    Parameters
    ----------
    local : DimFit, sequence of float or Tensor
        Local slopes, or the fit that holds them.

    Returns
    -------
    float
        Between 0 and 1; 1 exactly if `N(lambda r) = lambda^(-D) N(r)` at every step. NaN if there are fewer
        than two slopes or their mean is not positive.

    Raises
    ------
    ValueError
        If a tensor of slopes is not one-dimensional.

    Notes
    -----
    Source: the abstract of arXiv 2503.14298 speaks of a degree of self-similarity; its formula could not be
    read. Reconstructed as `1 - sd / mean`, clipped. It does not tell fractals from lines or from noise: all
    of them can come close to 1.

    Examples
    --------
    >>> self_similarity([1.5, 1.5, 1.5])
    1.0
    >>> self_similarity([0.5, 1.5])
    0.5
    """
    values = local.local if isinstance(local, DimFit) else local
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"local must be a list of slopes, got shape {found.shape}")
    if len(found) < 2 or not found.mean() > 0:
        return math.nan
    return float(np.clip(1 - found.std() / found.mean(), 0.0, 1.0))


def _check(
    r: np.ndarray, n: np.ndarray, window: Window, shape: Sequence[int] | None, min_scales: int
) -> None:
    if r.ndim != 1 or r.shape != n.shape or len(r) == 0:
        raise ValueError(f"sizes and counts must be lists of one length, got shapes {r.shape} and {n.shape}")
    if not (r > 0).all() or (np.diff(r) <= 0).any():
        raise ValueError(f"sizes must be positive and growing, got {r.tolist()}")
    if not np.isfinite(n).all() or (n < 0).any():
        raise ValueError(f"counts must be finite and not negative, got {n.tolist()}")
    if isinstance(window, str) and window not in ("inner", "full", "plateau"):
        raise ValueError(f"window must be 'inner', 'full', 'plateau' or (low, high), got {window!r}")
    if window == "plateau" and shape is None:
        raise ValueError("shape must be given with window='plateau': saturated scales are left out of it")
    if min_scales < 2:
        raise ValueError(f"min_scales must be at least 2, got {min_scales}: one point has no slope")


def _window(r: np.ndarray, window: Window, shape: Sequence[int] | None) -> tuple[float, float]:
    if isinstance(window, tuple):
        return window
    if window == "inner":
        return 2.0, (min(shape) if shape is not None else r[-1]) / 4
    return float(r[0]), float(r[-1])


def _boxes(r: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Count all boxes of each size, those that the border cuts included."""
    return np.prod([np.ceil(side / r) for side in shape], axis=0)


def _fills(r: np.ndarray, n: np.ndarray, shape: Sequence[int]) -> bool:
    """Tell whether every box is occupied, counted with the border or normalised to full boxes."""
    whole = np.prod([side / r for side in shape], axis=0)
    return bool((n == _boxes(r, shape)).all() or np.allclose(n, whole, rtol=1e-12, atol=0))


def _local(r: np.ndarray, n: np.ndarray) -> np.ndarray:
    return -np.diff(np.log(n)) / np.diff(np.log(r))


def _plateau(local: np.ndarray, tol: float) -> tuple[int, int] | None:
    """Return first and last size of the longest run of slopes within `2 tol`; the steadier of equal ones."""
    best: tuple[int, float, int] | None = None
    for start in range(len(local)):
        for end in range(start + 3, len(local) + 1):
            run = local[start:end]
            if run.max() - run.min() > 2 * tol:
                break
            if best is None or (-len(run), run.std()) < best[:2]:
                best = (-len(run), float(run.std()), start)
    return None if best is None else (best[2], best[2] - best[0])


def _least_squares(r: np.ndarray, n: np.ndarray, weights: Literal["counts"] | None) -> DimFit:
    if len(r) < 2:
        return _replaced(_nothing("ok"), sizes=tuple(r.tolist()), counts=tuple(n.tolist()))
    x, y = -np.log(r), np.log(n)
    w = n / n.mean() if weights == "counts" else np.ones_like(n)
    mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
    spread = float((w * (x - mean_x) ** 2).sum())
    D = float((w * (x - mean_x) * (y - mean_y)).sum() / spread)
    left = float((w * (y - mean_y - D * (x - mean_x)) ** 2).sum())
    total = float((w * (y - mean_y) ** 2).sum())
    free = len(r) - 2
    se = math.sqrt(left / free / spread) if free else math.nan
    half = float(stdtrit(free, 0.975)) * se if free else math.nan
    return DimFit(
        D=D,
        se=se,
        ci=(D - half, D + half),
        r2=1 - left / total if total > 0 else 1.0,
        intercept=float(mean_y - D * mean_x),
        local=tuple(_local(r, n).tolist()),
        sizes=tuple(r.tolist()),
        counts=tuple(n.tolist()),
        status="ok",
    )


def _nothing(status: Status) -> DimFit:
    nan = math.nan
    return DimFit(nan, nan, (nan, nan), nan, nan, (), (), (), status)


def _replaced(found: DimFit, **changes: object) -> DimFit:
    """Change fields; an interval belongs to the slope that it was computed with, and goes with it."""
    if "D" in changes:
        changes = {"se": math.nan, "ci": (math.nan, math.nan), **changes}
    return DimFit(**{**found.__dict__, **changes})
