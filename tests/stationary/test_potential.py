"""Potentials: gradients, Hessians, proximity operators and bounds belong together, node by node."""

import pytest
import torch

from geomlib.stationary import Local, Potential, Quartic, Rectifier, Tanh
from geomlib.stationary.equation import blocks, linearise

NODES = 4


def quartic():
    return Quartic(torch.linspace(0.2, 2, NODES).double(), torch.linspace(0, 3, NODES).double())


def soft():
    """Return a Huber-like potential that mixes the components of a node."""
    slope = torch.linspace(0.5, 1.5, NODES, dtype=torch.float64)

    def density(psi, slope):
        rows = torch.view_as_real(psi).flatten(2) if psi.is_complex() else psi
        return slope * (1 + rows.square().sum(2)).sqrt() + rows.square().sum(2) / 2

    return Local(density, slope, convexity=1.0)


MAKERS = {"quartic": quartic, "local": soft, "tanh": Tanh, "rectifier": Rectifier}
SMOOTH = ["quartic", "local", "tanh"]


def states(complex_, seed=0, size=0.3):
    """States inside the open cube, where all potentials are defined."""
    generator = torch.Generator().manual_seed(seed)
    draw = size * (2 * torch.rand(2, 3, NODES, 2, generator=generator, dtype=torch.float64) - 1)
    return torch.complex(*draw) if complex_ else draw[0]


def rows(psi):
    return torch.view_as_real(psi).flatten(2) if psi.is_complex() else psi


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_is_the_derivative_of_the_value(name, complex_):
    potential, psi = MAKERS[name](), states(complex_).requires_grad_()
    (slope,) = torch.autograd.grad(potential.value(psi).sum(), psi)
    torch.testing.assert_close(potential.gradient(psi.detach()), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_hessian_product_is_the_derivative_of_the_gradient(name, complex_):
    potential, psi, x, h = MAKERS[name](), states(complex_), states(complex_, seed=1), 1e-6
    difference = (potential.gradient(psi + h * x) - potential.gradient(psi - h * x)) / (2 * h)
    torch.testing.assert_close(potential.hessian_product(psi, x), difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_blocks_and_the_linearised_form_multiply_like_the_product(name, complex_):
    potential, psi, x, y = MAKERS[name](), *(states(complex_, seed=seed) for seed in (0, 1, 2))
    product = potential.hessian_product(psi, x)
    matrix = blocks(potential, psi)
    torch.testing.assert_close(torch.einsum("bnij,bnj->bni", matrix, rows(x)), rows(product))
    torch.testing.assert_close(matrix, Potential.blocks(potential, psi))
    add, curvature = linearise(potential, psi)
    torch.testing.assert_close(add(x, y), y + product)
    values = torch.linalg.eigvalsh(matrix)
    assert (curvature >= values[..., 0] - 1e-12).all()
    assert (curvature <= values[..., -1] + 1e-12).all()


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_eigenvalue_is_below_the_bound(name, complex_):
    potential = MAKERS[name]()
    for size in (1e-3, 0.3, 0.9):
        values = torch.linalg.eigvalsh(blocks(potential, states(complex_, size=size)))
        assert float(values.min()) >= float(potential.convexity()) - 1e-12


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("t", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", ["quartic", "tanh"])
def test_prox_solves_its_equation(name, t, complex_):
    potential = MAKERS[name]()
    for size in (0.0, 0.3, 30.0):
        q = states(complex_, size=size)
        z = potential.prox(q, t)
        if (
            name == "tanh" and t * 18 < size
        ):  # artanh of the nearest number below 1 is 18: rounding says no more
            continue
        torch.testing.assert_close(z + t * potential.gradient(z), q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [0.1, 10.0])
def test_prox_of_the_quartic_is_smooth_in_everything(t):
    V, kappa = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.tensor([[[0.0], [0.5], [-4.0]]], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, V, kappa)]
    assert torch.autograd.gradcheck(lambda q, V, kappa: Quartic(V, kappa).prox(q, t), inputs)


def test_prox_of_the_rectifier_is_the_minimiser():
    q, t = states(False, size=3.0), 0.7
    z = Rectifier().prox(q, t)
    cost = lambda z: t * Rectifier().value(z) + ((z - q) ** 2).sum((1, 2)) / 2  # noqa: E731
    for seed in range(20):
        other = (z + 0.1 * states(False, seed=seed)).relu()
        assert (cost(z) <= cost(other) + 1e-12).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_a_node_does_not_see_the_others(name):
    potential, psi, x = MAKERS[name](), states(True), states(True, seed=1)
    moved = psi.clone()
    moved[:, 1] *= 0.5
    rest = [0, 2, 3]
    assert torch.equal(potential.gradient(psi)[:, rest], potential.gradient(moved)[:, rest])
    assert torch.equal(
        potential.hessian_product(psi, x)[:, rest], potential.hessian_product(moved, x)[:, rest]
    )


@pytest.mark.parametrize("name", ["tanh", "rectifier"])
def test_values_outside_the_domain_are_infinite(name):
    outside = torch.full((1, NODES, 2), -1.5)
    assert MAKERS[name]().value(outside).tolist() == [float("inf")]


def test_the_layout_of_memory_does_not_matter():
    potential, psi, x = quartic(), states(True), states(True, seed=1)
    by_nodes = lambda z: z.transpose(0, 1).contiguous().transpose(0, 1)  # noqa: E731
    torch.testing.assert_close(potential.gradient(by_nodes(psi)), potential.gradient(psi))
    add, _ = potential.linearise(by_nodes(psi))
    torch.testing.assert_close(add(by_nodes(x), by_nodes(x)), x + potential.hessian_product(psi, x))
