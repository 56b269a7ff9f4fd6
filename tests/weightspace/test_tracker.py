"""The tracker records what the report says, when it should, and costs nothing in between."""

import math

import pytest
import torch
from torch import nn

from geomlib.lab import data, training
from geomlib.testing import count_host_syncs
from geomlib.weightspace.layers import model_report
from geomlib.weightspace.tracker import FractalTracker


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def test_it_follows_a_training_loop():
    digits = data.load("digits", train_size=100, flatten=True)
    model = mlp()
    start = {report.name: report.D for report in model_report(model)}
    tracker = FractalTracker(model, every=2, measures={"rms": lambda w: w.square().mean().sqrt()})
    training.fit(model, digits.train, epochs=5, lr=1e-2, on_epoch=tracker)
    steps, values = tracker.series("2.weight", "D")
    assert steps == [0, 2, 4]
    assert values[0] == start["2.weight"]
    assert len(set(values)) == 3
    assert tracker.series("0.weight", "rms")[1] == sorted(tracker.series("0.weight", "rms")[1])
    assert {record.report.name for record in tracker.records} == {"0.weight", "2.weight", "4.weight"}


def test_the_last_record_is_the_report_of_the_network_as_it_is():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = FractalTracker(model, every=3, threshold=("quantile", 0.8))
    handle = tracker.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    expected = model_report(model, threshold=("quantile", 0.8))
    found = [record.report for record in tracker.records if record.step == 6]
    assert [repr(a) for a in found] == [repr(b) for b in expected]
    handle.remove()
    optimizer.step()
    assert tracker.steps == 6


def test_no_number_is_read_between_records(emulated):
    model = mlp().to(emulated)
    tracker = FractalTracker(model, every=10, start=False)
    with count_host_syncs() as waits:
        for _ in range(9):
            tracker.step()
        tracker(11)
    assert waits == []
    assert tracker.records == []
    tracker.step()
    assert [record.step for record in tracker.records] == [10, 10, 10]


def test_recording_changes_neither_the_network_nor_its_gradients():
    model = mlp()
    model(torch.randn(8, 64)).sum().backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    FractalTracker(model, null="permutation", permutations=2, generator=torch.Generator().manual_seed(0))
    assert all(
        torch.equal(p, value) and torch.equal(p.grad, gradient)
        for p, (value, gradient) in zip(model.parameters(), before, strict=True)
    )


def test_the_random_state_of_training_is_left_alone():
    """A tracked run draws the numbers that an untracked one draws."""
    model = mlp()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    FractalTracker(model).record(1)
    assert torch.rand(()) == expected


def test_records_are_rows_and_names_select_them():
    tracker = FractalTracker(mlp(), names=["0.weight"], measures={"one": lambda w: 1.0})
    tracker.record(7)
    rows = [record.as_dict() for record in tracker.records]
    assert [(row["step"], row["name"], row["one"]) for row in rows] == [
        (0, "0.weight", 1.0),
        (7, "0.weight", 1.0),
    ]
    assert repr(tracker) == "FractalTracker(1 tensors, 2 records, last step 7)"
    assert repr(FractalTracker(mlp(), start=False)) == "FractalTracker(0 tensors, 0 records, last step nan)"


def test_small_layers_are_recorded_with_their_status():
    tracker = FractalTracker(nn.Linear(4, 4))
    assert tracker.series("weight", "status")[1] == ["insufficient_scales"]
    assert math.isnan(tracker.series("weight", "D")[1][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FractalTracker(mlp(), every=0), "every must be at least 1"),
        (
            lambda: FractalTracker(mlp(), names=["1.weight"]),
            "got 1.weight: it has 0.weight, 2.weight, 4.weight",
        ),
        (lambda: FractalTracker(mlp(), measures={"D": torch.mean}), "names of their own, got D"),
        (
            lambda: FractalTracker(mlp()).series("9.weight"),
            "got '9.weight' and 'delta'; there is 0.weight, 2",
        ),
        (lambda: FractalTracker(mlp()).series("0.weight", "zeta"), "got '0.weight' and 'zeta'"),
        (lambda: FractalTracker(mlp(), start=False).series("0.weight"), "there is nothing"),
        (
            lambda: FractalTracker(nn.Conv2d(8, 8, 3), layout="slices", measures={"one": torch.mean}),
            "measures need a layout of one grid",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
