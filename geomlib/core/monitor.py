"""The bookkeeping shared by all solvers: residuals, best iterates, per-sample stopping, restarts.

A solver calls :meth:`Monitor.observe` once per evaluation of ``f`` and stops when it returns True. All
accounting is done with masks on the device; the host waits for it at every evaluation on the CPU, where that
costs nothing, and at every fourth one elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Monitor"]

# Evaluations between two host synchronisations on an accelerator.
EVALUATIONS_PER_SYNC = 4
# Evaluations between two looks for runaway samples when nothing else happens.
EVALUATIONS_PER_PATROL = 16
# A sample has diverged when its step |f(z) - z| exceeds this many times floor + |z0| + its first step.
RUNAWAY = 1e8


class Monitor:
    """Best iterate, residual history and stopping mask of a batch of fixed-point iterations.

    Parameters
    ----------
    start : Tensor
        First iterate, shape ``(batch, n)``.
    tol : float
        Residual at which a sample is done.
    max_steps : int
        Evaluations of ``f`` after which all samples stop.
    floor : float or Tensor
        The ``1`` of ``|f(z) - z| / (1 + |z|)``, or its replacement per sample, shape ``(batch,)``.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0], [8.0]])
    >>> monitor = Monitor(x, tol=0.6, max_steps=10)
    >>> while not monitor.observe(x, x / 2, -x / 2):
    ...     x = x / 2
    >>> monitor.value.squeeze(1).tolist(), monitor.used.tolist()
    ([0.5, 4.0], [1, 1])
    """

    def __init__(self, start: Tensor, tol: float, max_steps: int, floor: float | Tensor = 1.0) -> None:
        self.tol, self.max_steps, self.floor = tol, max_steps, floor
        self.on_host = start.device.type == "cpu"
        self.is_meta = start.is_meta
        self.steps = 0
        self.tiny = torch.finfo(start.dtype).tiny
        self.value = start
        self.best = start.new_full(start.shape[:1], math.inf)
        self.active = torch.ones_like(self.best, dtype=torch.bool)
        self.converged = torch.zeros_like(self.active)
        self.runaway = torch.zeros_like(self.active)
        self.lost = torch.zeros_like(self.active)
        self.used = torch.zeros_like(self.best, dtype=torch.int64)
        self.residuals: list[Tensor] = []
        # Best residual while a sample is active, -1 afterwards, so that nothing improves on it.
        self._bar = self.best
        self._ceiling = self.best
        self._strikes = torch.zeros_like(self.used)
        self._mark = self.best
        self.restart: Tensor | None = None
        self.rewind: Tensor | None = None
        self.growth = math.inf
        self.patience = 1

    def allow(self, growth: float, patience: int) -> None:
        """Ask for restarts where the residual exceeds ``growth`` times the best, or runs away.

        ``patience`` is the number of evaluations out of bounds until a sample is given up. Extrapolating
        solvers may leave the region where ``f`` is defined and come back; the plain iteration may not.

        Examples
        --------
        >>> import torch
        >>> Monitor(torch.ones(1, 1), tol=0.1, max_steps=10).allow(growth=2.0, patience=3)
        """
        self.growth, self.patience = growth, patience

    def spend(self, evaluations: int) -> bool:
        """Count evaluations of ``f`` that are no iterates; True when the budget is used up.

        Examples
        --------
        >>> import torch
        >>> Monitor(torch.ones(1, 1), tol=0.1, max_steps=10).spend(10)
        True
        """
        self.steps += evaluations
        last = self.residuals[-1] if self.residuals else self.best
        self.residuals += [last] * evaluations
        return self.steps >= self.max_steps

    def observe(self, x: Tensor, image: Tensor, difference: Tensor) -> bool:
        """Account for one evaluation ``image = f(x)``, ``difference = image - x``; True when time to stop.

        Afterwards ``restart`` is None or the mask of samples whose history misled the solver, and ``rewind``
        None or the mask of those that ran away or met non-finite values and go back to their best iterate.

        Examples
        --------
        >>> import torch
        >>> x = torch.ones(1, 1)
        >>> Monitor(x, tol=0.1, max_steps=10).observe(x, x, x - x)
        True
        """
        self.steps += 1
        size = torch.linalg.vector_norm(difference, dim=1)
        residual = size / (torch.linalg.vector_norm(x, dim=1) + self.floor)
        self.residuals.append(residual)
        self.restart = self.rewind = None
        if self.steps == 1:
            self._ceiling = RUNAWAY * (self.floor + torch.linalg.vector_norm(x, dim=1) + size)

        if self.is_meta:
            self.value = image
            return True
        if self._nothing_happened(image, residual):
            return self.steps >= self.max_steps

        improved = residual < self._bar
        self.value = torch.where(improved.unsqueeze(1), image, self.value)
        self._bar = torch.where(improved, residual, self._bar)
        self._account(size, residual, improved)
        if self.steps >= self.max_steps:
            return True
        may_wait = self.on_host or self.steps % EVALUATIONS_PER_SYNC == 0
        return may_wait and not bool(self.active.any())

    def _nothing_happened(self, image: Tensor, residual: Tensor) -> bool:
        """On the host, settle the common case with two reductions: every sample improved and none is done."""
        if not self.on_host or self.steps % EVALUATIONS_PER_PATROL == 0:
            return False
        if not bool((residual < self._bar).all()) or float(residual.min()) <= self.tol:
            return False
        self.value, self._bar = image, residual
        return True

    def _account(self, size: Tensor, residual: Tensor, improved: Tensor) -> None:
        """Move samples between the masks. No host synchronisation, except on the host itself to save work."""
        stopped = improved & (residual <= self.tol)
        self.converged = self.converged | stopped
        strayed = self.active & ~(size <= self._ceiling)  # not finite counts as well
        if not self.on_host or bool(strayed.any()):
            stopped = stopped | self._give_up(strayed, size)
        if not self.on_host or bool(stopped.any()):
            # Freeze: remember what a stopped sample had, and make sure it never improves again.
            self.best = torch.where(stopped, self._bar, self.best)
            self.used = torch.where(stopped, self.steps, self.used)
            self.active = self.active & ~stopped
            self._bar = self._bar.masked_fill(stopped, -1.0)
        if self.growth < math.inf:
            restart = self.active & ~(residual <= self.growth * self._bar)
            if not self.on_host or bool(restart.any()):
                self.restart, self.rewind = restart, self.active & strayed

    def _give_up(self, strayed: Tensor, size: Tensor) -> Tensor:
        """Tell which of the strayed samples have tried patience: one more excursion that led nowhere."""
        strikes = torch.where(self._bar < self._mark, 1, self._strikes + 1)
        self._strikes = torch.where(strayed, strikes, self._strikes)
        self._mark = torch.where(strayed, self._bar, self._mark)
        given_up = strayed & (self._strikes >= self.patience)
        self.runaway = self.runaway | given_up & torch.isfinite(size)
        self.lost = self.lost | given_up & ~torch.isfinite(size)
        return given_up

    def settle(self) -> None:
        """Let the last evaluation count for every sample, as where all take the same number of steps.

        Examples
        --------
        >>> import torch
        >>> x = torch.ones(1, 1)
        >>> monitor = Monitor(x, tol=0.1, max_steps=1)
        >>> _ = monitor.observe(x, 2 * x, x)
        >>> monitor.settle()
        >>> monitor.best
        tensor([0.5000])
        """
        if self.is_meta:
            return
        self.best = self.residuals[-1]
        self.converged = self.best <= self.tol
        self.used = torch.full_like(self.used, self.steps)
        self.active = torch.zeros_like(self.active)
        self.lost = self.lost & ~self.converged
        self.runaway = self.runaway & ~self.converged

    def finish(self) -> str:
        """Close the books for samples that are still active and name the worst fate of any sample.

        Examples
        --------
        >>> import torch
        >>> x = torch.ones(1, 1)
        >>> monitor = Monitor(x, tol=0.1, max_steps=1)
        >>> monitor.observe(x, 2 * x, x), monitor.finish()
        (True, 'max_steps')
        """
        if self.is_meta:
            return "not evaluated"
        self.best = torch.where(self.active, self._bar, self.best)
        self.used = torch.where(self.active, self.steps, self.used)
        flags = torch.stack([self.converged.all(), self.lost.any(), self.runaway.any()]).tolist()
        if flags[0]:
            return "converged"
        return "not finite" if flags[1] else "diverged" if flags[2] else "max_steps"
