r"""When to stop: rules to compare, each a signal that grows as an answer becomes worth giving.

A rule watches a sample step by step and gives a number; the sample stops at the first step, from `t_min` on,
at which the number exceeds a threshold. The rank score of arXiv 2601.19551 is one such signal, confidence,
entropy, patience and residual are its rivals, random and fixed depth the floor, and an oracle that sees the
labels the ceiling. The same objects judge stored trajectories in `curves` and stop a running batch in
`halting`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from geomlib.frost.unrolled import Trajectory

__all__ = [
    "RULES",
    "Confidence",
    "Entropy",
    "FixedDepth",
    "Oracle",
    "Patience",
    "RandomStop",
    "RankScore",
    "Residual",
    "Rule",
    "Seen",
    "signals",
]

Memory = tuple[Tensor, ...]


class Seen(NamedTuple):
    """What a rule may look at after step `t`.

    Attributes
    ----------
    t
        The step, from 1 on.
    score
        Halting logits `(n,)`.
    logits
        `(n, K)`, `None` for rules that do not read.
    state, previous
        `(n, ...)` after and before the step, `None` where states were not kept.
    """

    t: int
    score: Tensor
    logits: Tensor | None = None
    state: Tensor | None = None
    previous: Tensor | None = None


class Rule(nn.Module):
    """A signal to stop by; larger means readier.

    A subclass defines :meth:`observe`, says whether it `reads` logits (which costs a readout per step) or
    looks at `moves` of the state, and gives the arguments of its constructor as `options`, plain values from
    which a saved policy makes it anew.

    Examples
    --------
    >>> class Late(Rule):
    ...     def observe(self, seen, memory):
    ...         return seen.score + seen.t, memory
    >>> trajectory = Trajectory(torch.zeros(1, 3, 2), torch.tensor([[0.5, 0.0, 0.5]]), torch.zeros(1, 4))
    >>> signals(trajectory, Late())
    tensor([[1.5000, 2.0000, 3.5000]])
    """

    reads: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON can hold them."""
        return {}

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the signals `(n,)` after a step, and what to remember of each sample.

        Parameters
        ----------
        seen
            What the step gave.
        memory
            What the call before returned, `()` at the first step: tensors with a row per sample, so that
            samples can leave in between.
        """
        raise NotImplementedError


class RankScore(Rule):
    """The halting logit of the model, taught by ranks (arXiv 2601.19551, (19)-(20)).

    Examples
    --------
    >>> RankScore().observe(Seen(1, torch.tensor([0.3])), ())[0]
    tensor([0.3000])
    """

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the halting logits."""
        return seen.score, memory


class Confidence(Rule):
    """The largest class probability `p`, as log-odds `log(p / (1 - p))`, which does not saturate at 1.

    A threshold on `p` is one on the log-odds: the order is the same, without ties among sure answers.

    Examples
    --------
    >>> signal, _ = Confidence().observe(Seen(1, torch.zeros(1), torch.tensor([[2.0, 0.0]])), ())
    >>> signal, signal.sigmoid()
    (tensor([2.]), tensor([0.8808]))
    """

    reads = True

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the log-odds of the likeliest class."""
        return log_odds(_read(seen)), memory


class Entropy(Rule):
    """The negative entropy of the class probabilities, in nats.

    Examples
    --------
    >>> Entropy().observe(Seen(1, torch.zeros(1), torch.zeros(1, 4)), ())[0]
    tensor([-1.3863])
    """

    reads = True

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return `sum p log p`."""
        log_p = _read(seen).log_softmax(1)
        return (log_p.exp() * log_p).nan_to_num(neginf=0.0).sum(1).where(
            log_p.isfinite().any(1), math.nan
        ), memory


class Patience(Rule):
    """How many steps in a row, this one included, have predicted the same class.

    `m` equal predictions in a row are asked for by a threshold of `m - 0.5`.

    Examples
    --------
    >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> signals(Trajectory(logits, torch.zeros(1, 3), torch.zeros(1, 4)), Patience())
    tensor([[1., 1., 2.]])
    """

    reads = True

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the length of the run."""
        logits = _read(seen)
        prediction = logits.argmax(1)
        run = torch.ones_like(logits[:, 0])
        if memory:
            run = torch.where(prediction == memory[0], memory[1] + 1, run)
        return run, (prediction, run)


class Residual(Rule):
    r"""How little the state moved: `-log(|h_t - h_(t-1)| / |h_t|)`.

    A relative step below `epsilon` is asked for by a threshold of `-log(epsilon)`. A state that does not move
    has the largest finite signal.

    Examples
    --------
    >>> seen = Seen(1, torch.zeros(1), state=torch.tensor([[4.0, 0.0]]), previous=torch.tensor([[3.0, 0.0]]))
    >>> Residual().observe(seen, ())[0].neg().exp()
    tensor([0.2500])
    """

    moves = True

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the negative logarithm of the relative step."""
        if seen.state is None or seen.previous is None:
            raise ValueError("trajectory must keep its states for the residual: unroll with keep_states=True")
        state = seen.state.flatten(1)
        step = torch.linalg.vector_norm(state - seen.previous.flatten(1), dim=1)
        tiny = torch.finfo(state.dtype).tiny
        return torch.linalg.vector_norm(state, dim=1).clamp(min=tiny).log() - step.clamp(
            min=tiny
        ).log(), memory


class RandomStop(Rule):
    """Uniform numbers: each step stops with the same probability, whatever the sample.

    Parameters
    ----------
    generator
        Draws them, on the CPU.

    Examples
    --------
    >>> rule = RandomStop(torch.Generator().manual_seed(0))
    >>> rule.observe(Seen(1, torch.zeros(2)), ())[0]
    tensor([0.4963, 0.7682])
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return numbers in [0, 1)."""
        return torch.rand(len(seen.score), generator=self.generator).to(seen.score), memory


class FixedDepth(Rule):
    """The number of steps: every sample stops at the same one, depth `d` by a threshold of `d - 0.5`.

    Examples
    --------
    >>> FixedDepth().observe(Seen(3, torch.zeros(2)), ())[0]
    tensor([3., 3.])
    """

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the step."""
        return torch.full_like(seen.score, float(seen.t)), memory


class Oracle(Rule):
    """Whether the answer is right: stops at the first step that is, at the last if none is.

    The best that any rule can do for the accuracy, and nothing to use: it looks at the labels.

    Parameters
    ----------
    y
        Classes `(N,)` of the samples in the order in which they will be observed.

    Examples
    --------
    >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> trajectory = Trajectory(logits, torch.zeros(1, 3), torch.zeros(1, 4))
    >>> signals(trajectory, Oracle(torch.tensor([1])))
    tensor([[0., 1., 1.]])
    """

    reads = True

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return 1 where the prediction is right, 0 elsewhere."""
        logits = _read(seen)
        (y,) = memory or (self.y.to(logits.device),)
        if len(y) != len(logits):
            raise ValueError(f"y must have a label for each of {len(logits)} samples, got {len(y)}")
        return (logits.argmax(1) == y).to(logits.dtype), (y,)


RULES: dict[str, type[Rule]] = {
    "score": RankScore,
    "confidence": Confidence,
    "entropy": Entropy,
    "patience": Patience,
    "residual": Residual,
    "random": RandomStop,
    "fixed": FixedDepth,
}
"""The rules that need nothing but a running model, by name."""


def signals(trajectory: Trajectory, rule: Rule | str) -> Tensor:
    """Return the signals of a rule along a stored trajectory.

    Parameters
    ----------
    trajectory
        Of `N` samples and `T` steps, with states if the rule looks at them.
    rule
        A rule, or its name in `RULES`.

    Returns
    -------
    Tensor
        `(N, T)`, detached.

    Raises
    ------
    ValueError
        If the name is unknown, or the rule needs what the trajectory has not kept.

    Examples
    --------
    >>> trajectory = Trajectory(torch.zeros(2, 3, 4), torch.randn(2, 3), torch.zeros(2, 5))
    >>> torch.equal(signals(trajectory, "score"), trajectory.scores)
    True
    """
    rule = find_rule(rule)
    columns: list[Tensor] = []
    memory: Memory = ()
    with torch.no_grad():
        for t in range(1, trajectory.scores.shape[1] + 1):
            states = trajectory.states
            state, previous = (None, None) if states is None else (states[:, t], states[:, t - 1])
            seen = Seen(t, trajectory.scores[:, t - 1], trajectory.logits[:, t - 1], state, previous)
            signal, memory = rule.observe(seen, memory)
            columns.append(signal)
    return torch.stack(columns, 1)


def log_odds(logits: Tensor) -> Tensor:
    """Return `log(p / (1 - p))` of the likeliest class, `(n,)`; 0 where there is one class only."""
    best, index = logits.max(1)
    if logits.shape[1] == 1:
        return torch.zeros_like(best)
    return best - logits.scatter(1, index.unsqueeze(1), -math.inf).logsumexp(1)


def find_rule(rule: Rule | str) -> Rule:
    """Return a rule by its name, or the rule itself."""
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ValueError(
            f"rule must be a Rule or one of {', '.join(RULES)}, got {rule!r}: it gives no signal"
        )
    return RULES[rule]()


def _read(seen: Seen) -> Tensor:
    if seen.logits is None:
        raise ValueError("logits must be read for this rule, got none: set reads = True in its class")
    return seen.logits
