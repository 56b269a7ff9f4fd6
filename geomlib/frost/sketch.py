"""Quantiles of a stream in bounded memory: the KLL sketch that turns halting scores into a threshold.

A sketch keeps a few hundred of the values it has seen; an item of level `i` stands for `2**i` of them. When
it holds too many, a level is sorted and every second item moves up, the offset decided by a coin, so the
rank of any value is off by at most the weight of one item each time, and errors cancel on average (Karnin,
Lang and Liberty, arXiv 1603.05346; arXiv 2601.19551, section 4.4, cites its variant with deletions).

Written here rather than taken from a package of sketches, because the library stands on torch, numpy, scipy
and safetensors alone; :class:`QuantileSketch` is all that the rest of it asks of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["KLLSketch", "QuantileSketch"]

# Capacity of a level relative to that of the next one up.
DECAY = 2 / 3
STATE = ("k", "n", "dropped", "extremes", "sizes", "items", "generator")


@runtime_checkable
class QuantileSketch(Protocol):
    """What halting needs of a sketch; any class with these members will do."""

    @property
    def n(self) -> int:
        """How many values it has taken."""

    @property
    def dropped(self) -> int:
        """How many it has refused because they were not finite."""

    def update(self, values: Tensor) -> None:
        """Take every value of a tensor."""

    def quantile(self, q: float) -> float:
        """Return a value below or at which a share `q` of the values lies."""

    def rank(self, value: float) -> float:
        """Return how many values lie at or below `value`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything it knows, as tensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the sketch whose state this is."""


class KLLSketch:
    r"""Karnin-Lang-Liberty quantile sketch.

    Parameters
    ----------
    k
        Capacity of the top level, at least 8. Ranks are off by about `1.65 n / k` in the worst of many, and
        about `3 k` values are kept.
    generator
        Seeds the sketch's own coin, on the CPU.

    Attributes
    ----------
    n, dropped : int
        Values taken, and values refused because they were NaN or infinite.
    minimum, maximum : float
        Exact; infinite as long as `n = 0`.

    Raises
    ------
    ValueError
        If `k` is too small.

    Notes
    -----
    Source: arXiv 1603.05346. A tensor is taken as a whole: it joins level 0 and what exceeds the budget is
    compacted level by level, each with one sort. Compacting many items at once costs no more accuracy than
    compacting a few, because every second item of a sorted list is taken whatever its length. Values on an
    accelerator are copied to the host, which waits for them once per tensor.

    Examples
    --------
    >>> sketch = KLLSketch(generator=torch.Generator().manual_seed(0))
    >>> sketch.update(torch.arange(100_000.0))
    >>> sketch
    KLLSketch(k=200, n=100000, kept=392)
    >>> abs(sketch.quantile(0.5) - 50_000) < 1_000
    True
    """

    def __init__(self, k: int = 200, generator: torch.Generator | None = None) -> None:
        if k < 8:
            raise ValueError(f"k must be at least 8, got {k}: the ranks would be mostly error")
        self.k, self.n, self.dropped = k, 0, 0
        self.minimum, self.maximum = math.inf, -math.inf
        self._levels: list[NDArray[np.float64]] = [np.empty(0)]
        self._coin = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def __repr__(self) -> str:
        return f"KLLSketch(k={self.k}, n={self.n}, kept={sum(map(len, self._levels))})"

    def update(self, values: Tensor) -> None:
        """Take every value of a tensor of any shape and floating dtype; NaN and infinities are counted only.

        Raises
        ------
        ValueError
            If the tensor is not floating point.
        """
        if not values.is_floating_point():
            raise ValueError(f"values must be floating point, got {values.dtype}: scores are logits")
        array = values.detach().cpu().to(torch.float64).flatten().numpy()
        finite = array[np.isfinite(array)]
        self.dropped += len(array) - len(finite)
        if len(finite) == 0:
            return
        self.n += len(finite)
        self.minimum = min(self.minimum, float(finite.min()))
        self.maximum = max(self.maximum, float(finite.max()))
        self._levels[0] = np.concatenate([self._levels[0], finite])
        self._compact()

    def merge(self, other: KLLSketch) -> None:
        """Take everything that another sketch has taken; that one stays as it is.

        Raises
        ------
        ValueError
            If `other` has another `k`: its error would become that of this one.

        Examples
        --------
        >>> first, second = KLLSketch(), KLLSketch()
        >>> first.update(torch.tensor([1.0, 2.0]))
        >>> second.update(torch.tensor([3.0]))
        >>> first.merge(second)
        >>> first.n, first.quantile(0.5), first.maximum
        (3, 2.0, 3.0)
        """
        if other.k != self.k:
            raise ValueError(f"both sketches must have the same k, got {self.k} and {other.k}: errors differ")
        self.n += other.n
        self.dropped += other.dropped
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        while len(self._levels) < len(other._levels):
            self._levels.append(np.empty(0))
        for i, items in enumerate(other._levels):
            self._levels[i] = np.concatenate([self._levels[i], items])
        self._compact()

    def quantile(self, q: float) -> float:
        """Return the smallest kept value whose rank is at least `q n`; the exact extremes at 0 and 1.

        Raises
        ------
        ValueError
            If `q` lies outside [0, 1], or nothing has been taken yet.

        Examples
        --------
        >>> sketch = KLLSketch()
        >>> sketch.update(torch.tensor([4.0, 1.0, 3.0, 2.0]))
        >>> sketch.quantile(0.0), sketch.quantile(0.5), sketch.quantile(1.0)
        (1.0, 2.0, 4.0)
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must lie in [0, 1], got {q}: it is a share of the values")
        if self.n == 0:
            raise ValueError("the sketch must have taken a value before a quantile is asked for, got none")
        if q in (0, 1):
            return self.maximum if q else self.minimum
        values, ranks = self._table()
        return float(values[min(int(np.searchsorted(ranks, q * self.n)), len(values) - 1)])

    def rank(self, value: float) -> float:
        """Return the number of values at or below `value`, up to the error of the sketch.

        Examples
        --------
        >>> sketch = KLLSketch()
        >>> sketch.update(torch.tensor([4.0, 1.0, 3.0, 2.0]))
        >>> sketch.rank(2.5)
        2.0
        """
        values, ranks = self._table()
        below = int(np.searchsorted(values, value, side="right"))
        return float(ranks[below - 1]) if below else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything, the state of the coin included, as tensors on the CPU.

        Examples
        --------
        >>> sorted(KLLSketch().state_dict())
        ['dropped', 'extremes', 'generator', 'items', 'k', 'n', 'sizes']
        """
        return {
            "k": torch.tensor(self.k),
            "n": torch.tensor(self.n),
            "dropped": torch.tensor(self.dropped),
            "extremes": torch.tensor([self.minimum, self.maximum], dtype=torch.float64),
            "sizes": torch.tensor([len(level) for level in self._levels]),
            "items": torch.from_numpy(np.concatenate(self._levels)),
            "generator": self._coin.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the sketch whose state this is; it goes on exactly as that one would.

        Raises
        ------
        ValueError
            If an entry is missing or they do not fit together.

        Examples
        --------
        >>> sketch, other = KLLSketch(), KLLSketch(k=50)
        >>> sketch.update(torch.arange(10.0))
        >>> other.load_state_dict(sketch.state_dict())
        >>> other
        KLLSketch(k=200, n=10, kept=10)
        """
        if missing := [name for name in STATE if name not in state]:
            raise ValueError(f"state must hold {', '.join(STATE)}, got none of {', '.join(missing)}")
        sizes, items = [int(size) for size in state["sizes"]], state["items"].to(torch.float64)
        weight = sum(size << i for i, size in enumerate(sizes))
        if sum(sizes) != len(items) or weight != int(state["n"]):
            raise ValueError(
                f"state must be that of one sketch, got {len(items)} items of weight {weight} for sizes "
                f"{sizes} and n {int(state['n'])}: ranks would be wrong"
            )
        self.k, self.n, self.dropped = (int(state[name]) for name in ("k", "n", "dropped"))
        self.minimum, self.maximum = state["extremes"].tolist()
        self._levels = [part.numpy().copy() for part in items.cpu().split(sizes)]
        self._coin.set_state(state["generator"].cpu())

    def _capacity(self, level: int) -> int:
        return max(2, math.ceil(self.k * DECAY ** (len(self._levels) - 1 - level)))

    def _compact(self) -> None:
        """Promote every second item of the lowest full level until the whole fits its budget."""
        while sum(map(len, self._levels)) > sum(self._capacity(i) for i in range(len(self._levels))):
            i = next(i for i, items in enumerate(self._levels) if len(items) >= self._capacity(i))
            if i + 1 == len(self._levels):
                self._levels.append(np.empty(0))
            items = np.sort(self._levels[i])
            offset, end = torch.randint(2, (2,), generator=self._coin).tolist()
            # Of an odd number one end stays behind, as the coin says: always the same would bias the rest.
            pairs = len(items) // 2 * 2
            first = end * (len(items) - pairs)
            self._levels[i + 1] = np.concatenate(
                [self._levels[i + 1], items[first : first + pairs][offset::2]]
            )
            self._levels[i] = np.delete(items, slice(first, first + pairs))

    def _table(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the kept values in order and the rank of each."""
        weights = [np.full(len(items), 2.0**i) for i, items in enumerate(self._levels)]
        values = np.concatenate(self._levels)
        order = values.argsort(kind="stable")
        return values[order], np.concatenate(weights)[order].cumsum()
