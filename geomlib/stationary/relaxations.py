r"""Two relaxations of the supra-graph in the form of graphs: stiff copies and one symmetric energy.

Beside the residual penalty these are the other two ways of softening the equations of a stack, with the same
rate :math:`1/\lambda` (arXiv 2507.20088 claims the convergence of a penalised global relaxation; both forms
are
reconstructed). See `penalty` for what the three share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from geomlib.core import Solution, newton_descent
from geomlib.core.monitor import Monitor
from geomlib.core.problem import conclude
from geomlib.stationary.assembly import as_real, empty_solution, like_state, refined, symmetric_solve
from geomlib.stationary.layer import energy
from geomlib.stationary.lifts import Layer
from geomlib.stationary.penalty import check_strength
from geomlib.stationary.potential import Quartic
from geomlib.stationary.supra import SupraGraph

__all__ = ["StiffCopies", "SymmetricEnergy", "convexity_threshold"]


@dataclass(frozen=True)
class StiffCopies:
    r"""P2: each layer reads a copy of its predecessor, tied to it by supra-edges of weight :math:`\lambda`.

    The copy solves :math:`A\chi+\lambda(\chi-\psi_{\ell-1})=0` with :math:`A=L_{\ell-1}+I` on the
    predecessor's graph:
    one more stationary layer, and the whole one more supra-graph. The input is read as it is.

    Parameters
    ----------
    supra : SupraGraph
        The exact system.

    Notes
    -----
    Source: reconstructed (SGN-P2); auxiliary coordinates in the form of a graph. Still triangular, and
    monotone for every strength.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node, node], [torch.ones(1, 1)] * 2)
    >>> StiffCopies(supra).solve(torch.ones(1, 1), 9.0, tol=1e-6).value  # the copy is 9 / 10
    tensor([[1.0000, 0.9000]])
    """

    supra: SupraGraph

    def extended(self, strength: float) -> SupraGraph:
        """Return the supra-graph with a layer of copies before each layer but the first."""
        check_strength(strength)
        old = self.supra
        new: list[tuple[Layer, Tensor, Tensor | None]] = []
        for place, layer in enumerate(old.layers):
            if place:
                graph = old.layers[place - 1].graph
                flat = graph.weights.new_full((graph.nodes,), 1 + 1 / strength)
                copy = Layer(graph.replace(weights=graph.weights / strength), Quartic(flat, 0 * flat))
                same = torch.eye(old.sizes[place - 1], dtype=old.maps[0].dtype, device=old.maps[0].device)
                new.append((copy, same, None))
            new.append((layer, old.maps[place], old.biases[place]))
        layers, maps, biases = zip(*new, strict=True)
        return SupraGraph(layers, maps, biases)

    def solve(
        self,
        x: Tensor,
        strength: float,
        *,
        start: Tensor | None = None,
        tol: float = 1e-12,
        max_steps: int = 200,
        throw: bool = True,
    ) -> Solution:
        """Solve by forward substitution, which needs no `start`; see :meth:`SupraGraph.solve`."""
        whole = self.extended(strength)
        solution = whole.solve(x, tol=tol, max_steps=max_steps, throw=throw)
        return dataclasses.replace(solution, value=self.supra.join(whole.split(solution.value)[::2]))

    def adjoint(self, psi: Tensor, x: Tensor, strength: float, gradient: Tensor) -> Tensor:
        """Return the adjoint of the layers in the extended system."""
        whole = self.extended(strength)
        # The copies are linear layers, so their own states do not enter.
        return self._layers(whole, whole.adjoint(self._padded(psi), self._padded(gradient)))

    def perturbation(self, psi: Tensor, x: Tensor) -> Tensor:
        r"""Return :math:`R_\ell=K_\ell A\psi_{\ell-1}`, zero for the first layer."""
        states = self.supra.split(psi)
        moved = [torch.zeros_like(states[0])]
        for place in range(1, len(states)):
            before = states[place - 1]
            pulled = self.supra.layers[place - 1].graph.laplacian(before) + before
            moved.append(self.supra.drive(place, pulled) - self.supra.biases[place])
        return self.supra.join(moved)

    def _padded(self, psi: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for place, state in enumerate(self.supra.split(psi)):
            parts += [torch.zeros_like(parts[-1]), state] if place else [state]
        return self.supra.join(parts)

    def _layers(self, whole: SupraGraph, psi: Tensor) -> Tensor:
        return self.supra.join(whole.split(psi)[::2])


@dataclass(frozen=True)
class SymmetricEnergy:
    r"""P3: minimise :math:`\sum_\ell\lambda^{-\ell}\Phi_\ell(\psi_\ell;\psi_{\ell-1})`, one energy for all.

    Edges between layers are symmetric now: a layer feels a reaction
    :math:`\lambda^{-1}K_{\ell+1}^*\psi_{\ell+1}` of the next. Strongly convex for
    :math:`\lambda>4\kappa_K^2/\mu^2` (:func:`convexity_threshold`); at
    :math:`\lambda=1` it is the plain symmetric coupling, whose minimiser is not the forward pass.

    Parameters
    ----------
    supra : SupraGraph
        The exact system.

    Notes
    -----
    Source: reconstructed (SGN-P3), in the spirit of equilibrium propagation (Scellier and Bengio 2017).
    Solved in the unknowns :math:`\lambda^{-\ell/2}\psi_\ell`, in which the Hessian is symmetric with blocks
    :math:`-\lambda^{-1/2}K_\ell` beside the diagonal.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node, node], [torch.ones(1, 1)] * 2)
    >>> SymmetricEnergy(supra).solve(torch.ones(1, 1), 5.0, tol=1e-6).value  # 1 / (1 - 1 / lambda), twice
    tensor([[1.2500, 1.2500]])
    """

    supra: SupraGraph

    def energy(self, psi: Tensor, x: Tensor, strength: float) -> Tensor:
        """Return the energy of each sample, times the strength: the first layer has weight one."""
        states = self.supra.split(psi)
        total = torch.zeros(len(psi), dtype=psi.real.dtype, device=psi.device)
        previous = x
        for place, ((graph, potential), state) in enumerate(zip(self.supra.layers, states, strict=True)):
            share = energy(graph, potential, self.supra.drive(place, previous), state)
            total = total + strength**-place * share
            previous = state
        return total

    def residual(self, psi: Tensor, x: Tensor, strength: float) -> Tensor:
        """Return the gradient of the energy in each layer, divided by the layer's weight."""
        return self.supra.residual(psi, x) + self.perturbation(psi, x) / strength

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        strength: float,
        *,
        start: Tensor | None = None,
        tol: float = 1e-12,
        max_steps: int = 200,
        throw: bool = True,
    ) -> Solution:
        """Minimise by Newton's method, then refine the layers of small weight.

        Parameters
        ----------
        x
            Input `(B, inputs)`.
        strength
            `lambda > 0`. Below :func:`convexity_threshold` the energy may have several minima or none.
        start
            `(B, size)`, zero by default.
        tol
            Of the norm of :meth:`residual`.
        max_steps, throw
            As in `solve_stationary`.
        """
        check_strength(strength)
        if len(x) == 0:
            return empty_solution(self.supra.zeros(0))
        scale = self.scale(strength)
        psi = self.supra.zeros(len(x)) if start is None else start
        product = partial(self._product, strength)

        def direction(y: Tensor, right: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor]:
            return symmetric_solve(product, (y / scale, x), right, accuracy)

        scaled, rough = newton_descent(
            lambda y: self.energy(y / scale, x, strength),
            lambda y: scale * self.residual(y / scale, x, strength),
            direction,
            psi * scale,
            tol=1e-6,
            max_steps=max_steps,
        )
        psi = scaled / scale
        # The energy hardly sees a deep layer, whose weight is tiny; its own equation does.
        monitor = Monitor(as_real(psi), tol, max_steps)
        origin = torch.zeros_like(as_real(psi))
        while not monitor.observe(origin, as_real(psi), as_real(miss := self.residual(psi, x, strength))):
            psi = psi - refined(product, (psi, x), scale * miss) / scale
        best = monitor.value
        value = like_state(best, psi)
        solution = conclude(value, monitor, tol, None, throw=throw, what="minimiser of the supra-energy")
        return dataclasses.replace(solution, steps=solution.steps + rough.used)

    @torch.no_grad()
    def adjoint(self, psi: Tensor, x: Tensor, strength: float, gradient: Tensor) -> Tensor:
        """Return the adjoint of :meth:`residual` at `psi`."""
        check_strength(strength)
        scale = self.scale(strength)
        return scale * refined(partial(self._product, strength), (psi, x), -gradient / scale)

    def perturbation(self, psi: Tensor, x: Tensor) -> Tensor:
        r"""Return :math:`R_\ell=-K_{\ell+1}^*\psi_{\ell+1}`, zero for the last layer."""
        states = self.supra.split(psi)
        pulled = [self.supra.backward(place, state) for place, state in enumerate(states) if place]
        return self.supra.join([*(-part for part in pulled), torch.zeros_like(states[-1])])

    def scale(self, strength: float) -> Tensor:
        r"""Return :math:`\lambda^{-(\ell-1)/2}` , in whose units it is symmetric, `(size,)`."""
        sizes = torch.tensor(self.supra.sizes)
        powers = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.supra.maps[0].real.dtype)
        return (float(strength) ** (-powers / 2)).to(self.supra.maps[0].device)

    def _product(self, strength: float, psi: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """Apply the Hessian in the scaled unknowns."""
        scale = self.scale(strength)
        direction = v / scale
        back = self.perturbation(direction, x) / strength  # linear in the state
        return scale * (self.supra.jvp(psi, direction) + back)


def convexity_threshold(mu: float, norm: float) -> float:
    r"""Return :math:`\lambda_0=4\kappa_K^2/\mu^2`, beyond which :class:`SymmetricEnergy` is strongly convex.

    Parameters
    ----------
    mu
        Strong monotonicity of every layer.
    norm
        Largest spectral norm of the maps between layers.

    Raises
    ------
    ValueError
        If `mu` is not positive.

    Examples
    --------
    >>> convexity_threshold(0.5, 1.0)
    16.0
    """
    if not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}: no layer would have a unique state")
    return 4 * (norm / mu) ** 2
