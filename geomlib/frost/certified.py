r"""The certified transition: `G(h; x) = W_n phi(... phi(W_1 h + U x + b_1) ...)` with proved operator norms.

`|W_i| <= 1`, `|W_n| <= kappa` and an activation of slope at most 1 make `G` Lipschitz in the state with the
constant `kappa`, and the step of the model a contraction (arXiv 2601.19551, Theorem B.2, asks for no more;
its printed update has no such property). Two parameterisations of the weights keep the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from geomlib.core.norms import ITERATIONS, operator_norm_bound
from geomlib.core.precision import full_precision, working_dtype
from geomlib.frost.transitions import Prepared, Transition, check_sizes, convolve, place, uniform

__all__ = ["ACTIVATIONS", "Certified", "max_min", "normalised", "orthogonal"]

Parametrisation = Literal["normalised", "orthogonal"]


def max_min(x: Tensor) -> Tensor:
    """Sort each half of the channels against the other: 1-Lipschitz, and no gradient is lost.

    Channel `i` of the first half becomes the larger, of the second the smaller of the pair. The Jacobian is
    a permutation, so that the norm of a gradient is kept where ReLU drops a part of it. The number of
    channels is even.

    Notes
    -----
    Source: GroupSort with groups of two, Anil, Lucas and Grosse 2019 (arXiv 1811.05381).

    Examples
    --------
    >>> max_min(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    tensor([[3., 2., 1., 0.]])
    """
    # Channels last in memory stay so, and ReLU has a backward pass ten times faster than `maximum`.
    first, second = x.movedim(1, -1).chunk(2, -1)
    surplus = torch.relu(first - second)
    return torch.cat([second + surplus, first - surplus], -1).movedim(-1, 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "maxmin": max_min,
    "abs": torch.abs,
}
"""The activations with slope at most 1 that a certificate may rest on."""


def normalised(raw: Tensor, bound: Tensor | float) -> Tensor:
    """Scale a matrix or a kernel so that its proved operator norm is `bound`, rounding included.

    Smaller weights are scaled up as well: a default initial weight is far inside the ball, and clipped only
    it would leave the block weak. Differentiable in `raw`; one call per forward pass is enough.

    Parameters
    ----------
    raw : Tensor
        `(out, in)`, `(out, in, k)` or `(out, in, k, k)`, floating. A dilated kernel has the same norm.
    bound : Tensor or float
        What the norm is not to exceed.

    Returns
    -------
    Tensor
        Shape and dtype of `raw`.

    Notes
    -----
    Source: the bound of :func:`geomlib.core.operator_norm_bound` (arXiv 2305.16173), from above at every
    iteration. A power iteration comes from below and needs a margin that nothing proves.

    Examples
    --------
    >>> weight = normalised(torch.diag(torch.tensor([3.0, 1.0])), 0.9)
    >>> round(torch.linalg.matrix_norm(weight, 2).item(), 3)
    0.9
    """
    # Matrices are cheap: 10 iterations leave 0.2 % of excess at rank 64. Kernels keep their 2 % between the
    # frequencies of the grid in any case.
    reached = operator_norm_bound(raw, iterations=ITERATIONS + 4 if raw.dim() == 2 else ITERATIONS)
    # The scaled entries are rounded, tap by tap: Frobenius norms, at most sqrt(rank) operator norms.
    roundoff = torch.finfo(raw.dtype).eps / 2 + 2 * torch.finfo(reached.dtype).eps
    allowance = 1 + roundoff * math.prod(raw.shape[2:]) * math.sqrt(min(raw.shape[:2]))
    factor = bound / (reached * allowance).clamp_min(torch.finfo(reached.dtype).tiny)
    return (raw.to(factor.dtype) * factor).to(raw.dtype)


def orthogonal(raw: Tensor, bound: Tensor | float, taps: Tensor | None = None) -> Tensor:
    """Turn a free matrix into a weight whose singular values all equal `bound`, or a kernel of shifts of it.

    `Q` has orthonormal rows or columns, from the QR decomposition of `raw`. With `taps` the kernel is `S Q`,
    where `S` shifts each output channel by its own tap: `|S| <= 1`, so that a convolution carries a state
    over places without damping any part of it. Differentiable in `raw`.

    Parameters
    ----------
    raw : Tensor
        `(out, in)`, floating, of full rank.
    bound : Tensor or float
        The norm.
    taps : Tensor, optional
        `(out, 1, k)` or `(out, 1, k, k)`, for each output channel one entry 1 and zeros.

    Returns
    -------
    Tensor
        `(out, in)`, or `(out, in, k)`, `(out, in, k, k)` with `taps`.

    Notes
    -----
    Source: the factors of orthogonal convolutions in Li et al. 2019 (arXiv 1911.00937), one of them; that
    one is enough is reconstructed. The rounding of `Q` is measured and divided out.

    Examples
    --------
    >>> torch.linalg.svdvals(orthogonal(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 0.9))
    tensor([0.9000, 0.9000])
    """
    wide = raw.shape[0] < raw.shape[1]
    tall = (raw.mT if wide else raw).to(working_dtype(raw.dtype))
    Q, R = torch.linalg.qr(tall)
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # one Q for each raw, without a jump of signs
    with torch.no_grad(), full_precision(Q.device):
        # |Q|^2 <= 1 + |Q^T Q - 1|_F, and the product itself is rounded: by rows * eps / 2 times |Q|_F^2.
        defect = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[1], device=Q.device, dtype=Q.dtype))
        eps = torch.finfo(Q.dtype).eps
        allowance = (1 + defect + eps * Q.numel()).sqrt() * (1 + 4 * eps)
    Q = ((Q.mT if wide else Q) * (bound / allowance)).to(raw.dtype)
    return Q if taps is None else Q.view(*Q.shape, *[1] * (taps.dim() - 2)) * taps


class Certified(Transition):
    r"""`G(h; x) = W_n phi(... phi(W_1 h + U x + b_1) ...)`, Lipschitz in `h` with constant `kappa`.

    All operator norms are at most 1, the last at most `kappa`; `U` and the biases are free, so that the
    input enters inside the nonlinearity without costing anything.

    Parameters
    ----------
    width : int
        Channels of the state.
    axes : {0, 1, 2}
        Vector, sequence or map.
    hidden : sequence of int, optional
        Channels between the weights, `(2 * width,)` by default; one weight more than entries.
    kernel_size : int or sequence of int
        Odd, one for all weights or one for each; ignored for vectors.
    dilation : int
        Of all convolutions; it widens the reach of a step and leaves the norms as they are.
    parametrisation : {"normalised", "orthogonal"}
        Free weights divided by their norm, or matrices that damp nothing, with one shift for each output
        channel in place of a dense kernel.
    kappa : float
        The constant, in (0, 1); changed during training by `set_kappa`.
    activation : {"relu", "tanh", "maxmin", "abs"}
        All 1-Lipschitz.
    generator : torch.Generator, optional
        Draws the initial weights, on the CPU: orthogonal as matrices
        `(out, in * taps)`.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If a size is below 1, a kernel even, `kappa` not in (0, 1), or the activation unknown or steeper
        than 1.

    Notes
    -----
    Source: Theorem B.2 allows any nonlinear operator with a Lipschitz constant below 1; eq. (25) injects
    inside the nonlinearity. Reconstructed: the parameterisation, in which eq. (14) contracts by
    construction.

    Examples
    --------
    >>> block = Certified(8, kappa=0.9, generator=torch.Generator().manual_seed(0))
    >>> prepared = block.prepare(torch.ones(1, 8))
    >>> near, far = block(torch.zeros(1, 8), prepared), block(torch.ones(1, 8), prepared)
    >>> bool((near - far).norm() <= 0.9 * 8**0.5), block.certificate() <= 0.9
    (True, True)
    """

    kappa: Tensor

    def __init__(
        self,
        width: int,
        *,
        axes: int = 0,
        hidden: Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 3,
        dilation: int = 1,
        parametrisation: Parametrisation = "normalised",
        kappa: float = 0.9,
        activation: str = "relu",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kappa, device=device, dtype=dtype)
        widths = (width, *((2 * width,) if hidden is None else hidden), width)
        kernels = [kernel_size] * (len(widths) - 1) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(widths) - 1:
            raise ValueError(
                f"kernel_size must have {len(widths) - 1} entries, got {len(kernels)}: one per weight"
            )
        for size, kernel in zip(widths[1:], kernels, strict=True):
            check_sizes(width=width, hidden=size, dilation=dilation, kernel_size=kernel, axes=axes)
        if parametrisation not in ("normalised", "orthogonal"):
            raise ValueError(
                f"parametrisation must be 'normalised' or 'orthogonal', got {parametrisation!r}: no "
                "norm is proved for it"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}: a certificate needs "
                "slope at most 1, and GELU reaches 1.13, SiLU 1.10"
            )
        if activation == "maxmin" and any(size % 2 for size in widths[1:-1]):
            raise ValueError(f"hidden must be even for 'maxmin', got {widths[1:-1]}: channels are paired")
        self.activation, self.dilation, self.parametrisation = activation, dilation, parametrisation
        self.phi = ACTIVATIONS[activation]
        self._kept: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        shapes = [
            (outputs, inputs, *[kernel] * axes)
            for inputs, outputs, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        ]
        for index, shape in enumerate(shapes):
            taps = None
            if parametrisation == "orthogonal" and axes:
                taps = _shifts(shape).to(device=device, dtype=dtype)
            self.register_buffer(f"taps{index}", taps, persistent=False)
        if parametrisation == "orthogonal":
            shapes = [shape[:2] for shape in shapes]
        self.weights = nn.ParameterList(_draw(shape, generator, device, dtype) for shape in shapes)
        self.inject = uniform((widths[1], width, *[kernels[0]] * axes), None, generator, device, dtype)
        self.biases = nn.ParameterList(
            uniform((size,), self.inject, generator, device, dtype) for size in widths[1:-1]
        )

    def prepare(self, x: Tensor) -> Prepared:
        """Return `U x + b`, and the weights in use with the biases behind them."""
        driven = convolve(x, self.inject, self.biases[0], self.dilation)
        return Prepared((driven,), (*self._used(), *self.biases[1:]))

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """Map `(N, d, ...)` to the same shape."""
        weights, biases = prepared.shared[: len(self.weights)], prepared.shared[len(self.weights) :]
        wide = self.phi(convolve(state, weights[0], None, self.dilation) + prepared.rows[0])
        for weight, bias in zip(weights[1:-1], biases, strict=True):
            wide = self.phi(convolve(wide, weight, bias, self.dilation))
        return convolve(wide, weights[-1], None, self.dilation)

    @torch.no_grad()
    def certificate(self) -> float:
        """Return a proved Lipschitz constant of the weights in use, computed in double precision."""
        bounds = [
            operator_norm_bound(weight.double(), iterations=ITERATIONS + 4) for weight in self._weights()
        ]
        proved = math.prod(bound.item() for bound in bounds)
        return min(proved, self.kappa.item())  # both bound it, and the second evaluation may round upwards

    def _used(self) -> tuple[Tensor, ...]:
        """Return the weights in use, from the last call without gradients if nothing has changed since.

        The check is by value: a version counter does not see what is written through `.data`.
        """
        if torch.is_grad_enabled():
            return self._weights()
        raw = (*self.weights, self.kappa)
        if self._kept is None or not all(map(_same, raw, self._kept[0])):
            with torch.inference_mode(False), torch.no_grad():  # so that a later gradient may pass
                self._kept = tuple(tensor.detach().clone() for tensor in raw), self._weights()
        return self._kept[1]

    def _weights(self) -> tuple[Tensor, ...]:
        bounds: list[Tensor | float] = [1.0] * (len(self.weights) - 1) + [self.kappa]
        if self.parametrisation == "normalised":
            return tuple(map(normalised, self.weights, bounds))
        taps = [getattr(self, f"taps{index}") for index in range(len(self.weights))]
        return tuple(map(orthogonal, self.weights, bounds, taps))

    def extra_repr(self) -> str:
        """Constant and form, for `repr`."""
        return f"kappa={self.kappa.item():.6g}, {self.parametrisation}, {self.activation}"


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype, a.shape) == (b.device, b.dtype, b.shape) and torch.equal(a, b)


def _draw(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Draw a matrix `(out, in * taps)` with orthonormal rows or columns."""
    rows, columns = shape[0], math.prod(shape[1:])
    tall = torch.randn(
        max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64, device="cpu"
    )
    Q, R = torch.linalg.qr(tall)
    Q = Q * R.diagonal().sign()  # uniform over the orthogonal group
    return place((Q if rows >= columns else Q.T).reshape(shape), device, dtype)


def _shifts(shape: tuple[int, ...]) -> Tensor:
    """Give each output channel a tap, evenly: `(out, 1, k, ...)` of zeros and ones."""
    outputs, count = shape[0], math.prod(shape[2:])
    tap = torch.arange(outputs, device="cpu") * count // outputs
    return nn.functional.one_hot(tap, count).to(torch.get_default_dtype()).view(outputs, 1, *shape[2:])
