r"""A stack of stationary layers as one stationary equation on a supra-graph (arXiv 2507.20088, abstract).

Node sets of all layers stand side by side; inside a layer the edges are those of its graph, between layers
the maps :math:`K_\ell` are directed edges. The residual
:math:`\mathbb F(\Psi)_\ell=F_\ell(\psi_\ell;K_\ell\psi_{\ell-1}+b_\ell)` has a block lower bidiagonal
derivative :math:`J`, so one forward substitution solves it, and back-propagation is
:math:`J^\top p=-\nabla\ell`. The equations of the paper's body were not readable; these are reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from geomlib.core import Solution, newton_descent, real_inner
from geomlib.core.problem import conclude
from geomlib.stationary.assembly import (
    DENSE_LIMIT,
    as_real,
    empty_solution,
    layer_bias,
    layer_shape,
    like_state,
    realify,
    sparse_hessian,
)
from geomlib.stationary.layer import NewtonCG, adjoint_field, hessian_product, residual, solve_stationary
from geomlib.stationary.lifts import Layer

__all__ = ["SupraGraph"]

# Relative residual of the linear solves of a layer.
LINEAR = 1e-13


class SupraGraph:
    r"""Layers of graphs, and the maps between them, as one system of equations.

    Parameters
    ----------
    layers
        Pairs `(graph, potential)`, first layer first.
    maps
        `K_l` of shape `(n_l d_l, n_{l-1} d_{l-1})`; the first one reads the input. They decide the stalks
        `d_l` and whether states are complex.
    biases
        `b_l` of shape `(n_l, d_l)` or None, one per layer; zero by default.

    Attributes
    ----------
    shapes
        `(n_l, d_l)` of each layer.
    size
        Entries of a state, the sum of `n_l d_l`. States are `(B, size)`: layer by layer, node by node.

    Raises
    ------
    ValueError
        If there is no layer, or shapes, dtypes or devices do not fit.

    Notes
    -----
    Source: the claim is the abstract's of version 3, the construction is reconstructed.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> edge = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
    >>> layer = edge, Quartic(torch.ones(2), torch.zeros(2))
    >>> supra = SupraGraph([layer, layer], [torch.eye(2), torch.eye(2)])
    >>> supra.solve(torch.tensor([[3.0, 0.0]]), tol=1e-6).value
    tensor([[2.0000, 1.0000, 1.6667, 1.3333]])
    """

    def __init__(
        self,
        layers: Sequence[tuple[Any, Any]],
        maps: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.layers = tuple(Layer(*layer) for layer in layers)
        self.maps = tuple(maps)
        depth = len(self.layers)
        given = (None,) * depth if biases is None else tuple(biases)
        if not depth:
            raise ValueError("layers must not be empty, got none: there would be no state")
        if len(self.maps) != depth or len(given) != depth:
            raise ValueError(
                f"layers, maps and biases must be equally many, got {depth}, {len(self.maps)}, {len(given)}"
            )
        self.shapes: list[tuple[int, int]] = []
        columns = None
        for place, ((graph, _), K) in enumerate(zip(self.layers, self.maps, strict=True), 1):
            self.shapes.append(layer_shape(place, graph.nodes, K, columns, self.maps[0]))
            columns = len(K)
        self.sizes = [n * d for n, d in self.shapes]
        self.size = sum(self.sizes)
        self.inputs = self.maps[0].shape[1]
        self.biases = tuple(
            layer_bias(place, b, shape, K)
            for place, (b, shape, K) in enumerate(zip(given, self.shapes, self.maps, strict=True), 1)
        )

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        shapes = " -> ".join(f"{n} x {d}" for n, d in self.shapes)
        return f"SupraGraph({self.inputs} -> {shapes}, {self.nonzeros()} entries)"

    def split(self, psi: Tensor) -> tuple[Tensor, ...]:
        """Cut a state `(B, size)` into its layers `(B, n_l, d_l)`."""
        if psi.dim() != 2 or psi.shape[1] != self.size:
            raise ValueError(f"a state must have shape (B, {self.size}), got {tuple(psi.shape)}")
        parts = psi.split(self.sizes, 1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))

    def join(self, states: Sequence[Tensor]) -> Tensor:
        """Put layers `(B, n_l, d_l)` side by side as a state `(B, size)`."""
        return torch.cat([state.flatten(1) for state in states], 1)

    def forward(self, place: int, previous: Tensor) -> Tensor:
        """Return `K_l previous` for the layer at `place` (from 0), `(B, n_l, d_l)`."""
        K = self.maps[place]
        return (previous.flatten(1).to(K.dtype) @ K.mT).unflatten(1, self.shapes[place])

    def backward(self, place: int, field: Tensor) -> Tensor:
        """Return the adjoint of `K_l` applied to a field on the layer at `place >= 1`."""
        return (field.flatten(1) @ self.maps[place].conj()).unflatten(1, self.shapes[place - 1])

    def drive(self, place: int, previous: Tensor) -> Tensor:
        """Return `K_l previous + b_l` for the layer at `place`, `(B, n_l, d_l)`."""
        return self.forward(place, previous) + self.biases[place]

    def residual(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return the equations' left-hand side at `psi` `(B, size)` for the input `x`, shaped like `psi`."""
        states = self.split(psi)
        before = (self._input(x), *states[:-1])
        return self.join(
            [
                residual(graph, potential, self.drive(place, previous), state)
                for place, ((graph, potential), previous, state) in enumerate(
                    zip(self.layers, before, states, strict=True)
                )
            ]
        )

    def jvp(self, psi: Tensor, direction: Tensor) -> Tensor:
        """Return `J direction`, shaped like `psi`, without building `J`."""
        parts, moved = self.split(direction), []
        for place, ((graph, potential), state, part) in enumerate(
            zip(self.layers, self.split(psi), parts, strict=True)
        ):
            image = hessian_product(graph, potential, state, part)
            moved.append(image - self.forward(place, parts[place - 1]) if place else image)
        return self.join(moved)

    def vjp(self, psi: Tensor, covector: Tensor) -> Tensor:
        """Return the adjoint of `J` applied to `covector`, without building `J`."""
        parts, moved = self.split(covector), []
        for place, ((graph, potential), state, part) in enumerate(
            zip(self.layers, self.split(psi), parts, strict=True)
        ):
            image = hessian_product(graph, potential, state, part)
            last = place == len(self) - 1
            moved.append(image if last else image - self.backward(place + 1, parts[place + 1]))
        return self.join(moved)

    def dense(self, psi: Tensor) -> Tensor:
        """Return `J` as real matrices `(B, N, N)`, `N = 2 size` for complex states; for small systems."""
        flat = as_real(psi)
        batch, entries = flat.shape
        basis = torch.eye(entries, dtype=flat.dtype, device=flat.device).repeat(batch, 1)
        columns = self.jvp(psi.repeat_interleave(entries, 0), like_state(basis, psi))
        return as_real(columns).unflatten(0, (batch, entries)).mT

    def sparse(self, psi: Tensor) -> sparse.csc_array:
        """Return `J` of one state `(1, size)` as a real sparse matrix; potentials must act inside nodes."""
        if len(psi) != 1:
            raise ValueError(f"psi must hold one sample, got {len(psi)}: each has its own matrix")
        rows: list[Any] = []
        complex_ = psi.is_complex()
        for place, ((graph, potential), state) in enumerate(zip(self.layers, self.split(psi), strict=True)):
            row: list[Any] = [None] * len(self)
            row[place] = sparse_hessian(graph, potential, state)
            if place:
                K = self.maps[place].detach()
                row[place - 1] = -sparse.coo_array((realify(K) if complex_ else K).cpu().numpy())
            rows.append(row)
        return sparse.csc_array(sparse.block_array(rows, format="csc"))

    def nonzeros(self) -> int:
        """Count the entries of `J` that can differ from zero, in the field of the states."""
        inside = sum(
            (n + 2 * int((graph.weights > 0).sum())) * d**2
            for (graph, _), (n, d) in zip(self.layers, self.shapes, strict=True)
        )
        return inside + sum(int(torch.count_nonzero(K)) for K in self.maps[1:])

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        *,
        solver: Any = None,
        tol: float = 1e-12,
        max_steps: int = 200,
        throw: bool = True,
    ) -> Solution:
        """Solve by forward substitution: layer after layer, each with a solver of stationary layers.

        Parameters
        ----------
        x
            Input `(B, inputs)`.
        solver
            As in `solve_stationary`; Newton-CG by default.
        tol, max_steps, throw
            As in `solve_stationary`, for each layer.

        Returns
        -------
        Solution
            `value` `(B, size)`; `steps` add up over layers, `trace` has one residual per layer.
        """
        previous, states, found = self._input(x), [], []
        for place, (graph, potential) in enumerate(self.layers):
            solution = solve_stationary(
                graph,
                potential,
                self.drive(place, previous),
                solver=NewtonCG() if solver is None else solver,
                tol=tol,
                max_steps=max_steps,
                throw=throw,
            )
            previous = solution.value
            states.append(previous)
            found.append(solution)
        psi = self.join(states)
        failed = [s.reason for s in found if s.reason != "converged"]
        return Solution(
            value=psi,
            residual=torch.linalg.vector_norm(self.residual(psi, x), dim=1) / self._scale(x),
            bound=None,
            steps=torch.stack([s.steps for s in found]).sum(0),
            converged=torch.stack([s.converged for s in found]).all(0),
            reason=failed[0] if failed else "converged",
            trace=torch.stack([s.residual for s in found]),
        )

    @torch.no_grad()
    def solve_global(
        self,
        x: Tensor,
        *,
        start: Tensor | None = None,
        path: str = "auto",
        tol: float = 1e-13,
        max_steps: int = 100,
        throw: bool = True,
    ) -> Solution:
        r"""Solve all layers at once by Newton's method on the whole system, from `start` or from zero.

        `J` is invertible everywhere under strong monotonicity, so that Newton steps which are halved until
        :math:`|\mathbb F|^2` shrinks arrive from any start.

        Parameters
        ----------
        x
            Input `(B, inputs)`.
        start
            `(B, size)`.
        path
            `"dense"`, `"sparse"` (one sparse LU factorisation per sample and step) or `"auto"`.
        tol
            Of :math:`|J^\top\mathbb F|` relative to the drive.
        max_steps, throw
            As in `solve_stationary`.
        """
        if len(x) == 0:
            return empty_solution(self.zeros(0))
        psi = self.zeros(len(x)) if start is None else start

        def direction(state: Tensor, right: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor]:
            step = self.solve_linear(state, -self.residual(state, x), path=path)
            return step, torch.zeros(len(state), dtype=torch.bool, device=state.device)

        def miss(state: Tensor) -> Tensor:
            given = self.residual(state, x)
            return 0.5 * real_inner(given, given)

        psi, monitor = newton_descent(
            miss,
            lambda state: self.vjp(state, self.residual(state, x)),
            direction,
            psi,
            floor=self._scale(x),
            tol=tol,
            max_steps=max_steps,
        )
        return conclude(psi, monitor, tol, None, throw=throw, what="state of the supra-graph")

    @torch.no_grad()
    def adjoint(self, psi: Tensor, gradient: Tensor) -> Tensor:
        r"""Solve :math:`J^\top p=-\nabla\ell` from the last layer to the first: implicit back-propagation.

        Parameters
        ----------
        psi
            The solution `(B, size)`.
        gradient
            Gradient of the loss in the state `(B, size)`; losses may read any layer.

        Returns
        -------
        Tensor
            `p` `(B, size)`.
        """
        fields: list[Tensor] = []
        states, gradients = self.split(psi), self.split(gradient)
        for place in range(len(self) - 1, -1, -1):
            graph, potential = self.layers[place]
            right = gradients[place]
            if fields:
                right = right - self.backward(place + 1, fields[-1])
            fields.append(adjoint_field(graph, potential, states[place], right, tol=LINEAR))
        return self.join(fields[::-1])

    def adjoint_global(self, psi: Tensor, gradient: Tensor, *, path: str = "auto") -> Tensor:
        """Solve the same equation as :meth:`adjoint` as one linear system with the whole matrix."""
        return self.solve_linear(psi, -gradient, transposed=True, path=path)

    @torch.no_grad()
    def tangent(self, psi: Tensor, right: Tensor) -> Tensor:
        """Solve `J x = right` by forward substitution: how the solution moves when the equations do."""
        moved: list[Tensor] = []
        for place, (state, part) in enumerate(zip(self.split(psi), self.split(right), strict=True)):
            graph, potential = self.layers[place]
            pushed = part + self.forward(place, moved[-1]) if moved else part
            moved.append(adjoint_field(graph, potential, state, -pushed, tol=LINEAR))
        return self.join(moved)

    @torch.no_grad()
    def solve_linear(
        self, psi: Tensor, right: Tensor, *, transposed: bool = False, path: str = "auto"
    ) -> Tensor:
        """Solve with the whole `J`, or its transpose, and no use of its block form."""
        if path not in ("auto", "dense", "sparse"):
            raise ValueError(f"path must be auto, dense or sparse, got {path!r}")
        flat = as_real(right)
        if path == "dense" or (path == "auto" and flat.shape[1] <= DENSE_LIMIT):
            matrix = self.dense(psi)
            solved = torch.linalg.solve(matrix.mT if transposed else matrix, flat[..., None])[..., 0]
            return like_state(solved, psi)
        mode = "T" if transposed else "N"
        rows = [
            splu(self.sparse(state[None])).solve(b.cpu().numpy().astype(np.float64), trans=mode)
            for state, b in zip(psi, flat, strict=True)
        ]
        solved = torch.as_tensor(np.array(rows).reshape(flat.shape)).to(flat)
        return like_state(solved, psi)

    def parameter_gradient(
        self, p: Tensor, psi: Tensor, x: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return `<p, dF / d theta>` for parameters `theta` that require gradients.

        With the adjoint state `p` this is the gradient of the loss through the solution, batch summed: minus
        `p` of a layer times the conjugate state of the layer before for a map, the edge formula for weights.
        """
        with torch.enable_grad():
            value = real_inner(p.detach(), self.residual(psi.detach(), x)).sum()
            return torch.autograd.grad(value, tuple(parameters))

    def zeros(self, batch: int) -> Tensor:
        """Return the zero state `(batch, size)`."""
        return self.maps[0].detach().new_zeros(batch, self.size)

    def _scale(self, x: Tensor) -> Tensor:
        # At zero nothing but the drives is left of the residual.
        given = self.residual(self.zeros(len(x)), x)
        return torch.linalg.vector_norm(given, dim=1).clamp_min(1)

    def _input(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if flat.shape[1] != self.inputs:
            raise ValueError(f"x must have {self.inputs} entries a sample, got {flat.shape[1]}")
        return flat.to(self.maps[0].dtype)
