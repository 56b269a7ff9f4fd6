"""Numerics that several papers share: fixed points, linear systems, contractions. Knows no paper."""

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
    "arnoldi",
    "gmres",
    "solve",
    "spectral_radius",
]
