"""Laws of sheaf graphs: the Laplacian and its parts, gauge and numbering, unions, what is refused."""

import pytest
import torch

from geomlib.stationary import SheafGraph
from geomlib.testing import assert_gradients


def slow_laplacian(graph, stalk):
    """Assemble the connection Laplacian block by block."""
    n, kind = graph.nodes, graph.weights.dtype
    maps = graph.transport
    if maps is None:
        maps = torch.eye(stalk, dtype=kind).expand(len(graph.weights), stalk, stalk)
    elif maps.dim() == 1:
        maps = torch.exp(1j * maps)[:, None, None] * torch.eye(stalk, dtype=kind)
    matrix = torch.zeros(n, stalk, n, stalk, dtype=maps.dtype)
    for (u, v), w, tau in zip(graph.edges.T.tolist(), graph.weights, maps, strict=True):
        matrix[u, :, u] += w * torch.eye(stalk, dtype=kind)
        matrix[v, :, v] += w * torch.eye(stalk, dtype=kind)
        matrix[u, :, v] -= w * tau
        matrix[v, :, u] -= w * tau.mH
    return matrix.reshape(n * stalk, n * stalk)


def test_dense_laplacian_is_assembled_block_by_block(make_layer, kind):
    graph, _, drive = make_layer(kind)
    torch.testing.assert_close(graph.dense_laplacian(2), slow_laplacian(graph, 2), rtol=0, atol=1e-12)
    assert drive.shape == (3, 6, 2)


def test_laplacian_is_hermitian_and_positive_semidefinite(make_layer, kind):
    graph, _, _ = make_layer(kind)
    matrix = graph.dense_laplacian(2)
    torch.testing.assert_close(matrix, matrix.mH, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_laplacian_of_states_is_the_dense_product(make_layer, kind, device):
    graph, _, psi = make_layer(kind)
    dense = psi.flatten(1) @ graph.dense_laplacian(2).mT.to(psi.dtype)
    found = graph.to(device).laplacian(psi.to(device)).cpu()
    torch.testing.assert_close(found.flatten(1), dense, rtol=0, atol=1e-12)


def test_without_a_connection_the_laplacian_is_the_incidence_form(make_layer):
    graph, _, _ = make_layer("plain")
    b = graph.incidence()
    expected = torch.kron(b.T @ torch.diag(graph.weights) @ b, torch.eye(2, dtype=b.dtype))
    torch.testing.assert_close(graph.dense_laplacian(2), expected, rtol=0, atol=1e-12)


def test_divergence_is_the_adjoint_of_the_coboundary(make_layer, kind, generator):
    graph, _, psi = make_layer(kind)
    flow = torch.randn(3, graph.edges.shape[1], 2, generator=generator, dtype=torch.float64).to(psi.dtype)
    left = (flow.conj() * graph.coboundary(psi)).real.sum()
    right = (graph.divergence(flow).conj() * psi).real.sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_transport_there_and_back_changes_nothing(make_layer, kind):
    graph, _, psi = make_layer(kind)
    on_edges = graph.coboundary(psi)
    torch.testing.assert_close(graph.back(graph.forth(on_edges)), on_edges)


def test_quadratic_form_is_the_weighted_tension(make_layer, kind):
    graph, _, psi = make_layer(kind)
    form = (psi.conj() * graph.laplacian(psi)).real.sum((1, 2))
    tension = (graph.weights * graph.coboundary(psi).abs().square().sum(2)).sum(1)
    torch.testing.assert_close(form, tension)


def test_edge_products_are_the_derivatives_of_the_quadratic_form(make_layer, kind):
    graph, _, psi = make_layer(kind)
    w = graph.weights.clone().requires_grad_()
    form = (psi.conj() * graph.with_tensors(w, graph.transport).laplacian(psi)).real.sum()
    torch.testing.assert_close(graph.edge_products(psi, psi), torch.autograd.grad(form, w)[0])


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_edge_products_in_pieces_are_those_at_once(make_layer, kind, chunk):
    graph, _, psi = make_layer(kind)
    whole = graph.coboundary(psi).conj() * graph.coboundary(psi + 1)
    torch.testing.assert_close(graph.edge_products(psi, psi + 1, chunk=chunk), whole.real.sum((0, 2)))


def test_laplacian_has_exact_derivatives_of_both_orders(make_layer, kind):
    graph, _, psi = make_layer(kind, nodes=3, batch=1, density=1.0)
    if graph.transport is None:
        assert_gradients(lambda x, w: graph.with_tensors(w, None).laplacian(x), psi, graph.weights)
    else:
        assert_gradients(
            lambda x, w, tau: graph.with_tensors(w, tau).laplacian(x), psi, graph.weights, graph.transport
        )


def test_a_union_is_the_graphs_side_by_side(make_layer):
    (one, _, psi), (two, _, phi) = (make_layer("unitary", seed=seed) for seed in (0, 1))
    both = SheafGraph.disjoint_union(one, two).laplacian(torch.cat([psi, phi], 1))
    torch.testing.assert_close(both, torch.cat([one.laplacian(psi), two.laplacian(phi)], 1))


def test_rounding_below_zero_is_taken_for_zero():
    edges = torch.tensor([[0], [1]])
    assert SheafGraph(2, edges, torch.tensor([-1e-15], dtype=torch.float64)).weights.tolist() == [0.0]


def test_replacing_weights_keeps_candidates_and_connection(make_layer):
    graph, _, _ = make_layer("unitary")
    other = graph.replace(weights=2 * graph.weights)
    torch.testing.assert_close(other.dense_laplacian(2), 2 * graph.dense_laplacian(2))
    with pytest.raises(ValueError, match="only weights and transport"):
        graph.replace(nodes=3)


EDGE = torch.tensor([[0], [1]])
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SheafGraph(0, EDGE[:, :0], ONE[:0]), "nodes must be at least 1"),
        (lambda: SheafGraph(2, EDGE.float(), ONE), r"edges must be \(2, M\) int64"),
        (lambda: SheafGraph(2, EDGE.T, ONE), r"edges must be \(2, M\) int64"),
        (lambda: SheafGraph(1, EDGE, ONE), "edges must lie in 0"),
        (lambda: SheafGraph(2, EDGE - 1, ONE), "edges must lie in 0"),
        (lambda: SheafGraph(2, torch.tensor([[1], [1]]), ONE), "loops"),
        (lambda: SheafGraph(2, EDGE.flip(0), ONE), r"edges\[0\] < edges\[1\]"),
        (lambda: SheafGraph(2, EDGE.repeat(1, 2), torch.ones(2)), "must not repeat"),
        (lambda: SheafGraph(2, EDGE, torch.ones(2)), "weights must be real"),
        (lambda: SheafGraph(2, EDGE, torch.ones(1, dtype=torch.int64)), "weights must be real"),
        (lambda: SheafGraph(2, EDGE, -ONE), "weights must not be negative, got -1"),
        (lambda: SheafGraph(2, EDGE, torch.tensor([torch.nan])), "weights must be finite"),
        (lambda: SheafGraph(2, EDGE, torch.tensor([torch.inf])), "weights must be finite"),
        (lambda: SheafGraph(2, EDGE, ONE, torch.ones(2)), "transport must be"),
        (lambda: SheafGraph(2, EDGE, ONE, torch.ones(1, 2, 3)), "transport must be"),
        (lambda: SheafGraph(2, EDGE, ONE, torch.ones(1, 2, 2)), "transport must be unitary"),
        (lambda: SheafGraph(2, EDGE, ONE, torch.tensor([torch.nan])), "transport must be finite"),
        (lambda: SheafGraph(2, EDGE, ONE).dense_laplacian(0), "stalk must be at least 1"),
        (lambda: SheafGraph(2, EDGE, ONE, torch.eye(2)[None]).dense_laplacian(3), "stalk must be 2"),
        (lambda: SheafGraph.disjoint_union(), "graphs must be at least one"),
    ],
)
def test_a_graph_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parallel_edges_and_negative_weights_come_on_request():
    twice = SheafGraph(2, EDGE.repeat(1, 2), torch.ones(2), parallel=True)
    assert twice.dense_laplacian().tolist() == [[2.0, -2.0], [-2.0, 2.0]]
    assert SheafGraph(2, EDGE, -ONE, signed=True).degrees().tolist() == [-1.0, -1.0]
