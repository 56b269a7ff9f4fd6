"""Admissible lifts: how a network is carried into another that computes the same function (arXiv 2507.20088).

The abstract speaks of admissible lifts without a definition that could be read; the one here is ours. A lift
is an injective real-linear map, a multiple of an isometry, that carries states, drives and read-outs of a
source network into a target network whose operator is strongly monotone on its **whole** state space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.potential import Potential, Quartic

__all__ = ["Layer", "Lift", "LiftedPotential"]


class Layer(NamedTuple):
    """One stationary layer: a graph and the potential on its nodes.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
    >>> Layer(graph, Quartic(torch.ones(2), torch.zeros(2))).graph.nodes
    2
    """

    graph: SheafGraph
    potential: Potential


@dataclass(frozen=True)
class Lift:
    """A target network and the maps between its states and those of the source.

    Attributes
    ----------
    target : object
        The network that computes the same function: a layer, a resolvent, a supra-graph, a unitary.
    lift, pull : callable
        States of the source to states of the target, and back: `pull(lift(psi)) == psi`.
    admissible : bool
        Whether the target is strongly monotone on all of its state space. If it is not, the lifted state is
        *an* equilibrium of the target, but not the one that a solver has to find.
    lambda_min : float
        Smallest eigenvalue of the target's linear part with the lower bound of its potential; NaN where the
        notion does not apply.
    deficit : Tensor
        What the lift has to pay: per node, the degree that is taken off the potential, or the holonomy that
        stays. Zero where the lift is free.
    drive : callable
        Drives of the source to drives of the target; `lift` if they are carried like states.

    Notes
    -----
    Source: reconstructed. The paper names admissible lifts in its abstract; its definition was not readable.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary.dilation import halmos
    >>> found = halmos(torch.tensor([[2.0, 0.0]]))
    >>> found.pull(found.target @ found.lift(torch.tensor([3.0, 4.0])))
    tensor([6.])
    """

    target: Any
    lift: Callable[[Any], Any]
    pull: Callable[[Any], Any]
    admissible: bool
    lambda_min: float
    deficit: Tensor
    drive: Callable[[Tensor], Tensor]


def identity(psi: Tensor) -> Tensor:
    """Return the argument."""
    return psi


class LiftedPotential(Potential):
    r"""The potential :math:`\sum_c s\,U(T_c\psi)+\frac12\langle\psi,C\psi\rangle` of the target of a lift.

    Parameters
    ----------
    base
        The potential `U` of the source.
    fold, unfold
        `T` takes states of the target `(B, n', d')` to `copies` stacked states of the source
        `(copies B, n, d)`; `unfold` is its adjoint and inverse. Both are isometries.
    copies
        How many states of the source one state of the target holds.
    shift
        `C`: a number, one per node `(n',)`, or Hermitian blocks `(n', d', d')`.
    scale
        `s > 0`.
    couples_nodes
        Whether `T` brings several nodes of the target to one node of the source, so that the potential acts
        on clusters of nodes.

    Raises
    ------
    ValueError
        If `copies` or `scale` is not positive, or `shift` has another shape.

    Notes
    -----
    Source: reconstructed. The same class serves gauge transforms (one copy), covers (a copy per sheet) and
    the diagonal blocks of a resolvent.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic
    >>> base = Quartic(torch.ones(2), torch.ones(2))
    >>> psi = torch.ones(1, 2, 1)
    >>> base.value(psi), LiftedPotential(base, shift=-0.5).value(psi)
    (tensor([1.5000]), tensor([1.]))
    """

    def __init__(
        self,
        base: Potential,
        fold: Callable[[Tensor], Tensor] = identity,
        unfold: Callable[[Tensor], Tensor] = identity,
        copies: int = 1,
        *,
        shift: Tensor | float = 0.0,
        scale: float = 1.0,
        couples_nodes: bool = False,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}: a state holds itself")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}: a convex potential would turn over")
        if isinstance(shift, Tensor) and shift.dim() not in (1, 3):
            raise ValueError(
                f"shift must be a number, (nodes,) or (nodes, stalk, stalk), got {tuple(shift.shape)}"
            )
        self.base, self.fold, self.unfold, self.copies = base, fold, unfold, copies
        self.shift, self.scale, self.couples_nodes = shift, scale, couples_nodes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters of the base."""
        return self.base.tensors

    def with_tensors(self, *tensors: Tensor) -> LiftedPotential:
        """Return the same lift of the base with other parameters, unchecked."""
        return LiftedPotential(
            self.base.with_tensors(*tensors),
            self.fold,
            self.unfold,
            self.copies,
            shift=self.shift,
            scale=self.scale,
            couples_nodes=self.couples_nodes,
        )

    def value(self, psi: Tensor) -> Tensor:
        """Return the potential of each sample `(B,)`."""
        whole = self.base.value(self.fold(psi)).view(self.copies, len(psi)).sum(0)
        shifted = self._shifted(psi)
        quadratic = (psi.conj() * shifted).real if psi.is_complex() else psi * shifted
        return self.scale * whole + 0.5 * quadratic.flatten(1).sum(1)

    def gradient(self, psi: Tensor) -> Tensor:
        """Return the gradient, shaped like `psi`."""
        return self.scale * self.unfold(self.base.gradient(self.fold(psi))) + self._shifted(psi)

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return the second derivative at `psi` applied to `x`."""
        curved = self.base.hessian_product(self.fold(psi), self.fold(x))
        return self.scale * self.unfold(curved) + self._shifted(x)

    def prox(self, q: Tensor, t: float) -> Tensor:
        """Return the minimiser of `U(z) + |z - q|^2 / 2t`, for a shift that is one number.

        Raises
        ------
        NotImplementedError
            If the shift varies.
        ValueError
            If the minimiser is not unique.
        """
        if isinstance(self.shift, Tensor):
            raise NotImplementedError("shift must be one number for prox: no closed form is known otherwise")
        stretch = 1 + t * self.shift
        if not stretch > 0:
            raise ValueError(f"t must keep 1 + t shift positive, got t = {t} and shift = {self.shift}")
        return self.unfold(self.base.prox(self.fold(q / stretch), t * self.scale / stretch))

    def convexity(self) -> Tensor | None:
        """Return a lower bound of the second derivative: that of the base plus the least shift."""
        base = self.base.convexity()
        if base is None:
            return None
        if not isinstance(self.shift, Tensor):
            return self.scale * base + self.shift
        diagonal = self.shift if self.shift.dim() == 1 else torch.linalg.eigvalsh(self.shift)
        return self.scale * base + diagonal.detach().min()

    def blocks(self, psi: Tensor) -> Tensor:
        """Return the Hessian of each node; there is none if nodes are coupled."""
        if self.couples_nodes:
            raise NotImplementedError(
                "this potential acts on clusters of nodes: use products with its Hessian"
            )
        return super().blocks(psi)

    def _shifted(self, x: Tensor) -> Tensor:
        if not isinstance(self.shift, Tensor):
            return self.shift * x
        if self.shift.dim() == 3:
            return torch.einsum("vab,nvb->nva", self.shift.to(x.dtype), x)
        return self.shift.to(x.real.dtype).unsqueeze(1) * x


def local_floor(potential: Potential, floor: Tensor | None, nodes: int) -> Tensor:
    """Return a lower bound of the second derivative at each node `(nodes,)`: `floor`, or what is known."""
    if floor is not None:
        return floor.expand(nodes)
    if isinstance(potential, Quartic):
        return potential.V.detach()
    known = potential.convexity()
    if known is None:
        raise ValueError(
            f"floor must be given for a {type(potential).__name__} of unknown convexity: a lower bound of "
            "its second derivative decides whether the lift is admissible"
        )
    return known.detach().expand(nodes)
