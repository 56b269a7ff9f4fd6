"""Laws of the monotone equilibrium network: one root, always found, rightly differentiated."""

import warnings

import pytest
import torch
from torch.func import functional_call

from geomlib.core.fixed_point import ConvergenceWarning
from geomlib.sim.monotone import MonDEQ, peaceman_rachford
from geomlib.testing import assert_gradients


def make(width=16, **options):
    options = {"tol": 1e-9, "max_steps": 500, "dtype": torch.float64, "monotonicity": 0.1} | options
    return MonDEQ(5, width, 3, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("monotonicity", [0.05, 0.5, 1.0])
def test_the_symmetric_part_stays_below_its_bound_through_training(monotonicity, generator):
    model = make(monotonicity=monotonicity)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
        W = model.weight().detach()
        assert torch.linalg.eigvalsh((W + W.T) / 2).max() <= 1 - monotonicity + 1e-8


def test_the_root_solves_the_equation_from_every_start(generator):
    model = make()
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    starts = [torch.randn(6, 16, generator=generator, dtype=torch.float64) * 10**k for k in range(-2, 3)]
    roots = torch.stack([model.equilibrium(x, start).value.detach() for start in starts])
    assert (roots - roots[0]).abs().max() < 1e-5
    residual = model.cell(roots[0], model.inject(x)) - roots[0]
    assert residual.abs().max() < 1e-7


def test_it_converges_where_plain_iteration_does_not(generator):
    model = make(width=32)
    with torch.no_grad():
        model.B.mul_(30)
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        u, z = model.inject(x), torch.zeros(4, 32, dtype=torch.float64)
        for _ in range(200):
            z = model.cell(z, u)
    assert z.norm() > 1e100
    model.max_steps = 20_000
    assert model.equilibrium(x).converged.all()


def test_gradients_to_second_order_equal_finite_differences(generator):
    model = make(width=4, tol=1e-13, max_steps=4000)
    names, values = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, 5, generator=generator, dtype=torch.float64)

    def run(x, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert_gradients(run, x, *(value.detach() for value in values))


def test_gradient_equals_the_unrolled_one(generator):
    # Small weights: plain iteration contracts too and can be unrolled.
    model = make(width=8)
    with torch.no_grad():
        model.A.mul_(0.1).add_(0.75 * torch.eye(8))
        model.B.mul_(0.1)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    implicit = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    z, u = torch.zeros(4, 8, dtype=torch.float64), model.inject(x)
    for _ in range(300):
        z = model.cell(z, u)
    unrolled = torch.autograd.grad(model.readout(z).square().sum(), list(model.parameters()))
    for one, other in zip(implicit, unrolled, strict=True):
        assert (one - other).norm() < 1e-6 * (1 + other.norm())


def test_what_does_not_converge_is_counted_and_warned_about_once(generator):
    model = make(max_steps=4)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="not_converged=3 of 3"):
        solution = model.equilibrium(x)
    assert solution.reason == "max_steps"
    assert model.diagnostics.not_converged == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_steps_count_until_each_sample_converged():
    W = torch.diag(torch.tensor([0.0, 0.9]))
    u = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    _, residual, steps, trace = peaceman_rachford(W, u, torch.zeros(2, 2), tol=1e-6, max_steps=400)
    assert (residual <= 1e-6).all()
    assert steps[0] > steps[1] == 4
    assert trace.shape[1] == 2


def test_it_runs_on_every_device(device, generator):
    model = MonDEQ(5, 8, 3, generator=torch.Generator().manual_seed(0), device=device)
    x = torch.randn(4, 5, generator=generator)
    y = model(x.to(device))
    y.square().sum().backward()
    reference = MonDEQ(5, 8, 3, generator=torch.Generator().manual_seed(0))
    assert (y.cpu() - reference(x)).abs().max() < 1e-5
    assert all(torch.isfinite(p.grad.cpu()).all() for p in model.parameters())


def test_shapes_on_the_meta_device():
    model = MonDEQ(5, 8, 3, device="meta")
    assert model(torch.empty(4, 5, device="meta")).shape == (4, 3)
    assert model.equilibrium(torch.empty(4, 5, device="meta")).reason == "not evaluated"


def test_bad_input_raises():
    for options, message in (
        ({"monotonicity": 0.0}, "monotonicity must be positive"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"width": 0}, "out_features must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    model = make()
    for x, message in (
        (torch.ones(2, 4), r"x must be \(batch, 5\)"),
        (torch.ones(0, 5), "x must not be empty"),
        (torch.ones(2, 5, dtype=torch.int64), "x must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x)
