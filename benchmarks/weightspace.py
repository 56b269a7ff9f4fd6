"""Measure box counting beside porespy and boxcounting, results compared first, and the report of a network.

    python benchmarks/weightspace.py

The table `weightspace` holds the times, `weightspace_truth` what each counts on sets whose dimension is
known, `weightspace_report` a whole network and permuted copies of one layer.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

from harness import Timing, interleave, machine, pin, show, write

pin()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from geomlib.weightspace import box_counts, fit_dimension, layer_dimension, model_report  # noqa: E402
from geomlib.weightspace.shapes import carpet, filled, gasket, menger, random_mask  # noqa: E402

ROUNDS = 7
PORESPY_CELLS = 5_000_000  # half a minute a call beyond
GOAL_BOXCOUNTING, GOAL_PORESPY, GOAL_READS, GOAL_REPORT, GOAL_COPIES = 2, 1000, 8, 5.0, 10.0
PROTOCOL = "one process, one thread, processor time, contestants in turn within each round, median of rounds"


def boxcounting_counts(mask: np.ndarray) -> list[int]:
    """Count with boxcounting (numba): powers of two up to the padded side."""
    from boxcounting import boxCount

    return [int(n) for n in boxCount(mask).calculateBoxCount()[0]]


def porespy_counts(mask: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Count with porespy (loops in Python): boxes that hold both phases."""
    import porespy

    porespy.settings.tqdm["disable"] = True
    with np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
        return [int(n) for n in porespy.metrics.boxcount(mask, bins=list(sizes)).count]


def peers() -> dict[str, bool]:
    """Say which peers are installed; an absent one is a gap in the table, not an error."""
    return {name: find_spec(name) is not None for name in ("boxcounting", "porespy")}


def worked(work: Callable[[], object], fill: float = 0.02) -> Callable[[], float]:
    """Make a candidate that returns its processor seconds: what else the machine does counts little."""

    def run() -> float:
        times, start = 0, time.process_time()
        while True:
            work()
            times += 1
            seconds = time.process_time() - start
            if seconds > fill:
                return seconds / times

    return run


def ms(seconds: float | None) -> object:
    """Round to three digits of milliseconds."""
    return None if seconds is None else float(f"{1e3 * seconds:.3g}")


def ratio(value: float | None) -> object:
    """Round to three digits."""
    return None if value is None else float(f"{value:.3g}")


def agreement(mask: Tensor, sizes: tuple[int, ...], counts: list[int], here: dict[str, bool]) -> str:
    """Compare the counts of all contestants, box size by box size."""
    words = []
    if here["boxcounting"]:
        theirs = boxcounting_counts(mask.numpy())
        shared = min(len(theirs), len(counts))
        same = sizes == tuple(2**k for k in range(len(sizes))) and theirs[:shared] == counts[:shared]
        words.append("boxcounting same" if same else "boxcounting DIFFERS")
    if here["porespy"]:
        coarse = [r for r in sizes if r >= 8]
        theirs = porespy_counts(mask.numpy(), coarse)
        ours = box_counts(mask, coarse, d=mask.ndim)
        empty = box_counts(~mask, coarse, d=mask.ndim).counts.tolist()
        both = [a + b - c for a, b, c in zip(ours.counts.tolist(), empty, ours.boxes, strict=True)]
        same = theirs == both
        full = [c - b for c, b in zip(ours.boxes, empty, strict=True)]
        words.append(
            ("porespy same less the full boxes" if any(full) else "porespy same")
            if same
            else "porespy DIFFERS"
        )
    return ", ".join(words)


def speed(here: dict[str, bool]) -> dict[str, object]:
    """Time the dyadic counts of random masks, the densest kind of work."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[object]] = []
    missed: dict[str, list[str]] = {"boxcounting": [], "porespy": [], "reads": []}
    shapes = [(2048, 2048), (4608, 512), (2000, 1500), (1024, 1024), (128,) * 3, (256,) * 3, (100,) * 3]
    for shape in shapes:
        mask = random_mask(shape, 0.1, generator=generator)
        array, name = mask.numpy(), " x ".join(map(str, shape))
        found = box_counts(mask, d=mask.ndim)
        same = agreement(mask, found.sizes, found.counts.tolist(), here)
        candidates: dict[str, Callable[[], object]] = {
            "ours": partial(box_counts, mask, d=mask.ndim),
            "torch read": mask.sum,
            "numpy read": partial(np.count_nonzero, array),
        }
        if here["boxcounting"]:
            candidates["boxcounting"] = partial(boxcounting_counts, array)
        times = interleave({key: worked(work) for key, work in candidates.items()}, ROUNDS)
        patient = here["porespy"] and mask.numel() <= PORESPY_CELLS
        slow = worked(partial(porespy_counts, array, found.sizes))() if patient else None
        rows.append(row(name, len(found.sizes), times, slow, same))
        note(missed, name, rows[-1])
        print(*rows[-1], sep="  ", flush=True)
    coarse = [1, 3, 5, 7, 10, 14, 20, 29, 41, 59, 84, 120, 171, 244]
    mask = random_mask((1024, 1024), 0.1, generator=generator)
    candidates = {
        "ours": partial(box_counts, mask, coarse),
        "torch read": mask.sum,
        "numpy read": partial(np.count_nonzero, mask.numpy()),
    }
    times = interleave({key: worked(work) for key, work in candidates.items()}, ROUNDS)
    slow = worked(partial(porespy_counts, mask.numpy(), coarse))() if here["porespy"] else None
    same = agreement(mask, tuple(coarse), [], {**here, "boxcounting": False})
    rows.append(row("1024 x 1024, 14 sizes from 1 to 244", len(coarse), times, slow, same))
    columns = ["mask", "sizes", "geomlib ms", "boxcounting ms", "porespy ms (once)", "mask.sum() ms"]
    columns += ["numpy.count_nonzero ms", "faster than boxcounting", "faster than porespy"]
    columns += ["times mask.sum()", "times count_nonzero", "counts"]
    notes = [
        "random masks of density 0.1, boolean, the same memory for all; the powers of two of box_counts",
        (
            "porespy runs once, for its loops in Python take seconds, and not at 256^3, where they take "
            "half a minute; the others run in turn, seven rounds of at least 20 ms"
        ),
        "boxcounting copies the mask into a padded cube of side 2^p and goes on to the box of side 2^p",
        "counts are compared at all sizes with boxcounting, at sizes of 8 and more with porespy",
        (
            "torch's sum of booleans converts them, so numpy.count_nonzero, which does not, is the stricter "
            "measure of one read"
        ),
        goal(f"{GOAL_BOXCOUNTING} times as fast as boxcounting", "boxcounting", missed, here),
        goal(f"{GOAL_PORESPY} times as fast as porespy", "porespy", missed, here),
        goal(f"within {GOAL_READS} times mask.sum()", "reads", missed, here),
    ]
    gaps = [name for name, found in here.items() if not found]
    if gaps:
        notes.append(f"not installed here, hence not measured: {', '.join(gaps)}")
    return table("Box counts of random masks", columns, rows, notes)


def row(name: str, sizes: int, times: dict[str, Timing], slow: float | None, same: str) -> list[object]:
    """Put one line of the table together."""
    ours, peer = times["ours"], times.get("boxcounting")
    return [
        name,
        sizes,
        ms(ours.seconds),
        ms(peer.seconds if peer else None),
        ms(slow),
        ms(times["torch read"].seconds),
        ms(times["numpy read"].seconds),
        ratio(ours.times_faster_than(peer) if peer else None),
        ratio(slow / ours.seconds if slow else None),
        ratio(times["torch read"].times_faster_than(ours)),
        ratio(times["numpy read"].times_faster_than(ours)),
        same,
    ]


def note(missed: dict[str, list[str]], name: str, line: list[object]) -> None:
    """Collect where a goal was missed, with the number."""
    faster, far, reads = line[7], line[8], line[9]
    if isinstance(faster, float) and faster < GOAL_BOXCOUNTING:
        missed["boxcounting"].append(f"{name} ({faster})")
    if isinstance(far, float) and far < GOAL_PORESPY:
        missed["porespy"].append(f"{name} ({far})")
    if isinstance(reads, float) and reads > GOAL_READS:
        missed["reads"].append(f"{name} ({reads})")


def goal(words: str, key: str, missed: dict[str, list[str]], here: dict[str, bool]) -> str:
    """Say how a goal came out."""
    if not here.get(key, True):
        return f"goal, {words}: not measured"
    where = "missed at " + ", ".join(missed[key]) if missed[key] else "reached in every dyadic row measured"
    return f"goal, {words}: {where}"


def truth(here: dict[str, bool]) -> dict[str, object]:
    """Estimate known dimensions with each contestant, called as its documentation does."""
    sets = [
        ("filled square 512", filled(512), 2, 2.0),
        ("filled square 500", filled(500), 2, 2.0),
        ("Sierpinski carpet 729", carpet(6), 3, np.log(8) / np.log(3)),
        ("Sierpinski gasket 512", gasket(9), 2, np.log(3) / np.log(2)),
        ("Menger sponge 81", menger(4), 3, np.log(20) / np.log(3)),
    ]
    rows: list[list[object]] = []
    for name, mask, native, exact in sets:
        found, own = box_counts(mask, d=mask.ndim), box_counts(mask, ratio=native, d=mask.ndim)
        inner = fit_dimension(found.sizes, found.counts, shape=mask.shape, min_scales=3)
        best = fit_dimension(own.sizes, own.counts, shape=mask.shape, window="full")
        line: list[object] = [name, round(exact, 4), round(inner.D, 4), round(best.D, 4)]
        if here["boxcounting"]:
            theirs = boxcounting_counts(mask.numpy())
            fit = fit_dimension([2**k for k in range(len(theirs))], theirs, window="full")
            line.append(round(fit.D, 4))
        else:
            line.append(None)
        line += porespy_dimensions(mask.numpy()) if here["porespy"] else [None, None]
        rows.append(line)
    columns = ["set", "exact", "geomlib, inner window", "geomlib, own ratio", "boxcounting, all sizes"]
    columns += ["porespy, default bins, least squares", "porespy, default bins, mean slope"]
    notes = [
        "boxcounting returns counts only; its column is a least-squares line through all of them",
        ("porespy counts boxes that hold both phases: on a filled set it finds none, and no dimension"),
        (
            "a set that fills the grid has the dimension of the grid, which ragged or padded borders hide: "
            "geomlib reports it by its status"
        ),
        "geomlib at the ratio of the set is exact; dyadic boxes on a triadic set are off for everybody",
    ]
    return table("Known dimensions", columns, rows, notes)


def porespy_dimensions(mask: np.ndarray) -> list[object]:
    """Take both readings of porespy's result with the default box sizes; words where there is none."""
    import porespy

    porespy.settings.tqdm["disable"] = True
    with np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
        found = porespy.metrics.boxcount(mask)
    sizes, counts = np.asarray(found.size, dtype=float), np.asarray(found.count, dtype=float)
    if (counts > 0).sum() < 2:
        return ["no boxes", "no boxes"]
    fit = fit_dimension(sizes, counts, window="full", min_scales=2)
    mean = float(np.mean(found.slope))
    return [round(fit.D, 4), round(mean, 4) if np.isfinite(mean) else "not finite"]


def report(here: dict[str, bool]) -> dict[str, object]:
    """Time the report of a whole network and permuted copies of its largest layer."""
    rows: list[list[object]] = []
    if find_spec("torchvision") is not None:
        from torchvision.models import resnet18

        torch.manual_seed(0)
        network = resnet18(num_classes=10)
        weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
        taken = interleave({"ours": worked(partial(model_report, network))}, 3)["ours"]
        rows.append(
            [
                f"model_report of a ResNet-18, {weights / 1e6:.1f} M weights",
                float(f"{taken.seconds:.3g}"),
                GOAL_REPORT,
                taken.seconds <= GOAL_REPORT,
            ]
        )
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(512, 512, 3, 3, generator=generator)
    plain = interleave({"ours": worked(partial(layer_dimension, layer))}, 3)["ours"]
    rows.append(
        ["layer_dimension of a 512 x 4608 layer, closed-form null", float(f"{plain.seconds:.3g}"), None, None]
    )
    for kind in ("cells", "rc"):
        work = partial(
            layer_dimension, layer, null="permutation", kind=kind, permutations=30, generator=generator
        )
        taken = interleave({"ours": worked(work)}, 3)["ours"]
        rows.append(
            [
                f"the same, null from 30 permuted copies ({kind})",
                float(f"{taken.seconds:.3g}"),
                GOAL_COPIES,
                taken.seconds <= GOAL_COPIES,
            ]
        )
    if here["boxcounting"]:
        mask = random_mask((512, 4608), 0.1, generator=generator).numpy()
        peer = interleave({"theirs": worked(partial(boxcounting_counts, mask))}, 3)["theirs"]
        rows.append(
            [
                "for comparison: 30 counts of such a mask by boxcounting, without the permutations",
                float(f"{30 * peer.seconds:.3g}"),
                None,
                None,
            ]
        )
    notes = [
        "one thread; the goals were set for two cores",
        "no peer reports a network layer by layer from box counts",
    ]
    return table("Report of a network", ["work", "seconds", "goal", "reached"], rows, notes)


def table(title: str, columns: list[str], rows: list[list[object]], notes: list[str]) -> dict[str, object]:
    """Pack and print a result."""
    show(title, columns, rows)
    print(*notes, sep="\n")
    return {
        "title": title,
        "machine": machine(),
        "protocol": PROTOCOL,
        "columns": columns,
        "rows": rows,
        "notes": notes,
    }


if __name__ == "__main__":
    installed = peers()
    print(machine(), installed)
    write("weightspace_truth", truth(installed))
    write("weightspace_report", report(installed))
    write("weightspace", speed(installed))
