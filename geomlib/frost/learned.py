r"""A stop rule fitted to a trained model: optimal stopping by backward induction on a calibration split.

Stopping after step `t` is worth 1 if the answer is right; going on costs a price `c` per step. The best rule
stops where no way of going on is worth more, and among rules of its mean depth none is more accurate (`c` is
the multiplier of that constraint). What is worth what is estimated from the signals that a running model
gives anyway: confidence, entropy, rank score, residual, patience, and how they changed.

This goes beyond arXiv 2601.19551, whose rule thresholds one of these signals. Without labels, as for the
paper's quantile, an answer counts as right if it is that of full depth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from geomlib.frost.halting import check_steps, evaluating
from geomlib.frost.ranking import check_labels
from geomlib.frost.rules import Confidence, Entropy, Memory, Patience, Residual, Rule, Seen
from geomlib.frost.unrolled import Unrolled

__all__ = ["OptimalStopping"]

FEATURES = 8
# Standardised features are cut off here, so that a square cannot run away on a sample unlike all others.
LARGEST = 4.0
# Of the logistic fit: its Hessian is bounded by that at p = 1/2, so every step descends.
LOGISTIC_STEPS = 30
LOGISTIC_RIDGE = 3.0


class OptimalStopping(Rule):
    r"""Stop where the price of a step exceeds what going on is worth.

    The signal is `-log(c)` of the break-even price `c` of a state, the largest at which a further step still
    pays: a threshold of `-log(c)` stops as if a step cost `c` right answers, and any other threshold trades
    accuracy for depth along the same family.

    Parameters
    ----------
    steps
        Depth `T` of the model that it will be fitted to.
    prices
        How many prices of a step are tried, on a logarithmic grid from 0.0001 to 0.5.

    Raises
    ------
    ValueError
        If a number is below its minimum (2 each); when observing a step beyond `T`.

    Notes
    -----
    Source: reconstructed. For each step, backwards from `T`: the worth of going on is what following the rule
    from the next step on really brought the calibration samples, minus the price, regressed on the signals
    (least squares on their quadratic polynomials and on a logistic estimate of being right). This is the
    regression form of backward induction that is used for American options (Longstaff and Schwartz 2001).
    A step costs one readout, and one product with a matrix of `(48, prices)` per sample.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> from geomlib.frost.curves import depth_curve
    >>> generator = torch.Generator().manual_seed(0)
    >>> model = vector(3, 4, width=8, steps=5, generator=generator)
    >>> inputs, y = torch.randn(200, 3, generator=generator), torch.randint(4, (200,), generator=generator)
    >>> rule = OptimalStopping.fit(model, inputs, y)
    >>> rule
    OptimalStopping(steps=5, prices=32)
    >>> depth_curve(model(inputs, keep_states=True), y, rule).depth[[0, -1]]
    tensor([1., 5.], dtype=torch.float64)
    """

    reads = True
    moves = True
    centre: Tensor
    spread: Tensor
    chance: Tensor
    worth: Tensor
    prices: Tensor

    def __init__(self, steps: int, prices: int = 32) -> None:
        super().__init__()
        for name, value in {"steps": steps, "prices": prices}.items():
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}: there would be no choice")
        self.steps = steps
        terms = 1 + FEATURES + FEATURES * (FEATURES + 1) // 2
        self.register_buffer("centre", torch.zeros(steps, FEATURES))
        self.register_buffer("spread", torch.ones(steps, FEATURES))
        self.register_buffer("chance", torch.zeros(steps, terms))
        self.register_buffer("worth", torch.zeros(steps, terms + 3, prices))
        self.register_buffer("prices", torch.logspace(-4, math.log10(0.5), prices))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"steps": self.steps, "prices": len(self.prices)}

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"steps={self.steps}, prices={len(self.prices)}"

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        model: Unrolled,
        inputs: Tensor,
        y: Tensor | None = None,
        *,
        steps: int | None = None,
        prices: int = 32,
        ridge: float = 1.0,
        batch_size: int = 512,
    ) -> OptimalStopping:
        """Fit the rule to a trained model, on a split that the model was not trained on.

        Parameters
        ----------
        model
            Run in evaluation mode; its mode is restored.
        inputs
            `(N, ...)`; some hundreds of samples will do, some thousands are better.
        y
            Classes `(N,)`. Without them the rule saves steps wherever they would not change the answer, and
            learns nothing of answers that more steps make worse.
        steps
            Of the unrolling, the model's own by default.
        prices
            See the class.
        ridge
            Of the regressions on standardised signals, positive.
        batch_size
            Samples at a time.

        Returns
        -------
        OptimalStopping
            On the device of the model.

        Raises
        ------
        ValueError
            If labels do not fit, there are no samples, or a number is out of range.
        """
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(
                f"ridge must be finite and positive, got {ridge}: the regressions may be singular"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: nothing would be computed")
        if len(inputs) < 2 or (y is not None and len(inputs) != len(y)):
            raise ValueError(
                f"inputs and y must have as many rows, two at least, got {len(inputs)} and "
                f"{'none' if y is None else len(y)}: nothing could be regressed"
            )
        rule = cls(check_steps(model, steps), prices)
        with evaluating(model):
            parts = [_watch(model, batch, rule.steps) for batch in inputs.split(batch_size)]
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        answers = logits.argmax(2)
        if y is not None:
            check_labels(logits, y)
        right = answers == (answers[:, -1] if y is None else y).unsqueeze(1)
        finite = torch.isfinite(features).all(2).all(1)
        rule._regress(features[finite].cpu().double(), right[finite].cpu().double(), ridge)
        return rule.to(next(model.parameters()).device)

    def observe(self, seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
        """Return minus the logarithm of the break-even price."""
        if not 1 <= seen.t <= self.steps:
            raise ValueError(
                f"t must lie in 1 ... {self.steps}, got {seen.t}: the rule was fitted up to there"
            )
        features, memory = _features(seen, memory)
        terms = self._terms(features, seen.t - 1)
        gain = terms @ self.worth[seen.t - 1].to(terms)  # (n, prices): of going on over stopping
        # What is not finite in the signals has to stay visible.
        return -_break_even(gain, self.prices.to(terms).log()) + 0 * features.sum(1), memory

    def _regress(self, features: Tensor, right: Tensor, ridge: float) -> None:
        """Fit all steps, backwards from the last; `(N, T, FEATURES)` and `(N, T)` in double precision."""
        if len(features) < 2:
            raise ValueError(
                f"inputs must hold two samples with finite signals, got {len(features)}: nothing could be "
                "regressed"
            )
        self.centre.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp_min(1e-3))
        prices = self.prices.double()
        reward = right[:, -1:].expand(-1, len(prices))
        for t in reversed(range(self.steps)):
            self.chance[t] = _logistic(self._polynomial(features[:, t], t), right[:, t])
            if t == self.steps - 1:
                continue
            terms = self._terms(features[:, t], t)
            target = reward - prices - right[:, t : t + 1]
            gram = terms.T @ terms + _penalty(terms, ridge).diag()
            weights = torch.linalg.solve(gram, terms.T @ target)
            self.worth[t] = weights
            # The regression decides; what counts is what its decision really brought.
            reward = torch.where(terms @ weights > 0, reward - prices, right[:, t : t + 1])

    def _polynomial(self, features: Tensor, t: int) -> Tensor:
        """Return 1, the standardised features, and their products, `(n, terms)`."""
        z = (features - self.centre[t].to(features)) / self.spread[t].to(features)
        z = z.clamp(-LARGEST, LARGEST)
        first, second = torch.triu_indices(FEATURES, FEATURES, device=z.device)
        return torch.cat([torch.ones_like(z[:, :1]), z, z[:, first] * z[:, second]], 1)

    def _terms(self, features: Tensor, t: int) -> Tensor:
        """Return what worth is linear in: the polynomial, and the chance of being right in three forms."""
        polynomial = self._polynomial(features, t)
        chance = polynomial @ self.chance[t].to(polynomial).unsqueeze(1)
        bounded = chance.clamp(-LARGEST, LARGEST)
        return torch.cat([polynomial, chance.sigmoid(), bounded, bounded.square()], 1)


def _watch(model: Unrolled, inputs: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return features `(n, T, FEATURES)` and logits `(n, T, K)` of a running model."""
    context = model.inject(inputs)
    state = model.start(context)
    features, answers = [], []
    memory: Memory = ()
    for t in range(1, steps + 1):
        previous, state = state, model.step(state, context, t)
        logits = model.read(state, context)
        row, memory = _features(Seen(t, model.score(state), logits, state, previous), memory)
        features.append(row)
        answers.append(logits)
    return torch.stack(features, 1), torch.stack(answers, 1)


def _features(seen: Seen, memory: Memory) -> tuple[Tensor, Memory]:
    """Return confidence, entropy, rank score, residual, log of the patience, and three changes, `(n, 8)`."""
    confidence, _ = Confidence().observe(seen, ())
    entropy, _ = Entropy().observe(seen, ())
    residual, _ = Residual().observe(seen, ())
    patience, run = Patience().observe(seen, memory[1:])
    now = torch.stack([confidence, seen.score.to(confidence), residual.to(confidence)], 1)
    change = now - memory[0] if memory else torch.zeros_like(now)
    features = torch.cat([now, entropy.unsqueeze(1), patience.log().unsqueeze(1), change], 1)
    return features, (now, *run)


def _penalty(terms: Tensor, ridge: float) -> Tensor:
    penalty = torch.full_like(terms[0], ridge)
    penalty[0] = 1e-6  # the constant is free
    return penalty


def _logistic(terms: Tensor, right: Tensor) -> Tensor:
    """Return weights of a logistic regression, by steps against an upper bound of its Hessian."""
    penalty = _penalty(terms, LOGISTIC_RIDGE)
    factor = torch.linalg.cholesky(terms.T @ terms / 4 + penalty.diag())
    weights = torch.zeros_like(penalty)
    for _ in range(LOGISTIC_STEPS):
        slope = terms.T @ ((terms @ weights).sigmoid() - right) + penalty * weights
        weights = weights - torch.cholesky_solve(slope.unsqueeze(1), factor).squeeze(1)
    return weights


def _break_even(gain: Tensor, log_prices: Tensor) -> Tensor:
    """Return the logarithm of the first price at which going on no longer pays, `(n,)`, interpolated.

    A state at which it never pays lies one grid step below the grid; one at which it always does, at its end.
    """
    stops = gain <= 0
    count = gain.shape[1]
    first = (stops.cumsum(1) == 0).sum(1)  # in 0 ... prices
    left = gain.gather(1, (first - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    right = gain.gather(1, first.clamp(max=count - 1).unsqueeze(1)).squeeze(1)
    between = (first > 0) & (first < count)
    share = torch.where(between, left / (left - right).clamp_min(torch.finfo(gain.dtype).tiny), 0.0)
    spacing = log_prices[1] - log_prices[0]
    return log_prices[0] + spacing * (first - 1 + share)
