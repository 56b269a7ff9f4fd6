r"""What can be said about a state without waiting for the last: resolutions, error bars, local norms.

Under a contraction with factor `L` the distance to the fixed point is at most `L^t / (1 - L)` times the first
step (arXiv 2601.19551, Theorem B.3) and at most the next step divided by `1 - L`, known before and after
the fact. `zoom` takes smaller steps under the same forcing: the fixed point stays where it is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from geomlib.core.contraction import lipschitz_estimate
from geomlib.core.fixed_point import Adjoint, Anderson, Implicit, Solution, Solver, solve
from geomlib.frost.model import Frost
from geomlib.frost.unrolled import Context, Unrolled

__all__ = [
    "a_posteriori_bound",
    "a_priori_bound",
    "equilibrium",
    "jacobian_norms",
    "jacobians",
    "step_factor",
    "zoom",
]


def step_factor(length: float | Tensor, kappa: float) -> float:
    r"""Bound the Lipschitz constant of `(1 - l) h + l G(h) + c` by `|1 - l| + l kappa`, the worst channel's.

    Parameters
    ----------
    length : float or Tensor
        Step length `l`, positive. A scalar bounds in every norm in which `G` has the constant. A tensor, one
        gate in (0, 1] for each channel, bounds in the sup norm, or, where `kappa` belongs to the 2-norm, in
        the norm `|diag(l)^(-1/2) v|_2`; in the plain 2-norm a gated step can expand.
    kappa : float
        Lipschitz constant of `G`, not negative.

    Returns
    -------
    float
        For `l <= 1` it is `1 - l (1 - kappa)`: a smaller step contracts less. It is below 1 exactly for
        `l < 2 / (1 + kappa)`, and at most `l` only for `l >= 1 / (2 - kappa)`.

    Raises
    ------
    ValueError
        If an entry of `length` is not positive, a gate above 1, or `kappa` negative.

    Notes
    -----
    Source: reconstructed, in place of `L <= lambda` in Appendix B. Proof for gates: conjugation with
    `diag(l)^(1/2)` gives `I - D + D^(1/2) J D^(1/2)`, and the bilinear form of each part is bounded by
    Cauchy and Schwarz. Sharp for `G = -kappa id` and scalar `l >= 1`.

    Examples
    --------
    >>> step_factor(0.5, 0.9), step_factor(1.4, 0.5)
    (0.95, 1.0999999999999999)
    >>> round(step_factor(torch.tensor([0.1, 0.9]), 0.9), 6)
    0.99
    """
    if not kappa >= 0:
        raise ValueError(f"kappa must not be negative, got {kappa}: it is a Lipschitz constant")
    lengths = torch.as_tensor(length, dtype=torch.float64)
    if lengths.numel() == 0 or not bool((lengths > 0).all()):
        raise ValueError(f"length must be positive, got {length}: the state would not move")
    if lengths.dim() and bool((lengths > 1).any()):
        raise ValueError(f"gates must be at most 1, got {lengths.max().item()}: no bound is proved there")
    return ((1 - lengths).abs() + lengths * kappa).max().item()


def zoom(model: Frost, m: float) -> Frost:
    """Return a copy that takes `m` times as many steps of a length `1 / m`, under the same forcing.

    The continuous system, its fixed point and the readout stay as they are; only the resolution in depth
    changes. The numbers of a trained model should hardly move.

    Parameters
    ----------
    model : Frost
        In any mode.
    m : float
        Positive; 2 halves the step, 0.5 doubles it. The number of steps is rounded.

    Returns
    -------
    Frost
        With `resolution` and `steps` changed. The resolution is not part of the state dict.

    Raises
    ------
    ValueError
        If `m` is not positive, leaves no step, or the model has no scale.

    Notes
    -----
    Source: reconstructed. It makes Definition 3.1, a finer view of one structure, a statement about step
    sizes: the error of Euler's method is proportional to the step.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=8, steps=6, generator=torch.Generator().manual_seed(0))
    >>> finer = zoom(model, 4)
    >>> finer.steps, finer.resolution, round(finer.contraction_factor(), 6)
    (24, 4.0, 0.9875)
    """
    if not isinstance(model, Frost):
        raise ValueError(f"model must be a Frost, got {type(model).__name__}: its steps have no length")
    if not m > 0 or round(m * model.steps) < 1:
        raise ValueError(f"m must be positive and leave a step, got {m} for {model.steps} steps")
    finer = copy.deepcopy(model)
    finer.resolution = model.resolution * m
    finer.steps = round(m * model.steps)
    return finer


def a_priori_bound(model: Frost, context: Context, steps: int) -> Tensor:
    r"""Bound the distance to the fixed point after each step, from the first step alone.

    Parameters
    ----------
    model : Frost
        That contracts.
    context : Context
        Of `N` samples.
    steps : int
        How far.

    Returns
    -------
    Tensor
        `(N, steps + 1)`: `L^t / (1 - L) |h_1 - h_0|` for `t = 0 ... steps`, in the norm of the transition.

    Raises
    ------
    ValueError
        If the model has no contraction factor or `steps` is negative.

    Notes
    -----
    Source: Theorem B.3 with the factor of :meth:`geomlib.frost.Frost.contraction_factor`.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=8, generator=torch.Generator().manual_seed(0))
    >>> bound = a_priori_bound(model, model.inject(torch.ones(5, 3)), 10)
    >>> bound.shape, round((bound[0, 1] / bound[0, 0]).item(), 4)
    (torch.Size([5, 11]), 0.95)
    """
    factor = _factor(model)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}: no state is there")
    start = model.start(context)
    first = _length(model.step(start, context) - start, model)
    powers = factor ** torch.arange(steps + 1, device=first.device, dtype=first.dtype)
    return first[:, None] * powers / (1 - factor)


def a_posteriori_bound(model: Frost, state: Tensor, context: Context) -> Tensor:
    r"""Bound the distance of states to their fixed points by one more step: `|step(h) - h| / (1 - L)`.

    Parameters
    ----------
    model : Frost
        That contracts.
    state : Tensor
        `(N, d, ...)`.
    context : Context
        Of the same samples.

    Returns
    -------
    Tensor
        `(N,)`, in the norm of the transition; no label is needed.

    Raises
    ------
    ValueError
        If the model has no contraction factor.

    Notes
    -----
    Source: the collage bound, known; the paper has only the bound in advance.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=8, generator=torch.Generator().manual_seed(0))
    >>> context = model.inject(torch.ones(5, 3))
    >>> bool((a_posteriori_bound(model, model.start(context), context) > 0).all())
    True
    """
    return _length(model.step(state, context) - state, model) / (1 - _factor(model))


def equilibrium(
    model: Frost,
    context: Context,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    tol: float = 1e-4,
    max_steps: int = 500,
) -> Solution:
    """Solve for the states that the steps approach, with a memory that does not grow with depth.

    Parameters
    ----------
    model : Frost
        That contracts: its fixed points exist and are unique.
    context : Context
        Of `N` samples, from `model.inject`.
    solver, adjoint
        As :func:`geomlib.core.solve` takes them; Anderson and implicit gradients if omitted.
    tol : float
        Bound of the error, in the 2-norm; of the residual for a transition of another norm.
    max_steps : int
        Evaluations of the step at most.

    Returns
    -------
    Solution
        `value` is `(N, d, ...)`; gradients flow to all parameters that the context depends on.

    Raises
    ------
    ValueError
        If the model has no contraction factor.
    ConvergenceError
        If a sample misses the tolerance.

    Notes
    -----
    Source: Theorem B.2 for the fixed point; the implicit gradient is that of deep equilibrium models (Bai,
    Kolter and Koltun 2019, arXiv 1909.01377).

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=8, generator=torch.Generator().manual_seed(0))
    >>> context = model.inject(torch.ones(5, 3))
    >>> fixed = equilibrium(model, context).value
    >>> bool((model.step(fixed, context) - fixed).norm() < 1e-4)
    True
    """
    factor = _factor(model)
    rows = len(context.rows)
    assert context.bx is not None
    assert context.scale is not None

    def step(state: Tensor, bx: Tensor, scale: Tensor, *kept: Tensor) -> Tensor:
        return model.step(state, Context(context.x, bx, rows=kept[:rows], shared=kept[rows:], scale=scale))

    return solve(
        step,
        model.start(context).detach(),
        context.bx,
        context.scale,
        *context.rows,
        *context.shared,
        solver=solver or Anderson(),
        adjoint=adjoint or Implicit(),
        tol=tol,
        contraction_factor=factor if model.transition.norm == "2" else None,
        max_steps=max_steps,
    )


def jacobians(model: Unrolled, state: Tensor, context: Context, t: int = 1) -> Tensor:
    """Return the derivative of a step at each sample, dense: `(N, D, D)` for states of `D` numbers.

    `D` backward passes, for small states.

    Parameters
    ----------
    model : Unrolled
        Any model of this room.
    state : Tensor
        `(N, d, ...)`, floating.
    context : Context
        Of the same samples.
    t : int
        Which step, for untied models.

    Returns
    -------
    Tensor
        `J[n, i, j]` is the derivative of number `i` of the next state by number `j` of the state.

    Notes
    -----
    Source: reconstructed; samples do not influence each other, so that one backward pass serves them all.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=4, generator=torch.Generator().manual_seed(0))
    >>> context = model.inject(torch.ones(5, 3))
    >>> jacobians(model, torch.zeros(5, 4), context).shape
    torch.Size([5, 4, 4])
    """
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        image = model.step(leaf, context, t).flatten(1)
        rows = [
            torch.autograd.grad(image[:, i].sum(), leaf, retain_graph=True)[0].flatten(1)
            for i in range(image.shape[1])
        ]
    return torch.stack(rows, 1)


def jacobian_norms(
    model: Unrolled,
    state: Tensor,
    context: Context,
    t: int = 1,
    *,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the 2-norm of the derivative of a step at each sample: how far it stretches a difference.

    Parameters
    ----------
    model : Unrolled
        Any model of this room.
    state : Tensor
        `(N, d, ...)`, floating.
    context : Context
        Of the same samples.
    t : int
        Which step, for untied models.
    steps : int, optional
        Power iterations, for large states: an estimate from below. Exact, by singular values, if omitted.
    generator : torch.Generator, optional
        Draws the first vectors of the power iteration.

    Returns
    -------
    Tensor
        `(N,)`.

    Raises
    ------
    ValueError
        If `steps < 1`.

    Notes
    -----
    Source: reconstructed. A local norm is a measurement, not a certificate: it says nothing of other states.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 2, width=4, generator=torch.Generator().manual_seed(0))
    >>> context = model.inject(torch.ones(5, 3))
    >>> bool((jacobian_norms(model, torch.zeros(5, 4), context) <= model.contraction_factor() + 1e-6).all())
    True
    """
    if steps is not None:
        return lipschitz_estimate(
            lambda h: model.step(h, context, t), state, steps=steps, generator=generator
        )
    return torch.linalg.matrix_norm(jacobians(model, state, context, t), 2)


def _factor(model: Frost) -> float:
    factor = model.contraction_factor()
    if factor is None:
        raise ValueError(
            f"model must contract, got mode {model.mode!r} at resolution {model.resolution}: without a "
            "factor below 1 no distance is bounded"
        )
    return factor


def _length(difference: Tensor, model: Frost) -> Tensor:
    """Return the norm of each sample, in the norm that the transition contracts in."""
    order = 2 if model.transition.norm == "2" else torch.inf
    return torch.linalg.vector_norm(difference.flatten(1), order, dim=1)
