r"""The controller of growth: it looks at the gradient of attention now and then, and lets heads come and go.

After each step of the optimiser it is asked whether something is to happen. A head is born when the signal of
a gate persists above its threshold (arXiv 2604.10703), and goes when it captures little and adds little; not
both in one check, and never the last head. All that it remembers stands in buffers of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.checks import absorb, captures_little, refresh, watch_scatter
from geomlib.incrt.encoder import SelfOrganisingEncoder
from geomlib.incrt.events import Event, Reading
from geomlib.incrt.growth import GrowthConfig, LayerGrowth, Structure, attach, listen
from geomlib.incrt.layer import EncoderLayer
from geomlib.incrt.operator import residual_operator
from geomlib.incrt.optimiser import SlotClock
from geomlib.incrt.processes import mean_over, several, share
from geomlib.incrt.prototypes import DDCLBlock

__all__ = ["GrowthController"]

WITNESSES = 512
"""Tokens on which the outputs of heads are measured."""


class GrowthController:
    r"""Lets the heads of an encoder come and go while it is trained.

    Parameters
    ----------
    model : SelfOrganisingEncoder
        Gets buffers for what growth remembers. A wrapper (data parallel, compiled) is looked through.
    optimizer : Optimizer
        Holds its parameters; what it knows of a head follows the head.
    config : GrowthConfig, optional
        When heads come and go.
    generator : torch.Generator, optional
        Draws new heads; its state is a buffer of the model.
    scaler : torch.amp.GradScaler, optional
        Whose scale is taken out of the gradients.

    Attributes
    ----------
    events : list of Event
        What happened, in order.
    history : list of Reading
        What the checks saw.

    Raises
    ------
    ValueError
        If the model is no such encoder, the optimiser does not hold it, or a cap does not fit.

    Notes
    -----
    Source: arXiv 2604.10703; the motor of the loss, the output test and everything about optimisers are
    reconstructed. Call `step` after `optimizer.step()`. Statistics come from a hook on the output of
    attention, set for one step in `check_every`; several backward passes before a step add up. In several
    processes the sums are reduced and all decide alike. In evaluation mode nothing is looked at or changed.
    Layers that wait have no gradient: data parallelism needs `find_unused_parameters=True` while there are
    any. If the loss of a dictionary reaches its tokens, a warning says once that these have collapsed.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> model = SelfOrganisingEncoder(
    ...     vocabulary=5, d=16, dk=8, dv=4, max_heads=4, prototypes=8, outputs=5, generator=generator
    ... )
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    >>> config = GrowthConfig(theta=0.0, dwell=20, check_every=5, persistence=1)
    >>> controller = GrowthController(model, optimizer, config, generator=generator)
    >>> loss = model.structure_loss()
    >>> for step in range(60):
    ...     x = torch.randint(5, (8, 12), generator=generator)
    ...     optimizer.zero_grad()
    ...     loss(model(x), x.roll(1, 1)).backward()
    ...     optimizer.step()
    ...     events = controller.step()
    >>> [(event.kind, event.step) for event in controller.events], model.heads
    ([('grow', 20), ('grow', 40), ('grow', 60)], [4])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: GrowthConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        scaler: Any = None,
    ) -> None:
        for name in ("module", "_orig_mod", "module"):
            model = getattr(model, name, model)
        if not isinstance(model, SelfOrganisingEncoder):
            raise ValueError(
                f"model must be a SelfOrganisingEncoder, got {type(model).__name__}: it has no slots"
            )
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.config = config = config or GrowthConfig()
        slots = model.active()[0].attention.max_heads
        if config.max_heads is not None and config.max_heads > slots:
            raise ValueError(f"max_heads must be at most the {slots} slots, got {config.max_heads}: no room")
        self.cap = slots if config.max_heads is None else config.max_heads
        self.generator = torch.Generator() if generator is None else generator
        self.structure: Structure = attach(model, config, self.generator)
        self.clocks = [
            SlotClock(optimizer, layer.attention, _growth(layer).ages, remedy=config.remedy)
            for layer in self.model.allocated()
        ]
        self.events: list[Event] = []
        self.history: list[Reading] = []
        self._losses: list[Tensor] = []
        self._version = -1
        if several():
            dist.broadcast(self.structure.random, 0)
        self._resume()

    # The public face.

    def step(self) -> list[Event]:
        """Say that the optimiser took a step; look, if it is time, and return what happened."""
        if not self.model.training:
            return []
        if self._version != self.structure.version:
            self._resume()
        structure = self.structure
        structure.t += 1
        structure.steps.add_(1)
        t = structure.t
        events: list[Event] = []
        if t == self.config.prototypes_at:
            self._set_prototypes()
        if structure.due():
            events = self._check(t)
        self._prepare()
        return events

    def watch(self, loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        """Return a loss that is seen here as well, for `loss_floor` and `motor="plateau"`."""

        def watched(output: Any, y: Tensor) -> Tensor:
            value = loss(output, y)
            if self.model.training and self.structure.due(ahead=1):
                self._losses.append(value.detach())
            return value

        return watched

    def operator(self, layer: int = 0, *, projected: bool = True) -> Tensor:
        """Return the operator of a layer `(d, d)`, with or without the directions already given."""
        growth = _growth(self.model.active()[layer])
        directions = growth.gate.directions if projected else None
        return residual_operator(growth.motor.S, growth.motor.Ma, directions)

    def grow(self, layer: int = 0, direction: Tensor | None = None) -> Event:
        """Give birth to a head by hand.

        Parameters
        ----------
        layer : int
            Where.
        direction : Tensor, optional
            `(d,)`; the top eigenvector of the residual operator by default.

        Raises
        ------
        ValueError
            If all slots are taken, or the direction is one of those already given.
        """
        growth = _growth(self.model.active()[layer])
        if direction is None:
            direction = growth.gate.measure(growth.motor.S, growth.motor.Ma).u_top
        signal = float(growth.gate.measure(growth.motor.S, growth.motor.Ma).top)
        return self._grow(layer, direction, self.structure.t, signal)

    def prune(self, layer: int, head: int) -> Event:
        """Remove a head by hand.

        Raises
        ------
        ValueError
            If there is no such head, or it is the last.
        """
        growth = _growth(self.model.active()[layer])
        signal = float(growth.gate.measure(growth.motor.S, growth.motor.Ma).top)
        return self._prune(layer, head, self.structure.t, signal)

    def deepen(self) -> Event:
        """Set the next allocated layer to work by hand; the function stays as it was.

        Raises
        ------
        ValueError
            If all allocated layers work.
        """
        t, trigger = self.structure.t, self.structure.depth
        signal, threshold = math.nan, math.nan
        if trigger is not None:
            signal, threshold = trigger.observe(self.model.active()[-1].attention), trigger.level
            trigger.restart(t)
        index = self.model.deepen()
        growth = _growth(self.model.active()[index])
        # Its heads are as young as heads that are born: they add nothing yet and must not go for that.
        growth.born.fill_(t)
        growth.gate.last_event.fill_(t)
        return self._note(Event("deepen", t, index, -1, signal, threshold))

    @property
    def settled(self) -> bool:
        """Whether every layer was quiet for four dwells, with its signal at or below the threshold."""
        latest = {reading.layer: reading for reading in self.history[-self.model.depth :]}
        return len(latest) == self.model.depth and all(
            self.structure.t - int(_growth(layer).gate.last_event) >= 4 * self.config.dwell
            and latest[index].signal <= latest[index].threshold
            for index, layer in enumerate(self.model.active())
        )

    # One check.

    def _check(self, t: int) -> list[Event]:
        events: list[Event] = []
        self._absorb_loss()
        for index, layer in enumerate(self.model.active()):
            growth, attention = _growth(layer), layer.attention
            if not attention.recorded:
                continue
            witness = attention.recorded[0]
            absorb(growth, attention, 1.0 if self.scaler is None else self.scaler.get_scale())
            if layer.tokens is not None and layer.unguarded:
                watch_scatter(growth, layer.tokens, index)
                layer.tokens = None
            top = growth.gate.observe(t, growth.motor.S, growth.motor.Ma).top
            signal, threshold = float(top), growth.gate.threshold()
            if self.config.motor == "plateau":
                signal, threshold = float(self.structure.stale), float(self.config.persistence)
            weak = self._weak(attention, growth, witness.x, witness.mask, t)
            if self._wants_head(growth, attention, t):
                events += self._births(index, growth, attention, t, signal)
            elif (head := self._prunable(growth, attention, weak, t)) is not None:
                events.append(self._prune(index, head, t, signal))
            elif self._stale(t):
                refresh(growth, attention)
            self.history.append(Reading(t, index, signal, threshold, attention.active))
        return events or self._deepened(t)

    def _stale(self, t: int) -> bool:
        """Whether it is time to look anew where the heads look."""
        every = self.config.refresh
        return every is not None and self.config.project and t % every < self.config.check_every

    def _deepened(self, t: int) -> list[Event]:
        trigger = self.structure.depth
        if trigger is None or self.model.depth == len(self.model.layers):
            return []
        trigger.observe(self.model.active()[-1].attention)
        return [self.deepen()] if trigger.ready(t) else []

    def _absorb_loss(self) -> None:
        if not self._losses:
            if self.config.motor == "plateau" or self.config.loss_floor is not None:
                raise ValueError("the loss must be watched: wrap it with GrowthController.watch")
            return
        self.structure.follow(mean_over(torch.stack(self._losses).mean()), self.config)

    def _wants_head(self, growth: LayerGrowth, attention: DirectionalAttention, t: int) -> bool:
        if attention.active >= self.cap:
            return False
        floor = self.config.loss_floor
        if floor is not None and float(self.structure.loss) < floor:
            return False
        if self.config.motor == "plateau":
            quiet = t - int(growth.gate.last_event) >= self.config.dwell
            return quiet and int(self.structure.stale) >= self.config.persistence
        return growth.gate.ready(t)

    def _births(
        self, index: int, growth: LayerGrowth, attention: DirectionalAttention, t: int, signal: float
    ) -> list[Event]:
        if self.config.motor == "plateau":
            return [self._grow(index, None, t, signal)]
        directions = growth.gate.proposal(growth.motor.S, growth.motor.Ma)
        return [self._grow(index, u, t, signal) for u in directions.T[: self.cap - attention.active]]

    def _grow(self, index: int, direction: Tensor | None, t: int, signal: float) -> Event:
        layer = self.model.active()[index]
        growth, attention = _growth(layer), layer.attention
        if attention.active >= self.cap:
            raise ValueError(
                f"max_heads must exceed the {attention.active} active heads to grow: no slot is free"
            )
        threshold, column = growth.gate.threshold(), -1
        u = v = None
        if direction is None:
            growth.gate.last_event.fill_(t)
            self.structure.best.copy_(self.structure.loss)
            self.structure.stale.zero_()
        else:
            column = growth.gate.captured
            growth.gate.capture(direction, t)
            u = growth.gate.directions[:, column].clone()
            v = growth.motor.Ma @ u
            if not self.config.project:
                growth.gate.held.zero_()
            if self.config.birth == "random" or not bool(v.norm() > 0):
                u = v = None
        slot = attention.grow(u, v, generator=self.generator)
        self.structure.random.copy_(self.generator.get_state())
        growth.give(slot, column, t)
        self.clocks[index].reset(slot)
        share(layer)
        return self._note(Event("grow", t, index, slot, signal, threshold))

    def _prunable(
        self, growth: LayerGrowth, attention: DirectionalAttention, weak: Tensor | None, t: int
    ) -> int | None:
        """Return the weakest head that may go, or None."""
        if weak is None or attention.active == 1 or t - int(growth.gate.last_event) < self.config.dwell:
            return None
        counts = growth.weak[: attention.active].tolist()
        outputs = weak.tolist()
        for head in sorted(range(attention.active), key=lambda head: outputs[head]):
            if counts[head] >= self.config.prune_checks:
                if self.config.motor == "plateau":
                    return head
                if not float(growth.regrow(head)) > growth.gate.threshold():
                    return head
        return None

    def _prune(self, index: int, head: int, t: int, signal: float) -> Event:
        layer = self.model.active()[index]
        growth, attention = _growth(layer), layer.attention
        threshold = growth.gate.threshold()
        last = attention.prune(head)
        column = growth.take(head, last)
        if column >= 0:
            growth.gate.release(column, t)
        else:
            growth.gate.last_event.fill_(t)
        self.clocks[index].move(last, head)
        share(layer)
        return self._note(Event("prune", t, index, head, signal, threshold))

    def _weak(
        self, attention: DirectionalAttention, growth: LayerGrowth, x: Tensor, mask: Tensor | None, t: int
    ) -> Tensor | None:
        """Count the checks on which heads were weak; return their outputs, if any head was to be measured."""
        heads = attention.active
        if not self.config.prune or heads == 1:
            return None
        old = t - growth.born[:heads] >= self.config.dwell
        idle = captures_little(growth, attention, self.config) & old
        if not bool(idle.any()):
            growth.weak.zero_()
            return None
        rows = max(1, WITNESSES // x.shape[1])
        x, mask = x[:rows], None if mask is None else mask[:rows]
        with torch.no_grad():
            lengths = attention.head_outputs(x, mask).norm(dim=-1).mean((0, 2))  # (H,)
            outputs = mean_over((lengths / x.norm(dim=-1).mean().clamp_min(1e-12)).float())
        quiet = idle & (outputs < self.config.eps_out)
        growth.weak[:heads] = torch.where(quiet, growth.weak[:heads] + 1, 0)
        return outputs

    def _set_prototypes(self) -> None:
        for layer in self.model.active():
            if isinstance(layer.feed_forward, DDCLBlock) and layer.tokens is not None:
                layer.feed_forward.initialise_from(layer.tokens, generator=self.generator)
                share(layer)
            layer.tokens = None
        self.structure.random.copy_(self.generator.get_state())

    def _resume(self) -> None:
        """Take up counters that were set or loaded."""
        self._version = self.structure.version
        self.generator.set_state(self.structure.random.cpu())

    def _prepare(self) -> None:
        self._losses = []
        if self.structure.turns():
            listen(self.model)

    def _note(self, event: Event) -> Event:
        self.events.append(event)
        return event


def _growth(layer: EncoderLayer) -> LayerGrowth:
    growth = layer.growth
    assert isinstance(growth, LayerGrowth)
    return growth
