r"""Scale as an operator on systems, and the step as an integrator (arXiv 2601.19551, sections 2 and 3).

A system is `h' = A(h) + B(x)`, `y = C(h) + D(x)`. `scale` gives the system that the rescaled signals obey
(eq. (9)-(13), (17)), exactly and for nonlinear maps; the scalings compose like the positive numbers. A unit
step of the scaled system is a step of length lambda of the base system: the whole of the printed update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Map", "System", "euler_step", "integrate", "printed_step", "scale", "trajectory"]

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class System:
    """Four time-invariant maps: `h' = A(h) + B(x)`, `y = C(h) + D(x)`.

    Attributes
    ----------
    A : callable
        Transition, state to velocity.
    B : callable
        Input map, input to velocity.
    C : callable
        Readout, state to output.
    D : callable
        Feed-through, input to output.

    Notes
    -----
    Source: eq. (1)-(2).

    Examples
    --------
    >>> decay = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: 0 * x)
    >>> decay.velocity(torch.tensor(1.0), torch.tensor(3.0))
    tensor(2.)
    """

    A: Map
    B: Map
    C: Map
    D: Map

    def velocity(self, state: Tensor, x: Tensor) -> Tensor:
        """Return `A(h) + B(x)`."""
        return self.A(state) + self.B(x)

    def output(self, state: Tensor, x: Tensor) -> Tensor:
        """Return `C(h) + D(x)`."""
        return self.C(state) + self.D(x)


def scale(system: System, lam: float | Tensor, hurst: float | Tensor) -> System:
    r"""Return the system that `h_lambda(t) = h(lambda t)` obeys under the input `lambda^(-H) x(lambda t)`.

    `A` becomes `lambda A(h)`, `B` `lambda B(lambda^H x)`, `C` `lambda^(-H) C(h)` and `D`
    `lambda^(-H) D(lambda^H x)`.

    Parameters
    ----------
    system : System
        Any maps, nonlinear ones too.
    lam : float or Tensor
        The scale, positive; a tensor is 0-dimensional and carries its gradient.
    hurst : float or Tensor
        The exponent `H`, any number.

    Returns
    -------
    System
        `scale(scale(s, mu, H), lam, H)` is `scale(s, lam * mu, H)`, and `scale(s, 1, H)` is `s`.

    Raises
    ------
    ValueError
        If `lam` is a number and not positive.

    Notes
    -----
    Source: eq. (13) and (17); Proposition 3.4 names the family self-similar, the group law is reconstructed.

    Examples
    --------
    >>> base = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: x)
    >>> half = scale(base, 0.25, 0.5)
    >>> half.A(torch.tensor(1.0)), half.B(torch.tensor(1.0)), half.C(torch.tensor(1.0))
    (tensor(-0.2500), tensor(0.1250), tensor(2.))
    """
    _positive(lam=lam)
    up, down = lam**hurst, lam ** (-hurst)
    return System(
        lambda h: lam * system.A(h),
        lambda x: lam * system.B(up * x),
        lambda h: down * system.C(h),
        lambda x: down * system.D(up * x),
    )


def euler_step(system: System, state: Tensor, x: Tensor, length: float | Tensor = 1.0) -> Tensor:
    """Return `h + length (A(h) + B(x))`, the exact flow of a field that is frozen over the step.

    Notes
    -----
    Source: Lemma 2.1 and eq. (3)-(4).

    Examples
    --------
    >>> decay = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: x)
    >>> euler_step(decay, torch.tensor(1.0), torch.tensor(3.0), 0.5)
    tensor(2.)
    """
    return state + length * system.velocity(state, x)


def printed_step(
    system: System, state: Tensor, x: Tensor, lam: float | Tensor, hurst: float | Tensor
) -> Tensor:
    """Return the update as it is printed, `(1 - lambda) h + lambda h + A_lambda(h) + B_lambda(x)`.

    The two terms with `lambda h` cancel: it is `euler_step` of the scaled system. For the comparison only,
    models take the short form. As printed `x` is not rescaled, so that `B_lambda(x) = lambda B(lambda^H x)`.

    Notes
    -----
    Source: eq. (14)-(15).

    Examples
    --------
    >>> decay = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: x)
    >>> printed_step(decay, torch.tensor(1.0), torch.tensor(4.0), 0.25, 0.5)
    tensor(1.2500)
    """
    scaled = scale(system, lam, hurst)
    refinement = lam * state + scaled.A(state) + scaled.B(x)
    return (1 - lam) * state + refinement


def trajectory(system: System, state: Tensor, x: Tensor, steps: int, length: float | Tensor = 1.0) -> Tensor:
    """Iterate `euler_step` under a constant input and return all states, the first included.

    Parameters
    ----------
    system : System
        To integrate.
    state : Tensor
        At time 0.
    x : Tensor
        The input.
    steps : int
        Number of steps.
    length : float or Tensor
        Of each.

    Returns
    -------
    Tensor
        `(steps + 1, ...)`; state `k` stands at time `k * length`.

    Raises
    ------
    ValueError
        If `steps` is negative or `length` a number and not positive.

    Notes
    -----
    Source: eq. (4); with a length other than 1 the refinement of Definition 3.1, reconstructed.

    Examples
    --------
    >>> decay = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: x)
    >>> trajectory(decay, torch.tensor(8.0), torch.tensor(0.0), 3, 0.5)
    tensor([8., 4., 2., 1.])
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}: time runs forward")
    _positive(length=length)
    states = [state]
    forcing = system.B(x)
    for _ in range(steps):
        state = state + length * (system.A(state) + forcing)
        states.append(state)
    return torch.stack(states)


def integrate(
    system: System, state: Tensor, signal: Callable[[float], Tensor], duration: float, steps: int
) -> Tensor:
    """Follow the continuous system under `x = signal(t)` by the classical Runge-Kutta method.

    Parameters
    ----------
    system : System
        To integrate.
    state : Tensor
        At time 0.
    signal : callable
        Time to input.
    duration : float
        Until when.
    steps : int
        Number of equal steps; the error falls with their fourth power.

    Returns
    -------
    Tensor
        `(steps + 1, ...)`, the state at equal intervals, the first included.

    Raises
    ------
    ValueError
        If `steps < 1` or `duration` is not positive.

    Notes
    -----
    Source: Runge-Kutta of order four, known; the reference for Lemma 3.3.

    Examples
    --------
    >>> decay = System(lambda h: -h, lambda x: x, lambda h: h, lambda x: x)
    >>> path = integrate(decay, torch.tensor(1.0), lambda t: torch.tensor(0.0), 1.0, 100)
    >>> path[-1], path.shape
    (tensor(0.3679), torch.Size([101]))
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: nothing would be integrated")
    _positive(duration=duration)
    length, states = duration / steps, [state]
    for k in range(steps):
        start = k * length
        first, middle, last = (system.B(signal(start + part * length)) for part in (0.0, 0.5, 1.0))
        k1 = system.A(state) + first
        k2 = system.A(state + 0.5 * length * k1) + middle
        k3 = system.A(state + 0.5 * length * k2) + middle
        k4 = system.A(state + length * k3) + last
        state = state + (length / 6) * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(state)
    return torch.stack(states)


def _positive(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}: time would stand still or turn back")
