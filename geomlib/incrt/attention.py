r"""Attention whose heads come and go: one fused call over the active prefix of preallocated slots.

The layer adds `sum_h softmax(Xh M_h Xh^T / sqrt(dk)) Xh W_V^h W_O^h` with `M_h = W_Q^h (W_K^h)^T` to the
residual stream (arXiv 2604.01880 and 2604.10703 by their abstracts; equations reconstructed). A birth fills
the next slot and leaves the function as it was; a removal moves the last active head into the gap. Parameters
never change identity, so that an optimiser keeps what it knows of them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DirectionalAttention"]


class Extent:
    """How many slots are active, as a number and as the length of an empty tensor.

    `torch.compile` makes the length of a tensor symbolic once it has changed, while an integer that belongs
    to a module is a constant of the graph, which would be compiled anew at every birth. Lengths 0 and 1 are
    always constants, hence two more rows than active slots.
    """

    def __init__(self, active: int) -> None:
        self.loads = 0  # state dicts taken in, so that what is derived from one can be renewed
        self.set(active)

    def set(self, active: int) -> None:
        """Change the number."""
        self.active = active
        self.rows = torch.empty(active + 2, 0)


class DirectionalAttention(nn.Module):
    r"""Sum (or mean) of heads in preallocated slots, of which the first `active` work.

    Parameters
    ----------
    d, dk, dv : int
        Width of the stream, of queries and keys, and of values per head.
    max_heads : int
        Slots; their parameters exist from the start.
    heads : int
        How many heads are active at the start.
    causal : bool
        Tokens see themselves and what stands before them.
    aggregate : {"sum", "mean"}
        The mean rescales all heads when one is born, so that a birth changes the function.
    slots : {"prefix", "mask"}
        Compute the active slots, or all of them times zero or one: static shapes and births that are exact to
        the bit, for `max_heads / active` times the work.
    generator : torch.Generator, optional
        Draws the initial weights.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    W_in : Parameter
        `(max_heads, 2 dk + dv, d)`: queries, keys and values of each head.
    W_out : Parameter
        `(max_heads, dv, d)`.
    births : Tensor
        `(max_heads,)` int64, the ordinal number of the birth of the head in each slot, -1 in empty slots.

    Raises
    ------
    ValueError
        If a size is below one, or more heads are asked for than there are slots or orthogonal directions.

    Notes
    -----
    Source: the public code of a successor of arXiv 2604.10703 for `W_Q`, `W_K ~ N(0, 1/d)`. Reconstructed:
    `W_V ~ N(0, 1/d)`, `W_O ~ N(0, 1 / (4 dv))` at the start and zero at a birth, and the sum, where that
    code has the mean: only so does a birth preserve the function.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> layer = DirectionalAttention(8, 4, 2, max_heads=3, generator=generator)
    >>> x = torch.randn(2, 5, 8, generator=generator)
    >>> before = layer(x)
    >>> u, v = torch.eye(8)[:2]
    >>> layer.grow(u, v, generator=generator), layer.active
    (1, 2)
    >>> torch.allclose(layer(x), before, atol=1e-6)
    True
    """

    births: Tensor
    active_heads: Tensor
    born: Tensor

    def __init__(
        self,
        d: int,
        dk: int,
        dv: int,
        max_heads: int,
        *,
        heads: int = 1,
        causal: bool = False,
        aggregate: Literal["sum", "mean"] = "sum",
        slots: Literal["prefix", "mask"] = "prefix",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(d, dk, dv, max_heads, heads)
        if aggregate not in ("sum", "mean"):
            raise ValueError(
                f"aggregate must be 'sum' or 'mean', got {aggregate!r}: heads are added or averaged"
            )
        if slots not in ("prefix", "mask"):
            raise ValueError(f"slots must be 'prefix' or 'mask', got {slots!r}: they are cut off or zeroed")
        super().__init__()
        self.d, self.dk, self.dv, self.max_heads = d, dk, dv, max_heads
        self.causal, self.aggregate, self.slots = causal, aggregate, slots
        self._extent = Extent(heads)
        self.recording = False
        self.recorded: list[Recorded] = []
        W_in = torch.zeros(max_heads, 2 * dk + dv, d, dtype=dtype)
        W_out = torch.zeros(max_heads, dv, d, dtype=dtype)
        W_in[:heads].normal_(std=d**-0.5, generator=generator)
        W_out[:heads].normal_(std=0.5 * dv**-0.5, generator=generator)
        self.W_in = nn.Parameter(W_in.to(device))
        self.W_out = nn.Parameter(W_out.to(device))
        births = torch.arange(max_heads).masked_fill(torch.arange(max_heads) >= heads, -1)
        self.register_buffer("births", births.to(device))
        self.register_buffer("active_heads", torch.full((), heads, device=device))
        self.register_buffer("born", torch.full((), heads, device=device))
        self.register_load_state_dict_post_hook(_read_extent)

    @property
    def active(self) -> int:
        """The number of active heads, which fill the first slots."""
        return self._extent.active

    @property
    def W_Q(self) -> Tensor:
        """Queries of the active heads `(H, d, dk)`, a view."""
        return self.W_in[: self.active, : self.dk].mT

    @property
    def W_K(self) -> Tensor:
        """Keys of the active heads `(H, d, dk)`, a view."""
        return self.W_in[: self.active, self.dk : 2 * self.dk].mT

    @property
    def W_V(self) -> Tensor:
        """Values of the active heads `(H, d, dv)`, a view."""
        return self.W_in[: self.active, 2 * self.dk :].mT

    @property
    def W_O(self) -> Tensor:
        """Outputs of the active heads `(H, dv, d)`, a view."""
        return self.W_out[: self.active]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor
            `(B, n, d)`, normalised.
        mask : Tensor, optional
            `(B, n)` bool, True for tokens and False for padding; the output is zero at padding.

        Returns
        -------
        Tensor
            `(B, n, d)`.

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        self._check(x, mask)
        heads = self.max_heads if self.slots == "mask" else self._extent.rows.shape[0] - 2
        mixed = self._mix(x, mask, heads)
        W_out = self.W_out[:heads]
        if self.slots == "mask":
            W_out = W_out * (self.births >= 0).to(W_out.dtype)[:, None, None]
        out = mixed.transpose(1, 2).flatten(2) @ W_out.flatten(0, 1)
        if self.aggregate == "mean":
            out = out / (self._extent.rows.shape[0] - 2)
        if mask is not None:
            out = out * mask.unsqueeze(-1)
        if self.recording and self.training and out.requires_grad:
            self._watch(out, x, mask)
        return out

    def head_outputs(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what each active head adds to the stream, `(B, H, n, d)`.

        Parameters
        ----------
        x, mask
            As in `forward`.

        Returns
        -------
        Tensor
            The sum over heads is the output of the layer.
        """
        self._check(x, mask)
        outputs = self._mix(x, mask, self.active) @ self.W_O
        if self.aggregate == "mean":
            outputs = outputs / self.active
        return outputs if mask is None else outputs * mask[:, None, :, None]

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of each active head, `(B, H, n, n)`, for pictures: the layer never forms it.

        Parameters
        ----------
        x, mask
            As in `forward`.

        Returns
        -------
        Tensor
            Rows add up to one.
        """
        self._check(x, mask)
        xh = x.unsqueeze(1)
        scores = (xh @ self.W_Q) @ (xh @ self.W_K).mT * self.dk**-0.5
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return scores.masked_fill(~self._visible(valid), -math.inf).softmax(-1)

    def _mix(self, x: Tensor, mask: Tensor | None, heads: int) -> Tensor:
        """Values mixed by attention, `(B, heads, n, dv)`."""
        projected = F.linear(x, self.W_in[:heads].flatten(0, 1))
        q, k, v = (
            projected.unflatten(-1, (heads, 2 * self.dk + self.dv))
            .transpose(1, 2)
            .split([self.dk, self.dk, self.dv], dim=-1)
        )
        wide = self.dk - self.dv
        # The fused kernels want heads of one width; a device that has others takes them as they are.
        if wide > 0:
            v = F.pad(v, (0, wide))
        elif wide < 0:
            q, k = F.pad(q, (0, -wide)), F.pad(k, (0, -wide))
        visible = None if mask is None else self._visible(mask)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=self.causal and mask is None, scale=self.dk**-0.5
        )
        return mixed[..., : self.dv]

    def _visible(self, mask: Tensor) -> Tensor:
        """Which keys each query sees, `(B, 1, n, n)`; padding sees itself, lest a row see nothing."""
        n = mask.shape[1]
        visible = mask[:, None, None, :].expand(-1, 1, n, n)
        position = torch.arange(n, device=mask.device)
        if self.causal:
            visible = visible & (position <= position[:, None])
        return visible | (position == position[:, None])

    @torch.no_grad()
    def grow(
        self, u: Tensor | None = None, v: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> int:
        """Give birth to a head that adds nothing yet.

        Parameters
        ----------
        u, v : Tensor, optional
            `(d,)`: the first column of queries and that of keys, made unit vectors. Random without them.
        generator : torch.Generator, optional
            Draws the other columns.

        Returns
        -------
        int
            The slot of the new head.

        Raises
        ------
        ValueError
            If all slots are taken, only one of `u` and `v` is given, or they are no directions.
        """
        slot = self.active
        if slot == self.max_heads:
            raise ValueError(f"max_heads must exceed the {slot} active heads to grow: every slot is taken")
        if (u is None) != (v is None):
            raise ValueError("u and v must be given together: a query direction needs a key direction")
        W_in = torch.empty(self.W_in.shape[1:], dtype=self.W_in.dtype)
        W_in.normal_(std=self.d**-0.5, generator=generator)
        block = W_in.to(self.W_in.device)
        if u is not None and v is not None:
            block[0], block[self.dk] = self._direction("u", u), self._direction("v", v)
        self.W_in[slot] = block
        self.W_out[slot] = 0
        self.births[slot] = self.born
        self.born += 1
        self._set_active(slot + 1)
        return slot

    @torch.no_grad()
    def prune(self, head: int) -> int:
        """Remove a head; the last active one takes its slot.

        Parameters
        ----------
        head : int
            Its slot.

        Returns
        -------
        int
            The slot that is free now, from which the moved head came: what an optimiser knows of it has to
            move from there to `head`.

        Raises
        ------
        ValueError
            If there is no such head, or it is the last.
        """
        if not 0 <= head < self.active:
            raise ValueError(
                f"head must be one of the {self.active} active ones, got {head}: its slot is empty"
            )
        if self.active == 1:
            raise ValueError("head must not be the last one: a layer without heads cannot attend")
        last = self.active - 1
        for tensor, empty in ((self.W_in, 0), (self.W_out, 0), (self.births, -1)):
            tensor[head] = tensor[last].clone()
            tensor[last] = empty
        self._set_active(last)
        return last

    def _set_active(self, active: int) -> None:
        self._extent.set(active)
        self.active_heads.fill_(active)

    def _direction(self, name: str, vector: Tensor) -> Tensor:
        vector = vector.to(self.W_in)
        length = vector.norm()
        if vector.shape != (self.d,) or not 0 < length < math.inf:
            raise ValueError(
                f"{name} must be a finite vector of {self.d} numbers other than zero, got shape "
                f"{tuple(vector.shape)} and length {length.item():.3g}: it is no direction"
            )
        return vector / length

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d:
            raise ValueError(f"x must be (B, n, {self.d}), got {tuple(x.shape)}: the layer has that width")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"mask must be bool of shape {tuple(x.shape[:2])}, got {mask.dtype} of {tuple(mask.shape)}: "
                "it marks the tokens"
            )

    @torch.compiler.disable
    def _watch(self, out: Tensor, x: Tensor, mask: Tensor | None) -> None:
        """Keep what comes in and the gradient of what goes out, once it is known."""
        x = x.detach()

        def keep(delta: Tensor) -> None:
            self.recorded.append(Recorded(x, delta.detach(), mask))

        out.register_hook(keep)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return (
            f"d={self.d}, dk={self.dk}, dv={self.dv}, heads={self.active} of {self.max_heads}, "
            f"causal={self.causal}, aggregate={self.aggregate!r}"
        )


class Recorded:
    """Input, gradient of the output and mask of one pass through a layer."""

    def __init__(self, x: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        self.x, self.delta, self.mask = x, delta, mask


def _read_extent(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, DirectionalAttention)
    module._extent.set(int(module.active_heads))
    module._extent.loads += 1


def check_sizes(d: int, dk: int, dv: int, max_heads: int, heads: int) -> None:
    """Raise unless the sizes of a layer make sense."""
    for name, value in (("d", d), ("dk", dk), ("dv", dv), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: a layer without it cannot attend")
    if not heads <= max_heads <= d:
        raise ValueError(
            f"max_heads must lie in {heads} ... {d}, got {max_heads}: heads need slots, and a width of {d} "
            "has no more orthogonal directions"
        )
