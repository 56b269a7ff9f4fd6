"""Laws of one step: the quadratic programme it solves, births and deaths, the clocks of four geometries."""

import math

import pytest
import torch

from geomlib.stationary.faces import face_clock
from geomlib.stationary.geometry import metric
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.natural import (
    barrier_step,
    diagonal_step,
    entropic_step,
    natural_step,
    projected_gradient,
)


def draw(edges, generator, dead=0.4):
    """Return weights with zeros, a gradient of both signs, and a metric."""
    nodes = int((1 + math.isqrt(1 + 8 * edges)) // 2)
    weights = torch.rand(edges, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(edges, generator=generator) > dead)
    gradient = torch.randn(edges, generator=generator, dtype=torch.float64)
    return weights, gradient, metric(SheafGraph.complete(nodes, weights), 0.5)


@pytest.mark.parametrize("edges", [1, 6, 45, 105])
@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
def test_natural_step_solves_its_programme(edges, step, generator):
    weights, gradient, tensor = draw(edges, generator)
    after = natural_step(tensor, weights, gradient, step)
    price = gradient + tensor @ (after - weights) / step
    scale = 1 + float(gradient.abs().max())
    assert (after >= 0).all()
    assert (price[after > 0].abs() <= 1e-8 * scale).all()
    assert (price[after == 0] >= -1e-8 * scale).all()


def test_natural_step_is_the_best_of_all_supports(generator):
    weights, gradient, tensor = draw(6, generator)
    after = natural_step(tensor, weights, gradient, 1.0)

    def value(z):
        return float(gradient @ (z - weights) + (z - weights) @ tensor @ (z - weights) / 2)

    best = math.inf
    for mask in range(64):
        free = torch.tensor([bool(mask >> e & 1) for e in range(6)])
        z = torch.zeros(6, dtype=torch.float64)
        right = (tensor @ weights - gradient)[free]
        z[free] = torch.linalg.solve(tensor[free][:, free], right)
        if (z >= 0).all():
            best = min(best, value(z))
    assert value(after) == pytest.approx(best, abs=1e-10)


def test_identity_makes_it_the_projected_gradient_step(generator):
    weights, gradient, _ = draw(45, generator)
    plain = natural_step(torch.eye(45, dtype=torch.float64), weights, gradient, 0.3)
    torch.testing.assert_close(plain, (weights - 0.3 * gradient).clamp_min(0))
    ones = diagonal_step(torch.ones(45, dtype=torch.float64), weights, gradient, 0.3)
    torch.testing.assert_close(plain, ones)


def test_diagonal_step_is_the_natural_step_of_a_diagonal_metric(generator):
    weights, gradient, tensor = draw(45, generator)
    diagonal = tensor.diagonal()
    expected = natural_step(torch.diag(diagonal), weights, gradient, 0.5)
    torch.testing.assert_close(diagonal_step(diagonal, weights, gradient, 0.5), expected)


def test_clipping_is_another_point_that_may_ascend():
    tensor = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    weights, gradient = torch.tensor([0.1, 1.0]).double(), torch.tensor([1.0, 0.8]).double()
    clipped = (weights - torch.linalg.solve(tensor, gradient)).clamp_min(0)
    after = natural_step(tensor, weights, gradient, 1.0)
    assert gradient @ (clipped - weights) > 0
    assert gradient @ (after - weights) < 0


def test_first_order_change_pays_for_the_length_of_the_step(generator):
    for _ in range(20):
        weights, gradient, tensor = draw(28, generator)
        step = natural_step(tensor, weights, gradient, 0.7) - weights
        assert gradient @ step <= -(step @ tensor @ step) / 0.7 + 1e-10


def test_quadratic_losses_descend_below_the_promised_length(generator):
    weights, _, tensor = draw(28, generator)
    root = torch.randn(28, 28, generator=generator, dtype=torch.float64)
    bend, target = root.T @ root / 28, torch.randn(28, generator=generator, dtype=torch.float64)

    def loss(w):
        return (w - target) @ bend @ (w - target) / 2

    step = float(torch.linalg.eigvalsh(tensor)[0] / torch.linalg.eigvalsh(bend)[-1])
    for _ in range(20):
        after = natural_step(tensor, weights, bend @ (weights - target), step)
        length = (after - weights) @ tensor @ (after - weights)
        assert loss(after) <= loss(weights) - length / (2 * step) + 1e-12
        weights = after


def test_it_stands_still_exactly_where_the_projected_gradient_vanishes(generator):
    weights, _, tensor = draw(45, generator)
    still = torch.where(weights > 0, 0.0, torch.rand(45, generator=generator).double())
    assert projected_gradient(weights, still).abs().max() == 0
    torch.testing.assert_close(natural_step(tensor, weights, still, 1.0), weights, rtol=0, atol=1e-12)
    for edge in (int((weights > 0).nonzero()[0]), int((weights == 0).nonzero()[0])):
        pushed = still.clone()
        pushed[edge] = -0.1
        assert projected_gradient(weights, pushed).abs().max() > 0
        assert (natural_step(tensor, weights, pushed, 1.0) - weights).abs().max() > 1e-3


def test_step_is_lipschitz_while_an_edge_dies_and_another_is_born():
    weights = torch.tensor([0.2, 0.0], dtype=torch.float64)
    tensor = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    path = torch.linspace(-1, 1, 401, dtype=torch.float64)
    points = torch.stack([natural_step(tensor, weights, torch.stack([t, -t]).double(), 1.0) for t in path])
    supports = {tuple(row) for row in (points > 0).tolist()}
    assert len(supports) > 2  # births and deaths on the way
    moves = (points[1:] - points[:-1]).norm(dim=1) / (math.sqrt(2) * (path[1] - path[0]))
    # |w+ - v+|_G <= step |g - h|_{G^-1}, so |w+ - v+| <= step |g - h| / lambda_min(G).
    assert float(moves.max()) <= 1 / float(torch.linalg.eigvalsh(tensor)[0]) + 1e-9


def test_death_and_birth_are_exact_in_a_toy_of_two_edges():
    weights = torch.tensor([0.3, 0.0], dtype=torch.float64)
    gradient = torch.tensor([1.0, -0.4], dtype=torch.float64)
    after = natural_step(torch.eye(2, dtype=torch.float64), weights, gradient, 1.0)
    assert after.tolist() == pytest.approx([0.0, 0.4])
    assert after[0] == 0


@pytest.mark.parametrize("start", [0.3, 1.0, 2.0])
def test_log_det_flow_reaches_the_face_when_the_clock_says(start):
    weight, elapsed, step = torch.tensor([start], dtype=torch.float64), 0.0, 2.5e-4
    gradient = torch.ones(1, dtype=torch.float64)
    edge = torch.tensor([[0], [1]])
    while float(weight) > 0:
        tensor = metric(SheafGraph(2, edge, weight), 0.5, rho=0.0)
        weight = natural_step(tensor, weight, gradient, step)
        elapsed += step
    assert elapsed == pytest.approx(face_clock(start, 0.5)[1], abs=1e-3)


def test_entropic_flow_decays_and_barrier_flow_crawls():
    one = torch.ones(1, dtype=torch.float64)
    entropic, barrier = one, one
    for _ in range(1000):
        entropic, barrier = entropic_step(entropic, one, 0.01), barrier_step(barrier, one, 0.01)
    assert float(entropic) == pytest.approx(math.exp(-10))
    assert float(barrier) == pytest.approx(1 / 11)


@pytest.mark.parametrize("move", [entropic_step, barrier_step])
def test_multiplicative_steps_bear_nothing(move):
    weights = torch.tensor([0.0, 1.0])
    assert move(weights, torch.tensor([-5.0, -5.0]), 1.0)[0] == 0


def test_multiplicative_steps_do_not_overflow():
    weights, gradient = torch.ones(2), torch.tensor([-1e9, 1e9])
    for move in (entropic_step, barrier_step):
        after = move(weights, gradient, 1.0)
        assert torch.isfinite(after).all()
        assert (after >= 0).all()


def test_devices(device, generator):
    weights, gradient, tensor = draw(15, generator)
    moved = natural_step(tensor.to(device), weights.to(device), gradient.to(device), 1.0)
    assert moved.device.type == torch.device(device).type
    torch.testing.assert_close(moved.cpu(), natural_step(tensor, weights, gradient, 1.0))


def test_single_precision_comes_back_in_single_precision(generator):
    weights, gradient, tensor = draw(15, generator)
    single = natural_step(tensor.float(), weights.float(), gradient.float(), 1.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), natural_step(tensor, weights, gradient, 1.0), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda w, g, t: natural_step(t, w, g, 0.0), "step"),
        (lambda w, g, t: natural_step(t, w - 1, g, 1.0), "weights"),
        (lambda w, g, t: natural_step(t, w, g[:2], 1.0), "gradient"),
        (lambda w, g, t: natural_step(t[:2], w, g, 1.0), "metric"),
        (lambda w, g, t: natural_step(-t, w, g, 1.0), "positive definite"),
        (lambda w, g, t: diagonal_step(0 * w, w, g, 1.0), "diagonal"),
        (lambda w, g, t: projected_gradient(w - 1, g), "weights"),
    ],
)
def test_bad_arguments_are_named(call, word, generator):
    with pytest.raises(ValueError, match=word):
        call(*draw(6, generator))


def test_no_edges():
    nothing = torch.zeros(0)
    assert natural_step(torch.zeros(0, 0), nothing, nothing, 1.0).shape == (0,)
