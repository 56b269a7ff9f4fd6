"""Random layers of every kind."""

import pytest
import torch

from geomlib.stationary import Quartic, SheafGraph

KINDS = ("real", "plain", "phases", "orthogonal", "unitary")


def random_layer(
    kind="unitary", *, nodes=6, stalk=2, batch=3, density=0.6, mu=0.5, kappa=1.0, dtype=torch.float64, seed=0
):
    """Draw a graph, a potential with `V >= mu`, and drives.

    `real` and `orthogonal` have real states, the others complex ones; `plain` has no connection.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, complex_=False):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if complex_:
            values = torch.complex(values, torch.randn(*shape, generator=generator, dtype=torch.float64))
        return values

    edges = torch.triu_indices(nodes, nodes, 1)
    edges = edges[:, torch.rand(edges.shape[1], generator=generator) < density]
    count = edges.shape[1]
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    transport = None
    if kind == "phases":
        transport = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    elif kind in ("orthogonal", "unitary"):
        transport = torch.linalg.qr(draw(count, stalk, stalk, complex_=kind == "unitary"))[0]
    V = mu + torch.rand(nodes, generator=generator, dtype=torch.float64)
    quartic = kappa * torch.rand(nodes, generator=generator, dtype=torch.float64)
    complex_ = kind in ("plain", "phases", "unitary")
    drive = draw(batch, nodes, stalk, complex_=complex_)
    weights, V, quartic = weights.to(dtype), V.to(dtype), quartic.to(dtype)
    if transport is not None:
        transport = transport.to(dtype.to_complex() if transport.is_complex() else dtype)
    drive = drive.to(dtype.to_complex() if complex_ else dtype)
    return SheafGraph(nodes, edges, weights, transport), Quartic(V, quartic), drive


@pytest.fixture
def make_layer():
    """Return the maker of random layers."""
    return random_layer


@pytest.fixture(params=KINDS)
def kind(request):
    """Return each kind of graph: real or complex states, with and without a connection."""
    return request.param
