r"""Transitions: the shared block that every step applies, free or with a proved Lipschitz constant.

A state is `(N, d)`, a sequence `(N, d, L)` or a map `(N, d, H, W)`, channels in the second place and last in
memory. `Block` is the free form of arXiv 2601.19551 (section 6, Appendix C) without an inner skip: the step
of the model is the skip. `Certified` is `W_n phi(... phi(W_1 h + U x + b))` with operator norms that are
proved, so that the step contracts. `Bottleneck` and `AttentionBlock` have the paper's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.core.norms import ITERATIONS, operator_norm_bound

__all__ = [
    "ACTIVATIONS",
    "AttentionBlock",
    "Block",
    "Bottleneck",
    "Certified",
    "Prepared",
    "Transition",
    "channel_norm",
    "convolve",
    "max_min",
    "normalised",
    "uniform",
]


class Prepared(NamedTuple):
    """What a transition computes once per sample, and once per forward pass.

    Attributes
    ----------
    rows : tuple of Tensor
        First dimension `N`: selected together with the state when samples leave the batch.
    shared : tuple of Tensor
        The same for all samples, such as normalised weights.
    """

    rows: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()


class Transition(nn.Module):
    """What the step applies: `prepare` once per forward pass, then `forward` at every step.

    A subclass that is built with `kappa` promises that `forward` is Lipschitz in the state with that
    constant, in the 2-norm unless `norm` says `"sup"`, whatever the input. The constant is a buffer, so that
    it is saved with the model.

    Examples
    --------
    >>> class Turn(Transition):
    ...     def forward(self, state, prepared):
    ...         return self.kappa * state.flip(1)
    >>> Turn(kappa=0.5)(torch.tensor([[2.0, 4.0]]), Prepared())
    tensor([[2., 1.]])
    """

    kappa: Tensor | None
    norm: Literal["2", "sup"] = "2"

    def __init__(
        self,
        kappa: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("kappa", None if kappa is None else torch.empty((), device=device, dtype=dtype))
        if kappa is not None:
            self.set_kappa(kappa)

    def set_kappa(self, kappa: float) -> None:
        """Change the constant from here on, for example along a schedule; raise unless it is in (0, 1)."""
        if self.kappa is None:
            raise ValueError(f"kappa belongs to certified transitions, got {kappa} for {type(self).__name__}")
        if not 0 < kappa < 1:
            raise ValueError(f"kappa must lie in (0, 1), got {kappa}: the transition would not contract")
        self.kappa.fill_(kappa)

    def prepare(self, x: Tensor) -> Prepared:
        """Return what does not depend on the state, from the injected features `x`, shaped like a state."""
        return Prepared()

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map a state to one of the same shape."""
        raise NotImplementedError


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Apply a matrix `(out, in)` or an odd kernel `(out, in, k)`, `(out, in, k, k)` to a state of that kind.

    Zero padding keeps the size. Sequences go through the two-dimensional routine, which is faster where the
    channels are last in memory.

    Examples
    --------
    >>> x = torch.ones(2, 3, 5)
    >>> convolve(x, torch.ones(4, 3, 3)).shape, convolve(x, torch.ones(4, 3, 3))[0, 0]
    (torch.Size([2, 4, 5]), tensor([6., 9., 9., 9., 6.]))
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    reach = dilation * (weight.shape[-1] // 2)
    if weight.dim() == 4:
        return F.conv2d(x, weight, bias, padding=reach, dilation=dilation)
    wide = F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, padding=(0, reach), dilation=(1, dilation))
    return wide.squeeze(2)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the channels of each position, `(N, d, ...)`: nothing is shared between samples or places.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 5.0], [3.0, 7.0]]])
    >>> channel_norm(x, torch.ones(2), torch.zeros(2))[0, :, 0].round()
    tensor([-1.,  1.])
    """
    return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias).movedim(-1, 1)


def max_min(x: Tensor) -> Tensor:
    """Sort each half of the channels against the other: 1-Lipschitz, and no gradient is lost.

    Channel `i` of the first half becomes the larger, of the second the smaller of the pair. The Jacobian is
    a permutation, so that the norm of a gradient is kept where ReLU drops a part of it. The number of
    channels is even.

    Notes
    -----
    Source: GroupSort with groups of two, Anil, Lucas and Grosse 2019 (arXiv 1811.05381).

    Examples
    --------
    >>> max_min(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    tensor([[3., 2., 1., 0.]])
    """
    first, second = x.chunk(2, 1)
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "max_min": max_min,
}
"""The activations with slope at most 1 that a certificate may rest on."""


def normalised(raw: Tensor, bound: Tensor | float) -> Tensor:
    """Scale a matrix or a kernel so that its proved operator norm is `bound`, rounding included.

    Smaller weights are scaled up as well: a default initial weight is far inside the ball, and clipped only
    it would leave the block weak. Differentiable in `raw`; one call per forward pass is enough.

    Parameters
    ----------
    raw : Tensor
        `(out, in)`, `(out, in, k)` or `(out, in, k, k)`, floating. A dilated kernel has the same norm.
    bound : Tensor or float
        What the norm is not to exceed.

    Returns
    -------
    Tensor
        Shape and dtype of `raw`.

    Notes
    -----
    Source: the bound of :func:`geomlib.core.operator_norm_bound` (arXiv 2305.16173), from above at every
    iteration. A power iteration comes from below and needs a margin that nothing proves.

    Examples
    --------
    >>> weight = normalised(torch.diag(torch.tensor([3.0, 1.0])), 0.9)
    >>> round(torch.linalg.matrix_norm(weight, 2).item(), 3)
    0.9
    """
    reached = operator_norm_bound(raw)
    # The scaled entries are rounded, tap by tap: Frobenius norms, at most sqrt(rank) operator norms.
    roundoff = torch.finfo(raw.dtype).eps / 2 + 2 * torch.finfo(reached.dtype).eps
    allowance = 1 + roundoff * math.prod(raw.shape[2:]) * math.sqrt(min(raw.shape[:2]))
    factor = bound / (reached * allowance).clamp_min(torch.finfo(reached.dtype).tiny)
    return (raw.to(factor.dtype) * factor).to(raw.dtype)


class Block(Transition):
    """The free transition: widen, normalise, ReLU, narrow, normalise; no skip.

    Parameters
    ----------
    width : int
        Channels of the state.
    axes : {0, 1, 2}
        Vector, sequence or map.
    kernel_size : int
        Odd; ignored for vectors.
    dilation : int
        Of both convolutions.
    expansion : int
        Hidden channels are `expansion * width`.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is below 1, `axes` is not 0, 1 or 2, or the kernel is even.

    Notes
    -----
    Source: a shape-preserving block (Appendix C). Reconstructed: the two layers and the norm over channels,
    because batch normalisation would mix samples and steps.

    Examples
    --------
    >>> block = Block(8, axes=1, generator=torch.Generator().manual_seed(0))
    >>> block(torch.ones(2, 8, 5), Prepared()).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        width: int,
        *,
        axes: int = 0,
        kernel_size: int = 3,
        dilation: int = 1,
        expansion: int = 2,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width=width, expansion=expansion, dilation=dilation, kernel_size=kernel_size, axes=axes)
        hidden, kernel, self.dilation = expansion * width, (kernel_size,) * axes, dilation
        self.weight1 = uniform((hidden, width, *kernel), None, generator, device, dtype)
        self.bias1 = uniform((hidden,), self.weight1, generator, device, dtype)
        self.gain1, self.shift1 = _affine(hidden, device, dtype)
        self.weight2 = uniform((width, hidden, *kernel), None, generator, device, dtype)
        self.bias2 = uniform((width,), self.weight2, generator, device, dtype)
        self.gain2, self.shift2 = _affine(width, device, dtype)

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, ...)` to the same shape."""
        wide = channel_norm(convolve(state, self.weight1, self.bias1, self.dilation), self.gain1, self.shift1)
        narrow = convolve(torch.relu(wide), self.weight2, self.bias2, self.dilation)
        return channel_norm(narrow, self.gain2, self.shift2)


class Certified(Transition):
    r"""`G(h; x) = W_n phi(... phi(W_1 h + U x + b_1) ...)`, Lipschitz in `h` with constant `kappa`.

    All operator norms are at most 1, the last at most `kappa`; `U` and the biases are free, so that the
    input enters inside the nonlinearity without costing anything.

    Parameters
    ----------
    width : int
        Channels of the state.
    axes : {0, 1, 2}
        Vector, sequence or map.
    hidden : sequence of int, optional
        Channels between the weights, `(2 * width,)` by default; one weight more than entries.
    kernel_size : int or sequence of int
        Odd, one for all weights or one for each; ignored for vectors.
    dilation : int
        Of all convolutions; it widens the reach of a step and leaves the norms as they are.
    kappa : float
        The constant, in (0, 1); changed during training by `set_kappa`.
    activation : {"relu", "tanh", "max_min"}
        All 1-Lipschitz.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU: orthogonal as matrices
        `(out, in * taps)`.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is below 1, a kernel even, `kappa` not in (0, 1), or the activation unknown or steeper
        than 1.

    Notes
    -----
    Source: Theorem B.2 allows any nonlinear operator with a Lipschitz constant below 1; eq. (25) injects
    inside the nonlinearity. Reconstructed: the parameterisation, in which eq. (14) contracts by
    construction.

    Examples
    --------
    >>> block = Certified(8, kappa=0.9, generator=torch.Generator().manual_seed(0))
    >>> prepared = block.prepare(torch.ones(1, 8))
    >>> near, far = block(torch.zeros(1, 8), prepared), block(torch.ones(1, 8), prepared)
    >>> bool((near - far).norm() <= 0.9 * 8**0.5), block.certificate() <= 0.9
    (True, True)
    """

    kappa: Tensor

    def __init__(
        self,
        width: int,
        *,
        axes: int = 0,
        hidden: Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 3,
        dilation: int = 1,
        kappa: float = 0.9,
        activation: str = "relu",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kappa, device=device, dtype=dtype)
        widths = (width, *((2 * width,) if hidden is None else hidden), width)
        kernels = [kernel_size] * (len(widths) - 1) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(widths) - 1:
            raise ValueError(
                f"kernel_size must have {len(widths) - 1} entries, got {len(kernels)}: one per weight"
            )
        for size, kernel in zip(widths[1:], kernels, strict=True):
            _check(width=width, hidden=size, dilation=dilation, kernel_size=kernel, axes=axes)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}: a certificate needs "
                "slope at most 1, and GELU reaches 1.13, SiLU 1.10"
            )
        if activation == "max_min" and any(size % 2 for size in widths[1:-1]):
            raise ValueError(f"hidden must be even for 'max_min', got {widths[1:-1]}: channels are paired")
        self.activation, self.dilation = activation, dilation
        self.phi = ACTIVATIONS[activation]
        self.weights = nn.ParameterList(
            _orthogonal((outputs, inputs, *[kernel] * axes), generator, device, dtype)
            for inputs, outputs, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        )
        self.inject = uniform((widths[1], width, *[kernels[0]] * axes), None, generator, device, dtype)
        self.biases = nn.ParameterList(
            uniform((size,), self.inject, generator, device, dtype) for size in widths[1:-1]
        )

    def prepare(self, x: Tensor) -> Prepared:
        """Return `U x + b` and the normalised weights."""
        return Prepared((convolve(x, self.inject, self.biases[0], self.dilation),), self._weights())

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, ...)` to the same shape."""
        first, *others = prepared.shared
        wide = self.phi(convolve(state, first, None, self.dilation) + prepared.rows[0])
        for weight, bias in zip(others[:-1], self.biases[1:], strict=True):
            wide = self.phi(convolve(wide, weight, bias, self.dilation))
        return convolve(wide, others[-1], None, self.dilation)

    @torch.no_grad()
    def certificate(self) -> float:
        """Return a proved Lipschitz constant of the weights in use, computed in double precision."""
        bounds = [
            operator_norm_bound(weight.double(), iterations=ITERATIONS + 4) for weight in self._weights()
        ]
        proved = math.prod(bound.item() for bound in bounds)
        return min(proved, self.kappa.item())  # both bound it, and the second evaluation may round upwards

    def _weights(self) -> tuple[Tensor, ...]:
        *first, last = self.weights
        return (*(normalised(raw, 1.0) for raw in first), normalised(last, self.kappa))


class Bottleneck(Transition):
    """The residual branch of a ResNet-50 block on maps: 1x1, 3x3, 1x1, each with a norm, ReLU between.

    Parameters
    ----------
    width : int
        Channels of the state, 256 in the paper.
    hidden : int
        Channels between, 64 in the paper.
    groups : int
        Of the group norms, a divisor of both.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is below 1 or `groups` divides one of them not.

    Notes
    -----
    Source: section 6 and Table 3; 69 632 weights at 256 and 64. Reconstructed: group norms, because batch
    normalisation would mix samples and steps.

    Examples
    --------
    >>> block = Bottleneck(8, 4, groups=2, generator=torch.Generator().manual_seed(0))
    >>> block(torch.ones(2, 8, 5, 5), Prepared()).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        width: int = 256,
        hidden: int = 64,
        *,
        groups: int = 16,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width=width, hidden=hidden, groups=groups)
        if width % groups or hidden % groups:
            raise ValueError(f"groups must divide {width} and {hidden}, got {groups}: no group norm is that")
        self.groups = groups
        shapes = [(hidden, width, 1, 1), (hidden, hidden, 3, 3), (width, hidden, 1, 1)]
        self.weights = nn.ParameterList(uniform(shape, None, generator, device, dtype) for shape in shapes)
        gains, shifts = zip(*(_affine(shape[0], device, dtype) for shape in shapes), strict=True)
        self.gains, self.shifts = nn.ParameterList(gains), nn.ParameterList(shifts)

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, H, W)` to the same shape."""
        for index, weight in enumerate(self.weights):
            state = torch.relu(state) if index else state
            state = convolve(state, weight)
            state = F.group_norm(state, self.groups, self.gains[index], self.shifts[index])
        return state


class AttentionBlock(Transition):
    """The two residual branches of a ViT block on sequences, together, without the outer skip.

    With `u = h + attention(norm(h))` it returns `u + mlp(norm(u)) - h`: an Euler step of length 1 is the
    block of the vision transformer.

    Parameters
    ----------
    width : int
        Channels of the state, 768 in ViT-B.
    heads : int
        A divisor of `width`, 12 in ViT-B.
    expansion : int
        Hidden channels of the network are `expansion * width`.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is below 1 or `heads` does not divide `width`.

    Notes
    -----
    Source: section 6 and Table 3, 7 087 872 parameters at the paper's size; Dosovitskiy et al. 2021 (arXiv
    2010.11929) for the block. Dot-product attention has no global Lipschitz constant (Kim, Papamakarios and
    Mnih 2021, arXiv 2006.04710), so that this block has no certificate, only local measurements.

    Examples
    --------
    >>> block = AttentionBlock(8, 2, generator=torch.Generator().manual_seed(0))
    >>> block(torch.ones(2, 8, 5), Prepared()).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        width: int = 768,
        heads: int = 12,
        *,
        expansion: int = 4,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width=width, heads=heads, expansion=expansion)
        if width % heads:
            raise ValueError(f"heads must divide {width}, got {heads}: the channels are shared out evenly")
        self.heads = heads
        shapes = [(3 * width, width), (width, width), (expansion * width, width), (width, expansion * width)]
        self.weights = nn.ParameterList(uniform(shape, None, generator, device, dtype) for shape in shapes)
        self.biases = nn.ParameterList(
            uniform((len(weight),), weight, generator, device, dtype) for weight in self.weights
        )
        self.gain1, self.shift1 = _affine(width, device, dtype)
        self.gain2, self.shift2 = _affine(width, device, dtype)

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, L)` to the same shape."""
        tokens = state.mT  # (N, L, d)
        flat = F.layer_norm(tokens, self.gain1.shape, self.gain1, self.shift1)
        split = F.linear(flat, self.weights[0], self.biases[0]).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (N, heads, L, d / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = F.linear(mixed, self.weights[1], self.biases[1])
        flat = F.layer_norm(tokens + attended, self.gain2.shape, self.gain2, self.shift2)
        wide = F.gelu(F.linear(flat, self.weights[2], self.biases[2]))
        return (attended + F.linear(wide, self.weights[3], self.biases[3])).mT


def _check(axes: int = 0, kernel_size: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}: the block would be empty")
    if axes not in (0, 1, 2):
        raise ValueError(f"axes must be 0 (vector), 1 (sequence) or 2 (map), got {axes}: no such state")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}: the state would change its size")


def _place(values: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """Move numbers drawn on the CPU, so that they are the same on every device."""
    return nn.Parameter(
        values.to(device=device or torch.get_default_device(), dtype=dtype or torch.get_default_dtype())
    )


def uniform(
    shape: tuple[int, ...],
    weight: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Draw from `+-1/sqrt(fan_in)`, torch's own range; a bias takes the fan of its weight."""
    fan_in = math.prod(shape[1:]) if weight is None else math.prod(weight.shape[1:])
    values = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return _place((2 * values - 1) / math.sqrt(fan_in), device, dtype)


def _orthogonal(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Draw a matrix `(out, in * taps)` with orthonormal rows or columns."""
    rows, columns = shape[0], math.prod(shape[1:])
    tall = torch.randn(
        max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64, device="cpu"
    )
    Q, R = torch.linalg.qr(tall)
    Q = Q * R.diagonal().sign()  # uniform over the orthogonal group
    return _place((Q if rows >= columns else Q.T).reshape(shape), device, dtype)


def _affine(
    width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    return _place(torch.ones(width), device, dtype), _place(torch.zeros(width), device, dtype)
