"""The Jacobian of an equilibrium model at its fixed point: spectrum, stability and a penalty on its size.

Near a fixed point the principal Koopman eigenvalues are those of `J = df/dz` (linearisation), so `J` tells
whether a root attracts the iteration and how fast. Only products with `J` are formed by autograd; the dense
matrix is built where a state is small enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigs
from torch import Tensor

from geomlib.core.fixed_point import spectral_radius
from geomlib.sim.edmd import spectral_order

__all__ = ["Stability", "jacobian_penalty", "jacobian_spectrum", "stability"]

_DENSE_LIMIT = 512  # largest state whose Jacobian is formed: 2 MB a sample in float64


def jacobian_spectrum(
    f: Callable[..., Tensor], state: Tensor, *params: Tensor, leading: int | None = None
) -> Tensor:
    """Eigenvalues of `df/dz` at each sample: near an equilibrium, its principal Koopman eigenvalues.

    Parameters
    ----------
    f : callable
        `f(z, *params) -> z'`, batch first, samples independent of each other.
    state : Tensor
        `(batch, ...)`.
    *params : Tensor
        Passed through to `f`.
    leading : int, optional
        Only this many eigenvalues of largest modulus, by Arnoldi iteration on vector-Jacobian products:
        for states too large for a dense Jacobian. All of them if omitted.

    Returns
    -------
    Tensor
        `(batch, n)` complex128, by decreasing modulus, then by angle.

    Raises
    ------
    ValueError
        If the batch is empty or `leading` is not in `1 .. n - 2`.

    Notes
    -----
    Source: linearisation at a fixed point (arXiv:2207.07475 states the limit by these eigenvalues; the
    choice of algorithm is reconstructed). A matrix and its transpose share their spectrum, so
    vector-Jacobian products are enough.

    Examples
    --------
    >>> jacobian_spectrum(lambda z: 0.5 * z, torch.zeros(1, 2)).real.tolist()
    [[0.5, 0.5]]
    """
    if state.ndim < 2 or len(state) == 0:
        raise ValueError(
            f"state must be (batch, ...) and not empty, got shape {tuple(state.shape)}: no Jacobian"
        )
    size = state[0].numel()
    if leading is not None and not 1 <= leading <= size - 2:
        raise ValueError(f"leading must lie in [1, {size - 2}], got {leading}: Arnoldi needs room to iterate")
    with torch.enable_grad():
        z = state.detach().requires_grad_()
        image = f(z, *(p.detach() for p in params))

    def pullback(v: Tensor) -> Tensor:
        return torch.autograd.grad(image, z, v, retain_graph=True)[0]

    if leading is None:
        unit = torch.eye(size, dtype=z.dtype, device=z.device).reshape(size, 1, *z.shape[1:])
        rows = torch.stack([pullback(row.expand_as(z)) for row in unit], 1)
        spectrum = torch.linalg.eigvals(rows.reshape(len(z), size, size).cpu().double())
    else:
        spectrum = torch.stack([_arnoldi(pullback, z, i, leading) for i in range(len(z))])
    return torch.stack([values[spectral_order(values)] for values in spectrum])


@dataclass(frozen=True, eq=False)
class Stability:
    """Whether roots of `f(z) = z` attract the iteration `z <- f(z)`.

    Attributes
    ----------
    radius : Tensor
        `(batch,)` float64, spectral radius of the Jacobian at the root.
    """

    radius: Tensor

    @property
    def attracting(self) -> Tensor:
        """`(batch,)` bool: false marks a root that the dynamics leave, which no Koopman limit can be."""
        return self.radius < 1

    def __repr__(self) -> str:
        return (
            f"Stability({int(self.attracting.sum())} of {len(self.radius)} roots attract, "
            f"largest radius {float(self.radius.max()):.3f})"
        )


def stability(
    f: Callable[..., Tensor], z: Tensor, *params: Tensor, generator: torch.Generator | None = None
) -> Stability:
    """Compute the spectral radius of `df/dz` at each root: below 1 it attracts, above 1 it repels.

    Parameters
    ----------
    f : callable
        `f(z, *params) -> z'`, batch first.
    z : Tensor
        `(batch, ...)` roots. Beyond 512 numbers a state, the radius is estimated by 60 Arnoldi steps.
    *params : Tensor
        Passed through to `f`.
    generator : torch.Generator, optional
        Draws the first vectors of the estimate.

    Returns
    -------
    Stability

    Raises
    ------
    ValueError
        If the batch is empty.

    Notes
    -----
    Source: linearised stability; a root solver does not know it (reconstructed: why a root is not enough).

    Examples
    --------
    >>> stability(lambda z: 1.2 * torch.tanh(z), torch.zeros(1, 2)).attracting.tolist()
    [False]
    """
    if z[:1].numel() <= _DENSE_LIMIT:
        return Stability(jacobian_spectrum(f, z, *params)[:, 0].abs())
    return Stability(spectral_radius(f, z, *params, steps=60, generator=generator).double().cpu())


def jacobian_penalty(
    f: Callable[..., Tensor], z: Tensor, *params: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate `|df/dz|_F^2 / n` at a batch of states with one random vector, differentiably.

    Added to the loss with a weight of 0.5 to 2, on about half of the steps, it keeps the spectral radius
    down and the solver fast.

    Parameters
    ----------
    f : callable
        `f(z, *params) -> z'`, batch first.
    z : Tensor
        `(batch, ...)` states; treated as constants.
    *params : Tensor
        Passed through; gradients flow to them and to the parameters of `f`.
    generator : torch.Generator, optional
        Draws the random vector.

    Returns
    -------
    Tensor
        Scalar: mean over the batch of `|eps^T J|^2 / n`, `n` the size of one state, unbiased.

    Raises
    ------
    ValueError
        If the batch is empty.

    Notes
    -----
    Source: Bai, Koltun and Kolter (arXiv:2106.14342), Hutchinson's estimator of the Frobenius norm.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> round(jacobian_penalty(lambda z: 3 * z, torch.zeros(400, 20), generator=g).item())
    9
    """
    if z.numel() == 0:
        raise ValueError(f"z must not be empty, got shape {tuple(z.shape)}: there is no Jacobian")
    with torch.enable_grad():
        state = z.detach().requires_grad_()
        image = f(state, *params)
        probe = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        pulled = torch.autograd.grad(image, state, probe, create_graph=True)[0]
    return pulled.square().sum() / z.numel()


def _arnoldi(pullback: Callable[[Tensor], Tensor], z: Tensor, sample: int, leading: int) -> Tensor:
    """Eigenvalues of largest modulus of one sample's transposed Jacobian."""
    size = z[0].numel()

    def apply(v: np.ndarray) -> np.ndarray:
        cotangent = torch.zeros_like(z)
        cotangent[sample] = torch.from_numpy(v.reshape(z.shape[1:])).to(z)
        return pullback(cotangent)[sample].flatten().cpu().double().numpy()

    operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    # A fixed start vector: the same input gives the same eigenvalues.
    values = eigs(operator, k=leading, v0=np.ones(size), return_eigenvectors=False)
    return torch.from_numpy(values.astype(np.complex128))
