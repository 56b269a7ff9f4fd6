"""Growth from end to end on a task with a planted number of heads, and the guard against collapse."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

from geomlib.incrt import (
    GrowthConfig,
    GrowthController,
    SelfOrganisingEncoder,
    covariance,
    effective_rank,
    multi_offset_copy,
    separation,
    used_codes,
)

STEPS, BATCH, HELD_OUT = 1500, 32, 500


class Grown(NamedTuple):
    model: SelfOrganisingEncoder
    controller: GrowthController
    accuracy: float
    rank: float
    scatter: float
    codes: int


def task(logits, y):
    return cross_entropy(logits.flatten(0, -2), y.flatten())


@cache
def grown(offsets, seed, motor="grad", steps=STEPS, guarded=True):
    """Train one layer on the copy of `offsets` predecessors, with heads that grow."""
    generator = torch.Generator().manual_seed(seed)
    model = SelfOrganisingEncoder(
        vocabulary=5, d=32, dk=12, dv=4, max_heads=12, prototypes=16, outputs=(offsets, 5),
        dictionary={"temperature": 4.0, "stop_grad": guarded}, affine=not guarded, generator=generator,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    # No births once the task is solved: at a constant rate the loss has spikes, and the signal with it.
    options = {"dwell": 350, "loss_floor": 0.1} if motor == "grad" else {"frac": 0.1, "dwell": 100}
    controller = GrowthController(model, optimizer, GrowthConfig(motor=motor, **options), generator=generator)
    loss = model.structure_loss(1.0, task=controller.watch(task))
    data = multi_offset_copy(BATCH * steps + HELD_OUT, offsets=offsets, generator=generator)
    for x, y in zip(data.x[:-HELD_OUT].split(BATCH), data.y[:-HELD_OUT].split(BATCH), strict=True):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        controller.step()
    model.eval()
    seen = []
    model.layers[0].feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, y = data.x[-HELD_OUT:], data.y[-HELD_OUT:]
    with torch.no_grad():
        output = model(x)
    right = (output.logits.argmax(-1) == y)[y >= 0].double().mean().item()
    spread = covariance(seen[0].flatten(0, 1))
    codes = int(used_codes(output.quantisation[0].q))
    return Grown(model, controller, right, effective_rank(spread).item(), spread.trace().item(), codes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("offsets", "slack"), [(1, 0), (2, 1), (3, 1)])
def test_growth_driven_by_the_loss_stops_near_the_planted_number(offsets, slack, seed):
    run = grown(offsets, seed)
    assert abs(run.model.heads[0] - offsets) <= slack
    assert run.accuracy >= 0.97


@pytest.mark.slow
def test_growth_driven_by_the_heads_goes_on():
    """The task is solved by one, and the signal does not fall below the threshold."""
    run = grown(1, 0, motor="heads", steps=500)
    last = run.controller.history[-1]
    assert run.model.heads[0] >= 4
    assert last.signal > last.threshold


@pytest.mark.slow
def test_a_guarded_dictionary_keeps_its_codes_and_an_unguarded_one_shrinks_its_tokens():
    guarded = grown(3, 0)
    assert guarded.rank > 2
    assert guarded.codes >= 4
    short = grown(3, 0, steps=400)
    with pytest.warns(UserWarning, match="the tokens of layer 0 have collapsed"):
        bare = grown(3, 0, steps=400, guarded=False)
    assert bare.scatter < 0.5 * short.scatter
    closest = separation(bare.model.layers[0].feed_forward.prototypes).minimum
    assert closest < 0.1 * separation(short.model.layers[0].feed_forward.prototypes).minimum
