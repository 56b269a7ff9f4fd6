"""Laws of the ends of a spectrum, and of sets of directions that stay orthonormal."""

import pytest
import torch

from geomlib.incrt.counts import greedy_directions, planted_operator
from geomlib.incrt.operator import residual_matvec, residual_operator, sym
from geomlib.incrt.spectrum import extreme_eigenpairs, fix_sign, lanczos_extremes, orthonormalise

LAMBDAS = (8, 6, 4.5, 3.3, 2.4, 1.7, 1.1, 0.6, 0.3, 0.1)


def frame(d, m, generator):
    return torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64)).Q


def test_ends_of_a_matrix_are_eigenpairs_with_a_fixed_sign(device, generator):
    A = sym(torch.randn(9, 9, generator=generator, dtype=torch.float64))
    found = extreme_eigenpairs(A.to(device))
    for value, u in ((found.top, found.u_top), (found.bottom, found.u_bottom)):
        u, value = u.cpu(), value.cpu()
        torch.testing.assert_close(A @ u, value * u)
        assert u[u.abs().argmax()] > 0
    assert found.residual < 1e-12
    assert found.bottom < A.diagonal().min() <= A.diagonal().max() < found.top


def test_sign_does_not_depend_on_the_sign_that_came(generator):
    vectors = torch.randn(7, 4, generator=generator)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(fix_sign(vectors * signs), fix_sign(vectors))
    assert torch.equal(fix_sign(-vectors[:, 0]), fix_sign(vectors[:, 0]))


@pytest.mark.parametrize("steps", [3, 20])
def test_lanczos_finds_both_ends(steps, device, generator):
    A = sym(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    expected = extreme_eigenpairs(A)
    on = A.to(device)
    found = lanczos_extremes(lambda v: on @ v, start.to(device), steps=steps, restarts=200, tol=1e-8)
    # A residual r leaves an error of r^2 / gap in the value and r / gap in the vector.
    for name, tolerance in (("top", 1e-10), ("bottom", 1e-10), ("u_top", 1e-6), ("u_bottom", 1e-6)):
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(expected, name), rtol=0, atol=tolerance
        )


def test_lanczos_stays_off_the_captured_directions_of_a_wide_operator(generator):
    S, Ma = planted_operator(LAMBDAS, 600, generator=generator, dtype=torch.float64)
    Q = greedy_directions(residual_operator(S, Ma), 5.0).Q
    start = torch.randn(600, generator=generator, dtype=torch.float64)
    start = start - Q @ (Q.mT @ start)
    found = lanczos_extremes(lambda v: residual_matvec(S, Ma, Q, v), start)
    assert float(found.top) == pytest.approx(4.5, abs=1e-8)
    assert float(found.bottom) == pytest.approx(-8, abs=1e-8)
    assert (Q.mT @ found.u_top).abs().max() < 1e-8
    assert found.residual < 1e-4


def test_lanczos_of_a_small_or_vanishing_operator():
    A = torch.diag(torch.tensor([2.0, -1.0, 0.0]))
    found = lanczos_extremes(lambda v: A @ v, torch.ones(3))
    torch.testing.assert_close(torch.stack([found.top, found.bottom]), torch.tensor([2.0, -1.0]))
    nothing = lanczos_extremes(torch.zeros_like, torch.ones(4))
    assert nothing.top == nothing.bottom == 0
    assert torch.linalg.vector_norm(nothing.u_top) == pytest.approx(1)
    # A start that is an eigenvector exhausts its space at once.
    alone = lanczos_extremes(lambda v: A @ v, torch.tensor([0.0, 1.0, 0.0]))
    assert alone.top == alone.bottom == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_passes_leave_nearly_dependent_directions_orthonormal(dtype, generator):
    """One pass would leave an overlap of eps over what is left of the vector, here 1e4 times larger."""
    Q = frame(40, 10, generator).to(dtype)
    near = Q @ torch.randn(10, generator=generator, dtype=dtype)
    near = near + 1e-4 * torch.randn(40, generator=generator, dtype=dtype)
    u = orthonormalise(near, Q)
    assert (Q.mT @ u).abs().max() < 10 * torch.finfo(dtype).eps
    once = near - Q @ (Q.mT @ near)
    assert (Q.mT @ (once / torch.linalg.vector_norm(once))).abs().max() > 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthonormalise(torch.eye(3)[0], torch.eye(3)), "at most d = 3 directions, got 3"),
        (lambda: orthonormalise(torch.eye(3)[0], torch.eye(3)[:, :1]), "span of those before"),
        (lambda: orthonormalise(torch.zeros(3)), "span of those before"),
        (lambda: orthonormalise(torch.ones(3), torch.eye(4)), "columns of length 3"),
        (lambda: extreme_eigenpairs(torch.ones(2, 3)), r"A must be square, got shape \(2, 3\)"),
        (lambda: lanczos_extremes(torch.sin, torch.zeros(3)), "start must be a vector that is not zero"),
        (lambda: lanczos_extremes(torch.sin, torch.ones(3), steps=0), "steps must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
