r"""Resolvents of monotone operators, and stationary layers read as resolvents and back (arXiv 2507.20088).

A network of resolvents applies :math:`J_A=(I+A)^{-1}` after each affine map (Combettes and Pesquet 2020). A
stationary layer is one, and a resolvent with a Hermitian linear part is a layer on a sheaf with phases. That
the classes coincide is the paper's claim; the constructions are reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomlib.core import Solution
from geomlib.core.monitor import Monitor
from geomlib.core.problem import conclude
from geomlib.stationary.assembly import as_real, like_state
from geomlib.stationary.dilation import unitary_pair
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.lifts import Layer, Lift, LiftedPotential, identity, local_floor
from geomlib.stationary.potential import Potential, Quartic

__all__ = ["Resolvent", "graph_to_resolvent", "resolvent_to_sheaf"]


@dataclass(frozen=True)
class Resolvent:
    r"""The map :math:`q\mapsto z` with :math:`z+Mz+\nabla\varphi(z)=q`: the resolvent of a monotone operator.

    Parameters
    ----------
    matrix
        `M`, Hermitian `(n d, n d)`, with :math:`I+M` positive definite.
    potential
        `phi`, convex, local, with a proximity operator.
    shape
        `(n, d)` of a state.

    Raises
    ------
    ValueError
        If the matrix is not Hermitian or does not fit the shape.

    Notes
    -----
    Source: Combettes and Pesquet 2020 for networks of resolvents; the class as named here is reconstructed.
    The Douglas-Rachford splitting uses nothing of the stationary layer's own solvers.

    Examples
    --------
    >>> import torch
    >>> half = Resolvent(torch.eye(2), Quartic(torch.zeros(2), torch.zeros(2)), (2, 1))
    >>> half(torch.tensor([[[4.0], [2.0]]]), tol=1e-6).value.flatten()
    tensor([2., 1.])
    """

    matrix: Tensor
    potential: Potential
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        size = self.shape[0] * self.shape[1]
        if self.matrix.shape != (size, size):
            raise ValueError(f"matrix must be ({size}, {size}), got {tuple(self.matrix.shape)}")
        check_hermitian(self.matrix)

    @torch.no_grad()
    def __call__(
        self,
        q: Tensor,
        *,
        step: float = 1.0,
        start: Tensor | None = None,
        tol: float = 1e-12,
        max_steps: int = 5000,
        throw: bool = True,
    ) -> Solution:
        r"""Evaluate by Douglas-Rachford splitting: a linear resolvent, factored once, and a local prox.

        Parameters
        ----------
        q
            `(B, n, d)`.
        step
            `t > 0` of both resolvents.
        start
            Where the iteration starts, zero by default; the limit does not depend on it.
        tol
            Of :math:`|z+Mz+\nabla\varphi(z)-q|` relative to `q`.
        max_steps, throw
            As in `solve_stationary`.
        """
        if not step > 0:
            raise ValueError(f"step must be positive, got {step}: a resolvent of zero is the identity")
        M = self.matrix.to(q.dtype)
        unit = torch.eye(len(M), dtype=M.dtype, device=M.device)
        # Each half gets a share of the identity that keeps it monotone, even if M has negative eigenvalues.
        share = 0.5 * float(1 + torch.linalg.eigvalsh(M).amin()) if len(M) else 0.5
        if not share > 0:
            raise ValueError(f"I + M must be positive definite, got the least eigenvalue {2 * share:.3g}")
        factor = torch.linalg.cholesky(unit + step * (M + (1 - share) * unit))
        scale = torch.linalg.vector_norm(q.flatten(1), dim=1).clamp_min(1)
        y = torch.zeros_like(q) if start is None else start.to(q.dtype).expand_as(q)
        origin = torch.zeros_like(as_real(q.flatten(1)))
        monitor = Monitor(origin, tol, max_steps, floor=scale)
        stretch = 1 + step * share
        while True:
            z = self.potential.prox((y + step * q) / stretch, step / stretch)
            flat = z.flatten(1)
            miss = flat + flat @ M.mT + self.potential.gradient(z).flatten(1) - q.flatten(1)
            if monitor.observe(origin, as_real(flat), as_real(miss)):
                break
            mirrored = (2 * z - y).flatten(1)
            w = torch.cholesky_solve(mirrored.mT, factor).mT.reshape(q.shape)
            y = y + w - z
        best = monitor.value
        value = like_state(best, q)
        return conclude(value.view(q.shape), monitor, tol, None, throw=throw, what="resolvent")


def graph_to_resolvent(graph: SheafGraph, potential: Potential, *, stalk: int = 1, mu: float) -> Lift:
    r"""Read a stationary layer as a resolvent: :math:`\psi^\star(f)=J_A(f/\mu)`, :math:`A=(F_0-\mu)/\mu`.

    Parameters
    ----------
    graph, potential
        The layer; :math:`F_0` is its residual without drive.
    stalk
        `d`.
    mu
        Positive, at most the convexity of the potential, so that `A` is monotone.

    Returns
    -------
    Lift
        `target` is a :class:`Resolvent`; states stay what they are, `drive` divides by `mu`. Always
        admissible; `lambda_min` is that of `I + M`.

    Raises
    ------
    ValueError
        If `mu` is not positive or exceeds what is known of the potential.

    Notes
    -----
    Source: reconstructed (SGN-R1): the stationary equation divided by `mu`.

    Examples
    --------
    >>> import torch
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
    >>> found = graph_to_resolvent(graph, Quartic(torch.ones(2), torch.ones(2)), mu=0.5)
    >>> found.target.matrix
    tensor([[ 2., -2.],
            [-2.,  2.]])
    """
    floor = local_floor(potential, None, graph.nodes)
    if not mu > 0 or (len(floor) and mu > float(floor.min()) * (1 + 1e-12)):
        raise ValueError(
            f"mu must be positive and at most the convexity {float(floor.min()):g} of the potential, got "
            f"{mu}: what is left of it would not be monotone"
        )
    matrix = graph.dense_laplacian(stalk).detach() / mu
    if isinstance(potential, Quartic):
        local: Potential = Quartic(potential.V / mu - 1, potential.kappa / mu)
    else:
        local = LiftedPotential(potential, shift=-1.0, scale=1 / mu)
    return Lift(
        target=Resolvent(matrix, local, (graph.nodes, stalk)),
        lift=identity,
        pull=identity,
        admissible=True,
        lambda_min=1 + float(torch.linalg.eigvalsh(matrix).amin()),
        deficit=graph.weights.new_zeros(graph.nodes),
        drive=lambda f: f / mu,
    )


def resolvent_to_sheaf(matrix: Tensor, potential: Potential, *, stalk: int = 1) -> Lift:
    r"""Read a resolvent with a Hermitian matrix and a local potential as a layer on a sheaf.

    Parameters
    ----------
    matrix
        `M`, Hermitian `(n d, n d)`. Entries below the rounding of its largest one are no edges.
    potential
        `phi`, local.
    stalk
        `d`. An off-diagonal block that is a multiple of a unitary matrix becomes one edge; any other becomes
        two parallel ones (:func:`unitary_pair`).

    Returns
    -------
    Lift
        `target` is a :class:`Layer`; states and drives stay what they are. `lambda_min` is that of `I + M`
        with the convexity of `phi`; `deficit` is the Hermitian block that the edges take off each node,
        `(n, d, d)`, which may be indefinite, since strong monotonicity is asked of the whole.

    Raises
    ------
    ValueError
        If the matrix is not Hermitian or does not fit the stalk.

    Notes
    -----
    Source: reconstructed (SGN-R2): the polar form of the off-diagonal entries.

    Examples
    --------
    >>> import torch
    >>> M = torch.tensor([[2.0, 1j], [-1j, 1.0]])
    >>> layer = resolvent_to_sheaf(M, Quartic(torch.zeros(2), torch.zeros(2))).target
    >>> layer.graph.dense_laplacian() + torch.diag(layer.potential.V - 1)
    tensor([[2.+0.j, 0.+1.j],
            [0.-1.j, 1.+0.j]])
    """
    check_hermitian(matrix)
    if stalk < 1 or len(matrix) % stalk:
        raise ValueError(f"stalk must divide the {len(matrix)} rows of the matrix, got {stalk}")
    n = len(matrix) // stalk
    blocks = matrix.unflatten(0, (n, stalk)).unflatten(2, (n, stalk)).transpose(1, 2)  # (n, n, d, d)
    u, v = torch.triu_indices(n, n, 1, device=matrix.device)
    # In one dimension a real entry is a multiple of a sign, so that real states stay real.
    X = blocks[u, v] if stalk == 1 else blocks[u, v].to(torch.promote_types(matrix.dtype, torch.complex64))
    tiny = 4 * torch.finfo(matrix.dtype).eps * (float(matrix.abs().amax()) if len(matrix) else 0.0)
    here = torch.linalg.matrix_norm(X) > tiny if len(X) else torch.zeros(0, dtype=torch.bool, device=X.device)
    u, v, X = u[here], v[here], X[here]
    if stalk == 1:
        weights = X.abs()[:, 0, 0]
        transport = -X / weights[:, None, None].to(X.dtype)
    else:
        c, first, second = unitary_pair(X)
        single = (first == second).flatten(1).all(1)
        double = ~single
        u, v = torch.cat([u, u[double]]), torch.cat([v, v[double]])
        weights = torch.cat([torch.where(single, c, c / 2), c[double] / 2])
        transport = -torch.cat([first, second[double]])
    graph = SheafGraph(n, torch.stack([u, v]), weights, transport, parallel=stalk > 1)
    unit = torch.eye(stalk, dtype=blocks.dtype, device=matrix.device)
    local = blocks[torch.arange(n), torch.arange(n)] - graph.degrees()[:, None, None] * unit
    if stalk == 1 and isinstance(potential, Quartic):
        lifted: Potential = Quartic(1 + local[:, 0, 0].real + potential.V, potential.kappa)
    else:
        lifted = LiftedPotential(potential, shift=unit + local)
    convexity = potential.convexity()
    smallest = 1 + float(torch.linalg.eigvalsh(matrix).amin()) if n else 1.0
    smallest += 0.0 if convexity is None else float(convexity)
    return Lift(Layer(graph, lifted), identity, identity, smallest > 0, smallest, local, identity)


def check_hermitian(matrix: Tensor) -> None:
    """Raise `ValueError` if a matrix is not square and Hermitian up to rounding."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got {tuple(matrix.shape)}")
    size = float(matrix.abs().amax()) if matrix.numel() else 0.0
    gap = float((matrix - matrix.mH).abs().amax()) if matrix.numel() else 0.0
    if not gap <= 64 * torch.finfo(matrix.dtype).eps * max(size, 1.0):
        raise ValueError(f"matrix must be Hermitian, got a difference of {gap:.2e} to its adjoint: no energy")
