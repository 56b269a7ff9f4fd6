"""Transitions: the shared block that every step applies, and what a transition has to offer.

A state is `(N, d)`, a sequence `(N, d, L)` or a map `(N, d, H, W)`, channels in the second place and last in
memory. `Block` is the free form of arXiv 2601.19551 (section 6, Appendix C) without an inner skip: the step
of the model is the skip. `Bottleneck` and `AttentionBlock` have the paper's sizes. What contracts by
construction is in :mod:`geomlib.frost.certified`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AttentionBlock",
    "Block",
    "Bottleneck",
    "Prepared",
    "Transition",
    "channel_norm",
    "check_sizes",
    "convolve",
    "place",
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
        check_sizes(width=width, expansion=expansion, dilation=dilation, kernel_size=kernel_size, axes=axes)
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
        check_sizes(width=width, hidden=hidden, groups=groups)
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
        check_sizes(width=width, heads=heads, expansion=expansion)
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


def check_sizes(axes: int = 0, kernel_size: int = 1, **sizes: int) -> None:
    """Raise unless sizes are positive, the kernel odd and the state a vector, a sequence or a map."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}: the block would be empty")
    if axes not in (0, 1, 2):
        raise ValueError(f"axes must be 0 (vector), 1 (sequence) or 2 (map), got {axes}: no such state")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}: the state would change its size")


def place(values: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
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
    return place((2 * values - 1) / math.sqrt(fan_in), device, dtype)


def _affine(
    width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    return place(torch.ones(width), device, dtype), place(torch.zeros(width), device, dtype)
