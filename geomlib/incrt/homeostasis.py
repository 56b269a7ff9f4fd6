r"""Growth and pruning together on a moving operator: when heads come to rest, and when they chatter.

A head is added when the residual top eigenvalue exceeds `theta`, and removed when the energy that its
direction captures, `q^T A q`, falls below `phi`. With `phi < theta` every head lives at least `(theta -
phi) / v` steps if the operator moves by at most `v` a step in the spectral norm (INCRT-12); otherwise heads
come and go at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from geomlib.incrt.operator import check_square, sym
from geomlib.incrt.spectrum import extreme_eigenpairs, orthonormalise

__all__ = ["Homeostasis", "StructuralEvent", "homeostasis"]


class StructuralEvent(NamedTuple):
    """A birth or a removal.

    Attributes
    ----------
    step
        Place of the operator in the sequence.
    kind
        `"grow"` or `"prune"`.
    head
        Number of the head, counted over all births.
    energy
        What its direction captured of the operator at that step.
    """

    step: int
    kind: Literal["grow", "prune"]
    head: int
    energy: float


class Homeostasis(NamedTuple):
    """Record of growth and pruning along a sequence of operators.

    Attributes
    ----------
    events
        In order, at most one a step.
    heads
        Number of heads after each step `(T,)`, int64.
    drift
        Largest move of the operator between neighbours, in the spectral norm.
    Q
        `(d, m)`: the directions held at the end, in the order of birth.
    """

    events: list[StructuralEvent]
    heads: Tensor
    drift: float
    Q: Tensor

    def lifetimes(self) -> list[int]:
        """Return the steps from birth to removal of each head that was removed."""
        born = {event.head: event.step for event in self.events if event.kind == "grow"}
        return [event.step - born[event.head] for event in self.events if event.kind == "prune"]


@torch.no_grad()
def homeostasis(
    operators: Iterable[Tensor], theta: float, phi: float, *, hysteresis: bool = True
) -> Homeostasis:
    r"""Let heads grow and go along a sequence of symmetric operators, one event a step at most.

    Parameters
    ----------
    operators
        `(d, d)` each, symmetric; the same one again and again for a stationary process.
    theta
        A head grows when the residual top eigenvalue exceeds it; positive.
    phi
        The head of least captured energy goes when that is below it. Removal is looked at first.
    hysteresis
        Refuse `phi >= theta`; without it the chattering can be watched.

    Returns
    -------
    Homeostasis

    Raises
    ------
    ValueError
        If a threshold is out of range, or the operators are none, not finite, or of different widths.

    Notes
    -----
    Source: thresholds `theta_w` and `phi_g` of arXiv 2604.10703, in one unit (the author's code compares
    `phi_g` with another energy). Reconstructed: the process and its bounds. The quotient of a fixed
    direction moves by at most `v` a step (Weyl), is above `theta` at birth and below `phi` at removal.

    Examples
    --------
    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0, -6.0]))
    >>> rest = homeostasis([A] * 10, theta=1.5, phi=0.5)
    >>> rest.heads.tolist()
    [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    >>> len(homeostasis([A] * 10, theta=1.5, phi=2.5, hysteresis=False).events)
    10
    """
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}: heads would grow on nothing")
    if hysteresis and not phi < theta:
        raise ValueError(
            f"phi must be below theta = {theta}, got {phi}: heads would grow and go at every step"
        )
    events: list[StructuralEvent] = []
    heads: list[int] = []
    alive: list[int] = []
    births, drift = 0, 0.0
    Q: Tensor | None = None
    previous: Tensor | None = None
    for step, A in enumerate(operators):
        check_square(A, "operators")
        if not bool(A.isfinite().all()):
            raise ValueError(f"operators must be finite, got a NaN or an infinity at step {step}")
        if previous is not None:
            if previous.shape != A.shape:
                raise ValueError(
                    f"operators must have one shape, got {tuple(previous.shape)} and {tuple(A.shape)}"
                )
            drift = max(drift, float(torch.linalg.matrix_norm(A - previous, 2)))
        previous = A
        Q = A.new_zeros(len(A), 0) if Q is None else Q
        energy = ((A @ Q) * Q).sum(0)
        if alive and float(energy.min()) < phi:
            column = int(energy.argmin())
            events.append(StructuralEvent(step, "prune", alive.pop(column), float(energy[column])))
            Q = torch.cat([Q[:, :column], Q[:, column + 1 :]], 1)
        elif Q.shape[1] < len(A):
            left = A - Q @ (Q.mT @ A)
            found = extreme_eigenpairs(sym(left - (left @ Q) @ Q.mT))
            if float(found.top) > theta:
                Q = torch.cat([Q, orthonormalise(found.u_top, Q).unsqueeze(1)], 1)
                events.append(StructuralEvent(step, "grow", births, float(found.top)))
                alive.append(births)
                births += 1
        heads.append(len(alive))
    if Q is None:
        raise ValueError("operators must hold at least one matrix: nothing would be watched")
    return Homeostasis(events, torch.tensor(heads), drift, Q)
