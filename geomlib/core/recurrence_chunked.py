r"""The linear recurrence in chunks of chunks, with its own backward pass: what `linear_recurrence` runs.

Time is cut into `n` chunks of `C` steps. All chunks are stepped through together, as if each began at zero,
to learn what each makes of a zero state, and the product of its coefficients is what it makes of another one.
The states at the ends of the chunks then obey a recurrence of length `n`, solved in the same way, and from
the right states all chunks are stepped through again. That is twice the work of the loop and a product, in
operations on `n` times as many numbers, with `2 / C` of the data as scratch. Reconstructed: the two levels
are those of reduce-then-scan (Blelloch 1990); the sizes were measured (`benchmarks/recurrence.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["chunked"]

LOOP_STEPS = 16  # the plain loop is as fast up to here, and up to width / 32 steps of `width` numbers
LOOP_WIDTH = 8192  # and for any number of steps this wide: calls then cost less than the work in them
SHORT_CHUNKS = (8, 9, 7, 10)
LONG_CHUNKS = (16, 17, 15, 18, 14)  # calls matter less and the second level more
LONG_FROM = 1 << 16  # numbers in all


def chunked(
    a: Tensor, b: Tensor, initial: Tensor | None, dim: int, reverse: bool, chunk: int | None = None
) -> Tensor:
    """Solve the recurrence; arguments as :func:`geomlib.core.linear_recurrence` has prepared them.

    Parameters
    ----------
    a : Tensor
        As many dimensions as `b` and as many steps; otherwise of the sizes of `b` or 1.
    b : Tensor
        `(..., L, ...)` with `L >= 1` at `dim`.
    initial : Tensor, optional
        Shape of `b` without `dim`.
    dim : int
        Not negative.
    reverse : bool
        Run from the end.
    chunk : int, optional
        Steps of a chunk at the lowest level.

    Returns
    -------
    Tensor
        Shape and layout of `b`.

    Examples
    --------
    >>> chunked(torch.full((4,), 0.5), torch.ones(4), None, 0, False)
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    # torch inspects a function made for its transforms at each call, which is a quarter of a short scan.
    transformed = torch._C._are_functorch_transforms_active()
    h: Tensor = (_Transformed if transformed else _Chunked).apply(a, b, initial, dim, reverse, chunk)
    return h


class _Chunked(torch.autograd.Function):
    """Saves coefficients and states. Derivatives of any order and mode are recurrences again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        h = _solve(*inputs)
        _remember(ctx, inputs, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, initial, h = ctx.saved_tensors
        derive = _differentiable if torch.is_grad_enabled() else _fused
        da, db = derive(ctx, a, initial, h, grads[0])
        d_initial = None
        if initial is not None and ctx.needs_input_grad[2]:
            first = -1 if ctx.reverse else 0
            d_initial = a.select(ctx.dim, first).conj() * db.select(ctx.dim, first)
        return da, db, d_initial, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        a, initial, h = ctx.saved_tensors
        da, db, d_initial = tangents[:3]
        b_dot = torch.zeros_like(h) if db is None else db
        if da is not None:
            b_dot = b_dot + da * _before(h, initial, ctx.dim, ctx.reverse)
        return chunked(a, b_dot, d_initial, ctx.dim, ctx.reverse, ctx.chunk)


class _Transformed(_Chunked):
    """The same for `torch.func`, which wants forward and context apart, and a rule for batches."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _solve(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        a, b, initial, dim, reverse, chunk = args

        # The batch goes in front. What has none is broadcast, and `b` written out.
        def front(value: Tensor, batched: int | None) -> Tensor:
            return value.unsqueeze(0) if batched is None else value.movedim(batched, 0)

        a, b = front(a, in_dims[0]), front(b, in_dims[1])
        b = b.expand(info.batch_size, *b.shape[1:])
        if initial is not None:
            initial = front(initial, in_dims[2])
            initial = initial.expand(info.batch_size, *initial.shape[1:])
        return chunked(a, b, initial, dim + 1, reverse, chunk), 0


def _solve(
    a: Tensor, b: Tensor, initial: Tensor | None, dim: int, reverse: bool, chunk: int | None
) -> Tensor:
    h = torch.empty_like(b)
    _fill(a, b, h, initial, dim, reverse, chunk)
    return h


def _remember(ctx: Any, inputs: tuple[Any, ...], h: Tensor) -> None:
    a, _, initial, ctx.dim, ctx.reverse, ctx.chunk = inputs
    ctx.save_for_backward(a, initial, h)
    ctx.save_for_forward(a, initial, h)


def _differentiable(
    ctx: Any, a: Tensor, initial: Tensor | None, h: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients as functions that can be differentiated again: the same recurrence, the other way."""
    dim, reverse = ctx.dim, ctx.reverse
    # The coefficient of the step after. The last step has none: the one rolled in meets a zero state.
    after = a.roll(1 if reverse else -1, dim).conj()
    db = chunked(after, grad, None, dim, not reverse, ctx.chunk)
    da = (db * _before(h, initial, dim, reverse).conj()).sum_to_size(a.shape)
    return da, db


def _fused(
    ctx: Any, a: Tensor, initial: Tensor | None, h: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients without a graph, written in place."""
    dim, reverse = ctx.dim, ctx.reverse
    length = h.shape[dim]
    first, last = (length - 1, 0) if reverse else (0, length - 1)

    def earlier(x: Tensor) -> Tensor:
        return x.narrow(dim, 1 if reverse else 0, length - 1)

    def later(x: Tensor) -> Tensor:
        return x.narrow(dim, 0 if reverse else 1, length - 1)

    db = torch.empty_like(h)
    state = db.select(dim, last).copy_(grad.select(dim, last))
    if length > 1:
        after = later(a).conj().resolve_conj()
        _fill(after, earlier(grad), earlier(db), state, dim, not reverse, ctx.chunk)
    if not ctx.needs_input_grad[0]:
        return None, db
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _product(later(db), earlier(h), later(da))
    start = da.narrow(dim, first, 1)
    if initial is None:
        start.zero_()
    else:
        _product(db.narrow(dim, first, 1), initial.unsqueeze(dim), start)
    return da, db


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Write `x conj(y)`, summed over the dimensions along which `out` is broadcast."""
    if out.shape == x.shape:
        torch.mul(x, y.conj(), out=out)
    else:
        out.copy_((x * y.conj()).sum_to_size(out.shape))


def _before(h: Tensor, initial: Tensor | None, dim: int, reverse: bool) -> Tensor:
    """Return the states that the steps began from."""
    rest = h.shape[dim] - 1
    edge = torch.zeros_like(h.narrow(dim, 0, 1)) if initial is None else initial.unsqueeze(dim)
    parts = [h.narrow(dim, 1, rest), edge] if reverse else [edge, h.narrow(dim, 0, rest)]
    return torch.cat(parts, dim)


def _fill(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    state: Tensor | None,
    dim: int,
    reverse: bool,
    chunk: int | None,
) -> Tensor:
    """Write the recurrence into `h` and return its last state."""
    length = b.shape[dim]
    if chunk is None:
        width = b.numel() // length
        if length <= max(LOOP_STEPS, width // 32) or width >= LOOP_WIDTH:
            return _steps(a, b, h, state, dim, reverse)
        sizes = LONG_CHUNKS if b.numel() >= LONG_FROM and length >= 64 else SHORT_CHUNKS
        chunk = min(sizes, key=lambda size: length % size)  # what is left over goes step by step
    elif chunk >= length:
        return _steps(a, b, h, state, dim, reverse)
    count, rest = divmod(length, chunk)
    tail = None
    if rest:
        parts = [rest, length - rest] if reverse else [length - rest, rest]
        cut = [_in_order(x.split(parts, dim), reverse) for x in (a, b, h)]
        (a, b, h), tail = zip(*cut, strict=True)
    a, b, h = (x.unflatten(dim, (count, chunk)) for x in (a, b, h))
    A, B, H = (_in_order(x.unbind(dim + 1), reverse) for x in (a, b, h))
    # What each chunk makes of a zero state, and by what it multiplies its state.
    ends, gains = B[0].clone(), a.prod(dim + 1)
    for a_t, b_t in zip(A[1:], B[1:], strict=True):
        torch.addcmul(b_t, a_t, ends, out=ends)
    # The states that the chunks begin with, and one more: what the last of them ends with.
    states = torch.empty(
        (*ends.shape[:dim], count + 1, *ends.shape[dim + 1 :]), dtype=b.dtype, device=b.device
    )
    first, late, early = (count, 0, 1) if reverse else (0, 1, 0)
    if state is None:
        states.select(dim, first).zero_()
    else:
        states.select(dim, first).copy_(state)
    state = _fill(gains, ends, states.narrow(dim, late, count), state, dim, reverse, None)
    before = states.narrow(dim, early, count)
    for a_t, b_t, h_t in zip(A, B, H, strict=True):
        before = torch.addcmul(b_t, a_t, before, out=h_t)
    if tail is None:
        return state
    late_a, late_b, late_h = tail
    return _steps(late_a, late_b, late_h, state, dim, reverse)


def _steps(a: Tensor, b: Tensor, h: Tensor, state: Tensor | None, dim: int, reverse: bool) -> Tensor:
    """Step by step into `h`: views are made once, which halves the time of a loop that slices."""
    A, B, H = (_in_order(x.unbind(dim), reverse) for x in (a, b, h))
    state = H[0].copy_(B[0]) if state is None else torch.addcmul(B[0], A[0], state, out=H[0])
    for a_t, b_t, h_t in zip(A[1:], B[1:], H[1:], strict=True):
        state = torch.addcmul(b_t, a_t, state, out=h_t)
    return state


def _in_order(parts: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
    return parts[::-1] if reverse else parts
