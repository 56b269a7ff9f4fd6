"""Conjugate gradients and Newton's method on energies: exact on known systems, honest on indefinite ones."""

import itertools

import pytest
import torch

from geomlib.core import conjugate_gradient, newton_cg, newton_descent, real_inner


def systems(batch=3, n=8, shift=1.0, seed=0):
    """Symmetric matrices, one a sample, with right-hand sides and the product."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    A = A @ A.mT + shift * torch.eye(n, dtype=torch.float64)
    b = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    return A, b, lambda v: torch.einsum("bij,bj->bi", A, v)


@pytest.mark.parametrize("batch", [1, 3])
def test_it_solves_each_sample_to_its_tolerance(batch):
    A, b, apply = systems(batch)
    for tol in (1e-2, 1e-10):
        x, info = conjugate_gradient(apply, b, tol=tol)
        residual = torch.linalg.vector_norm(apply(x) - b, dim=1) / torch.linalg.vector_norm(b, dim=1)
        assert (residual <= 1.01 * tol).all()
        assert bool(info.converged.all())
        torch.testing.assert_close(info.residual, residual, rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("batch", [1, 3])
def test_it_ends_after_as_many_steps_as_different_eigenvalues(batch):
    values = torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0, 9.0], dtype=torch.float64)
    _, info = conjugate_gradient(lambda v: values * v, torch.ones(batch, 6, dtype=torch.float64), tol=1e-12)
    assert info.steps.tolist() == [3] * batch


def test_it_minimises_the_error_over_the_krylov_space():
    A, b, apply = systems()
    krylov = [b, apply(b), apply(apply(b))]
    basis = torch.stack(krylov, 2)
    best = torch.linalg.solve(basis.mT @ A @ basis, basis.mT @ b.unsqueeze(2))
    x, info = conjugate_gradient(apply, b, tol=1e-14, max_steps=3)
    assert not bool(info.converged.any())
    torch.testing.assert_close(x, (basis @ best).squeeze(2), rtol=1e-7, atol=1e-9)


def test_complex_states_of_any_shape_are_real_vectors(generator):
    # Re z + 3 Im z is real-linear and symmetric for the real inner product, and not complex-linear.
    apply = lambda z: torch.complex(z.real, 3 * z.imag)  # noqa: E731
    b = torch.complex(*torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64))
    x, _ = conjugate_gradient(apply, b, tol=1e-12)
    torch.testing.assert_close(apply(x), b)
    torch.testing.assert_close(real_inner(b, 1j * b), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_samples_do_not_know_each_other():
    _, b, apply = systems(batch=4)
    b[1] = 0.0
    b[2] *= 1e9
    together, info = conjugate_gradient(apply, b, tol=1e-11)
    A, _, _ = systems(batch=4)
    for i in range(4):
        alone, one = conjugate_gradient(lambda v, i=i: v @ A[i], b[i : i + 1], tol=1e-11)
        torch.testing.assert_close(alone[0], together[i])
        assert int(one.steps) == int(info.steps[i])
    assert info.steps[1] == 0


def test_tolerances_can_differ_between_samples():
    _, b, apply = systems()
    tol = torch.tensor([1e-1, 1e-5, 1e-10], dtype=torch.float64)
    _, info = conjugate_gradient(apply, b, tol=tol)
    assert (info.residual <= tol).all()
    assert info.steps[0] < info.steps[2]


@pytest.mark.parametrize("batch", [1, 3])
def test_negative_and_zero_curvature_are_told(batch):
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    b = torch.ones(batch, 3, dtype=torch.float64)
    for last, expected in ((1.0, False), (0.0, True), (-1.0, True)):
        spectrum = torch.cat([values[:2], torch.tensor([last], dtype=torch.float64)])
        x, info = conjugate_gradient(lambda v, s=spectrum: s * v, b, tol=1e-12, max_steps=50)
        assert info.negative.tolist() == [expected] * batch
        assert bool(torch.isfinite(x).all())


def test_one_indefinite_sample_does_not_stop_the_others():
    A, b, _ = systems()
    A[1] -= 50 * torch.eye(8)
    x, info = conjugate_gradient(lambda v: torch.einsum("bij,bj->bi", A, v), b, tol=1e-10)
    assert info.negative.tolist() == [False, True, False]
    torch.testing.assert_close(x[[0, 2]], torch.linalg.solve(A, b)[[0, 2]])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_good_preconditioner_saves_steps_and_changes_nothing_else(batch):
    _, b, _ = systems(batch)
    scale = torch.logspace(0, 6, 8, dtype=torch.float64)
    small = 0.1 * torch.ones(8, 8, dtype=torch.float64)
    apply = lambda v: scale * v + v @ small  # noqa: E731
    plain, slow = conjugate_gradient(apply, b, tol=1e-10)
    x, fast = conjugate_gradient(apply, b, tol=1e-10, precondition=lambda v: v / scale)
    torch.testing.assert_close(x, plain)
    assert (fast.steps < slow.steps).all()


def test_the_layout_of_memory_does_not_matter():
    _, b, apply = systems()
    turned = b.T.contiguous().T
    torch.testing.assert_close(conjugate_gradient(apply, turned)[0], conjugate_gradient(apply, b)[0])


def test_an_empty_batch_is_solved():
    x, info = conjugate_gradient(lambda v: v, torch.zeros(0, 3))
    assert x.shape == (0, 3)
    assert info.steps.shape == (0,)


def test_it_runs_on_every_device(device):
    A, b, _ = systems()
    A = A.to(device)
    x, info = conjugate_gradient(lambda v: torch.einsum("bij,bj->bi", A, v), b.to(device), tol=1e-10)
    torch.testing.assert_close(x.cpu(), torch.linalg.solve(A.cpu(), b))
    assert x.device.type == device.type
    assert bool(info.converged.all())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tol": -1.0}, "tol must not be negative"), ({"max_steps": 0}, "max_steps must be at least 1")],
)
def test_options_that_solve_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, torch.ones(1, 1), **options)
    with pytest.raises(ValueError, match="b must be floating"):
        conjugate_gradient(lambda v: v, torch.ones(1, 1, dtype=torch.int64))


def double_well(x):
    """`sum (x^2 - 1)^2 / 4 + x / 10`: two minima, a maximum between them."""
    return ((x * x - 1) ** 2 / 4 + x / 10).sum(1)


WELL = {
    "energy": double_well,
    "gradient": lambda x: x * (x * x - 1) + 0.1,
    "hessian_product": lambda x, v: (3 * x * x - 1) * v,
}


@pytest.mark.parametrize("start", [-3.0, -0.01, 0.05, 0.5, 1e3])
def test_newton_descends_to_a_minimum_from_everywhere(start):
    x, monitor = newton_cg(start=torch.full((1, 1), start, dtype=torch.float64), tol=1e-10, **WELL)
    assert monitor.finish() == "converged"
    assert float(3 * x * x - 1) > 0
    assert double_well(x) <= double_well(torch.full((1, 1), start, dtype=torch.float64))


def test_newton_converges_quadratically():
    start = torch.full((1, 1), 1.5, dtype=torch.float64)
    _, monitor = newton_cg(start=start, tol=1e-13, **WELL)
    small = [float(r) for r in torch.stack(monitor.residuals).flatten() if 1e-9 < r < 1e-1]
    assert all(after < 10 * before**1.4 for before, after in itertools.pairwise(small))
    assert monitor.steps < 10


def test_a_step_that_overshoots_is_shortened():
    # Newton's step on sqrt(1 + x^2) from x = 3 leads to -27 and away.
    energy = lambda x: (1 + x * x).sqrt().sum(1)  # noqa: E731
    slope = lambda x: x / (1 + x * x).sqrt()  # noqa: E731
    curvature = lambda x, v: v / (1 + x * x) ** 1.5  # noqa: E731
    for convex in (False, True):
        x, monitor = newton_cg(
            energy, slope, curvature, torch.full((1, 1), 3.0, dtype=torch.float64), convex=convex
        )
        assert monitor.finish() == "converged"
        assert abs(float(x)) < 1e-9


def test_newton_on_a_quadratic_takes_one_step():
    A, b, apply = systems()

    def direction(x, right, accuracy):
        return torch.linalg.solve(A, right), torch.zeros(len(x), dtype=torch.bool)

    x, monitor = newton_descent(
        lambda x: real_inner(x, apply(x) / 2 - b), lambda x: apply(x) - b, direction, torch.zeros_like(b)
    )
    torch.testing.assert_close(x, torch.linalg.solve(A, b))
    assert monitor.steps == 2  # evaluations of the gradient: before and after
