"""The fast form behind box counts: OR of neighbouring boxes, eight cells to a machine word.

It works on a batch `(batch, n_1, ..., n_d)` of any device and never makes the host wait. A size starts from
the largest smaller one that divides it, so that the powers of two together cost little more than the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["occupied"]


def occupied(mask: Tensor, sizes: Sequence[int], shifts: Sequence[int], full: bool) -> Tensor:
    """Count occupied boxes of each size on a grid that is shifted towards the origin.

    Parameters
    ----------
    mask : Tensor
        `(batch, n_1, ..., n_d)`, boolean.
    sizes : sequence of int
        Sides of the boxes, growing.
    shifts : sequence of int
        Cells by which the grid is shifted, per axis.
    full : bool
        Leave out the boxes that the border cuts.

    Returns
    -------
    Tensor
        `(batch, len(sizes))`, int64.

    Raises
    ------
    ValueError
        Never: `box_counts` has looked at the arguments.

    Notes
    -----
    Source: reconstructed. The boxes of side `r` shifted by `o` are unions of the boxes of side `s` shifted
    by `o` whenever `s` divides `r`.

    Examples
    --------
    >>> occupied(torch.eye(6, dtype=torch.bool)[None], [1, 2, 3], [0, 0], False).tolist()
    [[6, 3, 2]]
    """
    known, counts = {1: mask}, []
    for r in sizes:
        done = max(s for s in known if r % s == 0)
        x = known[done]
        for axis, shift in enumerate(shifts, 1):
            lead = ((-shift if full else shift) % r) // done
            x = _align(x, axis, lead, full)
        for factor in _factors(r // done):
            for axis in range(1, x.ndim):
                x = _join(x, axis, factor, full)
        known[r] = x
        counts.append(_popcount(x))
    return torch.stack(counts, -1)


def _align(x: Tensor, axis: int, lead: int, full: bool) -> Tensor:
    """Let the first box start at position 0: pad before it, or drop what lies before the first whole one."""
    if lead == 0:
        return x
    if full:
        lead = min(lead, x.shape[axis])
        return x.narrow(axis, lead, x.shape[axis] - lead)
    return pad(x, [0, 0] * (x.ndim - 1 - axis) + [lead, 0])


def _factors(number: int) -> list[int]:
    """Split a factor into those that are joined in one step: whole words first, then primes."""
    found = []
    for word in (8, 4, 2):
        while number % word == 0:
            found.append(word)
            number //= word
    prime = 3
    while number > 1:
        if number % prime == 0:
            found.append(prime)
            number //= prime
        else:
            prime = prime + 2 if prime * prime < number else number
    return found


def _join(x: Tensor, axis: int, factor: int, full: bool) -> Tensor:
    """Or groups of `factor` neighbours along an axis; the last group may be smaller, or goes if `full`."""
    n = x.shape[axis]
    if n == 1 and not full:
        return x
    if n % factor and full:
        x = x.narrow(axis, 0, n - n % factor)
    elif n % factor:
        fill = [0, 0] * (x.ndim - 1 - axis) + [0, -n % factor]
        x = pad(x, fill)
    last = axis == x.ndim - 1
    if last and factor in (2, 4, 8):
        # A word of so many bytes is true if one of them is: the cast joins them at the speed of memory.
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[factor]
        return _words(x, word).to(torch.bool)
    if not last and x.shape[-1] % 8 == 0 and x.numel():
        return _or_slices(_words(x, torch.int64), axis, factor).view(torch.bool)
    return _or_slices(x, axis, factor)


def _or_slices(x: Tensor, axis: int, factor: int) -> Tensor:
    return reduce(torch.bitwise_or, x.unflatten(axis, (x.shape[axis] // factor, factor)).unbind(axis + 1))


def _words(x: Tensor, word: torch.dtype) -> Tensor:
    """Read a boolean tensor, whose rows are whole words, as `(..., n / bytes)` integers."""
    # Flat in between: an axis of length one may have any stride, which a view as words would refuse.
    flat = x.reshape(-1).contiguous()
    flat = flat.clone() if flat.storage_offset() % word.itemsize else flat
    return flat.view(word).view(*x.shape[:-1], x.shape[-1] // word.itemsize)


def _popcount(x: Tensor) -> Tensor:
    """Count the true cells of each sample, eight to a word: `(batch,)`, int64."""
    x = x.flatten(1)
    if x.numel() <= 4096:  # below, one slow operation is sooner done than ten fast ones
        return x.sum(1)
    block = 1024 if x.shape[1] > 1024 else 8
    rest = x.shape[1] % block
    whole = x.narrow(1, 0, x.shape[1] - rest)
    # 128 words add up without a carry from byte to byte; their bytes are then added in pairs, and in fours.
    words = _words(whole, torch.int64).unflatten(1, (whole.shape[1] // block, block // 8)).sum(2)
    pairs = (words & _LOW_BYTES) + ((words >> 8) & _LOW_BYTES)
    total = (((pairs * _ONES) >> 48) & 0xFFFF).sum(1)
    return total + x.narrow(1, whole.shape[1], rest).sum(1) if rest else total


_LOW_BYTES = 0x00FF00FF00FF00FF
_ONES = 0x0001000100010001
