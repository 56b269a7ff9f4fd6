r"""The middle block of a stable invariant model: the linear map that survives infinite time.

Konishi and Kawahara (arXiv 2207.07475) expand a state in eigenfunctions of the Koopman operator and keep what
does not decay, `y -> U (V^T y)`. The non-zero spectrum of `M = U V^T` is that of the small `Theta = V^T U`,
and `M^t = U Theta^(t-1) V^T`. The authors' code leaves `U` and `V` free; the other modes enforce what the
theory asks for.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["Mode", "SpectralMix"]

Mode = Literal["free", "orth", "oblique", "rotation", "stable"]
_CHECK_EVERY = (
    100  # forward passes in training between two looks at the conditioning: a look waits for the device
)
_ILL_CONDITIONED = 1e4


class SpectralMix(nn.Module):
    r"""A square map of `dim` features through `rank` spectral coordinates, with its spectrum under control.

    ========  ============================  ===============================  ==================
    mode      map `M`                       what holds at every step         parameters
    ========  ============================  ===============================  ==================
    free      `U V^T`                       nothing (the authors' block)     U, V
    orth      `Q Q^T`, `Q = qr(U)`          `M M = M = M^T`                  U
    oblique   `U (V^T U)^-1 V^T`            `M M = M`                        U, V
    rotation  `U R (V^T U)^-1 V^T`          all `rank` eigenvalues on the    U, V, angle
                                            unit circle
    stable    `U diag(1, R, d R, d) U^-1`   all `dim` eigenvalues in the     U (dim, dim),
                                            unit disk, the split known       angle, decay
    ========  ============================  ===============================  ==================

    `R` are plane rotations and `d` numbers in (-1, 1). Feature vectors are rows of a batch, so that
    `forward(y) = y @ M.T`.

    Parameters
    ----------
    dim
        Number of features `D`.
    rank
        Number `r` of spectral coordinates, `dim // 2` by default as in the authors' code. In mode `stable` it
        counts the eigenvalues of modulus one; the other `dim - rank` decay.
    mode
        One of the rows above.
    init
        `"orthonormal"` starts as a projection (`U` and `V` share orthonormal columns), `"default"` draws the
        ranges of `torch.nn.Linear`, as the authors' code does.
    rotations, ones
        Mode `stable` only: how many rotating pairs and how many eigenvalues 1. Together they make `rank`;
        with neither given, all are ones.
    spirals
        Mode `stable` only: how many decaying pairs among the `dim - rank` decaying eigenvalues.
    generator
        Source of the draws, made on the CPU.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        For a rank outside [1, dim], an unknown mode or init, or counts that do not add up.

    Notes
    -----
    Source: layers `V` and `U` of the authors' public code (mode `free`, init `default`). The other modes are
    reconstructed: the abstract asks for a limit that exists, and it does when `V^T U = I` (a fixed point) or
    `V^T U` is similar to an orthogonal matrix (an invariant set).

    Examples
    --------
    >>> mix = SpectralMix(6, rank=3, mode="rotation", generator=torch.Generator().manual_seed(0))
    >>> y = torch.ones(2, 6)
    >>> mix(y).shape
    torch.Size([2, 6])
    >>> mix.spectrum().abs().numpy().round(5)
    array([1., 1., 1.])
    >>> torch.allclose(mix.power(y, 3), mix(mix(mix(y))), atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        mode: Mode = "free",
        *,
        init: Literal["orthonormal", "default"] = "orthonormal",
        rotations: int | None = None,
        ones: int | None = None,
        spirals: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if init not in ("orthonormal", "default"):
            raise ValueError(f"init must be 'orthonormal' or 'default', got {init!r}")
        if mode != "stable" and (rotations is not None or ones is not None or spirals):
            raise ValueError(f"rotations, ones and spirals belong to mode 'stable', got mode {mode!r}")
        rank, ones, rotations = _count(dim, rank, mode, rotations, ones, spirals)
        self.dim, self.rank, self.mode = dim, rank, mode
        self.ones, self.rotations, self.spirals = ones, rotations, spirals
        width = dim if mode == "stable" else rank
        self.decays = width - ones - 2 * (rotations + spirals)
        self._forwards = 0

        device = torch.get_default_device() if device is None else device

        def place(draw: Tensor) -> nn.Parameter:
            return nn.Parameter(draw.to(dtype=dtype or torch.get_default_dtype()).to(device))

        left, right = _initial_factors(dim, width, mode, init, generator)
        self.U = place(left)
        if mode in ("free", "oblique", "rotation"):
            self.V = place(right)
        if mode != "free" and rotations + spirals:
            draw = torch.randn(rotations + spirals, generator=generator, dtype=torch.float64, device="cpu")
            self.angle = place(0.5 * draw)
        if mode == "stable" and spirals + self.decays:
            draw = torch.rand(spirals + self.decays, generator=generator, dtype=torch.float64, device="cpu")
            self.decay = place(0.3 + 1.2 * draw)  # tanh of it: 0.29 to 0.91

    def forward(self, y: Tensor) -> Tensor:
        """Apply `M` once.

        Parameters
        ----------
        y
            Features, `(..., dim)`, floating point.

        Returns
        -------
        Tensor
            `M y`, shape and dtype of `y`.

        Raises
        ------
        ValueError
            If the last dimension is not `dim` or the input is not floating point.
        """
        self._check(y)
        left, right = self._bases()
        coordinates = linear(y, right.to(y.dtype))  # (..., rank)
        if self.mode != "free":
            coordinates = self._evolve(coordinates, 1)
        return linear(coordinates, left.to(y.dtype))

    def power(self, y: Tensor, t: int) -> Tensor:
        """Apply `M` `t` times at the price of one: `U Theta^(t-1) V^T y`.

        Parameters
        ----------
        y
            Features, `(..., dim)`.
        t
            Number of steps, at least 0. Angles are multiplied by `t` in double precision.

        Returns
        -------
        Tensor
            `M^t y`, shape and dtype of `y`.

        Raises
        ------
        ValueError
            If `t` is negative or not an integer, or `y` does not fit.
        """
        self._check(y)
        if t != int(t) or t < 0:
            raise ValueError(f"t must be an integer of at least 0, got {t}: the map need not be invertible")
        if t == 0:
            return y
        left, right = self._bases()
        coordinates = linear(y, right.to(y.dtype))
        if self.mode == "free":
            power = torch.linalg.matrix_power(right @ left, int(t) - 1)
            coordinates = linear(coordinates, power.to(y.dtype))
        else:
            coordinates = self._evolve(coordinates, t)
        return linear(coordinates, left.to(y.dtype))

    def limit(self, y: Tensor, t: float = 0.0) -> Tensor:
        """Return the part of `y` that survives, with its rotating phases advanced by `t` steps.

        Parameters
        ----------
        y
            Features, `(..., dim)`.
        t
            Any real time; it only turns the phases. At 0 the result is the projection of `y` on the surviving
            eigenspace, and `power(y, t) - limit(y, t)` tends to zero.

        Returns
        -------
        Tensor
            Shape and dtype of `y`.

        Raises
        ------
        ValueError
            In mode `free`, where nothing keeps the spectrum on the unit circle and the limit need not exist.
        """
        self._check(y)
        if self.mode == "free":
            raise ValueError("limit needs an enforced spectrum, got mode 'free': no limit need exist")
        left, right = self._bases()
        coordinates = linear(y, right.to(y.dtype))
        return linear(self._evolve(coordinates, t, surviving=True), left.to(y.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `U` `(dim, r)` and `V^T` `(r, dim)` with `M = U V^T`; differentiable.

        In mode `stable`, `r` is `dim`: the factors are the eigenbasis and the advanced left eigenbasis.
        """
        left, right = self._bases()
        if self.mode == "free":
            return left, right
        return left, self._evolve(right.mT, 1).mT

    def theta(self) -> Tensor:
        """Return `Theta = V^T U`, `(r, r)`, which carries the spectrum of `M`; differentiable."""
        left, right = self.factors()
        return right @ left

    def penalty(self, target: Literal["fixed_point", "invariant_set"] = "fixed_point") -> Tensor:
        r"""Return a soft form of the constraint, for mode `free`: add a multiple of it to the loss.

        Parameters
        ----------
        target
            `"fixed_point"` gives `|Theta - I|_F^2 / r`, `"invariant_set"` `|Theta Theta^T - I|_F^2 / r`.

        Returns
        -------
        Tensor
            A number, differentiable in the parameters.

        Raises
        ------
        ValueError
            For an unknown target.
        """
        theta = self._surviving_theta()
        if target == "invariant_set":
            theta = theta @ theta.mT
        elif target != "fixed_point":
            raise ValueError(f"target must be 'fixed_point' or 'invariant_set', got {target!r}")
        return (
            theta - torch.eye(self.rank, dtype=theta.dtype, device=theta.device)
        ).square().sum() / self.rank

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """Return the eigenvalues of `Theta`: the non-zero ones of `M`.

        Returns
        -------
        Tensor
            `(r,)` complex128 on the CPU, sorted by falling modulus, then by angle.
        """
        return _sorted_eigenvalues(self.theta())

    @torch.no_grad()
    def fixed_point_defect(self) -> Tensor:
        """Return `|Theta - I|_F / sqrt(r)` of the surviving block: zero when it is a projection."""
        return self.penalty("fixed_point").sqrt()

    @torch.no_grad()
    def invariant_set_defect(self) -> Tensor:
        """Return the largest distance from 1 of the moduli of the surviving eigenvalues."""
        return (_sorted_eigenvalues(self._surviving_theta()).abs() - 1).abs().max()

    def extra_repr(self) -> str:
        """Describe the block in `repr`."""
        text = f"{self.dim}, rank={self.rank}, mode={self.mode!r}"
        if self.mode == "stable":
            text += f", ones={self.ones}, rotations={self.rotations}"
            text += f", spirals={self.spirals}, decays={self.decays}"
        return text

    def _check(self, y: Tensor) -> None:
        if not y.is_floating_point():
            raise ValueError(f"y must be floating point, got {y.dtype}")
        if y.ndim < 1 or y.shape[-1] != self.dim:
            raise ValueError(f"y must have {self.dim} features in its last dimension, got {tuple(y.shape)}")

    def _bases(self) -> tuple[Tensor, Tensor]:
        """Return the basis `(dim, r)` and its left inverse `(r, dim)`; in mode `free`, `U` and `V^T`."""
        left = _wide(self.U)
        if self.mode == "free":
            return left, _wide(self.V).mT
        with _full_precision(left.device):  # half-precision factors would leave the constraint at 1e-2
            if self.mode == "orth":
                left = torch.linalg.qr(left).Q
                return left, left.mT
            if self.mode == "stable":
                gram, right = left, torch.eye(self.dim, dtype=left.dtype, device=left.device)
            else:
                right = _wide(self.V).mT
                gram = right @ left
            self._watch(gram)
            return left, torch.linalg.solve(gram, right)

    def _evolve(self, coordinates: Tensor, t: float, *, surviving: bool = False) -> Tensor:
        """Advance coordinates `(..., r)` by `t` steps; drop the decaying ones if only survivors count."""
        still, turning, spiralling, decaying = coordinates.split(
            [self.ones, 2 * self.rotations, 2 * self.spirals, self.decays], dim=-1
        )
        parts = [still]
        if self.rotations:
            parts.append(_turn(turning, self.angle[: self.rotations], t))
        if self.spirals + self.decays and surviving:
            parts += [torch.zeros_like(spiralling), torch.zeros_like(decaying)]
        elif self.spirals + self.decays:
            factor = (torch.tanh(_wide(self.decay)) ** t).to(coordinates.dtype)
            if self.spirals:
                shrink = factor[: self.spirals].repeat_interleave(2)
                parts.append(_turn(spiralling, self.angle[self.rotations :], t) * shrink)
            parts.append(decaying * factor[self.spirals :])
        return torch.cat(parts, dim=-1)

    def _surviving_theta(self) -> Tensor:
        return self.theta()[: self.rank, : self.rank]

    def _watch(self, gram: Tensor) -> None:
        """Warn, now and then in training, when the solve behind the constraint is ill conditioned."""
        if not self.training or torch.compiler.is_compiling() or gram.is_meta:
            return
        self._forwards += 1
        if self._forwards % _CHECK_EVERY == 1:
            condition = torch.linalg.cond(gram.detach().cpu()).item()
            if condition > _ILL_CONDITIONED:
                warnings.warn(
                    f"mode {self.mode!r}: condition number {condition:.1e} exceeds {_ILL_CONDITIONED:.0e}, "
                    "the constraint holds to fewer digits, consider a smaller step or mode 'orth'",
                    stacklevel=3,
                )


def _count(
    dim: int, rank: int | None, mode: Mode, rotations: int | None, ones: int | None, spirals: int
) -> tuple[int, int, int]:
    """Return (rank, ones, rotations) after checking that the eigenvalues add up."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if mode == "stable":
        if rank is None and (rotations is not None or ones is not None):
            rank = (ones or 0) + 2 * (rotations or 0)
        rank = max(dim // 2, 1) if rank is None else rank
        if rotations is None:
            rotations = 0 if ones is None else (rank - ones) // 2
        ones = rank - 2 * rotations if ones is None else ones
        if min(ones, rotations, spirals) < 0 or ones + 2 * rotations != rank:
            raise ValueError(
                f"ones + 2 * rotations must equal rank, got {ones} + 2 * {rotations} and {rank}: "
                "every surviving eigenvalue is a one or half of a rotating pair"
            )
        if rank + 2 * spirals > dim:
            raise ValueError(f"rank + 2 * spirals must be at most dim {dim}, got {rank} + 2 * {spirals}")
    else:
        rank = max(dim // 2, 1) if rank is None else rank
        rotations = rank // 2 if mode == "rotation" else 0
        ones = rank - 2 * rotations
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must lie in [1, dim] = [1, {dim}], got {rank}")
    return rank, ones, rotations


def _initial_factors(
    dim: int, width: int, mode: Mode, init: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw the start of `U` and `V`, both `(dim, width)`, in float64 on the CPU."""
    if init == "orthonormal":
        left = torch.linalg.qr(
            torch.randn(dim, width, generator=generator, dtype=torch.float64, device="cpu")
        ).Q
        return left, left.clone()
    left = (
        2 * torch.rand(dim, width, generator=generator, dtype=torch.float64, device="cpu") - 1
    ) / width**0.5
    if mode != "free":  # a biorthogonal pair starts from V = U, where V^T U is positive definite
        return left, left.clone()
    return left, (
        2 * torch.rand(dim, width, generator=generator, dtype=torch.float64, device="cpu") - 1
    ) / dim**0.5


def _turn(pairs: Tensor, angle: Tensor, t: float) -> Tensor:
    """Rotate `(..., 2m)` coordinates, pair by pair, through `t * angle`, `(m,)`."""
    return rotate(pairs.unflatten(-1, (-1, 2)), angle, t).flatten(-2)


def rotate(pairs: Tensor, angle: Tensor | float, t: Tensor | float) -> Tensor:
    """Rotate `(..., 2)` coordinates through `angle * t`, which broadcasts with `(...)`.

    Only the phase modulo one turn counts, so the product is formed in double precision: in single precision
    it would be off by 0.06 radians at `t = 1e6`.
    """
    precision = pairs.dtype if pairs.device.type == "mps" else torch.float64
    phase = (
        angle.to(precision) if isinstance(angle, Tensor) else pairs.new_full((), angle, dtype=precision)
    ) * t
    cos, sin = phase.cos().to(pairs.dtype), phase.sin().to(pairs.dtype)
    first, second = pairs.unbind(-1)
    return torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)


def _wide(weight: Tensor) -> Tensor:
    """Return the weight in a precision in which a matrix can be factorised."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _sorted_eigenvalues(matrix: Tensor) -> Tensor:
    values = torch.linalg.eigvals(matrix.detach().cpu().double())
    modulus, phase = (
        values.abs().numpy().round(9),
        values.angle().numpy(),
    )  # rounding keeps conjugates together
    return values[torch.from_numpy(np.lexsort((phase, -modulus)))]
