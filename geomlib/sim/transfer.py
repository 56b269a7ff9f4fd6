"""Perron-Frobenius tools: Ulam's method on an interval, and embeddings of measures in a kernel space.

The Perron-Frobenius operator moves measures forward, `P mu = F_# mu`, and is dual to the Koopman operator.
Its fixed points are invariant measures: what an orbit looks like after infinite time (arXiv:2207.07475,
abstract). Ulam's method makes it a stochastic matrix; a kernel mean embedding makes a measure a vector,
whose norm tells a fixed point (norm 1) from every larger invariant set (norm below 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from geomlib.sim.features import RandomFourierFeatures

__all__ = ["Ulam", "circle_embedding_norm", "embedding_norm", "ulam"]


@dataclass(frozen=True, eq=False)
class Ulam:
    """The Perron-Frobenius operator of an interval map as a Markov chain between cells.

    Attributes
    ----------
    edges : Tensor
        `(cells + 1,)` float64, borders of the cells.
    transition : Tensor
        `(cells, cells)` float64; entry `(i, j)` is the share of cell `i` that lands in cell `j`; rows sum
        to one. Koopman acts as `transition @ g`, Perron-Frobenius as `rho @ transition`.
    measures : Tensor
        `(components, cells)` float64, one stationary probability vector for each closed class of cells:
        non-negative, with disjoint supports, a basis of the eigenspace at 1.
    escaped : float
        Share of the sample points that left the interval and were counted in the nearest border cell.
    """

    edges: Tensor
    transition: Tensor
    measures: Tensor
    escaped: float

    @property
    def centres(self) -> Tensor:
        """Midpoints of the cells, `(cells,)`."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def densities(self) -> Tensor:
        """The stationary measures per unit of length, `(components, cells)`."""
        return self.measures / (self.edges[1:] - self.edges[:-1])

    def eigenvalues(self) -> Tensor:
        """All eigenvalues of the chain, `(cells,)` complex128, by decreasing modulus."""
        values = torch.linalg.eigvals(self.transition)
        return values[values.abs().argsort(descending=True)]

    def __repr__(self) -> str:
        return (
            f"Ulam(cells={len(self.transition)}, components={len(self.measures)}, "
            f"interval=[{self.edges[0]:g}, {self.edges[-1]:g}], escaped={self.escaped:.2g})"
        )


def ulam(
    f: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    *,
    cells: int = 400,
    samples: int = 200,
    wrap: bool = False,
) -> Ulam:
    """Discretise the Perron-Frobenius operator of a map of an interval, and find its invariant measures.

    Parameters
    ----------
    f : callable
        Maps a vector of points, float64 `(n,)`, to their images.
    low, high : float
        The interval.
    cells : int
        Number of equal cells.
    samples : int
        Points in each cell, equally spaced; at least 50, or the matrix is mostly noise.
    wrap : bool
        Whether the interval is a circle. If not, points that leave it are counted in the nearest border
        cell and reported in `escaped`.

    Returns
    -------
    Ulam

    Raises
    ------
    ValueError
        If the interval is empty, there are too few cells or samples, or an image is not finite.

    Notes
    -----
    Source: Ulam's method as in Klus, Koltai and Schuette (arXiv:1512.05997). The discretised chain carries
    noise of one cell's width: a repelling fixed point is left, an attracting one is held.

    Examples
    --------
    >>> chain = ulam(lambda x: torch.tanh(2 * x), -1.0, 1.0, cells=100, samples=50)
    >>> len(chain.measures)  # two attracting fixed points, two ergodic measures
    2
    """
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}: the interval would be empty")
    if cells < 2:
        raise ValueError(f"cells must be at least 2, got {cells}: one cell has no dynamics")
    if samples < 50:
        raise ValueError(f"samples must be at least 50 per cell, got {samples}: the rest would be noise")
    width = (high - low) / cells
    offsets = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    points = low + width * (torch.arange(cells, dtype=torch.float64)[:, None] + offsets)
    images = f(points.flatten()).detach().cpu().double().reshape(cells, samples)
    if not torch.isfinite(images).all():
        raise ValueError("f must be finite on the interval, got nan or inf: mass would be lost")
    target = ((images - low) / width).floor().long()
    escaped = 0.0 if wrap else float(((images < low) | (images > high)).double().mean())
    target = target % cells if wrap else target.clamp(0, cells - 1)
    pairs = (torch.arange(cells)[:, None] * cells + target).flatten()
    transition = torch.bincount(pairs, minlength=cells * cells).double().reshape(cells, cells) / samples
    edges = low + width * torch.arange(cells + 1, dtype=torch.float64)
    return Ulam(edges, transition, _stationary_measures(transition), escaped)


def _stationary_measures(transition: Tensor) -> Tensor:
    """One stationary vector for each closed communicating class.

    Eigenvectors at a repeated eigenvalue 1 are arbitrary mixtures, of either sign; the classes of the
    chain are found exactly from its graph, and each class has one stationary vector.
    """
    matrix = transition.numpy()
    count, label = connected_components(csr_array(matrix), directed=True, connection="strong")
    measures = []
    for component in range(count):
        inside = np.flatnonzero(label == component)
        block = matrix[np.ix_(inside, inside)]
        if block.sum(1).min() < 1 - 1e-12:
            continue  # mass leaks out: transient cells
        balance = np.vstack([block.T - np.eye(len(inside)), np.ones(len(inside))])
        weights = np.linalg.lstsq(balance, np.append(np.zeros(len(inside)), 1.0), rcond=None)[0]
        measure = np.zeros(len(matrix))
        measure[inside] = weights.clip(0) / weights.clip(0).sum()
        measures.append(measure)
    return torch.from_numpy(np.stack(measures))


def embedding_norm(
    orbit: Tensor,
    bandwidth: float,
    features: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """Measure the squared norm of an orbit's kernel mean embedding: 1 for a fixed point, else less.

    With the Gaussian kernel, `|m|^2 = E k(Y, Y')` over two independent points of the orbit: an order
    parameter that tells whether the state settles.

    Parameters
    ----------
    orbit : Tensor
        `(steps, ...)` points of the orbit, transient removed.
    bandwidth : float
        Width of the kernel `exp(-|y - y'|^2 / (2 bandwidth^2))`, in units of the state.
    features : int, optional
        Number of random Fourier features. If omitted, the exact mean over all pairs, whose cost is
        quadratic in the number of steps.
    generator : torch.Generator, optional
        Draws the features.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the orbit is empty or not finite, or the bandwidth is not positive.

    Notes
    -----
    Source: kernel mean embeddings of Smola et al. (2007); as an order parameter for equilibria it is
    reconstructed from the use of the Perron-Frobenius operator in arXiv:2207.07475.

    Examples
    --------
    >>> embedding_norm(torch.zeros(10, 2), bandwidth=1.0)
    1.0
    >>> embedding_norm(torch.tensor([[0.0], [1e3]]), bandwidth=1.0)
    0.5
    """
    if orbit.ndim == 0 or len(orbit) == 0:
        raise ValueError(f"orbit must hold at least one step, got shape {tuple(orbit.shape)}: no mean exists")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}: the kernel would be undefined")
    points = orbit.detach().cpu().double().reshape(len(orbit), -1)
    if not torch.isfinite(points).all():
        raise ValueError("orbit must be finite, got nan or inf: a diverged orbit has no invariant measure")
    if features is None:
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        return float(torch.exp(-distances.square() / (2 * bandwidth**2)).mean())
    lift = RandomFourierFeatures(
        points.shape[1], features, bandwidth, generator=generator, device="cpu", dtype=torch.float64
    )
    with torch.no_grad():
        return float(lift(points).mean(0).square().sum())


def circle_embedding_norm(radius: float, bandwidth: float) -> float:
    """Return the `embedding_norm` of a uniform circle: `exp(-q) I_0(q)` with `q = (radius / bandwidth)^2`.

    Parameters
    ----------
    radius, bandwidth : float
        In the same units.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the radius is negative or the bandwidth is not positive.

    Notes
    -----
    Source: Bessel's integral for the mean of `exp(q cos(angle))`; reconstructed.

    Examples
    --------
    >>> round(circle_embedding_norm(1.0, 0.5), 4)
    0.207
    """
    if not radius >= 0 or not bandwidth > 0:
        raise ValueError(
            f"radius must be >= 0 and bandwidth > 0, got {radius} and {bandwidth}: no such circle"
        )
    return float(torch.special.i0e(torch.tensor((radius / bandwidth) ** 2, dtype=torch.float64)))
