"""Stationary graph networks (Pasechnyuk-Vilensky and Takac, arXiv 2507.20088): layers that relax.

A hidden layer is the stationary state of a dissipative Schrodinger-type flow on a weighted graph with a
unitary connection; the graph is learned, the stack is one equation.
"""

from geomlib.core import real_inner
from geomlib.stationary.births import Birth, birth, polar, unitary_step
from geomlib.stationary.bounds import (
    DepthSensitivity,
    EdgeCountBound,
    PacBayesBound,
    depth_sensitivity,
    edge_count_bound,
    pac_bayes_bound,
    weight_sensitivity,
)
from geomlib.stationary.branches import Branch, follow
from geomlib.stationary.faces import bridge_resistance, face_clock, toric_chart
from geomlib.stationary.geometry import (
    Tube,
    codazzi,
    log_det_potential,
    metric,
    metric_bounds,
    relabel,
    resistances,
    tube,
)
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
from geomlib.stationary.natural import (
    barrier_step,
    diagonal_step,
    entropic_step,
    natural_step,
    projected_gradient,
)
from geomlib.stationary.penalties import MCP, Linear, Penalty, linearised_rounds
from geomlib.stationary.perturbation import (
    LipschitzChain,
    MetricStability,
    distortion,
    green_from_resistance,
    lipschitz_chain,
    metric_stability,
    resistance_metric,
)
from geomlib.stationary.potential import Local, Potential, Quartic, Rectifier, Tanh
from geomlib.stationary.solvers import DissipativeFlow, DouglasRachford, ForwardBackward, NewtonCG
from geomlib.stationary.sparse import weighted_laplacian
from geomlib.stationary.spin import (
    bloch,
    effective_field,
    landau_lifshitz,
    rk4,
    spin_energy,
    spinor,
    spinor_velocity,
)
from geomlib.stationary.stability import (
    StabilityReport,
    StabilityWarning,
    inertia,
    linearised_flow,
    smallest_eigenvalue,
    stability_report,
    stable_states,
)

__all__ = [
    "MCP",
    "Birth",
    "Branch",
    "DepthSensitivity",
    "DissipativeFlow",
    "DouglasRachford",
    "EdgeCountBound",
    "ForwardBackward",
    "Linear",
    "LipschitzChain",
    "Local",
    "MetricStability",
    "NewtonCG",
    "PacBayesBound",
    "Penalty",
    "Potential",
    "Quartic",
    "Rectifier",
    "SheafGraph",
    "StabilityReport",
    "StabilityWarning",
    "Tanh",
    "Tube",
    "UnstableBranchError",
    "adjoint_field",
    "barrier_step",
    "birth",
    "bloch",
    "bridge_resistance",
    "codazzi",
    "dense_hessian",
    "depth_sensitivity",
    "diagonal_step",
    "distortion",
    "edge_count_bound",
    "edge_gradient",
    "effective_field",
    "energy",
    "entropic_step",
    "face_clock",
    "follow",
    "green_from_resistance",
    "hessian_product",
    "inertia",
    "landau_lifshitz",
    "linearised_flow",
    "linearised_rounds",
    "lipschitz_chain",
    "log_det_potential",
    "metric",
    "metric_bounds",
    "metric_stability",
    "natural_step",
    "pac_bayes_bound",
    "polar",
    "projected_gradient",
    "real_inner",
    "relabel",
    "residual",
    "resistance_metric",
    "resistances",
    "rk4",
    "smallest_eigenvalue",
    "solve_stationary",
    "spin_energy",
    "spinor",
    "spinor_velocity",
    "stability_report",
    "stable_states",
    "stationary_layer",
    "toric_chart",
    "tube",
    "unitary_step",
    "weight_sensitivity",
    "weighted_laplacian",
]
