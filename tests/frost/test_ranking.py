"""Laws of the ranking: order, roles of the two losses, where gradient may go, brute-force references."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, softplus

from geomlib.frost import model, vector
from geomlib.frost.ranking import HaltingLoss, feature_ranks, plackett_luce, rank_losses, step_losses
from geomlib.testing import assert_gradients, count_host_syncs

READINGS = ("global", "per_step", "sample")
KINDS = ("hinge", "ranknet", "listmle")


def trajectory_of(logits, scores):
    return model.Trajectory(logits, scores, state=torch.empty(len(logits), 0))


def draw(n=5, steps=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(n, steps, generator=generator, dtype=dtype)
    return losses, torch.randn(n, steps, generator=generator, dtype=dtype)


def sets(losses, pairs, share=0.5):
    """Return easy and hard states by loops over a sorted list."""
    n, steps = losses.shape
    states = sorted(itertools.product(range(n), range(steps)), key=lambda state: float(losses[state]))
    if pairs == "sample":
        rank = {state: place for place, state in enumerate(states)}
        samples = sorted(range(n), key=lambda i: sum(rank[i, t] for t in range(steps)))
        k = max(1, int(share * n))
        return (
            {(i, t) for i in samples[:k] for t in range(steps)},
            {(i, t) for i in samples[-k:] for t in range(steps)},
        )
    k = max(1, int(share * n * steps))
    return set(states[:k]), set(states[-k:])


def relative_by_loops(losses, scores, pairs, value, share=0.5):
    """Return the mean of `value(hard state, easy state)` as the equation reads."""
    easy, hard = sets(losses, pairs, share)
    if pairs == "global":
        pool = [value(h, e) for e in easy for h in hard]
        return sum(pool) / len(pool)
    total = 0.0
    for t in range(losses.shape[1]):
        pool = [value(h, e) for e in easy for h in hard if e[1] == h[1] == t]
        total += sum(pool) / max(1, len(pool))
    return total / losses.shape[1]


def test_ranks_are_a_permutation():
    losses, _ = draw()
    assert sorted(feature_ranks(losses).flatten().tolist()) == list(range(losses.numel()))


@pytest.mark.parametrize("increasing", [torch.exp, lambda loss: 3 * loss + 1])
def test_ranks_do_not_change_under_an_increasing_map(increasing):
    losses, _ = draw()
    assert torch.equal(feature_ranks(losses), feature_ranks(increasing(losses)))


def test_ties_keep_their_order_and_losses_that_are_not_finite_rank_last():
    losses = torch.tensor([[1.0, torch.inf, 0.0], [torch.nan, 1.0, 0.0]])
    assert feature_ranks(losses).tolist() == [[2, 4, 0], [5, 3, 1]]


@pytest.mark.parametrize("pairs", READINGS)
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_hinge_equals_the_double_loop(pairs, share):
    losses, scores = draw(n=7, steps=5)
    s = scores.sigmoid()
    expected = relative_by_loops(
        losses, scores, pairs, lambda h, e: max(0.0, float(s[h] - s[e]) + 0.2), share
    )
    ours = rank_losses(losses, scores, pairs=pairs, share=share).relative
    assert float(ours) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pairs", READINGS)
def test_hinge_of_tied_scores_counts_every_pair_once(pairs):
    losses, _ = draw(n=6)
    scores = torch.zeros_like(losses)
    expected = relative_by_loops(losses, scores, pairs, lambda h, e: 0.2)
    assert float(rank_losses(losses, scores, pairs=pairs).relative) == pytest.approx(expected)
    assert rank_losses(losses, scores, pairs=pairs, margin=0.0).relative == 0


@pytest.mark.parametrize("pairs", READINGS)
def test_ranknet_equals_the_double_loop(pairs):
    losses, z = draw()
    expected = relative_by_loops(losses, z, pairs, lambda h, e: float(softplus(z[h] - z[e])))
    ours = rank_losses(losses, z, pairs=pairs, kind="ranknet").relative
    assert float(ours) == pytest.approx(expected, abs=1e-12)


def test_ranknet_on_drawn_pairs_is_near_that_of_all_pairs(generator):
    losses, z = draw(n=60, steps=5)
    exact = rank_losses(losses, z, kind="ranknet").relative
    drawn = [rank_losses(losses, z, kind="ranknet", cap=50, generator=generator).relative for _ in range(20)]
    assert abs(torch.stack(drawn).mean() - exact) < 0.05
    assert len(set(map(float, drawn))) > 1


@pytest.mark.parametrize("pairs", READINGS)
def test_absolute_loss_equals_the_equation(pairs):
    losses, z = draw()
    s = z.sigmoid()
    easy, hard = sets(losses, pairs)
    steps = [range(losses.shape[1])] if pairs == "global" else [[t] for t in range(losses.shape[1])]
    expected = 0.0
    for group in steps:
        up = [math.log(s[e]) for e in easy if e[1] in group]
        down = [math.log(1 - s[h]) for h in hard if h[1] in group]
        expected -= (sum(up) / max(1, len(up)) + sum(down) / max(1, len(down))) / len(steps)
    assert float(rank_losses(losses, z, pairs=pairs).absolute) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pairs", ["global", "per_step"])
def test_ordered_scores_cost_nothing_and_reversed_ones_the_gap_plus_the_margin(pairs):
    losses = torch.arange(12.0).view(6, 2)
    easy = feature_ranks(losses) < 6
    ordered = torch.where(easy, 9.0, -9.0)
    assert rank_losses(losses, ordered, pairs=pairs).relative == 0
    reversed_ = rank_losses(losses, -ordered, pairs=pairs).relative
    gap = float(torch.tensor(9.0).sigmoid() - torch.tensor(-9.0).sigmoid())
    assert float(reversed_) == pytest.approx(gap + 0.2, abs=1e-6)
    assert float(reversed_) == pytest.approx(1.19975, abs=5e-6)


@pytest.mark.parametrize("pairs", READINGS)
def test_absolute_loss_pushes_easy_up_and_hard_down(pairs):
    losses = torch.arange(12.0).view(6, 2)
    easy = feature_ranks(losses) < 6
    z = torch.zeros(6, 2, requires_grad=True)
    rank_losses(losses, z, pairs=pairs).absolute.backward()
    assert (z.grad[easy] < 0).all()
    assert (z.grad[~easy] > 0).all()
    values = [
        float(rank_losses(losses, torch.where(easy, a, -a), pairs=pairs).absolute) for a in (0.0, 3.0, 30.0)
    ]
    assert values[0] > values[1] > values[2] >= 0
    assert values[2] < 1e-9


def test_losses_stay_finite_where_sigmoids_saturate():
    losses, _ = draw(dtype=torch.float32)
    z = torch.where(feature_ranks(losses) < losses.numel() // 2, -200.0, 200.0).requires_grad_()
    for kind in KINDS:
        result = rank_losses(losses, z, kind=kind)
        assert torch.isfinite(result.relative)
        assert result.absolute.item() == pytest.approx(400)
        (gradient,) = torch.autograd.grad(result.relative + result.absolute, z)
        assert torch.isfinite(gradient).all()


def test_listmle_is_the_plackett_luce_probability_of_the_order():
    """Draw item by item, and sum over all orders: the probabilities add up to one."""
    z = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        left, expected = list(order), 1.0
        for item in order:
            expected *= float(z[item].exp() / z[left].exp().sum())
            left.remove(item)
        assert float(plackett_luce(z[list(order)]).exp()) == pytest.approx(expected, rel=1e-12)
        losses = torch.empty(4, 1, dtype=torch.float64)
        losses[list(order), 0] = torch.arange(4.0, dtype=torch.float64)
        listmle = rank_losses(losses, z.unsqueeze(1), kind="listmle").relative
        assert float(listmle) == pytest.approx(-math.log(expected) / 4, rel=1e-12)
        total += expected
    assert total == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", READINGS)
def test_descent_on_the_relative_loss_sorts_the_scores(pairs, kind):
    losses, scores = draw(n=8)
    z = scores.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        result = rank_losses(losses, z, pairs=pairs, kind=kind)
        (result.relative + 0.01 * result.absolute).backward()
        optimizer.step()
    easy, hard = sets(losses, pairs)
    comparable = [
        (e, h) for e in easy for h in hard if (pairs == "global" or e[1] == h[1]) and losses[e] < losses[h]
    ]
    assert comparable
    assert all(z[e] > z[h] for e, h in comparable)


def test_regret_does_not_call_a_hopeless_sample_hard():
    losses = torch.tensor([[5.0, 5.0, 5.0], [3.0, 1.0, 0.1]])
    z = torch.zeros(2, 3, requires_grad=True)
    rank_losses(losses, z, target="loss").absolute.backward()
    assert (z.grad[0] > 0).all()
    z.grad = None
    rank_losses(losses, z, target="regret").absolute.backward()
    assert (z.grad[0] < 0).any()
    assert (z.grad[1, :2] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", READINGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 1), (3, 3)])
def test_small_batches_give_finite_losses_that_stay_in_the_graph(shape, pairs, kind):
    z = torch.randn(shape, requires_grad=True)
    result = rank_losses(torch.rand(shape), z, pairs=pairs, kind=kind)
    sum(result).backward()
    assert torch.isfinite(z.grad).all()
    comparable = shape[0] > 1 if pairs == "sample" else shape != (1, 1)
    assert bool(z.grad.any()) == comparable


def test_states_without_a_finite_loss_are_never_easy():
    losses = torch.full((2, 3), torch.nan)
    losses[0, 0] = 1.0
    z = torch.zeros(2, 3, requires_grad=True)
    rank_losses(losses, z).absolute.backward()
    assert z.grad[0, 0] < 0
    assert (z.grad.flatten()[1:] >= 0).all()


def network(seed=0):
    """Return inputs, a state that depends on shared weights, and two heads, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (4, 4), (4, 2), (4,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def unroll(x, weight, readout, halt, steps=3):
    state, logits, scores = x, [], []
    for _ in range(steps):
        state = state + 0.5 * torch.tanh(state @ weight + x)
        logits.append(state @ readout)
        scores.append(state @ halt)
    return trajectory_of(torch.stack(logits, 1), torch.stack(scores, 1))


def test_rank_losses_send_no_gradient_to_the_readout_but_to_the_state():
    x, weight, readout, halt = network()
    trajectory = unroll(x, weight, readout, halt)
    losses = step_losses(trajectory.logits, torch.tensor([0, 1, 1]))
    assert not losses.requires_grad
    gradients = torch.autograd.grad(
        sum(rank_losses(losses, trajectory.scores)), (weight, readout, halt), allow_unused=True
    )
    assert gradients[0].abs().max() > 0
    assert gradients[1] is None
    assert gradients[2].abs().max() > 0


def test_task_gradient_comes_from_the_last_step_alone():
    logits = torch.randn(4, 3, 5, requires_grad=True)
    trajectory = trajectory_of(logits, torch.randn(4, 3))
    y = torch.tensor([0, 1, 2, 3])
    HaltingLoss()(trajectory, y).backward()
    assert (logits.grad[:, :-1] == 0).all()
    assert (logits.grad[:, -1] != 0).any()
    logits.grad = None
    HaltingLoss(supervise="all")(trajectory, y).backward()
    assert (logits.grad != 0).any(2).all()


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("mode", ["euler", "certified"])
def test_rank_losses_reach_the_backbone_unless_the_model_detaches_its_scores(mode, detached, generator):
    built = vector(5, 3, mode=mode, width=8, steps=4, detach_halt=detached, generator=generator)
    trajectory, y = built(torch.randn(12, 5, generator=generator)), torch.arange(12) % 3
    sum(rank_losses(step_losses(trajectory.logits, y), trajectory.scores)).backward()
    reached = {name for name, p in built.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"halting.weight"} <= reached <= {name for name, _ in built.named_parameters()}
    assert not any(name.startswith(("classifier", "C", "D")) for name in reached)
    assert any(name.startswith("transition") for name in reached) == (not detached)
    assert any(name.startswith("stem") for name in reached) == (not detached)


def test_without_rank_losses_the_gradient_is_that_of_the_last_cross_entropy(generator):
    built = vector(5, 3, width=8, steps=4, generator=generator)
    x, y = torch.randn(12, 5, generator=generator), torch.arange(12) % 3
    parameters = [p for name, p in built.named_parameters() if not name.startswith("halting")]
    ours = torch.autograd.grad(HaltingLoss(0, 0)(built(x), y), parameters)
    expected = torch.autograd.grad(cross_entropy(built(x).final, y), parameters)
    for first, second in zip(ours, expected, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("pairs", READINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_whole_loss(pairs, kind):
    """Kinks of the hinge and ties of the ranks are a set of measure zero, and this seed stays away."""
    loss, y = HaltingLoss(pairs=pairs, kind=kind), torch.tensor([0, 1, 1])
    leaves = network(seed=1)

    def f(x, weight, readout, halt):
        return loss(unroll(x, weight, readout, halt), y)

    assert_gradients(f, *leaves)


@pytest.mark.parametrize("pairs", READINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_does_not_wait_for_the_device(pairs, kind, emulated):
    logits = torch.randn(6, 4, 3).to(emulated).requires_grad_()
    scores, y = torch.randn(6, 4).to(emulated).requires_grad_(), torch.arange(6).remainder(3).to(emulated)
    loss = HaltingLoss(pairs=pairs, kind=kind)
    with count_host_syncs() as syncs:
        value = loss(trajectory_of(logits, scores), y)
        value.backward()
    assert syncs == []
    expected = loss(trajectory_of(logits.cpu(), scores.cpu()), y.cpu())
    torch.testing.assert_close(value.cpu(), expected)


def test_parts_add_up_to_the_loss():
    _, scores = draw(n=6, dtype=torch.float32)
    trajectory, y = trajectory_of(torch.randn(6, 4, 3), scores), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = HaltingLoss(0.4, 0.2, share=0.3)
    value = loss(trajectory, y)
    task, relative, absolute = loss.last
    torch.testing.assert_close(value, task + 0.4 * relative + 0.2 * absolute)
    torch.testing.assert_close(task, cross_entropy(trajectory.logits[:, -1], y))


def test_a_sample_without_a_finite_loss_is_left_out_and_counted():
    logits = torch.randn(4, 2, 3)
    logits[1, 1] = torch.nan
    logits.requires_grad_()
    loss, y = HaltingLoss(relative=0, absolute=0), torch.tensor([0, 1, 2, 0])
    with pytest.warns(RuntimeWarning, match="1 of 4 samples"):
        value = loss(trajectory_of(logits, torch.zeros(4, 2)), y)
    value.backward()
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(value, cross_entropy(logits[kept, -1], y[kept]))
    assert torch.isfinite(logits.grad).all()
    assert loss.dropped == 1


def test_half_precision_scores_are_ranked_in_float32():
    losses, scores = draw(dtype=torch.float32)
    result = rank_losses(losses, scores.bfloat16())
    assert result.relative.dtype == result.absolute.dtype == torch.float32
    torch.testing.assert_close(result.relative, rank_losses(losses, scores).relative, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "any"}, "pairs must be one of"),
        ({"kind": "svm"}, "kind must be one of"),
        ({"target": "gain"}, "target must be one of"),
        ({"share": 0.6}, r"share must lie in \(0, 0.5\], got 0.6"),
        ({"share": 0.0}, r"share must lie in \(0, 0.5\], got 0.0"),
        ({"margin": -0.1}, "margin must be finite and at least 0, got -0.1"),
        ({"cap": 0}, "cap must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank_losses(torch.rand(2, 2), torch.rand(2, 2), **options)
    with pytest.raises(ValueError, match=message):
        HaltingLoss(**options)


def test_shapes_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="losses and scores must both be"):
        rank_losses(torch.rand(2, 3), torch.rand(2, 2))
    with pytest.raises(ValueError, match="not empty"):
        rank_losses(torch.rand(0, 3), torch.rand(0, 3))
    with pytest.raises(ValueError, match=r"y must lie in 0 ... 3, got 0 ... 4"):
        step_losses(torch.rand(2, 3, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"y must lie in 0 ... 3, got -1"):
        step_losses(torch.rand(2, 3, 4), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="y must be int64"):
        step_losses(torch.rand(2, 3, 4), torch.rand(2))
    with pytest.raises(ValueError, match="must fit"):
        step_losses(torch.rand(2, 3, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="must not be empty"):
        HaltingLoss()(
            trajectory_of(torch.rand(0, 3, 4), torch.rand(0, 3)), torch.tensor([], dtype=torch.int64)
        )
    with pytest.raises(ValueError, match="relative must be finite"):
        HaltingLoss(relative=-1)
    with pytest.raises(ValueError, match="supervise must be last or all"):
        HaltingLoss(supervise="first")
