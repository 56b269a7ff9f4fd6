"""One fixed-point problem: its checked arguments, the map on flat states, and the report on how it went."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core.monitor import Monitor
from geomlib.core.precision import full_precision, working_dtype
from geomlib.core.solution import (
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    describe_failure,
    observed_rate,
)
from geomlib.core.solvers import Solver

__all__ = ["FlatMap", "Problem", "conclude", "iterate"]


@dataclass(frozen=True)
class Problem:
    """Everything that :func:`geomlib.core.solve` was asked.

    Raises
    ------
    TypeError, ValueError
        If an argument cannot be worked with.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Picard
    >>> problem = Problem(torch.cos, torch.zeros(1, 1), (), Picard(), 1e-6, 0.9, 50, True)
    >>> round(problem.residual_tol * 1e7, 3)  # tol (1 - kappa) / kappa
    1.111
    """

    f: Callable[..., Tensor]
    z0: Tensor
    params: tuple[Tensor, ...]
    solver: Solver
    tol: float
    contraction_factor: float | None
    max_steps: int
    throw: bool

    def __post_init__(self) -> None:
        z0, kappa = self.z0, self.contraction_factor
        if not isinstance(z0, Tensor):
            raise TypeError(f"z0 must be a tensor, got {type(z0).__name__}")
        if not z0.is_floating_point():
            raise ValueError(
                f"z0 must have a floating dtype, got {z0.dtype}: the state converges in real numbers "
                "(view a complex state as real pairs)"
            )
        if z0.dim() == 0 or z0.numel() == 0:
            raise ValueError(
                f"z0 must be (batch, ...) and not empty, got shape {tuple(z0.shape)}: nothing to solve"
            )
        for position, param in enumerate(self.params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"params[{position}] must be a tensor, got {type(param).__name__}: "
                    "close over what is not differentiated"
                )
        if not (self.tol > 0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be positive and finite, got {self.tol}: no iterate could meet it")
        if kappa is not None and not 0 < kappa < 1:
            raise ValueError(
                f"contraction_factor must lie in (0, 1), got {kappa}: the map would not contract"
            )
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps must be at least 1, got {self.max_steps}: f would never be evaluated"
            )

    @property
    def residual_tol(self) -> float:
        """The residual at which ``tol`` is met: ``tol`` itself, or what the error bound asks for."""
        if self.contraction_factor is None:
            return self.tol
        return self.tol * (1 - self.contraction_factor) / self.contraction_factor

    def conclude(self, value: Tensor, monitor: Monitor) -> Solution:
        """Pack what ``monitor`` knows; raise or warn when the tolerance was missed."""
        return conclude(
            value, monitor, self.tol, self.contraction_factor, throw=self.throw, what="fixed point"
        )


def conclude(
    value: Tensor,
    monitor: Monitor,
    tol: float,
    contraction_factor: float | None,
    *,
    throw: bool,
    what: str,
    warning: str | None = None,
) -> Solution:
    """Make a :class:`Solution` of ``value`` and what ``monitor`` knows of it.

    ``warning`` replaces the sentence with the numbers where the same warning should be shown once only.

    Raises
    ------
    ConvergenceError
        If a sample missed ``tol`` and ``throw`` is true; otherwise a :class:`ConvergenceWarning` is issued.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(1, 1)
    >>> monitor = Monitor(x, tol=0.1, max_steps=1)
    >>> _ = monitor.observe(x, x, x - x)
    >>> conclude(monitor.value, monitor, 0.1, None, throw=True, what="fixed point").reason
    'converged'
    """
    reason = monitor.finish()
    kappa = contraction_factor
    bound = None if kappa is None else monitor.best * (kappa / (1 - kappa))
    trace = torch.stack(monitor.residuals)
    solution = Solution(value, monitor.best, bound, monitor.used, monitor.converged, reason, trace)
    if reason in ("converged", "not evaluated"):
        return solution
    rate = observed_rate(trace)
    message = describe_failure(solution, tol, rate, what)
    if throw:
        raise ConvergenceError(message, solution, rate)
    warnings.warn(warning or message, ConvergenceWarning, stacklevel=5)
    return solution


class FlatMap:
    """``f(., *params)`` on flat states ``(batch, n)``, its first image checked.

    The state is kept in float32 where ``z0`` is a half-precision tensor, so that residuals mean something.

    Raises
    ------
    ValueError
        On the first call, if the image has another shape, dtype or device than the state, or if gradients
        would flow to a tensor that is not among ``params``.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Picard
    >>> problem = Problem(torch.cos, torch.zeros(2, 3, 4), (), Picard(), 1e-6, None, 50, True)
    >>> FlatMap(problem)(torch.zeros(2, 12)).shape
    torch.Size([2, 12])
    """

    def __init__(self, problem: Problem) -> None:
        self.f = problem.f
        self.params = tuple(p.detach() for p in problem.params)
        self.shape, self.dtype, self.device = problem.z0.shape, problem.z0.dtype, problem.z0.device
        self.flat = (self.shape[0], problem.z0[0].numel())
        self.work = working_dtype(self.dtype)
        self.direct = self.flat == self.shape and self.work is self.dtype
        self.checks_closure = torch.is_grad_enabled()
        self.checked = False

    def start(self, z0: Tensor) -> Tensor:
        """First iterate, flat and in the working precision."""
        return z0.detach().reshape(self.flat).to(self.work)

    def finish(self, x: Tensor) -> Tensor:
        """Return a flat state to the shape and dtype of ``z0``."""
        return x.view(self.shape).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the map."""
        if not self.checked:
            return self._first(x)
        if self.direct:
            return self.f(x, *self.params)
        if self.work is not self.dtype:
            x = x.to(self.dtype)
        return self.f(x.view(self.shape), *self.params).reshape(self.flat).to(self.work)

    def _first(self, x: Tensor) -> Tensor:
        self.checked = True
        with torch.set_grad_enabled(self.checks_closure):
            image = self.f(x.to(self.dtype).view(self.shape), *self.params)
        if not isinstance(image, Tensor):
            raise TypeError(f"f must return a tensor like z0, got {type(image).__name__}")
        if image.shape != self.shape:
            raise ValueError(
                f"f must return a tensor shaped like z0, {tuple(self.shape)}, got {tuple(image.shape)}: "
                "a fixed point needs f(z) and z in one space"
            )
        if image.dtype != self.dtype or image.device != self.device:
            raise ValueError(
                f"f must keep dtype and device of z0, {self.dtype} on {self.device}, "
                f"got {image.dtype} on {image.device}"
            )
        if image.requires_grad:
            raise ValueError(
                "f uses a tensor that requires grad and is not among params: its gradient would be lost; "
                "pass it, as in solve(f, z0, weight), or detach it"
            )
        return image.detach().reshape(self.flat).to(self.work)


def iterate(problem: Problem) -> tuple[Tensor, Monitor]:
    """Run the problem's solver without recording; the value, shaped like ``z0``, and the monitor.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Picard
    >>> value, monitor = iterate(Problem(torch.cos, torch.zeros(1, 1), (), Picard(), 1e-4, None, 50, True))
    >>> round(float(value), 3)
    0.739
    """
    evaluate = FlatMap(problem)
    x = evaluate.start(problem.z0)
    monitor = Monitor(x, problem.residual_tol, problem.max_steps)
    with torch.no_grad(), full_precision(x.device):
        problem.solver.run(evaluate, x, monitor)
    return evaluate.finish(monitor.value), monitor
