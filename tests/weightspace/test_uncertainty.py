"""Two spreads of an estimate: small where nothing is special, and never the interval of the fit."""

import math

import pytest
import torch

from geomlib.weightspace import box_counts, fit_dimension, robustness, slopes
from geomlib.weightspace.shapes import carpet, filled, random_mask


@pytest.mark.parametrize("window", ["inner", "full"])
def test_noise_has_no_preferred_origin(window, device):
    masks = random_mask((30, 256, 256), 0.2, generator=torch.Generator().manual_seed(0))
    found = box_counts(masks)
    sampling = float(slopes(found.sizes, found.counts, window=window, shape=(256, 256)).std())
    one = robustness(masks[0].to(device), window=window)
    assert pytest.approx(fit_dimension(found.sizes, found.counts[0], window=window).D) == one.D
    assert one.offset_sd < 4 * sampling  # other boxes of noise are other noise
    assert sampling / 4 < one.jackknife_sd < 4 * sampling


def test_jackknife_is_that_of_the_definition(generator):
    mask = random_mask((40, 64), 0.1, generator=generator)
    left = []
    for group in range(4):
        rest = torch.cat([mask[: 10 * group], mask[10 * group + 10 :]])
        found = box_counts(rest, [1, 2, 4, 8, 16, 32, 64])
        left.append(float(slopes(found.sizes, found.counts)))
    mean = sum(left) / 4
    expected = math.sqrt(3 / 4 * sum((D - mean) ** 2 for D in left))
    assert robustness(mask, window="full", groups=4).jackknife_sd == pytest.approx(expected)


def test_a_fractal_has_an_origin():
    """Its boxes were drawn from a corner: shifted grids see another set."""
    assert robustness(carpet(6)).offset_sd > 10 * robustness(random_mask((729, 729), 0.5)).offset_sd


def test_a_full_grid_looks_the_same_from_everywhere():
    assert robustness(filled(100), window="full").offset_sd < 1e-12
    assert math.isnan(robustness(~filled(64)).D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robustness(filled(8), offsets=1), "offsets must be at least 2"),
        (lambda: robustness(filled(8), groups=9), "groups between 2 and the 8 rows, got 8 and 9"),
        (lambda: robustness(torch.tensor(True)), "the 0 rows"),
        (lambda: robustness(torch.rand(8, 8)), "mask must be boolean or integer"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
