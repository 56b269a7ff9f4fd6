r"""Four names for one function: resolvents, sheaves, plain graphs, supra-graphs (arXiv 2507.20088, abstract).

Each map takes a network of one class to a network of another that computes the same function, and says when
it may: the target, the maps of states, and whether the lift is admissible. The paper states that the classes
coincide under strong monotonicity and admissible lifts; its constructions were not readable, these are ours.
Covers, which trade a connection for more nodes, stand in `covers`; unitary dilations in `dilation`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from geomlib.stationary.assembly import transport_matrices
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.lifts import (
    Layer,
    Lift,
    LiftedPotential,
    identity,
    local_floor,
)
from geomlib.stationary.potential import Potential, Quartic, Rectifier, Tanh
from geomlib.stationary.relaxations import SymmetricEnergy
from geomlib.stationary.resolvent import resolvent_to_sheaf
from geomlib.stationary.supra import SupraGraph

__all__ = [
    "mlp_to_supra",
    "sheaf_gauge_trivialise",
    "stack_to_supra",
    "supra_to_stack",
    "symmetric_to_sheaf",
]


def sheaf_gauge_trivialise(graph: SheafGraph, potential: Potential, *, stalk: int = 1) -> Lift:
    r"""Turn a flat connection into none: :math:`\tau_e=g_ug_v^*` and :math:`\psi=g\psi'`.

    Parameters
    ----------
    graph
        Its positive edges decide; a spanning forest of them fixes the gauge.
    potential
        Radial ones stay as they are, others are transported.
    stalk
        `d`.

    Returns
    -------
    Lift
        `target` is a :class:`Layer` without transport, `lift` is :math:`g^*`. `deficit` is the largest
        :math:`\|\tau_e-g_ug_v^*\|` over edges, the holonomy that no gauge removes; `admissible` if that is
        rounding. `lambda_min` is that of the plain Laplacian with the convexity of the potential.

    Notes
    -----
    Source: reconstructed (SGN-R3); known for bundles: flat is trivial along a spanning tree.

    Examples
    --------
    >>> import torch
    >>> edges, ones = torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.ones(3)
    >>> flat = SheafGraph(3, edges, ones, torch.tensor([0.5, 1.2, 0.7]))
    >>> curved = SheafGraph(3, edges, ones, torch.tensor([0.5, 1.2, 1.7]))
    >>> [sheaf_gauge_trivialise(g, Quartic(ones, ones)).admissible for g in (flat, curved)]
    [True, False]
    """
    tau = transport_matrices(graph, stalk).detach()
    gauge = _gauge(graph, tau)
    u, v = graph.edges
    present = graph.weights > 0
    miss = torch.linalg.matrix_norm(tau - gauge[u] @ gauge[v].mH)[present]
    defect = miss.amax() if len(miss) else miss.new_zeros(())
    plain = SheafGraph(graph.nodes, graph.edges, graph.weights, parallel=graph.parallel)

    def lift(psi: Tensor) -> Tensor:
        return torch.einsum("vba,nvb->nva", gauge.conj().to(psi.dtype), psi)

    def pull(psi: Tensor) -> Tensor:
        return torch.einsum("vab,nvb->nva", gauge.to(psi.dtype), psi)

    radial = isinstance(potential, Quartic)
    lifted = potential if radial else LiftedPotential(potential, pull, lift)
    floor = local_floor(potential, None, graph.nodes)
    operator = plain.dense_laplacian().detach() + torch.diag(floor.to(graph.weights))
    smallest = float(torch.linalg.eigvalsh(operator).amin())
    flat = float(defect) < 1e3 * torch.finfo(graph.weights.dtype).eps * graph.nodes
    return Lift(Layer(plain, lifted), lift, pull, flat and smallest > 0, smallest, defect, lift)


def stack_to_supra(
    layers: Sequence[tuple[SheafGraph, Potential]],
    maps: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> Lift:
    """Assemble a stack of layers into one supra-graph.

    Returns
    -------
    Lift
        `target` is a :class:`SupraGraph`; `lift` joins a list of layer states `(B, n_l, d_l)` to one state,
        `pull` cuts it. Admissible if every layer is strongly monotone, of which `lambda_min` is the least
        known constant.

    Notes
    -----
    Source: reconstructed (SGN-R7, SGN-S1).

    Examples
    --------
    >>> import torch
    >>> edge = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1)), Quartic(torch.ones(2), torch.ones(2))
    >>> stack_to_supra([edge, edge], [torch.eye(2), torch.eye(2)]).target.size
    4
    """
    supra = SupraGraph(layers, maps, biases)
    known = []
    for (graph, potential), (_, d) in zip(supra.layers, supra.shapes, strict=True):
        operator = graph.dense_laplacian(d).detach()
        floor = local_floor(potential, None, graph.nodes).repeat_interleave(d)
        known.append(float(torch.linalg.eigvalsh(operator + torch.diag(floor.to(operator))).amin()))
    smallest = min(known)
    none = supra.maps[0].detach().real.new_zeros(())
    return Lift(supra, supra.join, supra.split, smallest > 0, smallest, none, identity)


def supra_to_stack(supra: SupraGraph) -> tuple[tuple[Layer, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return layers, maps and biases of a feed-forward supra-graph, to be solved one after the other.

    Examples
    --------
    >>> import torch
    >>> edge = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1)), Quartic(torch.ones(2), torch.ones(2))
    >>> layers, maps, biases = supra_to_stack(SupraGraph([edge], [torch.eye(2)]))
    >>> len(layers), maps[0].shape
    (1, torch.Size([2, 2]))
    """
    return supra.layers, supra.maps, supra.biases


def symmetric_to_sheaf(relaxation: SymmetricEnergy, strength: float) -> Lift:
    r"""Read a supra-graph with symmetric feedback as a single layer on a sheaf with phases.

    Parameters
    ----------
    relaxation
        Its layers have stalk 1 and quartic potentials.
    strength
        `lambda` of the symmetric energy.

    Returns
    -------
    Lift
        `target` is one :class:`Layer` on all nodes, coupled by :math:`-\lambda^{-1/2}K_\ell` as well;
        `lift` scales
        layers of states `(B, size)` to states `(B, size, 1)`, `drive` does it with inputs `(B, inputs)`.
        Admissible if the symmetric energy is strongly convex.

    Raises
    ------
    ValueError
        If a stalk is not 1 or a potential is not quartic.

    Notes
    -----
    Source: reconstructed (SGN-R7): a system with feedback is one layer if it is symmetric.

    Examples
    --------
    >>> import torch
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node, node], [torch.ones(1, 1)] * 2)
    >>> symmetric_to_sheaf(SymmetricEnergy(supra), 4.0).target.graph.dense_laplacian()
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    supra = relaxation.supra
    V, kappa = [], []
    for (_, potential), (n, d) in zip(supra.layers, supra.shapes, strict=True):
        if d != 1 or not isinstance(potential, Quartic):
            raise ValueError(
                f"layers must have stalk 1 and quartic potentials, got stalk {d} and a "
                f"{type(potential).__name__} on {n} nodes"
            )
        V.append(potential.V.detach())
        kappa.append(potential.kappa.detach())
    scale = relaxation.scale(strength)
    rows = torch.block_diag(*(graph.dense_laplacian().detach() for graph, _ in supra.layers))
    matrix = rows.to(supra.maps[0].dtype)
    end = supra.sizes[0]
    for n, before, K in zip(supra.sizes[1:], supra.sizes[:-1], supra.maps[1:], strict=True):
        coupling = -K.detach() / strength**0.5
        matrix[end : end + n, end - before : end] = coupling
        matrix[end - before : end, end : end + n] = coupling.mH
        end += n
    local = Quartic(torch.cat(V) - 1, torch.cat(kappa) / scale**2)
    found = resolvent_to_sheaf(matrix, local)

    def drive(x: Tensor) -> Tensor:
        return (-scale * supra.residual(supra.zeros(len(x)), x))[..., None]

    return Lift(
        target=found.target,
        lift=lambda psi: (scale * psi)[..., None],
        pull=lambda state: state[..., 0] / scale,
        admissible=found.admissible,
        lambda_min=found.lambda_min,
        deficit=found.deficit,
        drive=drive,
    )


def mlp_to_supra(
    weights: Sequence[Tensor], biases: Sequence[Tensor], *, activation: str = "tanh"
) -> SupraGraph:
    r"""Read a multilayer perceptron as a stack of stationary layers without edges.

    Parameters
    ----------
    weights, biases
        `(width, width before)` and `(width,)` of each hidden layer, real.
    activation
        `"tanh"`, whose potential has the derivative `artanh`, or `"relu"`, a projection: solve that one with
        a solver that uses the proximity operator.

    Raises
    ------
    ValueError
        If the activation is unknown.

    Notes
    -----
    Source: known (Combettes and Pesquet 2020): activations are proximity operators. In the orthant of weights
    these networks are the deepest stratum, where all edges are zero (SGN-R8).

    Examples
    --------
    >>> import torch
    >>> supra = mlp_to_supra([torch.ones(1, 1)], [torch.zeros(1)])
    >>> supra.solve(torch.ones(1, 1), tol=1e-6).value, torch.tensor(1.0).tanh()
    (tensor([[0.7616]]), tensor(0.7616))
    """
    potentials: dict[str, type[Potential]] = {"tanh": Tanh, "relu": Rectifier}
    if activation not in potentials:
        raise ValueError(f"activation must be one of {', '.join(potentials)}, got {activation!r}")
    layers = []
    for K in weights:
        none = torch.zeros(2, 0, dtype=torch.int64, device=K.device)
        layers.append((SheafGraph(len(K), none, K.detach().new_zeros(0)), potentials[activation]()))
    return SupraGraph(layers, weights, biases)


def _gauge(graph: SheafGraph, tau: Tensor) -> Tensor:
    """Carry the identity along a spanning forest of the positive edges, breadth first `(n, d, d)`."""
    gauge: list[Tensor | None] = [None] * graph.nodes
    around: list[list[tuple[int, int, bool]]] = [[] for _ in range(graph.nodes)]
    present = (graph.weights > 0).tolist()
    for edge, (u, v) in enumerate(graph.edges.T.tolist()):
        if present[edge]:
            around[u].append((v, edge, True))
            around[v].append((u, edge, False))
    unit = torch.eye(tau.shape[-1], dtype=tau.dtype, device=tau.device)
    for root in range(graph.nodes):
        if gauge[root] is not None:
            continue
        gauge[root] = unit
        queue = deque([root])
        while queue:
            node = queue.popleft()
            here = gauge[node]
            assert here is not None
            for other, edge, leaves in around[node]:
                if gauge[other] is None:
                    # tau_e = g_u g_v^*, so g_v = tau_e^* g_u.
                    gauge[other] = (tau[edge].mH if leaves else tau[edge]) @ here
                    queue.append(other)
    return torch.stack([g for g in gauge if g is not None])
