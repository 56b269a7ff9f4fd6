"""What Frost is measured against: untied depth, tied depth, and a state-space model without scale.

The names and Table 3 are those of arXiv 2601.19551 (section 6). The cells are reconstructed from its eq. (4):
`h + A_t(h)`, `h + A(h)` and `h + A(h) + B x`, with the same stem, heads and number of steps as `Frost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from geomlib.frost.transitions import Prepared, Transition
from geomlib.frost.unrolled import Context, Unrolled, on_channels

__all__ = ["BasicSSM", "Recurrent", "Vanilla"]


class Vanilla(Unrolled):
    """A residual network: `h <- h + A_t(h)` with a block of its own at each step, started at the features.

    Parameters
    ----------
    stem : Module
        From the inputs to `(N, width, ...)`.
    transitions : sequence of Transition
        One block for each step; as many as there are steps.
    width, classes, axes, read_position, readout_norm
        As in :class:`geomlib.frost.Frost`.
    supervise, detach_halt, checkpoint, generator, device, dtype
        As in :class:`geomlib.frost.Frost`.

    Raises
    ------
    ValueError
        If an argument is out of range; in `forward`, if more steps are asked for than there are blocks.

    Notes
    -----
    Source: section 6; the cell is reconstructed.

    Examples
    --------
    >>> from geomlib.frost import Block
    >>> model = Vanilla(nn.Linear(3, 8), [Block(8), Block(8)], 8, 2)
    >>> model(torch.ones(5, 3)).logits.shape
    torch.Size([5, 2, 2])
    """

    fixed_depth = True

    def __init__(
        self,
        stem: nn.Module,
        transitions: Sequence[Transition],
        width: int,
        classes: int,
        *,
        axes: int = 0,
        read_position: int | None = None,
        readout_norm: bool = False,
        supervise: Literal["last", "all"] = "last",
        detach_halt: bool = False,
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            stem,
            width,
            classes,
            axes=axes,
            steps=len(transitions),
            read_position=read_position,
            readout_norm=readout_norm,
            couple=False,
            initial="stem",
            supervise=supervise,
            detach_halt=detach_halt,
            checkpoint=checkpoint,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.transitions = nn.ModuleList(transitions)

    def inject(self, inputs: Tensor) -> Context:
        """Compute the features."""
        return Context(self.features(inputs))

    def step(self, state: Tensor, context: Context, t: int) -> Tensor:
        """Apply block `t`, from 1 to the number of steps."""
        if not 1 <= t <= self.steps:
            raise ValueError(f"t must lie in [1, {self.steps}], got {t}: untied steps end there")
        return state + self.transitions[t - 1](state, Prepared())


class _Tied(Unrolled):
    """What the two tied baselines share: one block, and whether the input is injected at every step."""

    couple: bool

    def __init__(
        self,
        stem: nn.Module,
        transition: Transition,
        width: int,
        classes: int,
        *,
        axes: int = 0,
        steps: int = 12,
        read_position: int | None = None,
        readout_norm: bool = False,
        supervise: Literal["last", "all"] = "last",
        detach_halt: bool = False,
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            stem,
            width,
            classes,
            axes=axes,
            steps=steps,
            read_position=read_position,
            readout_norm=readout_norm,
            couple=self.couple,
            initial="stem",
            supervise=supervise,
            detach_halt=detach_halt,
            checkpoint=checkpoint,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.transition = transition


class Recurrent(_Tied):
    """One block again and again: `h <- h + A(h)`, started at the features, which are not injected again.

    Parameters and errors are those of :class:`geomlib.frost.Frost` without mode, scale and start.

    Notes
    -----
    Source: section 6; the cell is reconstructed.

    Examples
    --------
    >>> from geomlib.frost import Block
    >>> model = Recurrent(nn.Linear(3, 8), Block(8), 8, 2, steps=4)
    >>> model(torch.ones(5, 3), steps=9).logits.shape
    torch.Size([5, 9, 2])
    """

    couple = False

    def inject(self, inputs: Tensor) -> Context:
        """Compute the features, and what the transition keeps of them."""
        x = self.features(inputs)
        rows, shared = self.transition.prepare(x)
        return Context(x, rows=rows, shared=shared)

    def step(self, state: Tensor, context: Context, t: int = 1) -> Tensor:
        """Apply the block once; `t` is ignored."""
        return state + self.transition(state, Prepared(context.rows, context.shared))


class BasicSSM(_Tied):
    """The state-space form without scale: `h <- h + A(h) + B x`, read as `C h + D x`.

    Parameters and errors are those of :class:`geomlib.frost.Frost` without mode, scale and start. It is the
    mode `euler` at `lambda = 1`.

    Notes
    -----
    Source: eq. (4) and section 6.

    Examples
    --------
    >>> from geomlib.frost import Block
    >>> model = BasicSSM(nn.Linear(3, 8), Block(8), 8, 2, steps=4)
    >>> model(torch.ones(5, 3)).scores.shape
    torch.Size([5, 4])
    """

    couple = True

    def inject(self, inputs: Tensor) -> Context:
        """Compute features, `B x` and `D x`."""
        x = self.features(inputs)
        rows, shared = self.transition.prepare(x)
        return Context(x, bx=on_channels(self.B, x), dx=self.D(self.pool(x)), rows=rows, shared=shared)

    def step(self, state: Tensor, context: Context, t: int = 1) -> Tensor:
        """Apply the block once; `t` is ignored."""
        assert context.bx is not None
        return state + context.bx + self.transition(state, Prepared(context.rows, context.shared))
