"""Fractal of stationary transformations (Yu and Hwang, arXiv 2601.19551): depth as resolution."""
