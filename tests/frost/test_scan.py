"""The scan transition: convex in the sup norm, certified, linear in the state, and a part of `Frost`."""

import pytest
import torch
from torch import nn

from geomlib.core import linear_recurrence
from geomlib.frost import Frost, infer
from geomlib.frost.scan import SelectiveScan, convex_scan, row_normalised
from geomlib.testing import assert_gradients

KAPPA = 0.9
FORMS = ["channel", "s6", "ssd"]
each_form = pytest.mark.parametrize("form", FORMS)


def block(form="channel", *, width=4, seed=0, dtype=torch.float64, time_step=(0.05, 1.0), **options):
    """Fast decays by default: on a dozen places slow ones would hardly move."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"state_size": 3, "heads": 2, "kappa": KAPPA, "time_step": time_step}
    return SelectiveScan(width, form=form, generator=generator, dtype=dtype, **sizes | options)


def features(*shape, seed=1, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sup_gain(f, at):
    """Return the Lipschitz constant of the linearised map in the sup norm: its largest absolute row sum."""
    jacobian = torch.func.jacrev(f)(at)
    return jacobian.reshape(at.numel(), at.numel()).abs().sum(1).max().item()


def push(model, x, steps=30):
    """Train against the constraint: drive the outputs apart."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (-model(x, model.prepare(x)).square().mean()).backward()
        optimiser.step()


@pytest.mark.parametrize("both", [False, True])
def test_a_convex_scan_is_a_matrix_of_row_sums_at_most_one(both):
    a = torch.rand(1, 30, 1, dtype=torch.float64)
    S = convex_scan(a, torch.eye(30, dtype=torch.float64).unsqueeze(0), both=both)[0]
    assert (S >= 0).all()
    assert (S.sum(1) <= 1 + 1e-14).all()
    v = features(1, 30, 1)
    torch.testing.assert_close(convex_scan(a, v, both=both)[0], S @ v[0])


def test_a_scan_that_averages_in_sup_norm_can_amplify_in_the_2_norm():
    """A first place that is never forgotten is copied to all others: rows sum to 1, columns do not."""
    for length in (16, 64, 256):
        a = torch.full((1, length, 1), 0.999, dtype=torch.float64)
        a[:, 0] = 0
        S = convex_scan(a, torch.eye(length, dtype=torch.float64).unsqueeze(0))[0]
        torch.testing.assert_close(S.sum(1), torch.ones(length, dtype=torch.float64), rtol=0, atol=1e-13)
        gain = torch.linalg.matrix_norm(S, 2).item()
        assert 0.85 * length**0.5 < gain <= length**0.5
        if length == 64:
            assert gain == pytest.approx(7.75, abs=0.005)


def test_slow_decays_in_single_precision_stay_convex():
    """`1 - a` of the decay as it is rounded; `-expm1` of its logarithm sums to 0.84 here, or to 2."""
    for log_decay in (-1e-7, -3e-7, -1e-5, -1e-3):
        a = torch.full((1, 5000, 1), log_decay).exp()
        total = convex_scan(a, torch.ones(1, 5000, 1))[0, -1].item()
        exact = 1 - a[0, 0, 0].double().item() ** 5000
        assert total <= 1 + 1e-6
        assert total == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_rows_sum_to_the_bound_and_never_above_it(dtype):
    for seed in range(20):
        raw = features(7, 300, seed=seed, scale=10.0 ** (seed - 10), dtype=dtype)
        sums = row_normalised(raw, KAPPA).double().abs().sum(1)
        assert (sums <= KAPPA).all()
        assert (sums >= KAPPA * (1 - 1e-4)).all()
    assert torch.equal(row_normalised(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


@each_form
def test_a_scan_is_the_loop_over_its_states(form):
    """All states written out, both directions, from the definition alone."""
    model, x = block(form), features(2, 4, 13)
    prepared = model.prepare(x)
    driven, decay = prepared.rows[:2]
    u = nn.functional.linear(features(2, 4, 13, seed=2).mT, prepared.shared[0])
    if form == "channel":
        B = C = torch.ones(2, 13, 1, dtype=u.dtype)
        a = decay.unsqueeze(-1)
    else:
        B, C = prepared.rows[2:]
        a = (
            decay if form == "s6" else decay.exp().repeat_interleave(4, -1).unsqueeze(-1)
        )  # 8 channels, 2 heads
    outputs = []
    for order in (range(13), range(12, -1, -1)):
        state, places = torch.zeros(2, 8, B.shape[-1], dtype=u.dtype), [None] * 13
        for k in order:
            state = a[:, k] * state + (1 - a[:, k]) * u[:, k, :, None] * B[:, k, None]
            places[k] = (state * C[:, k, None]).sum(-1)
        outputs.append(torch.stack(places, 1))
    wide = torch.relu((outputs[0] + outputs[1]) / 2 + driven)
    expected = nn.functional.linear(wide, prepared.shared[1]).mT
    torch.testing.assert_close(model(features(2, 4, 13, seed=2), prepared), expected, rtol=0, atol=1e-12)


@each_form
@pytest.mark.parametrize("activation", ["relu", "tanh", "maxmin", "abs"])
def test_the_sup_gain_is_at_most_kappa_before_and_after_training(form, activation):
    model, x = block(form, activation=activation), features(1, 4, 9)
    for _ in range(2):
        prepared = model.prepare(x)
        assert model.certificate() <= KAPPA
        gains = [
            sup_gain(lambda h, p=prepared: model(h, p), features(1, 4, 9, seed=3, scale=scale))
            for scale in (0.01, 1.0, 30.0)
        ]
        assert max(gains) <= model.certificate() + 1e-12
        push(model, x)


@each_form
def test_weights_of_one_sign_attain_the_bound(form):
    """Nothing is slack: positive rows, an open ReLU, short memory and full projections give `kappa`."""
    model, x = block(form, both=False), features(1, 4, 9)
    with torch.no_grad():
        for weight in (model.enter, model.leave):
            weight.abs_()
        model.inject.bias.fill_(100)
        model.select.weight.zero_()
        model.select.bias.fill_(5)
        if model.project is not None:
            model.project.bias.fill_(50)
    prepared = model.prepare(x)
    assert sup_gain(lambda h: model(h, prepared), features(1, 4, 9, seed=2)) == pytest.approx(KAPPA, rel=1e-6)


@each_form
def test_differences_never_grow_in_the_sup_norm(form):
    model, x = block(form), features(5, 4, 40)
    prepared = model.prepare(x)
    for scale in (1e-3, 1.0, 100.0):
        near = features(5, 4, 40, seed=4)
        far = near + scale * features(5, 4, 40, seed=5).sign()
        apart = (model(near, prepared) - model(far, prepared)).abs().flatten(1).amax(1)
        assert (apart <= KAPPA * (near - far).abs().flatten(1).amax(1)).all()


@each_form
def test_the_state_moves_the_map_at_most_affinely_between_kinks(form):
    """With `phi = id` on both sides the block is linear: selection by the state would make it quadratic."""
    model, x = block(form), features(2, 4, 11)
    model.phi = lambda v: v
    prepared = model.prepare(x)
    origin, first, second = (
        model(h, prepared)
        for h in (torch.zeros(2, 4, 11, dtype=x.dtype), *(features(2, 4, 11, seed=s) for s in (6, 7)))
    )
    both = model(features(2, 4, 11, seed=6) + features(2, 4, 11, seed=7), prepared)
    torch.testing.assert_close(both, first + second - origin, rtol=0, atol=1e-12)
    assert not torch.allclose(first, origin)


@each_form
def test_one_direction_is_causal_and_two_see_everything(form):
    x = features(1, 4, 12)
    for both in (False, True):
        model = block(form, both=both)
        prepared = model.prepare(x)
        h = features(1, 4, 12, seed=2)
        changed = h.clone()
        changed[:, :, 6] += 1
        same = (model(h, prepared) == model(changed, prepared)).all(1)[0]
        assert same[:6].all() != both
        assert not same[6:].any()


@each_form
@pytest.mark.parametrize("axes", [1, 2])
def test_frost_contracts_at_the_promised_factor_in_the_sup_norm(form, axes):
    shape = (9,) if axes == 1 else (3, 4)
    model = Frost(_Pass(), block(form, axes=axes), 4, 3, axes=axes, steps=6).double()
    factor = model.contraction_factor()
    assert factor == pytest.approx(1 - 0.5 * (1 - KAPPA))
    context = model.inject(features(1, 4, *shape))
    assert sup_gain(lambda h: model.step(h, context, 1), features(1, 4, *shape, seed=2)) <= factor + 1e-12
    starts = features(1, 4, *shape, seed=3, scale=50.0), torch.zeros(1, 4, *shape, dtype=torch.float64)
    distance = (starts[0] - starts[1]).abs().max()
    for t in range(1, 200):
        starts = tuple(model.step(h, context, t) for h in starts)
        assert (starts[0] - starts[1]).abs().max() <= factor**t * distance * (1 + 1e-9) + 1e-13


@each_form
def test_samples_leave_the_batch_with_their_coefficients(form):
    generator = torch.Generator().manual_seed(0)
    model = Frost(_Pass(), block(form, dtype=torch.float32), 4, 3, axes=1, steps=6, generator=generator)
    inputs = features(20, 4, 15, dtype=torch.float32)
    trajectory = model(inputs)
    threshold = trajectory.scores.median().item()
    halted = infer(model, inputs, threshold)
    crossed = trajectory.scores[:, :-1] > threshold
    depth = torch.where(crossed.any(1), crossed.to(torch.int8).argmax(1) + 1, 6)
    assert len(depth.unique()) > 1
    assert torch.equal(halted.depth, depth)
    assert halted.evaluations == int(depth.sum())
    expected = trajectory.logits[torch.arange(20), depth - 1]
    torch.testing.assert_close(halted.logits, expected, rtol=1e-5, atol=1e-5)


@each_form
def test_derivatives_are_right(form):
    model, x = block(form, width=2, activation="tanh"), features(1, 2, 3)
    names, values = zip(*model.named_parameters(), strict=True)

    def run(x, h, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(
            _Whole(model), {f"block.{n}": v for n, v in parameters.items()}, (x, h)
        )

    assert_gradients(run, x, features(1, 2, 3, seed=2), *(v.detach() for v in values), second_order=False)


@each_form
def test_training_brings_what_stands_at_the_far_end_to_the_place_that_is_read(form):
    """Only the backward scan reaches place 0, in a single step; no convolution of the block does."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (32,), generator=generator)
    x = torch.zeros(32, 3, 20)
    x[torch.arange(32), y, 12:] = 1
    scan = block(form, width=8, dtype=torch.float32, time_step=(0.02, 0.2))
    model = Frost(
        _Pad(8), scan, 8, 3, axes=1, steps=3, read_position=0, readout_norm=True, generator=generator
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x).final, y).backward()
        optimiser.step()
    assert (model(x).final.argmax(1) == y).float().mean() > 0.95
    assert model.contraction_factor() < 1


def test_initial_steps_are_spread_evenly_in_the_logarithm():
    model = block(width=200, time_step=(1e-3, 1e-1))
    steps = nn.functional.softplus(model.select.bias.detach()).log10()
    assert -3 <= steps.min() < -2.9
    assert -1.1 < steps.max() <= -1
    assert steps.mean().item() == pytest.approx(-2, abs=0.1)


@each_form
def test_a_saved_block_is_the_same_block(form, tmp_path):
    model, other = block(form), block(form, seed=7, kappa=0.5)
    torch.save(model.state_dict(), tmp_path / "block.pt")
    other.load_state_dict(torch.load(tmp_path / "block.pt", weights_only=True))
    x = features(2, 4, 10)
    assert torch.equal(model(x, model.prepare(x)), other(x, other.prepare(x)))
    assert other.certificate() == model.certificate()


@each_form
def test_devices_give_the_numbers_of_the_cpu(form, device):
    model, x = block(form), features(2, 4, 10)
    expected = model(x, model.prepare(x)).detach()
    moved = block(form, device=device)
    y = moved(x.to(device), moved.prepare(x.to(device)))
    torch.testing.assert_close(y.detach().cpu(), expected, rtol=0, atol=1e-12)
    y.sum().backward()
    assert all(p.grad.device.type == device.type for p in moved.parameters())


def test_bad_arguments_are_named():
    for options, message in [
        ({"axes": 0}, "axes must be 1"),
        ({"form": "mamba"}, "form must be"),
        ({"kappa": 1.0}, "kappa must lie in"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"form": "ssd", "heads": 3}, "heads must divide 8, got 3"),
        ({"time_step": (0.1, 0.01)}, "time_step must be"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"state_size": 0}, "state_size must be at least 1"),
        ({"activation": "maxmin", "width": 3, "expansion": 1}, "must be even"),
    ]:
        with pytest.raises(ValueError, match=message):
            block(**options)


def test_the_reference_of_a_convex_scan_is_the_recurrence():
    a, v = torch.rand(2, 20, 3, dtype=torch.float64), features(2, 20, 3)
    torch.testing.assert_close(convex_scan(a, v), linear_recurrence(a, (1 - a) * v, method="loop"))
    back = linear_recurrence(a, (1 - a) * v, method="loop", reverse=True)
    torch.testing.assert_close(convex_scan(a, v, reverse=True), back)


class _Pass(nn.Module):
    def forward(self, inputs):
        return inputs


class _Pad(nn.Module):
    """Append empty channels: features without weights."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, inputs):
        return nn.functional.pad(inputs, (0, 0, 0, self.width - inputs.shape[1]))


class _Whole(nn.Module):
    """Prepare and apply at once, for derivatives in the parameters."""

    def __init__(self, model):
        super().__init__()
        self.block = model

    def forward(self, x, h):
        return self.block(h, self.block.prepare(x))
