r"""Which entries of a weight tensor count as large: the set whose boxes are counted.

Without a threshold every box of a dense real tensor is occupied and its dimension is that of the grid. The
default is a quantile of the absolute values: it does not change when the tensor is multiplied by a number,
and it makes layers comparable at one density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from geomlib.weightspace.transform import as_signal

__all__ = ["Occupied", "Threshold", "occupied_set"]

Threshold: TypeAlias = tuple[str, float] | Literal["nonzero"]
NanPolicy: TypeAlias = Literal["raise", "omit"]


@dataclass(frozen=True, eq=False)
class Occupied:
    """The large entries of a tensor.

    Attributes
    ----------
    mask : Tensor
        Boolean, where the entries are large; the shape of the tensor.
    tau : float
        Entries above it, in absolute value, are large.
    cells : int
        Number of large entries.
    omitted : int
        NaN and infinite entries, which are never large.
    """

    mask: Tensor
    tau: float
    cells: int
    omitted: int

    @property
    def density(self) -> float:
        """Share of large entries that was realised; with ties it is below `1 - q`."""
        return self.cells / self.mask.numel()

    def __repr__(self) -> str:
        extra = f", {self.omitted} omitted" if self.omitted else ""
        return f"Occupied({self.cells} of {self.mask.numel()} entries above {self.tau:.4g}{extra})"


def occupied_set(
    W: Tensor,
    threshold: Threshold = ("quantile", 0.9),
    *,
    nan_policy: NanPolicy = "raise",
    ties: Literal["strict", "random"] = "strict",
    name: str = "W",
    generator: torch.Generator | None = None,
) -> Occupied:
    """Return where a tensor is large in absolute value.

    Parameters
    ----------
    W : Tensor
        Any shape, dtype and layout that `as_signal` can read.
    threshold : (str, float) or "nonzero"
        `("quantile", q)`: above the `ceil(q n)`-th smallest absolute value. `("std", c)`: above `c` standard
        deviations of the entries. `("abs", tau)`: above `tau`. `"nonzero"`: for pruned networks.
    nan_policy : {"raise", "omit"}
        What to do with NaN and infinities: refuse the tensor, or leave them out and count them.
    ties : {"strict", "random"}
        Quantized weights have many equal values, and of those at the quantile none is large. "random"
        draws as many of them as the density asks for; by their place none would ever be chosen, because
        that would make a pattern.
    name : str
        How messages call the tensor.
    generator : Generator, optional
        Source of random ties.

    Returns
    -------
    Occupied
        Its mask stands on the device of `W`.

    Raises
    ------
    ValueError
        For NaN or infinities (by name and number) unless omitted, for a tensor that cannot be read, or for
        a threshold out of range.

    Notes
    -----
    Source: reconstructed; whether arXiv 2503.14298 uses a threshold could not be read. The quantile is a
    value of the tensor, never interpolated, so it commutes with any increasing map of the absolute values.

    Examples
    --------
    >>> occupied_set(torch.arange(10.0), ("quantile", 0.8))
    Occupied(2 of 10 entries above 7)
    """
    rule, number = _check(threshold)
    if nan_policy not in ("raise", "omit"):
        raise ValueError(f"nan_policy must be raise or omit, got {nan_policy!r}")
    if ties not in ("strict", "random"):
        raise ValueError(f"ties must be strict or random, got {ties!r}: it names no choice")
    values = as_signal(W.detach(), name, check_finite=False)
    size = values.abs()
    omitted, kept = 0, size.flatten()
    # One pass: a sum is finite only if its parts are (or overflows, and then the slow look decides).
    if size.is_floating_point() and not bool(torch.isfinite(size.sum())):
        finite = torch.isfinite(size)
        omitted = size.numel() - int(finite.sum())
        if omitted and nan_policy == "raise":
            raise ValueError(
                f"{name} must be finite, got {omitted} NaN or infinite entries of {size.numel()}: they "
                "have no order of size (nan_policy='omit' leaves them out)"
            )
        kept, values = size[finite], values[finite]
        size = torch.where(finite, size, torch.zeros_like(size))
        if kept.numel() == 0:
            return Occupied(torch.zeros_like(finite), math.nan, 0, omitted)
    if rule == "quantile":
        rank = max(1, math.ceil(number * kept.numel() - 1e-9))
        level = _smallest(kept, rank)
    elif rule == "std":
        level = number * values.double().std(correction=0)
    else:
        level = kept.new_full((), number)
    mask = size > level
    if rule == "quantile" and ties == "random":
        mask = _drawn(mask, size == level, kept.numel() - rank, generator)
    return Occupied(mask, float(level), int(mask.sum()), omitted)


def _check(threshold: Threshold) -> tuple[str, float]:
    if threshold == "nonzero":
        return "abs", 0.0
    pair = isinstance(threshold, (tuple, list)) and len(threshold) == 2
    rule, number = threshold if pair else (threshold, math.nan)
    if rule not in ("quantile", "std", "abs"):
        raise ValueError(
            f"threshold must be ('quantile', q), ('std', c), ('abs', tau) or 'nonzero', got {threshold!r}: "
            "without one every box is occupied"
        )
    limit = 1.0 if rule == "quantile" else math.inf
    if not 0 <= float(number) < limit:
        raise ValueError(
            f"threshold {rule!r} must lie in [0, {limit:g}), got {number}: it would select nothing"
        )
    return str(rule), float(number)


def _smallest(values: Tensor, rank: int) -> Tensor:
    """Return the `rank`-th smallest value."""
    if values.device.type == "cpu":
        # The same selection, vectorised: six to ten times faster, and it is most of a report's time.
        return values.new_tensor(np.partition(values.numpy(), rank - 1)[rank - 1])
    return values.kthvalue(rank).values


def _drawn(mask: Tensor, tied: Tensor, wanted: int, generator: torch.Generator | None) -> Tensor:
    """Add as many tied entries, drawn without replacement, as are missing."""
    places = tied.flatten().nonzero()[:, 0]
    missing = wanted - int(mask.sum())
    chosen = torch.randperm(len(places), generator=generator)[: max(0, missing)].to(places.device)
    flat = mask.flatten()
    flat[places[chosen]] = True
    return flat.reshape(mask.shape)
