r"""FlowSIM: the stable invariant idea with exact dynamics, for phase portraits and long rollouts.

An invertible network `h` carries the state to coordinates in which the dynamics is written down: a
contraction to a known point, or a rotation of the direction with a decaying log-radius (a polar block),
whose unit circle attracts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from geomlib.sim.bases import mlp
from geomlib.sim.mix import rotate

__all__ = ["Coupling", "FlowSIM", "polar_advance", "trajectory_loss"]

_SMALLEST_RADIUS = 1e-6  # the origin of a polar block has no phase


class Coupling(nn.Module):
    """Invertible layer: one half of the coordinates shifts and scales the other.

    Parameters
    ----------
    dim
        Number of coordinates, at least 2.
    parity
        0 or 1: which of the alternating halves stays as it is.
    width
        Of the two hidden tanh layers.
    condition_features
        Width of an input that the network may look at as well; the layer stays invertible in `y`.
    generator
        Source of the initial weights. The last layer starts at zero: the layer starts as the identity.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If `dim` is below 2 or `parity` is not 0 or 1.

    Notes
    -----
    Source: affine coupling of Dinh, Sohl-Dickstein and Bengio (2017), scale `exp(tanh(.))` so that it
    cannot overflow.

    Examples
    --------
    >>> layer = Coupling(3, parity=0)
    >>> y = torch.ones(2, 3)
    >>> torch.equal(layer.inverse(layer(y)), y)
    True
    """

    kept: Tensor
    moved: Tensor
    order: Tensor

    def __init__(
        self,
        dim: int,
        parity: int,
        width: int = 48,
        condition_features: int = 0,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}: one half must move the other")
        if parity not in (0, 1):
            raise ValueError(f"parity must be 0 or 1, got {parity}")
        index = torch.arange(dim, device=device)
        self.register_buffer("kept", index[index % 2 == parity], persistent=False)
        self.register_buffer("moved", index[index % 2 != parity], persistent=False)
        self.register_buffer("order", torch.cat([self.kept, self.moved]).argsort(), persistent=False)
        inputs, outputs = len(self.kept) + condition_features, 2 * len(self.moved)
        self.net = mlp(
            inputs, width, width, outputs, activation=nn.Tanh, generator=generator, device=device, dtype=dtype
        )
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Map `(..., dim)` forward, looking at `x` `(..., condition_features)` if there is one."""
        kept, moved = y[..., self.kept], y[..., self.moved]
        scale, shift = self._scale_and_shift(kept, x)
        return self._join(kept, moved * scale.exp() + shift)

    def inverse(self, w: Tensor, x: Tensor | None = None) -> Tensor:
        """Undo `forward` in closed form."""
        kept, moved = w[..., self.kept], w[..., self.moved]
        scale, shift = self._scale_and_shift(kept, x)
        return self._join(kept, (moved - shift) * (-scale).exp())

    def _scale_and_shift(self, kept: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(_joined(kept, x)).chunk(2, dim=-1)
        return torch.tanh(raw), shift

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([kept, moved], dim=-1)[..., self.order]


def polar_advance(w: Tensor, angle: Tensor | float, decay: Tensor | float, t: Tensor | float) -> Tensor:
    r"""Advance polar blocks: turn `w / |w|` by `angle * t`, multiply `log |w|` by `decay ** t`.

    The unit circle attracts everything but the origin; `w / |w|` and `log |w|` are eigenfunctions with
    eigenvalues `exp(i angle)` and `decay`. Advancing by `a` and then by `b` is advancing by `a + b`.

    Parameters
    ----------
    w
        `(..., 2)` real coordinates; points closer to the origin than 1e-6 are treated as on that radius, the
        origin itself stays.
    angle
        Radians in one step; a number or a tensor that broadcasts with `(...)`.
    decay
        In (0, 1) for an attracting circle.
    t
        Any real time, a number or a tensor that broadcasts with `(...)`. Angles times time are formed in
        double precision, since only the phase modulo one turn counts.

    Returns
    -------
    Tensor
        `(..., 2)`, dtype of `w`.

    Raises
    ------
    ValueError
        If the last dimension of `w` is not 2.

    Notes
    -----
    Source: reconstructed. No smooth change of coordinates makes an attracting cycle linear, so the
    block is linear in `(w / |w|, log |w|)` instead.

    Examples
    --------
    >>> w = torch.tensor([[2.0, 0.0]])
    >>> polar_advance(w, angle=torch.pi / 2, decay=0.5, t=1).numpy().round(4) + 0.0
    array([[0.    , 1.4142]], dtype=float32)
    """
    if w.ndim < 1 or w.shape[-1] != 2:
        raise ValueError(f"w must have 2 coordinates in its last dimension, got {tuple(w.shape)}")
    radius = w.norm(dim=-1).clamp_min(_SMALLEST_RADIUS)
    log_radius = radius.log() * _power(radius.new_zeros(()) + decay, t)
    return rotate(w / radius[..., None], angle, t) * log_radius.exp()[..., None]


class FlowSIM(nn.Module):
    r"""Dynamical system with a known attractor: `h^-1` after an explicit step after `h`.

    Parameters
    ----------
    dim
        Dimension of the state, at least 2.
    polar
        Variant `"cycle"`: number `m` of polar blocks, hence of independent phases; the attractor is the
        image of an `m`-torus. Default 1.
    decays
        Number of plain decaying coordinates, by default all that the polar blocks leave.
    couplings
        Coupling layers of `h`, after an affine one that fits location and scale.
    width
        Of the hidden layers.
    condition_features
        Width of an input `x` that `h` (and the fixed point of variant `"point"`) depends on; 0 for none.
    variant
        `"cycle"`, or `"point"`: `h` carries the state to a contraction towards `c(x)`, a deep equilibrium
        model whose fixed point `h^-1(c(x))` is known.
    generator
        Source of the initial weights, drawn on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        For an unknown variant or counts that do not add up to `dim`; in the methods, for a state or
        condition that does not fit.

    Notes
    -----
    Source: reconstructed (not in arXiv 2207.07475): the paper's idea with an exact inverse in place of
    the learned inverse basis, so that invariant sets can be drawn and rollouts do not drift.

    Examples
    --------
    >>> flow = FlowSIM(2, generator=torch.Generator().manual_seed(0))
    >>> y = torch.tensor([[0.3, -0.2], [2.0, 1.0]])
    >>> torch.allclose(flow.decode(flow.encode(y)), y, atol=1e-5)
    True
    >>> flow.attractor(100).shape
    torch.Size([100, 2])
    >>> flow.advance(y, 500.0).norm(dim=1).detach().numpy().round(3)
    array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        dim: int,
        polar: int | None = None,
        decays: int | None = None,
        couplings: int = 6,
        width: int = 48,
        condition_features: int = 0,
        variant: Literal["cycle", "point"] = "cycle",
        *,
        angle: float = 0.5,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("cycle", "point"):
            raise ValueError(f"variant must be 'cycle' or 'point', got {variant!r}")
        polar = int(variant == "cycle") if polar is None else polar
        decays = dim - 2 * polar if decays is None else decays
        if polar < int(variant == "cycle") or (variant == "point" and polar):
            raise ValueError(
                f"variant {variant!r} cannot have {polar} polar blocks: a cycle needs one, a point none"
            )
        if decays < 0 or dim != 2 * polar + decays:
            raise ValueError(f"dim must equal 2 * polar + decays, got {dim} and 2 * {polar} + {decays}")
        if couplings < 0 or condition_features < 0:
            raise ValueError(
                f"couplings and condition_features must be >= 0, got {couplings}, {condition_features}"
            )
        self.dim, self.polar, self.decays, self.variant = dim, polar, decays, variant
        self.condition_features = condition_features
        self.shift = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            Coupling(dim, i % 2, width, condition_features, generator=generator, device=device, dtype=dtype)
            for i in range(couplings)
        )
        self.angle = nn.Parameter(torch.full((polar,), angle, device=device, dtype=dtype))
        self.decay_logit = nn.Parameter(torch.full((polar + decays,), 1.0, device=device, dtype=dtype))
        self.center: nn.Module | None = None
        if variant == "point" and condition_features:
            widths = (condition_features, width, width, dim)
            self.center = mlp(*widths, activation=nn.Tanh, generator=generator, device=device, dtype=dtype)
        elif variant == "point":
            self.fixed_center = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    @property
    def decay(self) -> Tensor:
        """Decay factors in one step, shape `(polar + decays,)`, each in (0, 1), log-radii first."""
        return torch.sigmoid(self.decay_logit)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the state one step later."""
        return self.advance(y, 1.0, x)

    def encode(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the coordinates `h(y; x)` of states `(..., dim)`."""
        self._check(y, x)
        w = y * self.log_scale.exp() + self.shift
        for layer in self.layers:
            w = layer(w, x)
        return w

    def decode(self, w: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the states `h^-1(w; x)` of coordinates `(..., dim)`, in closed form."""
        self._check(w, x)
        for layer in reversed(self.layers):
            w = layer.inverse(w, x)  # type: ignore[operator]
        return (w - self.shift) * (-self.log_scale).exp()

    def advance(self, y: Tensor, t: Tensor | float, x: Tensor | None = None) -> Tensor:
        """Return the state after time `t`.

        Parameters
        ----------
        y
            States `(..., dim)`.
        t
            Any real time (one step is 1), a number or a tensor that broadcasts with `(...)`.
        x
            Condition `(..., condition_features)`, if the model has one.

        Returns
        -------
        Tensor
            `(..., dim)`.
        """
        return self.decode(self.advance_code(self.encode(y, x), t, x), x)

    def advance_code(self, w: Tensor, t: Tensor | float, x: Tensor | None = None) -> Tensor:
        """Advance coordinates `(..., dim)` by `t`: the dynamics without `h` and its inverse."""
        if self.variant == "point":
            center = self._center(x)
            return center + (w - center) * _power(self.decay, _columns(t))
        blocks, rest = self._split(w)
        blocks = polar_advance(blocks, self.angle, self.decay[: self.polar], _columns(t))
        rest = rest * _power(self.decay[self.polar :], _columns(t))
        return torch.cat([blocks.flatten(-2), rest], dim=-1)

    def limit(self, y: Tensor, t: Tensor | float = 0.0, x: Tensor | None = None) -> Tensor:
        """Return the state on the attractor that `y` approaches, with its phases advanced by `t`.

        `advance(y, t) - limit(y, t)` tends to zero. In variant `"point"` this is the fixed point.

        Parameters
        ----------
        y
            States `(..., dim)`.
        t
            Any real time; it only turns the phases.
        x
            Condition, if the model has one.

        Returns
        -------
        Tensor
            `(..., dim)`.
        """
        w = self.encode(y, x)
        if self.variant == "point":
            return self.decode(self._center(x).expand_as(w), x)
        blocks, rest = self._split(w)
        direction = blocks / blocks.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST_RADIUS)
        turned = rotate(direction, self.angle, _columns(t)).flatten(-2)
        return self.decode(torch.cat([turned, torch.zeros_like(rest)], dim=-1), x)

    def attractor(self, n: int, x: Tensor | None = None) -> Tensor:
        """Return points of the attractor, `n` equispaced phases for every polar block.

        Their plain mean of any function is its time average, exact for trigonometric polynomials in the
        phases of degree below `n`.

        Parameters
        ----------
        n
            At least 1.
        x
            Conditions `(..., condition_features)`, if the model has them.

        Returns
        -------
        Tensor
            `(..., n ** polar, dim)`; in variant `"point"`, `(..., 1, dim)`.

        Raises
        ------
        ValueError
            If `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if self.variant == "point":
            w = self._center(x)[..., None, :]
        else:
            start = self.shift.new_tensor([1.0, 0.0]).expand(n, 2)
            circle = rotate(start, 2 * torch.pi / n, torch.arange(n, device=self.shift.device))
            index = torch.cartesian_prod(*[torch.arange(n, device=self.shift.device)] * self.polar)
            torus = circle[index.reshape(-1, self.polar)].flatten(-2)  # (n ** polar, 2 * polar)
            w = torch.cat([torus, torus.new_zeros(len(torus), self.decays)], dim=-1)
        if x is not None:
            w = w.expand(*x.shape[:-1], *w.shape[-2:])
            x = x[..., None, :].expand(*w.shape[:-1], x.shape[-1])
        return self.decode(w, x)

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """Return the eigenvalues: `exp(+-i angle)` of every polar block, then the decay factors.

        Returns
        -------
        Tensor
            `(3 polar + decays,)` complex128 on the CPU. A polar block has three eigenfunctions on its plane:
            its direction as a complex number, the conjugate, and the log-radius.
        """
        angle, decay = self.angle.detach().cpu().double(), self.decay.detach().cpu().double()
        turning = torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turning, turning.conj().resolve_conj(), decay.to(torch.complex128)])

    def extra_repr(self) -> str:
        """Describe the model in `repr`."""
        return f"{self.dim}, polar={self.polar}, decays={self.decays}, variant={self.variant!r}"

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w[..., : 2 * self.polar].unflatten(-1, (self.polar, 2)), w[..., 2 * self.polar :]

    def _center(self, x: Tensor | None) -> Tensor:
        return self.fixed_center if self.center is None else self.center(x)

    def _check(self, y: Tensor, x: Tensor | None) -> None:
        if not y.is_floating_point() or y.ndim < 1 or y.shape[-1] != self.dim:
            raise ValueError(
                f"states must be floating point (..., {self.dim}), got {y.dtype} {tuple(y.shape)}"
            )
        if self.condition_features == 0 and x is not None:
            raise ValueError("x must be None: the model was built without condition_features")
        if self.condition_features and (x is None or x.shape[-1] != self.condition_features):
            got = None if x is None else tuple(x.shape)
            raise ValueError(f"x must be (..., {self.condition_features}), got {got}")


def trajectory_loss(
    flow: FlowSIM, start: Tensor, later: Tensor, steps: Tensor | float, x: Tensor | None = None
) -> Tensor:
    """Return how far `flow` misses states seen `steps` later, in the state and in its own coordinates.

    Parameters
    ----------
    flow
        The model.
    start, later
        States `(batch, dim)` and the states `steps` later.
    steps
        Number of steps between them, `(batch,)` or one number.
    x
        Condition, if the model has one.

    Returns
    -------
    Tensor
        Mean over the batch of the two squared distances, a number.

    Notes
    -----
    Source: reconstructed. The second term keeps `h` from hiding an error where its inverse is flat.

    Examples
    --------
    >>> flow = FlowSIM(2)
    >>> y = torch.tensor([[1.0, 0.0]])
    >>> trajectory_loss(flow, y, flow.advance(y, 3.0), 3.0).item() < 1e-10
    True
    """
    code = flow.advance_code(flow.encode(start, x), steps, x)
    miss = (flow.decode(code, x) - later).square().sum(dim=-1)
    code_miss = (code - flow.encode(later, x)).square().sum(dim=-1)
    return (miss + code_miss).mean()


def _joined(y: Tensor, x: Tensor | None) -> Tensor:
    return y if x is None else torch.cat([y, x], dim=-1)


def _columns(t: Tensor | float) -> Tensor | float:
    """Give a tensor of times a last dimension, so that it broadcasts with eigenvalues."""
    return t[..., None] if isinstance(t, Tensor) and t.ndim else t


def _power(decay: Tensor, t: Tensor | float) -> Tensor:
    return decay ** (t.to(decay.dtype) if isinstance(t, Tensor) else t)
