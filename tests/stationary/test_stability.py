"""Stability is positive definiteness: inertia, folds, several states of one drive, rates of the flow."""

import math

import pytest
import torch

from geomlib.core import real_inner
from geomlib.stationary import (
    DissipativeFlow,
    Quartic,
    SheafGraph,
    StabilityWarning,
    dense_hessian,
    energy,
    follow,
    inertia,
    linearised_flow,
    smallest_eigenvalue,
    solve_stationary,
    stability_report,
    stable_states,
)
from geomlib.stationary.equation import Equation

ONE = torch.ones(1, dtype=torch.float64)
NODE = SheafGraph.complete(1, ONE[:0])


def test_the_flow_is_stable_exactly_where_the_hessian_is_positive(generator):
    hessians = torch.randn(200, 20, 20, generator=generator, dtype=torch.float64)
    hessians = hessians + hessians.mT
    gammas = 10 ** (2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1)
    expected = inertia(hessians)
    for hessian, gamma, counts in zip(hessians, gammas.tolist(), expected, strict=True):
        assert inertia(linearised_flow(hessian, gamma)).tolist() == counts.tolist()
    assert int((expected[:, 2] > 0).sum()) == 200  # the draws are indefinite, so the test can fail


def test_linearised_flow_is_the_derivative_of_the_velocity(make_layer):
    graph, potential, drive = make_layer("unitary", batch=1)
    equation, flow = Equation(graph, potential, drive), DissipativeFlow(0.7)
    jacobian = torch.autograd.functional.jacobian(
        lambda rows: torch.view_as_real(flow.velocity(equation, torch.view_as_complex(rows))),
        torch.view_as_real(drive),
    ).view(24, 24)
    matrix = linearised_flow(dense_hessian(graph, potential, drive)[0], 0.7)
    torch.testing.assert_close(jacobian, -matrix)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_energy_falls_at_twice_gamma_mu_or_faster(make_layer, gamma):
    graph, potential, drive = make_layer("unitary", mu=0.3)
    equation, flow = Equation(graph, potential, drive), DissipativeFlow(gamma)
    lowest = energy(graph, potential, drive, solve_stationary(graph, potential, drive, tol=1e-13).value)
    psi, time = torch.zeros_like(drive), torch.zeros(3, dtype=torch.float64)
    first = last = energy(graph, potential, drive, psi) - lowest
    for _ in range(100):
        time = time + flow.length(equation, psi).flatten()
        psi = flow.advance(equation, psi)
        above = energy(graph, potential, drive, psi) - lowest
        assert (above < last).all()
        last = above
        if float(last.min()) < 1e-9:  # below, differences of energies drown in rounding
            break
    rate = (first / last).log() / time
    assert (rate >= 2 * gamma * 0.3).all()


def test_the_rotating_part_of_the_flow_does_no_work(make_layer):
    graph, potential, drive = make_layer("unitary")
    slope = Equation(graph, potential, drive).residual(drive)
    assert float(real_inner(slope, 1j * slope).abs().max()) < 1e-12 * float(real_inner(slope, slope).max())


def driven_node(kappa=1.0, drive=0.5):
    return lambda V: (NODE, Quartic(V * ONE, kappa * ONE), drive * ONE.view(1, 1, 1))


@pytest.mark.parametrize(("kappa", "drive"), [(1.0, 0.5), (2.0, 0.1)])
def test_a_branch_is_followed_to_its_fold(kappa, drive):
    exact = -3 * (kappa * drive**2 / 4) ** (1 / 3)
    branch = follow(driven_node(kappa, drive), 3 * exact, 0.0, -3 * ONE.view(1, 1, 1))
    assert abs(branch.fold - exact) < 1e-8
    assert (branch.residual <= 1e-12).all()
    assert (branch.lambda_min > 0).all()
    # lambda_min = V + 3 kappa r^2 > 0: the branch stays below -sqrt(-V / 3 kappa) all the way.
    r = branch.states.flatten()
    assert (r < -(-branch.values / (3 * kappa)).sqrt()).all()


def test_the_smallest_eigenvalue_vanishes_like_a_square_root():
    branch = follow(driven_node(), -3.0, 0.0, -2 * ONE.view(1, 1, 1))
    distance = branch.fold - branch.values
    near = (distance > 1e-7) & (distance < 1e-3)
    logs = torch.stack([distance[near].log(), torch.ones_like(distance[near])], 1)
    exponent = torch.linalg.lstsq(logs, branch.lambda_min[near].log().unsqueeze(1)).solution[0, 0]
    assert int(near.sum()) >= 5
    assert float(exponent) == pytest.approx(0.5, abs=0.02)


def test_a_branch_without_a_fold_goes_to_the_end():
    branch = follow(driven_node(), 3.0, -3.0, 0.2 * ONE.view(1, 1, 1))
    assert branch.fold is None
    assert float(branch.values[-1]) == -3.0


@pytest.mark.parametrize(("V", "count"), [(0.5, 1), (0.0, 1), (-0.2, 1), (-0.5, 1), (-1.0, 4), (-2.0, 4)])
def test_a_frustrated_triangle_has_several_stable_states(V, count, generator):
    # Phases of pi / 3 along 0 -> 1 -> 2 -> 0 make a loop of holonomy -1.
    phases = math.pi / 3 * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    weights = torch.full((3,), 0.5, dtype=torch.float64)
    graph = SheafGraph.complete(3, weights, phases)
    potential = Quartic(V * torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    drive = torch.full((1, 3, 1), 0.05, dtype=torch.complex128)
    starts = torch.complex(*(2 * torch.randn(2, 200, 3, 1, generator=generator, dtype=torch.float64)))
    states, energies = stable_states(graph, potential, drive, starts)
    assert len(states) == count
    assert (energies.diff() >= 0).all()
    assert (smallest_eigenvalue(graph, potential, states) > 0).all()


def test_a_lone_complex_node_has_one_stable_state(generator):
    starts = torch.complex(*(2 * torch.randn(2, 50, 1, 1, generator=generator, dtype=torch.float64)))
    drive = torch.full((1, 1, 1), 0.5, dtype=torch.complex128)
    assert len(stable_states(NODE, Quartic(-3 * ONE, ONE), drive, starts)[0]) == 1


@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_the_smallest_eigenvalue_without_a_matrix_is_that_of_the_matrix(make_layer, shift, kind):
    graph, potential, psi = make_layer(kind, nodes=40, density=0.2)
    potential = Quartic(potential.V + shift, potential.kappa)
    dense, sparse = (
        smallest_eigenvalue(graph, potential, 0.3 * psi, path=path) for path in ("dense", "sparse")
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-7)


def test_a_report_wants_residual_and_eigenvalue(make_layer):
    graph, potential, drive = make_layer("unitary")
    psi = solve_stationary(graph, potential, drive).value
    assert bool(stability_report(graph, potential, drive, psi).stable.all())
    assert not bool(stability_report(graph, potential, drive, psi + 1e-3).stable.any())
    zero = torch.zeros_like(drive)
    unstable = Quartic(potential.V - 5, potential.kappa)
    assert not bool(stability_report(graph, unstable, zero, zero).stable.any())


def test_a_report_warns_near_a_fold():
    branch = follow(driven_node(), -3.0, 0.0, -2 * ONE.view(1, 1, 1))
    V, psi = float(branch.values[-1]), branch.states[-1:]
    with pytest.warns(StabilityWarning, match="a fold is near"):
        report = stability_report(*driven_node()(V), psi)
    assert bool(report.stable.all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: follow(driven_node(), 1.0, 1.0, ONE.view(1, 1, 1)), "begin and end must differ"),
        (lambda: follow(driven_node(), 1.0, 2.0, ONE.view(1, 1, 1), tol=0.0), "tol must be positive"),
        (lambda: follow(driven_node(), -3.0, 0.0, 0 * ONE.view(1, 1, 1)), "near a stable state"),
        (lambda: linearised_flow(torch.eye(3), 1.0), "even size"),
        (lambda: linearised_flow(torch.eye(2), 0.0), "gamma must be positive"),
        (lambda: stable_states(NODE, Quartic(ONE, ONE), ONE.view(1, 1), ONE.view(1, 1, 1)), "one drive"),
    ],
)
def test_questions_about_stability_without_an_answer_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
