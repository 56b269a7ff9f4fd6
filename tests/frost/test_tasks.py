"""The tasks of known difficulty: what is drawn, what is asked, and what the best rule can reach."""

import pytest
import torch
from torch.nn.functional import interpolate

from geomlib.frost.tasks import (
    first_symbol,
    fixed_depth_ceiling,
    glyphs,
    mean_required_steps,
    noisy_glyphs,
)


def draw(seed):
    return torch.Generator().manual_seed(seed)


def test_every_digit_has_its_own_bitmap_of_zeros_and_ones():
    bitmaps = glyphs()
    assert bitmaps.shape == (10, 7, 5)
    assert set(bitmaps.unique().tolist()) == {0.0, 1.0}
    assert len(bitmaps.flatten(1).unique(dim=0)) == 10


def test_glyphs_without_noise_are_shifted_copies_of_the_enlarged_bitmaps():
    data = noisy_glyphs(300, generator=draw(0), noise=(0, 0))
    large = interpolate(glyphs()[:, None], size=(10, 8), mode="bilinear")[:, 0]
    offsets = set()
    for picture, label in zip(data.x.reshape(-1, 12, 12), data.y, strict=True):
        canvas = [torch.zeros(12, 12) for _ in range(9)]
        for k, page in enumerate(canvas):
            page[k // 3 : k // 3 + 10, 1 + k % 3 : 9 + k % 3] = large[label]
        (where,) = [k for k, page in enumerate(canvas) if torch.equal(page, picture)]
        offsets.add(where)
    assert offsets == set(range(9))


def test_noise_of_glyphs_has_the_deviation_that_the_difficulty_says():
    with_noise = noisy_glyphs(4000, generator=draw(1))
    without = noisy_glyphs(4000, generator=draw(1), noise=(0, 0))
    assert torch.equal(with_noise.y, without.y)
    assert torch.equal(with_noise.difficulty, without.difficulty)
    standard = (with_noise.x - without.x) / (0.1 + 1.1 * with_noise.difficulty)[:, None]
    # 4000 x 144 numbers: the deviation of a standard deviation is 1 / sqrt(2 * 576000) = 9e-4.
    for third in standard[with_noise.difficulty.argsort()].chunk(3):
        assert third.std().item() == pytest.approx(1, abs=8e-3)
    assert 0 <= with_noise.difficulty.min() < 0.01 < 0.99 < with_noise.difficulty.max() < 1


@pytest.mark.parametrize("length", [2, 3, 12, 24])
def test_symbols_begin_at_the_distance_and_the_label_is_the_first(length):
    data = first_symbol(500, length=length, generator=draw(2))
    symbol = data.x[:, :5].argmax(1)
    assert torch.equal(data.x[:, :5].sum(1), torch.ones(500, length))
    for row, label, distance in zip(symbol, data.y, data.distance, strict=True):
        assert (row[:distance] == 0).all()
        assert (row[distance:] > 0).all()
        assert row[distance] == 1 + label
    assert torch.equal(data.x[:, 5], torch.eye(length)[0].expand(500, length))


def test_distances_and_labels_are_uniform():
    data = first_symbol(24_000, length=13, generator=draw(3))
    assert data.distance.unique().tolist() == list(range(1, 13))
    # Counts are binomial: 2000 +- 43 a distance and 6000 +- 67 a label; four deviations are allowed.
    assert (data.distance.bincount(minlength=13)[1:] - 2000).abs().max() < 4 * 43
    assert (data.y.bincount(minlength=4) - 6000).abs().max() < 4 * 67


def test_required_steps_are_those_of_two_convolutions_of_width_three():
    data = first_symbol(200, length=24, generator=draw(4))
    kernel = torch.ones(1, 1, 3)
    lit = torch.zeros(200, 1, 24).scatter(2, data.distance[:, None, None], 1.0)
    arrived = torch.zeros(200, dtype=torch.int64)
    for step in range(1, 13):
        lit = torch.conv1d(torch.conv1d(lit, kernel, padding=1), kernel, padding=1)
        arrived = arrived.where((arrived > 0) | (lit[:, 0, 0] == 0), torch.tensor(step))
    assert torch.equal(arrived, data.required_steps)


def test_ceiling_of_a_fixed_depth_is_what_the_ideal_local_rule_reaches():
    data = first_symbol(200_000, length=24, generator=draw(5))
    guess = torch.randint(4, data.y.shape, generator=draw(6))
    depths = torch.tensor([0, 1, 4, 8, 11, 12, 20])
    for depth, ceiling in zip(depths, fixed_depth_ceiling(depths), strict=True):
        answer = data.y.where(data.required_steps <= depth, guess)
        reached = (answer == data.y).float().mean()
        assert reached.item() == pytest.approx(ceiling.item(), abs=5e-3)  # 4.5 deviations at worst
    assert fixed_depth_ceiling(12).item() == 1


def test_a_perfect_rule_needs_144_steps_for_23_distances():
    assert mean_required_steps() == pytest.approx(144 / 23)
    data = first_symbol(200_000, generator=draw(7))
    # The steps have deviation 3.3, their mean over 200000 samples 0.0075.
    assert data.required_steps.float().mean().item() == pytest.approx(mean_required_steps(), abs=0.03)


def test_a_wider_reach_needs_fewer_steps():
    assert mean_required_steps(reach=23) == 1
    assert fixed_depth_ceiling(1, reach=23).item() == 1
    assert mean_required_steps(length=5, reach=4) == 1


@pytest.mark.parametrize("task", [noisy_glyphs, first_symbol])
def test_the_same_seed_draws_the_same_samples(task):
    first, again, other = (task(20, generator=draw(seed)) for seed in (8, 8, 9))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("task", [noisy_glyphs, first_symbol])
def test_no_samples_are_a_batch_of_none(task):
    data = task(0, generator=draw(0))
    assert len(data.x) == len(data.y) == 0
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noisy_glyphs(-1), "n must be at least 0, got -1"),
        (lambda: noisy_glyphs(1, noise=(-0.1, 1)), "noise must hold two numbers of at least 0"),
        (lambda: noisy_glyphs(1, noise=(0.1, float("nan"))), "noise must hold two numbers of at least 0"),
        (lambda: first_symbol(-1), "n must be at least 0, got -1"),
        (lambda: first_symbol(1, length=1), "length must be at least 2, got 1"),
        (lambda: fixed_depth_ceiling(-1), "depth must be at least 0, got -1"),
        (lambda: fixed_depth_ceiling(1, reach=0), "reach must be at least 1, got 0"),
        (lambda: mean_required_steps(length=0), "length must be at least 2, got 0"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()
