"""Laws of edges that do not exist yet: derivative, best transport, and steps on the unitary group."""

import math

import pytest
import torch

from geomlib.stationary.births import birth, polar, unitary_step
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import adjoint_field, solve_stationary, stationary_layer
from geomlib.stationary.objectives import StationaryObjective, transport_gradient
from geomlib.stationary.potential import Quartic

COMPLEX = torch.complex128


def unitaries(count, d, generator, dtype=COMPLEX):
    return torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=dtype)).Q


def problem(d, dtype, generator, nodes=6, batch=3):
    """Return a graph with dead edges, its potential, drive, state, a loss, and the adjoint field."""
    edges = torch.triu_indices(nodes, nodes, 1)
    count = edges.shape[1]
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(count, generator=generator) > 0.4)
    if d == 1 and dtype == COMPLEX:
        transport = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * 6
    else:
        transport = unitaries(count, d, generator, dtype)
    graph = SheafGraph(nodes, edges, weights, transport)
    potential = Quartic(*(0.5 + torch.rand(2, nodes, generator=generator, dtype=torch.float64)))
    drive = torch.randn(batch, nodes, d, generator=generator, dtype=dtype)
    target = torch.randn(batch, nodes, d, generator=generator, dtype=dtype)

    def loss(psi):
        return (psi - target).abs().square().sum() / 2

    psi = solve_stationary(graph, potential, drive, tol=1e-13).value
    return graph, potential, drive, psi, loss, adjoint_field(graph, potential, psi, psi - target)


CASES = [(1, COMPLEX), (2, COMPLEX), (3, COMPLEX), (2, torch.float64), (1, torch.float64)]


@pytest.mark.parametrize(("d", "dtype"), CASES)
def test_derivative_of_a_birth_is_the_one_sided_difference(d, dtype, generator):
    graph, potential, drive, psi, loss, p = problem(d, dtype, generator)
    born = birth(p, psi, graph.edges)
    for edge in (graph.weights == 0).nonzero().flatten()[:3].tolist():
        transport, weights = graph.transport.clone(), graph.weights.clone()
        transport[edge], weights[edge] = born.transport[edge], 1e-6
        near = graph.replace(weights=weights, transport=transport)
        change = loss(solve_stationary(near, potential, drive, tol=1e-13).value) - loss(psi)
        assert float(change) / 1e-6 == pytest.approx(float(born.derivative[edge]), rel=1e-4)


@pytest.mark.parametrize(("d", "dtype"), CASES)
def test_no_random_transport_is_better(d, dtype, generator):
    graph, _, _, psi, _, p = problem(d, dtype, generator)
    u, v = graph.edges[:, 0].tolist()
    born = birth(p, psi, graph.edges[:, :1])

    def derivative(tau):
        first = p[:, u] - torch.einsum("tab,nb->tna", tau, p[:, v])
        second = psi[:, u] - torch.einsum("tab,nb->tna", tau, psi[:, v])
        return (first.conj() * second).real.sum((1, 2))

    best = born.transport
    if best.dim() == 1:
        best = torch.polar(torch.ones_like(best), best).view(1, 1, 1)
    assert float(derivative(best)) == pytest.approx(float(born.derivative), abs=1e-10)
    assert (derivative(unitaries(2000, d, generator, dtype)) >= born.derivative - 1e-10).all()


def test_phase_is_the_unitary_of_one_dimension(generator):
    p, psi = (torch.randn(4, 5, 1, generator=generator, dtype=COMPLEX) for _ in range(2))
    edges = torch.triu_indices(5, 5, 1)
    phases = birth(p, psi, edges)
    # The same states in the first of two components: the rest of the unitary is free.
    wide = birth(*(torch.cat([x, torch.zeros_like(x)], 2) for x in (p, psi)), edges)
    torch.testing.assert_close(phases.derivative, wide.derivative)
    torch.testing.assert_close(
        torch.polar(torch.ones_like(phases.transport), phases.transport), wide.transport[:, 0, 0]
    )


def test_an_edge_that_nothing_passes_gets_the_identity():
    nothing = torch.zeros(2, 3, 2, dtype=COMPLEX)
    born = birth(nothing, nothing, torch.tensor([[0, 1], [1, 2]]))
    torch.testing.assert_close(born.transport, torch.eye(2, dtype=COMPLEX).expand(2, 2, 2))
    assert born.derivative.tolist() == [0, 0]


@pytest.mark.parametrize(("d", "dtype"), CASES)
def test_transport_gradient_is_that_of_autograd(d, dtype, generator):
    graph, potential, drive, psi, loss, p = problem(d, dtype, generator)
    transport = graph.transport.clone().requires_grad_()
    moving = graph.with_tensors(graph.weights, transport)
    value = stationary_layer(moving, potential, drive, tol=1e-13).value
    (expected,) = torch.autograd.grad(loss(value), transport)
    torch.testing.assert_close(transport_gradient(graph, p, psi), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX])
def test_births_on_devices(device, dtype, generator):
    p, psi = (torch.randn(4, 5, 2, generator=generator, dtype=dtype) for _ in range(2))
    edges = torch.triu_indices(5, 5, 1)
    expected = birth(p, psi, edges)
    moved = birth(p.to(device), psi.to(device), edges.to(device))
    torch.testing.assert_close(moved.derivative.cpu(), expected.derivative)
    torch.testing.assert_close(moved.transport.cpu(), expected.transport)


@pytest.mark.parametrize("connection", [False, True])
def test_slope_is_the_gradient_over_all_candidates(connection, generator):
    graph, potential, drive, _, loss, _ = problem(2, COMPLEX, generator)
    if not connection:
        graph = graph.replace(transport=None)
    objective = StationaryObjective(potential, drive, loss, connection=connection, tol=1e-13)
    slope = objective.slope(graph)
    weights = slope.graph.weights.clone().requires_grad_()
    moving = slope.graph.with_tensors(weights, slope.graph.transport)
    value = stationary_layer(moving, potential, drive, tol=1e-13).value
    (expected,) = torch.autograd.grad(loss(value), weights)
    assert (graph.weights == 0).any()
    torch.testing.assert_close(slope.gradient, expected, rtol=1e-7, atol=1e-9)
    if connection:
        alive = graph.weights > 0
        assert torch.equal(slope.graph.transport[alive], graph.transport[alive])
        assert not torch.equal(slope.graph.transport, graph.transport)


@pytest.mark.parametrize("dtype", [torch.float64, COMPLEX])
def test_unitary_step_stays_on_the_group_and_descends(dtype, generator):
    transport = unitaries(5, 3, generator, dtype)
    target = unitaries(5, 3, generator, dtype)

    def loss(tau):
        return (tau - target).abs().square().sum() / 2

    for _ in range(400):
        after = unitary_step(transport, transport - target, torch.full((5,), 0.3, dtype=torch.float64))
        identity = torch.eye(3, dtype=dtype).expand(5, 3, 3)
        torch.testing.assert_close(after @ after.mH, identity, rtol=0, atol=1e-12)
        assert loss(after) <= loss(transport) + 1e-12
        transport = after
    if dtype == COMPLEX:  # the real group has two components
        assert loss(transport) < 1e-6


def test_polar_factor_is_the_nearest_unitary(generator):
    matrix = torch.randn(3, 3, generator=generator, dtype=COMPLEX)
    near = float((polar(matrix) - matrix).norm())
    others = (unitaries(2000, 3, generator) - matrix).flatten(1).norm(dim=1)
    assert (others >= near).all()


def test_bad_arguments_are_named(generator):
    psi = torch.randn(4, 5, 1, generator=generator, dtype=COMPLEX)
    with pytest.raises(ValueError, match="psi"):
        birth(psi[:2], psi, torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="edges"):
        birth(psi, psi, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="matrices"):
        polar(psi)
    with pytest.raises(ValueError, match="step"):
        unitary_step(torch.eye(2)[None], torch.eye(2)[None], torch.ones(3))
    plain = SheafGraph.complete(5, torch.zeros(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="transports"):
        transport_gradient(plain, psi, psi)
    potential = Quartic(torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    objective = StationaryObjective(potential, psi.repeat(1, 1, 2), lambda x: x.real.sum(), connection=True)
    phases = plain.replace(transport=torch.full((10,), math.pi / 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="births would not fit"):
        objective.slope(phases)
