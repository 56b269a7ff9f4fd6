"""Numerics that several papers share: fixed points, linear systems, contractions, scans. Knows no paper."""

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
    "gmres",
    "linear_recurrence",
    "lipschitz_estimate",
    "operator_norm_bound",
    "solve",
    "spectral_radius",
    "ssd",
]
