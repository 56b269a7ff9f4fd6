"""Laws of early exit: answers of full depth and a look back, work that is saved, files that decide alike."""

import math

import pytest
import torch

from geomlib.frost import BasicSSM, Trajectory, Vanilla, sequence, vector
from geomlib.frost.curves import crossing_depths, depth_threshold, halting_depths, logits_at
from geomlib.frost.halting import HaltingWarning, infer, unroll_signals
from geomlib.frost.learned import OptimalStopping
from geomlib.frost.policy import HaltingPolicy, calibrate
from geomlib.frost.rules import RULES, Oracle, Rule
from geomlib.frost.sketch import KLLSketch
from geomlib.testing import count_host_syncs

STEPS = 6


def build(mode="euler", kind="vector", seed=0, device=None, **options):
    """Return an untrained model whose scores move about, and inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    options = {"mode": mode, "steps": STEPS, "width": 12, "generator": generator, **options}
    model = vector(5, 4, **options) if kind == "vector" else sequence(5, 4, **options)
    shape = (40, 5) if kind == "vector" else (24, 5, 7)
    inputs = 3 * torch.randn(shape, generator=generator)
    return model.to(device).eval(), inputs.to(device)


def between(signal, depth, t_min=1):
    """Return a threshold for a mean depth in the middle of a gap, so that rounding decides nothing."""
    threshold = depth_threshold(signal, depth, t_min=t_min)
    above = signal[signal > threshold]
    return (threshold + float(above.min())) / 2


class Scripted(torch.nn.Module):
    """Scores are the entries of the inputs `(N, T)`, one a step; logits count the steps; rows are counted."""

    fixed_depth = False

    class Context:
        def __init__(self, script):
            self.script = script

        def select(self, index):
            return Scripted.Context(self.script[index])

    def __init__(self, steps):
        super().__init__()
        self.steps, self.stepped, self.read_rows = steps, 0, 0

    def inject(self, inputs):
        return self.Context(inputs)

    def start(self, context):
        return torch.zeros_like(context.script[:, :2])

    def step(self, state, context, t):
        self.stepped += len(state)
        return torch.stack([state[:, 0] + 1, context.script[:, t - 1]], 1)

    def read(self, state, context):
        self.read_rows += len(state)
        return state.repeat(1, 2)

    def score(self, state):
        return state[:, 1]


@pytest.mark.parametrize("compact", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["score", "confidence", "entropy", "patience", "residual"])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("euler", "vector"),
        ("certified", "sequence"),
        ("gated", "sequence"),
        ("vanilla", "vector"),
        ("basic_ssm", "vector"),
    ],
)
def test_early_exit_is_full_depth_and_a_look_back(mode, kind, rule, compact):
    model, inputs = build(mode, kind)
    with torch.no_grad():
        trajectory = model(inputs, keep_states=True)
    signal = unroll_signals(model, inputs, rule=rule)
    threshold = 1.5 if rule == "patience" else between(signal, 3.5)
    halted = infer(model, inputs, threshold, rule=rule, compact=compact)
    depth = halting_depths(trajectory, rule, threshold)
    assert torch.equal(halted.depth, depth)
    torch.testing.assert_close(halted.logits, logits_at(trajectory, depth), atol=1e-5, rtol=1e-5)
    assert 1 < halted.depth.float().mean() < STEPS


@pytest.mark.parametrize("compact", [0.0, 0.5, 1.0])
def test_answers_do_not_depend_on_order_size_or_company(compact, generator):
    model, inputs = build("certified", "sequence")
    threshold = between(unroll_signals(model, inputs), 3.0)
    whole = infer(model, inputs, threshold, compact=compact)
    order = torch.randperm(len(inputs), generator=generator)
    parts = [infer(model, part, threshold, compact=compact) for part in inputs[order].split(5)]
    assert torch.equal(torch.cat([part.depth for part in parts]), whole.depth[order])
    torch.testing.assert_close(
        torch.cat([part.logits for part in parts]), whole.logits[order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("t_min", [1, 3])
def test_shrinking_at_every_exit_costs_the_sum_of_the_depths(t_min, generator):
    script = torch.rand(200, 10, generator=generator)
    model = Scripted(10)
    halted = infer(model, script, 0.8, t_min=t_min)
    assert halted.evaluations == model.stepped == int(halted.depth.sum())
    assert model.read_rows == 200  # every sample is read once
    assert torch.equal(halted.depth, crossing_depths(script, 0.8, t_min=t_min))
    assert torch.equal(halted.logits[:, 0], halted.depth.float())


def test_never_shrinking_costs_the_largest_depth_for_all(generator):
    script = torch.rand(50, 10, generator=generator)
    script[:, 6] = 1.0
    never, half = Scripted(10), Scripted(10)
    depth = infer(never, script, 0.7, compact=0.0).depth
    assert never.stepped == 50 * 7 == 50 * int(depth.max())
    assert int(depth.sum()) < infer(half, script, 0.7, compact=0.5).evaluations < never.stepped


def test_thresholds_at_the_ends_stop_all_at_once_or_none():
    model, inputs = build()
    for t_min in (1, 4):
        halted = infer(model, inputs, -math.inf, t_min=t_min)
        assert (halted.depth == t_min).all()
        assert halted.evaluations == t_min * len(inputs)
    halted = infer(model, inputs, math.inf)
    assert (halted.depth == STEPS).all()
    torch.testing.assert_close(halted.logits, model(inputs).final)


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_stops_nothing_and_is_reported(strange):
    script = torch.full((3, 4), 0.9)
    script[1, :] = strange
    script[2, 0] = strange
    with pytest.warns(HaltingWarning, match="4 signals were not finite"):
        halted = infer(Scripted(4), script, 0.5)
    assert halted.depth.tolist() == [1, 4, 2]
    assert halted.nonfinite == 4  # three steps of the second sample before its last, one of the third
    with pytest.warns(HaltingWarning):
        assert infer(Scripted(4), script, -math.inf).depth.tolist() == [1, 4, 2]


@pytest.mark.parametrize("kind", ["vector", "sequence"])
def test_an_empty_batch_gives_empty_answers(kind):
    model, inputs = build("certified", kind)
    halted = infer(model, inputs[:0], 0.0)
    assert halted.logits.shape == (0, 4)
    assert halted.depth.shape == (0,)
    assert halted.evaluations == 0


@pytest.mark.parametrize("samples", [1, 2])
def test_small_batches_and_one_step_work(samples):
    model, inputs = build()
    halted = infer(model, inputs[:samples], 0.0, steps=1)
    assert (halted.depth == 1).all()
    assert halted.logits.shape == (samples, 4)


def test_inputs_need_not_be_contiguous():
    model, inputs = build("certified", "sequence")
    strided = inputs.repeat_interleave(2, 0)[::2].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    threshold = between(unroll_signals(model, inputs), 3.0)
    assert torch.equal(infer(model, strided, threshold).depth, infer(model, inputs, threshold).depth)


def test_tied_models_go_deeper_than_they_were_built_and_untied_ones_refuse():
    model, inputs = build("certified")
    halted = infer(model, inputs, math.inf, steps=3 * STEPS)
    assert (halted.depth == 3 * STEPS).all()
    torch.testing.assert_close(halted.logits, model(inputs, steps=3 * STEPS).final)
    untied, inputs = build("vanilla")
    assert isinstance(untied, Vanilla)
    with pytest.raises(ValueError, match="steps must be at most 6, got 7"):
        infer(untied, inputs, 0.0, steps=7)


def test_a_model_in_training_is_run_in_evaluation_and_goes_on_training():
    model, inputs = build("basic_ssm")
    assert isinstance(model, BasicSSM)
    modes = []
    model.classifier.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.train()
    infer(model, inputs, 0.0)
    unroll_signals(model, inputs)
    assert modes
    assert not any(modes)
    assert model.training


@pytest.mark.parametrize("rule", ["score", "confidence"])
def test_the_host_waits_once_per_step_but_the_last(rule, emulated):
    model, inputs = build(device=emulated)
    threshold = between(unroll_signals(model, inputs, rule=rule).cpu(), 3.5)
    with count_host_syncs() as syncs:
        halted = infer(model, inputs, threshold, rule=rule)
    assert int(halted.depth.max()) == STEPS
    assert len(syncs) == STEPS - 1


@pytest.mark.parametrize("rule", ["score", "residual", "patience"])
def test_every_device_decides_alike(rule, device):
    model, inputs = build("certified", "sequence")
    threshold = 2.5 if rule == "patience" else between(unroll_signals(model, inputs, rule=rule), 3.0)
    expected = infer(model, inputs, threshold, rule=rule)
    halted = infer(model.to(device), inputs.to(device), threshold, rule=rule)
    assert halted.logits.device.type == device.type
    assert torch.equal(halted.depth.cpu(), expected.depth)
    torch.testing.assert_close(halted.logits.cpu(), expected.logits, atol=1e-5, rtol=1e-5)


def test_an_oracle_keeps_each_sample_with_its_label():
    model, inputs = build()
    trajectory = model(inputs)
    y = trajectory.logits[:, 3].argmax(1)
    halted = infer(model, inputs, 0.5, rule=Oracle(y))
    assert torch.equal(halted.depth, halting_depths(trajectory, Oracle(y), 0.5))
    assert (halted.logits.argmax(1) == y).all()


def test_signals_do_not_depend_on_the_batch_size():
    model, inputs = build("certified", "sequence")
    whole = unroll_signals(model, inputs)
    torch.testing.assert_close(unroll_signals(model, inputs, batch_size=7), whole)
    torch.testing.assert_close(whole, model(inputs).scores, atol=1e-5, rtol=1e-5)


def test_mean_depth_grows_with_the_level():
    model, inputs = build()
    depths = [
        calibrate(model, inputs, q=q).infer(model, inputs).depth.float().mean()
        for q in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] == STEPS
    assert len(set(depths)) > 4
    assert calibrate(model, inputs, q=0.0, t_min=3).depth == 3


@pytest.mark.parametrize("q", [0.125, 0.5, 0.875])
def test_a_share_q_of_the_calibration_scores_lies_below_the_threshold(q):
    model, inputs = build(seed=3)
    inputs = inputs.repeat(30, 1) + torch.randn(1200, 5)
    for t_min in (1, 3):
        policy = calibrate(model, inputs, q=q, t_min=t_min)
        scores = unroll_signals(model, inputs)[:, t_min - 1 :]
        assert abs((scores <= policy.threshold).double().mean() - q) <= 0.02
        assert policy.sketch.n == scores.numel()


@pytest.mark.parametrize("t_min", [1, 2])
@pytest.mark.parametrize("target", [2.0, 3.3, 5.75, 6.0])
def test_a_target_depth_is_met_as_bisection_would(target, t_min):
    model, inputs = build()
    policy = calibrate(model, inputs, target_depth=target, t_min=t_min)
    assert target - STEPS / len(inputs) < policy.depth <= target  # one sample may jump by several steps
    signal = unroll_signals(model, inputs)
    low, high = float(signal.min()) - 1, float(signal.max()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        reached = crossing_depths(signal, middle, t_min=t_min).double().mean()
        low, high = (low, middle) if reached > target + 1e-9 else (middle, high)
    bisected = crossing_depths(signal, low, t_min=t_min)
    assert torch.equal(policy.infer(model, inputs).depth, bisected)


def test_an_atom_is_reported_and_rounding_does_not_split_it(generator):
    """All samples share one state at step 1, equal up to rounding."""
    script = torch.rand(400, 6, generator=generator)
    script[:, 0] = 0.5 + 1e-7 * torch.randint(-2, 3, (400,), generator=generator)
    model = Scripted(6)
    with pytest.warns(HaltingWarning, match="tied"):
        policy = calibrate(model, script, q=0.5)
    assert policy.atom == pytest.approx(1 / 6)
    assert (script[:, 0] > policy.threshold).float().mean() in (0, 1)
    with pytest.warns(HaltingWarning, match="mean depth is"):
        policy = calibrate(model, script, target_depth=1.2)
    assert (script[:, 0] > policy.threshold).float().mean() in (0, 1)
    assert policy.depth == infer(model, script, policy.threshold).depth.double().mean()


def test_without_atoms_nothing_is_reported(generator, recwarn):
    script = torch.rand(400, 6, generator=generator)
    for options in ({"q": 0.4}, {"target_depth": 3.1}, {"q": 0.4, "t_min": 2}):
        assert calibrate(Scripted(6), script, **options).atom < 0.02
    assert not recwarn.list


def test_an_empty_sketch_means_full_depth_and_a_warning():
    model, inputs = build()
    with pytest.warns(HaltingWarning, match="the sketch is empty"):
        policy = HaltingPolicy.from_sketch(KLLSketch(), 0.5, steps=STEPS)
    assert (policy.infer(model, inputs).depth == STEPS).all()


def test_a_sketch_filled_batch_by_batch_gives_the_threshold_of_the_whole(generator):
    scores = torch.randn(600, 12, generator=generator)
    sketch = KLLSketch(generator=generator)
    for part in scores.split(50):
        sketch.update(part)
    for q in (0.25, 0.5, 0.75):
        threshold = HaltingPolicy.from_sketch(sketch, q, steps=12).threshold
        assert abs((scores <= threshold).double().mean() - q) < 2.5 * 1.65 / 200
    assert HaltingPolicy.from_sketch(sketch, 0.0, steps=12).threshold == -math.inf
    assert HaltingPolicy.from_sketch(sketch, 1.0, steps=12).threshold == math.inf


def rule_for(name, model, inputs):
    if name != "optimal":
        return RULES[name]()
    return OptimalStopping.fit(model, inputs, torch.arange(len(inputs)) % 4)


@pytest.mark.parametrize("name", ["score", "patience", "optimal"])
@pytest.mark.parametrize("mode", ["euler", "certified"])
def test_a_saved_pair_decides_bit_for_bit_alike(mode, name, tmp_path):
    model, inputs = build(mode)
    rule = rule_for(name, model, inputs)
    policy = (
        calibrate(model, inputs, target_depth=3.0, rule=rule, t_min=2)
        if name != "patience"
        else (HaltingPolicy(2.5, 0.5, 2, STEPS, rule=rule))
    )
    policy.save(tmp_path / "folder" / "pair.safetensors", model)
    other, _ = build(mode, seed=7)
    other.train()
    loaded = HaltingPolicy.load(tmp_path / "folder" / "pair.safetensors", other)
    before, after = policy.infer(model, inputs), loaded.infer(other, inputs)
    assert torch.equal(before.depth, after.depth)
    assert torch.equal(before.logits, after.logits)
    for attribute in ("threshold", "q", "t_min", "steps", "atom", "calibration"):
        assert getattr(loaded, attribute) == getattr(policy, attribute)
    for key, value in policy.sketch.state_dict().items():
        assert torch.equal(value, loaded.sketch.state_dict()[key])


def test_infinite_thresholds_survive_a_file(tmp_path):
    model, inputs = build()
    for q in (0.0, 1.0):
        calibrate(model, inputs, q=q).save(tmp_path / "pair", model)
        assert HaltingPolicy.load(tmp_path / "pair", model).threshold == (math.inf if q else -math.inf)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, inputs = build()
    path = tmp_path / "pair.safetensors"
    policy = calibrate(model, inputs, q=0.5)
    policy.save(path, model)
    content = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("geomlib.frost.policy.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        calibrate(model, inputs, q=0.1).save(path, model)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, inputs = build()
    path = tmp_path / "pair.safetensors"
    calibrate(model, inputs, q=0.5).save(path, model)
    other, _ = build("certified")
    with pytest.raises(ValueError, match="belongs to another model"):
        HaltingPolicy.load(path, other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        HaltingPolicy.load(path, model)
    with pytest.raises(ValueError, match="cannot be read"):
        HaltingPolicy.load(tmp_path / "none", model)

    class Mine(Rule):
        pass

    with pytest.raises(ValueError, match=r"rule must be one of .* to be saved, got Mine"):
        HaltingPolicy(0.0, 0.5, 1, STEPS, rule=Mine()).save(path, model)


def test_the_split_is_remembered_by_name_or_by_content():
    model, inputs = build()
    names = [calibrate(model, x, q=0.5).calibration for x in (inputs, inputs.clone(), inputs + 1)]
    assert names[0] == names[1] != names[2]
    assert calibrate(model, inputs, q=0.5, calibration="valid").calibration == "valid"


def test_bad_arguments_are_refused():
    model, inputs = build()
    for compact in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"compact must lie in \[0, 1\]"):
            infer(model, inputs, 0.0, compact=compact)
    for t_min in (0, STEPS + 1):
        with pytest.raises(ValueError, match=r"t_min must lie in 1 ... 6"):
            infer(model, inputs, 0.0, t_min=t_min)
        with pytest.raises(ValueError, match=r"t_min must lie in 1 ... 6"):
            calibrate(model, inputs, q=0.5, t_min=t_min)
    with pytest.raises(ValueError, match="threshold must be a number"):
        infer(model, inputs, math.nan)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        infer(model, inputs, 0.0, steps=0)
    with pytest.raises(ValueError, match="rule must be a Rule or one of"):
        infer(model, inputs, 0.0, rule="best")
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]"):
            calibrate(model, inputs, q=q)
    with pytest.raises(ValueError, match=r"depth must lie in \[1, 6\], got 7"):
        calibrate(model, inputs, target_depth=7)
    for options in ({}, {"q": 0.5, "target_depth": 2.0}):
        with pytest.raises(ValueError, match="either q or target_depth"):
            calibrate(model, inputs, **options)
    with pytest.raises(ValueError, match="inputs must hold samples"):
        calibrate(model, inputs[:0], q=0.5)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        unroll_signals(model, inputs, batch_size=0)
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\], got 2"):
        HaltingPolicy(0.0, 2.0, 1, 6)


def test_logits_at_picks_each_samples_own_step():
    logits = torch.arange(24.0).view(2, 3, 4)
    trajectory = Trajectory(logits, torch.zeros(2, 3), torch.zeros(2, 1))
    assert torch.equal(logits_at(trajectory, torch.tensor([3, 1])), torch.stack([logits[0, 2], logits[1, 0]]))
