r"""Derivatives of a stationary state by the implicit function theorem, to any order.

`F(psi*(theta), theta) = 0` gives `d psi* = -H^{-1} d_theta F`. A gradient `g` of the loss is pulled back by
one symmetric solve, `H p = -g`, and one product with `d_theta F`. The solve is a function of state and
parameters again, whose derivative is another solve: so on to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geomlib.core import ConvergenceError, Solution
from geomlib.stationary.equation import Equation, Path
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.hessian import hessian_solve, lowest, stiffness
from geomlib.stationary.potential import Potential

__all__ = ["UnstableBranchError", "attach", "inverse_hessian"]

# Products with the Hessian in an adjoint solve at most.
MAX_STEPS = 10_000


class UnstableBranchError(RuntimeError):
    """The Hessian at a state is not positive definite: the state is not on a stable branch.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph, adjoint_field
    >>> graph, one = SheafGraph.complete(1, torch.ones(0)), torch.ones(1)
    >>> psi = torch.zeros(1, 1, 1)
    >>> try:
    ...     adjoint_field(graph, Quartic(-one, one), psi, torch.ones_like(psi))
    ... except UnstableBranchError as error:
    ...     print(error)
    the Hessian is not positive definite for 1 of 1 samples: not on a stable branch, no derivative there
    """


def inverse_hessian(equation: Equation, psi: Tensor, right: Tensor, tol: float) -> Tensor:
    """Return `H(psi)^{-1} right`, or say that there is no stable branch.

    Raises
    ------
    UnstableBranchError
        If the Hessian of a sample is not positive definite.
    ConvergenceError
        If the solve misses `tol`.
    """
    if right.numel() == 0 or right.is_meta:
        return torch.zeros_like(right)
    floor = 0.0 if equation.convex else torch.finfo(right.dtype).eps ** 0.5
    x, indefinite, missed = hessian_solve(equation, psi, right, tol, MAX_STEPS, floor)
    if floor and not equation.dense:
        # Conjugate gradients see only what the right-hand side excites.
        indefinite = indefinite | (lowest(equation, psi) <= floor * stiffness(equation, psi))
    if bool(indefinite.any()):
        raise UnstableBranchError(
            f"the Hessian is not positive definite for {int(indefinite.sum())} of {len(psi)} samples: not on "
            "a stable branch, no derivative there"
        )
    if bool(missed.any()):
        raise _no_gradient(psi, missed, "the adjoint solve missed its tolerance")
    return x


def _no_gradient(psi: Tensor, missed: Tensor, why: str) -> ConvergenceError:
    flags = ~missed
    size = torch.where(missed, torch.inf, 0.0)
    steps = torch.full_like(missed, MAX_STEPS, dtype=torch.int64)
    report = Solution(psi.detach(), size, None, steps, flags, "max_steps", size[None])
    return ConvergenceError(
        f"{int(missed.sum())} of {len(psi)} samples have no gradient: {why}", report, float("nan")
    )


@dataclass(frozen=True)
class _Layer:
    """What of a layer is no tensor to differentiate."""

    graph: SheafGraph
    potential: Potential
    path: Path
    tol: float

    def parts(self, tensors: Sequence[Tensor]) -> tuple[SheafGraph, Potential, Tensor]:
        """Graph, potential and drive with these tensors in them."""
        *inner, drive = tensors
        weights, *inner = inner
        transport = None
        if self.graph.transport is not None:
            transport, *inner = inner
        potential = self.potential.with_tensors(*inner) if inner else self.potential
        return self.graph.with_tensors(weights, transport), potential, drive

    def equation(self, tensors: Sequence[Tensor]) -> Equation:
        """Return the equation with these tensors, detached."""
        graph, potential, drive = self.parts([tensor.detach() for tensor in tensors])
        return Equation(graph, potential, drive, self.path)


def attach(
    graph: SheafGraph,
    potential: Potential,
    drive: Tensor,
    solution: Solution,
    tol: float,
    path: Path,
) -> Solution:
    """Return the solution with a value that carries the implicit gradient."""
    tensors = [graph.weights]
    if graph.transport is not None:
        tensors.append(graph.transport)
    tensors += [*getattr(potential, "tensors", ()), drive]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return solution
    bare = potential
    if getattr(potential, "tensors", ()):
        bare = potential.with_tensors(*[tensor.detach() for tensor in potential.tensors])
    layer = _Layer(graph.detach(), bare, path, tol)
    value = _State.apply(layer, (solution.value, solution.converged), *tensors)
    return replace(solution, value=value)


class _State(torch.autograd.Function):
    """The identity on a state found elsewhere, with the implicit gradient."""

    @staticmethod
    def forward(layer: _Layer, found: tuple[Tensor, Tensor], *tensors: Tensor) -> Tensor:
        return found[0]  # in a tuple, so that no gradient is asked along the iterates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer, ctx.converged = inputs[0], inputs[1][1]
        ctx.save_for_backward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        psi, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if not grad.is_meta and not bool(ctx.converged.all()):
            raise _no_gradient(psi, ~ctx.converged, "what was found is no stationary state")
        p = -_inverse(ctx.layer, grad, psi, tensors)
        return (None, None, *_pull(ctx.layer, p, psi, tensors, wanted))


class _Inverse(torch.autograd.Function):
    """The identity on `x = H(psi)^{-1} right` found elsewhere, with its gradient."""

    @staticmethod
    def forward(layer: _Layer, found: tuple[Tensor], right: Tensor, psi: Tensor, *tensors: Tensor) -> Tensor:
        return found[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[0]
        ctx.save_for_backward(output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, psi, *tensors = ctx.saved_tensors
        q = _inverse(ctx.layer, grad, psi, tensors)
        wanted = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            aliases = [_alias(tensor, want) for tensor, want in zip((psi, *tensors), wanted, strict=True)]
            graph, potential, _ = ctx.layer.parts(aliases[1:])
            image = graph.laplacian(x) + potential.hessian_product(aliases[0], x)
        return None, None, q, *_gradients(image, aliases, wanted, -q)


def _inverse(layer: _Layer, right: Tensor, psi: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`H^{-1} right`, differentiable while gradients are recorded."""
    found = inverse_hessian(layer.equation(tensors), psi.detach(), right.detach(), layer.tol)
    if not torch.is_grad_enabled():
        return found
    return _Inverse.apply(layer, (found,), right, psi, *tensors)


def _pull(
    layer: _Layer, p: Tensor, psi: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """`<p, dF / d tensor>` for each tensor that is wanted."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [_alias(tensor, want) for tensor, want in zip(tensors, wanted, strict=True)]
        graph, potential, drive = layer.parts(aliases)
        if recorded:
            return _gradients(graph.laplacian(psi) + potential.gradient(psi) - drive, aliases, wanted, p)
        # Weights and drive have formulas; what is left is automatic.
        turned = graph.transport is not None and graph.transport.requires_grad
        image = potential.gradient(psi) + graph.laplacian(psi) if turned else potential.gradient(psi)
    rest = _gradients(image, aliases[1:-1], wanted[1:-1], p)
    weights = (
        layer.graph.with_tensors(tensors[0], graph.transport).edge_products(p, psi) if wanted[0] else None
    )
    return weights, *rest, -p if wanted[-1] else None


def _alias(tensor: Tensor, want: bool) -> Tensor:
    # An alias of its own: the derivative stops here, and does not follow how one tensor depends on another.
    if torch.is_grad_enabled() and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(want)


def _gradients(
    image: Tensor, aliases: Sequence[Tensor], wanted: Sequence[bool], cotangent: Tensor
) -> tuple[Tensor | None, ...]:
    targets = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
    if not targets or not image.requires_grad:
        return (None,) * len(wanted)
    found = iter(
        torch.autograd.grad(
            image, targets, cotangent, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    )
    return tuple(next(found) if want else None for want in wanted)
