"""Counting the boxes that a set occupies, at many scales in one pass, and what chance alone would count.

Boxes are joined by OR from size to size, eight cells to a machine word (`pyramid`); gliding windows come
from an integral image; clouds of points are counted by one sort of their Morton codes. `null_counts`, the
expectation for a random set, is in `null` and exported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from geomlib.weightspace.null import Border, null_counts
from geomlib.weightspace.pyramid import occupied

__all__ = ["BoxCounts", "box_counts", "gliding_mass", "null_counts", "point_counts", "shifted_counts"]


@dataclass(frozen=True, eq=False)
class BoxCounts:
    """How many boxes of each size a set occupies.

    Attributes
    ----------
    sizes : tuple of int
        Sides of the boxes in cells, growing.
    counts : Tensor
        `(..., len(sizes))` int64, occupied boxes; the leading axes are the batch of the mask.
    boxes : tuple of int
        Boxes that were looked at, per size.
    shape : tuple of int
        Sides of the grid.
    """

    sizes: tuple[int, ...]
    counts: Tensor
    boxes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def fraction(self) -> Tensor:
        """Share of the boxes that is occupied: `(..., len(sizes))`, float64, NaN where no box fits."""
        return self.counts / torch.tensor(self.boxes, dtype=torch.float64).to(self.counts.device)

    @property
    def normalised(self) -> Tensor:
        """Share times `prod(n_i / r)`: no bias of a ragged border, if only full boxes count."""
        volume = [math.prod(n / r for n in self.shape) for r in self.sizes]
        return self.fraction * torch.tensor(volume, dtype=torch.float64).to(self.counts.device)


def box_counts(
    mask: Tensor,
    sizes: Literal["dyadic"] | Sequence[int] = "dyadic",
    *,
    ratio: int = 2,
    offset: int | Sequence[int] = 0,
    border: Border = "clip",
    d: int = 2,
) -> BoxCounts:
    """Count the boxes of each size that hold at least one cell of a set.

    Parameters
    ----------
    mask : Tensor
        `(..., n_1, ..., n_d)` boolean or integer (nonzero is occupied): a batch of sets, of any device.
    sizes : "dyadic" or sequence of int
        Sides of the boxes. "dyadic" takes `ratio**k` from 1 up to the first that covers the shortest side
        (with `border="full"`, the last that fits into it).
    ratio : int
        Factor between the sizes of "dyadic".
    offset : int or sequence of int
        Cells by which the grid of boxes is shifted towards the origin, on all axes or on each.
    border : {"clip", "full"}
        "clip" counts the boxes that the border cuts, "full" leaves them out.
    d : int
        Number of trailing axes that form the grid.

    Returns
    -------
    BoxCounts

    Raises
    ------
    ValueError
        If the mask is empty, has fewer than `d` axes or holds real numbers, or if a size, the ratio, the
        offset or the border is out of range.

    Notes
    -----
    Source: box counting as in the abstract of arXiv 2503.14298. Reconstructed: a set is needed, because
    every box of a dense real tensor is occupied and its dimension is then that of the grid. A size starts
    from the largest smaller one that divides it, so that all powers of two together cost little more than
    the first. Nothing waits for the device.

    Examples
    --------
    >>> gasket = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    >>> found = box_counts(gasket)
    >>> found.sizes, found.counts.tolist()
    ((1, 2, 4), [9, 3, 1])
    """
    mask, shape = _as_mask(mask, d)
    if border not in get_args(Border):
        raise ValueError(f"border must be one of {get_args(Border)}, got {border!r}")
    shifts = (offset,) * d if isinstance(offset, int) else tuple(int(o) for o in offset)
    if len(shifts) != d or min(shifts) < 0:
        raise ValueError(f"offset must be one or {d} numbers of cells, none negative, got {offset}")
    wanted = _sizes(sizes, shape, ratio, border)
    batch = mask.shape[: mask.ndim - d]
    counts = occupied(mask.reshape(-1, *shape), wanted, shifts, border == "full")
    boxes = tuple(
        math.prod(_number(n, r, o % r, border == "full") for n, o in zip(shape, shifts, strict=True))
        for r in wanted
    )
    return BoxCounts(wanted, counts.reshape(*batch, len(wanted)), boxes, shape)


def shifted_counts(
    mask: Tensor,
    sizes: Sequence[int],
    *,
    offsets: int = 4,
    reduce: Literal["mean", "min"] = "mean",
    border: Border = "clip",
    d: int = 2,
) -> Tensor:
    """Count boxes on several shifted grids and take the mean or the least.

    Parameters
    ----------
    mask : Tensor
        `(..., n_1, ..., n_d)` as in `box_counts`.
    sizes : sequence of int
        Sides of the boxes.
    offsets : int
        Shifts per axis, evenly spaced in `[0, r)`; all `offsets**d` combinations are taken (fewer where the
        box is smaller than that).
    reduce : {"mean", "min"}
        "min" estimates the smallest cover, "mean" averages the phase of the grid out.
    border, d
        As in `box_counts`.

    Returns
    -------
    Tensor
        `(..., len(sizes))`, float64. With `border="full"` each grid counts `BoxCounts.normalised`, NaN where
        a shifted grid has no full box.

    Raises
    ------
    ValueError
        As `box_counts`, and if `offsets` is not positive or `reduce` unknown.

    Notes
    -----
    Source: reconstructed; box-counting tools offer shifted grids because one grid's phase biases the count.

    Examples
    --------
    >>> mask = torch.zeros(8, 8, dtype=torch.bool)
    >>> mask[3:5, 3:5] = True
    >>> box_counts(mask, [4]).counts.tolist(), shifted_counts(mask, [4], reduce="min").tolist()
    ([4], [1.0])
    """
    if offsets < 1:
        raise ValueError(f"offsets must be at least 1, got {offsets}: there would be no grid")
    if reduce not in ("mean", "min"):
        raise ValueError(f"reduce must be 'mean' or 'min', got {reduce!r}")
    mask, shape = _as_mask(mask, d)
    wanted = _sizes(sizes, shape, 2, border)
    flat = mask.reshape(-1, *shape)
    columns = []
    for r in wanted:
        shifts = sorted({i * r // offsets for i in range(offsets)})
        found = []
        for chosen in product(shifts, repeat=d):
            count = occupied(flat, [r], chosen, border == "full")[:, 0].double()
            if border == "full":
                boxes = math.prod(_number(n, r, o, True) for n, o in zip(shape, chosen, strict=True))
                count = count * (math.prod(n / r for n in shape) / boxes if boxes else math.nan)
            found.append(count)
        stacked = torch.stack(found)
        columns.append(stacked.mean(0) if reduce == "mean" else stacked.amin(0))
    return torch.stack(columns, -1).reshape(*mask.shape[: mask.ndim - d], len(wanted))


def gliding_mass(values: Tensor, r: int, *, d: int = 2) -> Tensor:
    """Sum a set or a measure over every window of side `r`, at all positions.

    Parameters
    ----------
    values : Tensor
        `(..., n_1, ..., n_d)`, boolean, integer or floating point.
    r : int
        Side of the window, at most the shortest side.
    d : int
        Number of trailing axes that form the grid.

    Returns
    -------
    Tensor
        `(..., n_i - r + 1)`: int64 for booleans and integers, float64 for floats.

    Raises
    ------
    ValueError
        If `r` or `d` does not fit.

    Notes
    -----
    Source: Allain and Cloitre (1991). Differences of an integral image: the cost does not depend on `r`.

    Examples
    --------
    >>> gliding_mass(torch.tensor([[1, 0, 2], [0, 3, 0]]), 2).tolist()
    [[4, 5]]
    """
    if not 1 <= d <= values.ndim or values.numel() == 0:
        raise ValueError(f"d must lie between 1 and the axes of values, got {d} for {tuple(values.shape)}")
    if not 1 <= r <= min(values.shape[-d:]):
        raise ValueError(f"r must fit into the grid {tuple(values.shape[-d:])}, got {r}: no window would")
    total = window_sums(integral_image(values, d), r, d)
    return total if values.is_floating_point() else total.to(torch.int64)


def integral_image(values: Tensor, d: int) -> Tensor:
    """Sum over all cells before each position of the last `d` axes: `(..., n_i + 1)`, zero in front.

    int32 for booleans where that is wide enough, else int64; float64 for floats.
    """
    if values.is_floating_point():
        wide = torch.float64
    else:
        cells = values[(0,) * (values.ndim - d)].numel()
        wide = torch.int32 if values.dtype == torch.bool and cells < 2**31 else torch.int64
    values = pad(values, [1, 0] * d)
    for axis in range(values.ndim - 1, values.ndim - 1 - d, -1):
        # Along the last axis of memory a cumulative sum is ten times as fast as along any other.
        values = values.movedim(axis, -1).contiguous().cumsum(-1, dtype=wide).movedim(-1, axis)
    return values


def window_sums(image: Tensor, r: int, d: int) -> Tensor:
    """Sum over every window of side `r` from an integral image: `(..., n_i - r + 1)`."""
    for axis in range(image.ndim - d, image.ndim):
        n = image.shape[axis] - r
        image = image.narrow(axis, r, n) - image.narrow(axis, 0, n)
    return image


def point_counts(
    points: Tensor, levels: int, *, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> BoxCounts:
    """Count the boxes that a cloud of points occupies, all dyadic sizes from one sort.

    Parameters
    ----------
    points : Tensor
        `(m, d)`, finite.
    levels : int
        The finest grid has `2**levels` cells on each axis; `levels * d` may not exceed 62.
    low, high : float or Tensor
        Corners of the box that is divided, numbers or `(d,)`; points outside go to the nearest cell.

    Returns
    -------
    BoxCounts
        Sizes `1, 2, ..., 2**levels` in cells of the finest grid.

    Raises
    ------
    ValueError
        If there is no point, a coordinate is not finite, the corners do not enclose a volume, or the codes
        would not fit into 62 bits.

    Notes
    -----
    Source: reconstructed. The bits of the coordinates are interleaved (Morton 1966); in sorted order two
    neighbours fall apart at the level of their highest differing bit, so one histogram holds every count.

    Examples
    --------
    >>> point_counts(torch.tensor([[0.1, 0.1], [0.2, 0.1], [0.9, 0.9]]), 2).counts.tolist()
    [2, 2, 1]
    """
    if points.ndim != 2 or points.numel() == 0:
        raise ValueError(f"points must be (m, d) with at least one point, got {tuple(points.shape)}")
    d = points.shape[1]
    if levels < 0 or levels * d > 62:
        raise ValueError(f"levels must lie between 0 and {62 // d} in {d} dimensions, got {levels}")
    points = points.detach().double()
    low, high = (torch.as_tensor(c, dtype=torch.float64).to(points.device) for c in (low, high))
    if not bool(torch.isfinite(points).all()) or not bool((high > low).all()):
        raise ValueError("points must be finite and low below high: a point would have no box")
    grid = ((points - low) / (high - low) * 2**levels).long().clamp(0, 2**levels - 1)
    code = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for axis in range(d):
        code |= _spread(grid[:, axis], d, levels) << axis
    code = code.sort().values
    apart = code[1:] ^ code[:-1]
    # Without the bits that follow a one, rounding to float64 cannot carry into the next power of two.
    highest = torch.frexp((apart & ~(apart >> 1)).double()).exponent - 1
    level = torch.where(apart > 0, torch.div(highest, d, rounding_mode="floor") + 1, 0).long()
    number = torch.bincount(level, minlength=levels + 1)
    counts = 1 + number.flip(0).cumsum(0).flip(0)[1:]
    counts = torch.cat([counts, torch.ones_like(code[:1])])
    sizes = tuple(2**k for k in range(levels + 1))
    return BoxCounts(sizes, counts, tuple((2**levels // r) ** d for r in sizes), (2**levels,) * d)


def _as_mask(mask: Tensor, d: int) -> tuple[Tensor, tuple[int, ...]]:
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask must be boolean or integer, got {mask.dtype}: without a threshold every box of a dense "
            "tensor is occupied"
        )
    if not 1 <= d <= mask.ndim:
        raise ValueError(f"d must lie between 1 and the {mask.ndim} axes of the mask, got {d}")
    if mask.numel() == 0:
        raise ValueError(f"mask must not be empty, got shape {tuple(mask.shape)}: it has no cells")
    mask = mask.to_dense() if mask.layout != torch.strided else mask
    return mask.detach().to(torch.bool), tuple(mask.shape[mask.ndim - d :])


def _sizes(
    sizes: Literal["dyadic"] | Sequence[int], shape: tuple[int, ...], ratio: int, border: Border
) -> tuple[int, ...]:
    if isinstance(sizes, str):
        if sizes != "dyadic" or ratio < 2:
            raise ValueError(f"sizes must be 'dyadic' with a ratio of at least 2, got {sizes!r} with {ratio}")
        powers = [1]
        while (powers[-1] < min(shape)) if border == "clip" else (powers[-1] * ratio <= min(shape)):
            powers.append(powers[-1] * ratio)
        return tuple(powers)
    chosen = tuple(int(r) for r in sizes)
    if not chosen or min(chosen) < 1 or any(small >= large for small, large in pairwise(chosen)):
        raise ValueError(f"sizes must be positive and growing, got {chosen}")
    return chosen


def _number(n: int, r: int, shift: int, full: bool) -> int:
    """Count the boxes along an axis of `n` cells whose grid is shifted by `shift < r`."""
    return max(0, (n - (r - shift) % r) // r) if full else -(-(n + shift) // r)


def _spread(x: Tensor, d: int, bits: int) -> Tensor:
    """Move bit `i` of each number to bit `d * i`, by halving the blocks that still stand together."""
    block = 1
    while block < bits:
        block *= 2
    while d > 1 and block > 1:
        block //= 2
        mask = sum(((1 << block) - 1) << (start * d) for start in range(0, bits, block))
        x = (x | (x << (block * (d - 1)))) & mask
    return x
