"""What a sheaf graph is made of: edges, weights and transports, each refused by name if it is none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_edges", "check_transport", "check_weights"]

# Weights may be this much below zero from rounding; they are taken for zero.
ROUNDING = 1e-14
# A transport is unitary up to this, or up to so many units of rounding of its dtype.
UNITARY = 1e-8


def check_edges(nodes: int, edges: Tensor, parallel: bool) -> None:
    """Raise `ValueError` unless these are edges between so many nodes.

    Examples
    --------
    >>> check_edges(2, torch.tensor([[0], [1]]), parallel=False)
    """
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}: there would be no state")
    if edges.dtype != torch.int64 or edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(f"edges must be (2, M) int64, got {tuple(edges.shape)} {edges.dtype}")
    if edges.is_meta or edges.shape[1] == 0:
        return
    if int(edges.min()) < 0 or int(edges.max()) >= nodes:
        raise ValueError(
            f"edges must lie in 0 ... {nodes - 1}, got {int(edges.min())} ... {int(edges.max())}"
        )
    if bool((edges[0] == edges[1]).any()):
        raise ValueError("edges must not be loops: a loop adds nothing to the energy")
    if bool((edges[0] > edges[1]).any()):
        raise ValueError("edges must have edges[0] < edges[1]: the transport is from the second end")
    if not parallel and len(torch.unique(edges[0] * nodes + edges[1])) < edges.shape[1]:
        raise ValueError("edges must not repeat: the metric of the weights would be singular")


def check_weights(weights: Tensor, count: int, signed: bool) -> Tensor:
    """Return weights that are real, finite and, unless `signed`, not negative; raise `ValueError` else.

    Examples
    --------
    >>> check_weights(torch.tensor([1.0, -1e-15]), 2, signed=False)
    tensor([1., 0.])
    """
    if weights.shape != (count,) or not weights.is_floating_point():
        raise ValueError(f"weights must be real ({count},), got {tuple(weights.shape)} {weights.dtype}")
    if weights.is_meta or weights.numel() == 0:
        return weights
    with torch.no_grad():
        lowest, finite = float(weights.min()), bool(torch.isfinite(weights).all())
    if not finite:
        raise ValueError("weights must be finite, got infinities or NaN")
    if lowest >= 0 or signed:
        return weights
    if lowest < -ROUNDING:
        raise ValueError(
            f"weights must not be negative, got {lowest:.3g}: the energy may have no minimum; project them"
        )
    return weights.clamp_min(0)


def check_transport(transport: Tensor, count: int) -> None:
    """Raise `ValueError` unless these are phases or unitary matrices, one for each edge.

    Examples
    --------
    >>> check_transport(torch.eye(2).expand(3, 2, 2), 3)
    """
    phases = transport.shape == (count,) and transport.is_floating_point()
    maps = transport.dim() == 3 and transport.shape[0] == count and transport.shape[1] == transport.shape[2]
    if not (phases or maps) or not (transport.is_floating_point() or transport.is_complex()):
        raise ValueError(
            f"transport must be ({count}, d, d) or real phases ({count},), got "
            f"{tuple(transport.shape)} {transport.dtype}"
        )
    if transport.is_meta or transport.numel() == 0:
        return
    with torch.no_grad():
        if not bool(torch.isfinite(transport).all()):
            raise ValueError("transport must be finite, got infinities or NaN")
        if maps:
            identity = torch.diag(transport.new_ones(transport.shape[1]))
            off = float(torch.linalg.matrix_norm(transport @ transport.mT.conj_physical() - identity).max())
            if off > max(UNITARY, 100 * torch.finfo(transport.dtype).eps):
                raise ValueError(
                    f"transport must be unitary, got |tau tau^* - I| = {off:.1e}: take its polar factor"
                )
