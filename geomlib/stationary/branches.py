r"""Follow a stable branch of stationary states as a parameter moves, up to the fold where it ends.

Near a fold at `s_c` the smallest eigenvalue of the Hessian behaves like `a (s_c - s)^{1/2}`, so its square is
nearly a line whose zero tells where the fold is (SGN-A6; reconstructed from the theory of turning points).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.stationary.equation import Equation
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.hessian import hessian_solve, lowest
from geomlib.stationary.potential import Potential

__all__ = ["Branch", "follow"]

Family = Callable[[float], tuple[SheafGraph, Potential, Tensor]]

# Newton steps to the next point of the branch; from close by they suffice, and from afar none should arrive.
CORRECTIONS = 8
# Share of the way to the expected fold that one step takes.
APPROACH = 0.6


@dataclass(frozen=True)
class Branch:
    """A piece of a stable branch.

    Attributes
    ----------
    values
        Values of the parameter, `(K,)`.
    states
        `(K, n, d)`.
    lambda_min
        Smallest eigenvalue of the Hessian, `(K,)`, all positive.
    residual
        `|F| / max(1, |f|)`, `(K,)`.
    fold
        Where the branch ends, or `None` if it goes on to the end.
    """

    values: Tensor
    states: Tensor
    lambda_min: Tensor
    residual: Tensor
    fold: float | None

    def __repr__(self) -> str:
        end = "no fold" if self.fold is None else f"fold at {self.fold:.8g}"
        first, last = float(self.values[0]), float(self.values[-1])
        return f"Branch({len(self.values)} points, {first:.6g} to {last:.6g}, {end})"


def follow(
    family: Family,
    begin: float,
    end: float,
    start: Tensor,
    *,
    step: float | None = None,
    tol: float = 1e-12,
    fold_tol: float = 1e-9,
    max_points: int = 500,
) -> Branch:
    """Follow the stable branch through `start` from one value of the parameter towards another.

    A point is taken only if its residual and its smallest eigenvalue pass, and if Newton's method comes to it
    from the point before without leaving the region where the Hessian is positive definite.

    Parameters
    ----------
    family
        `family(s) -> (graph, potential, drive)` with a drive `(1, n, d)`.
    begin, end
        First and last value of `s`.
    start
        Near a stable state at `begin`, `(1, n, d)`.
    step
        Longest step in `s`, by default a twentieth of the way.
    tol
        Residual of each point.
    fold_tol
        The fold is located once steps are shorter than this times `1 + |s|`.
    max_points
        Points at most.

    Returns
    -------
    Branch

    Raises
    ------
    ValueError
        If `begin` equals `end`, a tolerance is not positive, or there is no stable state near `start`.

    Examples
    --------
    >>> from geomlib.stationary import Quartic
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> node = SheafGraph.complete(1, one[:0])
    >>> def driven(V):  # V r + r^3 = 1/2 has two stable states up to its fold
    ...     return node, Quartic(V * one, one), 0.5 * one.view(1, 1, 1)
    >>> follow(driven, -3.0, 0.0, -2 * one.view(1, 1, 1)).fold + 3 * (1 / 16) ** (1 / 3) < 1e-8
    True
    """
    if begin == end:
        raise ValueError(f"begin and end must differ, got {begin} twice")
    for name, value in {"tol": tol, "fold_tol": fold_tol}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}: it would never be reached")
    sign = 1.0 if end > begin else -1.0
    longest = abs(end - begin) / 20 if step is None else abs(step)
    points: list[tuple[float, Tensor, float, float]] = []

    def attempt(s: float, state: Tensor) -> bool:
        found = _correct(Equation(*family(s)), state, tol)
        if found is not None:
            points.append((s, *found))
        return found is not None

    with torch.no_grad():
        if not attempt(begin, start):
            raise ValueError(f"start must be near a stable state at {begin}, found none")
        length, folded = longest, False
        while points[-1][0] != end and len(points) < max_points:
            s, state, _, _ = points[-1]
            ahead = min(length, _to_fold(points) * APPROACH)
            if ahead < fold_tol * (1 + abs(s)):
                folded = True
                break
            target = end if ahead >= abs(end - s) else s + sign * ahead
            length = min(longest, 2 * ahead) if attempt(target, state) else ahead / 2
    fold = points[-1][0] + sign * min(_to_fold(points), length) if folded else None
    values, states, lambdas, residuals = zip(*points, strict=True)
    like = torch.zeros(0, dtype=torch.float64)
    return Branch(
        like.new_tensor(values), torch.cat(states), like.new_tensor(lambdas), like.new_tensor(residuals), fold
    )


def _correct(equation: Equation, state: Tensor, tol: float) -> tuple[Tensor, float, float] | None:
    """Newton's method inside the region of positive definite Hessians; None where it leads out of it."""
    for _ in range(CORRECTIONS):
        slope = equation.residual(state)
        step, indefinite, _ = hessian_solve(equation, state, -slope, 1e-10, 2 * equation.unknowns)
        if bool(indefinite):
            return None
        state = state + step
        residual = float(torch.linalg.vector_norm(equation.residual(state)) / equation.scale)
        if residual <= tol:
            smallest = float(lowest(equation, state))
            return (state, smallest, residual) if smallest > 0 else None
    return None


def _to_fold(points: list[tuple[float, Tensor, float, float]]) -> float:
    """Distance to where the square of the smallest eigenvalue, taken for a line, is zero."""
    if len(points) < 2:
        return float("inf")
    (s0, _, a, _), (s1, _, b, _) = points[-2:]
    return abs(s1 - s0) * b * b / (a * a - b * b) if a > b else float("inf")
