"""Five recent papers on the geometry of depth, as one small PyTorch library.

``geomlib.core`` holds the numerics that the papers share, each paper has a package of its own, and
``geomlib.lab`` holds what the chapters of the course need beside a model.
"""

__version__ = "0.1.0"
