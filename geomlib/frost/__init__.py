"""Fractal of stationary transformations (Yu and Hwang, arXiv 2601.19551): depth as resolution.

One map is iterated; its step length is a scale, its iterations are resolutions of one state, and a score
learned from ranks says when a resolution is good enough. `Frost` is the model, `scale` and `zoom` its theory.
"""

from geomlib.frost.architectures import KINDS, Options, image, resnet50, sequence, vector, vit_b16
from geomlib.frost.baselines import BasicSSM, Recurrent, Vanilla
from geomlib.frost.certified import ACTIVATIONS, Certified, max_min, normalised, orthogonal
from geomlib.frost.model import MODES, Context, Frost, Trajectory, Unrolled
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
    "Trajectory",
    "Transition",
    "Unrolled",
    "Vanilla",
    "image",
    "max_min",
    "normalised",
    "orthogonal",
    "resnet50",
    "sequence",
    "vector",
    "vit_b16",
]
