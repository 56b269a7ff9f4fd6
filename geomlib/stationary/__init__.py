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
from geomlib.stationary.cascade import inverse_bound, monotonicity, monotonicity_bound, supra_flow
from geomlib.stationary.covers import cover_sectors, root_split, sheaf_to_cover_u1, sheaf_to_gremban
from geomlib.stationary.dilation import halmos, unitary_pair
from geomlib.stationary.equivalence import (
    mlp_to_supra,
    sheaf_gauge_trivialise,
    stack_to_supra,
    supra_to_stack,
    symmetric_to_sheaf,
)
from geomlib.stationary.faces import bridge_resistance, face_clock, toric_chart
from geomlib.stationary.field import LogDetLikelihood, fisher_information, sample_field, score
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
from geomlib.stationary.learning import METRICS, Event, GraphHistory, learn_graph
from geomlib.stationary.lifts import Layer, Lift, LiftedPotential
from geomlib.stationary.natural import (
    barrier_step,
    diagonal_step,
    entropic_step,
    natural_step,
    projected_gradient,
)
from geomlib.stationary.network import NetworkDiagnostics, StationaryBlock, StationaryNetwork, cayley
from geomlib.stationary.objectives import (
    Objective,
    Slope,
    StationaryObjective,
    best_scale,
    transport_gradient,
)
from geomlib.stationary.penalties import MCP, Linear, Penalty, linearised_rounds
from geomlib.stationary.penalty import (
    Relaxation,
    ResidualPenalty,
    continuation,
    first_order,
    richardson,
    ridge,
)
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
from geomlib.stationary.relaxations import StiffCopies, SymmetricEnergy, convexity_threshold
from geomlib.stationary.resolvent import Resolvent, graph_to_resolvent, resolvent_to_sheaf
from geomlib.stationary.scores import phase_error, support_f1, weight_error
from geomlib.stationary.solvers import DissipativeFlow, DouglasRachford, ForwardBackward, NewtonCG
from geomlib.stationary.sparse import edge_dots, laplacian_product, weighted_laplacian
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
from geomlib.stationary.supra import SupraGraph
from geomlib.stationary.tasks import (
    HiddenClusters,
    Recovery,
    connection_recovery,
    hidden_clusters,
    latent_graph_regression,
    ring_with_chords,
    three_spirals,
)

__all__ = [
    "MCP",
    "METRICS",
    "Birth",
    "Branch",
    "DepthSensitivity",
    "DissipativeFlow",
    "DouglasRachford",
    "EdgeCountBound",
    "Event",
    "ForwardBackward",
    "GraphHistory",
    "HiddenClusters",
    "Layer",
    "Lift",
    "LiftedPotential",
    "Linear",
    "LipschitzChain",
    "Local",
    "LogDetLikelihood",
    "MetricStability",
    "NetworkDiagnostics",
    "NewtonCG",
    "Objective",
    "PacBayesBound",
    "Penalty",
    "Potential",
    "Quartic",
    "Recovery",
    "Rectifier",
    "Relaxation",
    "ResidualPenalty",
    "Resolvent",
    "SheafGraph",
    "Slope",
    "StabilityReport",
    "StabilityWarning",
    "StationaryBlock",
    "StationaryNetwork",
    "StationaryObjective",
    "StiffCopies",
    "SupraGraph",
    "SymmetricEnergy",
    "Tanh",
    "Tube",
    "UnstableBranchError",
    "adjoint_field",
    "barrier_step",
    "best_scale",
    "birth",
    "bloch",
    "bridge_resistance",
    "cayley",
    "codazzi",
    "connection_recovery",
    "continuation",
    "convexity_threshold",
    "cover_sectors",
    "dense_hessian",
    "depth_sensitivity",
    "diagonal_step",
    "distortion",
    "edge_count_bound",
    "edge_dots",
    "edge_gradient",
    "effective_field",
    "energy",
    "entropic_step",
    "face_clock",
    "first_order",
    "fisher_information",
    "follow",
    "graph_to_resolvent",
    "green_from_resistance",
    "halmos",
    "hessian_product",
    "hidden_clusters",
    "inertia",
    "inverse_bound",
    "landau_lifshitz",
    "laplacian_product",
    "latent_graph_regression",
    "learn_graph",
    "linearised_flow",
    "linearised_rounds",
    "lipschitz_chain",
    "log_det_potential",
    "metric",
    "metric_bounds",
    "metric_stability",
    "mlp_to_supra",
    "monotonicity",
    "monotonicity_bound",
    "natural_step",
    "pac_bayes_bound",
    "phase_error",
    "polar",
    "projected_gradient",
    "real_inner",
    "relabel",
    "residual",
    "resistance_metric",
    "resistances",
    "resolvent_to_sheaf",
    "richardson",
    "ridge",
    "ring_with_chords",
    "rk4",
    "root_split",
    "sample_field",
    "score",
    "sheaf_gauge_trivialise",
    "sheaf_to_cover_u1",
    "sheaf_to_gremban",
    "smallest_eigenvalue",
    "solve_stationary",
    "spin_energy",
    "spinor",
    "spinor_velocity",
    "stability_report",
    "stable_states",
    "stack_to_supra",
    "stationary_layer",
    "support_f1",
    "supra_flow",
    "supra_to_stack",
    "symmetric_to_sheaf",
    "three_spirals",
    "toric_chart",
    "transport_gradient",
    "tube",
    "unitary_pair",
    "unitary_step",
    "weight_error",
    "weight_sensitivity",
    "weighted_laplacian",
]
