"""Laws of the basis networks: official sizes, causality, seeds, refusals."""

import pytest
import torch

from geomlib.sim import ConvBasis, TemporalConvBasis, mlp


def test_mlp_is_linear_layers_with_relu_between():
    net = mlp(3, 5, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3)
    hidden = torch.relu(x @ net[0].weight.mT + net[0].bias)
    torch.testing.assert_close(net(x), hidden @ net[2].weight.mT + net[2].bias)


def test_initial_weights_fill_the_range_of_torch():
    weight = mlp(100, 400, generator=torch.Generator().manual_seed(0))[0].weight
    assert weight.abs().max() <= 0.1
    torch.testing.assert_close(weight.std(), torch.tensor(0.1 / 3**0.5), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: mlp(6, 5, 4, **options),
        lambda **options: ConvBasis(1, 3, 4, 8, **options),
        lambda **options: TemporalConvBasis(1, 3, 2, 3, 4, **options),
    ],
)
def test_same_seed_same_weights_on_every_device(build, device):
    here = build(generator=torch.Generator().manual_seed(3))
    there = build(generator=torch.Generator().manual_seed(3), device=device)
    other = build(generator=torch.Generator().manual_seed(4))
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu())
    assert any(not torch.equal(a, b) for a, b in zip(here.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("size", [4, 5, 8, 14, (6, 9)])
def test_conv_basis_takes_any_size_from_four(size, device):
    height, width = (size, size) if isinstance(size, int) else size
    basis = ConvBasis(2, 3, 7, size, device=device)
    assert basis(torch.zeros(5, 2, height, width, device=device)).shape == (5, 7)


def test_conv_basis_trains_on_a_single_smallest_image():
    basis = ConvBasis(1, 3, 7, 4)
    basis(torch.randn(1, 1, 4, 4)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in basis.parameters())


def test_temporal_basis_never_looks_ahead():
    basis = TemporalConvBasis(2, 4, 3, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(1, 2, 60, dtype=torch.float64)
    changed = x.clone()
    changed[..., 40:] += 1
    same = (basis(x) == basis(changed)).all(dim=-1)[0]
    assert same[:40].all()
    assert not same[40]


def test_receptive_field_is_exact():
    # ReLU can hide a dependence, so many random nets vote: none reaches further, one reaches all the way
    reach = 0
    for seed in range(20):
        basis = TemporalConvBasis(1, 8, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).double()
        x = torch.randn(1, 1, 40, dtype=torch.float64, requires_grad=True)
        basis(x)[0, -1].square().sum().backward()
        reach = max(reach, 40 - int(x.grad[0, 0].nonzero()[0]))
    assert reach == basis.receptive_field == 13


def test_official_temporal_basis_sees_the_whole_task():
    assert TemporalConvBasis(1, 10, 8, 8, 32).receptive_field == 3571


def test_weight_norm_has_one_gain_for_an_output_channel():
    basis = TemporalConvBasis(1, 10, 1, 8, 32)
    gains = [p.shape for name, p in basis.named_parameters() if name.endswith("original0")]
    assert gains == [(10, 1, 1), (10, 1, 1)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(3), "two or more positive integers"),
        (lambda: mlp(3, 0), "two or more positive integers"),
        (lambda: ConvBasis(1, 3, 4, 3), "size must be at least 4"),
        (lambda: ConvBasis(1, 3, 4, (8, 2)), "size must be at least 4"),
        (lambda: ConvBasis(0, 3, 4, 8), "must be positive"),
        (lambda: TemporalConvBasis(1, 3, 0, 3, 4), "levels must be at least 1"),
        (lambda: TemporalConvBasis(1, 3, 2, 3, 4, dropout=1.0), "dropout must lie in"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("basis", "x", "message"),
    [
        (mlp(3, 4), torch.zeros(2, 5), "must have 3 features"),
        (mlp(3, 4), torch.zeros(2, 3).long(), "floating point"),
        (ConvBasis(1, 3, 4, 8), torch.zeros(2, 1, 8, 9), r"must be \(batch, 1, 8, 8\)"),
        (ConvBasis(1, 3, 4, 8), torch.zeros(2, 1, 8, 8).byte(), "floating point"),
        (TemporalConvBasis(1, 3, 2, 3, 4), torch.zeros(2, 9, 1), r"must be \(batch, 1, time\)"),
        (TemporalConvBasis(1, 3, 2, 3, 4), torch.zeros(2, 1, 9).long(), "floating point"),
    ],
)
def test_bad_inputs_are_refused(basis, x, message):
    with pytest.raises(ValueError, match=message):
        basis(x)
