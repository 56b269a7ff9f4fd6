"""What the training loop stands on: batches, sums over an epoch, and randomness of its own.

All randomness of an epoch follows from the seed and the number of the epoch, so nothing random has to be
saved, and several processes agree on the order of the samples without a word.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from geomlib.lab.data import Samples

__all__ = ["Batch", "Totals", "TrainingError", "batches", "own_randomness", "seed_epoch"]

# A look at the loss makes the host wait for the device, so an accelerator is asked every so many steps.
LOOK_EVERY = 16


class TrainingError(RuntimeError):
    """The loss stopped being a number."""


@dataclass(frozen=True)
class Batch:
    """The share of a batch that this process takes.

    Attributes
    ----------
    x, y : Tensor
        Inputs and labels, on the device of the model.
    counted : int
        How many of the samples count: all, or none where there are fewer samples than processes.
    weight : float
        What the mean loss of the share is multiplied with, so that the mean over the processes is the mean
        over the batch.
    """

    x: Tensor
    y: Tensor
    counted: int
    weight: float


def batches(
    samples: Samples,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yield the share that this process takes of each batch of an epoch, in an order of its own.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.data import Split
    >>> from geomlib.lab.steps import batches
    >>> split = Split(torch.arange(5.0).unsqueeze(1), torch.arange(5))
    >>> [len(b.y) for b in batches(split, 2, seed=0, epoch=0, device=torch.device("cpu"))]
    [2, 2, 1]
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(_mixed(seed, epoch)))
    whole = order.split(batch_size)
    # A process without a sample takes one that does not count, since all must take every step.
    shares = [batch[process::processes] if len(batch) > process else batch[:1] for batch in whole]
    workers = min(samples.workers, os.cpu_count() or 1)
    # Each "sample" of this loader is a share, so that a split in memory is indexed once a step.
    loader: DataLoader[Any] = DataLoader(samples, sampler=shares, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    for batch, share, (x, y) in zip(whole, shares, loader, strict=True):
        counted = len(share) if len(batch) > process else 0
        yield Batch(x.to(device), y.to(device), counted, weight=counted * processes / len(batch))


class Totals:
    """Sums of losses and right answers, which tell at once when a loss is not finite.

    Parameters
    ----------
    epoch : int, optional
        Which epoch an error names; without it, a loss may be anything.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.steps import Batch, Totals
    >>> totals = Totals()
    >>> x, y = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
    >>> totals.add(torch.tensor(0.5), x, Batch(x, y, counted=2, weight=1.0))
    >>> totals.means()
    (0.5, 0.5)
    """

    def __init__(self, epoch: int | None = None) -> None:
        self.epoch = epoch
        self.steps = 0
        self.pending: list[tuple[Tensor, int]] = []
        # Loss, right answers, samples, labels.
        self.sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, loss: Tensor, output: Tensor, batch: Batch) -> None:
        """Take the mean loss and the outputs of a batch."""
        y, output = batch.y[: batch.counted], output.detach()[: batch.counted]
        right = loss.new_zeros(())
        if not y.is_floating_point() and output.shape[:-1] == y.shape:
            right = (output.argmax(dim=-1) == y).sum()
            self.sums[3] += y.numel()
        # A half-precision number could not hold the count.
        dtype = torch.promote_types(loss.dtype, torch.float32)
        self.pending.append((torch.stack([loss.detach().to(dtype), right.to(dtype)]), batch.counted))
        if loss.device.type == "cpu" or len(self.pending) == LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Add up what is pending, and stop the training if a loss is not finite."""
        if not self.pending:
            return
        values = torch.stack([pair for pair, _ in self.pending]).tolist()
        for (loss, right), (_, counted) in zip(values, self.pending, strict=True):
            self.steps += 1
            if self.epoch is not None and not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} in epoch {self.epoch}, step {self.steps}: a smaller learning rate "
                    "may help, or a model whose states stay bounded"
                )
            for i, value in enumerate((loss * counted, right, counted)):
                self.sums[i] += value
        self.pending.clear()

    def means(self, accelerator: Accelerator | None = None) -> tuple[float, float]:
        """Return mean loss and accuracy, over all processes if an accelerator is given."""
        self.look()
        sums = self.sums
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device)).tolist()
        loss, right, samples, labels = sums
        return loss / samples, right / labels if labels else math.nan


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators afterwards: a training run must not change what comes after it.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.steps import own_randomness
    >>> before = torch.get_rng_state()
    >>> with own_randomness(torch.device("cpu")):
    ...     _ = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    has_generator = device.type in ("cuda", "xpu")
    kind = device.type if has_generator else "cuda"
    with torch.random.fork_rng(devices=[device] if has_generator else [], device_type=kind):
        yield


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seed torch's global generators, which dropout and its like draw from; inside :func:`own_randomness`."""
    torch.manual_seed(_mixed(seed, epoch, process + 1))


def _mixed(*numbers: int) -> int:
    """Mix numbers into one seed, so that neighbouring epochs have unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
