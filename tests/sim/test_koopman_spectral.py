"""Laws of projectors, powers and time averages: the linear objects that an equilibrium is made of."""

import math

import pytest
import torch

from geomlib.sim.koopman import (
    affine_limit,
    generalised_laplace_average,
    jacobian_spectrum,
    mean_ergodic,
    projector_at_one,
    spectral_projector,
)
from geomlib.sim.systems import orbit, stuart_landau, stuart_landau_eigenfunctions

RHO = 0.9


@pytest.fixture
def affine(generator):
    """Draw an affine equilibrium model whose leading eigenvalue is `RHO` and real."""
    W = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    W = W + W.T + 0.3 * (W - W.T)  # mostly symmetric: the leading eigenvalue is real
    W = RHO * W / torch.linalg.eigvals(W).abs().max()
    B = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    return W, B, b


def test_affine_closed_form_is_the_spectral_projector(affine):
    limit = affine_limit(*affine)
    A, P = limit.A, limit.projector
    for defect in (
        P @ P - P,
        A @ P - P,
        P @ A - P,
        limit.V.T @ limit.U - torch.eye(6),
        P - projector_at_one(A),
    ):
        assert defect.abs().max() < 1e-12


def test_affine_read_out_is_the_equilibrium(affine, generator):
    W, B, b = affine
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    solved = torch.linalg.solve(torch.eye(8) - W, (x @ B.T + b).T).T
    assert (affine_limit(W, B, b).equilibrium(x) - solved).abs().max() < 1e-12


def test_multiplicity_of_one_is_the_number_of_inputs_plus_one(affine):
    values = torch.linalg.eigvals(affine_limit(*affine).A)
    assert ((values - 1).abs() < 1e-9).sum() == 5 + 1


def test_powers_approach_the_projector_at_the_leading_rate(affine):
    limit = affine_limit(*affine)
    errors = torch.stack(
        [
            torch.linalg.matrix_norm(torch.linalg.matrix_power(limit.A, t) - limit.projector, 2)
            for t in range(100, 200, 10)
        ]
    )
    slope = (errors[-1].log() - errors[0].log()) / 90
    assert abs(slope / math.log(RHO) - 1) < 0.03


def test_gradient_of_the_closed_form_is_implicit_and_unrolled(affine, generator):
    W, B, b = affine
    W = W.clone().requires_grad_()
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    closed = torch.autograd.grad((affine_limit(W, B, b).equilibrium(x) * weight).sum(), W)[0]
    z = torch.zeros(3, 8, dtype=torch.float64)
    for _ in range(400):  # 0.9^400 = 5e-19
        z = z @ W.T + x @ B.T + b
    unrolled = torch.autograd.grad((z * weight).sum(), W)[0]
    adjoint = torch.linalg.solve((torch.eye(8) - W.detach()).T, weight.T)
    implicit = adjoint @ z.detach()
    scale = implicit.norm()
    assert (closed - implicit).norm() < 1e-10 * scale
    assert (unrolled - implicit).norm() < 1e-10 * scale


def test_left_vectors_at_one_are_blind_to_the_state(affine):
    left = torch.linalg.svd(projector_at_one(affine_limit(*affine).A))[2][:6]
    assert left[:, :8].abs().max() < 1e-10


@pytest.fixture
def drifting(generator):
    """Draw a power-bounded `A = P + N`, its projector `P` and a direction for the closure error."""
    basis = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    spectrum = torch.tensor([1.0, 1.0, 0.8, 0.6, -0.5, 0.2], dtype=torch.float64)
    A = torch.linalg.solve(basis.T, (basis * spectrum).T).T
    push = torch.randn(6, generator=generator, dtype=torch.float64)
    return A, projector_at_one(A), push


def deviation(A, error, steps):
    """Return `|psi(F^t s) - A^t psi(s)|` for a constant closure error: the norms of sums of `A^j error`."""
    total = torch.zeros_like(error)
    norms = []
    for _ in range(steps):
        total = A @ total + error
        norms.append(total.norm())
    return torch.stack(norms)


def test_closure_error_stays_bounded_if_the_peripheral_functions_are_exact(drifting):
    A, P, push = drifting
    error = push - P @ push  # V^T e = 0
    error = 1e-3 * error / error.norm()
    N = A - P
    bound = 1e-3 * sum(torch.linalg.matrix_norm(torch.linalg.matrix_power(N, j), 2) for j in range(1, 200))
    assert deviation(A, error, 10_000).max() <= bound + 1e-3


def test_closure_error_drifts_linearly_otherwise(drifting):
    A, P, push = drifting
    error = 1e-3 * push / push.norm()
    grown = deviation(A, error, 10_000)
    rate = (P @ error).norm()
    assert abs(grown[-1] / (10_000 * rate) - 1) < 0.01


def test_projector_survives_a_repeated_eigenvalue(generator):
    basis = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    spectrum = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    A = torch.linalg.solve(basis.T, (basis * spectrum).T).T
    P = projector_at_one(A)
    assert abs(P.trace() - 3) < 1e-9
    assert (P @ P - P).abs().max() < 1e-9
    assert (P - torch.linalg.matrix_power(A, 80)).abs().max() < 1e-9


def test_projectors_of_all_eigenvalues_add_up_to_the_identity(generator):
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    parts = [spectral_projector(A, value) for value in torch.linalg.eigvals(A).tolist()]
    assert (sum(parts) - torch.eye(4)).abs().max() < 1e-9


def test_no_eigenvalue_no_projection():
    assert torch.equal(projector_at_one(0.5 * torch.eye(3)), torch.zeros(3, 3, dtype=torch.float64))


def test_a_jordan_block_has_no_projector():
    with pytest.raises(ValueError, match="must be semisimple"):
        projector_at_one(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))


def test_a_matrix_that_is_not_square_raises():
    with pytest.raises(ValueError, match="A must be square"):
        projector_at_one(torch.ones(2, 3))


def test_affine_limit_refuses_a_repelling_map_and_misfits():
    with pytest.raises(ValueError, match=r"spectral radius of W must be below 1, got 1\.1"):
        affine_limit(1.1 * torch.eye(2), torch.ones(2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="must fit"):
        affine_limit(torch.eye(2), torch.ones(3, 1), torch.ones(2))


@pytest.fixture(scope="module")
def oscillator():
    return orbit(stuart_landau, torch.tensor([0.3, 0.4], dtype=torch.float64), 10_000)


def test_the_oscillator_has_its_exact_eigenfunctions(oscillator):
    phase, decay = stuart_landau_eigenfunctions(oscillator[:40])
    factor = torch.exp(torch.tensor(0.3j, dtype=torch.complex128))
    assert (phase[1:] - factor * phase[:-1]).abs().max() < 1e-12
    assert (decay[1:] - math.exp(-0.6) * decay[:-1]).abs().max() < 1e-12


def test_time_averages_converge_like_one_over_time(oscillator):
    # The geometric sum of exp(0.3 i t) is at most 2 / |1 - exp(0.3 i)| = 6.69, plus the transient's own sum,
    # which is below 1; over one period (21 steps) it comes within a few per cent of that.
    error = mean_ergodic(oscillator).norm(dim=1)
    peaks = torch.stack([error[t : t + 25].max() * t for t in (100, 1000, 9900)])
    bound = 2 / abs(1 - complex(math.cos(0.3), math.sin(0.3)))
    assert peaks.max() < bound + 1
    assert peaks.min() > 0.5 * bound


def test_laplace_average_at_the_frequency_returns_the_phase(oscillator):
    z = torch.complex(oscillator[:, 0], oscillator[:, 1])
    average = generalised_laplace_average(z, complex(math.cos(0.3), math.sin(0.3)))[-1]
    start = torch.complex(torch.tensor(0.6), torch.tensor(0.8))
    assert (average - start).abs() < 5e-4


def test_cesaro_means_of_powers_obey_the_bound_of_the_geometric_sum():
    angle, rho = 0.7, 0.5
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    A = torch.block_diag(torch.ones(1, 1), rotation, torch.full((1, 1), rho)).double()
    powers = torch.stack([torch.linalg.matrix_power(A, t) for t in range(400)])
    errors = torch.linalg.matrix_norm(mean_ergodic(powers) - projector_at_one(A), 2)
    time = torch.arange(1, 401)
    bound = (4 / abs(1 - complex(math.cos(angle), math.sin(angle))) + 1 / (1 - rho)) / time
    assert (errors <= bound).all()


def test_averages_refuse_what_has_no_mean():
    with pytest.raises(ValueError, match="at least one step"):
        mean_ergodic(torch.ones(0, 2))
    with pytest.raises(ValueError, match="must not be 0"):
        generalised_laplace_average(torch.ones(3), 0.0)


def test_jacobian_spectrum_of_a_linear_map_is_its_spectrum(generator):
    W = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    spectrum = jacobian_spectrum(lambda s: s @ W.T, z)
    exact = torch.linalg.eigvals(W)
    assert spectrum.shape == (2, 9)
    for row in spectrum:
        assert (row[:, None] - exact).abs().min(0).values.max() < 1e-10
    assert (spectrum.abs().diff(dim=1) <= 1e-9).all()


def test_arnoldi_agrees_with_the_dense_spectrum(generator):
    W = torch.randn(30, 30, generator=generator, dtype=torch.float64) / 30**0.5
    z = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    u = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    f = lambda s, v: torch.tanh(s @ W.T + v)  # noqa: E731
    few, all_of_them = jacobian_spectrum(f, z, u, leading=3), jacobian_spectrum(f, z, u)
    assert (few.abs() - all_of_them.abs()[:, :3]).abs().max() < 1e-8


def test_jacobian_spectrum_refuses_bad_input():
    with pytest.raises(ValueError, match="not empty"):
        jacobian_spectrum(torch.tanh, torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"leading must lie in \[1, 1\]"):
        jacobian_spectrum(torch.tanh, torch.ones(1, 3), leading=3)
