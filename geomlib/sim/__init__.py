"""Stable Invariant Models (Konishi and Kawahara, arXiv 2207.07475) and what they are measured against.

A network of infinite depth is a dynamical system, and only the part of it that survives infinite time is its
output. `SIM` writes that part down with the spectrum of a linear operator, `DEQ` solves for it. `koopman`
holds the tools that look inside, `systems` the examples whose answers are known.
"""

from geomlib.sim.bases import ConvBasis, TemporalConvBasis, mlp
from geomlib.sim.deq import DEQ, ConvDEQ, Diagnostics
from geomlib.sim.features import RandomFourierFeatures, median_bandwidth
from geomlib.sim.flow import Coupling, FlowSIM, polar_advance, trajectory_loss
from geomlib.sim.jacobian import Stability, jacobian_penalty, stability
from geomlib.sim.koopman import (
    EDMD,
    AffineLimit,
    InputEDMD,
    Ulam,
    affine_limit,
    circle_embedding_norm,
    edmd,
    edmd_with_input,
    embedding_norm,
    generalised_laplace_average,
    jacobian_spectrum,
    mean_ergodic,
    projector_at_one,
    spectral_projector,
    ulam,
)
from geomlib.sim.mix import SpectralMix
from geomlib.sim.model import SIM
from geomlib.sim.monotone import MonDEQ
from geomlib.sim.systems import (
    copy_memory,
    orbit,
    polynomial_deq,
    polynomial_dictionary,
    polynomial_equilibrium,
    rotation_tanh,
    stuart_landau,
    stuart_landau_eigenfunctions,
    van_der_pol,
    van_der_pol_orbits,
)

__all__ = [
    "DEQ",
    "EDMD",
    "SIM",
    "AffineLimit",
    "ConvBasis",
    "ConvDEQ",
    "Coupling",
    "Diagnostics",
    "FlowSIM",
    "InputEDMD",
    "MonDEQ",
    "RandomFourierFeatures",
    "SpectralMix",
    "Stability",
    "TemporalConvBasis",
    "Ulam",
    "affine_limit",
    "circle_embedding_norm",
    "copy_memory",
    "edmd",
    "edmd_with_input",
    "embedding_norm",
    "generalised_laplace_average",
    "jacobian_penalty",
    "jacobian_spectrum",
    "mean_ergodic",
    "median_bandwidth",
    "mlp",
    "orbit",
    "polar_advance",
    "polynomial_deq",
    "polynomial_dictionary",
    "polynomial_equilibrium",
    "projector_at_one",
    "rotation_tanh",
    "spectral_projector",
    "stability",
    "stuart_landau",
    "stuart_landau_eigenfunctions",
    "trajectory_loss",
    "ulam",
    "van_der_pol",
    "van_der_pol_orbits",
]
