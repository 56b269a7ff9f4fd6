r"""Which heads can go: what a head captures, what it adds, and two bounds on what its removal does.

The sum of heads loses exactly the rows of the head (INCRT-15). Captured energy alone says nothing of them: a
head with symmetric logits captures none and may add as much as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core.precision import full_precision, working_dtype
from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.layer import EncoderLayer
from geomlib.incrt.operator import check_pair, sym

__all__ = ["PruneReport", "directional_energy", "output_bounds", "prune_report", "regrow_bound"]


@dataclass(frozen=True)
class PruneReport:
    """What is known of each active head, `(H,)` each.

    Attributes
    ----------
    energy
        Directional energy `|S M_a|` in the Frobenius norm.
    output
        Mean length of the rows that the head adds, over tokens.
    largest
        Length of the longest of these rows: how far the output of the layer moves without the head.
    bound
        What `largest` cannot exceed.
    regrow
        What the growth signal cannot exceed when the direction of the head is free again.
    """

    energy: Tensor
    output: Tensor
    largest: Tensor
    bound: Tensor
    regrow: Tensor


@torch.no_grad()
def directional_energy(S: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    r"""Return `|S M_a|_F` of heads `M = W_Q W_K^T`, `(H,)`, without forming a matrix of width `d`.

    Parameters
    ----------
    S
        `(d, d)`, second moments of the tokens.
    queries, keys
        `(H, d, dk)`.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: the public code of a successor of arXiv 2604.10703 calls it the directional energy `G_h`. With
    `M_a = (W_Q W_K^T - W_K W_Q^T) / 2` the squared norm is a sum of traces of `(dk, dk)` matrices.

    Examples
    --------
    >>> queries, keys = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    >>> directional_energy(torch.eye(2), queries, keys)
    tensor([0.7071])
    >>> directional_energy(torch.eye(2), queries, queries)
    tensor([0.])
    """
    if queries.dim() != 3 or queries.shape != keys.shape or S.shape != (queries.shape[1],) * 2:
        raise ValueError(
            f"queries and keys must both be (heads, {len(S)}, dk), got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}: they are factors of a form on the tokens"
        )
    queries, keys = queries.to(S), keys.to(S)
    moved_queries, moved_keys = S @ queries, S @ keys
    straight = (moved_queries.mT @ moved_queries) * (keys.mT @ keys)
    turned = (moved_keys.mT @ moved_keys) * (queries.mT @ queries)
    mixed = (moved_queries.mT @ moved_keys) * (keys.mT @ queries)
    return (straight + turned - 2 * mixed).sum((-2, -1)).clamp_min(0).sqrt() / 2


@torch.no_grad()
def output_bounds(layer: DirectionalAttention, longest: float | Tensor) -> Tensor:
    r"""Return `longest * |W_V W_O|_2` of each active head, `(H,)`: no row that it adds is longer.

    Parameters
    ----------
    layer
        Whose heads are bounded.
    longest
        Length of the longest token that the layer sees, at most `sqrt(d)` behind a layer norm without gain.

    Notes
    -----
    Source: reconstructed (INCRT-15): rows of a softmax are convex combinations. The spectral norm is that of
    a `(dv, dv)` matrix, the product of two triangular factors.

    Examples
    --------
    >>> layer = DirectionalAttention(4, 2, 2, max_heads=3, heads=2)
    >>> output_bounds(layer, 2.0).shape
    torch.Size([2])
    """
    dtype = torch.promote_types(working_dtype(layer.W_in.dtype), torch.float32)
    into, out = layer.W_V.to(dtype), layer.W_O.to(dtype)
    product = torch.linalg.qr(into, mode="r").R @ torch.linalg.qr(out.mT, mode="r").R.mT
    norms = torch.linalg.matrix_norm(product, ord=2) * longest
    return norms / layer.active if layer.aggregate == "mean" else norms


@torch.no_grad()
def regrow_bound(S: Tensor, Ma: Tensor, Q: Tensor, column: int) -> Tensor:
    r"""Return what the largest eigenvalue cannot exceed when a direction is free again, `()`.

    Parameters
    ----------
    S, Ma
        `(d, d)`: second moments and motor.
    Q
        `(d, m)`, orthonormal columns.
    column
        Which of them is given back.

    Returns
    -------
    Tensor
        `max(a, lambda_res, 0) + |b|`, `a = q^T A q`, `b = P A q`: at or below the threshold, the removal of
        its head cannot cause a birth.

    Raises
    ------
    ValueError
        If there is no such column, or shapes do not fit.

    Notes
    -----
    Source: reconstructed (INCRT-15): on the span of the complement and `q` the form is a block matrix.

    Examples
    --------
    >>> S, Ma = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> regrow_bound(S, Ma, torch.eye(2)[:, :1], 0)
    tensor(1.)
    """
    check_pair(S, Ma)
    if not 0 <= column < Q.shape[1]:
        raise ValueError(
            f"column must lie in 0 ... {Q.shape[1] - 1}, got {column}: there is no such direction"
        )
    A = sym(S @ Ma)
    q = Q[:, column]
    image = A @ q
    rest = image - Q @ (Q.mT @ image)
    P = torch.eye(len(A), dtype=A.dtype, device=A.device) - Q @ Q.mT
    residual = torch.linalg.eigvalsh(P @ A @ P)[-1]
    return torch.stack([q @ image, residual]).amax().clamp_min(0) + torch.linalg.vector_norm(rest)


@torch.no_grad()
def prune_report(
    layer: EncoderLayer | DirectionalAttention, x: Tensor, mask: Tensor | None = None
) -> PruneReport:
    """Judge the heads of a layer on a batch.

    Parameters
    ----------
    layer
        A layer whose growth is controlled, or attention alone, of which `regrow` is not known (NaN).
    x
        `(B, n, d)`, what the attention sees.
    mask
        `(B, n)` bool, True for tokens.

    Returns
    -------
    PruneReport

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: arXiv 2604.01880 claims pruning safety in its abstract; how it is measured is reconstructed. With
    `aggregate="mean"` a removal rescales the other heads as well, and `largest` is not the whole change.

    Examples
    --------
    >>> layer = DirectionalAttention(
    ...     4, 2, 2, max_heads=3, heads=2, generator=torch.Generator().manual_seed(0)
    ... )
    >>> report = prune_report(layer, torch.nn.functional.layer_norm(torch.randn(2, 5, 4), [4]))
    >>> bool((report.largest <= report.bound).all())
    True
    """
    attention = layer if isinstance(layer, DirectionalAttention) else layer.attention
    dtype = torch.promote_types(working_dtype(x.dtype), torch.float32)
    with full_precision(x.device):
        lengths = attention.head_outputs(x, mask).to(dtype).norm(dim=-1)  # (B, H, n)
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        tokens = x[valid].to(dtype)
        count = max(len(tokens), 1)
        S = tokens.mT @ tokens / count
        longest = tokens.norm(dim=-1).amax() if len(tokens) else tokens.new_zeros(())
        rows = lengths.transpose(0, 1).flatten(1)
        return PruneReport(
            energy=directional_energy(S, attention.W_Q, attention.W_K),
            output=rows.sum(1) / count,
            largest=rows.amax(1),
            bound=output_bounds(attention, longest),
            regrow=_regrow(layer, attention.active).to(tokens),
        )


def _regrow(layer: EncoderLayer | DirectionalAttention, heads: int) -> Tensor:
    growth = getattr(layer, "growth", None)
    if growth is None:
        return torch.full((heads,), torch.nan)
    return torch.stack([growth.regrow(slot) for slot in range(heads)])
