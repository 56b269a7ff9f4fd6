r"""One layer of the encoder: attention and a feed-forward block, each behind a layer norm (pre-norm)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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
        self.norm_attention = nn.LayerNorm(attention.d, elementwise_affine=affine, **where)
        self.attention = attention
        self.norm_feed_forward = nn.LayerNorm(attention.d, elementwise_affine=affine, **where)
        self.feed_forward = feed_forward
        self.keep_tokens = False
        self.tokens: Tensor | None = None

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
