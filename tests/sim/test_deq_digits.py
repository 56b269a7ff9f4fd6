"""On real digits: every model learns, and only the equilibrium models pay for their state by iterating."""

import pytest
import torch
import torch.nn.functional as F

from geomlib.lab.data import load
from geomlib.sim.bases import mlp
from geomlib.sim.deq import DEQ
from geomlib.sim.model import SIM
from geomlib.sim.monotone import MonDEQ

pytestmark = pytest.mark.filterwarnings("ignore::geomlib.core.fixed_point.ConvergenceWarning")


def accuracy_after_training(model, data, epochs=8):
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train.x), generator=shuffle).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(data.train.x[batch]), data.train.y[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        return float((model(data.test.x).argmax(1) == data.test.y).float().mean())


@pytest.fixture(scope="module")
def digits():
    return load("digits", flatten=True)


def build(kind):
    seed = torch.Generator().manual_seed(0)
    if kind == "sim":
        return SIM(mlp(64, 64, 64, 48, generator=seed), 48, 10, mode="orth", generator=seed)
    if kind == "deq":
        return DEQ(64, 87, 10, tol=1e-3, max_steps=30, generator=seed)
    return MonDEQ(64, 64, 10, tol=1e-3, max_steps=60, generator=seed)


@pytest.mark.parametrize("kind", ["sim", "deq", "mondeq"])
def test_a_few_epochs_reach_ninety_per_cent(kind, digits):
    # The smoke form of the comparison: one seed, 8 epochs; 94 to 97 per cent are usual.
    model = build(kind)
    assert accuracy_after_training(model, digits) > 0.9
    if kind != "sim":
        assert model.diagnostics.mean_steps > 2  # what the explicit model does not pay
