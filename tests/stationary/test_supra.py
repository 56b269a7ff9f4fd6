"""Laws of the stack as one equation: one solution, one adjoint, stable without an energy (SGN-S1 to S4)."""

import math

import pytest
import torch

from geomlib.core import ConvergenceError, real_inner
from geomlib.stationary import (
    DissipativeFlow,
    ForwardBackward,
    Local,
    Quartic,
    SheafGraph,
    adjoint_field,
    dense_hessian,
    edge_gradient,
    stationary_layer,
)
from geomlib.stationary.assembly import as_real, like_state
from geomlib.stationary.cascade import inverse_bound, monotonicity, monotonicity_bound, supra_flow
from geomlib.stationary.supra import SupraGraph

MU, NORM = 0.8, 1.2


def draw_graph(n, d, generator, real=False):
    candidates = torch.triu_indices(n, n, 1)
    edges = candidates[:, torch.rand(candidates.shape[1], generator=generator) < 0.6]
    count = edges.shape[1]
    weights = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
    dtype = torch.float64 if real else torch.complex128
    transport = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=dtype)).Q
    return SheafGraph(n, edges, weights, transport)


def draw_stack(generator, nodes=(6, 5, 4), d=2, real=False, kappa=0.5, inputs=3, norm=NORM):
    dtype = torch.float64 if real else torch.complex128
    layers, maps, biases, columns = [], [], [], inputs
    for n in nodes:
        V = MU + torch.rand(n, generator=generator, dtype=torch.float64)
        V[0] = MU
        layers.append((draw_graph(n, d, generator, real), Quartic(V, torch.full_like(V, kappa))))
        K = torch.randn(n * d, columns, generator=generator, dtype=dtype)
        maps.append(norm * K / torch.linalg.matrix_norm(K, 2))
        biases.append(0.3 * torch.randn(n, d, generator=generator, dtype=dtype))
        columns = n * d
    x = 2 * torch.randn(3, inputs, generator=generator, dtype=dtype)
    return SupraGraph(layers, maps, biases), x


@pytest.fixture(params=[False, True], ids=["complex", "real"])
def stack(request, generator):
    return draw_stack(generator, real=request.param)


def random_state(supra, batch=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, supra.size, generator=draw, dtype=supra.maps[0].dtype)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_newton_on_the_whole_system_finds_the_forward_pass(stack, path):
    supra, x = stack
    forward = supra.solve(x, tol=1e-14, throw=False).value
    for start in (None, 3 * random_state(supra)):
        whole = supra.solve_global(x, start=start, path=path).value
        assert (whole - forward).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DissipativeFlow(gamma=1.0), ForwardBackward()])
def test_the_solution_does_not_depend_on_the_solver(stack, solver):
    supra, x = stack
    forward = supra.solve(x).value
    other = supra.solve(x, solver=solver, tol=1e-11, max_steps=20_000).value
    assert (other - forward).abs().max() < 1e-9


def test_the_forward_pass_is_the_chain_of_layers(stack):
    supra, x = stack
    state, parts = x, []
    for (graph, potential), K, b in zip(supra.layers, supra.maps, supra.biases, strict=True):
        drive = (state.flatten(1) @ K.mT).view(len(x), graph.nodes, -1) + b
        state = stationary_layer(graph, potential, drive, tol=1e-13).value
        parts.append(state)
    solution = supra.solve(x, tol=1e-13)
    assert (supra.join(parts) - solution.value).abs().max() < 1e-12
    for part, cut in zip(parts, supra.split(solution.value), strict=True):
        assert part.shape == cut.shape
    assert solution.converged.all()
    assert solution.residual.max() < 1e-12


def test_the_derivative_is_that_of_the_residual(stack):
    supra, x = stack
    psi = random_state(supra)

    def f(flat):
        return as_real(supra.residual(like_state(flat, psi[:1]), x[:1]))

    exact = torch.autograd.functional.jacobian(f, as_real(psi[:1]))[0, :, 0]
    torch.testing.assert_close(supra.dense(psi[:1])[0], exact, rtol=0, atol=1e-12)


def test_the_derivative_is_block_lower_bidiagonal(stack):
    supra, _ = stack
    psi = random_state(supra)
    size = supra.dense(psi).shape[1] // supra.size
    blocks = supra.dense(psi).split([size * n for n in supra.sizes], 1)
    for row, block in enumerate(blocks):
        for column, part in enumerate(block.split([size * n for n in supra.sizes], 2)):
            if column not in (row, row - 1):
                assert not part.any()
            if column == row:
                graph, potential = supra.layers[row]
                state = supra.split(psi)[row]
                torch.testing.assert_close(part, dense_hessian(graph, potential, state), rtol=0, atol=1e-12)


def test_the_pulled_back_product_is_the_adjoint_of_the_pushed_one(stack):
    supra, _ = stack
    psi, v, w = (random_state(supra, seed=seed) for seed in range(3))
    gap = real_inner(supra.jvp(psi, v), w) - real_inner(v, supra.vjp(psi, w))
    assert gap.abs().max() < 1e-12 * real_inner(v, v).max()


def test_the_sparse_matrix_is_the_dense_one_and_its_entries_are_counted(stack):
    supra, _ = stack
    psi = random_state(supra, batch=1)
    matrix = supra.sparse(psi)
    dense = torch.from_numpy(matrix.toarray())
    torch.testing.assert_close(dense, supra.dense(psi)[0], rtol=0, atol=1e-12)
    if psi.is_complex():
        dense = dense.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).abs().amax((1, 3))
    assert supra.nonzeros() == int((dense != 0).sum())


def test_a_potential_of_any_form_is_assembled(generator):
    supra, _ = draw_stack(generator)
    local = Local(lambda psi: (psi.abs() ** 2).sum(2) + psi.real.cosh().sum(2), convexity=1.0)
    other = SupraGraph([(graph, local) for graph, _ in supra.layers], supra.maps, supra.biases)
    psi = random_state(other, batch=1)
    sparse = torch.from_numpy(other.sparse(psi).toarray())
    torch.testing.assert_close(sparse, other.dense(psi)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.1])
def test_a_weighted_norm_makes_the_whole_strongly_monotone(stack, epsilon):
    supra, x = stack
    for psi in (supra.solve(x).value, random_state(supra)):
        bound = monotonicity_bound(MU, NORM, len(supra), epsilon)
        assert monotonicity(supra, psi, epsilon).min() >= bound
    assert monotonicity_bound(MU, NORM, len(supra), 0.1) > 0


def test_the_bound_of_the_weighted_norm_is_attained_without_edges_and_curvature():
    layers = []
    for _ in range(4):
        flat = torch.full((1,), MU, dtype=torch.float64)
        layers.append((SheafGraph.complete(1, flat[:0]), Quartic(flat, 0 * flat)))
    supra = SupraGraph(layers, [torch.full((1, 1), NORM, dtype=torch.float64)] * 4)
    found = monotonicity(supra, supra.zeros(1), 0.5)
    assert float(found) == pytest.approx(monotonicity_bound(MU, NORM, 4, 0.5), abs=1e-12)


def test_the_inverse_is_bounded_by_the_constants_of_the_layers(stack):
    supra, x = stack
    for psi in (supra.solve(x).value, random_state(supra)):
        smallest = torch.linalg.svdvals(supra.dense(psi)).amin(1)
        assert (1 / smallest).max() <= inverse_bound(MU, NORM, len(supra))


def test_the_global_flow_is_stable_with_the_spectra_of_the_layers(generator):
    supra, x = draw_stack(generator)
    psi, gamma = supra.solve(x[:1]).value, 0.3
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)

    def spectrum(matrix):
        i = torch.block_diag(*[turn] * (len(matrix) // 2))
        return torch.linalg.eigvals((gamma * torch.eye(len(matrix), dtype=torch.float64) + i) @ matrix)

    whole = spectrum(supra.dense(psi)[0])
    parts = [
        spectrum(dense_hessian(graph, potential, state)[0])
        for (graph, potential), state in zip(supra.layers, supra.split(psi), strict=True)
    ]
    assert whole.real.min() > 0
    distance = (whole[:, None] - torch.cat(parts)).abs()
    # Eigenvalues of a triangular matrix that is not normal are known to the root of rounding only.
    assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-6


def test_the_global_flow_ends_at_the_forward_pass(stack):
    supra, x = stack
    end = supra_flow(supra, x, gamma=1.0, step=0.05, steps=900, start=random_state(supra))
    assert (end - supra.solve(x).value).abs().max() < 1e-9


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("readers", ["last", "all"])
def test_back_propagation_is_the_adjoint_of_the_whole_system(stack, path, readers):
    supra, x = stack
    psi, gradient = supra.solve(x, tol=1e-13).value, random_state(supra)
    if readers == "last":
        gradient[:, : -supra.sizes[-1]] = 0
    layerwise = supra.adjoint(psi, gradient)
    assert (layerwise - supra.adjoint_global(psi, gradient, path=path)).abs().max() < 1e-12
    assert (supra.vjp(psi, layerwise) + gradient).abs().max() < 1e-11


def chain(supra, x, weights, V, kappa, maps):
    state = x
    for (graph, _), w, v, k, K, b in zip(supra.layers, weights, V, kappa, maps, supra.biases, strict=True):
        drive = (state.flatten(1) @ K.mT).view(len(x), graph.nodes, -1) + b
        state = stationary_layer(graph.replace(weights=w), Quartic(v, k), drive, tol=1e-13).value
    return state


def test_gradients_of_all_parameters_are_those_of_autograd_through_the_layers(stack):
    supra, x = stack
    weights = [graph.weights.clone().requires_grad_() for graph, _ in supra.layers]
    V = [potential.V.clone().requires_grad_() for _, potential in supra.layers]
    kappa = [potential.kappa.clone().requires_grad_() for _, potential in supra.layers]
    maps = [K.clone().requires_grad_() for K in supra.maps]
    parameters = [*weights, *V, *kappa, *maps]
    layers = [
        (graph.replace(weights=w), Quartic(v, k))
        for (graph, _), w, v, k in zip(supra.layers, weights, V, kappa, strict=True)
    ]
    learned = SupraGraph(layers, maps, supra.biases)
    target = random_state(supra)[:, -supra.sizes[-1] :]
    answer = chain(supra, x, weights, V, kappa, maps)
    expected = torch.autograd.grad((answer.flatten(1) - target).abs().square().sum() / 2, parameters)
    psi = supra.solve(x, tol=1e-13).value
    gradient = torch.zeros_like(psi)
    gradient[:, -supra.sizes[-1] :] = psi[:, -supra.sizes[-1] :] - target
    p = learned.adjoint(psi, gradient)
    found = learned.parameter_gradient(p, psi, x, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    states, fields = supra.split(psi), supra.split(p)
    torch.testing.assert_close(found[-1], -fields[-1].flatten(1).mT @ states[-2].flatten(1).conj())
    for (graph, _), field, state, ours in zip(supra.layers, fields, states, found, strict=False):
        torch.testing.assert_close(edge_gradient(graph, field, state), ours, rtol=1e-9, atol=1e-11)


def test_the_tangent_is_the_move_of_the_solution(stack):
    supra, x = stack
    psi, right, step = supra.solve(x, tol=1e-14, throw=False).value, random_state(supra), 1e-6
    parts = [part[0] for part in supra.split(right)]
    ends = []
    for length in (step, -step):
        biases = [b + length * part for b, part in zip(supra.biases, parts, strict=True)]
        other = SupraGraph(supra.layers, supra.maps, biases)
        ends.append(other.solve(x[:1], tol=1e-14, throw=False).value)
    ahead, behind = ends
    found = supra.tangent(psi[:1], right[:1])
    assert ((ahead - behind) / (2 * step) - found).abs().max() < 1e-7
    torch.testing.assert_close(supra.jvp(psi, supra.tangent(psi, right)), right, rtol=0, atol=1e-11)


def test_one_layer_is_the_stationary_layer(generator):
    supra, x = draw_stack(generator, nodes=(5,))
    psi, gradient = supra.solve(x).value, random_state(supra)
    graph, potential = supra.layers[0]
    p = adjoint_field(graph, potential, *(supra.split(v)[0] for v in (psi, gradient)))
    assert (supra.join([p]) - supra.adjoint_global(psi, gradient)).abs().max() < 1e-9


def test_an_empty_batch_has_an_empty_solution(stack):
    supra, x = stack
    assert supra.solve(x[:0]).value.shape == (0, supra.size)
    assert supra.dense(supra.zeros(0)).shape[0] == 0


def test_single_precision_solves_to_its_rounding(generator):
    supra, x = draw_stack(generator)
    layers = [
        (graph.to(dtype=torch.float32), Quartic(p.V.float(), p.kappa.float())) for graph, p in supra.layers
    ]
    kind = torch.complex64
    single = SupraGraph(layers, [K.to(kind) for K in supra.maps], [b.to(kind) for b in supra.biases])
    found = single.solve(x.to(kind), tol=3e-6).value
    assert found.dtype == kind
    assert (found - supra.solve(x).value).abs().max() < 1e-4
    assert single.adjoint(found, torch.ones_like(found)).isfinite().all()


def test_the_whole_runs_where_its_tensors_are(device, generator):
    supra, x = draw_stack(generator, real=True)
    layers = [(graph.to(device), Quartic(p.V.to(device), p.kappa.to(device))) for graph, p in supra.layers]
    moved = SupraGraph(layers, [K.to(device) for K in supra.maps], [b.to(device) for b in supra.biases])
    x_there = x.to(device)
    psi = moved.solve(x_there).value
    assert psi.device.type == device.type
    torch.testing.assert_close(psi.cpu(), supra.solve(x).value)
    p = moved.adjoint(psi, torch.ones_like(psi))
    torch.testing.assert_close(moved.adjoint_global(psi, torch.ones_like(psi)).cpu(), p.cpu())


def test_a_solve_that_is_cut_short_says_so(stack):
    supra, x = stack
    with pytest.raises(ConvergenceError, match="supra-graph"):
        supra.solve_global(x, max_steps=1)
    with pytest.warns(UserWarning, match="not reached"):
        solution = supra.solve(x, max_steps=1, throw=False)
    assert not solution.converged.all()
    assert solution.reason == "max_steps"


def test_arguments_that_do_not_fit_are_refused(generator):
    supra, x = draw_stack(generator)
    layers, maps = supra.layers, supra.maps
    with pytest.raises(ValueError, match="layers must not be empty"):
        SupraGraph([], [])
    with pytest.raises(ValueError, match="equally many, got 3, 2"):
        SupraGraph(layers, maps[:2])
    with pytest.raises(ValueError, match=r"map 2 must have shape \(rows, 12\)"):
        SupraGraph(layers, [maps[0], maps[1][:, :5], maps[2]])
    with pytest.raises(ValueError, match="map 1 must have a multiple of 6 rows"):
        SupraGraph(layers[:1], [maps[0][:7]])
    with pytest.raises(ValueError, match="share dtype"):
        SupraGraph(layers, [maps[0], maps[1].real, maps[2]])
    with pytest.raises(ValueError, match="map 1 must be finite"):
        SupraGraph(layers, [maps[0] * math.nan, *maps[1:]])
    with pytest.raises(ValueError, match="bias 1 must have shape"):
        SupraGraph(layers[:1], maps[:1], [torch.zeros(3)])
    with pytest.raises(ValueError, match="x must have 3 entries"):
        supra.solve(x[:, :2])
    with pytest.raises(ValueError, match="a state must have shape"):
        supra.residual(torch.zeros(1, 5), x[:1])
    with pytest.raises(ValueError, match="path must be"):
        supra.adjoint_global(supra.zeros(1), supra.zeros(1), path="fast")
    with pytest.raises(ValueError, match="one sample"):
        supra.sparse(supra.zeros(2))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        monotonicity(supra, supra.zeros(1), 0.0)
    with pytest.raises(ValueError, match="gamma, step and steps must be positive"):
        supra_flow(supra, x, gamma=0.0, step=0.1, steps=1)
