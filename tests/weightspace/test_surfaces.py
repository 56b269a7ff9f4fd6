"""Grey-level estimators: what they read, what they miss, and what is left after a shuffle."""

import math
from itertools import pairwise

import pytest
import torch

from geomlib.weightspace import T, dbc, haar_energies, haar_exponent, project, ranks, slopes, variogram
from geomlib.weightspace.shapes import fbm_surface, plane


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(n, seed=0):
    return torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)


def shuffled(W, seed=0):
    return W.flatten()[torch.randperm(W.numel(), generator=seeded(seed))].view_as(W)


def reference_dbc(W, r, variant):
    """Loop over whole blocks."""
    W = (W - W.min()) / (W.max() - W.min())
    h, boxes, blocks = r / min(W.shape), 0, 0
    for i in range(0, W.shape[0] - r + 1, r):
        for j in range(0, W.shape[1] - r + 1, r):
            block = W[i : i + r, j : j + r]
            low, high = float(block.min()), float(block.max())
            if variant == "dbc":
                boxes += math.floor(high / h) - math.floor(low / h) + 1
            else:
                boxes += max(1, math.ceil((high - low) / h))
            blocks += 1
    return boxes * W.numel() / (blocks * r * r)


@pytest.mark.parametrize("variant", ["dbc", "rdbc"])
@pytest.mark.parametrize("shape", [(64, 64), (70, 101)])
def test_differential_counts_are_the_loop_over_blocks(shape, variant, generator, device):
    W = torch.rand(shape, generator=generator, dtype=torch.float64)
    for sizes in (None, [2, 3, 5, 10, 17]):
        found = dbc(W.to(device), variant=variant, sizes=sizes)
        assert found.counts == pytest.approx([reference_dbc(W, int(r), variant) for r in found.sizes])


def test_constant_surface_has_the_dimension_of_its_grid():
    found = dbc(torch.full((64, 64), 3.0))
    assert (found.D, found.status) == (2.0, "constant")
    assert found.counts == (1024, 256, 64, 16)


@pytest.mark.parametrize("variant", ["dbc", "rdbc"])
def test_plane_has_dimension_two(variant):
    assert abs(dbc(plane(256), variant=variant).D - 2) < 0.02


def test_uniform_noise_at_this_size_reads_288():
    D = [dbc(torch.rand(256, 256, generator=seeded(seed))).D for seed in range(3)]
    assert abs(sum(D) / 3 - 2.88) < 0.02


def test_differential_counting_orders_roughness_and_compresses_it():
    means = [
        sum(dbc(fbm_surface(256, H, generator=seeded(s))).D for s in range(3)) / 3
        for H in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert all(rougher > smoother for rougher, smoother in pairwise(means))
    assert means[0] < 2.5  # the graph has dimension 2.9


def test_differential_counting_reads_the_tails_and_ranks_do_not():
    uniform, heavy = torch.rand(256, 256, generator=seeded(0)), noise(256) ** 3
    assert dbc(uniform).D - dbc(heavy).D > 0.4  # neither has any spatial structure
    assert abs(dbc(uniform, rank=True).D - dbc(heavy, rank=True).D) < 0.01


@pytest.mark.parametrize("monotone", [lambda W: W**3, torch.exp, lambda W: 5 * W - 2])
def test_ranks_see_only_the_order(monotone):
    W = fbm_surface(64, 0.5, generator=seeded(0))
    assert torch.equal(ranks(monotone(W)), ranks(W))
    assert dbc(monotone(W), rank=True) == dbc(W, rank=True)


def test_equal_values_share_their_rank(device):
    W = torch.tensor([[2.0, 1.0, 2.0], [5.0, 2.0, 1.0]]).to(device)
    assert ranks(W).tolist() == [[0.5555555555555556, 0, 0.5555555555555556], [1, 0.5555555555555556, 0]]
    assert ranks(torch.ones(3)).tolist() == [0, 0, 0]


def test_few_scales_are_no_dimension():
    assert dbc(noise(32)).status == "insufficient_scales"
    assert math.isnan(dbc(noise(7)).D)


def test_haar_energy_is_what_the_transformation_loses(generator, device):
    W = torch.randn(24, 40, generator=generator, dtype=torch.float64)
    found = haar_energies(W.to(device)).cpu()
    assert len(found) == 4  # the shortest side goes 24, 12, 6, 3, 1
    V = W
    for k, energy in enumerate(found.tolist()):
        V = V[: V.shape[0] // 2 * 2, : V.shape[1] // 2 * 2]
        assert energy == pytest.approx(float((V - project(V, 1)).square().mean()) * 4 / 3, rel=1e-12)
        V = T(V, 1)
        assert k < 4


@pytest.mark.parametrize("ratio", [2, 3])
def test_haar_energies_add_up_to_the_variance(ratio, generator):
    n = ratio**4
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    total = sum(haar_energies(W, ratio=ratio).tolist()) * (1 - ratio**-2)
    assert total == pytest.approx(W.var(correction=0).item(), rel=1e-12)


def test_batched_energies_give_the_exponents_of_the_loop(generator):
    W = torch.randn(5, 64, 64, generator=generator)
    E = haar_energies(W, d=2)
    zeta = -slopes([2.0**k for k in range(5)], E[:, :5])
    for i in range(5):
        assert zeta[i].item() == pytest.approx(haar_exponent(W[i]).zeta, abs=1e-12)


@pytest.mark.parametrize("shape", [(512, 512), (4096,), (64, 64, 64)])
def test_white_noise_loses_everything_at_the_finest_scale(shape, generator):
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = haar_exponent(W, levels=5)
    assert found.zeta == pytest.approx(-len(shape), abs=0.1)
    assert math.isnan(found.D)


@pytest.mark.parametrize("hurst", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_haar_exponent_reads_roughness(hurst):
    found = [haar_exponent(fbm_surface(512, hurst, generator=seeded(seed))) for seed in range(3)]
    zeta = sum(f.zeta for f in found) / 3
    assert abs(zeta - 2 * hurst) < 0.25
    assert abs(sum(f.D for f in found) / 3 - (3 - hurst)) < 0.10


def test_haar_exponent_needs_the_order_of_the_cells():
    W = fbm_surface(256, 0.5, generator=seeded(0))
    assert abs(haar_exponent(shuffled(W)).zeta + 2) < 0.1


def test_haar_exponent_belongs_to_the_spectrum():
    """Random phases keep it: it is a second-order statistic."""
    W = fbm_surface(256, 0.5, generator=seeded(0))
    amplitude = torch.fft.rfft2(W).abs()
    phase = torch.fft.rfft2(noise(256, 1))
    surrogate = torch.fft.irfft2(amplitude * phase / phase.abs(), s=W.shape)
    assert abs(haar_exponent(surrogate).zeta - haar_exponent(W).zeta) < 0.15


def test_haar_exponent_is_the_same_on_every_device(device):
    W = fbm_surface(64, 0.5, generator=seeded(0))
    assert haar_exponent(W.to(device)).zeta == pytest.approx(haar_exponent(W).zeta, abs=1e-12)


def test_surfaces_without_detail_say_so():
    assert haar_exponent(torch.ones(64, 64)).status == "constant"
    assert haar_exponent(noise(4)).status == "insufficient_scales"
    assert math.isnan(haar_exponent(torch.ones(64, 64)).zeta)
    assert haar_exponent(noise(1)).values == ()
    assert variogram(torch.ones(64, 64)).status == "constant"
    assert variogram(noise(2)).status == "insufficient_scales"


@pytest.mark.parametrize(("hurst", "D"), [(0.1, 2.72), (0.3, 2.59), (0.5, 2.44), (0.7, 2.29), (0.9, 2.15)])
def test_variogram_of_known_surfaces(hurst, D):
    found = [variogram(fbm_surface(512, hurst, generator=seeded(seed))).D for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(D, abs=0.03)


def test_variogram_is_the_mean_squared_increment(device):
    W = torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
    found = variogram(W.to(device), lags=[1, 2, 3])
    assert found.scales == (1.0,)  # the shortest side has two cells
    assert found.values == pytest.approx(((1 + 4 + 0 + 1 + 1 + 0 + 9) / 7,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dbc(torch.ones(8, 8), variant="other"), "variant must be one of"),
        (lambda: dbc(torch.tensor(1.0)), "W must have at least one axis"),
        (lambda: dbc(noise(8), sizes=[4, 2]), "sizes must grow and fit"),
        (lambda: dbc(noise(8), sizes=[9]), "sizes must grow and fit"),
        (lambda: dbc(torch.tensor([[math.nan, 1.0]])), "W must be finite"),
        (lambda: haar_exponent(noise(8), levels=2), "levels must be at least 3"),
        (lambda: haar_exponent(torch.full((8, 8), math.inf)), "W must be finite"),
        (lambda: haar_energies(noise(8), ratio=1), "ratio must be at least 2"),
        (lambda: haar_energies(noise(8), d=3), "d must lie between"),
        (lambda: variogram(noise(8), lags=[2, 1]), "lags must be positive and growing"),
        (lambda: ranks(torch.tensor([math.nan])), "W must be finite"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
