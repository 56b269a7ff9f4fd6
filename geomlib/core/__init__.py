"""Numerics that several papers share: fixed points, linear systems, contractions. Knows no paper."""

from geomlib.core.fixed_point import (
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
    Unrolled,
    solve,
    spectral_radius,
)
from geomlib.core.linear import arnoldi, gmres

__all__ = [
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
    "Unrolled",
    "arnoldi",
    "gmres",
    "solve",
    "spectral_radius",
]
