"""Fractal and coarse geometry of weight spaces (arXiv 2503.14298), measured against what noise would give.

A weight tensor is a signal on a grid. `T` looks at it through boxes of growing side, `box_counts` counts the
boxes that large weights occupy, `fit_dimension` fits a slope, and `null_counts` says what the same slope is for
a random set of the same shape and density: only the difference is a finding.
"""
