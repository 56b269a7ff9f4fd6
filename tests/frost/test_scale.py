"""Laws of scale: one step is a flow, scaling is exact and a group, and halving the step halves the error."""

import math
from itertools import pairwise

import pytest
import torch

from geomlib.frost import System, euler_step, integrate, printed_step, scale, trajectory

HURST = 0.8
LAMBDAS = [0.25, 0.5, 0.8, 1.7]


def draw(*shape, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator, dtype=torch.float64)


def nonlinear(d=12):
    """Return a system of four nonlinear maps with `A = G - id`, where `G` contracts."""
    W1, W2, B, C, D = (draw(d, d, seed=seed) for seed in range(5))
    W1, W2 = W1 / torch.linalg.matrix_norm(W1, 2), W2 / torch.linalg.matrix_norm(W2, 2)
    return System(
        lambda h: 0.6 * torch.tanh(h @ W1.T) @ W2.T - h,
        lambda x: torch.sin(x @ B.T) + 0.1 * x**2,
        lambda h: torch.tanh(h @ C.T) + h**2,
        lambda x: torch.cos(x @ D.T) * x,
    )


def homogeneous(d=12, activation=torch.relu):
    """Return a bias-free system with `A` and `C` of degree one (with ReLU), `B` and `D` linear."""
    W1, W2, B, C, D = (draw(d, d, seed=seed, size=d**-0.5) for seed in range(5))
    return System(
        lambda h: activation(h @ W1.T) @ W2.T - h,
        lambda x: x @ B.T,
        lambda h: activation(h @ C.T),
        lambda x: x @ D.T,
    )


def furthest(a, b):
    return (a - b).abs().max().item()


def test_a_residual_step_is_the_exact_flow_of_the_frozen_field():
    system, h, x = nonlinear(), draw(5, 12, seed=7), draw(5, 12, seed=8)
    velocity = system.velocity(h, x)
    frozen = System(lambda state: velocity, lambda x: torch.zeros_like(x), system.C, system.D)
    assert furthest(integrate(frozen, h, lambda t: x, 1.0, 100)[-1], euler_step(system, h, x)) <= 1e-12
    # The smooth field is another matter: the step is no approximation of it.
    assert furthest(integrate(system, h, lambda t: x, 1.0, 100)[-1], euler_step(system, h, x)) > 1e-2


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_printed_update_is_a_step_of_length_lambda(lam):
    system, h, x = nonlinear(), draw(5, 12, seed=7), draw(5, 12, seed=8)
    linear = System(system.A, lambda x: 3 * x, system.C, system.D)
    short = h + lam * system.A(h) + lam ** (1 + HURST) * 3 * x
    # The terms with lambda h cancel up to their rounding, a few units of the last place of numbers around 20.
    assert furthest(printed_step(linear, h, x, lam, HURST), short) <= 1e-14 * max(1, short.abs().max().item())


@pytest.mark.parametrize(("lam", "hurst"), [*((lam, HURST) for lam in LAMBDAS), (0.5, 0.2)])
def test_scaled_signals_obey_the_scaled_system(lam, hurst):
    system, h = nonlinear(), draw(12, seed=7)
    phases = draw(12, seed=8)

    def signal(t):
        return torch.sin(2 * t + phases)

    # Different numbers of steps, or both sides would make the same error.
    base = integrate(system, h, signal, lam * 2.0, 1400)
    scaled = integrate(scale(system, lam, hurst), h, lambda t: lam ** (-hurst) * signal(lam * t), 2.0, 1600)
    assert furthest(base[-1], scaled[-1]) <= 1e-11
    assert furthest(base[700], scaled[800]) <= 1e-11


def test_scaled_outputs_are_the_outputs_divided_by_the_amplitude():
    system, h, x, lam = nonlinear(), draw(12, seed=7), draw(12, seed=8), 0.3
    inner = scale(system, lam, HURST).output(h, lam**-HURST * x)
    assert furthest(inner, lam**-HURST * system.output(h, x)) <= 1e-13


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_unit_step_of_the_scaled_system_is_a_step_of_length_lambda(lam):
    system, h, x = nonlinear(), draw(5, 12, seed=7), draw(5, 12, seed=8)
    scaled = euler_step(scale(system, lam, HURST), h, lam**-HURST * x)
    assert furthest(scaled, euler_step(system, h, x, lam)) <= 1e-13


def amplitude_errors(system, lam, steps=40):
    """Compare the scaled system under the raw input with `lambda^H` times the base, on lambda's time axis."""
    x, start = draw(5, 12, seed=8), torch.zeros(5, 12, dtype=torch.float64)
    scaled = scale(system, lam, HURST)
    states, base = trajectory(scaled, start, x, steps), trajectory(system, start, x, steps, lam)
    return furthest(states, lam**HURST * base), furthest(scaled.output(states, x), system.output(base, x))


@pytest.mark.parametrize("lam", LAMBDAS[:3])
def test_with_homogeneous_maps_the_output_does_not_see_the_scale(lam):
    state, output = amplitude_errors(homogeneous(), lam)
    assert state <= 1e-12
    assert output <= 1e-12


@pytest.mark.parametrize("lam", LAMBDAS[:3])
def test_without_homogeneity_the_amplitude_law_fails_visibly(lam):
    state, output = amplitude_errors(homogeneous(activation=torch.tanh), lam)
    assert state > 1e-3
    assert output > 1e-3


@pytest.mark.parametrize(("lam", "mu"), [(0.5, 0.5), (0.3, 1.7), (2.0, 0.5)])
def test_scalings_compose_like_positive_numbers(lam, mu):
    system, h, x = nonlinear(), draw(5, 12, seed=7), draw(5, 12, seed=8)
    twice, once = scale(scale(system, mu, HURST), lam, HURST), scale(system, lam * mu, HURST)
    for name, argument in (("A", h), ("B", x), ("C", h), ("D", x)):
        image = getattr(once, name)(argument)
        # Relative to numbers up to some hundreds: C is quadratic and D is amplified.
        assert furthest(getattr(twice, name)(argument), image) <= 1e-13 * max(1, image.abs().max().item())


def test_scale_one_changes_nothing():
    system, h, x = nonlinear(), draw(5, 12, seed=7), draw(5, 12, seed=8)
    same = scale(system, 1.0, HURST)
    for name, argument in (("A", h), ("B", x), ("C", h), ("D", x)):
        assert torch.equal(getattr(same, name)(argument), getattr(system, name)(argument))


def test_halving_the_step_halves_the_error():
    system, h, x = nonlinear(), draw(12, seed=7), draw(12, seed=8)
    exact = integrate(system, h, lambda t: x, 4.0, 4000)[-1]
    errors = [(trajectory(system, h, x, 4 * 2**k, 0.5**k)[-1] - exact).norm().item() for k in range(3, 11)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.7 <= ratio <= 2.1 for ratio in ratios), ratios
    assert all(1.97 <= ratio <= 2.03 for ratio in ratios[-2:]), ratios


def test_runge_kutta_has_order_four():
    system, h, x = nonlinear(), draw(12, seed=7), draw(12, seed=8)
    exact = integrate(system, h, lambda t: x, 2.0, 640)[-1]
    errors = [(integrate(system, h, lambda t: x, 2.0, n)[-1] - exact).norm().item() for n in (10, 20, 40)]
    assert all(3.7 < math.log2(a / b) < 4.3 for a, b in pairwise(errors)), errors


def test_the_scale_carries_its_gradient():
    system, h, x = nonlinear(), draw(12, seed=7), draw(12, seed=8)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    hurst = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda lam, hurst: printed_step(system, h, x, lam, hurst), (lam, hurst))


def test_bad_arguments_are_refused():
    system, h = nonlinear(), draw(12)
    with pytest.raises(ValueError, match="lam must be positive"):
        scale(system, 0.0, HURST)
    with pytest.raises(ValueError, match="lam must be positive"):
        scale(system, math.nan, HURST)
    with pytest.raises(ValueError, match="steps must not be negative"):
        trajectory(system, h, h, -1)
    with pytest.raises(ValueError, match="length must be positive"):
        trajectory(system, h, h, 1, 0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        integrate(system, h, lambda t: h, 1.0, 0)
    with pytest.raises(ValueError, match="duration must be positive"):
        integrate(system, h, lambda t: h, -1.0, 5)
