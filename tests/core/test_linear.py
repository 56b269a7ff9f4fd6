"""Krylov spaces: GMRES, Arnoldi, and the spectral radius that tells a root from an attractor."""

import math

import pytest
import torch
from core_problems import rotation, tanh_cell

from geomlib.core import arnoldi, gmres, solve, spectral_radius


def systems(batch=3, n=6):
    """Well-conditioned matrices, one per sample, and right-hand sides."""
    A = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(batch, n, n, dtype=torch.float64)
    return A, torch.randn(batch, n, dtype=torch.float64), lambda v: torch.einsum("bij,bj->bi", A, v)


def test_gmres_solves_each_sample_after_as_many_steps_as_dimensions():
    A, b, apply = systems()
    torch.testing.assert_close(gmres(apply, b, steps=6), torch.linalg.solve(A, b))


def test_gmres_minimises_the_residual_over_the_krylov_space():
    A, b, apply = systems()
    for steps in (1, 2, 4):
        krylov = [b]
        for _ in range(steps - 1):
            krylov.append(apply(krylov[-1]))
        basis = torch.stack(krylov, dim=2)  # (batch, n, steps)
        best = torch.linalg.lstsq(A @ basis, b.unsqueeze(2)).solution
        expected = (basis @ best)[:, :, 0]
        torch.testing.assert_close(gmres(apply, b, steps=steps), expected, rtol=1e-7, atol=1e-9)


def test_gmres_survives_an_exhausted_space_and_a_zero_right_hand_side():
    b = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]])
    torch.testing.assert_close(gmres(lambda v: 2 * v, b, steps=3), b / 2)


def test_the_arnoldi_relation_holds_on_an_orthonormal_basis():
    _, b, apply = systems()
    basis, hessenberg = arnoldi(apply, b, steps=4)
    gram = torch.bmm(basis, basis.mT)
    torch.testing.assert_close(gram, torch.eye(5, dtype=gram.dtype).expand_as(gram), rtol=0, atol=1e-12)
    images = torch.stack([apply(row) for row in basis[:, :4].unbind(1)], dim=1)
    torch.testing.assert_close(images, torch.bmm(hessenberg.mT, basis), rtol=0, atol=1e-12)


def test_the_basis_stays_orthonormal_where_cancellation_is_worst():
    """Next to the identity almost all of each product lies in the space already: one pass is not enough."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 20, generator=generator)
    basis, _ = arnoldi(lambda v: v + 1e-4 * v @ noise, torch.randn(2, 20, generator=generator), steps=8)
    gram = torch.bmm(basis, basis.mT)
    torch.testing.assert_close(gram, torch.eye(9).expand_as(gram), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_the_spectral_radius_is_that_of_the_jacobian(shape, generator):
    f, u, W = tanh_cell(2.0, width=6)

    def shaped(z, u, W):
        return f(z.flatten(1), u, W).view(z.shape)

    z = solve(f, torch.zeros_like(u), u, W, max_steps=2000).value
    found = spectral_radius(shaped, z.view(-1, *shape), u, W, generator=generator)
    jacobians = torch.stack(
        [torch.func.jacrev(lambda s, b: f(s, b, W))(s, b) for s, b in zip(z, u, strict=True)]
    )
    torch.testing.assert_close(found, torch.linalg.eigvals(jacobians).abs().amax(1), rtol=1e-8, atol=0)


def test_a_leading_complex_pair_does_not_disturb_the_estimate(generator):
    """A wide state with fewer Arnoldi steps than dimensions; a power iteration would wander for ever."""
    n, rate = 60, 0.97
    angle = 0.7
    block = rate * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    J = torch.block_diag(block, 0.5 * torch.diag(torch.linspace(-1, 1, n - 2))).double()
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    J = Q @ J @ Q.T
    found = spectral_radius(
        lambda z: z @ J.T, torch.zeros(1, n, dtype=torch.float64), steps=25, generator=generator
    )
    assert found.item() == pytest.approx(rate, rel=1e-6)


def test_a_root_that_repels_is_told_from_an_attractor(device, generator):
    z = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for gain in (0.8, 1.2):
        found = spectral_radius(rotation(gain), z, generator=generator)
        torch.testing.assert_close(found.cpu(), torch.full((2,), gain, dtype=torch.float64))


def test_a_constant_map_has_radius_zero(generator):
    found = spectral_radius(lambda z, b: b.expand_as(z), torch.ones(2, 3), torch.ones(1), generator=generator)
    assert found.tolist() == [0, 0]


def test_the_spectral_radius_checks_its_arguments():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        spectral_radius(torch.cos, torch.zeros(1, 1), steps=0)
    with pytest.raises(ValueError, match="floating and not empty"):
        spectral_radius(torch.cos, torch.zeros(0, 1))
