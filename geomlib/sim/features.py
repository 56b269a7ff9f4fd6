r"""Random Fourier features: the frozen second tier of a two-tier stable invariant model.

A state `y` is sent to `Phi(y)` with `<Phi(y), Phi(y')>` close to a kernel `k(y, y')` (Rahimi and Recht
2007). Averages of `Phi` embed measures, so that a linear map on these features can hold a cycle as well as a
point.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["RandomFourierFeatures", "median_bandwidth"]

_CAUCHY_CAP = 1e4  # float32 cosines of larger arguments are noise


class RandomFourierFeatures(nn.Module):
    r"""Map `y` to `(D/2)^(-1/2) [cos(W y), sin(W y)]` with random frequencies `W`.

    Parameters
    ----------
    in_features
        Width of `y`.
    out_features
        Number `D` of features, even: every frequency gives a cosine and a sine, so that `|Phi(y)| = 1`.
    bandwidth
        Length scale of the kernel, positive. Towards zero the features hash their input, towards infinity
        they become affine in it.
    kernel
        `"gaussian"`: `exp(-|y - y'|^2 / (2 bandwidth^2))`, normal frequencies; `"laplace"`:
        `exp(-|y - y'|_1 / bandwidth)`, Cauchy frequencies, capped at `1e4 / bandwidth`.
    trainable
        Train the frequencies. They are a buffer otherwise: saved and moved, not trained.
    generator
        Source of the frequencies, drawn on the CPU.
    device, dtype
        Of the frequencies.

    Raises
    ------
    ValueError
        If a size or the bandwidth is not positive, the width is odd or the kernel is unknown.

    Notes
    -----
    Source: the authors' public code of arXiv 2207.07475 (one matrix shared by cosine and sine); Rahimi
    and Recht (2007). `trainable` is an addition, for ablations.

    Examples
    --------
    >>> phi = RandomFourierFeatures(2, 512, bandwidth=1.0, generator=torch.Generator().manual_seed(0))
    >>> y = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> features = phi(y)
    >>> features.shape
    torch.Size([2, 512])
    >>> round((features[0] @ features[1]).item(), 1), round(math.exp(-0.5), 1)
    (0.6, 0.6)
    """

    frequencies: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bandwidth: float,
        kernel: Literal["gaussian", "laplace"] = "gaussian",
        *,
        trainable: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if out_features < 2 or out_features % 2:
            raise ValueError(
                f"out_features must be even and positive, got {out_features}: "
                "every frequency gives a cosine and a sine"
            )
        if not bandwidth > 0 or math.isinf(bandwidth):
            raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}: it is a length scale")
        if kernel not in ("gaussian", "laplace"):
            raise ValueError(f"kernel must be 'gaussian' or 'laplace', got {kernel!r}")
        self.in_features, self.out_features = in_features, out_features
        self.bandwidth, self.kernel, self.trainable = float(bandwidth), kernel, trainable
        shape = (out_features // 2, in_features)
        if kernel == "gaussian":
            draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        else:
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            draw = torch.tan(math.pi * (uniform - 0.5)).clamp(-_CAUCHY_CAP, _CAUCHY_CAP)
        device = torch.get_default_device() if device is None else device
        frequencies = (draw / bandwidth).to(dtype=dtype or torch.get_default_dtype()).to(device)
        if trainable:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)

    def forward(self, y: Tensor) -> Tensor:
        """Return the features.

        Parameters
        ----------
        y
            `(..., in_features)`, floating point.

        Returns
        -------
        Tensor
            `(..., out_features)`, of norm 1.

        Raises
        ------
        ValueError
            If the width does not fit or the input is not floating point.
        """
        if not y.is_floating_point():
            raise ValueError(f"y must be floating point, got {y.dtype}")
        if y.ndim < 1 or y.shape[-1] != self.in_features:
            raise ValueError(
                f"y must have {self.in_features} features in its last dimension, got {tuple(y.shape)}"
            )
        phase = linear(y, self.frequencies)
        return torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(self.out_features // 2)

    def gram(self, y: Tensor, other: Tensor) -> Tensor:
        """Return the exact kernel matrix that inner products of the features approximate.

        Parameters
        ----------
        y, other
            `(n, in_features)` and `(m, in_features)`.

        Returns
        -------
        Tensor
            `(n, m)`.
        """
        if self.kernel == "gaussian":
            return torch.exp(-torch.cdist(y, other).square() / (2 * self.bandwidth**2))
        return torch.exp(-torch.cdist(y, other, p=1) / self.bandwidth)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"{self.in_features}, {self.out_features}, bandwidth={self.bandwidth:g}, kernel={self.kernel!r}"
        )


@torch.no_grad()
def median_bandwidth(y: Tensor, *, pairs: int = 4096, generator: torch.Generator | None = None) -> float:
    """Return the median distance between random pairs of rows: a first guess of a bandwidth.

    Parameters
    ----------
    y
        Samples, `(n, features)`, at least two.
    pairs
        How many pairs are drawn.
    generator
        Source of the pairs, on the CPU.

    Returns
    -------
    float
        A length in the units of `y`.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or most pairs coincide.

    Notes
    -----
    Source: the usual median heuristic; the paper searches the bandwidth instead.

    Examples
    --------
    >>> y = torch.tensor([[0.0], [3.0]])
    >>> median_bandwidth(y, generator=torch.Generator().manual_seed(0))
    3.0
    """
    if y.ndim != 2 or len(y) < 2:
        raise ValueError(f"y must be (n, features) with n of at least 2, got {tuple(y.shape)}")
    first = torch.randint(len(y), (pairs,), generator=generator, device="cpu")
    step = torch.randint(
        1, len(y), (pairs,), generator=generator
    )  # a step of at least one: never the same row
    second = (first + step) % len(y)
    median = (y[first.to(y.device)] - y[second.to(y.device)]).norm(dim=1).median().item()
    if not median > 0:
        raise ValueError(f"the median distance must be positive, got {median}: most rows of y coincide")
    return median
