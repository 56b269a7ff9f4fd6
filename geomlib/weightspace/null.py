"""What chance alone counts: the expected number of occupied boxes of a random set, in closed form.

The paper (arXiv 2503.14298) states no null that could be read; reconstructed. Every count of the room is read
beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["Border", "null_counts"]

Border = Literal["clip", "full"]


def null_counts(
    shape: Sequence[int],
    m: int | Tensor,
    sizes: Sequence[int],
    *,
    border: Border = "clip",
    copies: int = 1,
) -> Tensor:
    """Return the expected counts of a uniformly random set of `m` cells.

    Parameters
    ----------
    shape : sequence of int
        Sides of the grid.
    m : int or Tensor
        Number of occupied cells; a tensor of integers, of any shape, is a batch.
    sizes : sequence of int
        Sides of the boxes.
    border : {"clip", "full"}
        As in `box_counts`.
    copies : int
        Grids of this shape that are counted together, `m` cells in all of them.

    Returns
    -------
    Tensor
        `(len(sizes),)` or `(*m.shape, len(sizes))`, float64 on the CPU.

    Raises
    ------
    ValueError
        If the shape, a size or `copies` is not positive, or `m` is not between 0 and the number of cells.

    Notes
    -----
    Source: reconstructed. A box of `b` of the `n` cells is empty with the hypergeometric probability
    `C(n - b, m) / C(n, m)`, and expectations add up whatever the dependence between boxes. This is what any
    layer of weights gives whose large entries sit nowhere in particular: a slope below `d`, and a straight
    line.

    Examples
    --------
    >>> null_counts((2, 2), 2, [1, 2]).tolist()
    [2.0, 1.0]
    """
    if len(shape) == 0 or min(shape) < 1 or copies < 1:
        raise ValueError(f"shape and copies must be positive, got {tuple(shape)} and {copies}")
    if len(sizes) == 0 or min(sizes) < 1:
        raise ValueError(f"sizes must be positive, got {tuple(sizes)}: a box holds at least one cell")
    if border not in get_args(Border):
        raise ValueError(f"border must be one of {get_args(Border)}, got {border!r}")
    n = copies * math.prod(shape)
    occupied = np.asarray(m.detach().cpu().numpy() if isinstance(m, Tensor) else m, dtype=np.int64)
    if occupied.size and (occupied.min() < 0 or occupied.max() > n):
        raise ValueError(f"m must lie between 0 and the {n} cells, got {occupied.min()} to {occupied.max()}")
    columns = []
    for r in sizes:
        expected = np.zeros(occupied.shape)
        for kind in product(*[_sides(side, r, border == "full") for side in shape]):
            number = copies * math.prod(count for count, _ in kind)
            if number:
                expected += number * -np.expm1(
                    _log_empty(n, math.prod(length for _, length in kind), occupied)
                )
        columns.append(expected)
    return torch.from_numpy(np.stack(columns, -1))


def _sides(n: int, r: int, full: bool) -> list[tuple[int, int]]:
    """List how many boxes have which length along an axis."""
    return [(n // r, r)] + ([(1, n % r)] if n % r and not full else [])


def _log_empty(n: int, b: int, m: np.ndarray) -> np.ndarray:
    """Return log C(n - b, m) / C(n, m), to a relative accuracy that differences of lgamma do not have."""
    if b == 1:
        with np.errstate(divide="ignore"):
            return np.log1p(-m / n)
    result = np.full(m.shape, -np.inf)
    for index in np.ndindex(m.shape):
        few, many = sorted((b, int(m[index])))
        if many + few > n:
            continue  # too many cells to leave the box empty
        if few <= 64:
            result[index] = np.log1p(-many / (n - np.arange(few))).sum()
        elif many * few < 800 * n:  # beyond, exp(result) is zero in float64
            result[index] = _stirling(n, few, many)
    return result


def _stirling(n: int, b: int, m: int) -> float:
    """Return log of (n-m)! (n-b)! / (n! (n-m-b)!): Stirling's leading terms cancelled by hand."""
    rest = n - m - b
    if rest < 32:
        return math.lgamma(n - m + 1) + math.lgamma(n - b + 1) - math.lgamma(n + 1) - math.lgamma(rest + 1)
    leading = b * math.log1p(-m / n) - (rest + 0.5) * math.log1p(-b / (n - m))
    leading += (n - b + 0.5) * math.log1p(-b / n)
    return leading + _tail(n - m) + _tail(n - b) - _tail(n) - _tail(rest)


def _tail(x: int) -> float:
    """Return what Stirling's formula leaves out of log x!."""
    return 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)
