"""Two tasks of known difficulty for every sample: glyphs under noise, and the first symbol to the right.

In the first, difficulty is noise, which no further iteration removes. In the second it is distance, and the
number of iterations that a sample needs can be counted: a rule that stops by difficulty can be compared with
what is best possible. Neither comes from arXiv:2601.19551, whose data are images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

__all__ = [
    "GlyphData",
    "SymbolData",
    "first_symbol",
    "fixed_depth_ceiling",
    "glyphs",
    "mean_required_steps",
    "noisy_glyphs",
]

SYMBOLS = 4
SIDE = 12
_BITMAPS = (  # rows of five bits, top to bottom; one digit a line
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


class GlyphData(NamedTuple):
    """Noisy digits, their labels, and how noisy each one is.

    Attributes
    ----------
    x : Tensor
        `(n, 144)` float32: pictures of 12 x 12, row by row.
    y : Tensor
        `(n,)` int64 in 0..9.
    difficulty : Tensor
        `(n,)` float32 in [0, 1): the standard deviation of the noise grows linearly with it.

    Examples
    --------
    >>> noisy_glyphs(3, generator=torch.Generator().manual_seed(0)).x.shape
    torch.Size([3, 144])
    """

    x: Tensor
    y: Tensor
    difficulty: Tensor


class SymbolData(NamedTuple):
    """Rows of symbols, the first symbol of each, how far away it stands and how many steps that takes.

    Attributes
    ----------
    x : Tensor
        `(n, 6, length)` float32: five channels say blank or which of four symbols, the sixth marks cell 0.
    y : Tensor
        `(n,)` int64 in 0..3: the symbol at position `distance`.
    distance : Tensor
        `(n,)` int64 in 1..length - 1: so many blanks come first.
    required_steps : Tensor
        `(n,)` int64: `ceil(distance / 2)`, the steps after which a map that moves information by two cells
        can know the answer at position 0.

    Examples
    --------
    >>> first_symbol(3, length=8, generator=torch.Generator().manual_seed(0)).x.shape
    torch.Size([3, 6, 8])
    """

    x: Tensor
    y: Tensor
    distance: Tensor
    required_steps: Tensor


def glyphs() -> Tensor:
    """Return the ten digits as bitmaps, `(10, 7, 5)` float32 of zeros and ones.

    Examples
    --------
    >>> glyphs()[1].int()[1].tolist()
    [0, 1, 1, 0, 0]
    """
    return torch.tensor([[[float(bit) for bit in row] for row in digit.split()] for digit in _BITMAPS])


def noisy_glyphs(
    n: int, *, generator: torch.Generator | None = None, noise: tuple[float, float] = (0.1, 1.1)
) -> GlyphData:
    """Draw digits of 5 x 7 dots, enlarged to 8 x 10, shifted, and covered with noise of known strength.

    Parameters
    ----------
    n : int
        Number of samples, at least 0.
    generator : torch.Generator, optional
        On the CPU, where everything is drawn.
    noise : (float, float)
        Standard deviation of the noise at difficulty 0, and how much it grows up to difficulty 1.

    Returns
    -------
    GlyphData
        On the CPU, where it was drawn.

    Raises
    ------
    ValueError
        If `n` or a part of `noise` is negative.

    Notes
    -----
    Source: reconstructed, a task with a difficulty that more depth does not cure: the best stop rule can gain
    little over a fixed depth here.

    Examples
    --------
    >>> data = noisy_glyphs(500, generator=torch.Generator().manual_seed(0))
    >>> data.y.bincount().min().item() > 20
    True
    """
    _check_count(n)
    base, growth = noise
    if not (base >= 0 and growth >= 0):
        raise ValueError(f"noise must hold two numbers of at least 0, got {noise}: they make a deviation")
    large = interpolate(glyphs()[:, None], size=(10, 8), mode="bilinear")[:, 0]
    y = torch.randint(10, (n,), generator=generator)
    down = torch.randint(0, 3, (n, 1), generator=generator)
    right = torch.randint(1, 4, (n, 1), generator=generator)
    difficulty = torch.rand(n, generator=generator)
    rows, columns = down + torch.arange(10), right + torch.arange(8)
    x = torch.zeros(n, SIDE, SIDE)
    x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]] = large[y]
    deviation = base + growth * difficulty
    x = x.flatten(1) + deviation[:, None] * torch.randn(n, SIDE * SIDE, generator=generator)
    return GlyphData(x, y, difficulty)


def first_symbol(n: int, *, length: int = 24, generator: torch.Generator | None = None) -> SymbolData:
    """Draw rows that begin with blanks; the label is the first symbol, asked for at position 0.

    The number of blanks is uniform on 1..length - 1; from there on every cell holds one of four symbols at
    random. Nothing but the first symbol tells the label, so before a local rule has carried it to position 0
    the best guess is right once in four times.

    Parameters
    ----------
    n : int
        Number of samples, at least 0.
    length : int
        Cells in a row, at least 2.
    generator : torch.Generator, optional
        On the CPU, where everything is drawn.

    Returns
    -------
    SymbolData
        On the CPU, where it was drawn.

    Raises
    ------
    ValueError
        If `n` is negative or `length` less than 2.

    Notes
    -----
    Source: reconstructed, a task with a required depth that is known: no rule with one depth for all samples
    can be good and cheap at once.

    Examples
    --------
    >>> data = first_symbol(4, length=6, generator=torch.Generator().manual_seed(0))
    >>> bool((data.x[torch.arange(4), 1 + data.y, data.distance] == 1).all())
    True
    """
    _check_count(n)
    _check_length(length)
    distance = torch.randint(1, length, (n,), generator=generator)
    symbol = torch.randint(1, SYMBOLS + 1, (n, length), generator=generator)
    symbol = symbol.where(torch.arange(length) >= distance[:, None], 0)
    x = torch.zeros(n, SYMBOLS + 2, length)
    x[:, : SYMBOLS + 1] = one_hot(symbol, SYMBOLS + 1).transpose(1, 2)
    x[:, SYMBOLS + 1, 0] = 1
    y = symbol.gather(1, distance[:, None])[:, 0] - 1
    return SymbolData(x, y, distance, (distance + 1) // 2)


def fixed_depth_ceiling(depth: int | Tensor, *, length: int = 24, reach: int = 2) -> Tensor:
    """Return the best accuracy on `first_symbol` of any rule that gives every sample the same depth.

    Parameters
    ----------
    depth : int or Tensor
        Steps, at least 0; any shape.
    length : int
        Cells in a row, at least 2.
    reach : int
        Cells that information moves in a step, at least 1; two convolutions of width 3 make 2.

    Returns
    -------
    Tensor
        Float32 of the shape of `depth`.

    Raises
    ------
    ValueError
        If an argument is too small.

    Notes
    -----
    Source: reconstructed. After `t` steps the symbol has arrived in a share `min(reach * t, length - 1) /
    (length - 1)` of the samples; in the others every label is as likely as any other.

    Examples
    --------
    >>> round(fixed_depth_ceiling(8).item(), 3)
    0.772
    """
    _check_length(length, reach)
    depth = torch.as_tensor(depth)
    if bool((depth < 0).any()):
        raise ValueError(f"depth must be at least 0, got {depth.min()}: a map cannot be undone")
    arrived = (reach * depth).clamp(max=length - 1) / (length - 1)
    return 1 / SYMBOLS + (1 - 1 / SYMBOLS) * arrived


def mean_required_steps(*, length: int = 24, reach: int = 2) -> float:
    """Return the mean depth of a rule on `first_symbol` that stops as soon as the symbol can have arrived.

    Parameters
    ----------
    length : int
        Cells in a row, at least 2.
    reach : int
        Cells that information moves in a step, at least 1.

    Returns
    -------
    float
        The mean of `ceil(distance / reach)`.

    Raises
    ------
    ValueError
        If an argument is too small.

    Notes
    -----
    Source: reconstructed. No rule that is always right can stop sooner on average.

    Examples
    --------
    >>> round(mean_required_steps(), 2)
    6.26
    """
    _check_length(length, reach)
    return sum(-(-distance // reach) for distance in range(1, length)) / (length - 1)


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}: there is no negative number of samples")


def _check_length(length: int, reach: int = 1) -> None:
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}: there is no cell beside the query")
    if reach < 1:
        raise ValueError(f"reach must be at least 1, got {reach}: nothing would ever arrive")
