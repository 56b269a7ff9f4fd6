"""How much an estimated dimension depends on where the boxes start and on a few of the rows.

The interval of `fit_dimension` measures the curvature of the counts; the spread over permuted copies
measures sampling. These two measure the estimate itself, and none of the four may stand for another (arXiv
2503.14298 gives no error bars that could be read; reconstructed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from geomlib.weightspace.boxes import box_counts
from geomlib.weightspace.dimension import slopes

__all__ = ["Robustness", "robustness"]

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Robustness:
    """Two spreads of an estimated dimension.

    Attributes
    ----------
    D : float
        The estimate, boxes anchored at the origin.
    offset_sd : float
        Standard deviation over shifted grids of boxes.
    jackknife_sd : float
        Jackknife standard error over deleted groups of rows.
    """

    D: float
    offset_sd: float
    jackknife_sd: float


def robustness(
    mask: Tensor,
    *,
    window: Literal["inner", "full"] | tuple[float, float] = "inner",
    offsets: int = 8,
    groups: int = 8,
) -> Robustness:
    """Estimate the dimension again on shifted grids and with groups of rows left out.

    Parameters
    ----------
    mask : Tensor
        `(n_1, ..., n_d)` boolean or integer.
    window : {"inner", "full"} or (low, high)
        As in `fit_dimension`.
    offsets : int
        Number of grids, shifted along the diagonal; whole boxes of at most half the shortest side count.
    groups : int
        Number of groups of neighbouring rows, at most the number of rows.

    Returns
    -------
    Robustness
        NaN where a grid has no occupied box.

    Raises
    ------
    ValueError
        If the mask is not a set, or there are fewer than two grids or groups, or more groups than rows.

    Notes
    -----
    Source: the delete-a-group jackknife (Quenouille 1949), `sqrt((g - 1) / g sum (D_i - mean)^2)`, whose
    groups are rows because units of a layer are rows.

    Examples
    --------
    >>> noise = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.2
    >>> found = robustness(noise)
    >>> round(found.D, 2), found.offset_sd < 0.003, found.jackknife_sd < 0.003
    (1.89, True, True)
    """
    rows = len(mask) if mask.ndim else 0
    if offsets < 2 or not 2 <= groups <= rows:
        raise ValueError(
            f"offsets must be at least 2 and groups between 2 and the {rows} rows, got {offsets} and "
            f"{groups}: one estimate has no spread"
        )
    d, found = mask.ndim, box_counts(mask, d=mask.ndim)
    sizes, shape = found.sizes, found.shape
    inner = [r for r in sizes if 2 * r <= min(shape)]

    def dimension(counts: Tensor, of: Sequence[int]) -> Tensor:
        return slopes(of, counts, window=window, shape=shape)

    # Multiples of the golden ratio: a shift by a round number would be none for every box that divides it.
    shifts = [int(i * GOLDEN % 1 * inner[-1]) if inner else 0 for i in range(offsets)]
    grids = [box_counts(mask, inner or [1], offset=shift, border="full", d=d).normalised for shift in shifts]
    edges = [i * rows // groups for i in range(groups + 1)]
    without = [torch.cat([mask[:start], mask[end:]]) for start, end in pairwise(edges)]
    left = torch.stack([dimension(box_counts(other, sizes, d=d).counts, sizes) for other in without])
    jackknife = (left - left.mean()).square().sum().mul((groups - 1) / groups).sqrt()
    return Robustness(
        float(dimension(found.counts, sizes)),
        float(torch.stack([dimension(counts, inner or [1]) for counts in grids]).std(correction=0)),
        float(jackknife),
    )
