"""Heads that come and go: births that change nothing, sums over heads, padding, what an optimiser knows."""

import copy

import pytest
import torch
from torch.nn.functional import layer_norm

from geomlib.incrt import DirectionalAttention, SlotClock, slot_state
from geomlib.incrt.optimiser import SETTLED

D = 12


def tokens(*shape, seed=1, dtype=torch.float32, device=None):
    x = torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return layer_norm(x, [D]).to(device)


def attention(*, dk=5, dv=3, heads=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return DirectionalAttention(D, dk, dv, max_heads=6, heads=heads, generator=generator, **options)


def by_hand(layer, x, mask=None):
    """One head after the other, from the formula."""
    n = x.shape[1]
    out = torch.zeros_like(x)
    for head in range(layer.active):
        M = layer.W_Q[head] @ layer.W_K[head].T
        logits = x @ M @ x.mT / layer.dk**0.5
        seen = torch.ones(len(x), n, n, dtype=torch.bool)
        if layer.causal:
            seen &= torch.ones(n, n, dtype=torch.bool).tril()
        if mask is not None:
            seen &= mask[:, None, :]
        # A row that sees nothing is one of padding, and counts nothing below.
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        out = out + weights @ x @ layer.W_V[head] @ layer.W_O[head]
    if mask is not None:
        out = out * mask.unsqueeze(-1)
    return out / layer.active if layer.aggregate == "mean" else out


@pytest.mark.parametrize(("dk", "dv"), [(5, 3), (3, 5), (4, 4), (1, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_fused_call_is_the_sum_over_heads(dk, dv, causal, aggregate, padded):
    layer = attention(dk=dk, dv=dv, heads=3, causal=causal, aggregate=aggregate, dtype=torch.float64)
    x = tokens(4, 7, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None] if padded else None
    torch.testing.assert_close(layer(x, mask), by_hand(layer, x, mask))
    torch.testing.assert_close(layer.head_outputs(x, mask).sum(1), by_hand(layer, x, mask))


@pytest.mark.parametrize("slots", ["prefix", "mask"])
def test_a_layer_computes_where_its_parameters_are(device, slots):
    layer = attention(heads=2, slots=slots, device=device)
    reference = attention(heads=2)
    x, mask = tokens(3, 5), torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    out = layer(x.to(device), mask.to(device))
    out.square().sum().backward()
    expected = reference(x, mask)
    expected.square().sum().backward()
    torch.testing.assert_close(out.detach().cpu(), expected.detach())
    torch.testing.assert_close(layer.W_in.grad.cpu(), reference.W_in.grad)
    assert layer.grow() == 2


def test_attention_weights_are_those_of_the_formula():
    layer = attention(dtype=torch.float64, causal=True)
    x = tokens(2, 5, dtype=torch.float64)
    weights = layer.weights(x)
    mixed = weights @ (x.unsqueeze(1) @ layer.W_V) @ layer.W_O
    torch.testing.assert_close(mixed, layer.head_outputs(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))


def test_padding_changes_nothing_and_an_empty_row_is_zero():
    layer = attention()
    x = tokens(2, 4)
    longer = torch.cat([x, 1e3 * tokens(2, 3, seed=9)], 1)
    mask = torch.arange(7).expand(2, 7) < 4
    out = layer(longer, mask)
    torch.testing.assert_close(out[:, :4], layer(x), rtol=0, atol=1e-6)
    assert (out[:, 4:] == 0).all()
    empty = layer(x, torch.zeros(2, 4, dtype=torch.bool))
    assert (empty == 0).all()
    layer.W_in.grad = None
    layer(x, torch.zeros(2, 4, dtype=torch.bool)).sum().backward()
    assert (layer.W_in.grad == 0).all()


def test_a_causal_layer_does_not_look_ahead():
    layer = attention(causal=True)
    x = tokens(1, 6)
    other = x.clone()
    other[:, 4:] = tokens(1, 2, seed=5)
    torch.testing.assert_close(layer(x)[:, :4], layer(other)[:, :4])
    assert not torch.allclose(layer(x)[:, 4:], layer(other)[:, 4:])


# Births.


@pytest.mark.parametrize("slots", ["prefix", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_birth_preserves_the_function(slots, dtype):
    """To the bit if all slots are computed; else other shapes may sum in another order."""
    x = tokens(4, 7, dtype=dtype)
    for seed in range(5):
        layer = attention(slots=slots, seed=seed, dtype=dtype)
        for birth in range(4):
            before = layer(x)
            layer.grow(*tokens(2, seed=birth).to(dtype))
            change = (layer(x) - before).abs().max()
            assert change == 0 if slots == "mask" else change < (1e-5 if dtype == torch.float32 else 1e-14)
    assert layer.active == 6


def test_a_mean_over_heads_does_not_preserve_the_function():
    x = tokens(4, 7)
    layer = attention(heads=3, aggregate="mean", slots="mask")
    before = layer(x)
    layer.grow()
    # Three quarters are left, whatever the new head does.
    torch.testing.assert_close(layer(x), 0.75 * before)


def test_at_birth_only_the_output_of_the_head_has_a_gradient():
    layer = attention(dtype=torch.float64)
    x, weight = tokens(4, 7, dtype=torch.float64), tokens(4, 7, seed=2, dtype=torch.float64)
    before = (layer(x) * weight).sum()
    slot = layer.grow(*tokens(2, seed=3, dtype=torch.float64))
    loss = (layer(x) * weight).sum()
    loss.backward()
    torch.testing.assert_close(loss, before)
    assert (layer.W_in.grad[slot] == 0).all()
    assert (layer.W_out.grad[slot] != 0).any()
    assert (layer.W_out.grad[slot + 1 :] == 0).all()


def test_a_head_is_born_looking_along_its_direction():
    layer = attention()
    u, v = tokens(2)
    slot = layer.grow(u, v, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(layer.W_Q[slot, :, 0], u / u.norm())
    torch.testing.assert_close(layer.W_K[slot, :, 0], v / v.norm())
    assert (layer.W_O[slot] == 0).all()
    again = attention()
    again.grow(u, v, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again.W_in, layer.W_in)


def test_a_birth_keeps_parameters_and_their_identity():
    layer = attention()
    before = {name: (id(p), p[:2].clone()) for name, p in layer.named_parameters()}
    layer.grow()
    for name, parameter in layer.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter[:2], before[name][1])


# Removals.


def test_a_removal_takes_exactly_the_rows_of_the_head():
    x = tokens(3, 5, dtype=torch.float64)
    for head in range(4):
        layer = attention(heads=4, dtype=torch.float64)
        outputs, before = layer.head_outputs(x), layer(x)
        layer.prune(head)
        torch.testing.assert_close(before - layer(x), outputs[:, head])


def test_the_last_active_head_takes_the_slot_that_falls_free():
    layer = attention(heads=4)
    W_in, W_out = layer.W_in.detach().clone(), layer.W_out.detach().clone()
    assert layer.prune(1) == 3
    assert layer.active == 3
    order = [0, 3, 2]
    assert torch.equal(layer.W_in[:3], W_in[order])
    assert torch.equal(layer.W_out[:3], W_out[order])
    assert (layer.W_in[3:] == 0).all()
    assert layer.births.tolist() == [0, 3, 2, -1, -1, -1]


def test_the_last_head_stays():
    layer = attention(heads=1)
    with pytest.raises(ValueError, match="must not be the last one"):
        layer.prune(0)
    assert layer.active == 1


def test_a_state_dict_restores_the_number_of_heads_and_holds_none_that_is_gone():
    layer = attention(heads=3)
    layer.grow()
    layer.prune(0)
    other = attention(heads=1, seed=5)
    other.load_state_dict(layer.state_dict())
    x = tokens(2, 5)
    assert other.active == 3
    assert torch.equal(other(x), layer(x))
    state = layer.state_dict()
    assert (state["W_in"][3:] == 0).all()
    assert (state["W_out"][3:] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"dk": 0}, "dk must be at least 1"),
        ({"dv": 0}, "dv must be at least 1"),
        ({"heads": 7}, "max_heads must lie in"),
        ({"aggregate": "max"}, "aggregate must be"),
        ({"slots": "loop"}, "slots must be"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)


def test_more_heads_than_orthogonal_directions_are_refused():
    with pytest.raises(ValueError, match="no more orthogonal directions"):
        DirectionalAttention(4, 2, 2, max_heads=5)


def test_wrong_inputs_and_impossible_births_are_refused():
    layer = attention(heads=6)
    with pytest.raises(ValueError, match="every slot is taken"):
        layer.grow()
    with pytest.raises(ValueError, match="head must be one of"):
        layer.prune(6)
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.zeros(2, 5, D + 1))
    with pytest.raises(ValueError, match="mask must be bool"):
        layer(tokens(2, 5), torch.ones(2, 5))
    layer = attention()
    for u in (torch.zeros(D), torch.full((D,), torch.nan), torch.ones(D + 1)):
        with pytest.raises(ValueError, match="no direction"):
            layer.grow(u, torch.ones(D))
    with pytest.raises(ValueError, match="given together"):
        layer.grow(torch.ones(D))
    assert layer.active == 2


# What an optimiser knows.


def trained(optimizer, *, remedy="counter", steps=5, heads=2, dtype=torch.float32):
    """Return a layer in the middle of its training, whose optimiser has counted 5000 steps more."""
    layer = attention(heads=heads, dtype=dtype)
    optimizer = optimizer(layer.parameters())
    clock = SlotClock(optimizer, layer, torch.full((6,), SETTLED), remedy=remedy)
    x, target = tokens(4, 7, dtype=dtype), tokens(4, 7, seed=2, dtype=dtype)
    for _ in range(steps):
        step(layer, optimizer, x, target)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] += 5000
    return layer, optimizer, clock, x, target


def step(layer, optimizer, x, target):
    optimizer.zero_grad()
    (layer(x) - target).square().sum().backward()
    optimizer.step()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [adam, adamw, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)])
def test_a_birth_leaves_what_is_known_of_old_heads_as_it_was(optimizer):
    layer, optimizer, clock, _, _ = trained(optimizer, steps=5)
    before = copy.deepcopy([slot_state(optimizer, p) for p in layer.parameters()])
    clock.reset(layer.grow())
    for parameter, old in zip(layer.parameters(), before, strict=True):
        now = slot_state(optimizer, parameter)
        assert now.keys() == old.keys()
        assert now
        for name, value in now.items():
            assert torch.equal(value[:2], old[name][:2])
            assert (value[2] == 0).all()


def first_update(remedy, optimizer=adam):
    layer, optimizer, clock, x, target = trained(optimizer, remedy=remedy)
    clock.reset(layer.grow(*tokens(2, seed=3), generator=torch.Generator().manual_seed(4)))
    before = layer.W_out.detach()[2].clone()
    step(layer, optimizer, x, target)
    return (layer.W_out.detach()[2] - before).abs().max().item() / 1e-2


def test_a_young_head_moves_no_further_than_the_learning_rate_and_without_a_remedy_three_times_as_far():
    assert 0.99 <= first_update("counter") <= 1.001
    assert first_update("ramp") <= 1.2
    # A tenth over the root of a thousandth, less what the count of 5005 steps leaves uncorrected.
    assert first_update("none") == pytest.approx(0.1 / 0.001**0.5, rel=0.01)


def test_a_steady_gradient_moves_a_young_head_far_beyond_the_rate_unless_its_steps_are_counted():
    """Uncorrected moments make `(1 - 0.9^s) / sqrt(1 - 0.999^s)` of the rate, 6.6 at its peak."""
    furthest = {}
    for remedy in ("counter", "ramp", "none"):
        layer, optimizer, clock, _, _ = trained(adam, remedy=remedy)
        clock.reset(layer.grow())
        updates = []
        for _ in range(150):
            layer.W_in.grad, layer.W_out.grad = torch.zeros_like(layer.W_in), torch.ones_like(layer.W_out)
            before = layer.W_out.detach()[2].clone()
            optimizer.step()
            updates.append((layer.W_out.detach()[2] - before).abs().max().item() / 1e-2)
        furthest[remedy] = max(updates)
    assert furthest["counter"] <= 1.05
    assert 6 <= furthest["none"] <= 6.7
    assert furthest["ramp"] >= 3


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_counted_head_is_updated_as_if_it_had_an_optimiser_of_its_own(kind):
    """Until it settles; then the corrected moments stand in for a count.

    The guard against division by zero is no part of the correction, and is made small.
    """

    def optimizer(parameters):
        return kind(parameters, lr=1e-2, weight_decay=0.1, eps=1e-16)

    layer, shared, clock, x, target = trained(optimizer, dtype=torch.float64)
    clock.reset(
        layer.grow(*tokens(2, seed=3, dtype=torch.float64), generator=torch.Generator().manual_seed(4))
    )
    own_in = torch.nn.Parameter(layer.W_in.detach()[2].clone())
    own_out = torch.nn.Parameter(layer.W_out.detach()[2].clone())
    own = optimizer([own_in, own_out])
    for _ in range(SETTLED):
        shared.zero_grad()
        (layer(x) - target).square().sum().backward()
        own_in.grad, own_out.grad = layer.W_in.grad[2].clone(), layer.W_out.grad[2].clone()
        shared.step()
        own.step()
        torch.testing.assert_close(layer.W_out.detach()[2], own_out.detach())
        torch.testing.assert_close(layer.W_in.detach()[2], own_in.detach())
    assert clock.young == {}


def test_a_removal_takes_what_is_known_along():
    layer, optimizer, clock, _, _ = trained(adam, steps=5, heads=4)
    before = copy.deepcopy([slot_state(optimizer, p) for p in layer.parameters()])
    clock.ages[3] = 7
    clock.read()
    last = layer.prune(1)
    clock.move(last, 1)
    for parameter, old in zip(layer.parameters(), before, strict=True):
        for name, value in slot_state(optimizer, parameter).items():
            assert torch.equal(value[:3], old[name][[0, 3, 2]])
            assert (value[3] == 0).all()
    assert clock.young == {1: 7}


def test_removing_the_head_of_the_last_slot_leaves_the_others_alone():
    layer, optimizer, clock, x, _ = trained(adam, steps=5, heads=3)
    before, outputs = layer(x).detach(), layer.head_outputs(x).detach()
    last = layer.prune(2)
    clock.move(last, 2)
    torch.testing.assert_close(layer(x), before - outputs[:, 2])
    assert all((value[2] == 0).all() for value in slot_state(optimizer, layer.W_in).values())
    assert clock.young == {}


def test_a_schedule_multiplies_the_rate_once_for_all():
    """No parameter group is added, so that an old and a new head have one rate."""
    layer, optimizer, clock, x, target = trained(adam, steps=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10))
    for t in range(20):
        if t == 5:
            clock.reset(layer.grow(generator=torch.Generator().manual_seed(4)))
        step(layer, optimizer, x, target)
        schedule.step()
        assert schedule.get_last_lr() == [pytest.approx(1e-2 * min(1.0, (t + 2) / 10))]
    assert len(optimizer.param_groups) == 1


def test_an_optimiser_without_the_layer_and_unknown_remedies_are_refused():
    layer = attention()
    optimizer = adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="optimizer must hold"):
        SlotClock(optimizer, layer, torch.full((6,), SETTLED))
    with pytest.raises(ValueError, match="remedy must be one of"):
        SlotClock(adam(layer.parameters()), layer, torch.full((6,), SETTLED), remedy="pray")
