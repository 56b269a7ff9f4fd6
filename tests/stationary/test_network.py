"""The trainable stack: it learns, keeps its weights in the orthant, counts what it missed, moves."""

import warnings

import pytest
import torch

from geomlib.core import ConvergenceWarning
from geomlib.lab import data, training
from geomlib.stationary import ForwardBackward, NewtonCG, StationaryNetwork, cayley, solve_stationary
from geomlib.testing import assert_gradients

CONNECTIONS = [False, "cayley", "exponential"]


def clusters(samples=200, seed=0):
    """Noise on six features; the label is the triple of features that is lifted."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (samples,), generator=generator)
    x = torch.randn(samples, 6, generator=generator)
    x[torch.arange(samples)[:, None], 3 * y[:, None] + torch.arange(3)] += 1.5
    return data.Split(x, y)


def network(**options):
    defaults = {"nodes": 6, "generator": torch.Generator().manual_seed(0)}
    return StationaryNetwork(6, 2, **{**defaults, **options})


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("stalk", [1, 2])
def test_it_learns_under_the_common_training_loop(connection, stalk):
    model = network(stalk=stalk, connection=connection, layers=2)
    history = training.fit(
        model,
        clusters(),
        clusters(100, seed=1),
        epochs=6,
        lr=0.02,
        batch_size=50,
        on_step=lambda step: model.project_(),
        progress=False,
    )
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert history.test_accuracy[-1] > 0.8
    assert model.diagnostics.unsolved == 0
    assert all(float(graph.weights.min()) >= 0 for graph in model.graphs())


def test_projection_makes_exact_zeros():
    model = network(weight=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    split = clusters()
    torch.nn.functional.cross_entropy(model(split.x), split.y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="weights must not be negative"):
        model(split.x)
    model.project_()
    weights = model.graphs()[0].weights
    assert float(weights.min()) == 0.0
    assert 0 < int((weights == 0).sum()) < 15
    assert torch.isfinite(model(split.x)).all()


def test_every_layer_feeds_the_next(generator):
    model = network(layers=2, nodes=(6, 4), dtype=torch.float64)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    first, second = model.states(x)
    block = model.blocks[1]
    drive = block.drive(first.value.flatten(1)).view(5, 4, 1)
    again = solve_stationary(block.graph(), block.potential(), drive, tol=1e-10).value
    torch.testing.assert_close(second.value, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_its_gradients_are_exact(connection, generator):
    model = network(nodes=2, stalk=2, connection=connection, dtype=torch.float64, tol=1e-13)
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def logits(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert_gradients(logits, *[p.detach() for p in model.parameters()], second_order=False)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_it_runs_on_every_device(connection, device, generator):
    x = torch.randn(5, 6, generator=generator)
    on_cpu, there = network(connection=connection), network(connection=connection, device=device)
    loss = there(x.to(device)).square().sum()
    loss.backward()
    torch.testing.assert_close(there(x.to(device)).cpu(), on_cpu(x), rtol=1e-4, atol=1e-5)
    assert all(bool(torch.isfinite(p.grad).all()) for p in there.parameters())


def test_a_saved_network_gives_the_same_answers(tmp_path, generator):
    x = torch.randn(5, 6, generator=generator)
    model = network(connection=True)
    with torch.no_grad():
        model.blocks[0].weights.mul_(3)
    other = network(connection=True, generator=torch.Generator().manual_seed(7))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_what_is_not_solved_is_counted_warned_of_once_and_has_no_gradient(generator):
    # Three samples are solved at once, the fourth is driven hard and needs more steps than there are.
    model = network(solver=ForwardBackward(), max_steps=3, kappa=5.0)
    x = torch.randn(4, 6, generator=generator)
    x[:3] *= 1e-6
    x.requires_grad_()
    with pytest.warns(ConvergenceWarning, match="some states of the network were not reached"):
        logits = model(x)
    assert (model.diagnostics.solves, model.diagnostics.unsolved) == (4, 1)
    logits.sum().backward()
    assert float(x.grad[3].abs().max()) == 0.0
    assert float(x.grad[:3].abs().amax(1).min()) > 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert model.diagnostics.unsolved == 2
    model.diagnostics.clear()
    assert model.diagnostics.solves == 0


def test_paths_agree(generator):
    x = torch.randn(5, 6, generator=generator)
    dense, sparse = (network(path=path, connection=True, stalk=2) for path in ("dense", "sparse"))
    torch.testing.assert_close(dense(x), sparse(x), rtol=1e-4, atol=1e-5)


def test_candidates_can_be_given():
    edges = torch.tensor([[0, 1, 2], [1, 2, 5]])
    assert network(candidates=edges).graphs()[0].edges.tolist() == edges.tolist()


def test_an_empty_batch_and_one_node_are_fine():
    assert network()(torch.zeros(0, 6)).shape == (0, 2)
    assert network(nodes=1, stalk=3)(torch.zeros(4, 6)).shape == (4, 2)


def test_cayley_transports_are_unitary(generator):
    draws = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64)
    for A in (draws[0], torch.complex(*draws)):
        tau = cayley(A)
        torch.testing.assert_close(tau @ tau.mH, torch.eye(3, dtype=A.dtype).expand(5, 3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers and classes must be at least 1"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"nodes": (3, 4)}, "nodes must be one number, or one for each of 1 layers"),
        ({"mu": 0.0}, "mu must be positive"),
        ({"kappa": -1.0}, "kappa must be positive"),
        ({"weight": -1.0}, "weight must not be negative"),
        ({"connection": "polar"}, "connection must be none, cayley or exponential"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_inputs_that_are_no_batch_of_features_are_refused():
    with pytest.raises(ValueError, match="x must be real"):
        network()(torch.zeros(6))
    assert isinstance(network().blocks[0].solver, NewtonCG)
