r"""Depths that a stop rule leads to, and rules compared at equal mean depth.

With `M_t` the largest signal up to step `t`, a sample runs beyond `t` just if `M_t` does not exceed the
threshold. So the mean depth is `t_min + (T - t_min) F(threshold)`, `F` being the distribution function of all
`M_t`, `t_min <= t < T`: a target depth is a quantile, and no search is needed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.frost.rules import Rule, signals
from geomlib.frost.unrolled import Trajectory

__all__ = [
    "DepthCurve",
    "crossing_depths",
    "depth_curve",
    "depth_threshold",
    "halting_depths",
    "logits_at",
]


def crossing_depths(signal: Tensor, threshold: float, *, t_min: int = 1) -> Tensor:
    """Return the first step, from `t_min` on, at which a signal exceeds a threshold; the last if none does.

    A signal that is not finite never stops a sample.

    Parameters
    ----------
    signal
        `(N, T)`.
    threshold
        Any number but NaN; `-inf` stops all at `t_min`, `inf` none before the end.
    t_min
        In 1 ... T.

    Returns
    -------
    Tensor
        `(N,)` int64 in `t_min ... T`.

    Raises
    ------
    ValueError
        If `t_min` is out of range or the threshold is NaN.

    Examples
    --------
    >>> crossing_depths(torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1]]), 0.5)
    tensor([2, 3])
    """
    steps = signal.shape[1]
    check_threshold(threshold, t_min, steps)
    open_ = torch.isfinite(signal) & (signal > threshold)
    open_[:, : t_min - 1] = False
    open_[:, -1] = True
    # The first True: argmax of booleans is not defined on every device, a sum is.
    return (open_.cumsum(1) == 0).sum(1) + 1


def halting_depths(trajectory: Trajectory, rule: Rule | str, threshold: float, *, t_min: int = 1) -> Tensor:
    """Return the depth at which a rule stops each sample of a stored trajectory.

    Parameters
    ----------
    trajectory, rule
        See :func:`signals`.
    threshold, t_min
        See :func:`crossing_depths`.

    Returns
    -------
    Tensor
        `(N,)` int64.

    Examples
    --------
    >>> trajectory = Trajectory(torch.zeros(1, 3, 4), torch.tensor([[0.0, 2.0, 3.0]]), torch.zeros(1, 5))
    >>> halting_depths(trajectory, "score", 1.0), halting_depths(trajectory, "fixed", 2.5)
    (tensor([2]), tensor([3]))
    """
    return crossing_depths(signals(trajectory, rule), threshold, t_min=t_min)


def depth_threshold(signal: Tensor, depth: float, *, t_min: int = 1) -> float:
    """Return the threshold at which the mean depth is the largest that does not exceed `depth`.

    Parameters
    ----------
    signal
        `(N, T)`, of a calibration split.
    depth
        Mean number of steps, in `[t_min, T]`.
    t_min
        In 1 ... T.

    Returns
    -------
    float
        `-inf` and `inf` at the ends. The mean depth stays below the target by less than `(T - t_min) / N`
        unless signals of several samples are tied.

    Raises
    ------
    ValueError
        If `depth` or `t_min` is out of range, or there are no samples.

    Notes
    -----
    Source: reconstructed. The mean depth is `t_min + (T - t_min) F(threshold)` with the distribution function
    `F` of the running maxima of the signal, so this is one of their order statistics. The paper's quantile
    level is one of the scores, which says nothing about depth by itself.

    Examples
    --------
    >>> signal = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1]])
    >>> threshold = depth_threshold(signal, 2.5)
    >>> crossing_depths(signal, threshold).float().mean()
    tensor(2.5000)
    """
    steps = signal.shape[1]
    check_threshold(0.0, t_min, steps)
    if signal.numel() == 0:
        raise ValueError(f"signal must hold samples, got {tuple(signal.shape)}: no depth could be predicted")
    if not t_min <= depth <= steps:
        raise ValueError(f"depth must lie in [{t_min}, {steps}], got {depth}: no threshold gives it")
    if depth == steps:
        return math.inf
    ordered = _running_maxima(signal, t_min).flatten().sort().values
    running = math.floor((depth - t_min) * len(signal) + 1e-9)
    if running == 0:
        return -math.inf
    threshold = float(ordered[running - 1])
    if running < len(ordered) and float(ordered[running]) == threshold:
        # A tie would take more steps than asked for: stay below it.
        lower = ordered[ordered < threshold]
        return float(lower[-1]) if len(lower) else -math.inf
    return threshold


def _running_maxima(signal: Tensor, t_min: int) -> Tensor:
    """Return the largest finite signal from `t_min` up to each step but the last, `(N, T - t_min)`."""
    window = signal[:, t_min - 1 : -1]
    finite = torch.where(torch.isfinite(window), window, -math.inf)
    return finite.cummax(1).values if finite.numel() else finite


def logits_at(trajectory: Trajectory, depth: Tensor) -> Tensor:
    """Return the logits `(N, K)` of each sample at its own depth `(N,)`.

    Examples
    --------
    >>> logits = torch.arange(6.0).view(1, 3, 2)
    >>> logits_at(Trajectory(logits, torch.zeros(1, 3), torch.zeros(1, 4)), torch.tensor([2]))
    tensor([[2., 3.]])
    """
    logits = trajectory.logits
    index = (depth - 1).view(-1, 1, 1).expand(-1, 1, logits.shape[2])
    return logits.gather(1, index).squeeze(1)


class DepthCurve(NamedTuple):
    """Accuracy against mean depth, one point per threshold.

    Attributes
    ----------
    depth, accuracy
        `(P,)` float64 on the CPU, by increasing depth.
    threshold
        `(P,)` float64, the smallest is `-inf`, the largest `inf`.
    """

    depth: Tensor
    accuracy: Tensor
    threshold: Tensor

    def at(self, depth: float) -> float:
        """Return the accuracy at a mean depth, linear between neighbouring points.

        A coin that chooses between the two thresholds for each sample has just that depth and that accuracy
        on average, so the value is that of a rule that exists.

        Raises
        ------
        ValueError
            If the depth lies outside the curve.

        Examples
        --------
        >>> curve = DepthCurve(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.9]), torch.tensor([0.0, 1.0]))
        >>> round(curve.at(2.0), 6)
        0.7
        """
        lowest, highest = float(self.depth[0]), float(self.depth[-1])
        if not lowest <= depth <= highest:
            raise ValueError(
                f"depth must lie in [{lowest:g}, {highest:g}], got {depth}: the curve ends there"
            )
        right = min(int(torch.searchsorted(self.depth, depth)), len(self.depth) - 1)
        left = max(right - 1, 0)
        width = float(self.depth[right] - self.depth[left])
        share = (depth - float(self.depth[left])) / width if width else 1.0
        return float(self.accuracy[left]) * (1 - share) + float(self.accuracy[right]) * share


def depth_curve(
    trajectory: Trajectory, y: Tensor, rule: Rule | str, *, points: int = 101, t_min: int = 1
) -> DepthCurve:
    """Return accuracy against mean depth of a rule, over all depths that its thresholds reach.

    Thresholds are those that give equally spaced mean depths on these very samples, which takes no labels.

    Parameters
    ----------
    trajectory, rule
        See :func:`signals`.
    y
        Classes `(N,)`.
    points
        How many depths to aim at, at least 2. Ties of the signal leave fewer.
    t_min
        In 1 ... T.

    Returns
    -------
    DepthCurve

    Raises
    ------
    ValueError
        If the sizes do not fit, `points < 2`, or `t_min` is out of range.

    Examples
    --------
    >>> logits = torch.eye(2).repeat(1, 1, 1)  # one sample: class 0 after step 1, class 1 after step 2
    >>> trajectory = Trajectory(logits, torch.zeros(1, 2), torch.zeros(1, 4))
    >>> depth, accuracy, threshold = depth_curve(trajectory, torch.tensor([1]), "fixed")
    >>> depth.tolist(), accuracy.tolist(), threshold.tolist()
    ([1.0, 2.0], [0.0, 1.0], [-inf, inf])
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}: a curve has two ends")
    if len(y) != len(trajectory.logits):
        raise ValueError(f"y must have a label for each of {len(trajectory.logits)} samples, got {len(y)}")
    signal = signals(trajectory, rule)
    steps = signal.shape[1]
    right = (trajectory.logits.detach().argmax(2) == y.unsqueeze(1)).cpu()
    signal = signal.cpu()
    found: dict[float, tuple[float, float]] = {}
    for i in range(points):
        threshold = depth_threshold(signal, t_min + (steps - t_min) * i / (points - 1), t_min=t_min)
        if threshold not in found:
            depth = crossing_depths(signal, threshold, t_min=t_min)
            hit = right.gather(1, (depth - 1).unsqueeze(1))
            found[threshold] = (depth.double().mean().item(), hit.double().mean().item())
    ordered = sorted((depth, threshold, accuracy) for threshold, (depth, accuracy) in found.items())
    depths, thresholds, accuracies = torch.tensor(ordered, dtype=torch.float64).T.contiguous()
    return DepthCurve(depths, accuracies, thresholds)


def check_threshold(threshold: float, t_min: int, steps: int) -> None:
    """Refuse a threshold that nothing exceeds by accident, and a first step outside the range."""
    if math.isnan(threshold):
        raise ValueError("threshold must be a number or infinite, got NaN: nothing would ever exceed it")
    if not 1 <= t_min <= steps:
        raise ValueError(f"t_min must lie in 1 ... {steps}, got {t_min}: no step is there to stop at")
