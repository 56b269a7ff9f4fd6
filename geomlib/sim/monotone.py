"""The monotone operator equilibrium network: a ReLU layer whose equilibrium exists, is unique, is found.

Winston and Kolter (arXiv:2006.08591): with `W = (1 - m) I - A^T A + B - B^T` the operator `I - W` is
strongly monotone with constant `m > 0`, so `z = relu(W z + U x + b)` has exactly one solution, and
Peaceman-Rachford splitting converges to it from every start. A baseline of arXiv:2207.07475.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from geomlib.core.fixed_point import ConvergenceWarning, Solution
from geomlib.sim.deq import Diagnostics, check_batch, dense

__all__ = ["MonDEQ"]


class MonDEQ(nn.Module):
    """Classify by the unique solution of `z = relu(W z + U x + b)`, found by Peaceman-Rachford splitting.

    Parameters
    ----------
    in_features, width, out_features : int
        Sizes of input, state and output.
    monotonicity : float
        The constant `m > 0` of `I - W >= m I`; the symmetric part of `W` stays below `1 - m`.
    tol : float
        Bound on the residual `|relu(W z + U x + b) - z| / (1 + |z|)` of each sample.
    max_steps : int
        Most splitting steps.
    generator : torch.Generator, optional
        Draws the initial weights.
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    diagnostics : Diagnostics or None
        What the last solve took; None before the first.

    Raises
    ------
    ValueError
        If a size or `max_steps` is below 1, or `monotonicity` or `tol` is not positive.

    Notes
    -----
    Source: Winston and Kolter (arXiv:2006.08591), equations for `W` and Peaceman-Rachford splitting with
    step 1. The backward pass solves its linear system densely: right for the small widths used here.

    Examples
    --------
    >>> model = MonDEQ(3, 8, 2, generator=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        *,
        monotonicity: float = 0.1,
        tol: float = 1e-4,
        max_steps: int = 200,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not monotonicity > 0:
            raise ValueError(f"monotonicity must be positive, got {monotonicity}: the root may not be unique")
        if not tol > 0 or max_steps < 1:
            raise ValueError(
                f"tol must be > 0 and max_steps >= 1, got {tol} and {max_steps}: nothing is solved"
            )
        self.inject = dense(in_features, width, generator=generator, device=device, dtype=dtype)
        self.readout = dense(width, out_features, generator=generator, device=device, dtype=dtype)
        draws = (torch.randn(width, width, generator=generator) * (0.5 / math.sqrt(width)) for _ in range(2))
        self.A, self.B = (nn.Parameter(draw.to(device=device, dtype=dtype)) for draw in draws)
        self.monotonicity, self.tol, self.max_steps = monotonicity, tol, max_steps
        self.diagnostics: Diagnostics | None = None
        self._warned = False

    def weight(self) -> Tensor:
        """`W`, `(width, width)`, whose symmetric part is at most `1 - monotonicity`."""
        identity = torch.diag(self.A.new_ones(len(self.A)))
        return (1 - self.monotonicity) * identity - self.A.T @ self.A + self.B - self.B.T

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        """One step of the underlying map, `relu(W z + u)`; `u = inject(x)` of shape `(batch, width)`."""
        return torch.relu(z @ self.weight().T + u)

    def equilibrium(self, x: Tensor, start: Tensor | None = None) -> Solution:
        """Solve for the state of every sample.

        Parameters
        ----------
        x : Tensor
            `(batch, in_features)`.
        start : Tensor, optional
            `(batch, width)`, zero if omitted; the solution does not depend on it.

        Returns
        -------
        Solution
            `value` is `(batch, width)`; gradients flow to all parameters and to `x`, to any order.

        Raises
        ------
        ValueError
            If `x` is not a floating-point `(batch, in_features)` or the batch is empty.
        """
        check_batch(x, (self.inject.in_features,))
        u, W = self.inject(x), self.weight()
        z0 = torch.zeros_like(u) if start is None else start
        with torch.no_grad():
            z, residual, steps, trace = peaceman_rachford(W, u, z0, tol=self.tol, max_steps=self.max_steps)
        converged = residual <= self.tol
        self.diagnostics = Diagnostics(steps, converged, residual)
        reason = "not evaluated"
        if not z.is_meta:
            reason = "converged" if bool(converged.all()) else "max_steps"
        if not self._warned and reason == "max_steps":
            self._warned = True
            warnings.warn(f"MonDEQ: {self.diagnostics}", ConvergenceWarning, stacklevel=2)
        return Solution(_Attach.apply(W, u, z), residual, None, steps, converged, reason, trace)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_features)` to `(batch, out_features)`."""
        return self.readout(self.equilibrium(x).value)


def peaceman_rachford(
    W: Tensor, u: Tensor, start: Tensor, *, tol: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve `z = relu(W z + u)` for monotone `I - W` by Peaceman-Rachford splitting with step 1.

    Parameters
    ----------
    W : Tensor
        `(width, width)`.
    u, start : Tensor
        `(batch, width)`.
    tol : float
        Bound on the residual of every sample.
    max_steps : int
        Most steps.

    Returns
    -------
    z : Tensor
        `(batch, width)`.
    residual : Tensor
        `(batch,)`, `|relu(W z + u) - z| / (1 + |z|)`.
    steps : Tensor
        `(batch,)` int64, steps until the sample was first seen within `tol`.
    trace : Tensor
        `(checks, batch)`, residuals where they were looked at.

    Examples
    --------
    >>> W, u = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    >>> z, *_ = peaceman_rachford(W, u, torch.zeros(1, 1), tol=1e-6, max_steps=100)
    >>> round(z.item(), 4)
    2.0
    """
    identity = torch.diag(W.new_ones(len(W)))
    resolvent = torch.linalg.inv(2 * identity - W)  # used every step; eigenvalues of 2I - W exceed 1
    z, v = start, start
    steps = torch.full(u.shape[:1], max_steps, dtype=torch.int64, device=u.device)
    trace, done = [], torch.zeros(u.shape[:1], dtype=torch.bool, device=u.device)
    for step in range(1, max_steps + 1):
        reflected = 2 * z - v
        half = (reflected + u) @ resolvent.T
        v = 2 * half - reflected
        z = torch.relu(v)
        if step % 4 and step < max_steps:  # looking costs a product with W and a wait for the device
            continue
        residual = (torch.relu(z @ W.T + u) - z).norm(dim=1) / (1 + z.norm(dim=1))
        trace.append(residual)
        steps = torch.where((residual <= tol) & ~done, step, steps)
        done = done | (residual <= tol)
        if u.is_meta or bool((residual <= tol).all()):
            break
    return z, residual, steps, torch.stack(trace)


class _Attach(torch.autograd.Function):
    """Give a solution of `z = relu(W z + u)` the gradient of the implicit function theorem.

    Its backward pass is made of differentiable operations on saved tensors, the solution among them, so
    that autograd can differentiate it again.
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, u: Tensor, z: Tensor) -> Tensor:
        solution = z.clone()
        ctx.save_for_backward(W, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        W, z = ctx.saved_tensors
        active = (z > 0).to(z.dtype)
        identity = torch.diag(W.new_ones(len(W)))
        # y = (I - W^T D)^{-1} g, one system a sample; the gradient of u is D y.
        y = torch.linalg.solve(identity - W.T * active[:, None, :], grads[0][..., None])[..., 0]
        through = active * y
        return through.T @ z, through, None
