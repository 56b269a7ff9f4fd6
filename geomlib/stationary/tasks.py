r"""Small problems whose latent graph is known beforehand, so that one can see whether it was found.

A planted graph recovered from the states it makes, with and without a connection; a classification in which
hidden clusters must be discovered; points on three spirals, for which no graph is needed. All reconstructed:
no experiment of arXiv 2507.20088 could be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import solve_stationary
from geomlib.stationary.objectives import StationaryObjective, best_scale
from geomlib.stationary.potential import Quartic

__all__ = [
    "HiddenClusters",
    "Recovery",
    "connection_recovery",
    "hidden_clusters",
    "latent_graph_regression",
    "ring_with_chords",
    "three_spirals",
]


def ring_with_chords(
    nodes: int,
    chords: int,
    *,
    phases: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> SheafGraph:
    """Draw a ring with extra edges at random places, as a graph over all candidates.

    Parameters
    ----------
    nodes
        At least 3.
    chords
        Number of edges beside the ring.
    phases
        Draw a phase for every candidate, uniform on the circle; those of dead edges mean nothing.
    generator
        On the CPU.
    dtype, device
        Of the weights.

    Returns
    -------
    SheafGraph
        Weights uniform in [0.5, 1.5] on ring and chords, zero elsewhere.

    Raises
    ------
    ValueError
        If there are not that many places.

    Examples
    --------
    >>> ring_with_chords(10, 3, generator=torch.Generator().manual_seed(0))
    SheafGraph(10 nodes, 13 edges of 45 candidates)
    """
    if nodes < 3:
        raise ValueError(f"nodes must be at least 3, got {nodes}: there would be no ring")
    u, v = torch.triu_indices(nodes, nodes, 1)
    apart = v - u
    ring = (apart == 1) | (apart == nodes - 1)
    free = (~ring).nonzero().flatten()
    if not 0 <= chords <= len(free):
        raise ValueError(f"chords must lie in 0 ... {len(free)}, got {chords}: no place is left")
    alive = ring.clone()
    alive[free[torch.randperm(len(free), generator=generator)[:chords]]] = True
    weights = (0.5 + torch.rand(len(u), generator=generator, dtype=dtype)) * alive
    transport = None
    if phases:
        transport = (torch.rand(len(u), generator=generator, dtype=dtype) * 2 - 1) * math.pi
        transport = transport.to(device)
    return SheafGraph(nodes, torch.stack([u, v]).to(device), weights.to(device), transport)


@dataclass(frozen=True, repr=False)
class Recovery:
    """Find a graph again from drives and the stationary states that they have on it.

    Attributes
    ----------
    truth
        The planted graph over all candidates.
    potential
        Of the layer, known.
    drive, target
        `(B, n, 1)`, complex.
    """

    truth: SheafGraph
    potential: Quartic
    drive: Tensor
    target: Tensor

    def __repr__(self) -> str:
        return f"Recovery({self.truth}, {len(self.drive)} drives)"

    def objective(self) -> StationaryObjective:
        """Return half the mean of `|psi - target|^2` over samples; phases are learned if there are any."""

        def loss(psi: Tensor) -> Tensor:
            return torch.view_as_real(psi - self.target).square().sum() / (2 * len(psi))

        connection = self.truth.transport is not None
        return StationaryObjective(self.potential, self.drive, loss, connection=connection)

    def start(self) -> SheafGraph:
        """Return the graph without edges."""
        transport = self.truth.transport
        nothing = torch.zeros_like(self.truth.weights)
        return self.truth.replace(
            weights=nothing, transport=None if transport is None else torch.zeros_like(transport)
        )


def latent_graph_regression(
    *,
    nodes: int = 10,
    chords: int = 3,
    drives: int = 60,
    noise: float = 0.0,
    mu: float = 0.5,
    kappa: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Recovery:
    """Plant a ring with chords and look at the states of random drives (task T1).

    Parameters
    ----------
    nodes, chords
        Of the graph.
    drives
        Number of samples.
    noise
        Standard deviation of real and imaginary part of the noise on the targets.
    mu, kappa
        Of the potential, the same at all nodes.
    generator
        On the CPU.
    device
        Of the tensors, which are in double precision.

    Raises
    ------
    ValueError
        If `drives` is less than one, `noise` negative, or the graph impossible.

    Examples
    --------
    >>> latent_graph_regression(generator=torch.Generator().manual_seed(0))
    Recovery(SheafGraph(10 nodes, 13 edges of 45 candidates), 60 drives)
    """
    truth = ring_with_chords(nodes, chords, generator=generator, device=device)
    return _recovery(truth, drives, noise, mu, kappa, generator)


def connection_recovery(
    *,
    nodes: int = 8,
    chords: int = 2,
    drives: int = 60,
    noise: float = 0.02,
    mu: float = 0.5,
    kappa: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Recovery:
    """Plant a ring with chords and a phase on every edge (task T3).

    Parameters
    ----------
    nodes, chords, drives, noise, mu, kappa, generator, device
        As in :func:`latent_graph_regression`.

    Raises
    ------
    ValueError
        As there.

    Examples
    --------
    >>> connection_recovery(generator=torch.Generator().manual_seed(0)).truth
    SheafGraph(8 nodes, 10 edges of 28 candidates, with a connection)
    """
    truth = ring_with_chords(nodes, chords, phases=True, generator=generator, device=device)
    return _recovery(truth, drives, noise, mu, kappa, generator)


@dataclass(frozen=True, repr=False)
class HiddenClusters:
    """Classify by the cluster that is driven, seeing one node of each cluster only (task T2).

    Attributes
    ----------
    potential
        Of the layer.
    drive
        `(N, n, 1)`, complex: white noise, and 1 on the real parts of the cluster of the label.
    labels
        `(N,)`, int64.
    cluster
        `(n,)`, int64: node `v` belongs to cluster `v` modulo their number. Never shown to the learner.
    """

    potential: Quartic
    drive: Tensor
    labels: Tensor
    cluster: Tensor

    def __repr__(self) -> str:
        return (
            f"HiddenClusters({len(self.drive)} samples, {len(self.cluster)} nodes, {self.classes} clusters)"
        )

    @property
    def classes(self) -> int:
        """Number of clusters; the nodes `0 ... classes - 1` are the anchors that are read."""
        return int(self.cluster.max()) + 1

    def logits(self, psi: Tensor) -> Tensor:
        """Return the real parts at the anchors, `(N, classes)`, before their common scale."""
        return psi[:, : self.classes, 0].real

    def objective(self) -> StationaryObjective:
        """Return the mean cross-entropy with the best common scale of the logits.

        The scale is minimised out, so that the weights of the graph are the only parameters left; by the
        envelope theorem the gradient does not see it.
        """

        def loss(psi: Tensor) -> Tensor:
            logits = self.logits(psi)
            return cross_entropy(best_scale(logits.detach(), self.labels) * logits, self.labels)

        return StationaryObjective(self.potential, self.drive, loss, tol=1e-9)

    def start(self) -> SheafGraph:
        """Return the graph without edges over all candidates."""
        nodes = len(self.cluster)
        edges = nodes * (nodes - 1) // 2
        return SheafGraph.complete(nodes, self.drive.real.new_zeros(edges))

    def accuracy(self, graph: SheafGraph) -> float:
        """Return the share of samples whose largest anchor is that of their label."""
        psi = solve_stationary(graph, self.potential, self.drive, tol=1e-9).value
        return float((self.logits(psi).argmax(1) == self.labels).double().mean())

    def purity(self, graph: SheafGraph) -> float:
        """Return the share of the weight that lies inside clusters."""
        u, v = graph.edges
        inside = self.cluster[u] == self.cluster[v]
        return float(graph.weights[inside].sum() / graph.weights.sum())


def hidden_clusters(
    samples: int = 300,
    *,
    nodes: int = 15,
    clusters: int = 3,
    mu: float = 0.5,
    kappa: float = 0.1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> HiddenClusters:
    """Draw the data of the hidden-cluster classification (task T2).

    Parameters
    ----------
    samples
        At least one.
    nodes, clusters
        At least one node per cluster.
    mu, kappa
        Of the potential.
    generator
        On the CPU.
    device
        Of the tensors, which are in double precision.

    Raises
    ------
    ValueError
        If there are no samples, or clusters without a node.

    Examples
    --------
    >>> task = hidden_clusters(5, generator=torch.Generator().manual_seed(0))
    >>> task.drive.shape, task.cluster[:6].tolist()
    (torch.Size([5, 15, 1]), [0, 1, 2, 0, 1, 2])
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: there would be nothing to learn from")
    if not 1 <= clusters <= nodes:
        raise ValueError(f"clusters must lie in 1 ... {nodes}, got {clusters}: some would have no node")
    cluster = torch.arange(nodes) % clusters
    labels = torch.randint(clusters, (samples,), generator=generator)
    noise = torch.randn(samples, nodes, 2, generator=generator, dtype=torch.float64)
    noise[..., 0] += cluster == labels[:, None]
    drive = torch.view_as_complex(noise)[..., None].to(device)
    return HiddenClusters(_potential(nodes, mu, kappa, drive), drive, labels.to(device), cluster.to(device))


def three_spirals(
    samples: int = 600,
    *,
    noise: float = 0.05,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Draw points on three interleaved spirals (task T4).

    Parameters
    ----------
    samples
        At least one.
    noise
        Standard deviation across the spiral.
    generator
        On the CPU.
    dtype
        Of the points.

    Returns
    -------
    tuple of Tensor
        Points `(samples, 2)` in about the unit disk, and labels `(samples,)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> points, labels = three_spirals(6, generator=torch.Generator().manual_seed(0))
    >>> points.shape, int(labels.max()) < 3
    (torch.Size([6, 2]), True)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: there would be no point")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}: it is a standard deviation")
    labels = torch.randint(3, (samples,), generator=generator)
    radius = 0.1 + 0.9 * torch.rand(samples, generator=generator, dtype=dtype)
    angle = 4.0 * radius + labels * (2 * math.pi / 3)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points + noise * torch.randn(samples, 2, generator=generator, dtype=dtype), labels


def _recovery(
    truth: SheafGraph, drives: int, noise: float, mu: float, kappa: float, generator: torch.Generator | None
) -> Recovery:
    if drives < 1:
        raise ValueError(f"drives must be at least 1, got {drives}: there would be nothing to learn from")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}: it is a standard deviation")

    def white() -> Tensor:
        pairs = torch.randn(drives, truth.nodes, 1, 2, generator=generator, dtype=torch.float64)
        return torch.view_as_complex(pairs).to(truth.weights.device)

    drive = white()
    potential = _potential(truth.nodes, mu, kappa, drive)
    target = solve_stationary(truth, potential, drive, tol=1e-13).value
    return Recovery(truth, potential, drive, target + noise * white())


def _potential(nodes: int, mu: float, kappa: float, drive: Tensor) -> Quartic:
    return Quartic(drive.real.new_full((nodes,), mu), drive.real.new_full((nodes,), kappa))
