"""The fractal inside the update, and estimators of dimension on sets whose dimension is known."""

import math

import pytest
import torch

from geomlib.frost.dimension import (
    box_counts,
    box_dimension,
    chaos_game,
    circle,
    fractional_brownian_motion,
    higuchi,
    koch_curve,
    madogram,
    similarity_dimension,
)

TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
SCALES = (0.5, 0.6, 2 / 3, 0.75)


@pytest.fixture(scope="module")
def attractors():
    draw = torch.Generator().manual_seed(0)
    return {scale: chaos_game(TRIANGLE, 200_000, scale=scale, generator=draw) for scale in SCALES}


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("scale", SCALES)
def test_attractor_of_the_update_has_the_similarity_dimension(attractors, scale):
    measured = box_dimension(attractors[scale], range(2, 8), generator=seeded())
    assert abs(measured - similarity_dimension(3, 1 - scale)) < 0.09


def test_size_of_the_attractor_goes_as_scale_to_the_hurst(attractors):
    size = [(p.amax(0) - p.amin(0)).max() / scale**0.8 for scale, p in attractors.items()]
    assert max(size) - min(size) < 1e-3
    assert abs(size[0] - 1) < 1e-3  # that of the triangle of inputs


def test_attractor_is_the_union_of_its_images(attractors):
    """Hutchinson's equation, point by point: undoing the last map leads back to the attractor."""
    scale, points = 0.6, attractors[0.6][:200]
    corners = scale**0.8 * TRIANGLE
    back = (points[:, None] - scale * corners) / (1 - scale)  # (n, 3, 2): undo each of the three maps
    distance = torch.cdist(back.flatten(0, 1), attractors[0.6][:50_000]).amin(1).unflatten(0, (-1, 3))
    assert distance.amin(1).max() < 5e-3  # the sample is about that dense


def test_half_and_three_inputs_are_the_sierpinski_triangle():
    """In barycentric coordinates base 2, no digit of a point is 1 twice."""
    points = chaos_game(TRIANGLE, 20_000, scale=0.5, hurst=1.0, generator=seeded())
    y = points[:, 1] / TRIANGLE[2, 1]
    v, w = 2 * points[:, 0] - y, 2 * y
    bits = [(coordinate * 2**10).floor().long().clamp(0, 2**10 - 1) for coordinate in (v, w)]
    rest = torch.stack([v, w]) * 2**10 % 1
    inside = ((rest > 1e-6) & (rest < 1 - 1e-6)).all(0)  # on the edges rounding decides
    assert inside.sum() > 10_000
    assert not (bits[0] & bits[1])[inside].any()


def test_slow_loop_and_walkers_agree():
    walkers, settle = 4, math.ceil(math.log(1e-7) / math.log1p(-0.5))
    fast = chaos_game(TRIANGLE, 40, scale=0.5, hurst=0.7, walkers=walkers, generator=seeded(3))
    moves = torch.randint(3, (settle + 10, walkers), generator=seeded(3))
    for walker in range(walkers):
        h = 0.5**0.7 * TRIANGLE[moves[0, walker]]
        for t in range(settle + 10):
            h = 0.5 * h + 0.5**1.7 * TRIANGLE[moves[t, walker]]
            if t >= settle:
                torch.testing.assert_close(fast[(t - settle) * walkers + walker], h)


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("estimate", [madogram, higuchi])
def test_graph_of_fractional_brownian_motion_has_dimension_two_minus_hurst(estimate, hurst):
    paths = fractional_brownian_motion(4096, hurst, paths=32, generator=seeded(), dtype=torch.float64)
    assert abs(estimate(paths, lags=64).mean() - (2 - hurst)) < 0.025


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_fractional_brownian_motion_has_the_exact_covariance(hurst):
    """Against the formula of the covariance, within four standard errors of 20000 paths."""
    paths = fractional_brownian_motion(17, hurst, paths=20_000, generator=seeded(), dtype=torch.float64)
    t = torch.arange(17.0, dtype=torch.float64)
    power = 2 * hurst
    exact = (t[:, None] ** power + t[None] ** power - (t[:, None] - t).abs() ** power) / 2
    error = ((exact.square() + torch.outer(exact.diag(), exact.diag())) / 20_000).sqrt()
    assert ((paths.T @ paths / 20_000 - exact).abs() <= 4 * error + 1e-12).all()


def test_koch_curve_is_overestimated_by_a_grid_at_its_corner():
    truth = math.log(4) / math.log(3)
    measured = box_dimension(koch_curve(8, dtype=torch.float64), offsets=0)
    assert 0.025 < measured - truth < 0.045


def test_where_the_grid_lies_moves_the_koch_dimension_by_several_hundredths():
    """Twelve placements of four grids: centred on the truth, and as far apart as the paper's two values."""
    curve = koch_curve(7, dtype=torch.float64)
    runs = torch.stack([box_dimension(curve, generator=seeded(seed)) for seed in range(12)])
    assert abs(runs.mean() - math.log(4) / math.log(3)) < 0.02
    assert runs.max() - runs.min() > 0.033


@pytest.mark.parametrize(
    ("points", "truth", "tolerance"),
    [
        (circle(20_000, dtype=torch.float64), 1.0, 0.02),
        (torch.linspace(0, 1, 4000, dtype=torch.float64)[:, None].expand(-1, 3), 1.0, 0.05),
    ],
    ids=["circle", "line in space"],
)
def test_box_dimension_of_plain_sets(points, truth, tolerance):
    assert abs(box_dimension(points, range(2, 7), generator=seeded()) - truth) < tolerance


def test_a_filled_square_fills_the_grid_and_spills_over_a_shifted_one():
    square, sides = torch.rand(100_000, 2, generator=seeded()), torch.tensor([2, 4, 8, 16])
    assert (box_counts(square, range(1, 5), offsets=0) == sides**2).all()
    shifted = box_counts(square, range(1, 5), offsets=1, generator=seeded())
    assert (shifted == (sides + 1) ** 2).all()  # which is why its dimension comes out too low


def test_box_counts_agree_with_counting_in_sets():
    points = torch.rand(300, 3, generator=seeded(), dtype=torch.float64)
    low, extent = points.amin(0), (points.amax(0) - points.amin(0)).max()
    unit = (points - low) / extent
    for k, count in zip((1, 3), box_counts(points, (1, 3), offsets=0), strict=True):
        cells = (unit * 2**k).floor().clamp(max=2**k - 1).int().tolist()
        assert count == len(set(map(tuple, cells)))


def test_box_dimension_does_not_see_position_size_or_order():
    points = chaos_game(TRIANGLE, 3000, generator=seeded())
    shuffled = 4 * points[torch.randperm(3000, generator=seeded(1))] - 8
    assert (box_counts(points, generator=seeded(2)) == box_counts(shuffled, generator=seeded(2))).all()


def test_a_short_exponential_has_a_dimension_that_follows_its_rate():
    """Seventeen states of a contraction: the number falls steadily as the factor grows, fractal or not."""
    t = torch.arange(17.0, dtype=torch.float64)
    rates = (0.5, 0.6, 0.65, 0.7, 0.9)
    measured = torch.stack([higuchi(1 - rate**t, lags=4) for rate in rates])
    assert (measured.diff() < -0.04).all()
    torch.testing.assert_close(
        measured, torch.tensor([1.44, 1.32, 1.26, 1.20, 1.02], dtype=torch.float64), rtol=0, atol=0.01
    )


def test_results_stay_on_the_device(device):
    points = chaos_game(TRIANGLE.to(device), 500, generator=seeded())
    assert points.device.type == device.type
    assert box_counts(points, generator=seeded()).device.type == device.type
    series = fractional_brownian_motion(200, 0.5, generator=seeded(), device=device)
    assert series.device.type == device.type
    for estimate in (madogram, higuchi):
        on_cpu = estimate(series.cpu(), lags=6)
        torch.testing.assert_close(estimate(series, lags=6).cpu(), on_cpu)
    on_cpu = chaos_game(TRIANGLE, 500, generator=seeded())
    torch.testing.assert_close(points.cpu(), on_cpu)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chaos_game(TRIANGLE[:1], 5), "inputs must be"),
        (lambda: chaos_game(TRIANGLE, 5, scale=1.0), r"scale must lie in \(0, 1\), got 1.0"),
        (lambda: chaos_game(TRIANGLE, 5, hurst=0.0), r"hurst must lie in \(0, 1\], got 0.0"),
        (lambda: chaos_game(TRIANGLE, 0), "count must be at least 1, got 0"),
        (lambda: chaos_game(TRIANGLE, 5, walkers=0), "walkers must be at least 1"),
        (lambda: similarity_dimension(0, 0.5), "maps must be at least 1"),
        (lambda: similarity_dimension(3, 1.0), "ratio must lie in"),
        (lambda: box_counts(TRIANGLE[0]), "points must be floating point of shape"),
        (lambda: box_counts(TRIANGLE[:1].expand(4, 2)), "points must differ"),
        (lambda: box_counts(TRIANGLE / 0), "points must be finite"),
        (lambda: box_counts(TRIANGLE, offsets=-1), "offsets must be at least 0"),
        (lambda: box_counts(TRIANGLE, (-1, 2)), "exponents must be at least 0"),
        (lambda: box_dimension(TRIANGLE, (3,)), "exponents must number at least two"),
        (lambda: madogram(torch.rand(10), lags=10), r"lags must lie in \[2, 9\]"),
        (lambda: madogram(torch.ones(10), lags=4), "series must change"),
        (lambda: madogram(torch.arange(9), lags=4), "series must be floating point"),
        (lambda: higuchi(torch.rand(10), lags=6), r"lags must lie in \[2, 5\]"),
        (lambda: higuchi(torch.ones(10), lags=4), "series must change"),
        (lambda: higuchi(torch.arange(9), lags=4), "series must be floating point"),
        (lambda: fractional_brownian_motion(1, 0.5), "count must be at least 2"),
        (lambda: fractional_brownian_motion(9, 1.0), r"hurst must lie in \(0, 1\)"),
        (lambda: fractional_brownian_motion(9, 0.5, paths=0), "paths must be at least 1"),
        (lambda: koch_curve(13), r"level must lie in \[0, 12\]"),
        (lambda: circle(0), "count must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
