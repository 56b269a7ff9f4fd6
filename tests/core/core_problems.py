"""Maps with known answers, shared by the tests of this folder."""

import torch


def affine(kappa, *, batch=4, width=8, symmetric=False, dtype=torch.float64, seed=0):
    """``z W^T + u`` with ``|W| = kappa``: the map, its parameters and its exact fixed point."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(width, width, generator=generator, dtype=torch.float64)
    W = W + W.T if symmetric else W
    W = W * (kappa / torch.linalg.matrix_norm(W, 2))
    u = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - W, u.T).T
    return (lambda z, u, W: z @ W.T + u), u.to(dtype), W.to(dtype), exact.to(dtype)


def tanh_cell(kappa, *, batch=4, width=8, dtype=torch.float64, seed=0):
    """``tanh(z W^T + u)`` with ``|W| = kappa``: the map and its parameters."""
    _, u, W, _ = affine(kappa, batch=batch, width=width, dtype=dtype, seed=seed)
    return (lambda z, u, W: torch.tanh(z @ W.T + u)), u, W


def rotation(gain, angle=0.5, dtype=torch.float64):
    """``tanh(gain R(angle) z)``: a root at 0 that stops attracting at ``gain = 1``."""
    turn = torch.tensor(angle, dtype=dtype)
    R = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    return lambda z: torch.tanh(gain * z @ R.T.to(z.device))
