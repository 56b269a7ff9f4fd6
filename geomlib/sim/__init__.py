"""Stable Invariant Models (Konishi and Kawahara, arXiv 2207.07475) and what they are measured against.

A network of infinite depth is a dynamical system, and only the part of it that survives infinite time is its
output. `SIM` writes that part down with the spectrum of a linear operator, `DEQ` solves for it.
"""

from geomlib.sim.bases import ConvBasis, TemporalConvBasis, mlp
from geomlib.sim.features import RandomFourierFeatures, median_bandwidth
from geomlib.sim.flow import Coupling, FlowSIM, polar_advance, trajectory_loss
from geomlib.sim.mix import SpectralMix
from geomlib.sim.model import SIM

__all__ = [
    "SIM",
    "ConvBasis",
    "Coupling",
    "FlowSIM",
    "RandomFourierFeatures",
    "SpectralMix",
    "TemporalConvBasis",
    "median_bandwidth",
    "mlp",
    "polar_advance",
    "trajectory_loss",
]
