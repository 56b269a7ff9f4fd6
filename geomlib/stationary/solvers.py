r"""Solvers of the stationary equation: Newton with conjugate gradients, splittings, the dissipative flow.

Newton's method needs the Hessian and finds minimisers on its own; forward-backward and Douglas-Rachford
splitting need the proximity operator of the potential; the flow `d psi / dt = -(gamma + i) F` is the physical
dynamics of arXiv 2507.20088. All of them iterate under a monitor of `geomlib.core`, on the residual `|F| /
max(1, |f|)` of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from geomlib.core import Anderson, Picard, conjugate_gradient, newton_descent
from geomlib.core.monitor import Monitor
from geomlib.stationary.equation import Equation
from geomlib.stationary.hessian import hessian_solve, stiffness

__all__ = ["DissipativeFlow", "DouglasRachford", "ForwardBackward", "NewtonCG", "Solver"]


class Solver(Protocol):
    """What :func:`geomlib.stationary.solve_stationary` asks of a solver."""

    def run(self, equation: Equation, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Monitor]:
        """Return the best states found and the monitor that watched."""


@dataclass(frozen=True)
class NewtonCG:
    """Newton's method, its linear systems by factorisation on the dense path, by conjugate gradients else.

    Parameters
    ----------
    inner_steps
        Products with the Hessian in one Newton step at most, on the sparse path.

    Raises
    ------
    ValueError
        If `inner_steps < 1`.

    Notes
    -----
    Source: Nocedal and Wright 2006, algorithm 7.1. Globally convergent under strong monotonicity, and
    quadratically at the end; elsewhere it descends to some minimiser.

    Examples
    --------
    >>> NewtonCG()
    NewtonCG(inner_steps=2000)
    """

    inner_steps: int = 2000

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(
                f"inner_steps must be at least 1, got {self.inner_steps}: no step would be found"
            )

    def run(self, equation: Equation, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Monitor]:
        """Iterate from `start`."""
        _need_smooth(equation, self)

        def direction(psi: Tensor, right: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor]:
            return hessian_solve(equation, psi, right, accuracy, self.inner_steps)[:2]

        return newton_descent(
            equation.energy,
            equation.residual,
            direction,
            start,
            floor=equation.scale,
            tol=tol,
            max_steps=max_steps,
            convex=equation.convex,
        )


@dataclass(frozen=True)
class ForwardBackward:
    """Forward-backward splitting `psi <- prox_{tU}(psi - t (L psi - f))`, accelerated on request.

    Parameters
    ----------
    step
        `t`; by default the reciprocal of the largest degree, at or below the stable `2 / lambda_max(L)`.
    memory
        Differences that Anderson acceleration mixes; 0 is the plain iteration.

    Raises
    ------
    ValueError
        If `step` is not positive or `memory` is negative.

    Notes
    -----
    Source: known (Lions and Mercier 1979); linear at the rate `1 / (1 + t mu)` or better.

    Examples
    --------
    >>> ForwardBackward(memory=5)
    ForwardBackward(step=None, memory=5)
    """

    step: float | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        _check_step(self.step)
        if self.memory < 0:
            raise ValueError(f"memory must not be negative, got {self.memory}")

    def advance(self, equation: Equation, psi: Tensor, push: Tensor | None = None) -> Tensor:
        """Return the next state; differentiable in everything."""
        t = self.length(equation)
        push = equation.laplacian(psi) if push is None else push
        return equation.potential.prox(psi - t * (push - equation.drive), t)

    def length(self, equation: Equation) -> float:
        """Return the step `t` taken on this equation."""
        if self.step is not None:
            return self.step
        with torch.no_grad():
            largest = float(equation.graph.degrees().max())
        return 1 / largest if largest > 0 else 1.0

    def run(self, equation: Equation, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Monitor]:
        """Iterate from `start`."""
        t = self.length(equation)
        last: list[Tensor] = []  # an image and its Laplacian, which the plain iteration needs next

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            psi = equation.shaped(x)
            push = last[1] if last and last[0] is x else equation.laplacian(psi)
            image = self.advance(equation, psi, push)
            flat, ahead = equation.flat(image), equation.laplacian(image)
            last[:] = [flat, ahead]
            # The prox gives a (sub)gradient of U at the image, so the residual there costs nothing more.
            return flat, equation.flat((psi - image) / t + ahead - push)

        solver = Anderson(self.memory) if self.memory else Picard()
        return _watched(equation, solver, evaluate, equation.flat(start), tol, max_steps)


@dataclass(frozen=True)
class DissipativeFlow:
    """Euler steps of the dissipative Schrodinger flow `d psi / dt = -(gamma + i) F(psi)`.

    Parameters
    ----------
    gamma
        Dissipation, positive; for real states the flow is the gradient flow `-gamma F`.
    step
        Length of a step in time; by default half of the stable `2 gamma / ((1 + gamma^2) h)`, with `h` a
        bound of the Hessian at the state.

    Raises
    ------
    ValueError
        If `gamma` or `step` is not positive.

    Notes
    -----
    Source: arXiv 2507.20088 for the dynamics; its equation is reconstructed. `gamma` changes the path and not
    the end (SGN-A2).

    Examples
    --------
    >>> DissipativeFlow(gamma=3.0)
    DissipativeFlow(gamma=3.0, step=None)
    """

    gamma: float = 1.0
    step: float | None = None

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}: the flow would never come to rest")
        _check_step(self.step)

    def velocity(self, equation: Equation, psi: Tensor) -> Tensor:
        """Return `-(gamma + i) F(psi)`."""
        slope = equation.residual(psi)
        return slope * -(self.gamma + 1j) if psi.is_complex() else slope * -self.gamma

    def advance(self, equation: Equation, psi: Tensor) -> Tensor:
        """Return the state one step later; differentiable in everything."""
        with torch.no_grad():
            length = self.length(equation, psi)
        return psi + length * self.velocity(equation, psi)

    def length(self, equation: Equation, psi: Tensor) -> Tensor:
        """Return the step that is stable at these states, `(B, 1, 1)`."""
        if self.step is not None:
            return equation.scale.new_full((len(psi), 1, 1), self.step)
        return self._stable(stiffness(equation, psi))[:, None, None]

    def _stable(self, stiffness: Tensor) -> Tensor:
        # Real states have no rotating part.
        gamma = self.gamma
        return stiffness.reciprocal() * (gamma / (1 + gamma * gamma))

    def run(self, equation: Equation, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Monitor]:
        """Iterate from `start`."""
        _need_smooth(equation, self)
        slope = equation.residual(start)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal slope
            psi = equation.shaped(x)
            turned = slope * (self.gamma + 1j) if psi.is_complex() else slope * self.gamma
            if self.step is None:
                turned = self._stable(stiffness(equation, psi))[:, None, None] * turned
            else:
                turned = self.step * turned
            image = psi - turned
            slope = equation.residual(image)
            return equation.flat(image), equation.flat(slope)

        return _watched(equation, Picard(), evaluate, equation.flat(start), tol, max_steps)


@dataclass(frozen=True)
class DouglasRachford:
    """Douglas-Rachford splitting between the linear part, factorised once, and the local potential.

    Parameters
    ----------
    step
        `t`; by default `1 / sqrt(mu h)` from the bounds of the curvature that are known.
    relaxation
        1 is Douglas-Rachford, 2 is Peaceman-Rachford.

    Raises
    ------
    ValueError
        If `step` is not positive or `relaxation` not in (0, 2].

    Notes
    -----
    Source: known (Lions and Mercier 1979). Converges for every convex potential and every `t`; with the
    resolvent `(I + t L)^{-1}` it is the reading of a layer as a resolvent (SGN-R1).

    Examples
    --------
    >>> DouglasRachford()
    DouglasRachford(step=None, relaxation=1.0)
    """

    step: float | None = None
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        _check_step(self.step)
        if not 0 < self.relaxation <= 2:
            raise ValueError(f"relaxation must lie in (0, 2], got {self.relaxation}: it would not converge")

    def run(self, equation: Equation, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Monitor]:
        """Iterate from `start`."""
        t = self.step
        if t is None:
            largest = 2 * float(equation.graph.degrees().max())
            least = equation.monotonicity or 1.0
            t = 1 / (least * max(largest, least)) ** 0.5
        resolvent = _resolvent(equation, t)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            y = equation.shaped(x)
            z = resolvent(y + t * equation.drive)
            q = 2 * z - y
            best[0] = equation.potential.prox(q, t)
            slope = equation.laplacian(best[0]) - equation.drive + (q - best[0]) / t
            return equation.flat(y + self.relaxation * (best[0] - z)), equation.flat(slope)

        best = [start]
        # The driver y of the state start = J(y).
        driver = start + t * (equation.laplacian(start) - equation.drive)
        return _watched(
            equation,
            Picard(),
            evaluate,
            equation.flat(driver),
            tol,
            max_steps,
            lambda: equation.flat(best[0]),
        )


class _Watch(Monitor):
    """A monitor that judges images by the residual of the equation, and keeps what it is told to keep."""

    def __init__(self, origin: Tensor, tol: float, max_steps: int, floor: Tensor) -> None:
        super().__init__(origin, tol, max_steps, floor=floor)
        self.origin = torch.zeros_like(origin)
        self.slope = origin
        self.keep: Callable[[], Tensor] | None = None

    def observe(self, x: Tensor, image: Tensor, difference: Tensor) -> bool:
        """Account for one step by the residual at its image."""
        return super().observe(self.origin, image if self.keep is None else self.keep(), self.slope)


def _watched(
    equation: Equation,
    solver: Anderson | Picard,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    tol: float,
    max_steps: int,
    keep: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Monitor]:
    """Run a fixed-point solver of core on a map that also tells the residual of the equation at its image."""
    monitor = _Watch(start, tol, max_steps, equation.scale)
    monitor.keep = keep

    def f(x: Tensor) -> Tensor:
        image, monitor.slope = evaluate(x)
        return image

    solver.run(f, start, monitor)
    return equation.shaped(monitor.value), monitor


def _resolvent(equation: Equation, t: float) -> Callable[[Tensor], Tensor]:
    """`(I + t L)^{-1}` on states, by one factorisation, or by conjugate gradients for large graphs."""
    if equation.unknowns > 20 * 200:
        tol = torch.finfo(equation.scale.dtype).eps * 16

        def iterate(y: Tensor) -> Tensor:
            return conjugate_gradient(lambda v: v + t * equation.laplacian(v), y, tol=tol)[0]

        return iterate
    matrix = t * equation.rows
    factor = torch.linalg.cholesky(matrix + torch.diag(torch.ones_like(matrix[0])))
    return lambda y: equation.shaped(torch.cholesky_solve(equation.flat(y).mT, factor).mT.contiguous())


def _need_smooth(equation: Equation, solver: object) -> None:
    if not getattr(equation.potential, "smooth", True):
        raise ValueError(
            f"solver must be ForwardBackward or DouglasRachford for {type(equation.potential).__name__}, got "
            f"{solver}: the potential has kinks"
        )


def _check_step(step: float | None) -> None:
    if step is not None and not step > 0:
        raise ValueError(f"step must be positive, got {step}: the iteration would not descend")
