r"""Three motors: whose directed part `M_a` drives growth, with running means that live in buffers.

`GradientMotor` asks the loss: it adds, in thought, a head whose value path is the identity and whose output
is scaled by `eps`, and takes the mixed derivative of the loss in `eps` and the head's form `M` at zero.
`HeadsMotor` takes the heads that are there, as the author's public code does; `TaskMotor` a given form. All
keep the second moments `S`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from geomlib.core.precision import full_precision
from geomlib.incrt.operator import Factors, antisym

__all__ = ["GradientMotor", "HeadsMotor", "MotorStatistics", "TaskMotor", "motor_statistics"]


class MotorStatistics(NamedTuple):
    """Sums over one batch, ready to be added over micro-batches or processes.

    Attributes
    ----------
    G
        `(d, d)`: minus the mixed derivative of the loss; zero if no gradient was given.
    gram
        `(d, d)`: sum of `x x^T` over the valid tokens.
    tokens
        Their number `()`, in the same dtype.
    """

    G: Tensor
    gram: Tensor
    tokens: Tensor

    def combine(self, other: MotorStatistics) -> MotorStatistics:
        """Add the sums of another micro-batch, whose loss carries its own weight."""
        return MotorStatistics(self.G + other.G, self.gram + other.gram, self.tokens + other.tokens)


@torch.no_grad()
def motor_statistics(
    delta: Tensor | None,
    xh: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> MotorStatistics:
    r"""Return what a batch says of the motor and of the second moments.

    Parameters
    ----------
    delta
        `(B, n, d)`, the derivative of the loss in the output of the attention sub-layer, or `None`.
    xh
        `(B, n, d)`, the normalised input of that sub-layer.
    mask
        `(B, n)` bool, true for tokens and false for padding.
    causal
        Whether token `i` sees the tokens `j <= i` only.
    scale
        What the loss was multiplied with before `backward`, for example by a gradient scaler.
    dtype
        Of the sums.

    Returns
    -------
    MotorStatistics

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Source: reconstructed. A virtual head `eps softmax(Xh M Xh^T) Xh` has, at `eps = 0` and `M = 0`, `-d^2 L
    / (d eps dM) = sum_b Xh^T C Xh` with `C_ij = -(delta_i . xh_j - its mean over the visible j) / n_i`,
    `n_i` visible keys: the derivative of a uniform softmax. One token sees itself alone and says nothing.

    Examples
    --------
    >>> delta, xh = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> motor_statistics(delta, xh).G
    tensor([[-0.2500,  0.2500],
            [ 0.0000,  0.0000]])
    """
    _check_batch(delta, xh, mask)
    batch, n, d = xh.shape
    with full_precision(xh.device):
        x = xh.to(dtype)
        if mask is None and not causal:
            # Every token sees all of them: the mean over keys is taken from the keys, not from (B, n, n).
            rows = x.reshape(-1, d)
            gram = rows.mT @ rows
            tokens = gram.new_full((), batch * n)
            if delta is None:
                return MotorStatistics(torch.zeros_like(gram), gram, tokens)
            C = torch.bmm(delta.to(dtype), (x.mean(1, keepdim=True) - x).mT)
            pulled = torch.bmm(C, x).reshape(-1, d)
            return MotorStatistics(rows.mT @ pulled / (n * scale), gram, tokens)
        valid = torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask
        weight = valid.to(dtype).unsqueeze(-1)
        x = torch.where(valid.unsqueeze(-1), x, 0.0)  # not a product: padding may hold anything
        rows = x.reshape(-1, d)
        gram, tokens = rows.mT @ rows, weight.sum()
        if delta is None:
            return MotorStatistics(torch.zeros_like(gram), gram, tokens)
        slope = torch.where(valid.unsqueeze(-1), delta.to(dtype) / scale, 0.0)
        visible = valid.unsqueeze(1).expand(batch, n, n)  # [b, i, j]: i sees j
        if causal:
            visible = visible & torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        seen = visible.to(dtype)
        count = seen.sum(-1, keepdim=True).clamp_min(1)
        C = torch.bmm(slope, x.mT) * seen
        C = (C - seen * (C.sum(-1, keepdim=True) / count)) / count
        pulled = torch.bmm(C, x)  # (B, n, d)
        return MotorStatistics(-rows.mT @ pulled.reshape(-1, d), gram, tokens)


class _Motor(nn.Module):
    """Running means of `S`, and of `M_a` where it moves, without the bias of a start from zero."""

    S: Tensor
    Ma: Tensor
    weight: Tensor

    def __init__(self, d: int, ema: float, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        if d < 1:
            raise ValueError(f"d must be at least 1, got {d}: tokens would have no entries")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {ema}: the mean would never move")
        self.d, self.ema = d, ema
        for name in ("S", "Ma"):
            self.register_buffer(name, torch.zeros(d, d, device=device, dtype=dtype))
        self.register_buffer("weight", torch.zeros((), device=device, dtype=dtype))  # 1 - ema^t

    @torch.no_grad()
    def _absorb(self, S: Tensor, Ma: Tensor, usable: Tensor) -> None:
        if S.shape[-1] != self.d:
            raise ValueError(f"xh must hold tokens of width {self.d}, got {S.shape[-1]}")
        # A batch with a NaN is skipped by selection, so that the host need not wait to look at it.
        weight = self.ema * self.weight + (1 - self.ema)
        rate = (1 - self.ema) / weight
        for mean, new in ((self.S, S), (self.Ma, Ma)):
            mean.copy_(torch.where(usable, mean + rate * (new - mean), mean))
        self.weight.copy_(torch.where(usable, weight, self.weight))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.d}, ema={self.ema:g}"


class GradientMotor(_Motor):
    r"""Running means of `S` and of the directed part of what the loss still asks of attention.

    Parameters
    ----------
    d
        Width.
    ema
        Weight of the past, in [0, 1).
    device, dtype
        Of the buffers.

    Raises
    ------
    ValueError
        For arguments out of range, and in `update` for shapes that do not fit.

    Notes
    -----
    Source: reconstructed, since growth driven by the heads themselves does not stop. `M_a` goes to zero
    with the gradient of the loss. `update` does nothing in evaluation mode and skips batches with
    infinities or NaN. The rate of update `t` is `(1 - ema) / (1 - ema^t)`, so that the first batch counts
    in full (as in Adam).

    Examples
    --------
    >>> motor = GradientMotor(2)
    >>> delta, xh = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> motor.update(delta, xh)
    >>> motor.Ma
    tensor([[ 0.0000,  0.1250],
            [-0.1250,  0.0000]])
    """

    def __init__(
        self,
        d: int,
        ema: float = 0.95,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d, ema, device, dtype)

    def update(
        self,
        delta: Tensor,
        xh: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        *,
        scale: float | Tensor = 1.0,
    ) -> None:
        """Take in a batch, see :func:`motor_statistics`."""
        if self.training:
            self.absorb(motor_statistics(delta, xh, mask, causal, scale=scale, dtype=self.S.dtype))

    def absorb(self, statistics: MotorStatistics) -> None:
        """Take in sums that were added over micro-batches or processes."""
        if not self.training:
            return
        G, gram, tokens = statistics
        usable = G.isfinite().all() & gram.isfinite().all() & (tokens > 0)
        self._absorb(gram / tokens.clamp_min(1), antisym(G), usable)


class HeadsMotor(_Motor):
    r"""Running mean of `S`, and the directed part of the present heads, `M_a = sum_h antisym(W_Q W_K^T)`.

    Parameters
    ----------
    d, ema, device, dtype
        See :class:`GradientMotor`; the mean is taken of `S` alone.

    Raises
    ------
    ValueError
        For arguments out of range, and in `update` for shapes that do not fit.

    Notes
    -----
    Source: the author's public code, with `S` divided by the number of tokens. Each head that grows feeds
    the motor, so that the signal rises in training and does not tell when to stop.

    Examples
    --------
    >>> motor = HeadsMotor(2)
    >>> motor.update(torch.ones(1, 3, 2), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]]))
    >>> motor.Ma
    tensor([[ 0.0000,  0.5000],
            [-0.5000,  0.0000]])
    """

    def __init__(
        self,
        d: int,
        ema: float = 0.95,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d, ema, device, dtype)

    def update(self, xh: Tensor, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch `xh (B, n, d)` and the factors `(H, d, dk)` of the present heads."""
        if self.training:
            self.absorb(motor_statistics(None, xh, mask, dtype=self.S.dtype), queries, keys)

    @torch.no_grad()
    def absorb(self, statistics: MotorStatistics, queries: Tensor, keys: Tensor) -> None:
        """Take in sums that were added over micro-batches or processes, and the factors `(H, d, dk)`."""
        if not self.training:
            return
        if queries.shape != keys.shape or queries.dim() != 3 or queries.shape[1] != self.d:
            raise ValueError(
                f"queries and keys must both be (heads, {self.d}, dk), got {tuple(queries.shape)} and "
                f"{tuple(keys.shape)}"
            )
        _, gram, tokens = statistics
        usable = gram.isfinite().all() & (tokens > 0)
        Ma = antisym(Factors(queries, keys).dense()).to(self.Ma.dtype)
        self._absorb(gram / tokens.clamp_min(1), self.Ma, usable)
        self.Ma.copy_(torch.where(Ma.isfinite().all(), Ma, self.Ma))


class TaskMotor(_Motor):
    r"""Running mean of `S` beside a directed form that is given and fixed, as the theorems assume.

    Parameters
    ----------
    Ma
        `(d, d)`, antisymmetric.
    ema
        Weight of the past, in [0, 1).

    Raises
    ------
    ValueError
        If `Ma` is not antisymmetric, or `ema` out of range.

    Notes
    -----
    Source: reconstructed.

    Examples
    --------
    >>> motor = TaskMotor(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    >>> motor.update(torch.tensor([[[2.0, 0.0]]]))
    >>> motor.S
    tensor([[4., 0.],
            [0., 0.]])
    """

    def __init__(self, Ma: Tensor, ema: float = 0.95) -> None:
        part = antisym(Ma)
        if Ma.dim() != 2 or not torch.allclose(part, Ma):
            raise ValueError("Ma must be an antisymmetric matrix: its symmetric part drives nothing")
        super().__init__(Ma.shape[-1], ema, Ma.device, Ma.dtype)
        self.Ma.copy_(part)

    def update(self, xh: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch `xh (B, n, d)`."""
        if self.training:
            self.absorb(motor_statistics(None, xh, mask, dtype=self.S.dtype))

    def absorb(self, statistics: MotorStatistics) -> None:
        """Take in sums that were added over micro-batches or processes."""
        if not self.training:
            return
        _, gram, tokens = statistics
        self._absorb(gram / tokens.clamp_min(1), self.Ma, gram.isfinite().all() & (tokens > 0))


def _check_batch(delta: Tensor | None, xh: Tensor, mask: Tensor | None) -> None:
    if xh.dim() != 3 or not xh.is_floating_point():
        raise ValueError(f"xh must be floating (batch, tokens, d), got {tuple(xh.shape)}, {xh.dtype}")
    if delta is not None and delta.shape != xh.shape:
        raise ValueError(f"delta must have the shape of xh {tuple(xh.shape)}, got {tuple(delta.shape)}")
    if mask is not None and (mask.shape != xh.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool with shape {tuple(xh.shape[:2])}, true for tokens, "
            f"got {tuple(mask.shape)}, {mask.dtype}"
        )
