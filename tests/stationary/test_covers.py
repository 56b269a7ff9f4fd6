"""Laws of covers: the same function from any start if admissible, flagged if not, at a price (SGN-R4, R5)."""

import math

import pytest
import torch

from geomlib.core import ConvergenceWarning
from geomlib.stationary import DissipativeFlow, Local, Quartic, SheafGraph, Tanh, residual, solve_stationary
from geomlib.stationary.covers import cover_sectors, root_split, sheaf_to_cover_u1, sheaf_to_gremban

SHEETS = [3, 4, 6, 8, 16, 32]


def draw_phases(generator, n=10, count=16, kappa=0.5):
    candidates = torch.triu_indices(n, n, 1)
    edges = candidates[:, torch.randperm(candidates.shape[1], generator=generator)[:count]]
    weights = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    V = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    drive = torch.randn(3, n, 1, generator=generator, dtype=torch.complex128)
    return SheafGraph(n, edges, weights, phases), Quartic(V, torch.full_like(V, kappa)), drive


def draw_unitary(generator, V, kappa=0.5, d=2):
    edges = torch.tensor([[0, 0, 1, 1, 2, 3], [1, 2, 2, 3, 4, 4]])
    weights = 0.5 + torch.rand(6, generator=generator, dtype=torch.float64)
    transport = torch.linalg.qr(torch.randn(6, d, d, generator=generator, dtype=torch.complex128)).Q
    flat = torch.full((5,), V, dtype=torch.float64)
    drive = torch.randn(3, 5, d, generator=generator, dtype=torch.complex128)
    return SheafGraph(5, edges, weights, transport), Quartic(flat, torch.full_like(flat, kappa)), drive


def from_random_start(found, drive, generator, **options):
    """Zero is a lifted state, and Newton's method never leaves those: a start of its own shows the rest."""
    lifted = found.drive(drive)
    start = 3 * torch.randn(lifted.shape, generator=generator, dtype=lifted.dtype)
    solution = solve_stationary(*found.target, lifted, start=start, **{"tol": 1e-11, **options})
    return found.pull(solution.value), solution


def exact(graph, potential, drive):
    return solve_stationary(graph, potential, drive, tol=1e-13).value


@pytest.mark.parametrize("sheets", SHEETS)
def test_a_phase_is_a_mixture_of_two_neighbouring_roots(sheets):
    phases = torch.linspace(-7, 7, 301, dtype=torch.float64)
    root, mixture = root_split(phases, sheets)
    omega = 2 * math.pi / sheets
    steps = omega * (root[:, None] + torch.arange(2)).double()
    rebuilt = (mixture * torch.polar(torch.ones_like(steps), steps)).sum(1)
    assert (rebuilt - torch.polar(torch.ones_like(phases), phases)).abs().max() < 1e-13
    assert (mixture >= 0).all()
    total = mixture.sum(1)
    assert total.min() >= 1 - 1e-14
    assert total.max() <= 1 / math.cos(math.pi / sheets) + 1e-14


@pytest.mark.parametrize("sheets", SHEETS)
def test_the_deficit_is_at_most_the_secant(generator, sheets):
    graph, potential, _ = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=sheets)
    ratio = found.deficit / graph.degrees().clamp_min(1e-12)
    assert (ratio >= 0).all()
    assert ratio.max() <= 1 / math.cos(math.pi / sheets) - 1 + 1e-12


def test_roots_of_unity_cost_nothing(generator):
    graph, potential, _ = draw_phases(generator)
    quarter = graph.replace(transport=(math.pi / 2) * torch.arange(16, dtype=torch.float64))
    found = sheaf_to_cover_u1(quarter, potential, sheets=4)
    assert found.deficit.abs().max() < 1e-12
    assert found.target.graph.edges.shape[1] == 4 * 16


@pytest.mark.parametrize("sheets", SHEETS)
def test_the_lifted_equation_is_the_lift_of_the_equation(generator, sheets):
    graph, potential, drive = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=sheets)
    psi = torch.randn(drive.shape, generator=generator, dtype=drive.dtype)
    lifted = residual(*found.target, found.drive(drive), found.lift(psi))
    torch.testing.assert_close(lifted, found.lift(residual(graph, potential, drive, psi)))
    torch.testing.assert_close(found.pull(found.lift(psi)), psi)
    assert (found.target.graph.weights > 0).all()
    assert found.target.graph.transport is None


@pytest.mark.parametrize("sheets", SHEETS)
def test_the_spectrum_of_a_cover_is_the_union_of_its_sectors(generator, sheets):
    graph, potential, _ = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=sheets)
    matrix = found.target.graph.dense_laplacian() + torch.diag(found.target.potential.V)
    sectors = cover_sectors(graph, potential.V, sheets)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(matrix), sectors.flatten().sort().values, rtol=0, atol=1e-12
    )
    base = torch.linalg.eigvalsh(graph.dense_laplacian() + torch.diag(potential.V).to(torch.complex128))
    torch.testing.assert_close(sectors[1], base, rtol=0, atol=1e-12)
    assert found.lambda_min == pytest.approx(float(sectors.min()))


@pytest.mark.parametrize("sheets", SHEETS[1:])
def test_an_admissible_cover_returns_the_layer_from_random_states(generator, sheets):
    graph, potential, drive = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=sheets)
    assert found.admissible
    value, _ = from_random_start(found, drive, generator)
    assert (value - exact(graph, potential, drive)).abs().max() < 1e-8


def test_three_sheets_are_flagged_and_fail_from_random_states_but_not_from_zero(generator):
    graph, potential, drive = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=3)
    assert not found.admissible
    assert found.lambda_min < -0.5
    target = exact(graph, potential, drive)
    with pytest.warns(ConvergenceWarning):
        value, _ = from_random_start(
            found, drive, generator, solver=DissipativeFlow(gamma=3.0), max_steps=400, throw=False
        )
    assert (value - target).abs().max() > 0.1
    lifted = found.lift(target)
    assert residual(*found.target, found.drive(drive), lifted).abs().max() < 1e-10


def test_conjugate_gradients_from_zero_hide_what_a_factorisation_sees(generator):
    graph, potential, drive = draw_phases(generator)
    found = sheaf_to_cover_u1(graph, potential, sheets=3)
    target, right, misses = exact(graph, potential, drive), found.drive(drive), {}
    for path in ("sparse", "dense"):
        solution = solve_stationary(
            *found.target, right, start=torch.zeros_like(right), path=path, tol=1e-10, max_steps=500
        )
        misses[path] = float((found.pull(solution.value) - target).abs().max())
    assert misses["sparse"] < 1e-8
    assert misses["dense"] > 0.1


@pytest.mark.parametrize("sheets", [3, 4, 8, 32])
def test_a_frustrated_triangle_has_no_admissible_cover_however_many_sheets(sheets):
    edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    one = torch.ones(3, dtype=torch.float64)
    graph = SheafGraph(3, edges, one, math.pi * one)
    potential = Quartic(-0.3 * one, 0 * one)
    base = graph.dense_laplacian() + torch.diag(potential.V)
    assert float(torch.linalg.eigvalsh(base).min()) == pytest.approx(0.7, abs=1e-12)
    found = sheaf_to_cover_u1(graph, potential, sheets=sheets)
    assert not found.admissible
    if sheets % 2 == 0:  # minus one is a root: nothing is lost, and yet
        assert found.deficit.abs().max() < 1e-12
        assert found.lambda_min == pytest.approx(-0.3, abs=1e-12)


def test_a_potential_that_is_not_radial_is_turned_on_each_sheet(generator):
    graph, _, drive = draw_phases(generator)
    local = Local(lambda psi: psi.abs().square().sum(2) + psi.real.cosh().sum(2), convexity=2.0)
    found = sheaf_to_cover_u1(graph, local, sheets=6)
    assert found.admissible
    value, _ = from_random_start(found, drive, generator)
    assert (value - exact(graph, local, drive)).abs().max() < 1e-8
    with pytest.raises(ValueError, match="floor must be given"):
        sheaf_to_cover_u1(graph, Local(lambda psi: psi.abs().square().sum(2)))


@pytest.mark.parametrize("path", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_an_admissible_double_cover_returns_the_layer_from_random_states(generator, kappa, path):
    graph, potential, drive = draw_unitary(generator, V=4.0, kappa=kappa)
    found = sheaf_to_gremban(graph, potential, stalk=2)
    assert found.admissible
    assert found.target.graph.nodes == 40
    assert found.target.graph.edges.shape[1] == 2 * 6 * 16
    value, _ = from_random_start(found, drive, generator, path=path)
    assert (value - exact(graph, potential, drive)).abs().max() < 1e-8


def test_a_small_potential_makes_the_double_cover_inadmissible(generator):
    graph, potential, drive = draw_unitary(generator, V=0.5)
    found = sheaf_to_gremban(graph, potential, stalk=2)
    assert not found.admissible
    assert found.lambda_min < 0
    value, _ = from_random_start(found, drive, generator, path="sparse", throw=False)
    assert (value - exact(graph, potential, drive)).abs().max() > 0.01


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_double_cover_lifts_the_equation_at_a_bounded_price(generator, d):
    graph, potential, drive = draw_unitary(generator, V=1.0, d=d)
    found = sheaf_to_gremban(graph, potential, stalk=d)
    psi = torch.randn(drive.shape, generator=generator, dtype=drive.dtype)
    lifted = residual(*found.target, found.drive(drive), found.lift(psi))
    torch.testing.assert_close(lifted, found.lift(residual(graph, potential, drive, psi)))
    torch.testing.assert_close(found.pull(found.lift(psi)), psi)
    ratio = found.deficit.view(5, 2 * d) / graph.degrees()[:, None]
    assert ratio.min() >= -1e-12
    assert ratio.max() <= math.sqrt(2 * d) - 1


def test_the_least_eigenvalue_of_the_double_cover_is_that_of_its_matrix(generator):
    graph, potential, _ = draw_unitary(generator, V=1.0)
    found = sheaf_to_gremban(graph, potential, stalk=2)
    shift = potential.V.repeat_interleave(8) - found.deficit.repeat_interleave(2)
    matrix = found.target.graph.dense_laplacian() + torch.diag(shift)
    assert found.lambda_min == pytest.approx(float(torch.linalg.eigvalsh(matrix).min()))


def test_phases_and_no_transport_have_a_double_cover_too(generator):
    graph, potential, drive = draw_phases(generator)
    stiff = Quartic(potential.V + 2, potential.kappa)
    plain = SheafGraph(graph.nodes, graph.edges, graph.weights)
    for source in (graph, plain):
        found = sheaf_to_gremban(source, stiff)
        value, _ = from_random_start(found, drive, generator, path="sparse")
        assert (value - exact(source, stiff, drive)).abs().max() < 1e-8
    assert sheaf_to_gremban(plain, stiff).deficit.abs().max() == 0


def test_arguments_that_do_not_fit_are_refused(generator):
    graph, potential, _ = draw_unitary(generator, V=1.0)
    with pytest.raises(ValueError, match="sheaf_to_gremban"):
        sheaf_to_cover_u1(graph, potential)
    with pytest.raises(ValueError, match="stalk must fit the transports"):
        sheaf_to_gremban(graph, potential, stalk=3)
    with pytest.raises(ValueError, match="sheets must be at least 3, got 2"):
        sheaf_to_cover_u1(draw_phases(generator)[0], potential, sheets=2)
    with pytest.raises(ValueError, match="floor must be given"):
        sheaf_to_gremban(graph, Local(lambda psi: psi.abs().square().sum(2)), stalk=2)
    assert sheaf_to_gremban(graph, Tanh(), stalk=2).target.graph.nodes == 40
