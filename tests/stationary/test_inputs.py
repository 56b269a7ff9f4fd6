"""What comes in: wrong inputs are refused by name, degenerate ones are solved."""

import pytest
import torch

from geomlib.stationary import (
    DissipativeFlow,
    DouglasRachford,
    ForwardBackward,
    NewtonCG,
    Quartic,
    Rectifier,
    SheafGraph,
    adjoint_field,
    edge_gradient,
    energy,
    hessian_product,
    residual,
    solve_stationary,
    stationary_layer,
)

PATHS = ("dense", "sparse")
ALL = [NewtonCG(), ForwardBackward(), ForwardBackward(memory=5), DissipativeFlow(), DouglasRachford()]
TWO = torch.ones(2, dtype=torch.float64)
EDGE = SheafGraph.complete(2, TWO[:1])
POTENTIAL = Quartic(TWO, TWO)
DRIVE = torch.ones(1, 2, 1, dtype=torch.float64)


def with_entry(value, like=DRIVE):
    spoiled = like.clone()
    spoiled[0, 0, 0] = value
    return spoiled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Quartic(TWO, -TWO), "kappa must not be negative"),
        (lambda: Quartic(TWO * torch.nan, TWO), "V must be finite"),
        (lambda: Quartic(TWO, TWO * torch.inf), "kappa must be finite"),
        (lambda: Quartic(TWO, TWO[:1]), "one number a node"),
        (lambda: Quartic(TWO.long(), TWO), "V must be real"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE[0]), "drive must be"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE.long()), "drive must be"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE[:, :1]), "drive must have 2 nodes"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE.float()), "one precision"),
        (lambda: solve_stationary(EDGE, POTENTIAL, with_entry(torch.nan)), "drive must be finite"),
        (lambda: solve_stationary(EDGE, POTENTIAL, with_entry(torch.inf)), "drive must be finite"),
        (lambda: solve_stationary(EDGE, Quartic(TWO[:1], TWO[:1]), DRIVE), "each of the 2 nodes"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE, tol=0.0), "tol must be positive"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE, max_steps=0), "max_steps must be at least 1"),
        (lambda: solve_stationary(EDGE, POTENTIAL, DRIVE, path="fast"), "path must be"),
        (
            lambda: solve_stationary(EDGE, POTENTIAL, DRIVE, start=DRIVE[:0]),
            "start must be shaped like drive",
        ),
        (
            lambda: solve_stationary(EDGE, POTENTIAL, DRIVE, start=with_entry(torch.nan)),
            "start must be finite",
        ),
        (lambda: solve_stationary(EDGE, Rectifier(), DRIVE), "the potential has kinks"),
        (
            lambda: solve_stationary(EDGE.replace(transport=TWO[:1]), POTENTIAL, DRIVE),
            "drive must be complex",
        ),
        (lambda: stationary_layer(EDGE, POTENTIAL, with_entry(torch.nan)), "drive must be finite"),
        (lambda: energy(EDGE, POTENTIAL, with_entry(torch.nan), DRIVE), "drive must be finite"),
        (lambda: residual(EDGE, POTENTIAL, with_entry(torch.nan), DRIVE), "drive must be finite"),
        (lambda: hessian_product(EDGE, POTENTIAL, with_entry(torch.nan), DRIVE), "psi must be finite"),
        (lambda: adjoint_field(EDGE, POTENTIAL, DRIVE, with_entry(torch.nan)), "gradient must be finite"),
        (lambda: edge_gradient(EDGE, DRIVE, DRIVE[:, :1]), "p and psi must be"),
        (lambda: NewtonCG(inner_steps=0), "inner_steps must be at least 1"),
        (lambda: ForwardBackward(step=0.0), "step must be positive"),
        (lambda: ForwardBackward(memory=-1), "memory must not be negative"),
        (lambda: DissipativeFlow(gamma=0.0), "gamma must be positive"),
        (lambda: DouglasRachford(relaxation=2.5), "relaxation must lie in"),
    ],
)
def test_what_cannot_be_worked_with_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("weight", [0.0, None])
def test_without_edges_every_node_settles_on_its_own(path, solver, weight):
    # 2 r + r^3 = 3 at r = 1.
    graph = SheafGraph(3, torch.zeros(2, 0, dtype=torch.int64), TWO[:0])
    if weight is not None:
        graph = SheafGraph.complete(3, torch.zeros(3, dtype=torch.float64))
    three = torch.ones(3, dtype=torch.float64)
    drive = 3 * torch.ones(2, 3, 1, dtype=torch.float64)
    drive[1] = 0.0
    found = solve_stationary(
        graph, Quartic(2 * three, three), drive, solver=solver, path=path, max_steps=2000
    )
    expected = drive / 3
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_components_of_a_graph_do_not_know_each_other(make_layer, path):
    (one, left, f), (two, right, g) = (make_layer("unitary", seed=seed) for seed in (0, 1))
    both = SheafGraph.disjoint_union(one, two)
    potential = Quartic(torch.cat([left.V, right.V]), torch.cat([left.kappa, right.kappa]))
    together = solve_stationary(both, potential, torch.cat([f, g], 1), path=path).value
    apart = [solve_stationary(*layer, path=path).value for layer in ((one, left, f), (two, right, g))]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_one_node_no_edges_many_components(path):
    graph = SheafGraph(1, torch.zeros(2, 0, dtype=torch.int64), TWO[:0])
    w, V = graph.weights.clone().requires_grad_(), TWO[:1].clone().requires_grad_()
    drive = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 1, 5)
    psi = stationary_layer(graph.replace(weights=w), Quartic(V, TWO[:1]), drive, path=path).value
    psi.sum().backward()
    assert w.grad.shape == (0,)
    assert torch.isfinite(V.grad).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ALL, ids=str)
def test_an_empty_batch_is_solved_and_has_a_gradient(path, solver):
    V = TWO.clone().requires_grad_()
    solution = stationary_layer(EDGE, Quartic(V, TWO), DRIVE[:0], solver=solver, path=path)
    assert solution.value.shape == (0, 2, 1)
    assert solution.reason == "converged"
    solution.value.sum().backward()
    assert V.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("path", PATHS)
def test_no_drive_no_state(path, make_layer, kind):
    graph, potential, drive = make_layer(kind)
    solution = solve_stationary(graph, potential, 0 * drive, path=path)
    assert float(solution.value.abs().max()) == 0.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e6, 1e9])
def test_a_huge_drive_is_no_harder(path, size, make_layer, kind):
    graph, potential, drive = make_layer(kind)
    solution = solve_stationary(graph, potential, size * drive, path=path)
    assert int(solution.steps.max()) < 40


@pytest.mark.parametrize("path", PATHS)
def test_a_huge_drive_from_a_bad_start_does_not_overshoot(path, make_layer, kind):
    graph, potential, drive = make_layer(kind)
    drive = 1e6 * drive
    exact = solve_stationary(graph, potential, drive, path=path).value
    cold = solve_stationary(graph, potential, drive, start=torch.zeros_like(drive), path=path).value
    torch.testing.assert_close(cold, exact, rtol=1e-6, atol=1e-6)


def test_the_path_is_chosen_by_size(make_layer):
    from geomlib.stationary.equation import Equation

    for nodes, dense in ((50, True), (51, False)):  # 4 real unknowns a node
        assert Equation(*make_layer("unitary", nodes=nodes, density=0.1)).dense is dense
