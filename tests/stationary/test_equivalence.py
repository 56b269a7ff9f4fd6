"""Laws of the lifts: each target computes the same function, or is flagged (SGN-R1 to R3 and R6 to R8)."""

import math

import pytest
import torch

from geomlib.core import ConvergenceError
from geomlib.stationary import ForwardBackward, Local, Quartic, SheafGraph, Tanh, residual, solve_stationary
from geomlib.stationary.dilation import halmos, unitary_pair
from geomlib.stationary.equivalence import (
    mlp_to_supra,
    sheaf_gauge_trivialise,
    stack_to_supra,
    supra_to_stack,
    symmetric_to_sheaf,
)
from geomlib.stationary.lifts import LiftedPotential
from geomlib.stationary.relaxations import SymmetricEnergy
from geomlib.stationary.resolvent import Resolvent, graph_to_resolvent, resolvent_to_sheaf
from geomlib.stationary.supra import SupraGraph

SAME = 1e-10


def randn(*shape, generator, dtype=torch.complex128):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def draw_layer(generator, n=6, d=1, kappa=0.5, dtype=torch.complex128):
    candidates = torch.triu_indices(n, n, 1)
    edges = candidates[:, torch.rand(candidates.shape[1], generator=generator) < 0.6]
    count = edges.shape[1]
    weights = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
    transport = torch.linalg.qr(randn(count, d, d, generator=generator, dtype=dtype)).Q
    V = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    drive = 2 * randn(3, n, d, generator=generator, dtype=dtype)
    return SheafGraph(n, edges, weights, transport), Quartic(V, torch.full_like(V, kappa)), drive


def solve(layer, drive, **options):
    return solve_stationary(*layer, drive, **{"tol": 1e-13, **options}).value


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64], ids=["complex", "real"])
@pytest.mark.parametrize("d", [1, 2])
def test_a_layer_is_a_resolvent(generator, d, dtype):
    graph, potential, drive = draw_layer(generator, d=d, dtype=dtype)
    found = graph_to_resolvent(graph, potential, stalk=d, mu=float(potential.V.min()))
    exact = solve((graph, potential), drive)
    for start in (None, 5 * randn(*drive.shape, generator=generator, dtype=dtype)):
        value = found.target(found.drive(drive), start=start).value
        assert (found.pull(value) - exact).abs().max() < SAME
    assert found.admissible
    assert found.lambda_min >= 1


def test_a_layer_with_any_convex_potential_is_a_resolvent(generator):
    graph, _, drive = draw_layer(generator, dtype=torch.float64)
    drive = drive / 4
    found = graph_to_resolvent(graph, Tanh(), mu=0.9)
    value = found.target(found.drive(drive), step=0.5).value
    assert (value - solve((graph, Tanh()), drive)).abs().max() < SAME


def test_mu_beyond_the_convexity_is_refused(generator):
    graph, potential, _ = draw_layer(generator)
    for mu in (0.0, float(potential.V.min()) + 0.01):
        with pytest.raises(ValueError, match="mu must be positive and at most"):
            graph_to_resolvent(graph, potential, mu=mu)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64], ids=["complex", "real"])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_resolvent_with_any_hermitian_matrix_is_a_sheaf(generator, d, dtype):
    n = 4
    A = randn(n * d, n * d, generator=generator, dtype=dtype)
    M = (A + A.mH) / 2
    M = M - (float(torch.linalg.eigvalsh(M).min()) + 0.4) * torch.eye(n * d, dtype=dtype)  # I + M >= 0.6
    phi = Quartic(
        torch.zeros(n, dtype=torch.float64), torch.rand(n, generator=generator, dtype=torch.float64)
    )
    found = resolvent_to_sheaf(M, phi, stalk=d)
    kind = torch.complex128 if d > 1 else dtype
    q = 2 * randn(3, n, d, generator=generator, dtype=kind)
    exact = Resolvent(M.to(kind), phi, (n, d))(q).value
    start = 5 * randn(*q.shape, generator=generator, dtype=kind)
    assert (solve(found.target, q, start=start) - exact).abs().max() < SAME
    assert found.admissible
    assert found.lambda_min == pytest.approx(0.6, abs=1e-12)
    assert (found.target.graph.weights > 0).all()


@pytest.mark.parametrize("d", [1, 3])
def test_the_matrix_of_a_resolvent_is_rebuilt_from_the_sheaf(generator, d):
    A = randn(4 * d, 4 * d, generator=generator)
    M = (A + A.mH) / 2
    found = resolvent_to_sheaf(M, Local(lambda psi: psi.abs().square().sum(2) / 2, convexity=1.0), stalk=d)
    rebuilt = found.target.graph.dense_laplacian(d) + torch.block_diag(*found.deficit)
    assert (rebuilt - M).abs().max() < 1e-13


def test_blocks_that_are_unitary_up_to_scale_become_single_edges(generator):
    graph, potential, drive = draw_layer(generator, d=2)
    resolvent = graph_to_resolvent(graph, potential, stalk=2, mu=0.5)
    back = resolvent_to_sheaf(resolvent.target.matrix, resolvent.target.potential, stalk=2)
    assert back.target.graph.edges.shape == graph.edges.shape
    assert (solve(back.target, resolvent.drive(drive)) - solve((graph, potential), drive)).abs().max() < SAME
    other = randn(12, 12, generator=generator)
    doubled = resolvent_to_sheaf(other + other.mH, potential, stalk=2).target.graph
    assert doubled.edges.shape[1] == 2 * 15


def test_a_resolvent_that_is_not_strongly_monotone_is_flagged():
    zero = torch.zeros(2, dtype=torch.float64)
    M = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    found = resolvent_to_sheaf(M, Quartic(zero, zero))
    assert not found.admissible
    assert found.lambda_min == pytest.approx(-1)
    with pytest.raises(ValueError, match="positive definite"):
        Resolvent(M, Quartic(zero, zero), (2, 1))(torch.ones(1, 2, 1, dtype=torch.float64))


def test_a_matrix_that_is_not_hermitian_is_refused():
    skew = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    flat = Quartic(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="matrix must be Hermitian"):
        resolvent_to_sheaf(skew, flat)
    with pytest.raises(ValueError, match="matrix must be Hermitian"):
        Resolvent(skew, flat, (2, 1))
    with pytest.raises(ValueError, match="matrix must be square"):
        resolvent_to_sheaf(skew[:1], flat)
    with pytest.raises(ValueError, match="stalk must divide"):
        resolvent_to_sheaf(torch.eye(3), flat, stalk=2)
    with pytest.raises(ValueError, match=r"matrix must be \(4, 4\)"):
        Resolvent(torch.eye(2), flat, (2, 2))


def test_a_resolvent_that_is_cut_short_says_so(generator):
    graph, potential, drive = draw_layer(generator)
    found = graph_to_resolvent(graph, potential, mu=0.5)
    with pytest.raises(ConvergenceError, match="resolvent"):
        found.target(found.drive(drive), max_steps=3)


def flat_connection(graph, d, generator):
    gauge = torch.linalg.qr(randn(graph.nodes, d, d, generator=generator)).Q
    u, v = graph.edges
    return graph.replace(transport=gauge[u] @ gauge[v].mH)


@pytest.mark.parametrize("d", [1, 3])
def test_a_flat_connection_is_a_gauge(generator, d):
    graph, potential, drive = draw_layer(generator, d=d)
    flat = flat_connection(graph, d, generator)
    found = sheaf_gauge_trivialise(flat, potential, stalk=d)
    assert found.admissible
    assert float(found.deficit) < 1e-13
    assert found.target.graph.transport is None
    value = solve(found.target, found.drive(drive), start=5 * randn(*drive.shape, generator=generator))
    assert (found.pull(value) - solve((flat, potential), drive)).abs().max() < 1e-12
    torch.testing.assert_close(found.pull(found.lift(drive)), drive)


def test_a_potential_that_is_not_radial_is_transported(generator):
    graph, _, drive = draw_layer(generator, d=2)
    flat = flat_connection(graph, 2, generator)
    local = Local(lambda psi: psi.abs().square().sum(2) + psi.real.cosh().sum(2), convexity=2.0)
    found = sheaf_gauge_trivialise(flat, local, stalk=2)
    value = solve(found.target, found.drive(drive), tol=1e-12)
    assert (found.pull(value) - solve((flat, local), drive, tol=1e-12)).abs().max() < SAME


def test_forests_dead_edges_and_real_signs_have_a_gauge(generator):
    edges = torch.tensor([[0, 1, 0, 3], [1, 2, 2, 4]])  # a triangle with one dead edge, an edge, a lone node
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None, None]
    V = torch.ones(6, dtype=torch.float64)
    signed = SheafGraph(6, edges, weights, signs)
    found = sheaf_gauge_trivialise(signed, Quartic(V, V))
    drive = randn(2, 6, 1, generator=generator, dtype=torch.float64)
    assert found.admissible
    value = found.pull(solve(found.target, found.drive(drive)))
    assert (value - solve((signed, Quartic(V, V)), drive)).abs().max() < SAME


def test_a_holonomy_is_found_and_flagged(generator):
    edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    one = torch.ones(3, dtype=torch.float64)
    curved = SheafGraph(3, edges, one, torch.tensor([0.0, 0.0, 0.4], dtype=torch.float64))
    found = sheaf_gauge_trivialise(curved, Quartic(one, one))
    assert not found.admissible
    assert float(found.deficit) == pytest.approx(abs(1 - complex(math.cos(0.4), math.sin(0.4))))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64], ids=["complex", "real"])
@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (3, 1), (2, 0)])
def test_any_matrix_is_a_corner_of_a_unitary(generator, shape, dtype):
    K = randn(*shape, generator=generator, dtype=dtype)
    found = halmos(K)
    size = sum(shape)
    Q = found.target
    assert (Q @ Q.mH - torch.eye(size, dtype=dtype)).abs().max() < 1e-11
    x = randn(7, shape[1], generator=generator, dtype=dtype)
    assert (found.pull(found.lift(x) @ Q.mT) - x @ K.mT).abs().max() < 1e-12


def test_a_dilation_of_a_unitary_of_zero_and_of_a_larger_scale(generator):
    unitary = torch.linalg.qr(randn(4, 4, generator=generator)).Q
    zero = torch.zeros(2, 3, dtype=torch.float64)
    for K, options in ((unitary, {}), (zero, {}), (unitary, {"scale": 3.0})):
        found = halmos(K, **options)
        Q = found.target
        assert (Q @ Q.mH - torch.eye(len(Q), dtype=Q.dtype)).abs().max() < 1e-12
        x = randn(3, K.shape[1], generator=generator, dtype=K.dtype)
        assert (found.pull(found.lift(x) @ Q.mT) - x @ K.mT).abs().max() < 1e-12
    with pytest.raises(ValueError, match="scale must be at least"):
        halmos(unitary, scale=0.5)
    with pytest.raises(ValueError, match="K must have shape"):
        halmos(zero[0])
    with pytest.raises(ValueError, match="K must be finite"):
        halmos(zero * math.nan)


def test_any_matrix_is_a_mean_of_two_unitaries(generator):
    X = randn(5, 3, 3, generator=generator)
    X[0] = 0
    X[1] = 2 * torch.linalg.qr(X[1]).Q
    c, first, second = unitary_pair(X)
    rebuilt = c[:, None, None] / 2 * (first + second)
    assert (rebuilt - X).abs().max() < 1e-13
    for U in (first, second):
        assert (U @ U.mH - torch.eye(3)).abs().max() < 1e-13
    assert torch.equal(first[1], second[1])
    assert c[0] == 0
    with pytest.raises(ValueError, match="X must have shape"):
        unitary_pair(X[:, :2])


def test_a_stack_whose_maps_are_dilated_computes_the_same(generator):
    """Maps of the sheaf class are scale, projection, unitary, zero-padding; composed they are any map."""
    first, second = draw_layer(generator), draw_layer(generator, n=5)
    K = randn(5, 6, generator=generator)
    state = solve(first[:2], first[2])
    dilation = halmos(K)
    drive = dilation.pull(dilation.lift(state.flatten(1)) @ dilation.target.mT)[..., None]
    supra = SupraGraph([first[:2], second[:2]], [torch.eye(6, dtype=K.dtype), K])
    found = supra.split(supra.solve(first[2], tol=1e-13).value)[1]
    assert (solve(second[:2], drive) - found).abs().max() < SAME


def test_a_stack_and_its_supra_graph_are_one_function(generator):
    layers = [draw_layer(generator, n=n)[:2] for n in (5, 4)]
    maps = [randn(5, 3, generator=generator), randn(4, 5, generator=generator)]
    biases = [randn(5, 1, generator=generator), None]
    x = randn(3, 3, generator=generator)
    found = stack_to_supra(layers, maps, biases)
    back = supra_to_stack(found.target)
    state = x
    for layer, K, b in zip(*back, strict=True):
        state = solve(layer, (state.flatten(1) @ K.mT)[..., None] + b)
    assert (found.pull(found.target.solve_global(x).value)[-1] - state).abs().max() < SAME
    assert found.admissible
    assert found.lambda_min >= min(float(p.V.min()) for _, p in layers)
    assert found.target.join(found.pull(found.lift(found.pull(found.target.zeros(1))))).shape == (1, 9)


def test_a_supra_graph_with_symmetric_feedback_is_one_sheaf_layer(generator):
    layers = [draw_layer(generator, n=n)[:2] for n in (5, 4, 3)]
    maps = [randn(n, m, generator=generator) / 2 for n, m in ((5, 3), (4, 5), (3, 4))]
    supra = SupraGraph(layers, maps, [randn(n, 1, generator=generator) for n in (5, 4, 3)])
    x, relaxation = randn(2, 3, generator=generator), SymmetricEnergy(supra)
    for strength in (30.0, 1000.0):
        found = symmetric_to_sheaf(relaxation, strength)
        assert found.admissible
        start = 3 * randn(2, supra.size, 1, generator=generator)
        value = found.pull(solve(found.target, found.drive(x), start=start))
        assert (value - relaxation.solve(x, strength).value).abs().max() < 1e-8 * strength
        assert (found.pull(found.lift(value)) - value).abs().max() < 1e-12
    assert not symmetric_to_sheaf(relaxation, 0.01).admissible
    wide = SupraGraph([draw_layer(generator, d=2)[:2]], [randn(12, 3, generator=generator)])
    with pytest.raises(ValueError, match="stalk 1 and quartic"):
        symmetric_to_sheaf(SymmetricEnergy(wide), 10.0)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_perceptron_is_a_stack_without_edges(generator, activation):
    widths = [4, 6, 5]
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [randn(*pair, generator=generator, dtype=torch.float64) / 2 for pair in pairs]
    biases = [randn(rows, generator=generator, dtype=torch.float64) / 2 for rows, _ in pairs]
    x = randn(8, 4, generator=generator, dtype=torch.float64)
    supra = mlp_to_supra(weights, biases, activation=activation)
    assert all(graph.edges.shape == (2, 0) for graph, _ in supra.layers)
    hidden = x
    for W, b in zip(weights, biases, strict=True):
        hidden = getattr(torch, activation)(hidden @ W.T + b)
    solver = {} if activation == "tanh" else {"solver": ForwardBackward()}
    found = supra.split(supra.solve(x, tol=1e-14 if solver else 1e-12, **solver).value)[-1]
    assert (found[..., 0] - hidden).abs().max() < 1e-12


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be one of tanh, relu"):
        mlp_to_supra([torch.ones(1, 1)], [torch.ones(1)], activation="sin")


def test_a_lifted_potential_is_consistent(generator):
    blocks = randn(4, 2, 2, generator=generator)
    base = Quartic(torch.rand(4, generator=generator).double(), torch.rand(4, generator=generator).double())
    gauge = torch.linalg.qr(randn(4, 2, 2, generator=generator)).Q
    lifted = LiftedPotential(
        base,
        lambda psi: torch.einsum("vab,nvb->nva", gauge, psi),
        lambda psi: torch.einsum("vba,nvb->nva", gauge.conj(), psi),
        shift=blocks + blocks.mH,
        scale=0.7,
    )
    psi, x = (randn(3, 4, 2, generator=generator) for _ in range(2))
    here = psi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lifted.value(here).sum(), here)
    torch.testing.assert_close(lifted.gradient(psi), gradient)
    step = 1e-6
    ahead, behind = (lifted.gradient(psi + s * x) for s in (step, -step))
    assert ((ahead - behind) / (2 * step) - lifted.hessian_product(psi, x)).abs().max() < 1e-7
    flat = LiftedPotential(base, shift=0.3, scale=0.7)
    z = flat.prox(x, 0.5)
    assert (z + 0.5 * flat.gradient(z) - x).abs().max() < 1e-12
    assert float(flat.convexity()) == pytest.approx(0.7 * float(base.V.min()) + 0.3)
    with pytest.raises(NotImplementedError, match="one number"):
        lifted.prox(x, 0.5)
    with pytest.raises(ValueError, match="keep 1"):
        LiftedPotential(base, shift=-3.0).prox(x, 0.5)
    for options in ({"copies": 0}, {"scale": 0.0}, {"shift": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LiftedPotential(base, **options)


def test_lifted_states_solve_the_lifted_equation(generator):
    graph, potential, drive = draw_layer(generator)
    flat = flat_connection(graph, 1, generator)
    found = sheaf_gauge_trivialise(flat, potential)
    psi = randn(*drive.shape, generator=generator)
    lifted = residual(*found.target, found.drive(drive), found.lift(psi))
    torch.testing.assert_close(lifted, found.lift(residual(flat, potential, drive, psi)))


def test_targets_live_where_their_sources_do(device, generator):
    graph, potential, drive = draw_layer(generator, dtype=torch.float64)
    there = graph.to(device), Quartic(potential.V.to(device), potential.kappa.to(device))
    drive_there, exact = drive.to(device), solve((graph, potential), drive)
    resolvent = graph_to_resolvent(*there, mu=0.5)
    value = resolvent.target(resolvent.drive(drive_there)).value
    assert (value.cpu() - exact).abs().max() < SAME
    back = resolvent_to_sheaf(resolvent.target.matrix, resolvent.target.potential)
    assert (solve(back.target, resolvent.drive(drive_there)).cpu() - exact).abs().max() < SAME
    K = torch.eye(4, 3, dtype=torch.float64).to(device)
    found = halmos(K)
    assert (
        found.pull(found.lift(K) @ found.target.mT).cpu() - torch.eye(4, 3) @ torch.eye(4, 3).T
    ).abs().max() < 1e-12
