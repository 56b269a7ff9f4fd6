"""What training does to the dimension of a layer: an exact test, its power, and what only looks like it."""

import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torch.nn import functional as F

from geomlib.lab import data, training
from geomlib.weightspace import dbc, haar_energies, slopes
from geomlib.weightspace.canonical import canonicalize
from geomlib.weightspace.surrogates import surrogate
from geomlib.weightspace.symmetry import perm_test, permute_pair, rescale_pair


def zeta(batch):
    """Haar exponent of each grid: all scales of a side of 32, five of larger ones."""
    energies = haar_energies(batch, d=2)[:, :5]
    return -slopes([2.0**k for k in range(energies.shape[1])], energies)


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", flatten=True)


OPTIMISERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=3e-3),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_moves_the_dimension_by_heterogeneity_alone(optimiser, digits, generator):
    model = mlp(0)
    history = training.fit(
        model, digits.train, digits.test, epochs=5, optimizer=OPTIMISERS[optimiser](model.parameters())
    )
    assert history.test_accuracy[-1] > 0.95
    W = model[2].weight.detach()
    cells, rc = (perm_test(W, kind, permutations=30, generator=generator) for kind in ("cells", "rc"))
    assert cells.z < -3
    assert abs(rc.observed - rc.mean) < 4 * rc.sd
    # Differential box counts read the tails of the distribution: a shuffle has them too.
    shuffled = [dbc(surrogate(W, "cells", generator=generator)).D for _ in range(3)]
    assert abs(dbc(W).D - sum(shuffled) / 3) < 0.05


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


@pytest.mark.parametrize("make", [lambda: mlp(0), cnn], ids=["mlp", "cnn"])
def test_trained_networks_keep_their_function_when_they_are_made_canonical(make, digits, generator):
    """In float32, on test images, at the ends of two different paths through one orbit."""
    model = make()
    training.fit(model, digits.train, epochs=2, lr=3e-3)
    model.eval()
    inputs = digits.test.x
    layer = "0" if isinstance(model[0], nn.Linear) else "1"
    twin = permute_pair(model, layer, inputs=inputs, generator=generator)
    twin = rescale_pair(twin, layer, 0.5, inputs=inputs, generator=generator)
    mine, theirs = (canonicalize(net, inputs=inputs) for net in (model, twin))
    with torch.no_grad():
        expected, found = model(inputs), mine(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def train_many(x, y, *, nets, epochs, generator, width=32, batch=64, lr=3e-3):
    """Train independent networks 64-width-width-10 at once; weights `(nets, out, in)`."""

    def layer(inputs, outputs):
        bound = inputs**-0.5
        draw = lambda *shape: (2 * torch.rand(*shape, generator=generator) - 1) * bound  # noqa: E731
        return [
            nn.Parameter(draw(nets, outputs, inputs)),
            nn.Parameter(draw(nets, outputs, 1)),
        ]

    parameters = [*layer(x.shape[1], width), *layer(width, width), *layer(width, 10)]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(epochs):
        # Each network sees the samples in an order of its own.
        order = torch.rand(nets, len(x), generator=generator).argsort(1)
        for index in order.split(batch, 1):
            h = x[index].mT  # (nets, features, batch)
            for W, b in zip(parameters[0:4:2], parameters[1:4:2], strict=True):
                h = torch.relu(torch.baddbmm(b, W, h))
            scores = torch.baddbmm(parameters[5], parameters[4], h)
            # The sum over networks leaves each with the gradient of its own mean loss.
            loss = F.cross_entropy(scores, y[index], reduction="sum") / index.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [p.detach() for p in parameters]


def test_training_many_networks_at_once_is_training_each(digits):
    """The reference: one of them alone, with the same draws."""
    x, y = digits.train.x[:200], digits.train.y[:200]
    generator = torch.Generator().manual_seed(0)
    both = train_many(x, y, nets=2, epochs=2, generator=generator, width=8)
    # The draws of the two, in the order in which they were made.
    generator = torch.Generator().manual_seed(0)
    start = []
    for inputs, outputs in ((64, 8), (8, 8), (8, 10)):
        for last in (inputs, 1):
            start.append((2 * torch.rand(2, outputs, last, generator=generator) - 1) * inputs**-0.5)
    orders = [torch.rand(2, 200, generator=generator).argsort(1) for _ in range(2)]
    for k in range(2):
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value[k].reshape(parameter.shape))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for order in orders:
            for index in order[k].split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
        for parameter, value in zip(model.parameters(), both, strict=True):
            torch.testing.assert_close(
                parameter.detach(), value[k].reshape(parameter.shape), rtol=1e-4, atol=1e-5
            )


@pytest.fixture(scope="module")
def trained(digits):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = digits.train.x, digits.train.y
    # Grey levels from 0 to 1: blank pixels at the border are zeros.
    x = (x - x.min()) / (x.max() - x.min())
    return train_many(x, y, nets=60, epochs=15, generator=generator)


def test_hidden_layers_stay_exchangeable_however_long_they_are_trained(trained, generator):
    """Exchangeable initial units and equivariant training: ranks among permuted copies are uniform."""
    hidden = trained[2]
    for statistic in (None, zeta):
        ranks = [
            perm_test(
                W,
                "rc",
                statistic=statistic,
                permutations=99,
                threshold=("quantile", 0.8),
                generator=generator,
            ).rank(generator=generator)
            for W in hidden
        ]
        assert kstest(ranks[:20], "uniform").pvalue > 0.01
        assert kstest(ranks, "uniform").pvalue > 0.01


def test_input_layers_show_the_order_of_the_pixels(trained, generator):
    """Neighbouring pixels are columns, and their weights are alike: the one ordered axis shows it."""
    ranks = [
        perm_test(W, "cols", statistic=zeta, permutations=99, generator=generator).rank(generator=generator)
        for W in trained[0][:20]
    ]
    assert kstest(ranks, "uniform").pvalue < 1e-6
    assert sum(ranks) / len(ranks) > 0.8


def topography(mu):
    """Penalise differences of neighbouring units, so that the order of units means something."""

    def penalty(model, x, y):
        first, second = model[0].weight, model[2].weight
        total = sum(w.diff(dim=0).square().sum() for w in (first, second)) + second.diff(dim=1).square().sum()
        return mu * total / len(first)

    return penalty


def test_order_is_found_where_training_puts_it(digits, generator):
    """The positive control: a topographic penalty, and both statistics leave the copies far behind."""
    model = mlp(0)
    history = training.fit(model, digits.train, digits.test, epochs=12, lr=3e-3, extra_loss=topography(0.5))
    assert history.test_accuracy[-1] > 0.8
    W = model[2].weight.detach()
    dimension = perm_test(W, "rc", permutations=30, generator=generator)
    rough = perm_test(W, "rc", statistic=zeta, permutations=30, generator=generator)
    assert abs(dimension.observed - dimension.mean) > 10 * dimension.sd
    assert rough.observed - rough.mean > 0.8
