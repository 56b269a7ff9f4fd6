"""The controller: when heads come and go, what evaluation leaves alone, and how a cut-off run goes on."""

import copy
import math

import pytest
import torch
from torch import nn

from geomlib.incrt import (
    GrowthConfig,
    GrowthController,
    SelfOrganisingEncoder,
    multi_offset_copy,
    planted_operator,
    slot_state,
)
from geomlib.incrt.checks import captures_little
from geomlib.incrt.optimiser import SETTLED
from geomlib.lab import checkpoints, training
from geomlib.lab.data import Split

QUICK = {"dwell": 25, "check_every": 5, "persistence": 3, "calibrate": (5, 10), "prototypes_at": 5}
COPY = multi_offset_copy(4096, offsets=2, generator=torch.Generator().manual_seed(0))


def encoder(seed=0, **options):
    settings = {"d": 16, "dk": 6, "dv": 4, "max_heads": 4, "prototypes": 8, "outputs": (2, 5)}
    generator = torch.Generator().manual_seed(seed)
    return SelfOrganisingEncoder(vocabulary=5, **settings | options, generator=generator)


class Run:
    """A model in training, one batch of 16 rows a step."""

    def __init__(self, config=None, *, seed=0, controlled=True, **options):
        self.model = encoder(seed, **options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=4e-3)
        self.controller = None
        if controlled:
            config = GrowthConfig(**QUICK) if config is None else config
            generator = torch.Generator().manual_seed(seed)
            self.controller = GrowthController(self.model, self.optimizer, config, generator=generator)
        self.loss = self.model.structure_loss()
        self.t = 0

    def steps(self, number):
        events = []
        for _ in range(number):
            rows = slice(self.t * 16 % 4096, self.t * 16 % 4096 + 16)
            self.optimizer.zero_grad()
            self.loss(self.model(COPY.x[rows]), COPY.y[rows]).backward()
            self.optimizer.step()
            self.t += 1
            if self.controller is not None:
                events += self.controller.step()
        return events


def always(**options):
    """Return a configuration that wants a head whenever it may have one."""
    return GrowthConfig(**QUICK | {"theta": 0.0, "persistence": 1} | options)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value.nan_to_num(), second[name].nan_to_num()) for name, value in first.items()
    )


# Births.


def test_an_infinite_threshold_never_grows_and_is_still_measured():
    run = Run(always(theta=math.inf))
    assert run.steps(100) == []
    assert run.model.heads == [1]
    assert len(run.controller.history) == 20
    assert all(reading.signal > 0 for reading in run.controller.history)


@pytest.mark.parametrize("dwell", [20, 35])
def test_heads_come_one_to_a_dwell_and_no_more_than_the_cap(dwell):
    run = Run(always(dwell=dwell))
    run.steps(200)
    steps = [event.step for event in run.controller.events]
    assert steps == [dwell, 2 * dwell, 3 * dwell]
    assert run.model.heads == [4]
    capped = Run(always(dwell=dwell, max_heads=2))
    capped.steps(200)
    assert capped.model.heads == [2]


def test_a_birth_is_seen_by_nothing_but_the_new_head():
    """The output before and after, and the optimiser's state of the others, are the same to the bit."""
    run = Run(GrowthConfig(**QUICK | {"theta": math.inf}), slots="mask")
    run.steps(30)
    run.model.eval()
    x = COPY.x[:16]
    before, known = run.model(x).logits, copy.deepcopy(run.optimizer.state_dict()["state"])
    event = run.controller.grow()
    assert torch.equal(run.model(x).logits, before)
    attention = run.model.layers[0].attention
    slots = [id(attention.W_in), id(attention.W_out)]
    for index, parameter in enumerate(run.model.parameters()):
        for name, value in run.optimizer.state[parameter].items():
            old = known[index][name]
            if id(parameter) in slots and value.dim():
                assert (value[event.head] == 0).all()
                value, old = value[: event.head], old[: event.head]
            assert torch.equal(value, old)


def test_a_head_looks_along_the_direction_of_the_gate_and_keeps_it():
    run = Run(always(dwell=40))
    run.steps(39)
    gate = run.model.layers[0].growth.gate
    run.steps(1)
    growth, attention = run.model.layers[0].growth, run.model.layers[0].attention
    u = gate.directions[:, 0]
    torch.testing.assert_close(attention.W_Q[1, :, 0].detach(), u)
    v = growth.motor.Ma @ u
    torch.testing.assert_close(attention.W_K[1, :, 0].detach(), v / v.norm())
    assert growth.columns.tolist() == [-1, 0, -1, -1]
    # The operator with that direction taken out has nothing left along it.
    A = run.controller.operator()
    assert (A @ u).norm() < 1e-5 * run.controller.operator(projected=False).norm()


def test_directions_stay_orthonormal_unless_they_are_not_projected_out():
    run = Run(always())
    run.steps(100)
    Q = run.model.layers[0].growth.gate.directions
    torch.testing.assert_close(Q.T @ Q, torch.eye(3), rtol=0, atol=1e-6)
    free = Run(always(project=False))
    free.steps(100)
    assert free.model.heads == [4]
    assert torch.equal(free.controller.operator(), free.controller.operator(projected=False))


def test_random_births_ignore_the_direction():
    run = Run(always(birth="random", dwell=40))
    run.steps(40)
    u = run.model.layers[0].growth.gate.directions[:, 0]
    column = run.model.layers[0].attention.W_Q[1, :, 0].detach()
    assert abs((column / column.norm()) @ u) < 0.9


def test_nearly_equal_directions_grow_together():
    S, Ma = planted_operator([3.0, 3.0, 1.0], 16, generator=torch.Generator().manual_seed(0))
    config = always(motor="task", task=Ma, theta=1e-6, block_ratio=0.5, prune=False)
    run = Run(config)
    growth = run.model.layers[0].growth
    run.steps(24)
    growth.motor.S.copy_(S)
    growth.motor.ema = 1.0 - 1e-7  # the planted moments stay
    events = run.steps(1)
    assert [event.step for event in events] == [25, 25]


@pytest.mark.parametrize("motor", ["grad", "heads"])
@pytest.mark.parametrize("gate", ["eigh", "lanczos", "online"])
def test_every_gate_and_motor_grows_heads(motor, gate):
    run = Run(always(motor=motor, gate=gate))
    run.steps(60)
    assert run.model.heads == [3]


def test_the_heads_motor_is_the_sum_over_heads():
    run = Run(always(motor="heads", theta=math.inf), heads=3)
    run.steps(30)
    attention, motor = run.model.layers[0].attention, run.model.layers[0].growth.motor
    before = run.model.layers[0].attention.W_Q @ run.model.layers[0].attention.W_K.mT
    dense = before.detach().sum(0)
    torch.testing.assert_close(motor.Ma, (dense - dense.T) / 2, rtol=1e-4, atol=1e-6)
    assert attention.active == 3


def test_a_plateau_of_the_loss_grows_without_a_direction():
    run = Run(always(motor="plateau", persistence=4, plateau_tol=0.9))
    run.loss = run.controller.watch(run.loss)
    run.steps(60)
    assert run.model.heads[0] >= 2
    assert run.model.layers[0].growth.gate.captured == 0
    assert {reading.threshold for reading in run.controller.history} == {4.0}
    falling = Run(always(motor="plateau", persistence=4, plateau_tol=0.0))
    falling.loss = falling.controller.watch(lambda output, y: output.logits.mean() - 1000.0 * falling.t)
    falling.steps(60)
    assert falling.model.heads == [1]


def test_a_low_loss_grows_nothing():
    run = Run(always(loss_floor=1e3))
    run.loss = run.controller.watch(run.loss)
    assert run.steps(60) == []
    with pytest.raises(ValueError, match="the loss must be watched"):
        Run(always(loss_floor=1e3)).steps(5)


# Removals.


def prunable(**options):
    """Return a run with four heads of which the second does and captures nothing."""
    run = Run(GrowthConfig(**QUICK | {"theta": math.inf, "prune_checks": 3} | options), heads=4)
    with torch.no_grad():
        run.model.layers[0].attention.W_in[1] = 0
        run.model.layers[0].attention.W_out[1] = 0
    run.model.layers[0].attention.W_in.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), 0.0))
    run.model.layers[0].attention.W_out.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), 0.0))
    return run


def test_a_head_that_captures_and_adds_nothing_goes_after_so_many_checks():
    run = prunable()
    events = run.steps(34)
    assert events == []
    events = run.steps(1)  # old enough at 25, weak at 25, 30, 35
    assert [(event.kind, event.step, event.head) for event in events] == [("prune", 35, 1)]
    assert run.model.heads == [3]
    state = slot_state(run.optimizer, run.model.layers[0].attention.W_in)
    assert all((value[3] == 0).all() and (value[1] != 0).any() for value in state.values())


def test_a_symmetric_head_that_adds_something_stays():
    """It captures nothing, and captured energy alone would have it removed (INCRT-15)."""
    run = Run(GrowthConfig(**QUICK | {"theta": math.inf, "prune_checks": 1}), heads=4)
    attention = run.model.layers[0].attention

    def symmetric():
        with torch.no_grad():
            attention.W_in[1, 6:12] = attention.W_in[1, :6]

    for _ in range(60):
        symmetric()
        run.steps(1)
    symmetric()
    layer, growth = run.model.layers[0], run.model.layers[0].growth
    assert captures_little(growth, attention, run.controller.config).tolist()[1]
    assert layer.attention.active == 4


def test_pruning_can_be_switched_off_and_waits_for_the_regrow_bound():
    run = prunable(prune=False)
    assert run.steps(60) == []
    run = prunable(theta=1e-9, max_heads=4)
    assert run.steps(60) == []  # the signal is above the threshold: a head that goes might come again


def test_a_head_is_never_born_and_removed_in_one_check_and_the_last_one_stays():
    run = prunable(theta=0.0, max_heads=4, prune_checks=1, dwell=25)
    run.steps(300)
    steps = [event.step for event in run.controller.events]
    assert len(steps) == len(set(steps))
    alone = Run(
        GrowthConfig(**QUICK | {"theta": math.inf, "prune_checks": 1, "eps_out": 1e9, "phi_g": 0.999})
    )
    alone.steps(100)
    assert alone.model.heads == [1]
    with pytest.raises(ValueError, match="must not be the last one"):
        alone.controller.prune(0, 0)


def test_heads_pruned_by_hand_take_their_directions_along():
    run = Run(always())
    run.steps(80)
    growth = run.model.layers[0].growth
    assert growth.columns.tolist() == [-1, 0, 1, 2]
    Q = growth.gate.directions.clone()
    run.controller.prune(0, 1)
    assert growth.columns.tolist() == [-1, 1, 0, -1]  # the head of slot 3 moved into slot 1
    torch.testing.assert_close(growth.gate.directions, Q[:, 1:])
    run.controller.prune(0, 0)
    assert growth.columns.tolist() == [0, 1, -1, -1]
    assert growth.gate.captured == 2
    run.steps(30)


def test_old_directions_can_be_replaced_by_those_that_heads_capture_now():
    run = Run(always(refresh=20, max_heads=3))
    run.steps(80)
    growth, attention = run.model.layers[0].growth, run.model.layers[0].attention
    Q = growth.gate.directions
    torch.testing.assert_close(Q.T @ Q, torch.eye(2), rtol=0, atol=1e-5)
    stale = Run(always(max_heads=3))
    stale.steps(80)
    assert not torch.allclose(Q, stale.model.layers[0].growth.gate.directions, atol=1e-3)
    assert attention.active == 3


# What is left alone.


def test_evaluation_changes_nothing_that_is_remembered():
    run = Run(always())
    run.steps(28)
    before = weights(run.model)
    run.model.eval()
    for _ in range(10):
        run.loss(run.model(COPY.x[:16]), COPY.y[:16]).backward()
        assert run.controller.step() == []
    assert same(before, weights(run.model))
    assert run.model.layers[0].attention.recorded == []


def test_steps_between_checks_record_nothing():
    run = Run(always(check_every=5))
    attention = run.model.layers[0].attention
    seen = [attention.recording]
    for _ in range(9):
        run.steps(1)
        seen.append(attention.recording)
    assert seen == [False] * 4 + [True] + [False] * 4 + [True]
    assert attention.recorded == []


def test_a_run_follows_from_its_seed():
    first, second = Run(always(), seed=3), Run(always(), seed=3)
    assert first.steps(80) == second.steps(80)
    assert same(weights(first.model), weights(second.model))


def test_micro_batches_say_what_one_batch_says():
    whole, split = Run(always(theta=math.inf)), Run(always(theta=math.inf))
    for run, parts in ((whole, 1), (split, 4)):
        task = nn.functional.cross_entropy
        for _ in range(5):
            run.optimizer.zero_grad()
            for x, y in zip(COPY.x[:16].chunk(parts), COPY.y[:16, 2:].chunk(parts), strict=True):
                logits = run.model(x).logits[:, 2:]
                (task(logits.flatten(0, -2), y.flatten()) / parts).backward()
            run.optimizer.step()
            run.controller.step()
    ours, theirs = (run.model.layers[0].growth.motor for run in (whole, split))
    torch.testing.assert_close(ours.S, theirs.S, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.Ma, theirs.Ma, rtol=1e-3, atol=1e-6)
    assert theirs.Ma.abs().max() > 1e-4


def test_a_scaled_loss_says_what_the_loss_says():
    plain, scaled = Run(always(theta=math.inf)), Run(always(theta=math.inf))

    class Scaler:
        def get_scale(self):
            return 1024.0

    scaled.controller.scaler = Scaler()
    for run, scale in ((plain, 1.0), (scaled, 1024.0)):
        for _ in range(5):
            run.optimizer.zero_grad()
            (scale * run.loss(run.model(COPY.x[:16]), COPY.y[:16])).backward()
            for p in run.model.parameters():
                p.grad /= scale
            run.optimizer.step()
            run.controller.step()
    ours, theirs = (run.model.layers[0].growth.motor.Ma for run in (plain, scaled))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_a_batch_that_is_no_number_says_nothing():
    run = Run(always(theta=math.inf))
    run.steps(10)
    before = run.model.layers[0].growth.motor.Ma.clone()
    attention = run.model.layers[0].attention
    run.steps(4)
    run.optimizer.zero_grad()
    (run.loss(run.model(COPY.x[:16]), COPY.y[:16]) * math.nan).backward()
    assert attention.recorded[0].delta.isnan().any()
    run.controller.step()
    assert torch.equal(run.model.layers[0].growth.motor.Ma, before)


def test_a_controlled_encoder_grows_where_its_parameters_are(device):
    model = encoder(device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    controller = GrowthController(model, optimizer, always(), generator=generator)
    loss = model.structure_loss()
    x, y = COPY.x[:8].to(device), COPY.y[:8].to(device)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        controller.step()
    assert model.heads == [3]
    assert model.layers[0].growth.gate.held.device.type == torch.device(device).type


# Runs that go on.


@pytest.mark.parametrize("cut", [24, 33, 59])
def test_a_run_that_is_cut_off_goes_on_to_the_bit(tmp_path, cut):
    """In the dwell of a head, before a check, and while a young head is corrected."""
    whole = Run(always(dwell=20))
    whole.steps(cut)
    checkpoints.save(tmp_path / "run", whole.model, whole.optimizer, history={}, identity={})
    rest = whole.steps(80)
    other = Run(always(dwell=20), seed=9)
    checkpoints.restore(tmp_path / "run", other.model, other.optimizer, identity={})
    other.t = cut
    assert other.steps(80) == rest
    assert rest
    assert same(weights(whole.model), weights(other.model))
    ours, theirs = (run.optimizer.state_dict()["state"] for run in (whole, other))
    for index, entries in ours.items():
        assert same(entries, theirs[index])


def test_fit_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    samples = Split(COPY.x[:320], COPY.y[:320])

    def fit(run, epochs, checkpoint=None):
        return training.fit(
            run.model,
            samples,
            epochs=epochs,
            batch_size=16,
            loss=run.loss,
            optimizer=run.optimizer,
            scores=lambda output: output.logits,
            clip_norm=1.0,
            on_step=lambda step: run.controller.step(),
            checkpoint=checkpoint,
        )

    whole = Run(always())
    history = fit(whole, 5)
    fit(Run(always()), 2, tmp_path / "run")
    resumed = Run(always(), seed=5)
    again = fit(resumed, 5, tmp_path / "run")
    assert again.loss == history.loss
    assert resumed.model.heads == whole.model.heads == [4]
    assert same(weights(whole.model), weights(resumed.model))


def test_a_copy_goes_on_like_the_original():
    run = Run(always())
    run.steps(33)
    twin = Run(always(), controlled=False)
    twin.model = copy.deepcopy(run.model)
    twin.optimizer = torch.optim.Adam(twin.model.parameters(), lr=4e-3)
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    twin.controller = GrowthController(twin.model, twin.optimizer, always())
    twin.loss, twin.t = twin.model.structure_loss(), run.t
    assert run.steps(60) == twin.steps(60)
    assert run.controller.events
    assert same(weights(run.model), weights(twin.model))


def test_young_heads_are_young_after_a_restart():
    run = Run(always(dwell=30))
    run.steps(34)
    other = Run(always(dwell=30), seed=4)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.steps(1)
    run.steps(1)
    assert other.controller.clocks[0].young == run.controller.clocks[0].young == {1: 5}
    run.steps(SETTLED)
    assert 1 not in run.controller.clocks[0].young


def test_growth_settles_when_nothing_happens_for_four_dwells():
    run = Run(GrowthConfig(**QUICK | {"theta": 1e6}))
    run.steps(95)
    assert not run.controller.settled
    run.steps(5)
    assert run.controller.settled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motor": "wind"}, "motor must be one of"),
        ({"motor": "task"}, "task must be given"),
        ({"task": torch.zeros(2, 2)}, "task must be given"),
        ({"phi_g": 1.0}, "phi_g must lie in"),
        ({"birth": "late"}, "birth must be"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"eps_out": -1.0}, "must not be negative"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"prune_checks": 0}, "prune_checks must be at least 1"),
        ({"max_heads": 0}, "max_heads must be at least 1"),
        ({"deepen_at": 1.0}, "deepen_at must lie in"),
        ({"deepen_tol": 0.0}, "deepen_tol must be positive"),
        ({"deepen_checks": 0}, "deepen_checks must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrowthConfig(**options)


def test_a_dwell_shorter_than_the_memory_is_warned_of():
    with pytest.warns(UserWarning, match="shorter than"):
        GrowthConfig(dwell=20)


def test_models_optimisers_and_caps_that_do_not_fit_are_refused():
    model = encoder()
    with pytest.raises(ValueError, match="model must be a SelfOrganisingEncoder"):
        GrowthController(nn.Linear(2, 2), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="optimizer must hold"):
        GrowthController(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="max_heads must be at most"):
        GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), GrowthConfig(max_heads=5))
    run = Run(always(dwell=25))
    run.steps(80)
    with pytest.raises(ValueError, match="max_heads must exceed"):
        run.controller.grow()
