"""Measure what a dictionary costs in the place of a feed-forward block of equally many parameters.

An encoder of one layer with four heads learns two tasks, with an MLP block and with dictionaries of several
kinds. Every family has as many settings to choose from, on validation samples, with one seed; what was chosen
is trained anew with other seeds and judged on test samples.

    python benchmarks/incrt_frontier.py
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

from harness import machine, pin, show, write

pin()

import torch  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch import Tensor  # noqa: E402

from geomlib.incrt import SelfOrganisingEncoder, sentiment_with_negation  # noqa: E402
from geomlib.incrt.tasks import VOCABULARY  # noqa: E402

WIDTH, HEADS, STEPS, START = 32, 4, 1500, 20
TUNING_SEED, SEEDS = 0, (1, 2, 3)
PROTOCOL = (
    f"one layer, width {WIDTH}, {HEADS} heads, mean pooling; AdamW, {STEPS} steps, cosine after 50 steps of "
    "warm-up, gradient norm clipped to 1; three settings per family and task, chosen on validation samples "
    f"with seed {TUNING_SEED}; test accuracy with seeds {', '.join(map(str, SEEDS))}"
)


@dataclass(frozen=True)
class Task:
    """Samples in three parts, and what the encoder must know of them."""

    name: str
    parts: dict[str, tuple[Tensor, Tensor]]
    inputs: dict[str, int]
    classes: int
    batch: int


@dataclass(frozen=True)
class Setting:
    """One way to build and train a block."""

    family: str
    words: str
    block: dict[str, Any]
    lr: float
    weight_decay: float = 0.0
    beta: float = 0.0
    start: str | None = "tokens"


def digits_by_rows() -> Task:
    """Digits as 8 tokens of 8 pixels."""
    raw = load_digits()
    x = torch.tensor(raw.data, dtype=torch.float32).view(-1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.tensor(raw.target)[order]
    x = (x - x[:1000].mean()) / x[:1000].std()
    cuts = {"train": slice(0, 1000), "validation": slice(1000, 1400), "test": slice(1400, None)}
    return Task("digits by rows", {k: (x[c], y[c]) for k, c in cuts.items()}, {"in_features": 8}, 10, 32)


def sentiment() -> Task:
    """Sentences of eight words: with sixteen no block learns to negate within these steps."""
    parts = {}
    for seed, (name, n) in enumerate({"train": 48000, "validation": 4000, "test": 4000}.items()):
        found = sentiment_with_negation(n, length=8, generator=torch.Generator().manual_seed(seed))
        parts[name] = (found.x, found.y)
    return Task("sentiment with negation", parts, {"vocabulary": len(VOCABULARY)}, 2, 64)


def families() -> dict[str, list[Setting]]:
    """Three settings of each kind of block, all of about 8 d^2 parameters."""
    found = {
        "MLP, 128 GELU units": [
            Setting("MLP", f"weight decay {decay:g}", {"ffn": "mlp", "hidden": 128}, lr, decay)
            for lr, decay in ((8e-3, 0.0), (8e-3, 0.1), (4e-3, 0.0))
        ]
    }
    kinds = {
        "gated values, 1 x 130": (130, {"out": "gated"}),
        "values, 1 x 130": (130, {"out": "value"}),
        "values, 65 x 2": (130, {"out": "value", "groups": 65}),
        "barycentre, 1 x 228": (228, {"out": "barycentre"}),
    }
    for name, (K, options) in kinds.items():
        found[name] = [
            Setting(name, f"T {T:g}", {"prototypes": K, "dictionary": {**options, "temperature": T}}, lr)
            for lr, T in ((8e-3, 4.0), (8e-3, 16.0), (4e-3, 4.0))
        ]
    return found


def build(task: Task, setting: Setting, seed: int) -> SelfOrganisingEncoder:
    """Return an untrained encoder."""
    return SelfOrganisingEncoder(
        **task.inputs, d=WIDTH, dk=12, dv=8, max_heads=HEADS, heads=HEADS, outputs=task.classes, pool="mean",
        generator=torch.Generator().manual_seed(seed), **setting.block,
    )  # fmt: skip


def train(task: Task, setting: Setting, seed: int) -> SelfOrganisingEncoder:
    """Train an encoder; prototypes are set to tokens once these have left their initial state."""
    model = build(task, setting, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=setting.weight_decay)
    loss = model.structure_loss(setting.beta)
    x, y = task.parts["train"]
    for step in range(STEPS):
        factor = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = setting.lr * factor
        if step == START and setting.start and "dictionary" in setting.block:
            layer = model.layers[0]
            layer.keep_tokens = True
            with torch.no_grad():
                model(x[:256])
            layer.feed_forward.initialise_from(layer.tokens, setting.start, generator=generator)
            layer.keep_tokens = False
        index = torch.randint(len(x), (task.batch,), generator=generator)
        value = loss(model(x[index]), y[index])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SelfOrganisingEncoder, part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    return float((model(part[0]).logits.argmax(-1) == part[1]).double().mean())


def parameters(model: SelfOrganisingEncoder) -> int:
    """Count the numbers of the feed-forward block that are learned."""
    return sum(p.numel() for p in model.layers[0].feed_forward.parameters())


def choose(task: Task, settings: list[Setting]) -> tuple[Setting, float]:
    """Return the setting with the best validation accuracy, and that accuracy."""
    scores = [accuracy(train(task, s, TUNING_SEED), task.parts["validation"]) for s in settings]
    best = max(range(len(settings)), key=scores.__getitem__)
    return settings[best], scores[best]


def judge(task: Task, setting: Setting) -> tuple[list[float], int]:
    """Return test accuracies over the seeds, and the size of the block."""
    models = [train(task, setting, seed) for seed in SEEDS]
    return [accuracy(model, task.parts["test"]) for model in models], parameters(models[0])


def shown(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def variants(dictionary: Setting, mlp: Setting) -> list[tuple[str, Setting]]:
    """Change one thing about what was chosen: size, start, the dictionary's own loss."""
    block = dictionary.block["dictionary"]
    changes: dict[str, tuple[Setting, dict[str, Any]]] = {
        "gated values, 1 x 32": (dictionary, {"block": {"prototypes": 32, "dictionary": block}}),
        "MLP, 32 GELU units": (mlp, {"block": {"ffn": "mlp", "hidden": 32}}),
        "gated values, 1 x 130, start at the mean": (dictionary, {"start": None}),
        "gated values, 1 x 130, with its own loss": (dictionary, {"beta": 1.0}),
    }
    return [(name, replace(setting, **change)) for name, (setting, change) in changes.items()]


if __name__ == "__main__":
    print(machine())
    rows: list[list[object]] = []
    notes: list[str] = []
    columns = ["task", "block", "parameters", "chosen", "validation %", "test %", "points below the MLP"]
    title = "A dictionary in the place of the feed-forward block"
    for task in (sentiment(), digits_by_rows()):
        reference = 0.0
        gaps: dict[str, float] = {}
        chosen: dict[str, Setting] = {}
        entries: list[tuple[str, Setting, float | None]] = []
        for name, settings in families().items():
            best, score = choose(task, settings)
            chosen[name] = best
            entries.append((name, best, score))
            print(task.name, name, best.words, best.lr, f"{score:.4f}", flush=True)
        pair = variants(chosen["gated values, 1 x 130"], chosen["MLP, 128 GELU units"])
        entries += [(name, setting, None) for name, setting in pair]
        for name, setting, score in entries:
            values, size = judge(task, setting)
            mean = 100 * statistics.mean(values)
            reference = reference or mean
            if score is not None:
                gaps[name] = reference - mean
            found = "" if score is None else f"{100 * score:.1f}"
            what = f"rate {setting.lr:g}, {setting.words}"
            rows.append([task.name, name, size, what, found, shown(values), f"{reference - mean:+.1f}"])
            print(rows[-1], flush=True)
        near = [name for name, gap in gaps.items() if gap <= 1 and not name.startswith("MLP")]
        notes.append(
            f"{task.name}: within one point of the MLP block of equal parameters: {', '.join(near) or 'none'}"
        )
    notes.append(
        "T is absolute; tokens are layer-normalised; what has no validation entry varies what was chosen"
    )
    show(title, columns, rows)
    print(*notes, sep="\n")
    content = {"title": title, "machine": machine(), "protocol": PROTOCOL}
    if "--dry" not in sys.argv:
        write("incrt_frontier", {**content, "columns": columns, "rows": rows, "notes": notes})
