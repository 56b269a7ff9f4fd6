"""Laws of the residual operator: its algebra, planted spectra, exact counts, bounds, and what is unique."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomlib.incrt.counts import greedy_directions, head_count_bounds, planted_operator
from geomlib.incrt.operator import (
    Factors,
    antisym,
    asymmetry_index,
    residual_matvec,
    residual_operator,
    sym,
    threshold_floor,
)
from geomlib.incrt.spectrum import fix_sign, orthonormalise

LAMBDAS = (8, 6, 4.5, 3.3, 2.4, 1.7, 1.1, 0.6, 0.3, 0.1)
THETAS = (7, 5, 4, 3, 2, 1.5, 1, 0.5, 0.2, 0.05)
EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(d=6, seed=0, dtype=torch.float64):
    """Return moments of random tokens and a random motor."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3 * d, d, generator=generator, dtype=dtype)
    tokens = tokens * torch.linspace(0.3, 2, d, dtype=dtype)
    return tokens.mT @ tokens / len(tokens), antisym(torch.randn(d, d, generator=generator, dtype=dtype))


def frame(d, m, generator):
    return torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64)).Q


def planted(d=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return residual_operator(*planted_operator(LAMBDAS, d, generator=generator, dtype=torch.float64))


def left(A, Q):
    """Return the largest eigenvalue on the complement of `Q` by the definition: a basis of the complement."""
    basis = torch.linalg.qr(Q, mode="complete").Q[:, Q.shape[1] :]
    return torch.linalg.eigvalsh(basis.mT @ A @ basis)[-1]


@given(st.integers(1, 7), st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_a_form_is_the_sum_of_its_parts(d, seed):
    M = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(sym(M) + antisym(M), M, **EXACT)
    assert torch.equal(sym(M), sym(M).mT)
    assert torch.equal(antisym(M), -antisym(M).mT)


def test_antisymmetric_part_is_the_difference_of_logits_forth_and_back(generator):
    M = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    logits = x @ M @ x.mT
    torch.testing.assert_close(logits - logits.mT, 2 * x @ antisym(M) @ x.mT)


@given(st.integers(1, 9), st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_operator_is_half_a_commutator_without_trace(d, seed):
    S, Ma = draw(d, seed)
    A = residual_operator(S, Ma)
    torch.testing.assert_close(A, (S @ Ma - Ma @ S) / 2, **EXACT)
    assert torch.equal(A, A.mT)
    assert abs(A.trace()) < 1e-12
    values = torch.linalg.eigvalsh(A)
    assert values[0] <= 1e-12
    assert values[-1] >= -1e-12


def test_entries_in_the_eigenbasis_of_the_moments():
    S, Ma = draw()
    values, basis = torch.linalg.eigh(S)
    inside = basis.mT @ residual_operator(S, Ma) @ basis
    expected = (values[:, None] - values) * (basis.mT @ Ma @ basis) / 2
    torch.testing.assert_close(inside, expected, **EXACT)
    assert inside.diagonal().abs().max() < 1e-12


def test_isotropic_tokens_give_no_signal_whatever_the_motor():
    _, Ma = draw()
    assert residual_operator(3 * torch.eye(6, dtype=torch.float64), Ma).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_whitening_leaves_lies_below_the_floor_of_the_threshold(dtype, generator):
    """Whitened moments are the identity up to rounding, and their operator is rounding as well."""
    tokens = torch.randn(400, 24, generator=generator, dtype=dtype)
    S = tokens.mT @ tokens / 400
    values, basis = torch.linalg.eigh(S)
    white = tokens @ basis / values.sqrt() @ basis.mT
    S = white.mT @ white / 400
    Ma = antisym(torch.randn(24, 24, generator=generator, dtype=dtype))
    top = torch.linalg.eigvalsh(residual_operator(S, Ma))[-1]
    assert 0 < top < threshold_floor(S, Ma)
    moments, motor = draw(24, dtype=dtype)
    assert torch.linalg.eigvalsh(residual_operator(moments, motor))[-1] > 100 * threshold_floor(
        moments, motor
    )


def test_captured_directions_leave_the_operator(generator):
    S, Ma = draw()
    Q = frame(6, 2, generator)
    A = residual_operator(S, Ma, Q)
    assert (A @ Q).abs().max() < 1e-12
    off = torch.eye(6, dtype=torch.float64) - Q @ Q.mT
    torch.testing.assert_close(A, off @ residual_operator(S, Ma) @ off, **EXACT)
    assert torch.equal(A, A.mT)


def test_bottom_eigenvalue_is_negative_once_anything_is_captured():
    """The second condition of the published gate, a bottom below a positive bound, never decides."""
    A = planted()
    for count in range(1, 11):
        Q = greedy_directions(A, 0.05).Q[:, :count]
        assert torch.linalg.eigvalsh(left_operator(A, Q))[0] < -1e-6


def left_operator(A, Q):
    off = torch.eye(len(A), dtype=A.dtype) - Q @ Q.mT
    return off @ A @ off


@pytest.mark.parametrize("captured", [0, 2])
@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_product_without_the_operator_equals_the_product_with_it(captured, shape, device, generator):
    S, _ = draw(7)
    factors = Factors(*torch.randn(2, 4, 7, 3, generator=generator, dtype=torch.float64))
    Ma, Q = antisym(factors.dense()), frame(7, captured, generator) if captured else None
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = residual_operator(S, Ma, Q) @ v
    moved = (tensor if tensor is None else tensor.to(device) for tensor in (S, Ma, Q, v))
    torch.testing.assert_close(residual_matvec(*moved).cpu(), expected, **EXACT)
    torch.testing.assert_close(residual_matvec(S, factors, Q, v), expected, **EXACT)


def test_stacks_of_operators_are_those_of_each_layer(generator):
    pairs = [draw(5, seed) for seed in range(3)]
    together = residual_operator(*(torch.stack(part) for part in zip(*pairs, strict=True)))
    torch.testing.assert_close(together, torch.stack([residual_operator(*pair) for pair in pairs]))


def test_asymmetry_index_of_factors_is_that_of_the_matrix(generator):
    factors = Factors(*torch.randn(2, 5, 9, 3, generator=generator, dtype=torch.float64))
    expected = asymmetry_index(factors.queries @ factors.keys.mT)
    torch.testing.assert_close(asymmetry_index(factors), expected)
    whole, part = factors.norms()
    torch.testing.assert_close(whole, torch.linalg.matrix_norm(factors.queries @ factors.keys.mT))
    torch.testing.assert_close(part / whole, expected)


def test_asymmetry_index_of_random_heads_is_one_over_root_two(generator):
    index = asymmetry_index(Factors(*torch.randn(2, 200, 64, 16, generator=generator)))
    assert abs(index.mean() - 1 / math.sqrt(2)) < 0.01
    assert asymmetry_index(torch.zeros(3, 3)) == 0
    assert asymmetry_index(torch.eye(3)) == 0


def test_planted_operator_has_the_planted_eigenvalues(generator):
    for d, gap in ((20, 1.0), (32, 1.0), (33, 0.2), (21, 5.0)):
        S, Ma = planted_operator(LAMBDAS, d, gap, generator=generator, dtype=torch.float64)
        expected = torch.tensor(LAMBDAS, dtype=torch.float64)
        expected = torch.cat([expected, -expected, expected.new_zeros(d - 20)]).sort().values
        found = torch.linalg.eigvalsh(residual_operator(S, Ma))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert torch.linalg.eigvalsh(S)[0] > 0.99


@pytest.mark.parametrize(("theta", "count"), [*zip(THETAS, range(1, 11), strict=True)])
def test_greedy_capture_counts_eigenvalues_above_the_threshold_in_order(theta, count):
    A = planted()
    Q, captured = greedy_directions(A, theta)
    assert Q.shape[1] == count
    torch.testing.assert_close(captured, torch.tensor(LAMBDAS[:count], dtype=torch.float64))
    assert (captured.diff() < 0).all()
    assert (Q.mT @ Q - torch.eye(count, dtype=torch.float64)).abs().max() < 1e-12


def test_bounds_lie_above_the_count_of_any_symmetric_operator(generator):
    for d in (1, 2, 5, 12):
        for _ in range(25):
            A = sym(torch.randn(d, d, generator=generator, dtype=torch.float64))
            theta = torch.rand(20, generator=generator, dtype=torch.float64) * 3 + 1e-3
            bounds = head_count_bounds(A, theta)
            by_hand = [(torch.linalg.eigvalsh(A) > t).sum() for t in theta]
            assert torch.equal(bounds.count, torch.stack(by_hand))
            some = bounds.count > 0
            assert (bounds.count[some] < bounds.kyfan[some]).all()
            assert (bounds.count[some] < bounds.frobenius[some]).all()
            assert (bounds.count <= bounds.cs).all()
            assert (bounds.cs[~some] >= 0).all()


def test_bounds_of_the_planted_operator():
    A = planted()
    bounds = head_count_bounds(A, torch.tensor(THETAS, dtype=torch.float64))
    assert bounds.count.tolist() == list(range(1, 11))
    torch.testing.assert_close(bounds.kyfan, 28 / torch.tensor(THETAS, dtype=torch.float64))
    # By the definition, over the heads that are counted.
    values = torch.tensor(LAMBDAS, dtype=torch.float64)
    for k in range(10):
        rank = max(float(values[j:].sum() / values[j]) for j in range(k + 1))
        assert float(bounds.rank[k]) == pytest.approx(rank)
        assert float(bounds.cs[k]) == pytest.approx(1 + rank * math.log(28 / THETAS[k]))


def test_geometric_spectra_keep_the_log_law_and_power_laws_leave_it():
    thetas = torch.logspace(-1, -5, 9, dtype=torch.float64)

    def counts(values):
        return head_count_bounds(torch.diag(torch.cat([values, -values])), thetas).count.double()

    k = torch.arange(400, dtype=torch.float64)
    for ratio in (0.5, 0.7, 0.9, 0.95):
        exact = torch.ceil(thetas.log() / math.log(ratio))
        torch.testing.assert_close(counts(ratio**k), exact)
    power = counts((k + 1) ** -2.0)
    torch.testing.assert_close(power[:5], torch.floor(thetas[:5] ** -0.5), rtol=0, atol=1)
    second = power[:5].diff().diff()
    assert (second > 0).all()  # convex in log(1 / theta): no straight line


def test_inexact_directions_may_take_more_heads_but_stay_below_the_trace_bound(generator):
    A = planted()
    counts = []
    for _ in range(20):
        Q, captured = greedy_directions(A, 0.05, noise=0.3, generator=generator)
        above = captured > 0.05
        counts.append(Q.shape[1])
        assert above.sum() < 28 / 0.05
        assert left(A, Q) <= 0.05 + 1e-9
        assert Q.shape[1] >= 10  # never fewer: interlacing
    assert max(counts) > 10


def test_trace_bound_is_reached_by_directions_of_equal_quotients():
    """Ten directions above 2.79 where only four eigenvalues are: Jacobi turns level the diagonal."""
    A = planted()
    Q = torch.linalg.eigh(A).eigenvectors[:, -10:]
    for k in range(9):  # turn column k towards a larger or a smaller one until its quotient is the mean
        quotients = ((A @ Q) * Q).sum(0)
        other = (
            k + 1 + int(quotients[k + 1 :].argmax() if quotients[k] < 2.8 else quotients[k + 1 :].argmin())
        )
        pair = Q[:, [k, other]]
        values, turn = torch.linalg.eigh(pair.mT @ A @ pair)
        share = (2.8 - values[0]) / (values[1] - values[0])
        level = torch.stack([(1 - share).sqrt(), share.sqrt()])
        Q[:, [k, other]] = pair @ turn @ torch.stack([level, torch.stack([level[1], -level[0]])], 1)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(10, dtype=torch.float64))
    quotients, bounds = ((A @ Q) * Q).sum(0), head_count_bounds(A, 2.79)
    torch.testing.assert_close(quotients, torch.full_like(quotients, 2.8))
    assert bounds.count == 4
    assert 10 < bounds.kyfan < 10.04  # all ten are above the threshold, and an eleventh may not be


def test_no_fewer_directions_than_eigenvalues_above_the_threshold_suffice(generator):
    """Random directions, and the hard case: all but one of the best, turned by a little or by much."""
    A = planted()
    for trial in range(200):
        k = trial % 10
        theta = THETAS[k]
        if k == 0:
            Q = A.new_zeros(32, 0)
        elif trial % 20 < 10:
            Q = frame(32, k, generator)
        else:
            best = (
                greedy_directions(A, theta).Q[:, 1:]
                if trial % 40 < 30
                else greedy_directions(A, theta).Q[:, :-1]
            )
            turned = best + 10 ** -(trial % 7) * torch.randn(best.shape, generator=generator, dtype=A.dtype)
            Q = orthonormalise(turned)
        assert Q.shape[1] == k
        assert left(A, Q) > theta


def test_even_optimised_directions_do_not_suffice_if_one_is_missing(generator):
    """Gradient descent on the largest eigenvalue that is left comes down to the bound and not below."""
    A, theta = planted(), 3.0  # four eigenvalues above it, and three directions
    W = torch.randn(32, 3, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([W], lr=0.05)
    for _ in range(300):
        Q = torch.linalg.qr(W).Q
        off = torch.eye(32, dtype=torch.float64) - Q @ Q.mT
        top = torch.linalg.eigvalsh(off @ A @ off)[-1]
        optimizer.zero_grad()
        top.backward()
        optimizer.step()
    assert theta < 3.3 - 1e-9 <= top < 3.5  # lambda_4 = 3.3 is what interlacing allows


@pytest.mark.parametrize("degrees", [5, 30, 54])
def test_a_turned_subspace_of_minimal_size_is_sufficient_too(degrees):
    A, theta = planted(), 3.0
    values, vectors = torch.linalg.eigh(A)
    Q = vectors[:, -4:].clone()
    angle = math.radians(degrees)
    Q[:, 0] = math.cos(angle) * vectors[:, -4] + math.sin(angle) * vectors[:, -5]
    cosines = torch.linalg.svdvals(Q.mT @ vectors[:, -4:])
    assert math.degrees(math.acos(cosines.min())) == pytest.approx(degrees)
    assert left(A, Q) <= theta
    assert values[-5] < theta


def test_a_subspace_turned_too_far_is_not_sufficient():
    """Of 3.3 and 2.4, with the direction between them at 56 degrees, more than 3 is left."""
    A = planted()
    _, vectors = torch.linalg.eigh(A)
    Q = vectors[:, -4:].clone()
    angle = math.radians(56)
    Q[:, 0] = math.cos(angle) * vectors[:, -4] + math.sin(angle) * vectors[:, -5]
    assert left(A, Q) > 3.0


def test_most_captured_energy_singles_the_greedy_subspace_out_and_least_energy_left_does_not():
    """A direction that leans to a negative eigenvector leaves the same positive energy."""
    A = planted()
    _, vectors = torch.linalg.eigh(A)
    Q = vectors[:, -4:]
    for other, same in ((0, True), (-5, False)):
        leaning = Q.clone()
        leaning[:, 0] = math.cos(0.3) * Q[:, 0] + math.sin(0.3) * vectors[:, other]
        energies = [torch.linalg.eigvalsh(left_operator(A, q)).clamp_min(0).sum() for q in (Q, leaning)]
        assert bool((energies[0] - energies[1]).abs() < 1e-9) == same
        assert (leaning.mT @ A @ leaning).trace() < (Q.mT @ A @ Q).trace() - 1e-3


def test_ordered_greedy_directions_are_unique_up_to_sign():
    A = planted()
    _, vectors = torch.linalg.eigh(A)
    expected = fix_sign(vectors.flip(1)[:, :4])
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        basis = frame(
            32, 32, generator
        )  # the same operator in other coordinates: other rounding, other signs
        Q = basis @ greedy_directions(sym(basis.mT @ A @ basis), 3.0).Q
        torch.testing.assert_close(fix_sign(Q), expected, rtol=0, atol=1e-10)


def test_degenerate_eigenvalues_leave_the_count_and_free_the_directions(generator):
    A = torch.diag(torch.tensor([4.0, 4.0, 4.0, 1.0, -13.0], dtype=torch.float64))
    basis = frame(5, 5, generator)
    Q, captured = greedy_directions(sym(basis @ A @ basis.mT), 2.0)
    torch.testing.assert_close(captured, torch.full((3,), 4.0, dtype=torch.float64))
    span = basis[:, :3]
    torch.testing.assert_close(span @ (span.mT @ Q), Q)


def test_greedy_capture_stops_when_all_directions_are_given():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert greedy_directions(A, 0.5).Q.shape == (3, 3)
    assert greedy_directions(torch.zeros(3, 3), 0.0).Q.shape == (3, 0)


def test_operator_follows_the_device_and_dtype_of_its_inputs(device):
    S, Ma = (part.float().to(device) for part in draw())
    A = residual_operator(S, Ma, torch.eye(6)[:, :2].to(device))
    assert A.dtype == torch.float32
    assert A.device.type == torch.device(device).type
    torch.testing.assert_close(A.cpu(), residual_operator(*draw(), torch.eye(6).double()[:, :2]).float())
    assert head_count_bounds(A, 0.01).count.device.type == torch.device(device).type
    assert greedy_directions(A, 0.01).Q.device.type == torch.device(device).type


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: antisym(torch.ones(2, 3)), r"M must be square, got shape \(2, 3\)"),
        (lambda: sym(torch.ones(2, 2, dtype=torch.int64)), "M must be floating"),
        (lambda: residual_operator(torch.eye(2), torch.eye(3)), "one width, got 2 and 3"),
        (lambda: residual_matvec(torch.eye(2), torch.eye(2), None, torch.ones(3)), "v must have shape"),
        (lambda: residual_operator(torch.eye(2), torch.eye(2), torch.ones(3, 1)), "columns of length 2"),
        (
            lambda: residual_matvec(torch.eye(2), torch.eye(2), torch.ones(3, 1), torch.ones(2)),
            "columns of length 2",
        ),
        (
            lambda: residual_matvec(torch.eye(2), Factors(*torch.ones(2, 3, 1)), None, torch.ones(2)),
            "must have the width 2 of S, got 3",
        ),
        (lambda: asymmetry_index(Factors(torch.ones(3, 1), torch.ones(3, 2))), "must both be"),
        (lambda: greedy_directions(torch.full((2, 2), math.nan), 1.0), "A must be finite"),
        (lambda: head_count_bounds(torch.full((2, 2), math.nan), 1.0), "A must be finite"),
        (lambda: head_count_bounds(torch.ones(3, 2, 2), 1.0), "A must be one matrix"),
        (lambda: planted_operator([1.0, 2.0], 3), "1 ... 1 values for d = 3"),
        (lambda: planted_operator([1.0], 4, gap=0.0), "gap positive, got gap 0.0"),
        (lambda: planted_operator([math.nan], 4), "lambdas must be finite"),
        (lambda: greedy_directions(torch.eye(2), -1.0), "theta must be at least 0, got -1.0"),
        (lambda: greedy_directions(torch.eye(2), 1.0, noise=-1.0), "noise must be at least 0"),
        (lambda: head_count_bounds(torch.eye(2), 0.0), "theta must be positive, got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
