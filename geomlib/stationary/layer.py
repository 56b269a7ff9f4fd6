r"""The stationary layer: solve `F(psi) = 0`, and differentiate the solution by one adjoint solve.

On a stable branch, where the Hessian is positive definite, the solution is a smooth function of weights,
transports, potential and drive (SGN-A4); its derivatives need one symmetric linear system and no record of
the iteration (SGN-A5). arXiv 2507.20088 claims the layer; equations and solvers are reconstructed.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from geomlib.core import ConvergenceError, ConvergenceWarning, Solution, real_inner
from geomlib.core.monitor import Monitor
from geomlib.core.solution import observed_rate
from geomlib.stationary.equation import (
    Equation,
    Path,
    check_state,
    dense_hessian,
    energy,
    hessian_product,
    residual,
)
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.implicit import UnstableBranchError, attach, inverse_hessian
from geomlib.stationary.potential import Potential
from geomlib.stationary.solvers import NewtonCG, Solver

__all__ = [
    "UnstableBranchError",
    "adjoint_field",
    "dense_hessian",
    "edge_gradient",
    "energy",
    "hessian_product",
    "real_inner",
    "residual",
    "solve_stationary",
    "stationary_layer",
]


def solve_stationary(
    graph: SheafGraph,
    potential: Potential,
    drive: Tensor,
    *,
    solver: Solver = NewtonCG(),  # noqa: B008  (frozen dataclass: one instance serves all calls)
    start: Tensor | None = None,
    tol: float = 1e-10,
    max_steps: int = 200,
    path: Path = "auto",
    throw: bool = True,
) -> Solution:
    """Find a stationary state of each sample, without recording anything for gradients.

    Parameters
    ----------
    graph, potential
        The layer.
    drive
        `(B, n, d)`, real or complex; `B` may be 0.
    solver
        One of `geomlib.stationary.solvers`.
    start
        First states, shaped like `drive`. By default one forward-backward step from zero where the layer is
        strongly monotone, else zero.
    tol
        Residual `|F| / max(1, |f|)` at which a sample is done.
    max_steps
        Steps of the solver at most.
    path
        See :class:`geomlib.stationary.equation.Equation`.
    throw
        Raise if a sample misses `tol`; otherwise warn.

    Returns
    -------
    Solution
        `value` is `(B, n, d)`; `bound` is a proved bound of `|psi - psi*| / (1 + |psi|)` where the layer is
        known to be strongly monotone, else None.

    Raises
    ------
    ValueError
        If an argument does not fit or is not finite, with its name.
    ConvergenceError
        If a sample misses `tol` and `throw` is true.

    Notes
    -----
    Source: reconstructed. Under strong monotonicity the state is unique and every solver finds it (SGN-A1);
    elsewhere the branch depends on `start`.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([1.0]))
    >>> potential = Quartic(torch.ones(2), torch.zeros(2))
    >>> solve_stationary(graph, potential, torch.tensor([[[3.0], [0.0]]]), tol=1e-6).value.flatten()
    tensor([2.0000, 1.0000])
    """
    with torch.no_grad():
        equation = _equation(graph, potential, drive, path)
        return _solve(equation, solver, start, tol, max_steps, throw)


def stationary_layer(
    graph: SheafGraph,
    potential: Potential,
    drive: Tensor,
    *,
    solver: Solver = NewtonCG(),  # noqa: B008
    start: Tensor | None = None,
    tol: float = 1e-10,
    adjoint_tol: float | None = None,
    max_steps: int = 200,
    path: Path = "auto",
    throw: bool = True,
) -> Solution:
    """Find a stationary state whose `value` carries gradients, to any order, for one adjoint solve each.

    Parameters
    ----------
    graph, potential, drive
        The layer; gradients flow to weights, transport, the tensors of the potential, and drive.
    solver, start, tol, max_steps, path, throw
        See :func:`solve_stationary`.
    adjoint_tol
        Relative residual of the adjoint solve, by default `tol`.

    Returns
    -------
    Solution
        `value` `(B, n, d)` is differentiable; the rest is not. Backward raises :class:`UnstableBranchError`
        where the Hessian is not positive definite, and `ConvergenceError` where a sample had not converged.

    Raises
    ------
    ValueError, ConvergenceError
        As :func:`solve_stationary`.

    Notes
    -----
    Source: implicit function theorem; the formulas of SGN-A5 are reconstructed. Memory does not depend on the
    steps of the solver: the state and the parameters are kept.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), w)
    >>> potential = Quartic(torch.ones(2), torch.zeros(2))
    >>> psi = stationary_layer(graph, potential, torch.tensor([[[3.0], [0.0]]]), tol=1e-6).value
    >>> torch.autograd.grad(psi[0, 1, 0], w)[0]  # w / (1 + 2 w) times 3
    tensor([0.3333])
    """
    solution = solve_stationary(
        graph,
        potential,
        drive,
        solver=solver,
        start=start,
        tol=tol,
        max_steps=max_steps,
        path=path,
        throw=throw,
    )
    return attach(graph, potential, drive, solution, adjoint_tol or tol, path)


def adjoint_field(
    graph: SheafGraph,
    potential: Potential,
    psi: Tensor,
    gradient: Tensor,
    *,
    tol: float = 1e-12,
    path: Path = "auto",
) -> Tensor:
    """Solve `H(psi) p = -gradient`: the field that turns changes of the equation into changes of the loss.

    Parameters
    ----------
    graph, potential
        The layer.
    psi, gradient
        A stationary state and the gradient of the loss there, `(B, n, d)`.
    tol
        Relative residual.
    path
        See :class:`geomlib.stationary.equation.Equation`.

    Returns
    -------
    Tensor
        `p`, `(B, n, d)`. A change `dF` of the equation changes the loss by `<p, dF>`.

    Raises
    ------
    ValueError
        If an argument does not fit or is not finite.
    UnstableBranchError
        If `H` is not positive definite.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> one = torch.ones(1)
    >>> graph, potential = SheafGraph.complete(1, one[:0]), Quartic(4 * one, 0 * one)
    >>> adjoint_field(graph, potential, torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    tensor([[[-0.2500]]])
    """
    check_state(graph, potential, gradient, "gradient")
    with torch.no_grad():
        equation = _equation(graph, potential, psi, path)
        return -inverse_hessian(equation, psi, gradient, tol)


def edge_gradient(graph: SheafGraph, p: Tensor, psi: Tensor) -> Tensor:
    """Return the derivative of the loss for the weight of every candidate edge, absent ones included.

    Parameters
    ----------
    graph
        `M` candidates; their weights do not matter, their transports do.
    p, psi
        Adjoint field and stationary state, `(B, n, d)`.

    Returns
    -------
    Tensor
        `(M,)`: `Re <(delta p)_e, (delta psi)_e>`, summed over the batch. Time `O(M B d)`, memory bounded.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Source: reconstructed (SGN-A5): `dF / dw_e = delta_e^* delta_e psi`.

    Examples
    --------
    >>> graph = SheafGraph.complete(3, torch.zeros(3))
    >>> psi = torch.tensor([[[1.0], [0.0], [3.0]]])
    >>> edge_gradient(graph, psi, psi)
    tensor([1., 4., 9.])
    """
    if p.shape != psi.shape or psi.dim() != 3 or psi.shape[1] != graph.nodes:
        raise ValueError(
            f"p and psi must be (batch, {graph.nodes}, stalk), got {tuple(p.shape)} and {tuple(psi.shape)}"
        )
    return graph.edge_products(p, psi)


def _equation(graph: SheafGraph, potential: Potential, drive: Tensor, path: Path) -> Equation:
    tensors = getattr(potential, "tensors", ())
    if any(tensor.requires_grad for tensor in tensors):
        potential = potential.with_tensors(*[tensor.detach() for tensor in tensors])
    return Equation(graph.detach(), potential, drive.detach(), path)


def _solve(
    equation: Equation, solver: Solver, start: Tensor | None, tol: float, max_steps: int, throw: bool
) -> Solution:
    drive = equation.drive
    if not (tol > 0 and math.isfinite(tol)):
        raise ValueError(f"tol must be positive and finite, got {tol}: no state could meet it")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}: no state would be looked at")
    if start is not None:
        check_state(equation.graph, equation.potential, start, "start")
        if start.shape != drive.shape or start.dtype != drive.dtype:
            raise ValueError(
                f"start must be shaped like drive, {tuple(drive.shape)} {drive.dtype}, got "
                f"{tuple(start.shape)} {start.dtype}"
            )
    if len(drive) == 0:
        empty = drive.new_zeros(0, dtype=drive.dtype.to_real())
        return Solution(drive.clone(), empty, None, empty.long(), empty.bool(), "converged", empty.view(0, 0))
    begin = _default_start(equation) if start is None else equation.by_nodes(start.detach())
    value, monitor = solver.run(equation, begin, tol, max_steps)
    return _conclude(equation, value, monitor, tol, throw)


def _default_start(equation: Equation) -> Tensor:
    """One forward-backward step from zero: every node settles with its neighbours at zero."""
    zero = torch.zeros_like(equation.drive)
    if not equation.convex:
        return zero
    t = 1 / max(float(equation.graph.degrees().mean()), equation.monotonicity)
    try:
        return equation.potential.prox(t * equation.drive, t)
    except (AttributeError, NotImplementedError):
        return zero


def _conclude(equation: Equation, value: Tensor, monitor: Monitor, tol: float, throw: bool) -> Solution:
    reason = monitor.finish()
    bound = None
    if equation.convex:
        size = torch.linalg.vector_norm(equation.flat(value), dim=1)
        bound = monitor.best * equation.scale / (equation.monotonicity * (1 + size))
    trace = torch.stack(monitor.residuals)
    solution = Solution(value, monitor.best, bound, monitor.used, monitor.converged, reason, trace)
    if reason in ("converged", "not evaluated"):
        return solution
    rate = observed_rate(trace)
    missed = int((~solution.converged).sum())
    message = (
        f"stationary state not reached for {missed} of {len(value)} samples ({reason}): residual "
        f"{float(solution.residual.max()):.2e} against tol {tol:.2e} after {int(solution.steps.max())} "
        f"steps, observed rate {rate:.4f} a step; raise max_steps or tol, or another solver"
    )
    if throw:
        raise ConvergenceError(message, solution, rate)
    warnings.warn(message, ConvergenceWarning, stacklevel=4)
    return solution
