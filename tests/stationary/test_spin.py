"""The Bloch map carries one flow to the other: shapes of the sphere, conservation, damping, refusals."""

import pytest
import torch

from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.spin import (
    bloch,
    effective_field,
    landau_lifshitz,
    rk4,
    spin_energy,
    spinor,
    spinor_velocity,
)
from geomlib.testing import assert_gradients

NODES = 6


@pytest.fixture
def magnet(generator):
    """Return a weighted graph, random states of norm one (2, n, 2) and an outer field (n, 3)."""
    edges = torch.triu_indices(NODES, NODES, 1)
    edges = edges[:, torch.rand(edges.shape[1], generator=generator) < 0.6]
    weights = torch.rand(edges.shape[1], generator=generator, dtype=torch.float64)
    psi = torch.randn(2, NODES, 2, generator=generator, dtype=torch.complex128)
    field = 0.3 * torch.randn(NODES, 3, generator=generator, dtype=torch.float64)
    return SheafGraph(NODES, edges, weights), psi / psi.norm(dim=-1, keepdim=True), field


def pauli():
    x = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
    y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
    z = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)
    return torch.stack([x, y, z])


def test_bloch_is_the_expectation_of_the_pauli_matrices(magnet):
    _, psi, _ = magnet
    expected = torch.einsum("bna,kac,bnc->bnk", psi.conj(), pauli(), psi).real
    torch.testing.assert_close(bloch(psi), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(bloch(psi).norm(dim=-1), psi.abs().square().sum(-1))


def test_phases_do_not_matter_and_spinors_come_back(magnet, generator):
    _, psi, _ = magnet
    angle = torch.rand(psi.shape[:2], generator=generator, dtype=torch.float64)
    turned = psi * torch.polar(torch.ones_like(angle), 6.28 * angle)[..., None]
    torch.testing.assert_close(bloch(turned), bloch(psi), rtol=0, atol=1e-14)
    torch.testing.assert_close(bloch(spinor(bloch(psi))), bloch(psi), rtol=0, atol=1e-14)
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(bloch(spinor(poles)), poles, rtol=0, atol=1e-14)


def test_field_and_energy_are_the_sums_over_edges(magnet):
    graph, psi, field = magnet
    spins = bloch(psi)
    energy = -torch.einsum("nk,bnk->b", field, spins)
    pull = -field.expand_as(spins).clone()
    for (u, v), w in zip(graph.edges.T.tolist(), graph.weights, strict=True):
        energy = energy - w * (spins[:, u] * spins[:, v]).sum(-1)
        pull[:, u] -= w * spins[:, v]
        pull[:, v] -= w * spins[:, u]
    torch.testing.assert_close(spin_energy(graph, spins, field), energy)
    torch.testing.assert_close(effective_field(graph, spins, field), pull)


def test_field_is_the_gradient_of_the_energy(magnet):
    graph, psi, field = magnet
    spins = bloch(psi).requires_grad_()
    (slope,) = torch.autograd.grad(spin_energy(graph, spins, field).sum(), spins)
    torch.testing.assert_close(slope, effective_field(graph, spins.detach(), field), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_velocities_correspond_at_every_state(magnet, gamma):
    graph, psi, field = magnet
    moved = spinor_velocity(graph, psi, field, gamma=gamma)
    # ds = 2 Re psi^* sigma dpsi
    pushed = 2 * torch.einsum("bna,kac,bnc->bnk", psi.conj(), pauli(), moved).real
    spins = bloch(psi)
    torch.testing.assert_close(pushed, landau_lifshitz(graph, spins, field, gamma=gamma), rtol=0, atol=1e-13)
    assert (psi.conj() * moved).real.sum(-1).abs().max() < 1e-14
    assert (spins * landau_lifshitz(graph, spins, field, gamma=gamma)).sum(-1).abs().max() < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_integrated_states_and_spins_agree(magnet, gamma):
    graph, psi, field = magnet
    times = {"step": 0.005, "steps": 4000, "every": 200}
    states = rk4(lambda y: spinor_velocity(graph, y, field, gamma=gamma), psi, **times)
    spins = rk4(lambda s: landau_lifshitz(graph, s, field, gamma=gamma), bloch(psi), **times)
    assert (bloch(states) - spins).abs().max() < 1e-6
    assert (states.norm(dim=-1) - 1).abs().max() < 1e-9
    energy = torch.stack([spin_energy(graph, s, field) for s in spins])
    if gamma == 0:
        assert (energy - energy[0]).abs().max() < 1e-9
    else:
        assert (energy.diff(dim=0) <= 1e-12).all()
        assert (energy[-1] < energy[0] - 0.1).all()


def test_energy_falls_at_the_rate_of_the_torque(magnet):
    graph, psi, field = magnet
    spins, gamma = bloch(psi), 0.7
    pull = effective_field(graph, spins, field)
    rate = (pull * landau_lifshitz(graph, spins, field, gamma=gamma)).sum((1, 2))
    torque = torch.linalg.cross(spins, pull).square().sum((1, 2))
    torch.testing.assert_close(rate, -gamma * torque)


def test_rk4_has_order_four():
    errors = []
    for steps in (20, 40):
        path = rk4(lambda y: 1j * y, torch.ones((), dtype=torch.complex128), step=2 / steps, steps=steps)
        errors.append((path[-1] - torch.polar(torch.tensor(1.0).double(), torch.tensor(2.0).double())).abs())
    assert 15 < errors[0] / errors[1] < 17


def test_gradients_flow_through_the_energy_of_states(magnet):
    graph, psi, field = magnet
    assert_gradients(lambda y, h: spin_energy(graph, bloch(y), h), psi[:1], field)


def test_velocities_follow_their_device(device, generator):
    spins = torch.nn.functional.normalize(torch.randn(2, 3, 3, generator=generator), dim=-1)
    psi = spinor(spins)
    graph = SheafGraph(3, torch.tensor([[0, 1], [1, 2]]), torch.ones(2))
    there = SheafGraph(3, graph.edges.to(device), graph.weights.to(device))
    moved = landau_lifshitz(there, spins.to(device), gamma=0.1)
    assert moved.device == spins.to(device).device
    torch.testing.assert_close(moved.cpu(), landau_lifshitz(graph, spins, gamma=0.1))
    carried = spinor_velocity(there, psi.to(device), gamma=0.1)
    torch.testing.assert_close(carried.cpu(), spinor_velocity(graph, psi, gamma=0.1))


def test_single_nodes_and_empty_batches_are_legal():
    alone = SheafGraph(1, torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    psi = torch.ones(1, 1, 2, dtype=torch.complex128) / 2**0.5
    assert (spinor_velocity(alone, psi, gamma=1.0) == 0).all()
    assert spinor_velocity(alone, psi[:0], gamma=1.0).shape == (0, 1, 2)


def test_what_is_not_a_spin_is_refused(magnet):
    graph, psi, field = magnet
    spins = bloch(psi)
    with pytest.raises(ValueError, match="psi must be complex with a last axis of 2"):
        bloch(spins)
    with pytest.raises(ValueError, match="spins must be real with a last axis of 3"):
        effective_field(graph, psi)
    with pytest.raises(ValueError, match="spins must have length 1"):
        spinor(2 * spins)
    with pytest.raises(ValueError, match=r"spins must have shape \(B, 6, 3\)"):
        effective_field(graph, spins[:, :4])
    with pytest.raises(ValueError, match="field must have shape"):
        effective_field(graph, spins, field[:4])
    with pytest.raises(ValueError, match="gamma must be finite and not negative"):
        landau_lifshitz(graph, spins, gamma=-1.0)
    with pytest.raises(ValueError, match="steps must be a positive multiple of every"):
        rk4(lambda y: y, spins, step=0.1, steps=5, every=2)
    with pytest.raises(ValueError, match="step must be positive"):
        rk4(lambda y: y, spins, step=0.0, steps=5)
    phases = torch.zeros(graph.edges.shape[1], dtype=torch.float64)
    with pytest.raises(ValueError, match="graph must have no transport"):
        effective_field(graph.replace(transport=phases), spins)
