"""Maps whose spectra, limits or attractors are known exactly: the ground truth of tests and chapters.

Each is a plain function from a batch of states to the next. None comes from arXiv:2207.07475, whose
experiments are learning tasks; they are the smallest cases in which a statement about stable invariant
models can be seen to hold. The copy task at the end is the paper's own (data of its public code).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "copy_memory",
    "orbit",
    "polynomial_deq",
    "polynomial_dictionary",
    "polynomial_equilibrium",
    "rotation_tanh",
    "stuart_landau",
    "stuart_landau_eigenfunctions",
    "van_der_pol",
    "van_der_pol_orbits",
]


def orbit(f: Callable[[Tensor], Tensor], state: Tensor, steps: int) -> Tensor:
    """Iterate a map and keep every state.

    Parameters
    ----------
    f : callable
        One step.
    state : Tensor
        Start, any shape.
    steps : int
        Number of steps.

    Returns
    -------
    Tensor
        `(steps + 1, *state.shape)`, the start included.

    Raises
    ------
    ValueError
        If `steps` is negative.

    Examples
    --------
    >>> orbit(lambda z: z / 2, torch.tensor(1.0), 3).tolist()
    [1.0, 0.5, 0.25, 0.125]
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}: a map cannot be undone")
    states = [state]
    for _ in range(steps):
        states.append(f(states[-1]))
    return torch.stack(states)


def stuart_landau(state: Tensor, *, mu: float = 1.0, omega: float = 1.0, dt: float = 0.3) -> Tensor:
    """Advance the Stuart-Landau oscillator `r' = r (mu - r^2)`, `theta' = omega` exactly by `dt`.

    Its limit cycle is the circle of radius `sqrt(mu)`.

    Parameters
    ----------
    state : Tensor
        `(..., 2)` Cartesian coordinates, not the origin.
    mu, omega, dt : float
        Growth rate (positive), angular velocity and time step.

    Returns
    -------
    Tensor
        `(..., 2)`.

    Raises
    ------
    ValueError
        If `mu` is not positive or the last axis is not 2.

    Notes
    -----
    Source: textbook normal form of the Hopf bifurcation; `1 / r^2` obeys a linear equation.

    Examples
    --------
    >>> on_cycle = torch.tensor([0.0, 2.0])
    >>> round(stuart_landau(on_cycle, mu=4.0).norm().item(), 5)
    2.0
    """
    _planar(state)
    if not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}: there is no limit cycle")
    inverse_square = state.square().sum(-1, keepdim=True).reciprocal()
    inverse_square = 1 / mu + (inverse_square - 1 / mu) * math.exp(-2 * mu * dt)
    direction = state / state.norm(dim=-1, keepdim=True)
    return _rotate(direction, omega * dt) * inverse_square.rsqrt()


def stuart_landau_eigenfunctions(state: Tensor, *, mu: float = 1.0) -> tuple[Tensor, Tensor]:
    """Evaluate two exact Koopman eigenfunctions of `stuart_landau`.

    Parameters
    ----------
    state : Tensor
        `(..., 2)`.
    mu : float
        As in `stuart_landau`.

    Returns
    -------
    phase : Tensor
        `(...)` complex, `exp(i theta)`, eigenvalue `exp(i omega dt)`: what survives.
    decay : Tensor
        `(...)` real, `1 / r^2 - 1 / mu`, eigenvalue `exp(-2 mu dt)`: what dies.

    Examples
    --------
    >>> phase, decay = stuart_landau_eigenfunctions(torch.tensor([0.0, 1.0]))
    >>> phase.item(), decay.item()
    (1j, 0.0)
    """
    _planar(state)
    radius = state.norm(dim=-1)
    return torch.complex(state[..., 0], state[..., 1]) / radius, radius.pow(-2) - 1 / mu


def van_der_pol(state: Tensor, *, mu: float = 1.0, dt: float = 0.25, substeps: int = 20) -> Tensor:
    """Advance the van der Pol oscillator `x'' = mu (1 - x^2) x' - x` by `dt`.

    At `mu = 1` the limit cycle has period 6.6633.

    Parameters
    ----------
    state : Tensor
        `(..., 2)`: position and velocity.
    mu, dt : float
        Damping and time step.
    substeps : int
        Classical Runge-Kutta steps inside `dt`.

    Returns
    -------
    Tensor
        `(..., 2)`.

    Raises
    ------
    ValueError
        If `substeps` is below 1 or the last axis is not 2.

    Examples
    --------
    >>> van_der_pol(torch.zeros(2)).tolist()
    [0.0, 0.0]
    """
    _planar(state)
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}: time would not advance")

    def velocity(z: Tensor) -> Tensor:
        x, v = z.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    h = dt / substeps
    for _ in range(substeps):
        k1 = velocity(state)
        k2 = velocity(state + h / 2 * k1)
        k3 = velocity(state + h / 2 * k2)
        k4 = velocity(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def van_der_pol_orbits(
    count: int,
    steps: int,
    *,
    mu: float = 1.0,
    dt: float = 0.25,
    spread: float = 3.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw starts uniformly from a square and follow them.

    Parameters
    ----------
    count, steps : int
        Number of orbits and of steps in each.
    mu, dt : float
        As in `van_der_pol`.
    spread : float
        Half the side of the square.
    generator : torch.Generator, optional
        Draws the starts.

    Returns
    -------
    Tensor
        `(count, steps + 1, 2)` in the default dtype.

    Raises
    ------
    ValueError
        If `count` is below 1 or `steps` is negative.

    Examples
    --------
    >>> van_der_pol_orbits(5, 8, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([5, 9, 2])
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: there would be no orbit")
    start = (torch.rand(count, 2, generator=generator) * 2 - 1) * spread
    return orbit(lambda z: van_der_pol(z, mu=mu, dt=dt), start, steps).transpose(0, 1)


def rotation_tanh(state: Tensor, gain: float, *, angle: float = 0.5) -> Tensor:
    """Advance `z' = tanh(gain R(angle) z)`: a root at 0 that repels once `gain` exceeds 1.

    There the fixed point gives birth to an attracting closed curve (Neimark-Sacker bifurcation), and a
    root solver no longer finds what the iteration does.

    Parameters
    ----------
    state : Tensor
        `(..., 2)`.
    gain, angle : float
        Both eigenvalues of the Jacobian at 0 have modulus `gain` and argument `+-angle`.

    Returns
    -------
    Tensor
        `(..., 2)`.

    Raises
    ------
    ValueError
        If the last axis is not 2.

    Examples
    --------
    >>> rotation_tanh(torch.zeros(2), 1.2).tolist()
    [0.0, 0.0]
    """
    _planar(state)
    return torch.tanh(gain * _rotate(state, angle))


def polynomial_deq(state: Tensor, x: Tensor) -> Tensor:
    """Advance a nonlinear equilibrium model whose Koopman dictionary closes.

    `z1' = 0.7 z1 + 0.3 x`, `z2' = 0.5 z2 + 1.3 z1^2`, with the input `x` held fixed.

    Parameters
    ----------
    state : Tensor
        `(..., 2)`.
    x : Tensor
        `(...)`.

    Returns
    -------
    Tensor
        `(..., 2)`.

    Raises
    ------
    ValueError
        If the last axis is not 2.

    Examples
    --------
    >>> x = torch.tensor([2.0])
    >>> equilibrium = polynomial_equilibrium(x)
    >>> bool(torch.allclose(polynomial_deq(equilibrium, x), equilibrium))
    True
    """
    _planar(state)
    z1, z2 = state.unbind(-1)
    return torch.stack([0.7 * z1 + 0.3 * x, 0.5 * z2 + 1.3 * z1.square()], -1)


def polynomial_dictionary(state: Tensor, x: Tensor) -> Tensor:
    """Lift to `(1, x, x^2, z1, z1 x, z1^2, z2)`, which `polynomial_deq` maps to itself linearly.

    The eigenvalues are `1, 1, 1, 0.7, 0.7, 0.5, 0.49`.

    Parameters
    ----------
    state : Tensor
        `(..., 2)`.
    x : Tensor
        `(...)`.

    Returns
    -------
    Tensor
        `(..., 7)`.

    Examples
    --------
    >>> polynomial_dictionary(torch.tensor([3.0, 5.0]), torch.tensor(2.0)).tolist()
    [1.0, 2.0, 4.0, 3.0, 6.0, 9.0, 5.0]
    """
    _planar(state)
    z1, z2 = state.unbind(-1)
    return torch.stack([torch.ones_like(x), x, x.square(), z1, z1 * x, z1.square(), z2], -1)


def polynomial_equilibrium(x: Tensor) -> Tensor:
    """Return the equilibrium `(x, 2.6 x^2)` of `polynomial_deq`.

    Parameters
    ----------
    x : Tensor
        `(...)`.

    Returns
    -------
    Tensor
        `(..., 2)`.

    Examples
    --------
    >>> [round(z, 4) for z in polynomial_equilibrium(torch.tensor(2.0)).tolist()]
    [2.0, 10.4]
    """
    return torch.stack([x, 2.6 * x.square()], -1)


def copy_memory(
    count: int,
    delay: int,
    symbols: int = 10,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the copy-memory task: symbols, a delay, then a signal to repeat them.

    With `L` symbols and delay `T`, the input is the symbols (1 to 8), `T - 1` zeros and `L + 1` nines;
    the target is `L + T` zeros and then the symbols. Both have length `T + 2 L`.

    Parameters
    ----------
    count : int
        Number of sequences.
    delay : int
        `T`, at least 1.
    symbols : int
        `L`, at least 1.
    generator : torch.Generator, optional
        Draws the symbols.

    Returns
    -------
    x, y : Tensor
        `(count, T + 2 L)` int64 each.

    Raises
    ------
    ValueError
        If an argument is below 1.

    Notes
    -----
    Source: data generation of the paper's public code, with `T = 500` and `L = 10` there.

    Examples
    --------
    >>> x, y = copy_memory(1, delay=3, symbols=2, generator=torch.Generator().manual_seed(0))
    >>> x.tolist(), y.tolist()
    ([[5, 8, 0, 0, 9, 9, 9]], [[0, 0, 0, 0, 0, 5, 8]])
    """
    for name, value in (("count", count), ("delay", delay), ("symbols", symbols)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: there would be nothing to remember")
    drawn = torch.randint(1, 9, (count, symbols), generator=generator)
    wait, signal = drawn.new_zeros(count, delay - 1), drawn.new_full((count, symbols + 1), 9)
    silence = drawn.new_zeros(count, symbols + delay)
    return torch.cat([drawn, wait, signal], 1), torch.cat([silence, drawn], 1)


def _rotate(state: Tensor, angle: float) -> Tensor:
    """Turn `(..., 2)` counter-clockwise."""
    x, y = state.unbind(-1)
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def _planar(state: Tensor) -> None:
    if state.ndim == 0 or state.shape[-1] != 2:
        raise ValueError(f"state must be (..., 2), got shape {tuple(state.shape)}: this system is planar")
