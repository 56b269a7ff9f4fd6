"""The sparse product and its fallback agree with the dense one, in value and in both derivatives."""

import pytest
import torch

from geomlib.stationary.sparse import EdgeIndex, edge_dots, weighted_laplacian
from geomlib.testing import assert_gradients, saved_tensor_bytes


def problem(batch, stalk, complex_=False, nodes=30, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    edges = torch.triu_indices(nodes, nodes, 1)
    edges = edges[:, torch.rand(edges.shape[1], generator=generator) < 0.2]
    edges = edges[:, torch.randperm(edges.shape[1], generator=generator)]  # in no order
    shape = (batch, nodes, stalk)
    psi, grad = (torch.randn(2, *shape, generator=generator, dtype=dtype) for _ in range(2))
    psi, grad = (torch.complex(*z) if complex_ else z[0] for z in (psi, grad))
    return edges, torch.rand(edges.shape[1], generator=generator, dtype=dtype), psi, grad


def index_of(edges, compressed, nodes=30):
    index = EdgeIndex(nodes, edges)
    index.compressed = compressed
    return index


def incidence(edges, nodes=30):
    b = torch.zeros(edges.shape[1], nodes, dtype=torch.float64)
    places = torch.arange(edges.shape[1])
    b[places, edges[0]], b[places, edges[1]] = 1.0, -1.0
    return b


both_forms = pytest.mark.parametrize("compressed", [True, False], ids=["csr", "edges"])
# 1 column, some columns, and enough of them for one sampled product.
widths = pytest.mark.parametrize(("batch", "stalk"), [(1, 1), (3, 2), (1, 40), (8, 5)])


@both_forms
@widths
@pytest.mark.parametrize("complex_", [False, True])
def test_product_and_derivatives_are_those_of_the_incidence_form(compressed, batch, stalk, complex_):
    edges, weights, psi, grad = problem(batch, stalk, complex_)
    x, w = psi.clone().requires_grad_(), weights.clone().requires_grad_()
    found = weighted_laplacian(x, w, index_of(edges, compressed))
    b = incidence(edges).to(psi.dtype)
    y, v = psi.clone().requires_grad_(), weights.clone().requires_grad_()
    jumps = torch.einsum("en,knd->ked", b, y)
    dense = torch.einsum("en,ked->knd", b, v[:, None] * jumps)
    torch.testing.assert_close(found, dense)
    for one, other in zip(
        torch.autograd.grad(found, (x, w), grad), torch.autograd.grad(dense, (y, v), grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@both_forms
def test_derivatives_are_exact_to_second_order(compressed):
    edges, weights, psi, _ = problem(2, 1, nodes=5)
    index = index_of(edges, compressed, nodes=5)
    assert_gradients(lambda x, w: weighted_laplacian(x, w, index), psi, weights)


@both_forms
@widths
def test_dot_products_of_edges_are_those_of_the_jumps(compressed, batch, stalk):
    edges, _, p, psi = problem(batch, stalk)
    jump = lambda x: x[:, edges[0]] - x[:, edges[1]]  # noqa: E731
    expected = (jump(p) * jump(psi)).sum((0, 2))
    torch.testing.assert_close(edge_dots(p, psi, index_of(edges, compressed)), expected)


def test_dot_products_of_nearly_constant_states_keep_their_digits():
    # The sampled form subtracts products of states; with the mean taken off, nothing large cancels.
    edges, _, p, psi = problem(1, 64, dtype=torch.float32)
    shifted = edge_dots(1e4 + p, 1e4 + psi, index_of(edges, True))
    jump = lambda x: (1e4 + x)[:, edges[0]] - (1e4 + x)[:, edges[1]]  # noqa: E731
    torch.testing.assert_close(shifted, (jump(p) * jump(psi)).sum((0, 2)), rtol=1e-2, atol=1e-2)


def test_weights_changed_behind_its_back_are_seen():
    edges, weights, psi, _ = problem(1, 1)
    index = index_of(edges, True)
    first = weighted_laplacian(psi, weights, index)
    weights.data.mul_(2)
    torch.testing.assert_close(weighted_laplacian(psi, weights, index), 2 * first)


@both_forms
def test_no_edges_no_flow(compressed):
    index = index_of(torch.zeros(2, 0, dtype=torch.int64), compressed)
    psi, w = torch.ones(2, 30, 3), torch.zeros(0, requires_grad=True)
    image = weighted_laplacian(psi, w, index)
    assert float(image.detach().abs().max()) == 0.0
    assert torch.autograd.grad(image.sum(), w)[0].shape == (0,)


def test_a_device_without_sparse_matrices_gathers_edges(device):
    edges, weights, psi, grad = problem(2, 3)
    index = EdgeIndex(30, edges.to(device))
    x, w = psi.to(device).requires_grad_(), weights.to(device).requires_grad_()
    image = weighted_laplacian(x, w, index)
    found = torch.autograd.grad(image, (x, w), grad.to(device))
    a, b = psi.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = torch.autograd.grad(weighted_laplacian(a, b, index_of(edges, False)), (a, b), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


@both_forms
def test_backward_keeps_no_states_on_edges(compressed):
    edges, weights, psi, _ = problem(4, 16)
    psi.requires_grad_()
    weights.requires_grad_()
    kept = saved_tensor_bytes(lambda: weighted_laplacian(psi, weights, index_of(edges, compressed)))
    assert kept <= 2 * psi.numel() * 8 + weights.numel() * 8  # states, their image, weights
