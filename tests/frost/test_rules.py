"""Laws of the stop rules: their definitions step by step, curves at equal mean depth, and the fitted rule."""

import itertools
import math

import pytest
import torch

from geomlib.frost import Trajectory, vector
from geomlib.frost.curves import (
    DepthCurve,
    crossing_depths,
    depth_curve,
    depth_threshold,
    halting_depths,
    logits_at,
)
from geomlib.frost.halting import unroll_signals
from geomlib.frost.learned import OptimalStopping
from geomlib.frost.rules import (
    Confidence,
    Entropy,
    FixedDepth,
    Oracle,
    Patience,
    RandomStop,
    Rule,
    signals,
)


def draw(n=50, steps=7, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Trajectory(
        logits=3 * torch.randn(n, steps, classes, generator=generator),
        scores=torch.randn(n, steps, generator=generator),
        state=torch.zeros(n, 5),
        states=torch.randn(n, steps + 1, 5, generator=generator),
    )


class Given(Rule):
    """A signal that is given."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def observe(self, seen, memory):
        return self.values[:, seen.t - 1], memory


def test_confidence_is_the_log_odds_of_the_largest_probability():
    trajectory = draw()
    p = trajectory.logits.softmax(2).amax(2)
    torch.testing.assert_close(signals(trajectory, "confidence").sigmoid(), p)
    torch.testing.assert_close(signals(trajectory, "confidence"), (p / (1 - p)).log(), rtol=1e-3, atol=1e-3)


def test_confidence_orders_answers_that_a_probability_calls_equal():
    logits = torch.tensor([[[40.0, 0.0], [60.0, 0.0]]])
    assert (logits.softmax(2).amax(2) == 1).all()
    signal = signals(Trajectory(logits, torch.zeros(1, 2), torch.zeros(1, 1)), "confidence")
    assert signal[0, 1] > signal[0, 0]


def test_entropy_is_that_of_the_class_law():
    trajectory = draw()
    expected = torch.distributions.Categorical(logits=trajectory.logits).entropy()
    torch.testing.assert_close(signals(trajectory, "entropy"), -expected)


def test_entropy_of_a_certain_answer_is_zero_and_of_no_answer_not_finite():
    logits = torch.tensor([[[0.0, -torch.inf]], [[torch.nan, 0.0]]])
    signal = signals(Trajectory(logits, torch.zeros(2, 1), torch.zeros(2, 1)), "entropy")
    assert signal[0] == 0
    assert not torch.isfinite(signal[1])


def test_patience_counts_equal_predictions_in_a_row():
    trajectory = draw(classes=2)
    predictions = trajectory.logits.argmax(2).tolist()
    expected = [
        [len(list(itertools.takewhile(lambda c, row=row, t=t: c == row[t], row[t::-1]))) for t in range(7)]
        for row in predictions
    ]
    assert signals(trajectory, "patience").tolist() == expected


def test_residual_is_the_relative_step_of_the_state():
    trajectory = draw()
    after, before = trajectory.states[:, 1:], trajectory.states[:, :-1]
    relative = (after - before).norm(dim=2) / after.norm(dim=2)
    torch.testing.assert_close(signals(trajectory, "residual").neg().exp(), relative)
    with pytest.raises(ValueError, match="keep_states=True"):
        signals(trajectory._replace(states=None), "residual")


def test_a_state_that_does_not_move_has_a_large_finite_residual_signal():
    trajectory = draw()
    still = trajectory._replace(states=torch.ones(50, 8, 5))
    signal = signals(still, "residual")
    assert torch.isfinite(signal).all()
    assert signal.min() > signals(trajectory, "residual").max()


def test_random_stops_are_reproducible_and_know_nothing_of_the_sample():
    trajectory = draw(n=4000)
    first, second = (signals(trajectory, RandomStop(torch.Generator().manual_seed(1))) for _ in range(2))
    assert torch.equal(first, second)
    depth = crossing_depths(first, 0.75)
    law = torch.bincount(depth, minlength=8)[1:].double() / 4000
    geometric = torch.tensor([0.25 * 0.75**t for t in range(6)] + [0.75**6])
    assert (law - geometric).abs().max() < 0.03


def test_fixed_depth_gives_every_sample_the_same():
    trajectory = draw()
    for depth in range(1, 8):
        assert (halting_depths(trajectory, "fixed", depth - 0.5) == depth).all()


def test_the_oracle_stops_at_the_first_right_answer():
    trajectory, y = draw(), torch.arange(50) % 4
    depth = halting_depths(trajectory, Oracle(y), 0.5)
    right = trajectory.logits.argmax(2) == y.unsqueeze(1)
    for i in range(50):
        hits = right[i].nonzero().flatten().tolist()
        assert depth[i] == (hits[0] + 1 if hits else 7)


@pytest.mark.parametrize("t_min", [1, 3, 7])
def test_crossing_is_the_first_step_above_the_threshold(t_min):
    signal = draw().scores
    signal[3] = math.nan
    signal[4] = math.inf
    depth = crossing_depths(signal, 0.4, t_min=t_min)
    for row, found in zip(signal.tolist(), depth.tolist(), strict=True):
        above = [t for t in range(t_min, 8) if math.isfinite(row[t - 1]) and row[t - 1] > 0.4]
        assert found == (above[0] if above else 7)


@pytest.mark.parametrize("t_min", [1, 2, 7])
def test_mean_depth_is_the_law_of_the_running_maxima(t_min):
    """`t_min + (T - t_min) F(threshold)`, with no search and no look at the crossings."""
    signal = draw().scores
    for threshold in (-1.0, 0.0, 0.7, 2.0):
        maxima = [signal[:, t_min - 1 : t].amax(1) for t in range(t_min, 7)]
        law = torch.stack(maxima).le(threshold).double().mean() if maxima else 0.0
        depth = crossing_depths(signal, threshold, t_min=t_min).double().mean()
        assert float(depth) == pytest.approx(t_min + (7 - t_min) * float(law))


@pytest.mark.parametrize("t_min", [1, 2])
def test_no_threshold_comes_closer_to_a_depth_from_below(t_min):
    signal = draw(n=9).scores
    candidates = [-math.inf, *signal.flatten().tolist(), math.inf]
    reached = [float(crossing_depths(signal, c, t_min=t_min).double().mean()) for c in candidates]
    for target in torch.linspace(t_min, 7, 23).tolist():
        depth = float(
            crossing_depths(signal, depth_threshold(signal, target, t_min=t_min), t_min=t_min).double().mean()
        )
        assert depth == pytest.approx(max(r for r in reached if r <= target + 1e-9))


def test_ties_keep_the_depth_below_its_target():
    signal = torch.zeros(10, 4)
    assert depth_threshold(signal, 2.5) == -math.inf
    assert depth_threshold(signal, 4.0) == math.inf
    assert depth_threshold(torch.full((3, 4), math.nan), 2.5) == -math.inf


def test_curve_runs_from_the_first_to_the_last_step():
    trajectory, y = draw(n=400), torch.arange(400) % 4
    right = (trajectory.logits.argmax(2) == y.unsqueeze(1)).double().mean(0)
    for rule in ("score", "confidence", "entropy", "patience", "residual", "fixed"):
        curve = depth_curve(trajectory, y, rule)
        assert (curve.depth.diff() > 0).all()
        assert (float(curve.depth[0]), float(curve.depth[-1])) == (1, 7)
        assert curve.at(1) == pytest.approx(float(right[0]))
        assert curve.at(7) == pytest.approx(float(right[-1]))
        for depth, accuracy, threshold in zip(*curve, strict=True):
            stopped = halting_depths(trajectory, rule, float(threshold))
            assert float(stopped.double().mean()) == pytest.approx(float(depth))
            hit = logits_at(trajectory, stopped).argmax(1) == y
            assert float(hit.double().mean()) == pytest.approx(float(accuracy))


def test_fixed_depth_curve_is_the_accuracy_of_every_step():
    trajectory, y = draw(n=400), torch.arange(400) % 4
    curve = depth_curve(trajectory, y, FixedDepth())
    right = (trajectory.logits.argmax(2) == y.unsqueeze(1)).double().mean(0)
    for t in range(1, 8):
        assert curve.at(t) == pytest.approx(float(right[t - 1]))


def test_interpolation_is_what_a_coin_between_two_thresholds_gives(generator):
    trajectory, y = draw(n=20_000), torch.arange(20_000) % 4
    curve = DepthCurve(*(column[[20, 80]] for column in depth_curve(trajectory, y, "confidence")))
    low, high = (halting_depths(trajectory, "confidence", float(t)) for t in curve.threshold)
    depth = torch.where(torch.rand(20_000, generator=generator) < 0.5, low, high)
    hit = logits_at(trajectory, depth).argmax(1) == y
    expected = curve.at(float(curve.depth.mean()))
    assert abs(float(depth.double().mean()) - float(curve.depth.mean())) < 0.05
    assert abs(float(hit.double().mean()) - expected) < 0.01
    with pytest.raises(ValueError, match="the curve ends there"):
        curve.at(7.5)


def test_the_oracle_bounds_every_rule():
    trajectory, y = draw(n=400), torch.arange(400) % 4
    ceiling = depth_curve(trajectory, y, Oracle(y))
    summit = float(ceiling.depth[1])
    for rule in ("score", "confidence", "patience", "fixed"):
        curve = depth_curve(trajectory, y, rule)
        assert all(curve.at(depth) <= ceiling.at(summit) for depth in range(1, 8))


def test_signals_are_the_same_on_every_device(device):
    trajectory = draw()
    moved = Trajectory(*(value.to(device) for value in trajectory))
    for rule in (Confidence(), Entropy(), Patience(), "residual", "score", Oracle(torch.zeros(50).long())):
        torch.testing.assert_close(signals(moved, rule).cpu(), signals(trajectory, rule))
    assert torch.equal(halting_depths(moved, "score", 0.3).cpu(), halting_depths(trajectory, "score", 0.3))


def test_bad_arguments_are_refused():
    trajectory, y = draw(), torch.zeros(50, dtype=torch.int64)
    with pytest.raises(ValueError, match="rule must be a Rule or one of score, confidence"):
        signals(trajectory, "luck")
    with pytest.raises(ValueError, match="threshold must be a number"):
        halting_depths(trajectory, "score", math.nan)
    for t_min in (0, 8):
        with pytest.raises(ValueError, match=r"t_min must lie in 1 ... 7"):
            halting_depths(trajectory, "score", 0.0, t_min=t_min)
    with pytest.raises(ValueError, match=r"depth must lie in \[2, 7\], got 1"):
        depth_threshold(trajectory.scores, 1.0, t_min=2)
    with pytest.raises(ValueError, match="signal must hold samples"):
        depth_threshold(torch.zeros(0, 3), 2.0)
    with pytest.raises(ValueError, match="points must be at least 2"):
        depth_curve(trajectory, y, "score", points=1)
    with pytest.raises(ValueError, match="y must have a label for each of 50"):
        depth_curve(trajectory, y[:3], "score")
    with pytest.raises(ValueError, match="y must have a label for each of 50"):
        signals(trajectory, Oracle(y[:3]))


# The fitted rule


class Riddle(torch.nn.Module):
    """Answers turn right at a known step: of one half of the samples after two, of the others after five.

    After one step nothing tells the halves apart, after two the prediction has changed or not.
    """

    fixed_depth, steps = False, 5

    class Context:
        def __init__(self, rows):
            self.rows = rows

        def select(self, index):
            return Riddle.Context(self.rows[index])

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def inject(self, inputs):
        return self.Context(inputs)

    def start(self, context):
        return torch.zeros_like(context.rows)

    def step(self, state, context, t):
        return state + 1

    def read(self, state, context):
        quick, t = context.rows[:, 0] > 0, state[:, 0]
        right = torch.where(quick, t >= 2, t >= 5)
        return torch.stack([(~right).float(), right.float()], 1)

    def score(self, state):
        return torch.zeros_like(state[:, 0])


def riddle(n=400, seed=0):
    rows = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return rows, torch.ones(n, dtype=torch.int64)


def test_optimal_stopping_finds_the_best_rule_of_a_known_problem():
    """From step 2 a slow sample pays three steps for one right answer, which breaks even at a third."""
    rows, y = riddle()
    rule = OptimalStopping.fit(Riddle(), rows, y)
    held_out = riddle(seed=1)[0]
    signal, quick = unroll_signals(Riddle(), held_out, rule=rule), held_out[:, 0] > 0
    for price, slow in ((0.02, 5), (0.3, 5), (0.36, 2)):
        depth = crossing_depths(signal, -math.log(price))
        assert (depth[quick] == 2).all()
        assert (depth[~quick] == slow).all()


def test_the_signal_is_the_break_even_price():
    """Going on from step 1 pays up to a half, that of the slow from step 3 as well, from step 4 more."""
    rows, y = riddle()
    price = unroll_signals(Riddle(), rows, rule=OptimalStopping.fit(Riddle(), rows, y)).neg().exp()
    slow = price[rows[:, 0] <= 0]
    spacing = 5000 ** (1 / 31)  # the best that the grid of prices can tell
    for t, expected in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 2), (4, 1 / 2)):
        ratio = slow[:, t - 1] / expected
        assert (1 / spacing < ratio).all()
        assert (ratio < spacing).all()
    assert (price[rows[:, 0] > 0][:, 1:] <= 1e-4).all()


def test_without_labels_the_answers_of_full_depth_count_as_right():
    rows, y = riddle()
    labelled, free = OptimalStopping.fit(Riddle(), rows, y), OptimalStopping.fit(Riddle(), rows)
    for name, value in labelled.state_dict().items():
        assert torch.equal(value, free.state_dict()[name]), name
    misled = OptimalStopping.fit(Riddle(), rows, 1 - y)
    signal = unroll_signals(Riddle(), rows, rule=misled)
    assert (crossing_depths(signal, -math.log(0.02)) == 1).all()  # every answer gets worse, by these labels


def test_no_rule_of_the_list_is_better_on_the_riddle():
    rows, y = riddle()
    rule = OptimalStopping.fit(Riddle(), rows, y)
    held_out, labels = riddle(seed=1)
    context, states, logits = Riddle().inject(held_out), [torch.zeros_like(held_out)], []
    for t in range(1, 6):
        states.append(Riddle().step(states[-1], context, t))
        logits.append(Riddle().read(states[-1], context))
    trajectory = Trajectory(torch.stack(logits, 1), torch.zeros(400, 5), states[-1], torch.stack(states, 1))
    curve = depth_curve(trajectory, labels, rule)
    for rival in ("score", "confidence", "entropy", "patience", "residual", "fixed"):
        other = depth_curve(trajectory, labels, rival)
        assert all(curve.at(d) >= other.at(d) - 1e-9 for d in torch.linspace(1, 5, 17).tolist())
    stopped = halting_depths(trajectory, rule, -math.log(0.02))
    assert (logits_at(trajectory, stopped).argmax(1) == labels).all()


def fitted(**options):
    generator = torch.Generator().manual_seed(0)
    model = vector(3, 4, mode="euler", width=8, steps=5, generator=generator)
    inputs = torch.randn(300, 3, generator=generator)
    y = torch.randint(4, (300,), generator=generator)
    return model, inputs, OptimalStopping.fit(model, inputs, y, **options)


def test_fitted_signals_do_not_depend_on_how_they_are_watched():
    model, inputs, rule = fitted()
    stored = signals(model.eval()(inputs, keep_states=True), rule)
    torch.testing.assert_close(unroll_signals(model, inputs, rule=rule, batch_size=32), stored)
    other = signals(model(inputs, keep_states=True), fitted(batch_size=77)[2])
    torch.testing.assert_close(stored, other, rtol=1e-4, atol=1e-3)  # rounding goes through a regression
    assert torch.isfinite(stored).all()


def test_a_fitted_rule_is_remade_from_its_options_and_state():
    model, inputs, rule = fitted(prices=12)
    other = OptimalStopping(**rule.options)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(unroll_signals(model, inputs, rule=other), unroll_signals(model, inputs, rule=rule))


def test_the_fitted_rule_follows_its_model_to_every_device(device):
    model, inputs, rule = fitted()
    expected = unroll_signals(model, inputs, rule=rule)
    moved = unroll_signals(model.to(device), inputs.to(device), rule=rule.to(device))
    torch.testing.assert_close(moved.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_state_that_is_not_finite_has_no_finite_fitted_signal():
    model, inputs, rule = fitted()
    trajectory = model.eval()(inputs[:4], keep_states=True)
    trajectory.states[1, 2] = math.nan
    trajectory.logits[2, 2] = math.nan
    finite = torch.isfinite(signals(trajectory, rule))
    assert finite[0].all()
    assert not finite[1, 1]
    assert not finite[2, 2]


def test_bad_fits_are_refused():
    model, inputs, rule = fitted()
    y = torch.zeros(300, dtype=torch.int64)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        OptimalStopping(1)
    with pytest.raises(ValueError, match="prices must be at least 2, got 1"):
        OptimalStopping(5, 1)
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="ridge must be finite and positive"):
            OptimalStopping.fit(model, inputs, y, ridge=ridge)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        OptimalStopping.fit(model, inputs, y, batch_size=0)
    with pytest.raises(ValueError, match=r"y must lie in 0 ... 3"):
        OptimalStopping.fit(model, inputs, y + 4)
    with pytest.raises(ValueError, match="inputs and y must have as many rows"):
        OptimalStopping.fit(model, inputs, y[:10])
    with pytest.raises(ValueError, match="as many rows, two at least, got 1 and 1"):
        OptimalStopping.fit(model, inputs[:1], y[:1])
    with pytest.raises(ValueError, match="two at least, got 1 and none"):
        OptimalStopping.fit(model, inputs[:1])
    with pytest.raises(ValueError, match="two samples with finite signals, got 0"):
        OptimalStopping.fit(model, inputs * math.nan)
    with pytest.raises(ValueError, match="the rule was fitted up to there"):
        signals(model(inputs, steps=6, keep_states=True), rule)
