"""Assertions about maps: right derivatives, a contraction rate, a symmetry, the memory backward holds.

Each fails with the numbers that broke it. Each searches for a counterexample rather than sampling a few
random points, since in many dimensions a random direction hardly ever shows the largest gain of a map.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["assert_contraction", "assert_equivariant", "assert_gradients", "saved_tensor_bytes"]


def assert_gradients(f: Callable[..., Any], *inputs: Any, second_order: bool = True) -> None:
    """Assert that autograd's derivatives of ``f`` equal finite differences, in double precision.

    Parameters
    ----------
    f : callable
        Takes ``inputs`` and returns a tensor or a tuple of tensors. What it closes over is not checked, so
        parameters are passed as inputs (``torch.func.functional_call`` helps with a module).
    *inputs : Tensor or object
        Floating tensors of any shape are copied to float64, complex ones to complex128, and differentiated;
        keep each under a few dozen entries. Everything else is passed on.
    second_order : bool
        Check the derivatives of the derivatives as well.

    Raises
    ------
    AssertionError
        If a derivative differs, with torch's table of both Jacobians.
    ValueError
        If no input is a floating or complex tensor: there would be nothing to check.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import assert_gradients
    >>> assert_gradients(torch.tanh, torch.tensor([0.3, -1.2]))
    """
    prepared = [_double(value) for value in inputs]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in prepared):
        raise ValueError("inputs must hold a floating or complex tensor: there is nothing to differentiate")
    checks: list[tuple[str, Callable[..., bool]]] = [("first", torch.autograd.gradcheck)]
    if second_order:
        checks.append(("second", torch.autograd.gradgradcheck))
    for order, check in checks:
        try:
            check(f, tuple(prepared))
        except RuntimeError as error:
            raise AssertionError(f"derivatives of {order} order are wrong: {error}") from error


def assert_contraction(
    f: Callable[[Tensor], Tensor],
    kappa: float,
    x: Tensor,
    pairs: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    """Assert that ``|f(x) - f(y)| <= kappa |x - y|`` for pairs chosen to break it.

    A pair is a sample of ``x`` and a neighbour at a distance between a thousandth and ten times the norm of
    the sample. The neighbour is then turned towards the direction of largest gain by twenty steps of
    gradient ascent, which for a linear map is power iteration.

    Parameters
    ----------
    f : callable
        Maps ``(batch, ...)`` to ``(batch, ...)``, each sample on its own.
    kappa : float
        The promised factor, positive.
    x : Tensor
        Shape ``(batch, ...)``, floating. States near which the promise is tried.
    pairs : int
        How many pairs to try.
    generator : torch.Generator, optional
        Draws samples, distances and first directions, on the CPU.

    Returns
    -------
    float
        The largest ratio found, a lower bound of the Lipschitz constant.

    Raises
    ------
    AssertionError
        If a ratio exceeds ``kappa`` by more than rounding, with the ratio and the distance of the pair.
    ValueError
        If ``kappa`` is not positive, ``x`` has no samples, or ``pairs`` is less than 1.

    Notes
    -----
    Source: the definition of a Lipschitz map; the ascent direction of the gain is ``J^T (f(x) - f(y))``.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import assert_contraction
    >>> x, generator = torch.zeros(4, 3), torch.Generator().manual_seed(0)
    >>> round(assert_contraction(lambda z: 0.5 * z, 0.5, x, generator=generator), 3)
    0.5
    >>> assert_contraction(lambda z: 0.6 * z, 0.5, x, generator=generator)
    Traceback (most recent call last):
        ...
    AssertionError: the map stretches a pair by 0.6, more than the promised 0.5 ...
    """
    if kappa <= 0:
        raise ValueError(f"kappa must be positive, got {kappa}: no map but a constant contracts so")
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}: nothing would be checked")

    chosen = torch.randint(x.shape[0], (pairs,), generator=generator).to(x.device)
    start = x.detach()[chosen]
    exponents = torch.empty(pairs, dtype=torch.float64).uniform_(-3, 1, generator=generator)
    direction = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
    scale = _norms(start)
    radius = torch.where(scale > 0, scale, torch.ones_like(scale)) * (10**exponents).to(start)

    with torch.no_grad():
        image = f(start).detach()
    worst = torch.zeros_like(radius)
    for _ in range(20):
        offset = direction * _as_column(radius / _norms(direction), direction)
        with torch.enable_grad():
            neighbour = (start + offset).requires_grad_(True)
            difference = f(neighbour) - image
            (direction,) = torch.autograd.grad(difference.square().sum(), neighbour)
        # The distance as stored, not as asked for: a small offset is rounded when it is added.
        distance = _norms(neighbour.detach() - start)
        gap = _norms(difference.detach())
        rounding = _rounding(image, start + offset, kappa)
        worst = torch.maximum(worst, (gap - rounding).clamp_min(0) / distance)
        stuck = _norms(direction) == 0
        direction = torch.where(_as_column(stuck, direction), offset, direction)
    ratio, pair = worst.max(dim=0)
    if not ratio <= kappa:  # written so that a NaN fails
        raise AssertionError(
            f"the map stretches a pair by {ratio.item():.6g}, more than the promised {kappa:.6g} "
            f"(sample {chosen[pair].item()}, distance {radius[pair].item():.3g})"
        )
    return ratio.item()


def assert_equivariant(
    f: Callable[[Tensor], Tensor],
    act_in: Callable[[Tensor], Tensor],
    act_out: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that ``f`` commutes with an action: ``f(act_in(x)) == act_out(f(x))``.

    Parameters
    ----------
    f : callable
        The map.
    act_in, act_out : callable
        The action of one group element on inputs and on outputs; the identity on outputs for an invariant.
    x : Tensor
        An input that ``act_in`` moves.
    rtol, atol : float, optional
        As in :func:`torch.testing.assert_close`; the defaults follow the dtype.

    Raises
    ------
    AssertionError
        If the two sides differ.
    ValueError
        If ``act_in`` leaves ``x`` where it is: every map would pass.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import assert_equivariant
    >>> swap = lambda z: z.flip(-1)
    >>> assert_equivariant(torch.sin, swap, swap, torch.tensor([0.1, 0.2]))
    """
    moved = act_in(x)
    if moved.shape == x.shape and torch.equal(moved, x):
        raise ValueError("act_in must move x, got the same tensor back: every map would pass")
    torch.testing.assert_close(
        f(moved),
        act_out(f(x)),
        rtol=rtol,
        atol=atol,
        msg=lambda detail: f"the map does not commute with the action: {detail}",
    )


def saved_tensor_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps alive for the backward pass of ``fn()``.

    Storages are counted once however often they are saved, and only if the graph of the result still holds
    them when ``fn`` returns. Tensors that a custom function hides on its context, past
    ``save_for_backward``, are not seen.

    Parameters
    ----------
    fn : callable
        Takes nothing and returns what is to be differentiated.
    exclude : iterable of Tensor
        Tensors whose storages do not count, for example ``module.parameters()`` and the inputs.

    Returns
    -------
    int
        Bytes in distinct storages.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import saved_tensor_bytes
    >>> x = torch.ones(10, requires_grad=True)
    >>> saved_tensor_bytes(lambda: x.exp().sum())  # exp keeps its result: ten floats
    40
    """
    ignored = {_storage(tensor).data_ptr() for tensor in exclude}
    boxes: list[weakref.ref[_Box]] = []

    def pack(tensor: Tensor) -> _Box:
        # Detached: an output that its own node saves would otherwise hold that node for ever.
        box = _Box(tensor.detach())
        boxes.append(weakref.ref(box))
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        result = fn()
    held = [box.tensor for reference in boxes if (box := reference()) is not None]
    sizes = {_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in held}
    del result  # the graph had to live until here
    return sum(size for address, size in sizes.items() if address not in ignored)


class _Box:
    """Holds a saved tensor, so that the graph's own reference can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # A tensor of the emulated device has no storage of its own.
    return getattr(tensor, "raw", tensor).untyped_storage()


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    dtype = torch.complex128 if value.is_complex() else torch.float64
    return value.detach().to(dtype, copy=True).requires_grad_(True)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)  # (batch,)


def _as_column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (like.dim() - 1))


def _rounding(image: Tensor, neighbour: Tensor, kappa: float) -> Tensor:
    # Each entry of f(x) and of x carries an error of a few units in its last place, and a sum over n terms
    # inside f about sqrt(n) of them.
    terms = max(image[0].numel(), neighbour[0].numel())
    unit = torch.finfo(image.dtype).eps * terms**0.5
    return 4 * unit * (_norms(image) + kappa * _norms(neighbour))
