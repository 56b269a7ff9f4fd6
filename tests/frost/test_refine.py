"""Laws of refinement: error bars hold at every step, resolutions share one fixed point, norms are exact."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from geomlib.core.fixed_point import Picard, Unrolled
from geomlib.frost import (
    KINDS,
    Transition,
    Vanilla,
    a_posteriori_bound,
    a_priori_bound,
    equilibrium,
    image,
    jacobian_norms,
    jacobians,
    sequence,
    step_factor,
    vector,
    zoom,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(samples=20, seed=1):
    return torch.randn(samples, 5, generator=seeded(seed), dtype=torch.float64)


def trained(mode="certified", steps=30, **options):
    """Return a model after some training, so that its weights are not those it was drawn with."""
    model = vector(5, 3, width=12, mode=mode, generator=seeded(), dtype=torch.float64, **options)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=1e-2)
    x, y = inputs(100, seed=2), torch.arange(100) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).final, y).backward()
        optimizer.step()
    return model


@torch.no_grad()
def limit(model, context, steps=2000):
    state = model.start(context)
    for _ in range(steps):
        state = model.step(state, context)
    return state


@pytest.mark.parametrize("form", ["normalised", "orthogonal"])
def test_both_bounds_hold_at_every_step_of_a_trained_model(form):
    model = trained(kappa=0.9, parametrisation=form)
    with torch.no_grad():
        context = model.inject(inputs())
        fixed, state = limit(model, context), model.start(context)
        before = a_priori_bound(model, context, 100)
        for t in range(101):
            error = (state - fixed).norm(dim=1)
            # 2000 steps end at the rounding of numbers of size 1.
            assert (error <= before[:, t] + 1e-13).all()
            assert (error <= a_posteriori_bound(model, state, context) + 1e-13).all()
            state = model.step(state, context)


def test_the_second_bound_is_the_sharper_one():
    model = trained(kappa=0.9)
    with torch.no_grad():
        context = model.inject(inputs())
        state = model(inputs(), steps=30).state
        assert (a_posteriori_bound(model, state, context) < a_priori_bound(model, context, 30)[:, 30]).all()


def test_bounds_on_sequences_and_images_take_all_places_together():
    for model, x in (
        (sequence(2, 3, width=6, kappa=0.9, generator=seeded()), torch.randn(4, 2, 7, generator=seeded())),
        (image(1, 3, width=6, kappa=0.9, generator=seeded()), torch.randn(4, 1, 12, 8, generator=seeded())),
    ):
        with torch.no_grad():
            context = model.double().inject(x.double())
            state, fixed = model(x.double()).state, limit(model, context, 600)
            error = (state - fixed).flatten(1).norm(dim=1)
            assert (error <= a_posteriori_bound(model, state, context) + 1e-12).all()
            assert (error <= a_priori_bound(model, context, model.steps)[:, -1] + 1e-12).all()


def test_a_transition_of_the_sup_norm_is_bounded_in_that_norm():
    class Mean(Transition):
        """Rows that sum to kappa in modulus: a bound of the sup norm, not of the 2-norm."""

        norm = "sup"

        def forward(self, state, prepared):
            return self.kappa * state[:, :1].expand_as(state)

    model = trained(steps=0)
    model.transition = Mean(0.9, dtype=torch.float64)
    with torch.no_grad():
        context = model.inject(inputs())
        fixed, state = limit(model, context), model.start(context)
        before = a_priori_bound(model, context, 100)
        for t in range(100):
            error = (state - fixed).abs().amax(1)
            assert (error <= before[:, t] + 1e-13).all()
            assert (error <= a_posteriori_bound(model, state, context) + 1e-13).all()
            state = model.step(state, context)
        assert jacobian_norms(model, state, context).max() > 1  # the 2-norm promises nothing here
        assert equilibrium(model, context, tol=1e-8).residual.max() <= 1e-8


@pytest.mark.parametrize("m", [0.5, 2, 3.5, 16])
def test_every_resolution_has_the_same_fixed_point(m):
    model = trained(kappa=0.5, steps=5)
    other = zoom(model, m)
    with torch.no_grad():
        fixed = limit(model, model.inject(inputs()), 200)
        found = limit(other, other.inject(inputs()), round(200 * m))
    torch.testing.assert_close(found, fixed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["euler", "leaky", "gated", "certified"])
def test_halving_the_step_of_a_trained_model_halves_its_error(mode):
    """Without a reference: the differences between successive resolutions halve as well."""
    model, x = trained(mode), inputs()
    model.steps = 4
    with torch.no_grad():
        states = [zoom(model, 2**k)(x).state for k in range(2, 9)]
    differences = [(a - b).norm().item() for a, b in pairwise(states)]
    ratios = [a / b for a, b in pairwise(differences)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios[1:]), ratios
    assert 1.95 < ratios[-1] < 2.05, ratios


def test_zoom_changes_a_copy_and_only_its_resolution():
    model = trained(steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finer = zoom(zoom(model, 2), 2)
    assert (finer.resolution, finer.steps, model.resolution, model.steps) == (4.0, 48, 1.0, 12)
    finer.rho.data += 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = inputs()
    assert torch.equal(zoom(model, 1)(x).logits, model(x).logits)


def test_the_factor_at_another_resolution_is_that_of_its_steps():
    model = trained(steps=0, kappa=0.5, scale=0.8)
    assert zoom(model, 4).contraction_factor() == pytest.approx(1 - 0.2 * 0.5)
    assert zoom(model, 0.8).contraction_factor() == pytest.approx(0.5)
    assert zoom(model, 0.7).contraction_factor() == pytest.approx(1 / 7 + 8 / 7 * 0.5)
    assert zoom(model, 0.5).contraction_factor() is None  # steps of 1.6, past 2 / (1 + kappa)


@pytest.mark.parametrize("length", [0.1, 0.43, 0.59, 1.0, 1.2, 4 / 3 - 1e-9])
def test_the_step_factor_is_the_slope_of_the_sharpest_map(length):
    kappa = 0.5
    slopes = [abs((1 - length) + length * slope) for slope in (-kappa, kappa)]
    assert step_factor(length, kappa) == pytest.approx(max(slopes))
    assert step_factor(length, kappa) < 1
    assert (step_factor(length, kappa) <= length + 1e-12) == (length >= 1 / (2 - kappa))


def test_steps_beyond_the_limit_do_not_contract():
    assert step_factor(2 / 1.5, 0.5) == pytest.approx(1)
    assert step_factor(1.4, 0.5) > 1


def test_gated_steps_contract_in_their_own_norm():
    """Random gates and random symmetric and unsymmetric maps of norm kappa, against the bound."""
    generator = seeded()
    for kappa in (0.3, 0.9):
        for _ in range(50):
            gate = torch.rand(5, generator=generator, dtype=torch.float64) * 0.98 + 0.02
            J = torch.randn(5, 5, generator=generator, dtype=torch.float64)
            J *= kappa / torch.linalg.matrix_norm(J, 2)
            step = torch.diag(1 - gate) + torch.diag(gate) @ J
            own = torch.diag(gate**-0.5) @ step @ torch.diag(gate**0.5)
            assert torch.linalg.matrix_norm(own, 2) <= step_factor(gate, kappa) + 1e-12
            J *= kappa / torch.linalg.matrix_norm(J, torch.inf)
            step = torch.diag(1 - gate) + torch.diag(gate) @ J
            assert torch.linalg.matrix_norm(step, torch.inf) <= step_factor(gate, kappa) + 1e-12


def test_the_equilibrium_is_the_limit_of_the_steps(device):
    model = vector(5, 3, width=8, device=device, generator=seeded())
    context = model.inject(torch.randn(6, 5, generator=seeded()).to(device))
    solution = equilibrium(model, context, tol=1e-4)
    gap = (solution.value - limit(model, context, 400)).norm(dim=1)
    assert gap.max() <= 2e-4


def test_gradients_of_the_equilibrium_are_those_of_a_long_unrolled_model():
    model, x = trained(steps=0, kappa=0.7), inputs(4)

    def gradients(adjoint, solver=None):
        context = model.inject(x)
        value = equilibrium(model, context, adjoint=adjoint, solver=solver, tol=1e-11).value
        loss = F.cross_entropy(model.read(value, context), torch.arange(4) % 3)
        used = [p for name, p in model.named_parameters() if "halting" not in name]
        return torch.autograd.grad(loss, used)

    implicit = gradients(None)
    unrolled = gradients(Unrolled(300), Picard())
    final = model(x, steps=300).final
    used = [p for name, p in model.named_parameters() if "halting" not in name]
    direct = torch.autograd.grad(F.cross_entropy(final, torch.arange(4) % 3), used)
    for a, b, c in zip(implicit, unrolled, direct, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", KINDS)
def test_jacobians_are_those_of_each_sample_alone(mode):
    model = vector(5, 3, width=6, mode=mode, generator=seeded(), dtype=torch.float64)
    context = model.inject(inputs(3))
    state = torch.randn(3, 6, generator=seeded(3), dtype=torch.float64)
    J = jacobians(model, state, context, t=2)
    for n in range(3):
        part = context.select(torch.tensor([n]))
        alone = torch.autograd.functional.jacobian(lambda h: model.step(h, part, 2), state[n : n + 1])  # noqa: B023
        torch.testing.assert_close(J[n], alone[0, :, 0])
    exact = jacobian_norms(model, state, context, t=2)
    torch.testing.assert_close(exact, torch.linalg.matrix_norm(J, 2))
    estimate = jacobian_norms(model, state, context, t=2, steps=300, generator=seeded())
    assert (estimate <= exact * (1 + 1e-12)).all()
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=0)


def test_jacobians_work_without_a_graph_around_them():
    model = sequence(2, 3, width=4, generator=seeded())
    with torch.no_grad():
        context = model.inject(torch.randn(2, 2, 5))
        assert jacobians(model, torch.randn(2, 4, 5), context).shape == (2, 20, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: zoom(m, 0.0), "m must be positive"),
        (lambda m: zoom(m, math.nan), "m must be positive"),
        (lambda m: zoom(m, 0.01), "leave a step"),
        (lambda m: zoom(vector(5, 3, mode="vanilla"), 2), "model must be a Frost, got Vanilla"),
        (lambda m: a_priori_bound(m, m.inject(inputs()), -1), "steps must not be negative"),
        (
            lambda m: jacobian_norms(m, torch.zeros(1, 12), m.inject(inputs(1)), steps=0),
            "steps must be at least",
        ),
        (lambda m: step_factor(0.0, 0.5), "length must be positive"),
        (lambda m: step_factor(torch.tensor([0.5, 1.5]), 0.5), "gates must be at most 1"),
        (lambda m: step_factor(0.5, -0.1), "kappa must not be negative"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    model = trained(steps=0)
    with pytest.raises(ValueError, match=message):
        make(model)


@pytest.mark.parametrize("mode", ["euler", "leaky", "gated"])
def test_models_without_a_factor_have_no_error_bars(mode):
    model = trained(mode, steps=0)
    context = model.inject(inputs())
    for bound in (
        lambda: a_priori_bound(model, context, 3),
        lambda: a_posteriori_bound(model, context.x, context),
        lambda: equilibrium(model, context),
    ):
        with pytest.raises(ValueError, match="model must contract"):
            bound()


def test_untied_models_have_a_jacobian_at_each_step():
    model = vector(5, 3, width=6, mode="vanilla", generator=seeded())
    assert isinstance(model, Vanilla)
    context = model.inject(torch.randn(2, 5))
    assert not torch.equal(jacobians(model, context.x, context, 1), jacobians(model, context.x, context, 2))
