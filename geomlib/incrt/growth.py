r"""What growth remembers: a configuration, and the state of every layer in buffers that a checkpoint holds.

`GrowthConfig` says when heads come and go. `LayerGrowth` is attached to a layer of an encoder and `Structure`
to the encoder itself, so that motor, gate, directions, counters and random state are part of its state dict.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from geomlib.core.precision import working_dtype
from geomlib.incrt.depth import DepthTrigger
from geomlib.incrt.encoder import SelfOrganisingEncoder
from geomlib.incrt.gate import Gate, Mode
from geomlib.incrt.layer import EncoderLayer
from geomlib.incrt.motor import GradientMotor, HeadsMotor, TaskMotor
from geomlib.incrt.optimiser import SETTLED, Remedy
from geomlib.incrt.pruning import regrow_bound

__all__ = ["GrowthConfig", "LayerGrowth", "Structure", "attach"]

Motor = Literal["grad", "heads", "task", "plateau"]
RNG_BYTES = torch.Generator().get_state().numel()


@dataclass(frozen=True)
class GrowthConfig:
    r"""When heads come and go.

    Attributes
    ----------
    motor : {"grad", "heads", "task", "plateau"}
        What drives growth: what the loss still asks for, the heads that are there, a given form, or a loss
        that no longer falls, which knows no direction.
    task : Tensor, optional
        `(d, d)` antisymmetric, for `motor="task"`.
    frac, theta : float
        The threshold is `theta`, or `frac` times the median signal of the calibration. `inf` never grows.
    calibrate : (int, int)
        First and last step of the calibration.
    dwell : int
        Steps between the events of a layer, and the age from which a head may be pruned.
    check_every : int
        Steps between looks at the statistics; those between cost nothing.
    persistence : int
        Checks whose median signal must exceed the threshold; with `motor="plateau"`, checks without a better
        loss.
    ema : float
        Weight of the past in the running means at a check: 0.95 a step makes 0.6 in ten.
    gate : {"auto", "eigh", "lanczos", "online"}
        How the ends of the spectrum are found.
    block_ratio : float
        Directions whose eigenvalue is at least this share of the largest grow together; 1 grows one.
    project : bool
        Take the directions already given out of the operator.
    birth : {"aligned", "random"}
        First columns of queries and keys of a new head: the direction and its image, or random ones.
    remedy : {"counter", "ramp", "fill", "none"}
        How an optimiser starts a new head, see `SlotClock`.
    prune : bool
        Whether heads may go.
    prune_checks : int
        Checks in a row on which a head must be weak.
    phi_g : float
        Share of the threshold below which captured energy is weak (`heads`, `task`), or share of the median
        directional energy (`grad`, `plateau`); below 1.
    eps_out : float
        Share of the token length below which the output of a head is weak. Both must be weak.
    max_heads : int, optional
        Cap, the slots of a layer by default.
    prototypes_at : int, optional
        Step at which prototypes are set to tokens; None leaves them.
    refresh : int, optional
        Steps between fresh looks at the directions of the heads, which move with the weights.
    loss_floor : float, optional
        No births while the running loss is below. Needs `GrowthController.watch`.
    plateau_tol : float
        With `motor="plateau"`, relative fall of the running loss that counts as better.
    deepen_at : float, optional
        Mean asymmetry index of the heads of the top layer above which, once it has settled, the next
        allocated layer is set to work; None never deepens by itself. The author's public code has 0.9.
    deepen_tol, deepen_checks, deepen_dwell : float, int, int
        It has settled if it moved by less than `deepen_tol` over the last `deepen_checks` checks, all of them
        with one number of layers; layers come `deepen_dwell` steps apart.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: arXiv 2604.10703 and the public code of its successor name thresholds and dwell; the values for
    narrow models, the median over checks and the output test are reconstructed.

    Examples
    --------
    >>> GrowthConfig(frac=0.3).dwell
    250
    >>> GrowthConfig(phi_g=1.5)
    Traceback (most recent call last):
        ...
    ValueError: phi_g must lie in [0, 1), got 1.5: at the growth threshold heads would come and go for ever
    """

    motor: Motor = "grad"
    task: Tensor | None = field(default=None, compare=False, repr=False)
    frac: float = 0.15
    theta: float | None = None
    calibrate: tuple[int, int] = (20, 60)
    dwell: int = 250
    check_every: int = 10
    persistence: int = 15
    ema: float = 0.6
    gate: Mode = "auto"
    block_ratio: float = 1.0
    project: bool = True
    birth: Literal["aligned", "random"] = "aligned"
    remedy: Remedy = "counter"
    prune: bool = True
    prune_checks: int = 20
    phi_g: float = 0.05
    eps_out: float = 0.02
    max_heads: int | None = None
    prototypes_at: int | None = 20
    refresh: int | None = None
    loss_floor: float | None = None
    plateau_tol: float = 0.01
    deepen_at: float | None = None
    deepen_tol: float = 0.01
    deepen_checks: int = 200
    deepen_dwell: int = 500

    def __post_init__(self) -> None:
        if self.motor not in get_args(Motor):
            raise ValueError(
                f"motor must be one of {get_args(Motor)}, got {self.motor!r}: nothing would drive"
            )
        if (self.motor == "task") != (self.task is not None):
            raise ValueError("task must be given with motor 'task' and only then: it is the form that drives")
        if self.birth not in ("aligned", "random"):
            raise ValueError(f"birth must be 'aligned' or 'random', got {self.birth!r}: no such columns")
        if not 0 <= self.phi_g < 1:
            raise ValueError(
                f"phi_g must lie in [0, 1), got {self.phi_g}: at the growth threshold heads would come and "
                "go for ever"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}: the means would never move")
        if not (self.eps_out >= 0 and self.plateau_tol >= 0):
            raise ValueError(
                f"eps_out and plateau_tol must not be negative, got {self.eps_out} and {self.plateau_tol}: "
                "they are shares"
            )
        if self.deepen_at is not None and not 0 <= self.deepen_at < 1:
            raise ValueError(
                f"deepen_at must lie in [0, 1), got {self.deepen_at}: no asymmetry index exceeds 1"
            )
        if not self.deepen_tol > 0:
            raise ValueError(f"deepen_tol must be positive, got {self.deepen_tol}: nothing ever settles")
        whole = {
            "check_every": self.check_every,
            "persistence": self.persistence,
            "prune_checks": self.prune_checks,
            "max_heads": self.max_heads,
            "prototypes_at": self.prototypes_at,
            "refresh": self.refresh,
            "deepen_checks": self.deepen_checks,
            "deepen_dwell": self.deepen_dwell,
        }
        for name, value in whole.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}: it is counted")
        horizon = self.check_every / (1 - self.ema)
        if self.motor != "task" and self.dwell < horizon:
            warnings.warn(
                f"dwell {self.dwell} is shorter than the {horizon:.0f} steps that the running means "
                "remember: a birth may answer to a signal from before the last",
                stacklevel=3,
            )


class LayerGrowth(nn.Module):
    """Motor, gate and counters of one layer.

    Attributes
    ----------
    columns : Tensor
        `(max_heads,)` int64: which direction of the gate belongs to the head of a slot, -1 for none.
    born : Tensor
        `(max_heads,)` int64: the step of its birth.
    ages : Tensor
        `(max_heads,)` int64: optimiser steps since, up to `SETTLED`.
    weak : Tensor
        `(max_heads,)` int64: checks in a row on which it was weak.
    scatter, collapsed : Tensor
        `()`: trace of the covariance of the tokens of an unguarded dictionary at the first check, zero
        before; and whether it was warned that they collapsed.
    """

    columns: Tensor
    born: Tensor
    ages: Tensor
    weak: Tensor
    scatter: Tensor
    collapsed: Tensor

    def __init__(self, layer: EncoderLayer, config: GrowthConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        attention = layer.attention
        d, slots = attention.d, attention.max_heads
        parameter = attention.W_in
        where: dict[str, Any] = {"device": parameter.device, "dtype": working_dtype(parameter.dtype)}
        self.motor: GradientMotor | HeadsMotor | TaskMotor
        if config.motor == "task":
            assert config.task is not None
            self.motor = TaskMotor(config.task.to(**where), config.ema)
        else:
            kind = HeadsMotor if config.motor == "heads" else GradientMotor
            self.motor = kind(d, config.ema, **where)
        self.gate = Gate(
            d, mode=config.gate, theta=config.theta, frac=config.frac, calibrate=config.calibrate,
            dwell=config.dwell, persistence=config.persistence, block_ratio=config.block_ratio,
            generator=generator, **where,
        )  # fmt: skip
        device = parameter.device
        self.register_buffer("columns", torch.full((slots,), -1, device=device))
        self.register_buffer("born", torch.zeros(slots, dtype=torch.int64, device=device))
        self.register_buffer("ages", torch.full((slots,), SETTLED, device=device))
        self.register_buffer("weak", torch.zeros(slots, dtype=torch.int64, device=device))
        self.register_buffer("scatter", torch.zeros((), **where))
        self.register_buffer("collapsed", torch.zeros((), dtype=torch.bool, device=device))

    def regrow(self, slot: int) -> Tensor:
        """Bound the signal if the head of a slot goes, `()`: the present one if it holds no direction."""
        column = int(self.columns[slot])
        if column < 0:
            return self.gate.measure(self.motor.S, self.motor.Ma).top
        return regrow_bound(self.motor.S, self.motor.Ma, self.gate.directions, column)

    def give(self, slot: int, column: int, step: int) -> None:
        """Write down a birth."""
        self.columns[slot], self.born[slot], self.weak[slot] = column, step, 0

    def take(self, head: int, last: int) -> int:
        """Write down a removal, after which the head of slot `last` stands in `head`; return its column."""
        column = int(self.columns[head])
        for counter, empty in ((self.columns, -1), (self.born, 0), (self.weak, 0)):
            counter[head] = counter[last].clone()
            counter[last] = empty
        if column >= 0:
            self.columns -= (self.columns > column).to(self.columns.dtype)
        return column


class Structure(nn.Module):
    """What all layers share: the number of steps, the random state, and the loss as it runs.

    Attributes
    ----------
    steps : Tensor
        `()` int64.
    random : Tensor
        `uint8`, state of the generator that draws new heads.
    loss, best : Tensor
        `()`: running loss and its best value since the last event; NaN before the first.
    stale : Tensor
        `()` int64: checks without a better one.
    depth : DepthTrigger, optional
        When the next layer is set to work.
    t, version
        For the host: steps, and how often a state dict was loaded.
    check_every, prototypes_at
        As configured.
    """

    steps: Tensor
    random: Tensor
    loss: Tensor
    best: Tensor
    stale: Tensor
    prototypes_at: int | None
    depth: DepthTrigger | None

    def __init__(self, random: Tensor, device: torch.device) -> None:
        super().__init__()
        self.t, self.version = 0, 0
        self.check_every, self.prototypes_at = 1, None
        self.depth = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("random", random.to(device))
        self.register_buffer("loss", torch.full((), math.nan, device=device))
        self.register_buffer("best", torch.full((), math.nan, device=device))
        self.register_buffer("stale", torch.zeros((), dtype=torch.int64, device=device))

    def due(self, ahead: int = 0) -> bool:
        """Whether the step so many ahead is one whose statistics are looked at."""
        return (self.t + ahead) % self.check_every == 0

    def turns(self) -> bool:
        """Whether layers have to be told what to record: not between two steps that are not looked at."""
        return self.due() or self.due(ahead=1) or self.prototypes_at in (self.t, self.t + 1)

    def follow(self, value: Tensor, config: GrowthConfig) -> None:
        """Bring a loss `()` into the running one, and count the checks without a better."""
        value = value.to(self.loss)
        old = self.loss.nan_to_num(nan=float(value))
        self.loss.copy_(torch.lerp(value, old, config.ema))
        better = ~(self.loss > self.best * (1 - config.plateau_tol))
        self.best.copy_(torch.where(better, self.loss, self.best))
        self.stale.copy_(torch.where(better, 0, self.stale + 1))


def attach(model: SelfOrganisingEncoder, config: GrowthConfig, generator: torch.Generator) -> Structure:
    """Give a model the buffers of its growth, unless it has them, and return those that layers share."""
    for layer in model.layers:
        assert isinstance(layer, EncoderLayer)
        if not hasattr(layer, "growth"):
            layer.growth = LayerGrowth(layer, config, generator)
    if not hasattr(model, "structure"):
        device = next(model.parameters()).device
        model.structure = Structure(generator.get_state(), device)
        model.register_load_state_dict_post_hook(_loaded)
    structure = model.structure
    assert isinstance(structure, Structure)
    structure.check_every, structure.prototypes_at = config.check_every, config.prototypes_at
    if config.deepen_at is not None and structure.depth is None:
        structure.depth = DepthTrigger(
            config.deepen_at, config.deepen_tol, config.deepen_checks, config.deepen_dwell,
            structure.steps.device,
        )  # fmt: skip
    listen(model)
    return structure


def listen(model: SelfOrganisingEncoder) -> None:
    """Let the layers record the step that comes, if it is one to look at."""
    structure = model.structure
    assert isinstance(structure, Structure)
    for layer in model.active():
        layer.attention.recording = structure.due(ahead=1)
        layer.attention.recorded.clear()
        layer.keep_tokens = structure.t + 1 == structure.prototypes_at or (
            layer.attention.recording and layer.unguarded
        )


def _loaded(model: nn.Module, _keys: object) -> None:
    # No method of the controller, since a copy of the model must not hold the controller.
    assert isinstance(model, SelfOrganisingEncoder)
    structure = getattr(model, "structure", None)
    if not isinstance(structure, Structure):
        return  # a compact copy
    structure.t = int(structure.steps)
    structure.version += 1
    listen(model)
