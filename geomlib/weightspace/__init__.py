"""Fractal and coarse geometry of weight spaces (arXiv 2503.14298), measured against what noise would give.

A weight tensor is a signal on a grid. `T` looks at it through boxes of growing side, `box_counts` counts
the boxes that large weights occupy, `fit_dimension` fits a slope, and `null_counts` says what the same
slope is for a random set of the same shape and density: only the difference is a finding.
"""

from geomlib.weightspace.boxes import (
    BoxCounts,
    box_counts,
    gliding_mass,
    null_counts,
    point_counts,
    shifted_counts,
)
from geomlib.weightspace.dimension import (
    DimFit,
    fit_dimension,
    line_slope,
    local_slopes,
    self_similarity,
    slopes,
)
from geomlib.weightspace.mass import GeneralisedDimensions, lacunarity, renyi_dimensions
from geomlib.weightspace.surfaces import (
    Roughness,
    dbc,
    haar_energies,
    haar_exponent,
    ranks,
    variogram,
)
from geomlib.weightspace.transform import T, as_signal, cells, defect, phi, project, segment

__all__ = [
    "BoxCounts",
    "DimFit",
    "GeneralisedDimensions",
    "Roughness",
    "T",
    "as_signal",
    "box_counts",
    "cells",
    "dbc",
    "defect",
    "fit_dimension",
    "gliding_mass",
    "haar_energies",
    "haar_exponent",
    "lacunarity",
    "line_slope",
    "local_slopes",
    "null_counts",
    "phi",
    "point_counts",
    "project",
    "ranks",
    "renyi_dimensions",
    "segment",
    "self_similarity",
    "shifted_counts",
    "slopes",
    "variogram",
]
