r"""One stationary map, iterated: depth as resolution (Yu and Hwang, arXiv 2601.19551).

The printed update (14)-(15), `h <- (1 - lambda) h + lambda h + lambda A(h) + lambda^(1+H) B x`, is a forward
Euler step of length lambda, since two terms cancel. `Frost` has it and three relatives; only `certified`
contracts, with the factor `1 - lambda (1 - kappa)`. What it shares with the baselines, such as reading after
every step, is in :mod:`geomlib.frost.unrolled`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.frost.transitions import Prepared, Transition
from geomlib.frost.unrolled import Context, Trajectory, Unrolled, linear, on_channels

__all__ = ["MODES", "Context", "Frost", "Mode", "Trajectory", "Unrolled"]

Mode = Literal["euler", "leaky", "gated", "certified"]
MODES: tuple[Mode, ...] = ("euler", "leaky", "gated", "certified")
"""The dynamics of `Frost`, `euler` as printed in the paper."""

# lambda^(-H) in the readout amplifies: 100 times at lambda = 0.01 and H = 1.
SMALLEST_SCALE, LARGEST_SCALE = 1e-3, 2.0


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
