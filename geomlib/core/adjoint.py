"""How to differentiate through a fixed point: implicitly, by unrolling, or by one step.

``Implicit`` is the implicit function theorem (Krantz and Parks 2013; for deep equilibrium models Bai, Kolter,
Koltun 2019, arXiv 1909.01377): with ``J = df/dz`` at the solution, the gradient of a loss ``L`` is ``u^T
df/dp`` where ``u = J^T u + dL/dz``. That linear equation is a fixed point itself, so its derivative is
implicit too, and so on to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from geomlib.core.monitor import Monitor
from geomlib.core.newton import Direct
from geomlib.core.precision import full_precision, working_dtype
from geomlib.core.problem import FlatMap, Problem, conclude, iterate
from geomlib.core.solution import Solution
from geomlib.core.solvers import Anderson, Solver

__all__ = ["Adjoint", "Implicit", "OneStep", "Unrolled"]


class Adjoint(Protocol):
    """What :func:`geomlib.core.solve` asks of a way to differentiate.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import OneStep, solve
    >>> solve(torch.cos, torch.ones(1, 1), adjoint=OneStep()).reason
    'converged'
    """

    def run(self, problem: Problem) -> Solution:
        """Solve and attach the gradient."""


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: exact at the solution, to any order, memory independent of the steps.

    Parameters
    ----------
    solver : Solver, optional
        For the linear equation ``u = J^T u + g``. By default ``Direct()`` where the solution was found by
        ``Direct()``, otherwise ``Anderson()``.
    tol : float, optional
        Relative residual ``|J^T u + g - u| / (|g| + |u|)`` of each sample. By default that of the solve.
    max_steps : int, optional
        Products with ``J^T`` at most. By default that of the solve.

    Raises
    ------
    ValueError
        If ``tol`` or ``max_steps`` is not positive.

    Notes
    -----
    Needs ``1`` not to be an eigenvalue of ``J``. A backward solve that misses its tolerance raises
    :class:`ConvergenceError`, or warns where the solve had ``throw=False``.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import solve
    >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> z = solve(
    ...     lambda z, a: a * z + 1, torch.zeros(1, 1, dtype=torch.float64), a
    ... ).value.sum()  # 1 / (1 - a)
    >>> (first,) = torch.autograd.grad(z, a, create_graph=True)  # 1 / (1 - a)^2
    >>> (second,) = torch.autograd.grad(first, a)  # 2 / (1 - a)^3
    >>> round(first.item(), 6), round(second.item(), 6)
    (4.0, 16.0)
    """

    solver: Solver | None = None
    tol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol}: no residual is below it")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(
                f"max_steps must be at least 1, got {self.max_steps}: the gradient needs one product"
            )

    def run(self, problem: Problem) -> Solution:
        """Solve and attach the gradient."""
        value, monitor = iterate(problem)
        if torch.is_grad_enabled() and any(p.requires_grad for p in problem.params):
            default = Direct() if isinstance(problem.solver, Direct) else Anderson()
            backward = _Backward(
                solver=self.solver or default,
                tol=self.tol or problem.residual_tol,
                max_steps=self.max_steps or problem.max_steps,
                throw=problem.throw,
            )
            solution = problem.conclude(value, monitor)
            attached = _attach(problem.f, backward, value, problem.params)
            return replace(solution, value=attached)
        return problem.conclude(value, monitor)


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the plain iteration ``z <- f(z)`` from the initial state, every step recorded.

    Whatever solver the call names, the recorded iteration is the plain one: it is the reference that the
    other adjoints are measured against. All samples take the same number of steps. Memory grows with that
    number.

    Parameters
    ----------
    steps : int, optional
        Exactly so many evaluations. By default as many as the tolerance needs.

    Raises
    ------
    ValueError
        If ``steps`` is not positive.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Unrolled, solve
    >>> a = torch.tensor(0.5, requires_grad=True)
    >>> z = solve(lambda z, a: a * z + 1, torch.zeros(1, 1), a, adjoint=Unrolled(2), tol=0.5).value  # 1 + a
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor(1.)
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}: nothing would be unrolled")

    def run(self, problem: Problem) -> Solution:
        """Iterate with every step recorded."""
        f, params = problem.f, problem.params
        check = FlatMap(problem)
        x = check.start(problem.z0)
        with torch.no_grad():
            check(x)  # shapes and closed-over tensors, before a graph is built on them
        monitor = Monitor(x, problem.residual_tol, self.steps or problem.max_steps)
        z = problem.z0.detach()
        while True:
            image = f(z, *params)
            with torch.no_grad():
                x, y = check.start(z), check.start(image)
                enough = monitor.observe(x, y, y - x)
            if enough if self.steps is None else monitor.steps == self.steps:
                break
            z = image
        monitor.settle()
        return problem.conclude(image, monitor)


@dataclass(frozen=True)
class OneStep:
    """The gradient of one evaluation of ``f`` at the solution: cheap, biased by ``(I - J)^{-1}``.

    Notes
    -----
    Source: Fung et al. 2022 (Jacobian-free backpropagation, arXiv 2103.12803). The value is the solution
    itself; only its gradient comes from the extra evaluation.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import OneStep, solve
    >>> a = torch.tensor(0.5, requires_grad=True)
    >>> z = solve(lambda z, a: a * z + 1, torch.zeros(1, 1), a, adjoint=OneStep()).value
    >>> torch.autograd.grad(z.sum(), a)[0]  # z* = 2, half of the true 1 / (1 - a)^2 = 4
    tensor(2.)
    """

    def run(self, problem: Problem) -> Solution:
        """Solve, then record one evaluation."""
        value, monitor = iterate(problem)
        solution = problem.conclude(value, monitor)
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in problem.params)):
            return solution
        image = problem.f(value, *problem.params)
        return replace(solution, value=value + (image - image.detach()))


# The same words each time: Python shows a warning once for each place and text, and a training run has many
# steps.
_INEXACT = (
    "implicit gradient not reached for some samples: the best iterate stands in for it; "
    "raise max_steps or tol of Implicit, or make the map contract"
)


@dataclass(frozen=True)
class _Backward:
    """How the adjoint equation is solved."""

    solver: Solver
    tol: float
    max_steps: int
    throw: bool


def _attach(
    f: Callable[..., Tensor], backward: _Backward, value: Tensor, params: tuple[Tensor, ...]
) -> Tensor:
    """``value`` with the implicit gradient of ``z = f(z, *params)`` in it."""
    return _ImplicitFunction.apply(f, backward, (value,), *params)


class _ImplicitFunction(torch.autograd.Function):
    """The identity on a solution found elsewhere, whose backward is the adjoint fixed point."""

    @staticmethod
    def forward(
        f: Callable[..., Tensor], backward: _Backward, holder: tuple[Tensor], *params: Tensor
    ) -> Tensor:  # the tuple keeps the value out of autograd's sight: no gradient flows along the iterates
        return holder[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.f, ctx.backward = inputs[:2]
        # The output, saved as such, comes back with its own history: second derivatives start from it.
        ctx.save_for_backward(output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *params = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        with full_precision(z.device):
            if torch.is_grad_enabled():
                grads = _differentiable_adjoint(ctx.f, ctx.backward, z, params, wanted, grad)
            else:
                grads = _plain_adjoint(ctx.f, ctx.backward, z, params, wanted, grad)
        remaining = iter(grads)
        return (None, None, None, *[next(remaining) if want else None for want in wanted])


def _plain_adjoint(
    f: Callable[..., Tensor],
    backward: _Backward,
    z: Tensor,
    params: list[Tensor],
    wanted: tuple[bool, ...],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Compute detached gradients: one graph of ``f``, walked once per product with ``J^T``."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        leaves = [p.detach().requires_grad_(want) for p, want in zip(params, wanted, strict=True)]
        image = f(leaf, *leaves)
    u = _solve_adjoint(image, leaf, grad, backward)
    targets = [p for p, want in zip(leaves, wanted, strict=True) if want]
    return _pull_back(image, targets, u)


def _solve_adjoint(image: Tensor, leaf: Tensor, grad: Tensor, backward: _Backward) -> Tensor:
    """``u = J^T u + grad`` with ``J = d image / d leaf``, no history."""
    flat = (grad.shape[0], -1)
    work = working_dtype(grad.dtype)
    g = grad.detach().reshape(flat).to(work)
    if not image.requires_grad:  # f does not look at its state
        return grad.detach()

    def pull(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            image, leaf, u.reshape(grad.shape).to(grad.dtype), retain_graph=True, allow_unused=True
        )
        return g if product is None else product.reshape(flat).to(work) + g

    # Gradients come in any scale, so the equation is judged relative to its right-hand side.
    size = torch.linalg.vector_norm(g, dim=1).clamp_min_(torch.finfo(work).tiny)
    monitor = Monitor(g, backward.tol, backward.max_steps, floor=size)
    with torch.no_grad():
        backward.solver.run(pull, g, monitor)
    solution = conclude(
        monitor.value,
        monitor,
        backward.tol,
        None,
        throw=backward.throw,
        what="implicit gradient",
        warning=_INEXACT,
    )
    return solution.value.view(grad.shape).to(grad.dtype)


def _differentiable_adjoint(
    f: Callable[..., Tensor],
    backward: _Backward,
    z: Tensor,
    params: list[Tensor],
    wanted: tuple[bool, ...],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Compute the same gradients as differentiable functions of ``z``, ``params`` and ``grad``."""

    def adjoint_map(u: Tensor, z: Tensor, grad: Tensor, *params: Tensor) -> Tensor:
        with torch.enable_grad():
            # An alias of its own: the derivative stops here, and does not follow how z depends on params.
            here = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
            image = f(here, *params)
            (product,) = _pull_back(image, [here], u, create_graph=True)
        return grad if product is None else product + grad

    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = f(leaf, *[p.detach() for p in params])
    value = _solve_adjoint(image, leaf, grad, backward)
    u = _attach(adjoint_map, backward, value, (z, grad, *params))

    aliases = [p.view_as(p) for p in params]
    image = f(z, *aliases)
    targets = [p for p, want in zip(aliases, wanted, strict=True) if want]
    return _pull_back(image, targets, u, create_graph=True)


def _pull_back(
    image: Tensor, targets: list[Tensor], u: Tensor, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """``u^T d image / d target`` for each target, None where ``image`` does not depend on it."""
    if not image.requires_grad:
        return (None,) * len(targets)
    return torch.autograd.grad(image, targets, u, create_graph=create_graph, allow_unused=True)
