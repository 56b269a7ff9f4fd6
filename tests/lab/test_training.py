"""The loop learns, resumes on the same curve, stops when the loss is no number, and leaves no trace."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import geomlib
from geomlib.lab import checkpoints, training
from geomlib.lab.data import Split
from geomlib.lab.training import History, cosine, evaluate, fit, one_cycle
from geomlib.testing import count_host_syncs


def blobs(n=90, features=4, classes=3):
    """Return noisy clusters, one per class."""
    generator = torch.Generator().manual_seed(7)
    centres = 2 * torch.randn(classes, features, generator=generator)
    y = torch.arange(n) % classes
    return Split(centres[y] + torch.randn(n, features, generator=generator), y)


def network(dropout=0.0):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def curve(history):
    """Return everything but the times."""
    return {name: values for name, values in vars(history).items() if name != "seconds"}


def weights(model):
    return [value.detach().cpu().clone() for value in model.state_dict().values()]


class Interrupted(Exception):
    pass


def interrupt_after(epochs):
    def on_epoch(epoch, history):
        if epoch == epochs:
            raise Interrupted

    return on_epoch


# Learning


def test_training_learns_separable_classes(device):
    model = network().to(device)
    history = fit(model, blobs(), blobs(), epochs=5, lr=0.02, batch_size=16)
    assert history.test_accuracy[-1] > 0.9
    assert history.loss[-1] < history.loss[0] / 2
    assert len(history) == len(history.seconds) == len(history.test_loss) == 5
    assert all(p.device == device or p.device.type == device.type for p in model.parameters())


def test_on_step_sees_every_step_after_it_was_taken():
    model, seen = network(), []
    before = [weights(model)]

    def on_step(step):
        gradients = [parameter.grad is not None for parameter in model.parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(before[-1], weights(model), strict=True))
        before.append(weights(model))
        seen.append((step, all(gradients), moved))

    fit(model, blobs(), epochs=2, batch_size=32, on_step=on_step)
    steps = 2 * -(-len(blobs()) // 32)
    assert seen == [(step, True, True) for step in range(1, steps + 1)]


def test_the_loop_is_the_textbook_loop():
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    split = blobs()
    history = fit(ours, split, epochs=1, batch_size=len(split), lr=0.1)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.1)
    output = theirs(split.x)
    loss = nn.functional.cross_entropy(output, split.y)
    loss.backward()
    optimizer.step()
    # The samples come in another order, so that sums round differently.
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert history.loss[0] == pytest.approx(loss.item(), rel=1e-6)
    assert history.accuracy[0] == pytest.approx((output.argmax(1) == split.y).double().mean().item())


def test_every_sample_is_seen_once_in_an_epoch():
    seen = []
    model = nn.Linear(4, 3)
    fit(model, blobs(), epochs=2, batch_size=32, extra_loss=lambda m, x, y: (seen.append(x), x.sum() * 0)[1])
    one, two = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert [len(x) for x in seen] == [32, 32, 26] * 2
    assert not torch.equal(one, two), "each epoch has its own order"
    for rows in (one, two):
        torch.testing.assert_close(rows.sort(dim=0).values, blobs().x.sort(dim=0).values, rtol=0, atol=0)


def test_the_reported_loss_weighs_samples_not_batches():
    # 90 samples in batches of 80 and 10; without learning, the mean must be that of the whole split.
    model = nn.Linear(4, 3)
    history = fit(
        model, blobs(), epochs=1, batch_size=80, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
    )
    loss, accuracy = evaluate(model, blobs(), batch_size=7)
    assert history.loss[0] == pytest.approx(loss, rel=1e-5)
    assert history.accuracy[0] == accuracy


def test_extra_loss_is_added_and_learned():
    plain, penalised = network(), network()
    fit(plain, blobs(), epochs=2, lr=0.05)
    fit(penalised, blobs(), epochs=2, lr=0.05, extra_loss=lambda m, x, y: 10 * m[0].weight.square().sum())
    assert penalised[0].weight.norm() < plain[0].weight.norm() / 2


class Twice(nn.Module):
    """Returns class scores at two depths, as a model that may stop early does."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, x):
        y = self.layer(x)
        return torch.stack([torch.zeros_like(y), y], dim=1)


def test_a_model_may_return_more_than_its_scores():
    def last(output):
        return output[:, -1]

    def loss(output, y):
        return nn.functional.cross_entropy(last(output), y)

    plain, twice = network(), Twice()
    expected = fit(plain, blobs(), blobs(), epochs=2)
    found = fit(twice, blobs(), blobs(), epochs=2, loss=loss, scores=last)
    assert curve(found) == curve(expected)
    assert evaluate(twice, blobs(), loss=loss, scores=last) == evaluate(plain, blobs())


def test_the_gradient_is_clipped_to_the_norm(device):
    model, split = network().to(device), blobs()
    before = weights(model)
    rate = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, split, epochs=1, batch_size=len(split), optimizer=rate, clip_norm=1e-3)
    parameters = {name for name, _ in model.named_parameters()}
    moved = [
        (new - old).square().sum()
        for name, new, old in zip(model.state_dict(), weights(model), before, strict=True)
        if name in parameters
    ]
    # The gradient is far longer than this norm, so the step has its length exactly.
    torch.testing.assert_close(torch.stack(moved).sum().sqrt(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_regression_has_a_loss_and_no_accuracy():
    x = torch.randn(40, 2)
    history = fit(nn.Linear(2, 1), Split(x, x.sum(1, keepdim=True)), epochs=2, loss=nn.functional.mse_loss)
    assert history.loss[1] < history.loss[0]
    assert history.accuracy[0] != history.accuracy[0]


def test_labels_at_every_time_are_counted_one_by_one():
    x, y = torch.randn(8, 5, 2), torch.zeros(8, 5, dtype=torch.int64)

    class Zero(nn.Linear):
        def forward(self, x):
            logits = super().forward(x) * 0
            logits[:, :2, 0] += 1  # right at two times of five
            logits[:, 2:, 1] += 1
            return logits

    _, accuracy = evaluate(Zero(2, 3), Split(x, y), loss=lambda o, y: nn.functional.cross_entropy(o.mT, y))
    assert accuracy == pytest.approx(0.4)


# Schedules and limits


def test_a_schedule_sets_the_rate_of_each_step():
    rates = []
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(
        model,
        blobs(),
        epochs=2,
        batch_size=45,
        optimizer=optimizer,
        schedule=lambda t: 1 - t,
        extra_loss=lambda m, x, y: (rates.append(optimizer.param_groups[0]["lr"]), x.sum() * 0)[1],
    )
    assert rates == [0.5, 0.375, 0.25, 0.125]


def test_one_cycle_is_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    steps = 40
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
    # torch reaches its peak and its end at whole steps, one step before the share of the progress.
    ours = one_cycle(warmup=(0.3 * steps - 1) / (steps - 1))
    for step in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours(step / (steps - 1)), abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("bad", [{"warmup": 0.0}, {"warmup": 1.0}, {"start": 1.0}, {"end": -0.1}])
def test_one_cycle_refuses_what_does_not_rise_and_fall(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        one_cycle(**bad)


def test_cosine_refuses_a_warm_up_without_end():
    with pytest.raises(ValueError, match="warmup"):
        cosine(1.0)


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (3, 1), (4, 2), (6, 2), (100, 3)])
def test_a_dry_run_stops_after_its_steps(max_steps, epochs):
    seen = []
    history = fit(
        network(),
        blobs(),
        epochs=3,
        batch_size=30,
        max_steps=max_steps,
        extra_loss=lambda m, x, y: (seen.append(1), x.sum() * 0)[1],
    )
    assert len(seen) == min(max_steps, 9)
    assert len(history) == epochs


# Randomness


def test_the_seed_alone_decides_the_curve():
    def run(seed):
        torch.rand(seed + 5)  # whatever happened before must not matter
        return curve(fit(network(0.3), blobs(), blobs(), epochs=2, seed=seed))

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    torch.set_rng_state(before)
    fit(model, blobs(), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_epochs_and_seeds_have_unrelated_orders():
    from geomlib.lab.steps import batches

    def order(seed, epoch):
        (batch,) = batches(blobs(), 90, seed=seed, epoch=epoch, device=torch.device("cpu"))
        return batch.x

    assert not torch.equal(order(0, 1), order(1, 0))
    assert torch.equal(order(0, 1), order(0, 1))


# Resuming


@pytest.mark.parametrize("schedule", [None, cosine(warmup=0.25)])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path, kind, schedule):
    options = {"momentum": 0.9} if kind is not torch.optim.Adam else {"amsgrad": True}

    def run(path, **kwargs):
        model = network(dropout=0.2)
        optimizer = kind(model.parameters(), lr=0.01, **options)
        arguments = {"epochs": 4, "batch_size": 32, "optimizer": optimizer, "schedule": schedule, **kwargs}
        return model, lambda: fit(model, blobs(), blobs(), checkpoint=path, **arguments)

    whole, train = run(tmp_path / "whole.safetensors")
    expected = train()
    _, train = run(tmp_path / "cut.safetensors", on_epoch=interrupt_after(2))
    with pytest.raises(Interrupted):
        train()
    torch.rand(100)
    resumed, train = run(tmp_path / "cut.safetensors")
    assert curve(train()) == curve(expected)
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_finished_run_is_read_back_without_training(tmp_path):
    path = tmp_path / "run.safetensors"
    trained = network()
    expected = fit(trained, blobs(), epochs=2, checkpoint=path)
    untouched = network()
    history = fit(untouched, blobs(), epochs=2, checkpoint=path, on_epoch=interrupt_after(1))
    assert history == expected
    assert torch.equal(untouched[0].weight, trained[0].weight)


def test_a_checkpoint_is_ignored_on_request(tmp_path):
    path = tmp_path / "run.safetensors"
    first = fit(network(), blobs(), epochs=2, checkpoint=path)
    again = fit(network(), blobs(), epochs=2, checkpoint=path, resume=False)
    assert again.seconds != first.seconds
    assert curve(again) == curve(first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0, got 1"),
        ({"batch_size": 8}, "batch_size 64, got 8"),
        ({"epochs": 1}, "epochs must be at least the 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, words):
    path = tmp_path / "run.safetensors"
    fit(network(), blobs(), epochs=2, checkpoint=path)
    with pytest.raises(ValueError, match=words):
        fit(network(), blobs(), **{"epochs": 3, "checkpoint": path, **change})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(network(), blobs(), epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="another model"):
        fit(nn.Linear(4, 3), blobs(), epochs=2, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(network(), blobs(), epochs=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read"):
        fit(network(), blobs(), epochs=2, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    fit(network(), blobs(), epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full(tensors, scratch, metadata):
        with open(scratch, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        fit(network(), blobs(), epochs=2, checkpoint=path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no scratch file stays behind"


def test_tied_weights_survive_a_checkpoint(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3, bias=False)
            self.down = nn.Linear(3, 4, bias=False)
            self.down.weight = nn.Parameter(torch.randn(4, 3))
            self.again = self.down

        def forward(self, x):
            return self.up(self.again(self.up(x)))

    path = tmp_path / "run.safetensors"
    trained = Tied()
    fit(trained, blobs(), epochs=1, checkpoint=path)
    read = Tied()
    fit(read, blobs(), epochs=1, checkpoint=path)
    assert torch.equal(read.down.weight, trained.down.weight)


def test_what_no_file_can_hold_is_named(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": object()}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="_extra_state must be a tensor"):
        fit(Odd(4, 3), blobs(), epochs=1, checkpoint=tmp_path / "run.safetensors")


# Failing


def test_a_loss_that_is_no_number_stops_with_epoch_and_step():
    def explode(output, y):
        explode.calls += 1
        return output.sum() * (torch.nan if explode.calls == 5 else 1.0)

    explode.calls = 0
    with pytest.raises(training.TrainingError, match=r"nan in epoch 2, step 2"):
        fit(network(), blobs(), epochs=3, batch_size=30, loss=explode)
    assert explode.calls == 5, "the next step is never taken"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"mixed_precision": "int4"}, "mixed_precision must be"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change, words):
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        fit(model, blobs(), **{"epochs": 1, **change})
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_training_on_nothing_is_refused():
    with pytest.raises(ValueError, match="train must hold samples"):
        fit(network(), Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), epochs=1)


def test_half_precision_on_the_cpu_is_ignored_aloud():
    with pytest.warns(UserWarning, match="ignored on the CPU"):
        half = fit(network(), blobs(), epochs=1, mixed_precision="bf16")
    assert curve(half) == curve(fit(network(), blobs(), epochs=1))


# Manners


def test_the_host_seldom_waits_for_the_device(emulated):
    model = nn.Linear(4, 3).to(emulated)
    with count_host_syncs() as syncs:
        fit(model, blobs(320), epochs=1, batch_size=10)
    # 32 steps: two looks at the loss.
    assert len(syncs) <= 2


def test_the_model_comes_back_as_it_was():
    model = network()
    model.eval()
    forward = model.forward
    fit(model, blobs(), blobs(), epochs=1)
    assert type(model) is nn.Sequential
    assert model.forward == forward
    evaluate(model.eval(), blobs())
    assert not model.training


def test_nobody_is_shown_a_bar_unless_they_watch(capfd, monkeypatch):
    fit(network(), blobs(), epochs=1)
    assert capfd.readouterr().err == ""
    fit(network(), blobs(), epochs=1, progress=True)
    assert "1/1" in capfd.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("CI", "true")
    fit(network(), blobs(), epochs=1)
    assert capfd.readouterr().err == ""


def test_a_history_reads_well():
    assert repr(History()) == "History(no epochs)"
    history = History([1.0, 0.5], [0.1, 0.2], [2.0, 0.25], [0.3, 0.75], [9.0, 8.0])
    assert repr(history) == "History(2 epochs: loss 0.5, accuracy 0.2, test loss 0.25, test accuracy 0.75)"
    assert history.last()["seconds"] == 8.0


SCRIPT = """
import json, sys, torch
from torch import nn
from geomlib.lab.data import Split
from geomlib.lab.training import fit

def train(checkpoint=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(33, 4).double()
    # 33 = 2 * 16 + 1: the last batch has one sample for two processes.
    split = Split(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    history = fit(model, split, split, epochs=3, batch_size=16, lr=0.05, checkpoint=checkpoint)
    return [history.loss, history.accuracy, history.test_loss]

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    script, checkpoint = tmp_path / "train.py", tmp_path / "two.safetensors"
    script.write_text(SCRIPT)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(checkpoint),
    ]
    output = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(geomlib.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    first, second = (json.loads(line) for line in output.stdout.splitlines() if line.startswith("[["))
    assert first == second
    alone = runpy.run_path(str(script))["train"]()
    for ours, theirs in zip(first, alone, strict=True):
        # Gradients are summed in another order.
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert checkpoint.is_file()
