"""Laws of adaptive computation time and PonderNet: weights and laws by loops, costs, gradients, draws."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from geomlib.frost import Trajectory, vector
from geomlib.frost.adaptive import (
    ACTLoss,
    PonderLoss,
    act_answer,
    act_weights,
    ponder_answer,
    ponder_law,
)
from geomlib.testing import assert_gradients, count_host_syncs


def draw(n=6, steps=5, classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, steps, classes, generator=generator, dtype=dtype)
    scores = torch.randn(n, steps, generator=generator, dtype=dtype) - 1
    return trajectory_of(logits, scores), torch.arange(n) % classes


def trajectory_of(logits, scores):
    return Trajectory(logits, scores, state=torch.empty(len(logits), 0))


def act_by_loop(z, epsilon):
    total, weights = 0.0, [0.0] * len(z)
    for t, value in enumerate(z):
        p = 1 / (1 + math.exp(-value))
        if total + p >= 1 - epsilon or t == len(z) - 1:
            weights[t] = 1 - total
            return weights, t + 1, 1 - total
        weights[t], total = p, total + p
    raise AssertionError


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_act_weights_equal_the_loop(epsilon):
    trajectory, _ = draw(n=40)
    weights, depth, remainder = act_weights(trajectory.scores, epsilon=epsilon)
    for i, row in enumerate(trajectory.scores.tolist()):
        expected = act_by_loop(row, epsilon)
        assert weights[i].tolist() == pytest.approx(expected[0])
        assert (int(depth[i]), float(remainder[i])) == (expected[1], pytest.approx(expected[2]))
    torch.testing.assert_close(weights.sum(1), torch.ones(40, dtype=torch.float64))
    assert len(set(depth.tolist())) > 2


def test_act_stops_at_once_when_sure_and_at_the_end_when_never():
    sure, never = torch.full((1, 4), 10.0), torch.full((1, 4), -10.0)
    assert act_weights(sure)[1] == 1
    assert act_weights(sure)[0].tolist() == [[1, 0, 0, 0]]
    weights, depth, remainder = act_weights(never)
    assert depth == 4
    assert weights[0, -1] == remainder > 0.999
    assert act_weights(torch.zeros(2, 1))[0].tolist() == [[1], [1]]


def test_act_loss_is_the_error_of_the_mean_answer_and_the_ponder_cost():
    trajectory, y = draw()
    weights, depth, remainder = act_weights(trajectory.scores)
    answer = torch.einsum("nt,ntk->nk", weights, trajectory.logits)
    expected = cross_entropy(answer, y) + 0.3 * (depth + remainder).mean()
    torch.testing.assert_close(ACTLoss(0.3)(trajectory, y), expected)
    torch.testing.assert_close(act_answer(trajectory).logits, answer)
    assert torch.equal(act_answer(trajectory).depth, depth)


def test_ponder_cost_pushes_every_step_before_the_last_towards_stopping():
    trajectory, y = draw()
    scores = trajectory.scores.clone().requires_grad_()
    zero = trajectory_of(torch.zeros_like(trajectory.logits), scores)
    ACTLoss(1.0)(zero, y).backward()
    _, depth, _ = act_weights(scores.detach())
    before = torch.arange(1, 6) < depth.unsqueeze(1)
    assert (scores.grad[before] < 0).all()
    assert (scores.grad[~before] == 0).all()


def law_by_loop(z):
    left, law = 1.0, []
    for t, value in enumerate(z):
        g = 1 / (1 + math.exp(-value)) if t < len(z) - 1 else 1.0
        law.append(left * g)
        left *= 1 - g
    return law


def test_ponder_law_equals_the_loop_and_adds_up_to_one():
    trajectory, _ = draw(n=40)
    law = ponder_law(trajectory.scores).exp()
    for row, z in zip(law.tolist(), trajectory.scores.tolist(), strict=True):
        assert row == pytest.approx(law_by_loop(z))
    torch.testing.assert_close(law.sum(1), torch.ones(40, dtype=torch.float64))
    assert ponder_law(torch.randn(3, 1)).exp().tolist() == [[1], [1], [1]]


def test_ponder_law_keeps_its_logarithms_where_products_vanish():
    law = ponder_law(torch.full((1, 50), 30.0))
    assert torch.isfinite(law).all()
    assert float(law[0, 40]) == pytest.approx(-40 * 30)


@pytest.mark.parametrize("prior", [1 / 6, 0.7])
def test_ponder_loss_is_the_expected_loss_and_the_divergence(prior):
    trajectory, y = draw()
    total = 0.0
    geometric = [prior * (1 - prior) ** t for t in range(5)]
    geometric = [p / sum(geometric) for p in geometric]
    for i, z in enumerate(trajectory.scores.tolist()):
        for t, p in enumerate(law_by_loop(z)):
            loss = float(cross_entropy(trajectory.logits[i, t], y[i]))
            total += (p * loss + 0.2 * p * math.log(p / geometric[t])) / 6
    assert float(PonderLoss(0.2, prior=prior)(trajectory, y)) == pytest.approx(total)


def test_divergence_vanishes_for_the_prior_itself():
    """A truncated geometric law stops at step t with probability prior / (1 - (1 - prior)^(T - t + 1))."""
    prior, steps = 0.3, 6
    g = torch.tensor([prior / (1 - (1 - prior) ** (steps - t)) for t in range(steps)], dtype=torch.float64)
    scores = torch.logit(g, eps=1e-12).expand(4, steps)
    logits = torch.zeros(4, steps, 3, dtype=torch.float64)
    loss = PonderLoss(1.0, prior=prior)(trajectory_of(logits, scores), torch.tensor([0, 1, 2, 0]))
    assert float(loss) == pytest.approx(math.log(3), abs=1e-9)


@pytest.mark.parametrize("loss", [ACTLoss(0.1), PonderLoss(0.1)])
def test_gradients_are_right_where_the_depth_does_not_jump(loss):
    trajectory, y = draw(n=3, steps=4)
    assert_gradients(
        lambda logits, scores: loss(trajectory_of(logits, scores), y), trajectory.logits, trajectory.scores
    )


@pytest.mark.parametrize("loss", [ACTLoss(0.01), PonderLoss(0.01)])
def test_every_readout_is_taught(loss):
    generator = torch.Generator().manual_seed(0)
    model = vector(3, 4, width=8, steps=5, supervise="all", generator=generator)
    trajectory = model(torch.randn(16, 3, generator=generator))
    trajectory.logits.retain_grad()
    loss(trajectory, torch.arange(16) % 4).backward()
    assert (trajectory.logits.grad[:, 0] != 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_drawn_depths_follow_the_law(generator):
    scores = torch.tensor([[-1.0, 0.5, -0.3, 2.0]]).expand(20_000, 4)
    logits = torch.arange(4.0).view(1, 4, 1).expand(20_000, 4, 2)
    answer = ponder_answer(trajectory_of(logits, scores), generator=generator)
    drawn = torch.bincount(answer.depth, minlength=5)[1:] / 20_000
    assert (drawn - ponder_law(scores[:1]).exp()[0]).abs().max() < 0.01
    assert torch.equal(answer.logits[:, 0], answer.depth - 1.0)
    again = ponder_answer(trajectory_of(logits, scores), generator=torch.Generator().manual_seed(3))
    same = ponder_answer(trajectory_of(logits, scores), generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.depth, same.depth)


@pytest.mark.parametrize("loss", [ACTLoss(0.01), PonderLoss(0.01)])
def test_losses_do_not_wait_for_the_device(loss, emulated):
    trajectory, y = draw(dtype=torch.float32)
    moved = trajectory_of(trajectory.logits.to(emulated), trajectory.scores.to(emulated))
    there = y.to(emulated)
    with count_host_syncs() as syncs:
        value = loss(moved, there)
    assert syncs == []
    torch.testing.assert_close(value.cpu(), loss(trajectory, y))


def test_bad_arguments_are_refused():
    trajectory, y = draw()
    for tau in (-1.0, math.inf):
        with pytest.raises(ValueError, match="tau must be finite and at least 0"):
            ACTLoss(tau)
    for epsilon in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 1\)"):
            ACTLoss(epsilon=epsilon)
        with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 1\)"):
            act_weights(trajectory.scores, epsilon=epsilon)
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        PonderLoss(-0.1)
    for prior in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"prior must lie in \(0, 1\)"):
            PonderLoss(prior=prior)
    for loss in (ACTLoss(), PonderLoss()):
        with pytest.raises(ValueError, match="y must lie in 0"):
            loss(trajectory, y + 3)
    for law in (ponder_law, act_weights):
        with pytest.raises(ValueError, match=r"scores must be \(N, T\)"):
            law(torch.zeros(3))
