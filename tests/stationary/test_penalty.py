"""Laws of the relaxations: the rate 1 / lambda of states and adjoints, and its coefficient (SGN-P0 to P3)."""

import itertools
import math

import pytest
import torch

from geomlib.core import ConvergenceError, real_inner
from geomlib.stationary import Quartic, SheafGraph, UnstableBranchError, assembly
from geomlib.stationary.assembly import as_real, like_state
from geomlib.stationary.cascade import inverse_bound, monotonicity
from geomlib.stationary.penalty import (
    ResidualPenalty,
    continuation,
    first_order,
    richardson,
    ridge,
)
from geomlib.stationary.relaxations import StiffCopies, SymmetricEnergy, convexity_threshold
from geomlib.stationary.supra import SupraGraph

MU, NORM = 0.8, 1.2
STRENGTHS = [1e2, 1e3, 1e4, 1e5]
NAMES = ["residual, ridge", "residual, loss", "stiff copies", "symmetric energy"]


def draw_stack(generator, nodes=(6, 5, 4), d=2, dtype=torch.complex128, kappa=0.5, batch=2):
    layers, maps, biases, columns = [], [], [], 3
    for n in nodes:
        candidates = torch.triu_indices(n, n, 1)
        edges = candidates[:, torch.rand(candidates.shape[1], generator=generator) < 0.6]
        count = edges.shape[1]
        weights = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
        transport = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=dtype)).Q
        V = torch.full((n,), MU, dtype=torch.float64)
        layers.append((SheafGraph(n, edges, weights, transport), Quartic(V, torch.full_like(V, kappa))))
        K = torch.randn(n * d, columns, generator=generator, dtype=dtype)
        maps.append(NORM * K / torch.linalg.matrix_norm(K, 2))
        biases.append(0.3 * torch.randn(n, d, generator=generator, dtype=dtype))
        columns = n * d
    return SupraGraph(layers, maps, biases), 2 * torch.randn(batch, 3, generator=generator, dtype=dtype)


class Problem:
    """A stack with a quadratic loss on its last layer, and the exact state and adjoint."""

    def __init__(self, generator, **options):
        self.supra, self.x = draw_stack(generator, **options)
        self.psi = self.supra.solve(self.x, tol=1e-14, throw=False).value
        self.target = torch.randn(self.supra.sizes[-1], generator=generator, dtype=self.psi.dtype)
        self.gradient = torch.zeros_like(self.psi)
        self.gradient[:, -len(self.target) :] = self.psi[:, -len(self.target) :] - self.target
        self.p = self.supra.adjoint(self.psi, self.gradient)

    def loss(self, psi):
        gap = psi[:, -len(self.target) :] - self.target
        return 0.5 * real_inner(gap, gap)

    def relaxation(self, name):
        return {
            "residual, ridge": lambda: ResidualPenalty(self.supra, ridge(0.5)),
            "residual, loss": lambda: ResidualPenalty(self.supra, self.loss),
            "stiff copies": lambda: StiffCopies(self.supra),
            "symmetric energy": lambda: SymmetricEnergy(self.supra),
        }[name]()


@pytest.fixture
def problem(generator):
    return Problem(generator)


def slope_of(errors, strengths=STRENGTHS):
    x = torch.tensor(strengths, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_state_and_adjoint_approach_the_exact_ones_at_the_rate_one_over_lambda(problem, name):
    relaxation, states, adjoints = problem.relaxation(name), [], []
    for strength, solution in zip(STRENGTHS, continuation(relaxation, problem.x, STRENGTHS), strict=True):
        states.append(float((solution.value - problem.psi).norm()))
        p = relaxation.adjoint(solution.value, problem.x, strength, problem.gradient)
        adjoints.append(float((p - problem.p).norm()))
    assert -1.05 < slope_of(states) < -0.95
    assert -1.05 < slope_of(adjoints) < -0.95


@pytest.mark.parametrize("name", NAMES)
def test_the_first_coefficient_is_predicted(problem, name):
    relaxation, strength = problem.relaxation(name), 1e4
    moved = strength * (relaxation.solve(problem.x, strength).value - problem.psi)
    predicted = first_order(relaxation, problem.psi, problem.x)
    assert abs(float(moved.norm() / predicted.norm()) - 1) < 1e-3
    assert (moved - predicted).norm() < 2e-3 * predicted.norm()


@pytest.mark.parametrize("name", NAMES)
def test_richardson_extrapolation_gains_an_order(problem, name):
    relaxation, errors = problem.relaxation(name), []
    strengths = [1e2, 4e2, 1.6e3]
    for strength in strengths:
        pair = [relaxation.solve(problem.x, factor * strength).value for factor in (1, 2)]
        errors.append(float((richardson(*pair) - problem.psi).norm()))
    assert -2.1 < slope_of(errors, strengths) < -1.9


def test_the_multiplier_is_the_adjoint_in_the_limit(problem):
    relaxation, errors = problem.relaxation("residual, loss"), []
    for strength, solution in zip(STRENGTHS, continuation(relaxation, problem.x, STRENGTHS), strict=True):
        errors.append(float((relaxation.multiplier(solution.value, problem.x, strength) - problem.p).norm()))
    assert -1.05 < slope_of(errors) < -0.95
    assert errors[-1] < 1e-3 * problem.p.norm()


def test_a_base_energy_that_is_not_the_loss_has_another_multiplier(problem):
    relaxation = problem.relaxation("residual, ridge")
    psi = relaxation.solve(problem.x, 1e5).value
    assert (relaxation.multiplier(psi, problem.x, 1e5) - problem.p).norm() > 0.1 * problem.p.norm()


def test_one_penalised_solve_gives_the_gradient_of_a_parameter(problem):
    """The loss with the first map scaled by `s`: its derivative at 1 by the multiplier and by differences."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def scaled(s):
        maps = [s * problem.supra.maps[0], *problem.supra.maps[1:]]
        return SupraGraph(problem.supra.layers, maps, problem.supra.biases)

    step, ends = 1e-6, []
    for s in (1 + step, 1 - step):
        ends.append(problem.loss(scaled(s).solve(problem.x, tol=1e-14, throw=False).value).sum())
    exact = float(ends[0] - ends[1]) / (2 * step)
    errors = []
    relaxation = problem.relaxation("residual, loss")
    for strength in STRENGTHS:
        psi = relaxation.solve(problem.x, strength).value
        multiplier = relaxation.multiplier(psi, problem.x, strength)
        (found,) = scaled(scale).parameter_gradient(multiplier, psi, problem.x, [scale])
        errors.append(abs(float(found) - exact))
    assert -1.1 < slope_of(errors[:3], STRENGTHS[:3]) < -0.9
    assert errors[-1] < 1e-4 * abs(exact)


def test_plain_symmetric_coupling_is_another_model(problem):
    relaxation = problem.relaxation("symmetric energy")
    naive = relaxation.solve(problem.x, 1.0).value
    assert (naive - problem.psi).norm() > 0.1 * problem.psi.norm()


@pytest.mark.parametrize("strength", [10.0, 1e3])
def test_the_error_is_bounded_by_the_inverse_bound_times_the_perturbation(problem, strength):
    bound = inverse_bound(MU, NORM, len(problem.supra))
    for name in NAMES[:2] + NAMES[3:]:  # in these R is known at any state, not to first order only
        relaxation = problem.relaxation(name)
        psi = relaxation.solve(problem.x, strength).value
        error = torch.linalg.vector_norm(psi - problem.psi, dim=1)
        pushed = torch.linalg.vector_norm(relaxation.perturbation(psi, problem.x), dim=1)
        assert (error <= bound * pushed / strength).all()


@pytest.mark.parametrize("name", ["residual, ridge", "residual, loss", "symmetric energy"])
def test_solutions_are_stationary_points_of_the_energy(problem, name):
    relaxation, strength = problem.relaxation(name), 30.0
    psi = relaxation.solve(problem.x, strength).value.requires_grad_()
    (gradient,) = torch.autograd.grad(relaxation.energy(psi, problem.x, strength).sum(), psi)
    assert gradient.abs().max() < 1e-11
    psi = torch.randn_like(psi).requires_grad_()
    (gradient,) = torch.autograd.grad(relaxation.energy(psi, problem.x, strength).sum(), psi)
    if name == "symmetric energy":
        weight = torch.repeat_interleave(strength ** -torch.arange(3.0), torch.tensor(problem.supra.sizes))
        ours = weight * relaxation.residual(psi, problem.x, strength)
    else:
        ours = relaxation.gradient(psi, problem.x, strength)
    torch.testing.assert_close(gradient, ours.to(gradient.dtype), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("name", ["residual, ridge", "residual, loss"])
def test_the_hessian_of_the_residual_penalty_is_that_of_its_energy(problem, name):
    relaxation, strength = problem.relaxation(name), 5.0
    draw = torch.Generator().manual_seed(1)
    psi, v, w = (torch.randn(2, problem.supra.size, generator=draw, dtype=torch.complex128) for _ in range(3))
    product = relaxation.hessian_product(psi, problem.x, strength, v)
    step = 1e-6
    ahead, behind = (relaxation.gradient(psi + s * v, problem.x, strength) for s in (step, -step))
    assert ((ahead - behind) / (2 * step) - product).abs().max() < 1e-6 * product.abs().max()
    mirrored = relaxation.hessian_product(psi, problem.x, strength, w)
    assert (real_inner(product, w) - real_inner(v, mirrored)).abs().max() < 1e-10
    rough = relaxation.hessian_product(psi, problem.x, strength, v, gauss_newton=True)
    assert (rough - product).abs().max() > 1e-3


def test_adjoints_are_those_of_the_relaxed_equations(problem):
    """`G^T p = -g` for the derivative `G` of each relaxed left-hand side, by automatic differentiation."""
    strength, psi, x = 7.0, problem.psi[:1], problem.x[:1]
    gradient = problem.gradient[:1]

    def jacobian(f):
        def real(flat):
            return as_real(f(like_state(flat, psi)))

        return torch.autograd.functional.jacobian(real, as_real(psi))[0, :, 0]

    symmetric = SymmetricEnergy(problem.supra)
    matrix = jacobian(lambda state: symmetric.residual(state, x, strength))
    expected = torch.linalg.solve(matrix.T, -as_real(gradient)[0])
    found = as_real(symmetric.adjoint(psi, x, strength, gradient))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    penalty = problem.relaxation("residual, loss")
    matrix = torch.autograd.functional.hessian(
        lambda flat: penalty.energy(like_state(flat, psi), x, strength).sum(), as_real(psi)
    )[0, :, 0]
    q = torch.linalg.solve(matrix.T, -as_real(gradient)[0])
    expected = problem.supra.dense(psi)[0] @ q
    found = as_real(penalty.adjoint(psi, x, strength, gradient))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_scaled_system_of_the_residual_penalty_stays_well_conditioned(problem):
    relaxation, x = problem.relaxation("residual, loss"), problem.x[:1]
    size = 2 * problem.supra.size
    basis = like_state(torch.eye(size, dtype=torch.float64), problem.psi)
    limit = float(torch.linalg.cond(problem.supra.dense(problem.psi[:1]))) ** 2
    for strength in (1e2, 1e4, 1e6):
        psi = relaxation.solve(x, strength).value
        product = relaxation.hessian_product(psi.expand(size, -1), x.expand(size, -1), strength, basis)
        assert float(torch.linalg.cond(as_real(product))) < 1.1 * limit


def test_copies_are_resolvents_and_keep_the_system_monotone(problem):
    for strength in (0.01, 1.0, 100.0):
        whole = StiffCopies(problem.supra).extended(strength)
        assert len(whole) == 5
        assert monotonicity(whole, whole.zeros(1), 0.05).min() > 0
        states = whole.split(whole.solve(problem.x).value)
        graph = problem.supra.layers[0].graph
        L = graph.dense_laplacian(2)
        A = L + torch.eye(len(L), dtype=L.dtype)
        expected = torch.linalg.solve(
            A + strength * torch.eye(len(L), dtype=L.dtype), strength * states[0].flatten(1).mT
        )
        torch.testing.assert_close(states[1].flatten(1), expected.mT, rtol=0, atol=1e-11)


def test_the_symmetric_energy_is_strongly_convex_beyond_the_threshold(generator):
    problem = Problem(generator, kappa=0.0)
    above = 1.01 * convexity_threshold(MU, NORM)
    relaxation = SymmetricEnergy(problem.supra)
    psi = relaxation.solve(problem.x, above).value
    relaxation.adjoint(psi, problem.x, above, problem.gradient)  # raises unless positive definite
    strong = SupraGraph(problem.supra.layers, [20 * K for K in problem.supra.maps], problem.supra.biases)
    with pytest.raises(UnstableBranchError, match="raise the strength"):
        SymmetricEnergy(strong).adjoint(problem.psi, problem.x, 1.0, problem.gradient)


def test_the_threshold_is_sharp_for_two_linear_nodes():
    """`((mu, -k), (-k, mu))` with `k = norm / sqrt(lambda)` is singular at `lambda = (norm / mu)^2`."""
    V = torch.full((1,), MU, dtype=torch.float64)
    node = SheafGraph.complete(1, V[:0]), Quartic(V, 0 * V)
    supra = SupraGraph([node, node], [torch.full((1, 1), NORM, dtype=torch.float64)] * 2)
    relaxation, one = SymmetricEnergy(supra), torch.ones(1, 2, dtype=torch.float64)
    critical = convexity_threshold(MU, NORM) / 4
    relaxation.adjoint(one, one[:, :1], 1.01 * critical, one)
    with pytest.raises(UnstableBranchError):
        relaxation.adjoint(one, one[:, :1], 0.99 * critical, one)


@pytest.mark.parametrize("name", NAMES)
def test_large_systems_are_solved_by_products_alone(problem, name, monkeypatch):
    relaxation, strength = problem.relaxation(name), 50.0
    psi = relaxation.solve(problem.x, strength).value
    p = relaxation.adjoint(psi, problem.x, strength, problem.gradient)
    monkeypatch.setattr(assembly, "DENSE_LIMIT", 0)
    again = relaxation.solve(problem.x, strength).value
    assert (again - psi).abs().max() < 1e-10
    p_again = relaxation.adjoint(psi, problem.x, strength, problem.gradient)
    assert (p_again - p).abs().max() < 1e-10


def test_steps_fall_back_to_gauss_newton_where_the_hessian_is_indefinite(generator):
    problem = Problem(generator, kappa=5.0)
    relaxation, strength = problem.relaxation("residual, loss"), 10.0
    start = 0.3 * problem.psi
    size = 2 * problem.supra.size
    basis = like_state(torch.eye(size, dtype=torch.float64), problem.psi)
    rows = relaxation.hessian_product(
        start[:1].expand(size, -1), problem.x[:1].expand(size, -1), strength, basis
    )
    assert torch.linalg.eigvalsh(as_real(rows)).min() < 0
    found = relaxation.solve(problem.x, strength, start=start).value
    torch.testing.assert_close(found, relaxation.solve(problem.x, strength).value, rtol=0, atol=1e-10)


def test_continuation_is_warm(problem):
    relaxation = problem.relaxation("residual, loss")
    path = continuation(relaxation, problem.x, [10.0**k for k in range(7)])
    assert all(solution.converged.all() for solution in path)
    steps = [int(solution.steps.max()) for solution in path]
    assert steps[-1] < steps[0]
    assert all(later <= earlier for earlier, later in itertools.pairwise(steps[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_real_states_have_the_same_laws(generator, name):
    problem = Problem(generator, dtype=torch.float64)
    relaxation, errors = problem.relaxation(name), []
    for strength in (1e3, 1e4):
        psi = relaxation.solve(problem.x, strength).value
        p = relaxation.adjoint(psi, problem.x, strength, problem.gradient)
        errors.append((float((psi - problem.psi).norm()), float((p - problem.p).norm())))
    for early, late in zip(*errors, strict=True):
        assert early / late == pytest.approx(10, rel=0.05)


def test_linear_layers_have_a_penalty_without_third_derivatives(generator):
    problem = Problem(generator, kappa=0.0)
    relaxation = ResidualPenalty(problem.supra, lambda psi: psi.real.sum(1))  # a linear base energy
    strength = 20.0
    psi = relaxation.solve(problem.x, strength).value
    torch.testing.assert_close(
        psi - problem.psi, first_order(relaxation, problem.psi, problem.x) / strength, rtol=0, atol=1e-11
    )


def test_an_empty_batch_is_relaxed_to_an_empty_state(problem):
    for name in NAMES:
        assert problem.relaxation(name).solve(problem.x[:0], 10.0).value.shape == (0, problem.supra.size)


def test_arguments_out_of_range_are_refused(problem):
    for name, strength in itertools.product(NAMES, (0.0, -1.0, math.inf)):
        with pytest.raises(ValueError, match="strength must be positive and finite"):
            problem.relaxation(name).solve(problem.x, strength)
    with pytest.raises(ValueError, match="strengths must increase"):
        continuation(problem.relaxation(NAMES[0]), problem.x, [2.0, 1.0])
    with pytest.raises(ValueError, match="mu must be positive"):
        convexity_threshold(0.0, 1.0)
    with pytest.raises(ConvergenceError, match="penalised state"):
        problem.relaxation(NAMES[0]).solve(problem.x, 10.0, max_steps=1)
