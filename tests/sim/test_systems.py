"""The exact systems are what they claim to be."""

import math

import pytest
import torch

from geomlib.sim.systems import (
    copy_memory,
    orbit,
    polynomial_deq,
    polynomial_equilibrium,
    rotation_tanh,
    stuart_landau,
    van_der_pol,
    van_der_pol_orbits,
)


def test_stuart_landau_steps_compose(generator):
    z = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    twice = stuart_landau(stuart_landau(z, mu=2.0, dt=0.1), mu=2.0, dt=0.2)
    assert (twice - stuart_landau(z, mu=2.0, dt=0.3)).abs().max() < 1e-12


def test_stuart_landau_solves_its_differential_equation(generator):
    z = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    dt, mu, omega = 1e-5, 1.5, 0.7
    x, y = z.unbind(-1)
    growth = (mu - x**2 - y**2)[:, None]
    field = growth * z + omega * torch.stack([-y, x], -1)
    slope = (stuart_landau(z, mu=mu, omega=omega, dt=dt) - stuart_landau(z, mu=mu, omega=omega, dt=-dt)) / (
        2 * dt
    )
    assert (slope - field).abs().max() < 1e-6  # central differences: error of order dt^2 times |z|^5


def test_van_der_pol_has_its_period():
    on_cycle = orbit(van_der_pol, torch.tensor([2.0, 0.0], dtype=torch.float64), 200)[-1]
    period = 6.6632868593  # mu = 1
    back = van_der_pol(on_cycle, dt=period, substeps=600)
    assert (back - on_cycle).abs().max() < 1e-4


def test_van_der_pol_orbits_start_in_the_square_and_repeat_with_the_seed():
    first, again, other = (
        van_der_pol_orbits(30, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (30, 5, 2)
    assert first[:, 0].abs().max() <= 3
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rotation_tanh_changes_its_attractor_at_gain_one():
    start = torch.tensor([0.3, 0.1], dtype=torch.float64)
    below, above = (
        orbit(lambda z, g=g: rotation_tanh(z, g), start, 3000)[-500:].norm(dim=1) for g in (0.95, 1.2)
    )
    assert below.max() < 1e-9
    assert 0.72 < above.min() < above.max() < 0.80


def test_polynomial_model_tends_to_its_equilibrium(generator):
    x = torch.randn(10, generator=generator, dtype=torch.float64)
    z = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    assert (orbit(lambda s: polynomial_deq(s, x), z, 120)[-1] - polynomial_equilibrium(x)).abs().max() < 1e-12


def test_copy_memory_asks_for_its_symbols_after_the_delay(generator):
    x, y = copy_memory(50, delay=20, symbols=10, generator=generator)
    assert x.shape == y.shape == (50, 40)
    assert torch.equal(x[:, :10], y[:, -10:])
    assert set(x[:, :10].unique().tolist()) == set(range(1, 9))
    assert (x[:, 10:29] == 0).all()
    assert (x[:, 29:] == 9).all()
    assert (y[:, :-10] == 0).all()


def test_systems_follow_dtype_and_device(device):
    for dtype in (torch.float32, torch.float64):
        z = torch.ones(3, 2, dtype=dtype).to(device)
        for f in (stuart_landau, van_der_pol, lambda s: rotation_tanh(s, 1.1)):
            assert f(z).dtype == dtype
            assert f(z).device == z.device


def test_bad_input_raises():
    with pytest.raises(ValueError, match="delay must be at least 1, got 0"):
        copy_memory(1, 0)
    with pytest.raises(ValueError, match="mu must be positive"):
        stuart_landau(torch.ones(2), mu=0.0)
    with pytest.raises(ValueError, match="substeps must be at least 1"):
        van_der_pol(torch.ones(2), substeps=0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        van_der_pol_orbits(0, 3)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        orbit(torch.tanh, torch.ones(1), -1)
    for f in (stuart_landau, van_der_pol, lambda z: rotation_tanh(z, math.e)):
        with pytest.raises(ValueError, match=r"state must be \(\.\.\., 2\)"):
            f(torch.ones(3))
