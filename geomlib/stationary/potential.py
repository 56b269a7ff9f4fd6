r"""Node-local potentials: the nonlinear half of a stationary layer.

A potential is a sum over nodes of functions of the state at the node: value, gradient, Hessian product and
proximity operator act node by node (arXiv 2507.20088 speaks of a convex local potential; the forms here are
reconstructed). All derivatives are for the real inner product `Re sum conj(a) b`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Local", "Potential", "Quartic", "Rectifier", "Tanh"]

# Newton steps of a scalar equation: monotone from one side, so this many reach rounding.
PROX_STEPS = 60


class Potential(ABC):
    """What a stationary layer asks of a potential.

    Examples
    --------
    >>> class Square(Potential):
    ...     def value(self, psi):
    ...         return psi.abs().square().sum((1, 2)) / 2
    ...
    ...     def gradient(self, psi):
    ...         return psi
    ...
    ...     def hessian_product(self, psi, x):
    ...         return x
    >>> Square().value(torch.ones(1, 3, 2))
    tensor([3.])
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters that gradients flow to."""
        return ()

    def with_tensors(self, *tensors: Tensor) -> Potential:
        """Return the same potential with other parameters, unchecked."""
        return self

    @abstractmethod
    def value(self, psi: Tensor) -> Tensor:
        """Return `U` of each sample: `(B, n, d)` to `(B,)`."""

    @abstractmethod
    def gradient(self, psi: Tensor) -> Tensor:
        """Return the gradient of `U`, `(B, n, d)`."""

    @abstractmethod
    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return the Hessian of `U` at `psi` applied to `x`, `(B, n, d)`."""

    def prox(self, q: Tensor, t: float) -> Tensor:
        """Return the proximity operator: `z` with `z + t grad U(z) = q`."""
        raise NotImplementedError(f"{type(self).__name__} has no prox: use a solver that needs none")

    #: Whether the gradient is differentiable everywhere; otherwise only proximity operators solve it.
    smooth: bool = True
    #: Whether nodes act on each other, so that the Hessian has no blocks of single nodes.
    couples_nodes: bool = False

    def convexity(self) -> Tensor | None:
        """Return a lower bound of all eigenvalues of all Hessians, a scalar; `None` if it is not known."""
        return None

    def linearise(self, psi: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Return `(x, y) -> y + U''(psi) x`, and a typical curvature of each node, `(B, n)`."""
        if self.couples_nodes:
            return lambda x, y: y + self.hessian_product(psi, x), torch.ones_like(_square(psi))
        ones = torch.ones_like(psi) * (1 + 1j) if psi.is_complex() else torch.ones_like(psi)
        diagonal = _inner(ones, self.hessian_product(psi, ones)) / _square(ones)
        return lambda x, y: y + self.hessian_product(psi, x), diagonal

    def blocks(self, psi: Tensor) -> Tensor:
        """Return the Hessian of each node as a real matrix `(B, n, r, r)`, `r` real components of a node."""
        columns = []
        for position in range(psi.shape[2] * (2 if psi.is_complex() else 1)):
            unit = torch.zeros_like(psi, memory_format=torch.contiguous_format)
            _components(unit)[..., position] = 1.0
            columns.append(_components(self.hessian_product(psi, unit)))
        return torch.stack(columns, -1)


class Quartic(Potential):
    """The radial potential `sum_v V_v |psi_v|^2 / 2 + kappa_v |psi_v|^4 / 4`.

    Parameters
    ----------
    V
        `(n,)`, real, any sign.
    kappa
        `(n,)`, real, not negative.

    Raises
    ------
    ValueError
        If shapes differ, numbers are not finite or `kappa` is negative: the energy would be unbounded.

    Notes
    -----
    Source: reconstructed. The simplest potential that commutes with all unitary maps of a node, has a closed
    proximity operator and a Hessian that is polynomial; its gradient is the cubic term of a Schrodinger
    equation.

    Examples
    --------
    >>> potential = Quartic(torch.tensor([1.0]), torch.tensor([2.0]))
    >>> psi = torch.tensor([[[3.0, 4.0]]])
    >>> potential.value(psi), potential.gradient(psi)
    (tensor([325.]), tensor([[[153., 204.]]]))
    """

    def __init__(self, V: Tensor, kappa: Tensor) -> None:
        for name, value in {"V": V, "kappa": kappa}.items():
            if value.dim() != 1 or not value.is_floating_point():
                raise ValueError(f"{name} must be real (n,), got {tuple(value.shape)} {value.dtype}")
        if V.shape != kappa.shape:
            raise ValueError(f"V and kappa must be one number a node, got {len(V)} and {len(kappa)}")
        if not V.is_meta and V.numel():
            with torch.no_grad():
                for name, value in {"V": V, "kappa": kappa}.items():
                    if not bool(torch.isfinite(value).all()):
                        raise ValueError(f"{name} must be finite, got infinities or NaN")
                if float(kappa.min()) < 0:
                    raise ValueError(f"kappa must not be negative, got {float(kappa.min()):.3g}: no minimum")
        self.V, self.kappa = V, kappa

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """`V` and `kappa`."""
        return self.V, self.kappa

    def with_tensors(self, *tensors: Tensor) -> Quartic:
        """Return the potential with other `V` and `kappa`, unchecked."""
        other = object.__new__(Quartic)
        other.V, other.kappa = tensors
        return other

    def value(self, psi: Tensor) -> Tensor:
        """Return `U` of each sample: `(B, n, d)` to `(B,)`."""
        square = _square(psi)
        return (square * (self.V / 2 + self.kappa / 4 * square)).sum(1)

    def gradient(self, psi: Tensor) -> Tensor:
        """Return `(V + kappa |psi|^2) psi`."""
        return (self.V + self.kappa * _square(psi)).unsqueeze(2) * psi

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return `(V + kappa |psi|^2) x + 2 kappa Re<psi, x> psi`."""
        along = _inner(psi, x)
        scale = self.V + self.kappa * _square(psi)
        return scale.unsqueeze(2) * x + (2 * self.kappa * along).unsqueeze(2) * psi

    def linearise(self, psi: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Return `(x, y) -> y + U''(psi) x`, and the mean diagonal of the Hessian at each node, `(B, n)`."""
        square = self.kappa * _square(psi)
        scale, size = self.V + square, psi.shape[2] * (2 if psi.is_complex() else 1)
        if size == 1:
            whole = (scale + 2 * square).unsqueeze(2)
            return lambda x, y: torch.addcmul(y, whole, x), whole.squeeze(2)
        factor, column = (2 * self.kappa).unsqueeze(1) * psi, scale.unsqueeze(2)
        return lambda x, y: y + column * x + _inner(psi, x).unsqueeze(2) * factor, scale + 2 * square / size

    def prox(self, q: Tensor, t: float) -> Tensor:
        """Return `z` with `z + t grad U(z) = q`, for `t V > -1`."""
        # z = s q with (1 + t V) s + t kappa |q|^2 s^3 = 1, smooth at q = 0.
        cubic = t * self.kappa * _square(q)
        return positive_root((1 + t * self.V).expand_as(cubic), cubic).unsqueeze(2) * q

    def convexity(self) -> Tensor:
        """Return the least `V`."""
        return self.V.detach().min()

    def blocks(self, psi: Tensor) -> Tensor:
        """Return the Hessian of each node, `(B, n, r, r)`."""
        rows = _components(psi)
        scale = self.V + self.kappa * rows.square().sum(2)
        identity = torch.diag(torch.ones_like(rows[0, 0])) if rows.shape[0] else rows.new_zeros(rows.shape[2])
        outer = (2 * self.kappa)[:, None, None] * rows.unsqueeze(3) * rows.unsqueeze(2)
        return scale[..., None, None] * identity + outer


class Local(Potential):
    """Any smooth potential that acts within nodes, its derivatives by automatic differentiation.

    Parameters
    ----------
    density
        `density(psi, *parameters) -> (B, n)`: the potential of each node, twice differentiable in the state
        `(B, n, d)`. Entry `(b, v)` may depend on `psi[b, v]` only.
    *parameters
        Tensors that gradients flow to.
    convexity
        A lower bound of all eigenvalues of all Hessians, if it is known.

    Notes
    -----
    Source: reconstructed; the stationary layer needs no more than a node-local potential with two
    derivatives.

    Examples
    --------
    >>> soft = Local(lambda psi, a: (a * psi).cosh().log().sum(2), torch.tensor(2.0), convexity=0.0)
    >>> soft.gradient(torch.zeros(1, 2, 1)).flatten(), soft.hessian_product(*[torch.ones(1, 1, 1)] * 2)
    (tensor([0., 0.]), tensor([[[0.2826]]]))
    """

    def __init__(
        self, density: Callable[..., Tensor], *parameters: Tensor, convexity: float | None = None
    ) -> None:
        self.density, self.parameters, self.bound = density, parameters, convexity

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters of the density."""
        return self.parameters

    def with_tensors(self, *tensors: Tensor) -> Local:
        """Return the same density with other parameters."""
        return Local(self.density, *tensors, convexity=self.bound)

    def value(self, psi: Tensor) -> Tensor:
        """Return `U` of each sample: `(B, n, d)` to `(B,)`."""
        return self.density(psi, *self.parameters).sum(1)

    def gradient(self, psi: Tensor) -> Tensor:
        """Return the gradient of `U`, `(B, n, d)`."""
        track = torch.is_grad_enabled() and any(t.requires_grad for t in (psi, *self.parameters))
        with torch.enable_grad():
            here = psi.view_as(psi) if psi.requires_grad else psi.detach().requires_grad_()
            value = self.density(here, *self.parameters).sum()
            (gradient,) = torch.autograd.grad(value, here, create_graph=track)
        return gradient

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return the Hessian of `U` at `psi` applied to `x`, `(B, n, d)`."""
        track = torch.is_grad_enabled() and any(t.requires_grad for t in (psi, x, *self.parameters))
        with torch.enable_grad():
            here = psi.view_as(psi) if psi.requires_grad else psi.detach().requires_grad_()
            gradient = self.gradient(here)
            if not gradient.requires_grad:  # a density of degree one at most
                return torch.zeros_like(x)
            (product,) = torch.autograd.grad(gradient, here, x, create_graph=track)
        return product

    def convexity(self) -> Tensor | None:
        """Return the bound that was given."""
        return None if self.bound is None else torch.tensor(self.bound)


class Tanh(Potential):
    """The potential with derivative `artanh`: a node without edges is `tanh` of its drive.

    It acts on each real coordinate and lives on the open cube `(-1, 1)^d`; all its Hessians are at least the
    identity.

    Notes
    -----
    Source: Combettes and Pesquet 2020 for activations as proximity operators; arXiv 2507.20088 for resolvent
    networks among the classes that coincide.

    Examples
    --------
    >>> Tanh().prox(torch.tensor([[[2.0]]]), 1e6).abs() < 1e-5
    tensor([[[True]]])
    >>> Tanh().gradient(torch.tensor([[[0.5]]]))
    tensor([[[0.5493]]])
    """

    def value(self, psi: Tensor) -> Tensor:
        """Return the sum of `z artanh z + log(1 - z^2) / 2`, infinite outside the cube."""
        z = _components(psi)
        inside = (1 + z).xlogy(1 + z) / 2 + (1 - z).xlogy(1 - z) / 2
        return inside.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("inf")).sum((1, 2))

    def gradient(self, psi: Tensor) -> Tensor:
        """Return `artanh psi`, NaN outside the cube."""
        return _states(_components(psi).atanh(), psi)

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return `x / (1 - psi^2)`."""
        return _states(_components(x) / (1 - _components(psi).square()), psi)

    def prox(self, q: Tensor, t: float) -> Tensor:
        """Return `z` with `z + t artanh z = q`, by Newton's method on `tanh`'s side."""
        q_real = _components(q)
        # In y = artanh z the equation tanh y + t y = q is increasing; Newton with a bracket never leaves it.
        low, high = (q_real - 1) / t, (q_real + 1) / t
        y = q_real / (1 + t)
        for _ in range(PROX_STEPS):
            z = y.tanh()
            gap = z + t * y - q_real
            high, low = torch.where(gap > 0, y, high), torch.where(gap > 0, low, y)
            newton = y - gap / (1 - z.square() + t)
            y = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        return _states(y.tanh(), q)

    def convexity(self) -> Tensor:
        """Return 1."""
        return torch.ones(())


class Rectifier(Potential):
    """The indicator of the orthant plus `|psi|^2 / 2`: a node without edges is `relu` of its drive.

    It has no Hessian at its kinks, so only solvers that use the proximity operator solve it, and gradients
    are those of the active coordinates.

    Notes
    -----
    Source: Combettes and Pesquet 2020: ReLU is the projection onto the orthant.

    Examples
    --------
    >>> Rectifier().prox(torch.tensor([[[-1.0, 3.0]]]), 0.5)
    tensor([[[0., 2.]]])
    """

    smooth = False

    def value(self, psi: Tensor) -> Tensor:
        """Return half the square of the norm, infinite outside the orthant."""
        z = _components(psi)
        return torch.where(z < 0, float("inf"), z.square() / 2).sum((1, 2))

    def gradient(self, psi: Tensor) -> Tensor:
        """Return `psi`, the gradient of the smooth part."""
        return psi

    def hessian_product(self, psi: Tensor, x: Tensor) -> Tensor:
        """Return `x`, the Hessian of the smooth part."""
        return x

    def prox(self, q: Tensor, t: float) -> Tensor:
        """Return `relu(q) / (1 + t)`."""
        return _states(_components(q).relu() / (1 + t), q)

    def convexity(self) -> Tensor:
        """Return 1."""
        return torch.ones(())


def positive_root(linear: Tensor, cubic: Tensor) -> Tensor:
    """Return the root of `linear s + cubic s^3 = 1` for `linear > 0` and `cubic >= 0`.

    Newton's method from `1 / linear` or the cube root, whichever is less: at most 1.5 times the root and
    above it, where the left side is convex, so that the steps come down quadratically. The last of them
    carries the exact derivative.

    Examples
    --------
    >>> positive_root(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 2e9])).round(decimals=5)
    tensor([0.5000, 0.0008])
    """
    with torch.no_grad():
        cube = cubic.clamp_min(torch.finfo(cubic.dtype).tiny).reciprocal().pow(1 / 3)
        root = torch.minimum(linear.reciprocal(), cube)
    for _ in range(6):
        square = root.square()
        root = (1 + 2 * cubic * square * root) / (linear + 3 * cubic * square)
    return root


def _components(psi: Tensor) -> Tensor:
    """Return the real coordinates of each node, `(B, n, d)` or `(B, n, 2 d)`, a view."""
    return torch.view_as_real(psi).flatten(2) if psi.is_complex() else psi


def _states(rows: Tensor, like: Tensor) -> Tensor:
    """Real coordinates as states of the kind of `like`."""
    return torch.view_as_complex(rows.reshape(*like.shape, 2)) if like.is_complex() else rows


def _square(psi: Tensor) -> Tensor:
    """`|psi_v|^2`, `(B, n)`."""
    return _sum(_components(psi).square())


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """`Re <a_v, b_v>`, `(B, n)`."""
    return _sum(_components(a) * _components(b))


def _sum(rows: Tensor) -> Tensor:
    """Sum over the components of each node, in the order of memory that the rows have."""
    if rows.shape[2] == 1:
        return rows.squeeze(2)
    by_nodes = rows.stride(0) < rows.stride(1)
    return rows.transpose(0, 1).sum(2).transpose(0, 1) if by_nodes else rows.sum(2)
