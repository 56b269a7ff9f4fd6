r"""Soft quantisation: tokens written as mixtures of prototypes, and the loss of that.

Tokens are rows `z`, prototypes rows `p_k`, `D_k = |z - p_k|^2`, `q = softmax(-D / T)`. The loss is the mean
of `sum_k q_k D_k`, which splits into the error of the barycentre `zhat = q P` and the variance of the
prototypes around it (arXiv 2604.01740, loss decomposition). Distances are never formed: `|z|^2` cancels in
the softmax, and what is left is one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from geomlib.core.precision import full_precision, working_dtype

__all__ = [
    "Mode",
    "Quantised",
    "soft_quantise",
]

Mode = Literal["full", "em"]
COLDEST = 1e-20
"""Below this temperature assignments are hard in any precision, and quotients by it could overflow."""


@dataclass(frozen=True)
class Quantised:
    """Tokens written in a dictionary.

    The loss is computed with the assignments; barycentres, their error and the variance of the prototypes
    only when they are asked for, so that a training step does not pay for what nobody reads.

    Attributes
    ----------
    q
        Assignments `(..., K)`: non-negative, one in sum over each group of prototypes, zero for padding.
    loss
        Soft quantisation loss `()`: mean over tokens (and groups) of `sum_k q_k D_k`.
    tokens, prototypes, centre
        `(N, d)`, `(K, d)`, `(d,)`: what the assignments were computed from, relative to the centre.
    scores
        `(|x|^2 - D_k) / T` of these tokens `(N, K)`, what the softmax was taken of.
    T
        Temperature `()`.
    weights
        `(N,)`: share of each token in every mean, or None if all are valid.
    groups
        Number of dictionaries that the prototypes are divided into.
    mode
        As given to `soft_quantise`.
    """

    q: Tensor
    loss: Tensor
    tokens: Tensor = field(repr=False)
    prototypes: Tensor = field(repr=False)
    centre: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    T: Tensor = field(repr=False)
    weights: Tensor | None = field(repr=False)
    groups: int = 1
    mode: Mode = "full"

    @property
    def zhat(self) -> Tensor:
        """Barycentres `q P`: `(..., d)`, or `(..., groups, d)` if there are several groups."""
        whole = self._barycentres(self._rows()) + self.centre
        if self.weights is not None:
            whole = whole * (self.weights != 0)[:, None, None]
        groups = () if self.groups == 1 else (self.groups,)
        return whole.reshape(*self.q.shape[:-1], *groups, -1)

    @property
    def ols(self) -> Tensor:
        """Mean squared distance of the tokens from their barycentres `()`."""
        rows = self._rows() if self.mode == "full" else self._rows().detach()
        error = (self.tokens[:, None] - self._barycentres(rows)).square().sum(-1).mean(1)
        return self._mean(error)

    @property
    def match(self) -> Tensor:
        """Half of what a prototype is nearer than they are on average `(..., K)`, zero for padding."""
        # Relative to the centre the mean prototype is 0, but its gradient is not.
        with full_precision(self.q.device):
            mean = self.prototypes.square().sum(1).mean() / 2 - self.tokens @ self.prototypes.mean(0)
        match = torch.addcmul(mean[:, None], self.scores, self.T / 2)
        if self.weights is not None:
            match = match * (self.weights != 0)[:, None]
        return match.view(self.q.shape)

    def distance_to_fixed(self) -> Tensor:
        """Return `ols` with the barycentres held fixed `()`: its gradient moves the tokens only."""
        fixed = self._barycentres(self._rows().detach()).detach()
        return self._mean((self.tokens[:, None] - fixed).square().sum(-1).mean(1))

    @property
    def variance(self) -> Tensor:
        """Mean over tokens of `sum_k q_k |p_k - zhat|^2` `()`: what the loss holds beside `ols`."""
        rows = self._rows() if self.mode == "full" else self._rows().detach()
        with full_precision(self.q.device):
            second = rows @ self.prototypes.square().sum(1)
        first = self._barycentres(rows).square().sum(-1).sum(1)
        return self._mean((second - first) / self.groups).clamp_min(0)

    @property
    def usage(self) -> Tensor:
        """Mean assignment of each prototype `(K,)`, in each group one in sum."""
        rows = self._rows().detach()
        with full_precision(self.q.device):
            return rows.mean(0) if self.weights is None else rows.T @ self.weights

    def _rows(self) -> Tensor:
        return self.q.reshape(-1, self.q.shape[-1])

    def _barycentres(self, rows: Tensor) -> Tensor:
        """Barycentres relative to the centre `(N, groups, d)`."""
        with full_precision(rows.device):
            if self.groups == 1:
                return (rows @ self.prototypes)[:, None]
            parts = rows.unflatten(1, (-1, self.groups)).permute(2, 0, 1)  # (groups, N, K / groups)
            codes = self.prototypes.unflatten(0, (-1, self.groups)).transpose(0, 1)
            return (parts @ codes).transpose(0, 1)

    def _mean(self, values: Tensor) -> Tensor:
        return values.mean() if self.weights is None else (self.weights * values).sum()


def soft_quantise(
    z: Tensor,
    P: Tensor,
    T: float | Tensor,
    mode: Mode = "full",
    mask: Tensor | None = None,
    *,
    groups: int = 1,
    log_prior: Tensor | None = None,
    stop_grad: bool = False,
    commitment: float = 0.0,
) -> Quantised:
    """Assign tokens to prototypes softly, and return the loss of that.

    Parameters
    ----------
    z
        Tokens `(..., d)`, floating point, at least one.
    P
        Prototypes `(K, d)`.
    T
        Temperature, positive and finite; a tensor `()` is not looked at and gets no gradient.
    mode
        `"full"` differentiates the loss through the assignments, `"em"` holds them fixed in it. What is
        computed from `q` elsewhere sees their gradient in either mode.
    mask
        Valid tokens `(...)`, boolean; the others get no assignment and enter no mean.
    groups
        Deal the prototypes out into so many dictionaries of equal size, each of which assigns the whole token
        on its own: prototype `k` belongs to dictionary `k % groups`, the order in which a softmax is fast.
    log_prior
        Added to `-D / T` `(K,)`; `-inf` switches a prototype off.
    stop_grad
        Let the loss move the prototypes only. Gradients that arrive through `q` still reach the tokens.
    commitment
        Weight of the mean squared distance of the tokens from their barycentres, these held fixed, that is
        added to the loss and reaches the tokens in any case.

    Returns
    -------
    Quantised

    Raises
    ------
    ValueError
        If shapes do not fit, a number is out of range, or an input is not floating point.

    Notes
    -----
    Source: loss and decomposition arXiv 2604.01740; softmax with a temperature is named there, its scaling
    `-D / T` is reconstructed: with it the critical temperature is a multiple of an eigenvalue. Everything
    runs in float32 at least, relative to the mean of the prototypes, since squares of large offsets would
    cancel. Groups, prior and `stop_grad` are reconstructed.

    Examples
    --------
    >>> z = torch.tensor([[0.0], [1.0], [3.0]])
    >>> found = soft_quantise(z, torch.tensor([[0.0], [2.0]]), T=1.0)
    >>> found.q[1]
    tensor([0.5000, 0.5000])
    >>> torch.isclose(found.loss, found.ols + found.variance)
    tensor(True)
    """
    check_tokens(z, P, T, mode, mask, groups, log_prior)
    dtype = working_dtype(torch.promote_types(z.dtype, P.dtype))
    with full_precision(z.device):
        prototypes = P.to(dtype)
        centre = prototypes.detach().mean(0)
        # The loss does not change under a common shift, so the centre is a constant and nothing is lost.
        prototypes = prototypes - centre
        tokens = (z.to(dtype) - centre).reshape(-1, z.shape[-1])
        weights = None
        if mask is not None:
            valid = mask.reshape(-1)
            tokens = torch.where(valid[:, None], tokens, 0)
            weights = valid.to(dtype) / valid.sum().clamp_min(1)
        prior = None if log_prior is None else log_prior.to(dtype)
        degree = cold(T, tokens)
        q, loss, scores = _Assign.apply(
            tokens, prototypes, degree, prior, weights, groups, mode == "full", stop_grad
        )
    q = q.view(*z.shape[:-1], len(P))
    found = Quantised(q, loss, tokens, prototypes, centre, scores, degree, weights, groups, mode)
    return found if commitment == 0 else replace(found, loss=loss + commitment * found.distance_to_fixed())


class _Assign(torch.autograd.Function):
    """Assignments and loss of centred tokens, with a derivative that forms every product once.

    `scores = (2 x.p - |p|^2) / T` differ from `-D / T` by `|x|^2 / T` only, which no softmax sees. Automatic
    differentiation would need a second set of distances for a loss that must not reach the tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        P: Tensor,
        T: Tensor,
        prior: Tensor | None,
        weights: Tensor | None,
        groups: int,
        full: bool,
        stop: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.addmm(-P.square().sum(1) / T, x, (P * (2 / T)).T)
        logits = scores if prior is None else scores + prior
        q = logits.softmax(1) if groups == 1 else logits.unflatten(1, (-1, groups)).softmax(1).flatten(1)
        if weights is None:
            inner = torch.dot(q.reshape(-1), scores.reshape(-1))
            square = torch.dot(x.reshape(-1), x.reshape(-1))
            loss = (square - T / groups * inner) / len(x)
        else:
            q = q * (weights != 0)[:, None]
            loss = (weights * (x.square().sum(1) - T / groups * (q * scores).sum(1))).sum()
        return q, loss.clamp_min(0), scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, P, T, prior, weights, ctx.groups, ctx.full, ctx.stop = inputs
        q, _, scores = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, P, T, weights, q, scores)
        ctx.has_prior = prior is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        by_q, by_loss, by_scores = gradients
        x, P, T, weights, q, scores = ctx.saved_tensors
        through_q = None if by_q is None else _softmax_backward(by_q, q, ctx.groups)
        to_scores, to_prior, by_square = through_q, through_q, None
        if by_loss is not None:
            share = by_loss / len(x) if weights is None else (by_loss * weights)[:, None]
            pull = share * (-T / ctx.groups)
            if ctx.full:
                # The loss holds the assignments, which pass on, and the scores: one pass for both arrivals.
                whole = pull * scores if by_q is None else torch.addcmul(by_q, pull, scores)
                to_prior = _softmax_backward(whole, q, ctx.groups)
            to_scores = pull * q if to_prior is None else torch.addcmul(to_prior, pull, q)
            by_square = None if ctx.stop else 2 * share * x
        to_tokens = through_q if ctx.stop else to_scores
        to_scores, to_tokens = _add(to_scores, by_scores), _add(to_tokens, by_scores)
        by_x = by_P = by_prior = None
        if ctx.needs_input_grad[0]:
            by_x = _add(None if to_tokens is None else to_tokens @ (P * (2 / T)), by_square)
        if ctx.needs_input_grad[1] and to_scores is not None:
            by_P = (to_scores.T @ x - to_scores.sum(0)[:, None] * P) * (2 / T)
        if ctx.has_prior and ctx.needs_input_grad[3] and to_prior is not None:
            by_prior = to_prior.sum(0)
        return by_x, by_P, None, by_prior, None, None, None, None


def _softmax_backward(gradient: Tensor, q: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return torch._softmax_backward_data(gradient, q, 1, q.dtype)
    rows, gradient = q.unflatten(1, (-1, groups)), gradient.unflatten(1, (-1, groups))
    return torch._softmax_backward_data(gradient, rows, 1, rows.dtype).flatten(1)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def cold(T: float | Tensor, like: Tensor) -> Tensor:
    """Return the temperature as a tensor `()` that can be divided by."""
    if isinstance(T, Tensor):
        return T.detach().to(like).clamp_min(COLDEST)
    return like.new_full((), max(T, COLDEST))


def check_mode(mode: str) -> None:
    """Refuse a gradient mode that is not known."""
    if mode not in get_args(Mode):
        raise ValueError(
            f"mode must be full or em, got {mode!r}: it says what the loss is differentiated through"
        )


def check_temperature(T: float | Tensor) -> None:
    """Refuse a temperature that is not a positive, finite number; tensors are not looked at."""
    if isinstance(T, Tensor):
        if T.dim():
            raise ValueError(f"T must be a number or a tensor (), got shape {tuple(T.shape)}")
    elif not (T > 0 and math.isfinite(T)):
        raise ValueError(f"T must be positive and finite, got {T}: assignments are softmax(-D / T)")


def check_tokens(
    z: Tensor,
    P: Tensor,
    T: float | Tensor,
    mode: str = "full",
    mask: Tensor | None = None,
    groups: int = 1,
    log_prior: Tensor | None = None,
) -> None:
    """Refuse what `soft_quantise` cannot take."""
    for name, value in {"z": z, "P": P}.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if P.dim() != 2 or len(P) == 0:
        raise ValueError(
            f"P must be (K, d) with K >= 1, got shape {tuple(P.shape)}: there is nothing to assign to"
        )
    if z.dim() < 1 or z.shape[-1] != P.shape[1]:
        raise ValueError(f"z must be (..., {P.shape[1]}) to fit P, got shape {tuple(z.shape)}")
    if z.numel() == 0:
        raise ValueError(f"z must hold a token, got shape {tuple(z.shape)}: a mean over none is undefined")
    check_temperature(T)
    check_mode(mode)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != z.shape[:-1]):
        raise ValueError(f"mask must be boolean {tuple(z.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
    if groups < 1 or len(P) % groups:
        raise ValueError(f"groups must divide the {len(P)} prototypes, got {groups}")
    if log_prior is not None and log_prior.shape != (len(P),):
        raise ValueError(f"log_prior must be ({len(P)},), got shape {tuple(log_prior.shape)}")
