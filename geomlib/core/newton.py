"""Solvers that use the Jacobian: Newton-Krylov for any map, one LU factorisation for affine maps.

Sources: Knoll and Keyes 2004 for the Jacobian-free Newton-Krylov method; the direct solve is Gaussian
elimination on ``(I - J) z = f(0)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core.linear import gmres
from geomlib.core.monitor import Monitor
from geomlib.core.solvers import PATIENCE, Map

__all__ = ["Direct", "NewtonKrylov"]


@dataclass(frozen=True)
class NewtonKrylov:
    """Newton's method on ``f(z) - z = 0`` with GMRES inside, Jacobian products by differences of ``f``.

    Converges quadratically near a root, attracting or not. Every inner product is one more evaluation of
    ``f`` and is counted as one; a Newton step that does not lower the residual is halved.

    Parameters
    ----------
    inner : int
        Dimension of the Krylov space of each Newton step.
    halvings : int
        How often a step may be halved before it is taken all the same.

    Raises
    ------
    ValueError
        If ``inner < 1`` or ``halvings < 0``.

    Notes
    -----
    Source: Knoll and Keyes 2004, section 2, with their choice ``sqrt(eps) (1 + |z|) / |v|`` of the increment.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import NewtonKrylov, solve
    >>> f = lambda z: z**2 - 2  # roots 2 and -1, neither attracts
    >>> solve(f, torch.full((1, 1), 1.5, dtype=torch.float64), solver=NewtonKrylov()).value.round(decimals=6)
    tensor([[2.]], dtype=torch.float64)
    """

    inner: int = 10
    halvings: int = 4

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"inner must be at least 1, got {self.inner}: a Newton step needs a direction")
        if self.halvings < 0:
            raise ValueError(f"halvings must not be negative, got {self.halvings}")

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Iterate until ``monitor`` says stop."""
        inner = min(self.inner, x.shape[1])
        monitor.allow(float("inf"), PATIENCE)
        image = f(x)
        residual = image - x
        if monitor.observe(x, image, residual):
            return
        while True:
            if monitor.spend(min(inner, monitor.max_steps - monitor.steps)):
                return
            step = gmres(_shifted_jacobian(f, x, image), residual, steps=inner)
            step = torch.where(torch.isfinite(step).all(dim=1, keepdim=True), step, residual)
            size = torch.linalg.vector_norm(residual, dim=1)
            length = torch.ones_like(size)
            for attempt in range(self.halvings + 1):
                trial = x + length.unsqueeze(1) * step
                trial_image = f(trial)
                trial_residual = trial_image - trial
                if monitor.observe(trial, trial_image, trial_residual):
                    return
                worse = ~(torch.linalg.vector_norm(trial_residual, dim=1) < size)
                if attempt == self.halvings or not bool((worse & monitor.active).any()):
                    break
                length = torch.where(worse, length / 2, length)
            keep = torch.isfinite(trial_residual).all(dim=1, keepdim=True)
            x = torch.where(keep, trial, x)
            image = torch.where(keep, trial_image, image)
            residual = torch.where(keep, trial_residual, residual)


def _shifted_jacobian(f: Map, x: Tensor, image: Tensor) -> Map:
    """``v -> v - J v`` with ``J v`` by a forward difference of ``f`` at ``x``."""
    reach = (1.0 + torch.linalg.vector_norm(x, dim=1, keepdim=True)) * torch.finfo(x.dtype).eps ** 0.5

    def apply(v: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        increment = reach / torch.where(length > 0, length, 1.0)
        return v - (f(x + increment * v) - image) / increment

    return apply


@dataclass(frozen=True)
class Direct:
    """One LU factorisation, for maps that are affine in ``z`` with one Jacobian for all samples.

    The Jacobian is read off the map itself: a batch of ``b`` basis vectors costs one evaluation. The result
    is checked against ``f`` and refined while its residual misses the tolerance; a map that is not affine, or
    whose samples have Jacobians of their own, is reported as not converged.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Direct, solve
    >>> W = torch.tensor([[0.0, 0.99], [-0.99, 0.0]])
    >>> solve(lambda z, W: z @ W.T + 1, torch.zeros(4, 2), W, solver=Direct()).steps.tolist()
    [3, 3, 3, 3]
    """

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Solve and verify; refine while the residual is above the tolerance."""
        batch, n = x.shape
        offset = f(torch.zeros_like(x))
        monitor.spend(1)
        identity = torch.diag(x.new_ones(n))
        system = identity.clone()  # I - J^T, filled row by row
        for first in range(0, n, batch):
            rows = min(batch, n - first)
            probe = torch.zeros_like(x)
            probe[:rows] = identity[first : first + rows]
            system[first : first + rows] -= (f(probe) - offset)[:rows]
            if monitor.spend(1):
                return
        factors, pivots, _ = torch.linalg.lu_factor_ex(system.mT)
        x = torch.linalg.lu_solve(factors, pivots, offset.mT).mT
        while True:
            image = f(x)
            residual = image - x
            if monitor.observe(x, image, residual):
                return
            x = x + torch.linalg.lu_solve(factors, pivots, residual.mT).mT
