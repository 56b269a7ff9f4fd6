"""Laws of growth with pruning on a moving operator: rest, lifetimes, chattering."""

import pytest
import torch

from geomlib.incrt.counts import planted_operator
from geomlib.incrt.homeostasis import homeostasis
from geomlib.incrt.operator import antisym, residual_operator, sym

LAMBDAS = (8.0, 6.0, 4.5, 3.3, 2.4, 1.7, 1.1, 0.6, 0.3, 0.1)


def planted():
    generator = torch.Generator().manual_seed(0)
    return residual_operator(*planted_operator(LAMBDAS, 24, generator=generator, dtype=torch.float64))


def test_fixed_operator_comes_to_rest_and_prunes_nothing():
    A = planted()
    for theta, count in ((7.0, 1), (2.0, 5), (0.05, 10)):
        rest = homeostasis([A] * 30, theta, 0.5 * theta)
        assert [event.kind for event in rest.events] == ["grow"] * count
        assert rest.heads[-1] == count
        assert rest.drift == 0
        energies = [event.energy for event in rest.events]
        torch.testing.assert_close(torch.tensor(energies), torch.tensor(LAMBDAS[:count]))


def band(steps, generator, turn=0.0):
    """Return operators whose eigenvalues wander through a band, and whose eigenvectors turn if asked."""
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    spin = torch.linalg.matrix_exp(
        turn * antisym(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    )
    phase = torch.arange(4, dtype=torch.float64)
    operators = []
    for t in range(steps):
        values = 1.5 + 1.2 * torch.sin(0.02 * (1 + phase / 3) * t + phase)
        operators.append(sym(basis @ torch.diag(torch.cat([values, -values])) @ basis.mT))
        basis = spin @ basis
    return operators


@pytest.mark.parametrize("turn", [0.0, 0.002])
def test_no_head_is_pruned_sooner_than_the_drift_allows(turn, generator):
    theta, phi = 2.0, 1.0
    found = homeostasis(band(800, generator, turn), theta, phi)
    lives = found.lifetimes()
    assert len(lives) >= 3
    assert min(lives) >= (theta - phi) / found.drift
    for event in found.events:
        assert event.energy > theta if event.kind == "grow" else event.energy < phi


def test_fixed_directions_suffer_few_events_in_all(generator):
    """Four directions, each at most `2 (1 + t v / (theta - phi))` events in `t` steps."""
    operators = band(800, generator)
    for theta, phi in ((2.0, 1.0), (2.0, 1.8), (1.2, 0.9)):
        found = homeostasis(operators, theta, phi)
        assert len(found.events) <= 4 * 2 * (1 + 800 * found.drift / (theta - phi))


def test_without_hysteresis_heads_chatter():
    A = planted()
    chatter = homeostasis([A] * 40, 2.0, 5.0, hysteresis=False)
    kinds = [event.kind for event in chatter.events]
    assert len(kinds) == 40  # an event at every step, for ever
    assert kinds.count("prune") > 15
    assert min(chatter.lifetimes()) == 1
    assert len(homeostasis([A] * 40, 2.0, 1.9).events) == 5


def test_everything_may_be_captured_and_nothing_more_is():
    everything = homeostasis([torch.eye(3) * 5] * 6, 1.0, 0.5)
    assert everything.heads.tolist() == [1, 2, 3, 3, 3, 3]
    assert everything.Q.shape == (3, 3)


def test_process_follows_the_device(device):
    A = planted()
    moved = homeostasis([A.to(device)] * 4, 2.0, 1.0)
    assert moved.Q.device.type == torch.device(device).type
    assert moved.heads.tolist() == homeostasis([A] * 4, 2.0, 1.0).heads.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: homeostasis([], 1.0, 0.5), "operators must hold at least one matrix"),
        (lambda: homeostasis([torch.eye(2)], 1.0, 1.0), "phi must be below theta = 1.0, got 1.0"),
        (lambda: homeostasis([torch.eye(2)], 0.0, -1.0), "theta must be positive, got 0.0"),
        (lambda: homeostasis([torch.eye(2), torch.eye(3)], 1.0, 0.5), "operators must have one shape"),
        (lambda: homeostasis([torch.eye(2) * torch.nan], 1.0, 0.5), "operators must be finite"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
