"""Measure the self-organising encoder beside torch's own, its statistics, and the dictionary beside an MLP.

The peer is a stack of `torch.nn.TransformerEncoderLayer`, pre-norm and without dropout, between the same
embedding and the same readout; heads, width, depth, activation and optimiser are equal.

    python benchmarks/incrt.py
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import harness
from harness import Timing, interleave, machine, pin, show, write

pin()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from geomlib.incrt import DDCLBlock, GrowthConfig, GrowthController, SelfOrganisingEncoder  # noqa: E402

harness.PEERS = (*harness.PEERS, "vector-quantize-pytorch")
warnings.simplefilter("ignore")

SIZES = ((32, 32, 64, 4), (16, 64, 128, 4), (8, 128, 256, 8))  # batch, tokens, width, heads
LAYERS = 2
FEATURES, CLASSES = 16, 10
ROUNDS, PERIODS = 9, 9
TRIMMED = "over rounds: ratios without the least and the largest"
CHECK_EVERY = GrowthConfig().check_every
GOAL, OVERHEAD = 1.0, 2.0
PEER, PLAIN = "torch", "torch, not fused"
COMPILED = (PEER, "mlp", "ddcl, equal parameters")
PROTOCOL = (
    "one process, one thread, processor time, contestants in turn within each round, each after a call that "
    f"does not count; median of {ROUNDS}"
)


class Peer(nn.Module):
    """What `SelfOrganisingEncoder` is, with torch's layers in the place of ours."""

    def __init__(self, d: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(FEATURES, d)
        self.register_buffer("positions", torch.randn(tokens, d))
        layer = nn.TransformerEncoderLayer(
            d, heads, 4 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.readout = nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layers(self.embedding(x) + self.positions))


def ours(d: int, heads: int, *, slots: int | None = None, **options: object) -> SelfOrganisingEncoder:
    """Build an encoder of ours as wide, deep and many-headed as the peer."""
    return SelfOrganisingEncoder(
        in_features=FEATURES, d=d, dk=d // heads, dv=d // heads, heads=heads, max_heads=slots or heads,
        layers=LAYERS, outputs=CLASSES, generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip


def measured(output: object, y: Tensor) -> Tensor:
    """Loss of the peer."""
    assert isinstance(output, Tensor)
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def spent(work: Callable[[], object]) -> Callable[[], float]:
    """Make a candidate that returns the processor seconds of a call, of several if one is very short."""

    def candidate() -> float:
        times, start = 0, time.process_time()
        while True:
            work()
            times += 1
            seconds = time.process_time() - start
            if seconds > 2e-2:
                return seconds / times

    return candidate


def stepper(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    run: Callable[[Tensor], object] | None = None,
    config: GrowthConfig | None = None,
    looking: list[float] | None = None,
) -> Callable[[], None]:
    """Make a training step; with a configuration of growth, one that a controller looks at, for so long."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss = model.structure_loss() if isinstance(model, SelfOrganisingEncoder) else measured
    controller = None if config is None else GrowthController(model, optimiser, config)
    run = model if run is None else run

    def step() -> None:
        optimiser.zero_grad()
        loss(run(x), y).backward()
        optimiser.step()
        if controller is not None and looking is not None:
            start = time.process_time()
            controller.step()
            looking.append(time.process_time() - start)

    return step


def batch(size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets of one size."""
    rows, tokens, *_ = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, tokens, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (rows, tokens), generator=generator)


def models(size: tuple[int, int, int, int]) -> dict[str, nn.Module]:
    """Contestants of a training step."""
    _, tokens, d, heads = size
    torch.manual_seed(0)
    return {
        PEER: Peer(d, heads, tokens),
        "mlp": ours(d, heads, ffn="mlp"),
        "mlp, half the slots empty": ours(d, heads, ffn="mlp", slots=2 * heads),
        "ddcl, equal parameters": ours(d, heads, prototypes=4 * d, dictionary={"out": "value"}),
        "ddcl, 16 prototypes": ours(d, heads, prototypes=16),
    }


def against(timings: dict[str, Timing], name: str, peer: str = PEER) -> float:
    """How many times as fast as the peer."""
    return timings[name].times_faster_than(timings[peer])


def spread(timings: dict[str, Timing], name: str, peer: str = PEER) -> str:
    """Least and largest ratio of the rounds."""
    pairs = zip(timings[name].rounds, timings[peer].rounds, strict=True)
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return f"{ratios[1]:.2f} ... {ratios[-2]:.2f}"


def rows_of(
    size: tuple[int, int, int, int], how: str, sizes: dict[str, int], timings: dict[str, Timing]
) -> list[list[object]]:
    """Rows of a table of ratios to the peer."""
    return [
        [
            how, *size, name, number, f"{1e3 * timings[name].seconds:.2f}", f"{against(timings, name):.2f}",
            spread(timings, name),
        ]
        for name, number in sizes.items()
    ]  # fmt: skip


def training() -> tuple[list[list[object]], list[str]]:
    """Rows and verdicts of a training step, as it comes and compiled."""
    rows: list[list[object]] = []
    notes = [f"{LAYERS} layers, pre-norm, no dropout, GELU, hidden 4 d, Adam; statistics off", TRIMMED]
    for size in SIZES:
        x, y = batch(size)
        for how in ("eager", "compiled"):
            contestants = models(size)
            sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in contestants.items()}
            steps = {}
            for name, model in contestants.items():
                if how == "compiled" and name not in COMPILED:
                    continue
                torch.compiler.reset()
                steps[name] = stepper(model, x, y, torch.compile(model) if how == "compiled" else None)
                try:
                    steps[name]()
                except Exception as error:
                    del steps[name]
                    notes.append(f"{name}, d = {size[2]}, {how}: fails with {type(error).__name__}")
            if PEER not in steps:
                continue
            timings = interleave({name: spent(step) for name, step in steps.items()}, ROUNDS)
            rows += rows_of(size, how, {name: sizes[name] for name in steps}, timings)
            if "mlp" in steps:
                notes.append(verdict(f"training step, d = {size[2]}, {how}", against(timings, "mlp")))
    return rows, notes


def inference() -> tuple[list[list[object]], list[str]]:
    """Rows and verdicts of a pass in evaluation mode: with empty slots, and without them."""
    rows: list[list[object]] = []
    notes = [f"{LAYERS} layers, pre-norm, GELU, hidden 4 d, nothing recorded", TRIMMED]
    for size in SIZES:
        x, _ = batch(size)
        _, tokens, d, heads = size
        whole = ours(d, heads, ffn="mlp", slots=2 * heads).eval()
        small = whole.compact()
        with torch.no_grad():
            torch.testing.assert_close(small(x).logits, whole(x).logits, rtol=1e-5, atol=1e-6)
        contestants = {
            PEER: Peer(d, heads, tokens).eval(),
            PLAIN: Peer(d, heads, tokens).eval(),
            "mlp, half the slots empty": whole,
            "mlp, compact": small,
            "ddcl, equal parameters, compact": ours(
                d, heads, prototypes=4 * d, dictionary={"out": "value"}
            ).compact(),
        }
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in contestants.items()}
        passes = {name: spent(partial(quietly, model, x, name)) for name, model in contestants.items()}
        timings = interleave(passes, ROUNDS)
        rows += rows_of(size, "inference", sizes, timings)
        notes.append(verdict(f"inference, d = {d}, compact", against(timings, "mlp, compact")))
        notes.append(
            f"inference, d = {d}, compact: {against(timings, 'mlp, compact', PLAIN):.2f} times as fast as "
            "torch's layers without their fused form for evaluation, which adds and activates in place"
        )
    return rows, notes


@torch.no_grad()
def quietly(model: nn.Module, x: Tensor, name: str) -> object:
    """Run a pass that records nothing, through torch's fused layer unless the name is that without."""
    torch.backends.mha.set_fastpath_enabled(name != PLAIN)
    return model(x)


def verdict(what: str, ratio: float, goal: float = GOAL, peer: str = "torch's") -> str:
    """Say whether a goal was reached."""
    return f"{what}: {ratio:.2f} times as fast as {peer}; goal {goal:g}: " + (
        "reached" if round(ratio, 2) >= goal else "missed"
    )


def statistics() -> tuple[list[list[object]], list[str]]:
    """Rows and verdicts of what growth costs: periods of steps with a controller beside steps without."""
    rows: list[list[object]] = []
    notes = []
    for size in SIZES:
        x, y = batch(size)
        _, _, d, heads = size
        # No threshold is ever exceeded: what is measured is looking, not growing.
        config = GrowthConfig(theta=float("inf"))
        looking: list[float] = []
        steps = {
            "without": stepper(ours(d, heads, ffn="mlp"), x, y),
            "with": stepper(ours(d, heads, ffn="mlp"), x, y, config=config, looking=looking),
        }

        def period(steps: dict[str, Callable[[], None]] = steps) -> list[float]:
            """Take the steps of a period in turn, and return the seconds of each contestant."""
            seconds = dict.fromkeys(steps, 0.0)
            for _ in range(CHECK_EVERY):
                for name, step in steps.items():
                    start = time.process_time()
                    step()
                    seconds[name] += time.process_time() - start
            return list(seconds.values())

        period()
        looking.clear()
        pairs = [period() for _ in range(PERIODS)]
        spells = [looking[k : k + CHECK_EVERY] for k in range(0, len(looking), CHECK_EVERY)]
        plain = median(bare for bare, _ in pairs) / CHECK_EVERY
        check = median(spell[-1] for spell in spells)
        share = median(100 * sum(spell) / bare for spell, (bare, _) in zip(spells, pairs, strict=True))
        whole = sorted(100 * (seen / bare - 1) for bare, seen in pairs)
        quarter = len(whole) // 4
        rows.append(
            [
                *size, f"{1e3 * plain:.2f}", f"{1e3 * check:.2f}",
                f"{1e3 * median(t for spell in spells for t in spell[:-1]):.3f}", f"{share:.1f}",
                f"{median(whole):.1f}", f"{whole[quarter]:.1f} ... {whole[-1 - quarter]:.1f}",
            ]
        )  # fmt: skip
        notes.append(
            f"d = {d}: training with statistics takes {median(whole):.1f} % longer, {share:.1f} % in the "
            f"controller, {1e3 * check / LAYERS:.2f} ms for a layer and check; goal {OVERHEAD:g} %: "
            + ("reached" if round(median(whole), 1) <= OVERHEAD else "missed")
        )
    return rows, notes


def dictionaries() -> tuple[list[list[object]], list[str]]:
    """Rows and verdicts of one block: forward and backward of dictionary, MLP, and hard quantisation."""
    rows: list[list[object]] = []
    notes = []
    for batch_size, tokens, d, _ in SIZES:
        K = 4 * d
        generator = torch.Generator().manual_seed(0)
        z = F.layer_norm(torch.randn(batch_size, tokens, d, generator=generator), (d,)).requires_grad_()
        towards = torch.randn(batch_size, tokens, d, generator=generator)
        mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        blocks: dict[str, nn.Module] = {
            "MLP": mlp,
            "MLP, softmax for GELU": nn.Sequential(nn.Linear(d, K), nn.Softmax(-1), nn.Linear(K, d)),
            "ddcl, values": DDCLBlock(d, K, out="value", generator=generator),
            "ddcl, gated values": DDCLBlock(d, K, out="gated", generator=generator),
            "ddcl, barycentre": DDCLBlock(d, K, generator=generator),
        }
        try:
            from vector_quantize_pytorch import VectorQuantize

            blocks["vector-quantize-pytorch, EMA"] = VectorQuantize(dim=d, codebook_size=K)
            blocks["vector-quantize-pytorch, gradient"] = VectorQuantize(
                dim=d, codebook_size=K, learnable_codebook=True, ema_update=False
            )
        except ImportError:
            notes.append("vector-quantize-pytorch: not installed, not measured")

        def work(block: nn.Module, z: Tensor = z, towards: Tensor = towards) -> None:
            inputs = [z, *(p for p in block.parameters() if p.requires_grad)]
            found = block(z)
            if isinstance(block, DDCLBlock):
                value = (found[0] * towards).sum() + found[1].loss
            elif isinstance(found, tuple):
                value = (found[0] * towards).sum() + found[2].sum()
            else:
                value = (found * towards).sum()
            torch.autograd.grad(value, inputs, allow_unused=True)

        timings = interleave({name: spent(partial(work, block)) for name, block in blocks.items()}, ROUNDS)
        peers = [name for name in blocks if name.startswith("vector")]
        for name, block in blocks.items():
            rows.append(
                [
                    d, batch_size * tokens, name, K, sum(p.numel() for p in block.parameters()),
                    f"{1e3 * timings[name].seconds:.2f}", f"{against(timings, name, 'MLP'):.2f}",
                    spread(timings, name, "MLP"),
                ]
            )  # fmt: skip
        notes.append(
            verdict(
                f"dictionary with values, d = {d}", against(timings, "ddcl, values", "MLP"), peer="the MLP"
            )
        )
        notes.append(
            f"dictionary with values, d = {d}: an MLP with softmax in the place of GELU is "
            f"{against(timings, 'MLP, softmax for GELU', 'MLP'):.2f} times as fast as the MLP; the rest is "
            "the loss of the dictionary and its temperature, which follows the tokens"
        )
        if peers:
            # A hard quantiser mixes no values, and hands the gradient on as it comes.
            ratio = min(against(timings, "ddcl, values", peer) for peer in peers)
            notes.append(
                verdict(f"dictionary with values, d = {d}", ratio, peer="vector-quantize-pytorch's fastest")
            )
    return rows, notes


def report(name: str, title: str, columns: list[str], rows: list[list[object]], notes: list[str]) -> None:
    """Print and write a table."""
    show(title, columns, rows)
    print(*notes, sep="\n", flush=True)
    table = {"title": title, "machine": machine(), "protocol": PROTOCOL}
    write(name, {**table, "columns": columns, "rows": rows, "notes": notes})


if __name__ == "__main__":
    print(machine())
    size_columns = ["batch", "tokens", "d", "heads"]
    ratio_columns = [*size_columns, "model", "parameters", "ms", "times as fast as torch", "over rounds"]
    parts = set(sys.argv[1:]) or {"statistics", "dictionaries", "inference", "encoder"}
    if "statistics" in parts:
        report(
            "incrt_statistics",
            "What looking at the gradient of attention costs",
            [*size_columns, "step ms", "a check ms", "between checks ms", "in the controller %",
             "training longer by %", "middle half of periods %"],
            *statistics(),
        )  # fmt: skip
    if "dictionaries" in parts:
        report(
            "incrt_dictionary",
            "A dictionary beside an MLP of equal parameters and hard quantisation of equal size",
            ["d", "tokens", "block", "K", "parameters", "forward and backward ms", "times as fast as the MLP",
             "over rounds"],
            *dictionaries(),
        )  # fmt: skip
    if "encoder" in parts:
        report(
            "incrt",
            "A training step of the self-organising encoder beside torch.nn.TransformerEncoder",
            ["how", *ratio_columns],
            *training(),
        )
    if "inference" in parts:
        report(
            "incrt_inference",
            "A pass of the self-organising encoder beside torch.nn.TransformerEncoder",
            ["how", *ratio_columns],
            *inference(),
        )
