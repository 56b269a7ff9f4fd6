"""Permutations: what they leave exactly, what they change, and the exact test that is made of them."""

import copy
import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from geomlib.weightspace import T, box_counts, fit_dimension, haar_energies, segment, slopes
from geomlib.weightspace.canonical import rescale, same_function
from geomlib.weightspace.layers import layer_dimension
from geomlib.weightspace.layouts import lay_out
from geomlib.weightspace.shapes import fbm_surface, gasket, random_mask
from geomlib.weightspace.symmetry import (
    against_copies,
    block_perm,
    bounded_perm,
    holm,
    perm_test,
    permute_pair,
    permuted,
    rescale_pair,
    tree_perm,
)
from geomlib.weightspace.thresholds import occupied_set
from geomlib.weightspace.units import trace


def osc(x):
    return float(x.max() - x.min())


def grid_zeta(batch):
    """Haar exponent of each grid, from four scales."""
    energies = haar_energies(batch, d=2)[:, :4]
    return -slopes([2.0**k for k in range(4)], energies)


# What every permutation of the cells leaves alone, and how little that is ---------------------------------


def test_the_global_segmentation_is_invariant_under_every_permutation(generator):
    W = torch.randn(37, 53, generator=generator)
    shuffled = permuted(lay_out(W), "cells", 1, generator=generator)[0, 0]
    before, after = (occupied_set(x) for x in (W, shuffled))
    assert (before.tau, before.cells) == (after.tau, after.cells)
    assert torch.equal(W.flatten().sort().values, shuffled.flatten().sort().values)
    assert segment(W.shape, 4).max() == segment(shuffled.shape, 4).max()
    assert not torch.equal(box_counts(before.mask).counts[1:], box_counts(after.mask).counts[1:])


@pytest.mark.parametrize("r", [2, 4, 16])
def test_permutations_of_blocks_commute_with_averages(r, generator):
    W = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    rows, columns = block_perm(64, r, generator=generator), block_perm(48, r, generator=generator)
    k = int(math.log2(r))
    coarse = T(W, k)[rows[::r] // r][:, columns[::r] // r]
    torch.testing.assert_close(T(W[rows][:, columns], k), coarse, rtol=1e-12, atol=1e-12)
    mask = W > 1
    assert torch.equal(box_counts(mask, [r]).counts, box_counts(mask[rows][:, columns], [r]).counts)


def test_automorphisms_of_the_tree_leave_every_count_alone(generator):
    mask = gasket(8)
    rows, columns = (tree_perm(8, generator=generator) for _ in range(2))
    moved = mask[rows][:, columns]
    assert not torch.equal(moved, mask)
    assert torch.equal(box_counts(moved).counts, box_counts(mask).counts)


def test_automorphisms_of_the_ternary_tree_leave_ternary_counts_alone(generator):
    mask = random_mask((81, 81), 0.05, generator=generator)
    moved = mask[tree_perm(4, ratio=3, generator=generator)]
    assert torch.equal(box_counts(moved, ratio=3).counts, box_counts(mask, ratio=3).counts)
    assert not torch.equal(box_counts(moved, ratio=2).counts, box_counts(mask, ratio=2).counts)


@pytest.mark.parametrize("surface", ["fbm", "white"])
def test_bounded_permutations_fade_at_large_scale(surface, generator):
    n = 256
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if surface == "fbm":
        W = fbm_surface(n, 0.5, generator=generator)
    for reach in (1, 4, 16, 64):
        rows, columns = (bounded_perm(n, reach, generator=generator) for _ in range(2))
        for r in (2, 8, 32, 128):
            k = int(math.log2(r))
            one = (T(W[rows], k) - T(W, k)).abs().max()
            two = (T(W[rows][:, columns], k) - T(W, k)).abs().max()
            assert one <= min(1, 2 * reach / r) * osc(W) + 1e-12
            assert two <= 2 * min(1, 2 * reach / r) * osc(W) + 1e-12


@pytest.mark.parametrize(
    ("surface", "targets"),
    [("fbm", (0.157, 0.080, 0.0165, 0.0024)), ("white", (1.40, 1.20, 0.64, 0.24))],
)
def test_smooth_tensors_forget_a_bounded_permutation_and_noise_hardly_does(surface, targets, generator):
    """Relative change of the averages for a displacement of 16, on 512 x 512 cells."""
    n = 512
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if surface == "fbm":
        W = fbm_surface(n, 0.5, generator=generator)
    rows, columns = (bounded_perm(n, 16, generator=generator) for _ in range(2))
    moved = W[rows][:, columns]
    found = [float((T(moved, k) - T(W, k)).norm() / T(W, k).norm()) for k in (1, 3, 5, 7)]
    # A rough surface is one draw, and its level moves by a factor of two; for noise the targets are means of
    # eight draws, whose scatter at the largest boxes is 0.05.
    for value, target in zip(found, targets, strict=True):
        if surface == "fbm":
            assert target / 2.5 < value < target * 2.5
        else:
            assert abs(value - target) < 0.15
    assert found == sorted(found, reverse=True)


def test_the_bound_is_not_idle():
    """A reversal of sixteen neighbours at a jump comes within a factor of four of it."""
    W = (torch.arange(64) >= 32).double()
    moved = torch.cat([torch.arange(24), torch.arange(24, 40).flip(0), torch.arange(40, 64)])
    reach = int((moved - torch.arange(64)).abs().max())
    change = float((T(W[moved], 5) - T(W, 5)).abs().max())
    assert (reach, change) == (15, 0.25)
    assert change > 2 * reach / 32 / 4


@pytest.mark.parametrize("reach", [0, 0.5, 1, 3, 20.5, 1000])
def test_bounded_permutations_are_bounded(reach, generator):
    permutation = bounded_perm(200, reach, generator=generator)
    assert torch.equal(permutation.sort().values, torch.arange(200))
    assert (permutation - torch.arange(200)).abs().max() <= reach
    if reach >= 3:
        assert not torch.equal(permutation, torch.arange(200))


def test_the_dimension_of_a_structured_set_is_not_invariant(generator):
    mask = gasket(8)
    window = {"window": (2, 64)}

    def dimension(m):
        found = box_counts(m)
        return fit_dimension(found.sizes, found.counts, **window).D

    shuffled = [
        dimension(mask[torch.randperm(256, generator=generator)][:, torch.randperm(256, generator=generator)])
        for _ in range(5)
    ]
    assert dimension(mask) == pytest.approx(math.log2(3), abs=1e-12)
    assert min(shuffled) - dimension(mask) > 0.08


# Permuted copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cells", "rc", "rows", "cols"])
@pytest.mark.parametrize("layout", ["matrix", "mosaic", "slices", "norms", "nd"])
@pytest.mark.parametrize("groups", [1, 2])
def test_copies_hold_the_same_values(kind, layout, groups, generator, device):
    W = torch.randn(8, 12, 2, 2, generator=generator).to(device)
    grid = lay_out(W, layout, groups=groups)
    copies = permuted(grid, kind, 3, generator=generator)
    assert copies.shape == (3, *grid.values.shape)
    assert copies.device.type == device.type
    for one in copies.cpu():
        assert torch.equal(one.flatten().sort().values, grid.values.cpu().flatten().sort().values)
        assert not torch.equal(one, grid.values.cpu())


@pytest.mark.parametrize("layout", ["matrix", "mosaic", "slices", "norms", "nd"])
@pytest.mark.parametrize("kind", ["rows", "cols", "rc"])
def test_permuting_the_grid_is_permuting_the_tensor(layout, kind):
    W = torch.arange(6 * 5 * 2 * 3).reshape(6, 5, 2, 3).double()
    # One seed draws the same permutation of units for every layout; the plainest one shows which.
    plain = permuted(lay_out(W[:, :, 0, 0]), kind, 1, generator=torch.Generator().manual_seed(3))[0, 0]
    rows, columns = (plain // 30).long()[:, 0], (plain % 30 // 6).long()[0]
    assert not torch.equal(plain, W[:, :, 0, 0])
    expected = lay_out(W[rows][:, columns], layout).values
    found = permuted(lay_out(W, layout), kind, 1, generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(found, expected)


def test_grouped_units_stay_in_their_group(generator):
    W = torch.arange(2).repeat_interleave(3)[:, None] * 100 + torch.arange(4)  # (6, 4): group * 100 + input
    for _ in range(10):
        copy_ = permuted(lay_out(W, groups=2), "rc", 1, generator=generator)[0, 0]
        halves = (copy_ // 100).reshape(2, 3, 4)
        assert all((half == half[0, 0]).all() for half in halves)
        assert all(torch.equal(row.sort().values % 100, torch.arange(4)) for row in copy_)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_shuffled_masks_keep_their_size_and_favour_no_cell(density, generator):
    mask = torch.arange(100).reshape(10, 10) < 100 * density
    copies = permuted(lay_out(mask), "cells", 4000, generator=generator)[:, 0]
    assert (copies.sum((1, 2)) == mask.sum()).all()
    share = copies.double().mean(0)
    # 100 cells at once: five standard deviations of a binomial.
    assert (share - density).abs().max() <= 5 * math.sqrt(density * (1 - density) / 4000)


# The test -------------------------------------------------------------------------------------------------


def test_p_values_are_uniform_for_exchangeable_input(generator):
    results = [
        perm_test(torch.randn(32, 32, generator=generator), kind, permutations=39, generator=generator)
        for kind in ("cells", "rc")
        for _ in range(50)
    ]
    assert kstest([result.rank(generator=generator) for result in results], "uniform").pvalue > 0.001
    for level in (0.05, 0.1, 0.25, 0.5):
        # Exact means that no level is exceeded: beyond it by three standard deviations of a binomial.
        share = sum(result.p <= level for result in results) / 100
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 100)


@pytest.mark.parametrize("seed", range(20))
def test_no_level_is_exceeded_whichever_value_is_the_observed_one(seed):
    """Exactness without a draw: of `n` exchangeable values at most `k` may get a p-value of `k / n`."""
    values = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    p = []
    for i in range(6):
        queue = [values[i : i + 1], torch.cat([values[:i], values[i + 1 :]])]
        found = against_copies(lay_out(torch.eye(8)), lambda batch, q=queue: q.pop(0), "rows", 5)
        assert found.observed == values[i]
        p.append(found.p)
    for k in range(1, 7):
        assert sum(one <= k / 6 + 1e-12 for one in p) <= k
    assert min(p) == 1 / 6


def test_ranks_of_constant_statistics_are_uniform(generator):
    grid = lay_out(torch.eye(8))
    found = against_copies(grid, lambda batch: torch.ones(len(batch)), "rows", 1)
    ranks = [found.rank(generator=generator) for _ in range(500)]
    assert kstest(ranks, "uniform").pvalue > 0.001


def test_a_fractal_is_as_far_out_as_the_test_can_say(generator):
    found = perm_test(gasket(7).double(), "cells", threshold="nonzero", permutations=49, generator=generator)
    assert found.p == 1 / 50
    assert found.z < -10


def test_the_test_is_its_own_reference(generator):
    W = torch.randn(40, 56, generator=generator)
    found = perm_test(W, "rc", permutations=25, generator=torch.Generator().manual_seed(1))
    copies = permuted(lay_out(occupied_set(W).mask), "rc", 25, generator=torch.Generator().manual_seed(1))
    values = [fit_dimension((c := box_counts(copy_[0])).sizes, c.counts, window="full").D for copy_ in copies]
    assert found.observed == pytest.approx(layer_dimension(W).D, abs=1e-12)
    assert found.values.tolist() == pytest.approx(values, abs=1e-12)
    every = torch.tensor([found.observed, *values], dtype=torch.float64)
    distance = (every - every.mean()).abs()
    assert found.p == (1 + int((distance[1:] >= distance[0] - 1e-12).sum())) / 26
    assert found.z == pytest.approx(float((every[0] - every[1:].mean()) / every[1:].std()))


def test_constant_statistics_have_p_one(generator):
    found = perm_test(torch.eye(32), "rc", statistic=lambda w: w.sum((1, 2)), permutations=9)
    assert (found.p, found.sd) == (1.0, 0.0)
    assert math.isnan(found.z)


def test_order_is_seen_only_by_the_kind_that_destroys_it(generator):
    """A ramp along the columns survives a permutation of rows and not one of columns."""
    W = torch.linspace(0, 6, 128, dtype=torch.float64).cos() + 0.1 * torch.randn(
        96, 128, generator=generator, dtype=torch.float64
    )
    rows, columns = (
        perm_test(W, kind, statistic=grid_zeta, permutations=99, generator=generator)
        for kind in ("rows", "cols")
    )
    assert rows.p > 0.01
    assert columns.p == 0.01


def test_batches_do_not_change_the_result(monkeypatch):
    W = torch.randn(32, 32)
    draw = lambda: perm_test(W, permutations=20, generator=torch.Generator().manual_seed(0)).values  # noqa: E731
    whole = draw()
    monkeypatch.setattr("geomlib.weightspace.permutation.CHUNK", 3 * 1024)
    assert torch.equal(draw(), whole)


def test_devices_agree(device):
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    expected, found = (
        perm_test(w, kind, permutations=5, generator=torch.Generator().manual_seed(0)).values
        for kind in ("rc",)
        for w in (W, W.to(device))
    )
    assert torch.equal(expected, found)


@pytest.mark.parametrize("W", [torch.ones(32, 32), torch.randn(4, 64)])
def test_what_has_no_dimension_has_no_p_value(W):
    found = perm_test(W, permutations=3)
    assert math.isnan(found.p)
    assert math.isnan(found.observed)


def test_corrected_p_values_hold_the_level_over_all_layers(generator):
    p = torch.rand(2000, 20, generator=generator, dtype=torch.float64)
    wrong = sum(min(holm(row)) <= 0.1 for row in p.tolist()) / 2000
    # At most a tenth of the families, and not far below it: three standard deviations of a binomial.
    assert abs(wrong - 0.1) < 3 * math.sqrt(0.09 / 2000) + 0.005


def test_holm_is_its_definition():
    assert holm([0.04, math.nan, 0.01, 0.03, 0.6])[::2] == pytest.approx([0.09, 0.04, 0.6])
    assert math.isnan(holm([0.04, math.nan])[1])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# Function-preserving pairs --------------------------------------------------------------------------------


def twolayer(n=256, activation=nn.ReLU):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, n), activation(), nn.Linear(n, n), activation(), nn.Linear(n, 5))
    return net.double(), torch.randn(16, n, dtype=torch.float64)


def test_multiples_have_equal_counts(generator):
    W = torch.randn(64, 96, generator=generator)
    expected = layer_dimension(W)
    for c in (4.0, -1.0, 2.0**-10):
        found = layer_dimension(c * W)
        assert found.fit.counts == expected.fit.counts
        assert (found.D, found.similarity) == (expected.D, expected.similarity)


def test_row_scales_add_the_covariance_inside_blocks(generator):
    """`T(D W) = mean(d) T(W) + cov(d, W)` block by block, and the covariance is bounded by the spreads."""
    W = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    d = torch.randn(64, 1, generator=generator, dtype=torch.float64).exp()
    for k in (1, 3, 5):
        D = d.expand(64, 64)
        covariance = T(D * W, k) - T(D, k) * T(W, k)
        mean_d, mean_w = (T(T(x, k), -k) for x in (D, W))
        direct = T((D - mean_d) * (W - mean_w), k)
        torch.testing.assert_close(covariance, direct, rtol=0, atol=1e-12)
        spread = T((D - mean_d) ** 2, k).sqrt() * T((W - mean_w) ** 2, k).sqrt()
        assert (direct.abs() <= spread + 1e-12).all()
        constant = T(D, k).repeat_interleave(2**k, 0).repeat_interleave(2**k, 1)
        torch.testing.assert_close(T(constant * W, k), T(D, k) * T(W, k), rtol=0, atol=1e-12)


def test_averages_and_convex_activations_obey_jensen(generator):
    z = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    for sigma in (torch.relu, lambda x: nn.functional.leaky_relu(x, 0.1), torch.exp, nn.functional.softplus):
        assert (sigma(T(z, 2)) <= T(sigma(z), 2) + 1e-12).all()
    one_sign = T(z, 2).sign().repeat_interleave(4, 0).repeat_interleave(4, 1) * z.abs()
    torch.testing.assert_close(T(torch.relu(one_sign), 2), torch.relu(T(one_sign, 2)))
    torch.testing.assert_close(T(torch.relu(3 * z), 2), 3 * T(torch.relu(z), 2))


@pytest.mark.parametrize(
    ("logsd", "target", "sd"), [(0.5, 1.6801, 0.002), (1, 1.6614, 0.004), (2, 1.6475, 0.006)]
)
def test_dimension_moves_under_rescalings_that_keep_the_function(logsd, target, sd, generator):
    """The target is one draw and `sd` the scatter of draws: their mean lies within three of it."""
    net, inputs = twolayer()
    nn.init.normal_(net[2].weight, generator=generator)
    twins = [rescale_pair(net, "2", logsd, inputs=inputs, generator=generator) for _ in range(10)]
    assert max(same_function(net, twin, inputs) for twin in twins) < 1e-13
    before, *after = (layer_dimension(n[2].weight).D for n in (net, *twins))
    assert before == pytest.approx(1.6917, abs=0.0015)
    assert sum(after) / 10 == pytest.approx(target, abs=3 * sd)
    normed = twins[0][2].weight / twins[0][2].weight.norm(dim=1, keepdim=True)
    assert pytest.approx(before, abs=0.0015) == layer_dimension(normed).D


def test_a_permuted_pair_is_the_same_function_with_other_counts(generator):
    net, inputs = twolayer(64, nn.GELU)
    twin = permute_pair(net, "2", inputs=inputs, generator=generator)
    assert not torch.equal(twin[2].weight, net[2].weight)
    assert torch.equal(twin[2].weight.sort(0).values, net[2].weight.sort(0).values)


@pytest.mark.parametrize(
    ("activation", "positive", "odd"),
    [
        (nn.ReLU(), True, False),
        (nn.LeakyReLU(0.1), True, False),
        (nn.Tanh(), False, True),
        (nn.GELU(), False, False),
        (nn.Sigmoid(), False, False),
        (nn.SiLU(), False, False),
        (nn.Hardtanh(), False, True),
        (nn.Softsign(), False, True),
        (nn.ReLU6(), False, False),
        (nn.Identity(), True, True),
    ],
)
def test_the_table_of_activations_is_true(activation, positive, odd, generator):
    """What the trace says about an activation is what the activation does."""
    z = 10 * torch.randn(1000, generator=generator, dtype=torch.float64)
    c = torch.randn(1000, generator=generator, dtype=torch.float64).exp()
    scaling = (activation(c * z) - c * activation(z)).abs().max()
    oddness = (activation(-z) + activation(z)).abs().max()
    assert (scaling < 1e-12) == positive
    assert (oddness < 1e-12) == odd
    domain = trace(nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))).domain_of("0")
    assert (domain.positive, domain.odd) == (positive, odd)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Sigmoid, nn.Tanh])
def test_rescaling_a_unit_that_does_not_commute_is_refused(activation):
    net, _ = twolayer(8, activation)
    with pytest.raises(ValueError, match="the function would change"):
        rescale_pair(net, "0", 1.0)


def test_pairs_follow_the_device(device, generator):
    net, inputs = twolayer(16)
    net, inputs = net.to(device), inputs.to(device)
    for twin in (
        permute_pair(net, "0", inputs=inputs, generator=generator),
        rescale_pair(net, "0", 0.5, inputs=inputs, generator=generator),
    ):
        assert twin[0].weight.device.type == device.type
        assert not torch.equal(twin[0].weight.cpu(), net[0].weight.cpu())


def test_a_wrong_pair_is_noticed():
    net, inputs = twolayer(8)
    broken = copy.deepcopy(net)
    domain = trace(net).domain_of("0")
    domain.readers.clear()
    rescale(broken, domain, torch.full((8,), 2.0))
    with pytest.raises(RuntimeError, match="the networks differ"):
        same_function(net, broken, inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perm_test(torch.ones(8, 8), "all"), "kind must be one of cells"),
        (lambda: perm_test(torch.ones(8, 8), permutations=0), "permutations must be at least 1"),
        (
            lambda: perm_test(torch.ones(8, 8), statistic=lambda w: w.sum(), permutations=3),
            "one number per grid",
        ),
        (
            lambda: perm_test(torch.ones(8, 8, 3, 3), statistic=lambda w: w, layout="slices"),
            "is 9 grids",
        ),
        (lambda: permuted(lay_out(torch.ones(8), "vector"), "rc", 1), "that the grid has"),
        (
            lambda: against_copies(lay_out(torch.ones(8, 8)), lambda w: w.sum((1, 2, 3)), "all", 3),
            "kind must be one of",
        ),
        (lambda: holm([0.5, 1.5]), "p must lie in"),
        (lambda: bounded_perm(0, 1), "n must be positive"),
        (lambda: bounded_perm(4, -1), "reach not negative"),
        (lambda: bounded_perm(4, math.nan), "reach not negative"),
        (lambda: block_perm(7, 2), "r must divide n, got 2 and 7"),
        (lambda: tree_perm(-1), "levels must not be negative"),
        (lambda: tree_perm(2, ratio=1), "ratio at least 2"),
        (lambda: permute_pair(nn.Sequential(nn.Linear(3, 2)), "0"), "layer must make hidden units"),
        (lambda: permute_pair(nn.Sequential(nn.Linear(3, 2)), "1"), "layer must be one of 0, got '1'"),
        (lambda: rescale_pair(nn.Sequential(nn.Linear(3, 2)), "0", 1.0), "the function would change"),
        (lambda: rescale_pair(nn.Sequential(nn.Linear(3, 2)), "0", -1.0), "logsd must be finite"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
