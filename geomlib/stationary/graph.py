r"""Weighted graphs with a unitary connection, and their Laplacian: the linear half of a stationary layer.

A sheaf graph carries `C^d` at every node and a unitary `tau_e` at every edge `e = (u, v)`, `u < v`, that
brings the fibre of `v` to that of `u`. `(delta psi)_e = psi_u - tau_e psi_v` is the coboundary, `L = delta^*
diag(w) delta` the connection Laplacian (arXiv 2507.20088; sheaf Laplacians after Hansen and Ghrist 2019).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from geomlib.stationary.checks import check_edges, check_transport, check_weights
from geomlib.stationary.sparse import EdgeIndex, edge_dots, laplacian_product, weighted_laplacian

__all__ = ["SheafGraph"]

# Numbers on edges that a gradient over all candidates holds at once.
CHUNK = 1 << 18


class SheafGraph:
    """Nodes, weighted candidate edges, and the transport along each.

    Parameters
    ----------
    nodes
        Number of nodes, at least 1.
    edges
        `(2, M)` int64 with `edges[0] < edges[1]`, no edge twice. `M` may be 0.
    weights
        `(M,)`, real and not negative; an edge of weight 0 is absent.
    transport
        `(M, d, d)` unitary (real orthogonal ones act on real states too), or `(M,)` real phases `theta` that
        stand for `exp(i theta)` and act on stalks of any dimension; `None` is the identity.
    parallel
        Allow an edge to occur more than once, as coverings need it.
    signed
        Allow negative weights: the branch of stationary states extends a little beyond a face.

    Raises
    ------
    ValueError
        For edges that are loops, repeated, unordered or out of range, weights that are negative or not
        finite, and transports that are not unitary.

    Notes
    -----
    Source: arXiv 2507.20088 names weighted graphs and unitary connections; the orientation of `tau` and the
    restriction maps `(I, tau)` are reconstructed: every pair of unitary restriction maps reduces to them.

    Examples
    --------
    >>> path = SheafGraph(3, torch.tensor([[0, 1], [1, 2]]), torch.tensor([1.0, 2.0]))
    >>> path.dense_laplacian()
    tensor([[ 1., -1.,  0.],
            [-1.,  3., -2.],
            [ 0., -2.,  2.]])
    >>> path
    SheafGraph(3 nodes, 2 edges of 2 candidates)
    """

    def __init__(
        self,
        nodes: int,
        edges: Tensor,
        weights: Tensor,
        transport: Tensor | None = None,
        *,
        parallel: bool = False,
        signed: bool = False,
    ) -> None:
        self.nodes, self.edges, self.parallel, self.signed = nodes, edges, parallel, signed
        check_edges(nodes, edges, parallel)
        self._index = EdgeIndex(nodes, edges)
        self.weights = check_weights(weights, edges.shape[1], signed)
        if transport is not None:
            check_transport(transport, edges.shape[1])
        self.transport = transport

    def __repr__(self) -> str:
        present = "" if self.weights.is_meta else f"{int((self.weights != 0).sum())} edges of "
        connection = "" if self.transport is None else ", with a connection"
        return f"SheafGraph({self.nodes} nodes, {present}{self.edges.shape[1]} candidates{connection})"

    @classmethod
    def complete(
        cls, nodes: int, weights: Tensor | None = None, transport: Tensor | None = None, **options: Any
    ) -> SheafGraph:
        """Return the graph with all `n (n - 1) / 2` candidate edges, of weight 0 if none is given.

        Examples
        --------
        >>> SheafGraph.complete(4, torch.ones(6)).degrees()
        tensor([3., 3., 3., 3.])
        """
        device = None if weights is None else weights.device
        edges = torch.triu_indices(nodes, nodes, 1, device=device)
        weights = torch.zeros(edges.shape[1]) if weights is None else weights
        return cls(nodes, edges, weights, transport, **options)

    def replace(self, **changes: Tensor | None) -> SheafGraph:
        """Return the same candidates with other `weights` or another `transport`, checked anew.

        Examples
        --------
        >>> SheafGraph.complete(3, torch.ones(3)).replace(weights=torch.tensor([1.0, 0.0, 0.0]))
        SheafGraph(3 nodes, 1 edges of 3 candidates)
        """
        unknown = set(changes) - {"weights", "transport"}
        if unknown:
            raise ValueError(f"only weights and transport can be replaced, got {sorted(unknown)}")
        other = object.__new__(SheafGraph)
        other.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in ("weights", "transport", "_phase")}
        )
        other.weights, other.transport = self.weights, self.transport
        if "weights" in changes:
            assert changes["weights"] is not None
            other.weights = check_weights(changes["weights"], self.edges.shape[1], self.signed)
        if "transport" in changes:
            if changes["transport"] is not None:
                check_transport(changes["transport"], self.edges.shape[1])
            other.transport = changes["transport"]
        return other

    def with_tensors(self, weights: Tensor, transport: Tensor | None) -> SheafGraph:
        """Return the same candidates with tensors that are known to be good, unchecked.

        Examples
        --------
        >>> SheafGraph.complete(2, torch.ones(1)).with_tensors(torch.zeros(1), None).degrees()
        tensor([0., 0.])
        """
        other = object.__new__(SheafGraph)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_phase"})
        other.weights, other.transport = weights, transport
        return other

    def detach(self) -> SheafGraph:
        """Return the graph without its history.

        Examples
        --------
        >>> SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1, requires_grad=True)).detach().weights
        tensor([1.])
        """
        if not (self.weights.requires_grad or (self.transport is not None and self.transport.requires_grad)):
            return self
        return self.with_tensors(
            self.weights.detach(), None if self.transport is None else self.transport.detach()
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SheafGraph:
        """Return the graph elsewhere, or in the precision of a real `dtype`.

        Examples
        --------
        >>> SheafGraph.complete(2, torch.ones(1)).to(dtype=torch.float64).weights
        tensor([1.], dtype=torch.float64)
        """
        weights, transport = self.weights.to(device=device, dtype=dtype), self.transport
        if transport is not None:
            kind = dtype.to_complex() if dtype is not None and transport.is_complex() else dtype
            transport = transport.to(device=device, dtype=kind)
        return SheafGraph(
            self.nodes,
            self.edges.to(weights.device),
            weights,
            transport,
            parallel=self.parallel,
            signed=self.signed,
        )

    @staticmethod
    def disjoint_union(*graphs: SheafGraph) -> SheafGraph:
        """Return all graphs side by side, numbered one after the other: a batch of different graphs.

        Raises
        ------
        ValueError
            If there is none, or some have a transport and others not.

        Examples
        --------
        >>> edge = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
        >>> SheafGraph.disjoint_union(edge, edge).edges
        tensor([[0, 2],
                [1, 3]])
        """
        if not graphs or len({graph.transport is None for graph in graphs}) > 1:
            raise ValueError(
                f"graphs must be at least one, all with or all without a transport, got {len(graphs)}"
            )
        edges, offset = [], 0
        for graph in graphs:
            edges.append(graph.edges + offset)
            offset += graph.nodes
        transports = [graph.transport for graph in graphs if graph.transport is not None]
        return SheafGraph(
            offset,
            torch.cat(edges, 1),
            torch.cat([graph.weights for graph in graphs]),
            torch.cat(transports) if transports else None,
            parallel=any(graph.parallel for graph in graphs),
            signed=any(graph.signed for graph in graphs),
        )

    @cached_property
    def _phase(self) -> Tensor | None:
        """Transports as they act: `(M, d, d)`, or `(M, 1)` unit complex numbers for phases."""
        if self.transport is None or self.transport.dim() == 3:
            return self.transport
        return torch.polar(torch.ones_like(self.transport), self.transport).unsqueeze(1)

    def degrees(self) -> Tensor:
        """Return the weighted degree of each node, `(n,)`.

        Examples
        --------
        >>> SheafGraph(3, torch.tensor([[0], [1]]), torch.tensor([2.0])).degrees()
        tensor([2., 2., 0.])
        """
        zero = self.weights.new_zeros(self.nodes)
        return zero.index_add(0, self.edges[0], self.weights).index_add(0, self.edges[1], self.weights)

    def incidence(self) -> Tensor:
        """Return the real incidence matrix `(M, n)`: 1 at the first end, -1 at the second.

        Examples
        --------
        >>> SheafGraph(3, torch.tensor([[0], [2]]), torch.ones(1)).incidence()
        tensor([[ 1.,  0., -1.]])
        """
        one = torch.ones_like(self.weights).unsqueeze(1)
        zero = self.weights.new_zeros(len(self.weights), self.nodes)
        return zero.scatter(1, self.edges[0, :, None], one).scatter(1, self.edges[1, :, None], -one)

    def forth(self, psi: Tensor) -> Tensor:
        """Bring states `(B, M, d)` of the second ends to the first ends along the edges.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1), torch.tensor([torch.pi / 2]))
        >>> graph.forth(torch.ones(1, 1, 1, dtype=torch.complex64)).imag
        tensor([[[1.]]])
        """
        tau = self._phase
        if tau is None:
            return psi
        return tau * psi if tau.dim() == 2 else torch.einsum("eab,neb->nea", tau, psi)

    def back(self, psi: Tensor) -> Tensor:
        """Bring states `(B, M, d)` of the first ends to the second ends: the inverse of :meth:`forth`.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1), torch.tensor([torch.pi / 2]))
        >>> graph.back(torch.ones(1, 1, 1, dtype=torch.complex64)).imag
        tensor([[[-1.]]])
        """
        tau = self._phase
        if tau is None:
            return psi
        tau = tau.conj_physical()
        return tau * psi if tau.dim() == 2 else torch.einsum("eba,neb->nea", tau, psi)

    def coboundary(self, psi: Tensor) -> Tensor:
        """Return `psi_u - tau_e psi_v` for each edge: `(B, n, d)` to `(B, M, d)`.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
        >>> graph.coboundary(torch.tensor([[[3.0], [1.0]]]))
        tensor([[[2.]]])
        """
        first, second = self.edges
        return psi.index_select(1, first) - self.forth(psi.index_select(1, second))

    def divergence(self, flow: Tensor) -> Tensor:
        """Return the adjoint of the coboundary: `(B, M, d)` to `(B, n, d)`.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
        >>> graph.divergence(torch.ones(1, 1, 1))
        tensor([[[ 1.],
                 [-1.]]])
        """
        first, second = self.edges
        zero = flow.new_zeros(flow.shape[0], self.nodes, flow.shape[2])
        return zero.index_add(1, first, flow).index_add(1, second, -self.back(flow))

    def laplacian(self, psi: Tensor) -> Tensor:
        """Return `L psi` for states `(B, n, d)`, with exact gradients for states, weights and transport.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0]))
        >>> graph.laplacian(torch.tensor([[[3.0], [1.0]]]))
        tensor([[[ 4.],
                 [-4.]]])
        """
        if self.transport is None:
            return weighted_laplacian(psi, self.weights, self._index)
        flow = self.coboundary(psi)
        return self.divergence(flow * self.weights.unsqueeze(1))

    def compressed(self) -> Tensor | None:
        """Return the Laplacian without its connection as a sparse matrix, or `None` where there are none.

        Examples
        --------
        >>> SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1)).compressed().to_dense()
        tensor([[ 1., -1.],
                [-1.,  1.]])
        """
        return self._index.matrix(self.weights) if self._index.compressed else None

    def prepared(self, psi: Tensor, matrix: Tensor | None) -> Tensor:
        """Return `L psi` of a plain graph without history, by the matrix of :meth:`compressed`.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.ones(1))
        >>> graph.prepared(torch.tensor([[[3.0], [1.0]]]), graph.compressed()).flatten()
        tensor([ 2., -2.])
        """
        return laplacian_product(psi, self.weights, self._index, matrix)

    def edge_products(self, p: Tensor, psi: Tensor, *, chunk: int | None = None) -> Tensor:
        """Return `Re <(delta p)_e, (delta psi)_e>` of each candidate, summed over the batch, `(M,)`.

        Parameters
        ----------
        p, psi
            `(B, n, d)`.
        chunk
            Edges at a time; by default so many that a few megabytes are in use.

        Examples
        --------
        >>> graph = SheafGraph(2, torch.tensor([[0], [1]]), torch.zeros(1))
        >>> psi = torch.tensor([[[3.0], [1.0]]])
        >>> graph.edge_products(psi, psi)
        tensor([4.])
        """
        if self.transport is None and chunk is None:
            return edge_dots(p, psi, self._index)
        count = self.edges.shape[1]
        chunk = chunk or max(1, CHUNK // max(1, psi.shape[0] * psi.shape[2]))
        if chunk >= count:
            return self._products(p, psi)
        parts = []
        for first in range(0, count, chunk):
            part = object.__new__(SheafGraph)
            part.edges = self.edges[:, first : first + chunk]
            part._phase = None if self._phase is None else self._phase[first : first + chunk]
            parts.append(part._products(p, psi))
        return torch.cat(parts)

    def _products(self, p: Tensor, psi: Tensor) -> Tensor:
        product = self.coboundary(p).conj_physical() * self.coboundary(psi)
        return product.real.sum((0, 2)) if product.is_complex() else product.sum((0, 2))

    def dense_laplacian(self, stalk: int = 1) -> Tensor:
        """Return `L` as a matrix `(n d, n d)`, rows ordered by node and then by component.

        Parameters
        ----------
        stalk
            The dimension `d`; that of the transport where it has one.

        Raises
        ------
        ValueError
            If `stalk` is not that of the transport.

        Examples
        --------
        >>> SheafGraph(2, torch.tensor([[0], [1]]), torch.tensor([2.0])).dense_laplacian(stalk=2)
        tensor([[ 2.,  0., -2.,  0.],
                [ 0.,  2.,  0., -2.],
                [-2.,  0.,  2.,  0.],
                [ 0., -2.,  0.,  2.]])
        """
        self.check_stalk(stalk)
        first, second = self.edges
        identity = torch.diag(self.weights.new_ones(stalk))
        tau = self._phase
        if tau is None:
            tau = identity.expand(len(self.weights), stalk, stalk)
        elif tau.dim() == 2:
            tau = tau.unsqueeze(2) * identity
        block = self.weights[:, None, None] * tau  # (M, d, d)
        n = self.nodes
        matrix = block.new_zeros(n * n, stalk, stalk)
        matrix = matrix.index_add(0, first * n + second, -block)
        matrix = matrix.index_add(0, second * n + first, -block.mT.conj_physical())
        diagonal = torch.diag_embed(self.degrees()).view(n * n, 1, 1) * identity
        matrix = (matrix + diagonal).view(n, n, stalk, stalk)
        return matrix.transpose(1, 2).reshape(n * stalk, n * stalk)

    def check_stalk(self, stalk: int) -> None:
        """Raise `ValueError` if a stalk of this dimension does not fit the transport.

        Examples
        --------
        >>> SheafGraph.complete(2, torch.ones(1)).check_stalk(5)
        """
        if stalk < 1:
            raise ValueError(f"stalk must be at least 1, got {stalk}: there would be no state")
        if self.transport is not None and self.transport.dim() == 3 and self.transport.shape[1] != stalk:
            raise ValueError(
                f"stalk must be {self.transport.shape[1]}, as the transport {tuple(self.transport.shape)} "
                f"acts on it, got {stalk}"
            )
