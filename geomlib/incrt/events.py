"""What growth says of itself: events, and what each check saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Event", "Reading"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a layer.

    Attributes
    ----------
    kind
        A head was born or pruned, or a layer set to work.
    step, layer, head
        When, where, and in which slot; -1 for a whole layer.
    signal, threshold
        Of the gate at that time; for a layer the mean asymmetry index below it and its level, NaN if there
        is none.
    """

    kind: Literal["grow", "prune", "deepen"]
    step: int
    layer: int
    head: int
    signal: float
    threshold: float


class Reading(NamedTuple):
    """What a check saw in a layer.

    Attributes
    ----------
    step, layer
        When and where.
    signal
        Largest eigenvalue of the residual operator; with `motor="plateau"`, checks without a better loss.
    threshold
        What it must exceed, NaN before it is known.
    active
        Heads, after the check.
    """

    step: int
    layer: int
    signal: float
    threshold: float
    active: int
