"""How far it is to a face of the space of graphs, and how long: closed forms for the smallest graphs.

Three geometries differ where an edge disappears. The log-det metric reaches the face in finite time, and the
toric chart makes an ordinary point of it (arXiv 2507.20088 speaks of face crossing; the comparison is ours).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geomlib.stationary.geometry import check_metric

__all__ = ["bridge_resistance", "face_clock", "toric_chart"]


def face_clock(weight: float, epsilon: float) -> tuple[float, float]:
    """Return distance and time to the face `w = 0` for one edge between two nodes.

    The time is that of the natural gradient flow `dw/dt = -1 / G` of a loss with the constant gradient 1.

    Parameters
    ----------
    weight
        Where the flow starts, at least zero.
    epsilon
        Positive.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: reconstructed (SGN-B6): `G = 4 / (2 w + epsilon)^2`. As `epsilon` goes to zero both grow without
    bound: the metric becomes that of the logarithmic barrier.

    Examples
    --------
    >>> distance, time = face_clock(1.0, 0.5)
    >>> round(distance, 4), round(time, 4)
    (1.6094, 3.2)
    """
    check_metric(epsilon)
    if weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight}: it lies behind the face")
    start = 2 * weight + epsilon
    return math.log(start / epsilon), 2 * (1 / epsilon - 1 / start)


def bridge_resistance(left: int, right: int, epsilon: float) -> float:
    """Return `(1 / left + 1 / right) / epsilon`: the resistance across a cut edge between parts so large.

    Parameters
    ----------
    left, right
        Numbers of nodes on either side, positive.
    epsilon
        Positive.

    Raises
    ------
    ValueError
        If an argument is not positive.

    Notes
    -----
    Source: reconstructed (SGN-B6), the leading term for small `epsilon`: the ground is the only way across.

    Examples
    --------
    >>> bridge_resistance(4, 5, 1e-3)
    450.0
    """
    check_metric(epsilon)
    if left < 1 or right < 1:
        raise ValueError(f"left and right must be at least 1, got {left} and {right}: a part without nodes")
    return (1 / left + 1 / right) / epsilon


def toric_chart(weights: Tensor, phases: Tensor) -> Tensor:
    """Return `c = sqrt(2 w) exp(i theta)`: the chart in which the face is an ordinary point.

    With the potential `w log(w) / 2` the metric `dw^2 / (2 w) + 2 w dtheta^2` is the flat `|dc|^2`. A loss
    that knows `|c|^2` only has no gradient at `c = 0`, so that an edge is never born.

    Parameters
    ----------
    weights
        At least zero, any shape.
    phases
        Same shape.

    Raises
    ------
    ValueError
        If a weight is negative or the shapes differ.

    Notes
    -----
    Source: known (Guillemin 1994; Abreu 1998); offered for comparison (SGN-B8).

    Examples
    --------
    >>> toric_chart(torch.tensor([0.5, 0.0]), torch.tensor([0.0, 1.0])).abs()
    tensor([1., 0.])
    """
    if weights.shape != phases.shape:
        raise ValueError(
            f"phases must have the shape {tuple(weights.shape)} of weights, got {tuple(phases.shape)}"
        )
    if bool((weights < 0).any()):
        raise ValueError(f"weights must be at least 0, got {float(weights.min())}: the chart has a root")
    return torch.polar((2 * weights).sqrt(), phases)
