"""Laws of the solvers: what they find, at which rate, when they stop, and what they do when they fail."""

import math
from itertools import pairwise

import pytest
import torch
from core_problems import affine, rotation, tanh_cell
from hypothesis import given, settings
from hypothesis import strategies as st

from geomlib.core import Anderson, Broyden, Direct, NewtonKrylov, Picard, solve

ITERATIVE = [Picard(), Anderson(), Broyden(), NewtonKrylov()]
# Missing a tolerance is part of what is tested; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore::geomlib.core.ConvergenceWarning")
NAMES = [type(solver).__name__ for solver in ITERATIVE]


def each_solver(*extra):
    solvers = [*ITERATIVE, *extra]
    return pytest.mark.parametrize("solver", solvers, ids=[type(solver).__name__ for solver in solvers])


def distance(a, b):
    return (a - b).flatten(1).norm(dim=1)


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_the_plain_iteration_contracts_at_banachs_rate(kappa):
    f, u, W, exact = affine(kappa)
    z = torch.zeros_like(u)
    for _ in range(30):
        image = f(z, u, W)
        # One unit of rounding per entry is all that may be added to the exact inequality.
        assert (distance(image, exact) <= kappa * distance(z, exact) + 1e-14).all()
        z = image
    by_solver = solve(f, torch.zeros_like(u), u, W, solver=Picard(), max_steps=30, tol=1e-300, throw=False)
    torch.testing.assert_close(by_solver.value, z, rtol=0, atol=0)


@each_solver()
@pytest.mark.parametrize("kappa", [0.5, 0.9, 0.99])
def test_the_bound_certifies_the_returned_value(solver, kappa):
    f, u, W, exact = affine(kappa)
    solution = solve(
        f, torch.zeros_like(u), u, W, solver=solver, contraction_factor=kappa, tol=1e-6, max_steps=3000
    )
    # The bound is relative to 1 + |z| at the iterate before, from which |value| differs by the residual.
    error = distance(solution.value, exact) / (1 + solution.value.norm(dim=1))
    assert (error <= solution.bound * (1 + 1e-3)).all()
    assert (solution.bound <= 1e-6).all()


def test_the_tolerance_means_the_bound_where_a_factor_is_known():
    f, u, W, _ = affine(0.99)
    honest = solve(
        f, torch.zeros_like(u), u, W, solver=Picard(), contraction_factor=0.99, tol=1e-4, max_steps=5000
    )
    naive = solve(f, torch.zeros_like(u), u, W, solver=Picard(), tol=1e-4, max_steps=5000)
    assert (honest.residual <= 1e-4 * 0.01 / 0.99).all()
    assert (naive.residual > honest.residual).all()


@pytest.mark.parametrize("kappa", [0.9, 0.99])
def test_all_solvers_find_the_same_point(kappa):
    f, u, W = tanh_cell(kappa)
    found = [
        solve(f, torch.zeros_like(u), u, W, solver=s, tol=1e-12, max_steps=5000).value for s in ITERATIVE
    ]
    for name, value in zip(NAMES, found, strict=True):
        assert (value - found[0]).abs().max() < 1e-8, name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kappa", [0.9, 0.99])
def test_anderson_needs_no_more_steps_than_the_plain_iteration(kappa, symmetric):
    f, u, W, _ = affine(kappa, width=32, symmetric=symmetric)
    plain, fast = (
        solve(f, torch.zeros_like(u), u, W, solver=s, tol=1e-8, max_steps=5000).steps
        for s in (Picard(), Anderson())
    )
    assert (fast <= plain).all()


def test_anderson_on_an_affine_map_is_a_krylov_method():
    """Without truncation it ends after as many steps as dimensions, and two to start and to check."""
    f, u, W, exact = affine(0.99, width=6)
    solution = solve(f, torch.zeros_like(u), u, W, solver=Anderson(memory=6), tol=1e-10)
    assert (solution.steps <= 6 + 2).all()
    torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("width", [1, 3])
def test_anderson_in_one_unknown_is_the_secant_method(width):
    """Also where the unknown is repeated, so that every difference after the first depends on the window."""
    x = [0.0, 1.0]
    for _ in range(4):
        (a, b), (r, s) = x[-2:], (math.cos(x[-2]) - x[-2], math.cos(x[-1]) - x[-1])
        x.append(b - s * (b - a) / (s - r))
    seen = []
    solve(lambda z: seen.append(z) or z.cos(), torch.zeros(1, width, dtype=torch.float64), tol=1e-7)
    found = torch.cat(seen)[: len(x)]
    torch.testing.assert_close(found, torch.tensor(x, dtype=torch.float64)[:, None].expand_as(found))


def test_a_short_window_is_enough_for_a_symmetric_jacobian():
    f, u, W, _ = affine(0.99, width=40, symmetric=True)
    steps = [
        int(
            solve(
                f, torch.zeros_like(u), u, W, solver=Anderson(memory=m), tol=1e-8, max_steps=500
            ).steps.max()
        )
        for m in (3, 30)
    ]
    assert steps[0] <= steps[1] + 2  # the recurrences differ by rounding only


def test_damping_leaves_the_fixed_point_where_it_is():
    f, u, W, exact = affine(0.9)
    for solver in (Picard(damping=0.5), Anderson(damping=0.5)):
        value = solve(f, torch.zeros_like(u), u, W, solver=solver, tol=1e-11, max_steps=2000).value
        torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-8)


@each_solver(Direct())
def test_a_window_of_dependent_differences_does_no_harm(solver, device):
    """Every sample and every entry repeats the same scalar problem: all windows have rank one."""
    solution = solve(
        lambda z: 0.9 * z + 1, torch.zeros(3, 5, device=device), solver=solver, tol=1e-5, max_steps=300
    )
    torch.testing.assert_close(solution.value.cpu(), torch.full((3, 5), 10.0), rtol=1e-3, atol=0)
    assert solution.reason == "converged"


@each_solver()
def test_starting_at_the_solution_costs_one_evaluation(solver):
    solution = solve(lambda z: z, torch.randn(3, 2), solver=solver)
    assert solution.steps.tolist() == [1, 1, 1]
    assert solution.residual.tolist() == [0, 0, 0]


@each_solver()
def test_samples_stop_one_by_one_and_stay_where_they_stopped(solver):
    """A sample gets the value and the steps that it gets alone, however long its neighbours take."""
    rates = torch.tensor([[0.1], [0.5], [0.95]], dtype=torch.float64)

    def f(z, rate):
        return rate * torch.sin(z) + 1

    together = solve(f, torch.zeros(3, 4, dtype=torch.float64), rates, solver=solver, max_steps=1000)
    alone = [
        solve(f, torch.zeros(1, 4, dtype=torch.float64), rate[None], solver=solver, max_steps=1000)
        for rate in rates
    ]
    if not isinstance(solver, NewtonKrylov):  # whose line search may cost the others an evaluation
        assert together.steps.tolist() == [int(solution.steps) for solution in alone]
        torch.testing.assert_close(
            together.value, torch.cat([s.value for s in alone]), rtol=1e-15, atol=1e-15
        )
    torch.testing.assert_close(together.value, torch.cat([s.value for s in alone]), rtol=0, atol=1e-5)
    assert together.steps[0] < together.steps[2]


@each_solver()
def test_the_value_is_the_image_of_the_best_iterate(solver):
    f, u, W = tanh_cell(0.9)
    seen = []

    def recording(z, u, W):
        image = f(z, u, W)
        seen.append((z, image))
        return image

    solution = solve(
        recording, torch.zeros_like(u), u, W, solver=solver, tol=1e-300, max_steps=14, throw=False
    )
    residuals = torch.stack([distance(image, z) / (1 + z.norm(dim=1)) for z, image in seen])
    if not isinstance(solver, NewtonKrylov):  # whose probes are no candidates
        torch.testing.assert_close(solution.residual, residuals.amin(0), rtol=1e-12, atol=0)
    for sample in range(len(u)):
        matches = [torch.equal(image[sample], solution.value[sample]) for _, image in seen]
        assert any(matches)
        at = matches.index(True)
        torch.testing.assert_close(residuals[at, sample], solution.residual[sample], rtol=1e-12, atol=0)


def test_a_diverging_iteration_returns_its_best_iterate():
    start = torch.tensor([[1.0], [-4.0]], dtype=torch.float64)
    solution = solve(lambda z: 3 * z + 1, start, solver=Picard(), throw=False)
    assert solution.reason == "diverged"
    torch.testing.assert_close(solution.residual, solution.trace.amin(0))
    assert solution.steps.max() < 200, "runaway samples do not use up the budget"


def test_extrapolation_finds_roots_that_repel():
    """Anderson on an expansive affine map: the secant does not ask for contraction."""
    value = solve(
        lambda z: 3 * z + 1, torch.randn(5, 2, dtype=torch.float64), solver=Anderson(), tol=1e-10
    ).value
    torch.testing.assert_close(value, torch.full_like(value, -0.5))


@each_solver(Direct())
def test_a_map_that_is_not_a_number_is_reported(solver):
    solution = solve(lambda z: z * math.nan, torch.ones(2, 3), solver=solver, throw=False)
    assert solution.reason == "not finite"
    assert not solution.converged.any()
    torch.testing.assert_close(solution.value, torch.ones(2, 3))  # nothing better was seen


@each_solver()
def test_one_lost_sample_does_not_touch_the_others(solver):
    f, u, W = tanh_cell(0.9)
    clean = solve(f, torch.zeros_like(u), u, W, solver=solver)

    def poisoned(z, u, W):
        image = f(z, u, W)
        return torch.where(torch.arange(len(z))[:, None] == 1, math.nan, image)

    solution = solve(poisoned, torch.zeros_like(u), u, W, solver=solver, throw=False)
    assert solution.converged.tolist() == [True, False, True, True]
    others = [0, 2, 3]
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=0, atol=1e-5)


def test_anderson_comes_back_from_outside_the_domain():
    """The residual is flat at first, so the first secant leads far out, to where the map is not a number."""
    outside = []

    def f(z):
        outside.append(bool((z > 2).any()))
        return torch.where(z < 2, z + 0.3 * torch.tanh(3 * (1.9 - z)), math.nan)

    solution = solve(f, torch.zeros(1, 1, dtype=torch.float64), solver=Anderson())
    assert any(outside)
    assert solution.value.item() == pytest.approx(1.9, abs=1e-5)


@pytest.mark.parametrize("solver", [Anderson(), NewtonKrylov()], ids=["Anderson", "NewtonKrylov"])
def test_a_root_need_not_attract(solver):
    """Neimark-Sacker: the solver sits at 0 while the orbits live on a circle around it."""
    f = rotation(1.2)
    start = 0.5 * torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = solve(f, start, solver=solver, tol=1e-9, max_steps=500)
    assert solution.value.abs().max() < 1e-8
    orbit = start
    for _ in range(500):
        orbit = f(orbit)
    assert (f(orbit) - orbit).norm(dim=1).min() > 0.1


def test_newton_converges_quadratically():
    f, u, W = tanh_cell(0.99, width=4)
    solution = solve(f, torch.zeros_like(u), u, W, solver=NewtonKrylov(inner=4), tol=1e-12)
    # One evaluation to start, then five per Newton step: four products and the new point.
    worst = solution.trace.amax(1)[::5]
    pairs = [(a, b) for a, b in pairwise(worst[1:]) if b > 1e-11]
    assert pairs, "the iteration takes more than two Newton steps"
    assert all(b < 5 * a**1.8 for a, b in pairs)


def test_one_factorisation_solves_an_affine_map_exactly():
    f, u, W, exact = affine(0.999)
    solution = solve(f, torch.zeros_like(u), u, W, solver=Direct(), tol=1e-12)
    torch.testing.assert_close(solution.value, exact, rtol=1e-9, atol=1e-9)
    # Offset, ceil(8 / 4) batches of basis vectors, check; one refinement may follow.
    assert int(solution.steps.max()) <= 5


def test_the_direct_solver_refuses_a_map_that_is_not_affine():
    f, u, W = tanh_cell(3.0)
    assert not solve(f, torch.zeros_like(u), u, W, solver=Direct(), throw=False, max_steps=20).converged.all()


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(), Direct()], ids=lambda s: type(s).__name__
)
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 5), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), dtype=st.booleans()
)
def test_any_shape_is_solved_and_kept(solver, batch, shape, dtype):
    dtype = torch.float64 if dtype else torch.float32
    shift = torch.linspace(-1, 1, batch * math.prod(shape), dtype=dtype).view(batch, *shape)
    solution = solve(lambda z, b: b - 0.5 * z, torch.zeros_like(shift), shift, solver=solver, tol=1e-5)
    assert solution.value.shape == shift.shape
    assert solution.value.dtype == dtype
    assert solution.steps.shape == solution.residual.shape == solution.converged.shape == (batch,)
    torch.testing.assert_close(solution.value, shift / 1.5, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_iterated_in_single_precision(dtype):
    # The map itself rounds to 8 or 11 bits, so the residual settles at a few of its last places.
    solution = solve(lambda z: (0.5 * z + 1).to(dtype), torch.zeros(2, 3, dtype=dtype), tol=0.02)
    assert solution.value.dtype == dtype
    assert solution.residual.dtype == torch.float32
    torch.testing.assert_close(solution.value.float(), torch.full((2, 3), 2.0), rtol=0.02, atol=0)
