"""Each surrogate keeps what it promises and destroys the rest."""

import pytest
import torch

from geomlib.weightspace import haar_exponent
from geomlib.weightspace.shapes import fbm_surface
from geomlib.weightspace.surrogates import SURROGATES, rank_remap, surrogate


@pytest.fixture
def W(generator):
    """Rows and columns of unequal scale, so that every property can be lost."""
    scale = torch.randn(24, 1, generator=generator).exp() * torch.randn(1, 30, generator=generator).exp()
    return scale * torch.randn(24, 30, generator=generator, dtype=torch.float64)


def ordered(x):
    return x.flatten().sort().values


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("shape", [(12, 10), (8, 4, 3, 3)])
def test_shape_dtype_and_device_follow_the_tensor(kind, shape, generator, device):
    W = torch.randn(shape, generator=generator).to(device)
    drawn = surrogate(W, kind, rounds=3, generator=generator)
    assert (drawn.shape, drawn.dtype, drawn.device.type) == (W.shape, W.dtype, device.type)
    assert not torch.equal(drawn.cpu(), W.cpu())
    assert torch.isfinite(drawn.cpu()).all()


@pytest.mark.parametrize("kind", SURROGATES)
def test_the_generator_decides_the_draw(kind, W):
    first, second, third = (
        surrogate(W, kind, rounds=3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("kind", ["cells", "rc", "iaaft"])
def test_shuffles_keep_the_values(kind, W, generator):
    assert torch.equal(ordered(surrogate(W, kind, rounds=5, generator=generator)), ordered(W))


def test_signflip_keeps_absolute_values_in_place(W, generator):
    drawn = surrogate(W, "signflip", generator=generator)
    assert torch.equal(drawn.abs(), W.abs())
    assert 0.3 < (drawn == W).double().mean() < 0.7


def test_rc_keeps_the_multisets_of_rows_and_columns(W, generator):
    drawn = surrogate(W, "rc", generator=generator)
    for axis in (0, 1):
        mine, theirs = (x.transpose(0, axis).sort(1).values.tolist() for x in (drawn, W))
        assert sorted(mine) == sorted(theirs)


def test_rc_moves_kernels_whole(generator):
    W = torch.randn(6, 5, 3, 3, generator=generator)
    kernels = {tuple(k.tolist()) for k in surrogate(W, "rc", generator=generator).reshape(30, 9)}
    assert kernels == {tuple(k.tolist()) for k in W.reshape(30, 9)}


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (8, 3, 3, 3)])
def test_svd_keeps_the_singular_values(shape, generator):
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = surrogate(W, "svd", generator=generator)
    before, after = (torch.linalg.svdvals(x.flatten(1)) for x in (W, drawn))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def test_svd_vectors_are_uniform_on_the_sphere(generator):
    """No direction is preferred: the mean of the leading projector is the identity over n."""
    W = torch.zeros(3, 3, dtype=torch.float64)
    W[0, 0] = 1
    draws = torch.stack([surrogate(W, "svd", generator=generator) for _ in range(4000)])
    mean = (draws @ draws.mT).mean(0)
    # Each entry of a projector on a random line has a standard deviation below 0.3: four of the mean's.
    torch.testing.assert_close(mean, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=4 * 0.3 / 4000**0.5)
    assert draws.mean(0).abs().max() < 4 * (1 / 9 / 4000) ** 0.5


@pytest.mark.parametrize("shape", [(24, 30), (25, 31), (24, 31)])
def test_phase_keeps_the_modulus_of_the_transform_and_the_mean(shape, generator):
    W = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    drawn = surrogate(W, "phase", generator=generator)
    before, after = torch.fft.fft2(W).abs(), torch.fft.fft2(drawn).abs()
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(drawn.mean(), W.mean())


def test_iaaft_comes_near_the_modulus_and_a_shuffle_does_not(generator):
    W = fbm_surface(64, 0.7, generator=generator) ** 3
    goal = torch.fft.fft2(W).abs()

    def miss(kind):
        return float(
            (torch.fft.fft2(surrogate(W, kind, generator=generator)).abs() - goal).norm() / goal.norm()
        )

    # The largest coefficients of a steep spectrum are fitted in a few rounds.
    assert miss("iaaft") < 0.1 < 0.5 < miss("cells")


def test_phase_keeps_the_haar_exponent_and_a_shuffle_does_not(generator):
    W = fbm_surface(256, 0.5, generator=generator)
    kept = haar_exponent(surrogate(W, "phase", generator=generator)).zeta
    lost = haar_exponent(surrogate(W, "cells", generator=generator)).zeta
    assert abs(kept - haar_exponent(W).zeta) < 0.15
    assert abs(lost + 2) < 0.1


def test_rank1_keeps_row_and_column_scales_only(generator):
    rows = torch.logspace(-1, 1, 64, dtype=torch.float64)[:, None]
    columns = torch.logspace(-1, 1, 48, dtype=torch.float64)[None]
    W = rows * columns * torch.randn(64, 48, generator=generator, dtype=torch.float64).sign()
    drawn = surrogate(W, "rank1", generator=generator)
    # Residuals are +-1 here, and any shuffle of them keeps every row and column norm.
    torch.testing.assert_close(drawn.abs(), W.abs())
    assert not torch.equal(drawn, W)


def test_rank1_leaves_dead_rows_and_columns_dead(generator):
    W = torch.randn(6, 5, generator=generator)
    W[2], W[:, 3] = 0, 0
    drawn = surrogate(W, "rank1", generator=generator)
    assert torch.isfinite(drawn).all()
    assert drawn[2].abs().max() == 0
    assert drawn[:, 3].abs().max() == 0


def test_reinit_draws_from_the_given_law(generator):
    W = torch.randn(50, 40, generator=generator)
    bound = 1 / 40**0.5  # torch's default for a linear layer: uniform within 1 / sqrt(inputs)
    drawn = surrogate(W, "reinit", generator=generator)
    assert 0.95 * bound < drawn.abs().max() <= bound
    assert torch.equal(surrogate(W, "reinit", init=lambda x: x.fill_(3.0)), torch.full_like(W, 3.0))


@pytest.mark.parametrize("kind", ["svd", "phase", "rank1"])
def test_remapping_gives_the_old_values_in_the_new_order(kind, W):
    plain, remapped = (
        surrogate(W, kind, remap=remap, generator=torch.Generator().manual_seed(0)) for remap in (False, True)
    )
    assert torch.equal(ordered(remapped), ordered(W))
    assert torch.equal(remapped.flatten().argsort(), plain.flatten().argsort())


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (torch.ones(3, 3), {"kind": "bootstrap"}, "kind must be one of cells"),
        (torch.ones(3), {"kind": "cells"}, "at least two axes"),
        (torch.ones(3, 3).long(), {"kind": "cells"}, "floating point"),
        (torch.tensor([[1.0, torch.nan]]), {"kind": "rc"}, "got 1 NaN or infinite"),
        (torch.ones(3, 3), {"kind": "iaaft", "rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(W, options, message):
    with pytest.raises(ValueError, match=message):
        surrogate(W, **options)


def test_remapping_needs_equal_sizes():
    with pytest.raises(ValueError, match="must have the 3 entries"):
        rank_remap(torch.ones(2), torch.ones(3))
