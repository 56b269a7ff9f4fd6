r"""Permutations and rescalings of hidden units: what they leave alone, and what they can test.

Bounded, block-wise and tree-wise permutations of an axis are the ones that box averages respect, each in its
own way; pairs of layers are permuted and rescaled without changing the function of a network. The test that
is made of random permutations stands in `permutation` and is exported here.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from geomlib.weightspace.canonical import relabel, rescale, same_function
from geomlib.weightspace.permutation import (
    PermTest,
    against_copies,
    dimension_of,
    fit_grid,
    holm,
    perm_test,
    permuted,
)
from geomlib.weightspace.units import trace

__all__ = [
    "PermTest",
    "against_copies",
    "block_perm",
    "bounded_perm",
    "dimension_of",
    "fit_grid",
    "holm",
    "perm_test",
    "permute_pair",
    "permuted",
    "rescale_pair",
    "tree_perm",
]


def bounded_perm(n: int, reach: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw a permutation that moves nothing further than `reach`.

    Parameters
    ----------
    n : int
        How many are permuted.
    reach : float
        Bound of the displacement, not negative.
    generator : Generator, optional
        Source of the draw.

    Returns
    -------
    Tensor
        `(n,)` int64 on the CPU.

    Raises
    ------
    ValueError
        If `n` is not positive or `reach` negative.

    Notes
    -----
    Source: reconstructed, the permutations that are close to the identity in the coarse sense: after
    averaging over boxes of side `r` they act as the identity up to `2 reach / r`.

    Examples
    --------
    >>> moved = bounded_perm(100, 5) - torch.arange(100)
    >>> bool(moved.abs().max() <= 5)
    True
    """
    if n < 1 or not reach >= 0:
        raise ValueError(f"n must be positive and reach not negative, got {n} and {reach}: no permutation")
    jitter = torch.rand(n, generator=generator, dtype=torch.float64)
    return (torch.arange(n, dtype=torch.float64) + reach * jitter).argsort(stable=True)


def block_perm(n: int, r: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw a permutation of the blocks of length `r`, and one inside each block.

    Parameters
    ----------
    n : int
        How many are permuted, a multiple of `r`.
    r : int
        Length of a block.
    generator : Generator, optional
        Source of the draw.

    Returns
    -------
    Tensor
        `(n,)` int64 on the CPU.

    Raises
    ------
    ValueError
        If `r` does not divide `n`: a shorter block could not change places.

    Notes
    -----
    Source: reconstructed, the wreath product of two symmetric groups. `T` commutes with it at scale `r`.

    Examples
    --------
    >>> (block_perm(6, 3).reshape(2, 3) // 3).unique(dim=1).shape
    torch.Size([2, 1])
    """
    if n < 1 or r < 1 or n % r:
        raise ValueError(f"r must divide n, got {r} and {n}: a shorter block could not change places")
    inside = torch.rand(n // r, r, generator=generator, dtype=torch.float64).argsort(1)
    return (torch.randperm(n // r, generator=generator)[:, None] * r + inside).flatten()


def tree_perm(levels: int, *, ratio: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """Draw an automorphism of the tree of boxes: at every node its children change places.

    Parameters
    ----------
    levels : int
        Depth; `ratio**levels` leaves are permuted.
    ratio : int
        Children of a node, at least 2.
    generator : Generator, optional
        Source of the draw.

    Returns
    -------
    Tensor
        `(ratio**levels,)` int64 on the CPU.

    Raises
    ------
    ValueError
        If `levels` is negative or `ratio` below 2.

    Notes
    -----
    Source: reconstructed, the iterated wreath product. It leaves every count at sizes `ratio**k` unchanged.

    Examples
    --------
    >>> (tree_perm(3) // 4).reshape(2, 4).unique(dim=1).shape
    torch.Size([2, 1])
    """
    if levels < 0 or ratio < 2:
        raise ValueError(
            f"levels must not be negative and ratio at least 2, got {levels} and {ratio}: no tree"
        )
    image = torch.zeros(1, dtype=torch.int64)
    for _ in range(levels):
        children = torch.rand(len(image), ratio, generator=generator, dtype=torch.float64).argsort(1)
        image = (image[:, None] * ratio + children).flatten()
    return image


def permute_pair(
    net: nn.Module,
    layer: str,
    *,
    inputs: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Relabel the hidden units that a layer makes, there and wherever they are read.

    Parameters
    ----------
    net : Module
        See `trace` for what it may hold; it is not changed.
    layer : str
        Name of a layer that makes hidden units.
    inputs : Tensor, optional
        A batch on which the outputs are compared.
    generator : Generator, optional
        Source of the permutation.

    Returns
    -------
    Module
        A copy that computes the same function.

    Raises
    ------
    ValueError
        If the layer makes no hidden units, or the network holds what `trace` cannot follow.
    RuntimeError
        If the outputs on `inputs` differ.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    >>> copy = permute_pair(net, "0", inputs=torch.randn(4, 3))
    """
    space = trace(net).space_of(layer)
    if space.frozen or space.size is None:
        raise ValueError(f"layer must make hidden units, got {layer!r}: its order is that of the output")
    twin = copy.deepcopy(net)
    relabel(twin, space, torch.randperm(space.size, generator=generator))
    if inputs is not None:
        same_function(net, twin, inputs)
    return twin


def rescale_pair(
    net: nn.Module,
    layer: str,
    logsd: float,
    *,
    inputs: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Rescale the hidden units that a layer makes, and undo it wherever they are read.

    Parameters
    ----------
    net : Module
        See `trace` for what it may hold; it is not changed.
    layer : str
        Name of a layer whose units pass activations that commute with positive factors.
    logsd : float
        Standard deviation of the logarithms of the factors.
    inputs : Tensor, optional
        A batch on which the outputs are compared.
    generator : Generator, optional
        Source of the factors.

    Returns
    -------
    Module
        A copy that computes the same function (behind a batch norm: in evaluation mode).

    Raises
    ------
    ValueError
        If the layer makes no hidden units, their activation does not commute with positive factors, or
        `logsd` is negative.
    RuntimeError
        If the outputs on `inputs` differ.

    Notes
    -----
    Source: the intertwiner group of ReLU, arXiv 2205.14258. Box counts of the layer change, its function
    does not.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> copy = rescale_pair(net, "0", 0.5, inputs=torch.randn(4, 3))
    """
    if not 0 <= logsd < math.inf:
        raise ValueError(f"logsd must be finite and not negative, got {logsd}: it is a standard deviation")
    units = trace(net)
    domain, size = units.domain_of(layer), units.space_of(layer).size
    assert size is not None  # whatever makes units has a number of them
    factor = (logsd * torch.randn(size, generator=generator, dtype=torch.float64)).exp()
    twin = copy.deepcopy(net)
    rescale(twin, domain, factor)
    if inputs is not None:
        same_function(net, twin, inputs)
    return twin
