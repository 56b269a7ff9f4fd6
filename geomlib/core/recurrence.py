r"""Linear recurrences `h_t = a_t h_{t-1} + b_t`, elementwise along one dimension, in five equal forms.

The loop is the definition. Odd-even pairs (Blelloch 1990) and doubling (Hillis and Steele 1986) need `log L`
rounds because `(a, b) -> (a' a, a' b + b')` is associative. `chunked` (see `recurrence_chunked`) is the fast
one, with a backward pass of its own. `ssd` is for decays that all channels of a head share: matrix products.
No form divides by a product of decays, which underflows, or takes a logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geomlib.core.precision import full_precision
from geomlib.core.recurrence_chunked import chunked

__all__ = ["linear_recurrence", "ssd"]

Method = Literal["auto", "chunked", "doubling", "loop", "pairs"]


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial: Tensor | None = None,
    dim: int = 1,
    reverse: bool = False,
    method: Method = "auto",
    chunk: int | None = None,
) -> Tensor:
    r"""Return all `h_t = a_t h_{t-1} + b_t` along `dim`, differentiable to any order.

    Parameters
    ----------
    a : Tensor
        Coefficients, broadcastable to the shape of `b`. What is not expanded is not computed twice.
    b : Tensor
        Inputs `(..., L, ...)` with `L` at `dim`, floating or complex, in any memory layout.
    initial : Tensor, optional
        The state before the first step (after the last one with `reverse`), broadcastable to the shape of `b`
        without `dim`; zero by default.
    dim : int
        Time.
    reverse : bool
        Run from the end: `h_t = a_t h_{t+1} + b_t`.
    method : {"auto", "chunked", "doubling", "loop", "pairs"}
        `"auto"` takes `"chunked"` on every device, and `"pairs"` while `torch.compile` or `torch.export`
        traces, because it is made of functional operations only.
    chunk : int, optional
        Steps of a chunk at the lowest level of `"chunked"`; by default chosen by size.

    Returns
    -------
    Tensor
        `h`, shape of `b`, in the common dtype of the arguments. Half precision is computed in float32 and
        rounded once; under autocast the result stays float32.

    Raises
    ------
    ValueError
        If a dtype is an integer, a shape does not broadcast, devices differ, `dim` is out of range, `method`
        is unknown, or `chunk` is below 1 or given for another method.

    Notes
    -----
    Operations: `2 L` for the loop, `O(L)` for pairs and chunked, `O(L log L)` for doubling. Depth: `L`,
    `O(log L)`, `O(C log L / log C)` for chunks of `C`, `log L`. Source: Blelloch 1990, "Prefix sums and their
    applications"; Hillis and Steele 1986; the gradient is the same recurrence backwards in time,
    `db_t = g_t + conj(a_{t+1}) db_{t+1}`, `da_t = db_t conj(h_{t-1})`.

    Examples
    --------
    >>> a, b = torch.full((1, 4), 0.5), torch.ones(1, 4)
    >>> linear_recurrence(a, b)
    tensor([[1.0000, 1.5000, 1.7500, 1.8750]])
    >>> linear_recurrence(torch.tensor(0.5), b, initial=torch.tensor(2.0), reverse=True)
    tensor([[2., 2., 2., 2.]])
    """
    dim = _check(a, b, initial, dim, method, chunk)
    tensors = [a, b] if initial is None else [a, b, initial]
    common = a.dtype
    for tensor in tensors[1:]:
        common = torch.promote_types(common, tensor.dtype)
    working = torch.promote_types(common, torch.float32)
    autocast = torch.amp.is_autocast_available(b.device.type) and torch.is_autocast_enabled(b.device.type)
    result = working if autocast else common
    length, rest = b.shape[dim], (*b.shape[:dim], *b.shape[dim + 1 :])
    if length == 0:
        return b.to(result, copy=True)

    # Time is written out in `a`, as a view; its other dimensions stay as small as they came.
    a, b = a.to(working), b.to(working)
    if a.shape != b.shape:
        a = a.reshape((1,) * (b.dim() - a.dim()) + a.shape)
        a = a.expand(*a.shape[:dim], length, *a.shape[dim + 1 :])
    state = None if initial is None else initial.to(working).expand(rest)
    if method == "auto":
        method = "pairs" if torch.compiler.is_compiling() else "chunked"
    with full_precision(b.device):
        if method == "chunked":
            h = chunked(a, b, state, dim, reverse, chunk)
        else:
            if reverse:
                a, b = a.flip(dim), b.flip(dim)
            if state is not None:
                first, others = b.split([1, length - 1], dim)
                b = torch.cat([first + a.narrow(dim, 0, 1) * state.unsqueeze(dim), others], dim)
            h = FORMS[method](a, b, dim)
            h = h.flip(dim) if reverse else h
    return h.to(result)


def ssd(
    log_decay: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial: Tensor | None = None,
    reverse: bool = False,
    chunk: int = 64,
) -> Tensor:
    r"""Return `y_t = S_t C_t` with `S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T`, by matrix products.

    States `S_t` of `P x n` numbers are formed only at the ends of chunks. Inside a chunk the map from `x` to
    `y` is a lower triangular matrix `C_t . B_s exp(log_decay_{s+1} + ... + log_decay_t)`.

    Parameters
    ----------
    log_decay : Tensor
        `(N, L, H)`, one decay for each head and step. At most 0, for states that stay bounded; `-inf`
        forgets everything.
    x : Tensor
        Values, `(N, L, H, P)`.
    B, C : Tensor
        What enters the state and what is read from it, `(N, L, H, n)`; `H` may be 1, shared by all heads.
    initial : Tensor, optional
        The state before the first step, `(N, H, P, n)`; zero by default.
    reverse : bool
        Run from the end.
    chunk : int
        Steps of a chunk; more of them make larger products and fewer states.

    Returns
    -------
    Tensor
        `y`, `(N, L, H, P)`, in the dtype of `x`; computed in float32 at least, and float32 under autocast.

    Raises
    ------
    ValueError
        If the shapes do not fit, a dtype is not floating, or `chunk < 1`.

    Notes
    -----
    Costs `O(L (Q (n + P) + n P) H)` for chunks of `Q`, against `O(L H P n)` numbers of memory traffic for
    every state. Sums of log-decays over the steps between, never differences of long sums: strong decay
    stays exact. Source: Dao and Gu 2024 (arXiv 2405.21060), section 6.

    Examples
    --------
    >>> x, ones = torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
    >>> ssd(torch.full((1, 4, 1), 0.5).log(), x, ones, ones, chunk=2).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    _check_ssd(log_decay, x, B, C, initial, chunk)
    working = torch.promote_types(x.dtype, torch.float32)
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    result = working if autocast else x.dtype
    length = x.shape[1]
    if length == 0:
        return x.to(result, copy=True)
    la, x, B, C = (tensor.to(working) for tensor in (log_decay, x, B, C))
    if reverse:
        la, x, B, C = (tensor.flip(1) for tensor in (la, x, B, C))
    size = min(chunk, length)
    lacking = -length % size
    # (N, chunks, Q, H, ...); a padded step keeps the state and adds nothing.
    x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, lacking)).unflatten(1, (-1, size)) for tensor in (x, B, C))
    la = F.pad(la, (0, 0, 0, lacking)).unflatten(1, (-1, size)).movedim(3, 1)  # (N, H, chunks, Q)
    after = F.pad(la[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)  # from the step to the end of its chunk
    with full_precision(x.device):
        inside = torch.einsum("nclhk,ncshk->nhcls", C, B) * _between(la).exp()
        y = torch.einsum("nhcls,ncshp->nclhp", inside, x)
        ends = torch.einsum("nhcs,ncshp,ncshk->nchpk", after.exp(), x, B)
        decay = la.sum(-1).exp().movedim(1, 2)[..., None, None]  # (N, chunks, H, 1, 1)
        state = None if initial is None else initial.to(working)
        ends = linear_recurrence(decay, ends, initial=state)
        first = torch.zeros_like(ends[:, :1]) if state is None else state.unsqueeze(1)
        before = torch.cat([first, ends[:, :-1]], 1)
        y = y + torch.einsum("nclhk,nchpk,nhcl->nclhp", C, before, la.cumsum(-1).exp())
    y = y.flatten(1, 2)[:, :length]
    return (y.flip(1) if reverse else y).to(result)


def _loop(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Step by step, as the definition says: the reference."""
    state, states = torch.zeros_like(b.select(dim, 0)), []
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim), strict=True):
        state = a_t * state + b_t
        states.append(state)
    return torch.stack(states, dim)


def _pairs(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Join neighbours, solve the half as long recurrence of the odd steps, and fill in the even ones."""
    length = b.shape[dim]
    if length == 1:
        # The first coefficient meets a zero state; `where` keeps it in the graph, with gradient zero.
        return torch.where(torch.ones_like(b, dtype=torch.bool), b, a)
    if length % 2:
        head = _pairs(a.narrow(dim, 0, length - 1), b.narrow(dim, 0, length - 1), dim)
        last = a.narrow(dim, length - 1, 1) * head.narrow(dim, length - 2, 1) + b.narrow(dim, length - 1, 1)
        return torch.cat([head, last], dim)
    a_even, a_odd = a.unflatten(dim, (-1, 2)).unbind(dim + 1)
    b_even, b_odd = b.unflatten(dim, (-1, 2)).unbind(dim + 1)
    odd = _pairs(a_odd * a_even, a_odd * b_even + b_odd, dim)
    before = torch.cat([torch.zeros_like(odd.narrow(dim, 0, 1)), odd.narrow(dim, 0, length // 2 - 1)], dim)
    return torch.stack([a_even * before + b_even, odd], dim + 1).flatten(dim, dim + 1)


def _doubling(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """After round `k` every step knows the `2^k` steps before it."""
    length, reach = b.shape[dim], 1
    if length == 1:
        return _pairs(a, b, dim)
    while reach < length:
        rest = length - reach
        late_a, late_b = a.narrow(dim, reach, rest), b.narrow(dim, reach, rest)
        b = torch.cat([b.narrow(dim, 0, reach), late_a * b.narrow(dim, 0, rest) + late_b], dim)
        a = torch.cat([a.narrow(dim, 0, reach), late_a * a.narrow(dim, 0, rest)], dim)
        reach *= 2
    return b


FORMS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "doubling": _doubling,
    "loop": _loop,
    "pairs": _pairs,
}


def _between(log_decay: Tensor) -> Tensor:
    """Sum `(..., Q)` over the steps after `s` up to `t`: `(..., t, s)`, `-inf` where `s > t`."""
    size = log_decay.shape[-1]
    square = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    low = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    return square.masked_fill(~low.tril(-1), 0.0).cumsum(-2).masked_fill(~low, -torch.inf)


def _check(a: Tensor, b: Tensor, initial: Tensor | None, dim: int, method: str, chunk: int | None) -> int:
    """Raise if an argument does not fit; return `dim` counted from the front."""
    named = {"a": a, "b": b} if initial is None else {"a": a, "b": b, "initial": initial}
    for name, tensor in named.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{name} must be floating or complex, got {tensor.dtype}: decays are not integers"
            )
        if tensor.device != b.device:
            raise ValueError(f"{name} must be on the device of b, {b.device}, got {tensor.device}")
    if not -b.dim() <= dim < b.dim():
        raise ValueError(
            f"dim must be a dimension of b, of shape {tuple(b.shape)}, got {dim}: time is not there"
        )
    dim %= b.dim()
    rest = b.shape[:dim] + b.shape[dim + 1 :]
    if not _expands(a.shape, b.shape):
        raise ValueError(f"a must broadcast to the shape of b, {tuple(b.shape)}, got {tuple(a.shape)}")
    if initial is not None and not _expands(initial.shape, rest):
        raise ValueError(
            f"initial must broadcast to one step of b, of shape {tuple(rest)}, got {tuple(initial.shape)}"
        )
    if method not in ("auto", "chunked", *FORMS):
        raise ValueError(f"method must be one of {['auto', 'chunked', *FORMS]}, got {method!r}")
    if chunk is not None and method not in ("auto", "chunked"):
        raise ValueError(
            f"chunk belongs to method 'chunked', got {chunk} with {method!r}: it would do nothing"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: a chunk holds a step")
    return dim


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


def _check_ssd(
    log_decay: Tensor, x: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, chunk: int
) -> None:
    if x.dim() != 4 or not all(tensor.is_floating_point() for tensor in (log_decay, x, B, C)):
        raise ValueError(
            f"x must be (N, L, H, P) and all inputs floating, got x {tuple(x.shape)} of {x.dtype}, log_decay "
            f"of {log_decay.dtype}, B of {B.dtype} and C of {C.dtype}"
        )
    batch, length, heads, values = x.shape
    if log_decay.shape != (batch, length, heads):
        raise ValueError(
            f"log_decay must be one number for each head and step, {(batch, length, heads)}, got "
            f"{tuple(log_decay.shape)}: for more use linear_recurrence"
        )
    for name, tensor in (("B", B), ("C", C)):
        fits = tensor.dim() == 4 and tensor.shape[:2] == (batch, length) and tensor.shape[2] in (1, heads)
        if not fits or tensor.shape[3] != B.shape[-1]:
            raise ValueError(
                f"{name} must be {(batch, length, heads)} or {(batch, length, 1)} and then n, the same for "
                f"B and C, got {tuple(tensor.shape)}"
            )
    if initial is not None and initial.shape != (batch, heads, values, B.shape[3]):
        raise ValueError(
            f"initial must be {(batch, heads, values, B.shape[3])}, one a head, got {tuple(initial.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: a chunk holds a step")
