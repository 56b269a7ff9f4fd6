"""Laws of the model: what contracts and what does not, one fixed point, gradients, precision, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import DefaultDeviceType

from geomlib.frost import (
    MODES,
    Certified,
    Context,
    Frost,
    System,
    Transition,
    jacobian_norms,
    printed_step,
    sequence,
    step_factor,
    vector,
)
from geomlib.testing import saved_tensor_bytes

WIDTH = 12


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(mode="certified", seed=0, **options):
    options = {"width": WIDTH, "dtype": torch.float64, "generator": seeded(seed), **options}
    return vector(5, 3, mode=mode, **options)


def inputs(samples=6, features=5, dtype=torch.float64, seed=1):
    return torch.randn(samples, features, generator=seeded(seed), dtype=dtype)


class Linear(Transition):
    """`G(h) = gain h`: the sharpest case of a Lipschitz constant."""

    def __init__(self, gain, kappa=None):
        super().__init__(kappa, dtype=torch.float64)
        self.gain = gain

    def forward(self, state, prepared):
        return self.gain * state


def linear_model(mode, gain, scale, kappa=None, **options):
    stem = nn.Linear(5, WIDTH, dtype=torch.float64)
    return Frost(
        stem,
        Linear(gain, kappa),
        WIDTH,
        3,
        mode=mode,
        scale=scale,
        generator=seeded(),
        dtype=torch.float64,
        **options,
    )


def test_an_euler_model_takes_the_step_as_it_is_printed():
    model, x = build("euler"), inputs()
    context = model.inject(x)
    system = System(lambda h: model.transition(h, model.transition.prepare(h)), model.B, model.C, model.D)
    h = inputs(features=WIDTH)
    printed = printed_step(system, h, context.x, model.scale, model.hurst)
    assert (model.step(h, context) - printed).abs().max() <= 1e-14 * printed.abs().max()


@pytest.mark.parametrize("mode", ["leaky", "certified"])
def test_interpolating_modes_are_the_printed_step_of_a_shifted_transition(mode):
    """`A = G - id` in the printed update gives `(1 - lambda) h + lambda G(h)`."""
    model, x = build(mode), inputs()
    context = model.inject(x)
    prepared = model.transition.prepare(context.x)
    system = System(lambda h: model.transition(h, prepared) - h, model.B, model.C, model.D)
    h = inputs(features=WIDTH)
    printed = printed_step(system, h, context.x, model.scale, model.hurst)
    torch.testing.assert_close(model.step(h, context), printed, rtol=1e-13, atol=1e-13)


def test_a_gated_step_interpolates_channel_by_channel():
    model, x = build("gated"), inputs()
    context = model.inject(x)
    h = inputs(features=WIDTH)
    gate = torch.sigmoid(model.gate(context.x))
    moved = model.transition(h, model.transition.prepare(h))
    forcing = model.scale ** (1 + model.hurst) * model.B(context.x)
    torch.testing.assert_close(model.step(h, context), (1 - gate) * h + gate * moved + forcing)


def test_the_readout_undoes_the_amplitude():
    model, x = build("euler", readout_norm=True), inputs()
    context, h = model.inject(x), inputs(features=WIDTH)
    y = model.scale**-model.hurst * model.C(h) + model.D(context.x)
    torch.testing.assert_close(model.read(h, context), model.classifier(model.readout_norm(y)))
    torch.testing.assert_close(model.score(h), model.halting(model.halting_norm(h))[:, 0])


@pytest.mark.parametrize("mode", MODES)
def test_forward_is_inject_start_step_read_score(mode):
    model, x = build(mode, readout_norm=True), inputs()
    trajectory = model(x, keep_states=True)
    context = model.inject(x)
    h = model.start(context)
    for t in range(1, model.steps + 1):
        torch.testing.assert_close(trajectory.states[:, t - 1], h)
        h = model.step(h, context, t)
        torch.testing.assert_close(trajectory.logits[:, t - 1], model.read(h, context))
        torch.testing.assert_close(trajectory.scores[:, t - 1], model.score(h))
    torch.testing.assert_close(trajectory.state, h)
    torch.testing.assert_close(trajectory.final, model.read(h, context))
    assert model(x).states is None


def test_certified_starts_at_zero_and_the_others_at_the_features():
    for mode in MODES:
        model, x = build(mode), inputs()
        context = model.inject(x)
        expected = torch.zeros_like(context.x) if mode == "certified" else model.stem(x)
        assert torch.equal(model.start(context), expected)
        assert torch.equal(
            build(mode, initial="zeros")(x, steps=1, keep_states=True).states[:, 0], 0 * expected
        )


# Contraction


def states_of_all_sizes(samples=100):
    sizes = torch.logspace(-3, 1, samples, dtype=torch.float64)
    return sizes[:, None] * inputs(samples, WIDTH, seed=2)


def train(model, x, y, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).final, y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("form", ["normalised", "orthogonal"])
@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_the_certified_step_contracts_before_and_after_training(kappa, form):
    x = inputs(100)
    model = build(kappa=kappa, parametrisation=form)
    for steps in (0, 50):
        train(model, x, torch.arange(100) % 3, steps)
        factor = model.contraction_factor()
        assert factor == pytest.approx(1 - model.scale.item() * (1 - kappa))
        context = model.inject(x)
        visited = model(x, keep_states=True).states
        for states in (states_of_all_sizes(), visited[:, 3], visited[:, -1]):
            assert jacobian_norms(model, states, context).max() <= factor + 1e-9


def test_sequences_contract_at_the_promised_rate():
    model = sequence(2, 3, width=4, kappa=0.9, dtype=torch.float64, generator=seeded())
    x = torch.randn(10, 2, 6, generator=seeded(1), dtype=torch.float64)
    states = torch.randn(10, 4, 6, generator=seeded(2), dtype=torch.float64)
    assert jacobian_norms(model, states, model.inject(x)).max() <= model.contraction_factor() + 1e-9


def test_the_bound_is_reached_by_orthogonal_weights():
    """Near 0 with biases that keep all units on, `W2 W1` of matching frames is `kappa` times the identity."""
    generator = seeded()
    block = Certified(WIDTH, hidden=(WIDTH,), kappa=0.5, parametrisation="orthogonal", dtype=torch.float64)
    with torch.no_grad():
        block.weights[1].copy_(block.weights[0].T)
        block.biases[0].fill_(100.0)
    for scale in (0.43, 0.59):
        model = Frost(
            nn.Linear(5, WIDTH, dtype=torch.float64), block, WIDTH, 3, scale=scale, generator=generator
        ).double()
        norms = jacobian_norms(model, states_of_all_sizes() * 0.01, model.inject(inputs(100)))
        assert norms.max() <= model.contraction_factor() + 1e-9
        assert norms.min() >= 0.95 * model.contraction_factor()
        assert (
            model.contraction_factor() > scale
        )  # the printed theory would promise a factor of at most lambda


def test_a_free_step_expands_although_its_scale_is_below_one():
    x = inputs(100)
    for mode in ("euler", "leaky"):
        model = build(mode)
        assert model.scale < 1
        assert model.contraction_factor() is None
        assert jacobian_norms(model, states_of_all_sizes(), model.inject(x)).max() > 1


def test_one_limit_from_sixteen_starts():
    model = build(kappa=0.9)
    context = model.inject(inputs(1).expand(16, -1))
    sizes = torch.linspace(0, 100, 16, dtype=torch.float64)[:, None]
    h = sizes * F.normalize(inputs(16, WIDTH, seed=3), dim=1)
    for _ in range(math.ceil(math.log(1e-12) / math.log(model.contraction_factor()))):
        h = model.step(h, context)
    assert torch.cdist(h, h).max() <= 1e-10
    assert (model.step(h, context) - h).norm(dim=1).max() <= 1e-10


def test_the_influence_of_the_start_dies_at_the_promised_rate():
    model = build(kappa=0.9)
    context = model.inject(inputs(1))
    factor = model.contraction_factor()

    def run(start, steps):
        for _ in range(steps):
            start = model.step(start, context)
        return start

    for t in (1, 2, 5, 10, 20):
        J = torch.autograd.functional.jacobian(lambda h: run(h, t), inputs(1, WIDTH, seed=3))  # noqa: B023
        assert torch.linalg.matrix_norm(J[0, :, 0], 2) <= factor**t * (1 + 1e-6)


def test_a_step_that_is_too_long_diverges():
    """`G = -kappa id` at lambda = 1.4 and kappa = 0.5: the slope is -1.1, although kappa < 1."""
    model = linear_model("leaky", -0.5, 1.4)
    context = model.inject(inputs())
    h = inputs(features=WIDTH)
    gaps = []
    other = torch.zeros_like(h)
    for _ in range(50):
        h, other = model.step(h, context), model.step(other, context)
        gaps.append((h - other).norm().item())
    assert gaps[-1] / gaps[-2] == pytest.approx(1.1)
    assert gaps[-1] > 100 * gaps[0]
    assert step_factor(1.4, 0.5) == pytest.approx(1.1)


def test_the_printed_update_diverges_for_a_transition_that_points_outwards():
    model = linear_model("euler", 1.0, 0.5)
    sizes = model(inputs(), steps=60, keep_states=True).states.detach().norm(dim=2)
    assert (sizes[:, -1] / sizes[:, -2]).min() == pytest.approx(1.5)
    assert sizes.min(0).values[-1] > 1e6


def test_the_same_transition_as_a_target_is_certified():
    model = linear_model("certified", -0.5, 0.9, kappa=0.5)
    assert model.contraction_factor() == pytest.approx(0.55)
    sizes = model(inputs(), steps=200, keep_states=True).states.diff(dim=1).norm(dim=2)
    assert sizes[:, -1].max() < 1e-12


def test_a_gate_can_expand_in_the_plain_norm_and_contracts_in_its_own():
    gate = torch.tensor([0.1, 0.9], dtype=torch.float64)
    J = 0.9 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    step = torch.diag(1 - gate) + torch.diag(gate) @ J
    root = gate.sqrt()
    own = torch.diag(1 / root) @ step @ torch.diag(root)
    assert torch.linalg.matrix_norm(step, 2).item() == pytest.approx(1.218, abs=1e-3)
    assert torch.linalg.matrix_norm(own, 2) <= step_factor(gate, 0.9)
    assert step_factor(gate, 0.9) == pytest.approx(0.99)


# Gradients


@pytest.mark.parametrize("mode", MODES)
def test_only_the_last_readout_carries_a_gradient(mode):
    model, x = build(mode), inputs()
    trajectory = model(x)
    early = trajectory.logits[:, :-1].sum()
    gradients = torch.autograd.grad(early, list(model.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in gradients)
    last = torch.autograd.grad(trajectory.final.square().sum(), list(model.parameters()), allow_unused=True)
    unused = {name for (name, _), g in zip(model.named_parameters(), last, strict=True) if g is None}
    assert unused == {"halting.weight", "halting.bias"}


@pytest.mark.parametrize("how", ["build", "call"])
def test_all_readouts_carry_a_gradient_if_asked_for(how):
    model = build(supervise="all") if how == "build" else build()
    trajectory = model(inputs()) if how == "build" else model(inputs(), supervise="all")
    (gradient,) = torch.autograd.grad(trajectory.logits[:, 0].square().sum(), model.classifier.weight)
    assert gradient.any()


@pytest.mark.parametrize("detach", [False, True])
def test_halting_scores_reach_the_backbone_unless_detached(detach):
    model = build(detach_halt=detach)
    model(inputs()).scores.sum().backward()
    assert model.halting.weight.grad.any()
    assert (model.stem.map.weight.grad is None) == detach


def test_gradients_are_those_of_the_unrolled_equations():
    model = build(width=4, steps=3)
    parameters = dict(model.named_parameters())

    def loss(*values):
        named = dict(zip(parameters, values, strict=True))
        trajectory = torch.func.functional_call(model, named, (inputs(2),))
        return trajectory.final, trajectory.scores

    values = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("mode", [*MODES, "vanilla", "basic_ssm"])
def test_steps_can_be_computed_again_instead_of_kept(mode, monkeypatch):
    # An emulated device that an earlier test registered would be asked for an autocast, which it has not.
    monkeypatch.setattr(DefaultDeviceType, "_default_device_type", "cpu")
    models = [build(mode, steps=20, checkpoint=checkpoint) for checkpoint in (False, True)]
    x = inputs(50)
    first, second = (model(x).final.square().sum() for model in models)
    torch.testing.assert_close(first, second)
    for loss in (first, second):
        loss.backward()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    kept, again = (saved_tensor_bytes(lambda: model(x).final, model.parameters()) for model in models)  # noqa: B023
    assert again < 0.5 * kept


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_the_scale_keeps_its_range_while_it_is_learned(form):
    mode = "certified" if form == "sigmoid" else "euler"
    model = build(mode, scale_parameter=form)
    optimizer = torch.optim.SGD([model.rho], lr=1.0)
    for direction in (1.0, -1.0):
        for _ in range(100):
            optimizer.zero_grad()
            (direction * model.scale).backward()
            optimizer.step()
            assert 1e-3 <= model.scale <= (2 if form == "exp" else 1)
        if form == "sigmoid":
            assert model.contraction_factor() < 1


def test_weight_decay_spares_scale_biases_and_norms():
    model = build("gated", readout_norm=True, learn_hurst=True)
    decayed, spared = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"rho", "hurst", "halting.bias", "readout_norm.weight"} <= {names[id(p)] for p in spared["params"]}
    assert {"B.weight", "gate.weight", "transition.weight1"} <= {names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


# Depth, batches, devices, precision


def test_tied_steps_run_beyond_training_and_the_certified_state_settles():
    model, x = build(), inputs()
    assert model(x, steps=100).logits.shape == (6, 100, 3)
    torch.testing.assert_close(model(x, steps=7).logits, model(x).logits[:, :7])
    settled = model(x, steps=400, keep_states=True).states
    assert (settled[:, -1] - settled[:, -2]).norm() < 1e-8


def test_one_step_one_sample_one_class():
    model = vector(5, 1, steps=1)
    trajectory = model(torch.randn(1, 5))
    assert trajectory.logits.shape == (1, 1, 1)
    trajectory.final.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_fine_in_inference_and_refused_in_training(mode, device):
    model = build(mode, dtype=torch.float32, device=device)
    empty = torch.zeros(0, 5).to(device)
    with pytest.raises(ValueError, match="must not be empty in training"):
        model(empty)
    trajectory = model.eval()(empty, keep_states=True)
    assert trajectory.logits.shape == (0, 12, 3)
    assert trajectory.scores.shape == (0, 12)
    assert trajectory.states.shape == (0, 13, WIDTH)
    assert sequence(2, 3, width=6, mode=mode).eval()(torch.zeros(0, 2, 5)).final.shape == (0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_context_can_be_cut_to_some_samples(mode):
    model, x = build(mode), inputs()
    context, h = model.inject(x), inputs(features=WIDTH)
    for index in (torch.tensor([4, 1]), torch.tensor([0, 1, 0, 0, 1, 0]).bool()):
        part = context.select(index)
        torch.testing.assert_close(model.step(h[index], part), model.step(h, context)[index])
        torch.testing.assert_close(model.read(h[index], part), model.read(h, context)[index])
        assert all(a is b for a, b in zip(part.shared, context.shared, strict=True))
    assert isinstance(part, Context)


@pytest.mark.parametrize("mode", MODES)
def test_samples_do_not_influence_each_other(mode):
    """A NaN spoils its own row, and nothing else."""
    model, x = build(mode), inputs()
    clean = model(x)
    x[2, 0] = math.nan
    spoiled = model(x)
    others = torch.arange(6) != 2
    torch.testing.assert_close(spoiled.logits[others], clean.logits[others])
    torch.testing.assert_close(spoiled.scores[others], clean.scores[others])
    assert spoiled.scores[2].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_compute_the_same(mode):
    model, x = build(mode, dtype=torch.float32), inputs(dtype=torch.float32)
    assert torch.equal(model.train()(x).logits, model.eval()(x).logits)


def test_layout_of_the_input_does_not_matter():
    model = sequence(2, 3, width=6, generator=seeded())
    x = torch.randn(4, 7, 2)
    torch.testing.assert_close(model(x.mT).logits, model(x.mT.contiguous()).logits)


@pytest.mark.parametrize("mode", MODES)
def test_forward_and_backward_run_on_every_device(mode, device):
    for model, x in (
        (vector(5, 3, width=8, steps=3, mode=mode, device=device, generator=seeded()), torch.randn(4, 5)),
        (
            sequence(2, 3, width=6, steps=3, mode=mode, device=device, generator=seeded()),
            torch.randn(4, 2, 7),
        ),
    ):
        trajectory = model(x.to(device))
        (
            F.cross_entropy(trajectory.final, torch.arange(4).to(device) % 3) + trajectory.scores.mean()
        ).backward()
        assert all(p.grad is not None and p.grad.device.type == device.type for p in model.parameters())
        assert trajectory.state.device.type == device.type


@pytest.mark.parametrize("mode", MODES)
def test_the_state_stays_in_single_precision_under_autocast(mode):
    model, x = build(mode, dtype=torch.float32), inputs(dtype=torch.float32)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, keep_states=True)
        half.final.float().sum().backward()
    assert half.states.dtype == half.state.dtype == torch.float32
    assert half.logits.dtype == half.scores.dtype == torch.float32  # ranks and thresholds compare them
    torch.testing.assert_close(half.logits, full.logits, rtol=0.1, atol=0.1)
    increments = half.states.diff(dim=1)
    assert not torch.equal(increments, increments.bfloat16().float())


def test_training_under_autocast_stays_finite():
    model, x = build(dtype=torch.float32), inputs(64, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=3e-3)
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trajectory = model(x)
        loss = F.cross_entropy(trajectory.final, y)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert 0 < model.scale < 1


def test_a_saved_model_decides_bit_for_bit_alike():
    model, other, x = build(kappa=0.8), build(seed=7, kappa=0.9), inputs()
    train(model, x, torch.arange(6) % 3, 3)
    model.set_kappa(0.85)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x).scores, model(x).scores)
    assert torch.equal(other(x).logits, model(x).logits)
    assert other.contraction_factor() == model.contraction_factor()
    assert {"rho", "hurst", "transition.kappa"} <= model.state_dict().keys()


@pytest.mark.parametrize("mode", MODES)
def test_the_step_compiles_as_one_graph(mode):
    model, x = build(mode), inputs()
    context, h = model.inject(x), inputs(features=WIDTH)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(h, context, 1), model.step(h, context, 1))


def test_weights_are_normalised_once_per_forward_pass(monkeypatch):
    model, calls = build(), []
    original = type(model.transition)._weights
    monkeypatch.setattr(type(model.transition), "_weights", lambda self: calls.append(1) or original(self))
    model(inputs(), steps=20)
    assert len(calls) == 1


def test_without_gradients_weights_are_kept_until_they_change(monkeypatch):
    model, calls = build(), []
    original = type(model.transition)._weights
    monkeypatch.setattr(type(model.transition), "_weights", lambda self: calls.append(1) or original(self))
    x = inputs()
    with torch.no_grad():
        first = model(x).final
        assert torch.equal(model(x).final, first)
    with torch.inference_mode():
        assert torch.equal(model(x).final, first)
    assert len(calls) == 1
    changes = [
        lambda: model.transition.weights[0].data[0, 0].add_(1.0),  # no version counter sees this
        lambda: model.set_kappa(0.5),
        lambda: model.load_state_dict(build(seed=5).state_dict()),
        lambda: model.float(),
    ]
    for count, change in enumerate(changes, start=2):
        with torch.no_grad():
            change()
            x = x.to(model.rho.dtype)
            kept = model(x).final
        torch.testing.assert_close(kept, model(x).final)
        assert len(calls) == 2 * count - 1  # once without gradients, and every time with them


def test_a_context_made_in_inference_mode_serves_a_later_gradient():
    model, x = build(), inputs()
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        context = model.inject(x)
    assert jacobian_norms(model, inputs(features=WIDTH), context).max() <= model.contraction_factor() + 1e-9


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("newton"), "mode must be one of"),
        (lambda: build(steps=0), "steps must be at least 1"),
        (lambda: build(width=0), "must be at least 1"),
        (lambda: vector(5, 0), "classes must be at least 1"),
        (lambda: build(hurst=0.0), "hurst must lie in"),
        (lambda: build(hurst=1.1), "hurst must lie in"),
        (lambda: build("euler", scale=0.0), "scale must lie in"),
        (lambda: build("euler", scale=-1.0), "scale must lie in"),
        (lambda: build("euler", scale=2.5), "scale must lie in"),
        (lambda: build(scale=1.0), "scale must lie in"),
        (lambda: build(scale=math.nan), "scale must lie in"),
        (lambda: build(kappa=1.0), "kappa must lie in"),
        (lambda: build(kappa=-0.1), "kappa must lie in"),
        (lambda: build().set_kappa(1.0), "kappa must lie in"),
        (lambda: build("euler").set_kappa(0.5), "kappa belongs to certified"),
        (lambda: build(scale_parameter="exp"), "scale_parameter must be 'sigmoid'"),
        (lambda: build("euler", scale_parameter="softplus"), "scale_parameter must be"),
        (lambda: build(initial="random"), "initial must be"),
        (lambda: build(supervise="first"), "supervise must be"),
        (lambda: build().parameter_groups(-1.0), "weight_decay must not be negative"),
        (lambda: build()(inputs(), steps=0), "steps must be at least 1"),
        (lambda: build()(inputs(), supervise="none"), "supervise must be"),
        (lambda: build()(inputs().long()), "inputs must be floating point"),
        (lambda: build()(inputs(features=4)), r"inputs must be \(N, 5\)"),
        (lambda: linear_model("certified", 0.5, 0.5), "needs a transition with a constant"),
        (lambda: linear_model("euler", 0.5, 0.5, axes=0, read_position=0), "read_position is for sequences"),
        (lambda: linear_model("euler", 0.5, 0.5, axes=1)(inputs()), "stem must give"),
        (lambda: linear_model("euler", torch.ones(2, 1, 1), 0.5)(inputs()), "transition must keep the shape"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
