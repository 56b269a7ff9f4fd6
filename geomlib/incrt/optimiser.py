r"""What an optimiser knows of heads: it follows them when they move, and starts anew when they are born.

Adam counts the steps of a whole tensor. A head born into an empty slot finds a large count, which leaves its
young moments uncorrected: its first update is `(1 - beta1) / sqrt(1 - beta2) = 3.16` times the learning rate,
and at a steady gradient the twelfth is 6.6 times it. Here a slot has its own count until it has settled.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention

__all__ = ["Remedy", "SlotClock", "slot_state"]

Remedy = Literal["counter", "ramp", "fill", "none"]
SETTLED = 100
"""Steps after which the corrected moments of a slot take the place of its young ones."""
RAMP = 30


def slot_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what an optimiser keeps for every entry of a parameter, by name; all have its shape.

    Examples
    --------
    >>> layer = DirectionalAttention(4, 2, 2, max_heads=3)
    >>> optimizer = torch.optim.Adam(layer.parameters())
    >>> layer(torch.ones(1, 2, 4)).sum().backward()
    >>> optimizer.step()
    >>> sorted(slot_state(optimizer, layer.W_in))
    ['exp_avg', 'exp_avg_sq']
    """
    known = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in known.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


class SlotClock:
    r"""Counts the steps of the heads of one layer and corrects their updates while they are young.

    Parameters
    ----------
    optimizer : Optimizer
        Holds the parameters of the layer. Hooks are set on its `step`.
    layer : DirectionalAttention
        Whose slots are counted.
    ages : Tensor
        `(max_heads,)` int64 buffer, kept up to date: optimiser steps since birth, `SETTLED` for old heads.
    remedy : {"counter", "ramp", "fill", "none"}
        Bias correction by the age of the slot; updates multiplied by `age / 30` up to 30 steps; second
        moments filled with the mean over the other heads; nothing.

    Raises
    ------
    ValueError
        If the optimiser does not hold the layer, or the remedy is unknown.

    Notes
    -----
    Source: reconstructed, since the papers are silent and the author's code makes new tensors instead. With
    `"counter"` a slot is updated as if it had an Adam of its own: the update is multiplied by
    `(1 - beta1^t) / (1 - beta1^s) sqrt((1 - beta2^s) / (1 - beta2^t))`, with the shared count `t` and the
    age `s`. At `s = 100` the moments are replaced by the corrected ones, and nothing is left to do.

    Examples
    --------
    >>> layer = DirectionalAttention(4, 2, 2, max_heads=3)
    >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    >>> clock = SlotClock(optimizer, layer, torch.full((3,), SETTLED))
    >>> for step in range(50):
    ...     optimizer.zero_grad()
    ...     layer(torch.eye(4)[None]).square().sum().backward()
    ...     optimizer.step()
    >>> clock.reset(layer.grow())
    >>> (layer(torch.eye(4)[None]) * torch.ones(4)).sum().backward()
    >>> optimizer.step()
    >>> bool((layer.W_O[1].abs() <= 0.1001).all())
    True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layer: DirectionalAttention,
        ages: Tensor,
        *,
        remedy: Remedy = "counter",
    ) -> None:
        if remedy not in get_args(Remedy):
            raise ValueError(
                f"remedy must be one of {get_args(Remedy)}, got {remedy!r}: no such start of a slot"
            )
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.parameters = (layer.W_in, layer.W_out)
        if any(id(parameter) not in held for parameter in self.parameters):
            raise ValueError("optimizer must hold the parameters of the layer: its heads would never learn")
        self.optimizer, self.layer, self.ages, self.remedy = optimizer, layer, ages, remedy
        self.young: dict[int, int] = {}
        self._before: list[tuple[int, Tensor, Tensor]] = []
        self.read()
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._correct)

    def read(self) -> None:
        """Take the ages from the buffer, for example after a state dict was loaded."""
        self._loads = self.layer._extent.loads
        ages = self.ages.tolist()
        self.young = {slot: age for slot, age in enumerate(ages) if age < SETTLED}

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Forget what is known of a slot: a head was born in it."""
        for parameter in self.parameters:
            for name, value in slot_state(self.optimizer, parameter).items():
                others = value[: self.layer.active - 1]
                if self.remedy == "fill" and "sq" in name and len(others):
                    value[slot] = others.mean(0)
                else:
                    value[slot] = 0
        self._age(slot, 0)

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Let what is known of `source` follow its head to `target`, and empty `source`."""
        for parameter in self.parameters:
            for value in slot_state(self.optimizer, parameter).values():
                value[target] = value[source].clone()
                value[source] = 0
        self._age(target, self.young.get(source, SETTLED))
        self._age(source, SETTLED)

    def _age(self, slot: int, age: int) -> None:
        self.ages[slot] = age
        self.young.pop(slot, None)
        if age < SETTLED:
            self.young[slot] = age

    def _remember(self, *_: Any) -> None:
        if self._loads != self.layer._extent.loads:
            self.read()
        if not self.young:
            return
        into, out = (parameter.detach() for parameter in self.parameters)
        self._before = [(slot, into[slot].clone(), out[slot].clone()) for slot in self.young]

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        for slot, *before in self._before:
            age = self.young[slot] + 1
            for parameter, old in zip(self.parameters, before, strict=True):
                group, t = self._group(parameter), self._count(parameter)
                first, second = _factors(group, t, age, self.remedy)
                if first * second != 1:
                    # Decoupled decay is no part of the step that moments determine.
                    decay = (
                        group["lr"] * group.get("weight_decay", 0.0)
                        if _decoupled(self.optimizer, group)
                        else 0
                    )
                    start = old * (1 - decay)
                    parameter[slot] = start + first * second * (parameter[slot] - start)
                if age == SETTLED and self.remedy == "counter" and "betas" in group:
                    known = slot_state(self.optimizer, parameter)
                    for name, value in known.items():
                        value[slot] *= second**-2 if "sq" in name else first
            self._age(slot, age)
        self._before = []

    def _group(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(
            group for group in self.optimizer.param_groups if any(p is parameter for p in group["params"])
        )

    def _count(self, parameter: nn.Parameter) -> int:
        return int(self.optimizer.state.get(parameter, {}).get("step", 0))


def _factors(group: dict[str, Any], t: int, age: int, remedy: str) -> tuple[float, float]:
    """Factors of an update for the first and for the second moment."""
    if remedy == "ramp":
        return min(1.0, age / RAMP), 1.0
    if remedy != "counter" or "betas" not in group or t == 0:
        return 1.0, 1.0
    beta1, beta2 = (float(beta) for beta in group["betas"])
    first = (1 - beta1**t) / (1 - beta1**age)
    return first, math.sqrt((1 - beta2**age) / (1 - beta2**t))


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
