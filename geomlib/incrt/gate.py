r"""The gate: it tracks both ends of the residual spectrum, and says when a head is due and where.

Two ways to track: a decomposition at every check (Lanczos above `LANCZOS_FROM` dimensions), or online, one
or a few normalised Oja steps for the top and averaged minor-component steps for the bottom (arXiv
2604.10703; Oja 1982; MCA EXIN, Cirrincione et al. 2002). All that the gate remembers lives in buffers, so
that a checkpoint holds it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from geomlib.incrt.operator import check_pair, residual_matvec, residual_operator, threshold_floor
from geomlib.incrt.spectrum import Extremes, extreme_eigenpairs, fix_sign, lanczos_extremes, orthonormalise
from geomlib.incrt.trackers import mca_step, normalise, oja_step

__all__ = ["Gate"]


Mode = Literal["auto", "eigh", "lanczos", "online"]
MODES = ("auto", "eigh", "lanczos", "online")
# A full decomposition of 512 dimensions takes half a second on a processor, twice the width ten times that.
LANCZOS_FROM = 513


class Gate(nn.Module):
    r"""When to add a head, and along which direction, from moments `S` and a motor `M_a` seen at every check.

    Parameters
    ----------
    d
        Width.
    mode
        `"eigh"`: a decomposition at every check. `"lanczos"`: its ends alone, from products. `"online"`: a
        few Oja and minor-component steps from where the last check left off. `"auto"`: `eigh` up to 512
        dimensions, then `lanczos`.
    theta
        The threshold; `None` sets it to `frac` times the median signal of the calibration.
    frac
        See `theta`.
    calibrate
        First and last training step of the calibration.
    dwell
        Steps that must pass between events, so that directions and motor settle.
    persistence
        Checks whose median must exceed the threshold, so that one noisy batch adds no head. Fewer count
        while fewer were made since the last event, so the dwell should be longer than that.
    block_ratio
        Directions whose eigenvalue is at least this share of the largest grow together; 1 grows one at a
        time.
    online_steps
        Steps of each tracker in a check, with `mode="online"`.
    generator
        Draws where the trackers start, on the CPU.
    device, dtype
        Of the buffers.

    Attributes
    ----------
    directions
        `(d, m)`: the directions given to heads, in the order of capture, orthonormal.
    theta
        The threshold `()`, -1 until it is known.

    Raises
    ------
    ValueError
        For arguments out of range; in `capture` if there is no direction left (`m = d`) or it lies in the
        span of those captured; in `release` if there is no such column.

    Notes
    -----
    Source: arXiv 2604.10703 and the author's public code for the rule. Reconstructed: the fixed dwell, the
    median, the floor of the threshold at rounding level, blocks at a ratio. The second condition of the
    code, that the bottom eigenvalue lie below a positive number, is left out: the bottom of a traceless
    operator is not above zero, nor of what is left of it if the captured quotients are positive in sum. In
    evaluation mode `observe` measures and remembers nothing.

    Examples
    --------
    >>> from geomlib.incrt.counts import planted_operator
    >>> S, Ma = planted_operator([3.0, 2.0, 1.0], 8, generator=torch.Generator().manual_seed(0))
    >>> gate = Gate(8, theta=1.5, dwell=0, persistence=1)
    >>> for step in range(5):
    ...     signal = gate.observe(step, S, Ma)
    ...     if gate.ready(step):
    ...         gate.capture(gate.proposal(S, Ma), step)
    >>> gate.captured, round(signal.top.item(), 4)
    (2, 1.0)
    """

    theta: Tensor
    floor: Tensor
    trackers: Tensor
    start: Tensor
    held: Tensor
    count: Tensor
    calibration: Tensor
    calibrated: Tensor
    recent: Tensor
    seen: Tensor
    last_event: Tensor

    def __init__(
        self,
        d: int,
        *,
        mode: Mode = "auto",
        theta: float | None = None,
        frac: float = 0.15,
        calibrate: tuple[int, int] = (20, 60),
        dwell: int = 250,
        persistence: int = 15,
        block_ratio: float = 1.0,
        online_steps: int = 10,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_gate(d, mode, theta, frac, calibrate, dwell, persistence, block_ratio, online_steps)
        self.d, self.frac, self.calibrate = d, frac, calibrate
        self.mode = mode if mode != "auto" else _by_width(d)
        self.dwell, self.persistence, self.block_ratio = dwell, persistence, block_ratio
        self.online_steps = online_steps
        draws = normalise(torch.randn(3, d, generator=generator, dtype=dtype)).to(device)

        def zeros(*shape: int, kind: torch.dtype | None = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=kind)

        buffers = {
            "theta": zeros().fill_(-1 if theta is None else theta),
            "floor": zeros(),
            "trackers": draws[:2].clone(),  # top and bottom
            "start": draws[2].clone(),  # where a tracker starts anew when its direction was captured
            "held": zeros(d, d),  # the captured directions, then zeros
            "count": zeros(kind=torch.int64),
            "calibration": zeros(calibrate[1] - calibrate[0] + 1),
            "calibrated": zeros(kind=torch.int64),
            "recent": zeros(persistence),
            "seen": zeros(kind=torch.int64),
            "last_event": zeros(kind=torch.int64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @property
    def captured(self) -> int:
        """How many directions are captured."""
        return int(self.count)

    @property
    def directions(self) -> Tensor:
        """The captured directions `(d, m)`, orthonormal columns in the order of capture."""
        return self.held[:, : self.captured]

    @torch.no_grad()
    def measure(self, S: Tensor, Ma: Tensor) -> Extremes:
        """Return both ends of the residual spectrum and remember nothing."""
        check_pair(S, Ma)
        if S.shape[-1] != self.d:
            raise ValueError(f"S must have width {self.d}, got {S.shape[-1]}: the directions are that long")
        if not bool(S.isfinite().all() & Ma.isfinite().all()):
            raise ValueError("S and Ma must be finite: the spectrum of a NaN is none")
        Q = self.directions
        if Q.shape[1] == self.d:  # nothing is left, not even a vector to start from
            nothing = S.new_zeros(())
            return Extremes(nothing, nothing, self.trackers[0], self.trackers[1], nothing)
        if self.mode == "online":
            return self._online(residual_operator(S, Ma, Q))
        start = _project(self.trackers.sum(0) + 0.1 * self.start, Q)
        return _ends(S, Ma, Q, self.mode, start)

    @torch.no_grad()
    def observe(self, step: int, S: Tensor, Ma: Tensor) -> Extremes:
        """Measure, and in training mode remember: trackers, threshold, recent signals.

        Parameters
        ----------
        step
            Of the training, at least 0; it need not be the next one.
        S, Ma
            `(d, d)`: of a motor.

        Returns
        -------
        Extremes
            Of the residual operator, as far as the mode of tracking knows them.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}: it counts the steps of training")
        found = self.measure(S, Ma)
        if not self.training:
            return found
        self.trackers[0], self.trackers[1] = found.u_top, found.u_bottom
        self.floor.copy_(threshold_floor(S, Ma))
        first, last = self.calibrate
        if bool(self.theta < 0):
            known = int(self.calibrated)
            due = first <= step <= last and known < len(self.calibration)  # a step may come twice
            if due or (step > last and not known):
                self.calibration[known] = found.top
                self.calibrated += 1
                known += 1
            if step >= last:
                self.theta.copy_(self.frac * self.calibration[:known].median())
                return found
        self.recent[int(self.seen) % self.persistence] = found.top
        self.seen += 1
        return found

    def threshold(self) -> float:
        """Return what a signal must exceed: `theta`, but no less than rounding; `inf` before it is known."""
        theta = float(self.theta)
        return math.inf if theta < 0 else max(theta, float(self.floor))

    def ready(self, step: int) -> bool:
        """Whether a head is due: the dwell is over, and the median recent signal above the threshold."""
        threshold, known = self.threshold(), min(int(self.seen), self.persistence)
        if known == 0 or self.captured == self.d or step - int(self.last_event) < self.dwell:
            return False
        return float(self.recent[:known].median()) > threshold

    @torch.no_grad()
    def proposal(self, S: Tensor, Ma: Tensor) -> Tensor:
        """Return the directions `(d, k)` to grow along: the tracked one, and those of its block.

        The block is found by projecting out what it holds, so that each further direction costs one
        measurement.
        """
        block = orthonormalise(self.trackers[0], self.directions).unsqueeze(1)
        if self.block_ratio == 1:
            return block
        mode = _by_width(self.d) if self.mode == "online" else self.mode
        least = self.block_ratio * (block[:, 0] @ residual_matvec(S, Ma, self.directions, block[:, 0]))
        while self.captured + block.shape[1] < self.d:
            Q = torch.cat([self.directions, block], 1)
            found = _ends(S, Ma, Q, mode, _project(self.start, Q))
            if not bool(found.top >= least) or not float(found.top) > self.threshold():
                break
            block = torch.cat([block, orthonormalise(found.u_top, Q).unsqueeze(1)], 1)
        return block

    @torch.no_grad()
    def capture(self, directions: Tensor, step: int) -> None:
        """Give directions `(d,)` or `(d, k)` to heads, and forget the recent signals, which saw them free."""
        added = orthonormalise(directions.to(self.held), self.directions)
        added = added.unsqueeze(1) if added.dim() == 1 else added
        m = self.captured
        self.held[:, m : m + added.shape[1]] = added
        self._event(m + added.shape[1], step)

    @torch.no_grad()
    def release(self, column: int, step: int) -> None:
        """Take a direction back from a head that was pruned; later columns move one to the left."""
        m = self.captured
        if not 0 <= column < m:
            raise ValueError(f"column must lie in 0 ... {m - 1}, got {column}: no such direction is captured")
        kept = torch.cat([self.held[:, :column], self.held[:, column + 1 : m]], 1)
        self.held.zero_()
        self.held[:, : m - 1] = kept
        self._event(m - 1, step)

    @torch.no_grad()
    def refresh(self, directions: Tensor) -> None:
        """Replace the captured directions by `(d, m)`, made orthonormal in their order; this is no event."""
        m = self.captured
        if directions.shape != (self.d, m):
            raise ValueError(f"directions must have shape {(self.d, m)}, got {tuple(directions.shape)}")
        self.held[:, :m] = orthonormalise(directions.to(self.held))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.d}, mode={self.mode!r}, dwell={self.dwell}, captured={self.captured}"

    def _online(self, A: Tensor) -> Extremes:
        Q = self.directions
        eta = 1 / torch.linalg.matrix_norm(A).clamp_min(torch.finfo(A.dtype).tiny)
        top, bottom = (self._alive(u, Q) for u in self.trackers.to(A))
        for _ in range(self.online_steps):
            top = normalise(_project(oja_step(top, A, eta), Q))
            bottom = normalise(_project(mca_step(bottom, A, eta), Q))
        ends = fix_sign(torch.stack([top, bottom], 1))
        image = A @ ends
        values = (ends * image).sum(0)
        residual = torch.linalg.vector_norm(image - values * ends, dim=0).amax()
        return Extremes(values[0], values[1], ends[:, 0], ends[:, 1], residual)

    def _alive(self, u: Tensor, Q: Tensor) -> Tensor:
        """Return a unit vector off `Q`: the tracker, or where it starts anew if nothing of it is left."""
        left = _project(u, Q)
        fresh = _project(self.start.to(u), Q)
        return normalise(torch.where(torch.linalg.vector_norm(left) > 0.1, left, fresh))

    def _event(self, count: int, step: int) -> None:
        self.count.fill_(count)
        self.last_event.fill_(step)
        self.seen.zero_()
        if count < self.d:
            Q = self.directions
            for k in range(2):
                self.trackers[k] = self._alive(self.trackers[k], Q)


def _ends(S: Tensor, Ma: Tensor, Q: Tensor, mode: str, start: Tensor) -> Extremes:
    if mode == "eigh":
        return extreme_eigenpairs(residual_operator(S, Ma, Q))
    return lanczos_extremes(lambda v: residual_matvec(S, Ma, Q, v), start.to(S))


def _by_width(d: int) -> Literal["eigh", "lanczos"]:
    return "eigh" if d < LANCZOS_FROM else "lanczos"


def _project(u: Tensor, Q: Tensor) -> Tensor:
    for _ in range(2):
        u = u - Q @ (Q.mT @ u)
    return u


def _check_gate(
    d: int,
    mode: str,
    theta: float | None,
    frac: float,
    calibrate: tuple[int, int],
    dwell: int,
    persistence: int,
    block_ratio: float,
    online_steps: int,
) -> None:
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}: there would be no direction")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if theta is not None and not theta >= 0:
        raise ValueError(f"theta must be at least 0, got {theta}: captured directions have eigenvalue 0")
    if not 0 < frac < math.inf:
        raise ValueError(
            f"frac must be positive and finite, got {frac}: the threshold is that share of a signal"
        )
    if not 0 <= calibrate[0] <= calibrate[1]:
        raise ValueError(
            f"calibrate must hold a first and a last step, got {calibrate}: nothing lies between"
        )
    if dwell < 0:
        raise ValueError(f"dwell must be at least 0, got {dwell}: it is a number of steps")
    if persistence < 1:
        raise ValueError(f"persistence must be at least 1, got {persistence}: no signal would be looked at")
    if not 0 < block_ratio <= 1:
        raise ValueError(
            f"block_ratio must lie in (0, 1], got {block_ratio}: it is a share of the top eigenvalue"
        )
    if online_steps < 1:
        raise ValueError(
            f"online_steps must be at least 1, got {online_steps}: the trackers would stand still"
        )
