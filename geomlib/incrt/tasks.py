"""Two sequence tasks whose attention is known beforehand: copies of several offsets, and words that negate.

In the first every head can serve one offset, so the number of heads that is needed is planted. In the second
a word changes the meaning of the word behind it. Both need attention that tells before from behind, which is
what the antisymmetric part of a head carries. Neither comes from arXiv:2604.01880, which has no experiments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FILLERS",
    "IGNORED",
    "NEGATION",
    "NEGATIVE",
    "POSITIVE",
    "STRENGTHENING",
    "VOCABULARY",
    "CopyData",
    "SentimentData",
    "multi_offset_copy",
    "sentiment_score",
    "sentiment_with_negation",
]

IGNORED = -100
"""Label of a place where nothing is asked: what `cross_entropy` leaves out."""

POSITIVE = ("good", "great", "fine", "lovely", "warm", "clever", "fresh", "kind")
NEGATIVE = ("bad", "awful", "poor", "ugly", "cold", "silly", "stale", "mean")
NEGATION, STRENGTHENING = "not", "very"
FILLERS = ("the", "a", "film", "book", "was", "is", "and", "it", "this", "with")
VOCABULARY = (*POSITIVE, *NEGATIVE, NEGATION, STRENGTHENING, *FILLERS)
"""The 28 words; a token is an index into them."""

_GROUPS = (len(POSITIVE) + len(NEGATIVE), 1, 1, len(FILLERS))


class CopyData(NamedTuple):
    """Rows of symbols, and what stood a few places before each of them.

    Attributes
    ----------
    x : Tensor
        `(n, length)` int64 in 0..symbols - 1.
    y : Tensor
        `(n, length, offsets)` int64: `y[:, i, k - 1]` is `x[:, i - k]`, and `IGNORED` where `i < k`.

    Examples
    --------
    >>> multi_offset_copy(3, offsets=2, generator=torch.Generator().manual_seed(0)).y.shape
    torch.Size([3, 12, 2])
    """

    x: Tensor
    y: Tensor


class SentimentData(NamedTuple):
    """Sentences of a small language, and whether they speak well of something.

    Attributes
    ----------
    x : Tensor
        `(n, length)` int64, indices into `VOCABULARY`.
    y : Tensor
        `(n,)` int64: 1 where the score of the sentence is positive, 0 where it is negative.

    Examples
    --------
    >>> data = sentiment_with_negation(2, length=5, generator=torch.Generator().manual_seed(1))
    >>> data.x.shape, data.y.dtype
    (torch.Size([2, 5]), torch.int64)
    """

    x: Tensor
    y: Tensor


def multi_offset_copy(
    n: int,
    *,
    offsets: int,
    symbols: int = 5,
    length: int = 12,
    generator: torch.Generator | None = None,
) -> CopyData:
    """Draw rows of symbols; at every place the task is to name each of the last `offsets` symbols before it.

    Symbols are independent and uniform, so nothing but the token at the asked distance helps: without it the
    best guess is right once in `symbols` times. An attention head attends in one way to each place and hands
    on a mean of values of `dv` numbers. With `dv = symbols - 1`, as many as it takes to tell the symbols
    apart, a head can serve about one offset, and `offsets` is the planted number of heads.

    Parameters
    ----------
    n : int
        Number of rows, at least 0.
    offsets : int
        How many predecessors are asked for, at least 1 and below `length`.
    symbols : int
        Size of the alphabet, at least 2.
    length : int
        Symbols in a row, at least 2.
    generator : torch.Generator, optional
        On the CPU, where everything is drawn.

    Returns
    -------
    CopyData
        On the CPU, where it was drawn.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: reconstructed, a task with a planted number of heads; the paper has no experiments. The count is
    planted for attention alone. A feed-forward block that can decode mixtures makes do with fewer heads.

    Examples
    --------
    >>> data = multi_offset_copy(1, offsets=2, length=4, generator=torch.Generator().manual_seed(0))
    >>> data.x.tolist(), data.y.tolist()
    ([[4, 4, 3, 0]], [[[-100, -100], [4, -100], [4, 4], [3, 4]]])
    """
    _check_count(n)
    if symbols < 2:
        raise ValueError(f"symbols must be at least 2, got {symbols}: there would be nothing to tell apart")
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}: no place would have one before it")
    if not 1 <= offsets < length:
        raise ValueError(
            f"offsets must lie in 1..{length - 1}, got {offsets}: no place of {length} has a symbol that far"
        )
    x = torch.randint(symbols, (n, length), generator=generator)
    y = torch.full((n, length, offsets), IGNORED)
    for k in range(1, offsets + 1):
        y[:, k:, k - 1] = x[:, :-k]
    return CopyData(x, y)


def sentiment_score(x: Tensor) -> Tensor:
    """Return the score of sentences: the sum over their words, each as the word before it lets it count.

    A positive word counts 1, a negative one -1. Directly behind "not" it counts with the other sign, directly
    behind "very" three times. Everything else counts nothing; "not very good" is "very good", since "not"
    reaches no further than the next word.

    Parameters
    ----------
    x : Tensor
        `(..., length)` int64, indices into `VOCABULARY`.

    Returns
    -------
    Tensor
        `(...)` int64.

    Raises
    ------
    ValueError
        If a token is no word.

    Notes
    -----
    Source: reconstructed, the rule behind the labels of `sentiment_with_negation`.

    Examples
    --------
    >>> def tokens(text):
    ...     return torch.tensor([VOCABULARY.index(word) for word in text.split()])
    >>> [sentiment_score(tokens(text)).item() for text in ("good film", "not good", "very bad", "very good")]
    [1, -1, -3, 3]
    """
    if x.numel() and not bool(((x >= 0) & (x < len(VOCABULARY))).all()):
        raise ValueError(
            f"x must hold indices into the {len(VOCABULARY)} words, got {x.min()}..{x.max()}: no such word"
        )
    positive, negative = len(POSITIVE), len(POSITIVE) + len(NEGATIVE)
    value = (x < positive).long() - ((x >= positive) & (x < negative)).long()
    before = x[..., :-1]
    factor = torch.ones_like(x)
    factor[..., 1:] += 2 * (before == negative + 1).long() - 2 * (before == negative).long()
    return (value * factor).sum(-1)


def sentiment_with_negation(
    n: int,
    *,
    length: int = 16,
    shares: tuple[float, float, float, float] = (0.4, 0.15, 0.1, 0.35),
    generator: torch.Generator | None = None,
) -> SentimentData:
    """Draw sentences of independent words, without those whose score is a tie.

    Counting good and bad words alone is a fair guess; to be right one has to see what stands before each.

    Parameters
    ----------
    n : int
        Number of sentences, at least 0.
    length : int
        Words in a sentence, at least 2.
    shares : tuple of float
        How often a word with a value comes, "not", "very", and a filler; they add up to 1.
    generator : torch.Generator, optional
        On the CPU, where everything is drawn.

    Returns
    -------
    SentimentData
        On the CPU, where it was drawn.

    Raises
    ------
    ValueError
        If a number is out of range or the shares are none.

    Notes
    -----
    Source: reconstructed, a small stand-in for the sentiment task that arXiv:2604.10703 names, with the rule
    of the language known.

    Examples
    --------
    >>> data = sentiment_with_negation(500, generator=torch.Generator().manual_seed(0))
    >>> bool(((sentiment_score(data.x) > 0) == (data.y == 1)).all())
    True
    """
    _check_count(n)
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}: no word would have one before it")
    if len(shares) != 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise ValueError(
            f"shares must be four numbers that add up to 1, the first above 0, got {shares}: "
            "without words that count every sentence is a tie"
        )
    weights = torch.cat(
        [torch.full((size,), share / size) for size, share in zip(_GROUPS, shares, strict=True)]
    )
    kept = torch.empty(0, length, dtype=torch.int64)
    while len(kept) < n:
        x = torch.multinomial(weights, max(n, 16) * length, replacement=True, generator=generator)
        x = x.view(-1, length)
        kept = torch.cat([kept, x[sentiment_score(x) != 0]])
    x = kept[:n]
    return SentimentData(x, (sentiment_score(x) > 0).long())


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}: there is no negative number of samples")
