"""What checks look at beside heads: tokens that shrink, and heads of the top layer that have settled."""

import math
import warnings

import pytest
import torch

from geomlib.incrt import GrowthConfig, GrowthController, SelfOrganisingEncoder, covariance, multi_offset_copy
from geomlib.incrt.depth import DepthTrigger
from geomlib.lab import checkpoints

COPY = multi_offset_copy(4096, offsets=2, generator=torch.Generator().manual_seed(0))


class Run:
    """A model in training, one batch of 16 rows a step, whose heads stay as they are."""

    def __init__(self, beta=1.0, *, seed=0, dictionary=None, **options):
        generator = torch.Generator().manual_seed(seed)
        layers = {name: options.pop(name) for name in ("max_layers", "heads", "ffn") if name in options}
        self.model = SelfOrganisingEncoder(
            vocabulary=5, d=16, dk=6, dv=4, max_heads=4, prototypes=8, outputs=(2, 5), affine=True,
            dictionary=dictionary, generator=generator, **layers,
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=4e-3)
        self.config = GrowthConfig(
            theta=math.inf, dwell=25, check_every=5, calibrate=(5, 5), prototypes_at=None, **options
        )
        self.controller = GrowthController(self.model, self.optimizer, self.config, generator=generator)
        self.loss, self.t = self.model.structure_loss(beta), 0

    def steps(self, number):
        events = []
        for _ in range(number):
            rows = slice(self.t * 16 % 4096, self.t * 16 % 4096 + 16)
            self.optimizer.zero_grad()
            self.loss(self.model(COPY.x[rows]), COPY.y[rows]).backward()
            self.optimizer.step()
            self.t += 1
            events += self.controller.step()
        return events

    def scatter(self):
        seen = []
        hook = self.model.layers[0].feed_forward.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            self.model(COPY.x[:256])
        hook.remove()
        return covariance(seen[0].flatten(0, 1)).trace().item()


# Tokens that shrink.


def test_tokens_that_collapse_under_an_unguarded_dictionary_are_warned_of_once():
    run = Run(dictionary={"stop_grad": False})
    run.steps(5)
    first = run.scatter()
    with pytest.warns(UserWarning, match="the tokens of layer 0 have collapsed") as seen:
        run.steps(100)
    assert len([w for w in seen if "collapsed" in str(w.message)]) == 1
    assert run.scatter() < 0.5 * first


@pytest.mark.parametrize(("beta", "guarded"), [(1.0, True), (0.0, False)])
def test_tokens_that_no_loss_pulls_together_are_not_warned_of(beta, guarded):
    run = Run(beta, dictionary={"stop_grad": guarded})
    run.steps(5)
    first = run.scatter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.steps(100)
    assert run.scatter() > 0.5 * first
    assert (run.model.layers[0].growth.scatter > 0) == (not guarded)


# Depth.


DEEP = {"max_layers": 3, "deepen_at": 0.1, "deepen_tol": 0.5, "deepen_checks": 4, "deepen_dwell": 30}


@pytest.mark.parametrize("ffn", ["ddcl", "mlp"])
def test_a_layer_that_comes_by_itself_leaves_the_function_alone(ffn):
    run = Run(ffn=ffn, heads=2, **DEEP)
    run.steps(29)
    x = COPY.x[:64]
    # The step of the optimiser belongs to the training, what the controller does afterwards does not.
    step, seen = run.controller.step, []

    def watched():
        run.model.eval()
        before = run.model(x).logits
        run.model.train()
        events = step()
        run.model.eval()
        seen.append((events, torch.equal(run.model(x).logits, before)))
        run.model.train()
        return events

    run.controller.step = watched
    events = run.steps(1)
    assert [(event.kind, event.step, event.layer, event.head) for event in events] == [("deepen", 30, 1, -1)]
    assert events[0].signal > events[0].threshold == 0.1
    assert seen == [(events, True)]
    assert run.model.depth == 2


def test_layers_come_a_dwell_apart_until_none_is_left():
    run = Run(heads=2, **DEEP)
    events = run.steps(120)
    assert [(event.step, event.layer) for event in events] == [(30, 1), (60, 2)]
    # What is new adds nothing at first, and is not removed for that.
    assert run.model.heads == [2, 2, 2]
    with pytest.raises(ValueError, match="max_layers must exceed"):
        run.controller.deepen()


def test_no_layer_comes_unless_it_is_asked_for_settled_and_directed():
    for options in ({"deepen_at": None}, {"deepen_at": 0.99}, {"deepen_tol": 1e-9}):
        run = Run(**DEEP | options)
        assert run.steps(60) == []
        assert run.model.depth == 1


def test_a_window_holds_the_top_layer_only():
    trigger = DepthTrigger(level=0.1, tol=0.5, checks=2, dwell=0)
    attention = Run().model.layers[0].attention
    assert trigger.observe(attention) == pytest.approx(trigger.indices[0].item())
    assert not trigger.ready(5)
    trigger.observe(attention)
    assert trigger.ready(5)
    trigger.restart(5)
    assert not trigger.ready(5)


def test_a_run_that_is_cut_off_deepens_when_it_would_have(tmp_path):
    whole = Run(**DEEP)
    whole.steps(22)
    checkpoints.save(tmp_path / "run", whole.model, whole.optimizer, history={}, identity={})
    rest = whole.steps(50)
    other = Run(seed=9, **DEEP)
    checkpoints.restore(tmp_path / "run", other.model, other.optimizer, identity={})
    other.t = 22
    assert other.steps(50) == rest
    assert [event.step for event in rest] == [30, 60]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), other.model.state_dict()[name].nan_to_num()), name
