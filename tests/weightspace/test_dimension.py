"""A slope is a slope, its interval is not a sampling error, and nothing is estimated where nothing can be."""

import math

import numpy as np
import pytest
import torch

from geomlib.weightspace import (
    T,
    box_counts,
    fit_dimension,
    line_slope,
    local_slopes,
    null_counts,
    self_similarity,
    slopes,
)
from geomlib.weightspace.shapes import (
    DIMENSIONS,
    cantor_dust,
    carpet,
    diagonal,
    disk,
    filled,
    gasket,
    koch,
    menger,
    percolation,
    point,
    random_mask,
    vicsek,
)

SIZES = [2**k for k in range(9)]


def fit(mask, **options):
    found = box_counts(mask, ratio=options.pop("ratio", 2), d=mask.ndim)
    return fit_dimension(found.sizes, found.counts, shape=mask.shape, **options)


@pytest.mark.parametrize("D", [0.0, 0.7, 1.5849625, 2.0])
def test_exact_power_law_gives_its_exponent(D):
    counts = [1e6 * r**-D for r in SIZES]
    found = fit_dimension(SIZES, counts, window="full")
    assert abs(found.D - D) < 1e-12
    assert found.r2 == pytest.approx(1)
    assert found.intercept == pytest.approx(math.log(1e6))
    assert found.local == pytest.approx([D] * 8, abs=1e-12)
    assert found.ci[1] - found.ci[0] < 1e-10


def test_standard_error_and_interval_are_those_of_the_textbook():
    """Three points on (0, 0), (1, 1), (2, 3): slope 1.5, residuals 1/6, -1/3, 1/6, one degree of freedom."""
    sizes = [math.exp(-x) for x in (2, 1, 0)]
    found = fit_dimension(sizes, [math.exp(y) for y in (3, 1, 0)], window="full", min_scales=3)
    assert pytest.approx(1.5) == found.D
    assert found.se == pytest.approx(math.sqrt(1 / 6 / 2))
    assert found.r2 == pytest.approx(1 - (1 / 6) / (14 / 3))
    half = 12.7062047 * found.se  # Student's t with one degree of freedom, 97.5 %
    assert found.ci == pytest.approx((1.5 - half, 1.5 + half))


def test_weights_are_weighted_least_squares():
    counts = np.array([300.0, 90.0, 33.0, 9.0, 4.0])
    sizes = np.array(SIZES[:5], dtype=float)
    found = fit_dimension(sizes, counts, window="full", weights="counts")
    A = np.stack([np.ones(5), -np.log(sizes)], 1) * np.sqrt(counts)[:, None]
    expected = np.linalg.lstsq(A, np.log(counts) * np.sqrt(counts), rcond=None)[0]
    assert (found.intercept, found.D) == pytest.approx(tuple(expected))


def test_empty_scales_are_left_out():
    whole = fit_dimension(SIZES[:5], [81, 27, 9, 3, 1], window="full")
    with_zero = fit_dimension(SIZES[:6], [81, 27, 9, 3, 1, 0], window="full")
    assert with_zero == whole


def test_too_few_points_have_no_interval_and_say_so():
    two = fit_dimension([1, 2], [9, 3], window="full", min_scales=2)
    assert pytest.approx(math.log2(3)) == two.D
    assert math.isnan(two.se)
    assert math.isnan(two.ci[0])
    three = fit_dimension([1, 2, 4], [9, 3, 1], window="full")
    assert math.isnan(three.D)
    assert math.isnan(three.ci[1])
    assert three.status == "insufficient_scales"
    assert three.local == pytest.approx([math.log2(3)] * 2)  # what is known is kept
    one = fit_dimension([1], [9], window="full")
    assert (one.status, one.sizes) == ("insufficient_scales", (1.0,))


def test_windows_take_the_sizes_they_name():
    counts = [r**-1.5 * 1e5 for r in SIZES]
    assert fit_dimension(SIZES, counts, window="full").window == (1, 256)
    assert fit_dimension(SIZES, counts).window == (2, 64)
    assert fit_dimension(SIZES, counts, shape=(130, 900)).window == (2, 32)
    assert fit_dimension(SIZES, counts, window=(3, 40)).window == (4, 32)
    with_bend = [c if r <= 32 else c * (r / 32) ** -0.4 for r, c in zip(SIZES, counts, strict=True)]
    plateau = fit_dimension(SIZES, with_bend, window="plateau", shape=(2048, 2048))
    assert plateau.window == (1, 32)
    assert pytest.approx(1.5) == plateau.D


def test_longest_plateau_wins_and_the_steadier_of_equal_ones():
    local = [1.0, 1.0, 1.0, 1.5, 1.55, 1.52]
    counts = np.exp(-np.cumsum([0.0, *local]) * math.log(2)) * 1e9
    plateau = fit_dimension(SIZES[:7], counts, window="plateau", shape=(10**6, 10**6))
    assert plateau.window == (1, 8)
    assert pytest.approx(1.0) == plateau.D


@pytest.mark.parametrize(
    ("name", "mask", "ratio"),
    [
        ("carpet", carpet(6), 3),
        ("cantor_dust", cantor_dust(6), 3),
        ("vicsek", vicsek(6), 3),
        ("gasket", gasket(9), 2),
        ("menger", menger(4), 3),
    ],
)
def test_sets_have_their_dimension_at_their_own_ratio(name, mask, ratio):
    found = fit(mask, ratio=ratio, window="full")
    assert abs(found.D - DIMENSIONS[name]) < 1e-6
    assert self_similarity(found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "mask", "tolerance"),
    [
        ("carpet", carpet(6), 0.03),
        ("gasket", gasket(9), 1e-6),
        ("cantor_dust", cantor_dust(6), 0.05),
        ("vicsek", vicsek(6), 0.09),
        ("koch", koch(1024), 0.05),
        ("filled", filled(512), 1e-6),
        ("filled", filled(500), 0.02),
        ("diagonal", diagonal(512), 1e-6),
    ],
)
def test_dyadic_boxes_come_as_near_as_they_can(name, mask, tolerance):
    """The ratio of the set is not that of the boxes: the error is known, and R^2 does not show it."""
    assert abs(fit(mask).D - DIMENSIONS[name]) < tolerance


@pytest.mark.parametrize("n", [256, 512])
def test_percolation_clusters_of_this_size_look_thinner_than_they_are(n):
    found = [fit(percolation(n, generator=torch.Generator().manual_seed(seed))).D for seed in range(6)]
    assert abs(sum(found) / 6 - 1.80) < 0.08


def test_a_good_line_is_no_evidence():
    """R^2 of 0.998 on a set whose dimension is off by 0.07."""
    found = fit(vicsek(6))
    assert found.r2 > 0.998
    assert abs(found.D - DIMENSIONS["vicsek"]) > 0.07


def test_extreme_sets():
    assert fit(point(64)).D == 0
    assert fit(point(64)).r2 == 1
    assert math.isnan(self_similarity(fit(point(64))))
    empty = fit(torch.zeros(64, 64, dtype=torch.bool))
    assert empty.status == "empty"
    assert math.isnan(empty.D)
    assert empty.sizes == ()
    for shape in ((64, 64), (37, 53), (500, 500)):
        for window in ("full", "inner", "plateau", (1, 8)):
            full = fit(torch.ones(shape, dtype=torch.bool), window=window)
            assert (full.status, full.D) == ("space_filling", 2.0)
    normalised = box_counts(filled(500), [2, 3, 5, 7, 11], border="full").normalised
    assert fit_dimension([2, 3, 5, 7, 11], normalised, shape=(500, 500)).status == "space_filling"


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_noise_has_no_plateau_once_saturation_is_left_out(p, generator):
    found = fit(random_mask((512, 512), p, generator=generator), window="plateau")
    assert found.status == "no_scaling"
    assert math.isnan(found.D)


def test_plateaus_of_the_known_sets():
    assert fit(gasket(9), window="plateau").window == (1, 256)
    found = fit(carpet(6), window="plateau")
    assert found.window == (2, 16)
    assert pytest.approx(1.848, abs=1e-3) == found.D
    # Necessary, not sufficient: a disk has one as well.
    assert fit(disk(512), window="plateau").status == "ok"


def test_interval_of_the_fit_is_not_a_sampling_error(generator):
    """Among equally random masks D varies a hundred times less than the interval of one of them says."""
    W = torch.randn(40, 256, 512, generator=generator)
    masks = W.abs() > W.abs().flatten(1).quantile(0.9, dim=1)[:, None, None]
    found = box_counts(masks)
    D = slopes(found.sizes, found.counts)
    one = fit_dimension(found.sizes, found.counts[0], window="full")
    assert pytest.approx(D[0].item(), abs=1e-12) == one.D
    assert (one.ci[1] - one.ci[0]) / 2 > 100 * D.std()
    assert one.r2 > 0.95


def test_batched_slopes_are_the_single_fits(generator, device):
    counts = torch.randint(1, 1000, (3, 4, 9), generator=generator).sort(-1, descending=True).values
    for window in ("full", "inner", (2, 33)):
        batch = slopes(SIZES, counts.to(device), window=window, shape=(200, 300))
        assert batch.device.type == device.type
        for i in range(3):
            for j in range(4):
                one = fit_dimension(SIZES, counts[i, j], window=window, shape=(200, 300))
                assert batch[i, j].item() == pytest.approx(one.D, abs=1e-12)
    counts[0, 0, -1] = 0
    assert math.isnan(slopes(SIZES, counts)[0, 0])
    assert math.isnan(slopes(SIZES, counts, window=(1, 1))[1, 1])


def test_local_slopes_are_finite_differences(device):
    found = local_slopes([1, 3, 9], torch.tensor([[64, 8, 1], [9, 3, 1]]).to(device))
    expected = [[math.log(8, 3)] * 2, [1.0] * 2]
    assert (found.cpu() - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


def test_degree_of_self_similarity_does_not_separate_fractals_from_noise(generator):
    assert self_similarity(fit(carpet(6))) == pytest.approx(0.965, abs=1e-3)
    assert self_similarity(fit(random_mask((512, 512), 0.5, generator=generator))) > 0.97
    assert self_similarity([2.0, 1.0]) == pytest.approx(1 - 0.5 / 1.5)
    assert self_similarity(torch.tensor([0.0, 0.0, 9.0])) == 0.0
    assert math.isnan(self_similarity([1.0]))


def test_scaling_the_weights_changes_no_count(generator):
    W = torch.randn(64, 64, generator=generator)
    counts = [
        box_counts((c * W).abs() > (c * W).abs().flatten().kthvalue(3686).values).counts.tolist()
        for c in (1, 4, -1, 2**-10, 2**10)
    ]
    assert all(count == counts[0] for count in counts)


def test_pooled_occupancy_is_the_box_count(generator):
    """The transformation of the indicator and the count are one thing."""
    mask = random_mask((37, 53), 0.05, generator=generator)
    found = box_counts(mask)
    for k, count in enumerate(found.counts.tolist()):
        assert int(T(mask, k, reduce="absmax").sum()) == count


@pytest.mark.parametrize(
    ("shape", "q", "D", "r2"),
    [
        ((64, 27), 0.9, 1.325, 0.928),
        ((64, 576), 0.5, 1.886, 0.995),
        ((128, 1152), 0.9, 1.621, 0.964),
        ((512, 4608), 0.9, 1.744, 0.979),
        ((4096, 4096), 0.9, 1.842, 0.989),
    ],
)
def test_dimension_of_noise_is_known_from_the_shape_alone(shape, q, D, r2):
    sizes = [2**k for k in range(min(shape).bit_length() + (min(shape).bit_count() > 1))]
    n = math.prod(shape)
    found = fit_dimension(sizes, null_counts(shape, n - round(q * n), sizes), window="full", shape=shape)
    assert pytest.approx(D, abs=1e-3) == found.D
    assert found.r2 == pytest.approx(r2, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_dimension([1, 2], [1, 2, 3]), "sizes and counts must be lists of one length"),
        (lambda: fit_dimension([2, 1], [1, 2]), "sizes must be positive and growing"),
        (lambda: fit_dimension([1, 2], [1, -2]), "counts must be finite and not negative"),
        (lambda: fit_dimension([1, 2], [1, math.nan]), "counts must be finite"),
        (lambda: fit_dimension([1, 2], [1, 2], window="outer"), "window must be"),
        (lambda: fit_dimension([1, 2], [1, 2], window="plateau"), "shape must be given"),
        (lambda: fit_dimension([1, 2], [1, 2], min_scales=1), "min_scales must be at least 2"),
        (lambda: slopes([1, 2], torch.ones(3)), r"counts must be \(..., 2\)"),
        (lambda: slopes([1, 2], torch.ones(2), window="plateau"), "window must be"),
        (lambda: local_slopes([1, 2], torch.ones(3)), r"counts must be \(..., 2\)"),
        (lambda: line_slope([1.0, 1.0], torch.ones(2)), "x must hold two points"),
        (lambda: self_similarity(torch.ones(2, 2)), "local must be a list"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
