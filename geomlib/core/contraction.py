"""Layers that contract: Lipschitz constant at most ``kappa``, proved for the weights in use.

The proof is :func:`geomlib.core.norms.operator_norm_bound` (after Delattre et al. 2023, arXiv 2305.16173), a
differentiable upper bound that each weight is divided by as far as it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.core.norms import ITERATIONS, operator_norm_bound

__all__ = [
    "ContractiveConv1d",
    "ContractiveConv2d",
    "ContractiveLinear",
    "lipschitz_estimate",
]


class _Contractive(nn.Module):
    """A layer whose weight is scaled down, differentiably, until its proved bound is ``kappa``."""

    raw_weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        kappa: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if not 0 < kappa < 1:
            raise ValueError(f"kappa must lie in (0, 1), got {kappa}: the layer would not contract")
        self.kappa = kappa
        reach = 1 / math.sqrt(math.prod(shape[1:]))

        def draw(*size: int) -> nn.Parameter:
            # On the CPU and then moved: the same numbers on every device.
            values = torch.empty(size, dtype=torch.float64, device="cpu").uniform_(
                -reach, reach, generator=generator
            )
            return nn.Parameter(
                values.to(
                    device=device or torch.get_default_device(), dtype=dtype or torch.get_default_dtype()
                )
            )

        self.raw_weight = draw(*shape)
        self.bias = draw(shape[0]) if bias else None

    @property
    def weight(self) -> Tensor:
        """The weight in use: ``raw_weight`` times ``min(1, kappa / bound)``. Computed at each access."""
        raw = self.raw_weight
        bound = operator_norm_bound(raw)
        # Scaled entries are rounded to the dtype of the weight. Each tap of a kernel is a Fourier coefficient
        # of its symbol, so its norm is at most that of the operator, and its Frobenius norm sqrt(rank) times
        # that.
        roundoff = torch.finfo(raw.dtype).eps / 2 + 2 * torch.finfo(bound.dtype).eps
        allowance = 1 + roundoff * math.prod(raw.shape[2:]) * math.sqrt(min(raw.shape[:2]))
        # Room for the rounding of the certificate, which is computed anew in double precision.
        allowance += 8 * torch.finfo(torch.float64).eps * raw.numel()
        scale = (self.kappa / (bound * allowance)).clamp_max(1.0)
        return (raw.to(scale.dtype) * scale).to(raw.dtype)

    @torch.no_grad()
    def certificate(self) -> float:
        """Return a proved upper bound of the Lipschitz constant as the weights are, at most ``kappa``."""
        bound = operator_norm_bound(self.weight.double(), iterations=ITERATIONS + 4).item()
        return min(bound, self.kappa)  # both bound it, and the second evaluation may round upwards


class ContractiveLinear(_Contractive):
    """``x -> W x + b`` with the largest singular value of ``W`` at most ``kappa``, during training as well.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of input and output.
    bias : bool
        Whether to add ``b``.
    kappa : float
        The Lipschitz constant not to exceed, in (0, 1).
    device, dtype
        Of the parameters.
    generator : torch.Generator, optional
        Draws the initial weights.

    Attributes
    ----------
    raw_weight : Parameter
        ``(out_features, in_features)``, unconstrained: what is trained.
    weight : Tensor
        What is applied. It costs a few matrix products; in an iteration, compute it once outside the loop.

    Raises
    ------
    ValueError
        If ``kappa`` is not in (0, 1) or a size is not positive.

    Notes
    -----
    Inside the ball of norm ``kappa`` the weight is free: only larger ones are scaled down. Source: arXiv
    2305.16173 for the bound; the scaling is reconstructed, it keeps maps that contract already as they are.

    Examples
    --------
    >>> import torch
    >>> layer = ContractiveLinear(8, 8, kappa=0.9, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(2, 8)).shape, layer.certificate() <= 0.9
    (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kappa: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_sizes(in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), bias, kappa, device, dtype, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and constant, for ``repr``."""
        rows, columns = self.raw_weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}, kappa={self.kappa}"


class _ContractiveConv(_Contractive):
    """What one- and two-dimensional convolutions share."""

    axes: int
    convolve: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        *,
        kappa: float = 0.9,
        padding: Literal["zeros", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_sizes(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, got {kernel_size}: the output would have another size"
            )
        if padding not in ("zeros", "circular"):
            raise ValueError(
                f"padding must be 'zeros' or 'circular', got {padding!r}: no bound is known for it"
            )
        shape = (out_channels, in_channels, *[kernel_size] * self.axes)
        super().__init__(shape, bias, kappa, device, dtype, generator)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, ...)`` with stride 1, to the same spatial size."""
        reach = self.raw_weight.shape[-1] // 2
        if self.padding == "zeros":
            return type(self).convolve(x, self.weight, self.bias, padding=reach)
        return type(self).convolve(
            F.pad(x, [reach] * (2 * self.axes), mode="circular"), self.weight, self.bias
        )

    def extra_repr(self) -> str:
        """Sizes and constant, for ``repr``."""
        out_channels, in_channels, size = self.raw_weight.shape[:3]
        return (
            f"{in_channels}, {out_channels}, kernel_size={size}, bias={self.bias is not None}, "
            f"kappa={self.kappa}, padding={self.padding!r}"
        )


class ContractiveConv1d(_ContractiveConv):
    """A convolution of sequences with stride 1 whose operator norm is at most ``kappa``, for every length.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output.
    kernel_size : int
        Odd; the output is as long as the input.
    bias : bool
        Whether to add a bias per channel.
    kappa : float
        The Lipschitz constant not to exceed, in (0, 1).
    padding : {"zeros", "circular"}
        What stands beyond the ends.
    device, dtype
        Of the parameters.
    generator : torch.Generator, optional
        Draws the initial weights.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Sources as :func:`operator_norm_bound`. The bound is on the operator, not on the reshaped kernel.

    Examples
    --------
    >>> import torch
    >>> layer = ContractiveConv1d(2, 2, 3, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(1, 2, 7)).shape, layer.certificate() <= 0.9
    (torch.Size([1, 2, 7]), True)
    """

    axes = 1
    convolve = staticmethod(F.conv1d)


class ContractiveConv2d(_ContractiveConv):
    """A convolution of images with stride 1 whose operator norm is at most ``kappa``, for every size.

    Parameters and errors are those of :class:`ContractiveConv1d`.

    Notes
    -----
    Sources as :func:`operator_norm_bound`. The bound is on the operator, not on the reshaped kernel.

    Examples
    --------
    >>> import torch
    >>> layer = ContractiveConv2d(2, 2, 3, padding="circular", generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(1, 2, 8, 8)).shape, layer.certificate() <= 0.9
    (torch.Size([1, 2, 8, 8]), True)
    """

    axes = 2
    convolve = staticmethod(F.conv2d)


def lipschitz_estimate(
    f: Callable[[Tensor], Tensor], x: Tensor, *, steps: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate the largest singular value of ``df/dx`` at each sample, from below.

    Power iteration on ``J^T J``: a lower bound of the Lipschitz constant. Never a certificate: it approaches
    the norm of the Jacobian from below, at this point.

    Parameters
    ----------
    f : callable
        ``(batch, ...) -> (batch, ...)``, twice differentiable, with samples that do not influence each other.
    x : Tensor
        Where to linearise, shape ``(batch, ...)``, floating.
    steps : int
        Power iterations.
    generator : torch.Generator, optional
        For the first vectors, drawn on the CPU.

    Returns
    -------
    Tensor
        Shape ``(batch,)``, without history.

    Raises
    ------
    ValueError
        If ``steps < 1`` or ``x`` is empty or not floating.

    Notes
    -----
    Source: power iteration; the product ``J v`` is the derivative of ``u -> u^T J`` along ``v``, so that
    reverse mode is all that is asked of ``f``.

    Examples
    --------
    >>> import torch
    >>> W = torch.diag(torch.tensor([0.9, 0.1]))
    >>> lipschitz_estimate(lambda x: x @ W, torch.zeros(1, 2), generator=torch.Generator().manual_seed(0))
    tensor([0.9000])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: a random direction says nothing")
    if not x.is_floating_point() or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x must be (batch, ...), floating and not empty, got {tuple(x.shape)} {x.dtype}")
    vector = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        image = f(leaf)
        cotangent = torch.zeros_like(image, requires_grad=True)
        (pulled,) = torch.autograd.grad(image, leaf, cotangent, create_graph=True)
    size = _norms(vector)
    for _ in range(steps):
        vector = vector / _column(size, vector)
        (pushed,) = torch.autograd.grad(pulled, cotangent, vector, retain_graph=True)
        gain = _norms(pushed)
        (vector,) = torch.autograd.grad(image, leaf, pushed, retain_graph=True)
        size = _norms(vector).clamp_min(torch.finfo(x.dtype).tiny)
    return gain


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}: the layer would be empty")
