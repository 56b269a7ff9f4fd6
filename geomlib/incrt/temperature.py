r"""The temperature of a dictionary: fixed, annealed, or measured in units of what the tokens vary.

Coincident prototypes part below a multiple of the largest eigenvalue of the token covariance. So the default
schedule follows that eigenvalue: it starts where nothing has parted and cools until much has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geomlib.core.precision import working_dtype

__all__ = ["Temperature"]

SAMPLE = 1024
"""About how many tokens a training step looks at to follow the eigenvalue."""


class Temperature(nn.Module):
    r"""Schedule `T(t) = scale * max(end, start * decay^(t / total_steps))`.

    `scale` is a running mean of the largest eigenvalue of the covariance of the tokens, or 1 if the schedule
    is not `relative`. One step of power iteration per training step follows that eigenvalue; nothing waits
    for the device, nothing carries a gradient, and evaluation changes nothing.

    Parameters
    ----------
    start, end
        First and last factor, positive, `end <= start`. Equal factors hold the temperature.
    decay
        Share of `start` that is left after `total_steps`, in (0, 1].
    total_steps
        Length of the cooling in training steps.
    relative
        Measure in units of the running eigenvalue. A relative schedule suits tokens whose spread changes
        while an encoder trains; an absolute one is what tables of temperatures mean.
    ema
        Inertia of the running mean, in [0, 1).
    floor
        Smallest temperature, for tokens that do not vary.
    device, dtype
        Of the running numbers.

    Attributes
    ----------
    steps : Tensor
        Training steps seen `()`, int64.
    eigenvalue : Tensor
        Running largest eigenvalue `()`.

    Raises
    ------
    ValueError
        If a number is out of range; in `update`, if the tokens have another width than before.

    Notes
    -----
    Source: reconstructed: starts at the critical temperature `4 lambda` of the full gradient and cools to
    `lambda / 2`. arXiv 2604.01740 uses fixed temperatures and cooling from 2 to 0.5.

    Examples
    --------
    >>> schedule = Temperature(total_steps=100)
    >>> _ = schedule.update(torch.tensor([[1.0], [-1.0]]))
    >>> schedule.value(), schedule.steps
    (tensor(3.8622), tensor(1))
    >>> Temperature(start=2.0, end=0.5, relative=False).value()
    tensor(2.)
    """

    steps: Tensor
    eigenvalue: Tensor
    direction: Tensor

    def __init__(
        self,
        start: float = 4.0,
        end: float = 0.5,
        *,
        decay: float = 0.03,
        total_steps: int = 1000,
        relative: bool = True,
        ema: float = 0.98,
        floor: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (0 < end <= start and math.isfinite(start)):
            raise ValueError(f"0 < end <= start must hold and be finite, got start {start} and end {end}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}: the dictionary would heat up")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}: nothing would cool")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {ema}: the mean would never move")
        if not (floor > 0 and math.isfinite(floor)):
            raise ValueError(f"floor must be positive and finite, got {floor}: T = 0 divides by zero")
        self.start, self.end, self.decay, self.total_steps = start, end, decay, total_steps
        self.relative, self.ema, self.floor = relative, ema, floor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("eigenvalue", torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("direction", torch.empty(0, device=device, dtype=dtype))

    def watch(self, width: int) -> None:
        """Make room for the direction in which tokens of this width vary most.

        `update` does so by itself; a module that is to be stored and loaded does it when it is built.

        Raises
        ------
        ValueError
            If another width is watched already.

        Examples
        --------
        >>> schedule = Temperature()
        >>> schedule.watch(3)
        >>> schedule.direction.shape
        torch.Size([3])
        """
        if len(self.direction) not in (0, width):
            raise ValueError(
                f"width must stay {len(self.direction)}, got {width}: it follows the tokens of one block"
            )
        if len(self.direction) == 0:
            # Neither an axis nor a sum of axes, so that no covariance met in practice is orthogonal to it.
            places = torch.arange(1, width + 1, device=self.direction.device, dtype=self.direction.dtype)
            self.direction = nn.functional.normalize(torch.cos(places.square()), dim=0)

    @torch.no_grad()
    def update(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Look at the tokens of a training step, and return the temperature that follows `()`.

        Parameters
        ----------
        z
            Tokens `(..., d)`.
        mask
            Valid tokens `(...)`, boolean.

        Examples
        --------
        >>> schedule = Temperature(4.0, 4.0)
        >>> schedule.update(torch.tensor([[3.0], [-3.0]]))
        tensor(36.)
        """
        if self.relative:
            self.watch(z.shape[-1])
            # A plain mean at first, weighted to later steps, since the iteration has to find the direction.
            rate = (2 / (self.steps + 2)).clamp_min(1 - self.ema).to(self.eigenvalue)
            self.eigenvalue.lerp_(self._spread(z, mask).to(self.eigenvalue), rate)
        self.steps.add_(1)
        return self.value()

    def value(self) -> Tensor:
        """Return the present temperature `()`, without gradient.

        Examples
        --------
        >>> Temperature(2.0, 2.0, relative=False).value()
        tensor(2.)
        """
        progress = self.steps.to(self.eigenvalue) / self.total_steps
        factor = (self.start * self.decay**progress).clamp_min(self.end)
        return (factor * self.eigenvalue if self.relative else factor).clamp_min(self.floor)

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        unit = "eigenvalues" if self.relative else "absolute"
        return f"{self.start} to {self.end} in {self.total_steps} steps, {unit}"

    def _spread(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Take one step of power iteration with the covariance, and return the norm of the image `()`."""
        x = z.detach().reshape(-1, z.shape[-1])
        stride = max(1, len(x) // SAMPLE)  # one step of many: a sample will do
        x = x[::stride].to(working_dtype(z.dtype))
        direction = self.direction.to(x)
        if mask is None:
            x = x - x.mean(0)
            image = x.T @ (x @ direction) / len(x)
        else:
            valid = mask.reshape(-1, 1)[::stride]
            number = valid.sum().clamp_min(1)
            x = torch.where(valid, x, 0)
            x = torch.where(valid, x - x.sum(0) / number, 0)
            image = x.T @ (x @ direction) / number
        norm = image.norm()
        moves = norm > torch.finfo(x.dtype).tiny  # tokens that do not vary keep the direction
        self.direction.copy_(torch.where(moves, image / norm, direction))
        return norm
