"""Koopman spectra: projectors, ergodic averages, Jacobian spectra, and the limit they add up to.

The state of a deep equilibrium model is advanced by `s -> F(s)`; the Koopman operator `(K g)(s) = g(F(s))`
acts on functions of the state and is linear. Konishi and Kawahara (arXiv:2207.07475) write the limit of
the model with the part of the spectrum that does not decay; the tools below compute that part. Those that
fit an operator to data are in `edmd` (Koopman) and `transfer` (Perron-Frobenius), those that linearise at
a point in `jacobian`; all are exported here.

Everything is analysis, done in float64 or complex128 on the CPU whatever came in; `affine_limit` alone
follows the device and dtype of its input, because it is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geomlib.sim.edmd import EDMD, InputEDMD, edmd, edmd_with_input
from geomlib.sim.jacobian import jacobian_spectrum
from geomlib.sim.transfer import Ulam, circle_embedding_norm, embedding_norm, ulam

__all__ = [
    "EDMD",
    "AffineLimit",
    "InputEDMD",
    "Ulam",
    "affine_limit",
    "circle_embedding_norm",
    "edmd",
    "edmd_with_input",
    "embedding_norm",
    "generalised_laplace_average",
    "jacobian_spectrum",
    "mean_ergodic",
    "projector_at_one",
    "spectral_projector",
    "ulam",
]


@dataclass(frozen=True, eq=False)
class AffineLimit:
    """The spectral data at eigenvalue 1 of the affine map `z' = W z + B x + b` lifted to `(z, x, 1)`.

    Attributes
    ----------
    A : Tensor
        `(d_z + d_x + 1,) * 2`, the lifted map.
    U, V : Tensor
        `(d_z + d_x + 1, d_x + 1)`, right and left eigenvectors at 1 with `V.T @ U = I`.
    """

    A: Tensor
    U: Tensor
    V: Tensor

    @property
    def projector(self) -> Tensor:
        """`P = U V^T`, the limit of `A^t`."""
        return self.U @ self.V.T

    def equilibrium(self, x: Tensor) -> Tensor:
        """Equilibria `(batch, d_z)` of inputs `(batch, d_x)`: the rows of `U` that belong to `z`."""
        lifted = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return lifted @ self.U[: -lifted.shape[1]].T


def affine_limit(W: Tensor, B: Tensor, b: Tensor) -> AffineLimit:
    """Return the limit of `z' = W z + B x + b` in closed form, on the dictionary `(z, x, 1)`.

    Differentiable in all three arguments; device and dtype follow them.

    Parameters
    ----------
    W, B, b : Tensor
        `(d_z, d_z)`, `(d_z, d_x)` and `(d_z,)`.

    Returns
    -------
    AffineLimit

    Raises
    ------
    ValueError
        If the shapes do not fit or the spectral radius of `W` is not below 1 (no state is attracting then).

    Notes
    -----
    Source: reconstructed, the smallest case in which the expansion of arXiv:2207.07475 is exact.

    Examples
    --------
    >>> limit = affine_limit(torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([3.0]))
    >>> limit.equilibrium(torch.tensor([[2.0]]))
    tensor([[10.]])
    """
    square = W.ndim == 2 and W.shape[0] == W.shape[1]
    if not square or B.ndim != 2 or len(B) != len(W) or b.shape != W.shape[:1]:
        raise ValueError(
            f"W (d, d), B (d, d_x), b (d,) must fit, got {tuple(W.shape)}, {tuple(B.shape)}, "
            f"{tuple(b.shape)}: the map z' = W z + B x + b would be undefined"
        )
    radius = float(torch.linalg.eigvals(W.detach()).abs().max())
    if radius >= 1:
        raise ValueError(
            f"the spectral radius of W must be below 1, got {radius:.4f}: no state would be attracting"
        )
    d, inputs = B.shape
    forcing = torch.cat([B, b[:, None]], 1)
    still = W.new_zeros(inputs + 1, d)
    identity = torch.eye(inputs + 1, dtype=W.dtype, device=W.device)
    A = torch.cat([torch.cat([W, forcing], 1), torch.cat([still, identity], 1)])
    response = torch.linalg.solve(torch.eye(d, dtype=W.dtype, device=W.device) - W, forcing)
    return AffineLimit(A, torch.cat([response, identity]), torch.cat([still.T, identity]))


def spectral_projector(A: Tensor, eigenvalue: complex, *, tol: float = 1e-8) -> Tensor:
    """Projector on the eigenspace of one semisimple eigenvalue, along all the others.

    Built from the two null spaces of `A - lambda I` and never from eigenvectors: a repeated eigenvalue,
    the normal case at 1, has no stable eigenvectors, but its null spaces are well conditioned.

    Parameters
    ----------
    A : Tensor
        `(n, n)` real or complex.
    eigenvalue : complex
        The eigenvalue.
    tol : float
        Singular values of `A - lambda I` below `tol` times `max(1, largest)` count as zero.

    Returns
    -------
    Tensor
        `(n, n)`, float64 if `A` and the eigenvalue are real, else complex128; zero if `A` does not have
        the eigenvalue.

    Raises
    ------
    ValueError
        If `A` is not square, or the eigenvalue is defective (a Jordan block): powers of `A` would grow.

    Examples
    --------
    >>> spectral_projector(torch.diag(torch.tensor([1.0, 1.0, 0.5])), 1.0).diagonal().round().tolist()
    [1.0, 1.0, 0.0]
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) == 0:
        raise ValueError(f"A must be square, got shape {tuple(A.shape)}: nothing else has eigenvalues")
    real = not A.is_complex() and complex(eigenvalue).imag == 0
    matrix = A.detach().cpu().to(torch.float64 if real else torch.complex128)
    shift = complex(eigenvalue).real if real else complex(eigenvalue)
    left, sigma, right = torch.linalg.svd(matrix - shift * torch.eye(len(A), dtype=matrix.dtype))
    null = sigma <= tol * max(1.0, float(sigma[0]))
    if not null.any():
        return torch.zeros_like(matrix)
    U, V = right[null].mH, left[:, null]
    pairing = V.mH @ U
    smallest = float(torch.linalg.svdvals(pairing)[-1])
    if smallest < 1e-10:
        raise ValueError(
            f"eigenvalue {eigenvalue} of A must be semisimple, got orthogonal left and right eigenvectors "
            f"(smallest pairing {smallest:.1e}): a Jordan block has no spectral projector of this form"
        )
    return U @ torch.linalg.solve(pairing, V.mH)


def projector_at_one(A: Tensor, *, tol: float = 1e-8) -> Tensor:
    """Projector on the functions that do not change along orbits: `spectral_projector(A, 1)`.

    Parameters
    ----------
    A : Tensor
        `(n, n)`.
    tol : float
        As in `spectral_projector`.

    Returns
    -------
    Tensor
        `(n, n)`; the limit of `A^t` if 1 is the only eigenvalue of modulus one, and of its Cesaro means
        in any case.

    Raises
    ------
    ValueError
        As `spectral_projector`.

    Examples
    --------
    >>> A = torch.tensor([[0.5, 1.0], [0.0, 1.0]], dtype=torch.float64)
    >>> P = projector_at_one(A)
    >>> bool(torch.allclose(P, torch.linalg.matrix_power(A, 60)))
    True
    """
    return spectral_projector(A, 1.0, tol=tol)


def mean_ergodic(values: Tensor) -> Tensor:
    """Average an observable along an orbit: running means, which tend to its projection at eigenvalue 1.

    Parameters
    ----------
    values : Tensor
        `(steps, ...)` real or complex: the observable at times 0, 1, ...

    Returns
    -------
    Tensor
        Same shape, float64 or complex128; entry `t` is the mean of entries `0..t`.

    Raises
    ------
    ValueError
        If there is no step.

    Notes
    -----
    Source: von Neumann's mean ergodic theorem; the error is of order `1 / steps`.

    Examples
    --------
    >>> mean_ergodic(torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist()[-1]
    0.0
    """
    return generalised_laplace_average(values, 1.0)


def generalised_laplace_average(values: Tensor, eigenvalue: complex) -> Tensor:
    """Average `lambda^{-t} g(s_t)` along an orbit: running means, which tend to the projection at `lambda`.

    Parameters
    ----------
    values : Tensor
        `(steps, ...)` real or complex.
    eigenvalue : complex
        Usually on the unit circle. Inside the circle the slower part of the orbit must have been
        subtracted first, because the weights grow like `|lambda|^{-t}`.

    Returns
    -------
    Tensor
        Same shape; complex128, or float64 if values and eigenvalue are real.

    Raises
    ------
    ValueError
        If there is no step or the eigenvalue is zero.

    Notes
    -----
    Source: Mauroy and Mezic (2016); Budisic, Mohr and Mezic (2012).

    Examples
    --------
    >>> t = torch.arange(500)
    >>> average = generalised_laplace_average(torch.exp(0.3j * t), complex(torch.exp(torch.tensor(0.3j))))
    >>> round(average[-1].real.item(), 4)
    1.0
    """
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(
            f"values must hold at least one step, got shape {tuple(values.shape)}: no mean exists"
        )
    factor = complex(eigenvalue)
    if factor == 0:
        raise ValueError("eigenvalue must not be 0: the weights eigenvalue**(-t) would be infinite")
    real = not values.is_complex() and factor.imag == 0
    orbit = values.detach().cpu().to(torch.float64 if real else torch.complex128)
    time = torch.arange(len(orbit), dtype=torch.float64).reshape(-1, *[1] * (orbit.ndim - 1))
    if factor != 1:
        # An integer power, not a product of powers: the phase stays exact to rounding at late times.
        weights = torch.from_numpy(np.power(factor.real if real else factor, -time.numpy()))
        orbit = orbit * weights
    return orbit.cumsum(0) / (time + 1)
