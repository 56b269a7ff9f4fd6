"""Laws of the space of graphs: metric, bounds, faces, Kähler structure, and the Gaussian field behind."""

import math

import pytest
import torch

from geomlib.stationary import faces, field, geometry
from geomlib.stationary.graph import SheafGraph

EPSILON = 0.5


@pytest.fixture
def graph(generator):
    """Return the complete graph on eight nodes; about a third of its edges are dead."""
    weights = torch.rand(28, generator=generator, dtype=torch.float64)
    alive = torch.rand(28, generator=generator) > 0.3
    return SheafGraph.complete(8, weights * alive)


def slow_resistances(graph, epsilon):
    """`B (L + epsilon I)^-1 B^T` as the formula reads."""
    b = graph.incidence()
    laplacian = b.T @ torch.diag(graph.weights) @ b
    return b @ torch.linalg.inv(laplacian + epsilon * torch.eye(graph.nodes, dtype=b.dtype)) @ b.T


def test_metric_is_the_hessian_of_the_potential(graph):
    def potential(weights):
        return geometry.log_det_potential(graph.with_tensors(weights, None), EPSILON, rho=0.1)

    hessian = torch.autograd.functional.hessian(potential, graph.weights)
    torch.testing.assert_close(geometry.metric(graph, EPSILON, rho=0.1), hessian, rtol=0, atol=1e-10)


def test_resistances_equal_the_product_of_matrices(graph):
    slow = slow_resistances(graph, EPSILON)
    torch.testing.assert_close(geometry.resistances(graph, EPSILON), slow, rtol=0, atol=1e-13)


def test_resistance_of_an_edge_is_the_voltage_of_a_unit_current(graph):
    ground = torch.linalg.inv(geometry.grounded_laplacian(graph, EPSILON))
    current = torch.zeros(8, dtype=torch.float64)
    current[0], current[1] = 1, -1
    voltage = ground @ current
    assert float(geometry.resistances(graph, EPSILON)[0, 0]) == pytest.approx(float(voltage[0] - voltage[1]))


def test_transports_play_no_part(graph):
    turned = graph.replace(transport=torch.linspace(-3, 3, 28, dtype=torch.float64))
    torch.testing.assert_close(geometry.metric(turned, EPSILON), geometry.metric(graph, EPSILON))


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0])
def test_eigenvalues_lie_within_the_bounds(graph, epsilon):
    spectrum = torch.linalg.eigvalsh(geometry.metric(graph, epsilon, rho=0.0))
    lower, upper = geometry.metric_bounds(graph, epsilon)
    assert lower <= spectrum[0] <= spectrum[-1] <= upper


def test_bounds_are_attained_on_the_empty_complete_graph():
    empty = SheafGraph.complete(8, torch.zeros(28, dtype=torch.float64))
    spectrum = torch.linalg.eigvalsh(geometry.metric(empty, EPSILON, rho=0.0))
    lower, upper = geometry.metric_bounds(empty, EPSILON)
    assert float(lower) == pytest.approx(8)
    assert float(upper) == pytest.approx(64)
    assert float(spectrum[0]) == pytest.approx(8, abs=1e-10)
    assert float(spectrum[-1]) == pytest.approx(64, abs=1e-10)


def test_bounds_count_candidates_and_not_living_edges():
    star = SheafGraph(4, torch.tensor([[0, 0, 0], [1, 2, 3]]), torch.tensor([1.0, 0.0, 0.0]))
    assert float(geometry.metric_bounds(star, 1.0)[1]) == pytest.approx(2 + 2 * 3)


def test_codazzi_is_the_derivative_of_the_metric_and_symmetric(graph):
    small = SheafGraph.complete(4, graph.weights[:6])
    derivative = torch.autograd.functional.jacobian(
        lambda w: geometry.metric(small.with_tensors(w, None), EPSILON), small.weights
    )
    tensor = geometry.codazzi(small, EPSILON)
    torch.testing.assert_close(tensor, derivative, rtol=0, atol=1e-10)
    for places in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):
        torch.testing.assert_close(tensor, tensor.permute(places), rtol=0, atol=1e-10)


def test_tube_is_kähler(graph):
    small = SheafGraph.complete(4, graph.weights[:6])
    g, form, structure = geometry.tube(small, EPSILON)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(structure @ structure, -identity)
    torch.testing.assert_close(structure.T @ g @ structure, g)
    torch.testing.assert_close(form, -form.T)
    assert torch.linalg.eigvalsh(g)[0] > 0

    def entries(point):
        """Return the form at weights and phases; it depends on weights only."""
        return geometry.tube(small.with_tensors(point[:6], None), EPSILON).form

    # d omega is the cyclic sum of derivatives.
    d = torch.autograd.functional.jacobian(
        entries, torch.cat([small.weights, small.weights])
    )  # (a, b, c): by c
    assert (d + d.permute(1, 2, 0) + d.permute(2, 0, 1)).abs().max() < 1e-10
    assert d.abs().max() > 0.1


def test_restriction_to_a_stratum_is_the_metric_of_the_smaller_graph(graph):
    alive = graph.weights > 0
    smaller = SheafGraph(8, graph.edges[:, alive], graph.weights[alive])
    block = geometry.metric(graph, EPSILON)[alive][:, alive]
    torch.testing.assert_close(block, geometry.metric(smaller, EPSILON), rtol=0, atol=1e-12)
    part = geometry.metric(graph, EPSILON, edges=graph.edges[:, alive])
    torch.testing.assert_close(part, block, rtol=0, atol=1e-14)


def test_metric_tends_to_that_of_the_face_at_first_order(graph):
    gaps = []
    for weight in (1e-2, 1e-4, 1e-6):
        weights = graph.weights.clone()
        weights[3] = weight
        near = geometry.metric(graph.replace(weights=weights), EPSILON)
        weights[3] = 0
        face = geometry.metric(graph.replace(weights=weights), EPSILON)
        rest = torch.arange(28) != 3
        gaps.append(float((near - face)[rest][:, rest].abs().max()))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(100, rel=0.05)


def test_metric_follows_a_relabelling(graph, generator):
    renamed, order = geometry.relabel(graph, torch.randperm(8, generator=generator))
    expected = geometry.metric(graph, EPSILON)[order][:, order]
    torch.testing.assert_close(geometry.metric(renamed, EPSILON), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "phases", "unitary"])
def test_laplacian_follows_a_relabelling(graph, generator, kind):
    transport, stalk = None, 2
    if kind == "phases":
        transport, stalk = torch.randn(28, generator=generator, dtype=torch.float64), 1
    elif kind == "unitary":
        transport = torch.linalg.qr(torch.randn(28, 2, 2, generator=generator, dtype=torch.complex128)).Q
    graph = graph.replace(transport=transport)
    permutation = torch.randperm(8, generator=generator)
    renamed, _ = geometry.relabel(graph, permutation)
    psi = torch.randn(3, 8, stalk, generator=generator, dtype=torch.complex128)
    moved = torch.empty_like(psi)
    moved[:, permutation] = psi
    expected = torch.empty_like(psi)
    expected[:, permutation] = graph.laplacian(psi)
    torch.testing.assert_close(renamed.laplacian(moved), expected, rtol=0, atol=1e-12)


def test_fisher_information_is_the_covariance_of_the_score():
    weights = torch.tensor([1.0, 0.5, 0.0, 0.7, 1.2, 0.0], dtype=torch.float64)
    graph = SheafGraph.complete(4, weights)
    signals = field.sample_field(graph, 0.5, 400_000, generator=torch.Generator().manual_seed(0))
    scores = field.score(graph, 0.5, signals)
    fisher = field.fisher_information(graph, 0.5)
    assert (scores.mean(0).abs() < 0.01).all()
    assert (torch.cov(scores.T) - fisher).norm() / fisher.norm() < 0.02


def test_score_is_the_gradient_of_the_log_density(graph, generator):
    signal = torch.randn(1, 8, generator=generator, dtype=torch.float64)

    def log_density(weights):
        moving = graph.with_tensors(weights, None)
        precision = geometry.grounded_laplacian(moving, EPSILON)
        return precision.logdet() / 2 - (signal @ precision @ signal.T).sum() / 2

    gradient = torch.autograd.functional.jacobian(log_density, graph.weights)
    torch.testing.assert_close(field.score(graph, EPSILON, signal)[0], gradient, rtol=0, atol=1e-12)


def test_curvature_of_the_likelihood_is_the_metric(graph, generator):
    signals = field.sample_field(graph, EPSILON, 50, generator=generator)
    objective = field.LogDetLikelihood(signals.T @ signals / 50, EPSILON)
    gradient = torch.autograd.functional.jacobian(
        lambda w: objective.loss(graph.with_tensors(w, None)), graph.weights
    )
    torch.testing.assert_close(objective.slope(graph).gradient, gradient, rtol=0, atol=1e-12)
    hessian = torch.autograd.functional.hessian(
        lambda w: objective.loss(graph.with_tensors(w, None)), graph.weights
    )
    torch.testing.assert_close(objective.curvature(graph), hessian, rtol=0, atol=1e-10)


def test_face_clock_is_the_length_of_the_way_and_the_time_of_the_flow():
    weight = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    root = 2 / (2 * weight + EPSILON)  # the square root of the metric on two nodes
    distance, time = faces.face_clock(1.0, EPSILON)
    assert distance == pytest.approx(float(torch.trapezoid(root, weight)), abs=1e-7)
    assert time == pytest.approx(float(torch.trapezoid(root.square(), weight)), abs=1e-6)
    edge = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([0.3], dtype=torch.float64))
    assert float(geometry.metric(edge, EPSILON, rho=0.0)) == pytest.approx((2 / (0.6 + EPSILON)) ** 2)


def test_only_bridges_are_far_when_the_ground_vanishes(generator):
    # Two complete parts of 4 and 5 nodes, a dead edge between them, and a dead edge within the second.
    u, v = torch.triu_indices(9, 9, 1)
    inside = (u < 4) == (v < 4)
    within = (u == 4) & (v == 5)
    bridge = (u == 0) & (v == 4)
    edges, weights = torch.stack([u, v]), (inside & ~within).double()
    resistance = geometry.resistances(SheafGraph(9, edges, weights), 1e-3).diagonal()
    assert float(resistance[bridge]) == pytest.approx(faces.bridge_resistance(4, 5, 1e-3), rel=2e-3)
    assert float(resistance[within]) < 2


def test_toric_chart_is_flat():
    point = torch.tensor([0.7, 0.4], dtype=torch.float64)

    def chart(x):
        return torch.view_as_real(faces.toric_chart(x[:1], x[1:]))[0]

    jacobian = torch.autograd.functional.jacobian(chart, point)
    expected = torch.diag(torch.tensor([1 / (2 * 0.7), 2 * 0.7], dtype=torch.float64))
    torch.testing.assert_close(jacobian.T @ jacobian, expected, rtol=0, atol=1e-12)


def test_nothing_is_born_in_the_toric_chart():
    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    weight = c.square().sum() / 2
    loss = -3 * weight + weight**2  # an edge would lower it
    assert torch.autograd.grad(loss, c)[0].abs().max() == 0


def test_devices(device, graph):
    moved = graph.to(device)
    for what in (geometry.resistances, geometry.metric, field.fisher_information):
        torch.testing.assert_close(what(moved, EPSILON).cpu(), what(graph, EPSILON))
    assert geometry.tube(moved, EPSILON).form.device.type == moved.weights.device.type
    assert field.sample_field(moved, EPSILON, 3).device.type == moved.weights.device.type


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda g: geometry.metric(g, 0.0), "epsilon"),
        (lambda g: geometry.metric(g, math.nan), "epsilon"),
        (lambda g: geometry.metric(g, 1.0, rho=-1.0), "rho"),
        (lambda g: field.sample_field(g, 1.0, 0), "samples"),
        (lambda g: field.score(g, 1.0, torch.zeros(3, 5)), "signals"),
        (lambda g: field.LogDetLikelihood(torch.zeros(3, 2), 1.0), "covariance"),
        (lambda g: faces.face_clock(-1.0, 1.0), "weight"),
        (lambda g: faces.bridge_resistance(0, 1, 1.0), "left"),
        (lambda g: faces.toric_chart(torch.tensor([-1.0]), torch.tensor([0.0])), "weights"),
        (lambda g: faces.toric_chart(torch.ones(2), torch.ones(3)), "phases"),
        (lambda g: geometry.relabel(g, torch.zeros(8, dtype=torch.int64)), "permutation"),
    ],
)
def test_bad_arguments_are_named(graph, call, word):
    with pytest.raises(ValueError, match=word):
        call(graph)


def test_one_node_and_no_edge():
    alone = SheafGraph(1, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0))
    assert geometry.metric(alone, 0.5).shape == (0, 0)
    assert geometry.codazzi(alone, 0.5).shape == (0, 0, 0)
