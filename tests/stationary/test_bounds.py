"""Bounds hold, are ordered as they say, and reduce to one another where they must."""

import math
from itertools import pairwise

import pytest
import torch

from geomlib.stationary.bounds import (
    depth_sensitivity,
    edge_count_bound,
    pac_bayes_bound,
    weight_sensitivity,
)
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.layer import solve_stationary
from geomlib.stationary.perturbation import (
    distortion,
    green_from_resistance,
    lipschitz_chain,
    metric_stability,
    resistance_metric,
)
from geomlib.stationary.potential import Quartic

MU = 0.3


def drawn(generator, nodes=8, share=0.5, transport=None):
    """Return a graph over all candidate edges, some of them absent."""
    edges = torch.triu_indices(nodes, nodes, 1)
    weights = torch.rand(edges.shape[1], generator=generator, dtype=torch.float64)
    absent = torch.rand(edges.shape[1], generator=generator) > share
    return SheafGraph(nodes, edges, weights.masked_fill(absent, 0.0), transport)


def unitaries(generator, count, d):
    skew = torch.randn(count, d, d, generator=generator, dtype=torch.complex128)
    return torch.linalg.matrix_exp(skew - skew.mH)


@pytest.mark.parametrize("connection", [False, True])
def test_lipschitz_chain_is_ordered(generator, connection):
    transport = unitaries(generator, 28, 2) if connection else None
    potential = Quartic(torch.full((8,), MU).double(), torch.rand(8, generator=generator).double())
    for _ in range(10):
        graph, other = (drawn(generator, transport=transport) for _ in range(2))
        f = torch.randn(3, 8, 2, generator=generator, dtype=torch.complex128)
        states = [solve_stationary(g, potential, f).value for g in (graph, other)]
        chain = lipschitz_chain(graph, other, *states, f, mu=MU)
        assert (chain.distance <= chain.residual * (1 + 1e-9)).all()
        assert (chain.residual <= chain.uniform).all()
        assert (chain.distance > 0).all()


def test_the_last_link_is_the_sensitivity_of_the_other_bounds(generator):
    graph, other = drawn(generator), drawn(generator)
    f = torch.randn(1, 8, 1, generator=generator, dtype=torch.float64)
    chain = lipschitz_chain(graph, other, f, f, f, mu=MU)  # the last link needs no solution
    Lambda = weight_sensitivity(degree=chain.degree, drive_bound=float(f.norm()), mu=MU)
    torch.testing.assert_close(float(chain.uniform), Lambda * chain.change)


def test_degree_counts_edges_of_either_graph():
    edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    one, two = (SheafGraph(3, edges, torch.tensor(w)) for w in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    f = torch.ones(1, 3, 1)
    assert lipschitz_chain(one, two, f, f, f, mu=1.0).degree == 2
    assert lipschitz_chain(one, one, f, f, f, mu=1.0).degree == 1


def test_gap_grows_with_the_edges_and_shrinks_with_the_samples():
    def gap(s, N):
        return edge_count_bound(s, 105, N, sensitivity=48.0 * min(s, 14), largest_weight=2.0).gap

    for samples in (10**3, 10**6):
        assert all(gap(s, samples) < gap(s + 1, samples) for s in range(105))
    assert all(gap(30, a) > gap(30, b) for a, b in pairwise([10**2, 10**3, 10**4, 10**6]))


def test_gaps_have_the_sizes_of_the_formula():
    sizes = [
        round(edge_count_bound(s, 105, 10**6, sensitivity=48.0 * min(s, 14), largest_weight=2.0).gap, 3)
        for s in (12, 30, 60, 105)
    ]
    assert sizes == [0.012, 0.018, 0.023, 0.029]


def test_parts_of_the_gap_add_up():
    bound = edge_count_bound(12, 105, 10**4, sensitivity=10.0, largest_weight=2.0, any_count=True)
    assert bound.supports == pytest.approx(math.log(math.comb(105, 12)))
    assert bound.confidence == pytest.approx(math.log(105 / 0.05))
    assert bound.weights == pytest.approx(12 * math.log(1 + 2.0 * 10.0 / 0.01))
    nats = bound.weights + bound.supports + bound.confidence
    assert bound.gap == pytest.approx(0.02 + math.sqrt(nats / (2 * 10**4)))
    assert bound.gap > edge_count_bound(12, 105, 10**4, sensitivity=10.0, largest_weight=2.0).gap


def test_hoeffding_is_the_bound_of_a_graph_that_is_given():
    # No edge to choose and no weight to learn: nothing is left but one loss and its mean.
    bound = edge_count_bound(0, 105, 500, sensitivity=10.0, largest_weight=2.0, resolution=1e-12)
    assert bound.gap == pytest.approx(math.sqrt(math.log(1 / 0.05) / 1000))


def test_uniform_bound_covers_every_loss_of_a_finite_class(generator):
    # Coins stand for losses: the bound with no weights is a union over binomial(M, s) supports.
    candidates, edges, samples = 6, 3, 200
    bound = edge_count_bound(
        edges, candidates, samples, sensitivity=0.0, largest_weight=1.0, resolution=1e-12
    )
    supports = math.comb(candidates, edges)
    tosses = torch.rand(2000, supports, samples, generator=generator) < 0.5
    worst = (0.5 - tosses.double().mean(-1)).amax(1)
    assert (worst > bound.gap).double().mean() < 0.05


def test_depth_of_one_is_the_single_layer():
    one = depth_sensitivity(
        degrees=[5], mus=[0.5], map_norms=[1.2], bias_norms=[0.4], input_norm=2.0, readout_norm=3.0
    )
    assert one.drives == (1.2 * 2.0 + 0.4,)
    assert one.total == pytest.approx(
        weight_sensitivity(degree=5, drive_bound=one.drives[0], mu=0.5, readout_norm=3.0)
    )


def test_stack_moves_no_more_than_its_sensitivity(generator):
    nodes, mu = 6, 0.5
    potential = Quartic(torch.full((nodes,), mu).double(), torch.ones(nodes).double())
    maps = [
        torch.randn(nodes, nodes, generator=generator, dtype=torch.float64) / nodes**0.5 for _ in range(3)
    ]
    x = torch.randn(4, nodes, generator=generator, dtype=torch.float64)

    def run(graphs, matrices):
        state = x
        for graph, K in zip(graphs, matrices, strict=True):
            state = solve_stationary(graph, potential, (state @ K.T)[..., None]).value[..., 0]
        return state

    graphs = [drawn(generator, nodes) for _ in maps]
    others = [g.replace(weights=torch.rand(15, generator=generator).double()) for g in graphs]
    moved = [K + 0.1 * torch.rand(K.shape, generator=generator).double() for K in maps]
    fixed = {
        "degrees": [5] * 3,
        "mus": [mu] * 3,
        "map_norms": [float(torch.linalg.matrix_norm(K, 2)) for K in maps],
        "bias_norms": [0.0] * 3,
        "input_norm": float(x.norm(dim=1).max()),
    }
    step = max(float((g.weights - o.weights).abs().max()) for g, o in zip(graphs, others, strict=True))
    reached = (run(graphs, maps) - run(others, maps)).norm(dim=1).max()
    assert 0 < reached <= step * depth_sensitivity(**fixed).total
    # With learned maps: the norms of the moved ones bound both, and their entries change by at most 0.1.
    fixed["map_norms"] = [
        max(float(torch.linalg.matrix_norm(K, 2)) for K in two) for two in zip(maps, moved, strict=True)
    ]
    everything = depth_sensitivity(**fixed, fans=[nodes] * 3)
    reached = (run(graphs, maps) - run(others, moved)).norm(dim=1).max()
    assert reached <= max(step, 0.1) * everything.total
    assert everything.total > depth_sensitivity(**fixed).total


def test_pac_bayes_has_the_shape_of_the_uniform_bound():
    options = {"sensitivity": 672.0, "largest_weight": 2.0}
    for samples in (10**4, 10**6):
        pairs = [
            (pac_bayes_bound(s, 105, samples, **options), edge_count_bound(s, 105, samples, **options))
            for s in (12, 30, 60, 105)
        ]
        assert all(a[0].gap < b[0].gap for a, b in pairwise(pairs))
        assert all(0.8 < pac.gap / uniform.gap < 1.25 for pac, uniform in pairs)


def test_divergence_is_that_of_two_uniform_laws():
    bound = pac_bayes_bound(2, 4, 100, sensitivity=1.0, largest_weight=2.0, radius=0.25)
    # Prior: 1/4 for the count, 1/6 for the support, density 1/4 on the square; posterior: density 4.
    assert bound.divergence == pytest.approx(math.log(4 * 6 * 16))
    assert bound.blur == 0.5


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_resistance_is_a_metric_and_gives_the_inverse_back(generator, mu):
    for _ in range(20):
        graph = drawn(generator, share=0.3)
        R = resistance_metric(graph, mu=mu)
        assert (R[:, None, :] <= R[:, :, None] + R.mT[None] + 1e-12).all(), "triangle"
        assert (R.diagonal() == 0).all()
        assert (R + torch.eye(8) > 0).all()
        torch.testing.assert_close(R, R.mT, rtol=0, atol=1e-13)
        exact = torch.linalg.inv(graph.dense_laplacian(stalk=1) + mu * torch.eye(8, dtype=torch.float64))
        # Entries are as large as 1 / mu = 10.
        torch.testing.assert_close(green_from_resistance(R, mu=mu), exact, rtol=0, atol=1e-13)


def test_output_moves_no_more_than_the_metric(generator):
    for scale in (1.0, 0.1, 0.01):
        graph = drawn(generator)
        noise = 1 + scale * torch.rand(28, generator=generator, dtype=torch.float64)
        other = graph.replace(weights=graph.weights * noise)
        f = torch.randn(5, 8, 2, generator=generator, dtype=torch.complex128)
        found = metric_stability(graph, other, f, mu=MU)
        assert (found.gap <= found.bound).all()
        assert found.gromov_hausdorff == found.distortion / 2
        linear = Quartic(torch.full((8,), MU).double(), torch.zeros(8).double())
        solved = [solve_stationary(g, linear, f).value for g in (graph, other)]
        gap = (solved[0] - solved[1]).flatten(1).norm(dim=1)
        torch.testing.assert_close(found.gap, gap, rtol=1e-6, atol=1e-9)


def test_relabelled_graphs_have_no_distortion(generator):
    graph = drawn(generator, nodes=5)
    R = resistance_metric(graph, mu=MU)
    order = torch.randperm(5, generator=generator)
    moved = R[order][:, order]
    assert distortion(R, moved) > 0.1
    assert distortion(R, moved, relabel=True) < 1e-12


def test_one_node_and_no_edge_are_legal():
    alone = SheafGraph(1, torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    assert resistance_metric(alone, mu=2.0).tolist() == [[0.0]]
    assert green_from_resistance(torch.zeros(1, 1), mu=2.0).tolist() == [[0.5]]
    f = torch.ones(1, 1, 1, dtype=torch.float64)
    chain = lipschitz_chain(alone, alone, f / 2, f / 2, f, mu=2.0)
    assert (chain.degree, float(chain.uniform)) == (0, 0.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: weight_sensitivity(degree=3, drive_bound=1.0, mu=0.0), "mu must be positive"),
        (lambda: weight_sensitivity(degree=-1, drive_bound=1.0, mu=1.0), "degree must be finite"),
        (
            lambda: edge_count_bound(9, 8, 10, sensitivity=1.0, largest_weight=1.0),
            "edges must lie between 0 and the 8 candidates",
        ),
        (
            lambda: edge_count_bound(3, 8, 0, sensitivity=1.0, largest_weight=1.0),
            "samples must be at least 1",
        ),
        (
            lambda: edge_count_bound(3, 8, 9, sensitivity=1.0, largest_weight=1.0, delta=1.0),
            r"delta must lie in \(0, 1\)",
        ),
        (
            lambda: pac_bayes_bound(3, 8, 9, sensitivity=1.0, largest_weight=1.0, radius=2.0),
            "radius must lie in",
        ),
        (
            lambda: depth_sensitivity(
                degrees=[1], mus=[1.0, 1.0], map_norms=[1.0], bias_norms=[0.0], input_norm=1.0
            ),
            "one entry for each layer",
        ),
        (lambda: distortion(torch.zeros(2, 2), torch.zeros(3, 3)), "must have one shape"),
        (lambda: distortion(torch.zeros(9, 9), torch.zeros(9, 9), relabel=True), "at most 8 nodes"),
        (lambda: green_from_resistance(torch.zeros(2, 3), mu=1.0), "metric must be square"),
    ],
)
def test_what_makes_no_sense_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_only_the_weights_may_differ(generator):
    graph = drawn(generator)
    f = torch.zeros(1, 8, 1, dtype=torch.float64)
    fewer = SheafGraph(8, graph.edges[:, 1:], graph.weights[1:])
    with pytest.raises(ValueError, match="same nodes and candidate edges"):
        lipschitz_chain(graph, fewer, f, f, f, mu=1.0)
    turned = graph.replace(transport=torch.ones(28, dtype=torch.float64))
    with pytest.raises(ValueError, match="same transport"):
        lipschitz_chain(graph, turned, f, f, f, mu=1.0)
    with pytest.raises(ValueError, match="graph must have no transport"):
        resistance_metric(turned, mu=1.0)
    with pytest.raises(ValueError, match="must have one shape"):
        lipschitz_chain(graph, graph, f, f[:0], f, mu=1.0)
