r"""The permutation test: a statistic of a weight tensor beside that of its permuted copies.

If the initial weights of hidden units are exchangeable and training treats units alike, the trained weights
of a layer between two hidden layers have the same law as any copy with rows and columns permuted. For such
layers the test is exact, however long one trains; on ordered axes it finds what their order holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geomlib.weightspace.boxes import box_counts
from geomlib.weightspace.dimension import DimFit, Window, fit_dimension, slopes
from geomlib.weightspace.layouts import Grid, lay_out
from geomlib.weightspace.thresholds import NanPolicy, Threshold, occupied_set
from geomlib.weightspace.transform import as_signal

__all__ = ["PermTest", "against_copies", "dimension_of", "fit_grid", "holm", "perm_test", "permuted"]

KINDS = ("cells", "rc", "rows", "cols")
# Cells that are permuted at once: enough to keep the device busy, few enough to stay in memory.
CHUNK = 2**25


@dataclass(frozen=True, eq=False)
class PermTest:
    """A statistic of a weight tensor beside that of its permuted copies.

    Attributes
    ----------
    kind : str
        What was permuted.
    observed : float
        Statistic of the tensor itself.
    mean, sd : float
        Over the permuted copies.
    z : float
        `(observed - mean) / sd`; NaN if all copies agree.
    p : float
        Share of all values, the observed one included, that lie at least as far from their common mean. At
        most `p` of all exchangeable tensors get a value of `p` or less.
    values : Tensor
        `(permutations,)` float64: statistics of the copies.
    """

    kind: str
    observed: float
    mean: float
    sd: float
    z: float
    p: float
    values: Tensor

    def rank(self, *, generator: torch.Generator | None = None) -> float:
        """Return the share of values below the observed one, ties broken at random.

        It is uniform on [0, 1] for exchangeable tensors, even if the statistic takes few values.

        Examples
        --------
        >>> result = perm_test(torch.randn(16, 16), permutations=9, threshold=("quantile", 0.5))
        >>> 0 <= result.rank() <= 1
        True
        """
        slack = _slack(torch.cat([self.values, self.values.new_tensor([self.observed])]))
        below = int((self.values < self.observed - slack).sum())
        tied = int(((self.values - self.observed).abs() <= slack).sum())
        draw = float(torch.rand((), generator=generator, dtype=torch.float64))
        return (below + draw * (tied + 1)) / (len(self.values) + 1)

    def __repr__(self) -> str:
        return (
            f"PermTest({self.kind}: {self.observed:.4f} against {self.mean:.4f} +- {self.sd:.4f}, "
            f"z {self.z:.2f}, p {self.p:.3f})"
        )


def perm_test(
    W: Tensor,
    kind: str = "rc",
    *,
    statistic: Callable[[Tensor], Tensor] | None = None,
    permutations: int = 199,
    layout: str = "matrix",
    groups: int = 1,
    transposed: bool = False,
    threshold: Threshold = ("quantile", 0.9),
    window: Window = "full",
    nan_policy: NanPolicy = "raise",
    generator: torch.Generator | None = None,
) -> PermTest:
    """Compare a weight tensor with permuted copies of itself.

    Parameters
    ----------
    W : Tensor
        `(out, in / groups, *kernel)`.
    kind : str
        `"cells"`: all cells of the grid. `"rc"`: output units and input units, kernels whole. `"rows"`,
        `"cols"`: one of the two. With groups, units move within their group and groups as a whole.
    statistic : callable, optional
        Maps a batch of grids `(batch, *grid)`, in float32 or float64, to `(batch,)`. The box dimension of
        the large entries by default.
    permutations : int
        Number of copies.
    layout, groups, transposed
        See `lay_out`; a `statistic` needs a layout of one grid.
    threshold, nan_policy
        See `occupied_set`; only for the dimension. What is large is the same set in every copy.
    window
        See `fit_dimension`; only for the dimension. Sizes are those that fit the tensor itself.
    generator : Generator, optional
        Source of the permutations.

    Returns
    -------
    PermTest
        With NaN in place of numbers where the tensor is too small or too empty for a dimension.

    Raises
    ------
    ValueError
        For an unknown kind, no permutations, a statistic of the wrong shape, or what `lay_out` and
        `occupied_set` refuse.

    Notes
    -----
    Source: reconstructed as the sharp form of the permutation invariance that arXiv 2503.14298 claims:
    invariance in law. The distance is taken from the mean of all values, which treats the observed one like
    the rest and keeps the test exact. Exact means: for layers whose units are exchangeable. Ordered axes
    (pixels, kernel cells, classes) are where it may reject.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> W = torch.randn(64, 64, generator=generator)
    >>> perm_test(W, permutations=19, generator=generator).p > 0.05
    True
    """
    signal = as_signal(W.detach(), check_finite=statistic is not None)
    grid = lay_out(signal, layout, groups=groups, transposed=transposed)
    if statistic is None:
        mask = grid.like(occupied_set(grid.values, threshold, nan_policy=nan_policy).mask)
        return against_copies(mask, dimension_of(mask, window), kind, permutations, generator=generator)
    if grid.copies > 1:
        raise ValueError(f"layout {layout!r} is {grid.copies} grids: a statistic of one grid does not apply")
    judge = statistic  # narrowed to what may be called
    return against_copies(grid, lambda batch: judge(batch[:, 0]), kind, permutations, generator=generator)


def against_copies(
    grid: Grid,
    statistic: Callable[[Tensor], Tensor],
    kind: str,
    permutations: int,
    *,
    generator: torch.Generator | None = None,
) -> PermTest:
    """Compare a grid, of values or of a mask, with permuted copies of itself.

    Parameters
    ----------
    grid : Grid
        What is permuted.
    statistic : callable
        Maps `(batch, copies, *shape)` to `(batch,)`.
    kind, permutations, generator
        As in `perm_test`.

    Returns
    -------
    PermTest

    Raises
    ------
    ValueError
        For an unknown kind, no permutations or a statistic of the wrong shape.

    Examples
    --------
    >>> against_copies(lay_out(torch.eye(8)), lambda w: w.sum((1, 2, 3)), "rows", 5).observed
    8.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}: it names no permutation")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}: there would be no null")
    per_batch = max(1, CHUNK // grid.values.numel())
    found = [_judged(statistic, grid.values[None])]
    for done in range(0, permutations, per_batch):
        copies = min(per_batch, permutations - done)
        found.append(_judged(statistic, permuted(grid, kind, copies, generator=generator)))
    every = torch.cat(found)
    observed, values = float(every[0]), every[1:]
    mean, sd = float(values.mean()), float(values.std()) if permutations > 1 else math.nan
    distance = (every - every.mean()).abs()
    # Equal counts may differ in the last bit of a logarithm.
    extreme = int((distance[1:] >= distance[0] - _slack(every)).sum())
    p = math.nan if bool(every.isnan().any()) else (1 + extreme) / (1 + permutations)
    z = (observed - mean) / sd if sd > 0 else math.nan
    return PermTest(kind, observed, mean, sd, z, p, values)


def dimension_of(grid: Grid, window: Window = "full") -> Callable[[Tensor], Tensor]:
    """Return the dimension of masks laid out like this one, over the sizes that fit this one.

    Parameters
    ----------
    grid : Grid
        Of a boolean mask.
    window
        See `fit_dimension`.

    Returns
    -------
    callable
        Maps `(batch, copies, *shape)` to `(batch,)` float64; NaN throughout where this grid has no
        dimension.

    Raises
    ------
    ValueError
        For an unknown window.

    Examples
    --------
    >>> grid = lay_out(torch.eye(64) > 0)
    >>> dimension_of(grid)(grid.values[None])
    tensor([1.], dtype=torch.float64)
    """
    fit = fit_grid(grid, window)
    if math.isnan(fit.D) or len(fit.sizes) < 2:
        return lambda batch: torch.full((len(batch),), math.nan, dtype=torch.float64)
    sizes, d = tuple(int(r) for r in fit.sizes), len(grid.shape)
    return lambda batch: slopes(sizes, box_counts(batch, sizes, d=d).counts.sum(1))


def fit_grid(grid: Grid, window: Window = "full") -> DimFit:
    """Count the boxes of a mask on a grid and fit their dimension.

    Parameters
    ----------
    grid : Grid
        Of a boolean mask; the counts of several grids are averaged.
    window
        See `fit_dimension`.

    Returns
    -------
    DimFit
        `"insufficient_scales"` for a side below 8 or fewer than four sizes.

    Raises
    ------
    ValueError
        For an unknown window.

    Examples
    --------
    >>> fit_grid(lay_out(torch.eye(64) > 0)).D
    1.0
    """
    counts = box_counts(grid.values, grid.sizes, d=len(grid.shape)).counts.sum(0) / grid.copies
    # Kernel axes are cut short, so the full grid of the nd layout has no dimension of its own.
    shape = grid.shape if len(grid.shape) <= 2 else None
    if window == "inner":
        window = (2, min(grid.shape[:2]) / 4)
    fit = fit_dimension(grid.sizes, counts, window=window, shape=shape)
    if min(grid.shape[:2]) < 8 and fit.status in ("ok", "no_scaling"):
        return replace(fit, D=math.nan, se=math.nan, ci=(math.nan, math.nan), status="insufficient_scales")
    return fit


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values of many layers for their number.

    Parameters
    ----------
    p : sequence of float
        One per layer; NaN where a layer has none, and then it does not count.

    Returns
    -------
    list of float
        Corrected values in the same order: to reject what lies below a level errs, in any layer at all,
        with at most that probability.

    Raises
    ------
    ValueError
        If a value lies outside [0, 1].

    Notes
    -----
    Source: Holm (1979). With `B` permutations no p-value is below `1 / (1 + B)`: take `B` larger than the
    number of layers over the level.

    Examples
    --------
    >>> [round(value, 2) for value in holm([0.01, 0.04, 0.02])]
    [0.03, 0.04, 0.04]
    """
    if bad := [value for value in p if not (math.isnan(value) or 0 <= value <= 1)]:
        raise ValueError(f"p must lie in [0, 1], got {bad[0]}: it is no probability")
    corrected, worst = [math.nan] * len(p), 0.0
    ranked = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    for rank, i in enumerate(ranked):
        worst = max(worst, min(1.0, (len(ranked) - rank) * p[i]))
        corrected[i] = worst
    return corrected


def permuted(grid: Grid, kind: str, copies: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw permuted copies of a grid.

    Parameters
    ----------
    grid : Grid
        Of values or of a mask, any dtype.
    kind : str
        As in `perm_test`.
    copies : int
        How many.
    generator : Generator, optional
        Source of the permutations.

    Returns
    -------
    Tensor
        `(copies, *grid.values.shape)`, on the device of the grid.

    Raises
    ------
    ValueError
        For an unknown kind, or one that the grid cannot be permuted by: a vector has no rows.

    Examples
    --------
    >>> grid = lay_out(torch.arange(6).reshape(2, 3))
    >>> permuted(grid, "cells", 4).sum((1, 2, 3))
    tensor([15, 15, 15, 15])
    """
    if kind not in KINDS or (kind != "cells" and len(grid.shape) < 2):
        raise ValueError(f"kind must be one of {', '.join(KINDS)} that the grid has, got {kind!r} for {grid}")
    values = grid.values
    if kind == "cells":
        drawn = [_shuffled(values.reshape(-1), generator) for _ in range(copies)]
        return torch.stack(drawn).reshape(copies, *values.shape)
    return torch.stack([_by_unit(grid, kind, generator) for _ in range(copies)])


def _judged(judge: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    values = judge(batch)
    if values.shape != (len(batch),):
        raise ValueError(
            f"statistic must return one number per grid, ({len(batch)},), got {tuple(values.shape)}: "
            "copies could not be told apart"
        )
    return values.detach().double().cpu()


def _slack(values: Tensor) -> float:
    return 1e-12 * max(1.0, float(values.nan_to_num().abs().max()))


def _shuffled(flat: Tensor, generator: torch.Generator | None) -> Tensor:
    n = len(flat)
    if flat.dtype != torch.bool:
        return flat[torch.randperm(n, generator=generator).to(flat.device)]
    # A shuffled mask is a random set of the same size, which is drawn ten times faster than a permutation:
    # independent cells without repeats, of whichever side is the smaller.
    wanted = int(flat.sum())
    invert = 2 * wanted > n
    missing = few = n - wanted if invert else wanted
    drawn = torch.zeros(n, dtype=torch.bool)
    while missing:
        drawn[torch.randint(n, (missing,), generator=generator)] = True
        missing = few - int(drawn.sum())
    return (~drawn if invert else drawn).to(flat.device)


def _by_unit(grid: Grid, kind: str, generator: torch.Generator | None) -> Tensor:
    """Permute the units of rows, of columns, or of both; the columns of each group apart."""
    values, device = grid.values, grid.values.device
    rows, columns, groups = grid.shape[0] // grid.row_block, grid.shape[1] // grid.column_block, grid.groups
    if kind in ("rc", "rows"):
        inside = torch.rand(groups, rows // groups, generator=generator, dtype=torch.float64).argsort(1)
        whole = torch.randperm(groups, generator=generator)[:, None] * (rows // groups) + inside
        values = values.index_select(1, _cells_of(whole.flatten(), grid.row_block).to(device))
    if kind in ("rc", "cols"):
        if groups == 1:
            order = _cells_of(torch.randperm(columns, generator=generator), grid.column_block)
            return values.index_select(2, order.to(device))
        parts = [
            part.index_select(
                2, _cells_of(torch.randperm(columns, generator=generator), grid.column_block).to(device)
            )
            for part in values.chunk(groups, 1)
        ]
        values = torch.cat(parts, 1)
    return values


def _cells_of(units: Tensor, block: int) -> Tensor:
    return (units[:, None] * block + torch.arange(block)).flatten()
