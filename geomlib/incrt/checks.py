r"""What a check looks at: gradients brought into the motor, weak heads, stale directions, shrunken tokens."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.growth import GrowthConfig, LayerGrowth
from geomlib.incrt.motor import GradientMotor, HeadsMotor, motor_statistics
from geomlib.incrt.operator import residual_operator
from geomlib.incrt.processes import mean_over, reduced
from geomlib.incrt.pruning import directional_energy

__all__ = ["absorb", "captures_little", "refresh", "watch_scatter"]

SHRUNK = 0.5
"""Share of the first scatter below which tokens count as collapsed."""


def absorb(growth: LayerGrowth, attention: DirectionalAttention, scale: float) -> None:
    """Bring what was recorded into the running means, alike in all processes."""
    motor = growth.motor
    wants_gradient = isinstance(motor, GradientMotor)
    found = [
        motor_statistics(
            seen.delta if wants_gradient else None, seen.x, seen.mask, attention.causal,
            scale=scale, dtype=motor.S.dtype,
        )
        for seen in attention.recorded
    ]  # fmt: skip
    total = found[0]
    for part in found[1:]:
        total = total.combine(part)
    total = reduced(total)
    if isinstance(motor, HeadsMotor):
        motor.absorb(total, attention.W_Q.detach(), attention.W_K.detach())
    else:
        motor.absorb(total)


def captures_little(growth: LayerGrowth, attention: DirectionalAttention, config: GrowthConfig) -> Tensor:
    """Return which heads capture little directed energy, `(H,)` bool."""
    motor = growth.motor
    if config.motor in ("grad", "plateau"):
        energy = directional_energy(motor.S, attention.W_Q.detach(), attention.W_K.detach())
        ordered, heads = energy.sort().values, attention.active
        return energy < config.phi_g * (ordered[(heads - 1) // 2] + ordered[heads // 2]) / 2
    columns = growth.columns[: attention.active]
    A = residual_operator(motor.S, motor.Ma)
    q = growth.gate.held[:, columns.clamp_min(0)]
    captured = (q * (A @ q)).sum(0)
    return (captured < config.phi_g * growth.gate.threshold()) & (columns >= 0)


def refresh(growth: LayerGrowth, attention: DirectionalAttention) -> None:
    """Give each head the direction that it captures now, in the order of capture."""
    held = [int(column) for column in growth.columns[: attention.active]]
    slots = sorted((slot for slot, column in enumerate(held) if column >= 0), key=lambda slot: held[slot])
    fresh = []
    for slot in slots:
        form = (attention.W_Q[slot] @ attention.W_K[slot].mT).detach().to(growth.motor.S)
        A = residual_operator(growth.motor.S, (form - form.mT) / 2)
        fresh.append(torch.linalg.eigh(A).eigenvectors[:, -1])
    if fresh:
        growth.gate.refresh(torch.stack(fresh, 1))


@torch.no_grad()
def watch_scatter(growth: LayerGrowth, tokens: Tensor, index: int) -> None:
    """Compare the scatter of tokens `(N, d)` to what it was at first, and warn once when they have collapsed.

    Notes
    -----
    Source: reconstructed. Scatter is the trace of the covariance. An encoder can lower a quantisation loss
    that reaches its tokens by making them alike; the scatter of tokens that it does not reach was never below
    0.71 of that of the first check (copies of three predecessors, d = 32, 16 prototypes, four runs).
    """
    scatter = mean_over(tokens.to(growth.scatter).var(0, correction=0).sum())
    if not bool(growth.scatter > 0):
        growth.scatter.copy_(scatter)
    elif not bool(growth.collapsed) and bool(scatter < SHRUNK * growth.scatter):
        growth.collapsed.fill_(True)
        warnings.warn(
            f"the tokens of layer {index} have collapsed to {float(scatter / growth.scatter):.2f} of the "
            "scatter they had: the loss of the dictionary makes them alike; use stop_grad",
            stacklevel=4,
        )
