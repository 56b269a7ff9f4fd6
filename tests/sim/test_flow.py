"""Laws of FlowSIM: exact inverse, exact time, a known attractor."""

import pytest
import torch

from geomlib.sim import Coupling, FlowSIM, polar_advance, trajectory_loss
from geomlib.testing import assert_gradients


def bend(module, size=0.3, seed=5):
    """Move the zero-initialised parameters, so that the flow is no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (size * draw).to(parameter)
    return module


def flow(*arguments, **options):
    options = {"width": 16, "dtype": torch.float64, "generator": torch.Generator().manual_seed(0)} | options
    return bend(FlowSIM(*arguments, **options))


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_coupling_inverts_exactly(dim, parity):
    layer = bend(Coupling(dim, parity, width=16, dtype=torch.float64))
    y = torch.randn(20, dim, dtype=torch.float64)
    assert (layer(y) - y).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(layer(y)), y)
    kept = torch.arange(dim) % 2 == parity
    assert torch.equal(layer(y)[:, kept], y[:, kept])


def test_coupling_starts_as_the_identity():
    y = torch.randn(5, 4)
    assert torch.equal(Coupling(4, 0)(y), y)


def test_coupling_gradients():
    layer = bend(Coupling(3, 0, width=4, condition_features=1, dtype=torch.float64))
    y, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    assert_gradients(layer, y, x)
    assert_gradients(layer.inverse, y, x)


def test_single_precision_round_trip(device):
    model = bend(FlowSIM(2, generator=torch.Generator().manual_seed(0), device=device), size=0.1)
    y = torch.randn(100, 2).to(device)
    assert (model.decode(model.encode(y)) - y).abs().max().cpu() < 1e-5


def test_advancing_twice_is_advancing_by_the_sum():
    w = torch.randn(50, 2, dtype=torch.float64)
    once = polar_advance(polar_advance(w, 0.4, 0.8, 2.5), 0.4, 0.8, 4.0)
    assert (once - polar_advance(w, 0.4, 0.8, 6.5)).abs().max() < 1e-6


def test_direction_turns_and_log_radius_decays():
    w = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    after = polar_advance(w, torch.pi / 2, 0.5, 1.0)
    torch.testing.assert_close(after, torch.tensor([[-(3**0.5), 0.0]], dtype=torch.float64))


def test_unit_circle_attracts_all_but_the_origin():
    w = torch.randn(50, 2, dtype=torch.float64) * 10
    assert (polar_advance(w, 0.4, 0.8, 200.0).norm(dim=-1) - 1).abs().max() < 1e-12
    origin = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(polar_advance(origin, 0.4, 0.8, 200.0), origin)


def test_polar_gradients_away_from_the_origin():
    w = torch.tensor([[0.5, -0.2], [1.0, 2.0]], dtype=torch.float64)
    angle, decay = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    assert_gradients(lambda *a: polar_advance(*a, 3.0), w, angle, decay)


def test_late_phases_are_right_in_single_precision():
    w, t = torch.tensor([[1.0, 0.0]]), 1e6
    angle = torch.tensor(0.3)
    exact = polar_advance(w.double(), angle.double(), 0.5, t)
    torch.testing.assert_close(polar_advance(w, angle, 0.5, t).double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dim", "polar", "decays"), [(2, 1, 0), (3, 1, 1), (4, 2, 0), (5, 2, 1)])
def test_time_is_a_semigroup_and_has_an_inverse(dim, polar, decays):
    model, y = flow(dim, polar, decays), torch.randn(10, dim, dtype=torch.float64)
    there = model.advance(y, 2.0)
    torch.testing.assert_close(model.advance(there, 3.5), model.advance(y, 5.5), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.advance(there, -2.0), y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dim", [2, 4])
def test_every_start_falls_on_the_attractor(dim):
    model, y = flow(dim, dim // 2), torch.randn(10, dim, dtype=torch.float64)
    torch.testing.assert_close(model.advance(y, 300.0), model.limit(y, 300.0), atol=1e-9, rtol=1e-9)
    # in h coordinates the attractor is the product of unit circles
    radii = model.encode(model.attractor(12)).unflatten(-1, (-1, 2)).norm(dim=-1)
    assert (radii - 1).abs().max() < 1e-10


def test_the_attractor_is_invariant_and_one_step_turns_it():
    model = flow(2)
    points = model.attractor(64)
    again = model.advance(points, 2 * torch.pi / 64 / model.angle.item())
    torch.testing.assert_close(again, points.roll(-1, dims=0))


def test_mean_over_the_attractor_is_the_time_average():
    model = flow(2)
    orbit = model.limit(torch.ones(1, 2, dtype=torch.float64).expand(20_000, 2), torch.arange(20_000))
    # a rotation by an irrational angle: the running mean converges like 1 / steps
    torch.testing.assert_close(model.attractor(256).mean(dim=0), orbit.mean(dim=0), atol=2e-3, rtol=0)


def test_times_may_differ_from_sample_to_sample():
    model, y = flow(3), torch.randn(4, 3, dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 2.0, 7.0], dtype=torch.float64)
    one_by_one = torch.stack([model.advance(state, t.item()) for state, t in zip(y, times, strict=True)])
    torch.testing.assert_close(model.advance(y, times), one_by_one)
    torch.testing.assert_close(model.advance(y, times)[0], y[0])


@pytest.mark.parametrize("condition_features", [0, 2])
def test_point_variant_has_the_fixed_point_it_says(condition_features):
    model = flow(3, variant="point", condition_features=condition_features)
    y = torch.randn(6, 3, dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64) if condition_features else None
    rest = model.limit(y, x=x)
    torch.testing.assert_close(model(rest, x), rest)
    center = model.encode(rest, x)
    ratio = (model.encode(model.advance(y, 4.0, x), x) - center) / (model.encode(y, x) - center)
    torch.testing.assert_close(ratio, (model.decay**4).expand_as(ratio))
    torch.testing.assert_close(model.attractor(5, x)[..., 0, :].expand_as(rest), rest)


def test_condition_moves_the_attractor():
    model = flow(2, condition_features=1)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    points = model.attractor(32, x)
    assert points.shape == (2, 32, 2)
    assert (points[0] - points[1]).abs().max() > 0.01
    torch.testing.assert_close(points[1], model.attractor(32, x[1]))


def test_spectrum_lists_phases_on_the_circle_and_decays_inside():
    model = flow(5, 2)
    values = model.spectrum()
    assert values.shape == (7,)
    assert (values[:4].abs() - 1).abs().max() < 1e-12
    assert values[4:].abs().max() < 1
    torch.testing.assert_close(values[:2].angle(), model.angle.detach())


def test_flow_gradients():
    model = flow(3, couplings=2, width=4)
    assert_gradients(lambda y: model.advance(y, 2.0), torch.randn(2, 3, dtype=torch.float64) + 1)


def test_trajectory_loss_is_zero_on_its_own_orbits_only():
    model, y = flow(2), torch.randn(8, 2, dtype=torch.float64)
    later = model.advance(y, 3.0)
    assert trajectory_loss(model, y, later, 3.0) < 1e-12
    assert trajectory_loss(model, y, later, 4.0) > 1e-3


def test_training_finds_the_frequency_of_a_circle():
    angles = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 6.28
    start = 2 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    later = 2 * torch.stack([(angles + 0.3).cos(), (angles + 0.3).sin()], dim=-1)
    model = FlowSIM(2, couplings=2, width=8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        trajectory_loss(model, start, later, 1.0).backward()
        optimizer.step()
    assert abs(model.angle.item() - 0.3) < 0.01


def test_couplings_keep_the_orientation_so_the_angle_needs_its_sign():
    model = flow(2, angle=-0.5)
    jacobian = torch.func.vmap(torch.func.jacrev(model.encode))(torch.randn(30, 2, dtype=torch.float64))
    assert (torch.linalg.det(jacobian) > 0).all()
    assert FlowSIM(2, angle=-0.5).angle.item() == -0.5


def test_same_seed_same_flow_on_every_device(device):
    here = FlowSIM(3, generator=torch.Generator().manual_seed(0))
    there = FlowSIM(3, generator=torch.Generator().manual_seed(0), device=device)
    other = FlowSIM(3, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu())
    assert any(not torch.equal(a, b) for a, b in zip(here.parameters(), other.parameters(), strict=True))


def test_state_dict_round_trip_is_exact():
    model, other = flow(3), FlowSIM(3, width=16, dtype=torch.float64)
    y = torch.randn(4, 3, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.advance(y, 2.0), other.advance(y, 2.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Coupling(1, 0), "dim must be at least 2"),
        (lambda: Coupling(2, 2), "parity must be 0 or 1"),
        (lambda: FlowSIM(2, variant="chaos"), "variant must be"),
        (lambda: FlowSIM(2, polar=2), "dim must equal"),
        (lambda: FlowSIM(3, polar=1, decays=0), "dim must equal"),
        (lambda: FlowSIM(2, polar=0), "a cycle needs one"),
        (lambda: FlowSIM(2, polar=1, variant="point"), "a point none"),
        (lambda: FlowSIM(2, couplings=-1), "must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="2 coordinates"):
        polar_advance(torch.zeros(3), 0.1, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"states must be floating point \(..., 2\)"):
        FlowSIM(2).advance(torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match="x must be None"):
        FlowSIM(2).advance(torch.zeros(4, 2), 1.0, torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"x must be \(..., 1\)"):
        FlowSIM(2, condition_features=1).advance(torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        FlowSIM(2).attractor(0)
