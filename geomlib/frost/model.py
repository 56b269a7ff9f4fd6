r"""One stationary map, iterated: depth as resolution (Yu and Hwang, arXiv 2601.19551).

The printed update (14)-(15), `h <- (1 - lambda) h + lambda h + lambda A(h) + lambda^(1+H) B x`, is a forward
Euler step of length lambda, since two terms cancel. `Frost` has it and three relatives; only `certified`
contracts, with the factor `1 - lambda (1 - kappa)`. Every model of this room, the baselines too, is read and
scored in the same way after every step, and unrolled by `Unrolled.forward`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from geomlib.core.precision import full_precision, working_dtype
from geomlib.frost.transitions import Prepared, Transition

__all__ = ["MODES", "Context", "Frost", "Mode", "Trajectory", "Unrolled"]

Mode = Literal["euler", "leaky", "gated", "certified"]
MODES: tuple[Mode, ...] = ("euler", "leaky", "gated", "certified")
"""The dynamics of `Frost`, `euler` as printed in the paper."""

# lambda^(-H) in the readout amplifies: 100 times at lambda = 0.01 and H = 1.
SMALLEST_SCALE, LARGEST_SCALE = 1e-3, 2.0


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
        return self._replace(
            x=self.x[index],
            bx=None if self.bx is None else self.bx[index],
            dx=None if self.dx is None else self.dx[index],
            gate=None if self.gate is None else self.gate[index],
            rows=tuple(row[index] for row in self.rows),
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


class Frost(Unrolled):
    r"""Iterate one stationary map whose step length is the scale: `euler`, `leaky`, `gated` or `certified`.

    ========== ==================================================== ================================
    mode       update                                               source
    ========== ==================================================== ================================
    euler      `h + lambda A(h) + lambda^(1+H) B x`                 eq. (14)-(15)
    leaky      `(1 - lambda) h + lambda A(h) + lambda^(1+H) B x`    reconstructed: (14) read as
                                                                    interpolation
    gated      `(1 - g) h + g A(h) + lambda^(1+H) B x`,             Appendix C; `g` from `x` only is
               `g = sigmoid(W x + b)`                               reconstructed
    certified  as leaky, `A` Lipschitz with `kappa < 1`,            reconstructed: contracts with
               `lambda = sigmoid(rho)`                              `1 - lambda (1 - kappa)`
    ========== ==================================================== ================================

    Parameters
    ----------
    stem : Module
        From the inputs to `(N, width, ...)`.
    transition : Transition
        The block `A`.
    width, classes : int
        Channels of the state, number of classes.
    axes : {0, 1, 2}
        Vector, sequence or map.
    steps : int
        Steps of a forward pass, unless it says otherwise.
    mode : {"euler", "leaky", "gated", "certified"}
        The update.
    hurst : float
        Exponent `H` in (0, 1], fixed.
    scale : float
        Initial `lambda`.
    scale_parameter : {"exp", "sigmoid"}, optional
        Which function of the parameter `rho` gives `lambda`; `sigmoid` for the certified mode, which allows
        nothing else, `exp` otherwise. The scale is kept in `[0.001, 2]`, where the gradient of `rho` ends.
    learn_hurst : bool
        Make `H` a parameter, for the ablation.
    initial : {"zeros", "stem"}, optional
        Start of the iteration: zeros for the certified mode, the features otherwise.
    read_position : int, optional
        Which position of a sequence is read; the mean of all if omitted.
    readout_norm : bool
        Layer norms before classifier and halting score, outside the loop.
    supervise : {"last", "all"}
        Which readouts carry a gradient.
    detach_halt : bool
        Keep the gradient of the halting score from the backbone.
    checkpoint : bool
        Keep only the states for the way back and compute each step again: less memory, a third more time.
    generator : torch.Generator, optional
        Draws the initial weights made here.
    device, dtype
        Of the parameters made here.

    Attributes
    ----------
    rho : Parameter
        0-dimensional.
    hurst : Tensor
        0-dimensional buffer, or Parameter.
    resolution : float
        Steps that stand for one, see :func:`geomlib.frost.zoom`.

    Raises
    ------
    ValueError
        If an argument is out of range, or the certified mode gets a transition without a constant.

    Notes
    -----
    Source: arXiv 2601.19551, eq. (13)-(17), (19), section 6.2 for `lambda = 0.5` and `H = 0.8`. The paper
    leaves the start open: zeros drown the input in a norm-terminated block, whose value at 0 is a constant.

    Examples
    --------
    >>> from geomlib.frost import Certified
    >>> generator = torch.Generator().manual_seed(0)
    >>> block = Certified(8, kappa=0.9, generator=generator)
    >>> model = Frost(nn.Linear(3, 8), block, 8, 2, steps=4, generator=generator)
    >>> model(torch.ones(5, 3)).logits.shape, round(model.contraction_factor(), 6)
    (torch.Size([5, 4, 2]), 0.95)
    """

    hurst: Tensor

    def __init__(
        self,
        stem: nn.Module,
        transition: Transition,
        width: int,
        classes: int,
        *,
        axes: int = 0,
        steps: int = 12,
        mode: Mode = "certified",
        hurst: float = 0.8,
        scale: float = 0.5,
        scale_parameter: Literal["exp", "sigmoid"] | None = None,
        learn_hurst: bool = False,
        initial: Literal["zeros", "stem"] | None = None,
        read_position: int | None = None,
        readout_norm: bool = False,
        supervise: Literal["last", "all"] = "last",
        detach_halt: bool = False,
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}: no such update")
        if not 0 < hurst <= 1:
            raise ValueError(f"hurst must lie in (0, 1], got {hurst}: no self-similar process has it")
        form = scale_parameter or ("sigmoid" if mode == "certified" else "exp")
        if form not in ("exp", "sigmoid") or (mode == "certified" and form != "sigmoid"):
            raise ValueError(
                f"scale_parameter must be 'sigmoid', or 'exp' unless certified, got {form!r}: the bound "
                "needs lambda < 1"
            )
        largest = 1.0 if form == "sigmoid" else LARGEST_SCALE
        if not SMALLEST_SCALE <= scale <= largest or scale == 1.0 == largest:
            raise ValueError(
                f"scale must lie in [{SMALLEST_SCALE}, {largest}{')' if largest == 1 else ']'}, got {scale}: "
                f"{form} of a parameter cannot start there"
            )
        if mode == "certified" and transition.kappa is None:
            raise ValueError(
                f"mode 'certified' needs a transition with a constant, got {type(transition).__name__}: "
                "norms and attention in the loop have none"
            )
        super().__init__(
            stem,
            width,
            classes,
            axes=axes,
            steps=steps,
            read_position=read_position,
            readout_norm=readout_norm,
            couple=True,
            initial=initial or ("zeros" if mode == "certified" else "stem"),
            supervise=supervise,
            detach_halt=detach_halt,
            checkpoint=checkpoint,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.transition, self.mode, self.scale_parameter = transition, mode, form
        self.resolution = 1.0
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        rho = math.log(scale) if form == "exp" else math.log(scale) - math.log1p(-scale)
        self.rho = nn.Parameter(torch.full((), rho, **where))
        exponent = torch.full((), hurst, **where)
        if learn_hurst:
            self.hurst = nn.Parameter(exponent)
        else:
            self.register_buffer("hurst", exponent)
        self.gate = linear(width, width, generator=generator, **where) if mode == "gated" else None

    @property
    def log_scale(self) -> Tensor:
        """The logarithm of lambda, 0-dimensional."""
        if self.scale_parameter == "exp":
            return self.rho.clamp(math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE))
        return F.logsigmoid(self.rho).clamp_min(math.log(SMALLEST_SCALE))

    @property
    def scale(self) -> Tensor:
        """The scale lambda, 0-dimensional: the length of a step at resolution 1."""
        return self.log_scale.exp()

    def set_kappa(self, kappa: float) -> None:
        """Change the Lipschitz constant of a certified transition, for example along a schedule."""
        self.transition.set_kappa(kappa)

    def inject(self, inputs: Tensor) -> Context:
        """Compute features, `B x`, `D x`, gate, normalised weights and scales once.

        Parameters
        ----------
        inputs : Tensor
            A batch, as the stem takes it.

        Returns
        -------
        Context
            Rows per sample, and what all share.
        """
        x = self.features(inputs)
        log_scale = self.log_scale.to(x.dtype)
        length = log_scale.exp() / self.resolution
        forcing = (self.hurst * log_scale).exp() * length  # the amplitude lambda^H stays at every resolution
        gate = None if self.gate is None else on_channels(self.gate, x).sigmoid() / self.resolution
        rows, shared = self.transition.prepare(x)
        return Context(
            x=x,
            bx=forcing * on_channels(self.B, x),
            dx=self.D(self.pool(x)),
            gate=gate,
            rows=rows,
            shared=shared,
            scale=length,
            amplitude=(-self.hurst * log_scale).exp(),
        )

    def step(self, state: Tensor, context: Context, t: int = 1) -> Tensor:
        """Apply the map once.

        Parameters
        ----------
        state : Tensor
            `(N, d, ...)`.
        context : Context
            Of these samples.
        t : int
            Ignored: the map is the same at every step.

        Returns
        -------
        Tensor
            Like `state`.
        """
        moved = self.transition(state, Prepared(context.rows, context.shared)).to(state.dtype)
        if moved.shape != state.shape:
            raise ValueError(f"transition must keep the shape {tuple(state.shape)}, got {tuple(moved.shape)}")
        assert context.bx is not None
        assert context.scale is not None
        if self.mode == "euler":
            return torch.addcmul(state + context.bx, moved, context.scale)
        length = context.scale if context.gate is None else context.gate
        return torch.lerp(state, moved, length) + context.bx

    def contraction_factor(self) -> float | None:
        """Return `1 - lambda (1 - kappa)` for the certified mode, None for the others.

        It bounds the Lipschitz constant of a step in the norm of the transition. At a coarser resolution a
        step is longer, and its factor `|1 - lambda| + lambda kappa` may reach 1: then None as well.
        """
        if self.mode != "certified" or self.transition.kappa is None:
            return None
        length = self.scale.item() / self.resolution
        factor = abs(1 - length) + length * self.transition.kappa.item()
        return factor if factor < 1 else None

    def extra_repr(self) -> str:
        """Mode and sizes, for `repr`."""
        return f"mode={self.mode!r}, width={self.width}, steps={self.steps}, start={self.initial!r}"


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
