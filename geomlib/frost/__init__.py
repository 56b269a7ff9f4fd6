"""Fractal of stationary transformations (Yu and Hwang, arXiv 2601.19551): depth as resolution.

One map is iterated; its step length is a scale, its iterations are resolutions of one state, and a score
learned from ranks says when a resolution is good enough. `Frost` is the model, `scale` and `zoom` its theory.
"""

from geomlib.frost.architectures import KINDS, Options, image, resnet50, sequence, vector, vit_b16
from geomlib.frost.baselines import BasicSSM, Recurrent, Vanilla
from geomlib.frost.certified import ACTIVATIONS, Certified, max_min, normalised, orthogonal
from geomlib.frost.model import MODES, Context, Frost, Trajectory, Unrolled
from geomlib.frost.refine import (
    a_posteriori_bound,
    a_priori_bound,
    equilibrium,
    jacobian_norms,
    jacobians,
    step_factor,
    zoom,
)
from geomlib.frost.scale import System, euler_step, integrate, printed_step, scale, trajectory
from geomlib.frost.transitions import (
    AttentionBlock,
    Block,
    Bottleneck,
    Prepared,
    Transition,
)

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "MODES",
    "AttentionBlock",
    "BasicSSM",
    "Block",
    "Bottleneck",
    "Certified",
    "Context",
    "Frost",
    "Options",
    "Prepared",
    "Recurrent",
    "System",
    "Trajectory",
    "Transition",
    "Unrolled",
    "Vanilla",
    "a_posteriori_bound",
    "a_priori_bound",
    "equilibrium",
    "euler_step",
    "image",
    "integrate",
    "jacobian_norms",
    "jacobians",
    "max_min",
    "normalised",
    "orthogonal",
    "printed_step",
    "resnet50",
    "scale",
    "sequence",
    "step_factor",
    "trajectory",
    "vector",
    "vit_b16",
    "zoom",
]
