r"""When the next layer is set to work: once the heads of the top layer are directed and no longer change.

The author's public code adds a layer when the mean asymmetry index of the top layer exceeds a level and has
settled (arXiv 2604.10703 names growth in depth). A new layer adds nothing, so that the function stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.operator import Factors, asymmetry_index

__all__ = ["DepthTrigger"]


class DepthTrigger(nn.Module):
    r"""Watches the mean asymmetry index `|M_a| / |M|` of the heads of the top layer.

    Parameters
    ----------
    level : float
        What the index must exceed.
    tol : float
        How far it may have moved over the window.
    checks : int
        Length of the window.
    dwell : int
        Steps between two layers.
    device
        Of the buffers.

    Attributes
    ----------
    indices : Tensor
        `(checks,)`, the recent indices in a ring.
    seen, last : Tensor
        `()` int64: checks since the last layer, and its step.

    Notes
    -----
    Source: reconstructed from the public code of a successor of arXiv 2604.10703, which has the level 0.9,
    0.01 over 200 checks, and 500 steps.

    Examples
    --------
    >>> attention = DirectionalAttention(4, 2, 2, max_heads=2, generator=torch.Generator().manual_seed(0))
    >>> trigger = DepthTrigger(level=0.1, tol=0.01, checks=2, dwell=10)
    >>> for step in (5, 10):
    ...     index = trigger.observe(attention)
    ...     print(trigger.ready(step))
    False
    True
    """

    indices: Tensor
    seen: Tensor
    last: Tensor

    def __init__(
        self, level: float, tol: float, checks: int, dwell: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.level, self.tol, self.checks, self.dwell = level, tol, checks, dwell
        self.register_buffer("indices", torch.zeros(checks, device=device))
        for name in ("seen", "last"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def observe(self, attention: DirectionalAttention) -> float:
        """Take in the heads of the top layer, and return their mean index."""
        index = asymmetry_index(Factors(attention.W_Q, attention.W_K)).mean()
        self.indices[int(self.seen) % self.checks] = index
        self.seen += 1
        return float(index)

    def ready(self, step: int) -> bool:
        """Whether a layer is due: a full window above the level that hardly moved, and the dwell is over."""
        if int(self.seen) < self.checks or step - int(self.last) < self.dwell:
            return False
        low, high = self.indices.aminmax()
        return bool(low > self.level) and bool(high - low < self.tol)

    def restart(self, step: int) -> None:
        """Forget the window: another layer is on top."""
        self.seen.zero_()
        self.last.fill_(step)
