r"""The fractal transformation of a weight tensor: averages over nested boxes, and the maps behind it.

For `k >= 0`, `T(W, k)` is the mean of `W` over boxes of side `ratio**k`; for `k < 0` it repeats every
entry. The paper (arXiv 2503.14298) names the transformation and its laws in the abstract; its formula could
not be read, so this one is reconstructed: the simplest family that is linear, is the identity at `k = 0`,
cuts the grid into the boxes that are counted, and can be undone only at large scale. It is the Haar
multiresolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["T", "as_signal", "cells", "defect", "phi", "project", "segment"]

Reduce = Literal["mean", "sum", "absmax", "rms"]


def T(
    W: Tensor,
    k: int,
    *,
    ratio: int = 2,
    reduce: Reduce = "mean",
    d: int | None = None,
    counts: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Look at a tensor through boxes of side `ratio**k`, or repeat its entries if `k` is negative.

    Parameters
    ----------
    W : Tensor
        `(..., n_1, ..., n_d)` real; boxes at the far border are as large as the grid lets them be.
    k : int
        Scale. `0` is the identity.
    ratio : int
        Factor between two scales, at least 2.
    reduce : {"mean", "sum", "absmax", "rms"}
        What a box becomes when `k > 0`. Only `mean` and `sum` are linear; `absmax` of a 0/1 tensor says
        which boxes are occupied.
    d : int, optional
        Number of trailing axes that form the grid; all axes if not given. The axes before them are a batch.
    counts : Tensor, optional
        Cells that each entry of `W` stands for, broadcastable to it: `cells(shape, j)` if `W` is itself
        `T(..., j)`, which makes scales add up for every shape; zero where an entry is to be left out.
    shape : sequence of int, optional
        Grid to which a repeated signal (`k < 0`) is cropped.

    Returns
    -------
    Tensor
        `(..., ceil(n_i / ratio**k))` or `(..., n_i * ratio**-k)`; differentiable. Sums are taken in float64;
        the result has the dtype of `W` if that is float32 or float64, is float32 for narrower floats and
        float64 for integers and booleans. A box without any counted cell is NaN under `mean` and `rms`.

    Raises
    ------
    ValueError
        If `ratio`, `reduce`, `d` or `shape` is out of range, or `W` holds NaN or infinities.

    Notes
    -----
    Source: the transformation and its properties are named in the abstract of arXiv 2503.14298;
    reconstructed as box averages. Sums and counts are kept apart and divided at the end, so that linearity
    and `T_k T_l = T_(k+l)` are exact on ragged grids too.

    Examples
    --------
    >>> W = torch.arange(6.0).reshape(2, 3)
    >>> T(W, 1)
    tensor([[2.0000, 3.5000]])
    >>> T(T(W, 1), -1, shape=W.shape)
    tensor([[2.0000, 2.0000, 3.5000],
            [2.0000, 2.0000, 3.5000]])
    """
    _check_ratio(ratio)
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {get_args(Reduce)}, got {reduce!r}")
    W = as_signal(W)
    d = _grid_axes(W, d)
    if k == 0 or d == 0:
        return W.abs() if reduce in ("absmax", "rms") else W
    if k < 0:
        return _dilate(W, ratio**-k, d, shape)
    if reduce == "absmax":
        return _pool(W.abs(), k, ratio, d, largest=True)
    values = W.double()
    values = values.square() if reduce == "rms" else values
    if counts is not None:
        counts = counts.to(torch.float64).expand(W.shape)
        values = values * counts
    total = _pool(values, k, ratio, d)
    if reduce == "sum":
        return total.to(W.dtype)
    if counts is None:
        mean = total / cells(W.shape[W.ndim - d :], k, ratio=ratio, device=W.device)
    else:
        mean = total / _pool(counts, k, ratio, d)
    return (mean.sqrt() if reduce == "rms" else mean).to(W.dtype)


def project(W: Tensor, k: int, *, ratio: int = 2, d: int | None = None) -> Tensor:
    """Replace every entry by the mean of its box of side `ratio**k`: shrink, then dilate back.

    Parameters
    ----------
    W : Tensor
        `(..., n_1, ..., n_d)` real.
    k : int
        Scale, at least 0.
    ratio, d : int
        As in `T`.

    Returns
    -------
    Tensor
        The shape of `W`: the orthogonal projection on the signals that are constant on boxes.

    Raises
    ------
    ValueError
        As `T`, and if `k` is negative.

    Notes
    -----
    Source: reconstructed; the conditional expectation of the Haar multiresolution. What it removes, `W -
    project(W, k)`, is what shrinking by `k` scales loses for good.

    Examples
    --------
    >>> project(torch.tensor([1.0, 3.0, 5.0]), 1)
    tensor([2., 2., 5.])
    """
    if k < 0:
        raise ValueError(
            f"k must be at least 0, got {k}: a dilation loses nothing that could be projected away"
        )
    axes = _grid_axes(W, d)
    return T(T(W, k, ratio=ratio, d=d), -k, ratio=ratio, d=d, shape=W.shape[W.ndim - axes :])


def segment(shape: Sequence[int], r: int, *, device: torch.device | str | None = None) -> Tensor:
    """Give each cell the number of its box of side `r`.

    Parameters
    ----------
    shape : sequence of int
        Sides of the grid.
    r : int
        Side of a box.
    device
        Of the result.

    Returns
    -------
    Tensor
        `shape`, int64: the label of each cell's box, from 0 to `prod(ceil(n_i / r)) - 1`, in the order of
        the rows.

    Raises
    ------
    ValueError
        If a side or `r` is not positive.

    Notes
    -----
    Source: the segmentation into "fractals" of arXiv 2503.14298 (abstract); reconstructed as boxes anchored
    at the origin, which nest exactly: `floor(floor(x / a) / b) = floor(x / (a b))`.

    Examples
    --------
    >>> segment((3, 4), 2)
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 1],
            [2, 2, 3, 3]])
    """
    _check_sides(shape)
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}: a box holds at least one cell")
    label = torch.zeros((), dtype=torch.int64, device=device)
    for n in shape:
        label = label[..., None] * -(-n // r) + torch.arange(n, device=device) // r
    return label


def cells(
    shape: Sequence[int], k: int, *, ratio: int = 2, device: torch.device | str | None = None
) -> Tensor:
    """Count the cells in each box of side `ratio**k`: fewer at a ragged border.

    Parameters
    ----------
    shape : sequence of int
        Sides of the grid.
    k : int
        Scale, at least 0.
    ratio : int
        Factor between two scales.
    device
        Of the result.

    Returns
    -------
    Tensor
        `(ceil(n_i / ratio**k),)`, float64: what `T` takes as `counts`.

    Raises
    ------
    ValueError
        If a side is not positive, `k` is negative or `ratio` below 2.

    Notes
    -----
    Source: reconstructed, see `T`.

    Examples
    --------
    >>> cells((5, 4), 1).tolist()
    [[4.0, 4.0], [4.0, 4.0], [2.0, 2.0]]
    """
    _check_sides(shape)
    _check_ratio(ratio)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}: below one cell there is nothing to count")
    r = ratio**k
    number = torch.ones((), dtype=torch.float64, device=device)
    for n in shape:
        start = torch.arange(-(-n // r), device=device) * r
        number = number[..., None] * (n - start).clamp(max=r)
    return number


def phi(x: Tensor, k: int, *, ratio: int = 2) -> Tensor:
    """Move points of the integer grid by `k` scales: the map of coordinates that `T` is made of.

    Parameters
    ----------
    x : Tensor
        Integers of any shape, the coordinates of points of `Z^d`.
    k : int
        `floor(x / ratio**k)` if not negative, else `x * ratio**-k`.
    ratio : int
        Factor between two scales.

    Returns
    -------
    Tensor
        Same shape, int64.

    Raises
    ------
    ValueError
        If `x` is not of an integer dtype or `ratio` is below 2.

    Notes
    -----
    Source: reconstructed from "coarse group action" in the abstract of arXiv 2503.14298. In the largest
    coordinate difference, `|x - y| / r - 1 <= |phi_k(x) - phi_k(y)| <= |x - y| / r + 1` with `r = ratio**k`.

    Examples
    --------
    >>> phi(torch.tensor([-3, -1, 0, 5]), 1).tolist()
    [-2, -1, 0, 2]
    """
    _check_ratio(ratio)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"x must hold integers, got {x.dtype}: the maps act on the points of a grid")
    x = x.to(torch.int64)
    return x * ratio**-k if k < 0 else torch.div(x, ratio**k, rounding_mode="floor")


def defect(k: int, j: int, *, ratio: int = 2) -> int:
    """Return how far `phi_k(phi_j(x))` is from `phi_(k+j)(x)` at worst, over all integers `x`.

    Parameters
    ----------
    k, j : int
        Scales; `phi_j` acts first.
    ratio : int
        Factor between two scales.

    Returns
    -------
    int
        `ratio**|k| - ratio**max(0, |k| - j)` if `j > 0 > k` (shrunk first, dilated after), else 0.

    Raises
    ------
    ValueError
        If `ratio` is below 2.

    Notes
    -----
    Source: reconstructed. The maps of one sign compose exactly; the family is an action of the scales
    `k >= 0` and only a coarse one of all integers, with a defect that grows with `|k|`.

    Examples
    --------
    >>> defect(-3, 3), defect(3, -3)
    (7, 0)
    """
    _check_ratio(ratio)
    return ratio**-k - ratio ** max(0, -k - j) if j > 0 > k else 0


def as_signal(W: Tensor, name: str = "W", *, check_finite: bool = True) -> Tensor:
    """Return a tensor as dense real numbers that can be compared and averaged.

    Parameters
    ----------
    W : Tensor
        Any dtype and layout; sparse tensors become dense, quantised ones are dequantised, complex ones
        replaced by their modulus.
    name : str
        What the tensor is called in an error.
    check_finite : bool
        Refuse NaN and infinities, which waits for the device; `False` leaves them in.

    Returns
    -------
    Tensor
        float32 for floats of 32 bits and less, float64 for everything else.

    Raises
    ------
    ValueError
        If the tensor is on the `meta` device, is empty, or, unless allowed, holds NaN or infinities.

    Notes
    -----
    Source: reconstructed; an infinity would spoil every quantile, sum and energy without a sign of it.

    Examples
    --------
    >>> as_signal(torch.tensor([1, 2])).dtype
    torch.float64
    >>> as_signal(torch.tensor([1.0, torch.nan]), "layer1.weight")
    Traceback (most recent call last):
        ...
    ValueError: layer1.weight must be finite, got 1 NaN and 0 infinite of 2 entries: no statistic of it ...
    """
    if W.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    if W.layout != torch.strided:
        W = W.to_dense()
    if W.is_quantized:
        W = W.dequantize()
    if W.is_complex():
        W = W.abs()
    if W.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(W.shape)}: it has no cells")
    if not W.is_floating_point():
        return W.to(torch.float64)
    if check_finite and not bool(torch.isfinite(W).all()):
        bad, nan = int((~torch.isfinite(W)).sum()), int(torch.isnan(W).sum())
        raise ValueError(
            f"{name} must be finite, got {nan} NaN and {bad - nan} infinite of {W.numel()} entries: "
            "no statistic of it would mean anything"
        )
    return W if W.dtype in (torch.float32, torch.float64) else W.to(torch.float32)


def _pool(x: Tensor, k: int, ratio: int, d: int, *, largest: bool = False) -> Tensor:
    """Reduce the last `d` axes `k` times by `ratio`, with sums or maxima; zeros fill up the far border."""
    join = torch.maximum if largest else torch.add
    for axis in range(x.ndim - d, x.ndim):
        for _ in range(k):
            n = x.shape[axis]
            if n == 1:
                break
            if n % ratio:
                fill = list(x.shape)
                fill[axis] = -n % ratio
                x = torch.cat([x, x.new_zeros(fill)], axis)
            x = functools.reduce(join, x.unflatten(axis, (-1, ratio)).unbind(axis + 1))
    return x


def _dilate(V: Tensor, r: int, d: int, shape: Sequence[int] | None) -> Tensor:
    if shape is not None and (
        len(shape) != d or any(-(-n // r) != v for n, v in zip(shape, V.shape[V.ndim - d :], strict=True))
    ):
        raise ValueError(
            f"shape must have {tuple(V.shape[V.ndim - d :])} boxes of side {r}, got {tuple(shape)}: "
            "the repeated signal would not cover it"
        )
    for axis in range(V.ndim - d, V.ndim):
        V = V.repeat_interleave(r, axis)
        if shape is not None:
            V = V.narrow(axis, 0, shape[axis - (V.ndim - d)])
    return V


def _grid_axes(W: Tensor, d: int | None) -> int:
    if d is None:
        return W.ndim
    if not 1 <= d <= W.ndim:
        raise ValueError(f"d must lie between 1 and the {W.ndim} axes of W, got {d}")
    return d


def _check_ratio(ratio: int) -> None:
    if ratio < 2:
        raise ValueError(f"ratio must be at least 2, got {ratio}: boxes would not grow from scale to scale")


def _check_sides(shape: Sequence[int]) -> None:
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must hold positive sides, got {tuple(shape)}: there is no grid to cut")
