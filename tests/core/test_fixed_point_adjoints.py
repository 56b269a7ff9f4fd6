"""Laws of the derivatives: exact, of any order, at constant memory, and honest when they cannot be had."""

import pytest
import torch
import torch.nn.functional as F
from core_problems import affine, tanh_cell

from geomlib.core import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Direct,
    Implicit,
    NewtonKrylov,
    OneStep,
    Picard,
    Unrolled,
    solve,
)
from geomlib.testing import assert_gradients, saved_tensor_bytes


def gradients(f, u, W, weights, **options):
    """Gradients of a weighted sum of the solution for both parameters."""
    u, W = u.clone().requires_grad_(), W.clone().requires_grad_()
    value = solve(f, torch.zeros_like(u), u, W, **options).value
    return torch.autograd.grad((value * weights).sum(), (u, W))


def relative_error(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "solver", [Anderson(), Broyden(), Picard(), NewtonKrylov()], ids=lambda s: type(s).__name__
)
def test_first_and_second_derivatives_match_finite_differences(solver):
    def value(u, W):
        f = lambda z, u, W: torch.tanh(z @ W.T + u)  # noqa: E731
        return solve(
            f, torch.zeros_like(u), u, 0.3 * W, solver=solver, adjoint=Implicit(solver), tol=1e-13
        ).value

    assert_gradients(value, torch.randn(2, 3), torch.randn(3, 3))


def test_derivatives_match_for_parameters_of_several_shapes_and_states_of_images():
    def value(x, kernel, bias, gain):
        def f(z, x, kernel, bias, gain):
            return torch.tanh(gain * F.conv2d(z, kernel, bias, padding=1) + x)

        return solve(f, torch.zeros_like(x), x, 0.1 * kernel, bias, gain, tol=1e-13).value

    assert_gradients(
        value, torch.randn(1, 2, 2, 2), torch.randn(2, 2, 3, 3), torch.randn(2), torch.tensor(0.7)
    )


def test_derivatives_of_the_direct_solver_match_finite_differences():
    def value(u, W):
        f = lambda z, u, W: z @ W.T + u  # noqa: E731
        return solve(f, torch.zeros_like(u), u, 0.3 * W, solver=Direct(), tol=1e-13).value

    assert_gradients(value, torch.randn(2, 3), torch.randn(3, 3))


def test_the_third_derivative_is_right():
    """Z = 1 / (1 - a) for the map a z + 1, so the third derivative is 6 / (1 - a)^4."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = solve(lambda z, a: a * z + 1, torch.zeros(1, 1, dtype=torch.float64), a, tol=1e-13).value.sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, a, create_graph=True)
    torch.testing.assert_close(y.detach(), torch.tensor(96.0, dtype=torch.float64))


def test_the_implicit_gradient_is_that_of_a_long_unrolling():
    f, u, W = tanh_cell(0.95)
    weights = torch.randn_like(u)
    implicit = gradients(f, u, W, weights, tol=1e-12, max_steps=500)
    unrolled = gradients(f, u, W, weights, adjoint=Unrolled(300), tol=1e-6)
    assert relative_error(implicit, unrolled) < 1e-6


def test_the_implicit_gradient_is_that_of_the_closed_form():
    f, u, W, _ = affine(0.9)
    weights = torch.randn_like(u)
    v, V = u.clone().requires_grad_(), W.clone().requires_grad_()
    exact = torch.linalg.solve(torch.eye(len(V), dtype=V.dtype) - V, v.T).T
    expected = torch.autograd.grad((exact * weights).sum(), (v, V))
    for solver in (Anderson(), Direct()):
        assert relative_error(gradients(f, u, W, weights, solver=solver, tol=1e-13), expected) < 1e-10


def test_torchdeqs_implicit_gradient_is_ours():
    get_deq = pytest.importorskip("torchdeq").get_deq
    f, u, W = tanh_cell(0.9)
    weights = torch.randn_like(u)
    v, V = u.clone().requires_grad_(), W.clone().requires_grad_()
    deq = get_deq(ift=True, f_max_iter=500, b_max_iter=500, f_tol=1e-12, b_tol=1e-12)
    theirs = torch.autograd.grad(
        (deq(lambda z: f(z, v, V), torch.zeros_like(v))[0][-1] * weights).sum(), (v, V)
    )
    assert relative_error(gradients(f, u, W, weights, tol=1e-12), theirs) < 1e-8


def test_unrolling_is_plain_autograd():
    f, u, W = tanh_cell(0.9)
    weights = torch.randn_like(u)
    unrolled = gradients(f, u, W, weights, adjoint=Unrolled(7), tol=1.0)
    v, V = u.clone().requires_grad_(), W.clone().requires_grad_()
    z = torch.zeros_like(v)
    for _ in range(7):
        z = f(z, v, V)
    expected = torch.autograd.grad((z * weights).sum(), (v, V))
    for ours, theirs in zip(unrolled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_unrolling_without_a_number_goes_on_to_the_tolerance():
    f, u, W = tanh_cell(0.9)
    solution = solve(f, torch.zeros_like(u), u, W, adjoint=Unrolled(), tol=1e-8)
    assert (solution.residual <= 1e-8).all()
    assert solution.steps.unique().numel() == 1


def test_one_step_is_another_gradient():
    f, u, W = tanh_cell(0.9)
    weights = torch.randn_like(u)
    exact = gradients(f, u, W, weights, tol=1e-12)
    cheap = gradients(f, u, W, weights, adjoint=OneStep(), tol=1e-12)
    assert relative_error(cheap, exact) > 0.01
    v, V = u.clone().requires_grad_(), W.clone().requires_grad_()
    z = solve(f, torch.zeros_like(u), u, W, tol=1e-12).value
    expected = torch.autograd.grad((f(z, v, V) * weights).sum(), (v, V))
    assert relative_error(cheap, expected) < 1e-14


def test_the_value_does_not_depend_on_the_adjoint():
    f, u, W = tanh_cell(0.9)
    v = u.clone().requires_grad_()
    values = [
        solve(f, torch.zeros_like(u), v, W, solver=Picard(), adjoint=adjoint, tol=1e-10).value.detach()
        for adjoint in (Implicit(), OneStep())
    ]
    torch.testing.assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_gradient_is_as_exact_for_any_scale_of_the_loss(scale):
    f, u, W = tanh_cell(0.9)
    weights = torch.randn_like(u)
    unit = gradients(f, u, W, weights, tol=1e-12)
    scaled = gradients(f, u, W, scale * weights, tol=1e-12)
    assert relative_error([g / scale for g in scaled], unit) < 1e-9


def test_a_sample_without_gradient_is_no_obstacle():
    f, u, W = tanh_cell(0.9)
    weights = torch.randn_like(u)
    weights[1] = 0
    grad_u, _ = gradients(f, u, W, weights)
    assert torch.equal(grad_u[1], torch.zeros_like(grad_u[1]))
    assert torch.isfinite(grad_u).all()


def test_saved_memory_does_not_grow_with_the_steps():
    f, u, W = tanh_cell(0.99, batch=8, width=16)
    u, W = u.requires_grad_(), W.requires_grad_()

    def saved(adjoint, tol):
        run = lambda: solve(f, torch.zeros_like(u), u, W, solver=Picard(), adjoint=adjoint, tol=tol)  # noqa: E731
        return saved_tensor_bytes(lambda: run().value, exclude=[u, W]), int(run().steps.max())

    loose, few = saved(Implicit(), 1e-2)
    tight, many = saved(Implicit(), 1e-12)
    assert many > 3 * few
    assert tight == loose == u.numel() * u.element_size()  # the solution, and nothing else
    depths = torch.tensor([10.0, 20.0, 40.0, 80.0])
    unrolled = torch.tensor([float(saved(Unrolled(int(depth)), 1.0)[0]) for depth in depths])
    # Linear in depth: the same bytes for every further step.
    slopes = unrolled.diff() / depths.diff()
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes))


def test_no_gradient_flows_to_the_initial_state():
    f, u, W = tanh_cell(0.9)
    start = torch.zeros_like(u).requires_grad_()
    value = solve(f, start, u.requires_grad_(), W).value
    assert torch.autograd.grad(value.sum(), start, allow_unused=True) == (None,)


def test_parameters_that_do_not_matter_get_no_gradient():
    a, unused = torch.tensor(0.5, requires_grad=True), torch.ones(3, requires_grad=True)
    value = solve(lambda z, a, unused: a * z + 1, torch.zeros(1, 1), a, unused).value
    assert torch.autograd.grad(value.sum(), (a, unused), allow_unused=True)[1] is None


def test_a_map_that_ignores_its_state_has_the_gradient_of_a_function():
    b = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    value = solve(lambda z, b: b.sin(), torch.zeros_like(b), b).value
    (first,) = torch.autograd.grad(value.sum(), b, create_graph=True)
    torch.testing.assert_close(first, b.cos())
    (second,) = torch.autograd.grad(first.sum(), b)
    torch.testing.assert_close(second, -b.sin())


def test_without_grad_mode_nothing_is_recorded():
    f, u, W = tanh_cell(0.9)
    with torch.no_grad():
        value = solve(f, torch.zeros_like(u), u.requires_grad_(), W).value
    assert not value.requires_grad


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(), OneStep()], ids=lambda a: type(a).__name__)
def test_a_closed_over_tensor_that_requires_grad_is_refused(adjoint):
    weight = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="not among params"):
        solve(lambda z: weight * z + 1, torch.zeros(1, 1), adjoint=adjoint)
    with torch.no_grad():  # where no gradient is asked for, nothing is lost
        assert solve(lambda z: weight * z + 1, torch.zeros(1, 1), adjoint=adjoint).converged.all()


def test_a_backward_pass_that_does_not_converge_says_so():
    f, u, W = tanh_cell(0.99)
    u = u.requires_grad_()
    hopeless = Implicit(Picard(), tol=1e-12, max_steps=3)
    value = solve(f, torch.zeros_like(u), u, W, adjoint=hopeless).value
    with pytest.raises(ConvergenceError, match="implicit gradient not reached"):
        value.sum().backward()
    value = solve(f, torch.zeros_like(u), u, W, adjoint=hopeless, throw=False).value
    with pytest.warns(ConvergenceWarning, match="implicit gradient not reached"):
        value.sum().backward()


def test_gradients_are_the_same_on_every_device(device):
    f, u, W = tanh_cell(0.9, dtype=torch.float32)
    weights = torch.randn_like(u)
    expected = gradients(f, u, W, weights, tol=1e-6)
    found = gradients(f, u.to(device), W.to(device), weights.to(device), tol=1e-6)
    assert relative_error([g.cpu() for g in found], expected) < 1e-4


@pytest.mark.parametrize("arguments", [{"tol": 0.0}, {"max_steps": 0}])
def test_implicit_checks_its_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Implicit(**arguments)


def test_unrolled_checks_its_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Unrolled(0)
