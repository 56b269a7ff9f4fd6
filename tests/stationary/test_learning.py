"""Laws of learning a graph: descent in every geometry, one end for all, honest reports, sparsity."""

import pytest
import torch

from geomlib.core import ConvergenceError, solve
from geomlib.stationary.field import LogDetLikelihood, sample_field
from geomlib.stationary.geometry import grounded_laplacian, relabel
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.learning import METRICS, learn_graph
from geomlib.stationary.natural import projected_gradient
from geomlib.stationary.objectives import StationaryObjective
from geomlib.stationary.penalties import MCP, Linear, linearised_rounds
from geomlib.stationary.tasks import latent_graph_regression, ring_with_chords

EPSILON = 0.3
PRICE = Linear(0.02)
REACHING = ("logdet", "diag", "gauss_newton", "euclid")
NEWTON = {"metric": "logdet", "epsilon": EPSILON, "max_step": 1.0, "tol": 1e-9}


def field_problem(samples=2000, seed=0):
    """Return a planted graph on 12 nodes with 66 candidates, and the likelihood of signals on it."""
    generator = torch.Generator().manual_seed(seed)
    truth = ring_with_chords(12, 4, generator=generator)
    signals = sample_field(truth, EPSILON, samples, generator=generator)
    return truth, LogDetLikelihood(signals.T @ signals / samples, EPSILON)


def interior(truth):
    return truth.replace(weights=torch.full_like(truth.weights, 0.2))


def face(truth):
    """Eight true edges are dead at the start."""
    weights = torch.full_like(truth.weights, 0.2)
    weights[(truth.weights > 0).nonzero().flatten()[:8]] = 0
    return truth.replace(weights=weights)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", [interior, face])
def test_natural_gradient_needs_a_dozen_steps_from_inside_and_from_a_face(start, seed):
    truth, objective = field_problem(seed=seed)
    history = learn_graph(objective, start(truth), penalty=PRICE, max_steps=12, **NEWTON)
    assert history.converged
    assert history.projected[-1] <= 1e-9


@pytest.mark.parametrize("metric", ["entropic", "logbarrier"])
def test_multiplicative_geometries_stay_on_the_face_where_they_start(metric):
    truth, objective = field_problem()
    start = face(truth)
    history = learn_graph(
        objective, start, metric=metric, epsilon=EPSILON, penalty=PRICE, max_steps=300, tol=1e-6
    )
    best = learn_graph(objective, start, penalty=PRICE, **NEWTON).loss[-1]
    assert not history.converged
    assert history.reason == "max_steps"
    assert not history.births
    assert (history.weights[:, start.weights == 0] == 0).all()
    assert history.loss[-1] > best + 1


@pytest.mark.parametrize("metric", METRICS)
def test_every_geometry_descends(metric):
    truth, objective = field_problem()
    history = learn_graph(
        objective, interior(truth), metric=metric, epsilon=EPSILON, penalty=PRICE, max_steps=30
    )
    assert (history.loss[1:] <= history.loss[:-1] + 1e-12).all()
    assert history.loss[-1] < history.loss[0] - 0.1


@pytest.mark.parametrize("metric", REACHING)
def test_the_end_does_not_depend_on_the_geometry(metric):
    truth, objective = field_problem()
    best = learn_graph(objective, interior(truth), penalty=PRICE, **NEWTON)
    history = learn_graph(
        objective, face(truth), metric=metric, epsilon=EPSILON, penalty=PRICE, tol=1e-6, max_steps=500
    )
    assert history.converged
    torch.testing.assert_close(history.graph.weights, best.graph.weights, rtol=0, atol=1e-5)


def test_report_is_what_happened():
    truth, objective = field_problem()
    history = learn_graph(objective, face(truth), penalty=PRICE, **NEWTON)
    alive = history.weights > 0
    births = [(e.step, e.edge) for e in history.births]
    assert births == [(k + 1, e) for k, e in (alive[1:] & ~alive[:-1]).nonzero().tolist()]
    deaths = [(e.step, e.edge) for e in history.deaths]
    assert deaths == [(k + 1, e) for k, e in (alive[:-1] & ~alive[1:]).nonzero().tolist()]
    assert births
    assert deaths
    slope = objective.slope(history.graph)
    gradient = projected_gradient(history.graph.weights, slope.gradient + 0.02)
    assert float(history.projected[-1]) == pytest.approx(float(gradient.abs().max()), abs=1e-14)
    assert float(history.loss[-1]) == pytest.approx(float(slope.loss + 0.02 * history.graph.weights.sum()))
    assert history.steps == len(history.loss) - 1 == len(history.weights) - 1
    assert history.steps_to(1e-9) == history.steps
    assert history.steps_to(1e-30) is None


def test_running_out_of_steps_is_not_convergence():
    truth, objective = field_problem()
    history = learn_graph(objective, interior(truth), penalty=PRICE, max_steps=2)
    assert (history.converged, history.reason, history.steps) == (False, "max_steps", 2)
    assert "max_steps" in repr(history)


def test_a_geometry_without_a_way_down_says_that_it_is_stuck():
    truth, objective = field_problem()
    empty = truth.replace(weights=torch.zeros_like(truth.weights))
    history = learn_graph(objective, empty, metric="entropic")
    assert (history.converged, history.reason, history.steps) == (False, "stuck", 0)


def test_a_start_that_is_the_answer_takes_no_step():
    truth = ring_with_chords(6, 1, generator=torch.Generator().manual_seed(0))
    objective = LogDetLikelihood(torch.linalg.inv(grounded_laplacian(truth, EPSILON)), EPSILON)
    history = learn_graph(objective, truth, epsilon=EPSILON)
    assert history.converged
    assert history.steps == 0


def test_births_wait_for_their_tolerance():
    truth, objective = field_problem()
    empty = truth.replace(weights=torch.zeros_like(truth.weights))
    history = learn_graph(objective, empty, penalty=PRICE, tol_birth=2.0, max_steps=50)
    assert not history.births
    assert not history.converged


def test_a_price_per_weight_adds_edges_to_a_likelihood():
    truth, objective = field_problem(20_000)
    empty = truth.replace(weights=torch.zeros_like(truth.weights))
    counts = [
        int((learn_graph(objective, empty, penalty=Linear(price), **NEWTON).graph.weights > 0).sum())
        for price in (0.0, 0.02, 0.1, 0.5)
    ]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] + 10
    assert counts[0] > 16


@pytest.mark.parametrize("seed", range(3))
def test_concave_rounds_find_the_planted_edges(seed):
    truth, objective = field_problem(20_000, seed)

    def solve(price, start):
        return learn_graph(objective, truth.replace(weights=start), penalty=price, **NEWTON).graph.weights

    weights = linearised_rounds(solve, MCP(0.1, 0.3), torch.zeros_like(truth.weights))
    assert int((truth.weights > 0).sum()) == 16
    assert torch.equal(weights > 0, truth.weights > 0)


@pytest.mark.parametrize("penalty", [Linear(0.3), Linear(torch.rand(6)), MCP(0.2, 0.5)])
def test_derivative_of_a_penalty_is_that_of_autograd(penalty, generator):
    weights = torch.rand(6, generator=generator).requires_grad_()
    (expected,) = torch.autograd.grad(penalty.value(weights), weights)
    torch.testing.assert_close(penalty.derivative(weights.detach()), expected)


def test_tangent_prices_lie_above_the_concave_penalty(generator):
    penalty = MCP(0.2, 0.5)
    here, there = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    for a, b in zip(here, there, strict=True):
        tangent = penalty.value(a) + penalty.linearised(a).value(b) - penalty.linearised(a).value(a)
        assert tangent >= penalty.value(b) - 1e-12
    assert penalty.value(torch.tensor([0.5])) == penalty.value(torch.tensor([7.0]))


def test_gauss_newton_is_the_hessian_where_nothing_is_left_to_fit(generator):
    task = latent_graph_regression(nodes=5, chords=1, drives=8, generator=generator)
    objective, truth = task.objective(), task.truth
    weights = truth.weights + 0.0

    def gradient(edge, shift):
        moved = weights.clone()
        moved[edge] += shift
        return objective.slope(SheafGraph(5, truth.edges, moved, signed=True)).gradient

    columns = [(gradient(e, 1e-5) - gradient(e, -1e-5)) / 2e-5 for e in range(10)]
    torch.testing.assert_close(objective.curvature(truth), torch.stack(columns, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", ["logdet", "diag", "euclid"])
def test_learning_follows_a_relabelling(metric, generator):
    task = latent_graph_regression(nodes=6, chords=1, drives=10, noise=0.02, generator=generator)
    permutation = torch.randperm(6, generator=generator)
    renamed, order = relabel(task.truth, permutation)

    def moved(psi):
        other = torch.empty_like(psi)
        other[:, permutation] = psi
        return other

    target = moved(task.target)
    objective = StationaryObjective(
        task.potential, moved(task.drive), lambda psi: (psi - target).abs().square().sum() / 20
    )
    first, second = task.objective(), objective
    torch.testing.assert_close(
        second.slope(renamed).gradient, first.slope(task.truth).gradient[order], rtol=0, atol=1e-10
    )
    torch.testing.assert_close(second.state(renamed), moved(first.state(task.truth)), rtol=0, atol=1e-10)
    one = learn_graph(first, task.start(), metric=metric, max_steps=10)
    empty = renamed.replace(weights=torch.zeros_like(renamed.weights))
    two = learn_graph(second, empty, metric=metric, max_steps=10)
    torch.testing.assert_close(two.weights, one.weights[:, order], rtol=0, atol=1e-8)


class Fragile:
    """A likelihood whose solver fails for large weights, or always."""

    connection = False

    def __init__(self, inner, limit):
        self.inner, self.limit, self.failures = inner, limit, 0

    def loss(self, graph):
        if float(graph.weights.max()) > self.limit:
            self.failures += 1
            solve(torch.exp, torch.zeros(1, 1), max_steps=3)  # raises: it has no fixed point
        return self.inner.loss(graph)

    def slope(self, graph):
        return self.inner.slope(graph)

    def curvature(self, graph):
        return self.inner.curvature(graph)


def test_failed_solves_shorten_the_step():
    truth, objective = field_problem()
    fragile = Fragile(objective, 5.0)
    empty = truth.replace(weights=torch.zeros_like(truth.weights))
    history = learn_graph(fragile, empty, metric="euclid", penalty=PRICE, step=100.0, max_steps=40)
    assert fragile.failures > 0
    assert history.loss[-1] < history.loss[0]


def test_a_solver_that_never_succeeds_raises():
    truth, objective = field_problem()
    with pytest.raises(ConvergenceError):
        learn_graph(Fragile(objective, -1.0), interior(truth))


def test_unitary_connection_is_learned_from_nothing(generator):
    def unitaries(count):
        return torch.linalg.qr(torch.randn(count, 2, 2, generator=generator, dtype=torch.complex128)).Q

    ring = ring_with_chords(5, 1, generator=generator)
    truth = ring.replace(transport=unitaries(10))
    task = latent_graph_regression(nodes=5, chords=1, drives=2, generator=generator)
    drive = torch.randn(40, 5, 2, generator=generator, dtype=torch.complex128)
    target = StationaryObjective(task.potential, drive, torch.sum, connection=True).state(truth)

    objective = StationaryObjective(
        task.potential, drive, lambda psi: (psi - target).abs().square().sum() / 80, connection=True
    )
    empty = truth.replace(weights=torch.zeros_like(ring.weights), transport=unitaries(10))
    history = learn_graph(objective, empty, penalty=MCP(1e-2, 0.3), tol=1e-4, max_steps=300)
    alive = ring.weights > 0
    assert torch.equal(history.graph.weights > 0.05, alive)
    torch.testing.assert_close(history.graph.weights[alive], ring.weights[alive], rtol=0, atol=0.02)
    error = (history.graph.transport - truth.transport)[alive].abs().max()
    assert error < 0.02


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"metric": "riemann"}, "metric"),
        ({"step": 0.0}, "step"),
        ({"step": 2.0, "max_step": 1.0}, "step"),
        ({"tol": 0.0}, "tol"),
        ({"tol_birth": -1.0}, "tol_birth"),
        ({"max_steps": 0}, "max_steps"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"penalty": 3}, None),
    ],
)
def test_bad_arguments_are_named(options, word):
    truth, objective = field_problem(50)
    if word is None:
        with pytest.raises(AttributeError):
            learn_graph(objective, truth, **options)
        return
    with pytest.raises(ValueError, match=word):
        learn_graph(objective, truth, **options)


def test_graph_and_objective_must_agree_on_transports():
    truth, objective = field_problem(50)
    turned = truth.replace(transport=torch.zeros_like(truth.weights))
    with pytest.raises(ValueError, match="transports"):
        learn_graph(objective, turned)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Linear(-1.0), "strength"),
        (lambda: MCP(-1.0, 1.0), "strength"),
        (lambda: MCP(1.0, 0.0), "knee"),
        (lambda: linearised_rounds(lambda p, w: w, MCP(1.0, 1.0), torch.zeros(2), rounds=0), "rounds"),
    ],
)
def test_bad_penalties_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_devices(device):
    truth, objective = field_problem()
    moved = LogDetLikelihood(objective.covariance.to(device), EPSILON)
    history = learn_graph(moved, interior(truth).to(device), penalty=PRICE, **NEWTON)
    expected = learn_graph(objective, interior(truth), penalty=PRICE, **NEWTON)
    torch.testing.assert_close(history.graph.weights.cpu(), expected.graph.weights, rtol=0, atol=1e-8)


def test_no_candidates():
    alone = SheafGraph(1, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))
    objective = LogDetLikelihood(torch.ones(1, 1, dtype=torch.float64), EPSILON)
    assert learn_graph(objective, alone).converged
