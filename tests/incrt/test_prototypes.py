"""The DDCL block: its switches, statistics that keep still in evaluation, starts, splits and merges."""

import copy
import math

import pytest
import torch

from geomlib.incrt.dictionary import (
    between_scatter,
    close_pairs,
    covariance,
    draw_tokens,
    effective_rank,
    perplexity,
    separation,
    splits,
    used_codes,
)
from geomlib.incrt.prototypes import DDCLBlock
from geomlib.incrt.quantise import soft_quantise
from geomlib.incrt.splitting import merge_prototypes, split_prototypes
from geomlib.incrt.temperature import Temperature
from geomlib.testing import count_host_syncs


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clusters(places, each=40, spread=0.05, seed=0):
    """Tokens around places (n, d)."""
    places = torch.as_tensor(places)
    return (places[:, None] + spread * tokens(len(places), each, places.shape[1], seed=seed)).flatten(0, 1)


# Forward.


@pytest.mark.parametrize("out", ["barycentre", "value", "gated"])
@pytest.mark.parametrize("param", ["primal", "dual"])
@pytest.mark.parametrize("groups", [1, 2])
def test_output_is_assignments_times_values(out, param, groups, generator):
    block = DDCLBlock(4, 6, out=out, param=param, groups=groups, temperature=0.8, generator=generator)
    z = tokens(2, 5, 4)
    y, found = block(z)
    expected = soft_quantise(z, block.prototypes, 0.8, groups=groups)
    torch.testing.assert_close(found.q, expected.q)
    torch.testing.assert_close(found.loss, expected.loss)
    if out == "value":
        torch.testing.assert_close(y, expected.q @ block.values)
    elif out == "gated":
        D = (z[..., None, :] - block.prototypes).square().sum(-1)
        match = (D.mean(-1, keepdim=True) - D) / 2
        torch.testing.assert_close(expected.match, match, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y, (expected.q * match / 2) @ block.values, atol=1e-5, rtol=1e-5)
    else:
        centre = expected.zhat if groups == 1 else expected.zhat.mean(-2)
        torch.testing.assert_close(y, centre @ block.weight)


def test_two_prototypes_per_group_are_a_perceptron_with_sigmoid_units(generator):
    block = DDCLBlock(5, 14, out="value", groups=7, temperature=1.3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        block.free.mul_(100)
    z = tokens(3, 4, 5, dtype=torch.float64)
    first, second = block.free.view(2, 7, 5)
    weight = 2 * (first - second) / 1.3
    bias = (second.square().sum(1) - first.square().sum(1)) / 1.3
    hidden = torch.sigmoid(z @ weight.T + bias)
    above, below = block.values.view(2, 7, 5)
    torch.testing.assert_close(block(z)[0], hidden @ (above - below) + below.sum(0))


def test_rows_of_a_dual_dictionary_lie_in_the_hull_of_its_reservoir(generator):
    block = DDCLBlock(8, 5, param="dual", reservoir=3, generator=generator, dtype=torch.float64)
    block.initialise_from(tokens(50, 8, dtype=torch.float64), generator=generator)
    solution = torch.linalg.lstsq(block.reservoir.T, block.prototypes.detach().T)
    torch.testing.assert_close(block.reservoir.T @ solution.solution, block.prototypes.detach().T)
    shares = block.mixture.softmax(1)
    torch.testing.assert_close(solution.solution.T, shares.detach())
    block(tokens(4, 8, dtype=torch.float64))[1].loss.backward()
    assert block.mixture.grad.any()
    assert "reservoir" not in dict(block.named_parameters())


@pytest.mark.parametrize("stop_grad", [True, False])
def test_loss_reaches_the_tokens_only_without_stop_grad(stop_grad, generator):
    block = DDCLBlock(4, 6, stop_grad=stop_grad, temperature=1.0, generator=generator)
    z = tokens(2, 5, 4).requires_grad_()
    y, found = block(z)
    (by_loss,) = torch.autograd.grad(found.loss, z, retain_graph=True, allow_unused=True)
    assert (by_loss is not None and bool(by_loss.any())) != stop_grad
    by_task = torch.autograd.grad(y.square().sum(), [z, block.free, block.weight])
    assert all(gradient.any() for gradient in by_task)


def test_without_stop_grad_an_affine_norm_collapses_the_tokens_and_with_it_does_not():
    spreads = {}
    for stop_grad in (True, False):
        generator = torch.Generator().manual_seed(0)
        norm = torch.nn.LayerNorm(6)
        block = DDCLBlock(6, 8, stop_grad=stop_grad, temperature=4.0, generator=generator)
        optimizer = torch.optim.Adam([*norm.parameters(), *block.parameters()], lr=0.05)
        z = tokens(200, 6)
        for _ in range(150):
            optimizer.zero_grad()
            block(norm(z))[1].loss.backward()
            optimizer.step()
        spreads[stop_grad] = float(covariance(norm(z).detach()).trace())
    assert spreads[False] < 1e-2 < 1 < spreads[True]


def test_padding_gives_zeros_and_changes_nothing(device, generator):
    block = DDCLBlock(4, 6, generator=generator).to(device)
    z = tokens(2, 5, 4)
    padded = torch.cat([z, torch.full((2, 3, 4), math.nan)], 1).to(device)
    mask = (torch.arange(8) < 5).expand(2, 8).to(device)
    other = copy.deepcopy(block)
    y, found = block(padded, mask)
    plain, expected = other(z.to(device))
    torch.testing.assert_close(y[:, :5].cpu(), plain.cpu(), atol=1e-6, rtol=1e-5)
    assert not y[:, 5:].cpu().any()
    torch.testing.assert_close(found.loss.cpu(), expected.loss.cpu(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block.temperature.value().cpu(), other.temperature.value().cpu())


def test_a_training_step_does_not_wait_for_the_device(emulated, generator):
    block = DDCLBlock(4, 6, out="value", groups=2, generator=generator).to(emulated)
    z = tokens(2, 5, 4).to(emulated).requires_grad_()
    with count_host_syncs() as syncs:
        y, found = block(z)
        (y.sum() + found.loss).backward()
    assert syncs == []


def test_block_runs_under_autocast_and_in_half_precision(generator):
    block = DDCLBlock(4, 6, out="value", temperature=1.0, generator=generator)
    z = tokens(2, 5, 4)
    exact, found = block(z)
    with torch.autocast("cpu", torch.bfloat16):
        y, cast = block(z)
    assert torch.equal(cast.q, found.q)
    torch.testing.assert_close(y.float(), exact, atol=0.02, rtol=0.02)
    half = copy.deepcopy(block).bfloat16()
    y, cast = half(z.bfloat16())
    assert (y.dtype, cast.q.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)


def test_block_compiles_as_one_graph_in_training(generator):
    block = DDCLBlock(4, 6, generator=generator)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for step in range(3):
        z = tokens(2, 5, 4, seed=step)
        y, found = compiled(z)
        expected, wanted = twin(z)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(block.temperature.eigenvalue, twin.temperature.eigenvalue)


# Temperature.


def test_evaluation_touches_no_state(generator):
    block = DDCLBlock(4, 6, param="dual", generator=generator)
    block(tokens(2, 5, 4))
    before = copy.deepcopy(block.state_dict())
    block.eval()
    block(10 * tokens(2, 5, 4))
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_schedule_follows_the_largest_eigenvalue_and_cools():
    z = tokens(1000, 6) * torch.tensor([3.0, 1.5, 1, 1, 1, 0.5]) + 100
    schedule = Temperature(total_steps=200)
    exact = float(torch.linalg.eigvalsh(covariance(z.double()))[-1])
    seen = []
    for _ in range(200):
        seen.append(float(schedule.update(z)))
    assert float(schedule.eigenvalue) == pytest.approx(exact, rel=0.02)
    for t, T in enumerate(seen, start=1):
        if t > 50:
            expected = exact * max(0.5, 4 * 0.03 ** (t / 200))
            assert abs(T - expected) < 0.03 * expected
    assert seen[-1] == pytest.approx(exact / 2, rel=0.02)


def test_absolute_schedule_is_what_it_says_and_looks_at_no_token():
    schedule = Temperature(2.0, 0.5, decay=0.25, total_steps=100, relative=False)
    values = [float(schedule.update(tokens(3, 2))) for _ in range(150)]
    assert values[49] == pytest.approx(1.0)
    assert values[-1] == 0.5
    assert not schedule.eigenvalue


def test_tokens_that_do_not_vary_meet_the_floor_and_no_nan():
    schedule = Temperature(floor=1e-3)
    assert schedule.update(torch.ones(5, 3)) == pytest.approx(1e-3)
    for _ in range(100):
        schedule.update(tokens(50, 3))
    assert schedule.value() > 0.1


def test_schedule_resumes_from_its_state(generator):
    block = DDCLBlock(4, 6, generator=generator)
    for step in range(5):
        block(tokens(3, 4, seed=step))
    other = DDCLBlock(4, 6)
    other.load_state_dict(block.state_dict())
    for step in range(5, 8):
        z = tokens(3, 4, seed=step)
        assert torch.equal(block(z)[0], other(z)[0])


# Starts.


@pytest.mark.parametrize("method", ["tokens", "spread"])
def test_prototypes_start_at_different_tokens(method, generator):
    z = tokens(30, 4)
    block = DDCLBlock(4, 8, generator=generator)
    block.initialise_from(z, method, noise=0.0, generator=generator)
    nearest = torch.cdist(block.free.detach(), z)
    assert (nearest.amin(1) < 1e-6).all()
    assert len(set(nearest.argmin(1).tolist())) == 8


def test_spread_start_finds_every_cluster(generator):
    z = clusters([[0.0, 0], [9, 0], [0, 9], [9, 9]], each=50)
    block = DDCLBlock(2, 4, generator=generator)
    block.initialise_from(z, "spread", generator=generator)
    assert float(torch.cdist(z, block.free.detach()).amin(1).max()) < 1


def test_mean_start_and_fewer_tokens_than_prototypes_leave_no_duplicates(generator):
    block = DDCLBlock(4, 8, generator=generator)
    block.initialise_from(tokens(3, 4), generator=generator)
    assert separation(block.free).minimum > 1e-3
    z = tokens(50, 4) + 7
    block.initialise_from(z, "mean", generator=generator)
    assert (block.free - z.mean(0)).norm(dim=1).max() < 0.1
    assert separation(block.free).minimum > 1e-3
    constant = torch.ones(20, 4)
    assert torch.equal(draw_tokens(constant, 3, spread=True, generator=generator), torch.ones(3, 4))


def test_start_leaves_padding_out_and_is_reproducible():
    z = torch.cat([tokens(20, 4), torch.full((5, 4), math.nan)])
    mask = torch.arange(25) < 20
    found = []
    for _ in range(2):
        block = DDCLBlock(4, 8)
        block.initialise_from(z, mask=mask, generator=torch.Generator().manual_seed(3))
        found.append(block.free.detach().clone())
    assert torch.isfinite(found[0]).all()
    assert torch.equal(*found)


# Splits and merges.


def test_a_prototype_splits_exactly_when_its_own_tokens_would_part_it():
    z = clusters([[-1.0, 0.0], [1.0, 0.0]])
    for T, parts in ((3.5, True), (4.5, False)):
        block = DDCLBlock(2, 4, active=1, temperature=T)
        with torch.no_grad():
            block.free[0] = z.mean(0)
        assert 3.5 < float(splits(z, torch.ones(len(z), 1)).critical) < 4.5
        assert split_prototypes(block, z) == ([(0, 1)] if parts else [])
        assert block.active == 1 + parts


def test_splitting_preserves_the_function_to_a_hundredth_and_merging_undoes_it(generator):
    z = clusters([[-1.0, 0.0], [1.0, 0.0]])
    block = DDCLBlock(2, 3, out="value", active=1, temperature=1.0, generator=generator).eval()
    with torch.no_grad():
        block.free[0] = z.mean(0)
    before = block(z)[0]
    split_prototypes(block, z)
    after = block(z)[0]
    assert float((after - before).abs().max()) <= 0.01 * float(before.abs().max())
    assert float(separation(block.free[:2].detach()).minimum) == pytest.approx(0.02, rel=0.1)
    assert merge_prototypes(block, z, closer=0.1) == [(0, 1)]
    torch.testing.assert_close(block.free[0], z.mean(0))
    torch.testing.assert_close(block(z)[0], before)
    assert block.active == 1


def test_annealing_with_splits_grows_one_prototype_per_cluster():
    z = clusters([[-4.0, -4.0], [-4.0, 4.0], [4.0, -4.0], [4.0, 4.0]])
    block = DDCLBlock(
        2, 8, active=1, temperature=Temperature(100.0, 1.0, decay=0.01, total_steps=400, relative=False)
    )
    with torch.no_grad():
        block.free[0] = z.mean(0)
    optimizer = torch.optim.SGD([block.free], lr=0.2)
    counts = []
    for step in range(500):
        optimizer.zero_grad()
        block(z)[1].loss.backward()
        optimizer.step()
        if step % 10 == 0:
            split_prototypes(block, z)
            merge_prototypes(block, z)
        counts.append(block.active)
    assert counts[0] == 1
    assert counts[-1] == 4
    assert float(torch.cdist(z, block.free[block.log_prior.isfinite()].detach()).amin(1).max()) < 1


def test_only_a_block_with_room_may_change_its_number():
    with pytest.raises(ValueError, match="active must have been given"):
        split_prototypes(DDCLBlock(2, 3), tokens(4, 2))
    full = DDCLBlock(2, 2, active=2, temperature=1e-3)
    assert split_prototypes(full, clusters([[-1.0, 0.0], [1.0, 0.0]])) == []


# Statistics.


def test_statistics_by_hand():
    P = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    found = separation(P)
    assert (float(found.mean), float(found.minimum)) == (pytest.approx(10 / 3), 0)
    assert close_pairs(P, 1e-3).tolist() == [[0, 2]]
    usage = torch.tensor([0.5, 0.5, 0.0])
    mean = usage @ P
    expected = sum(u * (p - mean).outer(p - mean) for u, p in zip(usage, P, strict=True))
    torch.testing.assert_close(between_scatter(P, usage), expected)
    assert float(perplexity(usage)) == pytest.approx(2)
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(16 / 10)
    assert effective_rank(torch.zeros(2, 2)) == 0
    q = torch.tensor([[0.6, 0.4, 0], [0.2, 0.8, 0], [0, 0, 1.0]])
    assert used_codes(q) == 3
    assert used_codes(q, torch.tensor([True, True, False])) == 2
    z = tokens(50, 3)
    torch.testing.assert_close(covariance(z), torch.cov(z.T, correction=0))
    torch.testing.assert_close(covariance(z, torch.arange(50) < 20), torch.cov(z[:20].T, correction=0))


def test_between_and_within_scatter_add_up_when_assignments_are_hard():
    z, P = tokens(300, 3, dtype=torch.float64), tokens(5, 3, seed=1, dtype=torch.float64)
    for _ in range(50):  # k-means
        found = soft_quantise(z, P, 1e-9)
        P = (found.q.T @ z) / found.q.sum(0)[:, None]
    found = soft_quantise(z, P, 1e-9)
    within = (z - found.zhat).T @ (z - found.zhat) / len(z)
    torch.testing.assert_close(between_scatter(P, found.usage) + within, covariance(z))


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "d must be at least 1, got 0"),
        ({"K": 0}, "K must be at least 1, got 0"),
        ({"reservoir": 0}, "reservoir must be at least 1"),
        ({"out": "both"}, "out must be one of barycentre, value, gated, got 'both'"),
        ({"param": "free"}, "param must be one of primal, dual"),
        ({"mode": "hard"}, "mode must be full or em"),
        ({"groups": 4}, "groups must divide K = 6, got 4"),
        ({"active": 7}, r"active must lie in 1 ... 6, got 7"),
        ({"active": 2, "groups": 2}, "active needs one primal dictionary"),
        ({"active": 2, "param": "dual"}, "active needs one primal dictionary"),
        ({"temperature": 0.0}, "T must be positive and finite, got 0.0"),
        ({"commitment": -0.1}, "commitment must be finite and at least 0"),
    ],
)
def test_block_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDCLBlock(**{"d": 4, "K": 6, **options})


def test_a_large_commitment_warns():
    with pytest.warns(UserWarning, match=r"commitment 0.5 pulls tokens together"):
        DDCLBlock(4, 6, commitment=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "end": 2.0}, "0 < end <= start"),
        ({"end": 0.0}, "0 < end <= start"),
        ({"decay": 1.5}, r"decay must lie in \(0, 1\], got 1.5"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"floor": 0.0}, "floor must be positive"),
    ],
)
def test_schedule_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Temperature(**options)


def test_tokens_that_do_not_fit_are_refused():
    block = DDCLBlock(4, 6, check_finite=True)
    with pytest.raises(ValueError, match=r"z must be \(..., 4\), got shape \(2, 3\)"):
        block(tokens(2, 3))
    with pytest.raises(ValueError, match="z must be finite"):
        block(torch.full((2, 4), math.inf))
    with pytest.raises(ValueError, match=r"tokens must be \(..., 4\) and not empty"):
        block.initialise_from(tokens(2, 3))
    with pytest.raises(ValueError, match="method must be one of tokens, spread, mean"):
        block.initialise_from(tokens(2, 4), "far")
    with pytest.raises(ValueError, match="width must stay 4, got 3"):
        block.temperature.update(tokens(5, 3))
    with pytest.raises(ValueError, match="at least two prototypes"):
        separation(tokens(1, 3))
    with pytest.raises(ValueError, match="q must assign every token"):
        splits(tokens(5, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="x must hold a token"):
        draw_tokens(tokens(0, 3), 2)
