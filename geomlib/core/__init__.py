"""Numerics that several papers share: fixed points, linear systems, contractions, scans. Knows no paper."""

from geomlib.core.conjugate_gradient import CGInfo, conjugate_gradient, newton_cg, newton_descent, real_inner
from geomlib.core.contraction import (
    ContractiveConv1d,
    ContractiveConv2d,
    ContractiveLinear,
    lipschitz_estimate,
)
from geomlib.core.fixed_point import (
    Adjoint,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Direct,
    Implicit,
    NewtonKrylov,
    OneStep,
    Picard,
    Solution,
    Solver,
    Unrolled,
    solve,
    spectral_radius,
)
from geomlib.core.linear import arnoldi, gmres
from geomlib.core.norms import operator_norm_bound
from geomlib.core.recurrence import linear_recurrence, ssd

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "CGInfo",
    "ContractiveConv1d",
    "ContractiveConv2d",
    "ContractiveLinear",
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
    "arnoldi",
    "conjugate_gradient",
    "gmres",
    "linear_recurrence",
    "lipschitz_estimate",
    "newton_cg",
    "newton_descent",
    "operator_norm_bound",
    "real_inner",
    "solve",
    "spectral_radius",
    "ssd",
]
