r"""Relaxations of the supra-graph equation that become exact as a penalty grows (arXiv 2507.20088, abstract).

All have the form :math:`\mathbb F(\Psi)+\lambda^{-1}R(\Psi)=0`, so that state, adjoint and gradients are
:math:`O(\lambda^{-1})` away from the exact ones, with the first coefficient :math:`-J^{-1}R`. The abstract
states the
convergence; the three penalties, the rate and the coefficient are reconstructed. The residual penalty is the
quadratic penalty method, stiff copies are auxiliary coordinates, the symmetric energy is a Hopfield network
whose layers live on scales that part as the penalty grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from geomlib.core import Solution, newton_descent, real_inner
from geomlib.core.problem import conclude
from geomlib.stationary.assembly import empty_solution, refined, symmetric_solve
from geomlib.stationary.supra import SupraGraph

__all__ = [
    "Relaxation",
    "ResidualPenalty",
    "continuation",
    "first_order",
    "richardson",
    "ridge",
]


class Relaxation(Protocol):
    """What the three penalties share."""

    supra: SupraGraph

    def solve(self, x: Tensor, strength: float, *, start: Tensor | None = None, **options: Any) -> Solution:
        """Return the relaxed state `(B, size)`."""
        ...

    def adjoint(self, psi: Tensor, x: Tensor, strength: float, gradient: Tensor) -> Tensor:
        """Return the relaxed adjoint `(B, size)`."""
        ...

    def perturbation(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return `R(psi)`, what the relaxation adds to the equations over its strength, to first order."""
        ...


def ridge(weight: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return the base energy `weight / 2 |psi|^2` of each sample.

    Examples
    --------
    >>> ridge(0.5)(torch.ones(1, 4))
    tensor([1.])
    """
    return lambda psi: 0.5 * weight * real_inner(psi, psi)


@dataclass(frozen=True)
class ResidualPenalty:
    r"""P1: minimise :math:`E_0(\Psi)+\frac\lambda2|\mathbb F(\Psi)|^2`.

    Parameters
    ----------
    supra : SupraGraph
        The exact system.
    base
        :math:`E_0`: from states `(B, size)` to `(B,)`, twice differentiable. With the loss itself the
        multiplier
        :math:`\lambda\mathbb F` tends to the adjoint.

    Notes
    -----
    Source: quadratic penalty theory (Nocedal and Wright 2006, chapter 17) and the method of auxiliary
    coordinates (Carreira-Perpinan and Wang 2014), on the supra-graph (reconstructed, SGN-P1). All is divided
    by :math:`\lambda`, so that the Hessian tends to :math:`J^\top J` and its condition number stays bounded.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node], [torch.ones(1, 1)])
    >>> ResidualPenalty(supra, ridge()).solve(torch.ones(1, 1), 9.0, tol=1e-6).value  # 1 / (1 + 1 / lambda)
    tensor([[0.9000]])
    """

    supra: SupraGraph
    base: Callable[[Tensor], Tensor]

    def energy(self, psi: Tensor, x: Tensor, strength: float) -> Tensor:
        r"""Return :math:`E_0/\lambda+\frac12|\mathbb F|^2` of each sample."""
        miss = self.supra.residual(psi, x)
        return self.base(psi) / strength + 0.5 * real_inner(miss, miss)

    def gradient(self, psi: Tensor, x: Tensor, strength: float) -> Tensor:
        r"""Return :math:`\nabla E_0/\lambda+J^\top\mathbb F`, shaped like `psi`."""
        pulled = self.supra.vjp(psi, self.supra.residual(psi, x))
        return slope(self.base, psi) / strength + pulled

    def hessian_product(
        self, psi: Tensor, x: Tensor, strength: float, direction: Tensor, *, gauss_newton: bool = False
    ) -> Tensor:
        r"""Return :math:`(\nabla^2E_0/\lambda+J^\top J+\sum_i\mathbb F_i\nabla^2\mathbb F_i)` `direction`.

        `gauss_newton` leaves the last term out: positive definite far from the solution as well.
        """
        product = self.supra.vjp(psi, self.supra.jvp(psi, direction))
        product = product + curvature(self.base, psi, direction) / strength
        if gauss_newton:
            return product
        miss = self.supra.residual(psi, x)
        with torch.enable_grad():
            here = psi.detach().requires_grad_()
            pulled = self.supra.vjp(here, miss)
            if not pulled.requires_grad:  # linear layers
                return product
            (bent,) = torch.autograd.grad(real_inner(pulled, direction).sum(), here)
        return product + bent

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        strength: float,
        *,
        start: Tensor | None = None,
        tol: float = 1e-13,
        max_steps: int = 200,
        throw: bool = True,
    ) -> Solution:
        """Minimise by Newton's method, with Gauss-Newton steps where the Hessian is indefinite.

        Parameters
        ----------
        x
            Input `(B, inputs)`.
        strength
            `lambda > 0`.
        start
            `(B, size)`, for example the state of a smaller penalty; zero by default.
        tol
            Of the norm of the scaled gradient.
        max_steps, throw
            As in `solve_stationary`.
        """
        check_strength(strength)
        if len(x) == 0:
            return empty_solution(self.supra.zeros(0))
        psi = self.supra.zeros(len(x)) if start is None else start

        def direction(state: Tensor, right: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor]:
            step, indefinite = symmetric_solve(partial(self._product, strength), (state, x), right, accuracy)
            if not indefinite.any():
                return step, indefinite
            rough = partial(self._product, strength, gauss_newton=True)
            safe, _ = symmetric_solve(rough, (state, x), right, accuracy)
            return torch.where(indefinite[:, None], safe, step), torch.zeros_like(indefinite)

        psi, monitor = newton_descent(
            lambda state: self.energy(state, x, strength),
            lambda state: self.gradient(state, x, strength),
            direction,
            psi,
            tol=tol,
            max_steps=max_steps,
        )
        return conclude(psi, monitor, tol, None, throw=throw, what="penalised state")

    def multiplier(self, psi: Tensor, x: Tensor, strength: float) -> Tensor:
        r"""Return :math:`\lambda\mathbb F(\Psi_\lambda)`, in the limit the adjoint if the base is the loss.

        Rounding enters as :math:`\lambda` times the rounding of the state: not beyond 1e8 in double
        precision.
        """
        return strength * self.supra.residual(psi, x)

    @torch.no_grad()
    def adjoint(self, psi: Tensor, x: Tensor, strength: float, gradient: Tensor) -> Tensor:
        r"""Return :math:`p_\lambda=\lambda J(\Psi_\lambda)q`, `q` from the linearised relaxation."""
        check_strength(strength)
        q = refined(partial(self._product, strength), (psi, x), -gradient)
        return self.supra.jvp(psi, q)

    @torch.no_grad()
    def perturbation(self, psi: Tensor, x: Tensor) -> Tensor:
        r"""Return :math:`R=J^{-\top}\nabla E_0`."""
        return -self.supra.adjoint(psi, slope(self.base, psi))

    def _product(
        self, strength: float, psi: Tensor, x: Tensor, direction: Tensor, *, gauss_newton: bool = False
    ) -> Tensor:
        return self.hessian_product(psi, x, strength, direction, gauss_newton=gauss_newton)


def first_order(relaxation: Relaxation, psi: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`-J^{-1}R(\Psi^\star)`, the coefficient of :math:`1/\lambda` in the state of the penalty.

    Parameters
    ----------
    relaxation
        One of the three.
    psi, x
        The exact state `(B, size)` and its input.

    Notes
    -----
    Source: reconstructed (SGN-P0), the implicit function theorem at :math:`\lambda=\infty`.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node], [torch.ones(1, 1)])
    >>> first_order(ResidualPenalty(supra, ridge()), torch.ones(1, 1), torch.ones(1, 1))
    tensor([[-1.]])
    """
    return relaxation.supra.tangent(psi, -relaxation.perturbation(psi, x))


def continuation(
    relaxation: Relaxation, x: Tensor, strengths: Sequence[float], **options: Any
) -> list[Solution]:
    """Solve for growing penalties, each from the state of the one before.

    Parameters
    ----------
    relaxation
        One of the three.
    x
        Input `(B, inputs)`.
    strengths
        Positive and increasing.
    **options
        For `solve`.

    Raises
    ------
    ValueError
        If the strengths do not increase.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node], [torch.ones(1, 1)])
    >>> path = continuation(ResidualPenalty(supra, ridge()), torch.ones(1, 1), [1, 9, 99], tol=1e-6)
    >>> torch.cat([solution.value for solution in path]).flatten()
    tensor([0.5000, 0.9000, 0.9900])
    """
    if any(later <= earlier for earlier, later in pairwise(strengths)):
        raise ValueError(f"strengths must increase, got {list(strengths)}: each solve starts at the last")
    path: list[Solution] = []
    for strength in strengths:
        path.append(relaxation.solve(x, strength, start=path[-1].value if path else None, **options))
    return path


def richardson(once: Tensor, twice: Tensor) -> Tensor:
    r"""Extrapolate states or adjoints from two penalties, the second twice the first, to second order.

    Examples
    --------
    >>> lam = 10.0
    >>> richardson(torch.tensor(1 + 1 / lam), torch.tensor(1 + 1 / (2 * lam)))
    tensor(1.0000)
    """
    return 2 * twice - once


def slope(base: Callable[[Tensor], Tensor], psi: Tensor) -> Tensor:
    """Return the gradient of an energy of each sample, shaped like `psi`."""
    with torch.enable_grad():
        here = psi.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(base(here).sum(), here)
    return gradient


def curvature(base: Callable[[Tensor], Tensor], psi: Tensor, direction: Tensor) -> Tensor:
    """Return the second derivative of an energy applied to `direction`."""
    with torch.enable_grad():
        here = psi.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(base(here).sum(), here, create_graph=True)
        if not gradient.requires_grad:  # at most linear
            return torch.zeros_like(psi)
        (bent,) = torch.autograd.grad(real_inner(gradient, direction).sum(), here, allow_unused=True)
    return torch.zeros_like(psi) if bent is None else bent


def check_strength(strength: float) -> None:
    """Raise `ValueError` unless a penalty is positive and finite."""
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength must be positive and finite, got {strength}: it multiplies a penalty")
