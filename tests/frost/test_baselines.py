"""The three baselines: their equations, what they share with Frost, and where they end."""

import pytest
import torch
import torch.nn.functional as F

from geomlib.frost import Prepared, jacobian_norms, sequence, vector

BASELINES = ["vanilla", "recurrent", "basic_ssm"]


def build(mode, **options):
    options = {"width": 8, "steps": 5, "generator": torch.Generator().manual_seed(0), **options}
    return vector(5, 3, mode=mode, **options)


def test_vanilla_adds_a_block_of_its_own_at_each_step():
    model, x = build("vanilla"), torch.randn(4, 5)
    h = model.stem(x)
    states = [h]
    for block in model.transitions:
        h = h + block(h, Prepared())
        states.append(h)
    torch.testing.assert_close(model(x, keep_states=True).states, torch.stack(states, 1))
    torch.testing.assert_close(model(x).final, model.classifier(h))


def test_recurrent_adds_one_block_again_and_again():
    model, x = build("recurrent"), torch.randn(4, 5)
    h = model.stem(x)
    for _ in range(5):
        h = h + model.transition(h, Prepared())
    torch.testing.assert_close(model(x).state, h)
    torch.testing.assert_close(model(x).final, model.classifier(h))


def test_basic_ssm_injects_the_input_at_every_step():
    model, x = build("basic_ssm"), torch.randn(4, 5)
    features = model.stem(x)
    h = features
    for _ in range(5):
        h = h + model.transition(h, Prepared()) + model.B(features)
    torch.testing.assert_close(model(x).state, h)
    torch.testing.assert_close(model(x).final, model.classifier(model.C(h) + model.D(features)))


def test_basic_ssm_is_the_euler_mode_at_scale_one():
    model, frost, x = build("basic_ssm"), build("euler", scale=1.0), torch.randn(4, 5)
    own = model.state_dict()
    frost.load_state_dict({name: own.get(name, value) for name, value in frost.state_dict().items()})
    torch.testing.assert_close(frost(x).logits, model(x).logits)


@pytest.mark.parametrize("mode", BASELINES)
def test_forward_is_inject_start_step_read_score(mode):
    model, x = sequence(2, 3, width=8, steps=4, mode=mode), torch.randn(4, 2, 6)
    trajectory, context = model(x), model.inject(x)
    h = model.start(context)
    assert torch.equal(h, context.x)
    for t in range(1, 5):
        h = model.step(h, context, t)
        torch.testing.assert_close(trajectory.logits[:, t - 1], model.read(h, context))
        torch.testing.assert_close(trajectory.scores[:, t - 1], model.score(h))
        part = context.select(torch.tensor([2, 0]))
        torch.testing.assert_close(model.read(h[[2, 0]], part), model.read(h, context)[[2, 0]])


@pytest.mark.parametrize("mode", BASELINES)
def test_all_parameters_learn_on_every_device(mode, device):
    model = build(mode, device=device, readout_norm=True)
    trajectory = model(torch.randn(4, 5).to(device))
    (F.cross_entropy(trajectory.final, torch.arange(4).to(device) % 3) + trajectory.scores.mean()).backward()
    assert all(p.grad is not None and p.grad.device.type == device.type for p in model.parameters())


@pytest.mark.parametrize("mode", BASELINES)
def test_the_state_stays_in_single_precision_under_autocast(mode):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build(mode)(torch.randn(4, 5)).state.dtype == torch.float32


def test_tied_baselines_run_on_and_the_untied_one_ends():
    x = torch.randn(4, 5)
    for mode in ("recurrent", "basic_ssm"):
        assert build(mode)(x, steps=30).logits.shape == (4, 30, 3)
    model = build("vanilla")
    assert model(x, steps=3).logits.shape == (4, 3, 3)
    with pytest.raises(ValueError, match="steps must be at most 5, got 6"):
        model(x, steps=6)
    context = model.inject(x)
    for t in (0, 6):
        with pytest.raises(ValueError, match="t must lie in"):
            model.step(context.x, context, t)


@pytest.mark.parametrize("mode", BASELINES)
def test_no_baseline_has_a_certificate_nor_contracts(mode):
    model = build(mode)
    context = model.inject(torch.randn(20, 5))
    assert model.contraction_factor() is None
    assert jacobian_norms(model, context.x, context).max() > 1


@pytest.mark.parametrize("mode", BASELINES)
def test_an_empty_batch_is_fine_in_inference_and_refused_in_training(mode):
    model = build(mode)
    with pytest.raises(ValueError, match="must not be empty in training"):
        model(torch.zeros(0, 5))
    assert model.eval()(torch.zeros(0, 5)).logits.shape == (0, 5, 3)
