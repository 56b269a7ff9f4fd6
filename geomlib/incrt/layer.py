r"""One layer of the encoder: attention and a feed-forward block, each behind a layer norm (pre-norm)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.prototypes import DDCLBlock
from geomlib.incrt.quantise import Quantised

__all__ = ["EncoderLayer", "EncoderOutput"]


class EncoderOutput(NamedTuple):
    """What an encoder says.

    Attributes
    ----------
    logits
        `(B, n, ...)` per token, or `(B, ...)` if pooled.
    quantisation
        One entry per layer with a dictionary; empty with `ffn="mlp"`.
    """

    logits: Tensor
    quantisation: tuple[Quantised, ...]


class EncoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a layer norm and added to the stream.

    Parameters
    ----------
    attention : DirectionalAttention
        Adds its heads to the stream.
    feed_forward : Module
        A `DDCLBlock`, or a module of one argument.
    affine : bool
        Gain and bias in the layer norms.
    device, dtype
        Of these.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> attention = DirectionalAttention(8, 4, 2, max_heads=3, generator=generator)
    >>> layer = EncoderLayer(attention, nn.Identity())
    >>> stream, quantised = layer(torch.randn(2, 5, 8, generator=generator))
    >>> stream.shape, quantised
    (torch.Size([2, 5, 8]), None)
    """

    def __init__(
        self,
        attention: DirectionalAttention,
        feed_forward: nn.Module,
        *,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_attention = norm(attention.d, affine, where)
        self.attention = attention
        self.norm_feed_forward = norm(attention.d, affine, where)
        self.feed_forward = feed_forward
        self.keep_tokens = False
        self.tokens: Tensor | None = None

    @property
    def unguarded(self) -> bool:
        """Whether the loss of a dictionary reaches the tokens, which it could then make all alike."""
        return isinstance(self.feed_forward, DDCLBlock) and not self.feed_forward.stop_grad

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Quantised | None]:
        """Return the stream `(B, n, d)` behind the layer, and what its dictionary found, if it has one."""
        x = x + self.attention(self.norm_attention(x), mask)
        z = self.norm_feed_forward(x)
        if self.keep_tokens:
            self._keep(z, mask)
        if isinstance(self.feed_forward, DDCLBlock):
            y, quantised = self.feed_forward(z, mask)
            return x + y, quantised
        return x + self.feed_forward(z), None

    @torch.compiler.disable
    def _keep(self, z: Tensor, mask: Tensor | None) -> None:
        """Keep what the feed-forward block sees, so that prototypes can be set to tokens."""
        self.tokens = z.detach().flatten(0, 1) if mask is None else z.detach()[mask]


class PlainNorm(nn.Module):
    """A layer norm without gain and bias, which takes constants for them: the kernel is twice as fast so."""

    gain: Tensor
    shift: Tensor

    def __init__(self, d: int, **where: Any) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(d, **where), persistent=False)
        self.register_buffer("shift", torch.zeros(d, **where), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows of mean 0 and variance 1."""
        return F.layer_norm(x, self.gain.shape, self.gain, self.shift)


def norm(d: int, affine: bool, where: Mapping[str, Any]) -> nn.Module:
    """Return a layer norm, with or without gain and bias."""
    return nn.LayerNorm(d, **where) if affine else PlainNorm(d, **where)


def sinusoids(stream: Tensor) -> Tensor:
    """Return sines and cosines of the positions `(n, d)`, wave lengths from `2 pi` to `20000 pi`."""
    n, d = stream.shape[-2:]
    # In a graph they belong to it; otherwise they are kept, since they cost more than the embedding.
    codes = _codes if torch.compiler.is_compiling() else _kept_codes
    return codes(n, d, stream.device, stream.dtype)


def _codes(n: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    rate = torch.arange(0, d, 2, device=device, dtype=wide) / -d
    phase = torch.arange(n, device=device, dtype=wide)[:, None] * 10000.0**rate
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(1)[:, :d].to(dtype)


@lru_cache(maxsize=8)
def _kept_codes(n: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _codes(n, d, device, dtype)


@torch.no_grad()
def fill(module: nn.Module, scale: float, generator: torch.Generator | None) -> None:
    """Draw the weight on the CPU, so that every device starts alike; biases are zero."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(std=scale, generator=generator))


def perceptron(
    d: int, hidden: int, generator: torch.Generator | None, where: Mapping[str, Any]
) -> nn.Sequential:
    """Return the usual feed-forward block with one hidden layer."""
    first, second = nn.Linear(d, hidden, **where), nn.Linear(hidden, d, **where)
    fill(first, d**-0.5, generator)
    fill(second, hidden**-0.5, generator)
    return nn.Sequential(first, nn.GELU(), second)
