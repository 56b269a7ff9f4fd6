"""Extended dynamic mode decomposition: a Koopman matrix fitted to pairs of feature vectors.

The Koopman operator `(K g)(s) = g(F(s))` of a map `F` is linear even where `F` is not. On a dictionary
`psi` it becomes a matrix, `psi(F(s)) = A psi(s)`, which least squares recovers from samples (Williams,
Kevrekidis and Rowley 2015). Feature vectors are columns of that equation; a batch stores them as rows, so
that `psi_next = psi @ A.T`. All of it is analysis: float64 on the CPU, whatever came in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["EDMD", "InputEDMD", "edmd", "edmd_with_input"]


@dataclass(frozen=True, eq=False)
class EDMD:
    """A finite-dimensional Koopman operator fitted to pairs of feature vectors.

    Attributes
    ----------
    A : Tensor
        `(features, features)` float64, `psi(F(s)) ~ A psi(s)`.
    eigenvalues : Tensor
        `(rank,)` complex128, sorted by decreasing modulus, then by angle.
    eigenfunctions : Tensor
        `(features, rank)` complex128; column `i` holds the coefficients `xi_i` of `phi_i = psi @ xi_i`.
    residuals : Tensor
        `(rank,)` float64, `|phi_i(F(s)) - lambda_i phi_i(s)| / |phi_i(s)|` over the data: 0 for an
        eigenfunction, of order 1 for an artefact of the dictionary.
    modes : Tensor
        `(features, rank)` complex128, dual to the eigenfunctions (`eigenfunctions.T @ modes = I`):
        `psi(s) = sum_i phi_i(s) modes_i`. A read-out `C` of the features turns them into `C @ modes`.
    """

    A: Tensor
    eigenvalues: Tensor
    eigenfunctions: Tensor
    residuals: Tensor
    modes: Tensor

    def evaluate(self, psi: Tensor) -> Tensor:
        """Values of the eigenfunctions, `(samples, rank)` complex128, at features `(samples, features)`."""
        return as_analysis(psi, "psi").to(torch.complex128) @ self.eigenfunctions

    def predict(self, psi: Tensor, steps: int) -> Tensor:
        """Features `(samples, features)` after `steps` steps, by the spectral expansion."""
        return ((self.evaluate(psi) * self.eigenvalues**steps) @ self.modes.T).real

    def keep(self, residual: float = 0.1) -> EDMD:
        """Only the eigenpairs whose residual is at most `residual`."""
        kept = self.residuals <= residual
        return EDMD(
            self.A,
            self.eigenvalues[kept],
            self.eigenfunctions[:, kept],
            self.residuals[kept],
            self.modes[:, kept],
        )

    def __repr__(self) -> str:
        leading = ", ".join(f"{value:.4f}" for value in self.eigenvalues[:4].tolist())
        return f"EDMD(features={len(self.A)}, rank={len(self.eigenvalues)}, eigenvalues=[{leading}, ...])"


def edmd(psi_x: Tensor, psi_y: Tensor, *, ridge: float = 0.0, tol: float = 1e-10) -> EDMD:
    """Fit `psi(F(s)) = A psi(s)` by least squares and return its spectrum with a residual for each pair.

    Columns are scaled to unit root mean square, so that neither `ridge` nor `tol` depends on units;
    directions in which the dictionary is collinear are cut off, so that they bring no eigenvalues.

    Parameters
    ----------
    psi_x, psi_y : Tensor
        `(samples, features)` real: the dictionary at `s` and at `F(s)`, one pair a row.
    ridge : float
        Tikhonov weight, relative to the mean square of a scaled column.
    tol : float
        Singular values below `tol` times the largest are dropped.

    Returns
    -------
    EDMD

    Raises
    ------
    ValueError
        If the shapes differ or are not two-dimensional, the batch is empty, a value is not finite, or
        `ridge` or `tol` is out of range.

    Notes
    -----
    Source: Williams, Kevrekidis and Rowley, *A Data-Driven Approximation of the Koopman Operator* (2015);
    the scaling, the cut and the residual filter are reconstructed: equilibrium data are nearly collinear.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    >>> fit = edmd(torch.hstack([x, x**2]), torch.hstack([0.5 * x, 0.25 * x**2]))
    >>> [round(value.real, 6) for value in fit.eigenvalues.tolist()]
    [0.5, 0.25]
    """
    x, y = as_analysis(psi_x, "psi_x"), as_analysis(psi_y, "psi_y")
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(
            f"psi_x and psi_y must both be (samples, features), got {tuple(psi_x.shape)} and "
            f"{tuple(psi_y.shape)}: rows are pairs of one step"
        )
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}: it would reward large coefficients")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must lie in [0, 1), got {tol}: no direction would be left")
    scale = x.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a zero column is cut off below
    # An orthogonal change of the sample axis alters no norm below: two small triangles stand for all samples.
    triangle = torch.linalg.qr(torch.hstack([x, y]) / len(x) ** 0.5, mode="r").R
    x, y = (triangle / scale.repeat(2)).split(x.shape[1], 1)
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    kept = sigma > tol * sigma.max()
    if not kept.any():
        raise ValueError("psi_x must not be zero everywhere: no direction can be fitted")
    left, sigma, right = left[:, kept], sigma[kept], right[kept].T  # right: (features, rank)
    # In scaled coordinates the transposed operator is right @ half, of rank `rank`; its nonzero
    # eigenvalues are those of the small matrix half @ right.
    half = (sigma / (sigma.square() + ridge))[:, None] * (left.T @ y)
    A = (right @ half).T * scale[:, None] / scale
    eigenvalues, vectors = torch.linalg.eig(half @ right)
    order = spectral_order(eigenvalues)
    eigenvalues, vectors = eigenvalues[order], right.to(torch.complex128) @ vectors[:, order]
    modes = scale[:, None] * torch.linalg.pinv(vectors).T
    now, then = x.to(torch.complex128) @ vectors, y.to(torch.complex128) @ vectors
    tiny = torch.finfo(torch.float64).tiny
    residuals = (then - now * eigenvalues).norm(dim=0) / now.norm(dim=0).clamp_min(tiny)
    eigenfunctions = vectors / scale[:, None]
    return EDMD(A, eigenvalues, eigenfunctions, residuals, modes)


@dataclass(frozen=True, eq=False)
class InputEDMD:
    """A linear model `z' = drive psi + transition z` of a map whose input features `psi` stay put.

    Attributes
    ----------
    drive : Tensor
        `(state, features)` float64.
    transition : Tensor
        `(state, state)` float64.
    """

    drive: Tensor
    transition: Tensor

    @property
    def A(self) -> Tensor:
        """The augmented matrix `[[I, 0], [drive, transition]]` on columns `(psi, z)`."""
        top = torch.eye(self.drive.shape[1], sum(self.drive.shape), dtype=torch.float64)
        return torch.vstack([top, torch.hstack([self.drive, self.transition])])

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of `transition`, `(state,)` complex128, by decreasing modulus; `A` adds exact ones."""
        values = torch.linalg.eigvals(self.transition)
        return values[spectral_order(values)]

    @property
    def spectral_radius(self) -> float:
        """Largest modulus among `eigenvalues`; the limit exists if it is below 1."""
        return float(self.eigenvalues[0].abs())

    def readout(self) -> Tensor:
        """`(I - transition)^{-1} drive`, `(state, features)`: the limit is `readout() @ psi`.

        Raises
        ------
        RuntimeError
            If the fitted transition has an eigenvalue on or outside the unit circle.
        """
        radius = self.spectral_radius
        if radius >= 1:
            raise RuntimeError(
                f"the fitted transition must have spectral radius below 1, got {radius:.4f}: the model "
                "has no limit. Start from random states and use fewer steps"
            )
        identity = torch.eye(len(self.transition), dtype=torch.float64)
        return torch.linalg.solve(identity - self.transition, self.drive)

    def limit(self, features: Tensor) -> Tensor:
        """Limit states `(samples, state)` float64 for input features `(samples, features)`."""
        return as_analysis(features, "features") @ self.readout().T


def edmd_with_input(features: Tensor, state: Tensor, next_state: Tensor, *, ridge: float = 1e-6) -> InputEDMD:
    """Fit only the rows of the Koopman matrix that are unknown when the input features cannot change.

    The features of the input are constant along an orbit, so their rows of `A` are exact identity rows
    and their eigenvalues exact ones; least squares is spent on `z' = drive psi + transition z` alone. The
    limit is then `(I - transition)^{-1} drive psi`: a stable invariant model without any training.

    Parameters
    ----------
    features : Tensor
        `(samples, features)`: functions of the input alone, a constant column included if one is wanted.
    state, next_state : Tensor
        `(samples, state)`: states before and after one step under the input of the same row.
    ridge : float
        Tikhonov weight, relative to the mean square of a scaled column.

    Returns
    -------
    InputEDMD

    Raises
    ------
    ValueError
        If shapes do not fit, the batch is empty, a value is not finite, or `ridge` is not positive.

    Notes
    -----
    Source: reconstructed from the block form of the closed dictionary; the same regression is known as
    dynamic mode decomposition with control (Proctor, Brunton and Kutz, 2016).

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> psi, z = torch.randn(50, 2, generator=g), torch.randn(50, 1, generator=g)
    >>> fit = edmd_with_input(psi, z, 0.5 * z + psi[:, :1], ridge=1e-12)
    >>> round(fit.readout()[0, 0].item(), 4)
    2.0
    """
    psi, z = as_analysis(features, "features"), as_analysis(state, "state")
    z_next = as_analysis(next_state, "next_state")
    if psi.ndim != 2 or z.ndim != 2 or z.shape != z_next.shape or len(psi) != len(z):
        raise ValueError(
            f"features (samples, f), state and next_state (samples, d) must fit, got {tuple(psi.shape)}, "
            f"{tuple(z.shape)}, {tuple(z_next.shape)}: each row is one step under one input"
        )
    if not ridge > 0:
        raise ValueError(
            f"ridge must be positive, got {ridge}: near equilibrium states and inputs are collinear"
        )
    regressors = torch.hstack([psi, z])
    scale = regressors.square().mean(0).sqrt().clamp_min(1e-12)
    scaled = regressors / scale
    gram = scaled.T @ scaled / len(z) + ridge * torch.eye(scaled.shape[1], dtype=torch.float64)
    fitted = (torch.linalg.solve(gram, scaled.T @ z_next / len(z)) / scale[:, None]).T
    return InputEDMD(fitted[:, : psi.shape[1]], fitted[:, psi.shape[1] :])


def spectral_order(eigenvalues: Tensor) -> Tensor:
    """Order by decreasing modulus, then by angle; rounding keeps conjugates and copies together."""
    modulus, angle = eigenvalues.abs().numpy().round(9), eigenvalues.angle().numpy()
    return torch.from_numpy(np.lexsort((angle, -modulus)))


def as_analysis(tensor: Tensor, name: str) -> Tensor:
    """Detached float64 copy on the CPU, checked once at the door."""
    if len(tensor) == 0:
        raise ValueError(
            f"{name} must not be empty, got shape {tuple(tensor.shape)}: nothing could be fitted"
        )
    values = tensor.detach().cpu().to(torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got nan or inf: one such entry spoils every eigenvalue")
    return values
