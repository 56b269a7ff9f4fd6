r"""Surrogates: random tensors that keep one property of a weight tensor and destroy the rest.

A statistic that is the same on a surrogate measures what the surrogate kept. `cells` keeps the marginal,
`rc` also the spread among rows and columns, `rank1` only that spread, `svd` the spectrum, `phase` and
`iaaft` the two-dimensional power spectrum, `signflip` the absolute values, `reinit` nothing but the shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["SURROGATES", "rank_remap", "surrogate"]


def surrogate(
    W: Tensor,
    kind: str,
    *,
    remap: bool = False,
    rounds: int = 60,
    init: Callable[[Tensor], object] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw a surrogate of a weight tensor.

    Parameters
    ----------
    W : Tensor
        `(out, in, *kernel)`, floating point and finite. `svd`, `phase`, `iaaft` and `rank1` act on the matrix
        `(out, in * kernel)`.
    kind : str
        - `"cells"`: shuffle all entries.
        - `"rc"`: permute output units and input units, kernels whole.
        - `"signflip"`: multiply every entry by an independent random sign.
        - `"svd"`: `U' S V'^T` with uniformly distributed orthonormal `U'`, `V'`; the singular values stay.
        - `"phase"`: keep the modulus of the Fourier transform and the mean, take the phases of white noise.
        - `"iaaft"`: alternate that with the remapping to the old values, which stay exactly.
        - `"reinit"`: a fresh draw from the initialisation.
        - `"rank1"`: row scale times column scale times shuffled residuals.
    remap : bool
        Replace the values of the result, in rank order, by those of `W`: statistics that see the tails of
        the marginal must not see that `svd` and `phase` make entries Gaussian.
    rounds : int
        Alternations of `"iaaft"`.
    init : callable, optional
        Fills a tensor in place for `"reinit"`; torch's own initialisation of linear and convolution layers
        by default.
    generator : Generator, optional
        Source of everything drawn (`init` brings its own).

    Returns
    -------
    Tensor
        Shape, dtype and device of `W`, detached.

    Raises
    ------
    ValueError
        For an unknown kind, a tensor that is not a finite floating point tensor of two or more axes, or a
        number of rounds below 1.

    Notes
    -----
    Source: Theiler et al. (1992) for phase randomisation, Schreiber and Schmitz (1996) for `iaaft`; the
    others are reconstructed as the nulls that a claim about weight geometry has to beat.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> W = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    >>> spectrum = torch.linalg.svdvals(surrogate(W, "svd", generator=generator))
    >>> bool(torch.allclose(spectrum, torch.linalg.svdvals(W)))
    True
    """
    if kind not in SURROGATES:
        raise ValueError(f"kind must be one of {', '.join(SURROGATES)}, got {kind!r}: it keeps nothing known")
    if W.ndim < 2 or W.numel() == 0 or not W.is_floating_point():
        raise ValueError(
            f"W must be floating point with at least two axes, got {W.dtype} of shape {tuple(W.shape)}: "
            "rows and columns would not exist"
        )
    W = W.detach()
    if bad := int((~torch.isfinite(W)).sum()):
        raise ValueError(f"W must be finite, got {bad} NaN or infinite entries: they have no rank")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}: nothing would be alternated")
    if kind == "reinit":
        drawn = _reinit(W, init, generator)
    elif kind == "iaaft":
        drawn = _iaaft(W, rounds, generator)
    else:
        drawn = _KINDS[kind](W, generator)
    return rank_remap(drawn, W) if remap else drawn


def rank_remap(V: Tensor, W: Tensor) -> Tensor:
    """Replace the values of `V`, in rank order, by those of `W`.

    Parameters
    ----------
    V, W : Tensor
        The same number of entries, on the same device.

    Returns
    -------
    Tensor
        The order of `V` with the values and dtype of `W`, in the shape of `V`.

    Raises
    ------
    ValueError
        If the sizes differ.

    Examples
    --------
    >>> rank_remap(torch.tensor([0.3, 9.0, -2.0]), torch.tensor([10.0, 20.0, 30.0]))
    tensor([20., 30., 10.])
    """
    if V.numel() != W.numel():
        raise ValueError(f"V must have the {W.numel()} entries of W, got {V.numel()}: ranks would not match")
    out = torch.empty_like(W).reshape(-1)
    out[V.reshape(-1).argsort()] = W.reshape(-1).sort().values
    return out.reshape(V.shape)


def _cells(W: Tensor, generator: torch.Generator | None) -> Tensor:
    return W.reshape(-1)[torch.randperm(W.numel(), generator=generator).to(W.device)].reshape(W.shape)


def _rows_and_columns(W: Tensor, generator: torch.Generator | None) -> Tensor:
    rows = torch.randperm(W.shape[0], generator=generator).to(W.device)
    columns = torch.randperm(W.shape[1], generator=generator).to(W.device)
    return W[rows][:, columns]


def _signflip(W: Tensor, generator: torch.Generator | None) -> Tensor:
    heads = torch.rand(W.shape, generator=generator) < 0.5
    return torch.where(heads.to(W.device), W, -W)


def _svd(W: Tensor, generator: torch.Generator | None) -> Tensor:
    matrix = W.reshape(len(W), -1).double()
    spectrum = torch.linalg.svdvals(matrix)
    left, right = (_frame(side, len(spectrum), generator).to(W.device) for side in matrix.shape)
    return ((left * spectrum) @ right.mT).to(W.dtype).reshape(W.shape)


def _frame(n: int, k: int, generator: torch.Generator | None) -> Tensor:
    """Uniformly distributed `k` orthonormal vectors in `n` dimensions."""
    q, r = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    # QR alone is not uniform: the signs of the diagonal depend on the routine.
    return q * r.diagonal().sign()


def _phase(W: Tensor, generator: torch.Generator | None) -> Tensor:
    matrix = W.reshape(len(W), -1).double()
    noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(W.device)
    source, phases = torch.fft.rfft2(matrix), torch.fft.rfft2(noise)
    field = source.abs() * (phases / phases.abs())
    field[0, 0] = source[0, 0]
    return torch.fft.irfft2(field, s=matrix.shape).to(W.dtype).reshape(W.shape)


def _iaaft(W: Tensor, rounds: int, generator: torch.Generator | None) -> Tensor:
    matrix = W.reshape(len(W), -1)
    modulus = torch.fft.rfft2(matrix.double()).abs()
    drawn = _cells(matrix, generator)
    for _ in range(rounds):
        spectrum = torch.fft.rfft2(drawn.double())
        # A vanishing coefficient has no phase; any will do.
        direction = torch.where(spectrum.abs() > 0, spectrum / spectrum.abs(), torch.ones_like(spectrum))
        drawn = rank_remap(torch.fft.irfft2(modulus * direction, s=matrix.shape), matrix)
    return drawn.reshape(W.shape)


def _reinit(W: Tensor, init: Callable[[Tensor], object] | None, generator: torch.Generator | None) -> Tensor:
    fresh = torch.empty(W.shape, dtype=W.dtype)
    if init is None:
        nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
    else:
        init(fresh)
    return fresh.to(W.device)


def _rank1(W: Tensor, generator: torch.Generator | None) -> Tensor:
    matrix = W.reshape(len(W), -1).double()
    rows = matrix.square().mean(1, keepdim=True).sqrt()
    scaled = matrix / torch.where(rows > 0, rows, torch.ones_like(rows))
    columns = scaled.square().mean(0, keepdim=True).sqrt()
    residuals = scaled / torch.where(columns > 0, columns, torch.ones_like(columns))
    return (rows * columns * _cells(residuals, generator)).to(W.dtype).reshape(W.shape)


_KINDS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "cells": _cells,
    "rc": _rows_and_columns,
    "signflip": _signflip,
    "svd": _svd,
    "phase": _phase,
    "rank1": _rank1,
}

SURROGATES = (*_KINDS, "iaaft", "reinit")
