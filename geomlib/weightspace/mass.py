"""How a set or a measure fills its boxes: lacunarity and generalised dimensions.

Box counts ask whether a box is occupied; these ask by how much. Both are standard tools (Allain and Cloitre
1991, Hentschel and Procaccia 1983) that the room adds to what arXiv 2503.14298 counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.weightspace.boxes import integral_image, window_sums
from geomlib.weightspace.dimension import line_slope
from geomlib.weightspace.transform import T, as_signal

__all__ = ["GeneralisedDimensions", "lacunarity", "renyi_dimensions"]


@dataclass(frozen=True, eq=False)
class GeneralisedDimensions:
    """The dimensions `D_q` of a measure.

    Attributes
    ----------
    q : tuple of float
        Orders.
    D : tuple of float
        Dimension of each order, NaN where the status says that there is none.
    sizes : tuple of int
        Sides of the boxes in the fit.
    moments : Tensor
        `(len(q), len(sizes))`, float64: `log sum mu^q`, and `sum mu log mu` for `q = 1`.
    status : str
        "ok", "empty" or "insufficient_scales".
    """

    q: tuple[float, ...]
    D: tuple[float, ...]
    sizes: tuple[int, ...]
    moments: Tensor
    status: str


def lacunarity(values: Tensor, sizes: Sequence[int], *, d: int = 2) -> Tensor:
    """Return the spread of the mass in gliding windows, `E[M^2] / E[M]^2`.

    Parameters
    ----------
    values : Tensor
        `(..., n_1, ..., n_d)`: a set (boolean or integer) or a measure (not negative).
    sizes : sequence of int
        Sides of the windows, each at most the shortest side.
    d : int
        Number of trailing axes that form the grid.

    Returns
    -------
    Tensor
        `(..., len(sizes))`, float64, at least 1; `1 / p` at size 1 for a set of density `p`, and `1` where
        all windows weigh the same. NaN for an empty set.

    Raises
    ------
    ValueError
        If a size does not fit, or the values are empty, negative or not finite.

    Notes
    -----
    Source: Allain and Cloitre (1991). Independent cells of density `p` have `1 + (1 - p) / (p r^2)` in two
    dimensions; what lies above is structure.

    Examples
    --------
    >>> lacunarity(torch.tensor([[1, 0], [0, 0]]), [1, 2]).tolist()
    [4.0, 1.0]
    """
    signal = as_signal(values.detach(), "values")
    if bool((signal < 0).any()):
        raise ValueError("values must not be negative: a window would have no mass")
    if not 1 <= d <= values.ndim:
        raise ValueError(f"d must lie between 1 and the {values.ndim} axes of values, got {d}")
    side = min(values.shape[-d:])
    if len(sizes) == 0 or min(sizes) < 1 or max(sizes) > side:
        raise ValueError(f"sizes must lie between 1 and the shortest side {side}, got {tuple(sizes)}")
    whole = not values.is_floating_point()
    image = integral_image(signal.to(torch.int64) if whole else signal.double(), d)
    found = []
    for r in sizes:
        mass = window_sums(image, r, d).double().flatten(-d)
        mean = mass.mean(-1)
        found.append(mass.square().mean(-1) / mean.square())
    return torch.stack(found, -1)


def renyi_dimensions(
    measure: Tensor, q: Sequence[float] = (-2, 0, 1, 2, 4), *, ratio: int = 2, min_scales: int = 4
) -> GeneralisedDimensions:
    """Estimate the generalised dimensions of a measure on a grid.

    Parameters
    ----------
    measure : Tensor
        `(n_1, ..., n_d)`, not negative; scaled to sum 1 here. For weights, a power of `|w|`.
    q : sequence of float
        Orders. Large ones weigh the heaviest boxes, negative ones the lightest (boxes without mass are left
        out); 0 is the box dimension, 1 the information dimension, 2 the correlation dimension.
    ratio : int
        Factor between the sizes, which run from 1 to half the shortest side.
    min_scales : int
        Sizes below which no dimension is reported.

    Returns
    -------
    GeneralisedDimensions

    Raises
    ------
    ValueError
        If the measure is empty, negative or not finite, no order is given, or the ratio is below 2.

    Notes
    -----
    Source: Hentschel and Procaccia (1983): `D_q = slope of log sum mu^q against log r, over q - 1`, and the
    slope of `sum mu log mu` for `q = 1`.

    Examples
    --------
    >>> from geomlib.weightspace.shapes import cascade
    >>> [round(D, 4) for D in renyi_dimensions(cascade(5), [0, 1, 2]).D]
    [2.0, 1.8464, 1.737]
    """
    mu = as_signal(measure.detach(), "measure").double()
    if bool((mu < 0).any()):
        raise ValueError("measure must not be negative: its shares would not be probabilities")
    if mu.ndim == 0 or len(q) == 0:
        raise ValueError(
            f"measure must have an axis and q an order, got shape {tuple(mu.shape)} and {tuple(q)}"
        )
    if ratio < 2:
        raise ValueError(f"ratio must be at least 2, got {ratio}: boxes would not grow")
    orders = tuple(float(order) for order in q)
    total = mu.sum()
    nothing = tuple(math.nan for _ in orders)
    if not bool(total > 0):
        empty = torch.zeros(len(orders), 0, dtype=torch.float64, device=mu.device)
        return GeneralisedDimensions(orders, nothing, (), empty, "empty")
    mu, sizes, columns = mu / total, [1], []
    while True:
        share = mu[mu > 0]
        columns.append(
            torch.stack([(share * share.log()).sum() if p == 1 else (share**p).sum().log() for p in orders])
        )
        if sizes[-1] * ratio * 2 > min(measure.shape):
            break
        sizes.append(sizes[-1] * ratio)
        mu = T(mu, 1, ratio=ratio, reduce="sum")
    moments = torch.stack(columns, 1)
    if len(sizes) < max(min_scales, 2):
        return GeneralisedDimensions(orders, nothing, tuple(sizes), moments, "insufficient_scales")
    rise = line_slope([math.log(r) for r in sizes], moments).tolist()
    D = tuple(slope if p == 1 else slope / (p - 1) for slope, p in zip(rise, orders, strict=True))
    return GeneralisedDimensions(orders, D, tuple(sizes), moments, "ok")
