r"""The dimension of every layer of a network, beside what chance gives for its shape.

A layer of noise has an apparent dimension below two, with a straight line through its counts, that depends on
nothing but its shape, its density and the window of scales. So the number to read is the difference from that
null: `delta`, and `z` where permuted copies say how far it scatters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from inspect import ismethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from geomlib.weightspace.boxes import null_counts
from geomlib.weightspace.dimension import DimFit, Window, self_similarity, slopes
from geomlib.weightspace.layouts import lay_out
from geomlib.weightspace.permutation import against_copies, dimension_of, fit_grid
from geomlib.weightspace.thresholds import NanPolicy, Threshold, occupied_set
from geomlib.weightspace.transform import as_signal

__all__ = ["LayerReport", "WeightTensor", "layer_dimension", "model_report", "weight_tensors"]


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The box dimension of one layer and what to compare it with.

    Attributes
    ----------
    name : str
        Of the tensor.
    shape : tuple of int
        Of the tensor as torch stores it.
    layout : str
        How it was laid out; the dimension depends on it.
    grid : tuple of int
        Sides of the grid.
    D : float
        Slope of the counts, NaN where the status says that there is none. Not comparable between shapes.
    null : float
        The same slope for a random set of the same shape and density.
    delta : float
        `D - null`: what is left when shape and density are taken away.
    z : float
        `delta` over the standard deviation of permuted copies; NaN without permutations.
    p : float
        Of the permutation test, see `perm_test`; NaN without permutations. Over many layers: see `holm`.
    null_sd : float
        That standard deviation.
    similarity : float
        Degree of self-similarity over the window.
    fit : DimFit
        The fit behind `D`, with its sizes and counts.
    tau : float
        Threshold of the absolute values.
    density : float
        Share of large entries.
    omitted : int
        NaN and infinite entries that were left out.
    status : str
        "ok", "insufficient_scales" (a side below 8, or fewer than four sizes in the window), "empty" (no
        entry is above the threshold: constant tensors), "space_filling" (all are) or "no_scaling".
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    grid: tuple[int, ...]
    D: float
    null: float
    delta: float
    z: float
    p: float
    null_sd: float
    similarity: float
    fit: DimFit
    tau: float
    density: float
    omitted: int
    status: str

    def as_dict(self) -> dict[str, Any]:
        """Return one row of a table: the attributes, with the fit as numbers.

        Examples
        --------
        >>> row = layer_dimension(torch.eye(32), name="eye", threshold="nonzero").as_dict()
        >>> row["name"], row["D"], row["scales"], row["status"]
        ('eye', 1.0, 6, 'ok')
        """
        row = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "fit"}
        low, high = self.fit.window
        return row | {
            "se": self.fit.se,
            "r2": self.fit.r2,
            "scales": len(self.fit.sizes),
            "low": low,
            "high": high,
        }

    def __repr__(self) -> str:
        sides = " x ".join(map(str, self.grid))
        z = "" if math.isnan(self.z) else f" (z {self.z:.1f})"
        return (
            f"LayerReport({self.name}: {self.layout} {sides}, D {self.D:.4f}, null {self.null:.4f}, "
            f"delta {self.delta:+.4f}{z}, {self.status})"
        )


def layer_dimension(
    W: Tensor,
    *,
    layout: str = "matrix",
    threshold: Threshold = ("quantile", 0.9),
    window: Window = "full",
    null: Literal["closed_form", "permutation"] | None = "closed_form",
    kind: str = "cells",
    permutations: int = 30,
    groups: int = 1,
    transposed: bool = False,
    nan_policy: NanPolicy = "raise",
    ties: Literal["strict", "random"] = "strict",
    name: str = "W",
    generator: torch.Generator | None = None,
) -> LayerReport:
    r"""Report the box dimension of the large entries of a weight tensor.

    Parameters
    ----------
    W : Tensor
        `(out, in / groups, *kernel)` of any dtype that `as_signal` reads.
    layout, groups, transposed
        See `lay_out`.
    threshold, nan_policy, ties
        See `occupied_set`. Under `"norms"` it is the norms of the kernels that are compared.
    window
        See `fit_dimension`; sizes are the powers of two up to the first that covers the shorter side.
    null : {"closed_form", "permutation"} or None
        The expectation for a uniformly random set, the mean of permuted copies, or nothing.
    kind, permutations
        See `perm_test`; only for the permutation null.
    name : str
        Of the tensor, in the report and in messages.
    generator : Generator, optional
        Source of the permutations and of random ties.

    Returns
    -------
    LayerReport

    Raises
    ------
    ValueError
        For NaN or infinities (by name and number) unless omitted, tensors without entries or numbers,
        unknown options, or fewer than two permutations.

    Notes
    -----
    Source: the dimension per layer of arXiv 2503.14298 (abstract); layout, threshold, window and null are
    reconstructed. The closed form is the slope of the expected counts, not the expected slope; from a side
    of 16 on the two differ by less than 0.001, a fraction of the scatter of one random layer.

    Examples
    --------
    >>> W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    >>> report = layer_dimension(W, name="noise")
    >>> report.fit.r2 > 0.97, report.D < 1.7, abs(report.delta) < 0.003
    (True, True, True)
    """
    if null not in ("closed_form", "permutation", None):
        raise ValueError(f"null must be closed_form, permutation or None, got {null!r}: it names no null")
    if null == "permutation" and permutations < 2:
        raise ValueError(f"permutations must be at least 2, got {permutations}: one copy has no scatter")
    grid = lay_out(
        as_signal(W.detach(), name, check_finite=False), layout, groups=groups, transposed=transposed
    )
    found = occupied_set(
        grid.values, threshold, nan_policy=nan_policy, ties=ties, name=name, generator=generator
    )
    mask = grid.like(found.mask)
    fit = fit_grid(mask, window)
    expected = sd = z = p = math.nan
    sizes = tuple(int(r) for r in fit.sizes)
    if len(sizes) < 2 or fit.status == "empty":
        null = None
    if null is not None and fit.status == "space_filling":
        expected = fit.D  # there is one full set
    elif null == "closed_form":
        expected = float(slopes(sizes, null_counts(grid.shape, found.cells, sizes, copies=grid.copies)))
    elif null == "permutation":
        test = against_copies(mask, dimension_of(mask, window), kind, permutations, generator=generator)
        expected, sd, z, p = test.mean, test.sd, test.z, test.p
    return LayerReport(
        name=name,
        shape=tuple(W.shape),
        layout=layout,
        grid=grid.shape,
        D=fit.D,
        null=expected,
        delta=fit.D - expected,
        z=z,
        p=p,
        null_sd=sd,
        similarity=self_similarity(fit) if not math.isnan(fit.D) else math.nan,
        fit=fit,
        tau=found.tau,
        density=found.density,
        omitted=found.omitted,
        status=fit.status,
    )


def model_report(model: nn.Module, *, vectors: bool = False, **options: Any) -> list[LayerReport]:
    """Report the dimension of every weight tensor of a network.

    Parameters
    ----------
    model : Module
        Any module. It is neither changed nor moved.
    vectors : bool
        Report biases and norm layers as well, as intervals on a line.
    **options
        Of `layer_dimension`.

    Returns
    -------
    list of LayerReport
        In the order of the modules, one per tensor of `weight_tensors`: pass it to `pandas.DataFrame` as
        `[report.as_dict() for report in reports]`.

    Raises
    ------
    ValueError
        As `layer_dimension`, naming the tensor.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> [(report.name, report.status) for report in model_report(model)]
    [('0.weight', 'ok'), ('2.weight', 'insufficient_scales')]
    """
    return [
        layer_dimension(t.values, name=t.name, **t.geometry, **(options | t.layout))
        for t in weight_tensors(model, vectors=vectors)
    ]


@dataclass(frozen=True, eq=False)
class WeightTensor:
    """A weight tensor of a network and how its axes are to be read.

    Attributes
    ----------
    name : str
        `module.parameter`, without the prefixes of wrappers.
    values : Tensor
        What the layer computes with: behind pruning and parametrisations.
    groups : int
        Groups of a convolution.
    transposed : bool
        Stored with inputs first.
    """

    name: str
    values: Tensor
    groups: int = 1
    transposed: bool = False

    @property
    def geometry(self) -> dict[str, Any]:
        """Options of `lay_out` that follow from the layer."""
        return {"groups": self.groups, "transposed": self.transposed}

    @property
    def layout(self) -> dict[str, Any]:
        """Layout of a vector; a grid leaves the choice open."""
        return {"layout": "vector"} if self.values.ndim == 1 else {}


def weight_tensors(model: nn.Module, *, vectors: bool = False) -> Iterator[WeightTensor]:
    """List the tensors of a network that span a grid.

    Vectors (biases, norm layers) are left out, a tensor that several layers share comes once, the three
    projections of an attention layer come one by one, and the prefixes of `DataParallel` and
    `torch.compile` are dropped from names.

    Parameters
    ----------
    model : Module
        Any module.
    vectors : bool
        List biases and norm layers too.

    Yields
    ------
    WeightTensor

    Examples
    --------
    >>> model = nn.MultiheadAttention(8, 2)
    >>> [tensor.name for tensor in weight_tensors(model)]
    ['in_proj_weight.q', 'in_proj_weight.k', 'in_proj_weight.v', 'out_proj.weight']
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            continue
        for key, source in _own_tensors(module):
            if id(source) in seen:
                continue
            seen.add(id(source))
            values = _effective(module, key)
            if values.ndim == 0 or (values.ndim == 1 and not vectors):
                continue
            name = _plain(f"{path}.{key}" if path else key)
            if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
                for part, rows in zip("qkv", values.chunk(3), strict=True):
                    yield WeightTensor(f"{name}.{part}", rows)
                continue
            convolution = values.ndim > 1 and hasattr(module, "groups") and hasattr(module, "transposed")
            yield WeightTensor(
                name,
                values,
                int(module.groups) if convolution else 1,
                bool(module.transposed) if convolution else False,
            )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the parameters of a module by the names that its forward pass uses, with what identifies them."""
    parametrised = getattr(module, "parametrizations", {})
    for key in parametrised:
        yield key, getattr(parametrised[key], "original", parametrised[key])
    computed = {_name(hook): hook for hook in _hooks(module)}
    yield from computed.items()
    sources = {f"{key}{ending}" for key in computed for ending in ("_orig", "_g", "_v")}
    for key, parameter in module.named_parameters(recurse=False):
        if key not in sources:
            yield key, parameter
    if "weight" not in parametrised and ismethod(
        getattr(module, "weight", None)
    ):  # quantized layers keep theirs packed
        yield "weight", module


def _hooks(module: nn.Module) -> list[BasePruningMethod | WeightNorm]:
    """Hooks that compute a weight before each call: pruning, and the older form of weight norm."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, (BasePruningMethod, WeightNorm))]


def _name(hook: BasePruningMethod | WeightNorm) -> str:
    return str(hook.name if isinstance(hook, WeightNorm) else hook._tensor_name)


@torch.no_grad()
def _effective(module: nn.Module, key: str) -> Tensor:
    """Return what the layer would compute with if it were called now in evaluation mode."""
    for hook in _hooks(module):
        # The attribute is only refreshed by a call, and lags behind a step of the optimiser.
        if _name(hook) == key:
            return hook.compute_weight(module) if isinstance(hook, WeightNorm) else hook.apply_mask(module)
    if key in (chains := getattr(module, "parametrizations", {})):
        mode = chains[key].training
        chains[key].eval()  # spectral norm iterates, and changes, in training mode
        value = getattr(module, key)
        chains[key].train(mode)
        return value
    value = getattr(module, key)
    return value if isinstance(value, Tensor) else value()


def _plain(name: str) -> str:
    parts = name.split(".")
    while parts[0] in ("module", "_orig_mod"):
        parts = parts[1:]
    return ".".join(part for part in parts if part != "_orig_mod")
