"""The encoder: shapes, padding, the loss, prototypes set to tokens, depth, and the compact copy."""

import copy
import math

import pytest
import torch
from torch import nn

from geomlib.incrt import GrowthController, SelfOrganisingEncoder, compact


def encoder(seed=0, **options):
    settings = {"vocabulary": 5, "d": 16, "dk": 6, "dv": 4, "max_heads": 5, "prototypes": 8, "outputs": 5}
    if "in_features" in options:
        settings.pop("vocabulary")
    generator = torch.Generator().manual_seed(seed)
    return SelfOrganisingEncoder(**settings | options, generator=generator)


def symbols(*shape, seed=1):
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ffn", ["ddcl", "mlp"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"outputs": 3}, (4, 7, 3)),
        ({"outputs": (2, 3)}, (4, 7, 2, 3)),
        ({"outputs": 3, "pool": "mean"}, (4, 3)),
        ({"outputs": (2, 3), "pool": "mean"}, (4, 2, 3)),
    ],
)
def test_every_token_is_read_or_their_mean(ffn, options, shape):
    output = encoder(ffn=ffn, **options)(symbols(4, 7))
    assert output.logits.shape == shape
    assert len(output.quantisation) == (ffn == "ddcl")


def test_real_inputs_and_tokens_are_embedded():
    model = encoder(in_features=3, layers=2)
    assert model(torch.zeros(4, 7, 3)).logits.shape == (4, 7, 5)
    with pytest.raises(ValueError, match="x must be"):
        model(symbols(4, 7))
    with pytest.raises(ValueError, match="x must be"):
        encoder()(torch.zeros(4, 7, 3))


def test_an_encoder_computes_where_its_parameters_are(device):
    model, reference = encoder(device=device), encoder()
    x = symbols(4, 7)
    out = model(x.to(device))
    model.structure_loss()(out, x.to(device)).backward()
    reference.structure_loss()(reference(x), x).backward()
    torch.testing.assert_close(out.logits.detach().cpu(), reference.eval()(x).logits.detach())
    grads = [(p.grad.cpu(), q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", [None, "mean"])
def test_padding_changes_neither_outputs_nor_the_loss_of_the_dictionary(pool):
    model = encoder(pool=pool, layers=2).eval()
    x = symbols(3, 5)
    mask = torch.arange(9).expand(3, 9) < 5
    longer = torch.cat([x, symbols(3, 4, seed=8)], 1)
    plain, padded = model(x), model(longer, mask)
    logits = padded.logits if pool else padded.logits[:, :5]
    torch.testing.assert_close(logits, plain.logits, rtol=0, atol=1e-6)
    for ours, theirs in zip(padded.quantisation, plain.quantisation, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)


def test_a_row_of_padding_alone_gives_numbers_and_gradients():
    model = encoder(pool="mean")
    mask = torch.tensor([[True] * 4, [False] * 4])
    output = model(symbols(2, 4), mask)
    model.structure_loss()(output, torch.tensor([0, 1])).backward()
    assert output.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_causal_encoder_does_not_look_ahead():
    model = encoder(causal=True, layers=2).eval()
    x, other = symbols(1, 6), symbols(1, 6)
    other[:, 4:] = (other[:, 4:] + 1) % 5
    torch.testing.assert_close(model(x).logits[:, :4], model(other).logits[:, :4])


def test_the_loss_is_the_task_plus_the_dictionaries_over_the_width():
    model = encoder(layers=2)
    x, y = symbols(4, 7), symbols(4, 7, seed=3)
    y[:, 0] = -100
    output = model(x)
    task = nn.functional.cross_entropy(output.logits[:, 1:].flatten(0, 1), y[:, 1:].flatten())
    dictionaries = sum(q.loss for q in output.quantisation) / 16
    torch.testing.assert_close(model.structure_loss(0.3)(output, y), task + 0.3 * dictionaries)
    torch.testing.assert_close(model.structure_loss(0.0)(output, y), task)
    other = model.structure_loss(0.0, task=lambda logits, _: logits.square().mean())
    torch.testing.assert_close(other(output, y), output.logits.square().mean())
    with pytest.raises(ValueError, match="beta must not be negative"):
        model.structure_loss(-1.0)


def test_prototypes_are_set_to_tokens_that_each_layer_sees():
    model = encoder(layers=2)
    x, seen = symbols(16, 9), []
    steps = [int(layer.feed_forward.temperature.steps) for layer in model.layers]
    model.initialise_prototypes(x, generator=torch.Generator().manual_seed(0))
    assert model.training
    assert [int(layer.feed_forward.temperature.steps) for layer in model.layers] == steps
    for layer in model.layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    model.eval()(x)
    for layer, tokens in zip(model.layers, seen, strict=True):
        # The noise has a hundredth of the spread of the tokens in each of 16 directions.
        nearest = torch.cdist(layer.feed_forward.prototypes, tokens).amin(1)
        assert nearest.max() < 0.1


@pytest.mark.parametrize("ffn", ["ddcl", "mlp"])
@pytest.mark.parametrize("out", ["barycentre", "value"])
def test_a_new_layer_preserves_the_function_to_the_bit_and_learns(ffn, out):
    model = encoder(max_layers=3, ffn=ffn, dictionary={"out": out})
    x = symbols(4, 7)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.structure_loss()(model(x), x).backward()
    optimizer.step()
    model.eval()
    before = model(x).logits
    assert model.deepen() == 1
    assert torch.equal(model(x).logits, before)
    assert model.depth == len(model.heads) == 2
    model.train()
    optimizer.zero_grad()
    model.structure_loss()(model(x), x).backward()
    optimizer.step()
    # An untouched layer had no gradient until now, so that its own count of steps begins.
    assert optimizer.state[model.layers[1].attention.W_out]["step"] == 1
    assert (model.layers[1].attention.W_O != 0).any()
    assert model.layers[2].attention.W_out.grad is None
    model.deepen()
    with pytest.raises(ValueError, match="max_layers must exceed"):
        model.deepen()


def test_a_state_dict_restores_depth_and_heads():
    model = encoder(max_layers=3)
    model.layers[0].attention.grow()
    model.deepen()
    other = encoder(max_layers=3, seed=9)
    other.load_state_dict(model.state_dict())
    x = symbols(4, 7)
    assert (other.depth, other.heads) == (2, [2, 1])
    assert torch.equal(other.eval()(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize(
    "options", [{}, {"layers": 2, "max_layers": 3}, {"slots": "mask"}, {"aggregate": "mean"}, {"ffn": "mlp"}]
)
def test_the_compact_copy_is_the_same_function_without_empty_slots(options):
    model = encoder(**options)
    GrowthController(model, torch.optim.Adam(model.parameters()))
    attention = model.layers[0].attention
    for _ in range(3):
        attention.grow()
    with torch.no_grad():
        attention.W_out[: attention.active] = torch.randn(4, 4, 16)
    attention.prune(1)
    x = symbols(4, 7)
    expected = model.eval()(x).logits
    small = model.compact()
    torch.testing.assert_close(small(x).logits, expected, rtol=0, atol=1e-6)
    assert not small.training
    assert small.layers[0].attention.W_in.shape[0] == small.heads[0] == 3
    assert len(small.layers) == model.depth
    names = small.state_dict()
    assert not any("growth" in name or "structure" in name for name in names)
    assert all(layer.attention.W_out.shape[0] == layer.attention.active for layer in small.layers)
    # The original stays as it was, and so does a copy of the copy.
    assert model.layers[0].attention.W_in.shape[0] == 5
    torch.testing.assert_close(copy.deepcopy(small)(x).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(compact(small)(x).logits, expected, rtol=0, atol=1e-6)


def test_layer_norms_have_a_gain_only_if_asked():
    assert not any("norm" in name for name, _ in encoder().named_parameters())
    assert sum("norm" in name for name, _ in encoder(affine=True).named_parameters()) == 6


def test_every_layer_has_a_temperature_of_its_own():
    from geomlib.incrt import Temperature

    model = encoder(layers=2, dictionary={"temperature": Temperature(total_steps=5)})
    first, second = (layer.feed_forward.temperature for layer in model.layers)
    assert first is not second


def test_sinusoids_tell_places_apart_for_odd_widths_as_well():
    model = encoder(d=15, max_heads=3)
    stream = model.embed(torch.zeros(1, 6, dtype=torch.int64))[0]
    assert torch.pdist(stream).min() > 0.1
    assert encoder(positions=None).embed(torch.zeros(1, 6, dtype=torch.int64))[0].std(0).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 3, "vocabulary": 5}, "exactly one of"),
        ({"vocabulary": None}, "exactly one of"),
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"layers": 2, "max_layers": 1}, "max_layers must be at least"),
        ({"outputs": 0}, "outputs must be"),
        ({"outputs": (1, 2, 3)}, "outputs must be"),
        ({"ffn": "conv"}, "ffn must be"),
        ({"pool": "max"}, "pool must be"),
        ({"positions": "rotary"}, "positions must be"),
        ({"prototypes": 0}, "K must be at least 1"),
        ({"max_heads": 17}, "max_heads must lie in"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_the_first_loss_is_near_that_of_guessing():
    x = symbols(64, 12)
    loss = encoder().structure_loss(0.0)(encoder()(x), x)
    assert abs(loss.item() - math.log(5)) < 1.0
