"""How near a learned graph is to a planted one: its edges, their weights, their phases."""

from __future__ import annotations

import torch
from torch import Tensor

from geomlib.stationary.graph import SheafGraph

__all__ = ["phase_error", "support_f1", "weight_error"]


def support_f1(weights: Tensor, truth: Tensor, threshold: float = 0.05) -> float:
    """Return the F1 score of the edges above a threshold, against those of a planted graph.

    Parameters
    ----------
    weights, truth
        `(M,)`.
    threshold
        Of `weights`; of the truth every positive weight counts.

    Examples
    --------
    >>> support_f1(torch.tensor([1.0, 0.2, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    0.6666666666666666
    """
    found, real = weights > threshold, truth > 0
    both = int((found & real).sum())
    return 2 * both / max(1, int(found.sum()) + int(real.sum()))


def weight_error(weights: Tensor, truth: Tensor) -> float:
    """Return `|w - w*| / |w*|`.

    Examples
    --------
    >>> round(weight_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])), 3)
    0.1
    """
    return float((weights - truth).norm() / truth.norm())


def phase_error(graph: SheafGraph, truth: SheafGraph) -> float:
    """Return the largest difference of phases over the edges of a planted graph, in radians.

    Raises
    ------
    ValueError
        If a graph has no phases.

    Examples
    --------
    >>> edge, one = torch.tensor([[0], [1]]), torch.ones(1)
    >>> round(phase_error(SheafGraph(2, edge, one, 3.1 * one), SheafGraph(2, edge, one, -3.1 * one)), 3)
    0.083
    """
    if graph.transport is None or truth.transport is None:
        raise ValueError("both graphs must have phases, got a plain graph")
    turn = (graph.transport - truth.transport)[truth.weights > 0]
    return float((torch.polar(torch.ones_like(turn), turn)).angle().abs().max())
