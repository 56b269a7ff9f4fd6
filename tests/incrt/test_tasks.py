"""The tasks with known attention: what is asked, and what can be known without looking back."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from geomlib.incrt.tasks import (
    FILLERS,
    IGNORED,
    NEGATIVE,
    POSITIVE,
    VOCABULARY,
    multi_offset_copy,
    sentiment_score,
    sentiment_with_negation,
)


def draw(seed):
    return torch.Generator().manual_seed(seed)


def tokens(text):
    return torch.tensor([VOCABULARY.index(word) for word in text.split()])


def score_word_by_word(x):
    """Apply the rule of the language with a loop, the slow way."""
    total, before = 0, None
    for word in (VOCABULARY[token] for token in x.tolist()):
        value = (word in POSITIVE) - (word in NEGATIVE)
        total += {"not": -1, "very": 3}.get(before, 1) * value
        before = word
    return total


@pytest.mark.parametrize(("offsets", "length"), [(1, 2), (3, 12), (4, 5)])
def test_every_place_is_asked_for_the_symbols_before_it(offsets, length):
    data = multi_offset_copy(20, offsets=offsets, length=length, generator=draw(0))
    for row, asked in zip(data.x, data.y, strict=True):
        for place in range(length):
            for k in range(1, offsets + 1):
                wanted = row[place - k] if place >= k else IGNORED
                assert asked[place, k - 1] == wanted


def test_places_without_a_predecessor_do_not_count_in_the_loss():
    data = multi_offset_copy(50, offsets=3, generator=draw(1))
    logits = torch.randn(50, 12, 3, 5, generator=draw(2))
    everything = cross_entropy(logits.flatten(0, 2), data.y.flatten())
    asked = data.y != IGNORED
    assert asked.sum() == 50 * (11 + 10 + 9)
    torch.testing.assert_close(everything, cross_entropy(logits[asked], data.y[asked]))


def test_symbols_are_uniform_and_tell_nothing_of_their_neighbours():
    data = multi_offset_copy(20_000, offsets=1, symbols=5, length=2, generator=draw(3))
    pairs = (5 * data.x[:, 0] + data.x[:, 1]).bincount(minlength=25)
    # Counts are binomial, 800 +- 28; the largest of 25 lies within four deviations.
    assert (pairs - 800).abs().max() < 4 * 28


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("good", 1),
        ("bad", -1),
        ("not good", -1),
        ("not bad", 1),
        ("very good", 3),
        ("very bad", -3),
        ("not very good", 3),
        ("very not good", -1),
        ("not the good", 1),
        ("good not", 1),
        ("not not good", -1),
        ("the film was very lovely and not cold", 4),
    ],
)
def test_the_word_before_decides_how_a_word_counts(text, score):
    assert sentiment_score(tokens(text)).item() == score == score_word_by_word(tokens(text))


def test_scores_of_a_batch_are_those_of_the_loop():
    x = torch.randint(len(VOCABULARY), (300, 16), generator=draw(4))
    assert sentiment_score(x).tolist() == [score_word_by_word(row) for row in x]


def test_labels_are_the_signs_of_the_scores_and_no_sentence_is_a_tie():
    data = sentiment_with_negation(2000, generator=draw(5))
    score = sentiment_score(data.x)
    assert data.x.shape == (2000, 16)
    assert (score != 0).all()
    assert torch.equal(data.y, (score > 0).long())
    # The language is symmetric under exchange of good and bad words: half of the labels are 1, +- 22.
    assert abs(int(data.y.sum()) - 1000) < 4 * 22.4


def test_words_come_with_the_shares_that_are_asked_for():
    shares = (0.4, 0.2, 0.1, 0.3)
    data = sentiment_with_negation(5000, shares=shares, generator=draw(6))
    counts = data.x.flatten().bincount(minlength=len(VOCABULARY)).double()
    assert len(counts) == len(VOCABULARY) == 28
    valued, fillers = counts[:16], counts[18:]
    # Within a group the counts differ as Poisson counts do; four deviations are allowed.
    for group in (valued, fillers):
        assert ((group - group.mean()).abs() < 4 * group.mean().sqrt()).all()
    # Ties are dropped, about a sixth of all, and they hold fewer words with a value: 2 % either way.
    found = [valued.sum(), counts[16], counts[17], fillers.sum()]
    assert (torch.stack(found) / counts.sum()).tolist() == pytest.approx(shares, abs=0.02)
    assert len(FILLERS) == len(fillers)


def test_counting_words_without_their_neighbours_is_not_enough():
    data = sentiment_with_negation(5000, generator=draw(7))
    value = (data.x < 8).long() - ((data.x >= 8) & (data.x < 16)).long()
    guess = value.sum(1)
    right = ((guess > 0).long() == data.y)[guess != 0].float().mean()
    assert 0.6 < right < 0.9


@pytest.mark.parametrize(
    "task", [lambda n, **k: multi_offset_copy(n, offsets=2, **k), sentiment_with_negation]
)
def test_the_same_seed_draws_the_same_samples(task):
    first, again, other = (task(20, generator=draw(seed)) for seed in (8, 8, 9))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, other.x)
    assert len(task(0, generator=draw(0)).x) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_offset_copy(-1, offsets=1), "n must be at least 0, got -1"),
        (lambda: multi_offset_copy(1, offsets=0), r"offsets must lie in 1\.\.11, got 0"),
        (lambda: multi_offset_copy(1, offsets=12), r"offsets must lie in 1\.\.11, got 12"),
        (lambda: multi_offset_copy(1, offsets=1, symbols=1), "symbols must be at least 2, got 1"),
        (lambda: multi_offset_copy(1, offsets=1, length=1), "length must be at least 2, got 1"),
        (lambda: sentiment_with_negation(-2), "n must be at least 0, got -2"),
        (lambda: sentiment_with_negation(1, length=1), "length must be at least 2, got 1"),
        (lambda: sentiment_with_negation(1, shares=(0.5, 0.5, 0.5, 0.5)), "shares must be four numbers"),
        (lambda: sentiment_with_negation(1, shares=(0.0, 0.5, 0.5, 0.0)), "every sentence is a tie"),
        (lambda: sentiment_score(torch.tensor([28])), "x must hold indices into the 28 words"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
