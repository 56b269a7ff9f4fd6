r"""What makes a learned graph sparse: a price on every weight, and a price that large weights no longer pay.

With the log-det likelihood the plain price gives *more* edges, not fewer (Ying, Cardoso and Palomar 2020);
the minimax concave penalty (Zhang 2010) in a few linearised rounds does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["MCP", "Linear", "Penalty", "linearised_rounds"]


class Penalty(Protocol):
    """What a weight costs: a sum over edges and its derivative."""

    def value(self, weights: Tensor) -> Tensor:
        """Return the sum over edges, a scalar."""
        ...

    def derivative(self, weights: Tensor) -> Tensor:
        """Return the derivative by each weight, `(M,)`; at zero that from above."""
        ...


@dataclass(frozen=True)
class Linear:
    """Price per unit of weight: one for all edges, or one for each.

    Attributes
    ----------
    strength
        A number, or `(M,)`; at least zero.

    Raises
    ------
    ValueError
        If a price is negative.

    Examples
    --------
    >>> Linear(0.5).value(torch.tensor([1.0, 2.0]))
    tensor(1.5000)
    """

    strength: float | Tensor

    def __post_init__(self) -> None:
        if not bool((torch.as_tensor(self.strength) >= 0).all()):
            raise ValueError(f"strength must be at least 0, got {self.strength}: edges would be rewarded")

    def value(self, weights: Tensor) -> Tensor:
        """Return `sum strength w`."""
        return (self.strength * weights).sum()

    def derivative(self, weights: Tensor) -> Tensor:
        """Return the price of each edge, `(M,)`."""
        return self.strength * torch.ones_like(weights)


@dataclass(frozen=True)
class MCP:
    """Minimax concave penalty: the price falls linearly from `strength` at zero to nothing at `knee`.

    Attributes
    ----------
    strength
        At least zero.
    knee
        Positive: larger weights are free, so that they are not shrunk.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: known (Zhang 2010); `strength max(0, 1 - w / knee)` is its derivative.

    Examples
    --------
    >>> MCP(0.1, 0.3).derivative(torch.tensor([0.0, 0.15, 2.0]))
    tensor([0.1000, 0.0500, 0.0000])
    """

    strength: float
    knee: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength must be at least 0, got {self.strength}: edges would be rewarded")
        if not self.knee > 0:
            raise ValueError(f"knee must be positive, got {self.knee}: no weight would have a price")

    def value(self, weights: Tensor) -> Tensor:
        """Return the sum of `strength (w - w^2 / (2 knee))` up to the knee, constant beyond."""
        inside = weights.clamp_max(self.knee)
        return self.strength * (inside - inside.square() / (2 * self.knee)).sum()

    def derivative(self, weights: Tensor) -> Tensor:
        """Return `strength max(0, 1 - w / knee)`, `(M,)`."""
        return self.strength * (1 - weights / self.knee).clamp_min(0)

    def linearised(self, weights: Tensor) -> Linear:
        """Return the tangent prices at these weights: a convex penalty that lies above this one."""
        return Linear(self.derivative(weights))


def linearised_rounds(
    solve: Callable[[Linear, Tensor], Tensor], penalty: MCP, weights: Tensor, *, rounds: int = 4
) -> Tensor:
    """Minimise a loss under a concave penalty by solving convex problems with its tangent prices.

    Parameters
    ----------
    solve
        `solve(price, start)` returns the minimising weights `(M,)` of the loss with this linear penalty.
    penalty
        Whose tangents are taken.
    weights
        `(M,)`: where the first tangent is taken, and the first start; zeros give every edge the full price.
    rounds
        At least one; three or four suffice, since the prices hardly move afterwards.

    Returns
    -------
    Tensor
        `(M,)`, the last minimiser.

    Raises
    ------
    ValueError
        If `rounds` is less than one.

    Notes
    -----
    Source: known (local linear approximation, Zou and Li 2008); each round lowers loss plus penalty.

    Examples
    --------
    >>> target = torch.tensor([1.0, 0.05])
    >>> def shrink(price, start):  # of (w - target)^2 / 2
    ...     return (target - price.derivative(start)).clamp_min(0)
    >>> linearised_rounds(shrink, MCP(0.1, 0.3), torch.zeros(2))
    tensor([1., 0.])
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}: nothing would be solved")
    for _ in range(rounds):
        weights = solve(penalty.linearised(weights), weights)
    return weights
