"""What the planted problems must give back, weights, clusters, phases; how fast each geometry gets there."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from geomlib.stationary import tasks
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.learning import learn_graph
from geomlib.stationary.objectives import StationaryObjective, best_scale
from geomlib.stationary.penalties import MCP, Linear
from geomlib.stationary.scores import phase_error, support_f1, weight_error


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_noise_free_graph_comes_back(seed):
    task = tasks.latent_graph_regression(generator=seeded(seed))
    history = learn_graph(task.objective(), task.start(), tol=1e-8)
    assert int((task.truth.weights > 0).sum()) == 13
    assert history.converged
    assert weight_error(history.graph.weights, task.truth.weights) < 1e-5
    assert support_f1(history.graph.weights, task.truth.weights) == 1


def test_noisy_graph_comes_back_up_to_its_noise():
    task = tasks.latent_graph_regression(noise=0.05, generator=seeded(0))
    history = learn_graph(task.objective(), task.start())
    assert history.converged
    assert weight_error(history.graph.weights, task.truth.weights) < 0.1
    assert support_f1(history.graph.weights, task.truth.weights) >= 0.9


@pytest.mark.slow
def test_natural_gradient_needs_a_fifth_of_the_steps_of_euclid():
    task = tasks.latent_graph_regression(generator=seeded(0))
    natural = learn_graph(task.objective(), task.start()).steps_to(1e-6)
    euclid = learn_graph(task.objective(), task.start(), metric="euclid", max_steps=5 * natural)
    assert natural <= 60
    assert euclid.steps_to(1e-6) is None


def test_gauss_newton_needs_fewer_still_and_entropy_never_moves():
    task = tasks.latent_graph_regression(generator=seeded(0))
    assert learn_graph(task.objective(), task.start(), metric="gauss_newton", max_steps=20).converged
    still = learn_graph(task.objective(), task.start(), metric="entropic")
    assert (still.reason, still.steps) == ("stuck", 0)


@pytest.mark.parametrize("seed", range(3))
def test_hidden_clusters_are_found(seed):
    task = tasks.hidden_clusters(generator=seeded(seed))
    test = tasks.hidden_clusters(2000, generator=seeded(100 + seed))
    history = learn_graph(task.objective(), task.start(), penalty=Linear(1e-2), tol=1e-4, max_steps=100)
    assert history.converged
    assert test.accuracy(history.graph) >= 0.86
    assert test.accuracy(task.start()) < 0.7
    assert task.purity(history.graph) >= 0.95
    assert int((history.graph.weights > 0).sum()) <= 20


def test_complete_graph_hardly_helps():
    test = tasks.hidden_clusters(2000, generator=seeded(0))
    empty = test.start()
    complete = empty.replace(weights=torch.ones_like(empty.weights))
    assert test.accuracy(complete) < 0.7


@pytest.mark.parametrize("seed", range(3))
def test_connection_is_recovered(seed):
    task = tasks.connection_recovery(generator=seeded(seed))
    history = learn_graph(task.objective(), task.start(), penalty=MCP(1e-2, 0.3), tol=1e-5)
    assert history.converged
    assert support_f1(history.graph.weights, task.truth.weights) == 1
    assert weight_error(history.graph.weights, task.truth.weights) < 0.03
    assert phase_error(history.graph, task.truth) < 0.05


def test_graph_without_phases_cannot_fit_a_connection():
    task = tasks.connection_recovery(generator=seeded(0))
    sheaf = learn_graph(task.objective(), task.start(), tol=1e-4)
    readout = task.objective().readout
    plain = StationaryObjective(task.potential, task.drive, readout)
    flat = learn_graph(plain, task.start().replace(transport=None), tol=1e-4)
    assert flat.converged
    assert flat.loss[-1] > 50 * sheaf.loss[-1]


def test_scale_of_the_logits_is_the_best_one(generator):
    logits = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    labels = (logits + torch.randn(50, 3, generator=generator)).argmax(1)
    scale = float(best_scale(logits, labels))
    best = cross_entropy(scale * logits, labels)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert cross_entropy(factor * scale * logits, labels) > best
    assert abs(float(best_scale(7 * logits, labels)) - scale / 7) < 1e-6


def test_gradient_does_not_see_the_scale_that_is_minimised_out():
    task = tasks.hidden_clusters(40, nodes=6, generator=seeded(0))
    objective = task.objective()
    weights = torch.full((15,), 0.3, dtype=torch.float64)
    gradient = objective.slope(SheafGraph.complete(6, weights)).gradient
    for edge in (0, 7):
        moved = torch.zeros(15, dtype=torch.float64)
        moved[edge] = 1e-5
        above, below = (objective.loss(SheafGraph.complete(6, weights + s * moved)) for s in (1, -1))
        assert float(above - below) / 2e-5 == pytest.approx(float(gradient[edge]), rel=1e-5, abs=1e-8)


def test_spirals_are_separate_without_noise():
    points, labels = tasks.three_spirals(3000, noise=0.0, generator=seeded(0))
    distances = torch.cdist(points, points).fill_diagonal_(10)
    assert (labels[distances.argmin(1)] == labels).all()
    assert labels.bincount().min() > 900


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: tasks.latent_graph_regression(noise=0.1, generator=g).target,
        lambda g: tasks.connection_recovery(generator=g).target,
        lambda g: tasks.hidden_clusters(5, generator=g).drive,
        lambda g: tasks.three_spirals(5, generator=g)[0],
    ],
)
def test_a_generator_decides_everything(draw):
    assert torch.equal(draw(seeded(3)), draw(seeded(3)))
    assert not torch.equal(draw(seeded(3)), draw(seeded(4)))


def test_devices(device):
    task = tasks.latent_graph_regression(nodes=5, chords=1, drives=4, generator=seeded(0), device=device)
    expected = tasks.latent_graph_regression(nodes=5, chords=1, drives=4, generator=seeded(0))
    slope = task.objective().slope(task.start())
    torch.testing.assert_close(slope.gradient.cpu(), expected.objective().slope(expected.start()).gradient)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: tasks.ring_with_chords(2, 0), "nodes"),
        (lambda: tasks.ring_with_chords(4, 3), "chords"),
        (lambda: tasks.latent_graph_regression(drives=0), "drives"),
        (lambda: tasks.latent_graph_regression(noise=-1.0), "noise"),
        (lambda: tasks.hidden_clusters(0), "samples"),
        (lambda: tasks.hidden_clusters(5, nodes=2), "clusters"),
        (lambda: tasks.three_spirals(0), "samples"),
        (lambda: tasks.three_spirals(5, noise=-1.0), "noise"),
        (lambda: phase_error(SheafGraph.complete(3), SheafGraph.complete(3)), "phases"),
    ],
)
def test_bad_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()
