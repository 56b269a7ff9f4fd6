"""Laws of the middle block: its spectrum is the one promised, before and after training."""

import pytest
import torch

from geomlib.sim import SpectralMix
from geomlib.testing import assert_gradients

MODES = ["free", "orth", "oblique", "rotation", "stable"]


def build(mode, dim=8, rank=4, **options):
    if mode == "stable":
        options = {"ones": rank - 2, "rotations": 1, "spirals": 1} | options
    options = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64} | options
    return SpectralMix(dim, rank, mode, **options)


def matrix(mix):
    left, right = mix.factors()
    return left @ right


def step(mix):
    """Take one large, arbitrary optimiser step."""
    y = torch.randn(16, mix.dim, dtype=mix.U.dtype)
    optimizer = torch.optim.Adam(mix.parameters(), lr=0.05)
    (mix(y) - y.flip(-1)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_shape_dtype_and_device_are_those_of_the_input(mode, shape, device):
    mix = build(mode, dtype=torch.float32, device=device)
    out = mix(torch.ones(shape, device=device))
    assert (out.shape, out.dtype, out.device.type) == (shape, torch.float32, device.type)


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_is_a_batch_of_one(mode):
    mix, y = build(mode), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(mix(y), mix(y[None])[0])


@pytest.mark.parametrize("mode", MODES)
def test_forward_is_the_product_of_the_factors(mode):
    mix, y = build(mode), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(mix(y), y @ matrix(mix).mT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [0, 1, 2, 7])
def test_power_is_repeated_application(mode, t):
    mix, y = build(mode, init="default"), torch.randn(5, 8, dtype=torch.float64)
    slow = y
    for _ in range(t):
        slow = mix(slow)
    torch.testing.assert_close(mix.power(y, t), slow, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_nonzero_spectrum_of_the_map_is_that_of_theta(mode):
    mix = build(mode, init="default")
    full = torch.linalg.eigvals(matrix(mix).detach())
    full = full[full.abs().argsort(descending=True)][: len(mix.spectrum())]
    distance = (full[:, None] - mix.spectrum()[None]).abs()
    assert distance.min(dim=0).values.max() < 1e-10
    assert distance.min(dim=1).values.max() < 1e-10


def test_powers_of_a_free_block_go_through_theta():
    mix = build("free", init="default")
    left, right = mix.factors()
    powered = left @ torch.linalg.matrix_power(mix.theta(), 4) @ right
    assert (torch.linalg.matrix_power(matrix(mix), 5) - powered).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["orth", "oblique"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_projections_stay_projections_through_training(mode, dtype, tolerance):
    mix = build(mode, dtype=dtype)
    before = matrix(mix).detach()
    assert (before @ before - before).abs().max() < tolerance
    step(mix)
    after = matrix(mix).detach()
    assert (after @ after - after).abs().max() < tolerance
    assert (after - before).abs().max() > 1e-3  # the step did something


def test_orth_stays_symmetric_and_oblique_does_not():
    orth, oblique = build("orth"), build("oblique")
    step(orth)
    step(oblique)
    assert (matrix(orth) - matrix(orth).mT).abs().max() < 1e-12
    assert (matrix(oblique) - matrix(oblique).mT).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [1, 4, 5, 8])
def test_rotation_keeps_every_eigenvalue_on_the_unit_circle(rank):
    mix = build("rotation", rank=rank)
    step(mix)
    assert (mix.spectrum().abs() - 1).abs().max() < 1e-10
    assert mix.invariant_set_defect() < 1e-10
    if rank % 2:
        assert (mix.spectrum() - 1).abs().min() < 1e-10  # the odd one out is an eigenvalue 1


def test_rotation_orbits_neither_die_nor_grow():
    mix = build("rotation", rank=5)
    step(mix)
    left, _ = mix.factors()
    y = mix(torch.randn(8, dtype=torch.float64))
    start = torch.linalg.lstsq(left, y[:, None]).solution.norm()
    for _ in range(2000):
        y = mix(y)
    # 2000 products: rounding adds up to a few 1e-13 of the norm
    torch.testing.assert_close(torch.linalg.lstsq(left, y[:, None]).solution.norm(), start, atol=1e-8, rtol=0)


def test_stable_has_the_split_it_was_asked_for():
    mix = build("stable", dim=9, rank=5, ones=1, rotations=2, spirals=1)
    step(mix)
    modulus = mix.spectrum().abs()
    assert (modulus[:5] - 1).abs().max() < 1e-10
    assert modulus[5:].max() < 1 - 1e-3
    assert (mix.spectrum()[:5] - 1).abs().min() < 1e-10


def test_stable_powers_approach_the_limit_at_the_largest_decaying_rate():
    mix, y = build("stable", spirals=0), torch.randn(8, dtype=torch.float64)
    rate = mix.spectrum().abs()[mix.rank]
    times = range(20, 61, 20)
    error = torch.stack([(mix.power(y, t) - mix.limit(y, t)).norm() for t in times]).log()
    slope = (error[-1] - error[0]) / (times[-1] - times[0])
    torch.testing.assert_close(slope, rate.log(), rtol=0.03, atol=0)  # faster decays linger


@pytest.mark.parametrize("mode", ["rotation", "stable"])
def test_powers_form_a_semigroup(mode):
    mix, y = build(mode), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(mix.power(mix.power(y, 11), 6), mix.power(y, 17))


@pytest.mark.parametrize("mode", ["orth", "oblique", "rotation", "stable"])
def test_limit_is_a_projection_that_later_times_only_turn(mode):
    mix, y = build(mode), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(mix.limit(mix.limit(y)), mix.limit(y))
    torch.testing.assert_close(mix.limit(y, 3), mix.power(mix.limit(y), 3))


def test_free_block_has_no_limit_to_return():
    with pytest.raises(ValueError, match="no limit need exist"):
        build("free").limit(torch.zeros(8, dtype=torch.float64))


def test_phases_at_late_times_are_right_in_single_precision():
    t, exact = 1_000_000, build("rotation")
    mix = build("rotation", dtype=torch.float32)
    exact.load_state_dict(mix.state_dict())
    y = torch.randn(8, dtype=torch.float64)
    # float32 phases would be off by 0.06 radians here; what is left is the rounding of the other factors
    torch.testing.assert_close(mix.power(y.float(), t).double(), exact.power(y, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    mix = build(mode, dim=5, rank=3, ones=1) if mode == "stable" else build(mode, dim=5, rank=3)
    names, values = zip(*mix.named_parameters(), strict=True)

    def forward(y, *weights):
        return torch.func.functional_call(mix, dict(zip(names, weights, strict=True)), (y,))

    y = torch.randn(2, 5, dtype=torch.float64)
    assert_gradients(forward, y, *(value.detach() for value in values), second_order=mode != "orth")


@pytest.mark.parametrize("mode", ["free", "rotation", "stable"])
def test_gradients_of_powers(mode):
    mix = build(mode, dim=5, rank=3, ones=1) if mode == "stable" else build(mode, dim=5, rank=3)
    assert_gradients(lambda y: mix.power(y, 4), torch.randn(2, 5, dtype=torch.float64))


def test_orthonormal_start_is_a_projection_and_the_default_start_shrinks():
    projection = build("free", dim=50, rank=25)
    assert projection.fixed_point_defect() < 1e-12
    shrinking = build("free", dim=50, rank=25, init="default").spectrum().abs()
    assert shrinking.max() < 0.9
    assert shrinking.median() < 0.4


@pytest.mark.parametrize(
    ("target", "defect"), [("fixed_point", "fixed_point"), ("invariant_set", "invariant_set")]
)
def test_descending_a_penalty_reaches_its_target(target, defect):
    mix = build("free", init="default")
    optimizer = torch.optim.Adam(mix.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        mix.penalty(target).backward()
        optimizer.step()
    assert getattr(mix, f"{defect}_defect")() < 1e-3


def test_defects_tell_a_rotation_from_a_projection():
    mix = build("rotation")
    assert mix.invariant_set_defect() < 1e-12
    assert mix.fixed_point_defect() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip_is_exact(mode):
    mix = build(mode)
    other = build(mode, generator=torch.Generator().manual_seed(2))
    y = torch.randn(3, 8, dtype=torch.float64)
    assert not torch.equal(other(y), mix(y))
    other.load_state_dict(mix.state_dict())
    assert torch.equal(other(y), mix(y))


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_numbers_on_every_device(mode, device):
    here, there = build(mode), build(mode, device=device)
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu())


def test_low_precision_input_keeps_its_dtype():
    mix = build("oblique", dtype=torch.float32).bfloat16()
    assert mix(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_autocast_does_not_spoil_the_projection():
    mix, y = build("oblique", dtype=torch.float32), torch.randn(4, 8)
    step(mix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right = mix._bases()
        mix(y).sum().backward()
    assert (right @ left - torch.eye(4)).abs().max() < 1e-5


def test_meta_device_knows_the_shapes():
    mix = SpectralMix(8, 4, "rotation", device="meta")
    assert mix(torch.empty(2, 8, device="meta")).shape == (2, 8)


def test_ill_conditioned_pair_warns():
    mix = build("oblique")
    with torch.no_grad():
        mix.V[:, 0] = mix.V[:, 1] + 1e-6 * mix.V[:, 0]
    with pytest.warns(UserWarning, match="condition number"):
        mix(torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 4, "rank": 0}, "rank must lie in"),
        ({"dim": 4, "rank": 5}, "rank must lie in"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": 4, "mode": "unitary"}, "mode must be one of"),
        ({"dim": 4, "init": "zeros"}, "init must be"),
        ({"dim": 4, "mode": "orth", "ones": 1}, "belong to mode 'stable'"),
        ({"dim": 6, "rank": 4, "mode": "stable", "ones": 1, "rotations": 1}, "must equal rank"),
        ({"dim": 6, "rank": 4, "mode": "stable", "spirals": 2}, "must be at most dim"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralMix(**arguments)


@pytest.mark.parametrize(
    ("y", "message"),
    [(torch.zeros(3, 5), "must have 8 features"), (torch.zeros(3, 8).long(), "floating point")],
)
def test_bad_inputs_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        build("free")(y)


@pytest.mark.parametrize("t", [-1, 1.5])
def test_powers_need_a_natural_number(t):
    with pytest.raises(ValueError, match="integer of at least 0"):
        build("stable").power(torch.zeros(8, dtype=torch.float64), t)


def test_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match="target must be"):
        build("free").penalty("cycle")
