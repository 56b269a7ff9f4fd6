"""Laws of the stable invariant model: official sizes, composition, the rank knee, refusals."""

import pytest
import torch
from torch import nn

from geomlib.sim import SIM, ConvBasis, RandomFourierFeatures, SpectralMix, TemporalConvBasis, mlp


def build(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    basis = mlp(6, 16, 16, 12, generator=generator, device=options.get("device"))
    return SIM(basis, 12, 3, readout_features=8, generator=generator, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: SIM(ConvBasis(1, 24, 50, 28), 50, 10), 81_480),
        (lambda: SIM(ConvBasis(1, 21, 50, 28), 50, 10, second_features=104), 80_466),
        (lambda: SIM(ConvBasis(3, 38, 50, 32), 50, 10), 168_694),
        (lambda: SIM(ConvBasis(3, 36, 50, 32), 50, 10, second_features=104), 168_264),
        (lambda: SIM(TemporalConvBasis(1, 10, 8, 8, 32), 32, 10), 17_294),
        (lambda: SIM(TemporalConvBasis(1, 10, 8, 8, 32), 32, 10, second_features=32), 17_294),
        (lambda: SIM(mlp(2, 256, 256, 256), 256, 3, readout_features=256), 396_035),
    ],
)
def test_parameter_counts_are_the_official_ones(model, parameters):
    assert count(model()) == parameters


@pytest.mark.parametrize("options", [{}, {"second_features": 20}])
@pytest.mark.parametrize("mode", ["free", "orth", "oblique", "rotation", "stable"])
def test_forward_and_backward_run_on_every_device(options, mode, device):
    model = build(mode=mode, device=device, **options)
    model(torch.randn(4, 6).to(device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.device.type == device.type for p in model.parameters())


def test_single_tier_is_basis_mix_inverse_basis_readout():
    model, x = build(), torch.randn(4, 6)
    left, right = model.mix.factors()
    surviving = model.basis(x) @ right.mT @ left.mT
    torch.testing.assert_close(model(x), model.out(model.inverse_basis(surviving)))


def test_two_tier_puts_kernel_features_before_the_mix():
    model, x = build(second_features=20, bandwidth=3.0), torch.randn(4, 6)
    assert isinstance(model.features, RandomFourierFeatures)
    assert model.mix.dim == 20
    torch.testing.assert_close(model(x), model.decode(model.mix(model.features(model.basis(x)))))


def test_without_mix_it_is_the_plain_network():
    model, x = build(mix=False), torch.randn(4, 6)
    torch.testing.assert_close(model(x), model.out(model.inverse_basis(model.basis(x))))
    assert count(build()) - count(model) == 2 * 12 * 6


def test_a_ready_mix_is_taken_as_it_is():
    mix = SpectralMix(12, mode="stable", ones=2, rotations=1)
    assert build(mix=mix).mix is mix


def test_sequences_are_decoded_position_by_position():
    generator = torch.Generator().manual_seed(0)
    model = SIM(TemporalConvBasis(1, 4, 2, 3, 8, generator=generator), 8, 5, generator=generator)
    x = torch.randn(2, 1, 11)
    assert model(x).shape == (2, 11, 5)
    torch.testing.assert_close(model(x)[:, :7], model(x[..., :7]))


def test_state_dict_round_trip_is_exact_with_the_kernel_features():
    model, other, x = build(second_features=20), build(seed=1, second_features=20), torch.randn(4, 6)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(other.features.frequencies, model.features.frequencies)


def train(model, x, y, steps, lr=3e-3, batch=256):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(x), (batch,), generator=generator)
        loss = nn.functional.mse_loss(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("mode", ["orth", "oblique"])
def test_training_keeps_the_projection_and_lowers_the_loss(mode):
    x = torch.randn(256, 6)
    y = x[:, :3].sin()
    model = build(mode=mode)
    before = nn.functional.mse_loss(model(x), y).item()
    train(model, x, y, steps=200, lr=1e-2)
    assert nn.functional.mse_loss(model(x), y) < 0.5 * before
    assert model.mix.fixed_point_defect() < 1e-5


def test_same_seed_gives_the_same_trained_numbers():
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    first, second, third = (train(build(seed, mode="orth"), x, y, 5) for seed in (0, 0, 1))
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), third(x))


def test_rank_knee_stands_at_the_number_of_inputs():
    """Two inputs move the equilibrium: one surviving direction is too few, two are enough."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 16, generator=generator)
    weight *= 0.8 / torch.linalg.matrix_norm(weight, 2)
    drive = torch.randn(16, 2, generator=generator)
    x = 2 * torch.rand(2000, 2, generator=generator) - 1
    z = torch.zeros(len(x), 16)
    for _ in range(100):
        z = torch.tanh(z @ weight.mT + x @ drive.mT)

    def error(rank):
        generator = torch.Generator().manual_seed(0)
        basis = mlp(2, 64, 64, 32, generator=generator)
        model = SIM(basis, 32, 16, readout_features=64, rank=rank, mode="orth", generator=generator)
        train(model, x[:1500], z[:1500], steps=600)
        with torch.no_grad():
            return ((model(x[1500:]) - z[1500:]).norm() / z[1500:].norm()).item()

    assert error(1) > 0.2
    assert error(2) < 0.06


def test_bad_inputs_are_refused():
    model = build()
    with pytest.raises(ValueError, match="must not be empty"):
        model(torch.zeros(0, 6))
    with pytest.raises(ValueError, match="floating point"):
        model(torch.zeros(2, 6).long())
    with pytest.raises(ValueError, match="must have 6 features"):
        model(torch.zeros(2, 7))
    model.check_finite = True
    with pytest.raises(ValueError, match="must be finite"):
        model(torch.full((2, 6), torch.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_features": 21}, "out_features must be even"),
        ({"second_features": 20, "bandwidth": 0.0}, "bandwidth must be positive"),
        ({"rank": 13}, "rank must lie in"),
        ({"mode": "none"}, "mode must be one of"),
        ({"mix": SpectralMix(11)}, "mix must act on the 12 features"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_basis_of_the_wrong_width_is_named():
    with pytest.raises(ValueError, match="basis must give 10 features"):
        SIM(mlp(6, 8), 10, 3)(torch.zeros(2, 6))
