r"""The controller of growth: it looks at the gradient of attention now and then, and lets heads come and go.

After each step of the optimiser it is asked whether something is to happen. A head is born when the signal of
a gate persists above its threshold (arXiv 2604.10703), and goes when it captures little and adds little; not
both in one check, and never the last head. All that it remembers stands in buffers of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.encoder import SelfOrganisingEncoder
from geomlib.incrt.events import Event, Reading
from geomlib.incrt.growth import GrowthConfig, LayerGrowth, Structure, attach, listen
from geomlib.incrt.layer import EncoderLayer
from geomlib.incrt.motor import GradientMotor, HeadsMotor, motor_statistics
from geomlib.incrt.operator import residual_operator
from geomlib.incrt.optimiser import SlotClock
from geomlib.incrt.processes import mean_over, reduced, several, share
from geomlib.incrt.prototypes import DDCLBlock
from geomlib.incrt.pruning import directional_energy

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
            for layer in self._layers()
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
        structure.steps += 1
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
            self._absorb(attention, growth)
            top = growth.gate.observe(t, growth.motor.S, growth.motor.Ma).top
            signal, threshold = float(top), growth.gate.threshold()
            if self.config.motor == "plateau":
                signal, threshold = float(self.structure.stale), float(self.config.persistence)
            weak = self._weak(attention, growth, witness.x, witness.mask, t)
            if self._wants_head(growth, attention, t):
                events += self._births(index, growth, attention, t, signal)
            elif (head := self._prunable(growth, attention, weak, t)) is not None:
                events.append(self._prune(index, head, t, signal))
            elif self.config.refresh is not None and t % self.config.refresh < self.config.check_every:
                self._refresh(attention, growth)
            self.history.append(Reading(t, index, signal, threshold, attention.active))
        return events

    def _absorb(self, attention: DirectionalAttention, growth: LayerGrowth) -> None:
        """Bring what was recorded into the running means, alike in all processes."""
        motor = growth.motor
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        wants_gradient = isinstance(motor, GradientMotor)
        found = [
            motor_statistics(
                seen.delta if wants_gradient else None, seen.x, seen.mask, attention.causal,
                scale=scale, dtype=motor.S.dtype,
            )
            for seen in attention.recorded
        ]  # fmt: skip
        total = found[0]
        for part in found[1:]:
            total = total.combine(part)
        total = reduced(total)
        if isinstance(motor, GradientMotor):
            motor.absorb(total)
            return
        usable = total.gram.isfinite().all() & (total.tokens > 0)
        motor._absorb(total.gram / total.tokens.clamp_min(1), motor.Ma, usable)
        if isinstance(motor, HeadsMotor):
            queries, keys = attention.W_Q.detach(), attention.W_K.detach()
            form = torch.einsum("hik,hjk->ij", queries, keys).to(motor.Ma)
            motor.Ma.copy_((form - form.mT) / 2)

    def _absorb_loss(self) -> None:
        if not self._losses:
            if self.config.motor == "plateau" or self.config.loss_floor is not None:
                raise ValueError("the loss must be watched: wrap it with GrowthController.watch")
            return
        structure, value = self.structure, torch.stack(self._losses).mean().to(self.structure.loss)
        value = mean_over(value)
        old = structure.loss.nan_to_num(nan=float(value))
        structure.loss.copy_(torch.lerp(value, old, self.config.ema))
        better = ~(structure.loss > structure.best * (1 - self.config.plateau_tol))
        structure.best.copy_(torch.where(better, structure.loss, structure.best))
        structure.stale.copy_(torch.where(better, 0, structure.stale + 1))

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
        idle = self._captures_little(attention, growth) & old
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

    def _captures_little(self, attention: DirectionalAttention, growth: LayerGrowth) -> Tensor:
        """Which heads capture little directed energy, `(H,)` bool."""
        motor, config = growth.motor, self.config
        if config.motor in ("grad", "plateau"):
            energy = directional_energy(motor.S, attention.W_Q.detach(), attention.W_K.detach())
            ordered, heads = energy.sort().values, attention.active
            return energy < config.phi_g * (ordered[(heads - 1) // 2] + ordered[heads // 2]) / 2
        columns = growth.columns[: attention.active]
        A = residual_operator(motor.S, motor.Ma)
        q = growth.gate.held[:, columns.clamp_min(0)]
        captured = (q * (A @ q)).sum(0)
        return (captured < config.phi_g * growth.gate.threshold()) & (columns >= 0)

    def _refresh(self, attention: DirectionalAttention, growth: LayerGrowth) -> None:
        """Give each head the direction that it captures now, in the order of capture."""
        held = [int(column) for column in growth.columns[: attention.active]]
        slots = sorted((slot for slot, column in enumerate(held) if column >= 0), key=lambda slot: held[slot])
        if not slots or not self.config.project:
            return
        fresh = []
        for slot in slots:
            form = (attention.W_Q[slot] @ attention.W_K[slot].mT).detach().to(growth.motor.S)
            fresh.append(
                torch.linalg.eigh(residual_operator(growth.motor.S, (form - form.mT) / 2)).eigenvectors[:, -1]
            )
        growth.gate.refresh(torch.stack(fresh, 1))

    def _set_prototypes(self) -> None:
        for layer in self.model.active():
            if isinstance(layer.feed_forward, DDCLBlock) and layer.tokens is not None:
                layer.feed_forward.initialise_from(layer.tokens, generator=self.generator)
                share(layer)
            layer.tokens = None
        self.structure.random.copy_(self.generator.get_state())

    # What keeps pace with the training.

    def _resume(self) -> None:
        """Take up counters that were set or loaded."""
        self._version = self.structure.version
        self.generator.set_state(self.structure.random.cpu())

    def _prepare(self) -> None:
        self._losses = []
        listen(self.model)

    def _layers(self) -> list[EncoderLayer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def _note(self, event: Event) -> Event:
        self.events.append(event)
        return event


def _growth(layer: EncoderLayer) -> LayerGrowth:
    growth = layer.growth
    assert isinstance(growth, LayerGrowth)
    return growth
