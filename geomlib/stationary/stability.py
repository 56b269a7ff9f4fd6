r"""Which stationary states are stable, and how far a stable branch goes.

The linearised flow at a state is `dx / dt = -(gamma + J) H x` with `J` the multiplication by `i`. As many
eigenvalues of `(gamma + J) H` lie to the right as `H` has positive ones (Ostrowski and Schneider 1962), so a
state is linearly stable exactly if its Hessian is positive definite, whatever `gamma > 0`. arXiv 2507.20088
speaks of stable branches; that this is the notion is reconstructed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core import ConvergenceWarning
from geomlib.stationary.equation import Equation, Path
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.hessian import lowest
from geomlib.stationary.layer import solve_stationary
from geomlib.stationary.potential import Potential
from geomlib.stationary.solvers import NewtonCG, Solver

__all__ = [
    "StabilityReport",
    "StabilityWarning",
    "inertia",
    "linearised_flow",
    "smallest_eigenvalue",
    "stability_report",
    "stable_states",
]

# Below this a state is close to losing its stability, and derivatives are large.
NARROW = 1e-3


class StabilityWarning(UserWarning):
    """A state is stable, but only just."""


@dataclass(frozen=True)
class StabilityReport:
    """How stable the states of a batch are.

    Attributes
    ----------
    residual
        `|F| / max(1, |f|)`, `(B,)`.
    lambda_min
        Smallest eigenvalue of the Hessian, `(B,)`.
    stable
        Whether the residual is below `tol` and `lambda_min` is positive, `(B,)` bool: both must pass.
    """

    residual: Tensor
    lambda_min: Tensor
    stable: Tensor

    def __repr__(self) -> str:
        if self.stable.numel() == 0:
            return "StabilityReport(no states)"
        return (
            f"StabilityReport({int(self.stable.sum())}/{self.stable.numel()} stable, residual at most "
            f"{float(self.residual.max()):.1e}, lambda_min at least {float(self.lambda_min.min()):.3g})"
        )


def smallest_eigenvalue(
    graph: SheafGraph, potential: Potential, psi: Tensor, *, path: Path = "auto"
) -> Tensor:
    """Return the smallest eigenvalue of the Hessian of each sample, `(B,)`.

    Parameters
    ----------
    graph, potential
        The layer.
    psi
        `(B, n, d)`.
    path
        On the dense path the eigenvalues are computed; on the sparse one the number is a Rayleigh quotient,
        an upper bound that inverse iteration has brought down.

    Raises
    ------
    ValueError
        If shapes do not fit or `psi` is not finite.

    Examples
    --------
    >>> from geomlib.stationary import Quartic
    >>> graph, one = SheafGraph.complete(1, torch.ones(0)), torch.ones(1)
    >>> smallest_eigenvalue(graph, Quartic(-one, one), torch.tensor([[[0.0]], [[2.0]]]))
    tensor([-1., 11.])
    """
    with torch.no_grad():
        equation = Equation(graph.detach(), potential, psi.detach(), path)
        return lowest(equation, equation.drive)


def stability_report(
    graph: SheafGraph,
    potential: Potential,
    drive: Tensor,
    psi: Tensor,
    *,
    tol: float = 1e-8,
    path: Path = "auto",
) -> StabilityReport:
    """Judge states by residual and smallest Hessian eigenvalue, and warn of those that are only just stable.

    Parameters
    ----------
    graph, potential, drive
        The layer.
    psi
        States to judge, `(B, n, d)`.
    tol
        Residual up to which a state counts as stationary.
    path
        See :func:`smallest_eigenvalue`.

    Raises
    ------
    ValueError
        If shapes do not fit or numbers are not finite.

    Warns
    -----
    StabilityWarning
        If a stable state has an eigenvalue below 1e-3.

    Examples
    --------
    >>> from geomlib.stationary import Quartic
    >>> graph, one = SheafGraph.complete(1, torch.ones(0)), torch.ones(1)
    >>> stability_report(graph, Quartic(-one, one), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    StabilityReport(0/1 stable, residual at most 0.0e+00, lambda_min at least -1)
    """
    with torch.no_grad():
        equation = Equation(graph.detach(), potential, drive.detach(), path)
        slope = equation.flat(equation.residual(psi))
        residual = torch.linalg.vector_norm(slope, dim=1) / equation.scale
        lambda_min = lowest(equation, psi)
    stable = (residual <= tol) & (lambda_min > 0)
    narrow = int((stable & (lambda_min < NARROW)).sum())
    if narrow:
        warnings.warn(
            f"{narrow} states are stable by less than {NARROW}: a fold is near, derivatives are large",
            StabilityWarning,
            stacklevel=2,
        )
    return StabilityReport(residual, lambda_min, stable)


def inertia(matrix: Tensor) -> Tensor:
    """Count eigenvalues with positive, zero and negative real part.

    Parameters
    ----------
    matrix
        `(..., N, N)`, real. Zero means below `N eps` times the largest modulus.

    Returns
    -------
    Tensor
        `(..., 3)` int64.

    Examples
    --------
    >>> inertia(torch.diag(torch.tensor([3.0, 0.0, -1.0, 2.0])))
    tensor([2, 1, 1])
    """
    values = torch.linalg.eigvals(matrix)
    zero = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values.abs().amax(-1, keepdim=True)
    right, left = values.real > zero, values.real < -zero
    return torch.stack([right.sum(-1), (~right & ~left).sum(-1), left.sum(-1)], -1)


def linearised_flow(hessian: Tensor, gamma: float) -> Tensor:
    """Return `(gamma + J) H` on interleaved real and imaginary parts.

    Parameters
    ----------
    hessian
        `(..., N, N)`, symmetric, `N` even, as :func:`geomlib.stationary.dense_hessian` gives it.
    gamma
        Dissipation, positive.

    Raises
    ------
    ValueError
        If `N` is odd or `gamma` is not positive.

    Examples
    --------
    >>> linearised_flow(torch.diag(torch.tensor([1.0, 2.0])), gamma=0.5)
    tensor([[ 0.5000, -2.0000],
            [ 1.0000,  1.0000]])
    """
    size = hessian.shape[-1]
    if size % 2:
        raise ValueError(
            f"hessian must have an even size, got {size}: real and imaginary parts come in pairs"
        )
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}: the flow would not dissipate")
    pairs = hessian.unflatten(-2, (size // 2, 2))
    turned = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], -2).flatten(-3, -2)
    return gamma * hessian + turned


def stable_states(
    graph: SheafGraph,
    potential: Potential,
    drive: Tensor,
    starts: Tensor,
    *,
    solver: Solver = NewtonCG(),  # noqa: B008
    tol: float = 1e-10,
    max_steps: int = 500,
    separation: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Find the different stable states of one drive that are reached from many starts.

    Parameters
    ----------
    graph, potential
        The layer, of any sign of `V`.
    drive
        `(1, n, d)`.
    starts
        `(S, n, d)`.
    solver, tol, max_steps
        See :func:`geomlib.stationary.solve_stationary`.
    separation
        States closer than this times one plus their norm are the same.

    Returns
    -------
    states
        `(K, n, d)`, by increasing energy.
    energies
        `(K,)`.

    Raises
    ------
    ValueError
        If `drive` is not one drive, or shapes do not fit.

    Notes
    -----
    Source: reconstructed (SGN-A6). That many starts give `K` states does not prove that there are no others.

    Examples
    --------
    >>> from geomlib.stationary import Quartic
    >>> graph, one = SheafGraph.complete(1, torch.ones(0)), torch.ones(1, dtype=torch.float64)
    >>> graph, starts = graph.to(dtype=torch.float64), torch.tensor([[[-1.0]], [[0.5]], [[2.0]]]).double()
    >>> stable_states(graph, Quartic(-2 * one, one), 0.1 * starts[2:], starts)[0].flatten()
    tensor([ 1.4618, -1.3613], dtype=torch.float64)
    """
    if drive.dim() != 3 or len(drive) != 1:
        raise ValueError(f"drive must be one drive (1, nodes, stalk), got {tuple(drive.shape)}")
    drives = drive.expand(len(starts), -1, -1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = solve_stationary(
            graph, potential, drives, solver=solver, start=starts, tol=tol, max_steps=max_steps, throw=False
        )
    with torch.no_grad():
        equation = Equation(graph.detach(), potential, drives)
        good = solution.converged & (lowest(equation, solution.value) > 0)
        energies = equation.energy(solution.value)[good]
    order = energies.argsort()
    states, energies = solution.value[good][order], energies[order]
    kept: list[int] = []
    for i in range(len(states)):
        near = separation * (1 + float(torch.linalg.vector_norm(states[i])))
        if all(float(torch.linalg.vector_norm(states[i] - states[j])) > near for j in kept):
            kept.append(i)
    return states[kept], energies[kept]
