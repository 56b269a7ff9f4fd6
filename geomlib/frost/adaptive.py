r"""Adaptive computation time and PonderNet on the trajectories of this room: rivals that learn when to stop.

Both read the halting logits `z_t` as probabilities of stopping and weigh the answers of all steps, so the
model has to keep the gradient of all its readouts (`supervise="all"`). Adaptive computation time (Graves,
arXiv 1603.08983) answers with a mean over steps and pays for each; PonderNet (Banino, Balaguer and Blundell,
arXiv 2107.05407) draws the step, and holds its law close to a geometric one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from geomlib.frost.curves import logits_at
from geomlib.frost.ranking import check_labels, state_losses
from geomlib.frost.unrolled import Trajectory

__all__ = ["ACTLoss", "Answer", "PonderLoss", "act_answer", "act_weights", "ponder_answer", "ponder_law"]


class Answer(NamedTuple):
    """What a rule that weighs steps answers.

    Attributes
    ----------
    logits
        `(N, K)`.
    depth
        Steps taken `(N,)`, int64.
    """

    logits: Tensor
    depth: Tensor


def act_weights(scores: Tensor, *, epsilon: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the weights of the steps, the depth, and the remainder of adaptive computation time.

    With `p_t = sigmoid(z_t)` the depth `N` is the first step at which `p_1 + ... + p_N >= 1 - epsilon`, the
    last one at the latest. Steps before `N` weigh `p_t`, step `N` the remainder `R = 1 - sum_(t<N) p_t`.

    Parameters
    ----------
    scores
        Halting logits `(N, T)`.
    epsilon
        In (0, 1); it lets one step be enough.

    Returns
    -------
    weights, depth, remainder : Tensor
        `(N, T)` with rows that add up to 1, `(N,)` int64, `(N,)`.

    Raises
    ------
    ValueError
        If `epsilon` is out of range or the shape is not `(N, T)`.

    Notes
    -----
    Source: arXiv 1603.08983, section 2.

    Examples
    --------
    >>> weights, depth, remainder = act_weights(torch.tensor([[0.0, 0.0, 0.0]]))
    >>> weights, depth, remainder
    (tensor([[0.5000, 0.5000, 0.0000]]), tensor([2]), tensor([0.5000]))
    """
    _check_scores(scores)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie in (0, 1), got {epsilon}: no step could be the last")
    p = scores.sigmoid()
    steps = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    total = p.cumsum(1)
    depth = ((total < 1 - epsilon).sum(1) + 1).clamp(max=len(steps))
    before = p * (steps < depth.unsqueeze(1))
    remainder = 1 - before.sum(1)
    return before + remainder.unsqueeze(1) * (steps == depth.unsqueeze(1)), depth, remainder


def act_answer(trajectory: Trajectory, *, epsilon: float = 0.01) -> Answer:
    """Return the weighted mean of the logits, and the depth, of adaptive computation time.

    Examples
    --------
    >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    >>> act_answer(Trajectory(logits, torch.zeros(1, 3), torch.zeros(1, 4)))
    Answer(logits=tensor([[2., 1.]]), depth=tensor([2]))
    """
    weights, depth, _ = act_weights(trajectory.scores, epsilon=epsilon)
    return Answer((weights.unsqueeze(2) * trajectory.logits).sum(1), depth)


class ACTLoss:
    r"""Cross-entropy of the mean answer plus `tau` times the ponder cost `N + R`.

    Parameters
    ----------
    tau
        Price of a step, at least 0.
    epsilon
        See :func:`act_weights`.

    Raises
    ------
    ValueError
        If an argument is out of range; when called, for logits and labels that do not fit.

    Notes
    -----
    Source: arXiv 1603.08983, section 2. The depth is constant between jumps, so the cost is felt through the
    remainder alone; large prices are known to drive all samples to one or two steps.

    Examples
    --------
    >>> trajectory = Trajectory(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 5))
    >>> ACTLoss(tau=0.01)(trajectory, torch.tensor([0, 1]))  # log 4 + 0.01 (2 + 0.5)
    tensor(1.4113)
    """

    def __init__(self, tau: float = 1e-2, *, epsilon: float = 0.01) -> None:
        if not (math.isfinite(tau) and tau >= 0):
            raise ValueError(f"tau must be finite and at least 0, got {tau}: steps would be rewarded")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie in (0, 1), got {epsilon}: no step could be the last")
        self.tau, self.epsilon = tau, epsilon

    def __call__(self, trajectory: Trajectory, y: Tensor) -> Tensor:
        """Return the loss of a trajectory that keeps the gradient of all its readouts."""
        check_labels(trajectory.logits, y)
        weights, depth, remainder = act_weights(trajectory.scores, epsilon=self.epsilon)
        answer = (weights.unsqueeze(2) * trajectory.logits).sum(1)
        return cross_entropy(answer, y) + self.tau * (depth + remainder).mean()


def ponder_law(scores: Tensor) -> Tensor:
    r"""Return the log-probabilities of stopping at each step, `log g_t + sum_(j<t) log(1 - g_j)`.

    The last step takes what is left, so that each row is a distribution.

    Parameters
    ----------
    scores
        Halting logits `(N, T)`, `g = sigmoid(z)`.

    Returns
    -------
    Tensor
        `(N, T)`.

    Notes
    -----
    Source: arXiv 2107.05407, section 2; sums of logarithms, because products of many `1 - g` vanish.

    Examples
    --------
    >>> ponder_law(torch.zeros(1, 3)).exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    _check_scores(scores)
    left = logsigmoid(-scores[:, :-1]).cumsum(1)
    left = torch.cat([torch.zeros_like(scores[:, :1]), left], 1)
    stop = torch.cat([logsigmoid(scores[:, :-1]), torch.zeros_like(scores[:, :1])], 1)
    return left + stop


def ponder_answer(trajectory: Trajectory, *, generator: torch.Generator | None = None) -> Answer:
    """Draw the step of each sample from its law, and answer with the readout there.

    Parameters
    ----------
    trajectory
        Of any model of this room.
    generator
        Draws, on the CPU.

    Examples
    --------
    >>> scores = torch.tensor([[-40.0, 40.0, 0.0]])
    >>> ponder_answer(Trajectory(torch.zeros(1, 3, 2), scores, torch.zeros(1, 4))).depth
    tensor([2])
    """
    total = ponder_law(trajectory.scores.detach()).exp().cumsum(1)
    coin = torch.rand(len(total), 1, generator=generator).to(total)
    # The last step takes the rest, rounding included.
    depth = (total[:, :-1] <= coin).sum(1) + 1
    return Answer(logits_at(trajectory, depth), depth)


class PonderLoss:
    r"""Expected loss over the drawn step, plus `beta` times the divergence from a geometric law.

    Parameters
    ----------
    beta
        Weight of the divergence, at least 0.
    prior
        Probability of stopping at each step under the geometric law, in (0, 1); `1 / prior` is its mean depth
        before it is cut off at the last step and renormalised.

    Raises
    ------
    ValueError
        If an argument is out of range; when called, for logits and labels that do not fit.

    Notes
    -----
    Source: arXiv 2107.05407, section 2. Defaults: reconstructed, a mean depth of six.

    Examples
    --------
    >>> trajectory = Trajectory(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 5))
    >>> PonderLoss(beta=0.0)(trajectory, torch.tensor([0, 1]))  # log 4 at every step
    tensor(1.3863)
    """

    def __init__(self, beta: float = 0.01, *, prior: float = 1 / 6) -> None:
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta must be finite and at least 0, got {beta}: the prior would repel")
        if not 0 < prior < 1:
            raise ValueError(f"prior must lie in (0, 1), got {prior}: it is a probability of stopping")
        self.beta, self.prior = beta, prior

    def __call__(self, trajectory: Trajectory, y: Tensor) -> Tensor:
        """Return the loss of a trajectory that keeps the gradient of all its readouts."""
        check_labels(trajectory.logits, y)
        log_p = ponder_law(trajectory.scores)
        p = log_p.exp()
        divergence = (p * (log_p - self._log_prior(log_p))).sum(1)
        return ((p * state_losses(trajectory.logits, y)).sum(1) + self.beta * divergence).mean()

    def _log_prior(self, like: Tensor) -> Tensor:
        steps = like.shape[1]
        waiting = torch.arange(steps, device=like.device, dtype=like.dtype)
        cut_off = math.log1p(-((1 - self.prior) ** steps))
        return waiting * math.log1p(-self.prior) + (math.log(self.prior) - cut_off)


def _check_scores(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"scores must be (N, T) with T at least 1, got {tuple(scores.shape)}: no step to stop at"
        )
