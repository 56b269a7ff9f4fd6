"""Stationary graph networks (Pasechnyuk-Vilensky and Takac, arXiv 2507.20088): layers that relax.

A hidden layer is the stationary state of a dissipative Schrodinger-type flow on a weighted graph with a
unitary connection; the graph is learned, the stack is one equation.
"""

from geomlib.core import real_inner
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import (
    UnstableBranchError,
    adjoint_field,
    dense_hessian,
    edge_gradient,
    energy,
    hessian_product,
    residual,
    solve_stationary,
    stationary_layer,
)
from geomlib.stationary.potential import Local, Potential, Quartic, Rectifier, Tanh
from geomlib.stationary.solvers import DissipativeFlow, DouglasRachford, ForwardBackward, NewtonCG

__all__ = [
    "DissipativeFlow",
    "DouglasRachford",
    "ForwardBackward",
    "Local",
    "NewtonCG",
    "Potential",
    "Quartic",
    "Rectifier",
    "SheafGraph",
    "Tanh",
    "UnstableBranchError",
    "adjoint_field",
    "dense_hessian",
    "edge_gradient",
    "energy",
    "hessian_product",
    "real_inner",
    "residual",
    "solve_stationary",
    "stationary_layer",
]
