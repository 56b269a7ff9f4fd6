"""Laws of the trackers, and of the gate that holds them."""

import copy
import math

import pytest
import torch

from geomlib.incrt.counts import greedy_directions, planted_operator
from geomlib.incrt.gate import LANCZOS_FROM, Gate
from geomlib.incrt.operator import antisym, residual_operator
from geomlib.incrt.trackers import mca_step, oja_step

LAMBDAS = (8.0, 6.0, 4.5, 3.3, 2.4, 1.7, 1.1, 0.6, 0.3, 0.1)


def unit(shape, generator, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=dtype), dim=-1)


def traceless(d, generator):
    """Return a random residual operator."""
    tokens = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    S = tokens.mT @ tokens / len(tokens)
    return residual_operator(S, antisym(torch.randn(d, d, generator=generator, dtype=torch.float64)))


def pair(d=24, seed=0, dtype=torch.float64):
    return planted_operator(LAMBDAS, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(gate, S, Ma, steps):
    """Let a gate grow by itself and return the steps at which it did."""
    births = []
    for step in range(steps):
        gate.observe(step, S, Ma)
        if gate.ready(step):
            gate.capture(gate.proposal(S, Ma), step)
            births.append(step)
    return births


# Trackers


def test_trackers_reach_both_ends_of_indefinite_operators(generator):
    """Eta is one over the Frobenius norm; the ends of these operators are simple, as of almost every one."""
    for _ in range(3):
        A = traceless(16, generator)
        values, vectors = torch.linalg.eigh(A)
        eta = 1 / torch.linalg.matrix_norm(A)
        for step, end in ((oja_step, -1), (mca_step, 0)):
            u = unit((5, 16), generator)
            for _ in range(1000):
                u = step(u, A, eta)
            quotients = ((u @ A) * u).sum(1)
            torch.testing.assert_close(quotients, values[end].expand(5), rtol=0, atol=1e-6)
            assert (u @ vectors[:, end]).abs().min() > 1 - 1e-6


def test_a_hundred_steps_reach_both_ends_of_an_operator_with_gaps(generator):
    A = residual_operator(*pair(32))
    eta = 1 / torch.linalg.matrix_norm(A)
    top, bottom = unit((2, 32), generator)
    for _ in range(100):
        top, bottom = oja_step(top, A, eta), mca_step(bottom, A, eta)
    assert (top @ A @ top).item() == pytest.approx(8, abs=1e-6)
    assert (bottom @ A @ bottom).item() == pytest.approx(-8, abs=1e-6)


@pytest.mark.parametrize(("share", "reached"), [(0.9, True), (0.99, True), (1.01, False), (1.1, False)])
def test_oja_converges_exactly_while_the_step_times_the_spread_is_below_two(share, reached, generator):
    """Beyond it the top eigenvector is a fixed point that repels along the bottom one."""
    A = residual_operator(*pair(32))
    u = unit(32, generator)
    for _ in range(4000):
        u = oja_step(u, A, share * 2 / 16)
    assert bool(abs(u @ A @ u - 8) < 1e-6) == reached


def test_oja_converges_at_the_rate_of_the_gap(generator):
    """Near the end an error along `lambda_2` shrinks by `1 - eta (lambda_1 - lambda_2)` a step."""
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0, -4.0], dtype=torch.float64))
    u = torch.tensor([1.0, 1e-4, 0.0, 0.0], dtype=torch.float64)
    u = u / torch.linalg.vector_norm(u)
    after = oja_step(u, A, 0.1)
    assert (after[1] / u[1]).item() == pytest.approx(1 - 0.1 * (3 - 2), rel=1e-6)


def test_published_minor_step_stops_where_the_quotient_is_zero_and_not_at_the_bottom(generator):
    for _ in range(3):
        A = traceless(16, generator)
        bottom = torch.linalg.eigvalsh(A)[0]
        eta = 1 / torch.linalg.matrix_norm(A)
        published = averaged = unit(16, generator)
        for _ in range(3000):
            published = mca_step(published, A, eta, form="published")
            averaged = mca_step(averaged, A, eta)
        assert abs(published @ A @ published) < 1e-3
        assert bottom < -0.5
        assert (averaged @ A @ averaged - bottom).abs() < 1e-6


def test_published_minor_step_works_on_a_positive_operator(generator):
    """There the factor has one sign, and only slows the step down: the form was made for covariances."""
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    u = unit(3, generator)
    for _ in range(2000):
        u = mca_step(u, A, 0.1, form="published")
    assert float(u @ A @ u) == pytest.approx(1)


def test_steps_take_products_instead_of_matrices(generator):
    A, u = traceless(6, generator), unit((4, 6), generator)
    for step in (oja_step, mca_step):
        torch.testing.assert_close(step(u, lambda v: v @ A, 0.1), step(u, A, 0.1))
        assert torch.linalg.vector_norm(step(u, A, 0.1), dim=1).sub(1).abs().max() < 1e-12


# The gate


@pytest.mark.parametrize("mode", ["eigh", "lanczos", "online"])
def test_gate_works_on_every_device(mode, device, generator):
    """A few checks only, for the emulated device is slow; rounding may differ by device."""
    S, Ma = pair()
    ours = Gate(24, mode=mode, theta=2.0, dwell=2, persistence=1, generator=generator, dtype=torch.float64)
    theirs = copy.deepcopy(ours).to(device)
    births = run(theirs, S.to(device), Ma.to(device), 5)
    assert births == run(ours, S, Ma, 5) == [2, 4]
    torch.testing.assert_close(theirs.directions.cpu(), ours.directions, rtol=0, atol=1e-8)
    assert theirs.directions.device.type == torch.device(device).type


@pytest.mark.parametrize("mode", ["eigh", "lanczos", "online"])
def test_gate_grows_once_for_each_eigenvalue_above_the_threshold(mode, generator):
    S, Ma = pair()
    options = {"theta": 2.0, "dwell": 60, "persistence": 5, "mode": mode}
    gate = Gate(24, **options, generator=generator, dtype=torch.float64)
    assert run(gate, S, Ma, 400) == [60, 120, 180, 240, 300]
    expected = greedy_directions(residual_operator(*pair()), 2.0).Q
    found = gate.directions
    # Sixty checks of ten steps each converge the online tracker to this.
    overlap = (found * expected).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (found.mT @ found - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-12


def test_online_trackers_stay_off_the_captured_directions(generator):
    S, Ma = pair()
    gate = Gate(
        24, mode="online", theta=2.0, dwell=30, persistence=1, generator=generator, dtype=torch.float64
    )
    for step in range(200):
        found = gate.observe(step, S, Ma)
        if gate.captured:
            for u in (found.u_top, found.u_bottom):
                assert (gate.directions.mT @ u).abs().max() < 1e-8
        if gate.ready(step):
            gate.capture(gate.proposal(S, Ma), step)
    assert gate.captured == 5
    assert float(found.top) == pytest.approx(1.7, abs=1e-6)
    assert float(found.bottom) == pytest.approx(-8, abs=1e-6)


def test_online_tracker_follows_a_slow_rotation(generator):
    """The operator turns by 0.2 degrees a check; the tracker lags by less than a degree."""
    S, Ma = pair()
    turn = torch.linalg.matrix_exp(math.radians(0.2) * antisym(unit((24, 24), generator)))
    gate = Gate(24, mode="online", theta=math.inf, generator=generator, dtype=torch.float64)
    for step in range(300):
        S, Ma = turn @ S @ turn.mT, turn @ Ma @ turn.mT
        found = gate.observe(step, S, Ma)
    vector = torch.linalg.eigh(residual_operator(S, Ma)).eigenvectors[:, -1]
    assert abs(vector @ found.u_top) > math.cos(math.radians(1))


def test_threshold_is_a_share_of_the_median_of_the_calibration():
    gate = Gate(20, frac=0.5, calibrate=(2, 6), dwell=0, persistence=1)
    S, Ma = planted_operator([1.0], 20)
    for step in range(2):
        gate.observe(step, S, 100 * Ma)  # before the calibration: no matter
    for step, size in enumerate((3.0, 1.0, 50.0, 2.0, 4.0), start=2):
        assert gate.threshold() == math.inf
        assert not gate.ready(step)
        gate.observe(step, S, size * Ma)
    assert gate.threshold() == pytest.approx(0.5 * 3, rel=1e-5)
    gate.observe(7, S, 1.4 * Ma)
    assert not gate.ready(7)
    gate.observe(8, S, 1.6 * Ma)
    assert gate.ready(8)


def test_calibration_takes_a_step_that_comes_twice():
    gate = Gate(20, frac=0.5, calibrate=(2, 4))
    S, Ma = planted_operator([3.0], 20)
    for step in (2, 2, 3, 3, 3, 4):
        gate.observe(step, S, Ma)
    assert gate.threshold() == pytest.approx(1.5, rel=1e-5)


def test_calibration_that_saw_nothing_takes_the_first_signal_after_it():
    gate = Gate(20, frac=0.5, calibrate=(2, 6))
    gate.observe(10, *planted_operator([4.0], 20))
    assert gate.threshold() == pytest.approx(2, rel=1e-5)


def test_one_noisy_check_adds_no_head():
    S, Ma = planted_operator([1.0], 20)
    gate = Gate(20, theta=2.0, dwell=0, persistence=5)
    for step in range(10):
        gate.observe(step, S, (100 if step % 5 == 4 else 1) * Ma)
        assert not gate.ready(step)
    for step in range(10, 13):
        gate.observe(step, S, 3 * Ma)
    assert gate.ready(12)


def test_dwell_parts_any_two_events():
    S, Ma = pair()
    gate = Gate(24, theta=0.05, dwell=7, persistence=3, dtype=torch.float64)
    assert run(gate, S, Ma, 80) == [7 * k for k in range(1, 11)]
    gate.release(3, 80)
    gate.observe(81, S, Ma)
    assert not gate.ready(86)
    assert gate.ready(87)


def test_infinite_threshold_never_grows():
    assert run(Gate(24, theta=math.inf, dwell=0, persistence=1, dtype=torch.float64), *pair(), 20) == []


@pytest.mark.parametrize("frac", [0.15, 1e-9])
def test_isotropic_tokens_never_grow_a_head(frac, generator):
    """A threshold calibrated on rounding is rounding; its floor is not."""
    tokens = torch.randn(500, 12, generator=generator)
    values, basis = torch.linalg.eigh(tokens.mT @ tokens / 500)
    white = tokens @ basis / values.sqrt() @ basis.mT
    S, gate = white.mT @ white / 500, Gate(12, frac=frac, calibrate=(0, 4), dwell=0, persistence=1)
    for step in range(40):
        Ma = antisym(torch.randn(12, 12, generator=generator))
        gate.observe(step, S, Ma)
        assert not gate.ready(step)
    assert 0 <= float(gate.theta) < gate.threshold()


@pytest.mark.parametrize("mode", ["eigh", "lanczos", "online"])
def test_gate_refuses_a_direction_when_none_is_left(mode):
    gate = Gate(3, mode=mode, theta=0.0, dwell=0, persistence=1)
    S, Ma = planted_operator([1.0], 3)
    gate.capture(torch.eye(3), 0)
    assert gate.observe(1, S, Ma).top == 0
    assert all(value.isfinite().all() for value in gate.state_dict().values())
    assert not gate.ready(1)
    with pytest.raises(ValueError, match="the space is full"):
        gate.capture(torch.ones(3), 1)


def test_nearly_degenerate_directions_grow_as_a_block(generator):
    S, Ma = planted_operator([3.0, 2.9, 2.86, 2.0, 1.0], 16, generator=generator, dtype=torch.float64)
    for mode in ("eigh", "lanczos", "online"):
        options = {"theta": 0.5, "dwell": 40, "persistence": 1, "mode": mode, "online_steps": 40}
        one = Gate(16, **options, generator=generator, dtype=torch.float64)
        block = Gate(16, **options, block_ratio=0.95, generator=generator, dtype=torch.float64)
        assert run(one, S, Ma, 42) == run(block, S, Ma, 42) == [40]
        assert one.captured == 1
        assert block.captured == 3
        Q = greedy_directions(residual_operator(S, Ma), 2.5).Q
        torch.testing.assert_close(Q @ (Q.mT @ block.directions), block.directions, rtol=0, atol=1e-6)


def test_a_block_takes_nothing_below_the_threshold(generator):
    S, Ma = planted_operator([3.0, 2.9, 2.86], 16, generator=generator, dtype=torch.float64)
    gate = Gate(
        16, theta=2.88, dwell=1, persistence=1, block_ratio=0.5, generator=generator, dtype=torch.float64
    )
    run(gate, S, Ma, 3)
    assert gate.captured == 2


def test_release_keeps_the_others_in_order(generator):
    gate = Gate(6, generator=generator)
    gate.capture(torch.eye(6)[:, :4], 5)
    gate.release(1, 9)
    assert torch.equal(gate.directions, torch.eye(6)[:, [0, 2, 3]])
    assert int(gate.last_event) == 9
    gate.capture(torch.eye(6)[:, 1], 20)
    assert torch.equal(gate.directions, torch.eye(6)[:, [0, 2, 3, 1]])


def test_refresh_replaces_stale_directions_and_is_no_event(generator):
    gate = Gate(6, generator=generator)
    gate.capture(torch.eye(6)[:, :2], 5)
    stale = torch.eye(6)[:, :2] + 0.1 * torch.randn(6, 2, generator=generator)
    gate.refresh(stale)
    Q = gate.directions
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2))
    torch.testing.assert_close(Q[:, 0], stale[:, 0] / torch.linalg.vector_norm(stale[:, 0]))
    assert int(gate.last_event) == 5


@pytest.mark.parametrize("mode", ["eigh", "lanczos", "online"])
def test_evaluation_mode_changes_nothing(mode, generator):
    gate = Gate(24, mode=mode, calibrate=(0, 3), generator=generator, dtype=torch.float64).eval()
    before = copy.deepcopy(gate.state_dict())
    found = gate.observe(2, *pair())
    assert found.top > 0
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


@pytest.mark.parametrize("mode", ["eigh", "lanczos", "online"])
def test_saved_gate_goes_on_bit_for_bit(mode, generator):
    """Saved in the middle of a dwell, after calibration, with directions captured."""
    S, Ma = pair()
    noise = antisym(torch.randn(24, 24, generator=generator, dtype=torch.float64))

    def go(gate, steps):
        for step in steps:
            gate.observe(step, S, Ma + 0.01 * math.sin(step) * noise)
            if gate.ready(step):
                gate.capture(gate.proposal(S, Ma), step)

    options = {"frac": 0.2, "calibrate": (3, 9), "dwell": 20, "persistence": 4, "mode": mode}
    first = Gate(24, **options, generator=generator, dtype=torch.float64)
    go(first, range(70))
    second = Gate(24, **options, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    go(first, range(70, 150))
    go(second, range(70, 150))
    assert first.captured == second.captured > 3
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_wide_gates_take_lanczos():
    assert Gate(8).mode == "eigh"
    assert Gate(LANCZOS_FROM).mode == "lanczos"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "d must be at least 1, got 0"),
        ({"mode": "power"}, "mode must be one of auto, eigh, lanczos, online"),
        ({"theta": -1.0}, "theta must be at least 0, got -1.0"),
        ({"theta": math.nan}, "theta must be at least 0, got nan"),
        ({"frac": 0.0}, "frac must be positive and finite, got 0.0"),
        ({"calibrate": (5, 2)}, r"first and a last step, got \(5, 2\)"),
        ({"dwell": -1}, "dwell must be at least 0, got -1"),
        ({"persistence": 0}, "persistence must be at least 1, got 0"),
        ({"block_ratio": 1.5}, r"block_ratio must lie in \(0, 1\], got 1.5"),
        ({"online_steps": 0}, "online_steps must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Gate(**{"d": 4, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oja_step(torch.ones(3), torch.eye(2), 0.1), r"A must be square of width 3, got \(2, 2\)"),
        (lambda: oja_step(torch.ones(2), torch.eye(2), 0.0), "eta must be positive, got 0.0"),
        (
            lambda: mca_step(torch.ones(2), torch.eye(2), 0.1, form="new"),
            "form must be averaged or published",
        ),
        (lambda: Gate(4).observe(-1, torch.eye(4), torch.zeros(4, 4)), "step must be at least 0, got -1"),
        (lambda: Gate(4).observe(0, torch.eye(3), torch.zeros(3, 3)), "S must have width 4, got 3"),
        (lambda: Gate(4).observe(0, torch.eye(4) * math.nan, torch.zeros(4, 4)), "must be finite"),
        (lambda: Gate(4).release(0, 0), "no such direction is captured"),
        (lambda: Gate(4).refresh(torch.ones(4, 1)), r"directions must have shape \(4, 0\)"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
