r"""A transition that scans: selective state spaces inside the step. Our extension, not the paper's.

In arXiv 2601.19551 the block `A` is a ResNet or ViT block, and selection along tokens is named an orthogonal
axis (Appendix A). Here the block is `G(h; x) = W_2 phi(S_x(W_1 h) + U x + b)` with a scan `S_x` along the
positions. Decays and projections come from the injected `x` and not from the state, so that the scan is
linear in the state; and each of its outputs is a convex combination, so that no output exceeds the largest
input. That is a bound in the sup norm, and there is none in the 2-norm: a decay that varies in time can have
a gain of `sqrt(L)` there.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.core.recurrence import linear_recurrence, ssd
from geomlib.frost.certified import ACTIVATIONS
from geomlib.frost.model import linear, on_channels
from geomlib.frost.transitions import Prepared, Transition, check_sizes, place, uniform

__all__ = ["SelectiveScan", "convex_scan", "row_normalised"]

Form = Literal["channel", "s6", "ssd"]


def convex_scan(a: Tensor, v: Tensor, *, reverse: bool = False, both: bool = False) -> Tensor:
    """Return `s_k = a_k s_(k-1) + (1 - a_k) v_k` along dimension 1, from zero.

    Parameters
    ----------
    a : Tensor
        Decays in [0, 1], broadcastable to `v`.
    v : Tensor
        `(N, L, ...)`.
    reverse : bool
        From the end.
    both : bool
        The mean of both directions, so that every position sees all others.

    Returns
    -------
    Tensor
        Like `v`; nowhere larger in absolute value than the largest entry of its channel.

    Notes
    -----
    Source: reconstructed. `1 - a` is computed from the rounded `a`, exactly where `a >= 1/2`: weights that
    were rounded on their own would not sum to 1, and slow decays would drift.

    Examples
    --------
    >>> convex_scan(torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([[1.0000, 0.5000, 0.7500]])
    """
    driven = (1 - a) * v
    s = linear_recurrence(a, driven, reverse=reverse)
    return (s + linear_recurrence(a, driven, reverse=not reverse)) / 2 if both else s


def row_normalised(raw: Tensor, bound: Tensor | float) -> Tensor:
    """Scale each row of a matrix so that its absolute values sum to `bound`: the operator norm in sup.

    Parameters
    ----------
    raw : Tensor
        `(out, in)`, floating.
    bound : Tensor or float
        What no row sum exceeds, rounding included.

    Returns
    -------
    Tensor
        Like `raw`, differentiable in it.

    Notes
    -----
    Source: the norm of a matrix as a map of the sup norm is its largest absolute row sum.

    Examples
    --------
    >>> row_normalised(torch.tensor([[1.0, -3.0], [2.0, 2.0]]), 0.5).abs().sum(1)
    tensor([0.5000, 0.5000])
    """
    size = raw.abs().sum(1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)
    # Each entry is rounded twice, and the sum of a row once for each entry.
    allowance = 1 + torch.finfo(raw.dtype).eps * (raw.shape[1] + 2)
    return raw * (bound / (size * allowance))


class SelectiveScan(Transition):
    r"""`G(h; x) = W_2 phi(S_x(W_1 h) + U x + b)`, Lipschitz in `h` with `kappa` in the sup norm.

    The scan has one of three forms. With steps `D = softplus(W x + b)` they are

    - `channel`: `a = exp(-D)` for each channel;
    - `s6`: `n` states for each channel, `a = exp(-D r_j)` with rates `r_j`, entered through `B` and read
      through `C`, which come from `x` (Mamba's selection);
    - `ssd`: the same with one decay for all channels of a head, by matrix products (Mamba-2).

    `|B_j| <= 1` and `sum_j |C_j| <= 1` keep the combinations convex up to sign.

    Parameters
    ----------
    width : int
        Channels of the state.
    axes : {1, 2}
        Sequence or map; the positions of a map are scanned row by row.
    form : {"channel", "s6", "ssd"}
        Of the scan.
    expansion : int
        `expansion * width` channels are scanned.
    state_size : int
        `n`, for `s6` and `ssd`.
    heads : int
        For `ssd`, a divisor of the scanned channels.
    both : bool
        Average the scans of both directions; otherwise positions see only those before them.
    kappa : float
        The constant, in (0, 1).
    activation : {"relu", "tanh", "maxmin", "abs"}
        All 1-Lipschitz in the sup norm.
    time_step : tuple of float
        Range of the initial steps, drawn evenly in the logarithm: a channel remembers about `1 / D` places.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size, `axes`, `form`, `heads`, `kappa`, `activation` or `time_step` is out of range.

    Notes
    -----
    Our extension. Source of the forms and of the initial steps: Gu and Dao 2023 (arXiv 2312.00752), Dao and
    Gu 2024 (arXiv 2405.21060). Reconstructed: selection from `x`, the convex normalisation, row sums. With
    selection from the state the map would be quadratic in it and have no Lipschitz constant at all.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> block = SelectiveScan(8, kappa=0.9, generator=generator)
    >>> prepared = block.prepare(torch.randn(2, 8, 30, generator=generator))
    >>> near, far = (block(torch.full((2, 8, 30), value), prepared) for value in (0.0, 1.0))
    >>> bool((near - far).abs().max() <= 0.9), block.norm, block.certificate() <= 0.9
    (True, 'sup', True)
    """

    norm = "sup"
    kappa: Tensor
    log_rates: nn.Parameter | None

    def __init__(
        self,
        width: int,
        *,
        axes: int = 1,
        form: Form = "channel",
        expansion: int = 2,
        state_size: int = 4,
        heads: int = 4,
        both: bool = True,
        kappa: float = 0.9,
        activation: str = "relu",
        time_step: tuple[float, float] = (1e-3, 1e-1),
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kappa, device=device, dtype=dtype)
        check_sizes(width=width, expansion=expansion, state_size=state_size, heads=heads, axes=axes)
        hidden = expansion * width
        if axes == 0:
            raise ValueError("axes must be 1 (sequence) or 2 (map), got 0: a vector has no positions to scan")
        if form not in ("channel", "s6", "ssd"):
            raise ValueError(f"form must be 'channel', 's6' or 'ssd', got {form!r}: no such scan")
        if form == "ssd" and hidden % heads:
            raise ValueError(f"heads must divide {hidden}, got {heads}: the channels are shared out evenly")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}: a certificate needs "
                "slope at most 1"
            )
        if activation == "maxmin" and hidden % 2:
            raise ValueError(
                f"expansion * width must be even for 'maxmin', got {hidden}: channels are paired"
            )
        shortest, longest = time_step
        if not 0 < shortest <= longest:
            raise ValueError(
                f"time_step must be 0 < shortest <= longest, got {time_step}: decays lie below 1"
            )
        self.form, self.both, self.phi = form, both, ACTIVATIONS[activation]
        where: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self.enter = uniform((hidden, width), None, **where)
        self.leave = uniform((width, hidden), None, **where)
        self.inject = linear(width, hidden, **where)
        steps = heads if form == "ssd" else hidden
        self.select = linear(width, steps, **where)
        draw = torch.rand(steps, generator=generator, dtype=torch.float64, device="cpu")
        step = torch.exp(math.log(shortest) + draw * (math.log(longest) - math.log(shortest)))
        with torch.no_grad():
            self.select.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.project = None if form == "channel" else linear(width, 2 * state_size, **where)
        self.log_rates = None
        if form == "s6":
            rates = torch.arange(1, state_size + 1, dtype=torch.float64, device="cpu").log()
            self.log_rates = place(rates.expand(hidden, state_size).clone(), device, dtype)

    def prepare(self, x: Tensor) -> Prepared:
        """Return `U x + b`, decays and projections of each position, and the weights in use."""
        driven, step = (on_channels(layer, x).flatten(2).mT for layer in (self.inject, self.select))
        log_decay = -F.softplus(step)  # (N, L, channels or heads)
        if self.log_rates is not None:
            log_decay = log_decay.unsqueeze(-1) * self.log_rates.exp()  # (N, L, channels, n)
        rows = [driven, log_decay if self.form == "ssd" else log_decay.exp()]
        if self.project is not None:
            B, C = on_channels(self.project, x).flatten(2).mT.chunk(2, -1)  # (N, L, n)
            rows += [B.tanh(), C / C.abs().sum(-1, keepdim=True).clamp_min(1)]
        return Prepared(tuple(rows), self._weights())

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, ...)` to the same shape."""
        enter, leave = prepared.shared
        u = F.linear(state.flatten(2).mT, enter)  # (N, L, channels)
        y = F.linear(self._phi(self._scan(u, prepared.rows) + prepared.rows[0]), leave)
        return y.mT.reshape(state.shape)

    def _scan(self, u: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        decay = rows[1]
        if self.form == "channel":
            return convex_scan(decay, u, both=self.both)
        B, C = (row.unsqueeze(2) for row in rows[2:])
        if self.form == "s6":
            return (convex_scan(decay, u.unsqueeze(-1) * B, both=self.both) * C).sum(-1)
        # `ssd` sums logarithms, so that 1 - a has to fit them and not a rounded decay.
        values = u.unflatten(-1, (decay.shape[-1], -1)) * -torch.expm1(decay).unsqueeze(-1)
        y = ssd(decay, values, B, C)
        return ((y + ssd(decay, values, B, C, reverse=True)) / 2 if self.both else y).flatten(2)

    def _phi(self, x: Tensor) -> Tensor:
        return self.phi(x.mT).mT  # channels in the second place, where activations pair them

    @torch.no_grad()
    def certificate(self) -> float:
        """Return a proved Lipschitz constant of the weights in use, in the sup norm, in double precision."""
        proved = math.prod(weight.double().abs().sum(1).amax().item() for weight in self._weights())
        return min(proved, self.kappa.item())  # both bound it, and the sum may round upwards

    def _weights(self) -> tuple[Tensor, Tensor]:
        return row_normalised(self.enter, 1.0), row_normalised(self.leave, self.kappa)

    def extra_repr(self) -> str:
        """Form and constant, for `repr`."""
        return f"form={self.form!r}, kappa={self.kappa.item():.6g}, both={self.both}"
