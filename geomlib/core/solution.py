"""What a fixed-point solve hands back: a value with its evidence, or an error that carries the same evidence.

Residuals are per sample, ``r = |f(z) - z| / (1 + |z|)`` with the Euclidean norm of the flattened sample; ``1
+`` keeps the measure meaningful near ``z = 0``. The bound is Banach's a-posteriori estimate (Banach 1922).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ConvergenceError", "ConvergenceWarning", "Solution"]


@dataclass(frozen=True, repr=False)
class Solution:
    """A fixed point and how well it is known.

    Attributes
    ----------
    value : Tensor
        ``f(z)`` at the best iterate ``z`` found for each sample, shaped like the initial state.
    residual : Tensor
        ``|f(z) - z| / (1 + |z|)`` of each sample at that iterate, shape ``(batch,)``.
    bound : Tensor or None
        ``contraction_factor / (1 - contraction_factor) * residual`` where a contraction factor was given: a
        proved bound of ``|value - z*| / (1 + |z|)``, shape ``(batch,)``.
    steps : Tensor
        Evaluations of ``f`` that each sample needed, shape ``(batch,)``, int64.
    converged : Tensor
        Whether the tolerance was met, shape ``(batch,)``, bool.
    reason : str
        ``"converged"``, ``"max_steps"``, ``"diverged"`` or ``"not finite"``: the worst fate of any sample.
        ``"not evaluated"`` on the meta device, which has shapes and no numbers.
    trace : Tensor
        Residual known after each evaluation of ``f``, shape ``(evaluations, batch)``, detached.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import solve
    >>> solve(torch.cos, torch.zeros(2, 3, dtype=torch.float64), tol=1e-3)
    Solution(2/2 converged, at most 5 steps, residual at most 4.4e-05, value (2, 3) float64)
    """

    value: Tensor
    residual: Tensor
    bound: Tensor | None
    steps: Tensor
    converged: Tensor
    reason: str
    trace: Tensor

    def __repr__(self) -> str:
        shape, dtype = tuple(self.value.shape), str(self.value.dtype).removeprefix("torch.")
        if self.value.is_meta:
            return f"Solution(not evaluated, value {shape} {dtype} on meta)"
        done, batch = int(self.converged.sum()), self.converged.numel()
        fate = "" if self.reason == "converged" else f" ({self.reason})"
        bound = "" if self.bound is None else f", bound at most {float(self.bound.max()):.1e}"
        return (
            f"Solution({done}/{batch} converged{fate}, at most {int(self.steps.max())} steps, "
            f"residual at most {float(self.residual.max()):.1e}{bound}, value {shape} {dtype})"
        )


class ConvergenceError(RuntimeError):
    """Raised when a solve does not reach its tolerance.

    Attributes
    ----------
    residual : Tensor
        Best residual of each sample, shape ``(batch,)``.
    steps : int
        Evaluations of ``f`` that were spent.
    rate : float
        Observed factor by which the worst sample's residual changed per evaluation, over the last
        evaluations; at or above 1 the iteration does not contract. NaN when there is nothing to compare.
    solution : Solution
        Everything that was found, the best iterate included.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import ConvergenceError, Picard, solve
    >>> try:
    ...     solve(lambda z: -z, torch.ones(1, 2), solver=Picard(), max_steps=50)
    ... except ConvergenceError as error:
    ...     print(error.steps, error.rate)
    50 1.0
    """

    def __init__(self, message: str, solution: Solution, rate: float) -> None:
        super().__init__(message)
        self.solution = solution
        self.residual = solution.residual
        self.steps = int(solution.steps.max())
        self.rate = rate


class ConvergenceWarning(UserWarning):
    """Issued instead of :class:`ConvergenceError` when ``throw=False``.

    Examples
    --------
    >>> import torch, warnings
    >>> from geomlib.core import ConvergenceWarning, Picard, solve
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", ConvergenceWarning)
    ...     solve(lambda z: 1 - z, torch.zeros(1, 2), solver=Picard(), throw=False).reason
    'max_steps'
    """


def observed_rate(trace: Tensor, window: int = 10) -> float:
    """Geometric mean of the change of the worst sample's residual per evaluation; NaN when it cannot be told.

    Examples
    --------
    >>> import torch
    >>> observed_rate(torch.tensor([[1.0], [0.5], [0.25]]))
    0.5
    """
    worst = trace.amax(dim=1).double()
    worst = worst[torch.isfinite(worst) & (worst > 0)][-window:]
    if worst.numel() < 2:
        return float("nan")
    return float((worst[-1] / worst[0]) ** (1 / (worst.numel() - 1)))


def describe_failure(solution: Solution, tol: float, rate: float, what: str) -> str:
    """One sentence on a solve that missed its tolerance: what, how far, and what to try.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1)
    >>> solution = Solution(one, one, None, one.long(), one < 0, "max_steps", one[None])
    >>> describe_failure(solution, 0.1, 1.0, "fixed point").split(":")[0]
    'fixed point not reached for 1 of 1 samples (max_steps)'
    """
    missed = int((~solution.converged).sum())
    measure = solution.residual if solution.bound is None else solution.bound
    name = "residual" if solution.bound is None else "error bound"
    return (
        f"{what} not reached for {missed} of {solution.converged.numel()} samples ({solution.reason}): "
        f"{name} {float(measure.max()):.2e} against tol {tol:.2e} after {int(solution.steps.max())} steps, "
        f"observed rate {rate:.4f} a step; raise max_steps or tol, or make the map contract"
    )
