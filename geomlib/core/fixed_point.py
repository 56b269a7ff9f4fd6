"""Fixed points ``z = f(z, *params)`` with honest reports and gradients of any order.

>>> import torch
>>> W = torch.full((3, 3), 0.1, requires_grad=True)
>>> solution = solve(lambda z, W: torch.tanh(z @ W.T + 1), torch.zeros(2, 3), W)
>>> solution.reason
'converged'
>>> solution.value.sum().backward()
>>> W.grad.shape
torch.Size([3, 3])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geomlib.core.adjoint import Adjoint, Implicit, OneStep, Unrolled
from geomlib.core.linear import arnoldi
from geomlib.core.newton import Direct, NewtonKrylov
from geomlib.core.problem import Problem
from geomlib.core.solution import ConvergenceError, ConvergenceWarning, Solution
from geomlib.core.solvers import Anderson, Broyden, Picard, Solver

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "Direct",
    "Implicit",
    "NewtonKrylov",
    "OneStep",
    "Picard",
    "Solution",
    "Solver",
    "Unrolled",
    "solve",
    "spectral_radius",
]


def solve(
    f: Callable[..., Tensor],
    z0: Tensor,
    *params: Tensor,
    solver: Solver = Anderson(),  # noqa: B008  (frozen dataclass: one instance serves all calls)
    adjoint: Adjoint = Implicit(),  # noqa: B008
    tol: float = 1e-6,
    contraction_factor: float | None = None,
    max_steps: int = 200,
    throw: bool = True,
) -> Solution:
    """Solve ``z = f(z, *params)`` for each sample of a batch.

    Parameters
    ----------
    f : callable
        ``f(z, *params) -> z'`` with ``z'`` like ``z``; samples must not influence each other.
    z0 : Tensor
        Initial state, shape ``(batch, ...)``, floating. No gradient flows to it.
    *params : Tensor
        The tensors that gradients flow to, of any shape. A tensor that requires grad and is only closed over
        by ``f`` raises, unless grad mode is off.
    solver : Solver
        ``Anderson()``, ``Picard()``, ``Broyden()``, ``NewtonKrylov()`` or ``Direct()``.
    adjoint : Adjoint
        ``Implicit()``, ``Unrolled(steps)`` or ``OneStep()``.
    tol : float
        What each sample must reach: a bound of its error where ``contraction_factor`` is given, otherwise its
        residual ``|f(z) - z| / (1 + |z|)``.
    contraction_factor : float, optional
        A Lipschitz constant of ``f`` in ``z``, in (0, 1).
    max_steps : int
        Evaluations of ``f`` at most.
    throw : bool
        Whether missing the tolerance raises :class:`ConvergenceError` or warns with
        :class:`ConvergenceWarning`.

    Returns
    -------
    Solution
        The best iterate of each sample with residual, error bound, steps and the residual history. A sample
        that has converged does not change any more.

    Raises
    ------
    ConvergenceError
        If a sample misses the tolerance and ``throw`` is true; also from the backward pass.
    TypeError, ValueError
        If an argument, or the first image of ``f``, cannot be worked with.

    Notes
    -----
    Sources: Banach 1922 for the error bound ``kappa / (1 - kappa) |f(z) - z|``; the solvers and adjoints name
    theirs. On the meta device ``f`` is evaluated once and only shapes are returned.

    Examples
    --------
    >>> import torch
    >>> from geomlib.core import Picard, solve
    >>> f = lambda z, b: 0.5 * z + b
    >>> b = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> solution = solve(f, torch.zeros(2, 1), b, solver=Picard(), contraction_factor=0.5, tol=1e-3)
    >>> solution.value.detach().round(decimals=2).squeeze(1).tolist()
    [2.0, 4.0]
    >>> bool((solution.bound <= 1e-3).all())
    True
    """
    return adjoint.run(Problem(f, z0, params, solver, tol, contraction_factor, max_steps, throw))


def spectral_radius(
    f: Callable[..., Tensor],
    z: Tensor,
    *params: Tensor,
    steps: int = 30,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the spectral radius of ``df/dz`` for each sample: below 1 a root attracts, above it repels.

    The largest Ritz value of ``steps`` Arnoldi steps with vector-Jacobian products: exact once ``steps``
    reaches the size of the state, and complex pairs of eigenvalues do not disturb it, as they do a power
    iteration.

    Parameters
    ----------
    f : callable
        ``f(z, *params) -> z'`` with samples that do not influence each other.
    z : Tensor
        Where to linearise, shape ``(batch, ...)``.
    *params : Tensor
        Handed to ``f``.
    steps : int
        Products with the Jacobian, at most the size of one sample's state are used.
    generator : torch.Generator, optional
        For the first vectors, drawn on the CPU.

    Returns
    -------
    Tensor
        Shape ``(batch,)``, without history.

    Raises
    ------
    ValueError
        If ``steps < 1`` or ``z`` is empty or not floating.

    Notes
    -----
    Source: Arnoldi 1951; that an equilibrium attracts if the spectral radius is below one is Ostrowski's
    theorem.

    Examples
    --------
    >>> import torch
    >>> turn = torch.tensor([[0.0, 1.2], [-1.2, 0.0]])  # a root at 0 that repels
    >>> spectral_radius(lambda z: torch.tanh(z @ turn.T), torch.zeros(1, 2), generator=torch.Generator())
    tensor([1.2000])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: nothing would be learned of the Jacobian")
    if not z.is_floating_point() or z.dim() == 0 or z.numel() == 0:
        raise ValueError(f"z must be (batch, ...), floating and not empty, got {tuple(z.shape)} {z.dtype}")
    flat = (z.shape[0], z[0].numel())
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = f(leaf, *[p.detach() for p in params])

    def pull(v: Tensor) -> Tensor:
        if not image.requires_grad:  # f does not look at its state
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(image, leaf, v.view(z.shape), retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product.reshape(flat)

    steps = min(steps, flat[1])
    start = torch.randn(flat, generator=generator, dtype=z.dtype).to(z.device)
    with torch.no_grad():
        _, hessenberg = arnoldi(pull, start, steps)
        # Eigenvalues of a few small matrices: LAPACK on the host is the one place where they all exist.
        ritz = torch.linalg.eigvals(hessenberg[:, :steps].cpu())
        return ritz.abs().amax(dim=1).to(z.device)
