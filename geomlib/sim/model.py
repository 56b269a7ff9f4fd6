r"""The stable invariant model: basis, kernel features, surviving spectral part, inverse basis, read-out.

Single-tier: `x -> psi(x) -> U V^T psi(x) -> decoder`. Two-tier: random Fourier features `Phi` stand between
basis and mix, `x -> Phi(psi(x)) -> U V^T Phi(psi(x)) -> decoder`. One pass forward, no solver (arXiv
2207.07475).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from geomlib.sim.bases import mlp
from geomlib.sim.features import RandomFourierFeatures
from geomlib.sim.mix import Mode, SpectralMix

__all__ = ["SIM"]


class SIM(nn.Module):
    """Single-tier and two-tier stable invariant model.

    Parameters
    ----------
    basis
        Network from the input to `(..., basis_features)`.
    basis_features
        Width of the first tier.
    out_features
        Width of the output.
    second_features
        Width of the second tier, even; `None` makes the model single-tier.
    bandwidth, kernel
        Of the second tier, see `RandomFourierFeatures`.
    readout_features
        Width of the three layers of the inverse basis.
    rank, mode, init
        Of the middle block, see `SpectralMix`.
    mix
        `True` builds the middle block, `False` leaves it out (the plain network to compare with), and a ready
        `SpectralMix` is taken as it is.
    check_finite
        Look for infinities and NaN in the input of every call; it waits for the device.
    generator
        Source of the initial weights that are drawn here (the basis brings its own).
    device, dtype
        Of the parameters made here.

    Raises
    ------
    ValueError
        For sizes that do not fit, an unknown mode or kernel; in `forward`, for an empty batch, integers or a
        width that does not fit, and, if asked, for numbers that are not finite.

    Notes
    -----
    Source: both models of the authors' public code, with the same layers and parameter counts (mode
    `free`, init `default`). No term ties the decoder to the basis and nothing depends on an initial
    state or a time. The other modes and the orthonormal start are reconstructed, see `SpectralMix`.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> basis = mlp(64, 32, 32, 24, generator=generator)
    >>> model = SIM(basis, 24, 10, mode="orth", generator=generator)
    >>> model(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    >>> SIM(basis, 24, 10, second_features=40, bandwidth=2.0).mix
    SpectralMix(40, rank=20, mode='free')
    """

    mix: SpectralMix | nn.Identity

    def __init__(
        self,
        basis: nn.Module,
        basis_features: int,
        out_features: int,
        *,
        second_features: int | None = None,
        bandwidth: float = 1.0,
        kernel: Literal["gaussian", "laplace"] = "gaussian",
        readout_features: int = 32,
        rank: int | None = None,
        mode: Mode = "free",
        init: Literal["orthonormal", "default"] = "orthonormal",
        mix: bool | SpectralMix = True,
        check_finite: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = basis_features if second_features is None else second_features
        self.basis, self.basis_features, self.check_finite = basis, basis_features, check_finite
        self.features: RandomFourierFeatures | nn.Identity = nn.Identity()
        if second_features is not None:
            self.features = RandomFourierFeatures(
                basis_features,
                second_features,
                bandwidth,
                kernel,
                generator=generator,
                device=device,
                dtype=dtype,
            )
        if isinstance(mix, SpectralMix):
            if mix.dim != width:
                raise ValueError(f"mix must act on the {width} features of the last tier, got dim {mix.dim}")
            self.mix = mix
        elif mix:
            self.mix = SpectralMix(
                width, rank, mode, init=init, generator=generator, device=device, dtype=dtype
            )
        else:
            self.mix = nn.Identity()
        readout = (width, readout_features, readout_features, readout_features)
        self.inverse_basis = mlp(*readout, generator=generator, device=device, dtype=dtype)
        self.out = mlp(readout_features, out_features, generator=generator, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the surviving part.

        Parameters
        ----------
        x
            What the basis takes: `(batch, ...)`, floating point, not empty.

        Returns
        -------
        Tensor
            `(batch, ..., out_features)`.
        """
        return self.decode(self.mix(self.lift(x)))

    def lift(self, x: Tensor) -> Tensor:
        """Return the features of the last tier, before the mix: `(batch, ..., D)`."""
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.numel() == 0:
            raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
        if self.check_finite and not bool(torch.isfinite(x).all()):
            raise ValueError("x must be finite, got infinities or NaN: every later number would be NaN")
        y = self.basis(x)
        if y.shape[-1] != self.basis_features:
            raise ValueError(f"basis must give {self.basis_features} features, got {tuple(y.shape)}")
        return self.features(y)

    def decode(self, y: Tensor) -> Tensor:
        """Return the output of features `(batch, ..., D)` through inverse basis and read-out."""
        return self.out(self.inverse_basis(y))
