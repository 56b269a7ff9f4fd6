"""Fixed-point solvers: plain iteration, Anderson acceleration, Broyden's method.

All work on a batch of independent samples with states flattened to ``(batch, n)`` and learn one model of the
map per sample. Anderson acceleration is the variant with truncated Gram-Schmidt (Tang, Xu, He, Saad, Xi 2024,
arXiv 2403.14961), Broyden's is the "good" update (Broyden 1965).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from geomlib.core.monitor import Monitor

__all__ = ["Anderson", "Broyden", "Picard", "Solver"]

Map = Callable[[Tensor], Tensor]

# A restart is due when a sample's residual exceeds its best by this factor. Broyden's residual rises on its
# way down, and a restart throws away what the rise has taught ...
GROWTH = 2.0
BROYDEN_GROWTH = 100.0
# ... and a sample is given up after this many evaluations that ran away or were not finite.
PATIENCE = 3


class Solver(Protocol):
    """What :func:`geomlib.core.solve` asks of a solver: iterate until the monitor says stop.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import solve
    >>> class Halfway:
    ...     def run(self, f, x, monitor):
    ...         while not monitor.observe(x, image := f(x), image - x):
    ...             x = (x + image) / 2
    >>> solve(lambda z: 2 - z, torch.zeros(1, 1), solver=Halfway()).value
    tensor([[1.]])
    """

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Iterate ``x <- ...`` on ``(batch, n)`` states, reporting each evaluation to ``monitor``."""


@dataclass(frozen=True)
class Picard:
    """Plain iteration ``z <- (1 - damping) z + damping f(z)``.

    Converges from anywhere at the rate of the contraction factor (Banach 1922); nothing is stored but the
    state.

    Parameters
    ----------
    damping : float
        Share of the new image in the next state, in (0, 2).

    Raises
    ------
    ValueError
        If ``damping`` is not in (0, 2).

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Picard, solve
    >>> solve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Picard(), tol=1e-4).value
    tensor([[1.9998]])
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        _check_damping(self.damping)

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Iterate until ``monitor`` says stop."""
        while True:
            image = f(x)
            difference = image - x
            if monitor.observe(x, image, difference):
                return
            x = image if self.damping == 1.0 else torch.add(x, difference, alpha=self.damping)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: the next state cancels the residual, as far as the last differences can.

    Differences of residuals are orthonormalised against the window as they arrive (truncated Gram-Schmidt)
    and the state differences are carried along, so no Gram matrix is formed, no small system solved and no
    condition number squared. For an affine map this is a truncated Krylov method: with a symmetric Jacobian a
    short window already gives the iterates of GMRES. A sample whose residual grows to twice its best starts a
    new window.

    Parameters
    ----------
    memory : int
        Differences kept, at most the size of one sample's state.
    ridge : float
        A residual difference of which less than this share is orthogonal to the window brings no direction,
        only rounding and an old slope to fight: the sample's window starts again with it. Relative to the
        difference itself, so singular windows do no harm and no tolerance is out of reach.
    damping : float
        Share of the accelerated image in the next state, in (0, 2).

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: Walker and Ni 2011 for the method, arXiv 2403.14961 for the Gram-Schmidt form. Reconstructed: the
    restart rules.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Anderson, Picard, solve
    >>> f, z0 = lambda z: 0.99 * z + 1, torch.zeros(1, 1, dtype=torch.float64)
    >>> [int(solve(f, z0, solver=s, max_steps=2000).steps) for s in (Picard(), Anderson())]
    [917, 3]
    """

    memory: int = 6
    ridge: float = 0.01
    damping: float = 1.0

    def __post_init__(self) -> None:
        _check_memory(self.memory)
        _check_damping(self.damping)
        if not 0 <= self.ridge < 1:
            raise ValueError(f"ridge must lie in [0, 1), got {self.ridge}: it is a share of a difference")

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Iterate until ``monitor`` says stop."""
        batch, n = x.shape
        memory = min(self.memory, n)
        monitor.allow(GROWTH, PATIENCE)
        # Row i of the window is [q_i | p_i]: an orthonormal direction q_i of residual space and the change
        # p_i of the damped image that goes with it. Rows not yet filled are zero. All views are taken once:
        # at the usual sizes slicing costs as much as the work.
        window = x.new_zeros(batch, memory, 2 * n)
        slots = window.split(1, 1)
        q, p = window.split(n, 2)
        q = q.mT
        # Below 400 products a sample, torch's batched product falls back to a loop several times slower than
        # taking both halves.
        wide = memory * n < 400 <= 2 * memory * n
        pairs, change, part = (_Pair(x), _Pair(x)), _Pair(x), _Pair(x)
        rewound: Tensor | None = None
        count = 0  # of differences so far
        while True:
            now, before = pairs[count % 2], pairs[1 - count % 2]
            image = f(x)
            torch.sub(image, x, out=now.residual)
            if self.damping == 1.0:
                now.target.copy_(image)
            else:
                torch.add(x, now.residual, alpha=self.damping, out=now.target)
            if monitor.observe(x, image, now.residual):
                return
            if count == 0:
                change.both.zero_()
            else:
                torch.sub(now.both, before.both, out=change.both)
            if rewound is not None or monitor.restart is not None:
                rewound = _start_again(now, change, window, rewound, monitor)
            if count == 0:
                x, count = now.target.clone(), 1
                continue

            row = slots[(count - 1) % memory]
            if count > memory:
                row.zero_()  # the oldest direction leaves before the new one is made orthogonal
            torch.baddbmm(change.both, torch.bmm(change.r, q), window, alpha=-1, out=part.both)
            left = torch.linalg.vector_norm(part.r, dim=2)
            whole = torch.linalg.vector_norm(change.r, dim=2)
            fresh = torch.sub(left, whole, alpha=self.ridge)
            if not (monitor.on_host and float(fresh.min()) >= 0):
                left = _drop_known(change, part, window, fresh, left, whole, monitor)
            torch.div(part.both, left.clamp_min_(monitor.tiny).unsqueeze(2), out=row)

            weights = torch.bmm(now.r, q)
            if wide:
                x = torch.baddbmm(now.both, weights, window, alpha=-1)[:, 0, n:].contiguous()
            else:
                x = torch.baddbmm(now.s, weights, p, alpha=-1)[:, 0]
            count += 1


class _Pair:
    """Residual ``r`` and damped image ``s`` side by side, ``(batch, 1, 2 n)``, and its views."""

    def __init__(self, like: Tensor) -> None:
        batch, n = like.shape
        self.both = like.new_empty(batch, 1, 2 * n)
        self.r, self.s = self.both.split(n, 2)
        self.residual, self.target = self.r.squeeze(1), self.s.squeeze(1)


def _drop_known(
    change: _Pair,
    part: _Pair,
    window: Tensor,
    fresh: Tensor,
    left: Tensor,
    whole: Tensor,
    monitor: Monitor,
) -> Tensor:
    """Start the window again where the new difference lies in it; the norm of what is taken instead."""
    known = (fresh < 0) & monitor.active.unsqueeze(1)
    if monitor.on_host and not bool(known.any()):  # samples that have stopped raise no alarm
        return left
    mask = known.unsqueeze(2)
    window.masked_fill_(mask, 0.0)
    torch.where(mask, change.both, part.both, out=part.both)
    return torch.where(known, whole, left)


def _start_again(
    now: _Pair, change: _Pair, window: Tensor, rewound: Tensor | None, monitor: Monitor
) -> Tensor | None:
    """Forget the window where the monitor says so; go on from the best image where ``f`` ran away."""
    back = None
    if monitor.restart is not None and monitor.rewind is not None:
        window.masked_fill_(monitor.restart[:, None, None], 0.0)
        back = monitor.rewind.unsqueeze(1)
        now.residual.masked_fill_(back, 0.0)
        torch.where(back, monitor.value, now.target, out=now.target)
    # A difference with a point that was given up, now or one step ago, says nothing.
    stale = back if rewound is None else rewound if back is None else back | rewound
    if stale is not None:
        change.both.masked_fill_(stale.unsqueeze(2), 0.0)
    return back


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method on ``f(z) - z = 0``, the inverse Jacobian as ``-I`` plus rank-one updates.

    Parameters
    ----------
    memory : int
        Updates kept; when they are used up the model starts again from ``-I``.

    Raises
    ------
    ValueError
        If ``memory`` is not positive.

    Notes
    -----
    Source: Broyden 1965, in the Sherman-Morrison form. Reconstructed: updates with a vanishing denominator
    are skipped per sample, and a sample whose residual grows to a hundred times its best starts
    again.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Broyden, solve
    >>> bool(solve(torch.cos, torch.zeros(2, 3), solver=Broyden(), tol=1e-5).converged.all())
    True
    """

    memory: int = 30

    def __post_init__(self) -> None:
        _check_memory(self.memory)

    def run(self, f: Map, x: Tensor, monitor: Monitor) -> None:
        """Iterate until ``monitor`` says stop."""
        batch, n = x.shape
        eps = torch.finfo(x.dtype).eps
        monitor.allow(BROYDEN_GROWTH, PATIENCE)
        # H = -I + sum_i left_i right_i^T approximates the inverse of f' - I.
        left, right = x.new_zeros(batch, self.memory, n), x.new_zeros(batch, self.memory, n)
        step = old_residual = None
        rewound: Tensor | None = None
        used = 0
        while True:
            image = f(x)
            residual = (image - x).unsqueeze(1)
            if monitor.observe(x, image, residual[:, 0]):
                return
            back, stale = None, rewound
            if monitor.restart is not None and monitor.rewind is not None:
                again = monitor.restart[:, None, None]
                left.masked_fill_(again, 0.0)
                right.masked_fill_(again, 0.0)
                back = monitor.rewind[:, None, None]
                residual = residual.masked_fill_(back, 0.0)
                # The last step was made with the model just dropped, so it does not update the new one.
                stale = again if rewound is None else again | rewound

            applied = _apply(left[:, :used], right[:, :used], residual)  # H residual with the old H
            if step is not None and old_residual is not None:
                if used == self.memory:
                    left.zero_()
                    right.zero_()
                    used = 0
                    applied = -residual
                else:
                    row = _apply(right[:, :used], left[:, :used], step)  # step^T H
                    change = residual - old_residual
                    denominator = (row * change).sum(-1, keepdim=True)
                    size = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
                    usable = denominator.abs() > eps * size * torch.linalg.vector_norm(
                        change, dim=-1, keepdim=True
                    )
                    if stale is not None:
                        usable = usable & ~stale
                    # step was -H old_residual, so step - H change = -H residual.
                    column = torch.where(usable, -applied / denominator, 0.0)
                    row = torch.where(usable, row, 0.0)
                    left[:, used], right[:, used] = column[:, 0], row[:, 0]
                    used += 1
                    applied = applied + column * (row * residual).sum(-1, keepdim=True)
            rewound = back
            step, old_residual = -applied, residual
            if back is not None:
                step = torch.where(back, (monitor.value - x).unsqueeze(1), step)
                x = torch.where(back[:, 0], monitor.value, x + step[:, 0])
            else:
                x = x + step[:, 0]


def _apply(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """``(-I + sum_i left_i right_i^T) vector`` for row vectors ``(batch, 1, n)``."""
    return torch.baddbmm(vector, torch.bmm(vector, right.transpose(1, 2)), left, beta=-1)


def _check_damping(damping: float) -> None:
    if not 0 < damping < 2:
        raise ValueError(
            f"damping must lie in (0, 2), got {damping}: the step would not move towards the image"
        )


def _check_memory(memory: int) -> None:
    if memory < 1:
        raise ValueError(f"memory must be at least 1, got {memory}: without history use Picard()")
