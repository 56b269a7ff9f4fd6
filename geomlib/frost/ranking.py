r"""Which states are good: ranks of task losses, and the losses that teach a linear head to order them.

A state `(i, t)` is sample `i` after `t` steps; its quality is the task loss of its readout. All `N T` states
of a batch are ranked together, the lower share `E` is called easy, the upper share `H` hard, and the halting
scores `s = sigmoid(z)` are asked to be larger on `E` than on `H` (arXiv 2601.19551, section 4, (19)-(24)).

Nothing here waits for the device: sets are masks, so no size depends on the data.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from geomlib.frost.unrolled import Trajectory

__all__ = [
    "HaltingLoss",
    "LossParts",
    "RankLosses",
    "feature_ranks",
    "plackett_luce",
    "rank_losses",
    "step_losses",
]

Pairs = Literal["global", "per_step", "sample"]
Kind = Literal["hinge", "ranknet", "listmle"]
Target = Literal["loss", "regret"]


class RankLosses(NamedTuple):
    """The two rank losses, scalars that carry gradient to the scores alone.

    Attributes
    ----------
    relative
        Asks for the order: easy states above hard ones.
    absolute
        Anchors the scores: easy states at 1, hard ones at 0.
    """

    relative: Tensor
    absolute: Tensor


class LossParts(NamedTuple):
    """The terms of the last :class:`HaltingLoss`, before their weights; detached scalars on the device."""

    task: Tensor
    relative: Tensor
    absolute: Tensor


def step_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every state, detached.

    Parameters
    ----------
    logits
        `(N, T, K)`.
    y
        Classes `(N,)`, int64.

    Returns
    -------
    Tensor
        `(N, T)`, at least float32.

    Raises
    ------
    ValueError
        If shapes do not fit, the batch is empty, or a label is out of range. Labels on an accelerator are
        left to its own check, because reading them would wait for it.

    Notes
    -----
    Source: arXiv 2601.19551, section 4.1: the quality of a state is the task loss of its readout.

    Examples
    --------
    >>> step_losses(torch.zeros(1, 2, 4), torch.tensor([3]))
    tensor([[1.3863, 1.3863]])
    """
    check_labels(logits, y)
    return state_losses(logits.detach(), y)


def feature_ranks(losses: Tensor) -> Tensor:
    """Return the rank of every state among all, 0 for the lowest loss.

    Ties keep the order of the states; losses that are not finite come last, in that order.

    Parameters
    ----------
    losses
        `(N, T)`, any shape in fact.

    Returns
    -------
    Tensor
        int64, same shape, a permutation of `0 ... N T - 1`.

    Notes
    -----
    Source: arXiv 2601.19551, section 4.2. Ranks do not change under an increasing map of the losses.

    Examples
    --------
    >>> feature_ranks(torch.tensor([[0.3, 0.1], [torch.nan, 0.1]]))
    tensor([[2, 0],
            [3, 1]])
    """
    return _positions(_order(losses.detach().flatten())).view(losses.shape)


def plackett_luce(scores: Tensor) -> Tensor:
    """Return the log-probability of the order in which the scores stand, best first.

    One item after the other is drawn without replacement with probability proportional to `exp(score)`.

    Parameters
    ----------
    scores
        `(..., n)`.

    Returns
    -------
    Tensor
        `(...)`.

    Notes
    -----
    Source: the Plackett-Luce model; its negative is ListMLE.

    Examples
    --------
    >>> plackett_luce(torch.zeros(3)).exp()  # each of the 3! orders is as likely
    tensor(0.1667)
    """
    # logcumsumexp from the back: the items that are still to be drawn.
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (scores - remaining).sum(-1)


def rank_losses(
    losses: Tensor,
    scores: Tensor,
    *,
    pairs: Pairs = "global",
    kind: Kind = "hinge",
    target: Target = "loss",
    share: float = 0.5,
    margin: float = 0.2,
    cap: int = 512,
    generator: torch.Generator | None = None,
) -> RankLosses:
    r"""Return how far the scores are from the order of the losses.

    Parameters
    ----------
    losses
        `(N, T)`; no gradient goes there. States whose loss is not finite rank last and are never easy.
    scores
        Halting logits `z` `(N, T)`.
    pairs
        Which states are compared. `"global"`: any with any, the only reading that orders early against late
        states. `"per_step"`: states of the same step, in sets of the common ranking. `"sample"`: samples by
        their mean rank, the same sets at every step.
    kind
        `"hinge"`: `max(0, s_H - s_E + margin)` on `s = sigmoid(z)`, exact over all pairs. `"ranknet"`:
        `log(1 + exp(z_H - z_E))` over sampled pairs. `"listmle"`: the negative log-probability of the whole
        order, per item.
    target
        `"loss"` ranks the loss of a state, `"regret"` what it exceeds the loss at the last step by: hopeless
        samples are then not hard, since more steps do not help them.
    share
        Size of the easy and of the hard set as a share of all states, in (0, 0.5]; at least one state each.
    margin
        Of the hinge.
    cap
        For RankNet, which needs a table of pairs: at most `2 cap` states (samples where the sets are those of
        a step) are drawn, in each set about `cap`.
    generator
        Draws them, on the CPU.

    Returns
    -------
    RankLosses
        Both zero, and still attached to `scores`, where there are no two things to compare.

    Raises
    ------
    ValueError
        For shapes that do not fit, an empty batch, unknown names, or numbers out of range.

    Notes
    -----
    Source: arXiv 2601.19551, (22) and (23). Equation (23) is printed without the minus sign of a
    cross-entropy and would turn the scores upside down; what stands here is
    `-(mean_E log s + mean_H log(1 - s))`, on logits. Sums over steps are means, so that `T` does not change
    the weight. Reconstructed: the three readings (the sets carry no step index in print), share and margin
    (not given), RankNet on logits, because scores in (0, 1) could not move apart by more than 1, and the
    regret.

    The hinge costs `O(n log n)` for all pairs: with the order known, a score enters with the number of its
    active pairs.

    Examples
    --------
    >>> losses = torch.tensor([[2.0, 0.1], [1.5, 0.2]])
    >>> ordered = rank_losses(losses, torch.tensor([[-9.0, 9.0], [-9.0, 9.0]]))
    >>> reversed = rank_losses(losses, torch.tensor([[9.0, -9.0], [9.0, -9.0]]))
    >>> ordered.relative, reversed.relative
    (tensor(0.), tensor(1.1998))
    """
    _check_options(losses, scores, pairs, kind, target, share, margin, cap)
    quality = losses.detach()
    if target == "regret":
        quality = quality - quality[:, -1:]
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    size = len(losses) if pairs == "sample" else losses.numel()
    if size < 2:
        return RankLosses(scores.sum() * 0, scores.sum() * 0)
    easy, hard, rank = _sets(quality, pairs, max(1, int(share * size)))
    columns = scores
    if pairs == "global":
        # One column that holds all states: the other readings have a column per step.
        easy, hard, rank, columns = (value.reshape(-1, 1) for value in (easy, hard, rank, scores))
    if kind == "listmle":
        relative = -plackett_luce(columns.gather(0, rank.argsort(dim=0)).T).mean() / len(columns)
    elif kind == "hinge":
        relative = _hinge(columns.sigmoid(), easy, hard, margin)
    else:
        if len(columns) > 2 * cap:
            drawn = torch.randperm(len(columns), generator=generator)[: 2 * cap].to(columns.device)
            relative = _ranknet(columns[drawn], easy[drawn], hard[drawn])
        else:
            relative = _ranknet(columns, easy, hard)
    return RankLosses(relative, _absolute(columns, easy, hard))


class HaltingLoss:
    r"""Task loss plus rank losses of a trajectory: `task + 0.7 relative + 0.3 absolute`.

    Parameters
    ----------
    relative, absolute
        Weights of the two rank losses.
    supervise
        `"last"`: the task loss is that of the last step. `"all"`: the mean over the steps (deep supervision);
        the model must then keep the gradient of all its readouts, `model(x, supervise="all")`.
    pairs, kind, target, share, margin, cap, generator
        See :func:`rank_losses`.

    Attributes
    ----------
    last : LossParts or None
        The terms of the last call, detached and still on the device.
    dropped : Tensor or None
        How many samples have been left out of the task loss so far because theirs was not finite.

    Raises
    ------
    ValueError
        If an option is out of range; when called, for what :func:`step_losses` refuses.

    Notes
    -----
    Source: arXiv 2601.19551, (21)-(24) and its footnote 2 for the weights. The paper says both that halting
    gradients are kept from the backbone (section 4.3) and that they reach it (5.3); they do, unless the model
    detaches its scores.

    Examples
    --------
    >>> loss = HaltingLoss(pairs="global")
    >>> trajectory = Trajectory(torch.zeros(3, 2, 4), torch.zeros(3, 2), state=torch.zeros(3, 5))
    >>> loss(trajectory, torch.tensor([0, 1, 2]))
    tensor(1.9422)
    >>> loss.last
    LossParts(task=tensor(1.3863), relative=tensor(0.2000), absolute=tensor(1.3863))
    """

    def __init__(
        self,
        relative: float = 0.7,
        absolute: float = 0.3,
        *,
        supervise: Literal["last", "all"] = "last",
        pairs: Pairs = "global",
        kind: Kind = "hinge",
        target: Target = "loss",
        share: float = 0.5,
        margin: float = 0.2,
        cap: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in {"relative": relative, "absolute": absolute}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name} must be finite and at least 0, got {value}: the order would be unlearned"
                )
        if supervise not in ("last", "all"):
            raise ValueError(f"supervise must be last or all, got {supervise!r}: it names no steps")
        probe = torch.zeros(1, 1)
        _check_options(probe, probe, pairs, kind, target, share, margin, cap)
        self.relative, self.absolute, self.supervise = relative, absolute, supervise
        self.pairs, self.kind, self.target = pairs, kind, target
        self.share, self.margin, self.cap, self.generator = share, margin, cap, generator
        self.last: LossParts | None = None
        self.dropped: Tensor | None = None

    def __call__(self, trajectory: Trajectory, y: Tensor) -> Tensor:
        """Return the loss of a trajectory, a scalar.

        Parameters
        ----------
        trajectory
            What a model of this room returns.
        y
            Classes `(N,)`.
        """
        logits = trajectory.logits
        check_labels(logits, y)
        supervised = logits[:, -1:] if self.supervise == "last" else logits
        task = self._task(supervised, y)
        losses = state_losses(logits.detach(), y)
        relative, absolute = rank_losses(
            losses,
            trajectory.scores,
            pairs=self.pairs,
            kind=self.kind,
            target=self.target,
            share=self.share,
            margin=self.margin,
            cap=self.cap,
            generator=self.generator,
        )
        self.last = LossParts(task.detach(), relative.detach(), absolute.detach())
        return task + self.relative * relative + self.absolute * absolute

    def _task(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the samples whose loss is finite, and count the others."""
        finite = torch.isfinite(state_losses(logits.detach(), y)).all(1)
        # Replaced before the loss, not after it: a masked NaN still has a NaN for a gradient.
        safe = torch.where(finite[:, None, None], logits, logits.new_zeros(()))
        losses = state_losses(safe, y).mean(1) * finite
        missing = (~finite).sum()
        self.dropped = missing if self.dropped is None else self.dropped.to(missing.device) + missing
        if logits.device.type == "cpu" and int(missing):
            warnings.warn(
                f"{int(missing)} of {len(y)} samples have a loss that is not finite and were left out: the "
                "model may be diverging",
                RuntimeWarning,
                stacklevel=3,
            )
        return losses.sum() / finite.sum().clamp(min=1)


def state_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every state with its gradient, `(N, T)`, at least float32."""
    n, steps, classes = logits.shape
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    repeated = y.unsqueeze(1).expand(n, steps).reshape(-1)
    return cross_entropy(logits.reshape(-1, classes), repeated, reduction="none").view(n, steps)


def _order(values: Tensor) -> Tensor:
    """Return the states by increasing value, those without a finite one last; ties keep their order."""
    return torch.where(torch.isfinite(values), values, math.inf).argsort(dim=0, stable=True)


def _positions(order: Tensor) -> Tensor:
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def _sets(quality: Tensor, pairs: Pairs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks of easy and hard states, and the ranks that made them, all `(N, T)`."""
    if pairs == "sample":
        sums = feature_ranks(quality).sum(1)
        rank = _positions(sums.argsort(stable=True)).unsqueeze(1).expand(quality.shape)
        total = len(quality)
    else:
        rank = feature_ranks(quality)
        total = quality.numel()
    return (rank < k) & torch.isfinite(quality), rank >= total - k, rank


def _hinge(s: Tensor, easy: Tensor, hard: Tensor, margin: float) -> Tensor:
    """Return the mean of `max(0, s_H - s_E + margin)` over the pairs of each column, averaged over columns.

    A pair is active where `s_E - margin < s_H`. The sum is linear in the scores as long as the active pairs
    stay the same, so counting them, on detached values, gives both the value and the gradient.
    """
    value = s.detach().T.contiguous()  # (columns, rows): searchsorted works along the last dimension
    keys = (value - margin).masked_fill(~easy.T, math.inf)
    hards = value.masked_fill(~hard.T, -math.inf)
    below = torch.searchsorted(hards.sort(dim=1).values, keys, right=True)
    against_easy = (len(s) - below).T.to(s.dtype) * easy  # hard states above this easy one's key
    against_hard = torch.searchsorted(keys.sort(dim=1).values, hards).T.to(s.dtype) * hard
    total = (s * (against_hard - against_easy) + margin * against_easy).sum(0)
    return (total / (easy.sum(0) * hard.sum(0)).clamp(min=1)).mean()


def _ranknet(z: Tensor, easy: Tensor, hard: Tensor) -> Tensor:
    pair = easy.unsqueeze(1) & hard.unsqueeze(0)  # (easy, hard, columns)
    total = (softplus(z.unsqueeze(0) - z.unsqueeze(1)) * pair).sum((0, 1))
    return (total / pair.sum((0, 1)).clamp(min=1)).mean()


def _absolute(z: Tensor, easy: Tensor, hard: Tensor) -> Tensor:
    up = (logsigmoid(z) * easy).sum(0) / easy.sum(0).clamp(min=1)
    down = (logsigmoid(-z) * hard).sum(0) / hard.sum(0).clamp(min=1)
    return -(up + down).mean()


def check_labels(logits: Tensor, y: Tensor) -> None:
    """Refuse logits `(N, T, K)` and classes `(N,)` that do not fit; labels are looked at on the CPU only."""
    if logits.ndim != 3 or y.ndim != 1 or len(y) != len(logits):
        raise ValueError(
            f"logits (N, T, K) and y (N,) must fit, got {tuple(logits.shape)} and {tuple(y.shape)}: a state "
            "would have no label"
        )
    if logits.numel() == 0:
        raise ValueError(f"logits must not be empty, got {tuple(logits.shape)}: there is no mean loss")
    if y.dtype != torch.int64:
        raise ValueError(f"y must be int64 classes, got {y.dtype}: they index the logits")
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[2]:
        raise ValueError(
            f"y must lie in 0 ... {logits.shape[2] - 1}, got {int(y.min())} ... {int(y.max())}: there are no "
            "logits for it"
        )


def _check_options(
    losses: Tensor,
    scores: Tensor,
    pairs: Pairs,
    kind: Kind,
    target: Target,
    share: float,
    margin: float,
    cap: int,
) -> None:
    if losses.ndim != 2 or losses.shape != scores.shape or losses.numel() == 0:
        raise ValueError(
            f"losses and scores must both be (N, T) and not empty, got {tuple(losses.shape)} and "
            f"{tuple(scores.shape)}: states and scores would not match"
        )
    for name, value, known in (
        ("pairs", pairs, ("global", "per_step", "sample")),
        ("kind", kind, ("hinge", "ranknet", "listmle")),
        ("target", target, ("loss", "regret")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}: it names no loss")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must lie in (0, 0.5], got {share}: a state would be easy and hard at once")
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be finite and at least 0, got {margin}: ordered pairs would be pushed")
    if cap < 1:
        raise ValueError(f"cap must be at least 1, got {cap}: no pair would be drawn")
