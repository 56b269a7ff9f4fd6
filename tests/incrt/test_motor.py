"""Laws of the motors: the mixed derivative of a virtual head, masks, running means, what is skipped."""

import copy

import pytest
import torch

from geomlib.incrt.motor import GradientMotor, HeadsMotor, TaskMotor, motor_statistics
from geomlib.incrt.operator import Factors, antisym, residual_operator
from geomlib.testing import count_host_syncs

MASKS = {
    "none": None,
    "padded": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool),
    "one token, no token": torch.tensor(
        [[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool
    ),
}


def tokens(generator, batch=3, n=5, d=4):
    return torch.randn(batch, n, d, generator=generator, dtype=torch.float64)


def downstream(output, mask, target):
    """Return a loss of the attention output that is not linear in it; padding takes no part."""
    error = (torch.tanh(output) - target).square().sum(-1)
    return error.mean() if mask is None else error[mask].mean()


def virtual_head(xh, M, mask, causal):
    """Attend with logits `x M x^T` and identity values, in plain words: one query at a time."""
    rows = []
    for b in range(len(xh)):
        for i in range(xh.shape[1]):
            seen = [j for j in range(xh.shape[1]) if (mask is None or mask[b, j]) and (not causal or j <= i)]
            if seen and (mask is None or mask[b, i]):
                rows.append((xh[b, i] @ M @ xh[b, seen].T).softmax(0) @ xh[b, seen])
            else:
                rows.append(torch.zeros_like(xh[b, i]) * M.sum())
    return torch.stack(rows).reshape(xh.shape)


def slope(output, mask, target):
    """Return the derivative of the loss in the attention output."""
    leaf = output.clone().requires_grad_()
    downstream(leaf, mask, target).backward()
    return leaf.grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_motor_is_minus_the_mixed_derivative_of_a_virtual_head(name, causal, generator):
    mask, xh = MASKS[name], tokens(generator)
    output, target = tokens(generator), tokens(generator)
    M = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = downstream(output + eps * virtual_head(xh, M, mask, causal), mask, target)
    (by_eps,) = torch.autograd.grad(loss, eps, create_graph=True)
    (mixed,) = torch.autograd.grad(by_eps, M)
    delta = slope(output, mask, target)
    G = motor_statistics(delta, xh, mask, causal, dtype=torch.float64).G
    torch.testing.assert_close(G, -mixed, rtol=0, atol=1e-10)
    assert G.abs().max() > 1e-3
    motor = GradientMotor(4, dtype=torch.float64)
    motor.update(delta, xh, mask, causal)
    torch.testing.assert_close(motor.Ma, -antisym(mixed), rtol=0, atol=1e-10)


def test_motor_agrees_with_finite_differences(generator):
    xh, output, target = tokens(generator), tokens(generator), tokens(generator)
    G = motor_statistics(slope(output, None, target), xh, dtype=torch.float64).G
    step = 1e-3

    def loss(eps, entry):
        M = torch.zeros(4, 4, dtype=torch.float64)
        M[1, 2] = entry
        return downstream(output + eps * virtual_head(xh, M, None, False), None, target)

    corners = [
        sign * loss(a * step, b * step) for sign, a, b in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1), (1, -1, -1))
    ]
    assert (-sum(corners) / (4 * step**2)).item() == pytest.approx(G[1, 2].item(), rel=1e-4)


def test_a_head_along_the_motor_lowers_the_loss(generator):
    xh, output, target = tokens(generator), tokens(generator), tokens(generator)
    G = motor_statistics(slope(output, None, target), xh, dtype=torch.float64).G

    def second_difference(M):
        """Return how the benefit of a little output changes as the head is given its form."""
        losses = [
            downstream(output + 1e-3 * virtual_head(xh, form, None, False), None, target)
            for form in (M, 0 * M)
        ]
        return losses[0] - losses[1]

    assert second_difference(0.01 * G) < 0 < second_difference(-0.01 * G)


def test_moments_are_the_mean_over_valid_tokens(generator):
    mask, xh = MASKS["padded"], tokens(generator)
    motor = GradientMotor(4, dtype=torch.float64)
    motor.update(tokens(generator), xh, mask)
    valid = xh[mask]
    torch.testing.assert_close(motor.S, valid.T @ valid / len(valid))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything_and_be_of_any_length(causal, generator):
    xh, delta = tokens(generator), tokens(generator)
    expected = motor_statistics(delta, xh, causal=causal, dtype=torch.float64)
    wide = [torch.cat([part, part.new_full((3, 2, 4), torch.nan)], 1) for part in (delta, xh)]
    mask = torch.arange(7).expand(3, 7) < 5
    found = motor_statistics(*wide, mask, causal, dtype=torch.float64)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_single_tokens_say_nothing(generator):
    xh, delta = tokens(generator, n=1), tokens(generator, n=1)
    assert motor_statistics(delta, xh, dtype=torch.float64).G.abs().max() == 0


def test_equal_tokens_say_nothing(generator):
    xh = tokens(generator, n=1).expand(3, 5, 4)
    assert motor_statistics(tokens(generator), xh, dtype=torch.float64).G.abs().max() < 1e-12


def test_motor_vanishes_with_the_gradient_of_the_loss(generator):
    motor = GradientMotor(4, ema=0.5)
    motor.update(tokens(generator), tokens(generator))
    first = motor.Ma.abs().max()
    for _ in range(20):
        motor.update(torch.zeros(3, 5, 4), tokens(generator))
    assert motor.Ma.abs().max() < 1e-5 * first
    assert motor.S.abs().max() > 0.1


def test_running_mean_weighs_the_past_geometrically_and_starts_without_bias(generator):
    motor = GradientMotor(4, ema=0.8, dtype=torch.float64)
    batches = [(tokens(generator), tokens(generator)) for _ in range(6)]
    for t in range(1, 7):
        motor.update(*batches[t - 1])
        parts = [motor_statistics(*batch, dtype=torch.float64) for batch in batches[:t]]
        weights = [0.8 ** (t - k) for k in range(1, t + 1)]
        G = sum(w * part.G for w, part in zip(weights, parts, strict=True)) / sum(weights)
        S = sum(w * part.gram / part.tokens for w, part in zip(weights, parts, strict=True)) / sum(weights)
        torch.testing.assert_close(motor.Ma, antisym(G))
        torch.testing.assert_close(motor.S, S)
    assert torch.equal(motor.Ma, -motor.Ma.mT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_batches_that_are_not_finite_are_skipped(bad, generator):
    delta, xh = tokens(generator), tokens(generator)
    motor = GradientMotor(4, dtype=torch.float64)
    motor.update(delta, xh)
    before = copy.deepcopy(motor.state_dict())
    for place in (0, 1):
        broken = [delta.clone(), xh.clone()]
        broken[place][1, 2, 3] = bad
        motor.update(*broken)
    motor.update(delta, xh, torch.zeros(3, 5, dtype=torch.bool))  # no token at all
    assert all(torch.equal(value, before[name]) for name, value in motor.state_dict().items())


def test_evaluation_mode_changes_nothing(generator):
    queries, keys = torch.randn(2, 3, 4, 2, generator=generator)
    Ma = antisym(torch.randn(4, 4, generator=generator))
    xh = torch.randn(3, 5, 4, generator=generator)
    motors = {
        GradientMotor(4): lambda motor: motor.update(xh, xh),
        HeadsMotor(4): lambda motor: motor.update(xh, queries, keys),
        TaskMotor(Ma): lambda motor: motor.update(xh),
    }
    for motor, update in motors.items():
        before = copy.deepcopy(motor.eval().state_dict())
        update(motor)
        assert all(torch.equal(value, before[name]) for name, value in motor.state_dict().items())
        update(motor.train())
        assert not torch.equal(motor.S, before["S"])


def test_sums_over_micro_batches_are_those_of_the_whole_batch(generator):
    """The loss is a mean over the whole batch, so its gradients at the parts need no further weight."""
    delta, xh, mask = tokens(generator), tokens(generator), MASKS["padded"]
    whole, parts = GradientMotor(4, dtype=torch.float64), GradientMotor(4, dtype=torch.float64)
    whole.update(delta, xh, mask)
    first = motor_statistics(delta[:1], xh[:1], mask[:1], dtype=torch.float64)
    second = motor_statistics(delta[1:], xh[1:], mask[1:], dtype=torch.float64)
    parts.absorb(first.combine(second))
    torch.testing.assert_close(parts.Ma, whole.Ma)
    torch.testing.assert_close(parts.S, whole.S)


def test_scaled_gradients_are_divided_by_their_scale(generator):
    delta, xh = tokens(generator), tokens(generator)
    plain, scaled = (GradientMotor(4, dtype=torch.float64) for _ in range(2))
    plain.update(delta, xh)
    scaled.update(1024 * delta, xh, scale=torch.tensor(1024.0))
    torch.testing.assert_close(scaled.Ma, plain.Ma)


def test_half_precision_and_autocast_are_summed_in_full(generator):
    delta, xh = (part.bfloat16() for part in (tokens(generator), tokens(generator)))
    motor, expected = GradientMotor(4), GradientMotor(4)
    expected.update(delta.float(), xh.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        motor.update(delta, xh)
    assert motor.Ma.dtype == torch.float32
    assert torch.equal(motor.Ma, expected.Ma)


@pytest.mark.parametrize("causal", [False, True])
def test_update_follows_the_device_and_does_not_wait_for_it(causal, emulated, generator):
    delta, xh, mask = tokens(generator).float(), tokens(generator).float(), MASKS["padded"]
    expected, motor = GradientMotor(4), GradientMotor(4, device=emulated)
    moved = [part.to(emulated) for part in (delta, xh, mask)]
    expected.update(delta, xh, mask, causal)
    with count_host_syncs() as syncs:
        motor.update(*moved, causal)
    assert syncs == []
    torch.testing.assert_close(motor.Ma.cpu(), expected.Ma)
    torch.testing.assert_close(motor.S.cpu(), expected.S)


def test_heads_motor_is_the_directed_part_of_the_sum_of_heads(generator):
    queries, keys = torch.randn(2, 3, 4, 2, generator=generator)
    motor = HeadsMotor(4)
    motor.update(torch.randn(3, 5, 4, generator=generator), queries, keys)
    expected = antisym(sum(q @ k.T for q, k in zip(queries, keys, strict=True)))
    torch.testing.assert_close(motor.Ma, expected)
    motor.update(torch.randn(3, 5, 4, generator=generator), queries[:1], keys[:1])
    torch.testing.assert_close(motor.Ma, antisym(Factors(queries[:1], keys[:1]).dense()))


def test_heads_and_task_motors_take_sums_over_parts(generator):
    queries, keys = torch.randn(2, 3, 4, 2, generator=generator)
    xh = torch.randn(3, 5, 4, generator=generator)
    parts = motor_statistics(None, xh[:1]).combine(motor_statistics(None, xh[1:]))
    whole, heads, task = HeadsMotor(4), HeadsMotor(4), TaskMotor(antisym(queries[0] @ keys[0].T))
    whole.update(xh, queries, keys)
    heads.absorb(parts, queries, keys)
    task.absorb(parts)
    torch.testing.assert_close(heads.S, whole.S)
    torch.testing.assert_close(heads.Ma, whole.Ma)
    torch.testing.assert_close(task.S, whole.S)


def test_heads_motor_grows_with_the_heads_though_nothing_asks_for_them(generator):
    """The signal of more random heads is larger: what drives growth is fed by it."""
    xh = torch.randn(8, 30, 16, generator=generator) * torch.linspace(0.5, 2, 16)
    queries, keys = torch.randn(2, 16, 16, 4, generator=generator)
    signals = []
    for heads in (1, 4, 16):
        motor = HeadsMotor(16)
        motor.update(xh, queries[:heads], keys[:heads])
        signals.append(torch.linalg.eigvalsh(residual_operator(motor.S, motor.Ma))[-1])
    assert signals == sorted(signals)
    assert signals[2] > 2 * signals[0]


def test_task_motor_keeps_its_form(generator):
    Ma = antisym(torch.randn(4, 4, generator=generator))
    motor = TaskMotor(Ma)
    xh = torch.randn(3, 5, 4, generator=generator)
    motor.update(xh)
    assert torch.equal(motor.Ma, Ma)
    torch.testing.assert_close(motor.S, torch.einsum("bni,bnj->ij", xh, xh) / 15)


@pytest.mark.parametrize("make", [lambda: GradientMotor(4), lambda: HeadsMotor(4)])
def test_state_of_a_motor_is_in_its_state_dict(make, generator):
    queries, keys = torch.randn(2, 3, 4, 2, generator=generator)
    first, second = make(), make()

    def go(motor, seed):
        xh = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
        motor.update(xh, xh.flip(1)) if isinstance(motor, GradientMotor) else motor.update(xh, queries, keys)

    for seed in range(3):
        go(first, seed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        go(first, seed)
        go(second, seed)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientMotor(0), "d must be at least 1, got 0"),
        (lambda: GradientMotor(4, ema=1.0), r"ema must lie in \[0, 1\), got 1.0"),
        (
            lambda: GradientMotor(4).update(torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
            "delta must have the shape of xh",
        ),
        (
            lambda: motor_statistics(None, torch.ones(3, 4)),
            r"xh must be floating \(batch, tokens, d\), got \(3, 4\)",
        ),
        (lambda: motor_statistics(None, torch.ones(2, 3, 4), torch.ones(2, 3)), "mask must be bool"),
        (
            lambda: motor_statistics(None, torch.ones(2, 3, 4), torch.ones(3, 2).bool()),
            r"mask must be bool with shape \(2, 3\)",
        ),
        (
            lambda: HeadsMotor(4).update(torch.ones(2, 3, 4), torch.ones(1, 4, 2), torch.ones(1, 4, 3)),
            "must both be",
        ),
        (lambda: TaskMotor(torch.ones(3, 3)), "Ma must be an antisymmetric matrix"),
        (
            lambda: GradientMotor(5).update(torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
            "tokens of width 5, got 4",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
