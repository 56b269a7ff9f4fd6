"""One training loop for every chapter, short enough to read.

The order of the samples and all other randomness of an epoch follow from the seed and the number of the epoch
alone. So a run that was cut off resumes on the same curve, and several processes together draw the batches
that one would have drawn.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from geomlib.lab import checkpoints
from geomlib.lab.data import Samples, Split
from geomlib.lab.steps import Batch, Totals, TrainingError, batches, own_randomness, seed_epoch

__all__ = ["History", "Loss", "Scores", "TrainingError", "cosine", "evaluate", "fit", "one_cycle"]

# The output is a tensor for most models; a model that returns more has a loss that takes it whole.
Loss = Callable[[Any, Tensor], Tensor]
Scores = Callable[[Any], Tensor]


@dataclass
class History:
    """What happened in each epoch; the lists have one entry per epoch.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the training samples while they were learned; accuracy is NaN where labels are no classes.
    test_loss, test_accuracy : list of float
        On the test samples after the epoch; empty without a test split.
    seconds : list of float
        Wall time of the training part of the epoch.

    Examples
    --------
    >>> from geomlib.lab.training import History
    >>> History(loss=[0.7, 0.4], accuracy=[0.6, 0.8], seconds=[1.0, 0.9])
    History(2 epochs: loss 0.4, accuracy 0.8)
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)

    def last(self) -> dict[str, float]:
        """Return the entries of the last epoch by name.

        Examples
        --------
        >>> from geomlib.lab.training import History
        >>> History(loss=[0.7, 0.4], accuracy=[0.6, 0.8]).last()
        {'loss': 0.4, 'accuracy': 0.8}
        """
        return {name: values[-1] for name, values in vars(self).items() if values}

    def __repr__(self) -> str:
        shown = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in self.last().items() if k != "seconds")
        return f"History({len(self)} epochs: {shown})" if len(self) else "History(no epochs)"


def fit(
    model: nn.Module,
    train: Samples,
    test: Samples | None = None,
    *,
    epochs: int,
    loss: Loss = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    schedule: Callable[[float], float] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    mixed_precision: str = "no",
    max_steps: int | None = None,
    on_epoch: Callable[[int, History], object] | None = None,
    on_step: Callable[[int], object] | None = None,
    extra_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    scores: Scores | None = None,
    clip_norm: float | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model and return what happened.

    A model on the CPU is trained on the fastest device there is and comes back; one that stands elsewhere is
    trained where it stands. Under ``torchrun`` every process takes its share of each batch, so the curve is
    that of a single process up to rounding.

    Parameters
    ----------
    model : Module
        Maps inputs ``(batch, ...)`` to outputs ``(batch, ...)``; trained in place.
    train, test : Split or ImageSplit
        Samples to learn and, optionally, samples to be judged on after each epoch.
    epochs : int
        How often to go through ``train`` in all, those of a resumed checkpoint included.
    loss : callable
        ``loss(output, y)``, a mean over the batch.
    optimizer : Optimizer, optional
        Over the parameters of ``model``. Adam with ``lr`` by default; ``lr`` is not used otherwise.
    batch_size : int
        Samples in a step, over all processes.
    seed : int
        Decides the order of the samples and what the model draws from torch's global generators. Their state
        is restored afterwards.
    schedule : callable, optional
        Factor of the learning rate at each step, as a function of the progress from 0 to 1; see
        :func:`cosine`.
    checkpoint : str or Path, optional
        Where to keep the state after each epoch, one safetensors file, replaced as a whole.
    resume : bool
        Go on from ``checkpoint`` if it is there. On the CPU the curve is that of an uninterrupted run, bit
        for bit.
    mixed_precision : str
        ``"no"``, ``"bf16"`` or ``"fp16"``. On the CPU it is ignored with a warning: there it would be slower.
    max_steps : int, optional
        Stop after so many optimisation steps in all, for a dry run.
    on_epoch : callable, optional
        ``on_epoch(epoch, history)`` after each epoch, counted from 1.
    on_step : callable, optional
        ``on_step(step)`` after each optimisation step, counted from 1 over all epochs, while the gradients of
        that step still stand. A model that changes its own structure does so here.
    extra_loss : callable, optional
        ``extra_loss(model, x, y)`` is added to the loss, a penalty for example.
    scores : callable, optional
        Takes the class scores out of what the model returns, for the accuracy. By default they are what it
        returns.
    clip_norm : float, optional
        Scale the gradient down to this Euclidean norm where it is longer.
    progress : bool, optional
        Show a bar. By default only where somebody watches: in a terminal or in Colab, not in CI.

    Returns
    -------
    History
        One entry per epoch, those of a resumed checkpoint included.

    Raises
    ------
    ValueError
        If a number is out of range, or the checkpoint belongs to another run.
    TrainingError
        If the loss is not finite, with epoch and step.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab import data, training
    >>> digits = data.load("digits", train_size=300, flatten=True)
    >>> model = torch.nn.Linear(64, 10)
    >>> history = training.fit(model, digits.train, digits.test, epochs=3, lr=0.01)
    >>> len(history), history.loss[-1] < history.loss[0]
    (3, True)
    """
    _check(train, epochs, batch_size, max_steps, mixed_precision, clip_norm)
    accelerator = _accelerator(mixed_precision)
    origin = next(model.parameters()).device
    device = accelerator.device if origin.type == "cpu" else origin
    model.to(device)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=lr)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])

    history = History()
    identity = {"seed": seed, "batch_size": batch_size, "samples": len(train)}
    if checkpoint is not None and resume and Path(checkpoint).exists():
        history = History(**checkpoints.restore(checkpoint, model, optimizer, identity=identity))
        if len(history) > epochs:
            raise ValueError(
                f"epochs must be at least the {len(history)} of {checkpoint}, got {epochs}: they are over"
            )
    train, test = _bring(train, device), None if test is None else _bring(test, device)
    per_epoch = -(-len(train) // batch_size)
    wrapped, stepper = accelerator.prepare(model, optimizer, device_placement=[False, False])
    shown = (_watched() if progress is None else progress) and accelerator.is_main_process
    bar = tqdm(total=epochs, initial=len(history), unit="epoch", disable=not shown)

    def train_epoch(epoch: int) -> bool:
        """Take the steps of an epoch; say whether it was cut short."""
        seed_epoch(seed, epoch, accelerator.process_index)
        began, totals, cut = time.perf_counter(), Totals(epoch + 1), False
        model.train()
        share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        for step, batch in enumerate(
            batches(train, batch_size, seed=seed, epoch=epoch, device=device, **share),
            start=epoch * per_epoch,
        ):
            if cut := max_steps is not None and step >= max_steps:
                break
            if schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * schedule(step / (epochs * per_epoch))
            with accelerator.autocast():
                output = wrapped(batch.x)
                value = loss(output, batch.y)
                if extra_loss is not None:
                    value = value + extra_loss(model, batch.x, batch.y)
            stepper.zero_grad()
            accelerator.backward(value * batch.weight)
            if clip_norm is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
            stepper.step()
            if on_step is not None:
                on_step(step + 1)
            totals.add(value, output if scores is None else scores(output), batch)
        mean, accuracy = totals.means(accelerator)
        history.loss.append(mean)
        history.accuracy.append(accuracy)
        history.seconds.append(time.perf_counter() - began)
        return cut

    try:
        with own_randomness(device):
            for epoch in range(len(history), epochs):
                if max_steps is not None and epoch * per_epoch >= max_steps:
                    break
                cut = train_epoch(epoch)
                if test is not None:
                    mean, accuracy = evaluate(model, test, loss=loss, scores=scores)
                    history.test_loss.append(mean)
                    history.test_accuracy.append(accuracy)
                if checkpoint is not None and not cut and accelerator.is_main_process:
                    checkpoints.save(checkpoint, model, optimizer, history=vars(history), identity=identity)
                bar.update()
                bar.set_postfix(history.last())
                if on_epoch is not None:
                    on_epoch(epoch + 1, history)
    finally:
        bar.close()
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to(origin)
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 512,
    loss: Loss = cross_entropy,
    scores: Scores | None = None,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy of a model in evaluation mode, where the model stands.

    Parameters
    ----------
    model : Module
        Its training mode is restored afterwards.
    samples : Split or ImageSplit
        What to judge it on.
    batch_size : int
        Samples at a time.
    loss : callable
        ``loss(output, y)``, a mean over the batch.
    scores : callable, optional
        Takes the class scores out of what the model returns. By default they are the output.

    Returns
    -------
    loss, accuracy : float
        Accuracy is NaN where labels are no classes.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab import data, training
    >>> digits = data.load("digits", flatten=True)
    >>> loss, accuracy = training.evaluate(torch.nn.Linear(64, 10), digits.test)
    >>> 0 <= accuracy <= 1
    True
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    totals = Totals()
    for index in torch.arange(len(samples)).split(batch_size):
        x, y = samples[index]
        x, y = x.to(device), y.to(device)
        output = model(x)
        found = output if scores is None else scores(output)
        totals.add(loss(output, y), found, Batch(x, y, counted=len(y), weight=1.0))
    model.train(training)
    return totals.means()


def cosine(warmup: float = 0.0) -> Callable[[float], float]:
    """Return a schedule: linear from 0 during ``warmup``, then half a cosine from 1 to 0.

    Parameters
    ----------
    warmup : float
        Share of the training, in [0, 1).

    Raises
    ------
    ValueError
        If ``warmup`` lies outside.

    Examples
    --------
    >>> from geomlib.lab.training import cosine
    >>> [round(cosine(warmup=0.2)(t), 2) for t in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must lie in [0, 1), got {warmup}: the learning rate would never come down")

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return factor


def one_cycle(warmup: float = 0.3, start: float = 0.04, end: float = 4e-6) -> Callable[[float], float]:
    """Return a schedule: half a cosine from ``start`` to 1 during ``warmup``, then half a cosine to ``end``.

    Parameters
    ----------
    warmup : float
        Share of the training that the rate rises, in (0, 1).
    start, end : float
        First and last factor, in [0, 1).

    Raises
    ------
    ValueError
        If one of them lies outside.

    Notes
    -----
    Source: Smith and Topin (2019, arXiv 1708.07120), with the defaults of torch's ``OneCycleLR``.

    Examples
    --------
    >>> from geomlib.lab.training import one_cycle
    >>> [round(one_cycle()(t), 2) for t in (0.0, 0.15, 0.3, 0.65, 1.0)]
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if not 0 < warmup < 1:
        raise ValueError(f"warmup must lie in (0, 1), got {warmup}: the rate must rise and come down")
    for name, value in {"start": start, "end": end}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}: the peak of the schedule is 1")

    def factor(progress: float) -> float:
        if progress < warmup:
            return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * progress / warmup))
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return factor


def _accelerator(mixed_precision: str) -> Accelerator:
    # Accelerate keeps its settings for the life of the process and refuses another precision; a chapter may
    # train one model in each.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if mixed_precision != "no" and accelerator.device.type == "cpu":
        warnings.warn(
            f"mixed_precision={mixed_precision!r} is ignored on the CPU, where it is slower", stacklevel=3
        )
        return _accelerator("no")
    return accelerator


def _check(
    samples: Samples,
    epochs: int,
    batch_size: int,
    max_steps: int | None,
    mixed_precision: str,
    clip_norm: float | None,
) -> None:
    if len(samples) == 0:
        raise ValueError("train must hold samples, got none: there is nothing to learn from")
    for name, value in {"epochs": epochs, "batch_size": batch_size, "max_steps": max_steps}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: nothing would be trained")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}: no step would be taken")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(
            f"mixed_precision must be no, bf16 or fp16, got {mixed_precision!r}: it names no format"
        )


def _bring(samples: Samples, device: torch.device) -> Samples:
    # What fits in memory fits on the device, where it need not travel again at every step.
    return samples.to(device) if isinstance(samples, Split) else samples


def _watched() -> bool:
    """Say whether somebody watches: a terminal or Colab, not CI, and not a notebook that is being stored."""
    if os.environ.get("CI"):
        return False
    return sys.stderr.isatty() or "google.colab" in sys.modules
