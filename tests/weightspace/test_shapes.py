"""The sets are what they claim to be."""

import math

import pytest
import torch

from geomlib.weightspace import shapes
from geomlib.weightspace.shapes import (
    DIMENSIONS,
    cantor_dust,
    carpet,
    cascade,
    cascade_dimension,
    diagonal,
    disk,
    fbm_surface,
    filled,
    gasket,
    koch,
    kronecker_power,
    menger,
    percolation,
    plane,
    point,
    random_mask,
    vicsek,
)

SEED = torch.tensor([[1, 0, 1], [1, 1, 0]])


def test_kronecker_power_nests_its_seed():
    power = kronecker_power(SEED, 3)
    assert power.shape == (8, 27)
    for i in range(8):
        for j in range(27):
            digits = [SEED[i // 2**k % 2, j // 3**k % 3].item() for k in range(3)]
            assert power[i, j] == math.prod(digits)


@pytest.mark.parametrize(
    ("shape", "level", "cells"),
    [(carpet, 3, 512), (gasket, 4, 81), (cantor_dust, 3, 64), (vicsek, 3, 125), (menger, 2, 400)],
)
def test_levels_multiply_the_cells(shape, level, cells, device):
    mask = shape(level, device=device)
    assert mask.dtype == torch.bool
    assert mask.device.type == device.type
    assert int(mask.sum()) == cells


def test_gasket_is_pascals_triangle_modulo_two():
    mask = gasket(4)
    assert all(mask[i, j].item() == bool(math.comb(i, j) % 2) for i in range(16) for j in range(16))


def test_menger_sponge_has_carpets_for_faces():
    sponge = menger(2)
    for face in (sponge[0], sponge[-1], sponge[:, 0], sponge[:, :, -1]):
        assert torch.equal(face, carpet(2))


def test_koch_curve_is_connected_symmetric_and_has_its_height():
    from scipy import ndimage

    mask = koch(243)
    _, parts = ndimage.label(mask.numpy(), structure=torch.ones(3, 3).numpy())
    assert parts == 1
    assert mask[-1, 0]
    assert mask[-1, -1]
    height = 243 - int(mask.any(1).nonzero()[0])
    assert abs(height - 243 * math.sqrt(3) / 6) <= 1.5
    overlap = (mask & mask.flip(1)).sum() / mask.sum()
    assert overlap > 0.8  # up to the rounding of points to cells


def test_lines_points_and_blocks(device):
    assert torch.equal(diagonal(5, device=device).cpu(), torch.eye(5, dtype=torch.bool))
    assert int(diagonal(4, d=3).sum()) == 4
    assert int(point(6, d=3, device=device).sum()) == 1
    assert bool(filled(3, d=3, device=device).all())
    assert filled(3, d=1).shape == (3,)
    area = disk(200, device=device).double().mean().item()
    assert area == pytest.approx(math.pi / 4, abs=0.005)


def test_random_mask_has_its_density_and_repeats_with_the_seed(device):
    first, again = (
        random_mask((200, 200), 0.3, generator=torch.Generator().manual_seed(1), device=device)
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 40_000))


def test_percolation_keeps_the_largest_cluster_only(generator):
    from scipy import ndimage

    mask = percolation(100, generator=generator)
    _, clusters = ndimage.label(mask.numpy())
    assert clusters == 1
    again = random_mask((100, 100), 0.592746, generator=torch.Generator().manual_seed(0))
    label, number = ndimage.label(again.numpy())
    assert int(mask.sum()) == max(int((label == k).sum()) for k in range(1, number + 1))
    assert (again | ~mask).all()
    assert not percolation(8, p=0.0).any()
    assert percolation(8, p=1.0).all()


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_rough_surface_has_its_spectrum(hurst):
    """Power falls like the wave number to the power -(2H + 2), through a window that damps the border."""
    n, k = 256, torch.fft.fftfreq(256, dtype=torch.float64) * 256
    radius = (k[:, None].square() + k.square()).sqrt()
    window = torch.hann_window(n, dtype=torch.float64)
    power = 0.0
    for seed in range(4):
        W = fbm_surface(n, hurst, generator=torch.Generator().manual_seed(seed))
        assert abs(W.mean().item()) < 1e-12
        assert W.std(correction=0).item() == pytest.approx(1)
        power = power + torch.fft.fft2(W * window[:, None] * window).abs().square()
    rings = [2.0**e for e in (2.5, 3.5, 4.5, 5.5)]
    mean = torch.stack([power[(radius >= r) & (radius < 1.3 * r)].mean().log() for r in rings])
    slope = float((mean[-1] - mean[0]) / math.log(rings[-1] / rings[0]))
    assert slope == pytest.approx(-(2 * hurst + 2), abs=0.2)


def test_surface_is_drawn_anew_with_each_seed_and_moved(device):
    a, b, c = (
        fbm_surface(16, 0.5, generator=torch.Generator().manual_seed(s), device=device) for s in (0, 0, 1)
    )
    assert a.device.type == device.type
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_plane_is_flat():
    assert plane(9).diff(n=2, dim=0).abs().max() < 1e-12
    assert (plane(9).min(), plane(9).max()) == (0, 1)


def test_cascade_is_a_measure_with_the_dimensions_of_its_shares(device):
    mu = cascade(4, device=device)
    assert mu.sum().item() == pytest.approx(1)
    assert mu.max().item() == pytest.approx(0.4**4)
    known = {-2: 2.384470, 0: 2.0, 1: 1.846439, 2: 1.736966, 4: 1.606702}
    for q, D in known.items():
        assert cascade_dimension(q) == pytest.approx(D, abs=1e-6)
    assert cascade_dimension(1 + 1e-6) == pytest.approx(cascade_dimension(1), abs=1e-5)
    assert cascade_dimension(7, [0.25] * 4) == pytest.approx(2)


def test_every_exact_dimension_belongs_to_a_function():
    assert all(callable(getattr(shapes, name)) for name in DIMENSIONS)
    assert all(0 <= D <= 3 for D in DIMENSIONS.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kronecker_power([[1]], 0), "level be at least 1"),
        (lambda: carpet(0), "level be at least 1"),
        (lambda: koch(1), "n must be at least 2"),
        (lambda: diagonal(0), "n and d must be positive"),
        (lambda: point(3, d=0), "n and d must be positive"),
        (lambda: disk(0), "n must be positive"),
        (lambda: random_mask((2, 2), 1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda: percolation(0), "n must be positive"),
        (lambda: fbm_surface(1, 0.5), "n must be at least 2"),
        (lambda: fbm_surface(8, 1.0), r"hurst must lie in \(0, 1\), got 1.0"),
        (lambda: plane(1), "n must be at least 2"),
        (lambda: cascade(2, [0.5, 0.5, 0.5, 0.5]), "four positive shares with sum 1"),
        (lambda: cascade_dimension(0, [1.0, 0, 0, 0]), "four positive shares"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
