"""Counts are exact: the pyramid and the sorted points against loops, the closed form against draws."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomlib.testing import count_host_syncs
from geomlib.weightspace import (
    box_counts,
    fit_dimension,
    gliding_mass,
    local_slopes,
    null_counts,
    point_counts,
    segment,
    shifted_counts,
)
from geomlib.weightspace.shapes import cantor_dust, carpet, filled, gasket, menger, random_mask, vicsek

SHAPES = [(37, 53), (64, 64), (1, 9), (5, 1), (48, 20), (9, 10, 11), (30,), (5, 6, 3, 3)]


def reference(mask, r, shifts=None, full=False):
    """Loop over the boxes of side `r` of a grid that is shifted towards the origin; (occupied, all)."""
    shifts = shifts or (0,) * mask.ndim
    occupied = number = 0
    starts = [range(-(shift % r), n, r) for n, shift in zip(mask.shape, shifts, strict=True)]
    for corner in product(*starts):
        if full and any(c < 0 or c + r > n for c, n in zip(corner, mask.shape, strict=True)):
            continue
        box = mask[tuple(slice(max(c, 0), c + r) for c in corner)]
        occupied, number = occupied + bool(box.any()), number + 1
    return occupied, number


@pytest.mark.parametrize("border", ["clip", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_is_counted_as_by_the_loop(shape, border, generator, device):
    mask = random_mask(shape, 0.08, generator=generator)
    found = box_counts(mask.to(device), range(1, 20), border=border, d=len(shape))
    expected = [reference(mask, r, full=border == "full") for r in found.sizes]
    assert found.counts.device.type == device.type
    assert found.counts.tolist() == [occupied for occupied, _ in expected]
    assert list(found.boxes) == [number for _, number in expected]


@pytest.mark.parametrize("border", ["clip", "full"])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_powers_of_a_ratio_are_counted_as_by_the_loop(shape, ratio, border, generator, device):
    mask = random_mask(shape, 0.08, generator=generator)
    found = box_counts(mask.to(device), ratio=ratio, border=border, d=len(shape))
    assert found.counts.tolist() == [reference(mask, r, full=border == "full")[0] for r in found.sizes]
    # A shift by a whole period of every size is no shift.
    period = ratio ** len(found.sizes)
    other = box_counts(mask.to(device), found.sizes, offset=period, border=border, d=len(shape))
    assert torch.equal(found.counts.cpu(), other.counts.cpu())
    assert found.boxes == other.boxes


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_the_corners_of_an_integral_image(shape, generator, device):
    """Whole boxes are every r-th window of side r."""
    mask = random_mask(shape, 0.08, generator=generator).to(device)
    d = len(shape)
    for r in range(1, min(20, min(shape) + 1)):
        windows = gliding_mass(mask, r, d=d)[(slice(None, None, r),) * d]
        assert int((windows > 0).sum()) == int(box_counts(mask, [r], border="full", d=d).counts)


@pytest.mark.parametrize("border", ["clip", "full"])
@pytest.mark.parametrize("offset", [(1, 2), (3, 0), (7, 5)])
def test_shifted_grids_are_counted_as_by_the_loop(offset, border, generator, device):
    for shape in [(37, 53), (5, 1)]:
        mask = random_mask(shape, 0.08, generator=generator)
        found = box_counts(mask.to(device), range(1, 20), offset=offset, border=border)
        expected = [reference(mask, r, offset, border == "full") for r in found.sizes]
        assert list(zip(found.counts.tolist(), found.boxes, strict=True)) == expected


def test_sizes_end_where_the_shortest_side_is_covered():
    assert box_counts(filled(64)).sizes == (1, 2, 4, 8, 16, 32, 64)
    assert box_counts(torch.ones(37, 53).bool()).sizes == (1, 2, 4, 8, 16, 32, 64)
    assert box_counts(torch.ones(37, 53).bool(), border="full").sizes == (1, 2, 4, 8, 16, 32)
    assert box_counts(torch.ones(1, 9).bool()).sizes == (1,)
    assert box_counts(filled(9), ratio=3).sizes == (1, 3, 9)


def test_occupied_boxes_are_the_labels_of_the_segmentation(generator):
    mask = random_mask((37, 53), 0.05, generator=generator)
    for r, count in zip(*[(f := box_counts(mask)).sizes, f.counts.tolist()], strict=True):
        assert count == len(segment(mask.shape, r)[mask].unique())


def test_batch_is_the_loop_over_layers_and_thresholds(generator, device):
    W = torch.randn(3, 2, 20, 36, generator=generator).to(device)
    masks = W.abs() > 1.5
    for options in ({}, {"sizes": [1, 3, 7]}, {"border": "full"}):
        together = box_counts(masks, **options)
        assert together.counts.shape == (3, 2, len(together.sizes))
        for i, j in product(range(3), range(2)):
            assert torch.equal(together.counts[i, j].cpu(), box_counts(masks[i, j], **options).counts.cpu())


@pytest.mark.parametrize("view", ["transposed", "sliced", "offset", "expanded", "slice of a kernel"])
def test_layout_in_memory_does_not_matter(view, generator):
    mask = random_mask((40, 72), 0.1, generator=generator)
    seen = {
        "transposed": mask.mT,
        "sliced": mask[:, 3:67:2],
        "offset": mask.flatten()[5 : 5 + 32 * 64].view(32, 64),
        "expanded": mask[0].expand(16, 72),
        "slice of a kernel": mask.view(16, 20, 3, 3)[:, :, 1, 2],
    }[view]
    copy = seen.clone(memory_format=torch.contiguous_format)
    assert torch.equal(box_counts(seen).counts, box_counts(copy).counts)


def test_integers_are_occupied_where_they_are_not_zero():
    numbers = torch.tensor([[0, 256], [-1, 0]])  # 256 has a zero low byte
    assert box_counts(numbers).counts.tolist() == [2, 1]
    assert box_counts(numbers.to_sparse()).counts.tolist() == [2, 1]


def test_counting_never_waits_for_the_device(emulated, generator):
    mask = random_mask((64, 48), 0.1, generator=generator).to(emulated)
    with count_host_syncs() as syncs:
        box_counts(mask)
        box_counts(mask, [1, 3, 7], offset=2)
    assert syncs == []


def test_large_counts_do_not_overflow_a_byte_or_a_lane():
    found = box_counts(torch.ones(1030, 2053, dtype=torch.bool))
    assert found.counts.tolist() == [-(-1030 // r) * -(-2053 // r) for r in found.sizes]


@pytest.mark.parametrize(
    ("mask", "ratio", "counts"),
    [
        (carpet(2), 3, [64, 8, 1]),
        (gasket(3), 2, [27, 9, 3, 1]),
        (cantor_dust(2), 3, [16, 4, 1]),
        (vicsek(2), 3, [25, 5, 1]),
        (menger(2), 3, [400, 20, 1]),
    ],
)
def test_small_fractals_have_their_counts(mask, ratio, counts):
    assert box_counts(mask, ratio=ratio, d=mask.ndim).counts.tolist() == counts


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 4), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_nested_counts_fall_and_slopes_stay_between_zero_and_d(height, width, ratio, p, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask((height, width), p, generator=generator)
    more = mask | random_mask((height, width), 0.1, generator=generator)
    found, larger = box_counts(mask, ratio=ratio), box_counts(more, ratio=ratio)
    assert (found.counts.diff() <= 0).all()
    assert (found.counts <= larger.counts).all()
    if mask.any() and len(found.sizes) > 1:
        local = local_slopes(found.sizes, found.counts)
        assert local.min() >= -1e-12
        assert local.max() <= 2 + 1e-12


def test_full_boxes_undo_the_bias_of_the_border():
    sizes = [2, 3, 5, 7, 11, 17, 26, 40, 61, 94, 125]
    mask = filled(500)
    full = box_counts(mask, sizes, border="full")
    clipped = box_counts(mask, sizes)
    assert abs(fit_dimension(sizes, full.normalised, window="full").D - 2) < 1e-9
    assert fit_dimension(sizes, clipped.counts, window="full").D < 1.99
    assert full.fraction.tolist() == [1.0] * len(sizes)


def test_shifts_average_the_phase_and_find_the_smallest_cover(generator):
    mask = random_mask((24, 31), 0.02, generator=generator)
    sizes = [1, 2, 3, 8]
    mean, least = (shifted_counts(mask, sizes, offsets=3, reduce=how) for how in ("mean", "min"))
    for index, r in enumerate(sizes):
        shifts = sorted({i * r // 3 for i in range(3)})
        counts = [reference(mask, r, chosen)[0] for chosen in product(shifts, repeat=2)]
        assert mean[index].item() == pytest.approx(sum(counts) / len(counts))
        assert least[index].item() == min(counts)
    once = shifted_counts(mask, sizes, offsets=1)
    assert once.tolist() == box_counts(mask, sizes).counts.tolist()
    full = shifted_counts(mask, sizes, offsets=1, border="full")
    assert torch.allclose(full, box_counts(mask, sizes, border="full").normalised)


def test_gliding_windows_are_the_loop(generator, device):
    mask = random_mask((9, 13), 0.3, generator=generator)
    measure = torch.rand(9, 13, generator=generator)
    for r in (1, 2, 5, 9):
        windows = mask.unfold(0, r, 1).unfold(1, r, 1).sum((-1, -2))
        assert torch.equal(gliding_mass(mask.to(device), r).cpu(), windows)
        windows = measure.double().unfold(0, r, 1).unfold(1, r, 1).sum((-1, -2))
        assert (gliding_mass(measure.to(device), r).cpu() - windows).abs().max() < 1e-12


@pytest.mark.parametrize(("d", "levels"), [(1, 10), (2, 7), (3, 4), (4, 3), (2, 31), (3, 20)])
def test_points_are_counted_as_their_cells(d, levels, generator, device):
    points = torch.rand(300, d, generator=generator, dtype=torch.float64)
    points[:50] = points[50:100] + 1e-9  # close pairs fall apart late or never
    found = point_counts(points.to(device), levels)
    grid = (points * 2**levels).long().clamp(0, 2**levels - 1)
    expected = [len((grid >> k).unique(dim=0)) for k in range(levels + 1)]
    assert found.counts.tolist() == expected
    assert found.sizes[-1] == 2**levels


def test_points_and_masks_agree(generator):
    points = torch.rand(2000, 2, generator=generator, dtype=torch.float64) * 6 - 3
    found = point_counts(points, 6, low=-3.0, high=torch.tensor([3.0, 3.0]))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    cell = ((points + 3) / 6 * 64).long()
    mask[cell[:, 0], cell[:, 1]] = True
    assert found.counts.tolist() == box_counts(mask).counts.tolist()


def test_null_counts_are_the_hypergeometric_expectation():
    """All subsets of a small ragged grid, counted one by one."""
    shape, sizes = (2, 3), [1, 2, 3]
    for m in range(7):
        masks = torch.tensor([c for c in product([0, 1], repeat=6) if sum(c) == m]).bool().view(-1, *shape)
        mean = box_counts(masks, sizes).counts.double().mean(0)
        assert (null_counts(shape, m, sizes) - mean).abs().max() < 1e-12


def exact(n, b, m):
    return 1 - math.comb(n - b, m) / math.comb(n, m)


@pytest.mark.parametrize("m", [0, 1, 5, 65, 70, 400, 2000, 3800, 4030, 4096])
def test_null_counts_are_exact_in_every_branch(m):
    sizes = [1, 2, 4, 8, 9, 16, 32, 64]
    found = null_counts((64, 64), m, sizes, border="full")
    expected = [(64 // r) ** 2 * exact(4096, r * r, m) for r in sizes]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-10)


def test_null_counts_of_copies_and_batches():
    shape, sizes = (5, 7), [1, 2, 4]
    batch = null_counts(shape, torch.tensor([[3, 30], [0, 60]]), sizes, copies=2)
    assert batch.shape == (2, 2, 3)
    for m, found in zip([3, 30, 0, 60], batch.flatten(0, 1), strict=True):
        assert torch.equal(found, null_counts(shape, m, sizes, copies=2))
    assert batch[0, 1, 0].item() == pytest.approx(30)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.75])
def test_noise_has_the_dimension_of_the_closed_form(p, generator):
    mask = random_mask((512, 512), p, generator=generator)
    found = box_counts(mask)
    null = null_counts(mask.shape, int(mask.sum()), found.sizes)
    measured = fit_dimension(found.sizes, found.counts, window="full")
    expected = fit_dimension(found.sizes, null, window="full")
    assert abs(measured.D - expected.D) <= 0.005
    assert measured.D < 1.98
    assert measured.r2 > 0.95


def test_mean_counts_of_draws_are_the_closed_form(generator):
    shape, m, draws = (37, 53), 150, 400
    order = torch.rand(draws, math.prod(shape), generator=generator).argsort(1)
    masks = torch.zeros(draws, math.prod(shape), dtype=torch.bool).scatter_(1, order[:, :m], True)
    found = box_counts(masks.view(draws, *shape))
    mean, spread = found.counts.double().mean(0), found.counts.double().std(0)
    null = null_counts(shape, m, found.sizes)
    # Empty boxes exclude each other: their number varies less than a Poisson number, drawn or not.
    rare = (torch.tensor(found.boxes) - null).clamp(min=0).sqrt()
    bound = 4 * torch.where(spread > 0, spread, rare) / math.sqrt(draws)
    assert ((mean - null).abs() <= bound + 1e-9).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_counts(torch.rand(4, 4)), "mask must be boolean or integer"),
        (lambda: box_counts(torch.ones(4).bool()), "d must lie between 1 and the 1 axes"),
        (lambda: box_counts(torch.ones(0, 4).bool()), "mask must not be empty"),
        (lambda: box_counts(filled(4), ratio=1), "ratio of at least 2"),
        (lambda: box_counts(filled(4), "triadic"), "sizes must be 'dyadic'"),
        (lambda: box_counts(filled(4), [2, 1]), "sizes must be positive and growing"),
        (lambda: box_counts(filled(4), [0, 1]), "sizes must be positive and growing"),
        (lambda: box_counts(filled(4), offset=-1), "offset must be"),
        (lambda: box_counts(filled(4), offset=(1, 1, 1)), "offset must be one or 2"),
        (lambda: box_counts(filled(4), border="pad"), "border must be one of"),
        (lambda: shifted_counts(filled(4), [2], offsets=0), "offsets must be at least 1"),
        (lambda: shifted_counts(filled(4), [2], reduce="max"), "reduce must be"),
        (lambda: gliding_mass(filled(4), 5), "r must fit into the grid"),
        (lambda: gliding_mass(torch.ones(4), 1), "d must lie between"),
        (lambda: point_counts(torch.rand(4), 3), r"points must be \(m, d\)"),
        (lambda: point_counts(torch.rand(4, 3), 21), "levels must lie between 0 and 20"),
        (lambda: point_counts(torch.tensor([[math.nan]]), 3), "points must be finite"),
        (lambda: point_counts(torch.rand(4, 2), 3, low=1.0), "low below high"),
        (lambda: null_counts((4, 4), 17, [1]), "m must lie between 0 and the 16 cells, got 17"),
        (lambda: null_counts((4, 0), 1, [1]), "shape and copies must be positive"),
        (lambda: null_counts((4, 4), 1, [0]), "sizes must be positive"),
        (lambda: null_counts((4, 4), 1, [1], border="pad"), "border must be one of"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
