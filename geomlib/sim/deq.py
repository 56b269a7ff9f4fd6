"""Deep equilibrium models: the state is the root of `z = f(z; x)`, differentiated implicitly.

Bai, Kolter and Koltun (arXiv:1909.01377). These are the models that arXiv:2207.07475 sets out to replace,
and the dynamical systems whose Koopman spectrum the course looks at. The cells are reconstructed, as small
as can be: `tanh(W z + U x + b)` and `sin(W z + U x + b)`, dense or convolutional. Solver and derivative come
from `geomlib.core.fixed_point`; `jacobian_penalty` is the regulariser of arXiv:2106.14342.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.core.fixed_point import (
    Adjoint,
    Anderson,
    ConvergenceWarning,
    Implicit,
    Solution,
    Solver,
    solve,
)
from geomlib.sim.bases import initialise_
from geomlib.sim.jacobian import Stability, jacobian_penalty, stability

__all__ = ["DEQ", "ConvDEQ", "Diagnostics", "Stability", "jacobian_penalty", "stability"]

_CELLS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "sin": torch.sin}


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What a batch of solves took; tensors stay on the device until a property is read.

    Attributes
    ----------
    steps : Tensor
        `(batch,)` int64, evaluations of the cell.
    converged : Tensor
        `(batch,)` bool.
    residual : Tensor
        `(batch,)`.
    """

    steps: Tensor
    converged: Tensor
    residual: Tensor

    @property
    def mean_steps(self) -> float:
        """Evaluations of the cell, averaged over the batch."""
        return float(self.steps.float().mean())

    @property
    def not_converged(self) -> int:
        """Number of samples that missed the tolerance."""
        return int((~self.converged).sum())

    @property
    def worst_residual(self) -> float:
        """Largest residual of the batch."""
        return float(self.residual.max())

    def __repr__(self) -> str:
        return (
            f"Diagnostics(mean_steps={self.mean_steps:.1f}, not_converged={self.not_converged} of "
            f"{len(self.steps)}, worst_residual={self.worst_residual:.1e})"
        )


class _Equilibrium(nn.Module):
    """What dense and convolutional models share: injection, solve, report, read-out."""

    inject: nn.Module
    readout: nn.Module
    W: nn.Parameter

    def __init__(self, cell: str, tol: float, max_steps: int, solver: Solver, adjoint: Adjoint) -> None:
        super().__init__()
        if cell not in _CELLS:
            raise ValueError(f"cell must be one of {sorted(_CELLS)}, got {cell!r}: no such nonlinearity")
        if not tol > 0 or max_steps < 1:
            raise ValueError(
                f"tol must be > 0 and max_steps >= 1, got {tol} and {max_steps}: nothing is solved"
            )
        self.activation = _CELLS[cell]
        self.tol, self.max_steps, self.solver, self.adjoint = tol, max_steps, solver, adjoint
        self.diagnostics: Diagnostics | None = None
        self._warned = False

    def _mix(self, z: Tensor, W: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        """One step of the state `z` under the injected input `u = inject(x)`; both like the state."""
        return self._step(z, u, self.W)

    def _step(self, z: Tensor, u: Tensor, W: Tensor) -> Tensor:
        return self.activation(self._mix(z, W) + u)

    def equilibrium(self, x: Tensor, start: Tensor | None = None, *, throw: bool = False) -> Solution:
        """Solve for the state of every sample.

        Parameters
        ----------
        x : Tensor
            A batch of inputs.
        start : Tensor, optional
            States to start from, zero if omitted.
        throw : bool
            Whether a sample that does not converge raises. If not, the best iterate is used, the miss is
            counted in `diagnostics`, and the first one warns.

        Returns
        -------
        Solution
            `value` is the batch of states; gradients flow to all parameters and to `x`.

        Raises
        ------
        ValueError
            If the batch is empty, of the wrong shape, or not of a floating-point type.
        ConvergenceError
            If `throw` and some sample did not converge.
        """
        self._check(x)
        u = self.inject(x)
        with warnings.catch_warnings():
            # The solver warns at every call; a model that trains warns once and counts.
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = solve(
                self._step,
                torch.zeros_like(u) if start is None else start,
                u,
                self.W,
                solver=self.solver,
                adjoint=self.adjoint,
                tol=self.tol,
                max_steps=self.max_steps,
                throw=throw,
            )
        self.diagnostics = Diagnostics(solution.steps, solution.converged, solution.residual.detach())
        if not self._warned and solution.reason not in ("converged", "not evaluated"):
            self._warned = True
            warnings.warn(f"{type(self).__name__}: {self.diagnostics}", ConvergenceWarning, stacklevel=3)
        return solution

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch of inputs to `(batch, out_features)`."""
        return self.readout(self.equilibrium(x).value)

    def stability(self, x: Tensor) -> Stability:
        """Tell for each sample whether its equilibrium attracts the iteration, or is merely a root."""
        with torch.no_grad():
            u = self.inject(x)
            z = self.equilibrium(x).value
        return stability(self.cell, z, u)


class DEQ(_Equilibrium):
    """Classify or regress from the root of `z = tanh(W z + U x + b)`, or the same with a sine.

    Parameters
    ----------
    in_features, width, out_features : int
        Sizes of input, state and output.
    cell : {"tanh", "sin"}
        The nonlinearity. With `"sin"` the input weights start uniform in `+-15`, for coordinates as input.
    tol : float
        Bound on the residual `|f(z) - z| / (1 + |z|)` of each sample.
    max_steps : int
        Most evaluations of the cell.
    solver, adjoint
        As `geomlib.core.fixed_point.solve` takes them.
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
        If a size or `max_steps` is below 1, `tol` is not positive, or the cell is unknown.

    Notes
    -----
    Source: Bai, Kolter and Koltun (arXiv:1909.01377) for the model; the cell and its initial weights,
    normal with variance `0.25 / width`, are reconstructed: the map starts as a contraction.

    Examples
    --------
    >>> model = DEQ(3, 8, 2, generator=torch.Generator().manual_seed(0))
    >>> model(torch.ones(4, 3)).shape
    torch.Size([4, 2])
    >>> model.diagnostics.not_converged
    0
    """

    inject: nn.Linear

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        *,
        cell: Literal["tanh", "sin"] = "tanh",
        tol: float = 1e-4,
        max_steps: int = 60,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cell, tol, max_steps, solver or Anderson(), adjoint or Implicit())
        self.inject = dense(in_features, width, generator=generator, device=device, dtype=dtype)
        if cell == "sin":
            with torch.no_grad():
                self.inject.weight.mul_(15 * math.sqrt(in_features))
        self.W = _normal((width, width), 0.5 / math.sqrt(width), generator, device, dtype)
        self.readout = dense(width, out_features, generator=generator, device=device, dtype=dtype)

    def _mix(self, z: Tensor, W: Tensor) -> Tensor:
        return z @ W.T

    def _check(self, x: Tensor) -> None:
        check_batch(x, (self.inject.in_features,))


class ConvDEQ(_Equilibrium):
    """Classify images from the root of `z = tanh(W * z + U * x + b)` with 3x3 convolutions.

    The state keeps the size of the image, divided by `stride`; the read-out averages it over a 4x4 grid.

    Parameters
    ----------
    in_channels, width, out_features : int
        Channels of image and state, number of outputs.
    stride : int
        Of the input convolution.
    cell, tol, max_steps, solver, adjoint, generator, device, dtype
        As in `DEQ`.

    Raises
    ------
    ValueError
        If a size, `stride` or `max_steps` is below 1, `tol` is not positive, or the cell is unknown.

    Notes
    -----
    Source: as `DEQ`; the convolutional cell and the read-out are reconstructed.

    Examples
    --------
    >>> model = ConvDEQ(1, 6, 10, generator=torch.Generator().manual_seed(0))
    >>> model(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    inject: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_features: int,
        *,
        stride: int = 1,
        cell: Literal["tanh", "sin"] = "tanh",
        tol: float = 1e-4,
        max_steps: int = 60,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cell, tol, max_steps, solver or Anderson(), adjoint or Implicit())
        _positive(in_channels=in_channels, width=width, stride=stride)
        where = torch.get_default_device() if device is None else device
        self.inject = nn.utils.skip_init(
            nn.Conv2d, in_channels, width, 3, padding=1, stride=stride, device=where, dtype=dtype
        )
        initialise_(self.inject, generator)
        self.W = _normal((width, width, 3, 3), 0.5 / math.sqrt(9 * width), generator, device, dtype)
        self.readout = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            dense(16 * width, out_features, generator=generator, device=device, dtype=dtype),
        )

    def _mix(self, z: Tensor, W: Tensor) -> Tensor:
        return F.conv2d(z, W, padding=1)

    def _check(self, x: Tensor) -> None:
        stride = int(self.inject.stride[0])
        check_batch(x, (self.inject.in_channels, None, None))
        if min(x.shape[2:]) < 4 * stride:
            raise ValueError(
                f"images must be at least {4 * stride} pixels wide, got shape {tuple(x.shape)}: "
                "the read-out needs a 4x4 grid"
            )


def dense(
    in_features: int,
    out_features: int,
    *,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """Make a linear layer with torch's default ranges, drawn from `generator` alone."""
    _positive(in_features=in_features, out_features=out_features)
    where = torch.get_default_device() if device is None else device
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features, device=where, dtype=dtype)
    return initialise_(layer, generator)


def check_batch(x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless `x` is a non-empty floating-point batch of `shape`, where None allows any size."""
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}: an equilibrium is real-valued")
    if x.ndim != len(shape) + 1 or any(w not in (None, g) for w, g in zip(shape, x.shape[1:], strict=True)):
        raise ValueError(f"x must be (batch, {wanted}), got shape {tuple(x.shape)}: the input layer is fixed")
    if len(x) == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}: there is nothing to solve")


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: the layer would be empty")


def _normal(
    shape: tuple[int, ...],
    std: float,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, generator=generator) * std).to(device=device, dtype=dtype))
