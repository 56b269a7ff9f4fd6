r"""Linear algebra with the Hessian of a stationary equation: systems and extreme eigenvalues.

Dense where the equation is, by products only where it is not. The Hessian is symmetric for the real inner
product and not complex-linear, so all of it runs on real coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geomlib.core import arnoldi, conjugate_gradient
from geomlib.stationary.equation import ENTRIES, Equation, blocks

__all__ = ["hessian_solve", "lowest", "stiffness"]

# Dimension of the Krylov space in which the smallest eigenvalue of a large Hessian is looked for, and how
# often the vector found there is improved by inverse iteration.
KRYLOV = 60
IMPROVEMENTS = 3


def hessian_solve(
    equation: Equation,
    psi: Tensor,
    right: Tensor,
    accuracy: Tensor | float,
    max_steps: int,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve `H(psi) x = right` for each sample.

    Parameters
    ----------
    equation
        Decides between one factorisation and conjugate gradients.
    psi, right
        `(B, n, d)`.
    accuracy, max_steps
        Of conjugate gradients, see :func:`geomlib.core.conjugate_gradient`.
    floor
        On the dense path, pivots below this times the largest diagonal entry are not positive.

    Returns
    -------
    x : Tensor
        `(B, n, d)`.
    indefinite : Tensor
        `(B,)` bool, where `H` was seen not to be positive definite; `x` is of no use there.
    missed : Tensor
        `(B,)` bool, where conjugate gradients ran out of steps.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> one = torch.ones(1)
    >>> equation = Equation(SheafGraph.complete(1, one[:0]), Quartic(4 * one, one), torch.ones(1, 1, 1))
    >>> hessian_solve(equation, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), 1e-6, 10)
    (tensor([[[0.2500]]]), tensor([False]), tensor([False]))
    """
    if not equation.dense:
        product, inverse_diagonal = equation.linearised(psi)
        x, info = conjugate_gradient(
            product,
            equation.by_nodes(right),
            tol=accuracy,
            max_steps=max_steps,
            precondition=lambda v: inverse_diagonal * v,
        )
        return x, info.negative, ~info.converged & ~info.negative
    chunk = max(1, ENTRIES // equation.unknowns**2)
    parts, flags = [], []
    for some, b in zip(psi.split(chunk), equation.flat(right).split(chunk), strict=True):
        matrix = equation.hessian(some)
        factor, info = torch.linalg.cholesky_ex(matrix)
        bad = info != 0
        if floor:
            pivots = factor.diagonal(dim1=1, dim2=2).square().amin(1)
            bad = bad | ~(pivots > floor * matrix.diagonal(dim1=1, dim2=2).amax(1))
        found = torch.cholesky_solve(b.unsqueeze(2), factor).squeeze(2)
        parts.append(torch.where(bad[:, None], 0.0, found))
        flags.append(bad)
    indefinite = torch.cat(flags)
    return equation.shaped(torch.cat(parts)), indefinite, torch.zeros_like(indefinite)


def lowest(equation: Equation, psi: Tensor) -> Tensor:
    """Return the smallest eigenvalue of `H(psi)` for each sample of an equation, `(B,)`.

    Examples
    --------
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> graph, one = SheafGraph.complete(1, torch.ones(0)), torch.ones(1)
    >>> lowest(Equation(graph, Quartic(one, one), torch.zeros(1, 1, 1)), torch.ones(1, 1, 1))
    tensor([4.])
    """
    if len(psi) == 0:
        return psi.new_zeros(0, dtype=psi.dtype.to_real())
    if equation.dense:
        return torch.linalg.eigvalsh(equation.hessian(psi))[:, 0]

    def apply(flat: Tensor) -> Tensor:
        return equation.flat(equation.hessian_product(psi, equation.shaped(flat)))

    size = min(KRYLOV, equation.unknowns)
    # A start in general position that is the same on every device.
    places = torch.ones_like(equation.flat(psi)).cumsum(1)
    basis, hessenberg = arnoldi(apply, (places * places * 0.618).sin(), size)
    values, vectors = torch.linalg.eigh((hessenberg[:, :size] + hessenberg[:, :size].mT) / 2)
    vector = torch.bmm(vectors[:, None, :, 0], basis[:, :size])[:, 0]
    quotient = values[:, 0]
    for _ in range(IMPROVEMENTS):
        found, indefinite, _ = hessian_solve(equation, psi, equation.shaped(vector), 1e-3, equation.unknowns)
        flat = equation.flat(found)
        length = flat.square().sum(1)
        better = (flat * apply(flat)).sum(1) / length
        quotient = torch.where(indefinite | ~(better < quotient), quotient, better)
        vector = torch.where(
            indefinite[:, None] | (length == 0)[:, None], vector, flat / length.sqrt()[:, None]
        )
    return quotient


def stiffness(equation: Equation, psi: Tensor) -> Tensor:
    """Bound the largest eigenvalue of each sample's Hessian: twice the degree plus the local row sums."""
    local = blocks(equation.potential, psi).abs().sum(3).amax(2)  # (B, n)
    return (2 * equation.graph.degrees() + local).amax(1).clamp_min(torch.finfo(local.dtype).tiny)
