"""Symmetric systems and minimisation by conjugate gradients, batched, real or complex, never a matrix.

All is symmetric for the real inner product `Re sum conj(a) b`, for which a real-linear operator on complex
states may be self-adjoint without being complex-linear. Sources: Hestenes and Stiefel 1952; Steihaug 1983 and
Nocedal and Wright 2006, algorithm 7.1, for Newton's method with conjugate gradients inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core.monitor import EVALUATIONS_PER_SYNC, Monitor

__all__ = ["CGInfo", "conjugate_gradient", "newton_cg", "newton_descent", "real_inner"]

Operator = Callable[[Tensor], Tensor]
Direction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Sufficient decrease of the energy in units of what its slope promises (Armijo 1966), and how often a step is
# halved.
ARMIJO = 1e-4
HALVINGS = 40
# For a convex energy a step that lowers the gradient by this factor is taken without asking the energy.
SHRINK = 0.9
# Curvature below this many units of rounding, relative to the largest seen, is not positive.
FLAT = 16.0


@dataclass(frozen=True)
class CGInfo:
    """How each system of a batch went.

    Attributes
    ----------
    residual : Tensor
        `|b - A x| / |b|` as the recursion has it, shape `(batch,)`; 0 where `b` is 0.
    steps : Tensor
        Products with `A` that the sample needed, shape `(batch,)`, int64.
    converged : Tensor
        Whether the tolerance was met, shape `(batch,)`, bool.
    negative : Tensor
        Whether a direction without positive curvature was met, shape `(batch,)`, bool: `A` is not positive
        definite there, and `x` is what was found before.
    """

    residual: Tensor
    steps: Tensor
    converged: Tensor
    negative: Tensor


def real_inner(a: Tensor, b: Tensor) -> Tensor:
    """Return `Re sum conj(a) b` of each sample.

    Parameters
    ----------
    a, b : Tensor
        Shape `(batch, ...)`, both real or both complex.

    Returns
    -------
    Tensor
        Shape `(batch,)`, real.

    Examples
    --------
    >>> import torch
    >>> i = torch.tensor([[1j]])
    >>> real_inner(i, i), real_inner(i, i * i)
    (tensor([1.]), tensor([0.]))
    """
    product = _parts(a) * _parts(b)
    return product.sum(tuple(range(1, product.dim())))


def conjugate_gradient(
    apply: Operator,
    b: Tensor,
    *,
    tol: float | Tensor = 1e-10,
    max_steps: int = 1000,
    inner: Callable[[Tensor, Tensor], Tensor] = real_inner,
    precondition: Operator | None = None,
) -> tuple[Tensor, CGInfo]:
    """Solve `A x = b` for each sample, `A` symmetric and positive definite for `inner`.

    A sample that is done, or where `A` turns out to be indefinite, keeps its `x` while the others go on.

    Parameters
    ----------
    apply : callable
        `A`, from `(batch, ...)` to the same, linear over the reals and separate for each sample.
    b : Tensor
        Right-hand sides `(batch, ...)`, real or complex; the batch may be empty.
    tol : float or Tensor
        Residual `|b - A x| / |b|` at which a sample is done, one number or one a sample.
    max_steps : int
        Products with `A` at most.
    inner : callable
        Inner product of each sample, `(batch,)`.
    precondition : callable, optional
        An approximate inverse of `A`, itself symmetric and positive definite.

    Returns
    -------
    x : Tensor
        Shaped like `b`.
    info : CGInfo
        How each sample went; it is for the caller to look at.

    Raises
    ------
    ValueError
        If `b` is not floating or complex, `tol` is negative or `max_steps < 1`.

    Notes
    -----
    Source: Hestenes and Stiefel 1952. Reconstructed: the masks, and the flag of curvature below `16 eps` of
    the largest seen, which also tells a singular operator.

    Examples
    --------
    >>> import torch
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> x, info = conjugate_gradient(lambda v: v @ A, torch.tensor([[1.0, 2.0]]), tol=1e-6)
    >>> x, info.steps, info.negative
    (tensor([[0.0909, 0.6364]]), tensor([2]), tensor([False]))
    """
    if not (b.is_floating_point() or b.is_complex()):
        raise ValueError(f"b must be floating or complex, got {b.dtype}: the solution is not a whole number")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}: A would never be applied")
    if not isinstance(tol, Tensor) and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}: no residual is below it")
    if b.is_meta or b.numel() == 0:
        none = inner(b, b)
        return torch.zeros_like(b), CGInfo(none, none.long(), none == none, none != none)
    system = _System(apply, inner, precondition)
    if len(b) == 1 and b.device.type == "cpu" and not b.requires_grad:
        return _one(system, b, float(tol), max_steps)
    return _many(system, b, tol, max_steps)


@dataclass(frozen=True)
class _System:
    apply: Operator
    inner: Callable[[Tensor, Tensor], Tensor]
    precondition: Operator | None


def _many(system: _System, b: Tensor, tol: float | Tensor, max_steps: int) -> tuple[Tensor, CGInfo]:
    """Solve for a batch: masks on the device, the host waits now and then."""
    apply, inner, precondition = system.apply, system.inner, system.precondition
    r, x = b.clone(), torch.zeros_like(b)
    rows_x, rows_r = _parts(x), _parts(r)
    per_sample = (-1,) + (1,) * (rows_x.dim() - 1)
    size = inner(b, b)
    tiny, flat = torch.finfo(size.dtype).tiny, FLAT * torch.finfo(size.dtype).eps
    stop = (tol * tol) * size
    left = size
    active = left > stop
    negative, steps = torch.zeros_like(active), torch.zeros_like(active, dtype=torch.int64)
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = left if precondition is None else inner(r, z)
    length, largest = rz, torch.zeros_like(rz)
    on_host = b.device.type == "cpu"
    for step in range(max_steps):
        if (on_host or step % EVALUATIONS_PER_SYNC == 0) and not bool(active.any()):
            break
        product = apply(p)
        curvature = inner(p, product)
        largest = torch.maximum(largest, curvature.abs() / length.clamp_min(tiny))
        bent = active & ~(curvature > flat * largest * length)  # a NaN counts as well
        negative = negative | bent
        active = active & ~bent
        steps = steps + active
        alpha = torch.where(active, rz / curvature, 0.0).view(per_sample)
        rows_x.addcmul_(alpha, _parts(p))
        rows_r.addcmul_(alpha, _parts(product), value=-1)
        left = torch.where(active, inner(r, r), left)
        z = r if precondition is None else precondition(r)
        new = left if precondition is None else inner(r, z)
        beta = torch.where(active, new / rz.clamp_min(tiny), 0.0)
        _parts(p).mul_(beta.view(per_sample)).add_(_parts(z))
        length = new + beta.square() * length  # since r is orthogonal to the old p
        rz = torch.where(active, new, rz)
        active = active & (left > stop)
    return x, CGInfo((left / size.clamp_min(tiny)).sqrt(), steps, left <= stop, negative)


def _one(system: _System, b: Tensor, tol: float, max_steps: int) -> tuple[Tensor, CGInfo]:
    """Solve for a single sample on the host, with numbers of the host: a tenth of the bookkeeping."""
    apply, inner, precondition = system.apply, system.inner, system.precondition
    r, x = b.clone(), torch.zeros_like(b)
    size = left = float(inner(b, b))
    stop = tol * tol * size
    flat = FLAT * torch.finfo(b.dtype).eps
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = left if precondition is None else float(inner(r, z))
    length, largest, steps, negative = rz, 0.0, 0, False
    while left > stop and steps < max_steps:
        product = apply(p)
        curvature = float(inner(p, product))
        largest = max(largest, abs(curvature) / length if length > 0 else 0.0)
        if not curvature > flat * largest * length:
            negative = True
            break
        steps += 1
        alpha = rz / curvature
        x.add_(p, alpha=alpha)
        r.add_(product, alpha=-alpha)
        left = float(inner(r, r))
        z = r if precondition is None else precondition(r)
        new = left if precondition is None else float(inner(r, z))
        beta = new / rz if rz > 0 else 0.0
        p.mul_(beta).add_(z)
        length, rz = new + beta * beta * length, new
    like = torch.zeros(1, dtype=_parts(b).dtype)
    relative = like + (math.sqrt(left / size) if size > 0 else 0.0)
    flag = torch.zeros(1, dtype=torch.bool)
    return x, CGInfo(
        relative, torch.full_like(flag, steps, dtype=torch.int64), flag | (left <= stop), flag | negative
    )


def newton_descent(
    energy: Operator,
    gradient: Operator,
    direction: Direction,
    start: Tensor,
    *,
    floor: float | Tensor = 1.0,
    tol: float = 1e-10,
    max_steps: int = 200,
    convex: bool = False,
) -> tuple[Tensor, Monitor]:
    """Find a stationary point of an energy of each sample by damped Newton steps.

    Parameters
    ----------
    energy : callable
        From `(batch, ...)` to `(batch,)`.
    gradient : callable
        Its gradient for the real inner product, shaped like the state.
    direction : callable
        `direction(state, right, accuracy) -> (step, indefinite)`: the solution of `H step = right` up to a
        relative residual of `accuracy`, shape `(batch,)`, and which samples have no positive definite `H`.
    start : Tensor
        First states `(batch, ...)`, real or complex.
    floor : float or Tensor
        What the norm of the gradient is divided by, one number or one a sample.
    tol : float
        Residual `|gradient| / floor` at which a sample is done.
    max_steps : int
        Evaluations of the gradient at most.
    convex : bool
        Promise that every stationary point is the minimiser: then a step which lowers the gradient by a tenth
        is taken without asking the energy.

    Returns
    -------
    state : Tensor
        Best state of each sample, shaped like `start`.
    monitor : Monitor
        Residuals, steps and fate, for `geomlib.core.problem.conclude`.

    Notes
    -----
    Source: Nocedal and Wright 2006, sections 3.1 and 7.1. Reconstructed: the energy is not asked where the
    residual is below `64 sqrt(eps)`, where its differences drown in rounding.

    Examples
    --------
    >>> import torch
    >>> def direction(x, right, accuracy):
    ...     return right / (1 + 3 * x**2), torch.zeros(len(x), dtype=torch.bool)
    >>> x, monitor = newton_descent(
    ...     lambda x: (x**2 / 2 + x**4 / 4 - 2 * x).sum(1),
    ...     lambda x: x + x**3 - 2,
    ...     direction,
    ...     torch.zeros(1, 1),
    ... )
    >>> x, monitor.finish()
    (tensor([[1.]]), 'converged')
    """
    shape = (-1,) + (1,) * (start.dim() - 1)
    state = start
    flat = _real(state)
    origin = torch.zeros_like(flat)  # the residual is relative to the floor alone
    monitor = Monitor(flat, tol, max_steps, floor=floor)
    settled = 64 * math.sqrt(torch.finfo(flat.dtype).eps)
    slope_field = gradient(state)
    best: Tensor | None = None
    while not monitor.observe(origin, _real(state), _real(slope_field)):
        residual = monitor.residuals[-1]
        best = residual if best is None else torch.minimum(best, residual)
        going = monitor.active.view(shape)
        accuracy = torch.maximum(residual.sqrt().clamp(max=0.1), 0.3 * tol / residual.clamp_min(monitor.tiny))
        right = torch.where(going, -slope_field, 0.0)
        step, indefinite = direction(state, right, accuracy.clamp(max=0.5))
        descends = real_inner(step, right) > 0
        # Where the Hessian gave nothing that descends, the gradient does.
        step = torch.where((indefinite & ~descends).view(shape), right, step)
        if convex:
            trial = state + step
            trial_slope = gradient(trial)
            size = torch.linalg.vector_norm(_real(trial_slope), dim=1) / floor
            if bool(((size <= SHRINK * best) | (residual <= settled) | ~monitor.active).all()):
                state, slope_field = trial, trial_slope
                continue
        state = state + _armijo(energy, state, step, right, residual <= settled).view(shape) * step
        slope_field = gradient(state)
    return _like(monitor.value, start), monitor


def newton_cg(
    energy: Operator,
    gradient: Operator,
    hessian_product: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    floor: float | Tensor = 1.0,
    tol: float = 1e-10,
    max_steps: int = 200,
    inner_steps: int = 1000,
    precondition: Callable[[Tensor], Operator] | None = None,
    convex: bool = False,
) -> tuple[Tensor, Monitor]:
    """Find a stationary point of an energy by Newton's method with conjugate gradients inside.

    Parameters
    ----------
    energy, gradient, start, floor, tol, max_steps, convex
        See :func:`newton_descent`.
    hessian_product : callable
        `hessian_product(state, x)`, the Hessian at `state` applied to `x`.
    inner_steps : int
        Products with the Hessian in one step at most.
    precondition : callable, optional
        `precondition(state)` is an approximate inverse of the Hessian there.

    Returns
    -------
    state : Tensor
        Best state of each sample.
    monitor : Monitor
        Residuals, steps and fate.

    Notes
    -----
    Source: Nocedal and Wright 2006, algorithm 7.1; the accuracy `min(0.1, sqrt(residual))` of the inner solve
    makes the convergence superlinear (Dembo, Eisenstat and Steihaug 1982).

    Examples
    --------
    >>> import torch
    >>> x, monitor = newton_cg(
    ...     lambda x: (x**2 / 2 + x**4 / 4 - 2 * x).sum(1),
    ...     lambda x: x + x**3 - 2,
    ...     lambda x, v: (1 + 3 * x**2) * v,
    ...     torch.zeros(1, 1),
    ...     tol=1e-6,
    ... )
    >>> x.round(decimals=4), monitor.finish()
    (tensor([[1.]]), 'converged')
    """

    def direction(state: Tensor, right: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor]:
        step, info = conjugate_gradient(
            lambda x: hessian_product(state, x),
            right,
            tol=accuracy,
            max_steps=inner_steps,
            precondition=None if precondition is None else precondition(state),
        )
        return step, info.negative

    return newton_descent(
        energy, gradient, direction, start, floor=floor, tol=tol, max_steps=max_steps, convex=convex
    )


def _armijo(energy: Operator, state: Tensor, step: Tensor, right: Tensor, settled: Tensor) -> Tensor:
    """Step length of each sample: 1, halved until the energy has fallen enough or is at rounding."""
    shape = (-1,) + (1,) * (state.dim() - 1)
    before, promised = energy(state), real_inner(step, right)
    noise = 8 * torch.finfo(before.dtype).eps * before.abs()
    length = torch.ones_like(before)
    for _ in range(HALVINGS):
        after = energy(state + length.view(shape) * step)
        short = ~(after <= before - ARMIJO * length * promised + noise) & ~settled & (promised != 0)
        if not bool(short.any()):
            break
        length = torch.where(short, length / 2, length)
    return length


def _parts(x: Tensor) -> Tensor:
    """`x` with real and imaginary parts along a last axis, a view in any layout of memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def _real(x: Tensor) -> Tensor:
    """`x` as real rows `(batch, n)`, a view of contiguous memory."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.flatten(1)


def _like(flat: Tensor, like: Tensor) -> Tensor:
    """Real rows in the shape and kind of `like`."""
    return torch.view_as_complex(flat.view(*like.shape, 2)) if like.is_complex() else flat.view(like.shape)
