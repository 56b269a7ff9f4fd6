r"""Which tensors a hidden unit of a network lives in, so that it can be relabelled or rescaled in them all.

A unit is a row of the layer that makes it, an entry of every norm layer that it passes, and a column (or a
block of columns, behind a flattening) of every layer that reads it; a residual stream gives many layers the
same units. The network is traced once with `torch.fx`, and two partitions of its values are kept: *spaces*,
whose units are permuted together, and *domains*, whose units are scaled together. A batch norm ends a domain
but not a space.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

__all__ = ["Domain", "Slot", "Space", "Units", "trace"]


class Slot(NamedTuple):
    """One axis of one tensor, along which units lie, `block` entries each."""

    module: str
    tensor: str
    axis: int
    block: int = 1
    exponent: int = 0  # of the scale of a unit; 0 where it only moves

    def of(self, net: nn.Module) -> Tensor:
        """Return the tensor itself."""
        return getattr(net.get_submodule(self.module), self.tensor)


@dataclass
class Space:
    """Units that are permuted together: `readers` are the columns among the `slots`."""

    size: int | None = None
    frozen: bool = False
    slots: list[Slot] = field(default_factory=list)
    readers: list[Slot] = field(default_factory=list)


@dataclass
class Domain:
    """Values that are scaled together.

    Attributes
    ----------
    positive, odd : bool
        Whether everything that reads the values commutes with positive factors, and with a change of sign.
    makers : list of Slot
        What makes the values, `weight` and `bias` of each layer, in the order of the network.
    readers : list of Slot
        What must be divided by the factor.
    norms : list of (str, int)
        Batch norms that absorb the factor, and the domain that each opens.
    """

    positive: bool = True
    odd: bool = True
    makers: list[Slot] = field(default_factory=list)
    readers: list[Slot] = field(default_factory=list)
    norms: list[tuple[str, int]] = field(default_factory=list)


class _Value(NamedTuple):
    space: int
    domain: int
    flat: bool = False


class Units:
    """Spaces and domains of a traced network.

    Parameters
    ----------
    net : Module
        Traceable by `torch.fx`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> [(space.size, len(space.slots)) for space in Units(net).spaces()]
    [(5, 3)]
    """

    def __init__(self, net: nn.Module) -> None:
        self._spaces: list[Space] = []
        self._domains: list[Domain] = []
        self._parent: dict[str, list[int]] = {"space": [], "domain": []}
        self._read: dict[str, _Value] = {}
        self._made: dict[str, _Value] = {}
        self._owner: dict[int, str] = {}
        self._modules = dict(net.named_modules())
        try:
            graph = fx.Tracer().trace(net)
        except Exception as error:
            raise ValueError(
                f"net must be traceable by torch.fx, got {type(net).__name__} ({error}): "
                "the way of a unit through it would be unknown"
            ) from error
        values: dict[fx.Node, _Value | None] = {}
        for node in graph.nodes:
            values[node] = self._visit(node, values)

    def spaces(self) -> list[Space]:
        """Spaces whose units may be relabelled, in the order of the network."""
        roots = [space for i, space in enumerate(self._spaces) if self._root("space", i) == i]
        return [space for space in roots if not space.frozen]

    def domains(self) -> list[Domain]:
        """Domains, those of inputs and outputs included, in the order of the network."""
        return [domain for i, domain in enumerate(self._domains) if self._root("domain", i) == i]

    def space_of(self, layer: str) -> Space:
        """Return the space of the units that a layer makes."""
        return self._spaces[self._root("space", self._find(layer).space)]

    def domain_of(self, layer: str) -> Domain:
        """Return the domain of the values that a layer makes."""
        return self._domains[self._root("domain", self._find(layer).domain)]

    def opened_by(self, norm: tuple[str, int]) -> Domain:
        """Return the domain behind a batch norm of `Domain.norms`."""
        return self._domains[self._root("domain", norm[1])]

    def _find(self, layer: str) -> _Value:
        if layer not in self._made:
            raise ValueError(
                f"layer must be one of {', '.join(self._made)}, got {layer!r}: it makes no hidden units"
            )
        return self._made[layer]

    # Partitions -------------------------------------------------------------------------------------------

    def _new(self, *, frozen: bool = False, size: int | None = None) -> _Value:
        self._spaces.append(Space(size, frozen))
        self._parent["space"].append(len(self._spaces) - 1)
        return _Value(len(self._spaces) - 1, self._new_domain(frozen=frozen))

    def _new_domain(self, *, frozen: bool = False) -> int:
        self._domains.append(Domain(not frozen, not frozen))
        self._parent["domain"].append(len(self._domains) - 1)
        return len(self._domains) - 1

    def _root(self, kind: str, i: int) -> int:
        parent = self._parent[kind]
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def _space(self, value: _Value) -> Space:
        return self._spaces[self._root("space", value.space)]

    def _domain(self, value: _Value) -> Domain:
        return self._domains[self._root("domain", value.domain)]

    def _merge(self, a: _Value, b: _Value, where: str) -> _Value:
        """Let the earlier of two spaces, and of two domains, take up the later one: the values are added."""
        if a.flat != b.flat:
            raise ValueError(f"{where} adds a flattened value to one that is not: units would not match")
        i, j = sorted((self._root("space", a.space), self._root("space", b.space)))
        if i != j:
            first, second = self._spaces[i], self._spaces[j]
            if None not in (first.size, second.size) and first.size != second.size:
                raise ValueError(
                    f"{where} adds {first.size} units to {second.size}: broadcasting is unsupported"
                )
            first.size, first.frozen = first.size or second.size, first.frozen or second.frozen
            first.slots += second.slots
            first.readers += second.readers
            self._parent["space"][j] = i
        k, m = sorted((self._root("domain", a.domain), self._root("domain", b.domain)))
        if k != m:
            one, two = self._domains[k], self._domains[m]
            one.positive, one.odd = one.positive and two.positive, one.odd and two.odd
            one.makers += two.makers
            one.readers += two.readers
            one.norms += two.norms
            self._parent["domain"][m] = k
        return _Value(i, k, a.flat)

    def _is_input(self, value: _Value) -> bool:
        """Tell whether no layer has made or met the value yet: whatever happens to it, no unit moves."""
        space = self._space(value)
        return space.frozen and space.size is None

    def _restrict(self, value: _Value, *, positive: bool = True, odd: bool = True) -> _Value:
        domain = self._domain(value)
        domain.positive, domain.odd = domain.positive and positive, domain.odd and odd
        return value

    # One operation after the other ------------------------------------------------------------------------

    def _visit(self, node: fx.Node, values: dict[fx.Node, _Value | None]) -> _Value | None:
        tensors = [v for n in node.all_input_nodes if (v := values[n]) is not None]
        if node.op == "placeholder":
            return self._new(frozen=True)
        if node.op == "output":
            for value in tensors:
                self._space(value).frozen = True
                self._restrict(value, positive=False, odd=False)
            return None
        if node.op == "get_attr":
            raise ValueError(
                f"net reads the tensor {node.target!r} outside a layer: the units of its entries are unknown"
            )
        if node.op == "call_module":
            name = str(node.target)
            module = self._modules[name]
            if len(tensors) != 1:
                raise _unsupported(name, module)
            if self._is_input(tensors[0]) and not list(module.parameters()):
                return tensors[0]
            return self._module(name, module, tensors[0])
        return self._function(node, tensors)

    def _module(self, name: str, module: nn.Module, value: _Value) -> _Value:
        if isinstance(module, nn.Linear):
            return self._layer(name, module, value, (0, 1))
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return self._layer(name, module, value, (1, 0))
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return self._layer(name, module, value, (0, 1))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            return self._batch_norm(name, module, value)
        whole = isinstance(module, nn.GroupNorm) and module.num_groups == 1
        if whole or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
            self._carry(name, ("weight", "bias"), value)
            self._restrict(value, positive=False, odd=False)
            return _Value(value.space, self._new_domain(frozen=True), value.flat)
        if isinstance(module, nn.Flatten) and module.start_dim == 1:
            return value._replace(flat=True)
        if isinstance(module, nn.Hardtanh) and module.min_val == -module.max_val:
            return self._restrict(value, positive=False)
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            raise _unsupported(name, module)
        for types, positive, odd in _LAYERS:
            if type(module) in types:
                return self._restrict(value, positive=positive, odd=odd)
        raise _unsupported(name, module)

    def _layer(self, name: str, module: nn.Module, value: _Value, axes: tuple[int, int]) -> _Value:
        """Read the units of `value` along one axis of the weight and make new ones along the other."""
        if name in self._made:
            # The same columns read both values, so their units are the same.
            self._merge(self._read[name], value, name)
            return self._made[name]
        weight = self._parameter(name, "weight")
        row, column = axes
        groups = getattr(module, "groups", 1)
        size, space = weight.shape[row], self._space(value)
        if groups > 1:
            if not groups == module.in_channels == module.out_channels:
                raise ValueError(f"{name} must have one group or one per channel, got {groups}: unsupported")
            # Depthwise: row i reads unit i alone and makes unit i.
            made = _Value(value.space, self._new_domain(), value.flat)
            self._domain(value).readers.append(Slot(name, "weight", 0, 1, -1))
            space.slots.append(Slot(name, "weight", 0))
        else:
            entries = weight.shape[column]
            block = 1 if space.size is None else entries // space.size
            if space.size is not None and (entries % space.size or (block > 1 and not value.flat)):
                raise ValueError(
                    f"{name} must read {space.size} units, got {entries} columns: they would not match"
                )
            reader = Slot(name, "weight", column, block, -1)
            space.slots.append(reader)
            space.readers.append(reader)
            self._domain(value).readers.append(reader)
            made = self._new(size=size)
            self._space(made).slots.append(Slot(name, "weight", row))
        self._read[name], self._made[name] = value, made
        self._domain(made).makers.append(Slot(name, "weight", row, 1, 1))
        if getattr(module, "bias", None) is not None:
            self._parameter(name, "bias")
            self._space(made).slots.append(Slot(name, "bias", 0))
            self._domain(made).makers.append(Slot(name, "bias", 0, 1, 1))
        return made

    def _batch_norm(self, name: str, module: nn.Module, value: _Value) -> _Value:
        self._carry(name, ("weight", "bias", "running_mean", "running_var"), value)
        opened = self._new_domain()
        if module.running_mean is None or module.weight is None:
            # Nothing can take up what a scale does beside eps.
            self._restrict(value, positive=False, odd=False)
            self._domains[opened] = Domain(positive=False, odd=False)
        else:
            self._domain(value).norms.append((name, opened))
            self._domains[opened].makers += [Slot(name, t, 0, 1, 1) for t in ("weight", "bias")]
        return _Value(value.space, opened, value.flat)

    def _carry(self, name: str, tensors: tuple[str, ...], value: _Value) -> None:
        """Let the units of a value move the entries of vectors."""
        if name in self._made:
            raise ValueError(f"{name} is used twice: a norm layer shared by two places is unsupported")
        self._made[name] = value
        space = self._space(value)
        for tensor in tensors:
            entries = getattr(self._modules[name], tensor)
            if entries is None:
                continue
            self._parameter(name, tensor)
            if space.size is not None and len(entries) != space.size:
                raise ValueError(f"{name} must hold {space.size} units, got {len(entries)}: unsupported")
            space.slots.append(Slot(name, tensor, 0))

    def _parameter(self, name: str, tensor: str) -> Tensor:
        module = self._modules[name]
        if tensor not in module._parameters and tensor not in module._buffers:
            raise ValueError(
                f"{name}.{tensor} is computed from other parameters: remove the parametrisation first"
            )
        value = getattr(module, tensor)
        owner = self._owner.setdefault(id(value), name)
        if owner != name:
            raise ValueError(f"{name}.{tensor} is shared with {owner}: tied weights are unsupported here")
        return value

    def _function(self, node: fx.Node, tensors: list[_Value]) -> _Value | None:
        called = node.target
        name = called if isinstance(called, str) else getattr(called, "__name__", str(called))
        if called in (operator.add, operator.iadd, torch.add) or name in ("add", "add_"):
            if len(tensors) == 2 and len(node.args) == 2 and not node.kwargs:
                return self._merge(tensors[0], tensors[1], node.name)
        elif name in ("size", "dim", "getattr") or (called is operator.getitem and not tensors):
            return None
        elif len(tensors) == 1:
            if self._is_input(tensors[0]):
                return tensors[0]
            if name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,):
                return tensors[0]._replace(flat=True)
            if name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
                return tensors[0]._replace(flat=True)
            if name == "mean" and _means_over_space(node):
                return tensors[0]
            for names, positive, odd in _FUNCTIONS:
                if name in names:
                    return self._restrict(tensors[0], positive=positive, odd=odd)
        raise ValueError(
            f"net calls {name} ({node.name}), which is unsupported: where its units go is unknown"
        )


def trace(net: nn.Module) -> Units:
    """Trace a network and return the units that may be relabelled and rescaled.

    Parameters
    ----------
    net : Module
        Linear and convolution layers (one group, or depthwise), batch norm, layer norm, activations that act
        entry by entry, pooling, dropout, flattening, and sums of such (residual streams), in any order that
        `torch.fx` can trace.

    Returns
    -------
    Units

    Raises
    ------
    ValueError
        For whatever else the network does, by name: attention, concatenation, products, tied weights,
        parametrisations.

    Notes
    -----
    Source: the intertwiner groups of Godfrey et al. (arXiv 2205.14258), section 3: permutations for every
    activation that acts entry by entry, positive factors for ReLU and LeakyReLU, signs for odd ones.

    Examples
    --------
    >>> trace(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))).domain_of("0").odd
    True
    """
    return Units(net)


def _unsupported(name: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"layer {name!r} is a {type(module).__name__}, which is unsupported: how units pass it is unknown"
    )


def _means_over_space(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and set(dims) in ({2, 3}, {-1, -2})


_Types = tuple[type[nn.Module], ...]
# What acts on each unit alone, and whether it commutes with positive factors and with signs.
_LAYERS: tuple[tuple[_Types, bool, bool], ...] = (
    ((nn.ReLU, nn.LeakyReLU, nn.PReLU), True, False),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), True, False),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), True, False),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), True, True),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), True, True),
    ((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), True, True),
    ((nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink), False, True),
    ((nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus), False, False),
    ((nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.AlphaDropout), False, False),
)
_FUNCTIONS: tuple[tuple[tuple[str, ...], bool, bool], ...] = (
    (
        ("relu", "relu_", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d"),
        True,
        False,
    ),
    (("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "dropout", "contiguous"), True, True),
    (("tanh", "sin", "softsign"), False, True),
    (("sigmoid", "gelu", "silu", "elu", "selu", "mish", "softplus", "relu6", "hardtanh"), False, False),
)
