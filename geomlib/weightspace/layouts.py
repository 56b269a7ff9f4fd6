r"""Laying a weight tensor on a grid: matrix, mosaic, slices, norms, nd.

Boxes are counted on a grid, and a convolution kernel `(out, in, *kernel)` is not one: some order of its axes
has to be chosen. The choice is free and it changes the dimension that comes out, so every report names it.
Which rows and columns belong to one unit travels with the grid, because that is what a permutation of units
moves as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Grid", "filters", "lay_out"]

LAYOUTS = ("matrix", "mosaic", "slices", "norms", "nd", "vector")


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight tensor on one grid, or on several equal ones whose box counts add up.

    Attributes
    ----------
    values : Tensor
        `(copies, *shape)`: the weights, or their norms.
    layout : str
        How they were laid out.
    row_block, column_block : int
        Consecutive rows that belong to one output unit, and columns that belong to one input unit.
    groups : int
        Row groups whose columns stand for different input units (grouped convolutions).

    Examples
    --------
    >>> lay_out(torch.zeros(8, 4, 3, 3))
    Grid('matrix', 8 x 36, column_block=9)
    """

    values: Tensor
    layout: str = "matrix"
    row_block: int = 1
    column_block: int = 1
    groups: int = 1

    @property
    def copies(self) -> int:
        """Number of grids."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides of one grid."""
        return tuple(self.values.shape[1:])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Dyadic sizes of boxes, up to the first that covers the shorter axis of units."""
        sizes = [1]
        # Kernel axes of the nd layout are covered earlier, and boxes then grow along the units alone.
        while sizes[-1] < min(self.shape[:2]):
            sizes.append(2 * sizes[-1])
        return tuple(sizes)

    def like(self, values: Tensor) -> Grid:
        """Return other values in the same layout, a mask for example."""
        return Grid(values, self.layout, self.row_block, self.column_block, self.groups)

    def __repr__(self) -> str:
        sides = " x ".join(map(str, self.shape))
        copies = f"{self.copies} copies of " if self.copies > 1 else ""
        extra = {name: getattr(self, name) for name in ("row_block", "column_block", "groups")}
        shown = "".join(f", {name}={value}" for name, value in extra.items() if value != 1)
        return f"Grid({self.layout!r}, {copies}{sides}{shown})"


def lay_out(W: Tensor, layout: str = "matrix", *, groups: int = 1, transposed: bool = False) -> Grid:
    """Lay a weight tensor on a grid.

    Parameters
    ----------
    W : Tensor
        `(out, in)` of a linear layer or an embedding, or `(out, in / groups, *kernel)` of a convolution, as
        torch stores them; any dtype.
    layout : str
        - `"matrix"`: `(out, in * kernel)`, one row per filter. The default: it has the most scales.
        - `"mosaic"`: `(out * k_h, in * k_w)`, tile `(o, i)` is a kernel. A picture; boxes straddle kernels.
        - `"slices"`: one `(out, in)` matrix per kernel cell; counts are added up before the fit.
        - `"norms"`: `(out, in)`, the Frobenius norm of every kernel.
        - `"nd"`: the tensor as it is; reference only.
        - `"vector"`: everything in one row of one axis, for biases.
    groups : int
        Groups of a convolution. They are stacked along the rows.
    transposed : bool
        The tensor is of a transposed convolution, stored `(in, out / groups, *kernel)`.

    Returns
    -------
    Grid
        On the device of `W`. `"matrix"`, `"mosaic"`, `"slices"` and `"nd"` only move entries.

    Raises
    ------
    ValueError
        For an unknown layout, a tensor with fewer than two axes (except under `"vector"`) or without
        entries, or groups that do not divide the channels.

    Notes
    -----
    Source: reconstructed; arXiv 2503.14298 counts boxes in ResNet-18 and VGG-16 and the layout that it used
    could not be read. `"slices"` treats channels the way spectral tools such as WeightWatcher do.

    Examples
    --------
    >>> W = torch.arange(2 * 3 * 4).reshape(2, 3, 2, 2)
    >>> [lay_out(W, layout).values.shape[1:] for layout in ("matrix", "mosaic", "slices", "norms")]
    [torch.Size([2, 12]), torch.Size([4, 6]), torch.Size([2, 3]), torch.Size([2, 3])]
    >>> lay_out(W, "mosaic").values[0, :2, :2]
    tensor([[0, 1],
            [2, 3]])
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}: it names no grid")
    if W.numel() == 0 or W.ndim == 0:
        raise ValueError(f"W must have entries on an axis, got shape {tuple(W.shape)}: it spans no boxes")
    if layout == "vector":
        return Grid(W.reshape(1, -1), layout)
    kernels = filters(W, groups=groups, transposed=transposed)
    out, inputs, *window = kernels.shape
    cells = prod(window)
    if layout == "matrix":
        return Grid(kernels.reshape(1, out, inputs * cells), layout, 1, cells, groups)
    if layout == "mosaic":
        high, wide = prod(window[:-1]), window[-1] if window else 1
        tiles = kernels.reshape(out, inputs, high, wide).transpose(1, 2)
        return Grid(tiles.reshape(1, out * high, inputs * wide), layout, high, wide, groups)
    if layout == "slices":
        return Grid(kernels.reshape(out, inputs, cells).permute(2, 0, 1), layout, groups=groups)
    if layout == "norms":
        flat = kernels.reshape(out, inputs, cells)
        exact = flat if flat.is_floating_point() or flat.is_complex() else flat.double()
        # The norm of a single entry is its absolute value, without the rounding of a square and a root.
        norms = exact.abs()[..., 0] if cells == 1 else torch.linalg.vector_norm(exact, dim=-1)
        return Grid(norms[None], layout, groups=groups)
    return Grid(kernels[None], layout, groups=groups)


def filters(W: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return a weight tensor as `(out, in / groups, *kernel)`, whichever way its layer stores it.

    Parameters
    ----------
    W : Tensor
        At least two axes.
    groups : int
        Groups of a convolution.
    transposed : bool
        Stored `(in, out / groups, *kernel)`.

    Returns
    -------
    Tensor
        A view where that is possible.

    Raises
    ------
    ValueError
        For fewer than two axes, or groups that do not divide the first one.

    Examples
    --------
    >>> filters(torch.zeros(6, 4, 3), groups=2, transposed=True).shape
    torch.Size([8, 3, 3])
    """
    if W.ndim < 2:
        raise ValueError(
            f"W must have at least two axes, got shape {tuple(W.shape)}: "
            "a vector spans no boxes (layout='vector' counts intervals)"
        )
    if groups < 1 or W.shape[0] % groups:
        raise ValueError(
            f"groups must divide the {W.shape[0]} slices of the first axis, got {groups}: "
            "rows would belong to no group"
        )
    if not transposed:
        return W
    grouped = W.reshape(groups, W.shape[0] // groups, *W.shape[1:]).transpose(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])
