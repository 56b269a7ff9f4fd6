"""Stems: from inputs to the features that are injected at every step, channels in the second place.

The paper (arXiv 2601.19551) has those of ResNet-50 and ViT-B/16; the one of vectors and sequences is
reconstructed. All draws are made on the CPU, from one generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.frost.transitions import channel_norm, uniform
from geomlib.frost.unrolled import linear

__all__ = ["Patches", "Pointwise", "Tokens"]


class Pointwise(nn.Module):
    """A linear map of the channels of a vector or a sequence, a norm if asked for, ReLU.

    Parameters
    ----------
    inputs, width : int
        Channels of the input and of the features.
    axes : int
        0 for vectors, 1 for sequences.
    norm : bool
        Layer norm over the channels before ReLU.
    generator, device, dtype
        As in :class:`geomlib.frost.Frost`.

    Raises
    ------
    ValueError
        If a size is below 1; in `forward`, if the input does not fit.

    Notes
    -----
    Source: reconstructed.

    Examples
    --------
    >>> Pointwise(6, 24, axes=1)(torch.zeros(2, 6, 10)).shape
    torch.Size([2, 24, 10])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        axes: int = 0,
        norm: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axes = axes
        self.map = linear(inputs, width, generator=generator, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype) if norm else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(N, inputs)` or `(N, inputs, L)` to features of the same kind."""
        if inputs.dim() != self.axes + 2 or inputs.shape[1] != self.map.in_features:
            raise ValueError(
                f"inputs must be (N, {self.map.in_features}) and {self.axes} axes, got {tuple(inputs.shape)}"
            )
        return torch.relu(self.norm(self.map(inputs.movedim(1, -1)))).movedim(-1, 1)


class Patches(nn.Module):
    """A strided convolution of images, a norm over the channels, ReLU.

    Parameters
    ----------
    inputs, width : int
        Channels of the image and of the features.
    size : int
        Side of the kernel.
    stride : int
        Distance between kernels. If it is the size, the kernels tile the image; otherwise zeros surround it.
    generator, device, dtype
        As in :class:`geomlib.frost.Frost`.

    Raises
    ------
    ValueError
        If the size is below 1; in `forward`, if the input is no image of that many channels.

    Notes
    -----
    Source: reconstructed; the paper's stem is that of a ResNet-50 with its pooling replaced.

    Examples
    --------
    >>> Patches(3, 16, 4, stride=4)(torch.zeros(2, 3, 28, 28)).shape
    torch.Size([2, 16, 7, 7])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        size: int,
        *,
        stride: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or stride < 1:
            raise ValueError(
                f"patch must be at least 1, got {min(size, stride)}: an image has no smaller part"
            )
        self.stride, self.reach = stride, 0 if size == stride else size // 2
        self.weight = uniform((width, inputs, size, size), None, generator, device, dtype)
        self.bias = uniform((width,), self.weight, generator, device, dtype)
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, width, H', W')`."""
        _check_image(inputs, self.weight)
        x = F.conv2d(inputs, self.weight, self.bias, stride=self.stride, padding=self.reach)
        return torch.relu(channel_norm(x, self.norm.weight, self.norm.bias))


class Tokens(nn.Module):
    """Patches of an image as a sequence behind a class token, with a learned position each.

    Parameters
    ----------
    width : int
        Channels of the tokens.
    patch : int
        Side of the patches.
    size : int
        Side of the images, a multiple of `patch`.
    generator, device, dtype
        As in :class:`geomlib.frost.Frost`.

    Raises
    ------
    ValueError
        If the patches do not tile the image; in `forward`, if the image has another size.

    Notes
    -----
    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929).

    Examples
    --------
    >>> Tokens(8, 16, 32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        width: int,
        patch: int,
        size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch < 1 or size < patch or size % patch:
            raise ValueError(f"size must be a multiple of {patch}, got {size}: the patches tile the image")
        self.size, self.patch = size, patch
        self.weight = uniform((width, 3, patch, patch), None, generator, device, dtype)
        self.bias = uniform((width,), self.weight, generator, device, dtype)
        self.token = uniform((width, 1), None, generator, device, dtype)
        self.places = uniform((width, (size // patch) ** 2 + 1), self.token, generator, device, dtype)
        with torch.no_grad():  # small beside the patches, as customary for vision transformers
            self.token.mul_(0.02)
            self.places.mul_(0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(N, 3, size, size)` to `(N, width, tokens)`, the class token first."""
        _check_image(inputs, self.weight)
        if inputs.shape[2:] != (self.size, self.size):
            raise ValueError(f"inputs must be {self.size} pixels wide and high, got {tuple(inputs.shape)}")
        x = F.conv2d(inputs, self.weight, self.bias, stride=self.patch).flatten(2)
        token = self.token.expand(len(x), -1, -1).to(x.dtype)
        return torch.cat([token, x], 2) + self.places


def _check_image(inputs: Tensor, weight: Tensor) -> None:
    if inputs.dim() != 4 or inputs.shape[1] != weight.shape[1]:
        raise ValueError(f"inputs must be (N, {weight.shape[1]}, H, W), got {tuple(inputs.shape)}")
