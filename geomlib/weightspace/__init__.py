"""Fractal and coarse geometry of weight spaces (arXiv 2503.14298), measured against what noise would give.

A weight tensor is a signal on a grid. `T` looks at it through boxes of growing side, `box_counts` counts the
boxes that large weights occupy, `fit_dimension` fits a slope, and `null_counts` says what the same slope is
for a random set of the same shape and density: only the difference is a finding. `layer_dimension` and
`model_report` do all of it for a tensor and for a network; `shapes` holds the sets whose dimension is known.
"""

from geomlib.weightspace import shapes
from geomlib.weightspace.boxes import (
    BoxCounts,
    box_counts,
    gliding_mass,
    null_counts,
    point_counts,
    shifted_counts,
)
from geomlib.weightspace.canonical import canonicalize, order, relabel, rescale, same_function
from geomlib.weightspace.dimension import (
    DimFit,
    fit_dimension,
    line_slope,
    local_slopes,
    self_similarity,
    slopes,
)
from geomlib.weightspace.layers import (
    LayerReport,
    WeightTensor,
    layer_dimension,
    model_report,
    weight_tensors,
)
from geomlib.weightspace.layouts import Grid, lay_out
from geomlib.weightspace.mass import GeneralisedDimensions, lacunarity, renyi_dimensions
from geomlib.weightspace.scale_invariance import Periodogram, RatioTest, dsi_periodogram, dsi_ratio_test
from geomlib.weightspace.surfaces import Roughness, dbc, haar_energies, haar_exponent, ranks, variogram
from geomlib.weightspace.surrogates import rank_remap, surrogate
from geomlib.weightspace.symmetry import (
    PermTest,
    block_perm,
    bounded_perm,
    holm,
    perm_test,
    permute_pair,
    rescale_pair,
    tree_perm,
)
from geomlib.weightspace.thresholds import Occupied, occupied_set
from geomlib.weightspace.tracker import FractalTracker, TrackRecord
from geomlib.weightspace.transform import T, as_signal, cells, defect, phi, project, segment
from geomlib.weightspace.uncertainty import Robustness, robustness
from geomlib.weightspace.units import Domain, Slot, Space, Units, trace

__all__ = [
    "BoxCounts",
    "DimFit",
    "Domain",
    "FractalTracker",
    "GeneralisedDimensions",
    "Grid",
    "LayerReport",
    "Occupied",
    "Periodogram",
    "PermTest",
    "RatioTest",
    "Robustness",
    "Roughness",
    "Slot",
    "Space",
    "T",
    "TrackRecord",
    "Units",
    "WeightTensor",
    "as_signal",
    "block_perm",
    "bounded_perm",
    "box_counts",
    "canonicalize",
    "cells",
    "dbc",
    "defect",
    "dsi_periodogram",
    "dsi_ratio_test",
    "fit_dimension",
    "gliding_mass",
    "haar_energies",
    "haar_exponent",
    "holm",
    "lacunarity",
    "lay_out",
    "layer_dimension",
    "line_slope",
    "local_slopes",
    "model_report",
    "null_counts",
    "occupied_set",
    "order",
    "perm_test",
    "permute_pair",
    "phi",
    "point_counts",
    "project",
    "rank_remap",
    "ranks",
    "relabel",
    "renyi_dimensions",
    "rescale",
    "rescale_pair",
    "robustness",
    "same_function",
    "segment",
    "self_similarity",
    "shapes",
    "shifted_counts",
    "slopes",
    "surrogate",
    "trace",
    "tree_perm",
    "variogram",
    "weight_tensors",
]
