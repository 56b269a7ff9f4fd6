r"""A trainable stack of stationary layers with latent graphs: drive, relax, read out.

Layer `l` solves `F_l(psi_l) = 0` with the drive `K_l psi_{l-1} + b_l`. Its graph has no neighbours given: the
weights of all candidate edges are parameters, kept at or above zero by :meth:`StationaryNetwork.project_`
after each step of an optimiser, and phases or unitary transports may be learned on them (arXiv 2507.20088).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from geomlib.core import ConvergenceWarning, Solution
from geomlib.core.precision import full_precision
from geomlib.stationary.equation import Path
from geomlib.stationary.graph import SheafGraph
from geomlib.stationary.implicit import attach
from geomlib.stationary.layer import solve_stationary
from geomlib.stationary.potential import Quartic
from geomlib.stationary.solvers import NewtonCG, Solver

__all__ = ["NetworkDiagnostics", "StationaryBlock", "StationaryNetwork", "cayley"]

Connection = Literal["none", "cayley", "exponential"]


@dataclass
class NetworkDiagnostics:
    """What the solves of a network took, since it was made or :meth:`clear` was called.

    Attributes
    ----------
    solves
        Samples times layers that were solved.
    unsolved
        Those of them that missed the tolerance.
    worst
        Largest residual met.
    steps
        Most steps a sample of the last forward pass took.
    """

    solves: int = 0
    unsolved: int = 0
    worst: float = 0.0
    steps: int = 0

    def add(self, solution: Solution) -> None:
        """Count one solve."""
        if solution.value.is_meta or solution.converged.numel() == 0:
            return
        self.solves += solution.converged.numel()
        self.unsolved += int((~solution.converged).sum())
        self.worst = max(self.worst, float(solution.residual.max()))
        self.steps = max(self.steps, int(solution.steps.max()))

    def clear(self) -> None:
        """Start counting again."""
        self.solves = self.unsolved = self.steps = 0
        self.worst = 0.0


def cayley(generator: Tensor) -> Tensor:
    """Return the unitary `(I - Y / 2)^{-1} (I + Y / 2)` of the skew part `Y = (A - A^*) / 2`.

    Parameters
    ----------
    generator
        `A`, `(..., d, d)`, real or complex.

    Returns
    -------
    Tensor
        `(..., d, d)`, orthogonal or unitary, never with the eigenvalue -1.

    Examples
    --------
    >>> tau = cayley(torch.tensor([[0.0, -4.0], [0.0, 0.0]]))  # a quarter turn
    >>> (tau - torch.tensor([[0.0, -1.0], [1.0, 0.0]])).abs().max() < 1e-6
    tensor(True)
    """
    half = (generator - generator.mT.conj_physical()) / 4
    identity = torch.diag(half.new_ones(half.shape[-1])).expand_as(half)
    return torch.linalg.solve(identity - half, identity + half)


class StationaryBlock(nn.Module):
    """One layer of a stationary network: an affine drive, a latent graph, a quartic potential.

    Parameters
    ----------
    in_features
        Real numbers that the drive is made of.
    nodes, stalk
        The state is `(B, nodes, stalk)`.
    candidates
        Edges `(2, M)` to choose from, `None` for all pairs.
    mu
        Least `V`, so that the layer is strongly monotone with this constant.
    kappa
        `kappa` of every node at the start.
    connection
        `"none"`: real states and identity transports. `"cayley"` or `"exponential"`: complex states, and a
        learned unitary on each candidate, `exp(i theta)` for stalks of dimension 1.
    weight
        Weight of every candidate at the start.
    solver, tol, max_steps, path
        See :func:`geomlib.stationary.stationary_layer`.
    generator
        Draws the initial parameters.
    device, dtype
        Of the parameters, real; float32 by default.

    Raises
    ------
    ValueError
        If a size is below 1 or a number out of range.

    Notes
    -----
    Source: arXiv 2507.20088 for layers on learned graphs; the parametrisation `V = mu + softplus`, `kappa =
    softplus` is reconstructed: it keeps every layer strongly monotone.

    Examples
    --------
    >>> block = StationaryBlock(3, 4, generator=torch.Generator().manual_seed(0))
    >>> block(torch.ones(2, 3)).value.shape, block.graph()
    (torch.Size([2, 4, 1]), SheafGraph(4 nodes, 6 edges of 6 candidates))
    """

    edges: Tensor

    def __init__(
        self,
        in_features: int,
        nodes: int,
        stalk: int = 1,
        *,
        candidates: Tensor | None = None,
        mu: float = 0.5,
        kappa: float = 0.1,
        connection: Connection = "none",
        weight: float = 0.1,
        solver: Solver = NewtonCG(),  # noqa: B008
        tol: float = 1e-5,
        max_steps: int = 200,
        path: Path = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"in_features": in_features, "nodes": nodes, "stalk": stalk}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}: there would be no state")
        for name, number in {"mu": mu, "kappa": kappa}.items():
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}: softplus cannot start there")
        if connection not in ("none", "cayley", "exponential"):
            raise ValueError(f"connection must be none, cayley or exponential, got {connection!r}")
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}: the energy may have no minimum")
        self.nodes, self.stalk, self.mu, self.connection = nodes, stalk, mu, connection
        self.solver, self.tol, self.max_steps, self.path = solver, tol, max_steps, path
        edges = torch.triu_indices(nodes, nodes, 1) if candidates is None else candidates
        like = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("edges", edges.to(like.device))
        count = self.edges.shape[1]
        # The list is checked here; later only weights and transports change.
        self._bare = SheafGraph(nodes, self.edges, like.new_zeros(count))

        def draw(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(*shape, generator=generator)).to(like))

        size = nodes * stalk * (1 if connection == "none" else 2)
        self.drive = nn.Linear(in_features, size, device=device, dtype=dtype)
        self.drive.weight = draw(size, in_features, scale=1 / math.sqrt(in_features))
        nn.init.zeros_(self.drive.bias)
        self.weights = nn.Parameter(torch.full_like(like.new_empty(count), weight))
        self.rise = nn.Parameter(like.new_zeros(nodes))
        self.stiffness = nn.Parameter(torch.full_like(like.new_empty(nodes), math.log(math.expm1(kappa))))
        self.turn: nn.Parameter | None = None
        if connection != "none":
            shape = (count,) if stalk == 1 else (count, stalk, stalk, 2)
            self.turn = draw(*shape, scale=0.1)

    def potential(self) -> Quartic:
        """Return the potential, with `V >= mu` and `kappa > 0`."""
        return Quartic(self.mu + softplus(self.rise), softplus(self.stiffness))

    def transport(self) -> Tensor | None:
        """Return the transports of all candidates: none, phases `(M,)`, or unitaries `(M, d, d)`."""
        if self.turn is None or self.stalk == 1:
            return self.turn
        generator = torch.view_as_complex(self.turn)
        if self.connection == "cayley":
            return cayley(generator)
        return torch.linalg.matrix_exp((generator - generator.mT.conj_physical()) / 2)

    def graph(self) -> SheafGraph:
        """Return the graph with its parameters in it.

        Raises
        ------
        ValueError
            If a weight is negative: :meth:`project_` belongs after each step of an optimiser.
        """
        bare = (
            self._bare if self._bare.edges.device == self.edges.device else self._bare.to(self.edges.device)
        )
        self._bare = bare
        return bare.with_tensors(self.weights, None).replace(weights=self.weights, transport=self.transport())

    @torch.no_grad()
    def project_(self) -> None:
        """Put weights that have become negative to zero."""
        self.weights.clamp_(min=0)

    def forward(self, x: Tensor) -> Solution:
        """Solve for the state `(B, nodes, stalk)` under inputs `(B, in_features)`.

        Samples that miss the tolerance keep the best state found, and no gradient passes through them.
        """
        drive = self.drive(x).to(self.weights.dtype)
        if self.connection == "none":
            drive = drive.view(len(x), self.nodes, self.stalk)
        else:
            drive = torch.view_as_complex(drive.view(len(x), self.nodes, self.stalk, 2))
        layer = self.graph(), self.potential(), drive
        with full_precision(x.device):
            solution = solve_stationary(
                *layer,
                solver=self.solver,
                tol=self.tol,
                max_steps=self.max_steps,
                path=self.path,
                throw=False,
            )
        solved = solution.converged
        attached = attach(*layer, replace(solution, converged=torch.ones_like(solved)), self.tol, self.path)
        value = torch.where(solved[:, None, None], attached.value, attached.value.detach())
        return replace(solution, value=value)


class StationaryNetwork(nn.Module):
    """Classify by a stack of stationary layers on learned graphs.

    Parameters
    ----------
    in_features, classes
        Width of the input, and of the output.
    nodes, stalk
        Size of each layer, one number or one a layer.
    layers
        Number of layers.
    candidates
        Edges `(2, M)` to choose from in every layer, `None` for all pairs.
    mu, kappa, weight, solver, tol, max_steps, path
        See :class:`StationaryBlock`.
    connection
        `False` for real states; `True` or `"cayley"`, or `"exponential"`, for complex states with learned
        unitary transports.
    generator
        Draws the initial parameters.
    device, dtype
        Of the parameters; float32 by default, which makes complex states complex64.

    Attributes
    ----------
    diagnostics : NetworkDiagnostics
        Samples that were not solved are counted here and warned of once; what a loss makes of them is for the
        caller to decide, since no gradient passes through them.

    Raises
    ------
    ValueError
        If a size is below 1 or a number out of range.

    Notes
    -----
    Source: arXiv 2507.20088 for the stack; by SGN-S1 it is one stationary problem on the supra-graph. Weights
    must be projected after each step, for example with `fit(..., on_step=lambda step: model.project_())`.

    Examples
    --------
    >>> model = StationaryNetwork(3, 2, nodes=5, layers=2, generator=torch.Generator().manual_seed(0))
    >>> model(torch.ones(4, 3)).shape, model.diagnostics.unsolved
    (torch.Size([4, 2]), 0)
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        nodes: int | Sequence[int],
        stalk: int | Sequence[int] = 1,
        layers: int = 1,
        candidates: Tensor | None = None,
        mu: float = 0.5,
        kappa: float = 0.1,
        connection: bool | Connection = False,
        weight: float = 0.1,
        solver: Solver = NewtonCG(),  # noqa: B008
        tol: float = 1e-5,
        max_steps: int = 200,
        path: Path = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layers < 1 or classes < 1:
            raise ValueError(f"layers and classes must be at least 1, got {layers} and {classes}")
        kind: Connection = connection if isinstance(connection, str) else "cayley" if connection else "none"
        blocks: list[StationaryBlock] = []
        width = in_features
        for n, d in zip(_each(nodes, layers, "nodes"), _each(stalk, layers, "stalk"), strict=True):
            blocks.append(
                StationaryBlock(
                    width,
                    n,
                    d,
                    candidates=candidates,
                    mu=mu,
                    kappa=kappa,
                    connection=kind,
                    weight=weight,
                    solver=solver,
                    tol=tol,
                    max_steps=max_steps,
                    path=path,
                    generator=generator,
                    device=device,
                    dtype=dtype,
                )
            )
            width = n * d * (1 if kind == "none" else 2)
        self.blocks = nn.ModuleList(blocks)
        self.readout = nn.Linear(width, classes, device=device, dtype=dtype)
        draw = torch.randn(classes, width, generator=generator) / math.sqrt(width)
        self.readout.weight = nn.Parameter(draw.to(self.readout.weight))
        nn.init.zeros_(self.readout.bias)
        self.diagnostics = NetworkDiagnostics()
        self._warned = False

    def states(self, x: Tensor) -> list[Solution]:
        """Return the stationary state of every layer under inputs `(B, in_features)`."""
        solutions: list[Solution] = []
        self.diagnostics.steps = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for block in self._stack():
                solution = block(x)
                self.diagnostics.add(solution)
                solutions.append(solution)
                x = _reals(solution.value)
        if self.diagnostics.unsolved and not self._warned:
            self._warned = True
            warnings.warn(
                f"some states of the network were not reached, {self.diagnostics}: raise max_steps or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        return solutions

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_features)` to logits `(B, classes)`."""
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"x must be real (batch, features), got {tuple(x.shape)} {x.dtype}")
        return self.readout(_reals(self.states(x)[-1].value))

    def _stack(self) -> list[StationaryBlock]:
        return [cast(StationaryBlock, block) for block in self.blocks]

    def project_(self) -> None:
        """Put weights that have become negative to zero, in every layer."""
        for block in self._stack():
            block.project_()

    def graphs(self) -> list[SheafGraph]:
        """Return the learned graph of every layer, without history."""
        return [block.graph().detach() for block in self._stack()]


def _reals(psi: Tensor) -> Tensor:
    return (torch.view_as_real(psi) if psi.is_complex() else psi).flatten(1)


def _each(value: int | Sequence[int], layers: int, name: str) -> list[int]:
    if isinstance(value, int):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(f"{name} must be one number, or one for each of {layers} layers, got {list(value)}")
    return list(value)
