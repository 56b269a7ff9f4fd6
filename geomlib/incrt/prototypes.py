r"""The DDCL block: a dictionary of prototypes in the place of the feed-forward block of a transformer.

`y = softmax(-D / T) U`: assignments of arXiv 2604.01740 times values. With `out="barycentre"` the values are
the prototypes themselves behind a linear map, with `out="value"` they are free, which is the key-value memory
that a feed-forward block is said to be; with `out="gated"` each value is scaled by the fit of its prototype.
The dictionary has a loss of its own, the soft quantisation loss.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from geomlib.core.precision import working_dtype
from geomlib.incrt.dictionary import draw_tokens
from geomlib.incrt.quantise import Mode, Quantised, check_mode, check_temperature, soft_quantise
from geomlib.incrt.temperature import Temperature

__all__ = ["DDCLBlock"]

Out = Literal["barycentre", "value", "gated"]
Param = Literal["primal", "dual"]
Start = Literal["tokens", "spread", "mean"]


class DDCLBlock(nn.Module):
    r"""Dictionary of prototypes, applied to every token on its own.

    Parameters
    ----------
    d
        Width of the tokens.
    K
        Number of prototypes.
    out
        `"barycentre"`: `y = (q P) W`, with `W` `(d, d)` that starts at a tenth of the identity. `"value"`:
        `y = q U`, with a free value `(d,)` for each prototype. `"gated"`: `y = (q m) U`, with `m` the match
        (see `Quantised`) over the root of `d`: the output grows with the token, as that of an MLP block
        does, and is not held in the hull of the values.
    param
        `"primal"`: prototypes are free. `"dual"`: they are mixtures of a reservoir of tokens, `softmax(M) R`,
        and stay in its convex hull.
    mode
        Gradient of the loss: through the assignments (`"full"`) or past them (`"em"`).
    stop_grad
        Keep the loss away from the tokens. Without it an encoder can lower the loss by making all tokens
        alike.
    temperature
        A schedule, or a number that is held.
    groups
        Deal the prototypes out into so many dictionaries that assign independently (see `soft_quantise`);
        with two prototypes in each, the block is a feed-forward block with sigmoid units.
    active
        How many prototypes are switched on; the others are room to grow into, see
        `split_prototypes`. None: all, and for good.
    commitment
        Weight of the mean squared distance of the tokens from their barycentres, held fixed, in the loss.
    reservoir
        Tokens in the reservoir of the dual form.
    check_finite
        Look for infinities and NaN in the input of every call; it waits for the device.
    generator
        Source of the initial numbers.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    prototypes : Tensor
        `(K, d)`; a parameter, or computed from `mixture` and `reservoir`.
    values, weight : Parameter
        `U` `(K, d)` or `W` `(d, d)`, whichever `out` asks for; the other is None.
    log_prior : Tensor
        `(K,)`: 0, `-inf` for a prototype that is off, `log(1/2)` lower for each of two halves.
    temperature : Temperature

    Raises
    ------
    ValueError
        If an argument is out of range; in `forward`, if the tokens do not fit or, if asked, are not finite.

    Notes
    -----
    Source: arXiv 2604.01880 says that the dictionary replaces the feed-forward block; how its output enters
    the residual stream could not be seen. Output, values, groups, prior and start are reconstructed. Before
    `initialise_from` the prototypes stand near the mean of normalised tokens, 0, and part as the default
    schedule cools; prototypes far from all tokens would never be used.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> block = DDCLBlock(4, 8, generator=generator)
    >>> y, quantised = block(torch.randn(2, 5, 4, generator=generator))
    >>> y.shape, quantised.q.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 5, 8]))
    """

    free: Tensor
    mixture: Tensor
    reservoir: Tensor
    log_prior: Tensor
    weight: nn.Parameter | None
    values: nn.Parameter | None

    def __init__(
        self,
        d: int,
        K: int,
        *,
        out: Out = "barycentre",
        param: Param = "primal",
        mode: Mode = "full",
        stop_grad: bool = True,
        temperature: Temperature | float | None = None,
        groups: int = 1,
        active: int | None = None,
        commitment: float = 0.0,
        reservoir: int = 256,
        check_finite: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grows = active is not None
        active = K if active is None else active
        _check(d, K, out, param, groups, active, self.grows, commitment, reservoir)
        check_mode(mode)
        self.d, self.K, self.out, self.param, self.mode = d, K, out, param, mode
        self.stop_grad, self.groups, self.commitment = stop_grad, groups, commitment
        self.check_finite = check_finite

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        if param == "primal":
            self.free = nn.Parameter(0.01 * draw(K, d))
        else:
            self.mixture = nn.Parameter(draw(K, reservoir))
            self.register_buffer("reservoir", draw(reservoir, d))
        self.weight = None
        self.values = None
        if out == "barycentre":
            self.weight = nn.Parameter(0.1 * torch.eye(d, device=device, dtype=dtype))
        else:
            self.values = nn.Parameter(draw(K, d) / math.sqrt(d))
        prior = torch.zeros(K)
        prior[active:] = -math.inf
        self.register_buffer("log_prior", prior.to(device, dtype))
        if isinstance(temperature, Temperature):
            self.temperature = temperature
        elif temperature is None:
            self.temperature = Temperature(device=device, dtype=dtype)
        else:
            check_temperature(temperature)
            self.temperature = Temperature(
                temperature, temperature, relative=False, device=device, dtype=dtype
            )
        if self.temperature.relative:
            self.temperature.watch(d)

    @property
    def prototypes(self) -> Tensor:
        """Prototypes `(K, d)`."""
        return self.free if self.param == "primal" else self.mixture.softmax(-1) @ self.reservoir

    @property
    def active(self) -> int:
        """Number of prototypes that are switched on."""
        return int(self.log_prior.isfinite().sum())

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Quantised]:
        """Return the output of the dictionary, and the assignments with their loss.

        Parameters
        ----------
        z
            Tokens `(..., n, d)`.
        mask
            Valid tokens `(..., n)`, boolean; the others give 0 and enter no statistic.

        Returns
        -------
        y : Tensor
            `(..., n, d)`.
        quantised : Quantised
        """
        if z.dim() < 1 or z.shape[-1] != self.d:
            raise ValueError(f"z must be (..., {self.d}), got shape {tuple(z.shape)}")
        if self.check_finite and not bool(torch.isfinite(z).all()):
            raise ValueError("z must be finite, got infinities or NaN: every later number would be NaN")
        T = self.temperature.update(z, mask) if self.training else self.temperature.value()
        P = self.prototypes
        quantised = soft_quantise(
            z,
            P,
            T,
            self.mode,
            mask,
            groups=self.groups,
            log_prior=self.log_prior if self.grows else None,
            stop_grad=self.stop_grad,
            commitment=self.commitment,
        )
        # The linear map acts on K prototypes, not on all tokens.
        if self.weight is not None:
            values: Tensor = P @ self.weight / self.groups
        else:
            assert self.values is not None
            values = self.values
        shares = quantised.q
        if self.out == "gated":
            shares = shares * quantised.match * (1 / math.sqrt(self.d))
        return shares.to(values.dtype) @ values, quantised

    @torch.no_grad()
    def initialise_from(
        self,
        tokens: Tensor,
        method: Start = "tokens",
        *,
        noise: float = 0.01,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put the prototypes where tokens are.

        Parameters
        ----------
        tokens
            `(..., d)`.
        method
            `"tokens"` takes a random sample of them, `"spread"` one in which each next token is drawn in
            proportion to its squared distance from those before (k-means++), `"mean"` their mean.
        noise
            Standard deviation of what is added, in units of the tokens' own; coincident prototypes would
            receive the same gradient for ever.
        mask
            Valid tokens `(...)`, boolean.
        generator
            Source of the draws.

        Raises
        ------
        ValueError
            If the method is unknown, there is no token, or they have another width.

        Examples
        --------
        >>> block = DDCLBlock(2, 3, generator=torch.Generator().manual_seed(0))
        >>> tokens = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
        >>> block.initialise_from(tokens, noise=0.0, generator=torch.Generator().manual_seed(0))
        >>> block.prototypes.sum(0)
        tensor([8., 8.], grad_fn=<SumBackward1>)
        """
        if method not in get_args(Start):
            raise ValueError(f"method must be one of {', '.join(get_args(Start))}, got {method!r}")
        if tokens.numel() == 0 or tokens.shape[-1] != self.d:
            raise ValueError(f"tokens must be (..., {self.d}) and not empty, got {tuple(tokens.shape)}")
        x = tokens.detach().reshape(-1, self.d)
        x = x if mask is None else x[mask.reshape(-1)]
        x = x.to("cpu", working_dtype(x.dtype))  # where the draws are
        if self.param == "dual":
            size = len(self.reservoir)
            self.reservoir.copy_(draw_tokens(x, size, generator=generator))
            start = torch.randn(self.K, size, generator=generator)
            own = torch.arange(self.K)
            # Nine tenths of each mixture lie on one token of the reservoir.
            start[own, own % size] += math.log(9 * max(1, size - 1))
            self.mixture.copy_(start)
            return
        if method == "mean":
            start = x.mean(0).expand(self.K, -1)
        else:
            start = draw_tokens(x, self.K, spread=method == "spread", generator=generator)
        deviation = (x - x.mean(0)).square().mean().sqrt()
        self.free.copy_(start + noise * deviation * torch.randn(self.K, self.d, generator=generator))

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        return f"{self.d}, {self.K}, out={self.out!r}, param={self.param!r}, mode={self.mode!r}"


def _check(
    d: int,
    K: int,
    out: str,
    param: str,
    groups: int,
    active: int,
    grows: bool,
    commitment: float,
    reservoir: int,
) -> None:
    for name, value in {"d": d, "K": K, "reservoir": reservoir}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: the dictionary would be empty")
    for name, given, kind in (("out", out, Out), ("param", param, Param)):
        if given not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {given!r}")
    if groups < 1 or K % groups:
        raise ValueError(f"groups must divide K = {K}, got {groups}: dictionaries have one size")
    if not 1 <= active <= K:
        raise ValueError(f"active must lie in 1 ... {K}, got {active}")
    if grows and (groups > 1 or param == "dual"):
        raise ValueError(
            f"active needs one primal dictionary, got {groups} groups and param {param!r}: "
            "only there is it clear what a split prototype is"
        )
    if not (commitment >= 0 and math.isfinite(commitment)):
        raise ValueError(f"commitment must be finite and at least 0, got {commitment}")
    if commitment > 0.05:
        warnings.warn(
            f"commitment {commitment} pulls tokens together as a loss without stop_grad would; 0.05 is much",
            stacklevel=3,
        )
