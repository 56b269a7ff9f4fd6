"""Verdicts on sets whose scale invariance is known."""

import math

import pytest
import torch

from geomlib.weightspace.scale_invariance import dsi_periodogram, dsi_ratio_test
from geomlib.weightspace.shapes import (
    cantor_dust,
    carpet,
    diagonal,
    fbm_surface,
    filled,
    gasket,
    menger,
    percolation,
    random_mask,
    vicsek,
)


def level_set(n, hurst, seed=0):
    """Cells above the median of a rough surface: fractal edges, no preferred ratio."""
    surface = fbm_surface(n, hurst, generator=torch.Generator().manual_seed(seed))
    return surface > surface.median()


@pytest.mark.parametrize(
    ("mask", "ratio", "spread"),
    [
        (carpet(6), 3, {2: 0.095, 3: 0.0, 5: 0.056, 7: 0.064}),
        (gasket(9), 2, {2: 0.0, 3: 0.171, 5: 0.157, 7: 0.135}),
        (cantor_dust(6), 3, {2: 0.505, 3: 0.0, 5: 0.372, 7: 0.358}),
        (vicsek(6), 3, {2: 0.148, 3: 0.0, 5: 0.124, 7: 0.084}),
        (menger(4), 3, None),
    ],
    ids=["carpet", "gasket", "dust", "vicsek", "menger"],
)
def test_sets_built_by_a_rule_show_their_ratio_and_no_other(mask, ratio, spread, device):
    found = dsi_ratio_test(mask.to(device))
    assert (found.verdict, found.ratio) == ("DSI", ratio)
    if spread:
        assert found.spread == pytest.approx(spread, abs=6e-4)


@pytest.mark.parametrize("n", [512, 729])
@pytest.mark.parametrize("seed", range(3))
def test_percolation_prefers_no_ratio(n, seed):
    mask = percolation(n, generator=torch.Generator().manual_seed(seed))
    assert dsi_ratio_test(mask).verdict == "none"


@pytest.mark.parametrize("seed", range(4))
def test_level_sets_of_very_rough_surfaces_are_continuously_invariant_or_trivial(seed):
    assert dsi_ratio_test(level_set(512, 0.3, seed)).verdict == "continuous_or_trivial"


def test_level_sets_of_smoother_surfaces_have_no_ratio_and_differ_from_draw_to_draw():
    """At a Hurst index of one half, draws fall on both sides of the bound: only the absence is a law."""
    verdicts = [dsi_ratio_test(level_set(512, 0.5, seed)).verdict for seed in range(8)]
    assert set(verdicts) == {"continuous_or_trivial", "none"}


def test_two_equal_slopes_are_not_enough():
    """On 27 cells three sizes fit the ratio 3, and slopes agree by the smallness of the set."""
    found = dsi_ratio_test(cantor_dust(3))
    assert found.spread[3] == pytest.approx(0, abs=1e-12)
    assert (found.verdict, found.ratio) == ("none", None)
    assert dsi_ratio_test(cantor_dust(4)).ratio == 3


def test_a_line_is_invariant_at_every_ratio():
    found = dsi_ratio_test(diagonal(512))
    assert found.verdict == "continuous_or_trivial"
    assert found.spread == pytest.approx({2: 0, 3: 0.012, 5: 0.005, 7: 0.010}, abs=6e-4)


@pytest.mark.parametrize(
    ("density", "verdict"), [(0.02, "none"), (0.1, "undetermined"), (0.5, "undetermined")]
)
def test_noise_saturates(density, verdict, generator):
    assert dsi_ratio_test(random_mask((512, 512), density, generator=generator)).verdict == verdict


@pytest.mark.parametrize("mask", [filled(512), torch.zeros(64, 64).bool(), filled(4)])
def test_full_empty_and_tiny_grids_are_undetermined(mask):
    found = dsi_ratio_test(mask)
    assert (found.verdict, found.ratio, found.spread) == ("undetermined", None, {})


def test_the_true_ratio_must_be_among_the_candidates():
    assert dsi_ratio_test(carpet(6), (2, 5, 7)).verdict == "none"


@pytest.mark.parametrize(
    ("mask", "ratio"),
    [(cantor_dust(6), 3), (vicsek(6), 3), (gasket(9), 2)],
    ids=["dust", "vicsek", "gasket"],
)
def test_the_periodogram_finds_the_ratio(mask, ratio, device):
    found = dsi_periodogram(mask.to(device))
    assert found.verdict == "log_periodic"
    assert abs(found.ratio / ratio - 1) < 0.08
    assert found.power >= 0.5


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_periodogram_of_noise_is_weak(density, generator):
    found = dsi_periodogram(random_mask((512, 512), density, generator=generator))
    assert found.verdict == "none"
    assert found.power < 0.3


def test_mass_is_the_mean_over_centres_far_inside(generator):
    mask = random_mask((40, 50), 0.2, generator=generator)
    found = dsi_periodogram(mask, r_max=6)
    centres = [(i, j) for i, j in mask.nonzero().tolist() if 6 <= i < 34 and 6 <= j < 44]
    for r, mass in zip(found.radii.tolist(), found.mass.tolist(), strict=True):
        squares = [mask[i - r : i + r + 1, j - r : j + r + 1].sum().item() for i, j in centres]
        assert mass == pytest.approx(sum(squares) / len(squares))


def test_the_periodogram_reports_its_highest_point():
    found = dsi_periodogram(gasket(9), ratios=(1.5, 5.0), frequencies=100)
    assert found.ratios[found.powers.argmax()] == pytest.approx(found.ratio)
    assert found.powers.max() == pytest.approx(found.power)
    assert found.ratios[[0, -1]].tolist() == pytest.approx([5.0, 1.5])
    assert found.periods == pytest.approx(math.log(512 // 6) / math.log(found.ratio))


def test_exact_power_laws_have_no_power():
    for mask in (filled(256), diagonal(256)):
        found = dsi_periodogram(mask)
        assert (found.verdict, found.power) == ("none", 0.0)
        assert math.isnan(found.ratio)


def test_two_periods_are_needed():
    assert dsi_periodogram(carpet(3)).verdict == "undetermined"
    assert dsi_periodogram(torch.zeros(64, 64).bool()).verdict == "undetermined"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dsi_ratio_test(filled(8).flatten()), "two or three axes"),
        (lambda: dsi_ratio_test(filled(8), (2,)), "at least two numbers"),
        (lambda: dsi_ratio_test(filled(8), (2, 3, 4)), "powers of one another, got 2 and 4"),
        (lambda: dsi_ratio_test(filled(8), (3, 3)), "powers of one another, got 3 and 3"),
        (lambda: dsi_periodogram(torch.rand(8, 8)), "boolean grid"),
        (lambda: dsi_periodogram(filled(8), r_max=4), "r_max must leave centres"),
        (lambda: dsi_periodogram(filled(4)), "r_max must leave centres"),
        (lambda: dsi_periodogram(filled(16), ratios=(1.0, 2.0)), "ratios must grow from above 1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
