"""Laws of the quantile sketch, with the sorted stream beside it as the oracle."""

import math

import numpy as np
import pytest
import torch

from geomlib.frost.sketch import KLLSketch, QuantileSketch

N = 100_000
STREAMS = {
    "uniform": lambda generator: torch.rand(N, generator=generator),
    "sorted": lambda generator: torch.arange(float(N)),
    "reversed": lambda generator: -torch.arange(float(N)),
    "duplicates": lambda generator: torch.randint(0, 7, (N,), generator=generator).float(),
}
K = 200
BOUND = 2.5 * 1.65 / K
LEVELS = [(i + 0.5) / 50 for i in range(50)]


def fill(stream, batch, generator, k=K):
    sketch = KLLSketch(k, generator=generator)
    for part in stream.split(batch):
        sketch.update(part)
    return sketch


def worst_rank_error(sketch, stream):
    """Return the largest distance of a level from the ranks that its value occupies in the stream."""
    exact = np.sort(stream.double().numpy())
    worst = 0.0
    for q in LEVELS:
        value = sketch.quantile(q)
        below = np.searchsorted(exact, value, side="left") / len(exact)
        upto = np.searchsorted(exact, value, side="right") / len(exact)
        worst = max(worst, below - q, q - upto)
    return worst


@pytest.mark.parametrize("batch", [N, 3000, 61])
@pytest.mark.parametrize("name", STREAMS)
def test_ranks_are_right_up_to_the_bound_of_the_paper(name, batch, generator):
    stream = STREAMS[name](generator)
    sketch = fill(stream, batch, generator)
    assert worst_rank_error(sketch, stream) <= BOUND
    assert sketch.rank(math.inf) == sketch.n == N
    assert sketch.minimum == sketch.quantile(0) == stream.min()
    assert sketch.maximum == sketch.quantile(1) == stream.max()


def test_memory_stays_bounded(generator):
    sketch = KLLSketch(K, generator=generator)
    for part in torch.rand(N, generator=generator).split(97):
        sketch.update(part)
        assert len(sketch.state_dict()["items"]) <= 4 * K


def test_rank_is_the_inverse_of_the_quantile(generator):
    stream = torch.rand(N, generator=generator)
    sketch = fill(stream, 1000, generator)
    for q in LEVELS:
        assert abs(sketch.rank(sketch.quantile(q)) / N - q) <= BOUND
        assert abs(sketch.rank(q) / N - q) <= BOUND


def test_a_short_stream_is_kept_whole(generator):
    stream = torch.randn(150, generator=generator)
    sketch = fill(stream, 10, generator)
    exact = stream.double().sort().values
    for q in LEVELS:
        assert sketch.quantile(q) == exact[math.ceil(q * 150) - 1]
        assert sketch.rank(float(exact[10])) == 11


def test_error_shrinks_with_k(generator):
    stream = torch.rand(N, generator=generator)
    errors = [worst_rank_error(fill(stream, 100, generator, k), stream) for k in (20, 100, 500)]
    assert errors[0] > errors[1] > errors[2]


def test_merged_sketches_see_both_streams(generator):
    left, right = torch.rand(N, generator=generator), 0.5 + 3 * torch.rand(N // 3, generator=generator)
    first, second = fill(left, 500, generator), fill(right, 70, generator)
    before = second.state_dict()["items"]
    first.merge(second)
    both = torch.cat([left, right])
    assert first.n == len(both) == first.rank(math.inf)
    assert worst_rank_error(first, both) <= BOUND
    assert (first.minimum, first.maximum) == (both.min(), both.max())
    assert torch.equal(second.state_dict()["items"], before)


def test_merging_into_an_empty_sketch_copies(generator):
    full, empty = fill(torch.rand(N, generator=generator), 500, generator), KLLSketch(K)
    empty.merge(full)
    assert [empty.quantile(q) for q in LEVELS] == [full.quantile(q) for q in LEVELS]


def test_values_that_are_not_finite_are_counted_and_dropped():
    sketch = KLLSketch()
    sketch.update(torch.tensor([[1.0, torch.nan], [-torch.inf, 2.0], [torch.inf, 3.0]]))
    sketch.update(torch.tensor([torch.nan]))
    assert (sketch.n, sketch.dropped) == (3, 4)
    assert (sketch.minimum, sketch.quantile(0.5), sketch.maximum) == (1, 2, 3)


def test_empty_tensors_change_nothing():
    sketch = KLLSketch()
    sketch.update(torch.empty(0, 4))
    assert (sketch.n, sketch.dropped, sketch.rank(0.0)) == (0, 0, 0)


def test_the_same_seed_gives_the_same_sketch():
    stream = torch.rand(N, generator=torch.Generator().manual_seed(5))
    first, second, third = (fill(stream, 300, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    items = [sketch.state_dict()["items"] for sketch in (first, second, third)]
    assert torch.equal(items[0], items[1])
    assert not (len(items[0]) == len(items[2]) and torch.equal(items[0], items[2]))


def test_a_restored_sketch_goes_on_as_the_first_would_have(generator):
    stream = torch.randn(N, generator=generator)
    first, second = fill(stream[: N // 2], 300, generator), KLLSketch(8)
    second.load_state_dict(first.state_dict())
    for part in stream[N // 2 :].split(41):
        first.update(part)
        second.update(part)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_tensors_of_every_device_and_dtype_are_taken(device):
    for dtype in (torch.float32, torch.bfloat16):
        sketch = KLLSketch()
        sketch.update(torch.tensor([[0.5, 0.25]], dtype=dtype).to(device).requires_grad_())
        assert (sketch.n, sketch.minimum, sketch.maximum) == (2, 0.25, 0.5)


def test_it_is_the_sketch_that_halting_asks_for():
    assert isinstance(KLLSketch(), QuantileSketch)


def test_bad_arguments_are_refused(generator):
    sketch = KLLSketch()
    with pytest.raises(ValueError, match="k must be at least 8, got 3"):
        KLLSketch(3)
    with pytest.raises(ValueError, match="must have taken a value"):
        sketch.quantile(0.5)
    with pytest.raises(ValueError, match="values must be floating point"):
        sketch.update(torch.arange(3))
    with pytest.raises(ValueError, match="must have the same k, got 200 and 100"):
        sketch.merge(KLLSketch(100))
    sketch.update(torch.rand(1000, generator=generator))
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]"):
            sketch.quantile(q)
    state = sketch.state_dict()
    with pytest.raises(ValueError, match="got none of items"):
        sketch.load_state_dict({name: value for name, value in state.items() if name != "items"})
    with pytest.raises(ValueError, match="must be that of one sketch"):
        sketch.load_state_dict({**state, "n": state["n"] + 1})
