"""The weighted Laplacian with gradients of its weights, beside gather and scatter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import interleave
from stationary_cases import PROTOCOL, ROUNDS, cells_of, spent, table
from torch import Tensor
from torch_geometric.nn import MessagePassing

from geomlib.stationary import SheafGraph

SPARSE_GOAL = 3.0


class Scatter(MessagePassing):
    """The Laplacian as PyG would have it: messages along directed edges, added up."""

    def __init__(self) -> None:
        super().__init__(aggr="add")

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.propagate(index, x=x, weight=weight)

    def message(self, x_i: Tensor, x_j: Tensor, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1) * (x_i - x_j)


def sparse_products() -> dict[str, object]:
    """Time the weighted Laplacian with gradients of its weights beside gather and scatter."""
    nodes, count, width = 20_000, 160_000, 32
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(nodes, (2, count + 2_000), generator=generator).sort(0).values
    edges = edges[:, edges[0] < edges[1]].unique(dim=1)
    edges = edges[:, torch.randperm(edges.shape[1], generator=generator)[:count]]
    first, second = edges
    weights = torch.rand(count, generator=generator).requires_grad_()
    x = torch.randn(nodes, width, generator=generator).requires_grad_()
    grad = torch.randn(nodes, width, generator=generator)
    graph = SheafGraph(nodes, edges, weights.detach())
    both_ways, layer = torch.cat([edges.flip(0), edges], 1), Scatter()

    def gather() -> Tensor:
        source, target = both_ways
        flow = torch.cat([weights, weights])[:, None] * (
            x.index_select(0, target) - x.index_select(0, source)
        )
        return torch.zeros_like(x).index_add(0, target, flow)

    def incidence() -> Tensor:
        flow = weights[:, None] * (x.index_select(0, first) - x.index_select(0, second))
        return torch.zeros_like(x).index_add(0, first, flow).index_add(0, second, -flow)

    forms: dict[str, Callable[[], Tensor]] = {
        "geomlib": lambda: graph.with_tensors(weights, None).laplacian(x[None])[0],
        "PyG MessagePassing": lambda: layer(x, both_ways, torch.cat([weights, weights])),
        "gather and index_add, 2E": gather,
        "gather and index_add, E": incidence,
    }
    reference = [t.detach().double() for t in (x, weights)]
    a, w = (t.requires_grad_() for t in reference)
    truth = torch.zeros_like(a)
    flow = w[:, None] * (a[first] - a[second])
    truth = truth.index_add(0, first, flow).index_add(0, second, -flow)
    exact = [truth.detach(), *torch.autograd.grad(truth, (a, w), grad.double())]

    def all_of(form: Callable[[], Tensor]) -> list[Tensor]:
        image = form()
        return [image.detach(), *torch.autograd.grad(image, (x, weights), grad)]

    def forward(form: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return form()

    errors = {
        name: " / ".join(
            f"{float((p.double() - q).abs().max() / q.abs().max()):.0e}"
            for p, q in zip(all_of(form), exact, strict=True)
        )
        for name, form in forms.items()
    }
    once = interleave({name: spent(lambda f=form: forward(f)) for name, form in forms.items()}, ROUNDS)
    twice = interleave({name: spent(lambda f=form: all_of(f)) for name, form in forms.items()}, ROUNDS)
    rows: list[list[object]] = [
        [name, errors[name], *cells_of(once, name), *cells_of(twice, name)] for name in forms
    ]
    ratios = {name: twice["geomlib"].times_faster_than(twice[name]) for name in forms if name != "geomlib"}
    nearest = min(ratios, key=ratios.__getitem__)
    pyg = ratios["PyG MessagePassing"]
    notes = [
        "20,000 nodes, 160,000 edges, 32 features, float32; error of value / gradient of states / of weights",
        (
            f"both passes: {pyg:.1f} times as fast as PyG's own (goal {SPARSE_GOAL:.0f}: "
            f"{'reached' if pyg >= SPARSE_GOAL else 'missed'}), {ratios[nearest]:.1f} times as fast as "
            f"{nearest}"
        ),
    ]
    columns = ["form", "error", "forward ms", "times geomlib's", "both ms", "times geomlib's "]
    return table("The weighted Laplacian beside gather and scatter", columns, rows, notes, PROTOCOL)
