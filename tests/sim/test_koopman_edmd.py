"""Laws of extended dynamic mode decomposition: what it recovers exactly, and what it filters out."""

import pytest
import torch

from geomlib.sim.koopman import edmd, edmd_with_input, projector_at_one
from geomlib.sim.systems import (
    polynomial_deq,
    polynomial_dictionary,
    polynomial_equilibrium,
    stuart_landau,
    stuart_landau_eigenfunctions,
)


@pytest.fixture
def polynomial(generator):
    x = torch.rand(400, generator=generator, dtype=torch.float64) * 2 - 1
    z = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    psi = polynomial_dictionary(z, x)
    return x, z, psi, edmd(psi, polynomial_dictionary(polynomial_deq(z, x), x))


def test_a_closed_dictionary_is_recovered_exactly(polynomial):
    _, _, _, fit = polynomial
    exact = torch.tensor([1, 1, 1, 0.7, 0.7, 0.5, 0.49], dtype=torch.float64)
    assert (fit.eigenvalues.real - exact).abs().max() < 1e-9
    assert fit.eigenvalues.imag.abs().max() < 1e-9
    assert fit.residuals.max() < 1e-9


def test_eigenvalues_of_products_are_products(polynomial):
    # z1 - x has eigenvalue 0.7; its square must therefore appear with 0.49.
    x, z, psi, fit = polynomial
    values = fit.evaluate(psi)
    squared = (z[:, 0] - x).square()
    column = values[:, (fit.eigenvalues - 0.49).abs().argmin()]
    ratio = column / squared
    assert (ratio / ratio[0] - 1).abs().max() < 1e-6  # division by small squares costs digits


def test_the_projector_decodes_to_the_equilibrium(polynomial):
    x, _, psi, fit = polynomial
    limit = psi @ projector_at_one(fit.A, tol=1e-7).T
    assert (limit[:, [3, 6]] - polynomial_equilibrium(x)).abs().max() < 1e-10


def test_functions_at_eigenvalue_one_are_blind_to_the_state(polynomial):
    _, _, _, fit = polynomial
    left = torch.linalg.svd(projector_at_one(fit.A, tol=1e-7))[2][:3]  # row space: left eigenvectors
    assert left[:, 3:].abs().max() < 1e-8


def test_expansion_predicts_many_steps(polynomial):
    x, z, psi, fit = polynomial
    later = z
    for _ in range(7):
        later = polynomial_deq(later, x)
    assert (fit.predict(psi, 7) - polynomial_dictionary(later, x)).abs().max() < 1e-8


def test_modes_are_dual_to_eigenfunctions_and_rebuild_the_dictionary(polynomial):
    _, _, psi, fit = polynomial
    identity = torch.eye(7, dtype=torch.complex128)
    assert (fit.eigenfunctions.T @ fit.modes - identity).abs().max() < 1e-9
    assert (fit.predict(psi, 0) - psi).abs().max() < 1e-9


def test_a_collinear_dictionary_brings_no_extra_eigenvalues(generator):
    x = torch.randn(100, 1, generator=generator, dtype=torch.float64)
    fit = edmd(torch.hstack([x, 3 * x, 1e3 * x]), torch.hstack([0.5 * x, 1.5 * x, 500 * x]))
    assert fit.eigenvalues.shape == (1,)
    assert abs(fit.eigenvalues.item() - 0.5) < 1e-12


def test_rescaling_a_feature_leaves_the_eigenvalues_alone(generator):
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    A = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.6, 0.2], [0.0, 0.0, 0.3]], dtype=torch.float64)
    units = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    plain = edmd(x, x @ A.T, ridge=1e-6, tol=1e-8).eigenvalues
    scaled = edmd(x * units, (x @ A.T) * units, ridge=1e-6, tol=1e-8).eigenvalues
    assert (plain - scaled).abs().max() < 1e-9


def test_residual_filter_keeps_exact_pairs_and_drops_artefacts(generator):
    # exp(i theta) and 1/r^2 - 1 are eigenfunctions of the oscillator; r and r^2 are not.
    state = torch.randn(500, 2, generator=generator, dtype=torch.float64) + 0.1

    def psi(s):
        phase, decay = stuart_landau_eigenfunctions(s)
        radius = s.norm(dim=-1)
        return torch.stack([phase.real, phase.imag, decay, radius, radius**2], -1)

    fit = edmd(psi(state), psi(stuart_landau(state)))
    kept = fit.keep(1e-9)
    exact = torch.exp(torch.tensor([0.3j, -0.3j, -0.6 + 0j], dtype=torch.complex128))
    assert len(kept.eigenvalues) == 3 < len(fit.eigenvalues)
    assert all((kept.eigenvalues - value).abs().min() < 1e-9 for value in exact)


def test_a_contraction_has_no_other_eigenvalue_of_modulus_one(generator):
    # Continuous functions of a globally attracting equilibrium: the only peripheral eigenvalue is 1.
    W = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    W = 0.7 * W / torch.linalg.matrix_norm(W, 2)
    x = torch.rand(2000, 1, generator=generator, dtype=torch.float64) * 2 - 1
    z = torch.randn(2000, 3, generator=generator, dtype=torch.float64) * 0.7

    def psi(s):
        pairs = torch.stack([s[:, i] * s[:, j] for i in range(3) for j in range(i, 3)], 1)
        return torch.hstack([torch.ones_like(x), x, x**2, s, s * x, pairs, torch.tanh(s)])

    fit = edmd(psi(z), psi(torch.tanh(z @ W.T + x))).keep(0.1)
    peripheral = fit.eigenvalues[fit.eigenvalues.abs() > 0.99]
    assert len(peripheral) == 3  # functions of x in the dictionary: 1, x, x^2
    assert (peripheral - 1).abs().max() < 1e-6


def test_input_rows_are_exact_and_the_limit_solves_the_linear_model(generator):
    psi = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    z = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    drive = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    transition = 0.4 * torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    fit = edmd_with_input(psi, z, psi @ drive.T + z @ transition.T, ridge=1e-12)
    limit = fit.limit(psi)
    # the ridge of 1e-12 biases the coefficients by as much
    assert (limit - (psi @ drive.T + limit @ transition.T)).abs().max() < 1e-9
    assert torch.equal(fit.A[:4], torch.eye(4, 7, dtype=torch.float64))
    lifted = torch.hstack([psi, z]) @ projector_at_one(fit.A).T
    assert (lifted[:, 4:] - limit).abs().max() < 1e-9


def test_an_unstable_fit_refuses_to_give_a_limit(generator):
    psi = torch.randn(50, 2, generator=generator)
    z = torch.randn(50, 2, generator=generator)
    fit = edmd_with_input(psi, z, 1.1 * z)
    assert abs(fit.spectral_radius - 1.1) < 1e-4  # the ridge shrinks it slightly
    with pytest.raises(RuntimeError, match="spectral radius below 1"):
        fit.limit(psi)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(4, 2), torch.ones(4, 3), {}, "must both be"),
        (torch.ones(0, 2), torch.ones(0, 2), {}, "must not be empty"),
        (torch.full((4, 2), float("nan")), torch.ones(4, 2), {}, "must be finite"),
        (torch.ones(4, 2), torch.ones(4, 2), {"ridge": -1.0}, "ridge must be at least 0"),
        (torch.ones(4, 2), torch.ones(4, 2), {"tol": 1.0}, r"tol must lie in \[0, 1\)"),
        (torch.zeros(4, 2), torch.ones(4, 2), {}, "must not be zero everywhere"),
    ],
)
def test_bad_input_raises(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        edmd(x, y, **options)


def test_bad_input_of_the_input_form_raises():
    with pytest.raises(ValueError, match="must fit"):
        edmd_with_input(torch.ones(4, 2), torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="ridge must be positive"):
        edmd_with_input(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2), ridge=0.0)
