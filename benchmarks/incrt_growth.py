"""Grow heads where the number that is needed is planted, and on real rows, beside what does not grow.

Trainings of several seeds, too long for a page. Each finished run is kept in the table's own file, so a run
that was broken off goes on where it stopped; `--fresh` begins anew.

    python benchmarks/incrt_growth.py [--fresh] [planted] [twin] [guard] [real] [ablation]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

from harness import RESULTS, machine, pin, show, write

pin()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from geomlib.incrt import (  # noqa: E402
    GrowthConfig,
    GrowthController,
    SelfOrganisingEncoder,
    between_scatter,
    concentration,
    covariance,
    effective_rank,
    perplexity,
    prune_report,
    separation,
    used_codes,
)
from geomlib.incrt.tasks import IGNORED, multi_offset_copy  # noqa: E402
from geomlib.lab import data  # noqa: E402

SEEDS = range(5)
DWELL = 350
BATCH = 32
RATE = 4e-3
PROVIDED = 8  # heads of the over-provisioned model
PROTOCOL = "one process, one thread"
BLIND = ("grown on a plateau", "grown by a clock")  # what looks at no operator, and so has no signal


@dataclass(frozen=True)
class Task:
    """Where batches come from, what the model looks like, and how long it learns."""

    name: str
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    sizes: dict[str, Any]
    steps: int
    classes: int


def copying(offsets: int, steps: int = 1600) -> Task:
    """Return the task with a planted number of heads."""
    test = multi_offset_copy(1000, offsets=offsets, generator=torch.Generator().manual_seed(10_000))
    return Task(
        f"copy {offsets}",
        lambda n, generator: tuple(multi_offset_copy(n, offsets=offsets, generator=generator)),
        tuple(test),
        {"vocabulary": 5, "outputs": (offsets, 5), "pool": None, "dv": 4},
        steps,
        classes=5,
    )


def rows_of(name: str, steps: int, train_size: int | None = None) -> Task:
    """Return pictures read row by row: a token is a row."""
    pictures = data.load(name, train_size=train_size, download=False)
    x, y = pictures.train.x.squeeze(1), pictures.train.y

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(y), (n,), generator=generator)
        return x[index], y[index]

    sizes = {"in_features": x.shape[2], "outputs": 10, "pool": "mean", "dv": 8}
    return Task(name, draw, (pictures.test.x.squeeze(1), pictures.test.y), sizes, steps, classes=10)


@dataclass(frozen=True)
class Recipe:
    """What decides the structure: heads from the start, or a motor by which they are born."""

    name: str
    heads: int = 1
    motor: str | None = None
    frac: float = 0.15
    max_heads: int = 10
    prototypes: int = 16
    options: tuple[tuple[str, object], ...] = ()  # of the encoder
    dictionary: tuple[tuple[str, object], ...] = ()
    growth: tuple[tuple[str, object], ...] = ()


def build(task: Task, recipe: Recipe, seed: int) -> SelfOrganisingEncoder:
    """Build the model of a task at teaching size: one layer, width 32."""
    sizes = {"d": 32, "dk": 12, "max_heads": recipe.max_heads, "heads": recipe.heads}
    return SelfOrganisingEncoder(
        **sizes,
        **task.sizes,
        prototypes=recipe.prototypes,
        dictionary={"temperature": 4.0, **dict(recipe.dictionary)},
        generator=torch.Generator().manual_seed(seed),
        **dict(recipe.options),
    )


def decayed(progress: float) -> float:
    """Return the factor of the rate: 1 for the first half, then half a cosine down to a twentieth."""
    return 1.0 if progress < 0.5 else max(0.05, 0.5 * (1 + math.cos(2 * math.pi * (progress - 0.5))))


def parameters(model: SelfOrganisingEncoder, heads: int) -> int:
    """Count the parameters at work: those outside the heads, and those of `heads` heads."""
    attention = model.layers[0].attention
    per_head = attention.d * (2 * attention.dk + 2 * attention.dv)
    everything = sum(p.numel() for p in model.parameters())
    return everything + (heads - attention.max_heads) * per_head


@torch.no_grad()
def accuracy(model: SelfOrganisingEncoder, samples: tuple[Tensor, Tensor]) -> float:
    x, y = samples
    training = model.training
    model.eval()
    right = torch.cat([model(part).logits.argmax(-1) for part in x.split(500)]) == y
    model.train(training)
    return right[y != IGNORED].double().mean().item()


def grower(
    task: Task, recipe: Recipe, model: SelfOrganisingEncoder, optimizer: torch.optim.Optimizer, seed: int
) -> GrowthController:
    """Set up growth; a plateau is 15 checks without a loss better by 1 %, above 15 % of chance."""
    options: dict[str, Any] = {
        "motor": recipe.motor or "grad",
        "frac": recipe.frac,
        "dwell": DWELL,
        "ema": 0.6,
    }
    if recipe.motor is None:
        options["theta"] = math.inf
    if recipe.motor is None or recipe.motor == "plateau":
        options["prune"] = False
    if recipe.motor == "plateau":
        options["loss_floor"] = recipe.frac * math.log(task.classes)
    config = GrowthConfig(**{**options, **dict(recipe.growth)})
    return GrowthController(model, optimizer, config, generator=torch.Generator().manual_seed(seed))


def train(
    task: Task, recipe: Recipe, seed: int, *, until: int | None = None, watch: bool = False
) -> tuple[SelfOrganisingEncoder, dict[str, Any]]:
    """Train one model; the record says what became of it, with `watch` also how its dictionary came to be."""
    began = time.process_time()
    model = build(task, recipe, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    controller = grower(task, recipe, model, optimizer, seed)
    objective, seen = model.structure_loss(), controller.watch(lambda output, y: ask(output.logits, y))
    probe = task.draw(256, torch.Generator().manual_seed(20_000))
    portraits: dict[str, dict[str, float]] = {}
    work, losses = 0, []
    for step in range(1, (until or task.steps) + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * decayed(step / task.steps)
        x, y = task.draw(BATCH, generator)
        output = model(x)
        optimizer.zero_grad()
        objective(output, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(seen(output, y).item())
        optimizer.step()
        controller.step()
        work += parameters(model, model.heads[0])
        if watch and (step % 10 == 0 or step == task.steps):
            portraits[str(step)] = portrait(model, probe[0], controller)
    last = controller.history[-1]
    record: dict[str, Any] = {
        "heads": model.heads[0],
        "accuracy": round(accuracy(model, task.test), 4),
        "births": [event.step for event in controller.events if event.kind == "grow"],
        "prunes": [event.step for event in controller.events if event.kind == "prune"],
        "loss": round(mean(losses[-50:]), 5),
        "signal": None if math.isinf(last.threshold) else round(last.signal / last.threshold, 4),
        "parameters": parameters(model, model.heads[0]),
        "parameter_steps": work,
        "seconds": round(time.process_time() - began, 1),
    }
    if watch:
        record["portraits"] = portraits
    return model, record


def ask(logits: Tensor, y: Tensor) -> Tensor:
    """Return the loss of the task alone."""
    return cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def portrait(model: SelfOrganisingEncoder, x: Tensor, controller: GrowthController) -> dict[str, float]:
    """Measure the dictionary on a probe, and what the gate sees."""
    layer = model.layers[0]
    training = model.training
    model.eval()
    stream = model.embed(x)
    z = layer.norm_feed_forward(stream + layer.attention(layer.norm_attention(stream)))
    quantised = layer.feed_forward(z)[1]
    model.train(training)
    P = layer.feed_forward.prototypes
    C = covariance(z)
    found = {
        "rank of tokens": effective_rank(C),
        "rank of prototypes": effective_rank(between_scatter(P, quantised.usage)),
        "perplexity": perplexity(quantised.usage),
        "distance": separation(P).mean if len(P) > 1 else torch.zeros(()),
        "codes": used_codes(quantised.q),
        "concentration": concentration(quantised.q),
        "eigenvalue": torch.linalg.eigvalsh(C)[-1],
        "signal": torch.linalg.eigvalsh(controller.operator())[-1],
        "bare signal": torch.linalg.eigvalsh(controller.operator(projected=False))[-1],
    }
    return {name: float(f"{float(value):.5g}") for name, value in found.items()}


# Pruning of a model that had too many heads.


def importance(model: SelfOrganisingEncoder, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Weigh heads in four ways: what each adds, what the loss would miss, what it directs, and chance."""
    layer = model.layers[0]
    stream = model.embed(x).detach()
    xh = layer.norm_attention(stream)
    outputs = layer.attention.head_outputs(xh).detach().requires_grad_()
    middle = stream + outputs.sum(1)
    after = middle + layer.feed_forward(layer.norm_feed_forward(middle))[0]
    after = model.norm(after)
    after = after.mean(1) if model.pool == "mean" else after
    ask(model.readout(after).unflatten(-1, model.outputs), y).backward()
    assert outputs.grad is not None
    report = prune_report(layer.attention, xh)
    return {
        "output": report.output,
        "Michel": (outputs.grad * outputs.detach()).sum((2, 3)).abs().mean(0),
        "directed energy": report.energy,
        "chance": torch.rand(
            len(report.output), generator=torch.Generator().manual_seed(len(x) + len(report.output))
        ),
    }


def prune_by(model: SelfOrganisingEncoder, task: Task, criterion: str, seed: int) -> list[dict[str, float]]:
    """Take heads away one by one, the least important first; note what was promised and what happened."""
    model = copy.deepcopy(model).eval()
    attention = model.layers[0].attention
    x, y = task.draw(500, torch.Generator().manual_seed(30_000 + seed))
    xh = model.layers[0].norm_attention(model.embed(x)).detach()
    found = [
        {
            "heads": attention.active,
            "accuracy": accuracy(model, task.test),
            "held out": accuracy(model, (x, y)),
        }
    ]
    while attention.active > 1:
        weights = importance(model, x, y)[criterion]
        model.zero_grad()
        head = int(weights.argmin())
        report = prune_report(attention, xh)
        with torch.no_grad():
            before = attention(xh)
            attention.prune(head)
            moved = (attention(xh) - before).norm(dim=-1).max()
        found.append(
            {
                "heads": attention.active,
                "accuracy": accuracy(model, task.test),
                "held out": accuracy(model, (x, y)),
                "bound": float(report.bound[head]),
                "moved": float(moved),
            }
        )
    return [{name: float(f"{value:.5g}") for name, value in row.items()} for row in found]


def provided(task: Task, recipe: Recipe, seed: int, criteria: tuple[str, ...]) -> dict[str, Any]:
    """Train with too many heads, then prune to the fewest that lose at most half a point of accuracy."""
    model, record = train(task, recipe, seed)
    record["pruned"] = {criterion: prune_by(model, task, criterion, seed) for criterion in criteria}
    by_output = record["pruned"]["output"]
    enough = by_output[0]["held out"] - 0.005
    kept = [row for row in by_output if row["held out"] >= enough][-1]
    record |= {
        "heads": int(kept["heads"]),
        "accuracy": kept["accuracy"],
        "parameters": parameters(model, int(kept["heads"])),
    }
    return record


# Tables, and the runs behind them.


def plain(task: Task, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train, and keep the record."""
    return train(task, recipe, seed)[1]


def watched(task: Task, recipe: Recipe, seed: int, birth: int | None = None) -> dict[str, Any]:
    """Train, and keep the portraits before and one dwell after each birth, or after one that may not be."""
    until = None if birth is None else birth + DWELL
    record = train(task, recipe, seed, until=until, watch=True)[1]
    births = record["births"] if birth is None else [birth]
    kept = {str(step) for born in births for step in (born - 10, born + DWELL - 10, born + DWELL)}
    portraits = record["portraits"].items()
    return {**record, "portraits": {step: found for step, found in portraits if step in kept}}


Make = Callable[[Task, Recipe, int], dict[str, Any]]


class Store:
    """The runs of a table, kept in its file as they come: a broken series goes on where it stopped."""

    def __init__(self, name: str, fresh: bool) -> None:
        self.name = name
        path = RESULTS / f"{name}.json"
        self.table: dict[str, Any] = json.loads(path.read_text("utf8")) if path.exists() and not fresh else {}
        self.runs: list[dict[str, Any]] = self.table.setdefault("runs", [])

    def get(self, task: Task, recipe: Recipe, seed: int, make: Make) -> dict[str, Any]:
        """Return a stored run, or make and store it."""
        key = {"task": task.name, "recipe": recipe.name, "seed": seed}
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return run
        run = {**key, **make(task, recipe, seed)}
        self.runs.append(run)
        self.save()
        print(
            *(f"{name} {value}" for name, value in run.items() if name not in ("portraits", "pruned")),
            flush=True,
        )
        return run

    def save(self, **content: object) -> None:
        seconds = sum(float(run["seconds"]) for run in self.runs)
        self.table |= {"title": "", "columns": [], "rows": [], "notes": []} | self.table | content
        self.table |= {
            "machine": machine(),
            "protocol": f"{PROTOCOL}; {seconds:.0f} processor seconds in all",
        }
        self.table["runs"] = self.table.pop("runs")  # last, since they are long
        write(self.name, self.table)
        if content:
            show(str(self.table["title"]), self.table["columns"], self.table["rows"])
            print(*self.table["notes"], sep="\n")


def spread(values: list[float], digits: int = 3) -> str:
    """Write mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def summed_up(runs: list[dict[str, Any]]) -> list[list[object]]:
    """Make one row per task and recipe: head counts of the seeds in order, accuracy, size and cost."""
    groups: dict[tuple[object, object], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["recipe"]), []).append(run)
    rows: list[list[object]] = []
    for (task, recipe), found in groups.items():
        ratios = [float(run["signal"]) for run in found if run["signal"] is not None]
        rows.append(
            [
                task,
                recipe,
                " ".join(str(run["heads"]) for run in found),
                spread([float(run["accuracy"]) for run in found]),
                spread(ratios, 2) if ratios and str(recipe) not in BLIND else None,
                f"{mean(int(run['parameters']) for run in found):.0f}",
                f"{mean(int(run['parameter_steps']) for run in found) / 1e6:.2f}",
            ]
        )
    return rows


COLUMNS = [
    "task",
    "model",
    "heads, per seed",
    "accuracy",
    "signal / threshold",
    "parameters",
    "parameter-steps (M)",
]


def planted(fresh: bool) -> None:
    """Grow where 1 to 4 heads are planted, with a dictionary of 16 and with one prototype, a constant."""
    store = Store("incrt_growth", fresh)
    grown = Recipe("grown", motor="grad")
    bare = replace(grown, name="grown, attention alone", prototypes=1)
    plateau = Recipe("grown on a plateau", motor="plateau")
    heads_motor = Recipe("grown by the heads motor", motor="heads", frac=0.1)
    many = Recipe(f"{PROVIDED} heads, then pruned", heads=PROVIDED)
    for seed in SEEDS:
        for offsets in (1, 2, 3, 4):
            store.get(copying(offsets), grown, seed, watched if offsets > 2 else plain)
    for seed in SEEDS[:3]:
        store.get(copying(1), heads_motor, seed, plain)
        for offsets in (2, 3, 4):
            fewer = Recipe(f"fixed, {offsets - 1} heads", heads=offsets - 1)
            store.get(copying(offsets), fewer, seed, plain)
        two = Recipe("fixed, 2 heads, attention alone", heads=2, prototypes=1)
        for recipe in (plateau, bare, Recipe("fixed, 3 heads", heads=3), two):
            store.get(copying(3), recipe, seed, plain)
        criteria = ("output", "Michel", "directed energy", "chance")
        store.get(copying(3), many, seed, partial(provided, criteria=criteria))
    order = {"grown": 0, "grown, attention alone": 1}
    store.runs.sort(
        key=lambda run: (run["task"], order.get(str(run["recipe"]), 2), run["recipe"], run["seed"])
    )
    store.save(
        title="Growing heads where 1 to 4 are planted",
        columns=COLUMNS,
        rows=summed_up(store.runs),
        notes=[
            "copy k: name the last k symbols at every place; a head can carry about one",
            "attention alone: a dictionary of one prototype, which adds a constant",
            f"Adam at {RATE}, batches of {BATCH}, rate constant for half of the steps, then decaying",
            f"dwell {DWELL} steps, threshold 0.15 of the signal of steps 20 to 60",
            "a plateau: 15 checks without a loss better by 1 %, while it is above 0.15 of the loss of chance",
            f"{PROVIDED} heads are pruned by output to the fewest that lose at most half a point of accuracy",
        ],
    )


def twins(fresh: bool) -> None:
    """Repeat the training before each birth, and forbid it."""
    store = Store("incrt_growth_twin", fresh)
    base = json.loads((RESULTS / "incrt_growth.json").read_text("utf8"))["runs"]
    events = []
    for run in base:
        if run["recipe"] != "grown" or "portraits" not in run:
            continue
        task = copying(int(run["task"].split()[1]))
        for count, birth in enumerate(run["births"], start=1):
            if birth + DWELL > task.steps:
                continue
            recipe = Recipe(f"at most {count} heads", motor="grad", growth=(("max_heads", count),))
            make = partial(watched, birth=birth)
            twin = store.get(task, recipe, run["seed"], make)
            before = run["portraits"][str(birth - 10)]
            assert twin["portraits"][str(birth - 10)] == before, "the twin differed before the birth"
            # Where the next head is born at once, its direction is gone: look one check sooner.
            end = str(birth + DWELL - 10 if birth + DWELL in run["births"] else birth + DWELL)
            after = (run["portraits"][end], twin["portraits"][end])
            events.append({"task": task.name, "seed": run["seed"], "birth": birth, "before": before,
                           "grown": after[0], "twin": after[1]})  # fmt: skip
    rows: list[list[object]] = []
    for name in (
        "rank of tokens",
        "rank of prototypes",
        "perplexity",
        "distance",
        "eigenvalue",
        "bare signal",
        "signal",
    ):
        values = {kind: [event[kind][name] for event in events] for kind in ("before", "grown", "twin")}
        change = [g - t for g, t in zip(values["grown"], values["twin"], strict=True)]
        low, high = bootstrap(change, [event["seed"] for event in events])
        shown = [*(f"{mean(v):.3g}" for v in values.values()), f"{mean(change):+.3g}"]
        up = f"{sum(c > 0 for c in change)} of {len(change)}"
        rows.append([name, *shown, f"{low:+.3g} ... {high:+.3g}", up])
    store.table["events"] = events
    store.save(
        title="What a birth changes, one dwell later, beside a twin of the same seed without it",
        columns=[
            "measure",
            "before",
            "grown",
            "twin",
            "grown - twin",
            "95 % interval",
            "births that raised it",
        ],
        rows=rows,
        notes=[
            "copy 3 and copy 4, all births of five seeds with a dwell left",
            "until the birth both runs are the same to the bit; interval: bootstrap over seeds, 5000 draws",
            "signal: gradient motor; bare: with no direction taken out",
        ],
    )


def bootstrap(values: list[float], seeds: list[int], draws: int = 5000) -> tuple[float, float]:
    """Return the 95 % interval of the mean when whole seeds are drawn again."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        torch.tensor([v for v, s in zip(values, seeds, strict=True) if s == seed])
        for seed in sorted(set(seeds))
    ]
    means = []
    for _ in range(draws):
        chosen = torch.randint(len(groups), (len(groups),), generator=generator)
        means.append(torch.cat([groups[i] for i in chosen]).mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def guard(fresh: bool) -> None:
    """Let the quantisation loss reach the encoder or not, with and without a gain in the layer norms."""
    store = Store("incrt_growth_guard", fresh)
    task = copying(3, 1000)
    for seed in SEEDS[:3]:
        for stop, affine in ((True, False), (False, False), (False, True)):
            recipe = Recipe(
                f"{'detached' if stop else 'attached'}, {'with' if affine else 'no'} gain",
                heads=3, options=(("affine", affine),), dictionary=(("stop_grad", stop),),
            )  # fmt: skip
            store.get(task, recipe, seed, ending)
    rows: list[list[object]] = []
    for name in dict.fromkeys(str(run["recipe"]) for run in store.runs):
        found = [run for run in store.runs if run["recipe"] == name]
        cells = [spread([float(run["last"][key]) for run in found], 2)
                 for key in ("codes", "rank of tokens", "eigenvalue", "concentration")]  # fmt: skip
        rows.append([name, spread([float(run["accuracy"]) for run in found]), *cells])
    store.save(
        title="The guard against collapse: copy 3, three heads, three seeds",
        columns=["quantisation loss", "accuracy", "codes used of 16", "rank of tokens", "largest eigenvalue",
                 "concentration"],
        rows=rows,
        notes=["detached: the loss moves prototypes only; gain: the layer norms have learned scales"],
    )  # fmt: skip


def ending(task: Task, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train and keep the last portrait."""
    record = train(task, recipe, seed, watch=True)[1]
    portraits = record.pop("portraits")
    return {**record, "last": portraits[str(task.steps)]}


def real(fresh: bool) -> None:
    """Grow on digits and clothes row by row, beside what has that size from the start."""
    store = Store("incrt_growth_real", fresh)
    tasks = [rows_of("digits", 1000)]
    try:
        tasks.append(rows_of("fashion_mnist", 800))
    except FileNotFoundError as missing:
        print(missing)
    grown = Recipe("grown", motor="grad")
    for seed in SEEDS[:3]:
        for task in tasks:
            found = store.get(task, grown, seed, plain)
            same = {"heads": int(found["heads"])}
            mlp = (("ffn", "mlp"), ("hidden", 24))
            for recipe in (
                Recipe("grown on a plateau", motor="plateau"),
                Recipe("fixed, one head"),
                Recipe("fixed, as many as were grown", **same),
                Recipe("fixed, as many, perceptron block", options=mlp, **same),
            ):
                store.get(task, recipe, seed, plain)
            many = Recipe(f"{PROVIDED} heads, then pruned", heads=PROVIDED)
            store.get(task, many, seed, partial(provided, criteria=("output",)))
    place = {task.name: k for k, task in enumerate(tasks)}
    store.runs.sort(key=lambda run: (place[str(run["task"])], run["recipe"], run["seed"]))
    store.save(
        title="Growing heads on digits and clothes read row by row",
        columns=COLUMNS,
        rows=summed_up(store.runs),
        notes=[
            f"batches of {BATCH}: {', '.join(f'{task.steps} of {task.name}' for task in tasks)}",
            "perceptron block: 24 hidden units, as many parameters as the dictionary",
            "accuracy on the test set; pruning decides on training samples",
        ],
    )


def ablation(fresh: bool) -> None:
    """Vary thresholds and births."""
    store = Store("incrt_growth_ablation", fresh)
    grown = Recipe("grown", motor="grad")
    recipes = [
        replace(grown, name="threshold 0.05", frac=0.05),
        replace(grown, name="threshold 0.3", frac=0.3),
        replace(grown, name="random first columns", growth=(("birth", "random"),)),
    ]
    for seed in SEEDS[:3]:
        task = copying(3)
        for recipe in recipes:
            store.get(task, recipe, seed, plain)
    store.runs.sort(key=lambda run: (run["task"], run["recipe"], run["seed"]))
    store.save(
        title="Thresholds and births, varied",
        columns=COLUMNS,
        rows=summed_up(store.runs),
        notes=["else as in the table of planted heads, threshold 0.15"],
    )


def clock(fresh: bool) -> None:
    """Grow by the clock: a head at every dwell while the loss is above the floor of the plateau rule."""
    store = Store("incrt_growth_clock", fresh)
    ticking = (("persistence", 1), ("plateau_tol", 1.0))  # a tolerance of 1: no loss counts as better
    recipe = Recipe("grown by a clock", motor="plateau", growth=ticking)
    for seed in SEEDS[:3]:
        for offsets in (1, 2, 3, 4):
            store.get(copying(offsets), recipe, seed, plain)
    store.runs.sort(key=lambda run: (run["task"], run["recipe"], run["seed"]))
    store.save(
        title="Growing by the clock, without a look at the operator",
        columns=COLUMNS,
        rows=summed_up(store.runs),
        notes=[
            f"a head every {DWELL} steps, in a random direction, while the loss is above 0.15 of chance",
            "else as in the table of planted heads",
        ],
    )


SECTIONS = {
    "planted": planted,
    "twin": twins,
    "guard": guard,
    "real": real,
    "ablation": ablation,
    "clock": clock,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are there")
    options = parser.parse_args()
    for section in options.sections or SECTIONS:
        SECTIONS[section](options.fresh)
