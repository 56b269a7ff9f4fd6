"""What several processes have to agree on: sums over their batches, and what one of them drew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from geomlib.incrt.layer import EncoderLayer
from geomlib.incrt.motor import MotorStatistics

__all__ = ["mean_over", "reduced", "several", "share"]


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over(value: Tensor) -> Tensor:
    """Return the mean over processes."""
    if several():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def reduced(found: MotorStatistics) -> MotorStatistics:
    """Return the statistics of the batch of all processes, whose loss is the mean of theirs."""
    if not several():
        return found
    packed = torch.cat(
        [(found.G / dist.get_world_size()).flatten(), found.gram.flatten(), found.tokens[None]]
    )
    dist.all_reduce(packed)
    d = len(found.G)
    return MotorStatistics(packed[: d * d].view(d, d), packed[d * d : -1].view(d, d), packed[-1])


@torch.no_grad()
def share(layer: EncoderLayer) -> None:
    """Take over from the first process what was drawn at random, and all else that an event touched."""
    if several():
        for tensor in (*layer.parameters(), *layer.buffers()):
            dist.broadcast(tensor.detach(), 0)
