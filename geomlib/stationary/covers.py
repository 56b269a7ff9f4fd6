r"""Covering graphs: a sheaf with unitary transports as a plain graph with more nodes (arXiv 2507.20088).

A phase that is no root of unity is a mixture of two neighbouring roots with non-negative weights, so a cyclic
cover carries it with real, non-negative edges; a unitary matrix is a signed real matrix, so a double cover
carries it. Both give nodes a larger degree than the sheaf had, and the surplus is taken off the potential:
the lift is admissible only if the covering operator stays positive definite. The paper's construction was not
readable; these are ours (the double cover after Gremban 1996).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geomlib.stationary.assembly import realify, transport_matrices
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.lifts import Layer, Lift, LiftedPotential, local_floor
from geomlib.stationary.potential import Potential, Quartic

__all__ = ["cover_sectors", "root_split", "sheaf_to_cover_u1", "sheaf_to_gremban"]


def root_split(phases: Tensor, sheets: int) -> tuple[Tensor, Tensor]:
    r"""Write :math:`e^{i\theta}=a_0\omega^s+a_1\omega^{s+1}`, :math:`a\ge0`, :math:`\omega=e^{2\pi i/k}`.

    Parameters
    ----------
    phases
        `theta`, any shape, real.
    sheets
        `k`, at least 3: two neighbouring roots have to be independent.

    Returns
    -------
    root, mixture : Tensor
        `s` in 0 ... k - 1, int64, and `(..., 2)` with the two weights.

    Raises
    ------
    ValueError
        If `sheets < 3`.

    Notes
    -----
    Source: reconstructed. The weights add up to :math:`\cos(\pi/k-r)/\cos(\pi/k)` for the angle `r` beyond
    the
    root, which lies between 1 and :math:`\sec(\pi/k)`.

    Examples
    --------
    >>> import torch
    >>> root_split(torch.tensor([0.0, torch.pi / 4]), 4)
    (tensor([0, 0]), tensor([[1.0000, 0.0000],
            [0.7071, 0.7071]]))
    """
    if sheets < 3:
        raise ValueError(f"sheets must be at least 3, got {sheets}: two roots would not span the plane")
    step = 2 * math.pi / sheets
    turn = phases.remainder(2 * math.pi)
    root = (turn / step).floor()
    beyond = turn - root * step
    mixture = torch.stack([(step - beyond).sin(), beyond.sin()], -1) / math.sin(step)
    # Rounding at a root itself would leave an edge of weight 1e-16.
    mixture = torch.where(mixture > 16 * torch.finfo(mixture.dtype).eps, mixture, 0.0)
    return root.long() % sheets, mixture


def cover_sectors(graph: SheafGraph, floor: Tensor, sheets: int) -> Tensor:
    r"""Return the eigenvalues of a cyclic cover's operator, sector by sector.

    Parameters
    ----------
    graph
        Phases on the edges, stalk 1.
    floor
        `(n,)`, the diagonal that is added to the connection Laplacian: `V` of a quartic potential.
    sheets
        `k`.

    Returns
    -------
    Tensor
        `(k, n)`, ascending in each row. Row 1 is the spectrum of the layer itself; the others belong to
        states of the cover that no lifted state excites.

    Raises
    ------
    ValueError
        If `sheets < 3` or the graph has matrices on its edges.

    Notes
    -----
    Source: reconstructed. The cover is invariant under the cyclic group, so its operator splits over the
    characters :math:`r`, with edge factors :math:`\sum_sa_s\omega^{rs}` on the diagonal :math:`\deg_w+V` of
    the layer.

    Examples
    --------
    A triangle with a half turn on each edge: the layer is positive definite, the cover is not.

    >>> import torch
    >>> edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    >>> graph = SheafGraph(3, edges, torch.ones(3), torch.full((3,), torch.pi))
    >>> cover_sectors(graph, torch.full((3,), -0.3), 4).amin(1)
    tensor([-0.3000,  0.7000, -0.3000,  0.7000])
    """
    root, mixture = root_split(_phases(graph), sheets)
    n, weights = graph.nodes, graph.weights.detach()
    u, v = graph.edges
    characters = torch.arange(sheets, device=weights.device)[:, None]  # (k, 1)
    angle = (2 * math.pi / sheets) * (characters * root).to(mixture.dtype)
    step = (2 * math.pi / sheets) * characters.to(mixture.dtype)
    first, second = torch.polar(torch.ones_like(angle), angle), torch.polar(torch.ones_like(step), step)
    factor = first * (mixture[:, 0] + mixture[:, 1] * second)  # (k, M)
    place = torch.zeros(sheets, n * n, dtype=factor.dtype, device=weights.device)
    place = place.index_add(1, u * n + v, -weights * factor)
    matrix = place.view(sheets, n, n)
    diagonal = _degrees(graph, weights) + floor.detach().to(weights)
    return torch.linalg.eigvalsh(matrix + matrix.mH + torch.diag(diagonal).to(matrix.dtype))


def sheaf_to_cover_u1(
    graph: SheafGraph, potential: Potential, *, sheets: int = 8, floor: Tensor | None = None
) -> Lift:
    r"""Lift a layer with phases to a plain graph on `k` sheets.

    Parameters
    ----------
    graph
        Phases `(M,)` on the edges (or none), stalk 1.
    potential
        Any node-local potential; a quartic one stays quartic.
    sheets
        `k >= 3`; more sheets take less off the potential.
    floor
        `(n,)`, lower bound of the second derivative of the potential; `V` of a quartic by default.

    Returns
    -------
    Lift
        `target` is a :class:`Layer` on `n k` nodes and at most `2 k M` edges, node `(u, j)` at `u k + j`.
        `lift` sends `psi_u` to :math:`\omega^j\psi_u` on sheet `j`. `deficit` `(n,)` is what each node loses,
        :math:`\sum_{e\ni u}w_e(a_s+a_{s+1}-1)`, at most :math:`\sec(\pi/k)-1` times its degree.
        `admissible` if all
        sectors of :func:`cover_sectors` are positive.

    Raises
    ------
    ValueError
        If `sheets < 3`, the graph has matrices on its edges, or the floor is not known.

    Notes
    -----
    Source: reconstructed; the paper's own lift was not readable. With all :math:`V_u>0` it is admissible
    for all
    large `k`; if some :math:`V_u<0` it can fail for every `k`.

    Examples
    --------
    >>> import torch
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1), torch.tensor([0.3]))
    >>> found = sheaf_to_cover_u1(graph, Quartic(torch.ones(2), torch.ones(2)), sheets=4)
    >>> found.admissible, found.target.graph.nodes, found.deficit
    (True, 8, tensor([0.2509, 0.2509]))
    """
    root, mixture = root_split(_phases(graph), sheets)
    floor = local_floor(potential, floor, graph.nodes).to(graph.weights)
    weights, (u, v), n, k = graph.weights, graph.edges, graph.nodes, sheets
    sheet = torch.arange(k, device=weights.device)
    start = (u[:, None] * k + sheet)[:, None, :].expand(-1, 2, -1)  # (M, 2, k)
    shift = root[:, None] + torch.arange(2, device=weights.device)  # (M, 2)
    end = v[:, None, None] * k + (sheet + shift[..., None]) % k
    copied = (weights[:, None] * mixture.to(weights))[..., None].expand(-1, -1, k)
    kept = (mixture > 0)[..., None].expand(-1, -1, k)
    cover = SheafGraph(n * k, torch.stack([start[kept], end[kept]]), copied[kept])
    surplus = weights * (mixture.sum(1) - 1)
    deficit = _degrees(graph, surplus)
    phase = (2 * math.pi / k) * sheet.to(weights.dtype)
    turns = torch.polar(torch.ones_like(phase), phase)  # omega^j
    smallest = float(cover_sectors(graph, floor, k).min())

    def lift(psi: Tensor) -> Tensor:
        return (psi[:, :, None] * turns[:, None]).flatten(1, 2)

    def pull(psi: Tensor) -> Tensor:
        return (psi.unflatten(1, (n, k)) * turns.conj()[:, None]).mean(2)

    def fold(psi: Tensor) -> Tensor:
        return (psi.unflatten(1, (n, k)) * turns.conj()[:, None]).permute(2, 0, 1, 3).flatten(0, 1)

    def unfold(states: Tensor) -> Tensor:
        return (states.unflatten(0, (k, -1)).permute(1, 2, 0, 3) * turns[:, None]).flatten(1, 2)

    if isinstance(potential, Quartic):
        # Radial: the phase of a sheet does not matter, and the target stays in the class of plain layers.
        lifted: Potential = Quartic(
            (potential.V - deficit).repeat_interleave(k), potential.kappa.repeat_interleave(k)
        )
    else:
        lifted = LiftedPotential(potential, fold, unfold, k, shift=-deficit.repeat_interleave(k))
    return Lift(Layer(cover, lifted), lift, pull, smallest > 0, smallest, deficit, lift)


def sheaf_to_gremban(
    graph: SheafGraph, potential: Potential, *, stalk: int = 1, floor: Tensor | None = None
) -> Lift:
    r"""Lift a layer with unitary transports to a plain real graph, a signed double cover of its coordinates.

    Parameters
    ----------
    graph
        Unitary matrices `(M, d, d)`, phases, or no transport.
    potential
        Any node-local potential. On the target "local" means the cluster of `4 d` copies of one node, unless
        `kappa = 0`, where each copy stands alone.
    stalk
        `d`.
    floor
        `(n,)`, lower bound of the second derivative of the potential; `V` of a quartic by default.

    Returns
    -------
    Lift
        `target` is a :class:`Layer` on `4 d n` real nodes of stalk 1; coordinate `a` of node `u` on sheet
        `+` or `-` stands at `(2 d u + a) 2 + (0 or 1)`. `lift` sends real coordinates `x` to `(x, -x)`.
        `deficit` `(2 d n,)` is what each coordinate loses, at most :math:`(\sqrt{2d}-1)` times the degree.

    Raises
    ------
    ValueError
        If the stalk does not fit the transports or the floor is not known.

    Notes
    -----
    Source: Gremban 1996, the double cover of a signed matrix, applied to the realified connection
    (reconstructed). States of the cover split into `(x, -x)`, the layer itself, and `(x, x)`, on which the
    edges act with the moduli of their entries; both must be positive definite.

    Examples
    --------
    >>> import torch
    >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1), torch.tensor([0.3]))
    >>> found = sheaf_to_gremban(graph, Quartic(torch.ones(2), torch.zeros(2)))
    >>> found.target.graph.nodes, round(found.lambda_min, 3)
    (8, 0.749)
    """
    transport = transport_matrices(graph, stalk)
    if transport.shape[1:] != (stalk, stalk):
        raise ValueError(f"stalk must fit the transports {tuple(transport.shape)}, got {stalk}")
    floor = local_floor(potential, floor, graph.nodes).to(graph.weights)
    weights, (u, v), n, m = graph.weights, graph.edges, graph.nodes, 2 * stalk
    signed = realify(transport + 0j)  # (M, m, m)
    size = signed.abs().to(weights)
    entry = (size > 16 * torch.finfo(weights.dtype).eps).nonzero()  # (edge, row, column)
    edge, row, column = entry.unbind(1)
    flips = (signed[edge, row, column] < 0).long()
    start, end = ((u[edge] * m + row) * 2, (v[edge] * m + column) * 2)
    pairs = [torch.stack([start + side, end + (side + flips) % 2]) for side in (0, 1)]
    copied = weights[edge] * size[edge, row, column]
    cover = SheafGraph(n * m * 2, torch.cat(pairs, 1), copied.repeat(2))

    surplus = torch.zeros(n, m, dtype=weights.dtype, device=weights.device)
    surplus = surplus.index_add(0, u, weights[:, None] * (size.sum(2) - 1))
    deficit = surplus.index_add(0, v, weights[:, None] * (size.sum(1) - 1)).flatten()
    smallest = min(
        _smallest(graph, floor, block) for block in (signed.to(weights), size)
    )  # odd states, then even ones
    real = weights.dtype

    def spread(states: Tensor) -> Tensor:
        x = torch.view_as_real(states).flatten(2)  # (B, n, m)
        return torch.stack([x, -x], -1).flatten(1)[..., None].to(real)

    def pull(psi: Tensor) -> Tensor:
        both = psi.unflatten(1, (n, m, 2))[..., 0]
        half = (both[..., 0] - both[..., 1]) / 2
        return torch.view_as_complex(half.unflatten(2, (stalk, 2)).contiguous())

    def fold(psi: Tensor) -> Tensor:
        both = psi.unflatten(1, (n, m, 2))[..., 0]
        sheets = torch.cat([both[..., 0], -both[..., 1]])  # (2 B, n, m)
        return torch.view_as_complex(sheets.unflatten(2, (stalk, 2)).contiguous())

    def unfold(states: Tensor) -> Tensor:
        plus, minus = torch.view_as_real(states).flatten(2).unflatten(0, (2, -1))
        return torch.stack([plus, -minus], -1).flatten(1)[..., None]

    if isinstance(potential, Quartic) and not potential.kappa.any():
        curvature = potential.V.repeat_interleave(m) - deficit
        lifted: Potential = Quartic(
            curvature.repeat_interleave(2), torch.zeros_like(curvature).repeat_interleave(2)
        )
    else:
        lifted = LiftedPotential(
            potential, fold, unfold, 2, shift=-deficit.repeat_interleave(2), couples_nodes=True
        )
    return Lift(Layer(cover, lifted), spread, pull, smallest > 0, smallest, deficit, spread)


def _phases(graph: SheafGraph) -> Tensor:
    if graph.transport is None:
        return torch.zeros_like(graph.weights)
    if graph.transport.dim() == 1:
        return graph.transport.detach()
    if graph.transport.shape[1:] == (1, 1):
        return graph.transport.detach()[:, 0, 0].angle()
    raise ValueError(
        f"transport must hold phases (M,), got the shape {tuple(graph.transport.shape)}: matrices lift by "
        "sheaf_to_gremban"
    )


def _degrees(graph: SheafGraph, per_edge: Tensor) -> Tensor:
    """Add up a number per edge at both of its ends `(n,)`."""
    u, v = graph.edges
    total = torch.zeros(graph.nodes, dtype=per_edge.dtype, device=per_edge.device)
    return total.index_add(0, u, per_edge).index_add(0, v, per_edge)


def _smallest(graph: SheafGraph, floor: Tensor, blocks: Tensor) -> float:
    """Return the smallest eigenvalue of the operator with these blocks `(M, m, m)` in place of transports."""
    n, m = graph.nodes, blocks.shape[-1]
    weights = graph.weights.detach()
    u, v = graph.edges
    place = torch.zeros(n * n, m, m, dtype=weights.dtype, device=weights.device)
    place = place.index_add(0, u * n + v, -weights[:, None, None] * blocks.detach())
    matrix = place.view(n, n, m, m).transpose(1, 2).reshape(n * m, n * m)
    diagonal = (_degrees(graph, weights) + floor.detach()).repeat_interleave(m)
    return float(torch.linalg.eigvalsh(matrix + matrix.T + torch.diag(diagonal)).amin())
