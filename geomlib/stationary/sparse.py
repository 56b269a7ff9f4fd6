r"""The weighted Laplacian of a plain graph, with exact gradients for states and weights.

`(L_w x)_u = sum_{e = uv} w_e (x_u - x_v)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EdgeIndex", "weighted_laplacian"]


class EdgeIndex:
    """The index arrays of one list of edges."""

    def __init__(self, nodes: int, edges: Tensor) -> None:
        self.nodes, self.edges = nodes, edges


def weighted_laplacian(psi: Tensor, weights: Tensor, index: EdgeIndex) -> Tensor:
    """Return `L_w psi`."""
    first, second = index.edges
    flow = (psi.index_select(1, first) - psi.index_select(1, second)) * weights.unsqueeze(1)
    return torch.zeros_like(psi).index_add(1, first, flow).index_add(1, second, -flow)
