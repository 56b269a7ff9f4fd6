r"""Why the supra-graph is stable although it has no energy: weighted norms, bounds of the inverse, the flow.

The derivative :math:`J` of a stack is block lower bidiagonal. In a norm that weighs deeper layers less it is
strongly monotone, and the dissipative flow of the whole has the spectra of the layers (arXiv 2507.20088
claims a global stationary problem; the statements here are reconstructed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geomlib.stationary.supra import SupraGraph

__all__ = ["inverse_bound", "monotonicity", "monotonicity_bound", "supra_flow"]


def monotonicity(supra: SupraGraph, psi: Tensor, epsilon: float = 1.0) -> Tensor:
    r"""Return the smallest eigenvalue of sym(W J W^-1) per sample, :math:`W=\mathrm{diag}(\epsilon^\ell)`.

    Parameters
    ----------
    supra : SupraGraph
        The system.
    psi
        States `(B, size)`.
    epsilon
        Weight of a layer against the one before it.

    Returns
    -------
    Tensor
        `(B,)`.

    Raises
    ------
    ValueError
        If `epsilon` is not positive.

    Notes
    -----
    Source: reconstructed (SGN-S2).

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node, node], [torch.ones(1, 1)] * 2)
    >>> [round(float(monotonicity(supra, torch.zeros(1, 2), e)), 4) for e in (1.0, 0.1)]
    [0.5, 0.95]
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}: it is the weight of a layer")
    matrix = supra.dense(psi)
    each = torch.tensor(supra.sizes, device=psi.device) * (2 if psi.is_complex() else 1)
    power = torch.arange(len(supra), dtype=matrix.dtype, device=psi.device).repeat_interleave(each)
    weight = epsilon**power
    scaled = weight[:, None] * matrix / weight
    return torch.linalg.eigvalsh((scaled + scaled.mT) / 2).amin(1)


def monotonicity_bound(mu: float, norm: float, layers: int, epsilon: float = 1.0) -> float:
    r"""Return :math:`\mu-\epsilon\kappa_K\cos\frac\pi{L+1}`, a lower bound of :func:`monotonicity`.

    Parameters
    ----------
    mu
        Strong monotonicity of every layer.
    norm
        Largest spectral norm of the maps between layers.
    layers
        `L`.
    epsilon
        Weight of a layer against the one before it.

    Notes
    -----
    Source: reconstructed. The symmetric part of a bidiagonal Toeplitz matrix has these eigenvalues.

    Examples
    --------
    >>> round(monotonicity_bound(0.8, 1.2, 3, 0.1), 3)
    0.715
    """
    return mu - epsilon * norm * math.cos(math.pi / (layers + 1))


def inverse_bound(mu: float, norm: float, layers: int) -> float:
    r"""Return :math:`\frac1\mu\sum_{j<L}(\kappa_K/\mu)^j`, at least :math:`\|J^{-1}\|`; arguments as above.

    Examples
    --------
    >>> inverse_bound(0.5, 1.0, 3)
    14.0
    """
    return sum((norm / mu) ** j for j in range(layers)) / mu


@torch.no_grad()
def supra_flow(
    supra: SupraGraph,
    x: Tensor,
    *,
    gamma: float = 1.0,
    step: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    r"""Follow the flow :math:`\dot\Psi=-(\gamma+i)\mathbb F(\Psi)` of all layers by explicit Euler steps.

    Parameters
    ----------
    supra : SupraGraph
        The system. Real states follow :math:`\dot\Psi=-\gamma\mathbb F`.
    x
        Input `(B, inputs)`.
    gamma
        Dissipation, positive.
    step, steps
        Length and number of the steps.
    start
        `(B, size)`, zero by default.

    Returns
    -------
    Tensor
        The last state `(B, size)`.

    Raises
    ------
    ValueError
        If `gamma`, `step` or `steps` is not positive.

    Notes
    -----
    Source: reconstructed (SGN-S3): a cascade, whose linearisation has the spectra of its layers.

    Examples
    --------
    >>> import torch
    >>> from geomlib.stationary import Quartic, SheafGraph
    >>> node = SheafGraph.complete(1, torch.zeros(0)), Quartic(torch.ones(1), torch.zeros(1))
    >>> supra = SupraGraph([node, node], [torch.ones(1, 1)] * 2)
    >>> supra_flow(supra, torch.ones(1, 1), step=0.5, steps=60)
    tensor([[1., 1.]])
    """
    if not gamma > 0 or not step > 0 or steps < 1:
        raise ValueError(f"gamma, step and steps must be positive, got {gamma}, {step} and {steps}")
    psi = supra.zeros(len(x)) if start is None else start
    factor = step * (complex(gamma, 1.0) if psi.is_complex() else gamma)
    for _ in range(steps):
        psi = psi - factor * supra.residual(psi, x)
    return psi
