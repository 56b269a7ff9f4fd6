"""Under torch.compile: births do not compile anything anew, and statistics are those of the eager model.

With `slots="prefix"` the number of heads is symbolic from its first change on: one graph for the first
number, one for all others. With `slots="mask"` shapes never change. Steps that record have their own graphs.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from geomlib.incrt import GrowthConfig, GrowthController, SelfOrganisingEncoder, multi_offset_copy

COPY = multi_offset_copy(640, offsets=2, generator=torch.Generator().manual_seed(0))


def train(backend, *, slots="prefix", steps=60, layers=1, seed=0):
    """Train with a birth every ten steps; return model, controller, and graphs compiled so far by step."""
    generator = torch.Generator().manual_seed(seed)
    model = SelfOrganisingEncoder(
        vocabulary=5, d=16, dk=6, dv=4, max_heads=6, prototypes=8, outputs=(2, 5), slots=slots, layers=layers,
        generator=generator,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    config = GrowthConfig(
        theta=0.0, dwell=10, check_every=5, persistence=1, calibrate=(5, 5), prune=False, prototypes_at=5
    )
    forward = model if backend is None else torch.compile(model, backend=backend)
    controller = GrowthController(forward, optimizer, config, generator=generator)
    loss, graphs = model.structure_loss(), []
    for step in range(steps):
        rows = slice(step * 10, step * 10 + 10)
        optimizer.zero_grad()
        loss(forward(COPY.x[rows]), COPY.y[rows]).backward()
        optimizer.step()
        controller.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return model, controller, graphs


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:dwell")
@pytest.mark.parametrize("slots", ["prefix", "mask"])
def test_births_do_not_compile_anew(slots):
    model, controller, graphs = train("aot_eager", slots=slots)
    births = [event.step for event in controller.events]
    assert births == [10, 20, 30, 40, 50]
    assert model.heads == [6]
    assert graphs[0] > 0
    # The first birth makes the number of heads symbolic; the other four find their graphs there.
    assert graphs[19] == graphs[-1]
    if slots == "mask":
        assert graphs[5] == graphs[-1]  # the first step that records is the fifth


@pytest.mark.filterwarnings("ignore:dwell")
@pytest.mark.parametrize("slots", ["prefix", "mask"])
def test_a_compiled_run_is_the_eager_run(slots):
    compiled, ours, _ = train("aot_eager", slots=slots, steps=35)
    eager, theirs, _ = train(None, slots=slots, steps=35)
    assert [(event.kind, event.step) for event in ours.events] == [(e.kind, e.step) for e in theirs.events]
    for (name, value), expected in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("slots", ["prefix", "mask"])
def test_a_step_without_statistics_is_one_graph(slots):
    model = SelfOrganisingEncoder(
        vocabulary=5,
        d=16,
        dk=6,
        dv=4,
        max_heads=4,
        prototypes=8,
        outputs=5,
        layers=2,
        slots=slots,
        causal=True,
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = COPY.x[:4]
    mask = torch.arange(12) < torch.tensor([12, 7, 1, 0])[:, None]
    expected = model(x, mask).logits
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        compiled(x, mask).logits.isfinite(), torch.ones_like(expected, dtype=torch.bool)
    )
    model.eval()
    torch.testing.assert_close(compiled(x, mask).logits, model(x, mask).logits)
