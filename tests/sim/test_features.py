"""Laws of the second tier: features of norm one whose inner products are a kernel."""

import pytest
import torch

from geomlib.sim import RandomFourierFeatures, median_bandwidth
from geomlib.testing import assert_gradients


def build(*arguments, seed=0, **options):
    return RandomFourierFeatures(*arguments, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_features_have_norm_one(kernel, device):
    phi = build(3, 64, 0.7, kernel, device=device)
    features = phi(torch.randn(50, 3).to(device))
    assert (features.norm(dim=-1) - 1).abs().max().cpu() < 1e-6


# 4096 features average 2048 cosines: a standard error of at most 0.022, times 2.3 for 100 pairs, and for the
# Laplace kernel the cap on the heavy tail besides
@pytest.mark.parametrize(("kernel", "tolerance"), [("gaussian", 0.05), ("laplace", 0.08)])
def test_inner_products_approximate_the_kernel(kernel, tolerance):
    phi = build(3, 4096, 1.5, kernel, dtype=torch.float64)
    y = torch.randn(10, 3, dtype=torch.float64)
    assert (phi(y) @ phi(y).mT - phi.gram(y, y)).abs().max() < tolerance


def test_gram_is_the_written_formula():
    y, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    gaussian, laplace = build(2, 2, 2.0), build(2, 2, 2.0, "laplace")
    torch.testing.assert_close(gaussian.gram(y, other), torch.tensor([[-5 / 8]]).exp())
    torch.testing.assert_close(laplace.gram(y, other), torch.tensor([[-3 / 2]]).exp())


def test_frozen_frequencies_are_saved_but_not_trained():
    phi = build(3, 8, 1.0)
    assert not list(phi.parameters())
    other = build(3, 8, 1.0, seed=1)
    other.load_state_dict(phi.state_dict())
    assert torch.equal(other.frequencies, phi.frequencies)
    assert build(3, 8, 1.0, trainable=True).frequencies.requires_grad


def test_seed_decides_the_features():
    assert torch.equal(build(3, 8, 1.0).frequencies, build(3, 8, 1.0).frequencies)
    assert not torch.equal(build(3, 8, 1.0).frequencies, build(3, 8, 1.0, seed=1).frequencies)


def test_wide_kernel_sees_only_an_affine_function():
    phi = build(3, 16, 1e3, dtype=torch.float64)
    y = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64)) * torch.rand(20, 1).double()
    frequencies, scale = phi.frequencies, 8**-0.5
    affine = torch.cat([torch.ones(20, 8, dtype=y.dtype), y @ frequencies.mT], dim=-1) * scale
    assert (phi(y) - affine).norm() < 1e-3 * phi(y).norm()
    sines = phi(y)[:, 8:]
    assert (sines - affine[:, 8:]).norm() < 1e-3 * sines.norm()  # also relative to the small part alone


def test_narrow_kernel_hashes_its_input():
    phi, y = build(3, 4096, 1e-3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    off_diagonal = phi(y) @ phi(y).mT - torch.eye(10)
    assert off_diagonal.abs().max() < 0.1


def test_cauchy_frequencies_are_capped():
    phi = build(1, 100_000, 2.0, "laplace", dtype=torch.float64)
    assert phi.frequencies.abs().max() <= 1e4 / 2.0
    assert phi.frequencies.abs().max() > 1e3  # the tail is there


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_gradients(kernel):
    phi = build(3, 8, 2.0, kernel, dtype=torch.float64)
    assert_gradients(phi, torch.randn(2, 3, dtype=torch.float64))


def test_median_bandwidth_is_a_typical_distance(generator):
    y = torch.randn(2000, 50, generator=generator)
    assert abs(median_bandwidth(y, generator=generator) - 10) < 0.3  # sqrt(2 * 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 7, 1.0), "out_features must be even"),
        ((3, 0, 1.0), "out_features must be even"),
        ((0, 8, 1.0), "in_features must be at least 1"),
        ((3, 8, 0.0), "bandwidth must be positive"),
        ((3, 8, -1.0), "bandwidth must be positive"),
        ((3, 8, float("nan")), "bandwidth must be positive"),
        ((3, 8, 1.0, "cosine"), "kernel must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomFourierFeatures(*arguments)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="must have 3 features"):
        build(3, 8, 1.0)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        build(3, 8, 1.0)(torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="n of at least 2"):
        median_bandwidth(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="rows of y coincide"):
        median_bandwidth(torch.zeros(5, 3))
