r"""One representative for all networks that differ by relabelled and rescaled hidden units.

The dimension of a layer moves when hidden units are rescaled, although the function does not: it is no
property of the function. `canonicalize` picks one network out of each orbit, so that the dimension of *its*
layers is one. It need not equal the raw dimension, and whatever it is compared with must be ordered in the
same way, because sorting alone makes structure.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from geomlib.weightspace.units import Domain, Space, Units, trace

__all__ = ["canonicalize", "order", "relabel", "rescale", "same_function"]


def canonicalize(net: nn.Module, *, inputs: Tensor | None = None) -> nn.Module:
    """Return the canonical network of an orbit: scaled rows, fixed signs, sorted units.

    Front to back, every hidden unit whose activation commutes with positive factors gets weights of norm 1,
    and the norm moves into the columns that read it. Batch norms absorb the scale of what comes before them,
    and their own `(weight, bias)` is scaled to norm 1 in turn. Where the activation is odd, a sign makes the
    sum of the row positive; a unit in front of a batch norm gets a positive slope. Then the units of every
    layer are sorted by the norm of their outgoing columns, which no other relabelling changes. The layers of
    a residual stream share one order, and one scale that the first of them decides; where a layer norm reads
    the stream, it is not scaled at all.

    Parameters
    ----------
    net : Module
        See `trace` for what it may hold. It is not changed. Its function is kept in evaluation mode; in
        training mode the variance that a batch norm adds `eps` to is that of the scaled units.
    inputs : Tensor, optional
        A batch on which the outputs are compared.

    Returns
    -------
    Module
        A copy on the same device, in the same mode.

    Raises
    ------
    ValueError
        If the network holds what `trace` cannot follow.
    RuntimeError
        If the outputs on `inputs` differ.

    Notes
    -----
    Source: reconstructed; the orbit is that of the intertwiner groups of arXiv 2205.14258. The form is unique
    where no two units of a layer have the same outgoing norm, which fails for dead units and twins.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> bool(canonicalize(net, inputs=torch.randn(4, 3))[0].weight.norm(dim=1).allclose(torch.ones(8)))
    True
    """
    units, canonical = trace(net), copy.deepcopy(net)
    with torch.no_grad():
        for domain in units.domains():
            if domain.makers and domain.positive:
                norms = _incoming_norm(canonical, domain)
                rescale(canonical, domain, torch.where(norms > 0, 1 / norms, torch.ones_like(norms)))
            if domain.makers and domain.odd:
                rescale(canonical, domain, _sign(canonical, units, domain))
        for space in units.spaces():
            if space.readers:
                relabel(
                    canonical, space, _outgoing_norm(canonical, space).argsort(descending=True, stable=True)
                )
    if inputs is not None:
        same_function(net, canonical, inputs)
    return canonical


@torch.no_grad()
def relabel(net: nn.Module, space: Space, permutation: Tensor) -> None:
    """Put unit `permutation[i]` at place `i`, in place and in every tensor that the units live in.

    Parameters
    ----------
    net : Module
        Changed in place.
    space : Space
        Of `trace` of a network of the same form.
    permutation : Tensor
        `(units,)` int64.

    Raises
    ------
    ValueError
        If it is not a permutation of the units.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> x = torch.randn(4, 3)
    >>> y = net(x)
    >>> relabel(net, trace(net).space_of("0"), torch.tensor([4, 2, 0, 1, 3]))
    >>> bool(torch.allclose(net(x), y))
    True
    """
    if space.size is None or sorted(permutation.tolist()) != list(range(space.size)):
        raise ValueError(
            f"permutation must hold each of the {space.size} units once, got {tuple(permutation.shape)} "
            "entries that do not: units would be lost"
        )
    for slot in space.slots:
        tensor = slot.of(net)
        index = permutation[:, None] * slot.block + torch.arange(slot.block, device=permutation.device)
        tensor.copy_(tensor.index_select(slot.axis, index.flatten().to(tensor.device)))


@torch.no_grad()
def rescale(net: nn.Module, domain: Domain, factor: Tensor) -> None:
    """Multiply the values of a domain by a factor per unit, in place, and undo it wherever they are read.

    Parameters
    ----------
    net : Module
        Changed in place.
    domain : Domain
        Of `trace` of a network of the same form.
    factor : Tensor
        `(units,)`, not zero; positive where the domain commutes with positive factors only.

    Raises
    ------
    ValueError
        If the domain does not commute with such factors: the function would change.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> x = torch.randn(4, 3)
    >>> y = net(x)
    >>> rescale(net, trace(net).domain_of("0"), torch.tensor([2.0, 0.5]))
    >>> bool(torch.allclose(net(x), y))
    True
    """
    signs, sizes = bool((factor < 0).any()), bool((factor.abs() != 1).any())
    if bool((factor == 0).any()) or (signs and not domain.odd) or (sizes and not domain.positive):
        allowed = f"positive factors: {domain.positive}, signs: {domain.odd}"
        raise ValueError(
            f"factor must be one that the readers of these units commute with ({allowed}), got "
            f"{float(factor.min()):.3g} to {float(factor.max()):.3g}: the function would change"
        )
    for slot in domain.makers + domain.readers:
        tensor = slot.of(net)
        scale = factor.to(tensor).repeat_interleave(slot.block) ** slot.exponent
        tensor.mul_(scale.reshape([-1 if i == slot.axis else 1 for i in range(tensor.ndim)]))
    for name, _ in domain.norms:
        slope, mean, variance, eps = _batch_norm(net, name)
        c = factor.to(slope)
        # What eps does to the scaled variance goes into the slope, so that the function stays exactly.
        slope.mul_(((c**2 * variance + eps) / (variance + eps)).sqrt() / c)
        mean.mul_(c)
        variance.mul_(c**2)


@torch.no_grad()
def same_function(net: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """Compare two networks in evaluation mode and return the largest relative difference.

    Parameters
    ----------
    net, other : Module
        Their modes are restored afterwards.
    inputs : Tensor
        `(batch, ...)`.

    Returns
    -------
    float
        Largest difference over the largest output.

    Raises
    ------
    RuntimeError
        If it exceeds 1e-5 (1e-10 in float64): the networks are two functions.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> same_function(net, net, torch.ones(1, 3))
    0.0
    """
    modes = [(module, module.training) for both in (net, other) for module in both.modules()]
    try:
        net.eval(), other.eval()
        expected, found = net(inputs), other(inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    found, expected = found.detach(), expected.detach()
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    bound = 1e-10 if expected.dtype == torch.float64 else 1e-5
    # Written so that NaN fails.
    if not difference <= bound:
        raise RuntimeError(
            f"the networks differ by {difference:.1e} of the largest output, above {bound:.0e}"
        )
    return difference


def order(W: Tensor, how: str = "norm") -> Tensor:
    """Give the rows and columns of a weight tensor an order that does not depend on how they were numbered.

    Parameters
    ----------
    W : Tensor
        `(out, in, *kernel)`; kernels move whole.
    how : str
        `"none"`; `"norm"`: both axes by decreasing norm; `"seriation"`: both axes by the entries of the
        leading singular vectors of the norms of the kernels (of the matrix itself where it is one).

    Returns
    -------
    Tensor
        A copy with the units in order. Nulls that it is compared with must be ordered in the same way.

    Raises
    ------
    ValueError
        For fewer than two axes or an unknown `how`.

    Notes
    -----
    Source: reconstructed; spectral seriation after Atkins, Boman and Hendrickson (1998). The sign of the
    singular vectors is chosen so that the first one has a positive sum.

    Examples
    --------
    >>> order(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[4., 3.],
            [2., 1.]])
    """
    if W.ndim < 2:
        raise ValueError(
            f"W must have rows and columns, got shape {tuple(W.shape)}: there is nothing to order"
        )
    if how not in ("none", "norm", "seriation"):
        raise ValueError(f"how must be none, norm or seriation, got {how!r}: it names no order")
    if how == "none":
        return W.clone()
    # One entry per kernel; a matrix keeps its signs.
    matrix = W.double() if W.ndim == 2 else W.double().flatten(2).norm(dim=2)
    if how == "norm":
        rows, columns = matrix.norm(dim=1), matrix.norm(dim=0)
    else:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        sign = torch.where(left[:, 0].sum() < 0, -1.0, 1.0)
        rows, columns = left[:, 0] * sign, right[0] * sign
    by_row, by_column = (key.argsort(descending=True, stable=True) for key in (rows, columns))
    return W[by_row][:, by_column]


def _incoming_norm(net: nn.Module, domain: Domain) -> Tensor:
    """Norm of what makes each unit: weights of the first layer, or slope and shift of a batch norm."""
    first = domain.makers[0]
    weight = first.of(net)
    if weight.ndim > 1:
        return weight.transpose(0, first.axis).flatten(1).norm(dim=1)
    return torch.stack([slot.of(net) for slot in domain.makers if slot.module == first.module]).norm(dim=0)


def _sign(net: nn.Module, units: Units, domain: Domain) -> Tensor:
    """Sign of the slope of the batch norm behind each unit, else of the sum of what makes the unit."""
    slopes = [norm for norm in domain.norms if not units.opened_by(norm).odd]
    if slopes:
        value = _batch_norm(net, slopes[0][0])[0]
    else:
        first = domain.makers[0]
        weight = first.of(net)
        value = weight.transpose(0, first.axis).flatten(1).sum(1) if weight.ndim > 1 else weight
        if weight.ndim > 1:
            value = value + sum(s.of(net) for s in domain.makers if s[:2] == (first.module, "bias"))
    return torch.where(value < 0, -torch.ones_like(value), torch.ones_like(value))


def _batch_norm(net: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
    norm = net.get_submodule(name)
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.weight, norm.running_mean, norm.running_var, norm.eps


def _outgoing_norm(net: nn.Module, space: Space) -> Tensor:
    square: Tensor | float = 0.0
    for slot in space.readers:
        columns = slot.of(net).transpose(0, slot.axis).double()
        square = square + columns.reshape(len(columns) // slot.block, -1).square().sum(1)
    assert isinstance(square, Tensor)
    return square
