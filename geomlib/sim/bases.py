"""Basis networks: from an input to the features in which the dynamics of a stable invariant model is linear.

At eigenvalue 1 a Koopman eigenfunction of an attracting fixed point is a function of the input alone, which
is why these networks take no initial state. Sizes as in the public code of arXiv 2207.07475.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["ConvBasis", "TemporalConvBasis", "mlp"]

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv1d, nn.Conv2d)


class _MLP(nn.Sequential):
    """Linear layers with activations between them; refuses what does not fit before any work."""

    def forward(self, x: Tensor) -> Tensor:
        width = self[0].in_features
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != width:
            raise ValueError(f"x must have {width} features in its last dimension, got {tuple(x.shape)}")
        return super().forward(x)


def mlp(
    *widths: int,
    activation: type[nn.Module] = nn.ReLU,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Return linear layers of the given widths with an activation between them and none at the end.

    Parameters
    ----------
    widths
        At least an input and an output width.
    activation
        Class of the activation.
    generator
        Source of the initial weights, drawn on the CPU with the ranges of `torch.nn.Linear`.
    device, dtype
        Of the parameters.

    Returns
    -------
    torch.nn.Sequential
        Maps `(..., widths[0])` to `(..., widths[-1])`; raises `ValueError` on a width that does not fit and
        on integers.

    Raises
    ------
    ValueError
        With fewer than two widths or a width below 1.

    Notes
    -----
    Source: FC basis and inverse basis of the authors' public code.

    Examples
    --------
    >>> net = mlp(64, 32, 8)
    >>> net(torch.zeros(5, 64)).shape
    torch.Size([5, 8])
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more positive integers, got {widths}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, **_factory(device, dtype))
        layers += [initialise_(linear, generator), activation()]
    return _MLP(*layers[:-1])


class ConvBasis(nn.Module):
    """Two stages of two 3x3 convolutions with batch normalisation and a halving, then a linear map.

    Parameters
    ----------
    channels
        Of the image.
    width_channels
        Of every convolution.
    out_features
        Width `D` of the features.
    size
        Height and width of the image, at least 4 (an integer or a pair): it is halved twice, rounding down.
    generator
        Source of the initial weights, drawn on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If an image side is below 4 or a count is not positive; in `forward`, if the image does not fit or is
        not floating point.

    Notes
    -----
    Source: the authors' public code (MNIST: 24 channels; SVHN and CIFAR-10: 38).

    Examples
    --------
    >>> basis = ConvBasis(1, 16, 32, size=8)
    >>> basis(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 32])
    """

    def __init__(
        self,
        channels: int,
        width_channels: int,
        out_features: int,
        size: int | tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 4:
            raise ValueError(
                f"size must be at least 4 in both directions, got {height}x{width}: it is halved twice"
            )
        if min(channels, width_channels, out_features) < 1:
            raise ValueError(
                "channels, width_channels and out_features must be positive, "
                f"got {channels}, {width_channels} and {out_features}"
            )
        self.channels, self.size = channels, (height, width)
        factory = _factory(device, dtype)
        stages: list[nn.Module] = []
        for stage in range(2):
            for position in range(2):
                inputs = channels if stage == position == 0 else width_channels
                conv = nn.utils.skip_init(nn.Conv2d, inputs, width_channels, 3, padding=1, **factory)
                stages += [initialise_(conv, generator), nn.BatchNorm2d(width_channels, **factory), nn.ReLU()]
            stages.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*stages, nn.Flatten())
        area = (height // 4) * (width // 4)
        self.linear = initialise_(
            nn.utils.skip_init(nn.Linear, width_channels * area, out_features, **factory), generator
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, channels, height, width)` to features `(batch, out_features)`."""
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.ndim != 4 or x.shape[1:] != (self.channels, *self.size):
            raise ValueError(
                f"x must be (batch, {self.channels}, {self.size[0]}, {self.size[1]}), got {tuple(x.shape)}"
            )
        return self.linear(self.stages(x))


class TemporalConvBasis(nn.Module):
    """Residual causal convolutions with doubling dilation: a sequence to features at every position.

    Parameters
    ----------
    channels
        Of the sequence.
    width
        Channels of every level.
    levels
        Number of residual blocks; block `i` has dilation `2^i`.
    kernel_size
        Taps of every convolution.
    out_features
        Width `D` of the features at every position.
    dropout
        Probability after every activation.
    generator
        Source of the initial weights, drawn on the CPU. Dropout draws from torch's own stream.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a count is below 1 or the dropout lies outside [0, 1); in `forward`, if the sequence does not fit.

    Notes
    -----
    Source: the temporal convolutional network of Bai, Kolter and Koltun (2018), which the authors' code
    uses for the copy memory task (8 levels of 10 channels, kernel 8). Weights are normalised, one gain
    for an output channel.

    Examples
    --------
    >>> basis = TemporalConvBasis(1, 10, levels=3, kernel_size=4, out_features=6)
    >>> basis(torch.zeros(2, 1, 50)).shape
    torch.Size([2, 50, 6])
    >>> basis.receptive_field
    43
    """

    def __init__(
        self,
        channels: int,
        width: int,
        levels: int,
        kernel_size: int,
        out_features: int,
        dropout: float = 0.0,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {"channels": channels, "width": width, "levels": levels, "kernel_size": kernel_size}
        for name, value in (counts | {"out_features": out_features}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.channels = channels
        self.receptive_field = 1 + 2 * (kernel_size - 1) * (2**levels - 1)
        factory = _factory(device, dtype)
        self.blocks = nn.Sequential(
            *(
                _CausalBlock(
                    channels if i == 0 else width, width, kernel_size, 2**i, dropout, generator, factory
                )
                for i in range(levels)
            )
        )
        self.linear = initialise_(nn.utils.skip_init(nn.Linear, width, out_features, **factory), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences `(batch, channels, time)` to features `(batch, time, out_features)`."""
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, time), got {tuple(x.shape)}")
        return self.linear(self.blocks(x).mT)


class _CausalBlock(nn.Module):
    """Two weight-normalised causal convolutions beside a skip connection."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        dilation: int,
        dropout: float,
        generator: torch.Generator | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            conv = nn.utils.skip_init(nn.Conv1d, width, outputs, kernel_size, dilation=dilation, **factory)
            layers += [
                nn.ConstantPad1d(((kernel_size - 1) * dilation, 0), 0.0),  # left only: no look ahead
                weight_norm(initialise_(conv, generator)),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*layers)
        self.skip = (
            nn.Identity()
            if inputs == outputs
            else initialise_(nn.utils.skip_init(nn.Conv1d, inputs, outputs, 1, **factory), generator)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.skip(x))


@torch.no_grad()
def initialise_(layer: _Layer, generator: torch.Generator | None) -> _Layer:
    """Fill weight and bias uniformly in `+-1/sqrt(fan_in)`, torch's own range, from draws made on the CPU."""
    bound = layer.weight[0].numel() ** -0.5
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            parameter.copy_((2 * draw - 1) * bound)
    return layer


def _factory(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    return {"device": device if device is not None else torch.get_default_device(), "dtype": dtype}
