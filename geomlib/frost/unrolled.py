"""What all models of this room share: a context per sample, steps, a readout and a halting score after each.

`Unrolled` knows nothing of scales. It fixes what arXiv 2601.19551 asks of every model that is compared: one
stem, the same heads, the readout norm outside the loop, and a task gradient from the last step alone (eq.
(21)).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from geomlib.core.precision import full_precision, working_dtype

__all__ = ["Context", "Trajectory", "Unrolled", "linear", "on_channels", "take"]


class Trajectory(NamedTuple):
    """What an unrolled model gives for `N` samples, `T` steps and `K` classes.

    Attributes
    ----------
    logits : Tensor
        `(N, T, K)`, the readout after each step; only the last carries a gradient unless all are supervised.
    scores : Tensor
        `(N, T)`, halting logits: the paper's score is their sigmoid.
    state : Tensor
        `(N, d, ...)` after the last step.
    states : Tensor or None
        `(N, T + 1, d, ...)`, the start first, if they were kept.
    """

    logits: Tensor
    scores: Tensor
    state: Tensor
    states: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """The last readout, `(N, K)`."""
        return self.logits[:, -1]


class Context(NamedTuple):
    """What is computed once per sample and once per forward pass, and not again at each step.

    Attributes
    ----------
    x : Tensor
        Injected features, `(N, d, ...)`, at least float32.
    bx : Tensor or None
        `lambda^(1+H) B x`, like `x`.
    dx : Tensor or None
        `D` of the pooled features, `(N, d)`.
    gate : Tensor or None
        Step length of every channel, like `x`.
    rows : tuple of Tensor
        What the transition keeps per sample, `U x + b` for the certified one.
    shared : tuple of Tensor
        What it keeps for all samples: the normalised weights.
    scale : Tensor or None
        Length of a step, 0-dimensional.
    amplitude : Tensor or None
        `lambda^(-H)` of the readout, 0-dimensional.
    """

    x: Tensor
    bx: Tensor | None = None
    dx: Tensor | None = None
    gate: Tensor | None = None
    rows: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()
    scale: Tensor | None = None
    amplitude: Tensor | None = None

    def select(self, index: Tensor) -> Context:
        """Return the context of some samples, by indices or a mask; what is shared stays shared."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return self._replace(
            x=take(self.x, index),
            bx=None if self.bx is None else take(self.bx, index),
            dx=None if self.dx is None else take(self.dx, index),
            gate=None if self.gate is None else take(self.gate, index),
            rows=tuple(take(row, index) for row in self.rows),
        )


class Unrolled(nn.Module):
    """Stem, steps, readout and halting score: what `Frost` and its baselines share.

    A subclass defines `inject` (from `features`) and `step`, and sets `fixed_depth` if its steps differ.
    """

    fixed_depth = False

    def __init__(
        self,
        stem: nn.Module,
        width: int,
        classes: int,
        *,
        axes: int,
        steps: int,
        read_position: int | None,
        readout_norm: bool,
        couple: bool,
        initial: Literal["zeros", "stem"],
        supervise: Literal["last", "all"],
        detach_halt: bool,
        checkpoint: bool,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("classes", classes), ("steps", steps)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}: nothing would be computed")
        if initial not in ("zeros", "stem"):
            raise ValueError(f"initial must be 'zeros' or 'stem', got {initial!r}: no such start")
        if read_position is not None and axes != 1:
            raise ValueError(
                f"read_position is for sequences, got {read_position} for {axes} axes: nothing to pick"
            )
        _check_supervise(supervise)
        self.stem, self.width, self.classes, self.axes, self.steps = stem, width, classes, axes, steps
        self.read_position, self.initial = read_position, initial
        self.supervise, self.detach_halt, self.checkpoint = supervise, detach_halt, checkpoint
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        if couple:
            self.B, self.C, self.D = (linear(width, width, bias=False, **options) for _ in range(3))
        norm: dict[str, Any] = {"device": device, "dtype": dtype}
        self.readout_norm = nn.LayerNorm(width, **norm) if readout_norm else nn.Identity()
        self.halting_norm = nn.LayerNorm(width, **norm) if readout_norm else nn.Identity()
        self.classifier = linear(width, classes, **options)
        self.halting = linear(width, 1, **options)

    def inject(self, inputs: Tensor) -> Context:
        """Compute what the steps share, once: the context of a batch of inputs, as the stem takes them."""
        raise NotImplementedError

    def step(self, state: Tensor, context: Context, t: int) -> Tensor:
        """Apply step `t`, from 1 on, to a state `(N, d, ...)`."""
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Tensor:
        """Check the inputs and return the stem's features `(N, d, ...)`, at least float32, channels last."""
        if not inputs.is_floating_point():
            raise ValueError(f"inputs must be floating point, got {inputs.dtype}: the stem is a linear map")
        if self.training and len(inputs) == 0:
            raise ValueError(
                f"inputs must not be empty in training, got {tuple(inputs.shape)}: no loss is defined"
            )
        x = self.stem(inputs)
        if x.dim() != self.axes + 2 or x.shape[1] != self.width:
            raise ValueError(f"stem must give (N, {self.width}) and {self.axes} axes, got {tuple(x.shape)}")
        x = x.to(working_dtype(x.dtype))  # increments below 2^-8 of the state would be lost in bfloat16
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.axes else x

    def start(self, context: Context) -> Tensor:
        """Return the state before the first step, zeros or the injected features."""
        return context.x if self.initial == "stem" else torch.zeros_like(context.x)

    def pool(self, state: Tensor) -> Tensor:
        """Reduce a state to the vector that is read, `(N, d)`: one position, or the mean over all."""
        if self.axes == 0:
            return state
        if self.read_position is not None:
            return state[:, :, self.read_position]
        return state.flatten(2).mean(2)

    def read(self, state: Tensor, context: Context) -> Tensor:
        """Return the class logits `(N, K)` of a state."""
        return self._read(self.pool(state), context.dx, context.amplitude)

    def score(self, state: Tensor) -> Tensor:
        """Return the halting logit `(N,)` of a state: large means good enough to stop."""
        return self._score(self.pool(state))

    def forward(
        self,
        inputs: Tensor,
        *,
        steps: int | None = None,
        keep_states: bool = False,
        supervise: Literal["last", "all"] | None = None,
    ) -> Trajectory:
        """Unroll the model.

        Parameters
        ----------
        inputs : Tensor
            A batch, as the stem takes it.
        steps : int, optional
            Number of steps, the model's own if omitted; tied models take any.
        keep_states : bool
            Whether to return the states as well.
        supervise : {"last", "all"}, optional
            Which readouts carry a gradient, the model's own choice if omitted.

        Returns
        -------
        Trajectory
            Logits and halting logits of every step, the last state, and the states if asked for.

        Raises
        ------
        ValueError
            If the batch is empty in training or not floating, `steps < 1`, or untied steps run out.
        """
        steps = self.steps if steps is None else steps
        supervise = self.supervise if supervise is None else supervise
        _check_supervise(supervise)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}: there would be nothing to read")
        if self.fixed_depth and steps > self.steps:
            raise ValueError(f"steps must be at most {self.steps}, got {steps}: untied steps end there")
        context = self.inject(inputs)
        state = self.start(context)
        states, pooled = [state], []
        again = self.checkpoint and torch.is_grad_enabled()
        for t in range(1, steps + 1):
            state = self._step_again(state, context, t) if again else self.step(state, context, t)
            pooled.append(self.pool(state))
            if keep_states:
                states.append(state)
        # Read together: a handful of operations instead of as many per step.
        vectors = torch.stack(pooled, 1)
        dx = None if context.dx is None else context.dx.unsqueeze(1)
        if supervise == "all":
            logits = self._read(vectors, dx, context.amplitude)
        else:
            last = self._read(vectors[:, -1:], dx, context.amplitude)
            with torch.no_grad():
                early = self._read(vectors[:, :-1], dx, context.amplitude)
            logits = torch.cat([early, last], 1)
        scores = self._score(vectors.detach() if self.detach_halt else vectors)
        return Trajectory(logits, scores, state, torch.stack(states, 1) if keep_states else None)

    def contraction_factor(self) -> float | None:
        """Return a proved Lipschitz constant of the step, None where nothing is proved."""
        return None

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Split the parameters for an optimiser: scale, exponent, biases and norms without weight decay."""
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}: weights would grow")
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def _step_again(self, state: Tensor, context: Context, t: int) -> Tensor:
        """Apply a step that keeps nothing but the state, and is computed again on the way back."""
        result: Tensor = recompute(
            self.step, state, context, t, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _read(self, vector: Tensor, dx: Tensor | None, amplitude: Tensor | None) -> Tensor:
        with full_precision(vector.device):  # thresholds and ranks compare these numbers
            if dx is not None:
                vector = self.C(vector)
                vector = dx + (vector if amplitude is None else amplitude * vector)
            return self.classifier(self.readout_norm(vector))

    def _score(self, vector: Tensor) -> Tensor:
        with full_precision(vector.device):
            return self.halting(self.halting_norm(vector)).squeeze(-1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return `x[index]` for a vector of indices of samples: several times faster, with the same layout.

    Examples
    --------
    >>> x = torch.arange(12.0).view(3, 2, 2).mT
    >>> take(x, torch.tensor([2, 0])).stride() == x.stride()
    True
    """
    if x.dim() < 3 or x.is_contiguous():
        return x.index_select(0, index)
    return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)


def on_channels(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of `(N, d, ...)`, which stay last in memory; keeps the dtype."""
    return layer(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


def linear(
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """Make a linear layer with torch's default ranges, drawn on the CPU from `generator` alone."""
    if inputs < 1 or outputs < 1:
        raise ValueError(
            f"sizes of a linear layer must be at least 1, got {inputs} and {outputs}: it would be empty"
        )
    where = torch.get_default_device() if device is None else device
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=where, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            parameter.copy_((2 * draw - 1) / math.sqrt(inputs))
    return layer


def _check_supervise(supervise: str) -> None:
    if supervise not in ("last", "all"):
        raise ValueError(f"supervise must be 'last' or 'all', got {supervise!r}: no such loss")
