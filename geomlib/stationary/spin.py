"""The Bloch map: two-component states that keep their norm are spins on a sphere.

With a stalk of two complex numbers and `|psi_v| = 1` at every node, the dissipative Schrodinger flow is
carried by `s_v = psi_v^* sigma psi_v` onto the damped Landau-Lifshitz equation of a spin on each node (the
claim of arXiv 2507.20088, version 2; the formulas are reconstructed, since its text could not be read).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from geomlib.stationary.graph import SheafGraph

__all__ = [
    "bloch",
    "effective_field",
    "landau_lifshitz",
    "rk4",
    "spin_energy",
    "spinor",
    "spinor_velocity",
]


def bloch(psi: Tensor) -> Tensor:
    """Map two-component states to their spins, `s = psi^* sigma psi`.

    Parameters
    ----------
    psi : Tensor
        `(..., 2)`, complex. Its phase does not matter.

    Returns
    -------
    Tensor
        `(..., 3)`, real, of length `|psi|^2`.

    Raises
    ------
    ValueError
        If `psi` is not complex or its last axis is not 2.

    Notes
    -----
    Source: known (Bloch 1946; Hopf 1931 for the map of spheres).

    Examples
    --------
    >>> bloch(torch.tensor([[1, 0], [0, 1j]], dtype=torch.complex128)).tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]
    """
    _check_spinor(psi)
    up, down = psi.unbind(-1)
    across = 2 * up.conj_physical() * down  # not the lazy conj(), which not every backend resolves
    return torch.stack([across.real, across.imag, up.abs().square() - down.abs().square()], -1)


def spinor(spins: Tensor) -> Tensor:
    """Return the states of unit spins whose first component is real and not negative.

    Parameters
    ----------
    spins : Tensor
        `(..., 3)`, real, of length one.

    Returns
    -------
    Tensor
        `(..., 2)`, complex, of norm one; `bloch(spinor(spins))` is `spins`.

    Raises
    ------
    ValueError
        If the last axis is not 3 or a length is not one.

    Notes
    -----
    Source: known. No choice of phase is continuous on the whole sphere: this one jumps at `(0, 0, -1)`.

    Examples
    --------
    >>> spinor(torch.tensor([0.0, 0.0, 1.0])).real.tolist()
    [1.0, 0.0]
    """
    _check_spins(spins, "spins")
    lengths = spins.norm(dim=-1)
    if bool(((lengths - 1).abs() > 1e-4).any()):
        raise ValueError(
            f"spins must have length 1, got lengths from {float(lengths.min()):.4g} to "
            f"{float(lengths.max()):.4g}: only the sphere has spinors of norm one"
        )
    polar = torch.atan2(spins[..., :2].norm(dim=-1), spins[..., 2])
    azimuth = torch.atan2(spins[..., 1], spins[..., 0])
    up = torch.complex((polar / 2).cos(), torch.zeros_like(polar))
    return torch.stack([up, torch.polar((polar / 2).sin(), azimuth)], -1)


def effective_field(graph: SheafGraph, spins: Tensor, field: Tensor | None = None) -> Tensor:
    """Return the field that each spin feels, `B_v = -sum_u w_uv s_u - h_v`.

    Parameters
    ----------
    graph : SheafGraph
        Plain (without transport).
    spins : Tensor
        `(B, n, 3)`, real.
    field : Tensor, optional
        `(n, 3)` or `(B, n, 3)`: the outer field `h`; none by default.

    Returns
    -------
    Tensor
        `(B, n, 3)`: the gradient of :func:`spin_energy`.

    Raises
    ------
    ValueError
        If a shape does not fit, or the graph has a connection: a spin has no complex stalk to transport.

    Notes
    -----
    Source: reconstructed: the mean-field exchange of a Heisenberg magnet on the learned graph. Since
    `s_v x s_v = 0`, the Laplacian `L s - h` turns the spins exactly as this field does.

    Examples
    --------
    >>> pair = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0]))
    >>> effective_field(pair, torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])).tolist()
    [[[-2.0, 0.0, 0.0], [0.0, 0.0, -2.0]]]
    """
    _check_spins(spins, "spins")
    if graph.transport is not None:
        raise ValueError("graph must have no transport: the exchange of spins is defined on a plain graph")
    if spins.dim() != 3 or spins.shape[1] != graph.nodes:
        raise ValueError(
            f"spins must have shape (B, {graph.nodes}, 3), got {tuple(spins.shape)}: one spin for each node"
        )
    neighbours = graph.laplacian(spins) - graph.degrees()[:, None] * spins
    if field is None:
        return neighbours
    if field.shape not in (spins.shape, spins.shape[1:]):
        raise ValueError(
            f"field must have shape {tuple(spins.shape[1:])} or {tuple(spins.shape)}, got "
            f"{tuple(field.shape)}: one vector for each spin"
        )
    return neighbours - field


def spin_energy(graph: SheafGraph, spins: Tensor, field: Tensor | None = None) -> Tensor:
    """Return `E = -sum_e w_e s_u . s_v - sum_v h_v . s_v`, each edge counted once.

    Parameters
    ----------
    graph, spins, field
        As in :func:`effective_field`.

    Returns
    -------
    Tensor
        `(B,)`.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Notes
    -----
    Source: reconstructed. Along :func:`landau_lifshitz`, `dE/dt = -gamma sum_v |s_v x B_v|^2` for unit spins.

    Examples
    --------
    >>> pair = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0]))
    >>> spin_energy(pair, torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])).tolist()
    [-2.0]
    """
    exchange = effective_field(graph, spins)
    energy = 0.5 * (spins * exchange).sum((1, 2))
    if field is None:
        return energy
    effective_field(graph, spins, field)  # one place checks the shape of the field
    return energy - (spins * field).sum((1, 2))


def landau_lifshitz(graph: SheafGraph, spins: Tensor, field: Tensor | None = None, *, gamma: float) -> Tensor:
    """Return the velocity of damped spins, `B x s + gamma s x (s x B)`.

    Parameters
    ----------
    graph, spins, field
        As in :func:`effective_field`.
    gamma : float
        Damping, not negative. At 0 the energy is conserved.

    Returns
    -------
    Tensor
        `(B, n, 3)`, perpendicular to the spins.

    Raises
    ------
    ValueError
        If `gamma` is negative or a shape does not fit.

    Notes
    -----
    Source: Landau and Lifshitz (1935), with the sign for which the energy falls.

    Examples
    --------
    >>> single = SheafGraph(1, torch.empty(2, 0, dtype=torch.int64), torch.empty(0))
    >>> h, s = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> landau_lifshitz(single, s, h, gamma=0.5).tolist()
    [[[0.0, -1.0, 0.5]]]
    """
    _check_gamma(gamma)
    pull = effective_field(graph, spins, field)
    turn = torch.linalg.cross(pull, spins)
    return turn - gamma * torch.linalg.cross(spins, turn)


def spinor_velocity(graph: SheafGraph, psi: Tensor, field: Tensor | None = None, *, gamma: float) -> Tensor:
    """Return the velocity of the norm-preserving dissipative flow of two-component states.

    With `H_v = B_v . sigma / 2`, it is `-i H_v psi_v - gamma (H_v - <H_v>) psi_v`.

    Parameters
    ----------
    graph : SheafGraph
        Plain.
    psi : Tensor
        `(B, n, 2)`, complex, of norm one at every node.
    field : Tensor, optional
        Real `(n, 3)` or `(B, n, 3)`.
    gamma : float
        Damping, not negative.

    Returns
    -------
    Tensor
        `(B, n, 2)`, complex. Its real inner product with `psi_v` is zero at every node.

    Raises
    ------
    ValueError
        If `gamma` is negative or a shape does not fit.

    Notes
    -----
    Source: reconstructed: subtracting the mean energy is what keeps the norm, and :func:`bloch` then carries
    this flow to :func:`landau_lifshitz` exactly.

    Examples
    --------
    >>> single = SheafGraph(1, torch.empty(2, 0, dtype=torch.int64), torch.empty(0))
    >>> h, psi = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[[1.0 + 0j, 0.0]]])
    >>> spinor_velocity(single, psi, h, gamma=0.5).tolist()  # a spin along the field only turns its phase
    [[[1j, 0j]]]
    """
    _check_gamma(gamma)
    spins = bloch(psi)
    pull = effective_field(graph, spins, field)
    x, y, z = (pull / 2).unbind(-1)
    up, down = psi.unbind(-1)
    moved = torch.stack(
        [z * up + torch.complex(x, -y) * down, torch.complex(x, y) * up - z * down], -1
    )  # H psi
    # <H> of a state of norm one; dividing by |psi|^2 keeps any norm, not only one.
    mean = (psi.conj_physical() * moved).real.sum(-1, keepdim=True) / psi.abs().square().sum(-1, keepdim=True)
    return -1j * moved - gamma * (moved - mean * psi)


def rk4(
    velocity: Callable[[Tensor], Tensor], start: Tensor, *, step: float, steps: int, every: int = 1
) -> Tensor:
    """Integrate `dy/dt = velocity(y)` by the classical Runge-Kutta method of order four.

    Parameters
    ----------
    velocity : callable
        Takes and returns a tensor of the shape of `start`.
    start : Tensor
        Any shape, real or complex.
    step : float
        Length of a step, positive.
    steps : int
        Number of steps.
    every : int
        Keep each `every`-th state; a divisor of `steps`.

    Returns
    -------
    Tensor
        `(steps // every + 1, *start.shape)`: the states kept, with the start.

    Raises
    ------
    ValueError
        If `step` or `steps` is not positive, or `every` does not divide `steps`.

    Notes
    -----
    Source: known (Kutta 1901). Its error over a fixed time is of order `step^4`; it keeps no norm by itself,
    so that the drift of a norm measures it.

    Examples
    --------
    >>> path = rk4(lambda y: -y, torch.ones(()), step=0.1, steps=10, every=5)
    >>> [round(value, 5) for value in path.tolist()]
    [1.0, 0.60653, 0.36788]
    """
    if not (step > 0 and math.isfinite(step)):
        raise ValueError(f"step must be positive and finite, got {step}: time would not pass")
    if steps < 1 or every < 1 or steps % every:
        raise ValueError(
            f"steps must be a positive multiple of every, got {steps} and {every}: "
            "the last state would be lost"
        )
    state, kept = start, [start]
    for number in range(1, steps + 1):
        first = velocity(state)
        second = velocity(state + step / 2 * first)
        third = velocity(state + step / 2 * second)
        fourth = velocity(state + step * third)
        state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
        if number % every == 0:
            kept.append(state)
    return torch.stack(kept)


def _check_spinor(psi: Tensor) -> None:
    if not psi.is_complex() or psi.dim() < 1 or psi.shape[-1] != 2:
        raise ValueError(
            f"psi must be complex with a last axis of 2, got {psi.dtype} of shape {tuple(psi.shape)}: "
            "the Bloch map is of two-component states"
        )


def _check_spins(spins: Tensor, name: str) -> None:
    if not spins.is_floating_point() or spins.dim() < 1 or spins.shape[-1] != 3:
        raise ValueError(
            f"{name} must be real with a last axis of 3, got {spins.dtype} of shape {tuple(spins.shape)}: "
            "a spin is a vector in space"
        )


def _check_gamma(gamma: float) -> None:
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be finite and not negative, got {gamma}: the energy would grow")
