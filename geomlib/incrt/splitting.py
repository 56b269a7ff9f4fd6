r"""Dictionaries that grow and shrink: prototypes part where tokens are too broad, and join where they met.

A prototype parts when the temperature falls below four eigenvalues (two in `em` mode) of the covariance of
its own tokens: the critical temperature of the whole, applied to a part. Whether arXiv 2604.01880 lets
dictionaries grow could not be seen; all of this is reconstructed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geomlib.incrt.dictionary import close_pairs, covariance, splits
from geomlib.incrt.prototypes import DDCLBlock
from geomlib.incrt.quantise import soft_quantise

__all__ = ["merge_prototypes", "split_prototypes"]


@torch.no_grad()
def split_prototypes(block: DDCLBlock, z: Tensor, mask: Tensor | None = None) -> list[tuple[int, int]]:
    """Split every prototype that would part on its own tokens at the present temperature.

    The children stand a hundredth of a standard deviation to both sides, inherit the value and half of
    the prior each, so the function changes by that hundredth only. The highest critical temperature goes
    first, while there is room.

    Parameters
    ----------
    block
        Built with `active`; changed in place.
    z
        Tokens `(..., d)` that the block sees.
    mask
        Valid tokens `(...)`, boolean.

    Returns
    -------
    list of (int, int)
        Prototype and the slot of its new sibling; an optimiser's state of both should be reset.

    Raises
    ------
    ValueError
        If the block was not built with `active`.

    Examples
    --------
    >>> block = DDCLBlock(1, 4, active=1, temperature=1.0)
    >>> split_prototypes(block, torch.tensor([[-1.0], [1.0]]))
    [(0, 1)]
    """
    _may_change(block)
    T = float(block.temperature.value())
    quantised = soft_quantise(z, block.free, T, mask=mask, log_prior=block.log_prior)
    found = splits(z, quantised.q, block.mode, mask)
    usage = quantised.usage
    # A prototype that owns less than one token has no cluster to part in, and siblings that still share
    # their tokens are parting already.
    number = z.numel() // block.d if mask is None else int(mask.sum())
    on = block.log_prior.isfinite()
    gaps = torch.cdist(block.free, block.free).fill_diagonal_(math.inf)
    nearest = gaps.masked_fill(~on, math.inf).amin(1)
    alone = nearest > 0.5 * found.eigenvalue.sqrt()
    parting = (found.critical > T) & on & alone & (usage * number >= 1)
    order = found.critical.argsort(descending=True)
    free = (~on).nonzero().flatten().tolist()
    born = []
    for parent, slot in zip(order[parting[order]].tolist(), free, strict=False):
        step = 0.01 * found.eigenvalue[parent].sqrt() * found.direction[parent]
        block.free[slot] = block.free[parent] - step
        block.free[parent] += step
        block.log_prior[parent] -= math.log(2)
        block.log_prior[slot] = block.log_prior[parent]
        if block.values is not None:
            block.values[slot] = block.values[parent]
        born.append((parent, slot))
    return born


@torch.no_grad()
def merge_prototypes(
    block: DDCLBlock, z: Tensor, mask: Tensor | None = None, *, closer: float = 1e-3
) -> list[tuple[int, int]]:
    """Join prototypes that have met, and free the slot of the second.

    Parameters
    ----------
    block
        Built with `active`; changed in place.
    z
        Tokens `(..., d)`, whose spread is the unit of distance.
    mask
        Valid tokens `(...)`, boolean.
    closer
        Distance in units of the root of the trace of the covariance.

    Returns
    -------
    list of (int, int)
        Prototype that stays and slot that is free.

    Raises
    ------
    ValueError
        If the block was not built with `active`.

    Examples
    --------
    >>> block = DDCLBlock(1, 2, active=2, temperature=1.0)
    >>> with torch.no_grad():
    ...     _ = block.free.copy_(torch.tensor([[1.0], [1.0]]))
    >>> merge_prototypes(block, torch.tensor([[-1.0], [1.0]])), block.active
    ([(0, 1)], 1)
    """
    _may_change(block)
    reach = closer * covariance(z, mask).trace().sqrt()
    joined: list[tuple[int, int]] = []
    gone: set[int] = set()
    on = block.log_prior.isfinite()
    for stays, goes in close_pairs(block.free, reach).tolist():
        if not (on[stays] and on[goes]) or gone & {stays, goes}:
            continue
        prior = block.log_prior[[stays, goes]]
        shares = prior.softmax(0)
        block.free[stays] = shares @ block.free[[stays, goes]]
        if block.values is not None:
            block.values[stays] = shares @ block.values[[stays, goes]]
        block.log_prior[stays] = prior.logsumexp(0)
        block.log_prior[goes] = -math.inf
        gone.add(goes)
        joined.append((stays, goes))
    return joined


def _may_change(block: DDCLBlock) -> None:
    if not block.grows:
        raise ValueError("active must have been given to change the number of prototypes, it was not")
