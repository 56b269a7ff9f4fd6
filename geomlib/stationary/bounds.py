"""Bounds of the generalisation gap that count learned edges: uniform, through depth, and PAC-Bayes.

The claim is of the abstract of arXiv 2507.20088; the bounds are reconstructed from the one inequality of the
room, strong monotonicity with modulus `mu`, and from textbook covering arguments. They are loose by factors
of ten to a hundred. What they teach is how a gap depends on the edges, the degree, `mu` and the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "DepthSensitivity",
    "EdgeCountBound",
    "PacBayesBound",
    "depth_sensitivity",
    "edge_count_bound",
    "pac_bayes_bound",
    "weight_sensitivity",
]


def weight_sensitivity(
    *, degree: int, drive_bound: float, mu: float, output_lipschitz: float = 1.0, readout_norm: float = 1.0
) -> float:
    """Return how much the loss can change for each unit of the largest change of a weight (one layer).

    Parameters
    ----------
    degree : int
        Largest degree that the learned graphs may have.
    drive_bound : float
        Largest norm of a drive.
    mu : float
        Modulus of strong monotonicity.
    output_lipschitz, readout_norm : float
        Lipschitz constant of the loss in the output, and norm of the linear readout.

    Returns
    -------
    float
        `2 output_lipschitz readout_norm degree drive_bound / mu^2`.

    Raises
    ------
    ValueError
        If a number is negative or `mu` is not positive.

    Notes
    -----
    Source: reconstructed: the last link of :func:`geomlib.stationary.lipschitz_chain`.

    Examples
    --------
    >>> weight_sensitivity(degree=14, drive_bound=6.0, mu=0.5)
    672.0
    """
    _check_positive("mu", mu, "the layer would not be strongly monotone")
    for name, value in (
        ("degree", degree),
        ("drive_bound", drive_bound),
        ("output_lipschitz", output_lipschitz),
        ("readout_norm", readout_norm),
    ):
        _check_not_negative(name, value)
    return 2 * output_lipschitz * readout_norm * degree * drive_bound / mu**2


@dataclass(frozen=True)
class EdgeCountBound:
    """A bound of the generalisation gap that holds for all graphs with at most so many edges (C2).

    Attributes
    ----------
    gap : float
        `grid + sqrt((weights + supports + confidence) / (2 N))`.
    grid : float
        `2 t`: the price of rounding the weights to a grid.
    weights : float
        `s log(1 + W Lambda / t)`: nats to write the weights on that grid.
    supports : float
        `log binomial(M, s)`: nats to write which candidates are edges.
    confidence : float
        `log(1 / delta)`.
    """

    gap: float
    grid: float
    weights: float
    supports: float
    confidence: float


def edge_count_bound(
    edges: int,
    candidates: int,
    samples: int,
    *,
    sensitivity: float,
    largest_weight: float,
    delta: float = 0.05,
    resolution: float | None = None,
    any_count: bool = False,
) -> EdgeCountBound:
    """Bound the gap between risk and training loss uniformly over sparse graphs (C2).

    Parameters
    ----------
    edges : int
        Largest number of learned edges, `s`.
    candidates : int
        Number of candidate edges, `M`.
    samples : int
        Number of training samples, `N`.
    sensitivity : float
        `Lambda`, of :func:`weight_sensitivity` or :func:`depth_sensitivity`.
    largest_weight : float
        Weights lie in `[0, W]`.
    delta : float
        Probability with which the bound may fail.
    resolution : float, optional
        `t`, fixed before the data are seen; `N^-1/2` by default.
    any_count : bool
        Whether the bound is to hold for every `s` at once, which divides `delta` by the candidates.

    Returns
    -------
    EdgeCountBound
        For a loss in `[0, 1]`.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: reconstructed: a grid of weights, Hoeffding's inequality at each grid point, and a union over
    grid points and supports. The dense model is `edges = candidates`.

    Examples
    --------
    >>> bound = edge_count_bound(12, 105, 10**6, sensitivity=576.0, largest_weight=2.0)
    >>> round(bound.gap, 3)
    0.012
    """
    _check_counts(edges, candidates, samples, delta)
    _check_not_negative("sensitivity", sensitivity)
    _check_positive("largest_weight", largest_weight, "there would be no weights to learn")
    t = samples**-0.5 if resolution is None else resolution
    _check_positive("resolution", t, "the grid would be infinitely fine")
    weights = edges * math.log1p(largest_weight * sensitivity / t)
    supports = _log_binomial(candidates, edges)
    confidence = math.log((max(candidates, 1) if any_count else 1) / delta)
    gap = 2 * t + math.sqrt((weights + supports + confidence) / (2 * samples))
    return EdgeCountBound(gap, 2 * t, weights, supports, confidence)


@dataclass(frozen=True)
class DepthSensitivity:
    """How much the loss of a stack can change with the weights of its layers (C3).

    Attributes
    ----------
    total : float
        The sensitivity for all weights together, to be given to the other bounds.
    layers : tuple of float
        Share of each layer.
    drives : tuple of float
        Bound of the norm of each layer's drive.
    """

    total: float
    layers: tuple[float, ...]
    drives: tuple[float, ...]


def depth_sensitivity(
    *,
    degrees: Sequence[int],
    mus: Sequence[float],
    map_norms: Sequence[float],
    bias_norms: Sequence[float],
    input_norm: float,
    fans: Sequence[int] | None = None,
    output_lipschitz: float = 1.0,
    readout_norm: float = 1.0,
) -> DepthSensitivity:
    """Return the sensitivity of a stack of stationary layers to its weights (C3).

    Parameters
    ----------
    degrees, mus, map_norms, bias_norms : sequence
        Of each layer: largest degree, modulus, norm of the map `K` into it, norm of its bias.
    input_norm : float
        Largest norm of an input.
    fans : sequence of int, optional
        If the entries of the maps are learned too: the most non-zeros in a row or column of each.
    output_lipschitz, readout_norm : float
        As in :func:`weight_sensitivity`.

    Returns
    -------
    DepthSensitivity

    Raises
    ------
    ValueError
        If the sequences differ in length or a number is out of range.

    Notes
    -----
    Source: reconstructed. A change in layer `l` moves its state by `2 degree R_l / mu_l^2`, and each later
    layer passes it on with factor `|K_j| / mu_j`. A change of a map's entries by at most `x` changes its
    norm by at most `fan x` (Schur's test), hence the drive by `fan x R_(l-1) / mu_(l-1)`. The edges that
    the other bounds count are those of the supra-graph: the layers' edges, and the maps' entries if learned.

    Examples
    --------
    >>> options = {"map_norms": [1.0, 2.0], "bias_norms": [0.0, 0.0], "input_norm": 3.0}
    >>> depth_sensitivity(degrees=[2, 2], mus=[1.0, 1.0], **options)
    DepthSensitivity(total=48.0, layers=(24.0, 24.0), drives=(3.0, 6.0))
    """
    depth = len(degrees)
    lengths = [len(each) for each in (degrees, mus, map_norms, bias_norms, fans or degrees)]
    if depth == 0 or set(lengths) != {depth}:
        raise ValueError(f"every sequence must have one entry for each layer, got lengths {lengths}")
    for mu in mus:
        _check_positive("mus", mu, "a layer would not be strongly monotone")
    for name, values in (("degrees", degrees), ("map_norms", map_norms), ("bias_norms", bias_norms)):
        for value in values:
            _check_not_negative(name, value)
    for name, value in (
        ("input_norm", input_norm),
        ("output_lipschitz", output_lipschitz),
        ("readout_norm", readout_norm),
    ):
        _check_not_negative(name, value)
    below, drives, shares = input_norm, [], []
    for layer in range(depth):
        drive = map_norms[layer] * below + bias_norms[layer]
        moved = 2 * degrees[layer] * drive / mus[layer] ** 2
        if fans is not None:
            moved += fans[layer] * below / mus[layer]
        passed = math.prod(map_norms[j] / mus[j] for j in range(layer + 1, depth))
        shares.append(output_lipschitz * readout_norm * moved * passed)
        drives.append(drive)
        below = drive / mus[layer]
    return DepthSensitivity(math.fsum(shares), tuple(shares), tuple(drives))


@dataclass(frozen=True)
class PacBayesBound:
    """A PAC-Bayes bound of the gap of a sparse graph (C4).

    Attributes
    ----------
    gap : float
        `blur + sqrt((divergence + confidence) / (2 N))`.
    blur : float
        `2 Lambda r`: the price of a posterior that is a box around the weights.
    divergence : float
        Kullback-Leibler divergence of posterior and prior, in nats.
    confidence : float
        `log(2 sqrt(N) / delta)`.
    radius : float
        `r`, half the side of the box.
    """

    gap: float
    blur: float
    divergence: float
    confidence: float
    radius: float


def pac_bayes_bound(
    edges: int,
    candidates: int,
    samples: int,
    *,
    sensitivity: float,
    largest_weight: float,
    delta: float = 0.05,
    radius: float | None = None,
) -> PacBayesBound:
    """Bound the gap by PAC-Bayes, with a prior that draws a number of edges, a support, and weights (C4).

    Parameters
    ----------
    edges, candidates, samples, sensitivity, largest_weight, delta
        As in :func:`edge_count_bound`; no count of edges is fixed before the data are seen.
    radius : float, optional
        Half the side of the posterior's box, at most `W / 2`; `N^-1/2 / Lambda` by default.

    Returns
    -------
    PacBayesBound
        For a loss in `[0, 1]` and weights of edges in `[r, W - r]`; see the notes for the rest.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: known technique (McAllester 1999, with the constant of Maurer 2004); the prior is reconstructed.
    The posterior is a box of half side `r` around the weights of the edges, so the bound is for weights in
    `[r, W - r]`. Nearer to an end the box has to be shifted inside, by at most `r`; a bound for all of
    `[0, W]` is therefore `gap + blur`. It is uniform in the count of edges.

    Examples
    --------
    >>> bound = pac_bayes_bound(12, 105, 10**6, sensitivity=576.0, largest_weight=2.0)
    >>> round(bound.gap, 3)
    0.012
    """
    _check_counts(edges, candidates, samples, delta)
    _check_not_negative("sensitivity", sensitivity)
    _check_positive("largest_weight", largest_weight, "there would be no weights to learn")
    r = radius
    if r is None:
        r = largest_weight / 2
        if sensitivity > 0:
            r = min(r, samples**-0.5 / sensitivity)
    if not 0 < r <= largest_weight / 2:
        raise ValueError(
            f"radius must lie in (0, {largest_weight / 2:g}], got {r}: "
            "the posterior must lie in the prior's box"
        )
    divergence = math.log(max(candidates, 1)) + _log_binomial(candidates, edges)
    divergence += edges * math.log(largest_weight / (2 * r))
    confidence = math.log(2 * math.sqrt(samples) / delta)
    blur = 2 * sensitivity * r
    gap = blur + math.sqrt((divergence + confidence) / (2 * samples))
    return PacBayesBound(gap, blur, divergence, confidence, r)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _check_positive(name: str, value: float, consequence: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}: {consequence}")


def _check_not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and not negative, got {value}: it bounds a size")


def _check_counts(edges: int, candidates: int, samples: int, delta: float) -> None:
    if not 0 <= edges <= candidates:
        raise ValueError(f"edges must lie between 0 and the {candidates} candidates, got {edges}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: nothing would be measured")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}: it is a probability of failure")
