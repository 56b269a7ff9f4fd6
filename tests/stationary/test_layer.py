"""Laws of the layer: energy and residual, uniqueness, derivatives, symmetries, memory, precision."""

import math

import pytest
import torch

from geomlib.core import ConvergenceError, real_inner
from geomlib.stationary import (
    DissipativeFlow,
    DouglasRachford,
    ForwardBackward,
    Local,
    NewtonCG,
    Quartic,
    Rectifier,
    SheafGraph,
    Tanh,
    UnstableBranchError,
    adjoint_field,
    dense_hessian,
    edge_gradient,
    energy,
    hessian_product,
    residual,
    solve_stationary,
    stationary_layer,
)
from geomlib.testing import saved_tensor_bytes

PATHS = ("dense", "sparse")
SOLVERS = [
    NewtonCG(),
    ForwardBackward(),
    ForwardBackward(memory=5),
    DouglasRachford(),
    DouglasRachford(relaxation=2.0),
    *(DissipativeFlow(gamma) for gamma in (0.3, 1.0, 3.0)),
]


def gap(a, b):
    return float((a - b).detach().abs().max())


def norm(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def loss_of(psi):
    """Weigh all real coordinates differently: a loss without symmetries."""
    rows = torch.view_as_real(psi).flatten(1) if psi.is_complex() else psi.flatten(1)
    return (rows * torch.linspace(-1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device).sin()).sum()


@pytest.mark.parametrize("path", PATHS)
def test_residual_is_the_gradient_of_the_energy(make_layer, kind, path):
    graph, potential, drive = make_layer(kind)
    psi = (drive * 0.7 + 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(energy(graph, potential, drive, psi).sum(), psi)
    assert gap(slope, residual(graph, potential, drive, psi)) < 1e-12


def test_hessian_is_symmetric_for_the_real_inner_product(make_layer, kind, generator):
    graph, potential, psi = make_layer(kind)
    x, y = (torch.randn(psi.shape, generator=generator, dtype=torch.float64) * (1 + psi) for _ in range(2))
    left = real_inner(y, hessian_product(graph, potential, psi, x))
    assert gap(left, real_inner(x, hessian_product(graph, potential, psi, y))) < 1e-12 * float(
        left.abs().max()
    )


def test_hessian_is_the_derivative_of_the_residual(make_layer, kind):
    graph, potential, psi = make_layer(kind)
    x, h = psi.flip(1), 1e-6
    ahead, behind = (residual(graph, potential, psi, psi + s * h * x) for s in (1, -1))
    assert gap((ahead - behind) / (2 * h), hessian_product(graph, potential, psi, x)) < 1e-6


def test_dense_hessian_multiplies_like_the_product(make_layer, kind):
    graph, potential, psi = make_layer(kind)
    x = psi.flip(0)
    rows = (lambda z: torch.view_as_real(z).flatten(1)) if psi.is_complex() else (lambda z: z.flatten(1))
    product = (dense_hessian(graph, potential, psi) @ rows(x).unsqueeze(2)).squeeze(2)
    assert gap(product, rows(hessian_product(graph, potential, psi, x))) < 1e-12


def test_hessian_of_a_nonlinear_layer_is_not_complex_linear(make_layer):
    graph, potential, psi = make_layer("plain")
    x = psi.flip(1)
    turned = hessian_product(graph, potential, psi, 1j * x)
    assert gap(turned, 1j * hessian_product(graph, potential, psi, x)) > 0.1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_finds_the_one_state_from_every_start(make_layer, solver, path, generator):
    graph, potential, drive = make_layer("unitary", batch=1)
    reference = solve_stationary(graph, potential, drive, tol=1e-12, path="dense").value
    drives = drive.expand(10, -1, -1).contiguous()
    starts = 2 * torch.randn(10, 6, 2, generator=generator, dtype=torch.complex128)
    solution = solve_stationary(
        graph, potential, drives, solver=solver, start=starts, tol=1e-11, max_steps=9000, path=path
    )
    assert gap(solution.value, reference) < 1e-9


def test_states_are_bounded_and_lipschitz_in_the_drive(make_layer):
    for seed in range(100):
        graph, potential, drive = make_layer("phases", mu=0.3, seed=seed)
        other = drive.roll(1, 0)
        psi = solve_stationary(graph, potential, drive).value
        phi = solve_stationary(graph, potential, other).value
        assert (norm(psi) <= norm(drive) / 0.3).all()
        assert (norm(psi - phi) <= norm(drive - other) / 0.3).all()


def test_the_bound_of_a_solution_bounds_its_error(make_layer):
    graph, potential, drive = make_layer("unitary")
    exact = solve_stationary(graph, potential, drive, tol=1e-13).value
    rough = solve_stationary(graph, potential, drive, solver=ForwardBackward(), tol=1e-3)
    error = torch.linalg.vector_norm((rough.value - exact).flatten(1), dim=1)
    size = torch.linalg.vector_norm(rough.value.flatten(1), dim=1)
    assert (error <= rough.bound * (1 + size)).all()
    assert (error > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_equal_finite_differences(path):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    edges = torch.tensor([[0, 0, 1, 2], [1, 3, 2, 3]])
    A = torch.complex(draw(4, 2, 2), draw(4, 2, 2))
    inputs = [draw(4), A, 0.5 + draw(4), draw(4), torch.complex(draw(3, 4, 2), draw(3, 4, 2))]

    def layer(w, A, V, kappa, drive):
        tau = torch.linalg.matrix_exp(A - A.mH)
        graph = SheafGraph(4, edges, w, tau)
        psi = stationary_layer(graph, Quartic(V, kappa), drive, tol=1e-13, path=path).value
        return torch.view_as_real(psi)

    assert torch.autograd.gradcheck(layer, [x.requires_grad_() for x in inputs], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_second_derivatives_equal_finite_differences(path):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(2), draw(2), 0.5 + draw(3), draw(3), torch.complex(draw(1, 3, 1), draw(1, 3, 1))]

    def layer(w, theta, V, kappa, drive):
        graph = SheafGraph(3, torch.tensor([[0, 1], [1, 2]]), w, theta)
        return torch.view_as_real(
            stationary_layer(graph, Quartic(V, kappa), drive, tol=1e-13, path=path).value
        )

    assert torch.autograd.gradgradcheck(layer, [x.requires_grad_() for x in inputs])


def test_derivatives_reach_the_parameters_of_any_local_potential():
    edges, one = torch.tensor([[0], [1]]), torch.ones(1, dtype=torch.float64)

    def layer(a, drive):
        potential = Local(
            lambda psi, a: (a * (1 + psi.square()).sqrt() + psi.square()).sum(2), a, convexity=2.0
        )
        return stationary_layer(SheafGraph(2, edges, one), potential, drive, tol=1e-13).value

    inputs = [0.7 * one, torch.tensor([[[0.3], [-1.0]]], dtype=torch.float64)]
    assert torch.autograd.gradcheck(layer, [x.requires_grad_() for x in inputs])
    assert torch.autograd.gradgradcheck(layer, inputs)


def unrolled(graph, potential, drive, steps):
    """Forward-backward steps with every one of them recorded: the slow reference of the gradient."""
    t = 1 / graph.degrees().max().item()
    psi = torch.zeros_like(drive)
    for _ in range(steps):
        psi = potential.prox(psi - t * (graph.laplacian(psi) - drive), t)
    return psi


def test_gradients_of_the_unrolled_iteration_tend_to_the_implicit_ones(make_layer):
    graph, potential, drive = make_layer("phases", nodes=12, stalk=1)
    inputs = [graph.weights, graph.transport, potential.V, potential.kappa, drive]

    def gradients(solve):
        leaves = [x.clone().requires_grad_() for x in inputs]
        w, theta, V, kappa, f = leaves
        return torch.autograd.grad(
            loss_of(solve(graph.replace(weights=w, transport=theta), Quartic(V, kappa), f)), leaves
        )

    exact = gradients(lambda *layer: stationary_layer(*layer, tol=1e-13).value)
    errors = []
    for steps in (10, 40, 400):
        rough = gradients(lambda *layer, steps=steps: unrolled(*layer, steps))
        errors.append(max(gap(a, b) / float(b.abs().max()) for a, b in zip(rough, exact, strict=True)))
    assert errors[0] > 10 * errors[1]
    assert errors[2] < 1e-6


def test_one_adjoint_field_gives_all_derivatives(make_layer, kind):
    graph, potential, drive = make_layer(kind)
    leaves = [x.clone().requires_grad_() for x in (graph.weights, potential.V, potential.kappa, drive)]
    w, V, kappa, f = leaves
    psi = stationary_layer(graph.replace(weights=w), Quartic(V, kappa), f, tol=1e-13).value
    found = torch.autograd.grad(loss_of(psi), leaves)
    psi = psi.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(psi), psi)
    psi = psi.detach()
    p = adjoint_field(graph, potential, psi, slope)
    along = (p.conj() * psi).real.sum(2)
    formulas = [
        edge_gradient(graph, p, psi),
        along.sum(0),
        (psi.abs().square().sum(2) * along).sum(0),
        -p,
    ]
    for a, b in zip(formulas, found, strict=True):
        assert gap(a, b) < 1e-10


def test_gradient_of_the_transport_is_the_formula(make_layer):
    graph, potential, drive = make_layer("unitary")
    tau = graph.transport.clone().requires_grad_()
    psi = stationary_layer(graph.replace(transport=tau), potential, drive, tol=1e-13).value
    (found,) = torch.autograd.grad(loss_of(psi), tau)
    psi = psi.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(psi), psi)
    psi = psi.detach()
    p = adjoint_field(graph, potential, psi, slope)
    second = graph.edges[1]
    outer = lambda a, b: torch.einsum("bea,bec->eac", a, b.conj())  # noqa: E731
    formula = outer(graph.coboundary(psi), p[:, second]) + outer(graph.coboundary(p), psi[:, second])
    assert gap(found, -graph.weights[:, None, None] * formula) < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_derivative_of_an_absent_edge_is_that_of_its_birth(make_layer, path):
    graph, potential, drive = make_layer("unitary", density=1.0)
    absent = torch.arange(graph.edges.shape[1]) % 3 == 0
    graph = graph.replace(weights=graph.weights.masked_fill(absent, 0.0))
    w = graph.weights.clone().requires_grad_()

    def loss(graph):
        return loss_of(stationary_layer(graph, potential, drive, tol=1e-13, path=path).value)

    (slope,) = torch.autograd.grad(loss(graph.replace(weights=w)), w)
    h = 1e-6
    for e in torch.nonzero(absent).flatten().tolist():
        born = graph.weights.clone()
        born[e] = h
        difference = float(loss(graph.replace(weights=born)) - loss(graph)) / h
        assert difference == pytest.approx(float(slope[e]), rel=1e-4, abs=1e-6)


def test_the_branch_goes_on_smoothly_beyond_a_face(make_layer):
    graph, potential, drive = make_layer("phases", density=1.0)
    e, h = 4, 1e-5

    def loss(weight):
        weights = graph.weights.clone()
        weights[e] = weight
        bent = SheafGraph(graph.nodes, graph.edges, weights, graph.transport, signed=True)
        return float(loss_of(solve_stationary(bent, potential, drive, tol=1e-13).value))

    w = graph.weights.clone()
    w[e] = 0.0
    w.requires_grad_()
    (slope,) = torch.autograd.grad(
        loss_of(stationary_layer(graph.replace(weights=w), potential, drive, tol=1e-13).value), w
    )
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(float(slope[e]), rel=1e-7)


def test_layer_is_covariant_under_changes_of_gauge(make_layer, generator):
    graph, potential, drive = make_layer("unitary")
    draws = torch.randn(2, 6, 2, 2, generator=generator, dtype=torch.float64)
    g = torch.linalg.qr(torch.complex(*draws))[0]
    first, second = graph.edges
    turned = graph.replace(transport=g[first] @ graph.transport @ g[second].mH)
    act = lambda psi: torch.einsum("nab,Bnb->Bna", g, psi)  # noqa: E731
    psi = solve_stationary(graph, potential, drive, tol=1e-13).value
    assert gap(solve_stationary(turned, potential, act(drive), tol=1e-13).value, act(psi)) < 1e-10


def test_layer_and_gradient_do_not_depend_on_the_numbering(make_layer, generator):
    graph, potential, drive = make_layer("real")
    order = torch.randperm(6, generator=generator)  # new node i is old node order[i]
    place = torch.argsort(order)
    ends = place[graph.edges]
    renamed = SheafGraph(6, ends.sort(0).values, graph.weights)
    psi = solve_stationary(graph, potential, drive, tol=1e-13).value
    moved = Quartic(potential.V[order], potential.kappa[order])
    phi = solve_stationary(renamed, moved, drive[:, order], tol=1e-13).value
    assert gap(phi, psi[:, order]) < 1e-10
    p = adjoint_field(graph, potential, psi, psi.cos())
    q = adjoint_field(renamed, moved, phi, phi.cos())
    assert gap(edge_gradient(graph, p, psi), edge_gradient(renamed, q, phi)) < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_memory_does_not_grow_with_the_steps_and_is_a_hundredth_of_unrolling(make_layer, path):
    graph, potential, drive = make_layer("phases", nodes=24, stalk=3)

    def leaves():
        w, V = graph.weights.clone().requires_grad_(), potential.V.clone().requires_grad_()
        return graph.replace(weights=w), Quartic(V, potential.kappa), drive

    kept = {}
    for solver in (NewtonCG(), ForwardBackward(), DissipativeFlow()):
        options = {"solver": solver, "max_steps": 5000, "path": path}
        kept[solver] = saved_tensor_bytes(
            lambda options=options: stationary_layer(*leaves(), **options).value
        )
    assert len(set(kept.values())) == 1
    assert saved_tensor_bytes(lambda: unrolled(*leaves(), 400)) >= 100 * kept[NewtonCG()]


@pytest.mark.parametrize("path", PATHS)
def test_half_the_precision_reaches_its_floor_and_has_finite_gradients(make_layer, kind, path, device):
    graph, potential, drive = make_layer(kind, dtype=torch.float32)
    graph = graph.to(device)
    w = graph.weights.clone().requires_grad_()
    V, kappa = potential.V.to(device).requires_grad_(), potential.kappa.to(device)
    solution = stationary_layer(
        graph.replace(weights=w), Quartic(V, kappa), drive.to(device), tol=1e-5, adjoint_tol=1e-5, path=path
    )
    assert float(solution.residual.max()) <= 1e-5
    loss_of(solution.value).backward()
    assert bool(torch.isfinite(w.grad).all())
    assert bool(torch.isfinite(V.grad).all())
    double = make_layer(kind)
    exact = solve_stationary(*double).value
    torch.testing.assert_close(solution.value.detach().cpu().to(exact.dtype), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_samples_of_a_batch_do_not_know_each_other(make_layer, kind, path):
    graph, potential, drive = make_layer(kind, batch=4)
    drive = drive * torch.tensor([1e-3, 1.0, 30.0, 0.0])[:, None, None]
    together = solve_stationary(graph, potential, drive, path=path)
    for i in range(4):
        alone = solve_stationary(graph, potential, drive[i : i + 1], path=path)
        assert gap(alone.value[0], together.value[i]) < 1e-8
    assert int(together.steps.min()) < int(together.steps.max())


def test_a_tanh_layer_without_edges_is_tanh():
    drive = torch.linspace(-4, 4, 12, dtype=torch.float64).view(2, 3, 2)
    graph = SheafGraph.complete(3, torch.zeros(3, dtype=torch.float64))
    assert gap(solve_stationary(graph, Tanh(), drive, tol=1e-12).value, drive.tanh()) < 1e-12


@pytest.mark.parametrize("solver", [ForwardBackward(), DouglasRachford()], ids=str)
def test_a_rectified_layer_without_edges_is_relu(solver):
    drive = torch.linspace(-4, 4, 12, dtype=torch.float64).view(2, 3, 2)
    graph = SheafGraph.complete(3, torch.zeros(3, dtype=torch.float64))
    found = solve_stationary(graph, Rectifier(), drive, solver=solver, max_steps=500).value
    assert gap(found, drive.relu()) < 1e-9


@pytest.mark.parametrize("solver", [ForwardBackward(), DouglasRachford(), NewtonCG()], ids=str)
def test_a_tanh_layer_with_edges_solves_its_equation(make_layer, solver):
    graph, _, drive = make_layer("real")
    psi = solve_stationary(graph, Tanh(), 3 * drive, solver=solver, max_steps=2000, tol=1e-9).value
    assert gap(graph.laplacian(psi) + psi.atanh(), 3 * drive) < 1e-7


def test_a_missed_solve_has_no_gradient(make_layer):
    graph, potential, drive = make_layer("real")
    f = drive.clone().requires_grad_()
    with pytest.warns(UserWarning, match="stationary state not reached"):
        solution = stationary_layer(graph, potential, f, solver=ForwardBackward(), max_steps=3, throw=False)
    assert not bool(solution.converged.any())
    with pytest.raises(ConvergenceError, match="have no gradient"):
        solution.value.sum().backward()


def test_a_missed_solve_raises_with_its_evidence(make_layer):
    with pytest.raises(ConvergenceError, match="after 3 steps") as caught:
        solve_stationary(*make_layer("real"), solver=ForwardBackward(), max_steps=3)
    assert caught.value.steps == 3
    assert math.isfinite(caught.value.rate)


@pytest.mark.parametrize("path", PATHS)
def test_backward_off_a_stable_branch_raises(path):
    # The root of -3 r + r^3 = 1/2 against the drive is stable along the real line and not across it.
    one = torch.ones(1, dtype=torch.float64)
    node, potential = SheafGraph.complete(1, one[:0]), Quartic(-3 * one, one)
    drive = (0.5 * one).to(torch.complex128).view(1, 1, 1).requires_grad_()
    against = torch.full((1, 1, 1), -1.6, dtype=torch.complex128)
    solver = ForwardBackward(step=0.1)  # it stays on the real line, where it starts
    solution = stationary_layer(node, potential, drive, solver=solver, start=against, path=path)
    assert float(solution.value.detach().real) < -1
    with pytest.raises(UnstableBranchError, match="not on a stable branch"):
        solution.value.real.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_backward_on_an_orbit_of_minimisers_raises(path, generator):
    # Without a drive every minimiser may be turned in phase: the Hessian is singular along i psi.
    graph = SheafGraph.complete(3, torch.ones(3, dtype=torch.float64))
    V = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    start = torch.complex(*torch.randn(2, 1, 3, 1, generator=generator, dtype=torch.float64))
    solution = stationary_layer(
        graph, Quartic(V, -V.detach()), torch.zeros_like(start), start=start, path=path, max_steps=2000
    )
    assert float(solution.value.abs().min()) > 0.9
    with pytest.raises(UnstableBranchError):
        solution.value.abs().sum().backward()
