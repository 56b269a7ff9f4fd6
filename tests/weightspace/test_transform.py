"""Laws of the transformation: linear, composing, projecting, coarse; and where each of them ends."""

import math
from itertools import pairwise, product

import pytest
import torch

from geomlib.testing import count_host_syncs
from geomlib.weightspace import T, as_signal, cells, defect, phi, project, segment
from geomlib.weightspace.shapes import fbm_surface

SHAPES = [(64, 64), (37, 53), (7, 5), (1, 9), (24,), (6, 5, 7)]


def draw(shape, generator, device="cpu", dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def reference(W, r, reduce):
    """Loop over the boxes of a matrix."""
    rows = range(0, W.shape[0], r)
    columns = range(0, W.shape[1], r)
    return torch.tensor(
        [[reduce(W[i : i + r, j : j + r]) for j in columns] for i in rows], dtype=torch.float64
    )


REDUCTIONS = {
    "mean": lambda box: float(box.mean()),
    "sum": lambda box: float(box.sum()),
    "absmax": lambda box: float(box.abs().max()),
    "rms": lambda box: float(box.square().mean().sqrt()),
}


@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (37, 53)])
def test_segmentation_cuts_the_grid_into_nested_boxes(shape):
    for r in (1, 2, 3, 4, 8, 100):
        label = segment(shape, r)
        assert label.unique().tolist() == list(range(math.prod(-(-n // r) for n in shape)))
        for box in range(int(label.max()) + 1):
            where = (label == box).nonzero()
            assert (where.amax(0) - where.amin(0) < r).all()
    for small, large in ((1, 2), (2, 4), (2, 6), (3, 6), (4, 8)):
        fine, coarse = segment(shape, small).flatten(), segment(shape, large).flatten()
        for box in range(int(fine.max()) + 1):
            assert len(coarse[fine == box].unique()) == 1


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [(16, 8), (37, 53), (1, 9)])
@pytest.mark.parametrize("ratio", [2, 3])
def test_transformation_is_the_loop_over_boxes(shape, reduce, ratio, generator, device):
    W = draw(shape, generator)
    for k in (1, 2, 3):
        expected = reference(W, ratio**k, REDUCTIONS[reduce])
        found = T(W.to(device), k, ratio=ratio, reduce=reduce)
        assert found.device.type == device.type
        assert (found.cpu() - expected).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [-2, 0, 1, 3])
def test_transformation_is_linear_and_the_identity_at_zero(shape, k, generator):
    W, V = draw(shape, generator), draw(shape, generator)
    for reduce in ("mean", "sum"):
        apart = 2.5 * T(W, k, reduce=reduce) - 0.5 * T(V, k, reduce=reduce)
        assert (T(2.5 * W - 0.5 * V, k, reduce=reduce) - apart).abs().max() < 1e-12
    assert torch.equal(T(W, 0), W)


def test_linearity_holds_in_single_precision(generator):
    W, V = (draw((256, 256), generator, dtype=torch.float32) for _ in range(2))
    apart = T(W, 3) + T(V, 3)
    assert (T(W + V, 3) - apart).abs().max() < 1e-5 * apart.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [2, 3])
def test_shrinking_twice_adds_the_scales_on_ragged_grids_too(shape, ratio, generator):
    W = draw(shape, generator)
    for first, second in product(range(4), repeat=2):
        once = T(W, first + second, ratio=ratio)
        inner = T(W, first, ratio=ratio)
        twice = T(inner, second, ratio=ratio, counts=cells(shape, first, ratio=ratio))
        assert (once - twice).abs().max() < 1e-12


def test_means_of_means_are_wrong_on_a_ragged_grid(generator):
    """The counts are not decoration: without them a short box at the border weighs too much."""
    W = draw((37, 53), generator)
    assert (T(W, 3) - T(T(W, 1), 2)).abs().max() > 1e-3


def test_dilations_add_and_a_dilation_is_undone_exactly(generator):
    V = draw((5, 3), generator)
    assert torch.equal(T(V, -3), T(T(V, -1), -2))
    for down, up in product(range(4), repeat=2):
        assert (T(T(V, -down), up) - T(V, up - down)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(32, 64), (64, 64)])
def test_shrinking_first_loses_exactly_the_detail(shape, generator):
    W = draw(shape, generator)
    for down, up in product(range(1, 5), repeat=2):
        error = T(T(W, up), -down) - T(W, up - down)
        if down <= up:
            lost = -(T(W, up - down) - project(T(W, up - down), down))
        else:
            lost = -T(W - project(W, up), up - down)
        assert (error - lost).abs().max() < 1e-12
        assert error.norm() > 0.1  # it is lost: the integers act only coarsely
        assert T(error, down).abs().max() < 1e-12  # seen from far enough the two sides agree


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_are_nested_and_split_the_energy(shape, generator):
    W, V = draw(shape, generator), draw(shape, generator)
    for k in range(5):
        P = project(W, k)
        assert (project(P, k) - P).abs().max() < 1e-12
        assert abs(float((P * V).sum() - (W * project(V, k)).sum())) < 1e-10  # self-adjoint
        total = W.square().sum()
        assert abs(float(P.square().sum() + (W - P).square().sum() - total)) < 1e-12 * float(total)
        for j in range(5):
            assert (project(project(W, j), k) - project(W, max(j, k))).abs().max() < 1e-12


def test_details_of_all_scales_and_the_mean_hold_the_whole_energy(generator):
    W = draw((256, 256), generator)
    ladder = [project(W, k) for k in range(9)]
    details = sum(float((fine - coarse).square().sum()) for fine, coarse in pairwise(ladder))
    total = float(W.square().sum())
    assert abs(details + float(W.mean() ** 2) * W.numel() - total) < 1e-12 * total


@pytest.mark.parametrize("ratio", [2, 3])
def test_composition_defect_is_the_formula(ratio):
    x = torch.arange(-5000, 5001)
    for k, j in product(range(-5, 6), repeat=2):
        found = phi(phi(x, j, ratio=ratio), k, ratio=ratio) - phi(x, k + j, ratio=ratio)
        assert int(found.abs().max()) == defect(k, j, ratio=ratio)
    if ratio == 2:
        assert [defect(-3, 3), defect(-2, 4), defect(-4, 2)] == [7, 3, 12]


@pytest.mark.parametrize("ratio", [2, 3])
def test_each_dilation_is_a_quasi_isometry_with_a_coarse_inverse(ratio, generator):
    x, y = (torch.randint(-10_000, 10_001, (10_000, 2), generator=generator) for _ in range(2))
    far = (x - y).abs().amax(1)
    for k in range(6):
        r = ratio**k
        moved = (phi(x, k, ratio=ratio) - phi(y, k, ratio=ratio)).abs().amax(1)
        assert (moved >= far / r - 1).all()
        assert (moved <= far / r + 1).all()
        back = phi(phi(x, k, ratio=ratio), -k, ratio=ratio)
        assert int((back - x).abs().max()) <= r - 1
        assert torch.equal(phi(phi(x, -k, ratio=ratio), k, ratio=ratio), x)


@pytest.mark.parametrize("d", [1, 2])
def test_preimages_of_balls_are_bounded(d):
    side = torch.arange(-200, 201)
    grid = torch.cartesian_prod(*[side] * d).reshape(-1, d)
    for k in range(5):
        inside = int((phi(grid, k).abs().amax(1) <= 3).sum())
        assert inside == 7**d * 2 ** (d * k)


def test_as_an_action_it_is_not_proper():
    """Every orbit falls into the cube {0, -1}^d, so infinitely many scales bring that cube back to itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(10**6), 10**6, (1000, 2), generator=generator)
    for _ in range(40):
        x = phi(x, 1)
    assert set(x.flatten().tolist()) == {0, -1}
    assert torch.equal(phi(x, 1), x)
    neighbours = torch.tensor([0, 1])
    stretch = [int(phi(neighbours, -k).diff()) for k in range(8)]
    assert stretch == [2**k for k in range(8)]  # no single bound serves all scales


def test_inversion_is_asymptotic_for_regular_signals_and_never_for_noise():
    """Relative error against the side of the grid: the slope is the regularity, and zero for noise."""
    sides = [64, 128, 256, 512]

    def slope(make, k):
        errors = []
        for n in sides:
            W = make(n)
            W = W - W.mean()
            errors.append(float((W - project(W, k)).norm() / W.norm()))
        x = torch.tensor(sides, dtype=torch.float64).log()
        y = torch.tensor(errors, dtype=torch.float64).log()
        return float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()), errors

    def smooth(n):
        t = torch.arange(n, dtype=torch.float64) / n * 2 * math.pi
        return t.sin()[:, None] * t.cos()

    def rough(hurst):
        return lambda n: torch.stack(
            [fbm_surface(n, hurst, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        ).flatten(0, 1)

    for k in (1, 3):
        assert abs(slope(smooth, k)[0] + 1) < 0.12
        for hurst in (0.2, 0.5, 0.8):
            assert abs(slope(rough(hurst), k)[0] + hurst) < 0.12
        noise, errors = slope(
            lambda n: torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64), k
        )
        assert abs(noise) < 0.02
        level = math.sqrt(1 - 4.0**-k)
        assert all(abs(error - level) < 0.01 for error in errors[1:])


def test_batch_is_the_loop_and_no_axis_of_it_is_pooled(generator):
    W = draw((3, 2, 9, 14), generator)
    for k in (-1, 0, 2):
        together = T(W, k, d=2)
        for i, j in product(range(3), range(2)):
            assert torch.equal(together[i, j], T(W[i, j], k))


def test_left_out_cells_do_not_count():
    W = torch.tensor([[1.0, 5.0], [3.0, 100.0]])
    assert T(W, 1, counts=torch.tensor([[1, 1], [1, 0]])).item() == 3.0


def test_gradient_of_a_mean_is_spread_over_its_box():
    W = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    T(W, 1)[0, 0].backward()
    assert W.grad.tolist() == [[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int8, torch.float64),
        (torch.bool, torch.float64),
    ],
)
def test_narrow_numbers_are_widened(dtype, expected):
    assert T(torch.ones(4, 4, dtype=dtype), 1).dtype == expected


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_sparse_complex_and_quantised_tensors_become_signals():
    dense = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert torch.equal(as_signal(dense.to_sparse()), dense)
    assert as_signal(torch.tensor([3 + 4j])).tolist() == [5.0]
    quantised = torch.quantize_per_tensor(dense, 0.5, 0, torch.qint8)
    assert torch.equal(as_signal(quantised), dense)
    assert as_signal(torch.tensor([math.inf, 1.0]), check_finite=False).tolist() == [math.inf, 1.0]


def test_coordinates_never_wait_for_the_device(emulated):
    x = torch.arange(10).to(emulated)
    with count_host_syncs() as syncs:
        phi(phi(x, 2), -2)
    assert syncs == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T(torch.ones(2, 2), 1, ratio=1), "ratio must be at least 2"),
        (lambda: T(torch.ones(2, 2), 1, reduce="median"), "reduce must be one of"),
        (lambda: T(torch.ones(2, 2), 1, d=3), "d must lie between 1 and the 2 axes"),
        (lambda: T(torch.ones(2, 2), -1, shape=(9, 4)), r"shape must have \(2, 2\) boxes of side 2"),
        (lambda: T(torch.zeros(0, 2), 1), "W must not be empty"),
        (lambda: T(torch.ones(2, 2, device="meta"), 1), "meta device"),
        (lambda: T(torch.tensor([1.0, math.nan, -math.inf]), 1), "1 NaN and 1 infinite of 3 entries"),
        (lambda: as_signal(torch.tensor([math.inf]), "fc.weight"), "fc.weight must be finite"),
        (lambda: project(torch.ones(2), -1), "k must be at least 0"),
        (lambda: segment((3, 0), 2), "shape must hold positive sides"),
        (lambda: segment((3, 3), 0), "r must be at least 1"),
        (lambda: cells((3, 3), -1), "k must be at least 0"),
        (lambda: phi(torch.ones(2), 1), "x must hold integers"),
        (lambda: defect(1, 1, ratio=0), "ratio must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
