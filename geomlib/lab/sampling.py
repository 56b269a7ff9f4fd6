"""Choosing samples: subsets and held-out parts in which every class keeps its share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stratified"]


def stratified(y: Tensor, size: int | None, *, seed: int, argument: str = "size") -> Tensor:
    """Choose samples so that every class keeps its share, to within one sample.

    Parameters
    ----------
    y : Tensor
        Shape ``(n,)``, int64 labels.
    size : int or None
        How many; ``None`` for all, in their order.
    seed : int
        Same seed, same choice.
    argument : str
        What an error calls ``size``.

    Returns
    -------
    Tensor
        Shape ``(size,)``, int64 indices, shuffled.

    Raises
    ------
    ValueError
        If ``size`` is not between 1 and ``n``.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.sampling import stratified
    >>> y = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> y[stratified(y, 3, seed=0)].sort().values
    tensor([0, 0, 1])
    """
    if size is None:
        return torch.arange(len(y))
    if not 1 <= size <= len(y):
        raise ValueError(f"{argument} must lie in 1..{len(y)}, got {size}: there are no more samples")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(y)
    exact = counts.double() * size / len(y)
    share = exact.floor().long()
    # The samples left over go to the classes that rounding down cost most.
    missing = size - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:missing]] += 1
    chosen = []
    for label, wanted in enumerate(share.tolist()):
        members = (y == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    pool = torch.cat(chosen)
    return pool[torch.randperm(size, generator=generator)]
