"""The two fast forms behind the box counts: OR of neighbours, eight cells to a word, and an integral image.

Both work on a batch `(batch, n_1, ..., n_d)` of any device and never make the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["integral_image", "occupied", "popcount", "pyramid", "window_sums"]


def pyramid(x: Tensor, sizes: tuple[int, ...], full: bool) -> list[Tensor]:
    """Join boxes by OR from size to size; `x` is `(batch, n_1, ..., n_d)`."""
    counts, done = [], 1
    for r in sizes:
        for factor in _factors(r // done):
            for axis in range(1, x.ndim):
                x = _join(x, axis, factor, full)
        done = r
        counts.append(popcount(x))
    return counts


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
    if not last and x[0].numel() and x.shape[-1] % 8 == 0:
        return _or_slices(_words(x, torch.int64), axis, factor).view(torch.bool)
    return _or_slices(x, axis, factor)


def _or_slices(x: Tensor, axis: int, factor: int) -> Tensor:
    parts = x.unflatten(axis, (-1, factor)).unbind(axis + 1)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    return joined


def _words(x: Tensor, word: torch.dtype) -> Tensor:
    """Read a boolean tensor, whose rows are whole words, as `(..., n / bytes)` integers."""
    if x.storage_offset() % word.itemsize:
        x = x.clone(memory_format=torch.contiguous_format)
    # Flat in between: an axis of length one may have any stride, which a view as words would refuse.
    return x.reshape(-1).view(word).view(*x.shape[:-1], x.shape[-1] // word.itemsize)


def popcount(x: Tensor) -> Tensor:
    """Count the true cells of each sample, eight to a word: `(batch,)`, int64."""
    x = x.flatten(1)
    m = x.shape[1]
    block = 1024 if m > 1024 else 8
    if m % block:
        x = pad(x, [0, -m % block])
    # 128 words add up without a carry from byte to byte; their bytes are then added in pairs, and in fours.
    words = _words(x, torch.int64).unflatten(1, (-1, block // 8)).sum(2)
    pairs = (words & _LOW_BYTES) + ((words >> 8) & _LOW_BYTES)
    return (((pairs * _ONES) >> 48) & 0xFFFF).sum(1)


_LOW_BYTES = 0x00FF00FF00FF00FF
_ONES = 0x0001000100010001


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


def occupied(image: Tensor, r: int, shifts: Sequence[int], full: bool) -> Tensor:
    """Count occupied boxes of side `r` on a shifted grid from the integral image `(batch, n_i + 1)`."""
    for axis in range(len(shifts), 0, -1):  # the first axis is the innermost in memory
        n, start = image.shape[axis] - 1, -shifts[axis - 1] % r
        if full:
            edges = image.narrow(axis, min(start, n), n + 1 - min(start, n))[_every(axis, r)]
        else:
            inner = image.narrow(axis, start, max(0, n - start))[_every(axis, r)] if start < n else None
            parts = [image.narrow(axis, 0, int(start > 0)), inner, image.narrow(axis, n, 1)]
            edges = torch.cat([part for part in parts if part is not None], axis)
        image = edges.diff(dim=axis)
    return popcount(image.to(torch.bool))


def _every(axis: int, r: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(None, None, r),)
