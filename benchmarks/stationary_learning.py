"""Learn planted graphs in several geometries, and measure a learned graph beside models that have none.

First the steps and the processor time that each geometry needs on a planted graph. Then the accuracy of a
learned graph on two small classifications, one that needs a graph and one that does not, beside peers.

    python benchmarks/stationary_learning.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

from harness import machine, pin, show, write

pin()

import torch  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.neural_network import MLPClassifier  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from geomlib.lab.data import Split  # noqa: E402
from geomlib.lab.training import evaluate, fit  # noqa: E402
from geomlib.sim.monotone import MonDEQ  # noqa: E402
from geomlib.stationary import StationaryNetwork  # noqa: E402
from geomlib.stationary.learning import learn_graph  # noqa: E402
from geomlib.stationary.penalties import Linear  # noqa: E402
from geomlib.stationary.tasks import hidden_clusters, latent_graph_regression, three_spirals  # noqa: E402

warnings.simplefilter("ignore")

SEEDS = (0, 1, 2)
TOL, MOST = 1e-6, 1000
FEWER = 5.0  # the goal: this many times fewer steps than Euclid, and less time
METRICS = {
    "natural": "logdet",
    "Gauss-Newton": "gauss_newton",
    "diagonal of the natural metric": "diag",
    "Euclid": "euclid",
    "entropic, from w = 0.05": "entropic",
    "log-barrier, from w = 0.05": "logbarrier",
}
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Peer = Callable[[int], tuple[float, int]]


def race() -> None:
    """Count steps and processor seconds to a projected gradient of `TOL` on a planted graph."""
    rows, taken = [], {}
    for name, metric in METRICS.items():
        steps, seconds, ends = [], [], []
        for seed in SEEDS:
            task = latent_graph_regression(generator=torch.Generator().manual_seed(seed))
            start = task.start()
            if metric in ("entropic", "logbarrier"):  # from nothing they never move
                start = start.replace(weights=torch.full_like(start.weights, 0.05))
            objective = task.objective()
            objective.slope(start)  # caches are filled before the clock runs
            clock = time.process_time()
            history = learn_graph(objective, start, metric=metric, tol=TOL, max_steps=MOST)
            seconds.append(time.process_time() - clock)
            steps.append(history.steps)
            ends.append(history.converged)
        taken[name] = steps, seconds, all(ends)
        reached = f"{sum(ends)} of {len(SEEDS)}"
        rows.append([name, reached, ", ".join(map(str, steps)), statistics.median(seconds)])
        print(rows[-1], flush=True)
    (ours, quick, _), (theirs, slow, _) = taken["natural"], taken["Euclid"]
    fewer = min(b / a for a, b in zip(ours, theirs, strict=True))
    sooner = min(b / a for a, b in zip(quick, slow, strict=True))
    verdict = "reached" if fewer >= FEWER and sooner > 1 else "missed"
    notes = [
        "ten nodes, 45 candidates, a ring with three chords, 60 drives without noise, from no edges",
        f"Euclid takes at least {fewer:.1f} times the natural steps and {sooner:.1f} times their time",
        f"goal: {FEWER:.0f} times the steps, and more time: {verdict}",
    ]
    columns = ["geometry", "converged", "steps, by seed", "processor s, median"]
    title = f"Learning a planted graph to a projected gradient of {TOL:g}, at most {MOST} steps"
    report("stationary_learning", title, columns, rows, notes, "caches filled beforehand")


def clusters(seed: int) -> Data:
    """Real features `(N, 30)` and labels of the hidden-cluster problem, for training and test."""
    train = hidden_clusters(300, generator=torch.Generator().manual_seed(seed))
    test = hidden_clusters(2000, generator=torch.Generator().manual_seed(1000 + seed))
    x, z = (torch.view_as_real(task.drive[..., 0]).flatten(1).float() for task in (train, test))
    return x, train.labels, z, test.labels


def our_clusters(seed: int) -> tuple[float, int]:
    """Accuracy and parameters of the learned graph, read at three anchors."""
    task = hidden_clusters(300, generator=torch.Generator().manual_seed(seed))
    test = hidden_clusters(2000, generator=torch.Generator().manual_seed(1000 + seed))
    history = learn_graph(task.objective(), task.start(), penalty=Linear(1e-2), tol=1e-4, max_steps=100)
    return test.accuracy(history.graph), task.start().weights.numel() + 1


def trained(model: nn.Module, data: Data, seed: int, **options: float) -> float:
    """Train with the course's loop and return the test accuracy."""
    x, y, z, labels = data
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options["lr"], weight_decay=options.get("decay", 0.0)
    )
    project = getattr(model, "project_", lambda: None)
    fit(
        model,
        Split(x, y),
        epochs=int(options["epochs"]),
        optimizer=optimizer,
        seed=seed,
        progress=False,
        on_step=lambda step: project(),
    )
    project()
    return evaluate(model, Split(z, labels))[1]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def mondeq(seed: int) -> tuple[float, int]:
    """Train a monotone equilibrium model on all features."""
    model = MonDEQ(30, 15, 3, generator=torch.Generator().manual_seed(seed))
    return trained(model, clusters(seed), seed, lr=5e-3, decay=0.1, epochs=40), parameters(model)


def sklearn_peer(make: Callable[[int], object]) -> Peer:
    """Make a peer of a scikit-learn classifier."""

    def peer(seed: int) -> tuple[float, int]:
        x, y, z, labels = (value.numpy() for value in clusters(seed))
        model = make(seed).fit(x, y)
        coefficients = getattr(model, "coefs_", None) or [model.coef_]
        biases = getattr(model, "intercepts_", None) or [model.intercept_]
        return float(model.score(z, labels)), sum(a.size for a in (*coefficients, *biases))

    return peer


def spirals(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    train, test = three_spirals(600, generator=generator), three_spirals(2000, generator=generator)
    return train[0].float(), train[1], test[0].float(), test[1]


def network(edges: bool) -> Peer:
    """Two stationary layers of ten nodes, with all candidate edges or with none."""

    def peer(seed: int) -> tuple[float, int]:
        candidates = None if edges else torch.zeros(2, 0, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        model = StationaryNetwork(2, 3, nodes=10, layers=2, candidates=candidates, generator=generator)
        return trained(model, spirals(seed), seed, lr=1e-2, epochs=60), parameters(model)

    return peer


def mlp(seed: int) -> tuple[float, int]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    return trained(model, spirals(seed), seed, lr=1e-2, epochs=60), parameters(model)


def peers() -> None:
    """Accuracy on two tasks, one of which needs a graph."""
    contestants: dict[tuple[str, str], Peer] = {
        ("hidden clusters", "learned graph, read at 3 anchors"): our_clusters,
        ("hidden clusters", "monDEQ, 15 units, all features"): mondeq,
        ("hidden clusters", "MLP, 32 units, all features"): sklearn_peer(
            lambda seed: MLPClassifier((32,), alpha=1.0, max_iter=400, random_state=seed)
        ),
        ("hidden clusters", "linear, all features"): sklearn_peer(lambda seed: LogisticRegression(C=0.1)),
        ("three spirals", "two stationary layers, learned graphs"): network(edges=True),
        ("three spirals", "the same without edges"): network(edges=False),
        ("three spirals", "tanh MLP"): mlp,
    }
    rows = []
    for (task, name), peer in contestants.items():
        found = [peer(seed) for seed in SEEDS]
        accuracies = ", ".join(f"{accuracy:.3f}" for accuracy, _ in found)
        rows.append([name, task, found[0][1], accuracies])
        print(rows[-1], flush=True)
    notes = [
        "hidden clusters: 300 samples to learn from, 2,000 to test on",
        "the learned graph is driven at all fifteen nodes, its answer is read at three",
        "three spirals: 600 samples to learn from, 2,000 to test on; 60 epochs of Adam",
        "decays of the peers were fixed beforehand and not tuned",
    ]
    columns = ["model", "task", "parameters", "test accuracy, by seed"]
    title = "A learned graph beside models that have none"
    report("stationary_peers", title, columns, rows, notes, "three seeds")


def report(name: str, title: str, columns: list[str], rows: list, notes: list[str], protocol: str) -> None:
    """Show a table and write it down."""
    show(title, columns, rows)
    print(*notes, sep="\n")
    content = {"title": title, "machine": machine(), "protocol": f"one process, one thread, {protocol}"}
    write(name, {**content, "columns": columns, "rows": rows, "notes": notes})


if __name__ == "__main__":
    print(machine())
    race()
    peers()
