"""How boxes are filled: closed forms for independent cells, carpets and cascades."""

import math
from itertools import pairwise

import pytest
import torch

from geomlib.weightspace import box_counts, fit_dimension, lacunarity, renyi_dimensions
from geomlib.weightspace.shapes import carpet, cascade, cascade_dimension, filled, random_mask


def test_lacunarity_of_single_cells_is_one_over_the_density(generator):
    mask = random_mask((100, 80), 0.13, generator=generator)
    assert lacunarity(mask, [1]).item() == pytest.approx(1 / mask.double().mean().item(), rel=1e-12)


def test_lacunarity_of_independent_cells_has_a_closed_form(generator):
    mask = random_mask((512, 512), 0.1, generator=generator)
    p, sizes = mask.double().mean().item(), [1, 2, 4, 8, 16]
    expected = [1 + (1 - p) / (p * r * r) for r in sizes]
    assert lacunarity(mask, sizes).tolist() == pytest.approx(expected, rel=0.02)


def test_lacunarity_of_the_carpet():
    expected = [2.0273, 1.6086, 1.4227, 1.2813]
    assert lacunarity(carpet(6), [1, 3, 9, 27]).tolist() == pytest.approx(expected, abs=1e-3)


def test_lacunarity_is_the_loop_over_windows(generator, device):
    for values in (
        torch.rand(2, 9, 14, generator=generator),
        random_mask((2, 9, 14), 0.4, generator=generator),
    ):
        found = lacunarity(values.to(device), [1, 3, 9]).cpu()
        for k, r in enumerate((1, 3, 9)):
            mass = values.double().unfold(-2, r, 1).unfold(-2, r, 1).sum((-1, -2)).flatten(1)
            expected = mass.square().mean(1) / mass.mean(1).square()
            assert (found[:, k] - expected).abs().max() < 1e-10


def test_even_sets_have_no_lacunarity_and_empty_ones_no_answer():
    assert lacunarity(filled(16), [1, 4, 16]).tolist() == [1, 1, 1]
    assert lacunarity(filled(4, d=3), [2], d=3).tolist() == [1]
    assert math.isnan(lacunarity(~filled(16), [2]).item())


@pytest.mark.parametrize("shares", [(0.4, 0.3, 0.2, 0.1), (0.7, 0.1, 0.1, 0.1)])
def test_cascade_has_its_dimensions(shares, device):
    orders = [-2, 0, 0.5, 1, 2, 4]
    found = renyi_dimensions(cascade(8, shares, device=device), orders)
    assert pytest.approx([cascade_dimension(q, shares) for q in orders], abs=1e-6) == found.D
    assert found.sizes == (1, 2, 4, 8, 16, 32, 64, 128)


def test_order_zero_is_the_box_dimension(generator):
    mask = random_mask((64, 64), 0.1, generator=generator)
    found = box_counts(mask)
    box = fit_dimension(found.sizes[:-1], found.counts[:-1], window="full")
    assert renyi_dimensions(mask, [0]).D[0] == pytest.approx(box.D, abs=1e-12)
    native = renyi_dimensions(carpet(5), [0, 1, 2], ratio=3)
    assert pytest.approx([math.log(8, 3)] * 3, abs=1e-9) == native.D


def test_independent_weights_are_not_quite_uniform(generator):
    W = torch.randn(512, 512, generator=generator)
    D0, D2 = renyi_dimensions(W.abs(), [0, 2]).D
    assert pytest.approx(2) == D0
    assert pytest.approx(1.945, abs=0.01) == D2


def test_dimensions_fall_with_the_order(generator):
    D = renyi_dimensions(torch.rand(64, 64, generator=generator) ** 4, [-2, -1, 0, 1, 2, 3]).D
    assert all(before >= after - 1e-12 for before, after in pairwise(D))


def test_measures_without_mass_or_scales_say_so():
    assert renyi_dimensions(torch.zeros(32, 32)).status == "empty"
    small = renyi_dimensions(torch.ones(8, 8))
    assert small.status == "insufficient_scales"
    assert all(math.isnan(D) for D in small.D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lacunarity(-torch.ones(4, 4), [1]), "values must not be negative"),
        (lambda: lacunarity(torch.ones(4, 4), [5]), "sizes must lie between 1 and the shortest side 4"),
        (lambda: lacunarity(torch.ones(4, 4), []), "sizes must lie between"),
        (lambda: lacunarity(torch.ones(4), [1]), "d must lie between"),
        (lambda: lacunarity(torch.full((4, 4), math.nan), [1]), "values must be finite"),
        (lambda: renyi_dimensions(-torch.ones(4, 4)), "measure must not be negative"),
        (lambda: renyi_dimensions(torch.ones(4, 4), []), "q an order"),
        (lambda: renyi_dimensions(torch.ones(4, 4), ratio=1), "ratio must be at least 2"),
        (lambda: renyi_dimensions(torch.full((4, 4), math.inf)), "measure must be finite"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
