"""What a solve says: errors that name the argument, warnings, representations, the cost of asking."""

import math

import pytest
import torch
from core_problems import tanh_cell

from geomlib.core import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    NewtonKrylov,
    Picard,
    solve,
)
from geomlib.testing import count_host_syncs, emulated_device


def expanding(z):
    return 3 * z + 1


def test_missing_the_tolerance_raises_with_the_evidence():
    with pytest.raises(
        ConvergenceError, match=r"fixed point not reached for 2 of 2 samples \(max_steps\)"
    ) as caught:
        solve(lambda z: 0.99 * z + 1, torch.zeros(2, 3, dtype=torch.float64), solver=Picard(), max_steps=50)
    error = caught.value
    assert error.steps == 50
    assert error.residual.shape == (2,)
    # |f(z) - z| falls by 0.99 a step, and 1 + |z| grows on the way.
    assert 0.9 < error.rate < 0.99
    assert error.solution.reason == "max_steps"
    assert isinstance(error, RuntimeError)


def test_the_observed_rate_tells_expansion():
    with pytest.raises(ConvergenceError) as caught:
        solve(lambda z: -z, torch.ones(1, 2), solver=Picard(), max_steps=20)
    assert caught.value.rate == pytest.approx(1.0)


def test_missing_the_tolerance_warns_where_it_may_not_raise():
    with pytest.warns(ConvergenceWarning, match="not reached for 1 of 1"):
        solution = solve(expanding, torch.ones(1, 1), solver=Picard(), throw=False)
    assert not solution.converged.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"z0": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "floating dtype, got torch.int64"),
        ({"z0": torch.zeros(2, 3, dtype=torch.complex64)}, ValueError, "view a complex state as real pairs"),
        ({"z0": torch.zeros(0, 3)}, ValueError, r"not empty, got shape \(0, 3\)"),
        ({"z0": torch.zeros(3, 0)}, ValueError, r"not empty, got shape \(3, 0\)"),
        ({"z0": torch.tensor(1.0)}, ValueError, "batch"),
        ({"z0": [1.0]}, TypeError, "z0 must be a tensor, got list"),
        ({"tol": 0.0}, ValueError, "tol must be positive and finite, got 0.0"),
        ({"tol": math.nan}, ValueError, "tol must be positive and finite, got nan"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"contraction_factor": 1.3}, ValueError, r"contraction_factor must lie in \(0, 1\), got 1.3"),
        ({"f": lambda z: z[:, :1]}, ValueError, r"shaped like z0, \(2, 3\), got \(2, 1\)"),
        ({"f": lambda z: z.double()}, ValueError, "keep dtype and device of z0"),
        ({"f": lambda z: (z, z)}, TypeError, "must return a tensor like z0, got tuple"),
    ],
)
def test_what_cannot_be_solved_is_named_before_any_work(arguments, error, message):
    arguments = {"f": torch.cos, "z0": torch.zeros(2, 3), **arguments}
    f, z0 = arguments.pop("f"), arguments.pop("z0")
    with pytest.raises(error, match=message):
        solve(f, z0, **arguments)


def test_a_parameter_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"params\[1\] must be a tensor, got float"):
        solve(lambda z, a, b: a * z + b, torch.zeros(1, 1), torch.tensor(0.5), 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(damping=2.0), "damping must lie in"),
        (lambda: Anderson(damping=0.0), "damping must lie in"),
        (lambda: Anderson(memory=0), "memory must be at least 1"),
        (lambda: Anderson(ridge=1.0), "ridge must lie in"),
        (lambda: Broyden(memory=0), "memory must be at least 1"),
        (lambda: NewtonKrylov(inner=0), "inner must be at least 1"),
        (lambda: NewtonKrylov(halvings=-1), "halvings must not be negative"),
    ],
)
def test_solvers_check_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_representations_say_what_happened():
    done = solve(torch.cos, torch.zeros(2, 3), contraction_factor=0.9, tol=1e-3)
    assert repr(done).startswith("Solution(2/2 converged, at most ")
    assert "bound at most" in repr(done)
    with pytest.warns(ConvergenceWarning):
        failed = solve(expanding, torch.ones(1, 1), solver=Picard(), throw=False)
    assert repr(failed).startswith("Solution(0/1 converged (diverged), at most ")
    assert repr(Anderson()) == "Anderson(memory=6, ridge=0.01, damping=1.0)"


def test_the_trace_has_a_row_for_each_evaluation():
    calls = []
    f, u, W = tanh_cell(0.9)
    for solver in (Picard(), Anderson(), Broyden(), NewtonKrylov()):
        calls.clear()
        solution = solve(
            lambda z, u, W: calls.append(0) or f(z, u, W), torch.zeros_like(u), u, W, solver=solver
        )
        assert solution.trace.shape == (len(calls), len(u))
        assert int(solution.steps.max()) == len(calls)
        assert not solution.trace.requires_grad


def test_the_budget_of_evaluations_is_kept():
    calls = []
    f, u, W = tanh_cell(0.99)
    for solver in (Picard(), Anderson(), Broyden(), NewtonKrylov()):
        for budget in (1, 2, 7, 23):
            calls.clear()
            with pytest.warns(ConvergenceWarning):
                solve(
                    lambda z, u, W: calls.append(0) or f(z, u, W),
                    torch.zeros_like(u),
                    u,
                    W,
                    solver=solver,
                    tol=1e-300,
                    max_steps=budget,
                    throw=False,
                )
            assert len(calls) <= budget


def test_an_accelerator_is_waited_for_every_fourth_evaluation_at_most():
    try:
        device = emulated_device()
    except RuntimeError as error:
        pytest.skip(f"no emulated device: {error}")
    f, u, W = tanh_cell(0.99, width=16, dtype=torch.float32)
    u, W = u.to(device), W.to(device)
    for solver in (Picard(), Anderson(), Broyden()):
        with count_host_syncs() as syncs:
            solution = solve(f, torch.zeros_like(u), u, W, solver=solver, tol=1e-5, max_steps=2000)
        # One more to name the reason at the end.
        assert len(syncs) <= len(solution.trace) // 4 + 1, type(solver).__name__


def test_the_same_evaluations_are_counted_on_every_device(device):
    f, u, W = tanh_cell(0.9, dtype=torch.float32)
    expected = solve(f, torch.zeros_like(u), u, W, tol=1e-5)
    found = solve(f, torch.zeros_like(u, device=device), u.to(device), W.to(device), tol=1e-5)
    assert found.value.device.type == device.type
    assert found.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(found.value.cpu(), expected.value)


def test_on_meta_shapes_are_worked_out_forward_and_backward():
    f, u, W = tanh_cell(0.9)
    u, W = u.to("meta").requires_grad_(), W.to("meta").requires_grad_()
    for solver in (Picard(), Anderson(), Broyden(), NewtonKrylov()):
        solution = solve(f, torch.zeros_like(u), u, W, solver=solver)
        assert solution.reason == "not evaluated"
        assert repr(solution) == "Solution(not evaluated, value (4, 8) float64 on meta)"
        solution.value.sum().backward()
        assert W.grad.shape == W.shape
        assert W.grad.is_meta


def test_autocast_does_not_reach_the_iteration():
    f, u, W = tanh_cell(0.9, dtype=torch.float32)
    u = u.requires_grad_()
    expected = solve(f, torch.zeros_like(u), u, W, tol=1e-6)
    with torch.autocast("cpu"):
        found = solve(f, torch.zeros_like(u), u, W, tol=1e-6)
        found.value.sum().backward()
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=0)
    assert u.grad.dtype == torch.float32
