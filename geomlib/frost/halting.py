r"""Stop each sample at its own depth, and pay for no step that it does not take.

All samples of a batch are stepped together. After each step the rule is asked which of them stop; those are
set aside, and the batch is shrunk to the rest, state and cached context alike, so that the work done is the
sum of the depths and not their maximum times the batch (arXiv 2601.19551, (20), has the rule of one sample).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from geomlib.frost.curves import check_threshold
from geomlib.frost.rules import Rule, Seen, find_rule
from geomlib.frost.unrolled import Unrolled, take

__all__ = ["Halted", "HaltingWarning", "infer", "unroll_signals"]


class HaltingWarning(UserWarning):
    """A threshold does not do what was asked of it, or some scores are no numbers."""


class Halted(NamedTuple):
    """Answers of samples that stopped at their own depths.

    Attributes
    ----------
    logits
        `(N, K)`.
    depth
        Steps taken `(N,)`, int64.
    evaluations
        Rows times steps that were computed: the sum of the depths if the batch shrinks at every exit.
    nonfinite
        Signals that were NaN or infinite when they could have stopped their sample; they stop nothing.
    """

    logits: Tensor
    depth: Tensor
    evaluations: int
    nonfinite: int


@torch.no_grad()
def infer(
    model: Unrolled,
    inputs: Tensor,
    threshold: float,
    *,
    rule: Rule | str = "score",
    steps: int | None = None,
    t_min: int = 1,
    compact: float = 1.0,
) -> Halted:
    """Answer each sample at the first step at which a rule's signal exceeds a threshold.

    Unrolling the model in full and looking for the first crossing gives the same answers and depths, up to
    the rounding of batches of other sizes.

    Parameters
    ----------
    model
        Run in evaluation mode; its mode is restored.
    inputs
        A batch, as the model takes it; may be empty.
    threshold
        `-inf` stops all at `t_min`, `inf` none before the last step. What is not finite stops nothing.
    rule
        What signals, or its name in `geomlib.frost.RULES`; the model's halting logit by default.
    steps
        Where the last samples stop; the model's own number by default, tied models take any.
    t_min
        First step at which a sample may stop, in 1 ... steps.
    compact
        Shrink the batch when samples have left and less than this share of its rows still runs: 1 shrinks at
        every exit, 0 never. Indexing costs time as well, which a small model may not earn back.

    Returns
    -------
    Halted

    Raises
    ------
    ValueError
        If an argument is out of range.

    Warns
    -----
    HaltingWarning
        If a signal was not finite.

    Notes
    -----
    Source: arXiv 2601.19551, (20); batches are reconstructed. The host waits for the device once per step
    from `t_min` on, for the number of exits, which decides the size of the next step.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> from geomlib.frost.curves import depth_threshold
    >>> model = vector(3, 4, width=8, steps=5, generator=torch.Generator().manual_seed(0))
    >>> inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    >>> threshold = depth_threshold(unroll_signals(model, inputs), 2.5)
    >>> halted = infer(model, inputs, threshold)
    >>> halted.depth.float().mean(), halted.evaluations
    (tensor(2.5000), 15)
    """
    steps = check_steps(model, steps)
    check_threshold(threshold, t_min, steps)
    if not 0 <= compact <= 1:
        raise ValueError(f"compact must lie in [0, 1], got {compact}: it is a share of the rows")
    rule = find_rule(rule)
    with evaluating(model):
        halted = _infer(model, inputs, threshold, rule, steps, t_min, compact)
    if halted.nonfinite:
        warnings.warn(
            f"{halted.nonfinite} signals were not finite and stopped nothing: the model may be diverging",
            HaltingWarning,
            stacklevel=2,
        )
    return halted


def _infer(
    model: Unrolled, inputs: Tensor, threshold: float, rule: Rule, steps: int, t_min: int, compact: float
) -> Halted:
    context = whole = model.inject(inputs)
    state = model.start(context)
    samples = rows = running = len(inputs)
    index = torch.arange(samples, device=state.device)
    depth = torch.full_like(index, steps)
    runs: Tensor | None = None  # which rows still run, None if all do
    memory: tuple[Tensor, ...] = ()
    # What the samples left with: logits if the rule reads them anyway, else states, read together at the end.
    left: Tensor | None = None
    evaluations = nonfinite = 0
    for t in range(1, steps + 1):
        previous, state = state, model.step(state, context, t)
        evaluations += rows
        logits = model.read(state, context) if rule.reads else None
        if t < steps:
            signal, memory = rule.observe(Seen(t, model.score(state), logits, state, previous), memory)
            if t < t_min:
                continue
            finite = signal.abs() < math.inf  # False for NaN as well
            leaves, strange = finite & (signal > threshold), ~finite
            if runs is not None:
                leaves, strange = leaves & runs, strange & runs
            # The one time that the host waits in a step.
            leaving, odd = torch.stack([leaves, strange]).sum(1).tolist()
            nonfinite += odd
            if leaving == 0:
                continue
        else:
            leaves, leaving = torch.ones_like(index, dtype=torch.bool) if runs is None else runs, running
        result = state if logits is None else logits
        if leaving == samples:
            left, depth = result, torch.full_like(depth, t)
            break
        # Those who leave first, then those who stay, then those who left before: sizes are known on the host.
        key = leaves.to(torch.int8) if runs is None else leaves.to(torch.int8) * 2 + runs
        order = key.argsort(descending=True, stable=True)
        out, stay = order[:leaving], order[leaving:running]
        who = index[out]
        left = torch.empty_like(result) if left is None else left  # before the first exit all rows are there
        left[who] = take(result, out)
        depth[who] = t
        running -= leaving
        if running == 0:
            break
        if running < compact * rows:
            state, index, context = take(state, stay), index[stay], context.select(stay)
            memory = tuple(take(value, stay) for value in memory)
            runs, rows = None, running
        else:
            runs = ~leaves if runs is None else runs & ~leaves
    assert left is not None
    return Halted(left if rule.reads else model.read(left, whole), depth, evaluations, nonfinite)


@torch.no_grad()
def unroll_signals(
    model: Unrolled,
    inputs: Tensor,
    *,
    rule: Rule | str = "score",
    steps: int | None = None,
    batch_size: int = 512,
) -> Tensor:
    """Return the signals of a rule at every step, without keeping states or, unless the rule asks, reading.

    Parameters
    ----------
    model
        Run in evaluation mode; its mode is restored.
    inputs
        `(N, ...)`, as the model takes them.
    rule, steps
        See :func:`infer`.
    batch_size
        Samples at a time, so that memory does not grow with `N`.

    Returns
    -------
    Tensor
        `(N, steps)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 4, width=8, steps=5, generator=torch.Generator().manual_seed(0))
    >>> inputs = torch.ones(2, 3)
    >>> bool((unroll_signals(model, inputs) - model(inputs).scores).abs().max() < 1e-6)
    True
    """
    steps = check_steps(model, steps)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}: nothing would be computed")
    rule = find_rule(rule)
    parts = []
    with evaluating(model):
        for batch in inputs.split(batch_size):
            context = model.inject(batch)
            state = model.start(context)
            columns: list[Tensor] = []
            memory: tuple[Tensor, ...] = ()
            for t in range(1, steps + 1):
                previous, state = state, model.step(state, context, t)
                logits = model.read(state, context) if rule.reads else None
                signal, memory = rule.observe(Seen(t, model.score(state), logits, state, previous), memory)
                columns.append(signal)
            parts.append(torch.stack(columns, 1))
    return torch.cat(parts)


@contextmanager
def evaluating(model: Unrolled) -> Iterator[None]:
    """Put a model into evaluation mode, and back afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def check_steps(model: Unrolled, steps: int | None) -> int:
    """Return the number of steps to unroll, the model's own by default."""
    steps = model.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: there would be nothing to read")
    if model.fixed_depth and steps > model.steps:
        raise ValueError(f"steps must be at most {model.steps}, got {steps}: untied steps end there")
    return steps
